"""How a file is written, sealed, read, hashed and locked, and how a leaf of a tree is named: each in one way.

A crash, a full disk or a second process never leaves half a file under its final name. A sealed JSON file carries a
hash of itself, so that damage is noticed when it is read.
"""

import contextlib
import datetime
import errno
import fcntl
import hashlib
import json
import math
import os
import shutil
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from mmjax.errors import CommandError, StorageError, UserError, file_error

SEAL = 'sha256'  # key of a JSON object's hash, which is taken without it
SEALS = {SEAL: lambda data: hashlib.sha256(data).hexdigest(), 'crc32': zlib.crc32}  # that of earlier checkpoints
SPARE_BYTES = 64 * 2**20  # left free on the disk: metrics and logs have to go somewhere


@contextlib.contextmanager
def storage_errors(path: Path) -> Iterator[None]:
  """Turns an OSError while `path` is written into a sentence: why, and what room is left if there is too little.

  Raises:
    StorageError, UserError: instead of it, as `file_error` says.
  """
  try:
    yield
  except OSError as error:
    room = ''
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
      with contextlib.suppress(OSError):
        room = f' ({megabytes(free_bytes(path))} free)'
    raise file_error(error, f"'{path}' cannot be written", room) from error


def free_bytes(path: Path) -> int:
  """Returns the free space of the file system that holds `path` or its nearest existing parent."""
  while not path.exists():
    path = path.parent
  return shutil.disk_usage(path).free


def megabytes(n_bytes: int, *, up: bool = False) -> str:
  """Returns '0.9 MB'. What is needed is rounded up and what is free down: what does not fit is seen not to."""
  return f'{(-(-n_bytes // 10**5) if up else n_bytes // 10**5) / 10:,.1f} MB'


def check_room(path: Path, needed_bytes: int) -> None:
  """Raises StorageError if `needed_bytes`, and SPARE_BYTES to keep free, do not fit beside `path`."""
  free = free_bytes(path)
  if free < needed_bytes + SPARE_BYTES:
    raise StorageError(
      f"'{path}' needs about {megabytes(needed_bytes + SPARE_BYTES, up=True)} but {megabytes(free)} are free; "
      'make room or choose another directory'
    )


def write_file(path: Path, data: bytes | str) -> None:
  """Writes a whole file or none: to a hidden name, .NAME.PID.tmp of the name's beginning, flushed to the disk, renamed.

  Text is written as UTF-8.

  Raises:
    StorageError, UserError: if it cannot be written, as `file_error` says; the old file stays.
  """
  temporary = path.with_name(f'.{path.name[:40]}.{os.getpid()}.tmp')  # within 255 bytes, as the name itself is
  with storage_errors(path):
    try:
      temporary.unlink(missing_ok=True)  # and a new file, so that nothing is written through a link
      with temporary.open('xb') as handle:
        handle.write(data.encode() if isinstance(data, str) else data)
        handle.flush()
        os.fsync(handle.fileno())
      os.replace(temporary, path)
    except BaseException:  # Ctrl-C, too
      with contextlib.suppress(OSError):
        temporary.unlink()
      raise
    flush_directory(path.parent)


def write_json(path: Path, value: Any, *, sealed: bool = False) -> None:
  """Writes a JSON file as `write_file` does; NaN and infinities, which JSON has no number for, become null."""
  value = finite(value)
  write_file(path, json.dumps(seal(value) if sealed else value, indent=2, ensure_ascii=False, allow_nan=False) + '\n')


def read_json(path: Path, *, sealed: bool = False) -> dict[str, Any]:
  """Reads a JSON object, compares it with the seal that it carries, and takes that off.

  Args:
    path: of the file.
    sealed: whether one without a seal is refused.

  Raises:
    UserError: if it is missing, no JSON object, or was changed.
  """
  try:
    value = json.loads(path.read_bytes())
  except (FileNotFoundError, NotADirectoryError) as error:
    hint = '' if sealed else '; copy its directory again, with all that is in it'
    raise UserError(f'{path} is missing{hint}') from error
  except (ValueError, RecursionError) as error:
    raise UserError(f'{path} must be a JSON object, and is not JSON: {error}') from error
  if not isinstance(value, dict):
    raise UserError(f'{path} must be a JSON object, not {type(value).__name__}')
  stated = {name: value.pop(name) for name in SEALS if name in value}
  if any(found != _seal_of(value, name) for name, found in stated.items()) or (sealed and not stated):
    hint = '' if sealed else f'; if that was on purpose, remove {SEAL!r} from it'
    raise UserError(f'{path} was changed after it was written{hint}')
  return value


def seal(value: Mapping[str, Any]) -> dict[str, Any]:
  """Returns a JSON object with its own hash in it; `read_json` checks it and takes it off."""
  return {**value, SEAL: _seal_of(value, SEAL)}


def _seal_of(value: Mapping[str, Any], kind: str) -> str | int:
  return SEALS[kind](json.dumps(value, sort_keys=True).encode())


def finite(value: Any) -> Any:
  """Returns nested dicts and lists with every NaN and infinity replaced by None."""
  if isinstance(value, Mapping):
    return {name: finite(item) for name, item in value.items()}
  if isinstance(value, list | tuple):
    return [finite(item) for item in value]
  return None if isinstance(value, float) and not math.isfinite(value) else value


