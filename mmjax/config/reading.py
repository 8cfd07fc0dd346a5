"""From a config file and overrides of the command line, or from config.json, to a checked Config."""

import ast
import dataclasses
import json
import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from mmjax.config.history import as_of_today, removed_remark
from mmjax.config.idle import idle_settings
from mmjax.config.paths import expand_home, user_path
from mmjax.config.python_files import call_python_file
from mmjax.config.rules import check_fields, check_together
from mmjax.config.schema import SETTINGS, Config
from mmjax.config.setting import Setting, flatten
from mmjax.config.wording import nearest, nearest_file, quote, short
from mmjax.errors import UserError


def load_config(path: str, overrides: Sequence[str] = (), used: Collection[str] = ()) -> Config:
  """Reads a config file and applies command-line overrides.

  A setting that does nothing beside the others is refused, unless it is at its default. Where an override takes away
  what a setting of the file belongs to, as model.sublayer=dense does with a memory, the setting goes with it.

  Args:
    path: a Python file with `get_config() -> ConfigDict`, those of configs/ are found from any folder; or the
      config.json of a run.
    overrides: `--config.section.field=value` arguments; a value is read as the type of the field it replaces.
    used: settings that the caller reads, whatever the model does with them.

  Returns:
    The checked config.

  Raises:
    UserError: if there is no such file, it has no get_config, or a setting is unknown, breaks a rule or does nothing.
  """
  of_file = _read_config_file(path)
  given = dict(_read_override(override) for override in overrides)
  try:
    _build(of_file | {name: SETTINGS[name].default for name in given})
  except UserError as error:
    raise UserError(f'config file {path!r}: {error}') from None
  config, idle = _settle(of_file | given, used)
  of_file_alone = _idle_by_itself(of_file, used) if idle else ()
  for name, (value, why) in idle.items():
    if name in given or name in of_file_alone:
      where = '' if name in given else f'config file {path!r}: '
      raise UserError(f'{where}{name}={quote(value)} does nothing {why}')
  return config


def override_config(config: Config, overrides: Sequence[str], free: Sequence[str]) -> Config:
  """Applies command-line overrides to the settings of a run, where the run leaves them free.

  Args:
    config: as the run has it.
    overrides: `--config.section.field=value` arguments.
    free: names of the settings that may be given.

  Raises:
    UserError: if another one is, or the result breaks a rule.
  """
  given = dict(_read_override(override) for override in overrides)
  if others := [name for name in given if name not in free]:
    raise UserError(f'{others[0]} belongs to the run and cannot be given here; these can: {", ".join(free)}')
  return _settle(flatten(config.to_dict()) | given)[0]


def config_from_dict(settings: Mapping[str, Any]) -> Config:
  """Builds and checks a config from nested dicts, as read from config.json.

  Settings that do nothing are put at their defaults: what they were does not tell one run from another.

  Raises:
    UserError: if a field is missing, unknown, of the wrong type or against a rule.
  """
  return _settle(flatten({name: value for name, value in settings.items() if name != 'sha256'}))[0]


def overrides_of(config: Config, path: str) -> dict[str, Any]:
  """Returns the settings that turn a config file into a config, by name."""
  usual, idle = flatten(load_config(path).to_dict()), idle_settings(config)
  flat = flatten(config.to_dict())
  return {name: value for name, value in flat.items() if value != usual[name] and name not in idle}


def default_settings() -> dict[str, Any]:
  """Returns every setting as a run has it that says nothing of it, by name."""
  return {name: setting.default for name, setting in SETTINGS.items()}


class _Section(ConfigDict):
  """Keeps True out of a float, which ConfigDict takes for 1.0."""

  def __setitem__(self, name: str, value: Any) -> None:
    if isinstance(value, bool) and isinstance(self.get(name), float):
      raise UserError(f'{name}={value} must be a number')
    super().__setitem__(name, value)


def base_config() -> ConfigDict:
  """Returns every setting at its default, to be changed by an experiment's config file."""
  sections = {name: _Section(x) if isinstance(x, dict) else x for name, x in Config().to_dict().items()}
  return _Section(sections)


def _settle(flat: Mapping[str, Any], used: Collection[str] = ()) -> tuple[Config, dict[str, tuple[Any, str]]]:
  """Returns the checked config with settings that do nothing at their defaults, and what they were, and why."""
  config, usual = _build(flat), default_settings()
  check_fields(config)
  idle = {n: (flat[n], why) for n, why in idle_settings(config).items() if flat[n] != usual[n] and n not in used}
  config = _build({**flat, **{name: usual[name] for name in idle}})
  check_together(config)
  return config, idle


