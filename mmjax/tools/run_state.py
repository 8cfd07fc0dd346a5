"""How far a run came, read from its directory while it may still be running; nothing is locked or changed."""

import json
import time
from pathlib import Path
from typing import Any, NamedTuple

from mmjax.config import Config
from mmjax.data.loader import count_rows, steps_of_epochs
from mmjax.files import read_json
from mmjax.run.checkpoint import Checkpoints
from mmjax.training.progress import format_seconds

TAIL_BYTES = 1 << 17  # of metrics.jsonl: some lines, however many layers have a bank


class RunState(NamedTuple):
  """The step that a run would go on from, and its last; None where its data were not prepared yet."""

  step: int
  total: int | None

  @property
  def finished(self) -> bool:
    """Whether every step is done and saved."""
    return self.total is not None and self.step >= self.total


def run_state(path: Path, config: Config) -> RunState:
  """Reads how far the run in a directory came; the directory need not exist.

  Of a finished run the checkpoints may have been taken away, all of them: then its last evaluation counts.

  Args:
    path: run directory.
    config: its settings.
  """
  total, steps = planned_steps(path, config), Checkpoints(path, read_only=True).steps()
  if not (path / 'checkpoints').exists():
    reports = last_reports(path)
    steps = [reports['eval']['step']] if 'eval' in reports and reports['eval']['step'] == total else []
  return RunState(steps[-1] if steps else 0, total)


def planned_steps(path: Path, config: Config) -> int | None:
  """Returns a run's last step, or None where only its data would tell and they were not prepared yet."""
  train, index = config.train, path / 'data.json'
  if train.max_steps or not index.exists():
    return train.max_steps or None
  rows = count_rows(read_json(index)['splits']['train'], config.model.max_seq_len, config.data.layout)
  return steps_of_epochs(rows, train.update_rows, train.epochs)


def last_reports(path: Path) -> dict[str, dict[str, Any]]:
  """Returns the newest record of each kind, 'train', 'eval', among the last lines of metrics.jsonl."""
  try:
    with open(path / 'metrics.jsonl', 'rb') as file:
      file.seek(max(file.seek(0, 2) - TAIL_BYTES, 0))
      lines = file.read().splitlines()
  except OSError:
    return {}
  found = {}
  for line in lines:
    try:
      record = json.loads(line)
      found[record['kind']] = record
    except (ValueError, KeyError, TypeError):  # cut at the front, or half-written at the end
      continue
  return found


class LiveLine:
  """What a terminal shows of a run while it runs."""

  def __init__(self, label: str, path: Path, config: Config):
    self.label, self.path, self.config = label, path, config
    self.total: int | None = None
    self.first: tuple[int, float] | None = None  # step and time of the first report of this start
    self.begun = time.time()

  def text(self) -> str:
    """Returns name, steps, loss and the time left."""
    reports = last_reports(self.path)
    if 'train' not in reports or (self.path / 'metrics.jsonl').stat().st_mtime < self.begun:
      return f'{self.label}  starting'
    train = reports['train']
    self.total = self.total or planned_steps(self.path, self.config)
    self.first = self.first or (train['step'], time.monotonic())
    done, seconds = train['step'] - self.first[0], time.monotonic() - self.first[1]
    left = ''
    if done and self.total:
      left = f'  {format_seconds((self.total - train["step"]) * seconds / done)} left'
    loss = 'not finite' if train['loss'] is None else f'{train["loss"]:.4f}'
    return f'{self.label}  step {train["step"]:,}/{self.total or 0:,}  loss {loss}{left}'
