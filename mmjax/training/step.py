"""One optimizer update as a pure function: (state, batch) -> (state, metrics).

The loop calls what `make_train_step` returns; its gradient is that of mmjax/evaluation/loss.py, which runs the model of
mmjax/model/lm.py: next on the way.

Gradients of the micro-batches are accumulated by a scan inside the step. Which updates are thrown away: skips.py.
"""

from collections.abc import Callable
from functools import partial

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
from mmjax.model.lm import BANK, Params, init_params, without_bank
from mmjax.run.sharding import ROW_AXIS, spread
from mmjax.training.lazy_bank import init_moments, update_read_rows
from mmjax.training.optimizer import bank_rate, learning_rate_schedule, may_overflow
from mmjax.training.row_gradients import RowSums, add_gradients, empty_sum, gradient_by_reads, is_lazy, keeps_reads
from mmjax.training.skips import TrainState, TrainStep, count_update, goes_on, skip_unsound
from mmjax.training.teach import RowCounts, count_reads, first_reads, gradient_of_rows, rows_to_teach


def init_state(
  config: Config, optimizer: optax.GradientTransformation, params: Params | None = None, reads: RowCounts | None = None
) -> TrainState:
  """Returns the state before the first update, of new parameters or of those given; may run under jax.jit.

  `step` counts batches seen, `skipped` updates thrown away in a row, `skipped_total` all of them; `loss_average` is
  the running average of the loss over the updates that were applied, 0 before the first. A memory model also has
  `reads`, see teach.py, which goes on from those given; they are the background if rows are taught.
  """
  params = init_params(config) if params is None else params
  counts = {name: jnp.zeros((), jnp.int32) for name in ('step', 'skipped', 'skipped_total')}
  state = {'params': params, 'opt_state': optimizer.init(params), **counts, 'loss_average': jnp.float32(0)}
  if BANK in params:
    state['reads'] = first_reads(config, reads)
  return state | ({'bank_moments': init_moments(params[BANK])} if is_lazy(config) else {})


