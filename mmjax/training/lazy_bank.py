"""Adam for the rows of the bank that an update read, and no others (memory.bank_update='lazy').

Dense Adam reads and writes the bank, two moments and the gradient in every update, read or not: 3.5 GB for 1,048,576 x
128. Here an update costs what its rows cost. Every row that is read gets a slot when it is first read, gradients add up
in the slots, and Adam runs over the slots in use. It pays while far fewer rows are read in an update than there are.

The rule, for a row that was touched (read) in update s and next in update t, with g the sum of its clipped gradients in
t. Updates are numbered from 1, skipped ones not counted; rate_j and decay are the bank's own.
  mean   <- beta1^(t-s) mean + (1 - beta1) g         exactly dense Adam's: in between its gradients were 0
  square <- beta2^(t-s) square + (1 - beta2) g^2     exactly dense Adam's
  row    <- row prod_{s<j<t} (1 - rate_j decay)      exact but late: until t the row is read without it
  row    <- row - rate_t (mean / (1 - beta1^t) / (sqrt(square / (1 - beta2^t)) + eps) + decay row)
Dense Adam's mean goes on moving a row after it was read, in n updates without a gradient by as much as that last step
times drift(n) = sum_{k=1..n} (beta1 / sqrt(beta2))^k: in all 9.4 times as far with 0.9 and 0.99, and most rows are read
seldom. So with each step a row moves on at once by drift(n), with n the number of updates between its last two reads,
as a forecast, or all since the start where this is its first. At its next read drift(t-s-1) less that forecast makes up
for the difference. What is left of a difference from dense Adam: where a row stands while the forecast is wrong, and
that drift has the rate of the update that makes it. Where every row is read in every update, nothing differs.

Elsewhere: torch.optim.SparseAdam and LazyAdam of TensorFlow Addons leave the moments of untouched rows as they are,
where these decay, and have no weight decay.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array

from mmjax.config import Config
from mmjax.config.parameters import first_row, parameter_table
from mmjax.kernels.bank import Reads, add_reads
from mmjax.kernels.norm import ratio_of_norms
from mmjax.model.lm import BANK, Params, no_taps, without_bank
from mmjax.model.sublayers import SUBLAYERS, layer_kinds

CHUNK_ROWS = 4096  # rows updated at a time: 2 MB an array at P = 128, in a CPU's cache; the loop runs over rows in use

MOST_DRIFT = 0.999  # of a mean from one update to the next; dense Adam would move unread rows ever faster above 1

Moments = dict[str, Array]
ROW_MOMENTS = ('mean_MP', 'square_MP', 'count_M', 'missed_M', 'log_decay_M')  # those that have a part for each row


class RowReads(NamedTuple):
  """Rows that a micro-batch read, int32, and each layer's gradients of them."""

  row_LBThr: Array
  layers: list[Reads]


class RowSums(NamedTuple):
  """Summed gradients of rows, each in a slot of its own.

  Attributes:
    sum_UP: float32; 0 in free slots.
    row_U: int32, the slot's row; in free slots a number that is no row's, each another.
    slot_M: int32, the row's slot; -1 where it was not read.
    used: int32, slots in use; they are the first.
  """

  sum_UP: Array
  row_U: Array
  slot_M: Array
  used: Array


def is_lazy(config: Config) -> bool:
  """Tells whether the config has a bank that is updated row by row."""
  return config.memory.bank_update == 'lazy' and SUBLAYERS[config.model.sublayer].uses_bank


