"""A bag of rows that the last tokens address: no gate, and the bag's output as elsewhere.

What the rows hold depends on the n-gram alone; what becomes of them, on everything before it, through the gate of the
output, silu(m W1). Sources: Cheng et al. 2026, arXiv:2601.07372; for rows of the token alone, Sadhukhan et al. 2026,
arXiv:2601.10639.
"""

import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.typing import DTypeLike

from mmjax.config import MemoryConfig, ModelConfig
from mmjax.model.memory import Selection
from mmjax.model.sublayers.memory_bag import MemoryBag


class NgramBag(MemoryBag):
  """The whole sublayer: norm, means of the rows at `ngram_BThr`, the projection of a bag."""

  @staticmethod
  def make_gate(model: ModelConfig, memory: MemoryConfig, *, rngs: nnx.Rngs) -> None:
    """There is none."""

  def select(self, x_BTD: Array, ngram_BThr: Array | None, dtype: DTypeLike) -> Selection:
    """Returns the rows that the last tokens address, with scores of 0.

    Raises:
      ValueError: if there are none, or of another shape than the config says.
    """
    shape = (*x_BTD.shape[:2], *self.rows_shape)
    if ngram_BThr is None:
      raise ValueError('a memory that reads n-grams needs the rows that they address: mmjax.model.ngram.ngram_rows')
    if ngram_BThr.shape != shape:
      raise ValueError(
        f'the rows of n-grams must have the shape (B, T, memory.n_heads, model.num_selected)={shape}, '
        f'not {ngram_BThr.shape}'
      )
    return Selection(ngram_BThr, jnp.zeros(shape, jnp.float32), 0.0)

  def weights(self, selection: Selection) -> Array:
    """Returns 1 / r for each row."""
    return jnp.full(selection.row_BThr.shape, 1 / selection.row_BThr.shape[-1], jnp.float32)