def make_gradient(
  config: Config,
  graphdef: nnx.GraphDef,
  attention: str,
  mesh: Mesh | None = None,
  on_micro_batch: Callable | None = None,
) -> Callable:
  """Returns gradient(params, batch, total_weight, step) -> (parts of the loss, gradients), sums over micro-batches.

  On a mesh of several devices each sums up its own rows of all micro-batches, and what they found is added up once.
  Where the bank is updated lazily, its gradient is `RowSums`, and XLA divides the work. On one device,
  `on_micro_batch` is called on the host with the number of each micro-batch, from 0, and its part of the loss, as soon
  as that is known.
  """
  mesh = None if is_lazy(config) or mesh is None or mesh.size == 1 else mesh
  objective = make_loss(config, graphdef, attention, mesh=mesh)
  whole = mesh is None or mesh.shape[ROW_AXIS] == 1
  drops = config.model.dropout or config.memory.row_dropout

  def gradient(
    params: Params, batch: dict[str, Array], total_weight: Array, step: Array
  ) -> tuple[dict[str, Array], Params]:
    grad, add_up = jax.value_and_grad(objective, has_aux=True), partial(jax.tree.map, jnp.add)
    keeps = keeps_reads(config, whole=whole)
    if keeps:  # an array like the bank would cost more than what was read of it
      grad, add_up = gradient_by_reads(config, objective), add_gradients
    key = jax.random.fold_in(jax.random.key(config.seed), step)
    if mesh and drops:
      key = jax.random.fold_in(key, jax.lax.axis_index(mesh.axis_names))

    def of_micro_batch(index: Array | int, rows: dict[str, Array]) -> tuple[dict[str, Array], Params]:
      own_key = jax.random.fold_in(key, index) if drops else None
      (_, parts), grads = grad(params, rows, total_weight, own_key)
      if on_micro_batch is not None:
        jax.debug.callback(on_micro_batch, index, parts['loss'])
      return parts, grads

    def add(so_far: tuple, micro_batch: tuple) -> tuple[tuple, None]:
      parts, grads = of_micro_batch(*micro_batch)
      return (jax.tree.map(jnp.add, so_far[0], parts), add_up(so_far[1], grads)), None

    first = jax.tree.map(lambda x: x[0], batch)
    if len(batch['input']) == 1 and not keeps:  # no sums, which would be written and read once more
      return of_micro_batch(0, first)
    shapes = jax.eval_shape(of_micro_batch, 0, first)
    parts, grads = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    if keeps:
      grads[BANK] = empty_sum(config, params[BANK])
    return jax.lax.scan(add, (parts, grads), (jnp.arange(len(batch['input'])), batch))[0]

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
  metrics: loss (nats a token), accuracy, aux_loss, grad_norm (before clipping), grad_norm_X (of each parameter, in
  the order of the tree), learning_rate, tokens (targets that are not PADDING), finite, applied (finite, and no spike),
  loss_average (what a spike is measured by), skipped; of memory models also usage_LM (int32, how often each
  reader read each row), gate_norms and row_update_ratio (see `probes`).
  """
  gradient = make_gradient(config, graphdef, attention, mesh, on_micro_batch)
  schedule = learning_rate_schedule(config.train, total_steps)
  apply = make_apply(config, optimizer, total_steps)

  def train_step(state: TrainState, batch: dict[str, Array]) -> tuple[TrainState, dict[str, Array]]:
    tokens, row_sums = jnp.sum(batch['target'] != PADDING), None
    total_weight = jnp.maximum(tokens, 1).astype(jnp.float32)
    parts, grads = gradient(state['params'], batch, total_weight, state['step'])
    if is_lazy(config):
      row_sums, grads[BANK] = grads[BANK], grads[BANK].sum_UP
    if config.memory.teach_rows:
      grads = gradient_of_rows(grads, rows_to_teach(state['reads'], parts['usage_LM'], config.memory.teach_rows))
    with jax.named_scope('optimizer'):
      grad_norm = optax.global_norm(grads)
      finite = jnp.isfinite(parts['loss'] + parts['aux_loss']) & jnp.isfinite(grad_norm)
      applied = finite & goes_on(config.train, state, parts['loss'])
      after, ratio = apply(state, grads, row_sums, parts.get('usage_LM'), applied)
    after |= count_update(state, parts['loss'], applied)
    if 'usage_LM' in parts:
      after['reads'] = count_reads(state['reads'], parts['usage_LM'])
    metrics = {
      'grad_norm': grad_norm,
      'grad_norm_X': jnp.stack([optax.global_norm(grad) for grad in jax.tree.leaves(grads)]),
      'gate_norms': gate_norms(grads),
      'learning_rate': schedule(state['step'] - state['skipped_total']),
      'tokens': tokens,
      'finite': finite,
      'applied': applied,
      'loss_average': state['loss_average'],
      'skipped': after['skipped'],
    }
    return after, parts | metrics | ratio

  return skip_unsound(train_step) if may_overflow(config) else train_step


def make_apply(config: Config, optimizer: optax.GradientTransformation, total_steps: int) -> Callable:
  """Returns apply(state, grads, sums, usage_LM, applied) -> (state, metrics).

  The new state has no counters. Where `applied` is False, it is the old one. The metric is row_update_ratio, of models
  with a memory. `sums` are those of a bank that is updated lazily, with its gradient in `grads`.
  """
  lazy, rate = is_lazy(config), bank_rate(config, total_steps)

  def apply(state: TrainState, grads: Params, sums: RowSums | None, usage_LM: Array | None, applied: Array) -> tuple:
    params, bank, metrics = state['params'], state['params'].get(BANK), {}
    updates, opt_state = optimizer.update(grads, state['opt_state'], params)
    if lazy:
      sums = sums._replace(sum_UP=updates.pop(BANK))
      params, count = without_bank(params), state['step'] - state['skipped_total']
      bank, moments, ratio = update_read_rows(config, rate, bank, state['bank_moments'], sums, count, applied)
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