def gradient_by_reads(config: Config, objective: Callable) -> Callable:
  """Returns what `jax.value_and_grad(objective, has_aux=True)` does, with `RowReads` as the bank's gradient."""

  def gradient(params: Params, rows: dict[str, Array], total_weight: Array, key: Array | None) -> tuple:
    def tapped(others: Params, taps: dict[int, Reads]) -> tuple[Array, dict[str, Array]]:
      return objective(params | others, rows, total_weight, key, taps)

    taps = no_taps(config, *rows['target'].shape)
    both = jax.value_and_grad(tapped, argnums=(0, 1), has_aux=True)
    (value, parts), (grads, reads) = both(without_bank(params), taps)
    row_LBTR = parts.pop('row_LBTR')
    row_LBThr = row_LBTR.reshape(*row_LBTR.shape[:-1], config.memory.n_heads, -1)
    return (value, parts), grads | {BANK: RowReads(row_LBThr, list(reads.values()))}

  return gradient


def no_rows(config: Config) -> RowSums:
  """Returns slots, all free, for as many rows as an update can read."""
  model, train = config.model, config.train
  layers = sum(SUBLAYERS[kind].uses_bank for kind in layer_kinds(model, config.memory))
  reads = layers * model.max_seq_len * train.update_rows
  most = min(model.knowledge_num, reads * config.memory.n_heads * model.num_selected)
  chunk = min(CHUNK_ROWS, most)
  slots = -(-most // chunk) * chunk
  return RowSums(
    jnp.zeros((slots, model.knowledge_dim)),
    model.knowledge_num + jnp.arange(slots),
    jnp.full(model.knowledge_num, -1),
    jnp.zeros((), jnp.int32),
  )


@jax.named_scope('optimizer')
def add_rows(sums: RowSums, reads: RowReads) -> RowSums:
  """Adds the gradients of a micro-batch; rows that are new get the next free slots."""
  sum_UP, row_U, slot_M, used = sums
  slots, M, row_X = len(row_U), len(slot_M), reads.row_LBThr.reshape(-1)
  read_X = jnp.arange(len(row_X))
  last_read_M = jnp.full(M, -1).at[row_X].max(read_X)  # of the reads of one row, the last asks for the slot
  asks_X = (last_read_M[row_X] == read_X) & (slot_M[row_X] < 0)
  slot_X = used + jnp.cumsum(asks_X) - 1
  slot_M = slot_M.at[jnp.where(asks_X, row_X, M)].set(slot_X, mode='drop')
  row_U = row_U.at[jnp.where(asks_X, slot_X, slots)].set(row_X, mode='drop')
  for row_BThr, layer in zip(reads.row_LBThr, reads.layers, strict=True):
    sum_UP = add_reads(sum_UP, slot_M[row_BThr], layer)
  return RowSums(sum_UP, row_U, slot_M, used + jnp.sum(asks_X))


def add_gradients(sums: Params, grads: Params) -> Params:
  """Adds gradients of a micro-batch, whose bank is `RowReads`, to sums.

  Those of the bank are `RowSums`, or (M, P): then they are added up in place, the last layer's first, as they arise.
  """
  others = jax.tree.map(jnp.add, without_bank(sums), without_bank(grads))
  bank_sums, reads = sums[BANK], grads[BANK]
  if isinstance(bank_sums, RowSums):
    return others | {BANK: add_rows(bank_sums, reads)}
  for row_BThr, layer in zip(reads.row_LBThr[::-1], reads.layers[::-1], strict=True):
    bank_sums = add_reads(bank_sums, row_BThr, layer)
  return others | {BANK: bank_sums}


def init_moments(bank_MP: Array) -> Moments:
  """Returns the state before the first update.

  mean_MP and square_MP, float32, are Adam's. count_M, int32: the update that last touched a row; missed_M, int32:
  updates between the two that last did. log_decay, float32:
  sum of log(1 - rate_j decay) over all updates so far; log_decay_M: what it was when the row was last touched.
  """
  M, zero = len(bank_MP), jnp.zeros(())
  moments = {'mean_MP': jnp.zeros_like(bank_MP), 'square_MP': jnp.zeros_like(bank_MP)}
  moments |= {'count_M': jnp.zeros(M, jnp.int32), 'missed_M': jnp.zeros(M, jnp.int32)}
  return moments | {'log_decay_M': jnp.zeros(M), 'log_decay': zero}


@jax.named_scope('optimizer')
def update_rows(
  config: Config, rate: optax.Schedule, bank_MP: Array, moments: Moments, sums: RowSums, count: Array, applied: Array
) -> tuple[Array, Moments, Array]:
  """Makes one update by the rule above, in place where the compiler may reuse the arrays.

  Args:
    config: betas, eps and decay.
    rate: the bank's learning rate for the number of updates made before.
    bank_MP: float32.
    moments: from `init_moments`.
    sums: clipped gradients.
    count: int32, updates made before.
    applied: False leaves everything as it is.

  Returns:
    The bank, the moments, and the row_update_ratio of mmjax.evaluation.probes.
  """
  train, step_rate, t = config.train, rate(count), count + 1
  decay = train.weight_decay * first_row(parameter_table(config), BANK, 'decay').decay
  log_decay_after = moments['log_decay'] + jnp.where(applied, jnp.log1p(-step_rate * decay), 0)
  chunk = min(CHUNK_ROWS, len(sums.row_U))

  def adam(mean_UP: Array, square_UP: Array, t: Array) -> Array:
    return mean_UP / (1 - train.beta1**t) / (jnp.sqrt(square_UP / (1 - train.beta2**t)) + train.eps)

  def drift(n: Array) -> Array:
    factor = min(train.beta1 / train.beta2**0.5, MOST_DRIFT) if train.beta2 else 0.0
    return factor * (1 - factor**n) / (1 - factor)

  def update_chunk(i: Array, carry: tuple) -> tuple:
    bank_MP, moments, added, before = carry
    row_U, g_UP = (jax.lax.dynamic_slice_in_dim(x, i * chunk, chunk) for x in (sums.row_U, sums.sum_UP))
    row_UP, *of_rows = (x.at[row_U].get(mode='clip') for x in (bank_MP, *(moments[name] for name in ROW_MOMENTS)))
    mean_UP, square_UP, count_U, missed_U, log_decay_U = of_rows
    in_use_U1, old_UP = (row_U < len(bank_MP))[:, None], row_UP
    passed_U1 = (t - count_U)[:, None].astype(jnp.float32)
    drift_U1 = drift(passed_U1 - 1)
    late_UP = (drift_U1 - drift(missed_U[:, None])) * adam(mean_UP, square_UP, jnp.maximum(count_U, 1)[:, None])
    mean_UP = (1 - train.beta1) * g_UP + train.beta1**passed_U1 * mean_UP
    square_UP = (1 - train.beta2) * g_UP**2 + train.beta2**passed_U1 * square_UP
    row_UP = row_UP * jnp.exp(moments['log_decay'] - log_decay_U)[:, None] - step_rate * late_UP
    row_UP -= step_rate * ((1 + drift_U1) * adam(mean_UP, square_UP, t) + decay * row_UP)

    def put(x: Array, new: Array) -> Array:
      return x.at[row_U].set(new, mode='drop', unique_indices=True)

    new = zip(ROW_MOMENTS, (mean_UP, square_UP, t, t - count_U - 1, log_decay_after), strict=True)
    added += jnp.sum(jnp.where(in_use_U1, jnp.square(row_UP - old_UP), 0))
    before += jnp.sum(jnp.where(in_use_U1, jnp.square(old_UP), 0))
    return put(bank_MP, row_UP), moments | {name: put(moments[name], value) for name, value in new}, added, before

  chunks = jnp.where(applied, (sums.used + chunk - 1) // chunk, 0)
  carry = (bank_MP, moments, jnp.zeros(()), jnp.zeros(()))
  bank_MP, moments, added, before = jax.lax.fori_loop(0, chunks, update_chunk, carry)
  return bank_MP, moments | {'log_decay': log_decay_after}, ratio_of_norms(added, before)
