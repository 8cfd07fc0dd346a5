"""Revival: rows of the bank that nobody reads, and sub-keys that no query picks, start again (memory.revive_after).

Updates come in windows of `revive_after`. At the end of one, a row that no token of it read starts again from one that
was read, drawn evenly, plus noise; a sub-key that is part of no row that its head took starts again from one that is,
the most used first and each once, plus noise. The noise is normal, memory.revive_noise times the root mean square of
its source. Adam's moments of what starts again are 0. What is in use stays as it is, bit for bit.

What it can do, and what not. A row is read if both of its sub-keys match a query well, whatever its values are:
reviving a row brings no query to it. It makes sure that a query which comes finds a vector such as those that the model
has learned to use, in place of initial noise. What brings queries is a sub-key: one that starts beside a sub-key in use
gets nearly the same scores, so that a line of sqrt(M) rows comes into reach, and where the gate learns the two copies
part. Hence memory.revive_keys. Nothing helps rows whose two sub-keys are both in use, but never by one query. And it is
a shock: tokens that took the source now take the copy too, in place of their last rows. So let a window be hundreds of
updates long. Nothing starts again where less than one window of the run is left to mend it.

Padding does not count as reading. A window that ends in a skipped update grows by the next one. What starts again
depends on the state, the seed and the step alone, so that a resumed run revives what an undisturbed one does.
"""

import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from mmjax.config import Config
from mmjax.model.lm import memory_layers
from mmjax.model.sublayers import SUBLAYERS
from mmjax.training.optimizer import path_name

CHUNK_ROWS = 4096  # rows started at a time; the loop runs over dead rows only, and over none but at a window's end
STREAM = 1 << 30  # folded into the step's key, where dropout folds in numbers of micro-batches


def revives(config: Config) -> bool:
  """Tells whether the config has a bank whose rows are revived."""
  return config.memory.revive_after > 0 and SUBLAYERS[config.model.sublayer].uses_bank


def init_revival(config: Config) -> dict[str, Array]:
  """Returns what is known of a window that begins: rows read so far, and each sub-key's share of its set's picks."""
  sets = (len(memory_layers(config)), 2 * config.memory.n_heads, config.model.n_sub_keys)
  return {'read_M': jnp.zeros(config.model.knowledge_num, bool), 'share_LKC': jnp.zeros(sets)}


@jax.named_scope('bank_usage')
def count_sub_keys(row_LBTR: Array, weight_BT: Array, heads: int, n_sub_keys: int) -> Array:
  """Returns in how many of the rows taken each sub-key was, at positions that are not padding: int32 (L, 2 h, C)."""
  row_LBThr = row_LBTR.reshape(*row_LBTR.shape[:-1], heads, -1)
  sub_key_LBTh2r = jnp.stack(jnp.divmod(row_LBThr, n_sub_keys), axis=4)
  layer, head, half = (jnp.arange(n).reshape(-1, *(1,) * d) for n, d in ((len(row_LBTR), 5), (heads, 2), (2, 1)))
  taken = (weight_BT > 0).astype(jnp.int32)[:, :, None, None, None]
  counts_LKC = jnp.zeros((len(row_LBTR), 2 * heads, n_sub_keys), jnp.int32)
  return counts_LKC.at[layer, 2 * head + half, sub_key_LBTh2r].add(taken)


@jax.named_scope('optimizer')
def revive(
  config: Config, state: dict[str, Any], usage_LM: Array, count_LKC: Array, applied: Array, total_steps: int
) -> tuple[dict[str, Any], dict[str, Array]]:
  """Notes what an update read, and at the end of a window starts again what nobody read.

  Args:
    config: says how long windows are, the noise, and whether sub-keys start again.
    state: the train state after the update, its step counted; a `revival` of before.
    usage_LM: int32, reads of each row.
    count_LKC: from `count_sub_keys`.
    applied: False for a skipped update, whose reads do not count.
    total_steps: of the run.

  Returns:
    The state, and how many started again: `revived_rows` and `revived_keys`, int32.
  """
  seen, memory = state['revival'], config.memory
  read_M = seen['read_M'] | (applied & jnp.any(usage_LM > 0, axis=0))
  # Shares, because counts of a long window outgrow int32.
  taken_LK1 = jnp.maximum(jnp.sum(count_LKC, axis=-1, keepdims=True), 1)
  share_LKC = seen['share_LKC'] + jnp.where(applied, count_LKC / taken_LK1, 0)
  window_left = state['step'] <= total_steps - memory.revive_after
  due = applied & (state['step'] % memory.revive_after == 0) & window_left
  key = jax.random.fold_in(jax.random.fold_in(jax.random.key(config.seed), state['step']), STREAM)
  row_key, sub_key_key = jax.random.split(key)

  state, revived_rows = _revive_rows(state, read_M, due, row_key, memory.revive_noise)
  revived_keys = jnp.zeros((), jnp.int32)
  if memory.revive_keys:
    state, revived_keys = _revive_keys(state, share_LKC, due, sub_key_key, memory.revive_noise)
  begun = {'read_M': read_M & ~due, 'share_LKC': jnp.where(due, 0, share_LKC)}
  return state | {'revival': begun}, {'revived_rows': revived_rows, 'revived_keys': revived_keys}


