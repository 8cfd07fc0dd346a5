"""Rules that hold over the whole source: the direction of imports, no torch, no pickle, nothing run at import."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

SOURCES = sorted(Path('mmjax').rglob('*.py'))
EVERYTHING = [*SOURCES, *sorted(p for d in ('.', 'configs', 'benchmarks') for p in Path(d).glob('*.py'))]
# A package may import from those before it and from itself.
ORDER = (
  'environment',
  'errors',
  'choices',
  'files',
  'console',
  'config',
  'kernels',
  'memory',
  'model',
  'data',
  'run',
  'evaluation',
  'inference',
  'training',
  'ahead',
  'interop',
  'report',
  'serve',
  'tools',
)


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
      assert (own, package_of(name)) != (ORDER.index('training'), 'inference'), f'{path} imports {name}'
      assert ORDER.index(package_of(name)) <= own, f'{path} imports {name}'
    assert name.split('.')[0] not in ('pickle', 'dill', 'cloudpickle', 'shelve', 'marshal'), f'{path} imports {name}'
    assert name.split('.')[0] != 'torch' or path.parts[1] == 'interop', f'{path} imports {name}'
    assert name.split('.')[0] not in ('requests', 'urllib', 'http', 'socketserver'), f'{path} imports {name}'


def unsafe_calls(tree: ast.AST) -> list[str]:
  """Finds what no rule of the linter forbids; eval, exec, pickle and bare except are ruff's (pyproject.toml)."""
  found = []
  for node in ast.walk(tree):
    if isinstance(node, ast.Call):
      call = ast.unparse(node.func)
      arguments = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
      unsafe = (
        arguments.get('allow_pickle', 'False') != 'False'
        or (call == 'torch.load' and arguments.get('weights_only') != 'True')
        or arguments.get('errors') == "'ignore'"
        or (call.endswith('.decode') and [ast.unparse(argument) for argument in node.args[1:]] == ["'ignore'"])
      )
      found += [f'line {node.lineno}: {call}'] if unsafe else []
  return found


@pytest.mark.parametrize('path', EVERYTHING, ids=str)
def test_no_unsafe_loading(path):
  assert not unsafe_calls(ast.parse(path.read_text()))


@pytest.mark.parametrize(
  'line',
  [
    'np.load(path, allow_pickle=True)',
    'torch.load(path)',
    'torch.load(path, weights_only=False)',
    "raw.decode('utf-8', errors='ignore')",
    "raw.decode('utf-8', 'ignore')",
    "open(path, errors='ignore')",
  ],
)
def test_unsafe_loading_is_found(line):
  assert unsafe_calls(ast.parse(line))
  assert not unsafe_calls(ast.parse('torch.load(path, weights_only=True); np.load(path, allow_pickle=False)'))


@pytest.mark.parametrize(
  ('line', 'rule'),
  [
    ('import pickle', 'TID251'),
    ('from dill import loads', 'TID251'),
    ('import pickle  # noqa: TID251\npickle.load(file)', 'S301'),
    ('import marshal  # noqa: TID251\nmarshal.load(file)', 'S302'),
    ('import yaml\nyaml.load(text)', 'S506'),
    ('import xml.etree.ElementTree as tree\ntree.parse(file)', 'S314'),
    ('import tarfile\ntarfile.open(path).extractall()', 'S202'),
    ("eval('1')", 'S307'),
    ("exec('1')", 'S102'),
    ('try:\n  f()\nexcept:\n  g()', 'E722'),
    ('try:\n  f()\nexcept Exception:\n  g()', 'BLE001'),
    ("subprocess.run('ls', shell=True)", 'S602'),
    ("open(tempfile.mktemp(), 'w')", 'S306'),
  ],
)
def test_linter_forbids(line, rule):
  command = [
    sys.executable,
    '-m',
    'ruff',
    'check',
    '--stdin-filename',
    'mmjax/data/made_up.py',
    '--output-format',
    'concise',
    '-',
  ]
  done = subprocess.run(command, input=f'import subprocess, tempfile\n\n{line}\n', capture_output=True, text=True)
  assert f' {rule} ' in done.stdout, done.stdout


def test_reliability_names_tests_that_exist():
  text = Path('docs/reliability.md').read_text()
  named = re.findall(r'`(test_\w+)\.py(?:::(test_\w+))?`', text)
  assert len(named) > 30
  files = {path.stem: path.read_text() for path in Path('tests').rglob('test_*.py')}
  for file, name in named:
    assert file in files, file
    assert not name or re.search(rf'^def {name}\(', files[file], re.MULTILINE), f'{file}::{name}'
  modules = [Path(f'{m.replace(".", "/")}.py') for m in re.findall(r'python -m ((?:mmjax|tests)[\w.]+)', text)]
  assert modules and all(path.is_file() for path in modules)


