"""What each kernel computes, written down as its definition says; autodiff gives the gradients."""

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike

from mmjax.kernels.attention import MASKED


def causal_attention(q_BTNH: Array, k_BTKH: Array, v_BTKH: Array, segment_BT: Array) -> Array:
  """Attends head by repeated head, in float32."""
  q_BTNH, k_BTKH, v_BTKH = (x.astype(jnp.float32) for x in (q_BTNH, k_BTKH, v_BTKH))
  N, H = q_BTNH.shape[2:]
  k_BTNH, v_BTNH = (jnp.repeat(x, N // x.shape[2], axis=2) for x in (k_BTKH, v_BTKH))
  score_BNTS = jnp.einsum('BTNH,BSNH->BNTS', q_BTNH, k_BTNH) / H**0.5
  visible_BTS = jnp.tril(segment_BT[:, :, None] == segment_BT[:, None, :])
  weight_BNTS = jax.nn.softmax(jnp.where(visible_BTS[:, None], score_BNTS, MASKED), axis=-1)
  return jnp.einsum('BNTS,BSNH->BTNH', weight_BNTS, v_BTNH)


def product_key_topk(
  query_BTkp: Array, keys_kCp: Array, num_selected: int, bias_kC: Array | None = None
) -> tuple[Array, Array]:
  """Sorts all C*C sums."""
  score_BTkC = jnp.einsum('BTkp,kCp->BTkC', query_BTkp, keys_kCp, precision=jax.lax.Precision.HIGHEST)

  def all_sums(score_XkC: Array) -> Array:
    sums = score_XkC[..., 0::2, :, None] + score_XkC[..., 1::2, None, :]
    return sums.reshape(*sums.shape[:-2], -1)

  sums_BThM = all_sums(score_BTkC)
  bias_hM = 0 if bias_kC is None else jax.lax.stop_gradient(all_sums(bias_kC))
  row_BThr = jax.lax.top_k(sums_BThM + bias_hM, num_selected)[1]
  return row_BThr, jnp.take_along_axis(sums_BThM, row_BThr, axis=-1)


def bank_lookup(bank_MP: Array, row_BTR: Array, dtype: DTypeLike) -> Array:
  """Takes rows."""
  return jnp.take(bank_MP, row_BTR, axis=0).astype(dtype)


def bank_bag(bank_MP: Array, row_BThr: Array, weight_BThr: Array) -> Array:
  """Takes rows and sums them, weighted."""
  return jnp.einsum('...r,...rP->...P', weight_BThr, jnp.take(bank_MP, row_BThr, axis=0))


def gated_mlp(inputs: tuple[Array, ...], gate_kernel: Array, up_kernel: Array, down_kernel: Array) -> Array:
  """Builds the concatenation; in float32."""
  z = jnp.concatenate(inputs, axis=-1).astype(jnp.float32)
  return (jax.nn.silu(z @ gate_kernel) * (z @ up_kernel)) @ down_kernel


def cross_entropy_sums(hidden_BTD: Array, output_VD: Array, target_BT: Array, weight_BT: Array) -> tuple[Array, Array]:
  """Makes all logits at once."""
  logits_BTV = jnp.einsum('BTD,VD->BTV', *(x.astype(jnp.float32) for x in (hidden_BTD, output_VD)))
  log_likelihood_BTV = jax.nn.log_softmax(logits_BTV, axis=-1)
  nll_BT = -jnp.take_along_axis(log_likelihood_BTV, target_BT[..., None], axis=-1)[..., 0]
  return jnp.sum(weight_BT * nll_BT), jnp.sum(weight_BT * (jnp.argmax(logits_BTV, axis=-1) == target_BT))
