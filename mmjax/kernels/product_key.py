"""Product-key top-k: the best R of C*C rows from two lists of C sub-scores, exactly.

A row is a pair of sub-keys and its score is the sum of two sub-scores, so no row outside the R best of each list can
be among the R best sums. Source: Lample et al. 2019, arXiv:1907.05242, section 3.1.
"""

import jax
import jax.numpy as jnp
from jax import Array


def product_key_topk(query_BTP: Array, keys_2Cp: Array, num_selected: int) -> tuple[Array, Array]:
  """Picks the exact top `num_selected` of all C*C rows.

  Args:
    query_BTP: float; P even. Scores are computed in float32 whatever its dtype.
    keys_2Cp: two codebooks of C sub-keys, each P/2 wide.
    num_selected: R, at most C.

  Returns:
    row_BTR: int32 in [0, C*C), best first. score_BTR: float32, before any softmax; differentiable.

  Raises:
    ValueError: if R > C.

  Source: Lample et al. 2019, arXiv:1907.05242, section 3.1.
  """
  B, T, P = query_BTP.shape
  C, R = keys_2Cp.shape[1], num_selected
  if R > C:
    raise ValueError(f'num_selected={R} must be at most the {C} sub-keys of each half')
  query_X2p = query_BTP.astype(jnp.float32).reshape(B * T, 2, P // 2)
  keys_2Cp = keys_2Cp.astype(jnp.float32)
  score_2XC = jnp.einsum('xhp,hcp->hxc', query_X2p, keys_2Cp, precision=jax.lax.Precision.HIGHEST)
  best_2XR, sub_2XR = jax.lax.top_k(score_2XC.reshape(2 * B * T, C), R)
  best_2XR, sub_2XR = best_2XR.reshape(2, B * T, R), sub_2XR.reshape(2, B * T, R)
  sums_XRR = best_2XR[0, :, :, None] + best_2XR[1, :, None, :]
  rows_XRR = sub_2XR[0, :, :, None] * C + sub_2XR[1, :, None, :]
  score_XR, place_XR = jax.lax.top_k(sums_XRR.reshape(B * T, R * R), R)
  row_XR = jnp.take_along_axis(rows_XRR.reshape(B * T, R * R), place_XR, axis=1)
  return row_XR.reshape(B, T, R), score_XR.reshape(B, T, R)
