"""The parts that a block may have: RMSNorm, linear layers, rotary positions, grouped-query attention.

Parameters are float32 and stay so; each call says in which dtype its matrix products run. The residual stream, norms
and rotations are float32, as they are under torch's autocast in the code that this model comes from; on a GPU a norm
reads the stream in that dtype.
"""

import math
from functools import partial
from typing import TypedDict

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.typing import DTypeLike

from mmjax.kernels.attention import cached_attention, causal_attention
from mmjax.kernels.forms import on_cpu
from mmjax.kernels.matmul import TRAINED, matmul, uniform
from mmjax.kernels.norm import normed_matmul, rms_norm
from mmjax.model.values import ValueEmbedding, ValueRows


class LayerCache(TypedDict):
  """Keys and values of one layer at the positions decoded so far."""

  k: Array
  v: Array


class Linear(nnx.Module):
  """A matrix product without bias; `kernel` is (in, out)."""

  def __init__(self, in_dim: int, out_dim: int, *, rngs: nnx.Rngs):
    self.kernel = nnx.Param(uniform(rngs.params(), (in_dim, out_dim), fan_in=in_dim))

  def __call__(self, x: Array, dtype: DTypeLike) -> Array:
    """Maps (..., in) to (..., out), both operands and the result in `dtype`."""
    return matmul(x.astype(dtype), self.kernel[...])

  def flops(self) -> int:
    """Returns what a token costs in a training step."""
    return TRAINED * 2 * math.prod(self.kernel.shape)


class RMSNorm(nnx.Module):
  """Root-mean-square norm with a learned scale (Zhang and Sennrich 2019, arXiv:1910.07467)."""

  def __init__(self, dim: int, eps: float):
    self.scale = nnx.Param(jnp.ones(dim, jnp.float32))
    self.eps = eps

  def __call__(self, x: Array, dtype: DTypeLike = jnp.float32) -> Array:
    """Maps (..., D) to float32 (..., D); see mmjax.kernels.norm.rms_norm for `dtype`."""
    return rms_norm(x, self.scale[...], self.eps, dtype)

  def matmul(self, x: Array, kernel: Array, dtype: DTypeLike) -> Array:
    """Maps (..., D) to (..., out) in `dtype`: the norm, then a product."""
    return normed_matmul(x, self.scale[...], kernel, self.eps, dtype)


def add_to_stream(x: Array, delta: Array) -> Array:
  """Returns x + delta in the dtype of x, the float32 residual stream."""
  return x + delta if on_cpu() else _add_to_stream(x, delta)


@jax.custom_vjp
def _add_to_stream(x: Array, delta: Array) -> Array:
  return x + delta


def _add_to_stream_bwd(like_delta, grad):
  # A barrier, or XLA would read the wide gradient and round it wherever it is used.
  return grad, jax.lax.optimization_barrier(grad.astype(like_delta.dtype))


_add_to_stream.defvjp(lambda x, delta: (x + delta, jnp.zeros((), delta.dtype)), _add_to_stream_bwd)


def dropout(x: Array, rate: float, key: Array | None) -> Array:
  """Zeroes values with probability `rate` and rescales the rest, float of any shape; the identity without a key."""
  if key is None or rate == 0.0:
    return x
  keep = jax.random.bernoulli(key, 1.0 - rate, x.shape)
  return jnp.where(keep, x / (1.0 - rate), 0.0)