def _revive_rows(
  state: dict[str, Any], read_M: Array, due: Array, key: Array, noise: float
) -> tuple[dict[str, Any], Array]:
  M = len(read_M)
  chunk = min(CHUNK_ROWS, M)
  size = -(-M // chunk) * chunk

  def find() -> tuple[Array, Array]:
    return tuple(jnp.nonzero(x, size=size, fill_value=M)[0].astype(jnp.int32) for x in (~read_M, read_M))

  dead_X, used_X = jax.lax.cond(due, find, lambda: (jnp.zeros(size, jnp.int32),) * 2)
  n_used = jnp.sum(read_M, dtype=jnp.int32)
  n_dead = jnp.where(due & (n_used > 0), M - n_used, 0)

  def start_chunk(i: Array, arrays: list[Array]) -> list[Array]:
    bank_MP, *moments = arrays
    source_key, noise_key = jax.random.split(jax.random.fold_in(key, i))
    row_X = jax.lax.dynamic_slice_in_dim(dead_X, i * chunk, chunk)
    source_X = used_X[jax.random.randint(source_key, (chunk,), 0, n_used)]
    bank_MP = bank_MP.at[row_X].set(_with_noise(noise_key, bank_MP[source_X], noise), mode='drop')
    return [bank_MP, *(x.at[row_X].set(0, mode='drop') for x in moments)]

  def start(arrays: Sequence[Array]) -> list[Array]:
    return jax.lax.fori_loop(0, (n_dead + chunk - 1) // chunk, start_chunk, list(arrays))

  state = _edit(state, r'memory_bank$|bank_moments/(mean|square)_MP$', start)
  if 'bank_moments' in state:  # a row that starts now has no decay to catch up with
    moments = state['bank_moments']
    log_decay_M = jnp.where((n_dead > 0) & ~read_M, moments['log_decay'], moments['log_decay_M'])
    state |= {'bank_moments': moments | {'log_decay_M': log_decay_M}}
  return state, n_dead


def _revive_keys(
  state: dict[str, Any], share_LKC: Array, due: Array, key: Array, noise: float
) -> tuple[dict[str, Any], Array]:
  used_LKC = share_LKC > 0
  nth_LKC = jnp.cumsum(~used_LKC, axis=-1) - 1  # of the dead
  starts_LKC = due & ~used_LKC & (nth_LKC < jnp.sum(used_LKC, axis=-1, keepdims=True))
  source_LKC = jnp.take_along_axis(jnp.argsort(-share_LKC, axis=-1), nth_LKC, axis=-1, mode='clip')
  L = len(share_LKC)

  def start(arrays: Sequence[Array]) -> list[Array]:
    keys, moments = arrays[:L], arrays[L:]  # of the layers, one after the other
    started = []
    for l, keys_KCp in enumerate(keys):
      source_KCp = jnp.take_along_axis(keys_KCp, source_LKC[l, :, :, None], axis=1)
      new_KCp = _with_noise(jax.random.fold_in(key, l), source_KCp, noise)
      started.append(jnp.where(starts_LKC[l, :, :, None], new_KCp, keys_KCp))
    return started + [jnp.where(starts_LKC[i % L, :, :, None], 0, x) for i, x in enumerate(moments)]

  def start_if_due(arrays: Sequence[Array]) -> list[Array]:
    return jax.lax.cond(due, start, list, list(arrays))

  return _edit(state, r'sublayer/gate/keys$', start_if_due), jnp.sum(starts_LKC, dtype=jnp.int32)


def _with_noise(key: Array, source: Array, noise: float) -> Array:
  size = jnp.sqrt(jnp.mean(source**2, axis=-1, keepdims=True))
  noisy = source + noise * size * jax.random.normal(key, source.shape)
  return jnp.where(jnp.isfinite(noisy), noisy, source)


def _edit(state: dict[str, Any], pattern: str, change: Callable[[Sequence[Array]], Sequence[Array]]) -> dict[str, Any]:
  """Changes the arrays whose names match, all at once: the parameters first, then the optimizer's."""
  named, treedef = jax.tree_util.tree_flatten_with_path(state)
  names, leaves = [path_name(path) for path, _ in named], [leaf for _, leaf in named]
  chosen = [i for i, name in enumerate(names) if re.search(pattern, name)]
  chosen.sort(key=lambda i: not names[i].startswith('params/'))
  for i, leaf in zip(chosen, change([leaves[i] for i in chosen]), strict=True):
    leaves[i] = leaf
  return jax.tree.unflatten(treedef, leaves)
