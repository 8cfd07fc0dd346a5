"""N-grams as addresses: each head hashes the last n tokens to rows of the bank. There is nothing to learn, nothing to
search for, and no product to compute before a row is known.

Two things keep n-grams apart that would fall on one row. Each head may have a range of rows of its own, and for single
tokens one that needs no hash. And each n-gram may have signs, by which its row is multiplied: of two n-grams in one row
each then reads what is nearly orthogonal to what the other wrote.

Sources: hashed n-grams for a table that all tokens share, several heads against collisions, a prime size for each, as
in Cheng et al. 2026, arXiv:2601.07372; several rows added up, Svenstrup et al. 2017, arXiv:1709.03933; signs by a
second hash, Chen et al. 2015, arXiv:1504.04788, for n-grams https://github.com/KellerJordan/modded-nanogpt/pull/299.
"""

import functools
import math
import numbers
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from mmjax.kernels.mesh import on_any_mesh
from mmjax.memory.types import outside, shape_of

NO_TOKEN = -1  # before the first one
SIGN_VECTORS = 256
FIRST_OF_SIGNS = 1 << 16  # of the numbers that tell hashes apart, those of signs come after those of rows


def last_tokens(tokens_BT: Array, n: int, segment_BT: Array | None = None) -> Array:
  """Returns the n last tokens at each position, its own first: int32 (B, T, n), NO_TOKEN where there is none.

  Args:
    tokens_BT: integers that fit int32, whole rows.
    n: how many, at least 1.
    segment_BT: int32; tokens of another segment do not count. Each segment of a row has a number of its own: one that
      comes again is the same segment. None: each row is one segment.

  Raises:
    ValueError: if tokens or segments have another shape, n is no whole number of at least 1, or an id that is not
      traced does not fit int32.
  """
  _check_n(n)
  _check_axes('tokens', tokens_BT, 'B', 'T')
  if segment_BT is not None and (found := shape_of(segment_BT)) != tokens_BT.shape:
    raise ValueError(f'segments must have the shape of the tokens, {tokens_BT.shape}, not {found}')
  return on_any_mesh(functools.partial(_last_tokens, n), lambda spec: spec, tokens_BT, segment_BT)


def _last_tokens(n: int, tokens_BT: Array, segment_BT: Array | None) -> Array:
  tokens_BT, T, found = _signed(tokens_BT), tokens_BT.shape[1], []
  for back in range(n):
    earlier = ((0, 0), (back, 0))
    token_BT = jnp.pad(tokens_BT, earlier, constant_values=NO_TOKEN)[:, :T]
    if segment_BT is not None:
      token_BT = jnp.where(jnp.pad(segment_BT, earlier)[:, :T] == segment_BT, token_BT, NO_TOKEN)
    found.append(token_BT)
  return jnp.stack(found, axis=-1)


def cached_last_tokens(token_BS: Array, position_BT: Array, n: int) -> Array:
  """Does what `last_tokens` does, at int32 positions of rows of which slot s holds the token at position s.

  Args:
    token_BS: int32; each row is one segment.
    position_BT: int32 in [0, S): beyond, JAX would read the last slot.
    n: how many, at least 1.

  Raises:
    ValueError: if tokens or positions have another shape, or positions or n are no whole numbers.
  """
  _check_n(n)
  _check_axes('tokens', token_BS, 'B', 'S')
  B = token_BS.shape[0]  # which has no len() where it is symbolic
  _check_axes('positions', position_BT, f'B={B}', 'T')
  if position_BT.shape[0] != B:
    raise ValueError(f'positions must have the shape (B={B}, T), not {position_BT.shape}')
  if not jnp.issubdtype(position_BT.dtype, jnp.integer):
    raise ValueError(f'positions must be whole numbers, not {position_BT.dtype}')

  def find(position_BT: Array, token_BS: Array) -> Array:
    at_BTn = position_BT.astype(jnp.int32)[..., None] - jax.lax.broadcasted_iota(jnp.int32, (1, 1, n), 2)
    row_B11 = jnp.arange(B)[:, None, None]
    return jnp.where(at_BTn >= 0, jnp.asarray(_signed(token_BS))[row_B11, jnp.maximum(at_BTn, 0)], NO_TOKEN)

  return on_any_mesh(find, lambda spec: spec, position_BT, token_BS)


