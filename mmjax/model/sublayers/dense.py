"""Experiment 1.4.0: the SwiGLU feed-forward layer (Shazeer 2020, arXiv:2002.05202)."""

import jax
from flax import nnx
from jax import Array
from jax.typing import DTypeLike

from mmjax.config import MemoryConfig, ModelConfig
from mmjax.kernels.fusion import gated_mlp, normed_gated_mlp
from mmjax.model.layers import Linear, RMSNorm
from mmjax.model.sublayers import SublayerInput, SublayerOutput


class SwiGLU(nnx.Module):
  """down(silu(gate(x)) * up(x)), D -> F -> D."""

  def __init__(self, dim: int, hidden_dim: int, *, rngs: nnx.Rngs):
    self.gate = Linear(dim, hidden_dim, rngs=rngs)
    self.up = Linear(dim, hidden_dim, rngs=rngs)
    self.down = Linear(hidden_dim, dim, rngs=rngs)

  @jax.named_scope('feed_forward')
  def transform(self, x_BTD: Array, dtype: DTypeLike) -> Array:
    """Maps (B, T, D) to (B, T, D) in `dtype`."""
    return gated_mlp((x_BTD,), *self.kernels(), dtype)

  def kernels(self) -> tuple[Array, Array, Array]:
    """Returns those of gate, up and down, float32."""
    return tuple(linear.kernel[...] for linear in (self.gate, self.up, self.down))

  def flops(self) -> dict[str, int]:
    """See mmjax.model.sublayers."""
    return {'ffn': self.gate.flops() + self.up.flops() + self.down.flops()}


class DenseFFN(SwiGLU):
  """The whole sublayer: norm, then SwiGLU."""

  def __init__(self, dim: int, hidden_dim: int, norm_eps: float, *, rngs: nnx.Rngs):
    super().__init__(dim, hidden_dim, rngs=rngs)
    self.norm = RMSNorm(dim, norm_eps)

  def __call__(self, inputs: SublayerInput, dtype: DTypeLike) -> SublayerOutput:
    """See mmjax.model.sublayers."""
    with jax.named_scope('feed_forward'):
      scale, eps = self.norm.scale[...], self.norm.eps
      return SublayerOutput(normed_gated_mlp(inputs.h_BTD, scale, (), *self.kernels(), eps, dtype))


def dense(model: ModelConfig, memory: MemoryConfig, *, rngs: nnx.Rngs) -> DenseFFN:
  """Experiment 1.4.0."""
  return DenseFFN(model.dim, model.dense_hidden_dim, model.norm_eps, rngs=rngs)
