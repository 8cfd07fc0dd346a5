"""Product-key top-k: the best R of C*C rows from two lists of C sub-scores, exactly.

A row is a pair of sub-keys and its score is the sum of two sub-scores. The pair of the i-th best of one list and the
j-th best of the other (from 0) has (i+1)(j+1)-1 pairs before it, so only pairs with (i+1)(j+1) <= R can be among the R
best: 20 of C*C for R = 8. Source: Lample et al. 2019, arXiv:1907.05242, section 3.1.

Axes: h heads, each with two codebooks; K = 2 h codebooks, those of one head side by side; r rows a head.
"""

import jax
import jax.numpy as jnp
from jax import Array

from mmjax.errors import refuse_wrong_jaxlib


def product_key_topk(
  query_BTKp: Array, keys_KCp: Array, num_selected: int, bias_KC: Array | None = None
) -> tuple[Array, Array]:
  """Picks, for every head, the exact top `num_selected` of all C*C rows.

  Rows are ordered by their float32 score, best first, and equal scores by row, lowest first. Where two sums are equal
  only because float32 rounded them, the last place may go to the pair of the better sub-key instead of the lower row.

  Args:
    query_BTKp: float halves of queries. Scores are computed in float32 whatever its dtype: bf16 would pick other rows.
    keys_KCp: codebooks of C sub-keys, two a head.
    num_selected: r, at most C.
    bias_KC: float32, added to the sub-scores while rows are chosen and ordered; it gets no gradient.

  Returns:
    row_BThr: int32 in [0, C*C), i * C + j for sub-keys i and j. score_BThr: float32, before any softmax and without
    the bias; differentiable.

  Raises:
    ValueError: if r > C.
  """
  found = best_rows(sub_key_scores(query_BTKp, keys_KCp), num_selected, bias_KC)
  return tuple(x.reshape(*query_BTKp.shape[:2], *x.shape[1:]) for x in found)


def best_rows(score_KXC: Array, num_selected: int, bias_KC: Array | None = None) -> tuple[Array, Array]:
  """Does what `product_key_topk` does, from scores of X tokens as `sub_key_scores` returns them: row_Xhr, score_Xhr."""
  K, _, C = score_KXC.shape
  R, heads = num_selected, K // 2
  if R > C:
    raise ValueError(f'num_selected={R} must be at most the {C} sub-keys of each half')
  if bias_KC is not None:
    score_KXC += jax.lax.stop_gradient(bias_KC)[:, None]
  # Barriers, because only rank 2 gets XLA's fast top-k and reshapes move through it: 30 times slower on a CPU.
  flat_YC = jax.lax.optimization_barrier(score_KXC.reshape(-1, C))
  # One barrier an output: around both, XLA 0.10.2 aborts while it partitions over several devices.
  best_YR, sub_key_YR = (jax.lax.optimization_barrier(x) for x in jax.lax.top_k(flat_YC, R))
  # Heads and tokens Z last: what follows is arithmetic on the few candidates n of all of them at a time.
  best_2RZ, sub_key_2RZ = (
    x.reshape(heads, 2, -1, R).transpose(1, 3, 0, 2).reshape(2, R, -1) for x in (best_YR, sub_key_YR)
  )
  pairs = [(i, j) for i in range(R) for j in range(R) if (i + 1) * (j + 1) <= R]
  sum_nZ = jnp.stack([best_2RZ[0, i] + best_2RZ[1, j] for i, j in pairs])
  candidate_nZ = jnp.stack([sub_key_2RZ[0, i] * C + sub_key_2RZ[1, j] for i, j in pairs])
  row_RZ = _best_candidates(jax.lax.stop_gradient(sum_nZ), candidate_nZ, R, C * C - 1)
  # Row by row, because the gradient of one sum over (R, n, X) would be built at that size.
  score_RZ = jnp.stack([jnp.sum(jnp.where(candidate_nZ == row_Z, sum_nZ, 0), axis=0) for row_Z in row_RZ])
  row_Xhr, score_Xhr = (x.reshape(R, heads, -1).transpose(2, 1, 0) for x in (row_RZ, score_RZ))
  if bias_KC is not None:
    head_h1 = jnp.arange(heads)[:, None]
    first_Xhr, second_Xhr = jnp.divmod(row_Xhr, C)
    score_Xhr -= jax.lax.stop_gradient(bias_KC[2 * head_h1, first_Xhr] + bias_KC[2 * head_h1 + 1, second_Xhr])
  return row_Xhr, score_Xhr


def product_key_topk_reference(
  query_BTKp: Array, keys_KCp: Array, num_selected: int, bias_KC: Array | None = None
) -> tuple[Array, Array]:
  """The definition: all C*C sums, sorted."""
  score_KXC = sub_key_scores(query_BTKp, keys_KCp)
  score_BTKC = jnp.moveaxis(score_KXC, 0, 1).reshape(*query_BTKp.shape[:3], -1)

  def all_sums(score_xKC: Array) -> Array:
    sums = score_xKC[..., 0::2, :, None] + score_xKC[..., 1::2, None, :]
    return sums.reshape(*sums.shape[:-2], -1)

  sums_BThM = all_sums(score_BTKC)
  bias_hM = 0 if bias_KC is None else jax.lax.stop_gradient(all_sums(bias_KC))
  row_BThr = jax.lax.top_k(sums_BThM + bias_hM, num_selected)[1]
  return row_BThr, jnp.take_along_axis(sums_BThM, row_BThr, axis=-1)


def sub_key_scores(query_BTKp: Array, keys_KCp: Array) -> Array:
  """Returns the float32 scores (K, X, C) of the sub-keys of each codebook for the X = B * T tokens."""
  refuse_wrong_jaxlib()
  query_XKp = query_BTKp.reshape(-1, *query_BTKp.shape[2:]).astype(jnp.float32)
  # K first, as the products come: turning their axes costs a CPU more than the products do.
  # HIGHEST, because GPUs would multiply float32 as TF32, which picks other rows.
  return jnp.einsum('XKp,KCp->KXC', query_XKp, keys_KCp, precision=jax.lax.Precision.HIGHEST)


def _best_candidates(sum_nX: Array, candidate_nX: Array, R: int, last_row: int) -> Array:
  """Rows of the R greatest sums, (R, X): R rounds of a maximum, then the lowest row that reaches it."""

  def take_best(left_nX, _):
    reaches_nX = left_nX == jnp.max(left_nX, axis=0)
    row_X = jnp.min(jnp.where(reaches_nX, candidate_nX, last_row), axis=0)
    return jnp.where(candidate_nX == row_X, -jnp.inf, left_nX), row_X

  return jax.lax.scan(take_best, sum_nX, length=R)[1]
