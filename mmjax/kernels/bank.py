"""Reading rows of the memory bank, one by one or in weighted sums, and adding up their gradients.

A row that several tokens read gets the sum of their gradients, in float32 whatever the compute dtype is: a popular row
is read thousands of times in a batch, and bf16 would stop counting after a few hundred.

The gradient of a bank is as large as the bank, whatever was read. Through a `TappedBank` no such array is made: the
backward pass hands out what it would have been the sum of, and `add_reads` sums that where the caller wants it.

Elsewhere: torch.nn.EmbeddingBag reads weighted sums without keeping their rows. docs/memory.md, "How the bank learns".
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import DTypeLike

from mmjax.errors import refuse_wrong_jaxlib
from mmjax.kernels.mesh import exchange_rows, on_any_mesh
from mmjax.kernels.packed_bank import PackedBank


class Reads(NamedTuple):
  """Of one layer: what the gradient of its rows is the sum of.

  Attributes:
    grad: of each row read, (B, T, h, r, P) in the compute dtype; of each sum of a bag, (B, T, h, P) float32.
    weight_BThr: of the rows in the sums of a bag, float32; None where rows were read one by one.
  """

  grad: Array
  weight_BThr: Array | None


@functools.partial(jax.tree_util.register_dataclass, data_fields=['part_MP'], meta_fields=['axis'])
@dataclasses.dataclass(frozen=True)
class BankShard:
  """A device's part of a bank that is divided by rows, inside `jax.shard_map`; reading it reads the whole bank.

  What travels are the numbers of the rows that a device asks another one for and, in return, those rows. Of a bag that
  sums as many rows as there are devices, or more, sums travel instead: from each device one for each bag, over the rows
  that it holds. The bank never travels.

  Attributes:
    part_MP: float32, this device's M rows; the devices of the axis hold all of them, in order.
    axis: name of the mesh axis.
  """

  part_MP: Array
  axis: str

  @property
  def shape(self) -> tuple[int, int]:
    """Of the whole bank."""
    return len(self.part_MP) * jax.lax.axis_size(self.axis), self.part_MP.shape[1]


class TappedBank(NamedTuple):
  """A bank that gets no gradient: instead the 'gradient' with respect to `tap` is the `Reads` of one layer.

  Each layer that reads the bank needs a tap of its own: JAX would add up the reads of two, which are of other rows.

  Attributes:
    bank_MP: float32.
    tap: from `no_reads`; its values are not looked at.
  """

  bank_MP: Array
  tap: Reads

  @property
  def shape(self) -> tuple[int, int]:
    """Of the bank."""
    return self.bank_MP.shape


Bank = Array | BankShard | TappedBank | PackedBank


def no_reads(row_shape: tuple[int, ...], row_dim: int, dtype: DTypeLike, *, bag: bool) -> Reads:
  """Returns zeros to tap a bank with.

  Args:
    row_shape: (B, T, h, r), of the rows that the layer will read.
    row_dim: P.
    dtype: what the lookup will be asked for.
    bag: whether the layer reads with `bank_bag`, or with `bank_lookup`.
  """
  if bag:
    return Reads(jnp.zeros((*row_shape[:-1], row_dim), jnp.float32), jnp.zeros(row_shape, jnp.float32))
  return Reads(jnp.zeros((*row_shape, row_dim), dtype), None)


def add_reads(sums_MP: Array, row_BThr: Array, reads: Reads) -> Array:
  """Adds to each row the gradients of its reads; `row_BThr` may number other rows than those of a bank.

  Rows past the end get nothing.

  Args:
    sums_MP: float32.
    row_BThr: int32, not negative, in the shape in which they were read.
    reads: of them.

  Raises:
    ValueError: if rows and reads have not the same shape, the sums not the width of the reads or another dtype, in
      which small gradients would be lost, or a row that is not traced is negative.
  """
  if not isinstance(reads, Reads):
    raise ValueError(f'reads must be the Reads of a tapped bank, not of type {type(reads).__name__}')
  if not isinstance(row_BThr, jax.core.Tracer) and (least := np.asarray(row_BThr).min(initial=0)) < 0:
    raise ValueError(f'row_BThr must hold no negative number, not {least}')
  read = reads.grad.shape[:-1] if reads.weight_BThr is None else reads.weight_BThr.shape
  if row_BThr.shape != read:
    raise ValueError(f'rows of shape {row_BThr.shape} must have that of their reads, {read}')
  if sums_MP.shape[1:] != reads.grad.shape[-1:]:
    raise ValueError(f'sums of shape {sums_MP.shape} must have the width of the reads, {reads.grad.shape[-1]}')
  if sums_MP.dtype not in (jnp.float32, jnp.float64):
    raise ValueError(f'sums of {sums_MP.dtype} must be float32: many small gradients are added up')
  return on_any_mesh(_add_reads, lambda spec: spec, sums_MP, row_BThr, reads)


def _add_reads(sums_MP: Array, row_BThr: Array, reads: Reads) -> Array:
  if reads.weight_BThr is None:
    return _add_scatter(sums_MP, row_BThr.reshape(-1), reads.grad.reshape(-1, sums_MP.shape[1]))

  def add(sums_MP: Array, ith: tuple[Array, Array]) -> tuple[Array, None]:
    row, weight = ith
    grad_XP = (weight[..., None] * reads.grad).reshape(-1, sums_MP.shape[1])
    return _add_scatter(sums_MP, row.reshape(-1), grad_XP), None

  # One of the r rows at a time: all of their gradients would be r times the memory of the sums.
  ith = jnp.moveaxis(row_BThr, -1, 0), jnp.moveaxis(reads.weight_BThr, -1, 0)
  return jax.lax.scan(add, jnp.asarray(sums_MP), ith)[0]


@jax.named_scope('lookup')
def bank_lookup(bank_MP: Bank, row_BTR: Array, dtype: DTypeLike) -> Array:
  """Gathers rows of the bank.

  Args:
    bank_MP: float; may be sharded by rows under jit; may be a part of a bank; may be tapped; may be packed.
    row_BTR: int32 in [0, M), in any order and number, any number of axes.
    dtype: of the result.

  Returns:
    rows_BTRP in `dtype`.

  Raises:
    ValueError: if a tap is not of these reads.
  """
  refuse_wrong_jaxlib()
  if isinstance(bank_MP, BankShard):
    row_X = jnp.asarray(row_BTR, jnp.int32).reshape(-1)
    if not len(row_X):
      return jnp.zeros((*row_BTR.shape, bank_MP.shape[1]), dtype)
    rows_XP = exchange_rows(bank_MP.part_MP, row_X, bank_MP.axis, jnp.dtype(dtype))
    return rows_XP.reshape(*row_BTR.shape, -1)
  if isinstance(bank_MP, TappedBank):
    bank_MP, tap = bank_MP
    _check_tap(tap, row_BTR.shape, bank_MP.shape[1], bag=False)
    return _tapped(jax.lax.stop_gradient(jnp.asarray(bank_MP))[row_BTR].astype(dtype), tap.grad)
  return _gather(bank_MP, row_BTR, dtype)


def _gather(bank_MP: Array | PackedBank, row_BTR: Array, dtype: DTypeLike) -> Array:
  if not isinstance(bank_MP, PackedBank):
    bank_MP = jnp.asarray(bank_MP)  # a NumPy array takes no traced index
  if isinstance(bank_MP, PackedBank) or bank_MP.dtype == jnp.float32:
    return bank_MP[row_BTR].astype(dtype)  # rows are cast, and their gradients back, so that these add up in float32
  return _narrow_lookup(bank_MP, row_BTR, jnp.dtype(dtype))


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _narrow_lookup(bank_MP: Array, row_BTR: Array, dtype: jnp.dtype) -> Array:
  return bank_MP[row_BTR].astype(dtype)


def _narrow_lookup_bwd(dtype, residuals, grad_BTRP):
  bank_MP, row_BTR = residuals
  sums_MP = jnp.zeros(bank_MP.shape, jnp.float32)
  grad_MP = _add_scatter(sums_MP, row_BTR.reshape(-1), grad_BTRP.reshape(-1, bank_MP.shape[1]))
  return grad_MP.astype(bank_MP.dtype), None


_narrow_lookup.defvjp(
  lambda bank_MP, row_BTR, dtype: (_narrow_lookup(bank_MP, row_BTR, dtype), (bank_MP, row_BTR)), _narrow_lookup_bwd
)


@jax.named_scope('lookup')
def bank_bag(bank_MP: Bank, row_BThr: Array, weight_BThr: Array) -> Array:
  """Sums rows of the bank, weighted: an embedding bag for each head.

  The rows are read again in the backward pass. To keep them would take r times the memory of the sums.

  Args:
    bank_MP: float; may be sharded by rows under jit; may be a part of a bank; may be tapped; may be packed.
    row_BThr: int32 in [0, M), in any order and number, any number of axes; the last is summed over.
    weight_BThr: float32, like `row_BThr`.

  Returns:
    sum_BThP, float32.

  Raises:
    ValueError: if a tap is not of these reads.
  """
  refuse_wrong_jaxlib()
  if isinstance(bank_MP, BankShard):
    if row_BThr.shape[-1] < jax.lax.axis_size(bank_MP.axis) or not row_BThr.size:
      return jnp.sum(bank_lookup(bank_MP, row_BThr, jnp.float32) * weight_BThr[..., None], axis=-2)
    return _bag_of_parts(bank_MP, row_BThr, weight_BThr)
  if isinstance(bank_MP, TappedBank):
    bank_MP, tap = bank_MP
    _check_tap(tap, row_BThr.shape, bank_MP.shape[1], bag=True)
    sum_BThP = _bag(bank_MP, row_BThr, _tapped_weights(weight_BThr, tap.weight_BThr), False)
    return _tapped(sum_BThP, tap.grad)
  return _bag(bank_MP, row_BThr, weight_BThr, not isinstance(bank_MP, PackedBank))


@jax.named_scope('bank_usage')
def sum_by_row(row_LBTR: Array, value_LBTR: Array, knowledge_num: int) -> Array:
  """Returns the sum of what stands at each row of the bank, for each reader: (L, M) in the dtype of the values."""
  L = len(row_LBTR)
  zeros_LM = jnp.zeros((L, knowledge_num), value_LBTR.dtype)
  return zeros_LM.at[jnp.arange(L)[:, None], row_LBTR.reshape(L, -1)].add(value_LBTR.reshape(L, -1))


def _check_tap(tap: Reads, row_shape: tuple[int, ...], row_dim: int, *, bag: bool) -> None:
  """Raises ValueError if a tap is not of the rows that are read, which JAX would say of a gradient, far from here."""
  want = (*(row_shape[:-1] if bag else row_shape), row_dim)
  grad, weight = getattr(tap, 'grad', None), getattr(tap, 'weight_BThr', None)
  found = tuple(None if x is None else x.shape for x in (grad, weight))
  if found != (want, row_shape if bag else None):
    raise ValueError(
      f'the tap of this bank must be no_reads({row_shape}, {row_dim}, dtype, bag={bag}); its arrays have the shapes '
      f'{found}'
    )


def _bag_of_parts(bank: BankShard, row_BThr: Array, weight_BThr: Array) -> Array:
  """Sums on each device the rows that it holds, for the bags of all devices, and adds up the answers to each bag."""
  shape = row_BThr.shape
  row_Xr, weight_Xr = jnp.asarray(row_BThr, jnp.int32).reshape(-1, shape[-1]), weight_BThr.reshape(-1, shape[-1])
  row_Xr, weight_Xr = (jax.lax.all_gather(x, bank.axis, tiled=True) for x in (row_Xr, weight_Xr))
  n_rows = len(bank.part_MP)
  local_Xr = row_Xr - jax.lax.axis_index(bank.axis) * n_rows
  own_Xr = (local_Xr >= 0) & (local_Xr < n_rows)
  local_Xr = jnp.where(own_Xr, local_Xr, n_rows)  # past the end: scatters drop it
  sum_XP = _bag(bank.part_MP, local_Xr, jnp.where(own_Xr, weight_Xr, 0), True)
  return jax.lax.psum_scatter(sum_XP, bank.axis, tiled=True).reshape(*shape[:-1], -1)


def _add_scatter(sums_MP: Array, row_X: Array, grad_XP: Array) -> Array:
  return jnp.asarray(sums_MP).at[row_X].add(grad_XP.astype(sums_MP.dtype))


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _bag(bank_MP: Array, row_BThr: Array, weight_BThr: Array, differentiable: bool) -> Array:
  def whole(bank_MP, row_BThr, weight_BThr):
    return jnp.sum(bank_MP[row_BThr] * weight_BThr[..., None], axis=-2)

  def one_by_one(bank_MP, row_BThr, weight_BThr):
    # A CPU fuses these sums; the form above would build (B, T, h, r, P) there.
    return sum(bank_MP[row_BThr[..., i]] * weight_BThr[..., i, None] for i in range(row_BThr.shape[-1]))

  return jax.lax.platform_dependent(bank_MP, row_BThr, weight_BThr, cpu=one_by_one, default=whole)


def _bag_fwd(bank_MP, row_BThr, weight_BThr, differentiable):
  if not isinstance(bank_MP, PackedBank):
    bank_MP = jnp.asarray(bank_MP)  # a NumPy array takes no traced index
  return _bag(bank_MP, row_BThr, weight_BThr, differentiable), (bank_MP, row_BThr, weight_BThr)


def _bag_bwd(differentiable, residuals, grad_BThP):
  def no_sums(bank_MP):
    return jnp.zeros(bank_MP.shape if differentiable else (), jnp.float32)

  def add_rows(sums_MP, bank_MP, row, weight, grad):
    if differentiable:
      grad_XP = (weight[..., None] * grad).reshape(-1, grad.shape[-1])
      sums_MP = _add_scatter(sums_MP, row.reshape(-1), grad_XP)
    return sums_MP, jnp.sum(bank_MP[row] * grad, axis=-1)

  def whole(bank_MP, row_BThr, weight_BThr, grad_BThP):
    return add_rows(no_sums(bank_MP), bank_MP, row_BThr, weight_BThr, grad_BThP[..., None, :])

  def one_by_one(bank_MP, row_BThr, weight_BThr, grad_BThP):
    each = (jnp.moveaxis(row_BThr, -1, 0), jnp.moveaxis(weight_BThr, -1, 0))
    grad_MP, grad_weight_rBTh = jax.lax.scan(
      lambda sums_MP, x: add_rows(sums_MP, bank_MP, *x, grad_BThP), no_sums(bank_MP), each
    )
    return grad_MP, jnp.moveaxis(grad_weight_rBTh, 0, -1)

  bank_MP, _, weight_BThr = residuals
  grad_MP, grad_weight_BThr = jax.lax.platform_dependent(*residuals, grad_BThP, cpu=one_by_one, default=whole)
  grad_MP = grad_MP.astype(bank_MP.dtype) if differentiable else None
  return grad_MP, None, grad_weight_BThr.astype(weight_BThr.dtype)


_bag.defvjp(_bag_fwd, _bag_bwd)


@jax.custom_vjp
def _tapped(x: Array, tap: Array) -> Array:
  """Returns x; the gradient of x is that of `tap` too."""
  return x


_tapped.defvjp(lambda x, tap: (x, None), lambda _, grad: (grad, grad))


@jax.custom_vjp
def _tapped_weights(weight_BThr: Array, tap_BThr: Array) -> Array:
  """Returns the weights; the backward pass hands them out as the 'gradient' of `tap_BThr`."""
  return weight_BThr


_tapped_weights.defvjp(lambda weight, tap: (weight, weight), lambda weight, grad: (grad, weight))
