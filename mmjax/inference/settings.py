"""The settings of text generation, their defaults, and the flags that set them. Imports no JAX: --help is quick."""

import argparse
import dataclasses
import sys
from collections.abc import Mapping
from typing import Any, Self

from mmjax.choices import CHECKPOINT
from mmjax.config import CHOICES
from mmjax.config.wording import quote, short
from mmjax.errors import UserError

MOST_NEW_TOKENS = 32768  # the positions that the PyTorch code has rotations for
MOST_FLOAT = sys.float_info.max


def _setting(default: float, meaning: str, least: float, most: float, rule: str) -> Any:
  return dataclasses.field(default=default, metadata={'help': meaning, 'least': least, 'most': most, 'rule': rule})


@dataclasses.dataclass(frozen=True)
class Sampling:
  """How text is continued. Every command and the Python API take their settings and defaults from here.

  Raises:
    UserError: if a value breaks its rule.
  """

  max_new_tokens: int = _setting(
    64, 'stop after so many tokens if the text does not end before',
    1, MOST_NEW_TOKENS, f'a whole number from 1 to {MOST_NEW_TOKENS}',
  )  # fmt: skip
  temperature: float = _setting(
    0.75, 'divides the logits: higher is more random, 0 takes the most likely token',
    0, MOST_FLOAT, 'a number of at least 0',
  )  # fmt: skip
  top_p: float = _setting(
    0.9, 'draw from the most likely tokens that together hold this share', 0, 1, 'a number from 0 to 1'
  )
  repetition_penalty: float = _setting(
    1.0, 'above 1: tokens that the text already has become less likely',
    1e-3, 1e3, 'a number from 0.001 to 1000 (1: no penalty)',
  )  # fmt: skip
  seed: int = _setting(
    0, 'of the random numbers: the same seed gives the same text', 0, 2**32 - 1, 'a whole number from 0 to 2^32 - 1'
  )
  seed_sampling: bool = _setting(
    False, 'penalty and temperature exactly as in the PyTorch code of experiment 1.4.2', False, True, 'True or False'
  )

  def __post_init__(self):
    for field in dataclasses.fields(self):
      given = getattr(self, field.name)
      value = _as_kind(given, field.type)
      if type(value) is not field.type or not field.metadata['least'] <= value <= field.metadata['most']:
        shown = quote(given) if isinstance(given, str | bytes) else short(given)
        raise UserError(f'{field.name}={shown} must be {field.metadata["rule"]}')
      object.__setattr__(self, field.name, value)

  @classmethod
  def of(cls, settings: Mapping[str, Any]) -> Self:
    """Takes settings by name, the others at their defaults.

    Raises:
      UserError: if there is no such setting, or a value breaks its rule.
    """
    names = [field.name for field in dataclasses.fields(cls)]
    for name in settings:
      if name not in names:
        raise UserError(f'no sampling setting {name!r}; there are {", ".join(names)}')
    return cls(**settings)


def _as_kind(value: Any, kind: type) -> Any:
  """Returns a number as int or float, and scalars of NumPy and JAX as Python's; what is of another kind as it is."""
  if getattr(value, 'ndim', None) == 0:
    value = value.item()
  if kind is bool or isinstance(value, bool) or not isinstance(value, (int, float)):
    return value
  if kind is float:
    return float(value) if abs(value) < MOST_FLOAT else value
  return int(value) if isinstance(value, float) and value.is_integer() else value


def add_sampling_flags(parser: argparse.ArgumentParser) -> None:
  """Gives a command one flag for each field of Sampling."""
  for field in dataclasses.fields(Sampling):
    text = f'{field.metadata["help"]} (default: {field.default})'
    if field.type is bool:
      parser.add_argument(f'--{field.name}', action='store_true', help=field.metadata['help'])
    else:
      parser.add_argument(f'--{field.name}', type=field.type, default=field.default, help=text)


def add_checkpoint_flag(parser: argparse.ArgumentParser) -> None:
  """Gives a command that reads a run the flag that says where it stood."""
  said = f'best, last, or the number of a step (default: {CHECKPOINT})'
  parser.add_argument('--checkpoint', default=CHECKPOINT, help=said)


def add_model_flags(parser: argparse.ArgumentParser) -> None:
  """Gives a command that reads a trained model the flags that say which of a run, and how."""
  add_checkpoint_flag(parser)
  parser.add_argument(
    '--attention', choices=CHOICES['runtime.attention'], help="attention backend (default: the run's, if that can run)"
  )
  parser.add_argument(
    '--dtype',
    choices=CHOICES['train.dtype'],
    help="dtype of products (default: the run's for losses, float32 for all else)",
  )
  parser.add_argument(
    '--without',
    dest='without_taught',
    action='store_true',
    help='take out the rows that the run taught: the model that it started from; not with --checkpoint',
  )


def model_from_flags(arguments: argparse.Namespace) -> dict[str, Any]:
  """Returns what the flags of `add_model_flags` say, as `mmjax.load` takes it."""
  return {name: getattr(arguments, name) for name in ('checkpoint', 'attention', 'dtype', 'without_taught')}


def sampling_from_flags(arguments: argparse.Namespace) -> Sampling:
  """Returns what the flags of `add_sampling_flags` say.

  Raises:
    UserError: if a value breaks its rule.
  """
  return Sampling(**{field.name: getattr(arguments, field.name) for field in dataclasses.fields(Sampling)})
