"""What a person sees while a model trains: a bar with the time left, or plain lines where stdout is no terminal."""

import contextlib
import math
import sys
import time
from collections.abc import Mapping
from typing import Any, TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from mmjax.config import TrainConfig

LINE_SECONDS = 30  # between lines about micro-batches
SHORT_RUN_SECONDS = 300  # of the run that is proposed where a run takes long


class Progress:
  """Shows steps, loss, tokens/s, learning rate and time left. A display that breaks never ends a run."""

  def __init__(self, total_steps: int, stream: TextIO | None = None, *, quiet: bool = False):
    """Starts the display.

    Args:
      total_steps: the run's last step.
      stream: where to show it; None: stdout.
      quiet: show nothing.
    """
    self._total_steps = total_steps
    self._stream = stream or sys.stdout
    # Step and time of the first update: what came before was compiling, or another start of the run.
    self._first: tuple[float, float] | None = None
    self._last_line = -math.inf
    self._bar = None
    self._quiet = quiet
    if self._stream.isatty() and not quiet:
      columns = (TextColumn('step'), MofNCompleteColumn(), BarColumn(), TextColumn('{task.fields[shown]}'))
      console = Console(file=self._stream)
      self._bar = Bar(*columns, TimeRemainingColumn(compact=True), console=console, speed_estimate_period=600)
      self._task = self._bar.add_task('train', total=total_steps, shown='compiling')
      self._bar.start()

  def update(self, metrics: Mapping[str, Any]) -> None:
    """Shows a step's metrics: 'step', 'loss', 'learning_rate', 'tokens_per_second'."""
    shown = (
      f'loss {metrics["loss"]:.4f}  lr {metrics["learning_rate"]:.2e}  {metrics["tokens_per_second"]:,.0f} tokens/s'
    )
    if not self._move_bar(metrics['step'], shown):
      self._print(f'step {metrics["step"]}/{self._total_steps}  {shown}  {self._time_left(metrics["step"])}')

  def within(self, done: float, shown: str) -> None:
    """Shows that an update is under way: `done` updates, a fraction among them. Without a terminal, now and then."""
    if not self._move_bar(done, shown) and time.monotonic() - self._last_line > LINE_SECONDS:
      self._print(f'update {int(done) + 1}/{self._total_steps}  {shown}  {self._time_left(done)}')

  def message(self, text: str) -> None:
    """Prints a line above the bar."""
    if self._bar is not None:
      with contextlib.suppress(OSError):  # the terminal is gone
        self._bar.console.print(text, markup=False, highlight=False)
    else:
      self._print(text)

  def close(self) -> None:
    """Ends the display."""
    if self._bar is not None:
      with contextlib.suppress(OSError):
        self._bar.stop()
      self._bar = None

  def _move_bar(self, done: float, shown: str) -> bool:
    """Moves the bar, where there is one; the first move begins to count the time."""
    if is_first := self._first is None:
      self._first = (done, time.monotonic())
    if self._bar is None:
      return False
    with contextlib.suppress(OSError):
      if is_first:
        self._bar.reset(self._task, completed=done, shown=shown)
      self._bar.update(self._task, completed=done, shown=shown)
    return True

  def _time_left(self, step: float) -> str:
    done, seconds = step - self._first[0], time.monotonic() - self._first[1]
    return f'{format_seconds((self._total_steps - step) * seconds / done)} left' if done > 0 else ''

  def _print(self, text: str) -> None:
    if self._quiet:
      return
    self._last_line = time.monotonic()
    with contextlib.suppress(OSError):  # the reader of the pipe is gone, or the disk behind it is full
      print(text, file=self._stream, flush=True)


class MicroBatchWatch:
  """Hears of every micro-batch of a run with slow updates; moves the display, and says once how long all will take."""

  def __init__(self, train: TrainConfig, max_seq_len: int, start: int, total: int, progress: Progress):
    """Begins before the first update of this start.

    Args:
      train: the settings of the run.
      max_seq_len: T, of a row.
      start: updates made before.
      total: the run's last.
      progress: where to show it.
    """
    self._train, self._max_seq_len, self._progress = train, max_seq_len, progress
    self._start, self._total = start, total
    self._seen, self._time = 0, 0.0

  def __call__(self, index: Any, loss: Any) -> None:
    """Takes the number of a micro-batch in its update, and its part of the loss of the update, nats a token."""
    of, now = self._train.accumulation_steps, time.monotonic()
    self._seen += 1
    shown = f'micro-batch {int(index) + 1}/{of}  loss about {float(loss) * of:.3f}'
    if self._seen == 2:
      self._progress.message(
        describe_times(self._train, self._max_seq_len, self._total - self._start, now - self._time)
      )
    self._progress.within(self._start + (self._seen - 1) / of, shown)
    self._time = now


def describe_times(train: TrainConfig, max_seq_len: int, updates: int, seconds: float) -> str:
  """Says how long an update and the rest of a run take, and how to make a run of minutes.

  Args:
    train: the settings of the run.
    max_seq_len: T, of a row.
    updates: that are to be made.
    seconds: measured, of one micro-batch.
  """
  update = seconds * train.accumulation_steps
  said = (
    f'Timed on this machine: a micro-batch of {train.batch_size} x {max_seq_len} tokens takes {seconds:.1f} s, so an '
    f'update of {train.accumulation_steps} takes {format_seconds(update)}, and the {updates:,} updates to come '
    f'{format_seconds(updates * update)}, evaluations aside.'
  )
  rows = min(8, train.batch_size)
  fewer = int(SHORT_RUN_SECONDS * train.batch_size / (seconds * rows))
  if updates * update < 2 * SHORT_RUN_SECONDS or fewer < 1:
    return said
  return (
    f'{said}\nFor a run of {SHORT_RUN_SECONDS // 60} minutes here, press Ctrl-C twice and add to the command: '
    f'--workdir out/short --config.train.batch_size={rows} --config.train.accumulation_steps=1 '
    f'--config.train.max_steps={fewer}\nA small model learns more in that time: --config configs/quickstart.py'
  )


def format_seconds(seconds: float) -> str:
  """Returns '2 h 05 min', '5 min 10 s' or '12 s'."""
  minutes, rest = divmod(round(seconds), 60)
  if minutes < 1:
    return f'{rest} s'
  hours, minutes = divmod(minutes, 60)
  return f'{hours} h {minutes:02d} min' if hours else f'{minutes} min {rest:02d} s'
