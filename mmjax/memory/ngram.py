"""N-grams as addresses: each head hashes the last n tokens to rows of the bank. There is nothing to learn, nothing to
search for, and no product to compute before a row is known.

Source: hashed n-grams for a table that all tokens share, several heads against collisions, as in Cheng et al. 2026,
arXiv:2601.07372; several rows added up, Svenstrup et al. 2017, arXiv:1709.03933.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import Array

NO_TOKEN = -1  # before the first one


def last_tokens(tokens_BT: Array, n: int, segment_BT: Array | None = None) -> Array:
  """Returns the n last tokens at each position, its own first: int32 (B, T, n), NO_TOKEN where there is none.

  Args:
    tokens_BT: int32, whole rows.
    n: how many, at least 1.
    segment_BT: int32; tokens of another segment do not count. None: each row is one segment.
  """
  T, found = tokens_BT.shape[1], []
  for back in range(n):
    earlier = ((0, 0), (back, 0))
    token_BT = jnp.pad(tokens_BT, earlier, constant_values=NO_TOKEN)[:, :T]
    if segment_BT is not None:
      token_BT = jnp.where(jnp.pad(segment_BT, earlier)[:, :T] == segment_BT, token_BT, NO_TOKEN)
    found.append(token_BT)
  return jnp.stack(found, axis=-1)


def cached_last_tokens(token_BS: Array, position_BT: Array, n: int) -> Array:
  """Does what `last_tokens` does, for some positions of rows of which slot s holds the token at position s."""
  at_BTn = position_BT[..., None] - jnp.arange(n)
  row_B11 = jnp.arange(len(token_BS))[:, None, None]
  return jnp.where(at_BTn >= 0, token_BS[row_B11, jnp.maximum(at_BTn, 0)], NO_TOKEN)


@jax.named_scope('ngram')
def ngram_rows(token_BTn: Array, ngrams: Sequence[int], rows_per_head: int, n_rows: int) -> Array:
  """Hashes n-grams to rows, each head and each row of a head in its own way.

  Args:
    token_BTn: int32, from `last_tokens`.
    ngrams: for each head, how many of these tokens it looks at.
    rows_per_head: r.
    n_rows: M.

  Returns:
    int32 (B, T, h, r) in [0, M).
  """
  r = rows_per_head
  code_BThr = jnp.arange(len(ngrams) * r, dtype=jnp.uint32).reshape(-1, r)
  for back in range(max(ngrams)):
    mixed_BThr = _mix(code_BThr ^ _mix(token_BTn[..., back, None, None].astype(jnp.uint32)))
    looks_at_h1 = jnp.array([back < n for n in ngrams])[:, None]
    code_BThr = jnp.where(looks_at_h1, mixed_BThr, code_BThr)
  return (code_BThr % jnp.uint32(n_rows)).astype(jnp.int32)


def bucket_rows(token_BTn: Array, ngrams: Sequence[int], rows_per_head: int, n_rows: int) -> Array:
  """Hashes n-grams to buckets of r neighbouring rows; of r = 1 they are those of `ngram_rows`.

  Arguments and result are those of `ngram_rows`. Rows that are left when M is not divisible by r are in no bucket.
  """
  bucket_BTh1 = ngram_rows(token_BTn, ngrams, 1, n_rows // rows_per_head)
  return bucket_BTh1 * rows_per_head + jnp.arange(rows_per_head, dtype=jnp.int32)


def _mix(x: Array) -> Array:
  """A bijection of 32 bits in which every bit of `x` turns half of the others: the finalizer of MurmurHash3."""
  x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
  x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
  return x ^ (x >> 16)