def _check_n(n: int) -> None:
  if not isinstance(n, numbers.Integral) or isinstance(n, bool) or n < 1:
    raise ValueError(f'n={n!r} must be a whole number of at least 1: the token itself is the first of the last tokens')


def _check_axes(name: str, value: Array, *axes: str) -> None:
  """Raises ValueError for what is no array with as many axes as these names."""
  found = shape_of(value)
  if not isinstance(found, tuple) or len(found) != len(axes):
    raise ValueError(f'{name} must have the shape ({", ".join(axes)}), not {found}')


def _signed(token: Array) -> Array:
  """Returns token ids as int32, because NO_TOKEN is no uint16; what is no whole number is refused later.

  Raises:
    ValueError: if one is no int32, and not traced: the cast would make another token of it.
  """
  if not jnp.issubdtype(token.dtype, jnp.integer):
    return token
  if (wrong := outside(token, -(2**31), 2**31)) is not None:
    raise ValueError(f'token id {wrong} must fit int32')
  return token.astype(jnp.int32)


@jax.named_scope('ngram')
def ngram_rows(
  last_BTn: Array, ngrams: Sequence[int], rows_per_head: int, n_rows: int, vocab_size: int | None = None
) -> Array:
  """Hashes n-grams to rows, each head and each row of a head in its own way.

  Args:
    last_BTn: int32, from `last_tokens`.
    ngrams: for each head, how many of these tokens it looks at.
    rows_per_head: r.
    n_rows: M.
    vocab_size: V; each row of a head then lies in a range of its own, see `own_ranges`. None: anywhere.

  Returns:
    int32 (B, T, h, r) in [0, M).

  Raises:
    ValueError: if last tokens are too few or no integers, or an id is not in [0, V), unless it is traced: then its row
      is that of another token.
  """
  r = rows_per_head
  code_BThr = _codes(last_BTn, ngrams, jnp.arange(len(ngrams) * r, dtype=jnp.uint32).reshape(-1, r))
  if vocab_size is None:
    return (code_BThr % jnp.uint32(n_rows)).astype(jnp.int32)
  if (wrong := outside(last_BTn, 0, vocab_size, np.s_[..., 0])) is not None:
    raise ValueError(f'token id {wrong} must be from 0 to {vocab_size - 1}, below vocab_size')
  first_11hr, size_11hr = (np.reshape(x, (1, 1, -1, r)) for x in own_ranges(tuple(ngrams), r, n_rows, vocab_size))
  alone_11h1 = np.array(ngrams)[None, None, :, None] == 1
  code_BThr = jnp.where(alone_11h1, last_BTn[..., 0, None, None].astype(jnp.uint32), code_BThr)
  return first_11hr + (code_BThr % size_11hr.astype(np.uint32)).astype(jnp.int32)