def flush_directory(directory: Path) -> None:
  """Makes renames in a directory survive a power cut."""
  descriptor = os.open(directory, os.O_RDONLY)
  try:
    os.fsync(descriptor)
  finally:
    os.close(descriptor)


def sha256_of(path: Path) -> str:
  """Returns the sha256 of a file's content, in hex."""
  with path.open('rb') as handle:
    return hashlib.file_digest(handle, 'sha256').hexdigest()


def stamp_of(file: Path) -> list[int]:
  """Returns size, times and place on the disk: a file in which they are as before was not changed."""
  stat = file.stat()
  return [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino]


def known_sha256(files: Iterable[Path], notes: Iterable[Path]) -> dict[Path, str]:
  """Returns the sha256 of files; one is hashed only if it is not as it was when `note_sha256` wrote into a note."""
  read = [(path.parent, _read_notes(path)) for path in notes]
  found = {}
  for file in files:
    stamp = stamp_of(file)
    noted = (known.get(_note_key(file, folder)) for folder, known in read)
    found[file] = next((note[-1] for note in noted if note and note[:-1] == stamp), None) or sha256_of(file)
  return found


def note_sha256(notes: Path, sha256: Mapping[Path, str]) -> None:
  """Adds the hashes of files to a JSON file of such notes, where one may be written."""
  old = _read_notes(notes)
  new = old | {_note_key(file, notes.parent): [*stamp_of(file), found] for file, found in sha256.items()}
  if new != old:
    with contextlib.suppress(CommandError):  # a directory that may only be read is hashed at each start instead
      write_json(notes, new)


def _note_key(file: Path, folder: Path) -> str:
  return file.name if file.parent == folder else str(file.absolute())


def _read_notes(path: Path) -> dict[str, list]:
  try:
    notes = read_json(path)
  except (OSError, UserError):
    return {}
  return {key: note for key, note in notes.items() if isinstance(note, list) and note and isinstance(note[-1], str)}


def sha256_path(path: Path) -> Path:
  """Returns where the hash of a file that is handed around lies: beside it, as `sha256sum -c` reads it."""
  return path.with_name(path.name + '.sha256')


def check_sha256(path: Path) -> None:
  """Raises UserError if a hash lies beside a file and is not the file's."""
  beside = sha256_path(path)
  if not beside.is_file():
    return
  stated, found = beside.read_bytes().split(maxsplit=1)[:1], sha256_of(path)
  if stated != [found.encode()]:
    raise UserError(
      f"'{path}': its sha256 is {found}, but {beside.name} says {ascii((stated or [b''])[0][:64])[2:-1]}; "
      f'it is damaged, or you changed it: then remove {beside.name}'
    )


def lock(descriptor: int, waiting: Callable[[], None], shared: bool = False) -> None:
  """Holds an open file or directory for this process until it is closed; calls `waiting` if another holds it.

  The kernel drops the lock when the process dies, however it dies. Several may hold one that is shared.
  """
  kind = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
  try:
    fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
  except BlockingIOError:
    waiting()
    fcntl.flock(descriptor, kind)


@contextlib.contextmanager
def removed_unless_whole(directory: Path, last: str) -> Iterator[None]:
  """Removes a new directory if whatever fills it does not come to its end.

  If the file that is written last is there, another process was faster, and its directory stays.
  """
  try:
    yield
  except BaseException:
    if not (directory / last).exists():
      shutil.rmtree(directory, ignore_errors=True)
    raise


@contextlib.contextmanager
def locked_directory(directory: Path, waiting: Callable[[], None]) -> Iterator[None]:
  """Makes a directory and holds it for this process alone; calls `waiting` once if another process holds it.

  The lock is on the directory itself, so that it leaves no file behind and ends with the process.
  """
  while True:
    with storage_errors(directory):
      directory.mkdir(parents=True, exist_ok=True)
      descriptor = os.open(directory, os.O_RDONLY)
    try:
      lock(descriptor, waiting)
      if directory.exists() and os.path.samestat(os.fstat(descriptor), directory.stat()):
        yield
        return
    finally:  # the process that held it may have removed it: then the lock is on nothing, and we begin again
      os.close(descriptor)


def utc_now() -> str:
  """Returns the time (UTC) as files hold it, to the second."""
  return datetime.datetime.now(datetime.UTC).isoformat(timespec='seconds')


def path_name(path: tuple, separator: str = '/') -> str:
  """Turns a tree path into 'layers/0/sublayer/gate/keys', as patterns and messages name parameters."""
  return separator.join(str(getattr(key, 'key', getattr(key, 'name', getattr(key, 'idx', key)))) for key in path)


def named_leaves(tree: Any, separator: str = '/') -> list[tuple[str, Any]]:
  """Returns the name and the value of every leaf of a pytree; checkpoints have dots in these names."""
  from jax.tree_util import tree_leaves_with_path  # here: processes that prepare text do without JAX

  return [(path_name(path, separator), leaf) for path, leaf in tree_leaves_with_path(tree)]


def first_three(found: list[str], what: str = 'leaves') -> str:
  """Joins what was found of leaves, or of others, which may be hundreds."""
  return ', '.join([*found[:3], *([f'and {len(found) - 3} more {what}'] if len(found) > 3 else [])])
