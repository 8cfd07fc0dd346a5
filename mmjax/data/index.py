"""The index of a prepared directory: what lies there, where it came from, and whether it is still what was written.

index.json              written last: a directory without it is not finished
tokenizer.model | .json
train-00000.bin         token ids, little-endian uint16 or uint32, documents one after the other, each ending in EOS
train-00000.offsets.npy int64 (documents + 1,): where each document begins, in tokens of its shard
train-00000.bytes.npy   int64 (2, X): tokens of the shard that stand for more bytes of the text than their piece has, as
                        tokenizers change text (a space in front, NFKC): where, and how many more (mostly negative)
valid-00000...          the same for what is held out
verified.json           stamps and hashes of these files and of the texts, so that the next start need not hash again
"""

import contextlib
import hashlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mmjax.errors import UserError
from mmjax.files import known_sha256, note_sha256, read_json, sha256_of, write_json

FORMAT = 1
INDEX, VERIFIED = 'index.json', 'verified.json'


def write_index(directory: Path, index: dict[str, Any]) -> None:
  """Writes index.json, with its own hash, and notes the files' hashes. They must be flushed to the disk already."""
  write_json(directory / INDEX, index, sealed=True)
  note_sha256(directory / VERIFIED, {directory / name: sha256 for name, sha256 in described_files(index)})


def read_index(directory: str | Path) -> dict[str, Any]:
  """Reads index.json.

  Raises:
    UserError: if there is none (not prepared, or not to the end), or it is damaged.
  """
  path = Path(directory) / INDEX
  if not path.is_file():
    raise UserError(f"'{directory}' is not a finished prepared directory: it has no {INDEX}")
  try:
    index = read_json(path, sealed=True)
  except UserError as error:
    raise UserError(f"{error}; delete '{directory}' to prepare again") from None
  if index['format'] != FORMAT:
    raise UserError(f"'{path}' has format {index['format']} but must have {FORMAT}; delete it to prepare again")
  if any(Path(name).name != name for name, _ in described_files(index)):
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
  stated = {directory / name: sha256 for name, sha256 in described_files(index)}
  for path in stated:
    if not path.is_file():
      raise UserError(f"'{path}' is missing; delete '{directory}' to prepare again")
  for path, found in known_sha256(stated, [directory / VERIFIED]).items():
    if found != stated[path] != sha256_of(path):  # looked at again: it may be the note of it that is damaged
      raise UserError(
        f"'{path}' is not what {INDEX} describes (cut, swapped or edited); delete '{directory}' to prepare again"
      )
  note_sha256(directory / VERIFIED, stated)
  return index


def find_prepared(place: str | Path, fits: Callable[[dict[str, Any]], bool]) -> Path | None:
  """Returns the first finished prepared directory with an index that fits: `place` itself or one in it."""
  place = Path(place)
  for path in (place / INDEX, *sorted(place.glob(f'*/{INDEX}'))):
    with contextlib.suppress(UserError, OSError, KeyError, TypeError):  # not there, damaged, of another format
      if fits(read_index(path.parent)):
        return path.parent
  return None


def data_sha256(index: dict[str, Any]) -> str:
  """Returns the hash that says which data these are: of the hashes of all shards."""
  return _shards_sha256(_shards(index))


def split_sha256(index: dict[str, Any], split: str) -> str:
  """Returns the hash that says which tokens a split holds, whatever the others hold: of the hashes of its shards."""
  return _shards_sha256(index['splits'][split]['shards'])


def _shards_sha256(shards: list[dict[str, Any]]) -> str:
  return hashlib.sha256(''.join(shard['sha256'] for shard in shards).encode()).hexdigest()


def counts_bytes(index: dict[str, Any]) -> bool:
  """Whether it is known how many bytes of text each token stands for.

  Earlier versions did not note where a tokenizer changed text: there, only whole documents can be counted.
  """
  return not index['inexact_documents'] or all('bytes_file' in shard for shard in _shards(index))


def described_files(index: dict[str, Any]) -> Iterator[tuple[str, str]]:
  """Yields name and sha256 of every file that an index describes."""
  yield index['tokenizer']['file'], index['tokenizer']['sha256']
  for shard in _shards(index):
    yield from shard_files(shard)


def _shards(index: dict[str, Any]) -> list[dict[str, Any]]:
  return [shard for split in index['splits'].values() for shard in split['shards']]


def shard_files(shard: dict[str, Any]) -> Iterator[tuple[str, str]]:
  """Yields name and sha256 of every file of a shard, from what the index says of it."""
  for kind in ('', 'offsets_', 'bytes_'):
    if f'{kind}file' in shard:  # earlier versions wrote no bytes
      yield shard[f'{kind}file'], shard[f'{kind}sha256']


def open_shards(directory: Path, split: Mapping[str, Any], dtype: str) -> Iterator[tuple[np.ndarray, np.ndarray]]:
  """Yields the tokens of each shard, mapped, of `dtype`, and where its documents begin, with the end, int64."""
  for shard in split['shards']:
    tokens = np.memmap(directory / shard['file'], np.dtype(dtype).newbyteorder('<'), 'r', shape=(shard['tokens'],))
    yield tokens, np.load(directory / shard['offsets_file'], 'r', allow_pickle=False)
