"""Compares runs:   python -m mmjax.tools.compare out/g0-s0 out/g0-s1 out/g5-s0 [--out out/compare]

Also takes folders of runs, as mmjax.tools.sweep makes them. Writes compare.md with one table and its plots, and
compare.json with the numbers, and prints the table. Runs that differ only in their seed are one row. Where models were
trained on several numbers of tokens, each run with a schedule of its own, their lead over the first model is fitted
against tokens: runs of a model are told by their names, g42-3e6-s0 and g42-12e6-s0, or those of a sweep in several
folders, or by --models g0=g0-*,g42=g42-*. Losses of runs on other data or tokenizers say nothing about each other: such
runs are refused, or with --allow_other_data marked. Exit codes: 0 done, 2 user error, 4 storage.
"""

from mmjax.console import command_parser
from mmjax.errors import interrupt_ends_at_once, run_command


def main() -> None:
  """Reads flags, compares, and says where the result is."""
  parser = command_parser('compare', __doc__)
  parser.add_argument('runs', nargs='+', help='run directories, or folders of them; the first is the baseline')
  parser.add_argument('--out', default='out/compare', help='folder to write into (default: %(default)s)')
  parser.add_argument('--allow_other_data', action='store_true', help='mark runs on other data, not refuse them')
  parser.add_argument('--models', default='', help='names and patterns of the runs of each model: g0=g0-*,g42=g42-*')
  arguments = parser.parse_args()

  with interrupt_ends_at_once():
    from mmjax.report.compare import compare  # only now: --help and bad flags need not wait for JAX

  print(f'Written: {compare(arguments.runs, arguments.out, arguments.allow_other_data, arguments.models)}')


if __name__ == '__main__':
  run_command(main)
