"""Finds text that is in both splits: a loss on it says how well a model remembers, not how well it has learned."""

import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np


def shared_documents(directory: Path, index: Mapping[str, Any]) -> dict[str, int]:
  """Counts the validation documents that stand among the training documents too, token for token.

  Args:
    directory: of the shards.
    index: what they hold; both splits.

  Returns:
    documents, and their tokens.
  """
  held, sizes = [], []
  likely = np.empty(0, np.int64)
  for tokens, start in _shards(directory, index, 'valid'):
    held += [_digest(tokens, *pair) for pair in zip(start[:-1], start[1:], strict=True)]
    sizes += np.diff(start).tolist()
    likely = np.union1d(likely, _keys(tokens, start))
  wanted, seen = set(held), set()
  for tokens, start in _shards(directory, index, 'train'):
    for at in np.flatnonzero(np.isin(_keys(tokens, start), likely)):  # what is as long and begins alike
      digest = _digest(tokens, start[at], start[at + 1])
      seen |= {digest} & wanted
  found = [size for digest, size in zip(held, sizes, strict=True) if digest in seen]
  return {'documents': len(found), 'tokens': sum(found)}


def _shards(directory: Path, index: Mapping[str, Any], split: str) -> Iterator[tuple[np.ndarray, np.ndarray]]:
  """Yields the tokens of each shard, memory-mapped, and where its documents begin, with the end."""
  for shard in index['splits'][split]['shards']:
    dtype = np.dtype(index['dtype']).newbyteorder('<')
    yield np.memmap(directory / shard['file'], dtype, 'r'), np.load(directory / shard['offsets_file'])


def _keys(tokens: np.ndarray, start: np.ndarray) -> np.ndarray:
  """Returns int64 numbers that are the same for documents that are: of length and first token."""
  return np.diff(start) * 2**32 + tokens[start[:-1]]


def _digest(tokens: np.ndarray, start: int, stop: int) -> bytes:
  return hashlib.blake2b(tokens[start:stop].tobytes(), digest_size=16).digest()


def overlap_remark(index: Mapping[str, Any]) -> str:
  """Says how much of the validation text is training text too; '' for none, and where an old index does not tell."""
  valid = index['splits'].get('valid', {})
  found = valid.get('also_in_train')
  if not found or not found['documents']:
    return ''
  return (
    f'{found["documents"]:,} of {valid["documents"]:,} validation documents ({found["tokens"]:,} of '
    f'{valid["tokens"]:,} tokens, {found["tokens"] / valid["tokens"]:.1%}) are training documents too: the loss on '
    'them says what the model remembers, not what it has learned'
  )
