"""The product-key gate: a query for each head, and the rows whose two sub-keys match it best.

What becomes of the rows: fusion.py, the last on the way. Source: Lample et al. 2019, arXiv:1907.05242.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.typing import DTypeLike

from mmjax.kernels.bank import bank_lookup
from mmjax.kernels.forms import recomputed_on_gpu
from mmjax.kernels.matmul import TRAINED
from mmjax.kernels.norm import exact_normed_matmul, unit
from mmjax.kernels.product_key import balancing_slope, product_key_topk
from mmjax.memory.base import Memory
from mmjax.memory.checks import check_gate
from mmjax.memory.params import init_kernels
from mmjax.memory.types import Bank, Params, Selection, shape_of


@dataclasses.dataclass(frozen=True, kw_only=True)
class GatedMemory(Memory):
  """A memory whose gate selects rows by the product of their keys.

  With the defaults a gate learns. Those of a config are the record's, whose gate does not.

  Attributes:
    n_rows: M = C * C, a square: there are C sub-keys in each half.
    rows_per_head: r, from 2 where a softmax makes the weights: that of one score is 1, and the gate would not learn.
    query_dim: of a head's query, which is two sub-keys wide; even. None: row_dim.
    query_key_norm: 'l2': sub-scores are cosines times a learned scale, which starts at sqrt(p). 'none': products.
    selection_bias: whether a bias on sub-scores, which counts in the choice alone, learns to even out their use.
    activation: makes weights of the scores of a head: 'softmax', or 'relu' (Csordás et al. 2023, arXiv:2310.10837).
  """

  rows_per_head: int = 8
  query_dim: int | None = None
  query_key_norm: str = 'l2'
  selection_bias: bool = True
  activation: str = 'softmax'

  def __post_init__(self):
    """Raises ValueError if a size or a choice breaks its rule, or the gate would not learn."""
    super().__post_init__()
    check_gate(self)

  def init_gate(self, rngs: nnx.Rngs) -> Params:
    """Returns those of the norm, and of the gate, float32: kernel `query`, (D, k * p), `keys`, (k, C, p), and more."""
    k, C, p = 2 * self.n_heads, math.isqrt(self.n_rows), (self.query_dim or self.row_dim) // 2
    gate = init_kernels(rngs, query=(self.dim, k * p))
    gate['keys'] = jax.random.normal(rngs.params(), (k, C, p), jnp.float32)
    if self.query_key_norm == 'l2':
      gate['norm'] = {'scale': jnp.full(k, p**0.5, jnp.float32)}
    if self.selection_bias:
      gate['bias'] = jnp.zeros((k, C), jnp.float32)
    return super().init_gate(rngs) | {'gate': gate}

  @jax.named_scope('gate')
  def select(self, params: Params, x_BTD: Array, row_BThr: Array | None, dtype: DTypeLike) -> Selection:
    """Returns the rows that match best in float32 (docs/memory.md says why); raises ValueError if it is given rows."""
    if row_BThr is not None:
      found = shape_of(row_BThr)
      raise ValueError(f'row_BThr of shape {found} must be None: a memory with a gate selects its rows itself')
    gate = params['gate']
    query = exact_normed_matmul(x_BTD, params['norm']['scale'], gate['query']['kernel'], self.norm_eps, dtype)
    query_BTkp, keys_kCp = query.reshape(*x_BTD.shape[:-1], len(gate['keys']), -1), gate['keys']
    if self.query_key_norm == 'l2':
      query_BTkp, keys_kCp = recomputed_on_gpu(_scaled_units)(query_BTkp, keys_kCp, gate['norm']['scale'])
    bias_kC = keys_kCp.shape[-1] ** 0.5 * gate['bias'] if self.selection_bias else None  # at the size of scores
    row_BThr, score_BThr = product_key_topk(query_BTkp, keys_kCp, self.rows_per_head, bias_kC, gradient_dtype=dtype)
    return Selection(row_BThr, score_BThr, balancing_slope(bias_kC, row_BThr) if self.selection_bias else 0.0)

  def flops(self) -> dict[str, int]:
    """Adds those of the query, and of its scores against the sub-keys of both halves."""
    query_and_scores = (self.query_dim or self.row_dim) * (self.dim + math.isqrt(self.n_rows))
    times = TRAINED if self.gate_learns else 1
    return super().flops() | {'gate': times * 2 * self.n_heads * query_and_scores}

  @property
  def gate_learns(self) -> bool:
    """Whether a gradient reaches the gate."""
    return True

  def weights(self, selection: Selection) -> Array:
    """Returns how much each row counts among those of its head, float32 weight_BThr."""
    return score_weights(selection.score_BThr, self.activation)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RowsMemory(GatedMemory):
  """A memory that reads its rows one by one.

  Attributes:
    scores: 'scale': each row times its weight, times r after a softmax; 'none': rows as they are, and then no gradient
      reaches the gate, which routes by a fixed random projection, as in the record.
  """

  scores: str = 'scale'

  @property
  def gate_learns(self) -> bool:
    """Whether a gradient reaches the gate."""
    return self.scores != 'none'

  def rows(self, selection: Selection, bank_MP: Bank, dtype: DTypeLike) -> Array:
    """Returns rows_BTRP of all heads in `dtype`; raises ValueError for factors of heads, which only a bag takes."""
    if selection.kept_BTh is not None:
      shape = selection.kept_BTh.shape
      raise ValueError(f'kept_BTh of shape {shape} must be None: only a bag takes factors of its heads')
    rows_BThrP = bank_lookup(bank_MP, selection.row_BThr, dtype)
    if self.scores == 'scale':
      weight_BThr = self.weights(selection)
      if self.activation == 'softmax':
        weight_BThr *= self.rows_per_head  # 1 on average, so that rows keep their size
      rows_BThrP *= weight_BThr[..., None].astype(dtype)
    B, T, h, r, P = rows_BThrP.shape
    return rows_BThrP.reshape(B, T, h * r, P)


def score_weights(score_BThr: Array, activation: str) -> Array:
  """Turns the scores of each head's rows, float32, into weights: 'softmax' over the head's rows, or 'relu'."""
  return jax.nn.softmax(score_BThr, axis=-1) if activation == 'softmax' else jax.nn.relu(score_BThr)


def _scaled_units(query_BTkp: Array, keys_kCp: Array, scale_k: Array) -> tuple[Array, Array]:
  """Returns queries of length `scale_k` and sub-keys of length 1."""
  return unit(query_BTkp) * scale_k[None, None, :, None], unit(keys_kCp)
