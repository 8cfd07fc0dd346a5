"""New text into few rows of a bank (memory.teach_rows): what the model knew stays where it is, bit for bit.

Training counts in how many updates each row of the bank was read: `reads`, a part of the state. A run that starts from
another's weights goes on with its counts. The background is the updates before the teaching. While rows are taught, an
update teaches at most memory.teach_rows rows, those with the highest

  score = reads of the row in this update * log((background updates + 1) / (background updates that read it + 1))

and nothing else has a gradient. Only a row that every update of the background read is never taught. Adam also moves
the rows of the last updates on, until its mean of their gradients has faded; plain gradient descent does not.

Source: Lin et al. 2025, "Continual Learning via Sparse Memory Finetuning", arXiv:2510.15103: TF-IDF, with batches as
documents. There the rows move by plain gradient descent, which train.optimizer='sgd' does here. With few rows an update
Adam learned as much or more for what was forgotten: docs/bank_experiments.md.
"""

import jax
import jax.numpy as jnp
from jax import Array

from mmjax.config import Config
from mmjax.errors import StorageError
from mmjax.model.params import BANK, Params
from mmjax.run.checkpoint import START_STEP, Checkpoints

RowCounts = dict[str, Array]


def first_reads(config: Config, before: RowCounts | None = None) -> RowCounts:
  """Returns counts before the first update: zeros, or those of the run that the weights come from.

  count_M, int32: updates that read the row in any layer; updates, int32: how many were counted. Where rows are taught,
  also what these were before: background_M and background_updates.
  """
  reads = {'count_M': jnp.zeros(config.model.knowledge_num, jnp.int32), 'updates': jnp.zeros((), jnp.int32)}
  reads |= {name: before[name] for name in reads if before}
  if config.memory.teach_rows:
    reads |= {'background_M': reads['count_M'], 'background_updates': reads['updates']}
  return reads


def count_reads(reads: RowCounts, usage_LM: Array) -> RowCounts:
  """Counts an update, in which each reader read each row int32 `usage_LM` times."""
  read_M = jnp.any(usage_LM > 0, axis=0)
  return reads | {'count_M': reads['count_M'] + read_M, 'updates': reads['updates'] + 1}


def rows_left(reads: RowCounts) -> int:
  """Returns how many rows can be taught after such a background: those that not all of its updates read."""
  return int(jnp.sum(reads['count_M'] < reads['updates']))


def rows_to_teach(reads: RowCounts, usage_LM: Array, most: int) -> Array:
  """Returns bool (M,): the up to `most` rows with the largest score, see the top of this file; a score of 0 is none."""
  rarity_M = jnp.log((reads['background_updates'] + 1) / (reads['background_M'] + 1))
  score_M = jnp.sum(usage_LM, axis=0) * rarity_M
  score_X, row_X = jax.lax.top_k(score_M, most)
  return jnp.zeros(score_M.shape, bool).at[row_X].set(score_X > 0)


def gradient_of_rows(grads: Params, taught_M: Array) -> Params:
  """Returns gradients, float32 as before, that are 0 but for the rows of the bank where bool `taught_M` is true."""
  zeros = jax.tree.map(jnp.zeros_like, grads)
  return zeros | {BANK: jnp.where(taught_M[:, None], grads[BANK], 0)}


def rows_taught(checkpoints: Checkpoints, shapes: Params, params: Params) -> str:
  """Says how many rows of the bank are not what they were before the run."""
  try:
    before, *_ = checkpoints.restore_params(shapes, START_STEP)
  except StorageError as error:
    return f'How many rows were taught is not known: {error}'
  taught = int(jnp.any(params[BANK] != before[BANK], axis=1).sum())
  return f'Rows taught: {taught}' if taught else 'No row was taught: the bank is what it was'
