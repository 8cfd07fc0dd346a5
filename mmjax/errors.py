"""What can stop a command, and the exit code it stops with.

0 done, 2 user error, 3 diverged, 4 storage, 75 stopped and resumable (75 is EX_TEMPFAIL of sysexits.h); 134 where JAX's
runtime aborts because a process of the run was lost.
"""

import errno
import functools
import os
import re
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from importlib import metadata
from typing import Any, NoReturn

from mmjax.environment import ignore_jax_settings, keep_freed_memory, missing_packages

# Of a disk that is full, broken or read-only: exit code 4. Any other OSError is the user's path: exit code 2.
STORAGE_ERRNOS = (
  errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO, errno.ESTALE, errno.ENODEV, errno.ENXIO,
  errno.ETIMEDOUT,
)  # fmt: skip
SHOW_CURSOR = b'\x1b[?25h'


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


class PeerLostError(CommandError):
  """Another process of the run died; the same commands resume it from the last checkpoint."""

  exit_code = 75


def file_error(error: OSError, what: str, also: str = '') -> StorageError | UserError:
  """Returns what an OSError means to a command, `what: why also`: StorageError where the disk is to blame."""
  kind = StorageError if error.errno in STORAGE_ERRNOS else UserError
  return kind(f'{what}{": " if what else ""}{error.strerror or error}{also}')


def first_line(error: BaseException) -> str:
  """Returns an error's type and first line, cut short; where TensorStore quotes the system's reason, that alone."""
  lines = str(error).strip().splitlines()
  line = lines[0].partition('See full TensorStore details')[0].strip() if lines else ''  # then a function of Orbax's
  if number := re.search(r"\[os_error_code='(\d+)'\]", line):  # it stands behind long paths
    return os.strerror(int(number[1]))
  return f'{type(error).__name__}: {line[:160] or "no message"}'


@functools.cache
def refuse_wrong_jaxlib() -> None:
  """Raises UserError where the jaxlib that is installed computes wrong results.

  0.10.2 does on CPUs, where a jitted product over a few columns is reduced: sum((A @ x) ** 2), A 3 x 3, for 40,000 x.
  Source: jax-ml/jax#39103; 0.10.1, 0.11.0, 0.11.1 and 0.11.2 were found right.
  """
  version = metadata.version('jaxlib')
  if [int(n) for n in re.findall(r'\d+', version)[:3]] == [0, 10, 2]:
    raise UserError(
      f'jaxlib {version} computes wrong results on CPUs (jax-ml/jax#39103); install another with  '
      "pip install 'jax!=0.10.2,!=0.11.0,<0.12'"
    )


def stop_without_packages() -> None:
  """Ends the process with one sentence where the extra `train` is not installed."""
  if sentence := missing_packages():
    _stop(sentence, UserError.exit_code)


def run_command(main: Callable[[], None]) -> None:
  """Runs a command's `main` and turns what stopped it into one sentence on stderr and an exit code."""
  try:
    if ignored := ignore_jax_settings():
      print(ignored, file=sys.stderr)
    stop_without_packages()
    refuse_wrong_jaxlib()
    keep_freed_memory()
    with _ignored_interrupt_ends_at_once():
      main()
  except CommandError as error:
    _stop(str(error), error.exit_code)
  except BrokenPipeError:  # whoever read the output has seen enough, as in `... | head`
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is still buffered has nowhere to go
    sys.exit(141)  # 128 + SIGPIPE, what a shell reports of a command that the signal ended
  except OSError as error:  # a file that was readable a moment ago, a name that is too long, a disk that filled up
    explained = file_error(error, '' if error.filename is None else str(error.filename))
    _stop(str(explained), explained.exit_code)
  except KeyboardInterrupt:
    try:
      _stop('Interrupted.', 130)
    finally:
      if main.__module__ == '__main__':  # at Python's own end JAX's threads, which still compute, would crash
        with suppress(OSError):
          sys.stdout.flush()
        os._exit(130)


@contextmanager
def _ignored_interrupt_ends_at_once() -> Iterator[None]:
  """Makes a Ctrl-C end the process where Python would ignore it.

  That is in a callback of its garbage collector, of which JAX has one, and in a destructor.
  """
  report = sys.unraisablehook

  def hook(ignored: Any) -> None:
    if isinstance(ignored.exc_value, KeyboardInterrupt):
      _end_interrupted()
    report(ignored)

  sys.unraisablehook = hook
  try:
    yield
  finally:
    sys.unraisablehook = report


def _stop(sentence: str, exit_code: int) -> None:
  """Ends the process. What a file name or a file holds may move no cursor: control characters are escaped."""
  shown = ''.join(char if char.isprintable() or char in ' \n\t' else ascii(char)[1:-1] for char in sentence)
  print(shown, file=sys.stderr)
  sys.exit(exit_code)


@contextmanager
def interrupt_ends_at_once() -> Iterator[None]:
  """Makes Ctrl-C end the process here and now; for imports, in which libraries swallow a KeyboardInterrupt."""

  previous = signal.signal(signal.SIGINT, _end_interrupted)
  try:
    yield
  finally:
    signal.signal(signal.SIGINT, previous)


def _end_interrupted(*_: object) -> None:
  end_at_once('Interrupted.')


def end_at_once(sentence: str) -> NoReturn:
  """Ends the process here and now, with the exit code of Ctrl-C; shows the cursor, which a bar may have hidden."""
  with suppress(OSError):  # the terminal may be gone
    for descriptor in filter(os.isatty, (1, 2)):
      os.write(descriptor, SHOW_CURSOR)
    os.write(2, f'{sentence}\n'.encode())
  os._exit(130)
