"""Adam for the rows of the bank that an update read, and no others (memory.bank_update='lazy').

Dense Adam reads and writes the bank, two moments and the gradient in every update, read or not. Here an update costs
what its rows cost. Every row that is read gets a slot when it is first read, gradients add up in the slots, and Adam
runs over the slots in use. It pays if an update reads far fewer rows than there are: BENCHMARKS.md, "Cost of the bank".

The rule, for a row read in update t' and next in update t, with the sum g of its clipped gradients in t:
  mean   <- beta1^(t-t') mean + (1 - beta1) g         exactly dense Adam's: in between its gradients were 0
  square <- beta2^(t-t') square + (1 - beta2) g^2     exactly dense Adam's
  row    <- row prod_{t'<j<t} (1 - rate_j decay)      exact but late: until t the row is read without it
  row    <- row - rate_t (drift(t-t'-1) - drift(missed)) adam(t')      corrects the forecast that was made in t'
  row    <- row - rate_t ((1 + drift(t-t'-1)) adam(t) + decay row)     the step, and the next forecast
Here adam(t) = mean / (1 - beta1^t) / (sqrt(square / (1 - beta2^t)) + eps), of the averages after update t. In n updates
without a gradient dense Adam moves a row by its last step times drift(n) = sum_{j=1..n} factor^j, with factor = beta1 /
sqrt(beta2); here that is at most LARGEST_FACTOR, and 0 if beta2 is 0. A row moves by the drift at once, as a forecast:
n is the wait that has just ended, at the first read all updates before. `missed` is the n of the last forecast. Updates
are numbered from 1, skipped ones not counted. docs/memory.md, "Lazy updates of the bank", says what still differs.

With memory.bank_moments='square' or 'row' there is no mean. With 'row' square is one number for the row, and g^2 in it
is the mean over the row. Without decay all is then exactly the dense rule:
  square <- beta2^(t-t') square + (1 - beta2) g^2
  row    <- row prod_{t'<j<t} (1 - rate_j decay)
  row    <- row - rate_t (g / (sqrt(square / (1 - beta2^t)) + eps) + decay row)

Sources of the dense rule: Kingma and Ba 2015, arXiv:1412.6980; Loshchilov and Hutter 2019, arXiv:1711.05101.
Elsewhere: torch.optim.SparseAdam and LazyAdam of TensorFlow Addons leave the moments of untouched rows as they are,
where these decay, and have no weight decay.
"""

import jax
import jax.numpy as jnp
import optax
from jax import Array

from mmjax.config import Config
from mmjax.config.parameters import betas_of, first_rule, moments_of, parameter_table
from mmjax.kernels.norm import ratio_of_norms
from mmjax.model.params import BANK
from mmjax.training.row_gradients import RowSums

LARGEST_FACTOR = 0.999  # of a drift: a row moves on by at most 999 of its last steps

Moments = dict[str, Array]


def init_moments(bank_MP: Array, kept: str = 'full') -> Moments:
  """Returns the state before the first update.

  mean_MP and square_MP, float32, are Adam's. count_M, int32: the update that last touched a row; missed_M, int32:
  updates between the two that last did. log_decay, float32:
  sum of log(1 - rate_j decay) over all updates so far; log_decay_M: what it was when the row was last touched.
  `kept`, memory.bank_moments, 'square': without mean_MP and missed_M; 'row': and with a square_MP of shape (M, 1).
  """
  (M, P), zero = bank_MP.shape, jnp.zeros(())
  moments = {'count_M': jnp.zeros(M, jnp.int32), 'log_decay_M': jnp.zeros(M), 'log_decay': zero}
  moments['square_MP'] = jnp.zeros((M, 1 if kept == 'row' else P))
  if kept == 'full':
    moments |= {'mean_MP': jnp.zeros_like(bank_MP), 'missed_M': jnp.zeros(M, jnp.int32)}
  return moments


def of_rows(moments: Moments) -> Moments:
  """Returns those moments that have a part for each row."""
  return {name: value for name, value in moments.items() if value.ndim}


def _after_reading(old: Array, new: Array) -> Array:
  """Returns `new`: where a number is NaN the new one is, too, and no whole number is -1.

  XLA does not know that, and so has to read before it writes. Otherwise it would copy the whole array in every turn of
  the loop, to be free to write first.
  """
  return jnp.where(jnp.isnan(old) if old.dtype == jnp.float32 else old == -1, old, new)


