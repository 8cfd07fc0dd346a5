"""What a checkpoint must contain: name, dtype, shape and CRC-32 of every leaf, and a CRC-32 over that list itself.

CRC-32 finds every error within 32 neighbouring bits, so every flipped bit, and misses one in 4e9 of all others. It is
taken over the values a program would use, not over files: whatever lies between (compression, chunking, the file
system) is covered, and it does not depend on how a leaf is sharded.
"""

import hashlib
import json
import sys
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from mmjax.errors import UserError
from mmjax.run.processes import in_any_process

FORMAT = 1


class CorruptError(Exception):
  """A step is not what was saved; the message names the leaf or the file."""


def build_manifest(items: Mapping[str, Any], **fields: Any) -> dict[str, Any]:
  """Describes a step: `fields` and every leaf of the pytrees `items`, sealed with a checksum. JSON can hold it."""
  leaves = {item: _describe(tree) for item, tree in items.items()}
  body = {'format': FORMAT, **fields, 'leaves': leaves}
  return {**body, 'crc32': _body_crc32(body)}


def leaves_sha256(tree: Any) -> str:
  """Returns a hash of name, dtype, shape and CRC-32 of every leaf of a pytree."""
  return hashlib.sha256(json.dumps(_describe(tree), sort_keys=True).encode()).hexdigest()


def _describe(tree: Any) -> dict[str, list]:
  return {name: [*_type_of(leaf), leaf_crc32(leaf)] for name, leaf in named_leaves(tree)}


def read_manifest(path: Path, step: int) -> dict[str, Any]:
  """Reads the manifest of a step.

  Raises:
    CorruptError: if it is missing, is not what was saved, or belongs to another step.
  """
  try:
    manifest = json.loads(path.read_bytes())
    body = {name: value for name, value in manifest.items() if name != 'crc32'}
    whole = manifest['crc32'] == _body_crc32(body) and body['step'] == step
  except (FileNotFoundError, NotADirectoryError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
    whole = False
  if not whole:
    raise CorruptError(f'file {"/".join(path.parts[-2:])} is not what was saved')
  if body['format'] != FORMAT:
    raise UserError(f'checkpoint {step} has format {body["format"]}; this version reads format {FORMAT}')
  return body


def check_fits(manifest: Mapping[str, Any], abstract_items: Mapping[str, Any]) -> None:
  """Raises UserError if the leaves of a step differ from what a caller wants to restore in name, dtype or shape.

  Orbax would cast another dtype without a word, and a wrong shape is the caller's mistake, not corruption.
  """
  saved, wanted = {}, {}
  for item, tree in abstract_items.items():
    saved |= {f'{item}.{name}': _format_type(*kind[:2]) for name, kind in manifest['leaves'][item].items()}
    wanted |= {f'{item}.{name}': _format_type(*_type_of(leaf)) for name, leaf in named_leaves(tree)}
  names = [name for name in {**wanted, **saved} if saved.get(name) != wanted.get(name)]
  if names:
    first = ', '.join(f'{n}: {saved.get(n, "absent")} saved, {wanted.get(n, "absent")} expected' for n in names[:3])
    more = f', and {len(names) - 3} more leaves' if len(names) > 3 else ''
    raise UserError(f'checkpoint {manifest["step"]} does not fit this model and optimizer: {first}{more}')


def verify(manifest: Mapping[str, Any], items: Mapping[str, Any]) -> None:
  """Raises CorruptError naming the leaves whose values are not those that were saved."""
  wrong = [
    f'{item}.{name}'
    for item, tree in items.items()
    for name, leaf in named_leaves(tree)
    if manifest['leaves'][item][name] != [*_type_of(leaf), leaf_crc32(leaf)]
  ]
  if wrong:
    more = f' and {len(wrong) - 3} more' if len(wrong) > 3 else ''
    raise CorruptError(f'{", ".join(wrong[:3])}{more} failed the checksum')


def named_leaves(tree: Any) -> Iterator[tuple[str, Any]]:
  """Yields ('layers.0.attention.wq.kernel', leaf) for every leaf of a pytree."""
  for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
    yield jax.tree_util.keystr(path, simple=True, separator='.'), leaf


def non_finite(tree: Any) -> dict[str, int]:
  """Returns how many values of each leaf are NaN or infinite, where any are, in this process's part of them."""
  found = {}
  for name, leaf in named_leaves(tree):
    whole = not isinstance(leaf, jax.Array) or leaf.is_fully_addressable
    parts = [leaf] if whole else [shard.data for shard in leaf.addressable_shards]
    if count := sum(int(np.sum(~np.isfinite(np.asarray(part)))) for part in parts):
      found[name] = count
  return found


def describe_non_finite(found: Mapping[str, int]) -> str:
  """Says what `non_finite` found, in one clause."""
  if not found:
    return "another process's part of the state is not finite"
  listed = ', '.join(f'{count:,} in {name}' for name, count in list(found.items())[:3])
  return f'values that are not finite: {listed}{f" and {len(found) - 3} more leaves" if len(found) > 3 else ""}'


def refuse_non_finite(tree: Any, what: str) -> None:
  """Raises UserError, `what: where`, if there is NaN or infinity in a pytree, in any process's part of it."""
  found = non_finite(tree)
  if in_any_process(bool(found)):
    raise UserError(f'{what}: {describe_non_finite(found)}')


def warn_non_finite(tree: Any, what: str) -> None:
  """Says on stderr where there is NaN or infinity in a pytree."""
  if found := non_finite(tree):
    print(f'Warning: {what} holds {describe_non_finite(found)}', file=sys.stderr, flush=True)


def leaf_crc32(leaf: Any) -> int:
  """Returns the CRC-32 of an array's values in row-major order, however it is sharded."""
  if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:  # several processes hold parts of it
    leaf = leaf.addressable_data(0) if leaf.is_fully_replicated else multihost_utils.process_allgather(leaf, tiled=True)
  array = np.ascontiguousarray(leaf)
  return zlib.crc32(array.reshape(-1).view(np.uint8))


def _type_of(leaf: Any) -> tuple[str, list[int]]:
  return np.dtype(leaf.dtype).name, list(leaf.shape)


def _format_type(dtype: str, shape: list[int]) -> str:
  return f'{dtype}[{",".join(map(str, shape))}]'


def _body_crc32(body: Mapping[str, Any]) -> int:
  return zlib.crc32(json.dumps(body, sort_keys=True, allow_nan=False).encode())
