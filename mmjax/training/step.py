"""One optimizer update as a pure function: (state, batch) -> (state, metrics).

Gradients of the micro-batches are accumulated by a scan inside the step. An update whose loss or gradient is not
finite, or whose loss spikes above `train.max_loss_factor` times the running average, is computed and thrown away:
parameters, optimizer state and the average stay as they were, only the counters move. So is an update whose result
would not be finite, where the settings let a finite gradient make one (`may_overflow`): elsewhere to look at all that
is written would cost a third of the optimizer's time and find nothing.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax import Array
from jax.sharding import Mesh

from mmjax.config import Config
from mmjax.data.loader import PADDING
from mmjax.evaluation.loss import make_loss
from mmjax.evaluation.probes import gate_norms, row_update_ratio
from mmjax.kernels.forms import on_cpu
from mmjax.model.lm import BANK, Params, init_params, without_bank
from mmjax.model.sublayers import SUBLAYERS, layer_kinds
from mmjax.run.sharding import ROWS, spread
from mmjax.training.lazy_bank import add_gradients, gradient_by_reads, init_moments, is_lazy, no_rows, update_rows
from mmjax.training.optimizer import bank_rate, learning_rate_schedule, may_overflow

TrainState = dict[str, Any]
TrainStep = Callable[[TrainState, dict[str, Array]], tuple[TrainState, dict[str, Array]]]

LOSS_AVERAGE_DECAY = 0.98  # of the running average that a spike is measured by: about the last 50 updates


def init_state(config: Config, optimizer: optax.GradientTransformation, params: Params | None = None) -> TrainState:
  """Returns the state before the first update, of new parameters or of those given; may run under jax.jit.

  `step` counts batches seen, `skipped` updates thrown away in a row, `skipped_total` all of them; `loss_average` is
  the running average of the loss over the updates that were applied, 0 before the first.
  """
  params = init_params(config) if params is None else params
  zero = jnp.zeros((), jnp.int32)
  state = {
    'params': params,
    'opt_state': optimizer.init(params),
    'step': zero,
    'skipped': zero,
    'skipped_total': zero,
    'loss_average': jnp.zeros((), jnp.float32),
  }
  if is_lazy(config):
    state['bank_moments'] = init_moments(params[BANK])
  return state


def is_spike(loss: Array, average: Array, factor: float) -> Array | bool:
  """Whether a loss is more than `factor` times the running average; never before there is one, or for factor 0."""
  return (average > 0) & (loss > factor * average) if factor else False


def next_average(average: Array, loss: Array) -> Array:
  """Returns the running average after one more loss; the first is the average itself."""
  return jnp.where(average > 0, LOSS_AVERAGE_DECAY * average + (1 - LOSS_AVERAGE_DECAY) * loss, loss)


def adds_reads_in_place(config: Config, mesh: Mesh | None) -> bool:
  """Whether a GPU adds the gradients of all layers to one array: each would else fill and add up one of its own.

  A CPU does not: its sums would have another order than those of every run before. Nor do sums of several rows, whose
  reads would be kept with their weights and added one by one.
  """
  kinds = [SUBLAYERS[kind] for kind in layer_kinds(config.model, config.memory)]
  whole = mesh is None or mesh.shape[ROWS] == 1
  alone = config.model.num_selected == 1 or not any(kind.sums_rows for kind in kinds)
  return whole and alone and any(kind.uses_bank for kind in kinds) and not on_cpu()


def make_gradient(
  config: Config,
  graphdef: nnx.GraphDef,
  attention: str,
  mesh: Mesh | None = None,
  on_micro_batch: Callable | None = None,
) -> Callable:
  """Returns gradient(params, batch, tokens, step) -> (parts of the loss, gradients), summed over the micro-batches.

  On a mesh of several devices each sums up its own rows of all micro-batches, and what they found is added up once.
  Where the bank is updated lazily, its gradient is `RowSums`, and XLA divides the work. `on_micro_batch` is called on
  the host with the number of each micro-batch, from 0, and its part of the loss, as soon as that is known; of one
  device.
  """
  lazy = is_lazy(config)
  mesh = None if lazy or mesh is None or mesh.size == 1 else mesh
  objective = make_loss(config, graphdef, attention, mesh=mesh)
  use_dropout = config.model.dropout > 0

  def tell(index: Array | int, parts: dict[str, Array]) -> None:
    if on_micro_batch is not None:
      jax.debug.callback(on_micro_batch, index, parts['loss'])

  def gradient(params: Params, batch: dict[str, Array], tokens: Array, step: Array) -> tuple[dict[str, Array], Params]:
    by_reads = lazy or adds_reads_in_place(config, mesh)  # asked while a program is traced
    grad = gradient_by_reads(config, objective) if by_reads else jax.value_and_grad(objective, has_aux=True)
    add_up = add_gradients if by_reads else partial(jax.tree.map, jnp.add)
    key = jax.random.fold_in(jax.random.key(config.seed), step)
    if mesh and use_dropout:
      key = jax.random.fold_in(key, jax.lax.axis_index(mesh.axis_names))

    def add(sums: tuple, micro: tuple) -> tuple[tuple, None]:
      index, rows = micro
      (_, parts), grads = grad(params, rows, tokens, jax.random.fold_in(key, index) if use_dropout else None)
      tell(index, parts)
      return (jax.tree.map(jnp.add, sums[0], parts), add_up(sums[1], grads)), None

    first = jax.tree.map(lambda x: x[0], batch)
    if len(batch['input']) == 1 and not by_reads:  # no sums, which would be written and read once more
      (_, parts), grads = grad(params, first, tokens, jax.random.fold_in(key, 0) if use_dropout else None)
      tell(0, parts)
      return parts, grads
    micros = (jnp.arange(len(batch['input'])), batch)
    (_, parts), grads = jax.eval_shape(grad, params, first, tokens, key)
    parts, grads = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), (parts, grads))
    if by_reads:
      grads[BANK] = no_rows(config) if lazy else jnp.zeros_like(params[BANK])
    return jax.lax.scan(add, (parts, grads), micros)[0]

  return spread(gradient, mesh) if mesh else gradient


def make_train_step(
  config: Config,
  graphdef: nnx.GraphDef,
  optimizer: optax.GradientTransformation,
  *,
  attention: str,
  total_steps: int,
  mesh: Mesh | None = None,
  on_micro_batch: Callable | None = None,
) -> TrainStep:
  """Returns the update, not yet compiled, for a mesh or one device.

  It takes a state and `input`, `target`, `segment`, each int32 (A, B, T), and returns the next state and
  metrics: loss (nats a token), accuracy, aux_loss, grad_norm (before clipping), grad_norm_N (of each parameter, in
  the order of the tree), learning_rate, tokens (targets that are not PADDING), finite, applied (finite, and no spike),
  loss_average (what a spike is measured by), skipped; of memory models also usage_LM (int32 rows read) and norms (see
  `probes`).
  """
  gradient = make_gradient(config, graphdef, attention, mesh, on_micro_batch)
  schedule = learning_rate_schedule(config.train, total_steps)
  lazy, rate_of_bank = is_lazy(config), bank_rate(config, total_steps)

  def train_step(state: TrainState, batch: dict[str, Array]) -> tuple[TrainState, dict[str, Array]]:
    params, count = state['params'], state['step'] - state['skipped_total']
    tokens = jnp.sum(batch['target'] != PADDING)
    parts, grads = gradient(params, batch, jnp.maximum(tokens, 1).astype(jnp.float32), state['step'])
    if lazy:
      row_sums = grads[BANK]
      grads[BANK] = row_sums.sum_UP
    with jax.named_scope('optimizer'):
      grad_norm = optax.global_norm(grads)
      finite = jnp.isfinite(parts['loss'] + parts['aux_loss']) & jnp.isfinite(grad_norm)
      spikes = is_spike(parts['loss'], state['loss_average'], config.train.max_loss_factor)
      # The update after the last one that may be skipped is not made: the loop looks back one step, and its dump shall
      # hold the parameters of the step that diverged.
      applied = finite & jnp.logical_not(spikes) & (state['skipped'] != config.train.max_skipped_updates)
      updates, opt_state = optimizer.update(grads, state['opt_state'], params)
      if lazy:
        params, row_sums = without_bank(params), row_sums._replace(sum_UP=updates.pop(BANK))
      new = {'params': optax.apply_updates(params, updates), 'opt_state': opt_state}
      old = {'params': params, 'opt_state': state['opt_state']}
      kept = jax.tree.map(lambda n, o: jnp.where(applied, n, o), new, old)
      norms = {'gate_norms': gate_norms(grads)}
      if lazy:
        kept['params'][BANK], kept['bank_moments'], norms['row_update_ratio'] = update_rows(
          config, rate_of_bank, state['params'][BANK], state['bank_moments'], row_sums, count, applied
        )
      elif 'usage_LM' in parts:
        banks = params[BANK], updates[BANK]
        norms['row_update_ratio'] = row_update_ratio(*banks, parts['usage_LM'])
    skipped = jnp.where(applied, 0, state['skipped'] + 1)
    metrics = (
      parts
      | norms
      | {
        'grad_norm': grad_norm,
        'grad_norm_N': jnp.stack([optax.global_norm(grad) for grad in jax.tree.leaves(grads)]),
        'learning_rate': schedule(count),
        'tokens': tokens,
        'finite': finite,
        'applied': applied,
        'loss_average': state['loss_average'],
        'skipped': skipped,
      }
    )
    after = kept | {
      'step': state['step'] + 1,
      'skipped': skipped,
      'skipped_total': state['skipped_total'] + (1 - applied.astype(jnp.int32)),
      'loss_average': jnp.where(applied, next_average(state['loss_average'], parts['loss']), state['loss_average']),
    }
    return after, metrics

  return skip_unsound(train_step) if may_overflow(config) else train_step


def skip_unsound(train_step: TrainStep) -> TrainStep:
  """Returns the step with an update skipped whose parameters, optimizer state or moments would not be finite."""

  def step(state: TrainState, batch: dict[str, Array]) -> tuple[TrainState, dict[str, Array]]:
    after, metrics = train_step(state, batch)
    sound = jnp.all(jnp.stack([jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(after)]))
    skipped = state | {name: state[name] + 1 for name in ('step', 'skipped', 'skipped_total')}
    metrics |= {name: metrics[name] & sound for name in ('finite', 'applied')}
    metrics['skipped'] = jnp.where(sound, metrics['skipped'], skipped['skipped'])
    return jax.tree.map(lambda new, old: jnp.where(sound, new, old), after, skipped), metrics

  return step
