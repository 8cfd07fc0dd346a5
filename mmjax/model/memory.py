"""The product-key gate, which picks rows of a bank, and the bank itself.

The bank is one parameter of the whole model; it is passed to the blocks as an argument. Axes here: h heads of the gate,
r rows a head (R = h * r), K = 2 h sets of sub-keys, two a head.
Source: Lample et al. 2019, arXiv:1907.05242.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.typing import DTypeLike

from mmjax.config import MemoryConfig, ModelConfig
from mmjax.kernels.forms import on_cpu
from mmjax.kernels.product_key import best_rows, sub_key_scores
from mmjax.model.layers import Linear, RMSNorm


class Selection(NamedTuple):
  """Rows in [0, M), int32, best first; their float32 scores before any softmax; `balancing_slope`.

  With a selection bias, which the scores are without, the order is that of score plus bias.
  """

  row_BThr: Array
  score_BThr: Array
  balance: Array | float


class ProductKeyGate(nnx.Module):
  """Projects its input to a query for each head and finds the rows whose two sub-keys match it best."""

  def __init__(self, model: ModelConfig, memory: MemoryConfig, *, rngs: nnx.Rngs):
    half, sets = memory.query_dim(model) // 2, 2 * memory.n_heads
    self.query = Linear(model.dim, sets * half, rngs=rngs)
    self.keys = nnx.Param(jax.random.normal(rngs.params(), (sets, model.n_sub_keys, half), jnp.float32))
    self.norm = QUERY_KEY_NORMS[memory.query_key_norm](sets, half)
    self.num_selected = model.num_selected
    self.bias = nnx.Param(jnp.zeros((sets, model.n_sub_keys), jnp.float32)) if memory.selection_bias else None

  @jax.named_scope('gate')
  def __call__(self, x_BTD: Array, norm: RMSNorm, dtype: DTypeLike) -> Selection:
    """Selects rows for every token, in float32: in bf16 a fifth of the tokens would get other rows.

    Args:
      x_BTD: float.
      norm: what comes before the queries.
      dtype: of other products.
    """
    query_BTQ = norm.exact_matmul(x_BTD, self.query.kernel[...], dtype)
    query_BTKp = query_BTQ.reshape(*x_BTD.shape[:-1], len(self.keys[...]), -1)
    # On a GPU normed queries are had again from queries: memory is what bounds a batch there.
    norm_both = self.norm if on_cpu() else jax.checkpoint(self.norm)
    query_BTKp, keys_KCp = norm_both(query_BTKp, self.keys[...])
    bias_KC = None if self.bias is None else keys_KCp.shape[-1] ** 0.5 * self.bias[...]  # at the size of scores
    score_KXC = sub_key_scores(query_BTKp, keys_KCp, dtype)
    best = best_rows(score_KXC, self.num_selected, bias_KC)
    row_BThr, score_BThr = (x.reshape(*x_BTD.shape[:-1], *x.shape[1:]) for x in best)
    balance = 0.0 if bias_KC is None else balancing_slope(bias_KC, row_BThr)
    return Selection(row_BThr, score_BThr, balance)


class NoNorm(nnx.Module):
  """Leaves queries and sub-keys as they are."""

  def __init__(self, sets: int, half: int):
    pass

  def __call__(self, query_BTKp: Array, keys_KCp: Array) -> tuple[Array, Array]:
    """Returns its arguments."""
    return query_BTKp, keys_KCp


class L2Norm(nnx.Module):
  """Scores are cosines times a learned scale for each set of sub-keys, which starts at sqrt(p)."""

  def __init__(self, sets: int, half: int):
    self.scale = nnx.Param(jnp.full(sets, half**0.5, jnp.float32))

  def __call__(self, query_BTKp: Array, keys_KCp: Array) -> tuple[Array, Array]:
    """Returns queries of length `scale` and sub-keys of length 1."""
    return _unit(query_BTKp) * self.scale[...][:, None], _unit(keys_KCp)


QUERY_KEY_NORMS = {'none': NoNorm, 'l2': L2Norm}
NORM_EPS = 1e-6
BALANCING_SLOPE = 1e-4  # with 1, clipping changed: docs/experiments.md


def score_weights(score_BThr: Array, activation: str) -> Array:
  """Turns the scores of each head's rows into weights: 'softmax' over the head's rows, or 'relu'."""
  return jax.nn.softmax(score_BThr, axis=-1) if activation == 'softmax' else jax.nn.relu(score_BThr)


def balancing_slope(bias_KC: Array, row_BThr: Array) -> Array:
  """Returns 0, with a gradient for the bias: how much more often than one in C each sub-key is among the rows selected.

  Over all positions, padding too. Descending it, whatever the loss, lifts sub-keys that are taken too seldom. Adam
  steps by the sign and hardly by the size, which makes it the rule of Wang et al. 2024, arXiv:2408.15664, for experts.
  The size is therefore free, and so small that it takes no part in the norm by which all gradients are clipped.

  Args:
    bias_KC: float32, with which the rows were selected.
    row_BThr: int32 in [0, C * C).
  """
  C = bias_KC.shape[-1]
  balance = jnp.sum(bias_KC * (sub_key_shares(row_BThr, C) - 1 / C))
  return BALANCING_SLOPE * (balance - jax.lax.stop_gradient(balance))


def sub_key_shares(row_BThr: Array, n_sub_keys: int) -> Array:
  """Returns in each set the share of the selected rows that have each sub-key, float32 (K, C)."""
  K = 2 * row_BThr.shape[2]
  sub_key_BTh2r = jnp.stack(jnp.divmod(row_BThr, n_sub_keys), axis=3)
  sub_key_KX = jnp.moveaxis(sub_key_BTh2r, (2, 3), (0, 1)).reshape(K, -1)
  return jnp.zeros((K, n_sub_keys), jnp.float32).at[jnp.arange(K)[:, None], sub_key_KX].add(1 / sub_key_KX.shape[1])


def init_bank(model: ModelConfig, memory: MemoryConfig, *, rngs: nnx.Rngs) -> Array:
  """Returns the first values of the bank, float32 (M, P), N(0, bank_std^2)."""
  return memory.bank_std * jax.random.normal(rngs.params(), (model.knowledge_num, model.knowledge_dim), jnp.float32)


def _unit(x: Array) -> Array:
  return x * jax.lax.rsqrt(jnp.sum(x * x, axis=-1, keepdims=True) + NORM_EPS)
