"""Finds validation text that is training text too: a loss on it says what a model remembers, not what it learned."""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mmjax.data.index import open_shards


def shared_documents(
  valid: Path, valid_split: Mapping[str, Any], train: Path, index: Mapping[str, Any]
) -> dict[str, int]:
  """Counts the documents of a split that stand among training documents too, token for token.

  Args:
    valid: directory of the split's shards.
    valid_split: what its index says of it.
    train: directory of the training text, made with the same tokenizer.
    index: its index.

  Returns:
    documents, and their tokens.
  """
  held, sizes, first = [], [], []
  for tokens, start in open_shards(valid, valid_split, index['dtype']):
    held += [_digest(tokens, *pair) for pair in zip(start[:-1], start[1:], strict=True)]
    sizes += np.diff(start).tolist()
    first += tokens[start[:-1]].tolist()
  likely = np.array(sizes) * 2**32 + np.array(first)
  wanted, seen = set(held), set()
  for tokens, start in open_shards(train, index['splits']['train'], index['dtype']):
    size = np.diff(start)
    candidates = np.flatnonzero(np.isin(size, sizes))
    candidates = candidates[np.isin(size[candidates] * 2**32 + tokens[start[candidates]], likely)]
    seen |= wanted.intersection(_digest(tokens, start[at], start[at + 1]) for at in candidates)
  found = [size for digest, size in zip(held, sizes, strict=True) if digest in seen]
  return {'documents': len(found), 'tokens': sum(found)}


def _digest(tokens: np.ndarray, start: int, stop: int) -> bytes:
  return hashlib.blake2b(tokens[start:stop].tobytes(), digest_size=16).digest()


def overlap_remark(split: Mapping[str, Any], shared: Mapping[str, int] | None, layout: str) -> str:
  """Says how much of a split is training text too; '' for none, and where an old index does not tell."""
  if not shared or not shared['documents']:
    return ''
  share = f' ({shared["tokens"]:,} of {split["tokens"]:,} tokens, {shared["tokens"] / split["tokens"]:.1%})'
  if layout == 'padded':  # its rows cut documents, so nobody knows how many of these tokens count
    share = ''
  return (
    f'{shared["documents"]:,} of {split["documents"]:,} validation documents{share} are training documents too: the '
    'loss on them says what the model remembers, not what it has learned'
  )
