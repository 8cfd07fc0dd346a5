"""The table of sublayers: a new experiment is one module, one row here and one config file."""

from collections.abc import Iterable

import jax.numpy as jnp
from jax import Array

from mmjax.config import MemoryConfig, ModelConfig
from mmjax.model.memory import score_weights
from mmjax.model.sublayers.cross_attention import CrossAttentionMemory
from mmjax.model.sublayers.dense import DenseFFN
from mmjax.model.sublayers.gated_fusion import GatedMemoryFusion
from mmjax.model.sublayers.memory_bag import MemoryBag
from mmjax.model.sublayers.moe import MoEFFN
from mmjax.model.sublayers.ngram_bag import NgramBag

SUBLAYERS = {
  'dense': DenseFFN,
  'cross_attention': CrossAttentionMemory,
  'gated_fusion': GatedMemoryFusion,
  'memory_bag': MemoryBag,
  'ngram_bag': NgramBag,
  'moe': MoEFFN,
}


def layer_kinds(model: ModelConfig, memory: MemoryConfig) -> tuple[str, ...]:
  """Names the sublayer of each layer: model.sublayer; where only some layers have a memory, 'dense' in the others.

  Layers in memory.ngram_layers have an 'ngram_bag'.
  """
  if not SUBLAYERS[model.sublayer].uses_bank:
    return (model.sublayer,) * model.n_layers
  kinds = dict.fromkeys(range(model.n_layers), 'dense')
  kinds |= dict.fromkeys(memory.layer_numbers(model.n_layers), model.sublayer)
  kinds |= dict.fromkeys(memory.ngram_layer_numbers(model.n_layers), 'ngram_bag')
  return tuple(kinds.values())


def any_reads_ngrams(kinds: Iterable[str]) -> bool:
  """Tells whether a model with these sublayers has any that reads the rows at `ngram_BThr`."""
  return any(SUBLAYERS[kind].uses_bank and SUBLAYERS[kind].reads_ngrams for kind in kinds)


def row_weights(model: ModelConfig, memory: MemoryConfig, score_XR: Array) -> Array:
  """Returns how much each row that a token read counts, from the scores in `Output.score_LBTR`.

  Where scores weigh rows: `score_weights` within each head, so with 'softmax' the weights of a head sum to 1.
  Elsewhere, and where n-grams address rows, because all scores are 0 there: 1 / num_selected each.

  Args:
    model: a model with a memory.
    memory: how its scores act.
    score_XR: float32, any axes and the rows of all heads.
  """
  score_Xhr = score_XR.reshape(*score_XR.shape[:-1], memory.n_heads, model.num_selected)
  if SUBLAYERS[model.sublayer].scores_weigh(memory):
    weight_Xhr = score_weights(score_Xhr, memory.score_activation)
  else:
    weight_Xhr = jnp.full(score_Xhr.shape, 1 / model.num_selected)
  return weight_Xhr.reshape(score_XR.shape)
