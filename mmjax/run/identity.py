"""What makes a run the run it is: settings that may not change when it goes on, or when its weights are trained on; the
bank file that it started from, recorded by its hash in run.json and checked wherever it is used again.
"""

import shlex
from pathlib import Path
from typing import Any

from mmjax.config import Config, flatten, idle_settings
from mmjax.data.bank_file import read_texts, texts_path
from mmjax.errors import UserError
from mmjax.files import sha256_of
from mmjax.model.params import build_abstract
from mmjax.run.directory import RunDir

BANK_SHA256, TEXTS_SHA256 = 'bank_sha256', 'bank_texts_sha256'  # in run.json
# Which text it is: on resume its hash must be that of the first start, under whatever names.
TEXT = ('data.train_files', 'data.valid_files', 'data.valid_fraction', 'data.text_key', 'data.tokenizer')
# On resume: these may differ, all other settings of train need --allow_config_change, everything else must be equal.
FREE_SETTINGS = (
  *TEXT, 'memory.bank_file', 'memory.knowledge_length', 'experiment', 'data.workers', 'data.on_bad_line',
  'data.prepared_dir', 'train.log_interval', 'train.eval_interval', 'train.checkpoint_interval',
  'train.max_skipped_updates', 'train.profile_steps',
)  # fmt: skip
FREE_SECTIONS = ('runtime.',)
CUT = ('data.layout', 'data.isolate_documents')  # how text is cut into rows, and so how a model learns to read
# How a model learns, which does not change what its parameters mean.
LEARNING = ('model.dropout', 'model.aux_loss_weight', 'memory.row_dropout')
MICRO_BATCHES = ('train.batch_size', 'train.accumulation_steps')  # their product, the rows of an update, is fixed
FIXED_OF_TRAIN = (*MICRO_BATCHES, 'train.dtype', 'train.optimizer', 'train.parameters')


def settings_changed(old: Config, new: Config) -> tuple[list[str], list[str]]:
  """Lists as 'name old -> new' the differences that would make a run another run, and those of its schedule.

  Settings that do nothing in either may differ: a command of an earlier version may have one that is refused today.
  """
  fixed, schedule, idle = [], [], idle_settings(old).keys() & idle_settings(new).keys()
  free = (*FREE_SETTINGS, *MICRO_BATCHES) if old.train.update_rows == new.train.update_rows else FREE_SETTINGS
  for name, (before, after) in differences(old, new).items():
    if name not in free and name not in idle and not name.startswith(FREE_SECTIONS):
      is_schedule = name.startswith('train.') and name not in FIXED_OF_TRAIN
      (schedule if is_schedule else fixed).append(f'{name} {before!r} -> {after!r}')
  return fixed, schedule


def differences(old: Config, new: Config) -> dict[str, tuple[Any, Any]]:
  """Returns before and after of every setting that differs, by its name."""
  before, after = flatten(old.to_dict()), flatten(new.to_dict())
  return {name: (before[name], after[name]) for name in before if before[name] != after[name]}


def names_other_text(old: Config, new: Config) -> bool:
  """Whether settings may mean another text, which only its hash tells."""
  return not differences(old, new).keys().isdisjoint(TEXT)


def compare_configs(old: Config, new: Config, allow_config_change: bool) -> None:
  """Refuses to resume a run with settings that would make it another run.

  Raises:
    UserError: listing every difference as old -> new; those of the schedule only without `allow_config_change`.
  """
  fixed, schedule = settings_changed(old, new)
  if fixed:
    keep = f' ({" x ".join(MICRO_BATCHES)} must stay {old.train.update_rows})'
    keep = keep if any(text.startswith(MICRO_BATCHES) for text in fixed) else ''
    raise UserError(
      f'the run was started with other settings: {"; ".join(fixed)}{keep}; undo them or choose another --workdir'
    )
  if schedule and not allow_config_change:
    raise UserError(
      f'the run was started with another schedule: {"; ".join(schedule)}; --allow_config_change accepts that '
      '(in Python: allow_config_change=True)'
    )


