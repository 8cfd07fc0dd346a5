"""Which updates are thrown away, and what a state counts of them.

An update is computed and then thrown away if its loss or gradient is not finite, or if its loss is above
`train.max_loss_factor` times the running average. Only the counters move then; parameters, optimizer state and the
average stay. Where the settings let a finite gradient make parameters that are not finite (`may_overflow`), the result
is checked too. Elsewhere that check would read parameters and moments once more and find nothing.
"""

import jax
import jax.numpy as jnp
from jax import Array

from mmjax.config import TrainConfig
from mmjax.training.state import TrainState, TrainStep

LOSS_AVERAGE_DECAY = 0.98  # of the running average that a spike is measured by: about the last 50 updates


def goes_on(train: TrainConfig, state: TrainState, loss: Array) -> Array:
  """Tells, as a bool (), whether a finite update may be applied: its float32 loss is no spike, and the run goes on."""
  factor, average = train.max_loss_factor, state['loss_average']
  spikes = (factor > 0) & (average > 0) & (loss > factor * average)  # never before there is an average
  # The loop notices one step late that too many updates were skipped. This one is not applied, so that the
  # parameters that the loop dumps are those of the step that diverged.
  return ~spikes & ~(state['skipped'] == train.max_skipped_updates)


def count_update(state: TrainState, loss: Array, applied: Array) -> TrainState:
  """Returns what the state counts, see `init_state`, after an update of float32 loss (), if it was applied, bool ()."""
  average = state['loss_average']
  next_average = LOSS_AVERAGE_DECAY * average + (1 - LOSS_AVERAGE_DECAY) * loss
  return {
    'step': state['step'] + 1,
    'skipped': jnp.where(applied, 0, state['skipped'] + 1),
    'skipped_total': state['skipped_total'] + (1 - applied.astype(jnp.int32)),
    'loss_average': jnp.where(applied, jnp.where(average > 0, next_average, loss), average),
  }


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
