"""From a config file and overrides of the command line, or from config.json, to a checked Config."""

import ast
import contextlib
import dataclasses
import importlib.util
import inspect
import json
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from mmjax.config.history import as_of_today, removed_remark
from mmjax.config.idle import idle_settings
from mmjax.config.paths import expand_home, user_path
from mmjax.config.rules import check_fields, check_together
from mmjax.config.schema import SETTINGS, Config
from mmjax.config.setting import flatten
from mmjax.config.wording import nearest, quote, short
from mmjax.errors import UserError

PACKAGE = 'configs'  # what a config file imports others from: `from configs import base`


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
  settings = _read_config_file(path)
  of_file = settings.to_dict()
  given = [_apply_override(settings, override) for override in overrides]
  config = _build(Config, settings.to_dict(), '')
  check_fields(config)
  config, dropped = _without_idle(config, used)
  if dropped:
    at_fault = {*given, *_dropped_without_overrides(of_file, used)}
    for name, (value, why) in dropped.items():
      if name in at_fault:
        where = '' if name in given else f'config file {path!r}: '
        raise UserError(f'{where}{name}={quote(value)} does nothing {why}')
  check_together(config)
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
  settings = ConfigDict(config.to_dict())
  for override in overrides:
    if (name := _apply_override(settings, override)) not in free:
      raise UserError(f'{name} belongs to the run and cannot be given here; these can: {", ".join(free)}')
  return config_from_dict(settings.to_dict())


def config_from_dict(settings: Mapping[str, Any]) -> Config:
  """Builds and checks a config from nested dicts, as read from config.json.

  Settings that do nothing are put at their defaults: what they were does not tell one run from another.

  Raises:
    UserError: if a field is missing, unknown, of the wrong type or against a rule.
  """
  config = _build(Config, {name: value for name, value in settings.items() if name != 'sha256'}, '')
  check_fields(config)
  config, _ = _without_idle(config)
  check_together(config)
  return config


def own_config(name: str) -> Path:
  """Returns where a file of mmjax's own configs/ lies: in the checkout, or where pip put it.

  Raises:
    UserError: if it is not there.
  """
  found = [folder / name for folder in own_configs() if (folder / name).is_file()]
  if not found:
    raise UserError(f'configs/{name} is not where pip puts it, in share/mmjax below a folder above {__file__}')
  return found[0]


def own_configs() -> tuple[Path, ...]:
  """Returns where mmjax's own configs/ may lie. pip puts data under the prefix that the package itself lies under."""
  checkout = Path(__file__).parents[2]
  if (checkout / 'pyproject.toml').is_file():
    return (checkout / PACKAGE,)
  shares = (parent / 'share' / 'mmjax' / PACKAGE for parent in Path(__file__).resolve().parents)
  return tuple(share for share in shares if share.is_dir())


def overrides_of(config: Config, path: str) -> dict[str, Any]:
  """Returns the settings that turn a config file into a config, by name."""
  usual, idle = flatten(load_config(path).to_dict()), idle_settings(config)
  flat = flatten(config.to_dict())
  return {name: value for name, value in flat.items() if value != usual[name] and name not in idle}


def default_settings() -> dict[str, Any]:
  """Returns every setting as a run has it that says nothing of it, by name."""
  return {name: setting.default for name, setting in SETTINGS.items()}


def base_config() -> ConfigDict:
  """Returns every setting at its default, to be changed by an experiment's config file."""
  return ConfigDict(Config().to_dict())


def _without_idle(config: Config, used: Collection[str] = ()) -> tuple[Config, dict[str, tuple[Any, str]]]:
  """Returns the config with settings that do nothing at their defaults, and what those that were not were, and why."""
  flat, usual = flatten(config.to_dict()), default_settings()
  idle = {n: why for n, why in idle_settings(config).items() if flat[n] != usual[n] and n not in used}
  for name in idle:
    section, _, field = name.partition('.')
    changed = dataclasses.replace(getattr(config, section), **{field: usual[name]})
    config = dataclasses.replace(config, **{section: changed})
  return config, {name: (flat[name], why) for name, why in idle.items()}


def _dropped_without_overrides(settings: Mapping[str, Any], used: Collection[str]) -> Collection[str]:
  try:
    config = _build(Config, settings, '')
    check_fields(config)
    return _without_idle(config, used)[1]
  except UserError:  # a file that is no config without overrides
    return ()


def call_python_file(path: str, what: str, function: str, arguments: Mapping[str, Any]) -> Any:
  """Runs a Python file of settings and returns what a function in it returns.

  Args:
    path: the file, as in configs/ and sweeps/; 'configs/NAME' that is not there is looked for among mmjax's own.
    what: 'config file', 'sweep file': for messages.
    function: its name.
    arguments: of the function, by name.

  Raises:
    UserError: if there is no such file, it or the function fails, or the function has no such argument.
  """
  path = expand_home(path)
  places = [Path(path), *(folder.parent / path for folder in own_configs())]
  file = next((place for place in places if place.is_file()), None)
  if file is None:
    known = {str(Path(path).with_name(near.name)) for place in places for near in place.parent.glob('*.py')}
    raise UserError(f'no {what} {path!r}{nearest(path, sorted(known))}')
  spec = importlib.util.spec_from_file_location(f'settings_{file.stem}', file)
  if spec is None or spec.loader is None:
    raise UserError(f'{what} {path!r} must be a Python file (.py)')
  module = importlib.util.module_from_spec(spec)
  try:
    with _importing_from(file.resolve().parent):
      spec.loader.exec_module(module)
      called = getattr(module, function, None)
      if called is None:
        raise UserError(f'it has no {function}()')
      known = inspect.signature(called).parameters
      for name in arguments:
        if name not in known:
          raise UserError(f'{function}() has no argument {name!r}{nearest(name, known)}')
      return called(**arguments)
  except UserError as error:
    raise UserError(f'{what} {path!r}: {error}') from error
  except Exception as error:  # noqa: BLE001 - a user's file may raise anything
    raise UserError(f'{what} {path!r} failed: {type(error).__name__}: {error}') from error


