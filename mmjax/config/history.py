"""Settings that came and went, so that the config.json of an older run stays readable."""

from collections.abc import Mapping
from typing import Any

from mmjax.config.schema import SETTINGS
from mmjax.config.setting import flatten
from mmjax.config.wording import quote
from mmjax.errors import UserError

# Settings that no run of ours was better for, and the value at which they did nothing; None: none matters. How weights
# are read has no part in these, but for READING, so that any run can be read; it goes on only where it was trained
# without them.
REMOVED = {
  'memory.revive_after': 0,
  'memory.revive_noise': None,
  'memory.revive_keys': None,
  'memory.keys_init': 'normal',
  'memory.balance_loss_weight': 0.0,
  'memory.bank_grad_clip': 0.0,
  'runtime.scan_layers': None,
  'memory.value_conv': 0,
}
READING = ('memory.value_conv',)
REMOVED_CHOICES = {'memory.query_key_norm': 'layer_norm', 'memory.score_activation': 'none'}  # these change the reading
LAST_WITH = {'memory.value_conv': 'c5a56c4'}  # the last commit that has a setting
LAST_WITH_REMOVED = '1e0ca4d'  # and all others


def gone_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
  """Returns the settings of a config.json that mattered in its run and that mmjax no longer has, by name."""
  flat = flatten(settings)
  did = {name: flat.get(name, neutral) for name, neutral in REMOVED.items() if neutral is not None}
  return {name: value for name, value in did.items() if value != REMOVED[name]}


def as_of_today(settings: Any, *, to_train: bool) -> Any:
  """Returns the content of a config.json with the settings that came after it, and without those that went.

  Args:
    settings: as it was read.
    to_train: whether something is to be trained with it, and not only read.

  Raises:
    UserError: if a setting that went matters.
  """
  if not isinstance(settings, Mapping):
    return settings
  if to_train and (gone := gone_settings(settings)):
    name, value = next(iter(gone.items()))
    last = LAST_WITH.get(name, LAST_WITH_REMOVED)
    raise UserError(f'{name}={quote(value)}{removed_remark(name)}; commit {last} trains with it')
  for name, value in flatten(settings).items():
    if removed_remark(name, value) and (name not in REMOVED or (name in READING and value != REMOVED[name])):
      last = LAST_WITH.get(name, LAST_WITH_REMOVED)
      raise UserError(f'{name}={quote(value)}{removed_remark(name, value)}; commit {last} reads it')
  today = {name: dict(value) if isinstance(value, Mapping) else value for name, value in settings.items()}
  sections = {name: value for name, value in today.items() if isinstance(value, dict)}
  for name in REMOVED:
    section, field = name.split('.')
    sections.get(section, {}).pop(field, None)
  for name, setting in SETTINGS.items():
    section, _, field = name.rpartition('.')
    if setting.before is not None and section in sections:
      sections[section].setdefault(field, setting.before)
  return today


def removed_remark(name: str, choice: Any = None) -> str:
  """Returns what to say of a setting, or a choice for one, that went; '' of any other."""
  gone = name in REMOVED or (choice is not None and REMOVED_CHOICES.get(name) == choice)
  return ': mmjax no longer has it, since no run was clearly better for it' if gone else ''
