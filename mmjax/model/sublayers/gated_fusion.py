"""Experiment 1.4.2: rows from the bank, concatenated with the attention output, through a gated MLP.

Faithful to the record's code: the norm reads the attention output and not the residual stream, and the gate's scores
never reach the output, so that no gradient reaches the gate: it routes by a fixed random projection.
"""

import jax
from flax import nnx
from jax import Array
from jax.typing import DTypeLike

from mmjax.config import ModelConfig
from mmjax.kernels.bank import bank_lookup
from mmjax.kernels.fusion import gated_projection
from mmjax.model.layers import Linear, RMSNorm
from mmjax.model.memory import ProductKeyGate
from mmjax.model.sublayers.base import SublayerOutput


class GatedFusion(nnx.Module):
  """down(silu(gate(z)) * up(z)) with z = (m, R rows in score order); `gate` and `up` are (D + R * P, D)."""

  def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
    width = config.dim + config.num_selected * config.knowledge_dim
    self.gate = Linear(width, config.dim, rngs=rngs)
    self.up = Linear(width, config.dim, rngs=rngs)
    self.down = Linear(config.dim, config.dim, rngs=rngs)

  @jax.named_scope('fusion')
  def __call__(self, m_BTD: Array, rows_BTRP: Array, dtype: DTypeLike) -> Array:
    """Maps float32 (B, T, D) and rows (B, T, R, P) to (B, T, D) in `dtype`."""
    rows_BTF = rows_BTRP.reshape(*m_BTD.shape[:-1], -1)
    z_BTD = gated_projection(m_BTD.astype(dtype), rows_BTF, self.gate.kernel[...], self.up.kernel[...])
    return self.down(z_BTD, dtype)


class GatedMemoryFusion(nnx.Module):
  """The whole sublayer: norm, gate, lookup, fusion."""

  uses_bank = True
  without_gradient = (r'gate/keys$', r'gate/query/kernel$')

  def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
    self.norm = RMSNorm(config.dim, config.norm_eps)
    self.gate = ProductKeyGate(config, rngs=rngs)
    self.fusion = GatedFusion(config, rngs=rngs)

  def __call__(self, h_BTD: Array, h_attn_BTD: Array, bank_MP: Array | None, dtype: DTypeLike) -> SublayerOutput:
    """See mmjax.model.sublayers.base."""
    assert bank_MP is not None
    m_BTD = self.norm(h_attn_BTD)
    row_BTR, _ = self.gate(m_BTD)
    rows_BTRP = bank_lookup(bank_MP, row_BTR, dtype)
    return SublayerOutput(self.fusion(m_BTD, rows_BTRP, dtype), row_BTR)