def rope_angles(position: Array, head_dim: int, theta: float) -> Array:
  """Returns the float32 angle of each pair of channels.

  Args:
    position: integers (..., T).
    head_dim: H, even.
    theta: base of the geometric series of wavelengths.

  Returns:
    (..., T, a) in radians, a = H / 2.

  Source: Su et al. 2021, arXiv:2104.09864.
  """
  frequency = theta ** (-jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
  return position.astype(jnp.float32)[..., None] * frequency


def apply_rope(x_BTNH: Array, angle_BTa: Array) -> Array:
  """Rotates interleaved pairs (x[2i], x[2i+1]) by their angles, in float32; keeps the dtype.

  Args:
    x_BTNH: float queries or keys.
    angle_BTa: float32, a = H / 2 angles a position, from `rope_angles`; a leading axis of 1 is broadcast over B.

  Returns:
    Like `x_BTNH`.
  """
  cos, sin = jnp.cos(angle_BTa)[:, :, None, :], jnp.sin(angle_BTa)[:, :, None, :]
  pairs = x_BTNH.astype(jnp.float32).reshape(*x_BTNH.shape[:-1], -1, 2)  # angles in bf16 would blur positions
  even, odd = pairs[..., 0], pairs[..., 1]
  turned = jnp.stack((even * cos - odd * sin, even * sin + odd * cos), axis=-1)
  return turned.reshape(x_BTNH.shape).astype(x_BTNH.dtype)


class Attention(nnx.Module):
  """Causal grouped-query self-attention with rotary positions.

  With `qk_norm_eps` each head's queries and keys pass an RMSNorm before they are rotated (Henry et al. 2020,
  arXiv:2010.04245); with `vocab_size` values get a `ValueEmbedding`; with `row_width`, h P, `ValueRows`.
  """

  def __init__(
    self,
    *,
    dim: int,
    n_kv_heads: int,
    head_dim: int,
    qk_norm_eps: float | None = None,
    vocab_size: int | None = None,
    row_width: int | None = None,
    rngs: nnx.Rngs,
  ):
    self.wq = Linear(dim, dim, rngs=rngs)
    self.wk = Linear(dim, n_kv_heads * head_dim, rngs=rngs)
    self.wv = Linear(dim, n_kv_heads * head_dim, rngs=rngs)
    self.wo = Linear(dim, dim, rngs=rngs)
    self.head_dim = head_dim
    self.q_norm, self.k_norm = (None if qk_norm_eps is None else RMSNorm(head_dim, qk_norm_eps) for _ in range(2))
    sizes = {'dim': dim, 'n_kv_heads': n_kv_heads, 'head_dim': head_dim}
    self.value_embedding = None if vocab_size is None else ValueEmbedding(vocab_size=vocab_size, **sizes, rngs=rngs)
    self.value_rows = None if row_width is None else ValueRows(row_width=row_width, **sizes, rngs=rngs)

  def flops(self, length: int) -> dict[str, int]:
    """Returns the FLOPs of a training step for a token by part, averaged over a row of `length` tokens."""
    projections = (self.wq, self.wk, self.wv, self.wo)
    own = {
      'attention_projections': sum(linear.flops() for linear in projections),
      'attention': TRAINED * 2 * self.wq.kernel.shape[1] * (length + 1),
    }
    added = {'value_embeddings': self.value_embedding, 'value_rows': self.value_rows}
    return own | {name: values.flops() for name, values in added.items() if values is not None}

  @jax.named_scope('attention')
  def __call__(
    self,
    x_BTD: Array,
    norm: RMSNorm,
    angle_BTa: Array,
    tokens_BT: Array,
    segment_BT: Array | None,
    dtype: DTypeLike,
    backend: str,
    sum_BThP: Array | None = None,
  ) -> tuple[Array, LayerCache]:
    """Attends over whole rows; `segment_BT` and `backend` as in `kernels.attention.causal_attention`.

    `norm` norms the stream, `x_BTD`; `angle_BTa`, float32, comes from `rope_angles`; tokens are int32. `sum_BThP`,
    float32, is what each head of a memory read for a token; None where no values get it.

    Returns:
      (B, T, D) in `dtype`, and the keys (rotated) and values, (B, T, K, H), for a cache.
    """
    q_BTNH, k_BTKH, v_BTKH = self._project(x_BTD, norm, angle_BTa, tokens_BT, dtype, sum_BThP)
    out_BTNH = causal_attention(q_BTNH, k_BTKH, v_BTKH, segment_BT, backend=backend)
    return self.wo(out_BTNH.reshape(x_BTD.shape), dtype), {'k': k_BTKH, 'v': v_BTKH}

  def decode(
    self,
    x_BTD: Array,
    norm: RMSNorm,
    angle_BTa: Array,
    tokens_BT: Array,
    cache: LayerCache,
    position_BT: Array,
    dtype: DTypeLike,
    sum_BThP: Array | None = None,
  ) -> tuple[Array, LayerCache]:
    """Attends from new tokens, at `position_BT`, to themselves and to what the cache holds before them.

    The other arguments are as in `__call__`.

    Returns:
      (B, T, D) in `dtype`, and the cache, (B, S, K, H) with position s in slot s, with the new keys and values in it.
    """
    q_BTNH, k_BTKH, v_BTKH = self._project(x_BTD, norm, angle_BTa, tokens_BT, dtype, sum_BThP)
    row_B1 = jnp.arange(x_BTD.shape[0])[:, None]
    k_BSKH = cache['k'].at[row_B1, position_BT].set(k_BTKH.astype(cache['k'].dtype))
    v_BSKH = cache['v'].at[row_B1, position_BT].set(v_BTKH.astype(cache['v'].dtype))
    visible_BTS = jnp.arange(k_BSKH.shape[1]) <= position_BT[..., None]
    out_BTNH = cached_attention(q_BTNH, k_BSKH, v_BSKH, visible_BTS)
    return self.wo(out_BTNH.reshape(x_BTD.shape), dtype), {'k': k_BSKH, 'v': v_BSKH}

  def _project(
    self, x_BTD: Array, norm: RMSNorm, angle_BTa: Array, tokens_BT: Array, dtype: DTypeLike, sum_BThP: Array | None
  ) -> tuple[Array, Array, Array]:
    q_BTNH, k_BTKH, v_BTKH = self._project_heads(x_BTD, norm, angle_BTa, dtype)
    if self.value_embedding is not None:
      v_BTKH = self.value_embedding(tokens_BT, norm(x_BTD, dtype), v_BTKH)
    if self.value_rows is not None:
      v_BTKH = self.value_rows(sum_BThP, norm(x_BTD, dtype), v_BTKH)
    return q_BTNH, k_BTKH, v_BTKH

  def _project_heads(
    self, x_BTD: Array, norm: RMSNorm, angle_BTa: Array, dtype: DTypeLike
  ) -> tuple[Array, Array, Array]:
    heads = (*x_BTD.shape[:-1], -1, self.head_dim)
    kernels = [linear.kernel[...] for linear in (self.wq, self.wk, self.wv)]

    if not on_cpu():
      x_BTNH = norm.matmul(x_BTD, jnp.concatenate(kernels, axis=1), dtype).reshape(heads)
      n_kv_heads = kernels[1].shape[1] // self.head_dim
      if self.q_norm is None:
        return _split_and_rotate(x_BTNH, angle_BTa, n_kv_heads)
      n_heads = x_BTNH.shape[2] - 2 * n_kv_heads
      return self._norm_and_rotate(*jnp.split(x_BTNH, (n_heads, n_heads + n_kv_heads), axis=2), angle_BTa)
    normed_BTD = norm(x_BTD)  # cast for each product alone, so that their gradients are added up in float32
    q_BTNH, k_BTKH, v_BTKH = (matmul(normed_BTD.astype(dtype), kernel).reshape(heads) for kernel in kernels)
    return self._norm_and_rotate(q_BTNH, k_BTKH, v_BTKH, angle_BTa)

  def _norm_and_rotate(
    self, q_BTNH: Array, k_BTKH: Array, v_BTKH: Array, angle_BTa: Array
  ) -> tuple[Array, Array, Array]:
    if self.q_norm is not None:
      q_BTNH, k_BTKH = self.q_norm(q_BTNH).astype(q_BTNH.dtype), self.k_norm(k_BTKH).astype(k_BTKH.dtype)
    return apply_rope(q_BTNH, angle_BTa), apply_rope(k_BTKH, angle_BTa), v_BTKH


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def _split_and_rotate(x_BTNH: Array, angle_BTa: Array, n_kv_heads: int) -> tuple[Array, Array, Array]:
  """Splits heads into those of queries, keys and values, and rotates the first two; its gradient is one array, too."""
  n_heads = x_BTNH.shape[2] - 2 * n_kv_heads
  q_BTNH, k_BTKH, v_BTKH = jnp.split(x_BTNH, (n_heads, n_heads + n_kv_heads), axis=2)
  return apply_rope(q_BTNH, angle_BTa), apply_rope(k_BTKH, angle_BTa), v_BTKH


def _split_and_rotate_bwd(n_kv_heads, angle_BTa, grads):
  q_BTNH, k_BTKH, v_BTKH = grads
  back = apply_rope(q_BTNH, -angle_BTa), apply_rope(k_BTKH, -angle_BTa), v_BTKH
  return jnp.concatenate(back, axis=2), None


_split_and_rotate.defvjp(lambda x, angle, n: (_split_and_rotate(x, angle, n), angle), _split_and_rotate_bwd)
