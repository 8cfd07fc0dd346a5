"""One optimizer update as a pure function: (state, batch) -> (state, metrics).

Gradients of the micro-batches are accumulated by a scan inside the step. An update whose loss or gradient is not
finite is computed and thrown away: parameters and optimizer state stay as they were, only the counters move.
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
from mmjax.training.probes import step_norms

TrainState = dict[str, Any]
TrainStep = Callable[[TrainState, dict[str, Array]], tuple[TrainState, dict[str, Array]]]

CHUNK_LOGITS = 1 << 23  # float32 logits held at once by the loss: 32 MiB


def init_state(config: Config, optimizer: optax.GradientTransformation, params: Params | None = None) -> TrainState:
  """Returns the state before the first update, of new parameters or of those given; may run under jax.jit.

  `step` counts batches seen, `skipped` non-finite updates in a row, `skipped_total` all of them.
  """
  params = init_params(config) if params is None else params
  zero = jnp.zeros((), jnp.int32)
  return {
    'params': params,
    'opt_state': optimizer.init(params),
    'step': zero,
    'skipped': zero,
    'skipped_total': zero,
  }


def chunk_tokens(batch: int, vocab_size: int, length: int) -> int:
  """Returns how many positions the loss takes at a time, so that its logits stay near CHUNK_LOGITS values."""
  return max(1, min(length, CHUNK_LOGITS // (batch * vocab_size)))


def make_loss(
  config: Config, graphdef: nnx.GraphDef, pad_id: int, attention: str, probe: Callable | None = None
) -> Callable:
  """Returns objective(params, rows, total_weight, key) -> (what training minimises, parts).

  `rows` holds `input`, `target` and `segment`, int32 (B, T). The parts are `loss`, the sum of the negative
  log-likelihoods of the targets that are not padding, in nats, over `total_weight`; `accuracy`, their hits over
  `total_weight`; `aux_loss`, of the sublayers; and in memory models `usage_LM`, how often each layer read each row, and
  what `probe(output, weight_BT)` gives.
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
      parts |= probe(out, weight_BT) if probe else {}
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
  that are not padding), finite, skipped, and for memory models usage_LM (int32 rows read) and `probes.step_norms`.
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

    micros = (jnp.arange(len(batch['input'])), batch)
    first = jax.tree.map(lambda x: x[0], batch)
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
      updates, opt_state = optimizer.update(grads, state['opt_state'], params)
      new = {'params': optax.apply_updates(params, updates), 'opt_state': opt_state}
      old = {'params': params, 'opt_state': state['opt_state']}
      kept = jax.tree.map(lambda n, o: jnp.where(finite, n, o), new, old)
    norms = step_norms(params, grads, updates, parts['usage_LM']) if 'usage_LM' in parts else {}
    skipped = jnp.where(finite, 0, state['skipped'] + 1)
    metrics = (
      parts
      | norms
      | {
        'grad_norm': grad_norm,
        'learning_rate': schedule(state['step'] - state['skipped_total']),
        'tokens': tokens,
        'finite': finite,
        'skipped': skipped,
      }
    )
    return kept | {
      'step': state['step'] + 1,
      'skipped': skipped,
      'skipped_total': state['skipped_total'] + (1 - finite.astype(jnp.int32)),
    }, metrics

  return train_step
