"""From what a user typed to a path: a leading `~` means the home, in every flag and in every setting that is a path."""

import os
import tempfile
from pathlib import Path

from mmjax.errors import UserError
from mmjax.files import storage_errors


def expand_home(text: str) -> str:
  """Returns a path with its leading `~` or `~user` replaced by that home.

  Raises:
    UserError: if there is no such home, and no file of that name either.
  """
  expanded = os.path.expanduser(text)
  if expanded.startswith('~') and not os.path.lexists(expanded):
    home = text.partition('/')[0]
    raise UserError(f"'{text}': no home is known for {home!r}; write './{text}' for a name that begins with '~'")
  return expanded


def user_path(text: str | os.PathLike) -> Path:
  """Returns the path that a user typed; see `expand_home`.

  Raises:
    UserError: if it is no text, or empty, which would be the current folder; or as `expand_home` does.
  """
  try:
    path = os.fsdecode(text)
  except TypeError:
    raise UserError(f'a path must be text, not {type(text).__name__}') from None
  if not path:
    raise UserError('a path is empty and must not be; perhaps it came from a variable that is not set')
  return Path(expand_home(path))


def check_output(flag: str, text: str | None) -> None:
  """Refuses the file that a flag names, before what it would hold is computed, if it cannot be written.

  Raises:
    StorageError, UserError: if its folder is not there or takes no file, or it is a folder itself.
  """
  if text is None:
    return
  path = user_path(text).absolute()
  if not path.parent.is_dir():
    raise UserError(f"{flag} '{text}' must lie in a folder that is there")
  with storage_errors(path):
    if path.exists() and not path.is_file():
      raise UserError(f"{flag} '{text}' is {'a folder' if path.is_dir() else 'no file'} and must be a file")
    with tempfile.TemporaryFile(dir=path.parent):
      pass
