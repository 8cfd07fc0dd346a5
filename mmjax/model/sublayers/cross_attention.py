"""Experiment 1.4.1: cross attention from the attention output to the rows that the gate picked.

The record describes it and does not hold its code. This is the plain reading of the description: queries from the
normed input, keys and values projected from the token's R rows, as many heads as self-attention has, no
positions.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.typing import DTypeLike

from mmjax.config import MemoryConfig, ModelConfig
from mmjax.model.layers import Linear
from mmjax.model.memory import Selection
from mmjax.model.sublayers.memory import MemorySublayer


class CrossAttention(nnx.Module):
  """Multi-head attention from one token to its own R rows; `wk` and `wv` are (P, D)."""

  def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
    self.wq = Linear(config.dim, config.dim, rngs=rngs)
    self.wk = Linear(config.knowledge_dim, config.dim, rngs=rngs)
    self.wv = Linear(config.knowledge_dim, config.dim, rngs=rngs)
    self.wo = Linear(config.dim, config.dim, rngs=rngs)
    self.n_heads, self.head_dim = config.n_heads, config.head_dim

  @jax.named_scope('cross_attention')
  def __call__(self, m_BTD: Array, rows_BTRP: Array, dtype: DTypeLike) -> Array:
    """Maps float32 (B, T, D) and rows (B, T, R, P) to (B, T, D) in `dtype`.

    Each row would be projected for one token only. So the query is carried through the keys' projection instead,
    q . (row Wk) = (Wk q) . row, and the values' projection comes after the weighted sum of rows: the same numbers
    for a fifth of the multiplications (D 512, P 128, R 8).
    """
    per_head = (-1, self.n_heads, self.head_dim)
    q_BTNH = self.wq(m_BTD, dtype).reshape(*m_BTD.shape[:-1], self.n_heads, self.head_dim)
    wk_PNH = self.wk.kernel[...].astype(dtype).reshape(per_head)
    wv_PNH = self.wv.kernel[...].astype(dtype).reshape(per_head)
    query_BTNP = jnp.einsum('BTNH,PNH->BTNP', q_BTNH, wk_PNH)
    score_BTNR = jnp.einsum('BTNP,BTRP->BTNR', query_BTNP, rows_BTRP).astype(jnp.float32)  # softmax needs the range
    weight_BTNR = jax.nn.softmax(score_BTNR * self.head_dim**-0.5, axis=-1).astype(dtype)
    read_BTNP = jnp.einsum('BTNR,BTRP->BTNP', weight_BTNR, rows_BTRP)
    value_BTNH = jnp.einsum('BTNP,PNH->BTNH', read_BTNP, wv_PNH)
    return self.wo(value_BTNH.reshape(m_BTD.shape), dtype)


class CrossAttentionMemory(MemorySublayer):
  """The whole sublayer: norm, gate, lookup, cross attention."""

  def __init__(self, model: ModelConfig, memory: MemoryConfig, *, rngs: nnx.Rngs):
    super().__init__(model, memory, rngs=rngs)
    self.attention = CrossAttention(model, rngs=rngs)

  def read(self, x_BTD: Array, selection: Selection, bank_MP: Array, dtype: DTypeLike) -> Array:
    """Returns what the normed input reads from its rows."""
    return self.attention(self.norm(x_BTD, dtype), self.rows(selection, bank_MP, dtype), dtype)
