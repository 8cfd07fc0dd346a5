"""Product-key top-k: the best R of C*C rows from two lists of C sub-scores, exactly.

A row is a pair of sub-keys and its score is the sum of two sub-scores. The pair of the i-th best of one list and the
j-th best of the other (from 0) has (i+1)(j+1)-1 pairs before it, so only pairs with (i+1)(j+1) <= R can be among the R
best: 20 of C*C for R = 8. Source: Lample et al. 2019, arXiv:1907.05242, section 3.1.

Axes: h heads, each with two codebooks; K = 2 h codebooks, those of one head side by side; r rows a head.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike

from mmjax.errors import refuse_wrong_jaxlib
from mmjax.kernels.forms import on_cpu

MOST_MERGED = 32  # rows of a head: longer lists do not fit into a GPU's registers, and a sort it is


def product_key_topk(
  query_BTKp: Array, keys_KCp: Array, num_selected: int, bias_KC: Array | None = None
) -> tuple[Array, Array]:
  """Picks, for every head, the exact top `num_selected` of all C*C rows.

  Rows are ordered by their float32 score, best first, and equal scores by row, lowest first. Where two sums are equal
  only because float32 rounded them, the last place may go to the pair of the better sub-key instead of the lower row.

  Args:
    query_BTKp: float halves of queries. Scores are computed in float32 whatever its dtype: bf16 would pick other rows.
    keys_KCp: codebooks of C sub-keys, two a head.
    num_selected: r, at most C.
    bias_KC: float32, added to the sub-scores while rows are chosen and ordered; it gets no gradient.

  Returns:
    row_BThr: int32 in [0, C*C), i * C + j for sub-keys i and j. score_BThr: float32, before any softmax and without
    the bias; differentiable.

  Raises:
    ValueError: if r > C.
  """
  found = best_rows(sub_key_scores(query_BTKp, keys_KCp), num_selected, bias_KC)
  return tuple(x.reshape(*query_BTKp.shape[:2], *x.shape[1:]) for x in found)


def best_rows(score_KXC: Array, num_selected: int, bias_KC: Array | None = None) -> tuple[Array, Array]:
  """Does what `product_key_topk` does, from scores of X tokens as `sub_key_scores` returns them: row_Xhr, score_Xhr."""
  K, _, C = score_KXC.shape
  R, heads = num_selected, K // 2
  if R > C:
    raise ValueError(f'num_selected={R} must be at most the {C} sub-keys of each half')
  if bias_KC is not None:
    score_KXC += jax.lax.stop_gradient(bias_KC)[:, None]
  row_Xhr, score_Xhr = (_best_by_rounds if on_cpu() or R > MOST_MERGED else _best_by_merging)(score_KXC, R)
  if bias_KC is not None:
    head_h1 = jnp.arange(heads)[:, None]
    first_Xhr, second_Xhr = jnp.divmod(row_Xhr, C)
    score_Xhr -= jax.lax.stop_gradient(bias_KC[2 * head_h1, first_Xhr] + bias_KC[2 * head_h1 + 1, second_Xhr])
  return row_Xhr, score_Xhr


def product_key_topk_reference(
  query_BTKp: Array, keys_KCp: Array, num_selected: int, bias_KC: Array | None = None
) -> tuple[Array, Array]:
  """The definition: all C*C sums, sorted."""
  score_KXC = sub_key_scores(query_BTKp, keys_KCp)
  score_BTKC = jnp.moveaxis(score_KXC, 0, 1).reshape(*query_BTKp.shape[:3], -1)

  def all_sums(score_xKC: Array) -> Array:
    sums = score_xKC[..., 0::2, :, None] + score_xKC[..., 1::2, None, :]
    return sums.reshape(*sums.shape[:-2], -1)

  sums_BThM = all_sums(score_BTKC)
  bias_hM = 0 if bias_KC is None else jax.lax.stop_gradient(all_sums(bias_KC))
  row_BThr = jax.lax.top_k(sums_BThM + bias_hM, num_selected)[1]
  return row_BThr, jnp.take_along_axis(sums_BThM, row_BThr, axis=-1)


def sub_key_scores(query_BTKp: Array, keys_KCp: Array, dtype: DTypeLike = jnp.float32) -> Array:
  """Returns the float32 scores (K, X, C) of the sub-keys of each codebook for the X = B * T tokens.

  On a GPU gradients are multiplied in `dtype`, as those of other products; the scores never are.
  """
  refuse_wrong_jaxlib()
  query_XKp = query_BTKp.reshape(-1, *query_BTKp.shape[2:]).astype(jnp.float32)
  return (_scores if on_cpu() else partial(_scores_of_gpu, dtype=jnp.dtype(dtype)))(query_XKp, keys_KCp)


def _scores(query_XKp: Array, keys_KCp: Array) -> Array:
  # K first, as the products come: turning their axes costs a CPU more than the products do.
  # HIGHEST, because GPUs would multiply float32 as TF32, which picks other rows.
  return jnp.einsum('XKp,KCp->KXC', query_XKp, keys_KCp, precision=jax.lax.Precision.HIGHEST)


@partial(jax.custom_vjp, nondiff_argnames=('dtype',))
def _scores_of_gpu(query_XKp: Array, keys_KCp: Array, dtype: jnp.dtype) -> Array:
  return _scores(query_XKp, keys_KCp)


def _scores_of_gpu_fwd(query_XKp, keys_KCp, dtype):
  return _scores(query_XKp, keys_KCp), (query_XKp.astype(dtype), keys_KCp.astype(dtype))


def _scores_of_gpu_bwd(dtype, residuals, grad_KXC):
  query_XKp, keys_KCp = residuals
  grad_KXC = grad_KXC.astype(dtype)
  precision = jax.lax.Precision.HIGHEST if dtype == jnp.float32 else None
  product = partial(jnp.einsum, precision=precision, preferred_element_type=jnp.float32)
  return product('KXC,KCp->XKp', grad_KXC, keys_KCp), product('KXC,XKp->KCp', grad_KXC, query_XKp)


_scores_of_gpu.defvjp(_scores_of_gpu_fwd, _scores_of_gpu_bwd)


def _pairs(num_selected: int) -> list[tuple[int, int]]:
  """Returns the pairs (i, j) of places in the two lists that can be among the best rows."""
  places = range(num_selected)
  return [(i, j) for i in places for j in places if (i + 1) * (j + 1) <= num_selected]


def _best_by_rounds(score_KXC: Array, num_selected: int) -> tuple[Array, Array]:
  """Finds rows and scores for a CPU: `lax.top_k`, then rounds of maxima."""
  K, _, C = score_KXC.shape
  R, heads = num_selected, K // 2
  # Barriers, because only rank 2 gets XLA's fast top-k and reshapes move through it: 30 times slower on a CPU.
  flat_YC = jax.lax.optimization_barrier(score_KXC.reshape(-1, C))
  # One barrier an output: around both, XLA 0.10.2 aborts while it partitions over several devices.
  best_YR, sub_key_YR = (jax.lax.optimization_barrier(x) for x in jax.lax.top_k(flat_YC, R))
  # Heads and tokens Z last: what follows is arithmetic on the few candidates n of all of them at a time.
  best_2RZ, sub_key_2RZ = (
    x.reshape(heads, 2, -1, R).transpose(1, 3, 0, 2).reshape(2, R, -1) for x in (best_YR, sub_key_YR)
  )
  pairs = _pairs(R)
  sum_nZ = jnp.stack([best_2RZ[0, i] + best_2RZ[1, j] for i, j in pairs])
  candidate_nZ = jnp.stack([sub_key_2RZ[0, i] * C + sub_key_2RZ[1, j] for i, j in pairs])
  row_RZ = _best_candidates(jax.lax.stop_gradient(sum_nZ), candidate_nZ, R, C * C - 1)
  # Row by row, because the gradient of one sum over (R, n, X) would be built at that size.
  score_RZ = jnp.stack([jnp.sum(jnp.where(candidate_nZ == row_Z, sum_nZ, 0), axis=0) for row_Z in row_RZ])
  return tuple(x.reshape(R, heads, -1).transpose(2, 1, 0) for x in (row_RZ, score_RZ))


def _best_candidates(sum_nX: Array, candidate_nX: Array, R: int, last_row: int) -> Array:
  """Rows of the R greatest sums, (R, X): R rounds of a maximum, then the lowest row that reaches it."""

  def take_best(left_nX, _):
    reaches_nX = left_nX == jnp.max(left_nX, axis=0)
    row_X = jnp.min(jnp.where(reaches_nX, candidate_nX, last_row), axis=0)
    return jnp.where(candidate_nX == row_X, -jnp.inf, left_nX), row_X

  return jax.lax.scan(take_best, sum_nX, length=R)[1]


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def _best_by_merging(score_KXC: Array, num_selected: int) -> tuple[Array, Array]:
  """Finds rows and scores for a GPU, where `lax.top_k` of C columns is a sort: one pass over the scores, no more.

  X stays an axis of its own, so that no device asks for the tokens of another.
  """
  K, X, C = score_KXC.shape
  column_KXC = jax.lax.broadcasted_iota(jnp.int32, score_KXC.shape, 2)
  found = merge_best(score_KXC, column_KXC, C - 1, num_selected, 2)
  best, sub_key = ([x.reshape(K // 2, 2, X) for x in each] for each in found)
  pairs = _pairs(num_selected)
  # Last, because XLA gives sums over any other axis a tile of shared memory for each of a list's places.
  sum_hXn = jnp.stack([best[i][:, 0] + best[j][:, 1] for i, j in pairs], axis=-1)
  candidate_hXn = jnp.stack([sub_key[i][:, 0] * C + sub_key[j][:, 1] for i, j in pairs], axis=-1)
  score, row = merge_best(sum_hXn, candidate_hXn, C * C - 1, num_selected, 2)
  return tuple(jnp.stack(each, axis=-1).swapaxes(0, 1) for each in (row, score))


def _best_by_merging_fwd(score_KXC, num_selected):
  found = _best_by_merging(score_KXC, num_selected)
  return found, (found[0], jnp.zeros((0, score_KXC.shape[-1])))


def _best_by_merging_bwd(num_selected, residuals, grads):
  row_Xhr, columns_0C = residuals
  C = columns_0C.shape[-1]
  sub_key_KXr = jnp.stack(jnp.divmod(row_Xhr, C), axis=2).reshape(len(row_Xhr), -1, num_selected).swapaxes(0, 1)
  grad_KXr = jnp.repeat(grads[1].swapaxes(0, 1), 2, axis=0)
  # A comparison with every column instead of a scatter: it writes the gradient once, and reads nothing of its size.
  hits = [jnp.where(sub_key_KXr[..., r, None] == jnp.arange(C), grad_KXr[..., r, None], 0) for r in range(num_selected)]
  return (sum(hits),)


_best_by_merging.defvjp(_best_by_merging_fwd, _best_by_merging_bwd)


def merge_best(value: Array, index: Array, last: int, number: int, axis: int) -> tuple[list[Array], list[Array]]:
  """Returns the `number` greatest values along an axis, best first, and their indices; of equal ones the lowest first.

  One reduction, whose sums are sorted lists: two of them are merged by the last stages of a bitonic sort (Batcher
  1968). It reads its input once and keeps lists in registers, where a sort reads and writes all columns.

  Args:
    value: float32.
    index: int32, like `value`.
    last: the greatest index, which is found where there are too few numbers, with -inf.
    number: how many.
    axis: along which.

  Returns:
    Two lists of `number` arrays without that axis.
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

  found = jax.lax.reduce(lists, starts, merge, (axis,))
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
