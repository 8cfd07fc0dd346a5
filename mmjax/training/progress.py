"""What a person sees while a model trains: a bar with the time left, or plain lines where stdout is no terminal."""

import contextlib
import sys
import time
from collections.abc import Mapping
from typing import Any, TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar


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
    self._first: tuple[int, float] | None = None
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
    step, is_first = metrics['step'], self._first is None
    if is_first:
      self._first = (step, time.monotonic())
    if self._bar is None:
      self._print(f'step {step}/{self._total_steps}  {shown}  {self._time_left(step)}')
    elif is_first:
      self._bar.reset(self._task, completed=step, shown=shown)
    else:
      self._bar.update(self._task, completed=step, shown=shown)

  def message(self, text: str) -> None:
    """Prints a line above the bar."""
    if self._bar is not None:
      self._bar.console.print(text, markup=False, highlight=False)
    else:
      self._print(text)

  def close(self) -> None:
    """Ends the display."""
    if self._bar is not None:
      self._bar.stop()
      self._bar = None

  def _time_left(self, step: int) -> str:
    done, seconds = step - self._first[0], time.monotonic() - self._first[1]
    return f'{format_seconds((self._total_steps - step) * seconds / done)} left' if done > 0 else ''

  def _print(self, text: str) -> None:
    if self._quiet:
      return
    with contextlib.suppress(OSError):  # the reader of the pipe is gone, or the disk behind it is full
      print(text, file=self._stream, flush=True)


def format_seconds(seconds: float) -> str:
  """Returns '2 h 05 min', '5 min 10 s' or '12 s'."""
  minutes, rest = divmod(round(seconds), 60)
  if minutes < 1:
    return f'{rest} s'
  hours, minutes = divmod(minutes, 60)
  return f'{hours} h {minutes:02d} min' if hours else f'{minutes} min {rest:02d} s'
