"""One run of a sweep, in a process of its own:   python -m mmjax.tools.sweep_child --config FILE ... --workdir DIR

Takes train.py's arguments and trains as it does, without a report at the end. It ends with the sweep that started it.
"""

import argparse
import ctypes
import signal
import sys
from pathlib import Path

from mmjax.config import load_config
from mmjax.errors import run_command

PR_SET_PDEATHSIG = 1  # of Linux's prctl(2)


def main() -> None:
  """Flags -> config -> fit."""
  die_with_parent()
  parser = argparse.ArgumentParser(
    prog='python -m mmjax.tools.sweep_child', description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('--config', required=True, help='config file')
  parser.add_argument('--workdir', required=True, type=Path, help='where the run lives')
  arguments, overrides = parser.parse_known_args()
  config = load_config(arguments.config, overrides)

  from mmjax.training.loop import fit  # only now: bad settings need not wait for JAX

  fit(config, arguments.workdir)


def die_with_parent() -> None:
  """Asks Linux to send this process a SIGTERM, upon which a run saves, when its parent dies, however it dies."""
  if sys.platform == 'linux':
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


if __name__ == '__main__':
  run_command(main)
