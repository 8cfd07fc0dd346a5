r"""Measures what a larger bank costs: python benchmarks/memory_scaling.py [--rows 65536,262144,1048576,4194304]

For each size of the bank and each way to update it (--updates dense,lazy,lazy/row), then for each number of selected
rows, one step of the config takes turns with the first: forward and backward pass alone ("gradient"), and the whole
update, of which the optimizer's share is the rest, with one micro-batch of random tokens. "Rows read" counts different
rows in the last update. Memory is the compiler's sum for the update, and on a GPU also the allocator's peak so far,
with the base in it. On a CPU make the model smaller with `--config.model.dim=256` and the like. What lazy updates cost
and gain:

  python benchmarks/memory_scaling.py --config configs/product_key_bag.py --rows 65536,1048576 --updates dense,lazy \
    --selected '' --config.train.dtype=float32 --config.train.batch_size=4 --config.model.max_seq_len=256 \
    --config.model.dim=256 --config.model.n_layers=4 --config.model.n_heads=8 --config.model.n_kv_heads=2
"""

import gc
from collections.abc import Callable
from typing import Any

import common
import jax
import jax.numpy as jnp

from mmjax.ahead.trial import Trial
from mmjax.config import Config, load_config
from mmjax.config.rules import CHOICES
from mmjax.errors import UserError
from mmjax.model.params import model_graph
from mmjax.training.step import make_gradient

GIB = 1 << 30
ONE_MICRO_BATCH = '--config.train.accumulation_steps=1'


def main() -> None:
  """Reads flags, measures, prints the table, writes the JSON file."""
  parser = common.parser(__doc__)
  parser.add_argument('--rows', default='65536,262144,1048576,4194304', help='sizes of the bank; the first is the base')
  help_of_updates = "of the bank: 'dense', 'lazy', 'dense/row', ...: and what Adam keeps of it; the first is the base"
  parser.add_argument('--updates', default='dense', help=help_of_updates)
  parser.add_argument('--selected', default='1,16,32,64', help='rows a token, in addition to those of the config')
  arguments, overrides = parser.parse_known_args()
  config = load_config(arguments.config, [*overrides, ONE_MICRO_BATCH])
  rows, selected = ([int(n) for n in text.split(',') if n] for text in (arguments.rows, arguments.selected))
  updates = [with_update(config, update) for update in arguments.updates.split(',')]
  base_config = with_model(updates[0], knowledge_num=rows[0])
  base = Point(base_config)
  lines = []
  points = [with_model(update, knowledge_num=n) for n in rows for update in updates]
  points += [with_model(base_config, num_selected=n) for n in selected]
  for point_config in points:
    lines.append(measure(base, point_config, arguments.repeats))
    show = common.print_row if len(lines) > 1 else lambda first: common.print_table([first])
    show(row(lines[-1]))
    found = common.environment()
    common.write_json(arguments.json, found | {'config': base_config.to_dict(), 'points': lines})
    gc.collect()  # a state of the size before may still be held by a cycle


def with_model(config: Config, **fields: int) -> Config:
  """Returns the config with other sizes of the model."""
  return config.with_settings({f'model.{name}': value for name, value in fields.items()})


def with_update(config: Config, update: str) -> Config:
  """Returns the config with another way to update the bank, 'lazy', or 'lazy/row' with other moments of it."""
  update, _, moments = update.partition('/')
  settings = {'memory.bank_update': update, 'memory.bank_moments': moments or config.memory.bank_moments}
  for name, value in settings.items():
    if value not in CHOICES[name]:
      raise UserError(f'--updates: {value!r} must be one of {", ".join(CHOICES[name])}')
  return config.with_settings(settings)


class Point:
  """One size, compiled: the gradient alone, and the update."""

  def __init__(self, config: Config):
    self.config, self.step = config, Trial(config)
    self.step.run()
    gradient = make_gradient(config, model_graph(config), self.step.learner.placement.attention)
    total = jnp.float32(config.train.batch_size * config.model.max_seq_len)
    compiled = self.step.learner.placement.jit(lambda params, batch: gradient(params, batch, total, 0))
    self.gradient = lambda: jax.block_until_ready(compiled(self.step.state['params'], self.step.batch))
    self.gradient()

  def runs(self) -> dict[str, Callable[[], Any]]:
    """Returns what is timed."""
    return {'gradient': self.gradient, 'update': self.step.run}


def measure(base: Point, config: Config, repeats: int) -> dict[str, Any]:
  """Times one beside the base, turn by turn."""
  point = base if config == base.config else Point(config)
  seconds = {(side, name): [] for side in ('base', 'point') for name in ('gradient', 'update')}
  for _ in range(repeats):
    for name in ('gradient', 'update'):
      seconds['base', name].append(common.seconds_of(base.runs()[name]))
      seconds['point', name].append(common.seconds_of(point.runs()[name]))
  memory, stats = point.step.compiled.memory_analysis(), jax.devices()[0].memory_stats() or {}
  gradient, update = (common.spread(seconds['point', name]) for name in ('gradient', 'update'))
  return {
    'knowledge_num': config.model.knowledge_num,
    'num_selected': config.model.num_selected,
    'bank_update': config.memory.bank_update,
    'bank_moments': config.memory.bank_moments,
    'rows_read': int(jnp.sum(jnp.any(point.gradient()[0]['usage_LM'] > 0, axis=0))),
    'gradient_seconds': gradient,
    'update_seconds': update,
    'base_seconds': {name: common.spread(seconds['base', name]) for name in ('gradient', 'update')},
    'times_base': {
      name: common.spread([a / b for a, b in zip(seconds['point', name], seconds['base', name], strict=True)])
      for name in ('gradient', 'update')
    },
    'optimizer_share': 1 - gradient['median'] / update['median'],
    'analysis_bytes': common.program_bytes(memory),
    'peak_bytes': stats.get('peak_bytes_in_use'),
  }


def row(entry: dict[str, Any]) -> dict[str, str]:
  """Returns a line of the table."""
  gradient, update, times = entry['gradient_seconds'], entry['update_seconds'], entry['times_base']
  base = entry['base_seconds']
  peak = entry['peak_bytes']
  return {
    'rows of the bank': f'{entry["knowledge_num"]:,}',
    'selected': str(entry['num_selected']),
    'update of the bank': f'{entry["bank_update"]}/{entry["bank_moments"]}',
    'rows read': f'{entry["rows_read"]:,}',
    'gradient, ms': milliseconds(gradient),
    'base gradient, ms': milliseconds(base['gradient']),
    'gradient, times base': ratios(times['gradient']),
    'update, ms': milliseconds(update),
    'base update, ms': milliseconds(base['update']),
    'update, times base': ratios(times['update']),
    'optimizer': f'{entry["optimizer_share"]:.1%}',
    'GiB, compiler': f'{entry["analysis_bytes"] / GIB:.2f}',
    'peak GiB, allocator': f'{peak / GIB:.2f}' if peak else '',
  }


def milliseconds(seconds: dict[str, float]) -> str:
  """Returns a median and its range in milliseconds."""
  return f'{1e3 * seconds["median"]:.1f} ({1e3 * seconds["min"]:.1f}-{1e3 * seconds["max"]:.1f})'


def ratios(times: dict[str, float]) -> str:
  """Returns the median and the range of the ratios of the turns."""
  return f'{times["median"]:.2f} ({times["min"]:.2f}-{times["max"]:.2f})'


if __name__ == '__main__':
  from mmjax.errors import run_command

  run_command(main)
