"""One optimizer update as a pure function: (state, batch) -> (state, metrics).

Gradients of the micro-batches are accumulated by a scan inside the step. An update whose loss or gradient is not
finite is computed and thrown away: parameters and optimizer state stay as they were, only the counters move.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax import Array

from mmjax.config import Config
from mmjax.kernels.bank import Reads
from mmjax.kernels.cross_entropy import cross_entropy_sums
from mmjax.model.lm import Params, init_params
from mmjax.training.lazy_bank import (
  add_gradients,
  init_moments,
  is_lazy,
  lazy_gradient,
  no_rows,
  update_rows,
  without_bank,
)
from mmjax.training.optimizer import bank_rate, learning_rate_schedule
from mmjax.training.revival import count_sub_keys, init_revival, revive, revives

TrainState = dict[str, Any]
TrainStep = Callable[[TrainState, dict[str, Array]], tuple[TrainState, dict[str, Array]]]

CHUNK_LOGITS = 1 << 23  # float32 logits held at once by the loss: 32 MiB


def init_state(config: Config, optimizer: optax.GradientTransformation, params: Params | None = None) -> TrainState:
  """Returns the state before the first update, of new parameters or of those given; may run under jax.jit.

  `step` counts batches seen, `skipped` non-finite updates in a row, `skipped_total` all of them.
  """
  params = init_params(config) if params is None else params
  zero = jnp.zeros((), jnp.int32)
  state = {
    'params': params,
    'opt_state': optimizer.init(params),
    'step': zero,
    'skipped': zero,
    'skipped_total': zero,
  }
  if is_lazy(config):
    state['bank_moments'] = init_moments(params['memory_bank'])
  if revives(config):
    state['revival'] = init_revival(config, params)
  return state


def chunk_tokens(batch: int, vocab_size: int, length: int) -> int:
  """Returns how many positions the loss takes at a time, so that its logits stay near CHUNK_LOGITS values."""
  return max(1, min(length, CHUNK_LOGITS // (batch * vocab_size)))


def make_loss(config: Config, graphdef: nnx.GraphDef, pad_id: int, attention: str) -> Callable:
  """Returns objective(params, rows, total_weight, key, taps=None) -> (what training minimises, parts).

  `rows` holds `input`, `target` and `segment`, int32 (B, T). The parts are `loss`, the sum of the negative
  log-likelihoods of the targets that are not padding, in nats, over `total_weight`; `accuracy`, their hits over
  `total_weight`; `aux_loss`, of the sublayers; and in memory models `usage_LM`, how often each layer read each row.
  Summed over an update's micro-batches they are those of one big batch. The objective is loss + aux_loss. With `taps`,
  see LM, the parts also hold the rows that were read, `row_LBTR`; where rows are revived, how often each sub-key was
  taken, `count_LKC`.
  """
  dtype = jnp.dtype(config.train.dtype)
  isolate = config.data.isolate_documents

  def objective(
    params: Params,
    rows: dict[str, Array],
    total_weight: Array,
    key: Array | None,
    taps: list[Reads] | None = None,
  ) -> tuple[Array, dict[str, Array]]:
    model = nnx.merge(graphdef, params)
    out = model(
      rows['input'],
      rows['segment'] if isolate else None,
      dtype=dtype,
      attention=attention,
      remat=config.runtime.remat,
      dropout_key=key,
      taps=taps,
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
    if revives(config):
      parts['count_LKC'] = count_sub_keys(out.row_LBTR, weight_BT, config.memory.n_heads, config.model.n_sub_keys)
    if taps is not None:
      parts['row_LBTR'] = out.row_LBTR
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


def make_gradient(config: Config, graphdef: nnx.GraphDef, pad_id: int, attention: str) -> Callable:
  """Returns gradient(params, batch, tokens, step) -> (parts of the loss, gradients), summed over the micro-batches.

  Where the bank is updated lazily, its gradient is `RowSums`.
  """
  objective = make_loss(config, graphdef, pad_id, attention)
  lazy = is_lazy(config)
  grad = lazy_gradient(config, objective) if lazy else jax.value_and_grad(objective, has_aux=True)
  add_up = add_gradients if lazy else partial(jax.tree.map, jnp.add)
  use_dropout = config.model.dropout > 0

  def gradient(params: Params, batch: dict[str, Array], tokens: Array, step: Array) -> tuple[dict[str, Array], Params]:
    key = jax.random.fold_in(jax.random.key(config.seed), step)

    def add(sums: tuple, micro: tuple) -> tuple[tuple, None]:
      index, rows = micro
      (_, parts), grads = grad(params, rows, tokens, jax.random.fold_in(key, index) if use_dropout else None)
      return (jax.tree.map(jnp.add, sums[0], parts), add_up(sums[1], grads)), None

    micros = (jnp.arange(len(batch['input'])), batch)
    first = jax.tree.map(lambda x: x[0], batch)
    (_, parts), grads = jax.eval_shape(grad, params, first, tokens, key)
    parts, grads = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), (parts, grads))
    if lazy:
      grads['memory_bank'] = no_rows(config)
    return jax.lax.scan(add, (parts, grads), micros)[0]

  return gradient


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
  metrics: loss (nats a token), accuracy, aux_loss, grad_norm (before clipping), learning_rate, tokens (targets
  that are not padding), finite, skipped, and usage_LM (int32 rows read, memory models only); with memory.revive_after
  also revived_rows and revived_keys.
  """
  gradient = make_gradient(config, graphdef, pad_id, attention)
  schedule = learning_rate_schedule(config.train, total_steps)
  lazy, rate_of_bank = is_lazy(config), bank_rate(config, total_steps)

  def train_step(state: TrainState, batch: dict[str, Array]) -> tuple[TrainState, dict[str, Array]]:
    params, count = state['params'], state['step'] - state['skipped_total']
    tokens = jnp.sum(batch['target'] != pad_id)
    parts, grads = gradient(params, batch, jnp.maximum(tokens, 1).astype(jnp.float32), state['step'])
    if lazy:
      row_sums = grads['memory_bank']
      grads['memory_bank'] = row_sums.sum_UP
    with jax.named_scope('optimizer'):
      grad_norm = optax.global_norm(grads)
      finite = jnp.isfinite(parts['loss'] + parts['aux_loss']) & jnp.isfinite(grad_norm)
      updates, opt_state = optimizer.update(grads, state['opt_state'], params)
      if lazy:
        params, row_sums = without_bank(params), row_sums._replace(sum_UP=updates.pop('memory_bank'))
      new = {'params': optax.apply_updates(params, updates), 'opt_state': opt_state}
      old = {'params': params, 'opt_state': state['opt_state']}
      kept = jax.tree.map(lambda n, o: jnp.where(finite, n, o), new, old)
      if lazy:
        kept['params']['memory_bank'], kept['bank_moments'] = update_rows(
          config, rate_of_bank, state['params']['memory_bank'], state['bank_moments'], row_sums, count, finite
        )
    skipped = jnp.where(finite, 0, state['skipped'] + 1)
    metrics = parts | {
      'grad_norm': grad_norm,
      'learning_rate': schedule(count),
      'tokens': tokens,
      'finite': finite,
      'skipped': skipped,
    }
    after = kept | {
      'step': state['step'] + 1,
      'skipped': skipped,
      'skipped_total': state['skipped_total'] + (1 - finite.astype(jnp.int32)),
    }
    if revives(config):
      window = {'revival': state['revival']}
      after, revived = revive(config, after | window, parts['usage_LM'], metrics.pop('count_LKC'), finite)
      metrics |= revived
    return after, metrics

  return train_step
