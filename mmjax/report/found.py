"""What a run is, read from its directory while it may still be running; nothing is locked or changed.

Reports, comparisons and sweeps all ask a `FoundRun`. Each file is read when something in it is first asked for.
"""

import functools
import json
from pathlib import Path
from typing import Any

from mmjax.config import Config, gone_settings
from mmjax.data.loader import count_rows, steps_of_epochs
from mmjax.errors import UserError
from mmjax.files import read_json
from mmjax.run.directory import RunDir, refuse_links_of_run
from mmjax.run.identity import BANK_SHA256
from mmjax.run.log import read_metrics

# What sweep.json says of a run: how it ended, after what, and in how many seconds of all its starts.
ENDED = {'state', 'exit_code', 'step', 'tokens', 'train_loss', 'loss', 'bits_per_byte', 'seconds', 'said', 'time'}
TAIL_BYTES = 1 << 17  # of metrics.jsonl: some lines, however many layers have a bank


class FoundRun:
  """A run as its directory holds it; the directory need not exist where the settings are given.

  Attributes:
    dir: the directory.
    path: its path.
  """

  def __init__(self, path: str | Path, config: Config | None = None):
    """Names a directory, and the settings where they are known.

    Raises:
      UserError: if a link in a run's directory leads out of it.
    """
    self.dir = RunDir(path)
    self.path = self.dir.path
    refuse_links_of_run(self.dir)
    if config:
      self.config = config

  @functools.cached_property
  def config(self) -> Config:
    """The settings.

    Raises:
      UserError: if the directory is no run, or they are damaged.
    """
    if not self.dir.config_path.is_file():
      raise UserError(f'{self.path} is not a run directory: {self.dir.config_path.name} is missing')
    return self.dir.read_config()

  @functools.cached_property
  def gone(self) -> dict[str, Any]:
    """Settings that mattered in the run and that mmjax no longer has."""
    return gone_settings(read_json(self.dir.config_path)) if self.dir.config_path.is_file() else {}

  @functools.cached_property
  def records(self) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl."""
    self.step  # noqa: B018 - first: a run that ends meanwhile counts as one that has not
    return read_metrics(self.dir.metrics_path)

  def of_kind(self, kind: str) -> list[dict[str, Any]]:
    """Returns the records of a kind: 'train', 'eval' or 'skipped'."""
    return [record for record in self.records if record['kind'] == kind]

  @property
  def finite_evals(self) -> list[dict[str, Any]]:
    """The evaluations with a finite loss."""
    return [record for record in self.of_kind('eval') if record['loss'] is not None]

  @property
  def last_eval(self) -> dict[str, Any] | None:
    """The evaluation that counts, if there is one: of a finished run that of its last step, of others the last one.

    Its loss is finite. A finished run has none if that is lost, or not finite.
    """
    return next((e for e in reversed(self.finite_evals) if not self.finished or e['step'] == self.total), None)

  @functools.cached_property
  def history(self) -> dict[str, Any]:
    """What run.json says: identity, starts and, where it is known, init_from."""
    return self.dir.read_record()

  @functools.cached_property
  def index(self) -> dict[str, Any] | None:
    """What data.json says of the text; None where it was not prepared yet."""
    return _optional(self.path / 'data.json')

  @functools.cached_property
  def evaluation(self) -> dict[str, Any] | None:
    """What eval.py found; None where it was never called."""
    return _optional(self.path / 'eval.json')

  @property
  def origin(self) -> dict[str, Any]:
    """What must be equal for its losses to be compared with those of others."""
    found = {name: self.history['identity'][name] for name in ('data_sha256', 'tokenizer_sha256')}
    found['data.layout'] = self.config.data.layout
    evals = self.of_kind('eval')  # of which not the bytes count: earlier versions counted some otherwise
    return found | {'validation_tokens': evals[0]['tokens'] if evals else None}

  @property
  def bank(self) -> str:
    """Which file its bank started from: its hash, or its name in runs that did not note that."""
    return self.history['identity'].get(BANK_SHA256, self.config.memory.bank_file)

  @property
  def changed(self) -> list[str]:
    """Settings of its schedule that a later start changed, as 'name old -> new'."""
    return [change for start in self.history['starts'] for change in start.get('changed', ())]

  @property
  def devices(self) -> str:
    """What it ran on at its last start."""
    return where(self.history['starts'][-1])

  @functools.cached_property
  def total(self) -> int | None:
    """Its last step; None where only its data would tell and they were not prepared yet."""
    train = self.config.train
    if train.max_steps or self.index is None:
      return train.max_steps or None
    entry, model = self.index['splits']['train'], self.config.model
    rows = count_rows(entry, model.max_seq_len, self.config.data.layout)
    return steps_of_epochs(rows, train.update_rows, train.epochs)

  @property
  def tokens(self) -> float:
    """How many tokens it learns to predict up to its last step, padding left out: as its last report says."""
    return sum(report['tokens'] / report['step'] * (self.total or 0) for report in self.of_kind('train')[-1:])

  @functools.cached_property
  def step(self) -> int:
    """The step that it would go on from.

    Of a finished run the checkpoints may have been taken away, all of them: then its last evaluation counts.
    """
    if steps := self.dir.steps():
      return max(steps)
    evaluated, saved = self.last_reports().get('eval', {'step': 0})['step'], self.dir.newest_step
    was_saved = saved == evaluated or (saved is None and not self.dir.checkpoints_path.exists())
    return evaluated if evaluated == self.total and was_saved else 0

  @property
  def finished(self) -> bool:
    """Whether every step is done and saved."""
    return self.total is not None and self.step >= self.total

  def last_reports(self) -> dict[str, dict[str, Any]]:
    """Returns the newest record of each kind, 'train', 'eval', among the last lines that metrics.jsonl has now."""
    try:
      with open(self.dir.metrics_path, 'rb') as file:
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


def read_ended(folder: Path) -> dict[str, dict[str, Any]]:
  """Returns how the runs of a sweep ended, by name, as sweep.json in their folder says; {} where there is none.

  Raises:
    UserError: if it is damaged.
  """
  path = folder / 'sweep.json'
  ended = read_json(path).get('runs') if path.is_file() else {}
  if not isinstance(ended, dict) or not all(isinstance(e, dict) and e.keys() >= ENDED for e in ended.values()):
    raise UserError(f'{path} is not what a sweep wrote; remove it: the sweep writes it anew')
  return ended


def where(start: dict[str, Any]) -> str:
  """Says what a start of run.json ran on."""
  return f'{start["device_count"]} x {start["device"]} ({start["host"]})'


def _optional(path: Path) -> dict[str, Any] | None:
  return read_json(path) if path.exists() else None
