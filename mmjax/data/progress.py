"""Shows how far a long preparation is: a live bar on a terminal, a plain line now and then elsewhere."""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

LINE_SECONDS = 10  # between plain lines


class ProgressSink(Protocol):
  """What a preparation tells about itself."""

  def say(self, message: str) -> None:
    """Shows one line that stays."""

  def update(self, stage: str, done_bytes: int, total_bytes: int, note: str) -> None:
    """Shows how much of a stage is done; `note` is a short extra such as a speed."""

  def close(self) -> None:
    """Ends the display."""


class SilentProgress:
  """Shows nothing."""

  def say(self, message: str) -> None:
    """Does nothing."""

  def update(self, stage: str, done_bytes: int, total_bytes: int, note: str) -> None:
    """Does nothing."""

  def close(self) -> None:
    """Does nothing."""


class ConsoleProgress:
  """Shows a bar where stderr is a terminal, else a plain line every LINE_SECONDS."""

  def __init__(self):
    self._console = Console(stderr=True, highlight=False, soft_wrap=True)
    self._bar: Progress | None = None
    self._stage = ''
    self._last_line_seconds = time.monotonic()

  def say(self, message: str) -> None:
    """Shows one line that stays."""
    self._console.print(message, markup=False)

  def update(self, stage: str, done_bytes: int, total_bytes: int, note: str) -> None:
    """Shows how much of a stage is done."""
    if not self._console.is_terminal:
      if time.monotonic() - self._last_line_seconds >= LINE_SECONDS:
        self._last_line_seconds = time.monotonic()
        self.say(f'{stage}: {done_bytes / max(total_bytes, 1):.0%}  {note}')
      return
    if stage != self._stage:
      self.close()
      columns = (TextColumn('{task.description}'), BarColumn(), TextColumn('{task.percentage:3.0f} %'))
      self._bar = Progress(*columns, TextColumn('{task.fields[note]}'), TimeRemainingColumn(), console=self._console)
      self._bar.add_task(stage, total=total_bytes, note=note)
      self._bar.start()
      self._stage = stage
    self._bar.update(self._bar.task_ids[0], completed=done_bytes, note=note)

  def close(self) -> None:
    """Ends the display."""
    if self._bar is not None:
      self._bar.stop()
    self._bar, self._stage = None, ''


class Meter:
  """Sums up a pass over files and reports its share done, tokens and speed."""

  def __init__(self, stage: str, files: Sequence[Path], progress: ProgressSink):
    self._stage, self._progress = stage, progress
    self._total_bytes = sum(file.stat().st_size for file in files)
    self._read_bytes = self._text_bytes = self._tokens = 0
    self._start_seconds = time.monotonic()

  def read(self, disk_bytes: int) -> None:
    """Notes how much has been read from the disk."""
    self._read_bytes = disk_bytes

  def add(self, text_bytes: int, tokens: int = 0) -> None:
    """Adds text that is done, and shows the sums."""
    self._text_bytes += text_bytes
    self._tokens += tokens
    speed = self._text_bytes / 1e6 / max(time.monotonic() - self._start_seconds, 1e-3)
    note = f'{self._tokens / 1e6:.1f} M tokens, {speed:.1f} MB/s' if self._tokens else f'{speed:.1f} MB/s'
    self._progress.update(self._stage, self._read_bytes, self._total_bytes, note)
