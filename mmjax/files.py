"""Writing files so that a crash, a full disk or a second process never leaves half of one under its final name."""

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from mmjax.errors import CommandError, StorageError, UserError, file_error

SPARE_BYTES = 64 * 2**20  # left free on the disk: metrics and logs have to go somewhere


@contextlib.contextmanager
def storage_errors(path: Path) -> Iterator[None]:
  """Turns an OSError while `path` is written into one sentence that says why and how much room is left."""
  try:
    yield
  except OSError as error:
    raise file_error(error, f"'{path}' cannot be written", _room(path)) from error


def _room(path: Path) -> str:
  try:
    return f' ({free_bytes(path) / 1e6:.0f} MB free)'
  except OSError:
    return ''


def free_bytes(path: Path) -> int:
  """Returns the free space of the file system that holds `path` or its nearest existing parent."""
  while not path.exists():
    path = path.parent
  return shutil.disk_usage(path).free


def check_room(path: Path, needed_bytes: int) -> None:
  """Raises StorageError if `needed_bytes`, and SPARE_BYTES to keep free, do not fit beside `path`."""
  free = free_bytes(path)
  if free < needed_bytes + SPARE_BYTES:
    raise StorageError(
      f"'{path}' needs about {(needed_bytes + SPARE_BYTES) / 1e6:.0f} MB, {free / 1e6:.0f} MB are free; "
      'make room or choose another directory'
    )


def write_file(path: Path, data: bytes) -> None:
  """Writes a whole file or none: to a hidden name, .NAME.PID.tmp of the name's beginning, flushed to the disk, renamed.

  Raises:
    StorageError, UserError: if it cannot be written, as `file_error` says; the old file stays.
  """
  temporary = path.with_name(f'.{path.name[:40]}.{os.getpid()}.tmp')  # within 255 bytes, as the name itself is
  with storage_errors(path):
    try:
      temporary.unlink(missing_ok=True)  # and a new file, so that nothing is written through a link
      with temporary.open('xb') as handle:
        handle.write(data)
        handle.flush()
        os.fsync(handle.fileno())
      os.replace(temporary, path)
    except OSError:
      with contextlib.suppress(OSError):
        temporary.unlink()
      raise
    flush_directory(path.parent)


def write_json(path: Path, value: Any) -> None:
  """Writes a JSON file as `write_file` does."""
  write_file(path, (json.dumps(value, indent=2, ensure_ascii=False) + '\n').encode())


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
    notes = json.loads(path.read_bytes())
  except (OSError, ValueError, RecursionError):
    return {}
  notes = notes if isinstance(notes, dict) else {}
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
    raise UserError(f"'{path}': sha256 is {found}, {beside.name} says {ascii((stated or [b''])[0][:64])[2:-1]}")


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
      try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
      except BlockingIOError:
        waiting()
        fcntl.flock(descriptor, fcntl.LOCK_EX)
      if directory.exists() and os.path.samestat(os.fstat(descriptor), directory.stat()):
        yield
        return
    finally:  # the process that held it may have removed it: then the lock is on nothing, and we begin again
      os.close(descriptor)


def path_name(path: tuple) -> str:
  """Turns a tree path into 'layers/0/sublayer/gate/keys', as patterns and messages name parameters."""
  return '/'.join(str(getattr(key, 'key', getattr(key, 'name', getattr(key, 'idx', key)))) for key in path)
