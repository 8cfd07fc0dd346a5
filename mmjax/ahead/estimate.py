"""What a config would need and take on a card: memory by part, the largest micro-batch, and the least time.

Memory is the compiler's own plan, `peak_memory_in_bytes`; what libraries take while they run is not in it. Time is a
bound from counted bytes and products (mmjax/ahead/count.py), not a measurement.
"""

import dataclasses
import os
from collections.abc import Callable
from typing import Any

from mmjax.ahead.cards import Card
from mmjax.ahead.compiler import compile_for
from mmjax.ahead.count import bound_seconds
from mmjax.ahead.kernels import Kernel, kernels_of
from mmjax.ahead.memory import live_at_peak
from mmjax.config import Config
from mmjax.errors import UserError
from mmjax.run.hlo import Module

RECORD_POSITIONS = 3 * 38530 * 64 * 512  # that the record was trained on: 3 epochs of so many micro-batches
MEMORY_SHARE = 0.75  # of a card's memory that JAX takes unless it is told otherwise
GOOD_ENOUGH = 0.01  # share of the memory that a largest micro-batch may leave free
MOST_TRIES = 4


@dataclasses.dataclass(frozen=True)
class Estimate:
  """One compiled train step on one card.

  Attributes:
    config, card, devices: what was compiled for what.
    kernels: of a device.
    peak_bytes: of a device.
    parts: bytes by part at that moment; they add up to it.
    fixed_bytes: of these, state, batch and gradients, which do not grow with the micro-batch.
    seconds: least time of an update.
    model_flops: of an update, by the formula of mmjax/model/cost.py, as in a run's `mfu`.
  """

  config: Config
  card: Card
  devices: int
  kernels: list[Kernel]
  peak_bytes: int
  parts: dict[str, float]
  fixed_bytes: float
  seconds: float
  model_flops: float

  @property
  def usable_bytes(self) -> float:
    """What JAX takes of the card's memory."""
    return memory_share() * self.card.memory_bytes

  @property
  def fits(self) -> bool:
    """Whether the peak is within what JAX takes."""
    return self.peak_bytes <= self.usable_bytes

  @property
  def share_of_peak(self) -> float:
    """Model FLOPs over what the products' rate would allow in that time."""
    return self.model_flops / self.seconds / self.devices / self.card.peak_rate

  @property
  def positions(self) -> float:
    """Positions of the whole run: of train.max_steps, else as many as the record had."""
    return self.config.train.max_steps * self.config.update_positions or RECORD_POSITIONS

  @property
  def hours(self) -> float:
    """Least time of the whole run."""
    return self.positions / self.config.update_positions * self.seconds / 3600


def memory_share() -> float:
  """Returns the share of a card's memory that JAX takes, by its environment variables."""
  given = os.environ.get('XLA_CLIENT_MEM_FRACTION') or os.environ.get('XLA_PYTHON_CLIENT_MEM_FRACTION')
  return float(given) if given else MEMORY_SHARE


def check_card(config: Config, card: Card) -> None:
  """Refuses settings that a card's products cannot serve.

  Raises:
    UserError: for bfloat16, or cuDNN attention, on cards before compute capability 8.0.
  """
  if float(card.capability) < 8 and config.train.dtype != 'float32':
    raise UserError(
      f'{card.name} has compute capability {card.capability}: no bfloat16 products and no cuDNN attention, which need '
      '8.0 or newer; with --config.train.dtype=float32 it trains, several times slower'
    )


def estimate(config: Config, card: Card, devices: int = 1) -> Estimate:
  """Compiles a config's step for a card and counts it.

  Raises:
    UserError: if the card cannot run it.
  """
  from mmjax.model.cost import flops_per_token

  check_card(config, card)
  compiled = compile_for(config, card, devices)
  module = Module(compiled.as_text())
  kernels, peak = kernels_of(module), peak_bytes(compiled)
  state = compiled.memory_analysis().argument_size_in_bytes
  found = live_at_peak(module)
  found.pop('state', None)
  scale = (peak - state) / max(sum(found.values()), 1)  # the sum is the compiler's but for some percent
  parts = {'state': float(state)} | {part: scale * size for part, size in found.most_common() if size}
  flops = flops_per_token(config)['total'] * config.update_positions
  fixed = state + parts.get('gradients', 0.0)
  return Estimate(config, card, devices, kernels, peak, parts, fixed, bound_seconds(kernels, card), flops)


def peak_bytes(compiled: Any) -> int:
  """Returns what a compiled step needs of a device's memory at most."""
  return compiled.memory_analysis().peak_memory_in_bytes


def largest_batch(
  peak_of: Callable[[int], int], known: dict[int, float], limit: float, step: int
) -> tuple[int, dict[int, float]]:
  """Finds the largest micro-batch whose peak is within a limit, by compiling.

  Memory is close to linear in the micro-batch, so the next to try is where the line through the two nearest meets the
  limit. It ends where the next step would not fit by that line, or at most GOOD_ENOUGH of the limit is left.

  Args:
    peak_of: compiles for a micro-batch and returns its peak in bytes.
    known: peaks by micro-batch, at least two; 0 may stand for what does not grow.
    limit: bytes.
    step: the micro-batch is a multiple of it.

  Returns:
    The micro-batch, 0 if not even `step` fits, and all peaks by micro-batch.
  """
  known, compiled = dict(known), set()
  for _ in range(MOST_TRIES):
    near = sorted(known, key=lambda batch: abs(known[batch] - limit))[:2]
    low, high = min(near), max(near)
    slope = max((known[high] - known[low]) / (high - low), 1.0)
    fits = max((batch for batch in known if batch and known[batch] <= limit), default=0)
    over = min((batch for batch in known if known[batch] > limit), default=None)
    if fits and limit - known[fits] < max(slope * step, GOOD_ENOUGH * limit):
      break
    guess = int((low + (limit - known[low]) / slope) // step * step)
    guess = max(guess, fits + step)
    if over is not None:
      guess = min(guess, (over - 1) // step * step)
    if guess <= fits:
      break
    known[guess] = peak_of(guess)
    compiled.add(guess)
  return max((batch for batch in known if batch and known[batch] <= limit), default=0), known


def same_update(rows: int, most: int, step: int) -> tuple[int, int] | None:
  """Returns the largest micro-batch within `most` that divides an update's rows, and how many make it up."""
  batch = max((n for n in range(step, min(most, rows) + 1, step) if rows % n == 0), default=0)
  return (batch, rows // batch) if batch else None
