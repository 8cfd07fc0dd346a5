"""Product-key top-k: the best r of C * C rows from two lists of C sub-scores, exactly.

A row is a pair of sub-keys and its score is the sum of two sub-scores. The pair of the i-th best of one list and the
j-th best of the other (from 0) has (i+1)(j+1)-1 pairs before it, so only pairs with (i+1)(j+1) <= r can be among the r
best: 20 of C * C for r = 8. Source: Lample et al. 2019, arXiv:1907.05242, section 3.1.

Each of the h heads has two of the k = 2 h codebooks, side by side.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike

from mmjax.errors import refuse_wrong_jaxlib
from mmjax.kernels.forms import kept, on_cpu

BALANCING_SLOPE = 1e-4  # with 1, clipping changed: docs/first_experiments.md
MOST_MERGED = 32  # rows of a head: longer lists do not fit into a GPU's registers, and a sort it is


def product_key_topk(
  query_BTkp: Array,
  keys_kCp: Array,
  num_selected: int,
  bias_kC: Array | None = None,
  *,
  gradient_dtype: DTypeLike = jnp.float32,
) -> tuple[Array, Array]:
  """Picks, for every head, the exact top `num_selected` of all C*C rows.

  Rows are ordered by their float32 score, best first, and equal scores by row, lowest first. Where two sums are equal
  only because float32 rounded them, the last place may go to the pair of the better sub-key instead of the lower row.

  Args:
    query_BTkp: float halves of queries. Scores are computed in float32 whatever its dtype: bf16 would pick other rows.
    keys_kCp: float codebooks of C sub-keys, two a head, side by side.
    num_selected: r, at most C.
    bias_kC: float32, added to the sub-scores while rows are chosen and ordered; it gets no gradient.
    gradient_dtype: in which a GPU multiplies the gradients of the scores, as those of other products.

  Returns:
    row_BThr: int32 in [0, C*C), i * C + j for sub-keys i and j. score_BThr: float32, before any softmax and without
    the bias; differentiable.

  Raises:
    ValueError: if r > C.
  """
  refuse_wrong_jaxlib()
  B, T, k, p = query_BTkp.shape
  C, r = keys_kCp.shape[1], num_selected
  if r > C:
    raise ValueError(f'num_selected={r} must be at most the {C} sub-keys of each half')
  query_Xkp = query_BTkp.reshape(-1, k, p).astype(jnp.float32)
  score = _scores if on_cpu() else partial(_scores_of_gpu, dtype=jnp.dtype(gradient_dtype))
  score_kXC = score(query_Xkp, keys_kCp)
  if bias_kC is not None:
    score_kXC += jax.lax.stop_gradient(bias_kC)[:, None]
  best = _best_by_rounds if on_cpu() or r > MOST_MERGED else _best_by_merging
  row_Xhr, score_Xhr = (kept(x) for x in best(score_kXC, r))
  if bias_kC is not None:
    first_h1 = 2 * jnp.arange(k // 2)[:, None]
    i_Xhr, j_Xhr = jnp.divmod(row_Xhr, C)
    score_Xhr -= jax.lax.stop_gradient(bias_kC[first_h1, i_Xhr] + bias_kC[first_h1 + 1, j_Xhr])
  return row_Xhr.reshape(B, T, k // 2, r), score_Xhr.reshape(B, T, k // 2, r)


def balancing_slope(bias_kC: Array, row_BThr: Array) -> Array:
  """Returns 0, with a gradient for the bias: how much more often than one in C each sub-key is among the rows selected.

  Over all positions, padding too. Descending it, whatever the loss, lifts sub-keys that are taken too seldom. Adam
  steps by the sign and hardly by the size, which makes it the rule of Wang et al. 2024, arXiv:2408.15664, for experts.
  The size is therefore free, and so small that it takes no part in the norm by which all gradients are clipped.

  Args:
    bias_kC: float32, with which the rows were selected.
    row_BThr: int32 in [0, C * C).
  """
  k, C = bias_kC.shape
  sub_key_BTh2r = jnp.stack(jnp.divmod(row_BThr, C), axis=3)
  sub_key_kX = jnp.moveaxis(sub_key_BTh2r, (2, 3), (0, 1)).reshape(k, -1)
  share_kC = jnp.zeros((k, C), jnp.float32).at[jnp.arange(k)[:, None], sub_key_kX].add(1 / sub_key_kX.shape[1])
  balance = jnp.sum(bias_kC * (share_kC - 1 / C))
  return BALANCING_SLOPE * (balance - jax.lax.stop_gradient(balance))


def _scores(query_Xkp: Array, keys_kCp: Array) -> Array:
  # k first, as the products come: turning their axes costs a CPU more than the products do.
  # HIGHEST, because GPUs would multiply float32 as TF32, which picks other rows.
  return jnp.einsum('Xkp,kCp->kXC', query_Xkp, keys_kCp, precision=jax.lax.Precision.HIGHEST)


@partial(jax.custom_vjp, nondiff_argnames=('dtype',))
def _scores_of_gpu(query_Xkp: Array, keys_kCp: Array, dtype: jnp.dtype) -> Array:
  return _scores(query_Xkp, keys_kCp)


def _scores_of_gpu_fwd(query_Xkp, keys_kCp, dtype):
  return _scores(query_Xkp, keys_kCp), (query_Xkp.astype(dtype), keys_kCp.astype(dtype))


def _scores_of_gpu_bwd(dtype, residuals, grad_kXC):
  query_Xkp, keys_kCp = residuals
  grad_kXC = grad_kXC.astype(dtype)
  precision = jax.lax.Precision.HIGHEST if dtype == jnp.float32 else None
  product = partial(jnp.einsum, precision=precision, preferred_element_type=jnp.float32)
  return product('kXC,kCp->Xkp', grad_kXC, keys_kCp), product('kXC,Xkp->kCp', grad_kXC, query_Xkp)


_scores_of_gpu.defvjp(_scores_of_gpu_fwd, _scores_of_gpu_bwd)


def _pairs(num_selected: int) -> list[tuple[int, int]]:
  """Returns the pairs (i, j) of places in the two lists that can be among the best rows."""
  places = range(num_selected)
  return [(i, j) for i in places for j in places if (i + 1) * (j + 1) <= num_selected]


def _best_by_rounds(score_kXC: Array, num_selected: int) -> tuple[Array, Array]:
  """Finds rows and scores for a CPU: `lax.top_k`, then rounds of maxima."""
  k, _, C = score_kXC.shape
  r, h = num_selected, k // 2
  # Barriers, because on a CPU only rank 2 gets XLA's fast top-k, and reshapes move through it.
  flat_XC = jax.lax.optimization_barrier(score_kXC.reshape(-1, C))
  # One barrier an output: around both, the XLA of jax 0.10 aborts while it partitions over several devices.
  best_Xr, sub_key_Xr = (jax.lax.optimization_barrier(x) for x in jax.lax.top_k(flat_XC, r))
  # Heads and tokens last: what follows is arithmetic on the few candidates of all of them at a time.
  best_2rX, sub_key_2rX = (
    x.reshape(h, 2, -1, r).transpose(1, 3, 0, 2).reshape(2, r, -1) for x in (best_Xr, sub_key_Xr)
  )
  pairs = _pairs(r)
  sum_cX = jnp.stack([best_2rX[0, i] + best_2rX[1, j] for i, j in pairs])
  candidate_cX = jnp.stack([sub_key_2rX[0, i] * C + sub_key_2rX[1, j] for i, j in pairs])
  row_r1X = _best_candidates(jax.lax.stop_gradient(sum_cX), candidate_cX, r, C * C - 1)
  # Row by row, because the gradient of one sum over (r, c, X) would be built at that size.
  score_rX = jnp.stack([jnp.sum(jnp.where(candidate_cX == row_1X, sum_cX, 0), axis=0) for row_1X in row_r1X])
  return tuple(x.reshape(r, h, -1).transpose(2, 1, 0) for x in (row_r1X, score_rX))


def _best_candidates(sum_cX: Array, candidate_cX: Array, r: int, last_row: int) -> Array:
  """Returns row_r1X of the r greatest sums: r rounds of a maximum, then the lowest row that reaches it."""

  def take_best(left_cX, _):
    reaches_cX = left_cX == jnp.max(left_cX, axis=0, keepdims=True)
    row_1X = jnp.min(jnp.where(reaches_cX, candidate_cX, last_row), axis=0, keepdims=True)
    return jnp.where(candidate_cX == row_1X, -jnp.inf, left_cX), row_1X

  return jax.lax.scan(take_best, sum_cX, length=r)[1]


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def _best_by_merging(score_kXC: Array, num_selected: int) -> tuple[Array, Array]:
  """Finds rows and scores for a GPU, where `lax.top_k` of C columns is a sort: one pass over the scores, no more.

  X stays an axis of its own, so that no device asks for the tokens of another.
  """
  k, X, C = score_kXC.shape
  column_kXC = jax.lax.broadcasted_iota(jnp.int32, score_kXC.shape, 2)
  found = _merge_best(score_kXC, column_kXC, C - 1, num_selected)
  best, sub_key = ([x.reshape(k // 2, 2, X) for x in each] for each in found)
  pairs = _pairs(num_selected)
  # Last, because XLA gives sums over any other axis a tile of shared memory for each of a list's places.
  sum_hXc = jnp.stack([best[i][:, 0] + best[j][:, 1] for i, j in pairs], axis=-1)
  candidate_hXc = jnp.stack([sub_key[i][:, 0] * C + sub_key[j][:, 1] for i, j in pairs], axis=-1)
  score, row = _merge_best(sum_hXc, candidate_hXc, C * C - 1, num_selected)
  return tuple(jnp.stack(each, axis=-1).swapaxes(0, 1) for each in (row, score))


def _best_by_merging_fwd(score_kXC, num_selected):
  found = tuple(kept(x) for x in _best_by_merging(score_kXC, num_selected))
  return found, (found[0], jnp.zeros((0, score_kXC.shape[-1])))


def _best_by_merging_bwd(num_selected, residuals, grads):
  row_Xhr, columns_0C = residuals
  C = columns_0C.shape[-1]
  sub_key_kXr = jnp.stack(jnp.divmod(row_Xhr, C), axis=2).reshape(len(row_Xhr), -1, num_selected).swapaxes(0, 1)
  grad_kXr = jnp.repeat(grads[1].swapaxes(0, 1), 2, axis=0)
  # A comparison with every column instead of a scatter: it writes the gradient once, and reads nothing of its size.
  column_11C = jax.lax.broadcasted_iota(jnp.int32, (1, 1, C), 2)
  hits = [jnp.where(sub_key_kXr[..., r, None] == column_11C, grad_kXr[..., r, None], 0) for r in range(num_selected)]
  return (sum(hits),)


_best_by_merging.defvjp(_best_by_merging_fwd, _best_by_merging_bwd)


def _merge_best(value: Array, index: Array, last: int, number: int) -> tuple[list[Array], list[Array]]:
  """Returns the `number` greatest values along axis 2, best first, and their indices; of equal ones the lowest first.

  One reduction, whose sums are sorted lists: two of them are merged by the last stages of a bitonic sort (Batcher
  1968). It reads its input once and keeps lists in registers, where a sort reads and writes all columns. Where there
  are too few numbers it finds -inf, with the index `last`.
  """
  width = 1 << (number - 1).bit_length()
  rest, worst = width - 1, (-jnp.inf, last)
  lists = [
    x for start, bad in zip((value, index), worst, strict=True) for x in (start, *[jnp.full_like(start, bad)] * rest)
  ]
  starts = [jnp.asarray(bad, x.dtype) for x, bad in zip((value, index), worst, strict=True) for _ in range(width)]

  def merge(a: tuple[Array, ...], b: tuple[Array, ...]) -> tuple[Array, ...]:
    merged = _merge_sorted(*(list(zip(x[:width], x[width:], strict=True)) for x in (a, b)))
    return tuple(x for each in zip(*merged, strict=True) for x in each)

  found = jax.lax.reduce(lists, starts, merge, (2,))
  return found[:number], found[width : width + number]


def _merge_sorted(a: list[tuple], b: list[tuple]) -> list[tuple]:
  """Returns the better half of two sorted lists of (value, index), sorted; their length is a power of 2."""

  def ordered(x: tuple, y: tuple) -> tuple[tuple, tuple]:
    first = (x[0] > y[0]) | ((x[0] == y[0]) & (x[1] < y[1]))
    best, other = (tuple(jnp.where(first, *pair) for pair in zip(*two, strict=True)) for two in ((x, y), (y, x)))
    return best, other

  best = [ordered(x, y)[0] for x, y in zip(a, reversed(b), strict=True)]
  step = len(best) // 2
  while step:
    for i in range(len(best)):
      if not i & step:
        best[i], best[i + step] = ordered(best[i], best[i + step])
    step //= 2
  return best
