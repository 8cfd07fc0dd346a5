"""A bag of rows: each head's weighted sum of its rows, gated by the token and projected.

Source: the output (y * silu(m W1)) W2 follows Memory+ in Berges et al. 2024, arXiv:2412.09764; the weighted sum Lample
et al. 2019, arXiv:1907.05242.
"""

import jax
from flax import nnx
from jax import Array
from jax.typing import DTypeLike

from mmjax.config import MemoryConfig, ModelConfig
from mmjax.kernels.bank import bank_bag
from mmjax.kernels.forms import on_cpu
from mmjax.model.layers import Linear
from mmjax.model.memory import Selection, score_weights
from mmjax.model.sublayers.memory import MemorySublayer


class MemoryBag(MemorySublayer):
  """The whole sublayer: norm, gate, weighted sums, projection; `up`, their gate, is (D, h * P), `down` (h * P, D)."""

  def __init__(self, model: ModelConfig, memory: MemoryConfig, *, rngs: nnx.Rngs):
    super().__init__(model, memory, rngs=rngs)
    width = memory.n_heads * model.knowledge_dim
    self.up = Linear(model.dim, width, rngs=rngs) if memory.bag_gate else None
    self.down = Linear(width, model.dim, rngs=rngs)

  def weights(self, selection: Selection) -> Array:
    """Returns how much each row counts in the sum of its head, float32 like its scores."""
    return score_weights(selection.score_BThr, self.activation)

  @jax.named_scope('bag')
  def read(self, x_BTD: Array, selection: Selection, bank_MP: Array, dtype: DTypeLike) -> Array:
    """Returns (y * silu(m @ up)) @ down, or y @ down, with the heads' sums concatenated to y."""
    y_BThP = bank_bag(bank_MP, selection.row_BThr, self.weights(selection))
    y_BTF = y_BThP.reshape(*x_BTD.shape[:-1], -1).astype(dtype)
    if self.up is None:
      return self.down(y_BTF, dtype)

    def project(y_BTF: Array, up_BTF: Array) -> Array:
      return self.down(y_BTF * jax.nn.silu(up_BTF), dtype)

    up_BTF = self.norm.matmul(x_BTD, self.up.kernel[...], dtype)
    return (project if on_cpu() else jax.checkpoint(project))(y_BTF, up_BTF)  # a GPU keeps the factors alone
