"""Keeps the gradient of each read, instead of an array as large as the bank for each layer.

The gradients of all reads are added up row by row: in slots of their own, for rows that are updated alone
(lazy_bank.py), or on a GPU in one array for all layers. `accumulation` decides for step.py whether reads are kept.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from mmjax.config import Config
from mmjax.config.sublayers import bank_readers, uses_bank
from mmjax.kernels.bank import Reads, add_reads, no_reads
from mmjax.kernels.forms import on_cpu
from mmjax.model.params import BANK, Params, without_bank

CHUNK_ROWS = 4096  # slots that a loop over those in use takes at a time: 2 MB an array at P = 128, in a CPU's cache
GPU_CHUNK_ROWS = 65536  # a GPU has many threads, and starts some kernels for each chunk
NO_SLOT = -(2**31)  # of a row that nothing read


class RowReads(NamedTuple):
  """Rows that a micro-batch read, int32, and each layer's gradients of them."""

  row_LBThr: Array
  layers: list[Reads]


class RowSums(NamedTuple):
  """Summed gradients of rows, each in a slot of its own.

  Attributes:
    sum_UP: float32; 0 in free slots.
    row_U: int32, the slot's row; in free slots a number that is no row's, each another.
    slot_M: int32, the row's slot; below 0 where it was not read.
    used: int32, slots in use; they are the first.
  """

  sum_UP: Array
  row_U: Array
  slot_M: Array
  used: Array

  def over_chunks(self, step: Callable[[Array, Array, Any], Any], carry: Any) -> Any:
    """Returns what becomes of `carry` by step(row_U, sum_UP, carry) for each chunk of the slots in use."""
    chunk = chunk_rows(len(self.row_U))

    def take(i: Array, carry: Any) -> Any:
      return step(*(jax.lax.dynamic_slice_in_dim(x, i * chunk, chunk) for x in (self.row_U, self.sum_UP)), carry)

    return jax.lax.fori_loop(0, (self.used + chunk - 1) // chunk, take, carry)

  def norm(self) -> Array:
    """Returns the Euclidean norm of all sums."""
    return jnp.sqrt(self.over_chunks(lambda _, sum_UP, total: total + jnp.sum(jnp.square(sum_UP)), jnp.zeros(())))


def chunk_rows(slots: int) -> int:
  """Returns how many of the slots a loop takes at a time; to be asked while a program is traced."""
  return min(CHUNK_ROWS if on_cpu() else GPU_CHUNK_ROWS, slots)


# (params, rows, total_weight, key) -> ((objective, parts), gradients): of a micro-batch, for an objective of make_loss
Gradient = Callable[[Params, dict[str, Array], Array, Array | None], tuple[tuple[Array, dict[str, Array]], Params]]


class Accumulation(NamedTuple):
  """How the gradients of an update's micro-batches are found and added up.

  Attributes:
    gradient: of one micro-batch.
    start: (params, shapes of such gradients) -> sums of none.
    add: (sums, such gradients) -> sums.
    one_is_sum: whether the gradients of a single micro-batch need not be added to anything.
  """

  gradient: Gradient
  start: Callable[[Params, Params], Params]
  add: Callable[[Params, Params], Params]
  one_is_sum: bool


def accumulation(config: Config, objective: Callable, *, whole: bool) -> Accumulation:
  """Returns how to accumulate, with the reads of the bank where `keeps_reads`; to be asked while a program is traced.

  Args:
    config: of the model and the update.
    objective: of `make_loss`.
    whole: whether a device has the whole bank.
  """
  if keeps_reads(config, whole=whole):  # an array like the bank would cost more than what was read of it
    return Accumulation(gradient_by_reads(config, objective), partial(empty_sums, config), add_gradients, False)

  def zeros(params: Params, shapes: Params) -> Params:
    return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)

  return Accumulation(jax.value_and_grad(objective, has_aux=True), zeros, partial(jax.tree.map, jnp.add), True)


def is_lazy(config: Config) -> bool:
  """Tells whether the config has a bank that is updated row by row."""
  return config.memory.bank_update == 'lazy' and uses_bank(config.model, config.memory)


def keeps_reads(config: Config, *, whole: bool) -> bool:
  """Whether a micro-batch's gradient of the bank is what was read; to be asked while a program is traced.

  It is for a lazy update, and on a GPU that has the `whole` bank: there an array for each layer would have to be filled
  and added up. A CPU's sums would have another order than those of every run before. Sums of several rows, whose reads
  would be kept with their weights and added one by one, gain nothing.
  """
  readers = bank_readers(config).values()
  alone = config.model.num_selected == 1 or not any(reader.sums_rows for reader in readers)
  return is_lazy(config) or bool(whole and alone and readers and not on_cpu())


