"""What there is to say of a setting, as metadata of a dataclass field: mmjax/config/schema.py says it of each."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

INT_MOST = 2**31 - 1  # of a whole number: sizes, steps and the seed are counted in 32 bits


@dataclasses.dataclass(frozen=True)
class Setting:
  """A setting, but for its name and type.

  Attributes:
    default: its value unless a config says otherwise.
    meaning: what a user is told of it.
    least, most: of a number.
    choices: all that a text may be; () where there is no such list.
    is_path: whether it is a path, whose leading `~` means the home.
    needs: tells of a config whether the setting does anything there, and what to say after 'does nothing' if not.
    before: what runs did before there was the setting; None if there always was. It stays when the default changes.
  """

  default: Any
  meaning: str
  least: float = 0
  most: float = INT_MOST
  choices: tuple[str, ...] = ()
  is_path: bool = False
  needs: tuple[Callable[[Any], Any], str] | None = None
  before: Any = None


def field(default: Any, meaning: str, least: float = 0, most: float = INT_MOST, **more: Any) -> Any:
  """Returns a field of a section, with what is said of it."""
  return dataclasses.field(default=default, metadata={'setting': Setting(default, meaning, least, most, **more)})


def settings_of(section: type, prefix: str = '') -> Iterator[tuple[str, Setting]]:
  """Yields all settings of a dataclass of sections, with dotted names."""
  for part in dataclasses.fields(section):
    if dataclasses.is_dataclass(part.type):
      yield from settings_of(part.type, f'{prefix}{part.name}.')
    else:
      yield prefix + part.name, part.metadata['setting']


def flatten(settings: Mapping[str, Any], prefix: str = '') -> dict[str, Any]:
  """Turns nested dicts into one dict with dotted names."""
  flat = {}
  for name, value in settings.items():
    if isinstance(value, Mapping):
      flat |= flatten(value, f'{prefix}{name}.')
    else:
      flat[prefix + name] = value
  return flat