def test_no_pallas_and_no_triton_in_the_source():
  for path in SOURCES:
    found = re.search(r'import.*(pallas|triton)|(pallas|triton)_call', path.read_text(), re.IGNORECASE)
    assert not found, f'{path}: {found}'


@pytest.mark.parametrize('path', ['train.py', 'eval.py'])
def test_commands_that_train_and_evaluate_need_no_tools(path):
  assert not [name for name in imported_modules(ast.parse(Path(path).read_text())) if name.startswith('mmjax.tools')]


def test_importing_the_package_is_cheap():
  code = 'import sys, mmjax; print(sorted({"jax", "torch", "flax", "orbax"} & set(sys.modules)))'
  out = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True).stdout
  assert out.strip() == '[]'


def test_help_and_refusals_of_commands_wait_for_no_jax():
  names = [path.stem for path in Path('mmjax/tools').glob('*.py') if 'run_command(main)' in path.read_text()]
  loads = f"""
import importlib, sys
for name in {sorted(names)}:
  importlib.import_module('mmjax.tools.' + name)
  assert 'jax' not in sys.modules, name
"""
  subprocess.run([sys.executable, '-c', loads], check=True)


@pytest.mark.parametrize(
  ('module', 'most', 'never'),
  [
    ('training.optimizer', 24, 'mmjax.data mmjax.run mmjax.evaluation mmjax.inference tensorboardX grain orbax'),
    (
      'inference.api',
      38,
      'mmjax.training mmjax.evaluation mmjax.interop mmjax.tools mmjax.data.loader tensorboardX grain',
    ),
  ],
)
def test_imports_bring_along_only_what_is_needed(module, most, never):
  code = f'import sys, mmjax.{module}; print(*sys.modules)'
  loaded = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True).stdout.split()
  assert not [name for name in loaded if re.match(rf'({"|".join(never.split())})(\.|$)', name)]
  own = sorted(name for name in loaded if re.match(r'mmjax(\.(?!config|memory\.|model\.sublayers)|$)', name))
  assert len(own) <= most, f'{len(own)}: {own}'


@pytest.mark.parametrize(
  ('what', 'where'),
  [
    (r'flock\(', 'files.py'),
    (r'tree_leaves_with_path|keystr', 'files.py'),
    # a name in settings and in others' files, too:
    (r"'memory_bank'", 'model/params.py config/schema.py interop/sizes.py'),
    (r'compiler_options=|traced_for\(|xla_gpu', 'run/placement.py kernels/forms.py ahead/compiler.py'),
  ],
)
def test_each_thing_is_said_in_one_place(what, where):
  found = [path for path in SOURCES if re.search(what, path.read_text())]
  assert {str(path) for path in found} <= {f'mmjax/{name}' for name in where.split()}


def test_every_default_is_written_once():
  for path in SOURCES:
    for node in ast.walk(ast.parse(path.read_text())):
      if isinstance(node, ast.Call) and ast.unparse(node.func).endswith(('config.get', 'model.get', 'train.get')):
        pytest.fail(f'{path}:{node.lineno} reads a setting with a default of its own')


@pytest.mark.parametrize('path', [path for path in EVERYTHING if path.parts[0] != 'configs'], ids=str)
def test_functions_fit_two_screens(path):
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.FunctionDef):
      lines = node.end_lineno - node.lineno + 1
      assert lines <= 80, f'{path}: {node.name} has {lines} lines'


def raises_itself(function: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
  """Whether a function has a `raise` of its own: not in a nested one, and not a bare one, which hands an error on."""
  nodes = list(function.body)
  for node in nodes:
    if isinstance(node, ast.Raise) and node.exc:
      return True
    if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
      nodes += ast.iter_child_nodes(node)
  return False


def test_docstrings_say_what_public_functions_raise():
  found = {}
  for path in SOURCES:
    if 'tools' in path.parts:  # commands: mmjax/errors.py says what ends them
      continue
    tree = ast.parse(path.read_text())
    for owner in (tree, *(node for node in tree.body if isinstance(node, ast.ClassDef) and node.name[0] != '_')):
      for node in owner.body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and raises_itself(node):
          makes_it = node.name in ('__init__', '__post_init__')
          if node.name[0] != '_' or node.name.endswith('__'):
            docs = [ast.get_docstring(node), makes_it and ast.get_docstring(owner)]
            found[f'{path}:{node.lineno} {node.name}'] = ' '.join(filter(None, docs))
  assert len(found) > 100
  assert not [name for name, text in found.items() if not re.search(r'\b[Rr]aises\b', text)]