def no_taps(config: Config, batch: int, length: int) -> list[Reads]:
  """Returns what taps the reads of each of `memory_layers`, for batches of (batch, length) tokens."""
  model, dtype = config.model, jnp.dtype(config.train.dtype)
  shape = (batch, length, config.memory.n_heads, model.num_selected)
  readers = bank_readers(config).values()
  return [no_reads(shape, model.knowledge_dim, dtype, bag=reader.sums_rows) for reader in readers]


def gradient_by_reads(config: Config, objective: Callable) -> Gradient:
  """Returns what `jax.value_and_grad(objective, has_aux=True)` does, with `RowReads` as the bank's gradient."""

  def gradient(params: Params, rows: dict[str, Array], total_weight: Array, key: Array | None) -> tuple:
    def tapped(others: Params, taps: list[Reads]) -> tuple[Array, dict[str, Array]]:
      return objective(params | others, rows, total_weight, key, taps)

    taps = no_taps(config, *rows['target'].shape)
    both = jax.value_and_grad(tapped, argnums=(0, 1), has_aux=True)
    (value, parts), (grads, reads) = both(without_bank(params), taps)
    row_LBTR = parts.pop('row_LBTR')
    row_LBThr = row_LBTR.reshape(*row_LBTR.shape[:-1], config.memory.n_heads, -1)
    return (value, parts), grads | {BANK: RowReads(row_LBThr, reads)}

  return gradient


def empty_sums(config: Config, params: Params, shapes: Params) -> Params:
  """Returns what `add_gradients` adds to: zeros, float32, and for the bank of a lazy update `RowSums`."""
  zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), without_bank(shapes))
  return zeros | {BANK: no_rows(config) if is_lazy(config) else jnp.zeros_like(params[BANK])}


def split_row_sums(grads: Params) -> tuple[Params, RowSums | None]:
  """Returns gradients that are arrays alone, and the bank's `RowSums`, of which they hold the norm; None without one.

  So whoever takes the norm of all gradients, as clipping does, reads of the bank what is in use.
  """
  of_bank = grads.get(BANK)
  return (grads | {BANK: of_bank.norm()}, of_bank) if isinstance(of_bank, RowSums) else (grads, None)


def no_rows(config: Config) -> RowSums:
  """Returns slots, all free, for as many rows as an update can read."""
  model = config.model
  reads = len(bank_readers(config)) * config.update_positions
  most = min(model.knowledge_num, reads * config.memory.n_heads * model.num_selected)
  chunk = chunk_rows(most)
  slots = -(-most // chunk) * chunk
  return RowSums(
    jnp.zeros((slots, model.knowledge_dim)),
    model.knowledge_num + jnp.arange(slots),
    jnp.full(model.knowledge_num, NO_SLOT),
    jnp.zeros((), jnp.int32),
  )


@jax.named_scope('optimizer')
def add_rows(sums: RowSums, reads: RowReads) -> RowSums:
  """Adds the gradients of a micro-batch; rows that are new get the next free slots."""
  sum_UP, row_U, slot_M, used = sums
  slots, M, row_X = len(row_U), len(slot_M), reads.row_LBThr.reshape(-1)
  bid_X = jnp.arange(len(row_X)) - len(row_X)  # below any slot, above NO_SLOT: of a new row's reads the last one wins
  slot_M = slot_M.at[row_X].max(bid_X)
  asks_X = slot_M[row_X] == bid_X
  slot_X = used + jnp.cumsum(asks_X) - 1
  slot_M = slot_M.at[jnp.where(asks_X, row_X, M)].set(slot_X, mode='drop')
  row_U = row_U.at[jnp.where(asks_X, slot_X, slots)].set(row_X, mode='drop')
  for row_BThr, layer in zip(reads.row_LBThr, reads.layers, strict=True):
    sum_UP = add_reads(sum_UP, slot_M[row_BThr], layer)
  return RowSums(sum_UP, row_U, slot_M, used + jnp.sum(asks_X))


def add_gradients(sums: Params, grads: Params) -> Params:
  """Adds gradients of a micro-batch, whose bank is `RowReads`, to sums.

  Sums of the bank are `RowSums`, or float32 (M, P), to which reads are added in place, the last layer's first, as they
  arise.
  """
  others = jax.tree.map(jnp.add, without_bank(sums), without_bank(grads))
  bank_sums, reads = sums[BANK], grads[BANK]
  if isinstance(bank_sums, RowSums):
    return others | {BANK: add_rows(bank_sums, reads)}
  for row_BThr, layer in zip(reads.row_LBThr[::-1], reads.layers[::-1], strict=True):
    bank_sums = add_reads(bank_sums, row_BThr, layer)
  return others | {BANK: bank_sums}
