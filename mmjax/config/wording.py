"""How messages about settings write what a user gave, and what was perhaps meant."""

import difflib
from collections.abc import Mapping, Sequence
from typing import Any


def short(value: float) -> str:
  """Writes a number; of one with a hundred digits the first ones."""
  return _cut(str(value))


def quote(value: Any) -> str:
  """Writes what a user gave; of a page of it the beginning."""
  return _cut(repr(value), 300)


def _cut(text: str, length: int = 30) -> str:
  return text if len(text) <= length else f'{text[:length]}... ({len(text)} characters)'


def nearest(name: str, known: Sequence[str] | Mapping[str, Any], prefix: str = '') -> str:
  """Returns '; did you mean X?' for the known name most like `name`, or nothing."""
  found = difflib.get_close_matches(str(name), list(known), n=1, cutoff=0.5)
  if not found:  # a field that was put into the wrong section
    field = str(name).rpartition('.')[2]
    found = [k for k in known if k.rpartition('.')[2] == field][:1]
  return f'; did you mean {prefix + found[0]!r}?' if found else ''
