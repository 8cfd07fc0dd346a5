"""One optimizer update as a pure function: (state, batch) -> (state, metrics).

Its gradient is that of mmjax/evaluation/loss.py, which is next on the way, summed over micro-batches by a scan inside
the step. `accumulation` of row_gradients.py takes it, with `jax.value_and_grad`; apply.py applies it, and skips.py says
which are thrown away. The state is described in state.py.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax import Array
from jax.sharding import Mesh

from mmjax.config import Config
from mmjax.data.loader import PADDING
from mmjax.evaluation.loss import make_loss
from mmjax.evaluation.probes import gate_norms
from mmjax.model.params import Params
from mmjax.run.sharding import ROW_AXIS, spread
from mmjax.training.apply import make_apply
from mmjax.training.optimizer import learning_rate_schedule, may_overflow
from mmjax.training.row_gradients import accumulation, is_lazy, split_row_sums
from mmjax.training.skips import count_update, goes_on, skip_unsound
from mmjax.training.state import TrainState, TrainStep
from mmjax.training.teach import count_reads, gradient_of_rows, rows_to_teach


def make_gradient(
  config: Config,
  graphdef: nnx.GraphDef,
  attention: str,
  mesh: Mesh | None = None,
  on_micro_batch: Callable | None = None,
) -> Callable[[Params, dict[str, Array], Array, Array], tuple[dict[str, Array], Params]]:
  """Returns gradient(params, batch, total_weight, step) -> (parts of the loss, gradients), sums over micro-batches.

  `batch` holds `input`, `target` and `segment`, int32 (A, B, T), A micro-batches. On a mesh of several devices each
  sums up its own rows of all micro-batches, and what they found is added up once. Where the bank is updated lazily, its
  gradient is `RowSums`, and XLA divides the work. On one device, `on_micro_batch` is called on the host with the number
  of each micro-batch, from 0, and its part of the loss, as soon as that is known.
  """
  mesh = None if is_lazy(config) or mesh is None or mesh.size == 1 else mesh
  objective = make_loss(config, graphdef, attention, mesh=mesh)
  whole = mesh is None or mesh.shape[ROW_AXIS] == 1
  drops = config.model.dropout or config.memory.row_dropout

  def gradient(
    params: Params, batch: dict[str, Array], total_weight: Array, step: Array
  ) -> tuple[dict[str, Array], Params]:
    how = accumulation(config, objective, whole=whole)
    key = jax.random.fold_in(jax.random.key(config.seed), step)
    if mesh and drops:
      key = jax.random.fold_in(key, jax.lax.axis_index(mesh.axis_names))

    def of_micro_batch(index: Array | int, rows: dict[str, Array]) -> tuple[dict[str, Array], Params]:
      own_key = jax.random.fold_in(key, index) if drops else None
      (_, parts), grads = how.gradient(params, rows, total_weight, own_key)
      if on_micro_batch is not None:
        jax.debug.callback(on_micro_batch, index, parts['loss'])
      return parts, grads

    def add(so_far: tuple, micro_batch: tuple) -> tuple[tuple, None]:
      parts, grads = of_micro_batch(*micro_batch)
      return (jax.tree.map(jnp.add, so_far[0], parts), how.add(so_far[1], grads)), None

    first = jax.tree.map(lambda x: x[0], batch)
    if len(batch['input']) == 1 and how.one_is_sum:  # no sums, which would be written and read once more
      return of_micro_batch(0, first)
    parts, grads = jax.eval_shape(of_micro_batch, 0, first)
    start = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), parts), how.start(params, grads)
    return jax.lax.scan(add, start, (jnp.arange(len(batch['input'])), batch))[0]

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

  It takes a state and a batch, see `make_gradient`, and returns the next state and metrics: loss (nats a token),
  accuracy, aux_loss, grad_norm (before clipping), grad_norm_X (X: parameters, in the tree's order), learning_rate,
  tokens (targets that are not PADDING), finite, applied (finite, and no spike), loss_average (what a spike is measured
  by), skipped; of memory models also usage_LM (int32, how often each reader read each row), gate_norms and
  row_update_ratio (see `probes`).
  """
  gradient = make_gradient(config, graphdef, attention, mesh, on_micro_batch)
  schedule = learning_rate_schedule(config.train, total_steps)
  apply = make_apply(config, optimizer, total_steps)

  def train_step(state: TrainState, batch: dict[str, Array]) -> tuple[TrainState, dict[str, Array]]:
    tokens = jnp.sum(batch['target'] != PADDING)
    total_weight = jnp.maximum(tokens, 1).astype(jnp.float32)
    parts, grads = gradient(state['params'], batch, total_weight, state['step'])
    grads, row_sums = split_row_sums(grads)
    if config.memory.teach_rows:
      grads = gradient_of_rows(grads, rows_to_teach(state['reads'], parts['usage_LM'], config.memory.teach_rows))
    with jax.named_scope('optimizer'):
      grad_norm = optax.global_norm(grads)
      finite = jnp.isfinite(parts['loss'] + parts['aux_loss']) & jnp.isfinite(grad_norm)
      applied = finite & goes_on(config.train, state, parts['loss'])
      after, ratio = apply(state, grads, row_sums, grad_norm, parts.get('usage_LM'), applied)
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
