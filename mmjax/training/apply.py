"""What a gradient does to parameters, optimizer state and moments, once it is known whether it is applied."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from jax import Array

from mmjax.config import Config
from mmjax.evaluation.probes import row_update_ratio
from mmjax.model.params import BANK, Params, without_bank
from mmjax.training.lazy_bank import update_read_rows
from mmjax.training.optimizer import bank_rate
from mmjax.training.row_gradients import RowSums, is_lazy
from mmjax.training.state import TrainState

Apply = Callable[[TrainState, Params, RowSums | None, Array, Array | None, Array], tuple[TrainState, dict[str, Array]]]


def make_apply(config: Config, optimizer: optax.GradientTransformation, total_steps: int) -> Apply:
  """Returns apply(state, grads, sums, norm, usage_LM, applied) -> (state, metrics).

  The new state has no counters. Where `applied` is False, it is the old one. The metric is row_update_ratio, of models
  with a memory. `norm` is that of all gradients. Of a bank that is updated lazily, `sums` are the gradients and `grads`
  has their norm.
  """
  lazy, rate = is_lazy(config), bank_rate(config, total_steps)

  def apply(
    state: TrainState, grads: Params, sums: RowSums | None, norm: Array, usage_LM: Array | None, applied: Array
  ) -> tuple[TrainState, dict[str, Array]]:
    params, bank, metrics = state['params'], state['params'].get(BANK), {}
    updates, opt_state = optimizer.update(grads, state['opt_state'], params)
    if lazy:
      updates, params, count = without_bank(updates), without_bank(params), state['step'] - state['skipped_total']
      clip = jnp.minimum(1, config.train.grad_clip / norm) if config.train.grad_clip else 1.0
      bank, moments, ratio = update_read_rows(config, rate, bank, state['bank_moments'], sums, clip, count, applied)
      metrics['row_update_ratio'] = ratio
    elif usage_LM is not None:
      metrics['row_update_ratio'] = row_update_ratio(bank, updates[BANK], usage_LM)
    moved = optax.apply_updates({name: params[name] for name in updates}, updates)
    new = {'params': params | moved, 'opt_state': opt_state}
    old = {'params': params, 'opt_state': state['opt_state']}
    after = jax.tree.map(lambda n, o: jnp.where(applied, n, o), new, old)
    if lazy:
      after['params'][BANK], after['bank_moments'] = bank, moments
    return after, metrics

  return apply
