"""Settings that came and went, so that the config.json of an older run stays readable."""

from collections.abc import Mapping
from typing import Any

from mmjax.config.wording import quote
from mmjax.errors import UserError

# What runs did before a setting existed. These are no defaults, which configs/base.py alone states: they stay when a
# default changes.
BEFORE = {
  'memory.bank_update': 'dense',
  'memory.ngram_layers': '',
  'memory.ngrams': '1',
  'memory.key_dim': 0,
  'memory.bag_gate': True,
  'memory.selection_bias': False,
  'train.embedding_lr_multiplier': 1.0,
  'train.max_loss_factor': 0.0,
  'train.profile_steps': 0,
  'runtime.scan_layers': False,
  'runtime.triton_gemm': False,
  'runtime.coordinator': '',
  'runtime.num_processes': 1,
  'runtime.process_id': 0,
}
# Settings that no run of ours was better for, and the value at which they did nothing. None: it does nothing by itself.
REMOVED = {
  'memory.revive_after': 0,
  'memory.revive_noise': None,
  'memory.revive_keys': None,
}
LAST_WITH_REMOVED = '1e0ca4d'  # the last commit that has them


def as_of_today(settings: Any) -> Any:
  """Returns the content of a config.json with the settings that came after it, and without those that went.

  Raises:
    UserError: if a setting that went did something in that run.
  """
  if not isinstance(settings, Mapping):
    return settings
  settings = {name: dict(value) if isinstance(value, Mapping) else value for name, value in settings.items()}
  for name, value in BEFORE.items():
    section, field = name.split('.')
    if isinstance(settings.get(section), dict):
      settings[section].setdefault(field, value)
  for name, neutral in REMOVED.items():
    section, field = name.split('.')
    if isinstance(settings.get(section), dict) and field in settings[section]:
      value = settings[section].pop(field)
      if neutral is not None and value != neutral:
        raise UserError(f'{name}={quote(value)}{removed_remark(name)}; commit {LAST_WITH_REMOVED} reads this run')
  return settings


def removed_remark(name: str) -> str:
  """Returns what to say of a setting that went, and '' of any other."""
  return ': mmjax no longer has it, since no run was better for it' if name in REMOVED else ''
