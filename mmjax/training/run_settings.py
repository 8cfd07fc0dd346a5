"""Which settings of a run may change when it goes on, and what config.json of an earlier version left unsaid."""

from collections.abc import Mapping
from typing import Any

from mmjax.config import Config, flatten
from mmjax.errors import UserError

# Which text it is: on resume its hash must be that of the first start, under whatever names.
TEXT = ('data.train_files', 'data.valid_files', 'data.valid_fraction', 'data.text_key', 'data.tokenizer')
# On resume: these may differ, all other settings of train need --allow_config_change, everything else must be equal.
FREE = (
  *TEXT, 'experiment', 'data.workers', 'data.on_bad_line', 'data.prepared_dir', 'train.log_interval',
  'train.eval_interval', 'train.checkpoint_interval', 'train.max_skipped_updates', 'train.profile_steps',
)  # fmt: skip
FREE_SECTIONS = ('runtime.',)
# What an imported model does not bind: how it started, and how it learns.
FREE_OF_IMPORTS = (
  'model.dropout', 'model.aux_loss_weight', 'memory.keys_init', 'memory.knowledge_length', 'memory.balance_loss_weight',
  'memory.revive_after', 'memory.revive_noise', 'memory.revive_keys',
)  # fmt: skip
# What runs did before a setting existed, so that a config.json from then stays readable. These are no defaults, which
# configs/base.py alone states: they stay when a default changes.
BEFORE = {
  'memory.bank_update': 'dense',
  'memory.ngram_layers': '',
  'memory.ngrams': '1',
  'memory.key_dim': 0,
  'memory.bag_gate': True,
  'memory.revive_after': 0,
  'memory.selection_bias': False,
  'memory.revive_noise': 0.1,
  'memory.revive_keys': True,
  'train.embedding_lr_multiplier': 1.0,
  'train.max_loss_factor': 0.0,
  'train.profile_steps': 0,
  'runtime.scan_layers': False,
  'runtime.triton_gemm': False,
  'runtime.coordinator': '',
  'runtime.num_processes': 1,
  'runtime.process_id': 0,
}
BATCH = ('train.batch_size', 'train.accumulation_steps', 'train.dtype')


def settings_changed(old: Config, new: Config) -> tuple[list[str], list[str]]:
  """Lists as 'name old -> new' the differences that would make a run another run, and those of its schedule."""
  fixed, schedule = [], []
  before, after = flatten(old.to_dict()), flatten(new.to_dict())
  for name in before:
    if before[name] == after[name] or name in FREE or name.startswith(FREE_SECTIONS):
      continue
    is_schedule = name.startswith('train.') and name not in BATCH
    (schedule if is_schedule else fixed).append(f'{name} {before[name]!r} -> {after[name]!r}')
  return fixed, schedule


def names_other_text(old: Config, new: Config) -> bool:
  """Whether settings may mean another text, which only its hash tells."""
  before, after = flatten(old.to_dict()), flatten(new.to_dict())
  return any(before[name] != after[name] for name in TEXT)


def compare_configs(old: Config, new: Config, allow_config_change: bool) -> None:
  """Refuses to resume a run with settings that would make it another run.

  Raises:
    UserError: listing every difference as old -> new; those of the schedule only without `allow_config_change`.
  """
  fixed, schedule = settings_changed(old, new)
  if fixed:
    raise UserError(
      f'the run was started with other settings: {"; ".join(fixed)}; undo them or choose another --workdir'
    )
  if schedule and not allow_config_change:
    raise UserError(
      f'the run was started with another schedule: {"; ".join(schedule)}; --allow_config_change accepts that'
    )


def compare_models(old: Config, new: Config) -> None:
  """Refuses to train an imported model under settings that describe another architecture.

  Raises:
    UserError: listing every difference as old -> new.
  """
  before, after = flatten(old.to_dict()), flatten(new.to_dict())
  names = [n for n in before if n.startswith(('model.', 'memory.')) and not n.startswith('memory.bank_')]
  names = [n for n in names if n not in FREE_OF_IMPORTS]
  differences = list_differences(*({name: settings[name] for name in names} for settings in (before, after)))
  if differences:
    raise UserError(f'the imported model has other settings: {"; ".join(differences)}; give it those that it has')


def with_settings_before(settings: Any) -> Any:
  """Returns the content of a config.json with the settings that did not exist when it was written."""
  if not isinstance(settings, Mapping):
    return settings
  settings = {name: dict(value) if isinstance(value, Mapping) else value for name, value in settings.items()}
  for name, value in BEFORE.items():
    section, _, field = name.partition('.')
    if isinstance(settings.get(section), dict):
      settings[section].setdefault(field, value)
  return settings


def list_differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
  """Lists what differs as 'name old -> new'."""
  return [f'{name} {old.get(name)} -> {new.get(name)}' for name in {**old, **new} if old.get(name) != new.get(name)]
