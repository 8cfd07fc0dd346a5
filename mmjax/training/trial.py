"""Updates of a config on one batch of random tokens, to be timed: by tools.fit on a GPU, and by the benchmarks."""

import dataclasses
from collections.abc import Sequence

import jax
import numpy as np

from mmjax.config import Config
from mmjax.run.placement import place
from mmjax.run.sharding import put_batch
from mmjax.training.learner import Learner

FIRST_TOKEN = 4  # after the special ones
TOTAL_STEPS = 1000  # of the learning rate's schedule


class Trial:
  """The update of a config, compiled as a run compiles it, its state, and one batch.

  Attributes:
    learner: what made them. compiled: the update. Others, from `compile`, share the state.
  """

  def __init__(self, config: Config, devices: Sequence[jax.Device] | None = None):
    config = dataclasses.replace(config, memory=dataclasses.replace(config.memory, bank_init='normal'))
    self.learner = Learner(config, place(config, devices), TOTAL_STEPS)
    self.state = self.learner.new_state()
    self.batch = put_batch(self.learner.placement.mesh, random_rows(config), config.train.accumulation_steps)
    self.compiled = self.learner.compile(self.state)

  def compile(self, config: Config) -> jax.stages.Compiled:
    """Compiles the update with other settings of `runtime`."""
    placement = place(config, list(self.learner.placement.mesh.devices.flat))
    return dataclasses.replace(self.learner, config=config, placement=placement).compile(self.state)

  def run(self, compiled: jax.stages.Compiled | None = None) -> None:
    """Makes an update and waits for it."""
    self.state, metrics = (compiled or self.compiled)(self.state, self.batch)
    jax.block_until_ready((self.state, metrics))


def random_rows(config: Config) -> dict[str, np.ndarray]:
  """Returns the rows of one update, without padding: `input`, `target`, `segment`, int32 (A * B, T)."""
  shape = (config.train.update_rows, config.model.max_seq_len + 1)
  tokens = np.random.default_rng(0).integers(FIRST_TOKEN, config.model.vocab_size, shape, np.int32)
  return {'input': tokens[:, :-1], 'target': tokens[:, 1:], 'segment': np.zeros_like(tokens[:, 1:])}
