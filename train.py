"""Trains a model:   python train.py --config configs/exp_1_4_2.py [--config.section.field=value ...] [--workdir DIR]

The same command on the same work directory goes on where it stopped. Exit codes: 0 done, 2 user error, 3 diverged,
4 storage, 75 stopped by a signal after saving, or because another process of the run was lost.
"""

import argparse


def main() -> None:
  """Flags -> config -> `fit`, in mmjax/training/loop.py, which comes next on the way to the gradient -> report."""
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--config', required=True, help='a config file, such as configs/exp_1_4_2.py')
  parser.add_argument('--workdir', help='where the run lives (default: out/<experiment>)')
  parser.add_argument(
    '--allow_config_change', action='store_true', help='resume with other schedule settings (train.*)'
  )
  parser.add_argument(
    '--init_from', metavar='RUN[@CHECKPOINT]',
    help='start from the weights and the tokenizer of another run: of its best checkpoint, @last or @STEP',
  )  # fmt: skip
  args, overrides = parser.parse_known_args()

  from mmjax.config import load_config, user_path
  from mmjax.errors import interrupt_ends_at_once

  config = load_config(args.config, overrides)

  with interrupt_ends_at_once():  # only now: bad settings need not wait for JAX
    from mmjax.report.write import write_report
    from mmjax.run.processes import is_main
    from mmjax.training.loop import fit

  workdir = user_path(f'out/{config.experiment}' if args.workdir is None else args.workdir)
  fit(config, workdir, allow_config_change=args.allow_config_change, init_from=args.init_from)
  if is_main():
    print(f'Report: {write_report(workdir)}')


if __name__ == '__main__':
  from mmjax.errors import run_command

  run_command(main)
