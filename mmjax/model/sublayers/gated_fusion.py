"""Experiment 1.4.2: rows from the bank, concatenated with the memory's input, through a gated MLP."""

import jax
from flax import nnx
from jax import Array
from jax.typing import DTypeLike

from mmjax.config import MemoryConfig, ModelConfig
from mmjax.kernels.fusion import gated_mlp
from mmjax.model.layers import Linear
from mmjax.model.memory import Selection
from mmjax.model.sublayers.memory import MemorySublayer


class GatedFusion(nnx.Module):
  """down(silu(gate(z)) * up(z)) with z = (m, R rows, by head and score); `gate` and `up` are (D + R * P, D)."""

  def __init__(self, model: ModelConfig, memory: MemoryConfig, *, rngs: nnx.Rngs):
    width = model.dim + memory.n_heads * model.num_selected * model.knowledge_dim
    self.gate = Linear(width, model.dim, rngs=rngs)
    self.up = Linear(width, model.dim, rngs=rngs)
    self.down = Linear(model.dim, model.dim, rngs=rngs)

  @jax.named_scope('fusion')
  def __call__(self, m_BTD: Array, rows_BTRP: Array, dtype: DTypeLike) -> Array:
    """Maps float32 (B, T, D) and rows (B, T, R, P) to (B, T, D) in `dtype`."""
    rows_BTF = rows_BTRP.reshape(*m_BTD.shape[:-1], -1)
    kernels = (linear.kernel[...] for linear in (self.gate, self.up, self.down))
    return gated_mlp((m_BTD, rows_BTF), *kernels, dtype)


class GatedMemoryFusion(MemorySublayer):
  """The whole sublayer: norm, gate, lookup, fusion."""

  def __init__(self, model: ModelConfig, memory: MemoryConfig, *, rngs: nnx.Rngs):
    super().__init__(model, memory, rngs=rngs)
    self.fusion = GatedFusion(model, memory, rngs=rngs)

  def read(self, x_BTD: Array, selection: Selection, bank_MP: Array, dtype: DTypeLike) -> Array:
    """Returns the fusion of the normed input and the rows."""
    return self.fusion(self.norm(x_BTD, dtype), self.rows(selection, bank_MP, dtype), dtype)