def _idle_by_itself(of_file: Mapping[str, Any], used: Collection[str]) -> Collection[str]:
  try:
    return _settle(of_file, used)[1]
  except UserError:  # a file that is no config without overrides
    return ()


def _read_config_file(path: str) -> dict[str, Any]:
  """Returns its settings by name."""
  if path.endswith('.json'):
    settings = _read_json(user_path(path))
    try:
      return flatten(config_from_dict(settings).to_dict())
    except UserError as error:
      raise UserError(f'config file {path!r}: {error}') from None
  settings = call_python_file(path, 'config file', 'get_config', {})
  if not isinstance(settings, ConfigDict):
    kind = type(settings).__name__
    raise UserError(f'config file {path!r}: get_config() must return an ml_collections.ConfigDict, not {kind}')
  try:
    return flatten(settings.to_dict())
  except Exception as error:  # noqa: BLE001 - a placeholder without a value, a name that is no text
    raise UserError(f'config file {path!r} failed: {type(error).__name__}: {error}') from error


def _read_json(path: Path) -> dict[str, Any]:
  try:
    settings = json.loads(path.read_bytes())
  except FileNotFoundError:
    raise UserError(f"no config file '{path}'{nearest_file(path)}") from None
  except (ValueError, RecursionError) as error:
    raise UserError(f"config file '{path}' is not JSON: {error}") from None
  if not isinstance(settings, dict):
    raise UserError(f"config file '{path}' must hold a JSON object of settings, not {quote(settings)}")
  return as_of_today(settings, to_train=True)


def _read_override(override: str) -> tuple[str, Any]:
  """Returns the name of the setting, and its value."""
  name, equals, text = override.removeprefix('--config.').partition('=')
  if not override.startswith('--config.') or not equals:
    raise UserError(
      f'argument {quote(override)} is not understood; --help lists the flags, and a setting looks like '
      '--config.train.batch_size=32'
    )
  return name, _parse_value(name, text, type(_setting(name).default))


def _setting(name: str) -> Setting:
  if name not in SETTINGS:
    raise UserError(f'no setting {quote(name)}{removed_remark(name) or nearest(name, SETTINGS)}')
  return SETTINGS[name]


def _parse_value(name: str, text: str, kind: type) -> Any:
  if kind is str:
    return text
  if kind is bool:
    if text.lower() not in ('true', 'false'):
      raise UserError(f'{name}={quote(text)} must be True or False')
    return text.lower() == 'true'
  try:
    value = None if '#' in text else ast.literal_eval(text)  # which reads over a comment
  except (ValueError, SyntaxError, MemoryError, RecursionError):
    value = None
  if isinstance(value, bool) or not isinstance(value, int | float) or (kind is int and value % 1):
    raise UserError(f'{name}={quote(text)} must be {"a whole number" if kind is int else "a number"}')
  if not value and re.search('[1-9]', text.lower().partition('e')[0]):
    raise UserError(f'{name}={quote(text)} is too close to 0 for a float')
  return _convert(name, value, kind)


def _convert(name: str, value: float, kind: type) -> float:
  try:
    return kind(value)
  except OverflowError:  # a whole number beyond what a float holds
    raise UserError(f'{name}={short(value)} must be a finite number') from None


def _build(flat: Mapping[str, Any]) -> Config:
  values: dict[str, dict[str, Any]] = {}
  for name, value in flat.items():
    kind = type(_setting(name).default)
    if kind is float and (type(value) is int or isinstance(value, float)):  # a NumPy float64 is one
      value = _convert(name, value, float)
    if type(value) is not kind:
      raise UserError(f'{name}={quote(value)} must be of type {kind.__name__}')
    section, _, field = name.rpartition('.')
    values.setdefault(section, {})[field] = expand_home(value) if SETTINGS[name].is_path else value
  if missing := SETTINGS.keys() - flat.keys():
    raise UserError(
      f'setting {min(missing)!r} is missing; a config must have every setting of configs/base.py. If it is a '
      'new one of yours, give it in mmjax/config/schema.py a before=..., its value in runs that were made without it'
    )
  sections = {field.name: field.type for field in dataclasses.fields(Config) if dataclasses.is_dataclass(field.type)}
  return Config(**values.pop(''), **{name: sections[name](**fields) for name, fields in values.items()})
