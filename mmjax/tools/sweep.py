"""Makes a list of runs, one after the other:   python -m mmjax.tools.sweep sweeps/memory.py [--set scale=gpu] ...

Each run is a process of its own and lives in <out>/<name>-s<seed>, as if train.py had made it. What is finished is
skipped, what was stopped goes on, a run that diverged or failed is noted in <out>/sweep.json and the next one starts.
Overrides --config.section.field=value apply to every run. What a run prints goes to <out>/logs.

Exit codes: 0 every run is done; 75 stopped by a signal or --max_minutes after saving: the same command goes on; else
that of the first run that is not done: 2 user error, 3 diverged, 4 storage, 1 crashed.
"""

import argparse
import shlex
import time
from pathlib import Path

from mmjax.choices import EVERY_RUN
from mmjax.config import user_path
from mmjax.console import command_parser
from mmjax.errors import StoppedError, UserError, interrupt_ends_at_once, run_command
from mmjax.tools.sweep_file import read_sweep


def main() -> None:
  """Reads flags and the file, and makes the runs or says what it would make."""
  arguments, overrides = _parser().parse_known_args()
  if not arguments.max_minutes >= 0:  # so is NaN
    raise UserError(f'--max_minutes {arguments.max_minutes:g} must be at least 0')
  with interrupt_ends_at_once():  # only now: --help and bad flags need not wait for JAX, which the file may import
    runs = read_sweep(arguments.file, arguments.set, overrides, arguments.only)
    from mmjax.files import locked_directory
    from mmjax.report.found import read_ended
    from mmjax.run.signals import StopSignals
    from mmjax.tools.sweep_runs import Sweep

  sweep = Sweep(user_path(Path('out') / Path(arguments.file).stem if arguments.out is None else arguments.out), runs)
  if arguments.dry_run:
    sweep.print_plan()
    return
  deadline = time.monotonic() + 60 * arguments.max_minutes if arguments.max_minutes else float('inf')
  with locked_directory(sweep.folder, sweep.refuse), StopSignals() as stop:
    sweep.ended = read_ended(sweep.folder)  # again: another sweep may have worked until now
    stopped = sweep.make(stop, deadline, arguments.retry)
  sweep.print_summary()
  if stopped:
    raise StoppedError(f'Stopped {stopped}; the same command goes on from there.')
  if any(ended['state'] == 'done' for ended in sweep.ended.values()):
    print(f'Compare them: python -m mmjax.tools.compare {shlex.quote(str(sweep.folder))}')
  sweep.raise_first_failure()


def _parser() -> argparse.ArgumentParser:
  parser = command_parser('sweep', __doc__)
  parser.add_argument('file', help='a sweep file, such as sweeps/memory.py')
  parser.add_argument('--out', help='folder of the runs (default: out/<name of the file>)')
  parser.add_argument(
    '--set', action='append', default=[], metavar='NAME=VALUE', help='an argument of the get_runs() in the file'
  )
  parser.add_argument('--only', default=EVERY_RUN, help="runs to make, comma-separated patterns: 'g0-*,g5-*'")
  parser.add_argument('--max_minutes', type=float, default=0.0, help='save and stop after so many (default: no limit)')
  parser.add_argument('--retry', action='store_true', help='start runs that diverged again')
  parser.add_argument('--dry_run', action='store_true', help='list the runs and how far they are; change nothing')
  return parser


if __name__ == '__main__':
  run_command(main)
