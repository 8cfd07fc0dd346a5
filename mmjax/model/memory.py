"""The product-key gate, which picks rows of a bank, and the bank itself.

The bank is one parameter of the whole model; it is passed to the blocks as an argument.
Source: Lample et al. 2019, arXiv:1907.05242.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from mmjax.config import MemoryConfig, ModelConfig
from mmjax.kernels.product_key import product_key_topk
from mmjax.model.layers import Linear


class ProductKeyGate(nnx.Module):
  """Projects its input to a query and finds the rows whose two sub-keys match it best."""

  def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
    half = config.knowledge_dim // 2
    self.query = Linear(config.dim, config.knowledge_dim, rngs=rngs)
    self.keys = nnx.Param(jax.random.normal(rngs.params(), (2, config.n_sub_keys, half)))
    self.num_selected = config.num_selected

  @jax.named_scope('gate')
  def __call__(self, m_BTD: Array) -> tuple[Array, Array]:
    """Selects rows for every token, in float32: in bf16 a fifth of the tokens would get other rows.

    Args:
      m_BTD: float32.

    Returns:
      row_BTR: int32 in [0, M), best first. score_BTR: float32, before any softmax.
    """
    query_BTP = jnp.matmul(
      m_BTD.astype(jnp.float32), self.query.kernel[...], precision=jax.lax.Precision.HIGHEST
    )  # HIGHEST: no TF32 on GPUs
    return product_key_topk(query_BTP, self.keys[...], self.num_selected)


def init_bank(model: ModelConfig, memory: MemoryConfig, *, rngs: nnx.Rngs) -> Array:
  """Returns the first values of the bank, float32 (M, P), N(0, bank_std^2)."""
  return memory.bank_std * jax.random.normal(rngs.params(), (model.knowledge_num, model.knowledge_dim))
