"""One run of a sweep, in a process of its own:   python -m mmjax.tools.sweep_child --config FILE ... --workdir DIR

Takes train.py's arguments and trains as it does, without a report at the end. It ends with the sweep that started it.
"""

import ctypes
import signal
import sys

from mmjax.config import load_config, user_path
from mmjax.console import command_parser
from mmjax.errors import run_command

PR_SET_PDEATHSIG = 1  # of Linux's prctl(2)


def main() -> None:
  """Flags -> config -> fit."""
  die_with_parent()
  parser = command_parser('sweep_child', __doc__)
  parser.add_argument('--config', required=True, help='config file')
  parser.add_argument('--workdir', required=True, help='where the run lives')
  arguments, overrides = parser.parse_known_args()
  config = load_config(arguments.config, overrides)

  from mmjax.training.loop import fit  # only now: bad settings need not wait for JAX

  fit(config, user_path(arguments.workdir))


def die_with_parent() -> None:
  """Sends this process SIGUSR1, upon which a run saves, when its parent dies, however it dies. On Linux.

  Not SIGTERM: the kernel tells of the death of each thread that was a parent, and a run takes a second SIGTERM for a
  wish to exit without saving.
  """
  if sys.platform == 'linux':
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGUSR1)


if __name__ == '__main__':
  run_command(main)
