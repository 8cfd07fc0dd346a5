"""Writes report.md: what a run was and found, from the files of its directory alone. See mmjax/tools/report.py."""

import shlex
import warnings
from pathlib import Path

import jax

from mmjax import __version__
from mmjax.console import markdown
from mmjax.errors import CommandError, UserError
from mmjax.files import utc_now, write_file
from mmjax.report import sections
from mmjax.report.found import FoundRun
from mmjax.report.plots import write_plots
from mmjax.run.compressed import compressed_from, compressed_remark
from mmjax.run.identity import bank_remark

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
  run = FoundRun(workdir)
  try:
    content = _sections(run, workdir)
  except (KeyError, TypeError, AttributeError) as error:  # records that are JSON and not what was written
    raise UserError(f'{workdir}: a record in metrics.jsonl or eval.json is damaged: {error!r}') from error
  time, experiment, directory = utc_now(), run.config.experiment, run.path.resolve().name
  title = experiment if directory == experiment else f'{experiment}: {directory}'
  head = f'# {title}\n\nWritten {time} by mmjax {__version__} from the files in this directory.\n'
  bodies = {title: markdown(*blocks) for title, blocks in content.items()}
  path = run.path / 'report.md'
  write_file(path, head + ''.join(f'\n## {title}\n\n{body}' for title, body in bodies.items() if body))
  return path


def _sections(run: FoundRun, workdir: str | Path) -> dict[str, sections.Blocks]:
  config, found = run.config, run.evaluation
  plots = write_plots(run.records, run.path / 'plots')
  health = {name: text for name, text in plots.items() if name.startswith('bank_')}
  curves = {name: text for name, text in plots.items() if name not in health}
  not_done = f'Not done yet: `python eval.py --workdir {shlex.quote(str(workdir))}`'
  return {
    'Result': [compressed_remark(run.dir), *sections.result(run)],
    'Data': sections.data(run),
    'Bank file': [bank_remark(run.dir, config)],
    'Parameters': sections.parameters(run),
    'Settings': sections.settings(run),
    'Training': [*sections.training(run), *sections.images(curves)],
    'Bank health': [*sections.last_bank_health(run), *sections.images(health)],
    'Evaluation': sections.evaluation(found) if found else [not_done],
    'Samples': _samples(run),
    'Speed and memory': sections.speed(run),
    'Machine and versions': sections.environment(run),
    'Commands to repeat it': [
      sections.not_repeated(run),
      sections.commands(config, workdir, run.history.get('init_from'), compressed_from(run.dir)),
    ],
    'Notes of a person': _notes(run.path / 'notes.md'),
  }


def _samples(run: FoundRun) -> sections.Blocks:
  """Returns continuations, from eval.json or made now, and where they come from, or why there are none."""
  if run.evaluation:
    return sections.samples(run.evaluation, f'From eval.json, checkpoint {sections.evaluated(run.evaluation)}.')
  if jax.process_count() > 1:  # all of them would have to read the checkpoint, and one writes the report
    return ['None: the run had several processes; eval.py makes them.']
  from mmjax.inference.api import load  # a report with an eval.json needs no model
  from mmjax.inference.measure import beginnings, continue_prompts, open_text
  from mmjax.inference.settings import Sampling

  try:
    lm = load(run.path)
    with warnings.catch_warnings(action='ignore'):  # rows may be shorter than a prompt: then its end is used
      found = continue_prompts(lm, beginnings(open_text(lm.config, run.dir)), Sampling())
  except CommandError as error:
    return [f'None: {error}.']
  return sections.samples(found, f'Best checkpoint so far, step {lm.step}.')


def _notes(path: Path) -> sections.Blocks:
  if not path.exists():
    write_file(path, NOTES)
  text = path.read_text(encoding='utf-8', errors='replace')
  return ['From notes.md, which is yours to edit and is never overwritten.', text]
