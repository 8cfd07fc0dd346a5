"""Measures checkpoints and reading text: python benchmarks/storage.py [--config configs/exp_1_4_2.py] [--config...]

One state of the config, with the optimizer's moments, is saved into a temporary directory and read again, whole and as
parameters alone. Both ways all checksums are made or compared. The operating system may keep the files in memory, so
that reading is not the disk's speed. Then batches of the config's prepared training text are made without a model, in
both layouts.
"""

import dataclasses
import itertools
import tempfile
from contextlib import closing

import common
import jax

from mmjax.config import Config, load_config
from mmjax.data.loader import open_split, train_batches
from mmjax.data.prepare import prepare
from mmjax.run.checkpoint import Checkpoints
from mmjax.run.placement import place
from mmjax.training.first_state import new_state
from mmjax.training.learner import Learner

BATCHES = 200
TOTAL_STEPS = 1000  # of the learning rate's schedule, which nothing here uses


def main() -> None:
  """Measures, prints both tables, writes the JSON file."""
  parser = common.parser(__doc__)
  arguments, overrides = parser.parse_known_args()
  config = load_config(arguments.config, overrides)
  seconds = measure_checkpoints(config, arguments.repeats)
  common.print_table(
    {'what': what, 'seconds': f'{s["median"]:.2f}', 'range': f'{s["min"]:.2f}-{s["max"]:.2f}'}
    for what, s in ((what, common.spread(found)) for what, found in seconds.items())
  )
  speeds = {layout: reading_speed(config, layout) for layout in ('packed', 'padded')}
  common.print_table({'layout': layout, 'M positions/s': f'{speed / 1e6:.1f}'} for layout, speed in speeds.items())
  found = common.environment()
  common.write_json(arguments.json, found | {'seconds': seconds, 'positions_per_second': speeds})


def measure_checkpoints(config: Config, repeats: int) -> dict[str, list[float]]:
  """Returns the seconds of each save and restore of the config's first state."""
  learner = Learner(config, place(config), TOTAL_STEPS)
  state = jax.block_until_ready(new_state(learner))
  shapes, leaves = learner.shapes, jax.tree.leaves(state)
  print(f'{sum(leaf.nbytes for leaf in leaves) / 1e6:.1f} MB in {len(leaves)} arrays')
  seconds = {'save': [], 'restore': [], 'restore the parameters': []}
  with tempfile.TemporaryDirectory() as folder:
    checkpoints = Checkpoints(folder)
    for step in range(1, repeats + 1):
      seconds['save'].append(common.seconds_of(lambda step=step: checkpoints.save(step, state, {})))
      seconds['restore'].append(common.seconds_of(lambda: checkpoints.restore(shapes)))
      alone = common.seconds_of(lambda: checkpoints.restore_params(shapes['params'], 'last'))
      seconds['restore the parameters'].append(alone)
  return seconds


def reading_speed(config: Config, layout: str) -> float:
  """Returns the positions a second of batches of the training text, after the first."""
  data = dataclasses.replace(config.data, layout=layout)
  directory, length = prepare(data, config.model.vocab_size), config.model.max_seq_len
  split = open_split(directory, 'train', max_seq_len=length, layout=layout, isolate_documents=data.isolate_documents)
  rows = min(config.train.update_rows, split.n_rows)
  with closing(train_batches(split, global_batch_rows=rows, seed=config.seed)) as batches:
    next(batches)
    seconds = common.seconds_of(lambda: sum(1 for _ in itertools.islice(batches, BATCHES)))
  return BATCHES * rows * length / seconds


if __name__ == '__main__':
  from mmjax.errors import run_command

  run_command(main)
