"""Cross entropy of a large vocabulary, a chunk of positions at a time.

All float32 logits of a batch are its largest array by far, and the backward pass would need them again. Here the
gradients of a chunk are formed while its logits are at hand, so that one chunk of logits exists at a time and nothing
is computed twice; the backward pass only multiplies by the gradient of the sum.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array

from mmjax.kernels.forms import on_cpu
from mmjax.kernels.matmul import dot, weight_gradient

WIDER = 4  # times as long a chunk elsewhere than on a CPU: each adds to the gradient of the whole output projection
CHUNK_LOGITS = 1 << 23  # float32 logits held at once by the loss: 32 MiB


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def cross_entropy_sums(
  hidden_BTD: Array, output_VD: Array, target_BT: Array, weight_BT: Array, chunk_tokens: int
) -> tuple[Array, Array]:
  """Sums weighted negative log-likelihoods and weighted hits of the arg-max.

  Args:
    hidden_BTD: float, the compute dtype.
    output_VD: float, the output projection, cast to the compute dtype.
    target_BT: int32 in [0, V).
    weight_BT: float32; 0 leaves a position out. Has no gradient.
    chunk_tokens: positions of T, in all B rows, whose logits exist at the same time on a CPU; at least 1. Elsewhere
      `WIDER` times as many do, in the compute dtype.

  Returns:
    nll_sum: float32, nats; differentiable in hidden_BTD and output_VD, whose gradient is summed in float32.
    correct_sum: float32; the first of equal logits counts as the arg-max. Has no gradient.
  """

  def sums(of_chunk: Callable, chunk_tokens: int, *arrays: Array) -> tuple[Array, Array]:
    hidden_BTD, output_VD, *rest = arrays
    cast_VD = output_VD.astype(hidden_BTD.dtype)

    def add_chunk(sums, chunk):
      hidden_BtD, target_Bt, weight_Bt = chunk
      nll, correct, _ = of_chunk(hidden_BtD, cast_VD, target_Bt, weight_Bt)
      return (sums[0] + nll, sums[1] + correct), None

    return _scan(add_chunk, (jnp.float32(0), jnp.float32(0)), (hidden_BTD, *rest), chunk_tokens)[0]

  return _by_platform(sums, chunk_tokens, hidden_BTD, output_VD, target_BT, weight_BT)


def fitting_chunk(batch: int, vocab_size: int, length: int) -> int:
  """Returns how many positions the loss takes at a time, so that its logits stay near CHUNK_LOGITS values."""
  return max(1, min(length, CHUNK_LOGITS // (batch * vocab_size)))


def _by_platform(run: Callable, chunk_tokens: int, *arrays: Array) -> tuple:
  """Runs chunks in the form that the platform likes: small ones in a CPU's cache, few kernels on a GPU."""
  T = arrays[0].shape[1]
  if on_cpu():
    return run(_chunk, chunk_tokens, *arrays)
  n_chunks = -(-T // min(T, WIDER * chunk_tokens))
  return run(_chunk_in_one_pass, -(-T // n_chunks), *arrays)  # chunks of one length, if they can be


def _forward(hidden_BTD, output_VD, target_BT, weight_BT, chunk_tokens):
  return _by_platform(_sums_and_gradients, chunk_tokens, hidden_BTD, output_VD, target_BT, weight_BT)


def _sums_and_gradients(of_chunk, chunk_tokens, hidden_BTD, output_VD, target_BT, weight_BT):
  cast_VD = output_VD.astype(hidden_BTD.dtype)
  # D by V on a CPU, because weight_gradient may transpose its first argument, and hidden states are narrower than
  # logits; V by D elsewhere, because the embedding's gradient is added to it row by row.
  turned = of_chunk is _chunk

  def add_chunk(carry, chunk):
    nll_sum, correct_sum, grad = carry
    hidden_BtD, target_Bt, weight_Bt = chunk
    nll, correct, grad_logits_BtV = of_chunk(hidden_BtD, cast_VD, target_Bt, weight_Bt)
    grad_hidden_BtD = dot(grad_logits_BtV, cast_VD, 2, 0, hidden_BtD.dtype)
    pair = (hidden_BtD, grad_logits_BtV) if turned else (grad_logits_BtV, hidden_BtD)
    return (nll_sum + nll, correct_sum + correct, grad + weight_gradient(*pair)), grad_hidden_BtD

  shape = output_VD.shape[::-1] if turned else output_VD.shape
  carry = jnp.float32(0), jnp.float32(0), jnp.zeros(shape, jnp.float32)
  carry, grad_hidden_BTD = _scan(add_chunk, carry, (hidden_BTD, target_BT, weight_BT), chunk_tokens)
  grad_VD = carry[2].T if turned else carry[2]
  return carry[:2], (grad_hidden_BTD, grad_VD.astype(output_VD.dtype))


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


def _chunk_in_one_pass(hidden_BtD, output_VD, target_Bt, weight_Bt):
  """The same for a GPU: logits in the compute dtype, as under torch's autocast, and read once for all of their sums.

  One reduction carries greatest logit, its place, the sum of exponentials below it (Milakov and Gimelshein 2018,
  arXiv:1805.02867) and the target's logit.
  """
  logits_BtV = dot(hidden_BtD, output_VD, 2, 1, hidden_BtD.dtype)
  index_BtV = jax.lax.broadcasted_iota(jnp.int32, logits_BtV.shape, 2)
  is_target_BtV = index_BtV == target_Bt[..., None]
  wide_BtV = logits_BtV.astype(jnp.float32)

  def add(a, b):
    (a_max, a_index, a_sum, a_picked), (b_max, b_index, b_sum, b_picked) = a, b
    first = (a_max > b_max) | ((a_max == b_max) & (a_index < b_index))
    lower = jnp.exp(-jnp.abs(a_max - b_max))
    total = jnp.where(a_max > b_max, a_sum + b_sum * lower, b_sum + a_sum * lower)
    return jnp.where(first, a_max, b_max), jnp.where(first, a_index, b_index), total, a_picked + b_picked

  inputs = wide_BtV, index_BtV, jnp.ones_like(wide_BtV), jnp.where(is_target_BtV, wide_BtV, 0)
  # Finite, so that no difference of the greatest is a NaN.
  starts = jnp.finfo(jnp.float32).min, jnp.int32(output_VD.shape[0]), jnp.float32(0), jnp.float32(0)
  max_Bt, index_Bt, sum_Bt, picked_Bt = jax.lax.reduce(inputs, starts, add, (2,))
  log_sum_Bt = max_Bt + jnp.log(sum_Bt)
  grad_logits_BtV = weight_Bt[..., None] * (jnp.exp(wide_BtV - log_sum_Bt[..., None]) - is_target_BtV)
  nll, correct = jnp.sum(weight_Bt * (log_sum_Bt - picked_Bt)), jnp.sum(weight_Bt * (index_Bt == target_Bt))
  return nll, correct, grad_logits_BtV.astype(hidden_BtD.dtype)


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
    carry, out = jax.lax.scan(step_at, carry, jnp.arange(n_whole))
    if out is not None:
      parts.append(out.swapaxes(0, 1).reshape(out.shape[1], n_whole * chunk_tokens, -1))
  if T % chunk_tokens:
    carry, out_BtD = step(carry, [x[:, n_whole * chunk_tokens :] for x in arrays])
    parts.append(out_BtD)
  if not parts or parts[-1] is None:
    return carry, None
  return carry, jnp.concatenate(parts, axis=1)
