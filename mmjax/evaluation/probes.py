"""Whether a memory works: what the model loses without its bank, what its rows stand for, and whether it learns.

Three kinds of numbers, beside those of `bank_health`. Models without a memory have only the loss on the probed
positions, which compares with that of others with their bank zeroed, and pay nothing.

Of every evaluation, over all positions that are not padding, for each reader of the bank:
  kl_weighted      KL(usage || uniform) in nats as `kl_to_uniform`, but a read counts with the absolute weight that its
                   score or a gate gives the row (`row_weights`). Where nothing weighs rows it equals kl_to_uniform.
  head_overlap     of two heads of a token, the share of the r rows of one that the other took too; the mean over pairs
                   of different heads, then over positions. None with one head.

Of every evaluation, over the probed positions: those of its first batches, as many as `plan_probe` says:
  loss             nats a token, of the model as it is; compare the next two with this one.
  loss_zeroed      the same with every value of the bank 0.
  loss_shuffled    the same with the rows of the bank exchanged by a permutation that config.seed gives: the same rows,
                   but no longer where the gate looks for them.
  row_agreement    for each reader, how often a row stands for what comes next. Take a position and, at random, another
                   with the same next token: the chance that a head's best row (the first, where n-grams address
                   rows) is the same at both. The mean over heads and over all positions that have such another. Each
                   position weighs the same, so that the most frequent token does not decide alone. None where no next
                   token occurs twice.
  row_agreement_chance  the same for another of these positions whatever its next token.

Of a training step:
  gate_grad_norm   for each layer with a gate, L2 norm of the gradient of its query projection, before clipping.
  key_grad_norm    the same of its sub-keys.
  row_update_ratio L2 norm of what the update added to the rows that the step's batch read (in any layer), over the
                   norm of these rows before it; 0 where that is 0. All that moves them counts: learning rates, moments,
                   decay. Of a larger bank, unless it is updated lazily, over every so many rows, at most RATIO_ROWS.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from mmjax.config import Config
from mmjax.config.sublayers import memory_layers
from mmjax.data.loader import PADDING, TokenSplit
from mmjax.kernels.bank import sum_by_row
from mmjax.kernels.norm import ratio_of_norms
from mmjax.model.lm import Output
from mmjax.model.params import Params
from mmjax.model.sublayers import row_weights

RATIO_ROWS = 65536  # that row_update_ratio looks at
PROBED_POSITIONS = 65536  # the mean of differences that deviate by 1 nat is good to 0.004
LAYER_NORMS = ('gate_grad_norm', 'key_grad_norm')


@dataclasses.dataclass(frozen=True)
class ProbePlan:
  """How many batches of an evaluation are probed, the first ones; what the bank is shuffled with; which layers read."""

  batches: int
  seed: int
  layers: tuple[int | str, ...]


def plan_probe(config: Config, split: TokenSplit) -> ProbePlan:
  """Probes up to PROBED_POSITIONS, in whole batches, but no more than half of them: they are evaluated again."""
  rows = config.train.batch_size
  batches = -(-split.n_rows // rows)
  most = max(1, PROBED_POSITIONS // (rows * split.max_seq_len))
  return ProbePlan(min(most, -(-batches // 2)), config.seed, tuple(memory_layers(config)))


def make_read_probe(config: Config) -> Callable[[Output, Array], dict[str, Array]]:
  """Returns what an evaluation asks of each batch: a function of a memory model's output and weight_BT.

  weight_BT is 0 at padding, else 1. It returns weight_LM, float32 sums of the absolute weights with which each reader
  read each row; overlap_L, head overlaps summed over positions (with two heads or more); best_LhBT, int32 best rows,
  PADDING at padding.
  """
  model, memory = config.model, config.memory

  def probe(out: Output, weight_BT: Array) -> dict[str, Array]:
    L, B, T, _ = out.row_LBTR.shape
    row_LBThr = out.row_LBTR.reshape(L, B, T, memory.n_heads, -1)
    read_LBTR = jnp.abs(row_weights(config, out.score_LBTR)) * weight_BT[..., None]
    weight_LM = sum_by_row(out.row_LBTR, read_LBTR, model.knowledge_num)
    # The first row of a head is its best but for a selection bias, which takes part in the order.
    best_LBTh1 = jnp.argmax(out.score_LBTR.reshape(row_LBThr.shape), axis=-1, keepdims=True)
    best_LhBT = jnp.moveaxis(jnp.take_along_axis(row_LBThr, best_LBTh1, axis=-1)[..., 0], 3, 1)
    found = {'weight_LM': weight_LM, 'best_LhBT': jnp.where(weight_BT > 0, best_LhBT, PADDING)}
    if memory.n_heads > 1:
      found['overlap_L'] = jnp.sum(head_overlap(row_LBThr) * weight_BT, axis=(1, 2))
    return found

  return probe


def head_overlap(row_XThr: Array) -> Array:
  """Returns the mean share of a head's rows that another head took too, float32, without the last two axes.

  Args:
    row_XThr: int32, at least two heads; n-grams may hash to a row twice within a head, which counts as two rows.
  """
  *_, heads, r = row_XThr.shape
  taken_XThrh = jnp.any(row_XThr[..., None, None] == row_XThr[..., None, None, :, :], axis=-1)
  # Every row is taken by its own head; what is left are the ordered pairs of different heads.
  return (jnp.sum(taken_XThrh, axis=(-3, -2, -1), dtype=jnp.int32) - heads * r) / (heads * (heads - 1) * r)


def row_agreement(best_LhX: np.ndarray, target_X: np.ndarray) -> list[dict[str, float | None]]:
  """Returns row_agreement and row_agreement_chance of each reader, see the top of this file.

  Only positions count that share their next token with another: `all` of them. Of these `row` have a certain best row,
  `token` a certain next token, and `pair` both. row_agreement is the sum of pair * (pair - 1) / (token - 1) / all over
  all pairs, and by chance the sum of row * (row - 1) / (all * (all - 1)) over all rows.

  Args:
    best_LhX: int, best row of each reader and head at each position.
    target_X: int next tokens, without padding.
  """
  _, token_X, of_token = np.unique(target_X, return_inverse=True, return_counts=True)
  shared_X = of_token[token_X] > 1
  best_LhX, token_X, total = best_LhX[..., shared_X].astype(np.int64), token_X[shared_X], int(shared_X.sum())
  if not total:
    return [{'row_agreement': None, 'row_agreement_chance': None}] * len(best_LhX)
  found_L2 = []
  for best_hX in best_LhX:
    found_h2 = []
    for best_X in best_hX:
      pair, of_pair = np.unique(best_X * len(of_token) + token_X, return_counts=True)
      _, of_row = np.unique(best_X, return_counts=True)
      same = np.sum(of_pair * (of_pair - 1) / (of_token[pair % len(of_token)] - 1)) / total
      found_h2.append((same, np.sum(of_row * (of_row - 1.0)) / (total * (total - 1.0))))
    found_L2.append(np.mean(found_h2, axis=0).tolist())
  return [dict(zip(('row_agreement', 'row_agreement_chance'), found, strict=True)) for found in found_L2]


def gate_norms(grads: Params) -> dict[int, dict[str, Array]]:
  """Returns a training step's gate_grad_norm and key_grad_norm, see the top of this file, of each layer with a gate.

  Args:
    grads: float32, before clipping.
  """
  gates = {layer: block['sublayer'].get('gate', {}) for layer, block in grads['layers'].items()}
  return {
    layer: {'gate_grad_norm': optax.global_norm(gate['query']), 'key_grad_norm': optax.global_norm(gate['keys'])}
    for layer, gate in gates.items()
    if 'keys' in gate
  }


def row_update_ratio(bank_MP: Array, update_MP: Array, usage_LM: Array) -> Array:
  """Returns a training step's row_update_ratio, see the top of this file.

  Args:
    bank_MP: float32, before the update.
    update_MP: float32, what is added to it.
    usage_LM: int32, how often each reader read each row.
  """
  # Of more rows XLA would write down the whole update, and copy the whole bank.
  step = -(-len(bank_MP) // RATIO_ROWS)
  touched_X1 = jnp.any(usage_LM[:, ::step] > 0, axis=0)[:, None]
  added, before = (jnp.sum(jnp.where(touched_X1, jnp.square(x[::step]), 0.0)) for x in (update_MP, bank_MP))
  return ratio_of_norms(added, before)


def add_norms(record: dict[str, Any], steps: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
  """Returns a line of metrics.jsonl with norms of training steps in its `bank` and `probes`: means over those applied.

  Args:
    record: its `bank` has an entry for each layer with a memory.
    steps: what `make_train_step` reports, at least one; NaN is reported where none was applied.
  """
  if 'row_update_ratio' not in steps[0]:
    return {'probes': {}} | record
  steps = jax.device_get(
    [{name: step[name] for name in ('applied', 'row_update_ratio', 'gate_norms')} for step in steps]
  )
  applied = [step for step in steps if step['applied']]
  means = jax.tree.map(lambda *values: float(np.mean(values)) if applied else math.nan, *(applied or steps))
  bank = [health | means['gate_norms'].get(health['layer'], {}) for health in record['bank']]
  probes = record.get('probes', {}) | {'row_update_ratio': means['row_update_ratio']}
  return record | {'bank': bank, 'probes': probes}


def bank_health(counts_M: np.ndarray) -> dict[str, float]:
  """Measures how evenly the rows of a bank are used.

  Args:
    counts_M: int32 or int64; how often each row was selected.

  Returns:
    used_share: share of rows selected at least once. kl_to_uniform: KL(usage || uniform) in nats, 0 to log M.
    effective_rows: exp(entropy of usage), 1 to M. hottest_share: share of selections that went to the hottest row.
    Without any selection: 0, log M, 0, 0, as for a bank of which nothing is used.
  """
  counts_M = np.asarray(counts_M)
  total, log_rows = counts_M.sum(dtype=np.float64), float(np.log(counts_M.size))
  if total == 0:
    return {'used_share': 0.0, 'kl_to_uniform': log_rows, 'effective_rows': 0.0, 'hottest_share': 0.0}
  usage = counts_M[counts_M > 0].astype(np.float64) / total
  entropy = -float(np.sum(usage * np.log(usage)))
  return {
    'used_share': usage.size / counts_M.size,
    'kl_to_uniform': max(0.0, log_rows - entropy),
    'effective_rows': float(np.exp(entropy)),
    'hottest_share': float(usage.max()),
  }
