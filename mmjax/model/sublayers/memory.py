"""The memories of mmjax.memory as sublayers: sizes come from the config, which also says what they read.

With memory.input='attention' and memory.scores='none', as in the record's code, a memory reads the attention output and
not the residual stream, and the scores never reach the output, so that no gradient reaches the gate.
"""

from typing import Any

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from mmjax.config import MemoryConfig, ModelConfig
from mmjax.memory import CrossAttention, GatedFusion, Memory, MemoryBag, MemoryLayer, NgramBag, NgramBucket
from mmjax.memory.base import ParamTree
from mmjax.model.layers import dropout
from mmjax.model.sublayers import SublayerInput, SublayerOutput
from mmjax.model.sublayers.dense import DenseFFN


class MemorySublayer(MemoryLayer):
  """A memory, and perhaps a dense sublayer beside it."""

  def __init__(self, memory: Memory, *, reads_residual: bool, ffn_dim: int, row_dropout: float, rngs: nnx.Rngs):
    gate = memory.init_gate(rngs)  # in the order in which runs have always drawn their numbers
    self.ffn = DenseFFN(memory.dim, ffn_dim, memory.norm_eps, rngs=rngs) if ffn_dim else None
    ParamTree.__init__(self, gate | memory.init_read(rngs))
    self.memory, self.reads_residual, self.row_dropout = memory, reads_residual, row_dropout

  def __call__(self, inputs: SublayerInput, dtype: DTypeLike) -> SublayerOutput:
    """See mmjax.model.sublayers; raises ValueError as `Memory.apply` does."""
    x_BTD = inputs.h_BTD if self.reads_residual else inputs.h_attn_BTD
    row_BThr, sign_BTh = self.memory.addresses(inputs.last_BTn)
    kept_BTh = None
    if self.row_dropout and inputs.key is not None and row_BThr is not None:  # what a gate picks is never dropped
      kept_BTh = dropout(jnp.ones(row_BThr.shape[:3]), self.row_dropout, inputs.key)
    out = super().__call__(x_BTD, inputs.bank_MP, row_BThr, sign_BTh, kept_BTh, dtype=dtype)
    if self.ffn is None:
      return out
    return out._replace(delta_BTD=out.delta_BTD + self.ffn(inputs, dtype).delta_BTD)

  def flops(self) -> dict[str, int]:
    """See mmjax.model.sublayers."""
    return self.memory.flops() | ({} if self.ffn is None else self.ffn.flops())


def cross_attention(model: ModelConfig, memory: MemoryConfig, *, rngs: nnx.Rngs) -> MemorySublayer:
  """Experiment 1.4.1."""
  sizes = _gate_sizes(model, memory)
  return _sublayer(CrossAttention(**sizes, scores=memory.scores, attention_heads=model.n_heads), memory, rngs)


def gated_fusion(model: ModelConfig, memory: MemoryConfig, *, rngs: nnx.Rngs) -> MemorySublayer:
  """Experiment 1.4.2."""
  return _sublayer(GatedFusion(**_gate_sizes(model, memory), scores=memory.scores), memory, rngs)


def memory_bag(model: ModelConfig, memory: MemoryConfig, *, rngs: nnx.Rngs) -> MemorySublayer:
  """Weighted sums of rows that a gate selects."""
  return _sublayer(MemoryBag(**_gate_sizes(model, memory), output_gate=memory.bag_gate), memory, rngs)


def ngram_bag(model: ModelConfig, memory: MemoryConfig, *, rngs: nnx.Rngs) -> MemorySublayer:
  """Means of rows that the last tokens address."""
  return _sublayer(NgramBag(**_ngram_sizes(model, memory)), memory, rngs)


def ngram_bucket(model: ModelConfig, memory: MemoryConfig, *, rngs: nnx.Rngs) -> MemorySublayer:
  """Sums of rows that the context weighs, in buckets that the last tokens address."""
  return _sublayer(NgramBucket(**_ngram_sizes(model, memory), key_dim=memory.query_dim(model)), memory, rngs)


def value_bag(model: ModelConfig, memory: MemoryConfig) -> NgramBag:
  """Returns what reads the rows that go into the values of attention: once, for all layers."""
  return NgramBag(**_ngram_sizes(model, memory))


def _sublayer(sizes: Memory, memory: MemoryConfig, rngs: nnx.Rngs) -> MemorySublayer:
  return MemorySublayer(
    sizes,
    reads_residual=memory.input == 'residual',
    ffn_dim=memory.ffn_dim,
    row_dropout=memory.row_dropout,
    rngs=rngs,
  )


def _sizes(model: ModelConfig, memory: MemoryConfig) -> dict[str, Any]:
  return {
    'dim': model.dim,
    'n_rows': model.knowledge_num,
    'row_dim': model.knowledge_dim,
    'n_heads': memory.n_heads,
    'rows_per_head': model.num_selected,
    'norm_eps': model.norm_eps,
  }


def _ngram_sizes(model: ModelConfig, memory: MemoryConfig) -> dict[str, Any]:
  return _sizes(model, memory) | {
    'ngrams': memory.ngram_of_heads(),
    'vocab_size': model.vocab_size if memory.ngram_ranges == 'own' else None,
    'signs': memory.ngram_signs,
    'output_gate': memory.bag_gate,
  }


def _gate_sizes(model: ModelConfig, memory: MemoryConfig) -> dict[str, Any]:
  return _sizes(model, memory) | {
    'query_dim': memory.query_dim(model),
    'query_key_norm': memory.query_key_norm,
    'selection_bias': memory.selection_bias,
    'activation': memory.score_activation,
  }
