"""Memories with a gate as sublayers (of n-grams: ngram.py). mmjax/memory/base.py, next on the way, says what they are.

With memory.input='attention' and memory.scores='none', as in the record's code, a memory reads the attention output and
not the residual stream, and the scores never reach the output, so that no gradient reaches the gate.
"""

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from mmjax.config import MemoryConfig, ModelConfig
from mmjax.memory import CrossAttention, GatedFusion, Memory, MemoryBag
from mmjax.memory.params import ParamTree, params_of
from mmjax.model.layers import dropout
from mmjax.model.sublayers import SublayerInput, SublayerOutput
from mmjax.model.sublayers.dense import DenseFFN
from mmjax.model.sublayers.sizes import gate_sizes


class MemorySublayer(ParamTree):
  """A memory, and perhaps a dense sublayer beside it.

  Args:
    memory, rngs: how rows are selected and read, and what draws first values.
    reads_residual: whether it reads the residual stream instead of what attention adds to it.
    ffn_dim: F of the dense sublayer; 0: there is none.
    row_dropout: probability that training drops what a head read of n-grams.
  """

  def __init__(self, memory: Memory, *, reads_residual: bool, ffn_dim: int, row_dropout: float, rngs: nnx.Rngs):
    gate = memory.init_gate(rngs)  # in the order in which runs have always drawn their numbers
    self.ffn = DenseFFN(memory.dim, ffn_dim, memory.norm_eps, rngs=rngs) if ffn_dim else None
    super().__init__(gate | memory.init_read(rngs))
    self.memory, self.reads_residual, self.row_dropout = memory, reads_residual, row_dropout

  def __call__(self, inputs: SublayerInput, dtype: DTypeLike) -> SublayerOutput:
    """See mmjax.model.sublayers; raises ValueError as `Memory.apply` does."""
    x_BTD = inputs.h_BTD if self.reads_residual else inputs.h_attn_BTD
    row_BThr, sign_BTh = self.memory.addresses(inputs.last_BTn)
    kept_BTh = None
    if self.row_dropout and inputs.key is not None and row_BThr is not None:  # what a gate picks is never dropped
      kept_BTh = dropout(jnp.ones(row_BThr.shape[:3]), self.row_dropout, inputs.key)
    params = params_of(self, self.memory)
    out = self.memory.apply(params, x_BTD, inputs.bank_MP, row_BThr, sign_BTh, kept_BTh, dtype=dtype)
    if self.ffn is None:
      return out
    return out._replace(delta_BTD=out.delta_BTD + self.ffn(inputs, dtype).delta_BTD)

  def flops(self) -> dict[str, int]:
    """See mmjax.model.sublayers."""
    return self.memory.flops() | ({} if self.ffn is None else self.ffn.flops())


def cross_attention(model: ModelConfig, memory: MemoryConfig, *, rngs: nnx.Rngs) -> MemorySublayer:
  """Experiment 1.4.1."""
  sizes = gate_sizes(model, memory)
  return as_sublayer(CrossAttention(**sizes, scores=memory.scores, attention_heads=model.n_heads), memory, rngs)


def gated_fusion(model: ModelConfig, memory: MemoryConfig, *, rngs: nnx.Rngs) -> MemorySublayer:
  """Experiment 1.4.2."""
  return as_sublayer(GatedFusion(**gate_sizes(model, memory), scores=memory.scores), memory, rngs)


def memory_bag(model: ModelConfig, memory: MemoryConfig, *, rngs: nnx.Rngs) -> MemorySublayer:
  """Weighted sums of rows that a gate selects."""
  return as_sublayer(MemoryBag(**gate_sizes(model, memory), output_gate=memory.bag_gate), memory, rngs)


def as_sublayer(sized: Memory, memory: MemoryConfig, rngs: nnx.Rngs) -> MemorySublayer:
  """Returns a memory as the settings place it."""
  return MemorySublayer(
    sized, reads_residual=memory.input == 'residual', ffn_dim=memory.ffn_dim, row_dropout=memory.row_dropout, rngs=rngs
  )
