"""Starts processes that may be killed, quickly: all is imported once, and each request is served by a forked child.

A request is a JSON line on stdin, see `serve`; the answer on stdout comes when its child has ended. JAX is
imported here but not started, so that there is nothing which a fork would break. A child works as train.py does, on
real files, and dies by a real SIGKILL, which it sends itself at the n-th change that it makes to the file system or a
moment later.
"""

import json
import os
import signal
import sys
import threading
from pathlib import Path

from mmjax.config import config_from_dict
from mmjax.data import blocks, shards
from mmjax.data.prepare import prepare
from mmjax.errors import run_command
from mmjax.training.loop import fit

CHANGES = {'os.rename', 'os.remove', 'os.mkdir', 'os.rmdir', 'os.truncate', 'os.link', 'os.symlink', 'shutil.rmtree'}
LONGEST_SECONDS = 120  # after which a child that hangs is killed by SIGALRM


class Killer:
  """Counts the changes that this process makes to the file system, and kills it at a given one."""

  def __init__(self, kill_at: int | None, delay_seconds: float):
    self.changes, self._kill_at, self._delay_seconds = 0, kill_at, delay_seconds
    sys.addaudithook(self._on_event)

  def _on_event(self, event: str, args: tuple) -> None:
    writes = event == 'open' and isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR)
    if not writes and event not in CHANGES:
      return
    self.changes += 1
    if self.changes == self._kill_at:
      if self._delay_seconds:
        threading.Timer(self._delay_seconds, self._kill).start()
      else:
        self._kill()

  def _kill(self) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def work(request: dict) -> None:
  """Does what a request asks for, in the child."""
  output = os.open(request['output'], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
  os.dup2(output, 1)
  os.dup2(output, 2)
  signal.alarm(LONGEST_SECONDS)
  config = config_from_dict(request['config'])
  killer = Killer(request['kill_at'], request['delay_seconds'])
  if request['what'] == 'prepare':
    blocks.BLOCK_BYTES, shards.SHARD_TOKENS = 2000, 1500  # small, so that there is something to interrupt
    run_command(lambda: prepare(config.data, config.model.vocab_size))
  else:
    run_command(lambda: fit(config, Path(request['workdir'])))
  Path(request['output']).with_suffix('.changes').write_text(str(killer.changes))


def serve() -> None:
  """Answers requests until stdin closes.

  A request has `what` ('train' or 'prepare'), `config`, `workdir`, `output` (a file), `kill_at` (number of a change, or
  null) and `delay_seconds`. The answer is the child's exit code, or minus the signal that it died of.
  """
  print('ready', flush=True)
  for line in sys.stdin:
    child = os.fork()
    if not child:
      code = 1
      try:
        work(json.loads(line))
        code = 0
      except SystemExit as stopped:
        code = stopped.code
      finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


if __name__ == '__main__':
  serve()