def compare_models(old: Config, new: Config, source: str) -> None:
  """Refuses to read the parameters of a model under settings that give them another shape or another meaning.

  Whether a setting does is not looked up: the model is built with it, for its shapes alone.

  Args:
    old: settings that the parameters were made with.
    new: settings to train them on with.
    source: the run directory or the file that holds them, for the message.

  Raises:
    UserError: listing every such setting as old -> new, and what to type.
  """
  wrong = {
    name: (before, after)
    for name, (before, after) in differences(old, new).items()
    if name.startswith(('model.', 'memory.')) and name not in LEARNING and not _same_model(old, name, after)
  }
  if wrong:
    said = '; '.join(f'{name} {before} -> {after}' for name, (before, after) in wrong.items())
    flags = ' '.join(shlex.quote(f'--config.{name}={before}') for name, (before, _) in wrong.items())
    own = Path(source, 'config.json')
    shorter = f', or begin with --config {shlex.quote(str(own))}' if own.exists() else ''
    raise UserError(f'the model in {source} has other settings than the config: {said}; type {flags}{shorter}')


def _same_model(config: Config, name: str, value: Any) -> bool:
  try:
    return build_abstract(config.with_settings({name: value})) == build_abstract(config)
  except ValueError:  # a setting that does not go with the others at all
    return False


def bank_identity(config: Config) -> dict[str, str]:
  """Returns the hashes of the bank file that the settings name and of its texts, of those that are there."""
  return {name: sha256_of(path) for name, path in _bank_files(config).items() if path.is_file()}


def check_bank(run: RunDir, config: Config) -> None:
  """Raises UserError if the bank file that the settings name is there and is not what the run started from.

  Going on needs no such file: the checkpoints hold the bank.
  """
  found, recorded = bank_identity(config).get(BANK_SHA256), run.read_record()['identity'].get(BANK_SHA256)
  if found and recorded and found != recorded:
    raise UserError(
      f"memory.bank_file='{config.memory.bank_file}' is not the bank that the run in {run.path} started from (sha256 "
      f'{found[:12]}..., not {recorded[:12]}...); name that file, or one that does not exist '
      '(the checkpoints hold the bank), or choose another --workdir'
    )


def bank_texts(run: RunDir, config: Config) -> tuple[dict[int, str], str]:
  """Returns the texts that the rows of a run's bank started from, where they are known, and what is to be said of that.

  Raises:
    UserError: if their file is damaged.
  """
  path = _bank_files(config).get(TEXTS_SHA256)
  if path is None:
    return {}, ''
  if not path.is_file():
    return {}, f"The texts that the rows started from are not shown: there is no '{path}'."
  recorded = run.read_record()['identity'].get(TEXTS_SHA256)
  if recorded is None:
    return read_texts(path), f"{_unrecorded(run)}: the texts shown are those in '{path}' now."
  if sha256_of(path) != recorded:
    return {}, f"The texts that the rows started from are not shown: '{path}' is not what it was when the run started."
  return read_texts(path), ''


def bank_remark(run: RunDir, config: Config) -> str:
  """Returns a sentence about the file that a run's bank started from; '' where there is none."""
  if not _bank_files(config):
    return ''
  recorded, now = run.read_record()['identity'].get(BANK_SHA256), bank_identity(config).get(BANK_SHA256)
  if recorded is None:
    return f"{_unrecorded(run)}; the settings name '{config.memory.bank_file}'."
  state = 'is gone' if now is None else 'is still that file' if now == recorded else 'is another file now'
  return f"The bank started from the file with the hash bank_sha256; '{config.memory.bank_file}' {state}."


def _bank_files(config: Config) -> dict[str, Path]:
  if config.memory.bank_init != 'file':
    return {}
  path = Path(config.memory.bank_file)
  return {BANK_SHA256: path, TEXTS_SHA256: texts_path(path)}


def _unrecorded(run: RunDir) -> str:
  return f'{run.run_path} does not say which bank file the run started from'
