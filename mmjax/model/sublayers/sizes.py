"""The sizes of memories, by the keywords of mmjax.memory, from the sections of a config."""

from typing import Any

from mmjax.config import MemoryConfig, ModelConfig


def gate_sizes(model: ModelConfig, memory: MemoryConfig) -> dict[str, Any]:
  """Returns those of a memory whose gate selects rows."""
  return _sizes(model, memory) | {
    'query_dim': memory.query_dim(model),
    'query_key_norm': memory.query_key_norm,
    'selection_bias': memory.selection_bias,
    'activation': memory.score_activation,
  }


def ngram_sizes(model: ModelConfig, memory: MemoryConfig) -> dict[str, Any]:
  """Returns those of a memory whose rows the last tokens address."""
  return _sizes(model, memory) | {
    'ngrams': memory.ngram_of_heads(),
    'vocab_size': model.vocab_size if memory.ngram_ranges == 'own' else None,
    'signs': memory.ngram_signs,
    'output_gate': memory.bag_gate,
  }


def _sizes(model: ModelConfig, memory: MemoryConfig) -> dict[str, Any]:
  """Returns the sizes that every memory has, by keyword."""
  return {
    'dim': model.dim,
    'n_rows': model.knowledge_num,
    'row_dim': model.knowledge_dim,
    'n_heads': memory.n_heads,
    'rows_per_head': model.num_selected,
    'norm_eps': model.norm_eps,
  }
