"""What the loop reports of its steps: means between two reports, and the dump of a run that diverged."""

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from mmjax.config import Config
from mmjax.config.sublayers import memory_layers
from mmjax.evaluation.probes import add_norms, bank_health
from mmjax.files import named_leaves, write_json
from mmjax.model.cost import flops_per_token
from mmjax.run.log import peak_memory
from mmjax.run.nvidia import device_peak_flops
from mmjax.run.processes import is_main
from mmjax.training.state import TrainState

add_in_place = jax.jit(jnp.add, donate_argnums=0)  # a large bank has as many counts for each reader as rows
MEANS = ('loss', 'aux_loss', 'accuracy', 'grad_norm')


class Window:
  """Keeps the metrics of the steps between two reports on the device, and reads them once."""

  def __init__(self) -> None:
    self.steps: list[dict[str, jax.Array]] = []
    self.usage_LM: jax.Array | None = None
    self.paused_seconds = 0.0
    self.start = time.perf_counter()

  def add(self, metrics: dict[str, jax.Array]) -> None:
    """Takes the metrics of one step, see mmjax.training.step, without waiting for them; sums int32 `usage_LM`.

    The sum takes the place of the first `usage_LM`, which is then gone.
    """
    self.steps.append({name: value for name, value in metrics.items() if name not in ('usage_LM', 'grad_norm_X')})
    if 'usage_LM' in metrics:
      self.usage_LM = metrics['usage_LM'] if self.usage_LM is None else add_in_place(self.usage_LM, metrics['usage_LM'])

  @contextmanager
  def pause(self) -> Iterator[None]:
    """Stops the clock while something other than training runs."""
    jax.block_until_ready(self.steps)
    start = time.perf_counter()
    yield
    self.paused_seconds += time.perf_counter() - start

  def report(self, config: Config, mesh: Mesh) -> dict[str, Any]:
    """Returns a line of metrics.jsonl, but for its step.

    Means over the updates that were applied, NaN if none was; the last learning rate; tokens and seconds of all steps;
    their speed, the memory, and for each layer with a memory how evenly it used the bank.
    """
    steps = jax.device_get(self.steps)
    seconds = time.perf_counter() - self.start - self.paused_seconds
    applied = [step for step in steps if step['applied']]
    line = {name: float(np.mean([step[name] for step in applied])) if applied else math.nan for name in MEANS}
    tokens = int(sum(step['tokens'] for step in steps))
    peak_flops = device_peak_flops(jax.devices()[0].device_kind, config.train.dtype)
    positions = len(steps) * config.update_positions  # padding is computed, too
    flops_per_second = positions / seconds * flops_per_token(config)['total']
    peak_bytes, peak_of = peak_memory()
    usage_LM = () if self.usage_LM is None else np.asarray(self.usage_LM)
    bank = zip(memory_layers(config) if len(usage_LM) else (), usage_LM, strict=True)
    line |= {
      'learning_rate': float(steps[-1]['learning_rate']),
      'tokens': tokens,
      'seconds': seconds,
      'kind': 'train',
      'tokens_per_second': tokens / seconds,
      'mfu': flops_per_second / peak_flops / mesh.size if peak_flops else None,
      'peak_bytes': peak_bytes,
      'peak_bytes_of': peak_of,
      'bank': [{'layer': layer, **bank_health(counts_M)} for layer, counts_M in bank],
    }
    return add_norms(line, self.steps)


def describe_skipped(
  step: int, batch: dict[str, np.ndarray], metrics: dict[str, jax.Array]
) -> tuple[dict[str, Any], str]:
  """Returns the line of the log for an update that was skipped, and what to say of it.

  `batch` is of numpy, with `row_id` int64 (A * B,); `metrics` hold scalars, see mmjax.training.step.
  """
  numbers = {name: float(metrics[name]) for name in ('loss', 'loss_average', 'grad_norm')}
  reason, skipped = 'spike' if metrics['finite'] else 'not finite', int(metrics['skipped'])
  line = {'kind': 'skipped', 'step': step, 'reason': reason, **numbers, 'in_a_row': skipped}
  spike = f'loss {numbers["loss"]:.4f} after an average of {numbers["loss_average"]:.4f}'
  what = spike if reason == 'spike' else 'update not finite'
  said = f'Step {step}: {what}; update skipped ({skipped} in a row)'
  return line | {'row_ids': batch['row_id'].tolist()}, said


def write_divergence(
  folder: Path, step: int, batch: dict[str, np.ndarray], metrics: dict[str, jax.Array], state: TrainState
) -> None:
  """Writes the batch that broke a run and the norms of every parameter and its gradient.

  Arguments are as in `describe_skipped`, and `metrics` also hold `grad_norm_X`, float32, in the order of the leaves.
  """
  leaves = named_leaves(state['params'])
  names = [name for name, _ in leaves]
  norms = [float(jax.numpy.linalg.norm(leaf)) for _, leaf in leaves]  # every process has its part of them
  if not is_main():
    return
  folder.mkdir(exist_ok=True)
  np.savez(folder / f'batch-{step}.npz', **batch)
  content = {'step': step, 'row_ids': batch['row_id'].tolist()}
  content |= {name: float(metrics[name]) for name in ('loss', 'grad_norm', 'loss_average')}
  content['parameter_norms'] = dict(zip(names, norms, strict=True))
  content['gradient_norms'] = dict(zip(names, metrics['grad_norm_X'].tolist(), strict=True))
  write_json(folder / f'step-{step}.json', content)
