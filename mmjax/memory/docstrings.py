"""Docstrings of the memories that name every size: `help` does not look for those of base classes."""

import inspect
import re


def with_inherited_attributes(kind: type) -> str:
  """Returns a class's docstring with the attributes that its bases describe, the most general first."""
  text, entries = '', {}
  for base in reversed(kind.__mro__):
    text, _, attributes = inspect.cleandoc(base.__doc__ or '').partition('Attributes:\n')
    entries |= {entry.split(':')[0].strip(): entry for entry in re.split(r'\n(?=  \w)', attributes) if entry}
  return f'{text.rstrip()}\n\nAttributes:\n' + '\n'.join(entries.values())
