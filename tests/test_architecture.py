"""Rules that hold over the whole source: the direction of imports, no torch, no pickle, nothing run at import."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

SOURCES = sorted(Path('mmjax').rglob('*.py'))
# A package may import from those before it and from itself.
ORDER = ('errors', 'config', 'kernels', 'model', 'data', 'training', 'inference', 'interop', 'tools')


def imported_modules(tree: ast.AST) -> list[str]:
  names = []
  for node in ast.walk(tree):
    if isinstance(node, ast.Import):
      names += [alias.name for alias in node.names]
    elif isinstance(node, ast.ImportFrom) and node.module:
      names.append(node.module)
  return names


def package_of(module: str) -> str:
  return module.split('.')[1]


@pytest.mark.parametrize('path', SOURCES, ids=str)
def test_imports_point_one_way(path):
  if path.name == '__init__.py' and len(path.parts) == 2:
    return  # the top level hands out the API, lazily
  own = ORDER.index(package_of('.'.join(path.with_suffix('').parts)))
  for name in imported_modules(ast.parse(path.read_text())):
    if name.startswith('mmjax.'):
      assert ORDER.index(package_of(name)) <= own, f'{path} imports {name}'
    assert name.split('.')[0] not in ('pickle', 'dill', 'cloudpickle', 'shelve', 'marshal'), f'{path} imports {name}'
    assert name.split('.')[0] != 'torch' or path.parts[1] == 'interop', f'{path} imports {name}'
    assert name.split('.')[0] not in ('requests', 'urllib', 'http', 'socketserver'), f'{path} imports {name}'


@pytest.mark.parametrize('path', SOURCES, ids=str)
def test_no_unsafe_loading(path):
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.Call):
      call = ast.unparse(node.func)
      arguments = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
      assert arguments.get('allow_pickle', 'False') == 'False', f'{path}:{node.lineno}'
      assert not call.endswith('torch.load') or arguments.get('weights_only') == 'True', f'{path}:{node.lineno}'
      assert call not in ('eval', 'exec'), f'{path}:{node.lineno}'
      assert arguments.get('errors') != "'ignore'", f'{path}:{node.lineno}'


def test_no_pallas_and_no_triton_in_the_source():
  for path in SOURCES:
    found = re.search(r'import.*(pallas|triton)|(pallas|triton)_call', path.read_text(), re.IGNORECASE)
    assert not found, f'{path}: {found}'


def test_importing_the_package_is_cheap():
  code = 'import sys, mmjax; print(sorted({"jax", "torch", "flax", "orbax"} & set(sys.modules)))'
  out = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True).stdout
  assert out.strip() == '[]'


def test_every_default_is_written_once():
  for path in SOURCES:
    for node in ast.walk(ast.parse(path.read_text())):
      if isinstance(node, ast.Call) and ast.unparse(node.func).endswith(('config.get', 'model.get', 'train.get')):
        pytest.fail(f'{path}:{node.lineno} reads a setting with a default of its own')
