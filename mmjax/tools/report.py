"""Writes what a run was and found into its report.md:   python -m mmjax.tools.report --workdir out/exp_1_4_2

Made from the files of the run directory alone: config.json, run.json, data.json, metrics.jsonl, eval.json and the best
checkpoint (for samples, where eval.json has none). Facts only: purpose and judgement are a person's, who writes them
into notes.md. That file is made once with open questions, never changed afterwards, and shown in the report.
"""

import argparse
import datetime
import warnings
from pathlib import Path
from typing import Any

import jax

from mmjax import __version__
from mmjax.errors import CommandError, UserError, run_command
from mmjax.files import read_json, write_file
from mmjax.run.directory import RunDir
from mmjax.run.identity import bank_remark
from mmjax.run.log import read_metrics
from mmjax.tools import report_parts as parts
from mmjax.tools.plots import write_plots

NOTES = """\
- Builds on:
- Question:
- Hypothesis:
- Expected result:
- Quality of the samples (coherence, fluency, variety), and by what standard:
- Was the hypothesis confirmed, and how sure is that:
- What did not go as planned:
- What to do next:
"""


def write_report(workdir: str | Path) -> Path:
  """Writes report.md and plots/*.png from what the run directory holds, however far the run came.

  Returns:
    The path of the report.

  Raises:
    UserError: if the directory is not a run, or a record in it is damaged.
    StorageError: if the report cannot be written.
  """
  try:
    return _write_report(workdir)
  except (KeyError, TypeError, AttributeError) as error:  # records that are JSON and not what was written
    raise UserError(f'{workdir}: a record in metrics.jsonl or eval.json is damaged: {error!r}') from error


def _write_report(workdir: str | Path) -> Path:
  run = RunDir(workdir)
  if not run.config_path.is_file():
    raise UserError(f'{run.path} is not a run directory: {run.config_path.name} is missing')
  config = run.read_config()
  records = read_metrics(run.metrics_path) if run.metrics_path.exists() else []
  history = run.read_record()
  index = _read_optional(run.path / 'data.json')
  evaluation = _read_optional(run.path / 'eval.json')
  plots = write_plots(records, run.path / 'plots')
  curves = {name: text for name, text in plots.items() if not name.startswith('bank_')}
  health = {name: text for name, text in plots.items() if name.startswith('bank_')}
  sections = {
    'Result': parts.result(config, records, index),
    'Data': parts.data(index, history['identity'], history['starts']),
    'Bank file': bank_remark(run, config),
    'Parameters': parts.parameters(config),
    'Settings': parts.settings(config),
    'Training': parts.origin(history.get('init_from'))
    + parts.training(records, history['starts'])
    + parts.images(curves),
    'Bank health': parts.bank_health(records) + parts.images(health),
    'Evaluation': parts.evaluation(evaluation, workdir),
    'Samples': parts.samples(*_samples(run, evaluation)),
    'Speed and memory': parts.speed(records),
    'Machine and versions': parts.environment(history['starts']),
    'Commands to repeat it': parts.commands(config, workdir, history.get('init_from')),
    'Notes of a person': _notes(run.path / 'notes.md'),
  }
  time = datetime.datetime.now(datetime.UTC).isoformat(timespec='seconds')
  head = f'# {config.experiment}\n\nWritten {time} by mmjax {__version__} from the files in this directory.\n'
  body = ''.join(f'\n## {title}\n\n{text.rstrip()}\n' for title, text in sections.items() if text)
  path = run.path / 'report.md'
  write_file(path, head + body)
  return path


def _read_optional(path: Path) -> Any:
  return read_json(path) if path.exists() else None


def _samples(run: RunDir, evaluation: dict[str, Any] | None) -> tuple[dict[str, Any] | None, str]:
  """Returns continuations, from eval.json or made now, and where they come from (or why there are none)."""
  if evaluation is not None:
    return evaluation, f'From eval.json, checkpoint {evaluation["checkpoint"]}.'
  if jax.process_count() > 1:  # all of them would have to read the checkpoint, and one writes the report
    return None, 'None: the run had several processes; eval.py makes them.'
  from mmjax.inference.api import load  # a report with an eval.json needs no model
  from mmjax.inference.measure import PROMPTS, continue_prompts, read_prompts
  from mmjax.inference.settings import Sampling

  try:
    lm = load(run.path)
    with warnings.catch_warnings(action='ignore'):  # rows may be shorter than a prompt: then its end is used
      return continue_prompts(lm, read_prompts(PROMPTS), Sampling()), f'Best checkpoint so far, step {lm.step}.'
  except CommandError as error:
    return None, f'None: {error}.'


def _notes(path: Path) -> str:
  if not path.exists():
    write_file(path, NOTES)
  text = path.read_text(encoding='utf-8', errors='replace')
  return f'From notes.md, which is yours to edit and is never overwritten.\n\n{text}'


def main() -> None:
  """Writes the report of one run directory."""
  parser = argparse.ArgumentParser(
    prog='python -m mmjax.tools.report', description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('--workdir', required=True, help='run directory, as train.py makes it')
  print(write_report(parser.parse_args().workdir))


if __name__ == '__main__':
  run_command(main)