@contextlib.contextmanager
def _importing_from(folder: Path) -> Iterator[None]:
  """Lets a file in a folder say `from configs import base`, and import what lies beside that folder.

  `configs` is for it what lies in its own folder of that name, then what mmjax has, whatever was imported as `configs`
  before; and nothing of it stays imported for the next file.
  """
  spec = ModuleSpec(PACKAGE, None, is_package=True)
  nearby = (folder,) if folder.name == PACKAGE else (folder / PACKAGE, folder.parent / PACKAGE)
  spec.submodule_search_locations = [str(place) for place in (*nearby, *own_configs()) if place.is_dir()]
  others = _imported_configs()
  for name in others:
    del sys.modules[name]
  sys.modules[PACKAGE] = importlib.util.module_from_spec(spec)
  sys.path.insert(0, str(folder.parent))
  try:
    yield
  finally:
    sys.path.remove(str(folder.parent))
    for name in _imported_configs():
      del sys.modules[name]
    sys.modules.update(others)


def _imported_configs() -> dict[str, Any]:
  return {name: module for name, module in sys.modules.items() if name.partition('.')[0] == PACKAGE}


def _read_config_file(path: str) -> ConfigDict:
  if path.endswith('.json'):
    return ConfigDict(config_from_dict(_read_json(user_path(path))).to_dict())
  settings = call_python_file(path, 'config file', 'get_config', {})
  if not isinstance(settings, ConfigDict):
    raise UserError(f'config file {path!r}: get_config() must return an ml_collections.ConfigDict')
  return settings


def _read_json(path: Path) -> dict[str, Any]:
  try:
    settings = json.loads(path.read_bytes())
  except FileNotFoundError:
    raise UserError(f"no config file '{path}'") from None
  except (ValueError, RecursionError) as error:
    raise UserError(f"config file '{path}' is not JSON: {error}") from None
  if not isinstance(settings, dict):
    raise UserError(f"config file '{path}' must hold a JSON object of settings")
  return as_of_today(settings, to_train=True)


def _apply_override(settings: ConfigDict, override: str) -> str:
  """Sets what an override says and returns the name of the setting."""
  name, equals, text = override.removeprefix('--config.').partition('=')
  if not override.startswith('--config.') or not equals:
    raise UserError(f'argument {quote(override)} is not understood; overrides look like --config.train.batch_size=32')
  flat = flatten(settings.to_dict())
  if name not in flat:
    raise UserError(f'no setting {quote(name)}{removed_remark(name) or nearest(name, flat)}')
  section, _, field = name.rpartition('.')
  owner = settings[section] if section else settings
  with owner.ignore_type():
    owner[field] = _parse_value(name, text, type(flat[name]))
  return name


def _parse_value(name: str, text: str, kind: type) -> Any:
  if kind is str:
    return text
  if kind is bool:
    if text.lower() not in ('true', 'false'):
      raise UserError(f'{name}={quote(text)} must be True or False')
    return text.lower() == 'true'
  try:
    value = ast.literal_eval(text)
  except (ValueError, SyntaxError, MemoryError, RecursionError):
    value = None
  if isinstance(value, bool) or not isinstance(value, int | float) or (kind is int and value % 1):
    raise UserError(f'{name}={quote(text)} must be {"a whole number" if kind is int else "a number"}')
  return _convert(name, value, kind)


def _convert(name: str, value: float, kind: type) -> float:
  try:
    return kind(value)
  except OverflowError:  # a whole number beyond what a float holds
    raise UserError(f'{name}={short(value)} must be a finite number') from None


def _build(cls: type, settings: Mapping[str, Any], prefix: str) -> Any:
  fields = {field.name: field.type for field in dataclasses.fields(cls)}
  for name in settings:
    if name not in fields:
      remark = removed_remark(prefix + name) or nearest(name, fields, prefix)
      raise UserError(f'no setting {quote(prefix + name)}{remark}')
  values = {}
  for name, kind in fields.items():
    if name not in settings:
      raise UserError(f'setting {prefix + name!r} is missing')
    value = settings[name]
    if dataclasses.is_dataclass(kind):
      if not isinstance(value, Mapping):
        raise UserError(f'{prefix + name}={quote(value)} must be a section of settings')
      values[name] = _build(kind, value, f'{prefix}{name}.')
      continue
    if kind is float and type(value) is int:
      value = _convert(prefix + name, value, float)
    if type(value) is not kind:
      raise UserError(f'{prefix + name}={quote(value)} must be of type {kind.__name__}')
    values[name] = expand_home(value) if SETTINGS[prefix + name].is_path else value
  return cls(**values)
