"""Experiment 1.4.1: cross attention from the input to the rows that the gate picked.

The record describes it and does not hold its code. This is the plain reading of the description: queries from the
normed input, keys and values projected from the token's R rows, as many heads as self-attention has, no positions.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.typing import DTypeLike

from mmjax.kernels.matmul import TRAINED, matmul
from mmjax.kernels.norm import rms_norm
from mmjax.memory.gate import RowsMemory
from mmjax.memory.params import init_kernels
from mmjax.memory.types import Bank, Params, Read, Selection


@dataclasses.dataclass(frozen=True, kw_only=True)
class CrossAttention(RowsMemory):
  """Attention of each token to its own R rows.

  Attributes:
    attention_heads: N; D is a multiple of it.
  """

  attention_heads: int = 1

  def __post_init__(self):
    """Raises ValueError as a gate does, and if D is no multiple of N."""
    super().__post_init__()
    if self.dim % self.attention_heads:
      raise ValueError(f'dim={self.dim} must be divisible by attention_heads={self.attention_heads}')

  def init_read(self, rngs: nnx.Rngs) -> Params:
    """Returns the float32 kernels `wq` and `wo`, (D, D), `wk` and `wv`, (P, D)."""
    square, of_rows = (self.dim, self.dim), (self.row_dim, self.dim)
    return {'attention': init_kernels(rngs, wq=square, wk=of_rows, wv=of_rows, wo=square)}

  def flops(self) -> dict[str, int]:
    """Adds those of wq and wo, of wk and wv on the query's side, and of scores and weighted sums of rows."""
    projections = 2 * self.dim * self.dim + 2 * self.dim * self.row_dim
    reads = 2 * self.attention_heads * self.n_heads * self.rows_per_head * self.row_dim
    return super().flops() | {'cross_attention': TRAINED * 2 * (projections + reads)}

  def read(self, params: Params, x_BTD: Array, selection: Selection, bank_MP: Bank, dtype: DTypeLike) -> Read:
    """Returns what the normed input reads from its rows, delta_BTD in `dtype`, and the scores of the gate.

    Each row would be projected for one token only. So the query is carried through the keys' projection instead,
    q . (row Wk) = (Wk q) . row, and the values' projection comes after the weighted sum of rows: the same numbers
    for a fifth of the multiplications (D 512, N 32, P 128, R 8).
    """
    m_BTD = rms_norm(x_BTD, params['norm']['scale'], self.norm_eps, dtype)
    rows_BTRP = self.rows(selection, bank_MP, dtype)
    wq, wk, wv, wo = (params['attention'][name]['kernel'] for name in ('wq', 'wk', 'wv', 'wo'))
    with jax.named_scope('cross_attention'):
      q_BTD = matmul(m_BTD.astype(dtype), wq)
      q_BTNH = q_BTD.reshape(*q_BTD.shape[:-1], self.attention_heads, -1)
      wk_PNH, wv_PNH = (w.astype(dtype).reshape(self.row_dim, self.attention_heads, -1) for w in (wk, wv))
      query_BTNP = jnp.einsum('BTNH,PNH->BTNP', q_BTNH, wk_PNH)
      score_BTNR = jnp.einsum('BTNP,BTRP->BTNR', query_BTNP, rows_BTRP).astype(jnp.float32)  # softmax needs the range
      weight_BTNR = jax.nn.softmax(score_BTNR * q_BTNH.shape[-1] ** -0.5, axis=-1).astype(dtype)
      read_BTNP = jnp.einsum('BTNR,BTRP->BTNP', weight_BTNR, rows_BTRP)
      value_BTNH = jnp.einsum('BTNP,PNH->BTNH', read_BTNP, wv_PNH)
      return matmul(value_BTNH.reshape(m_BTD.shape), wo), selection.score_BThr