@functools.cache
def own_ranges(
  ngrams: tuple[int, ...], rows_per_head: int, n_rows: int, vocab_size: int
) -> tuple[np.ndarray, np.ndarray]:
  """Divides the rows of a bank among the rows of heads, one after the other.

  Those of a single token get V rows, one for each token. The others share what is left equally, and take of their share
  the largest prime number of rows, so that the remainder of a hash depends on all of its bits.

  Args:
    ngrams: for each head, how many tokens it looks at.
    rows_per_head: r.
    n_rows: M, enough for two rows in each range of the others.
    vocab_size: V.

  Returns:
    First row and number of rows of each of the h * r ranges, int32.
  """
  alone_R = np.repeat(ngrams, rows_per_head) == 1
  hashed = int(np.sum(~alone_R))
  prime = _prime_up_to((n_rows - vocab_size * (len(alone_R) - hashed)) // hashed) if hashed else 0
  size_R = np.where(alone_R, vocab_size, prime).astype(np.int32)
  return np.cumsum(size_R, dtype=np.int32) - size_R, size_R


@jax.named_scope('ngram')
def ngram_signs(last_BTn: Array, ngrams: Sequence[int]) -> Array:
  """Hashes n-grams to the numbers of vectors of signs, in other ways than to rows: int32 (B, T, h), below SIGN_VECTORS.

  Args:
    last_BTn: int32, from `last_tokens`.
    ngrams: for each head, how many of these tokens it looks at.

  Raises:
    ValueError: if last tokens are too few or no integers.
  """
  code_BTh1 = _codes(last_BTn, ngrams, FIRST_OF_SIGNS + jnp.arange(len(ngrams), dtype=jnp.uint32)[:, None])
  return (code_BTh1[..., 0] % SIGN_VECTORS).astype(jnp.int32)


@jax.custom_vjp
def with_signs(sum_BThP: Array, sign_BTh: Array) -> Array:
  """Multiplies each head's sum by the vector of signs that the n-gram picked, and its gradient too.

  A head's rows all have the signs of the n-gram. So the sum has them, and of the rows no signed copy is made; the
  numbers are all that is kept for the backward pass.

  Args:
    sum_BThP: float.
    sign_BTh: int32, from `ngram_signs`.
  """
  return sum_BThP * sign_vectors(sum_BThP.shape[-1]).astype(sum_BThP.dtype)[sign_BTh]


with_signs.defvjp(
  lambda sum_BThP, sign_BTh: (with_signs(sum_BThP, sign_BTh), sign_BTh),
  lambda sign_BTh, grad_BThP: (with_signs(grad_BThP, sign_BTh), None),
)


def sign_vectors(row_dim: int) -> Array:
  """Returns SIGN_VECTORS vectors of +1 and -1, float32: bits of a hash of each value's number."""
  number_XP = jnp.arange(SIGN_VECTORS * row_dim, dtype=jnp.uint32).reshape(SIGN_VECTORS, row_dim)
  return 1 - 2 * (_mix(number_XP + 1) >> 31).astype(jnp.float32)


def _codes(last_BTn: Array, ngrams: Sequence[int], number_hr: Array) -> Array:
  """Returns 32 bits for each n-gram, uint32 (B, T, h, r), by the hash of each number."""
  # JAX would read the last of too few tokens again, and cut fractions off.
  _check_axes('last tokens', last_BTn, 'B', 'T', 'n')
  if last_BTn.shape[-1] < max(ngrams) or not jnp.issubdtype(last_BTn.dtype, jnp.integer):
    raise ValueError(
      f'last tokens of shape {last_BTn.shape} and dtype {last_BTn.dtype} must be whole numbers, at least '
      f'{max(ngrams)} at each position: see last_tokens'
    )
  code_BThr, last_BTn = number_hr[None, None], _signed(last_BTn)
  for back in range(max(ngrams)):
    mixed_BThr = _mix(code_BThr ^ _mix(last_BTn[..., back, None, None].astype(jnp.uint32)))
    looks_at_11h1 = jnp.array([back < n for n in ngrams])[None, None, :, None]
    code_BThr = jnp.where(looks_at_11h1, mixed_BThr, code_BThr)
  return code_BThr


def _prime_up_to(most: int) -> int:
  return next(n for n in range(most, 1, -1) if all(n % d for d in range(2, math.isqrt(n) + 1)))


def _mix(x: Array) -> Array:
  """A bijection of 32 bits in which every bit of `x` turns half of the others: the finalizer of MurmurHash3."""
  x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
  x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
  return x ^ (x >> 16)
