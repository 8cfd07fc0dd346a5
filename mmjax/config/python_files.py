"""Settings that are Python files: where mmjax's own lie, and how one is run that imports others."""

import contextlib
import importlib.util
import inspect
import sys
import traceback
from collections.abc import Iterator, Mapping, Sequence
from importlib.machinery import ModuleSpec, SourceFileLoader
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any

from mmjax.config.paths import user_path
from mmjax.config.wording import nearest, nearest_file
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
  path = str(user_path(path))
  places = [Path(path), *(folder.parent / path for folder in own_configs())]
  file = next((place for place in places if place.is_file()), None)
  if file is None:
    near = (near for place in places for near in place.parent.glob('*.py') if near.is_file())
    known = {str(Path(path).parent / file.name) for file in near}
    if what == 'config file':
      known |= {f'{PACKAGE}/{file.name}' for folder in own_configs() for file in folder.glob('*.py')}
    known = sorted(known)
    raise UserError(f'no {what} {path!r}{nearest_file(Path(path)) if Path(path).is_dir() else nearest(path, known)}')
  if file.suffix != '.py':
    raise UserError(f'{what} {path!r} must be a Python file (.py)')
  loader = _LoaderOfToday(f'settings in {file.stem}', str(file))  # no module that is imported has such a name
  module = importlib.util.module_from_spec(importlib.util.spec_from_file_location(loader.name, file, loader=loader))
  try:
    with _importing_from(file.resolve().parent, {loader.name: module}):  # where dataclasses look for it
      loader.exec_module(module)
      called = getattr(module, function, None)
      if called is None:
        raise UserError(f'it has no {function}(){nearest(function, vars(module))}')
      if not callable(called):
        raise UserError(f'{function} must be a function, not {type(called).__name__}')
      known = inspect.signature(called).parameters
      for name in arguments:
        if name not in known:
          raise UserError(f'{function}() has no argument {name!r}{nearest(name, known)}')
      return called(**arguments)
  except UserError as error:
    raise UserError(f'{what} {path!r}: {error}') from error
  except (Exception, SystemExit) as error:  # noqa: BLE001 - a user's file may raise anything
    frames = [f for f in traceback.extract_tb(error.__traceback__) if _is_near(Path(f.filename), file)]
    other = f' of {frames[-1].filename!r}' if frames and frames[-1].filename != loader.path else ''
    where = f' in line {frames[-1].lineno}{other}' if frames else ''
    raise UserError(f'{what} {path!r} failed{where}: {type(error).__name__}: {error}') from error


class _LoaderOfToday(SourceFileLoader):
  """Compiles what stands in a file now: Python's cache knows a file by its size and the second of its last change."""

  def get_code(self, fullname: str) -> CodeType:
    return self.source_to_code(self.get_data(self.path), self.path)


@contextlib.contextmanager
def _importing_from(folder: Path, modules: Mapping[str, ModuleType]) -> Iterator[None]:
  """Lets a file in a folder say `from configs import base`, and import what lies beside it and beside that folder.

  `configs` is for it what lies in its own folder of that name, then what mmjax has, whatever was imported as `configs`
  before; and nothing that it imported from these folders stays imported for the next file. No compiled files are left
  in them, which would be read for sources that are written again within a second.

  Args:
    folder: of the file.
    modules: what counts as imported meanwhile, by name.
  """
  spec = ModuleSpec(PACKAGE, None, is_package=True)
  nearby = (folder,) if folder.name == PACKAGE else (folder / PACKAGE, folder.parent / PACKAGE)
  spec.submodule_search_locations = [str(place) for place in (*nearby, *own_configs()) if place.is_dir()]
  others = _imported_configs()
  for name in others:
    del sys.modules[name]
  before, path, caches = set(sys.modules), list(sys.path), sys.dont_write_bytecode
  sys.modules.update({PACKAGE: importlib.util.module_from_spec(spec), **modules})
  sys.path[:0] = [str(folder), str(folder.parent)]
  sys.dont_write_bytecode = True
  importlib.invalidate_caches()
  try:
    yield
  finally:
    sys.dont_write_bytecode = caches
    sys.path[:] = path
    new = sys.modules.keys() - before
    own = {name for name in new if '.' not in name and _lies_in((folder, folder.parent), sys.modules[name])}
    for name in new:
      if name in modules or name.partition('.')[0] in {*own, PACKAGE}:
        del sys.modules[name]
    sys.modules.update(others)


def _lies_in(folders: Sequence[Path], module: ModuleType) -> bool:
  """Whether a module that is not mmjax lies in one of these folders, and not somewhere below, as in a .venv."""
  spec = getattr(module, '__spec__', None)
  if spec is None or module.__name__ == __name__.partition('.')[0]:
    return False
  return any(Path(place).parent in folders for place in (*(spec.submodule_search_locations or ()), spec.origin or ''))


def _is_near(path: Path, file: Path) -> bool:
  if str(path).startswith('<frozen'):  # Python's own importer
    return False
  return path.resolve().parent in (file.resolve().parent, file.resolve().parent.parent)


def _imported_configs() -> dict[str, Any]:
  return {name: module for name, module in sys.modules.items() if name.partition('.')[0] == PACKAGE}
