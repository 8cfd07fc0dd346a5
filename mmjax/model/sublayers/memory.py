"""What every memory sublayer does: norm, rows of the bank that a gate or the last tokens pick; a subclass uses them.

With memory.input='attention' and memory.scores='none', as in the record's code, the norm reads the attention output
and not the residual stream, and the scores never reach the output, so that no gradient reaches the gate: it routes by a
fixed random projection.
"""

import dataclasses

import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.typing import DTypeLike

from mmjax.config import MemoryConfig, ModelConfig
from mmjax.kernels.bank import bank_lookup
from mmjax.model.layers import RMSNorm
from mmjax.model.memory import ProductKeyGate, Selection, score_weights
from mmjax.model.sublayers.base import SublayerOutput
from mmjax.model.sublayers.dense import DenseFFN


class MemorySublayer(nnx.Module):
  """Norm, gate if there is one, `read` of a subclass, and perhaps a dense sublayer beside it."""

  uses_bank = True
  reads_ngrams = False  # rows at ngram_BThr in place of a gate's
  sums_rows = False  # whether the bank is read with `bank_bag`, or with `bank_lookup`

  def __init__(self, model: ModelConfig, memory: MemoryConfig, *, rngs: nnx.Rngs):
    self.norm = RMSNorm(model.dim, model.norm_eps)
    self.gate = None if self.reads_ngrams else ProductKeyGate(model, memory, rngs=rngs)
    beside = dataclasses.replace(model, hidden_dim=memory.ffn_dim)
    self.ffn = DenseFFN(beside, memory, rngs=rngs) if memory.ffn_dim else None
    self.input, self.scores, self.activation = memory.input, memory.scores, memory.score_activation

  @staticmethod
  def scores_weigh(memory: MemoryConfig) -> bool:
    """Whether a row counts in the output by the weight that its score gives it."""
    return memory.scores != 'none'

  @classmethod
  def without_gradient(cls, memory: MemoryConfig) -> tuple[str, ...]:
    """The gate's parameters, unless its scores reach the output or a loss of their own."""
    learns = cls.scores_weigh(memory) or memory.balance_loss_weight > 0
    return () if learns else (r'gate/keys$', r'gate/query/kernel$', r'gate/norm/scale$')

  def read(self, m_BTD: Array, selection: Selection, bank_MP: Array, dtype: DTypeLike) -> Array:
    """Returns (B, T, D) in `dtype` from the normed input and the selected rows."""
    raise NotImplementedError

  def __call__(
    self,
    h_BTD: Array,
    h_attn_BTD: Array,
    bank_MP: Array | None,
    dtype: DTypeLike,
    ngram_BThr: Array | None = None,
  ) -> SublayerOutput:
    """See mmjax.model.sublayers.base.

    Raises:
      ValueError: if it reads n-grams and got no rows.
    """
    assert bank_MP is not None
    m_BTD = self.norm(h_BTD if self.input == 'residual' else h_attn_BTD)
    selection = self.gate(m_BTD) if self.gate is not None else _at(ngram_BThr)
    delta_BTD = self.read(m_BTD, selection, bank_MP, dtype)
    if self.ffn is not None:
      delta_BTD += self.ffn(h_BTD, h_attn_BTD, bank_MP, dtype).delta_BTD
    row_BTR, score_BTR = (x.reshape(*m_BTD.shape[:-1], -1) for x in selection[:2])
    return SublayerOutput(delta_BTD, row_BTR, score_BTR, selection.balance_loss)

  def rows(self, selection: Selection, bank_MP: Array, dtype: DTypeLike) -> Array:
    """Returns the rows of all heads, (B, T, R, P) in `dtype`; scaled by their weights if the config says so."""
    rows_BThrP = bank_lookup(bank_MP, selection.row_BThr, dtype)
    if self.scores == 'scale':
      weight_BThr = score_weights(selection.score_BThr, self.activation)
      if self.activation == 'softmax':
        weight_BThr *= weight_BThr.shape[-1]  # 1 on average, so that rows keep their size
      rows_BThrP *= weight_BThr[..., None].astype(dtype)
    B, T, h, r, P = rows_BThrP.shape
    return rows_BThrP.reshape(B, T, h * r, P)


def _at(ngram_BThr: Array | None) -> Selection:
  if ngram_BThr is None:
    raise ValueError('a memory that reads n-grams needs the rows that they address, from mmjax.model.ngram.ngram_rows')
  return Selection(ngram_BThr, jnp.zeros(ngram_BThr.shape), 0.0)
