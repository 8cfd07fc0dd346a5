"""What attention may add to its values: an embedding of the token, and rows of a bank that the last tokens address."""

import math

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from mmjax.kernels.matmul import TRAINED, matmul, uniform


class GatedValues(nnx.Module):
  """What attention adds to its values, each head weighed by a gate.

  The gate is 2 sigmoid(x W) of a few channels of the input, and starts at 1. Source: nanochat
  (https://github.com/karpathy/nanochat), after Zhou et al. 2024, arXiv:2410.17897.
  """

  GATE_CHANNELS = 12

  def __init__(self, dim: int, n_kv_heads: int):
    self.gate = nnx.Param(jnp.zeros((min(self.GATE_CHANNELS, dim), n_kv_heads), jnp.float32))

  def flops(self) -> int:
    """Returns what the gate of a token costs in a training step."""
    return TRAINED * 2 * math.prod(self.gate.shape)

  def add(self, own_BTX: Array, x_BTD: Array, v_BTKH: Array) -> Array:
    """Returns the values plus float `own_BTX`, X = K H, in the dtype of `v_BTKH`; x_BTD is the normed input."""
    kernel = self.gate[...]
    weight_BTK = 2 * jax.nn.sigmoid(x_BTD[..., : len(kernel)].astype(jnp.float32) @ kernel)
    return v_BTKH + (weight_BTK[..., None] * own_BTX.reshape(v_BTKH.shape)).astype(v_BTKH.dtype)


class ValueEmbedding(GatedValues):
  """A second embedding of the token, for the values of attention."""

  def __init__(self, *, vocab_size: int, dim: int, n_kv_heads: int, head_dim: int, rngs: nnx.Rngs):
    bound = (3 / dim) ** 0.5
    shape = (vocab_size, n_kv_heads * head_dim)
    super().__init__(dim, n_kv_heads)
    self.table = nnx.Param(jax.random.uniform(rngs.params(), shape, jnp.float32, -bound, bound))

  @jax.named_scope('value_embedding')
  def __call__(self, tokens_BT: Array, x_BTD: Array, v_BTKH: Array) -> Array:
    """Returns the values plus those of int32 tokens, in the dtype of `v_BTKH`; x_BTD is the normed input."""
    return self.add(self.table[...][tokens_BT], x_BTD, v_BTKH)


class ValueRows(GatedValues):
  """Rows of a memory bank that the last tokens address, projected for the values of attention."""

  def __init__(self, *, row_width: int, dim: int, n_kv_heads: int, head_dim: int, rngs: nnx.Rngs):
    super().__init__(dim, n_kv_heads)
    self.kernel = nnx.Param(uniform(rngs.params(), (row_width, n_kv_heads * head_dim), fan_in=row_width))

  def flops(self) -> int:
    """Adds the projection's."""
    return super().flops() + TRAINED * 2 * math.prod(self.kernel.shape)

  @jax.named_scope('value_rows')
  def __call__(self, sum_BThP: Array, x_BTD: Array, v_BTKH: Array) -> Array:
    """Returns the values plus the float sums, projected, in the dtype of `v_BTKH`; x_BTD is the normed input."""
    rows_BTX = sum_BThP.reshape(*sum_BThP.shape[:2], -1).astype(v_BTKH.dtype)
    return self.add(matmul(rows_BTX, self.kernel[...]), x_BTD, v_BTKH)
