"""The index of a prepared directory: what lies there, where it came from, and whether it is still what was written.

index.json              written last: a directory without it is not finished
tokenizer.model | .json
train-00000.bin         token ids, little-endian uint16 or uint32, documents one after the other, each ending in EOS
train-00000.offsets.npy int64[documents + 1]: where each document begins, in tokens of its shard
valid-00000...          the same for what is held out
verified.json           sizes, times and hashes last found right, so that the next start need not hash again
"""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mmjax.data.files import sha256_of, write_json
from mmjax.errors import StorageError, UserError

FORMAT = 1
INDEX, VERIFIED = 'index.json', 'verified.json'


def write_index(directory: Path, index: dict[str, Any]) -> None:
  """Writes index.json, with its own hash, and notes the files as verified. They must be flushed to the disk already."""
  write_json(directory / INDEX, index | {'sha256': _hash(index)})
  _note_verified(directory, index)


def read_index(directory: str | Path) -> dict[str, Any]:
  """Reads index.json.

  Raises:
    UserError: if there is none (not prepared, or not to the end), or it is damaged.
  """
  path = Path(directory) / INDEX
  if not path.is_file():
    raise UserError(f"'{directory}' is not a finished prepared directory: it has no {INDEX}")
  try:
    index = json.loads(path.read_text(encoding='utf-8'))
    stated = index.pop('sha256')
  except (OSError, ValueError, RecursionError, KeyError, AttributeError, TypeError) as error:
    raise UserError(f"'{path}' is damaged ({error}); delete '{directory}' to prepare again") from None
  if stated != _hash(index):
    raise UserError(f"'{path}' was changed after it was written; delete '{directory}' to prepare again")
  if index['format'] != FORMAT:
    raise UserError(f"'{path}' has format {index['format']}, this version reads {FORMAT}; delete it to prepare again")
  if any(Path(name).name != name for name, _ in _files(index)):
    raise UserError(f"'{path}' names files outside '{directory}'; delete it to prepare again")
  return index


def verify(directory: str | Path) -> dict[str, Any]:
  """Checks every shard and the tokenizer against the hashes in the index.

  A file whose size and time are those of the last check is not hashed again.

  Returns:
    The index.

  Raises:
    UserError: if a file is missing, cut, swapped or edited.
  """
  directory = Path(directory)
  index = read_index(directory)
  known = _read_verified(directory)
  fresh = False
  for name, sha256 in _files(index):
    path = directory / name
    if not path.is_file():
      raise UserError(f"'{path}' is missing; delete '{directory}' to prepare again")
    if known.get(name) == _stamp(path, sha256):
      continue
    fresh = True
    if sha256_of(path) != sha256:
      raise UserError(
        f"'{path}' is not what {INDEX} describes (cut, swapped or edited); delete '{directory}' to prepare again"
      )
  if fresh:
    _note_verified(directory, index)
  return index


def _hash(index: dict[str, Any]) -> str:
  return hashlib.sha256(json.dumps(index, sort_keys=True).encode()).hexdigest()


def _files(index: dict[str, Any]) -> Iterator[tuple[str, str]]:
  """Yields name and sha256 of every file that an index describes."""
  yield index['tokenizer']['file'], index['tokenizer']['sha256']
  for split in index['splits'].values():
    for shard in split['shards']:
      yield shard['file'], shard['sha256']
      yield shard['offsets_file'], shard['offsets_sha256']


def _stamp(path: Path, sha256: str) -> list:
  stat = path.stat()
  return [stat.st_size, stat.st_mtime_ns, sha256]


def _read_verified(directory: Path) -> dict[str, list]:
  try:
    known = json.loads((directory / VERIFIED).read_text(encoding='utf-8'))
  except (OSError, ValueError, RecursionError):
    return {}
  return known if isinstance(known, dict) else {}


def _note_verified(directory: Path, index: dict[str, Any]) -> None:
  try:
    write_json(directory / VERIFIED, {name: _stamp(directory / name, sha256) for name, sha256 in _files(index)})
  except StorageError:
    return  # a read-only directory is hashed at each start instead
