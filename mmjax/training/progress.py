"""What training shows beside the messages of its loop: each step, and how long a run with slow updates takes."""

import math
import time
from collections.abc import Mapping
from typing import Any

from mmjax.config import Config, TrainConfig
from mmjax.console import Progress, format_seconds
from mmjax.model.cost import flops_per_token
from mmjax.run.placement import Placement

STAGE = 'training'
SLOW_UPDATE_FLOPS = 1e12  # 3 to 30 s on a CPU
FORWARD_SHARE = 1 / 3  # of the time of a micro-batch
SHORT_RUN_SECONDS = 300  # of the run that is proposed where a run takes long


def has_slow_updates(config: Config, placement: Placement) -> bool:
  """Whether an update takes many seconds: on a CPU, so that the host can be told of its micro-batches cheaply."""
  on_cpu = placement.mesh.size == 1 and placement.platform == 'cpu'
  return on_cpu and flops_per_token(config)['total'] * config.update_positions > SLOW_UPDATE_FLOPS


def show_step(progress: Progress, total: int, metrics: Mapping[str, Any]) -> None:
  """Shows the metrics of a step of `total`: 'step', 'loss', 'learning_rate', 'tokens_per_second'."""
  step, rate = metrics['step'], metrics['tokens_per_second']
  loss = 'no update applied' if math.isnan(metrics['loss']) else f'loss {metrics["loss"]:.4f}'
  note = f'{loss}  lr {metrics["learning_rate"]:.2e}  {rate:,.0f} tokens/s'
  progress.update(STAGE, step, total, note, shown=f'step {step}/{total}', every=0)


def show_evaluation(progress: Progress, step: int, total: int, share: float) -> None:
  """Shows the share of the validation set that is done, of an evaluation after a step of `total`."""
  note = f'evaluating: {share:.0%}' if share < 1 else ''
  progress.update(STAGE, step, total, note, shown=f'step {step}/{total}')


class MicroBatchWatch:
  """Hears of every micro-batch of a run with slow updates; moves the display, and says once how long all will take."""

  def __init__(
    self, train: TrainConfig, max_seq_len: int, evaluation: tuple[int, int], start: int, total: int, progress: Progress
  ):
    """Begins before the first update of this start.

    Args:
      train: the settings of the run.
      max_seq_len: T, of a row.
      evaluation: tokens that it reads, and batches that it computes.
      start: updates made before.
      total: the run's last.
      progress: where to show it.
    """
    self._train, self._sizes, self._progress = train, (max_seq_len, evaluation), progress
    self._start, self._total = start, total
    self._seen, self._time = 0, 0.0

  def __call__(self, index: Any, loss: Any) -> None:
    """Takes the number of a micro-batch in its update, and its part of the loss of the update, nats a token."""
    of, now = self._train.accumulation_steps, time.monotonic()
    done = self._start + self._seen / of
    self._seen += 1
    if self._seen == 2:
      said = describe_times(self._train, *self._sizes, self._total - self._start, now - self._time)
      self._progress.say(said)
    note = f'micro-batch {int(index) + 1}/{of}  loss about {float(loss) * of:.3f}'
    at_once = 0 if self._seen == 1 else None
    self._progress.update(STAGE, done, self._total, note, shown=f'update {int(done) + 1}/{self._total}', every=at_once)
    self._time = now


def describe_times(
  train: TrainConfig, max_seq_len: int, evaluation: tuple[int, int], updates: int, seconds: float
) -> str:
  """Says how long an update and the rest of a run take, and how to make a run of minutes.

  Args:
    train: the settings of the run.
    max_seq_len: T, of a row.
    evaluation: tokens that it reads, and batches that it computes.
    updates: that are to be made.
    seconds: measured, of one micro-batch.
  """
  update = seconds * train.accumulation_steps
  valid_tokens, batches = evaluation
  said = (
    f'Timed on this machine: a micro-batch of {train.batch_size} x {max_seq_len} tokens takes {seconds:.1f} s, so an '
    f'update of {train.accumulation_steps} takes {format_seconds(update)}, and the {updates:,} updates left take '
    f'{format_seconds(updates * update)}. Each evaluation of {valid_tokens:,} tokens takes about '
    f'{format_seconds(FORWARD_SHARE * seconds * batches)} more.'
  )
  rows = min(8, train.batch_size)
  fewer = int(SHORT_RUN_SECONDS * train.batch_size / (seconds * rows))
  if updates * update < 2 * SHORT_RUN_SECONDS or fewer < 1:
    return said
  warmup = f' --config.train.warmup_steps={fewer // 10}' if train.warmup_steps > fewer // 2 else ''
  return (
    f'{said}\nFor a run of {SHORT_RUN_SECONDS // 60} minutes here, and its evaluation, press Ctrl-C twice and add to '
    f'the command: --workdir out/short --config.train.batch_size={rows} --config.train.accumulation_steps=1 '
    f'--config.train.max_steps={fewer}{warmup}\nA small model learns more in that time: --config configs/quickstart.py'
  )
