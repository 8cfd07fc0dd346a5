"""Cross entropy of a large vocabulary, a chunk of positions at a time.

All float32 logits of a batch are its largest array by far, and the backward pass would need them again. Here the
gradients of a chunk are formed while its logits are at hand, so that one chunk of logits exists at a time and nothing
is computed twice; the backward pass only multiplies by the gradient of the sum.
"""

import functools

import jax
import jax.numpy as jnp
from jax import Array

from mmjax.kernels.matmul import dot, weight_gradient


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def cross_entropy_sums(
  hidden_BTD: Array, output_VD: Array, target_BT: Array, weight_BT: Array, chunk_tokens: int
) -> tuple[Array, Array]:
  """Sums weighted negative log-likelihoods and weighted hits of the arg-max.

  Args:
    hidden_BTD: float, the compute dtype.
    output_VD: the output projection, cast to the compute dtype.
    target_BT: int32 in [0, V).
    weight_BT: float32; 0 leaves a position out. Has no gradient.
    chunk_tokens: positions of T, in all B rows, whose logits exist at the same time; at least 1.

  Returns:
    nll_sum: float32, nats; differentiable in hidden_BTD and output_VD, whose gradient is summed in float32.
    correct_sum: float32; the first of equal logits counts as the arg-max. Has no gradient.
  """
  output_VD = output_VD.astype(hidden_BTD.dtype)

  def add_chunk(sums, chunk):
    hidden_BtD, target_Bt, weight_Bt = chunk
    nll, correct, _ = _chunk(hidden_BtD, output_VD, target_Bt, weight_Bt)
    return (sums[0] + nll, sums[1] + correct), None

  sums, _ = _scan(add_chunk, (jnp.float32(0), jnp.float32(0)), (hidden_BTD, target_BT, weight_BT), chunk_tokens)
  return sums


def cross_entropy_sums_reference(
  hidden_BTD: Array, output_VD: Array, target_BT: Array, weight_BT: Array
) -> tuple[Array, Array]:
  """The definition, with all logits at once."""
  logits_BTV = jnp.einsum('btd,vd->btv', *(x.astype(jnp.float32) for x in (hidden_BTD, output_VD)))
  log_likelihood_BTV = jax.nn.log_softmax(logits_BTV, axis=-1)
  nll_BT = -jnp.take_along_axis(log_likelihood_BTV, target_BT[..., None], axis=-1)[..., 0]
  return jnp.sum(weight_BT * nll_BT), jnp.sum(weight_BT * (jnp.argmax(logits_BTV, axis=-1) == target_BT))


def _forward(hidden_BTD, output_VD, target_BT, weight_BT, chunk_tokens):
  cast_VD = output_VD.astype(hidden_BTD.dtype)

  def add_chunk(carry, chunk):
    nll_sum, correct_sum, grad_DV = carry
    hidden_BtD, target_Bt, weight_Bt = chunk
    nll, correct, grad_logits_BtV = _chunk(hidden_BtD, cast_VD, target_Bt, weight_Bt)
    grad_hidden_BtD = dot(grad_logits_BtV, cast_VD, 2, 0, hidden_BtD.dtype)
    # D by V, because weight_gradient may transpose its first argument, and hidden states are narrower than logits.
    grad_DV += weight_gradient(hidden_BtD, grad_logits_BtV)
    return (nll_sum + nll, correct_sum + correct, grad_DV), grad_hidden_BtD

  carry = jnp.float32(0), jnp.float32(0), jnp.zeros(output_VD.shape[::-1], jnp.float32)
  carry, grad_hidden_BTD = _scan(add_chunk, carry, (hidden_BTD, target_BT, weight_BT), chunk_tokens)
  return carry[:2], (grad_hidden_BTD, carry[2].T.astype(output_VD.dtype))


def _backward(chunk_tokens, residuals, cotangents):
  grad_hidden_BTD, grad_output_VD = residuals
  scale = cotangents[0]
  return (grad_hidden_BTD * scale).astype(grad_hidden_BTD.dtype), grad_output_VD * scale, None, None


cross_entropy_sums.defvjp(_forward, _backward)


def _chunk(hidden_BtD, output_VD, target_Bt, weight_Bt):
  """Sums of one chunk, and the gradient of the first of them with respect to the logits, in the compute dtype."""
  logits_BtV = dot(hidden_BtD, output_VD, 2, 1, jnp.float32)
  index_V = jnp.arange(output_VD.shape[0])
  is_target_BtV = index_V == target_Bt[..., None]
  max_Bt1 = jnp.max(logits_BtV, axis=-1, keepdims=True)
  exp_BtV = jnp.exp(logits_BtV - max_Bt1)
  sum_Bt1 = jnp.sum(exp_BtV, axis=-1, keepdims=True)
  picked_Bt = jnp.sum(jnp.where(is_target_BtV, logits_BtV, 0), axis=-1)
  nll_Bt = (max_Bt1 + jnp.log(sum_Bt1))[..., 0] - picked_Bt
  # argmax as two plain reductions, which vectorise: the target is a maximum, and none stands before it.
  beaten_Bt = jnp.any((logits_BtV == max_Bt1) & (index_V < target_Bt[..., None]), axis=-1)
  correct_Bt = (picked_Bt == max_Bt1[..., 0]) & ~beaten_Bt
  grad_logits_BtV = weight_Bt[..., None] * (exp_BtV / sum_Bt1 - is_target_BtV)
  return jnp.sum(weight_Bt * nll_Bt), jnp.sum(weight_Bt * correct_Bt), grad_logits_BtV.astype(hidden_BtD.dtype)


def _scan(step, carry, arrays, chunk_tokens):
  """Scans chunks of axis 1, so that axis 0 stays sharded as it is; the last chunk may be shorter.

  Returns the last carry, and what the steps returned joined along axis 1 (None where they returned None).
  """
  T = arrays[0].shape[1]
  n_whole = T // chunk_tokens

  def step_at(carry, i):
    return step(carry, [jax.lax.dynamic_slice_in_dim(x, i * chunk_tokens, chunk_tokens, axis=1) for x in arrays])

  parts = []
  if n_whole:
    carry, out_nBtD = jax.lax.scan(step_at, carry, jnp.arange(n_whole))
    if out_nBtD is not None:
      parts.append(out_nBtD.swapaxes(0, 1).reshape(out_nBtD.shape[1], n_whole * chunk_tokens, -1))
  if T % chunk_tokens:
    carry, out_BtD = step(carry, [x[:, n_whole * chunk_tokens :] for x in arrays])
    parts.append(out_BtD)
  if not parts or parts[-1] is None:
    return carry, None
  return carry, jnp.concatenate(parts, axis=1)
