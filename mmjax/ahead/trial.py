"""Updates of a config on one batch of random tokens, to be timed: by tools.fit on a GPU, and by the benchmarks.

python -m mmjax.ahead.trial --config configs/exp_1_4_2.py [--devices 8] [--config.section.field=value ...]

It prints one line of JSON: device, seconds_an_update (median), peak_bytes.
"""

import argparse
import dataclasses
import json
import statistics
import time
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from mmjax.config import Config, load_config
from mmjax.errors import run_command
from mmjax.run.placement import place
from mmjax.run.sharding import put_batch
from mmjax.training.first_state import new_state
from mmjax.training.learner import Learner

FIRST_TOKEN = 4  # after the special ones
TOTAL_STEPS = 1000  # of the learning rate's schedule
WARM_UPDATES, UPDATES = 2, 5


class Trial:
  """The update of a config, compiled as a run compiles it, its state, and one batch.

  Attributes:
    learner: what made them. compiled: the update. Others, from `compile`, share the state.
  """

  def __init__(self, config: Config, devices: Sequence[jax.Device] | None = None):
    config = config.with_settings({'memory.bank_init': 'normal'})
    self.learner = Learner(config, place(config, devices), TOTAL_STEPS)
    self.state = new_state(self.learner)
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


def measure(config: Config, devices: int) -> dict[str, Any]:
  """Makes some updates with JAX's first devices and returns what they took."""
  trial, seconds = Trial(config, jax.devices()[:devices]), []
  for _ in range(WARM_UPDATES + UPDATES):
    start = time.perf_counter()
    trial.run()
    seconds.append(time.perf_counter() - start)
  return {
    'device': jax.devices()[0].device_kind,
    'seconds_an_update': statistics.median(seconds[WARM_UPDATES:]),
    'peak_bytes': (jax.devices()[0].memory_stats() or {}).get('peak_bytes_in_use'),
  }


def main() -> None:
  """Flags -> config -> updates -> JSON."""
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--config', required=True)
  parser.add_argument('--devices', type=int, default=1)
  arguments, overrides = parser.parse_known_args()
  print(json.dumps(measure(load_config(arguments.config, overrides), arguments.devices)))


if __name__ == '__main__':
  run_command(main)
