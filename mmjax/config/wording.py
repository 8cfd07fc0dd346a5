"""How messages about settings write what a user gave, and what was perhaps meant."""

import difflib
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

LIKE = 0.65  # of the characters of two names, the share that stands in both, in the same order


def short(value: float) -> str:
  """Writes a number; of one with a hundred digits the first ones."""
  return _cut(str(value))


def quote(value: Any) -> str:
  """Writes what a user gave; of a page of it the beginning."""
  return _cut(repr(value), 300)


def _cut(text: str, length: int = 30) -> str:
  return text if len(text) <= length else f'{text[:length]}... ({len(text)} characters)'


def nearest(name: str, known: Iterable[str]) -> str:
  """Returns '; did you mean X?' for the known name most like `name`, or nothing.

  Last parts decide, of names with points and of paths: in a wrong section a right field is still meant. After that come
  parts of the section with a word that begins so, as max_steps has one for steps, and then parts that are alike.
  """
  section, given = _split(str(name))
  parts = {k: _split(k) for k in known}
  word = re.compile(f'(^|_){re.escape(given)}')
  close = (
    [k for k, (_, part) in parts.items() if part == given]
    or [k for k, (s, part) in parts.items() if len(given) > 3 and section in ('', s) and word.search(part)]
    or [k for k, (_, part) in parts.items() if difflib.SequenceMatcher(None, given, part).ratio() >= LIKE]
  )
  if not close:
    return ''
  return f'; did you mean {max(close, key=lambda k: difflib.SequenceMatcher(None, k, str(name)).ratio())!r}?'


def nearest_file(path: Path) -> str:
  """Returns what `nearest` does for a file that is not there, by stems in its folder; or that there is no folder."""
  if path.is_dir():
    return ', but a folder of that name'
  if not path.parent.is_dir():
    return f"; there is no folder '{path.parent}'"
  try:
    # Of one stem the one whose whole name is most alike.
    alike = sorted(path.parent.iterdir(), key=lambda near: difflib.SequenceMatcher(None, near.name, path.name).ratio())
    known = {near.stem: near for near in alike}
  except OSError:  # a folder that may not be listed
    return ''
  found = difflib.get_close_matches(path.stem, known, n=1, cutoff=LIKE)
  return f"; did you mean '{known[found[0]]}'?" if found else ''


def _split(name: str) -> tuple[str, str]:
  """Returns the section or folder of a name, and its last part."""
  section, _, part = name.removesuffix('.py').replace('/', '.').rpartition('.')
  return section, part
