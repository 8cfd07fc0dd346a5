"""A bag of rows that the last tokens address: no gate, and the bag's output as elsewhere.

What the rows hold depends on the n-gram alone; what becomes of them, on everything before it, through the gate of the
output, silu(m W1). Sources: Cheng et al. 2026, arXiv:2601.07372; for rows of the token alone, Sadhukhan et al. 2026,
arXiv:2601.10639.
"""

import jax.numpy as jnp
from jax import Array

from mmjax.config import MemoryConfig
from mmjax.model.memory import Selection
from mmjax.model.sublayers.memory_bag import MemoryBag


class NgramBag(MemoryBag):
  """The whole sublayer: norm, means of the rows at `ngram_BThr`, the projection of a bag."""

  reads_ngrams = True

  @staticmethod
  def scores_weigh(memory: MemoryConfig) -> bool:
    """There are none."""
    return False

  @classmethod
  def without_gradient(cls, memory: MemoryConfig) -> tuple[str, ...]:
    """Every parameter learns."""
    return ()

  def weights(self, selection: Selection) -> Array:
    """Returns 1 / r for each row."""
    return jnp.full(selection.row_BThr.shape, 1 / selection.row_BThr.shape[-1])
