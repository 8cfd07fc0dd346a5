"""From a config file and overrides of the command line, or from config.json, to a checked Config."""

import ast
import dataclasses
import importlib.util
import inspect
import site
import sys
import sysconfig
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from mmjax.config.paths import PATHS, expand_home
from mmjax.config.rules import check_config
from mmjax.config.schema import Config, flatten
from mmjax.config.wording import nearest, quote, short
from mmjax.errors import UserError

# Where configs/ lies, for whoever is elsewhere: beside the package in a checkout, or where pip put it.
ROOTS = (
  Path(__file__).parents[2],
  Path(sysconfig.get_path('data'), 'share', 'mmjax'),
  Path(site.getuserbase(), 'share', 'mmjax'),
)


def load_config(path: str, overrides: Sequence[str] = ()) -> Config:
  """Reads a config file and applies command-line overrides.

  Args:
    path: a Python file with `get_config() -> ConfigDict`; those of configs/ are found from any folder.
    overrides: `--config.section.field=value` arguments; a value is read as the type of the field it replaces.

  Returns:
    The checked config.

  Raises:
    UserError: if there is no such file, it has no get_config, or a setting is unknown or breaks a rule.
  """
  settings = _read_config_file(path)
  for override in overrides:
    _apply_override(settings, override)
  return config_from_dict(settings.to_dict())


def config_from_dict(settings: Mapping[str, Any]) -> Config:
  """Builds and checks a config from nested dicts, as read from config.json.

  Raises:
    UserError: if a field is missing, unknown, of the wrong type or against a rule.
  """
  config = _build(Config, {name: value for name, value in settings.items() if name != 'sha256'}, '')
  check_config(config)
  return config


def call_python_file(path: str, what: str, function: str, arguments: Mapping[str, Any]) -> Any:
  """Runs a Python file of settings and returns what a function in it returns; the folder above its own is importable.

  Args:
    path: the file, as in configs/ and sweeps/; where there is none it is looked for below ROOTS.
    what: 'config file', 'sweep file': for messages.
    function: its name.
    arguments: of the function, by name.

  Raises:
    UserError: if there is no such file, it or the function fails, or the function has no such argument.
  """
  path = expand_home(path)
  file = next((file for file in (Path(path), *(root / path for root in ROOTS)) if file.is_file()), Path(path))
  if not file.is_file():
    known = sorted(str(p) for p in file.parent.glob('*.py')) if file.parent.is_dir() else []
    raise UserError(f'no {what} {path!r}{nearest(path, known)}')
  root = str(file.resolve().parent.parent)
  if root not in sys.path:  # so that a config can say `from configs import base`
    sys.path.insert(0, root)
  spec = importlib.util.spec_from_file_location(f'settings_{file.stem}', file)
  if spec is None or spec.loader is None:
    raise UserError(f'{what} {path!r} must be a Python file (.py)')
  module = importlib.util.module_from_spec(spec)
  try:
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


def _read_config_file(path: str) -> ConfigDict:
  settings = call_python_file(path, 'config file', 'get_config', {})
  if not isinstance(settings, ConfigDict):
    raise UserError(f'config file {path!r}: get_config() must return an ml_collections.ConfigDict')
  return settings


def _apply_override(settings: ConfigDict, override: str) -> None:
  name, equals, text = override.removeprefix('--config.').partition('=')
  if not override.startswith('--config.') or not equals:
    raise UserError(f'argument {quote(override)} is not understood; overrides look like --config.train.batch_size=32')
  flat = flatten(settings.to_dict())
  if name not in flat:
    raise UserError(f'no setting {quote(name)}{nearest(name, flat)}')
  section, _, field = name.rpartition('.')
  owner = settings[section] if section else settings
  with owner.ignore_type():
    owner[field] = _parse_value(name, text, type(flat[name]))


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
      raise UserError(f'no setting {quote(prefix + name)}{nearest(name, fields, prefix)}')
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
    values[name] = expand_home(value) if prefix + name in PATHS else value
  return cls(**values)
