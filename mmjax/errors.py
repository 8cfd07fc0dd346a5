"""What can stop a command, and the exit code it stops with.

0 done, 2 user error, 3 diverged, 4 storage, 75 stopped and resumable (75 is EX_TEMPFAIL of sysexits.h).
"""

import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class CommandError(Exception):
  """A failure that one sentence explains; `run_command` prints the sentence, without a traceback."""

  exit_code = 1


class UserError(CommandError, ValueError):
  """Bad input: a path, a value, a file's content, a work directory that belongs to something else."""

  exit_code = 2


class DivergedError(CommandError):
  """Training produced non-finite updates too often."""

  exit_code = 3


class StorageError(CommandError):
  """State could not be written, or nothing whole is left to read."""

  exit_code = 4


class StoppedError(CommandError):
  """A signal ended the run after its state was saved; the same command resumes it."""

  exit_code = 75


def run_command(main: Callable[[], None]) -> None:
  """Runs a command's `main` and turns what stopped it into one sentence on stderr and an exit code."""
  try:
    main()
  except CommandError as error:
    print(f'{error}', file=sys.stderr)
    sys.exit(error.exit_code)
  except KeyboardInterrupt:
    print('Interrupted.', file=sys.stderr)
    sys.exit(130)


@contextmanager
def interrupt_ends_at_once() -> Iterator[None]:
  """Makes Ctrl-C end the process here and now; for imports, in which libraries swallow a KeyboardInterrupt."""

  def end(*_: object) -> None:
    os.write(2, b'Interrupted.\n')
    os._exit(130)

  previous = signal.signal(signal.SIGINT, end)
  try:
    yield
  finally:
    signal.signal(signal.SIGINT, previous)
