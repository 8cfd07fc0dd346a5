"""Memories whose rows the last tokens address, as sublayers."""

from flax import nnx

from mmjax.config import MemoryConfig, ModelConfig
from mmjax.memory import EngramBag, NgramBag, NgramBucket
from mmjax.model.sublayers.memory import MemorySublayer, as_sublayer
from mmjax.model.sublayers.sizes import ngram_sizes


def ngram_bag(model: ModelConfig, memory: MemoryConfig, *, rngs: nnx.Rngs) -> MemorySublayer:
  """Means of rows that the last tokens address."""
  return as_sublayer(NgramBag(**ngram_sizes(model, memory)), memory, rngs)


def engram_bag(model: ModelConfig, memory: MemoryConfig, *, rngs: nnx.Rngs) -> MemorySublayer:
  """Means of rows that the last tokens address, by how well they match the input."""
  return as_sublayer(EngramBag(**ngram_sizes(model, memory)), memory, rngs)


def ngram_bucket(model: ModelConfig, memory: MemoryConfig, *, rngs: nnx.Rngs) -> MemorySublayer:
  """Sums of rows that the context weighs, in buckets that the last tokens address."""
  return as_sublayer(NgramBucket(**ngram_sizes(model, memory), key_dim=memory.query_dim(model)), memory, rngs)


def value_bag(model: ModelConfig, memory: MemoryConfig, *, rngs: nnx.Rngs) -> NgramBag:
  """Rows that go into the values of attention, read once for all layers; without parameters of its own."""
  del rngs
  return NgramBag(**ngram_sizes(model, memory))
