"""What sublayers compute, a module for each; mmjax/config/sublayers.py is their table."""

from collections.abc import Iterable

import jax.numpy as jnp
from jax import Array

from mmjax.config import MemoryConfig, ModelConfig
from mmjax.config.sublayers import SUBLAYERS, layer_kinds
from mmjax.memory.gate import score_weights

__all__ = ['SUBLAYERS', 'any_reads_ngrams', 'layer_kinds', 'row_weights']


def any_reads_ngrams(kinds: Iterable[str]) -> bool:
  """Tells whether a model with these sublayers has any that reads the rows at `ngram_BThr`."""
  return any(SUBLAYERS[kind].reads_ngrams for kind in kinds)


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
    weight_Xhr = jnp.full(score_Xhr.shape, 1 / model.num_selected, jnp.float32)
  return weight_Xhr.reshape(score_XR.shape)
