"""Writes what a run was and found into its report.md:   python -m mmjax.tools.report --workdir out/exp_1_4_2

Made from the files of the run directory alone: config.json, run.json, data.json, metrics.jsonl, eval.json and the best
checkpoint (for samples, where eval.json has none). Facts only: purpose and judgement are a person's, who writes them
into notes.md. That file is made once with open questions, never changed afterwards, and shown in the report.
"""

from mmjax.console import command_parser
from mmjax.errors import interrupt_ends_at_once, run_command


def main() -> None:
  """Writes the report of one run directory."""
  parser = command_parser('report', __doc__)
  parser.add_argument('--workdir', required=True, help='run directory, as train.py makes it')
  workdir = parser.parse_args().workdir

  with interrupt_ends_at_once():
    from mmjax.report.write import write_report  # only now: --help and bad flags need not wait for JAX

  print(write_report(workdir))


if __name__ == '__main__':
  run_command(main)
