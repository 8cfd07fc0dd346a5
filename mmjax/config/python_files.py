"""Settings that are Python files: where mmjax's own lie, and how one is run that imports others."""

import contextlib
import importlib.util
import inspect
import sys
from collections.abc import Iterator, Mapping
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

from mmjax.config.paths import expand_home
from mmjax.config.wording import nearest
from mmjax.errors import UserError

PACKAGE = 'configs'  # what a config file imports others from: `from configs import base`


def own_config(name: str) -> Path:
  """Returns where a file of mmjax's own configs/ lies: in the checkout, or where pip put it.

  Raises:
    UserError: if it is not there.
  """
  found = [folder / name for folder in own_configs() if (folder / name).is_file()]
  if not found:
    raise UserError(f'configs/{name} was not found where pip puts it: in share/mmjax of any folder above {__file__}')
  return found[0]


def own_configs() -> tuple[Path, ...]:
  """Returns where mmjax's own configs/ may lie. pip puts data under the prefix that the package itself lies under."""
  checkout = Path(__file__).parents[2]
  if (checkout / 'pyproject.toml').is_file():
    return (checkout / PACKAGE,)
  shares = (parent / 'share' / 'mmjax' / PACKAGE for parent in Path(__file__).resolve().parents)
  return tuple(share for share in shares if share.is_dir())


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
        raise UserError(f'it has no {function}(){nearest(function, vars(module))}')
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
