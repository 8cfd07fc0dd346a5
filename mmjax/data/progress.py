"""How far a pass over files is: its share of the bytes on disk, its tokens and its speed."""

import time
from collections.abc import Sequence
from pathlib import Path

from mmjax.console import Progress


class Meter:
  """Sums up a pass over files and shows it."""

  def __init__(self, stage: str, files: Sequence[Path], progress: Progress):
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