@jax.named_scope('optimizer')
def update_read_rows(
  config: Config,
  rate: optax.Schedule,
  bank_MP: Array,
  moments: Moments,
  sums: RowSums,
  clip: Array,
  count: Array,
  applied: Array,
) -> tuple[Array, Moments, Array]:
  """Makes one update by the rule above, in place where the compiler may reuse the arrays.

  Args:
    config: betas and decay of the bank, eps.
    rate: the bank's learning rate for the number of updates made before.
    bank_MP: float32.
    moments: from `init_moments`.
    sums: gradients before clipping.
    clip: float32, what clipping multiplies them by.
    count: int32, updates made before.
    applied: False leaves everything as it is.

  Returns:
    The bank, the moments, and the row_update_ratio of mmjax.evaluation.probes.
  """
  train, step_rate, t = config.train, rate(count), count + 1
  beta1, beta2 = betas_of(config, BANK)
  decay = train.weight_decay * first_rule(parameter_table(config), BANK, 'decay').decay
  log_decay_after = moments['log_decay'] + jnp.where(applied, jnp.log1p(-step_rate * decay), 0)

  def adam(mean_UP: Array, square_UP: Array, t: Array) -> Array:
    return mean_UP / (1 - beta1**t) / (jnp.sqrt(square_UP / (1 - beta2**t)) + train.eps)

  def drift(n: Array) -> Array:
    factor = min(beta1 / beta2**0.5, LARGEST_FACTOR) if beta2 else 0.0
    return factor * (1 - factor**n) / (1 - factor)

  def new_square(g_UP: Array, passed_U1: Array, old: Moments) -> Array:
    squared_UP = jnp.mean(g_UP**2, axis=-1, keepdims=True) if kept == 'row' else g_UP**2
    return (1 - beta2) * squared_UP + beta2**passed_U1 * old['square_MP']

  def full_rule(g_UP: Array, passed_U1: Array, old: Moments) -> tuple[Array, Array, Moments]:
    drift_U1 = drift(passed_U1 - 1)
    late_UP = adam(old['mean_MP'], old['square_MP'], jnp.maximum(old['count_M'], 1)[:, None])
    late_UP = (drift_U1 - drift(old['missed_M'][:, None])) * late_UP
    mean_UP = (1 - beta1) * g_UP + beta1**passed_U1 * old['mean_MP']
    square_UP = new_square(g_UP, passed_U1, old)
    new = {'mean_MP': mean_UP, 'square_MP': square_UP, 'missed_M': t - old['count_M'] - 1}
    return late_UP, (1 + drift_U1) * adam(mean_UP, square_UP, t), new

  def square_rule(g_UP: Array, passed_U1: Array, old: Moments) -> tuple[float, Array, Moments]:
    square_UP = new_square(g_UP, passed_U1, old)
    return 0.0, adam(g_UP, square_UP, t), {'square_MP': square_UP}

  def update_chunk(row_U: Array, sum_UP: Array, carry: tuple) -> tuple:
    bank_MP, moments, added, before = carry
    row_UP, old = jax.tree.map(lambda x: x.at[row_U].get(mode='clip'), (bank_MP, of_rows(moments)))
    in_use_U1, old_UP = (row_U < len(bank_MP))[:, None], row_UP
    late_UP, step_UP, new = rule(clip * sum_UP, (t - old['count_M'])[:, None].astype(jnp.float32), old)
    new |= {'count_M': t, 'log_decay_M': log_decay_after}
    row_UP = row_UP * jnp.exp(moments['log_decay'] - old['log_decay_M'])[:, None] - step_rate * late_UP
    row_UP -= step_rate * (step_UP + decay * row_UP)

    def put(x: Array, new: Array) -> Array:
      return x.at[row_U].set(new, mode='drop', unique_indices=True)

    added += jnp.sum(jnp.where(in_use_U1, jnp.square(row_UP - old_UP), 0))
    before += jnp.sum(jnp.where(in_use_U1, jnp.square(old_UP), 0))
    moments |= {name: put(moments[name], _after_reading(old[name], value)) for name, value in new.items()}
    return put(bank_MP, row_UP), moments, added, before

  kept = moments_of(config, BANK)
  rule = full_rule if kept == 'full' else square_rule
  to_update = sums._replace(used=jnp.where(applied, sums.used, 0))
  carry = (bank_MP, moments, jnp.zeros(()), jnp.zeros(()))
  bank_MP, moments, added, before = to_update.over_chunks(update_chunk, carry)
  return bank_MP, moments | {'log_decay': log_decay_after}, ratio_of_norms(added, before)
