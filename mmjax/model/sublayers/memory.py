"""What every memory sublayer does: norm, rows of the bank that a gate or the last tokens pick; a subclass uses them.

With memory.input='attention' and memory.scores='none', as in the record's code, the norm reads the attention output
and not the residual stream, and the scores never reach the output, so that no gradient reaches the gate: it routes by a
fixed random projection.
"""

import dataclasses

from flax import nnx
from jax import Array
from jax.typing import DTypeLike

from mmjax.config import MemoryConfig, ModelConfig
from mmjax.kernels.bank import BankShard, TappedBank, bank_lookup
from mmjax.model.layers import RMSNorm
from mmjax.model.memory import ProductKeyGate, Selection, score_weights
from mmjax.model.sublayers.base import SublayerOutput
from mmjax.model.sublayers.dense import DenseFFN


class MemorySublayer(nnx.Module):
  """Norm, gate if there is one, `read` of a subclass, and perhaps a dense sublayer beside it."""

  def __init__(self, model: ModelConfig, memory: MemoryConfig, *, rngs: nnx.Rngs):
    self.norm = RMSNorm(model.dim, model.norm_eps)
    self.gate = self.make_gate(model, memory, rngs=rngs)
    beside = dataclasses.replace(model, hidden_dim=memory.ffn_dim)
    self.ffn = DenseFFN(beside, memory, rngs=rngs) if memory.ffn_dim else None
    self.input, self.scores, self.activation = memory.input, memory.scores, memory.score_activation
    self.dim, self.bank_shape = model.dim, (model.knowledge_num, model.knowledge_dim)
    self.rows_shape = (memory.n_heads, model.num_selected)

  @staticmethod
  def make_gate(model: ModelConfig, memory: MemoryConfig, *, rngs: nnx.Rngs) -> ProductKeyGate | None:
    """Returns what picks the rows."""
    return ProductKeyGate(model, memory, rngs=rngs)

  def select(self, x_BTD: Array, ngram_BThr: Array | None, dtype: DTypeLike) -> Selection:
    """Returns the rows to read, here those that the gate finds for the input that is still to be normed."""
    return self.gate(x_BTD, self.norm, dtype)

  def read(self, x_BTD: Array, selection: Selection, bank_MP: Array, dtype: DTypeLike) -> Array:
    """Returns (B, T, D) in `dtype` from the input, which is still to be normed, and the selected rows."""
    raise NotImplementedError

  def __call__(
    self,
    h_BTD: Array,
    h_attn_BTD: Array,
    bank_MP: Array | BankShard | TappedBank | None,
    dtype: DTypeLike,
    ngram_BThr: Array | None = None,
  ) -> SublayerOutput:
    """See mmjax.model.sublayers.base.

    Raises:
      ValueError: if an array has not the shape that the config says, or it reads n-grams and got no rows.
    """
    self._check(h_BTD, bank_MP)
    x_BTD = h_BTD if self.input == 'residual' else h_attn_BTD
    selection = self.select(x_BTD, ngram_BThr, dtype)
    delta_BTD = self.read(x_BTD, selection, bank_MP, dtype)
    if self.ffn is not None:
      delta_BTD += self.ffn(h_BTD, h_attn_BTD, bank_MP, dtype).delta_BTD
    row_BTR, score_BTR = (x.reshape(*x_BTD.shape[:-1], -1) for x in selection[:2])
    return SublayerOutput(delta_BTD, row_BTR, score_BTR, selection.balance)

  def _check(self, h_BTD: Array, bank_MP: Array | BankShard | TappedBank | None) -> None:
    """Raises ValueError where a wrong shape would read other rows without a word, or fail far from here."""
    if h_BTD.ndim != 3 or h_BTD.shape[-1] != self.dim:
      raise ValueError(f'the input must have the shape (B, T, model.dim={self.dim}), not {h_BTD.shape}')
    if bank_MP is None or bank_MP.shape != self.bank_shape:
      raise ValueError(
        f'the bank must have the shape (model.knowledge_num, model.knowledge_dim)={self.bank_shape}, '
        f'not {None if bank_MP is None else bank_MP.shape}'
      )

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
