"""Evaluates a run:   python eval.py --workdir out/exp_1_4_2 [--checkpoint best] [--prompts FILE] [--valid_files GLOB]

Measures loss, perplexity, bits per byte, token accuracy and what the memory does on the whole validation set (defined
in mmjax/evaluation/probes.py; of several layers with a memory also the loss with the bank zero for one of them alone,
which takes a pass over at most 65,536 positions for each), continues prompts, prints both, writes them into eval.json
in the work directory and updates its report.md. --config.data.prepared_dir=DIR or --config.data.train_files=... say
where the run's own text is now, if it was moved. Exit codes: 0 done, 2 user error, 4 storage.
"""

import argparse
from typing import Any


def main() -> None:
  """Flags -> model -> numbers and continuations -> table, eval.json, report."""
  from mmjax.errors import interrupt_ends_at_once
  from mmjax.inference.settings import (
    add_model_flags,
    add_sampling_flags,
    model_from_flags,
    sampling_from_flags,
  )

  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--workdir', required=True, help='run directory, as train.py makes it')
  parser.add_argument('--prompts', help='text file, one prompt a line (default: how three held-out documents begin)')
  parser.add_argument('--valid_files', default='', help='other text to evaluate on: comma-separated paths or globs')
  add_model_flags(parser)
  add_sampling_flags(parser)
  arguments, overrides = parser.parse_known_args()
  sampling = sampling_from_flags(arguments)

  with interrupt_ends_at_once():
    from mmjax.config import check_output, override_config
    from mmjax.console import prepare_terminal
    from mmjax.files import write_json
    from mmjax.inference.api import load_run
    from mmjax.inference.measure import WHERE, beginnings, continue_prompts, measure_run, open_text, read_prompts
    from mmjax.report.write import write_report
    from mmjax.run.directory import open_run

  prepare_terminal()
  prompts = read_prompts(arguments.prompts) if arguments.prompts else []
  run = open_run(arguments.workdir)
  check_output('--workdir', str(run.path / 'eval.json'))
  config = override_config(run.read_config(), overrides, WHERE)
  lm = load_run(run, config, **model_from_flags(arguments))
  split = open_text(lm.config, run, arguments.valid_files)
  found = measure_run(lm, run, split, arguments.valid_files)
  found |= continue_prompts(lm, prompts or beginnings(split), sampling)
  try:  # before anything is printed, which nobody may want to read to its end
    write_json(run.path / 'eval.json', found)
    report = write_report(run.path)
  finally:
    print_evaluation(found)
  print(f'Written: {run.path / "eval.json"} and {report}')


def print_evaluation(found: dict[str, Any]) -> None:
  """Prints what was found as tables."""
  from rich.text import Text

  from mmjax.console import printable, show
  from mmjax.report import sections
  from mmjax.report.numbers import memory_tables

  show(*sections.evaluation(found), *memory_tables(found['bank'], found['probes']))
  for sample in found['samples']:
    parts = (
      (printable(sample['prompt']), 'bold'),
      (' | ', 'dim'),
      (printable(sample['continuation']) + '\n', 'not bold'),
    )
    show(Text.assemble(*parts))
  show(sections.variety(found))


if __name__ == '__main__':
  from mmjax.errors import run_command

  run_command(main)
