"""Experiment 1.4.0: the SwiGLU feed-forward layer (Shazeer 2020, arXiv:2002.05202)."""

import jax
from flax import nnx
from jax import Array
from jax.typing import DTypeLike

from mmjax.config import ModelConfig
from mmjax.model.layers import Linear, RMSNorm
from mmjax.model.sublayers.base import SublayerOutput


class DenseFFN(nnx.Module):
  """down(silu(gate(x)) * up(x)) with x = norm(h)."""

  uses_bank = False
  without_gradient: tuple[str, ...] = ()

  def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
    hidden = config.dense_hidden_dim
    self.norm = RMSNorm(config.dim, config.norm_eps)
    self.gate = Linear(config.dim, hidden, rngs=rngs)
    self.up = Linear(config.dim, hidden, rngs=rngs)
    self.down = Linear(hidden, config.dim, rngs=rngs)

  def __call__(self, h_BTD: Array, h_attn_BTD: Array, bank_MP: Array | None, dtype: DTypeLike) -> SublayerOutput:
    """See mmjax.model.sublayers.base."""
    x_BTD = self.norm(h_BTD)
    z_BTF = jax.nn.silu(self.gate(x_BTD, dtype)) * self.up(x_BTD, dtype)
    return SublayerOutput(self.down(z_BTF, dtype), None)
