"""Product-key top-k: the best R of C*C rows from two lists of C sub-scores, exactly.

A row is a pair of sub-keys and its score is the sum of two sub-scores. The pair of the i-th best of one list and the
j-th best of the other (from 0) has (i+1)(j+1)-1 pairs before it, so only pairs with (i+1)(j+1) <= R can be among the R
best: 20 of C*C for R = 8. Source: Lample et al. 2019, arXiv:1907.05242, section 3.1.
"""

import jax
import jax.numpy as jnp
from jax import Array


def product_key_topk(query_BTP: Array, keys_2Cp: Array, num_selected: int) -> tuple[Array, Array]:
  """Picks the exact top `num_selected` of all C*C rows.

  Rows are ordered by their float32 score, best first, and equal scores by row, lowest first. Where two sums are equal
  only because float32 rounded them, the last place may go to the pair of the better sub-key instead of the lower row.

  Args:
    query_BTP: float; P even. Scores are computed in float32 whatever its dtype: bf16 would pick other rows.
    keys_2Cp: two codebooks of C sub-keys, each P/2 wide.
    num_selected: R, at most C.

  Returns:
    row_BTR: int32 in [0, C*C), i * C + j for sub-keys i and j. score_BTR: float32, before any softmax; differentiable.

  Raises:
    ValueError: if R > C.
  """
  B, T, _ = query_BTP.shape
  C, R = keys_2Cp.shape[1], num_selected
  if R > C:
    raise ValueError(f'num_selected={R} must be at most the {C} sub-keys of each half')
  score_2XC = _sub_scores(query_BTP, keys_2Cp)
  # Barriers, because only rank 2 gets XLA's fast top-k and reshapes move through it: 30 times slower on a CPU.
  flat_YC = jax.lax.optimization_barrier(score_2XC.reshape(-1, C))
  # One barrier an output: around both, XLA 0.10.2 aborts while it partitions over several devices.
  best_YR, sub_key_YR = (jax.lax.optimization_barrier(x) for x in jax.lax.top_k(flat_YC, R))
  # Tokens X last: what follows is arithmetic on the few candidates n of all tokens at a time.
  best_2RX = best_YR.reshape(2, -1, R).swapaxes(1, 2)
  sub_key_2RX = sub_key_YR.reshape(2, -1, R).swapaxes(1, 2)
  pairs = [(i, j) for i in range(R) for j in range(R) if (i + 1) * (j + 1) <= R]
  sum_nX = jnp.stack([best_2RX[0, i] + best_2RX[1, j] for i, j in pairs])
  candidate_nX = jnp.stack([sub_key_2RX[0, i] * C + sub_key_2RX[1, j] for i, j in pairs])
  row_RX = _best_candidates(jax.lax.stop_gradient(sum_nX), candidate_nX, R, C * C - 1)
  score_RX = jnp.sum(jnp.where(candidate_nX == row_RX[:, None], sum_nX, 0), axis=1)
  return row_RX.T.reshape(B, T, R), score_RX.T.reshape(B, T, R)


def product_key_topk_reference(query_BTP: Array, keys_2Cp: Array, num_selected: int) -> tuple[Array, Array]:
  """The definition: all C*C sums, sorted."""
  B, T, _ = query_BTP.shape
  first_XC, second_XC = _sub_scores(query_BTP, keys_2Cp)
  sums_XM = (first_XC[:, :, None] + second_XC[:, None, :]).reshape(B * T, -1)
  score_XR, row_XR = jax.lax.top_k(sums_XM, num_selected)
  return row_XR.reshape(B, T, -1), score_XR.reshape(B, T, -1)


def _sub_scores(query_BTP: Array, keys_2Cp: Array) -> Array:
  query_X2p = query_BTP.astype(jnp.float32).reshape(-1, 2, keys_2Cp.shape[2])
  # HIGHEST, because GPUs would multiply float32 as TF32, which picks other rows.
  return jnp.einsum('xhp,hcp->hxc', query_X2p, keys_2Cp, precision=jax.lax.Precision.HIGHEST)


def _best_candidates(sum_nX: Array, candidate_nX: Array, R: int, last_row: int) -> Array:
  """Rows of the R greatest sums, (R, X): R rounds of a maximum, then the lowest row that reaches it."""

  def take_best(left_nX, _):
    reaches_nX = left_nX == jnp.max(left_nX, axis=0)
    row_X = jnp.min(jnp.where(reaches_nX, candidate_nX, last_row), axis=0)
    return jnp.where(candidate_nX == row_X, -jnp.inf, left_nX), row_X

  return jax.lax.scan(take_best, sum_nX, length=R)[1]
