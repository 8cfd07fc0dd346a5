"""What is said of the leaves of a pytree: dtype, shape and checksum of each, and where values are not finite.

CRC-32 finds every error within 32 neighbouring bits, so every flipped bit, and misses one in 4e9 of all others. It is
taken over the values a program would use, not over files: whatever lies between (compression, chunking, the file
system) is covered, and it does not depend on how a leaf is sharded.
"""

import hashlib
import json
import sys
import zlib
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from mmjax.errors import UserError
from mmjax.files import first_three, named_leaves
from mmjax.run.processes import in_any_process


def describe_leaves(tree: Any) -> dict[str, list]:
  """Returns dtype, shape and CRC-32 of every leaf of a pytree, by its name."""
  return {name: [*type_of(leaf), leaf_crc32(leaf)] for name, leaf in named_leaves(tree, '.')}


def leaves_sha256(tree: Any) -> str:
  """Returns a hash of name, dtype, shape and CRC-32 of every leaf of a pytree."""
  return hashlib.sha256(json.dumps(describe_leaves(tree), sort_keys=True).encode()).hexdigest()


def type_of(leaf: Any) -> list:
  """Returns the name of a leaf's dtype, and its shape."""
  return [np.dtype(leaf.dtype).name, list(leaf.shape)]


def leaf_crc32(leaf: Any) -> int:
  """Returns the CRC-32 of an array's values in row-major order, however it is sharded."""
  if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:  # several processes hold parts of it
    leaf = leaf.addressable_data(0) if leaf.is_fully_replicated else multihost_utils.process_allgather(leaf, tiled=True)
  return zlib.crc32(np.ascontiguousarray(leaf).reshape(-1).view(np.uint8))


def non_finite(tree: Any) -> str:
  """Returns a clause that says where there is NaN or infinity in a pytree, in any process's part of it; '': nowhere."""
  found = []
  for name, leaf in named_leaves(tree, '.'):
    whole = not isinstance(leaf, jax.Array) or leaf.is_fully_addressable
    parts = [leaf] if whole else [shard.data for shard in leaf.addressable_shards]
    if count := sum(int(np.sum(~np.isfinite(np.asarray(part)))) for part in parts):
      found.append(f'{count:,} in {name}')
  if not in_any_process(bool(found)):
    return ''
  return f'values that are not finite: {first_three(found)}' if found else "another process's part is not finite"


def refuse_non_finite(tree: Any, what: str) -> None:
  """Raises UserError, `what: where`, if there is NaN or infinity in a pytree, in any process's part of it."""
  if found := non_finite(tree):
    raise UserError(f'{what}: {found}')


def warn_non_finite(tree: Any, what: str) -> None:
  """Says on stderr where there is NaN or infinity in a pytree."""
  if found := non_finite(tree):
    print(f'Warning: {what} holds {found}', file=sys.stderr, flush=True)
