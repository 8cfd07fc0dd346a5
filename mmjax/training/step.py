"""One optimizer update as a pure function: (state, batch) -> (state, metrics).

Gradients of the micro-batches are accumulated by a scan inside the step. An update whose loss or gradient is not
finite, or whose loss spikes above `train.max_loss_factor` times the running average, is computed and thrown away:
parameters, optimizer state and the average stay as they were, only the counters move.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax import Array

from mmjax.config import Config
from mmjax.kernels.cross_entropy import cross_entropy_sums
from mmjax.model.lm import Params, init_params
from mmjax.training.optimizer import learning_rate_schedule

TrainState = dict[str, Any]
TrainStep = Callable[[TrainState, dict[str, Array]], tuple[TrainState, dict[str, Array]]]

CHUNK_LOGITS = 1 << 23  # float32 logits held at once by the loss: 32 MiB
LOSS_AVERAGE_DECAY = 0.98  # of the running average that a spike is measured by: about the last 50 updates


def init_state(config: Config, optimizer: optax.GradientTransformation, params: Params | None = None) -> TrainState:
  """Returns the state before the first update, of new parameters or of those given; may run under jax.jit.

  `step` counts batches seen, `skipped` updates thrown away in a row, `skipped_total` all of them; `loss_average` is
  the running average of the loss over the updates that were applied, 0 before the first.
  """
  params = init_params(config) if params is None else params
  zero = jnp.zeros((), jnp.int32)
  return {
    'params': params,
    'opt_state': optimizer.init(params),
    'step': zero,
    'skipped': zero,
    'skipped_total': zero,
    'loss_average': jnp.zeros((), jnp.float32),
  }


def chunk_tokens(batch: int, vocab_size: int, length: int) -> int:
  """Returns how many positions the loss takes at a time, so that its logits stay near CHUNK_LOGITS values."""
  return max(1, min(length, CHUNK_LOGITS // (batch * vocab_size)))


def make_loss(config: Config, graphdef: nnx.GraphDef, pad_id: int, attention: str) -> Callable:
  """Returns objective(params, rows, total_weight, key) -> (what training minimises, parts).

  `rows` holds `input`, `target` and `segment`, int32 (B, T). The parts are `loss`, the sum of the negative
  log-likelihoods of the targets that are not padding, in nats, over `total_weight`; `accuracy`, their hits over
  `total_weight`; `aux_loss`, of the sublayers; and in memory models `usage_LM`, how often each layer read each row.
  Summed over an update's micro-batches they are those of one big batch. The objective is loss + aux_loss.
  """
  dtype = jnp.dtype(config.train.dtype)
  isolate = config.data.isolate_documents

  def objective(
    params: Params, rows: dict[str, Array], total_weight: Array, key: Array | None
  ) -> tuple[Array, dict[str, Array]]:
    model = nnx.merge(graphdef, params)
    out = model(
      rows['input'],
      rows['segment'] if isolate else None,
      dtype=dtype,
      attention=attention,
      remat=config.runtime.remat,
      scan_layers=config.runtime.scan_layers,
      dropout_key=key,
    )
    weight_BT = (rows['target'] != pad_id).astype(jnp.float32)
    chunk = chunk_tokens(len(rows['target']), config.model.vocab_size, rows['target'].shape[1])
    with jax.named_scope('loss'):
      nll, correct = cross_entropy_sums(out.hidden_BTD, model.embedding[...], rows['target'], weight_BT, chunk)
    parts = {
      'loss': nll / total_weight,
      'accuracy': correct / total_weight,
      'aux_loss': out.aux_loss / config.train.accumulation_steps,
    }
    if out.row_LBTR is not None:
      parts['usage_LM'] = count_rows(out.row_LBTR, weight_BT, config.model.knowledge_num)
    return parts['loss'] + parts['aux_loss'], parts

  return objective


@jax.named_scope('bank_usage')
def count_rows(row_LBTR: Array, weight_BT: Array, knowledge_num: int) -> Array:
  """Returns how often each layer read each row at positions that are not padding: int32 (L, M)."""
  n_layers = row_LBTR.shape[0]
  read_LBTR = jnp.broadcast_to((weight_BT > 0)[None, :, :, None], row_LBTR.shape).astype(jnp.int32)
  layer_L1 = jnp.arange(n_layers)[:, None]
  counts_LM = jnp.zeros((n_layers, knowledge_num), jnp.int32)
  return counts_LM.at[layer_L1, row_LBTR.reshape(n_layers, -1)].add(read_LBTR.reshape(n_layers, -1))


def is_spike(loss: Array, average: Array, factor: float) -> Array | bool:
  """Whether a loss is more than `factor` times the running average; never before there is one, or for factor 0."""
  return (average > 0) & (loss > factor * average) if factor else False


def next_average(average: Array, loss: Array) -> Array:
  """Returns the running average after one more loss; the first is the average itself."""
  return jnp.where(average > 0, LOSS_AVERAGE_DECAY * average + (1 - LOSS_AVERAGE_DECAY) * loss, loss)


def make_train_step(
  config: Config,
  graphdef: nnx.GraphDef,
  optimizer: optax.GradientTransformation,
  *,
  pad_id: int,
  attention: str,
  total_steps: int,
) -> TrainStep:
  """Returns the update, not yet compiled.

  It takes a state and `input`, `target`, `segment`, each int32 (A, B, T), and returns the next state and
  metrics: loss (nats a token), accuracy, aux_loss, grad_norm (before clipping), grad_norm_N (of each parameter, in
  the order of the tree), learning_rate, tokens (targets that are not padding), finite, applied (finite, and no spike),
  loss_average (what a spike is measured by), skipped, and usage_LM (int32 rows read, memory models only).
  """
  grad = jax.value_and_grad(make_loss(config, graphdef, pad_id, attention), has_aux=True)
  schedule = learning_rate_schedule(config.train, total_steps)
  use_dropout = config.model.dropout > 0

  def accumulate(params: Params, batch: dict[str, Array], tokens: Array, step: Array) -> tuple:
    key = jax.random.fold_in(jax.random.key(config.seed), step)

    def add(sums: tuple, micro: tuple) -> tuple[tuple, None]:
      index, rows = micro
      (_, parts), grads = grad(params, rows, tokens, jax.random.fold_in(key, index) if use_dropout else None)
      return jax.tree.map(jnp.add, sums, (parts, grads)), None

    first = jax.tree.map(lambda x: x[0], batch)
    if len(batch['input']) == 1:  # no sums, which would be written and read once more
      (_, parts), grads = grad(params, first, tokens, jax.random.fold_in(key, 0) if use_dropout else None)
      return parts, grads
    micros = (jnp.arange(len(batch['input'])), batch)
    (_, parts), grads = jax.eval_shape(grad, params, first, tokens, key)
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), (parts, grads))
    return jax.lax.scan(add, zeros, micros)[0]

  def train_step(state: TrainState, batch: dict[str, Array]) -> tuple[TrainState, dict[str, Array]]:
    params = state['params']
    tokens = jnp.sum(batch['target'] != pad_id)
    parts, grads = accumulate(params, batch, jnp.maximum(tokens, 1).astype(jnp.float32), state['step'])
    with jax.named_scope('optimizer'):
      grad_norm = optax.global_norm(grads)
      finite = jnp.isfinite(parts['loss'] + parts['aux_loss']) & jnp.isfinite(grad_norm)
      spikes = is_spike(parts['loss'], state['loss_average'], config.train.max_loss_factor)
      applied = finite & jnp.logical_not(spikes)
      updates, opt_state = optimizer.update(grads, state['opt_state'], params)
      new = {'params': optax.apply_updates(params, updates), 'opt_state': opt_state}
      old = {'params': params, 'opt_state': state['opt_state']}
      kept = jax.tree.map(lambda n, o: jnp.where(applied, n, o), new, old)
    skipped = jnp.where(applied, 0, state['skipped'] + 1)
    metrics = parts | {
      'grad_norm': grad_norm,
      'grad_norm_N': jnp.stack([optax.global_norm(g) for g in jax.tree.leaves(grads)]),
      'learning_rate': schedule(state['step'] - state['skipped_total']),
      'tokens': tokens,
      'finite': finite,
      'applied': applied,
      'loss_average': state['loss_average'],
      'skipped': skipped,
    }
    return kept | {
      'step': state['step'] + 1,
      'skipped': skipped,
      'skipped_total': state['skipped_total'] + (1 - applied.astype(jnp.int32)),
      'loss_average': jnp.where(applied, next_average(state['loss_average'], parts['loss']), state['loss_average']),
    }, metrics

  return train_step
