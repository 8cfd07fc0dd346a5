"""What attention may add to its values: an embedding of the token, and rows of a bank that the last tokens address."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from mmjax.kernels.matmul import TRAINED, matmul, uniform
from mmjax.memory import NgramBag
from mmjax.memory.base import Bank, Selection
from mmjax.memory.ngram import NO_TOKEN


class ValueReader(nnx.Module):
  """Reads the rows of all layers whose values get some, once, and adds a short causal convolution over them.

  The convolution weighs each value of a token's rows and of those of the tokens before it, as many as `conv_width` says
  in all, within its document. It starts at 0. Source: Allen-Zhu 2025, arXiv:2512.17351, who puts it into each layer.
  """

  def __init__(self, bag: NgramBag, conv_width: int):
    self.bag = bag
    self.conv = nnx.Param(jnp.zeros((conv_width, bag.n_heads, bag.row_dim), jnp.float32)) if conv_width else None

  def __call__(self, last_BTn: Array, bank_MP: Bank) -> tuple[Selection, Array]:
    """Returns what each position of whole rows reads, and float32 rows_BThP, what the heads make of that.

    Args:
      last_BTn: int32, the last tokens, as many as n-grams look at and, with a convolution, conv_width - 1 more.
      bank_MP: as `Memory.apply` takes it.
    """
    selection, rows_BThP = self.bag.sums_of(last_BTn, bank_MP)

    def shifted(back: int) -> Array:
      return jnp.pad(rows_BThP, ((0, 0), (back, 0), (0, 0), (0, 0)))[:, : rows_BThP.shape[1]]

    return selection, self._convolve(rows_BThP, last_BTn, shifted)

  def flops(self) -> dict[str, int]:
    """See mmjax.model.sublayers."""
    width = 0 if self.conv is None else math.prod(self.conv.shape)
    return {'bag_reads': self.bag.flops()['bag_reads'] + TRAINED * 2 * width}

  def decode(self, last_BTn: Array, bank_MP: Bank) -> Array:
    """Returns float32 rows_BThP for some positions of rows: those of earlier tokens are read once more."""
    rows_BThP = self.bag.sums_of(last_BTn, bank_MP)[1]
    return self._convolve(rows_BThP, last_BTn, lambda back: self.bag.sums_of(last_BTn[..., back:], bank_MP)[1])

  def _convolve(self, rows_BThP: Array, last_BTn: Array, earlier: Callable[[int], Array]) -> Array:
    if self.conv is None:
      return rows_BThP
    weights = self.conv[...]
    out_BThP = rows_BThP * (1 + weights[0])
    for back in range(1, len(weights)):
      is_there_BT11 = (last_BTn[..., back] != NO_TOKEN)[..., None, None]
      out_BThP += jnp.where(is_there_BT11, earlier(back), 0) * weights[back]
    return out_BThP


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
    """Returns the values with `own_BTX` added, X = K H, in the dtype of `v_BTKH`; x_BTD is the normed input."""
    gate_XK = self.gate[...]
    weight_BTK = 2 * jax.nn.sigmoid(x_BTD[..., : len(gate_XK)].astype(jnp.float32) @ gate_XK)
    return v_BTKH + (weight_BTK[..., None] * own_BTX.reshape(v_BTKH.shape)).astype(v_BTKH.dtype)


class ValueEmbedding(GatedValues):
  """A second embedding of the token, for the values of attention."""

  def __init__(self, *, vocab_size: int, dim: int, n_kv_heads: int, head_dim: int, rngs: nnx.Rngs):
    bound = (3 / dim) ** 0.5
    shape = (vocab_size, n_kv_heads * head_dim)
    super().__init__(dim, n_kv_heads)
    self.table = nnx.Param(jax.random.uniform(rngs.params(), shape, jnp.float32, -bound, bound))

  @jax.named_scope('value_embedding')
  def __call__(self, token_BT: Array, x_BTD: Array, v_BTKH: Array) -> Array:
    """Returns the values with those of the tokens added, in the dtype of `v_BTKH`; x_BTD is the normed input."""
    return self.add(self.table[...][token_BT], x_BTD, v_BTKH)


class ValueRows(GatedValues):
  """Rows of a memory bank that the last tokens address, projected for the values of attention."""

  def __init__(self, *, row_width: int, dim: int, n_kv_heads: int, head_dim: int, rngs: nnx.Rngs):
    super().__init__(dim, n_kv_heads)
    self.kernel = nnx.Param(uniform(rngs.params(), (row_width, n_kv_heads * head_dim), fan_in=row_width))

  def flops(self) -> int:
    """Adds the projection's."""
    return super().flops() + TRAINED * 2 * math.prod(self.kernel.shape)

  @jax.named_scope('value_rows')
  def __call__(self, rows_BThP: Array, x_BTD: Array, v_BTKH: Array) -> Array:
    """Returns the values with the projection of all heads' rows added; otherwise as `ValueEmbedding`."""
    rows_BTX = rows_BThP.reshape(*rows_BThP.shape[:2], -1).astype(v_BTKH.dtype)
    return self.add(matmul(rows_BTX, self.kernel[...]), x_BTD, v_BTKH)
