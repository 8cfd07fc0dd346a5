"""Python files of settings: which is found, what it may import, and that what is wrong in one is said with its file."""

import dataclasses
import os
import py_compile
import shutil
import sys
from pathlib import Path

import pytest

from mmjax.config import load_config, python_files
from mmjax.errors import UserError


@pytest.mark.parametrize('path', sorted(Path('configs').glob('*.py')), ids=lambda p: p.stem)
def test_every_config_file_loads_and_names_its_experiment(path):
  assert load_config(str(path)).experiment == path.stem


@pytest.mark.parametrize(
  ('old', 'new'),
  [('memory_plus', 'ngram_rows'), ('memory_bag', 'product_key_bag'), ('quickstart_plus', 'quickstart_ngram_rows')],
)
def test_old_name_of_a_config_is_the_same_but_for_its_work_directory(old, new):
  config = load_config(f'configs/{old}.py')
  assert dataclasses.replace(config, experiment=new) == load_config(f'configs/{new}.py')


def test_missing_config_file_suggests_the_nearest():
  with pytest.raises(UserError, match=r"no config file.*did you mean 'configs/exp_1_4_2.py'"):
    load_config('configs/exp_142.py')


@pytest.mark.parametrize('installed', [True, False])
def test_configs_are_found_from_any_folder(tmp_path, monkeypatch, installed):
  usual = load_config('configs/ngram_rows.py')
  if installed:  # as pip lays files out; `pip install --target` puts share/ beside the package instead
    package = tmp_path / 'lib' / 'python3' / 'site-packages' / 'mmjax' / 'config' / 'python_files.py'
    shutil.copytree('configs', tmp_path / 'share' / 'mmjax' / 'configs')
    monkeypatch.setattr(python_files, '__file__', str(package))
  monkeypatch.chdir(tmp_path)
  assert load_config('configs/ngram_rows.py') == usual
  with pytest.raises(UserError, match=r"no config file 'configs/ngram_row.py'; did you mean 'configs/ngram_rows.py'"):
    load_config('configs/ngram_row.py')
  with pytest.raises(UserError, match=r"no config file 'ngram_rows'; did you mean 'configs/ngram_rows.py'"):
    load_config('ngram_rows')


def test_installed_without_its_configs_says_so(tmp_path, monkeypatch):
  monkeypatch.setattr(python_files, '__file__', str(tmp_path / 'mmjax' / 'config' / 'python_files.py'))
  with pytest.raises(UserError, match=r'configs/base.py was not found where pip puts it'):
    python_files.own_config('base.py')


BASE = 'from configs import base\ndef get_config():\n  c = base.get_config()\n'
MINE = """from configs import base, {other}

def get_config():
  from configs import base as again

  config = {other}.get_config()
  config.model.n_layers = {layers}
  assert base is again
  return config
"""


def test_configs_of_several_folders_do_not_get_into_each_others_way(tmp_path, monkeypatch):
  """`configs` is each file's own folder, then mmjax's, whatever another file or the program imported by that name."""
  before = load_config('configs/ngram_rows.py')
  for folder, layers in (('a', 3), ('b', 5)):
    (tmp_path / folder / 'configs').mkdir(parents=True)
    (tmp_path / folder / 'configs' / 'mine.py').write_text(MINE.format(other='theirs', layers=layers))
    theirs = MINE.format(other='ngram_rows', layers=1).replace('return', f'config.model.dim = {64 * layers}\n  return')
    (tmp_path / folder / 'configs' / 'theirs.py').write_text(theirs)
  (tmp_path / 'plain.py').write_text(MINE.format(other='quickstart', layers=7))
  (tmp_path / 'b' / 'configs' / 'ngram_rows.py').write_text('raise ValueError("not mine")')
  monkeypatch.chdir(tmp_path)
  path, imported = list(sys.path), {name for name in sys.modules if name.startswith('configs')}
  for _ in range(2):
    config = load_config('a/configs/mine.py')
    assert (config.model.n_layers, config.model.dim, config.memory.ngrams) == (3, 192, '1,2')
    with pytest.raises(UserError, match='not mine'):
      load_config('b/configs/mine.py')
    assert load_config(str(tmp_path / 'plain.py')).model.n_layers == 7
    assert load_config('configs/ngram_rows.py') == before
  assert sys.path == path and {name for name in sys.modules if name.startswith('configs')} == imported


@pytest.mark.parametrize(
  ('body', 'said'),
  [
    ('def get_config(:', r'failed: SyntaxError: .*\(broken.py, line 1\)'),
    ('x = 1\0', 'failed: (SyntaxError|ValueError)'),
    (f'{BASE}  c.train.learning_rate = True', r'broken.py.: learning_rate=True must be a number'),
    (f"{BASE}  c.update({{'train': {{'grad_clip': True}}}})", r'broken.py.: grad_clip=True must be a number'),
    ('import sys\nsys.exit(3)', 'failed in line 2: SystemExit: 3'),
    ('get_config = 5', 'get_config must be a function, not int'),
    (f'{BASE}  c.model.n_layers = True', r'broken.py.: model.n_layers=True must be of type int'),
    (f'{BASE}  c.model.extra = 1', r"broken.py.: no setting 'model.extra'"),
    (f'{BASE}  c.model.dim = "a"', 'failed in line 4: TypeError'),
    (f'{BASE}  c[5] = 1', 'failed: TypeError'),
    (
      f'import ml_collections\n{BASE}  c.model.dim = ml_collections.config_dict.required_placeholder(int)',
      'failed: Req',
    ),
  ],
)
def test_broken_config_file_is_explained(tmp_path, body, said):
  file = tmp_path / 'broken.py'
  file.write_text(f'{body}\n  return c\n' if body.startswith((BASE, 'import ml')) else body)
  with pytest.raises(UserError, match=f"config file '.*{said}"):
    load_config(str(file))


@pytest.mark.parametrize(('path', 'said'), [('', 'a path is empty'), ('.', "no config file '.', but a folder")])
def test_path_that_names_no_config_file_is_refused(path, said):
  with pytest.raises(UserError, match=said):
    load_config(path)


def test_config_file_is_read_as_it_is_now(tmp_path, monkeypatch):
  """Python's cache of compiled files knows a file by its size and the second of its last change."""
  monkeypatch.setattr(sys, 'dont_write_bytecode', False)
  for dim in (128, 160, 192, 224):
    (tmp_path / 'near.py').write_text(f'DIM = {dim}')
    (tmp_path / 'mine.py').write_text(f'from near import DIM\n{BASE}  c.model.dim = DIM + {dim}\n  return c')
    assert load_config(str(tmp_path / 'mine.py')).model.dim == 2 * dim
  assert not list(tmp_path.rglob('*.pyc'))

  source = tmp_path / 'mine.py'
  py_compile.compile(str(source))
  source.write_text(source.read_text().replace('DIM + 224', 'DIM + 160'))
  os.utime(source, ns=(0, int.from_bytes(next(tmp_path.rglob('*.pyc')).read_bytes()[8:12], 'little') * 10**9))
  assert load_config(str(source)).model.dim == 224 + 160


def test_config_file_imports_what_lies_beside_it_and_leaves_nothing(tmp_path):
  for folder, dim in (('a', 256), ('b', 128)):
    (tmp_path / folder / 'configs').mkdir(parents=True)
    (tmp_path / folder / 'shared.py').write_text(f'import statistics\nDIM = {dim}')
    (tmp_path / folder / 'configs' / 'x.py').write_text(f'import shared\n{BASE}  c.model.dim = shared.DIM\n  return c')
  assert [load_config(f'{tmp_path}/{folder}/configs/x.py').model.dim for folder in 'abab'] == [256, 128, 256, 128]
  assert 'shared' not in sys.modules and 'statistics' in sys.modules

  shared = tmp_path / 'a' / 'shared.py'
  shared.write_text('\n\n1 / 0')
  with pytest.raises(UserError, match=r"failed in line 3 of '.*a/shared.py': ZeroDivisionError"):
    load_config(f'{tmp_path}/a/configs/x.py')


def test_folder_named_like_an_installed_package_takes_nothing_away(tmp_path, monkeypatch):
  monkeypatch.delitem(sys.modules, 'colorsys', raising=False)
  (tmp_path / 'colorsys').mkdir()
  (tmp_path / 'settings_x.py').write_text('DIM = 128')
  (tmp_path / 'x.py').write_text(
    f'import colorsys, sys\nfrom settings_x import DIM\n{BASE}  c.model.dim = DIM\n  sys.path.clear()\n  return c'
  )
  path, found = list(sys.path), set()
  for _ in range(2):
    assert load_config(str(tmp_path / 'x.py')).model.dim == 128
    found.add(id(sys.modules['colorsys']))
  assert len(found) == 1 and sys.path == path and not [name for name in sys.modules if name.startswith('settings')]


def test_override_may_give_what_a_config_file_leaves_open(tmp_path):
  body = f'import ml_collections as m\n{BASE}  c.model.dim = m.config_dict.placeholder(int)\n  return c'
  (tmp_path / 'x.py').write_text(body)
  assert load_config(str(tmp_path / 'x.py'), ['--config.model.dim=256']).model.dim == 256
  with pytest.raises(UserError, match='x.py.: model.dim=None must be of type int'):
    load_config(str(tmp_path / 'x.py'))


def test_config_file_may_hold_dataclasses_and_numbers_of_numpy(tmp_path):
  sizes = '@dataclasses.dataclass\nclass Sizes:\n  dim: int = 128\n'
  head = f'from __future__ import annotations\nimport dataclasses\nimport numpy as np\n{sizes}'
  rate = '  c.train.learning_rate = np.float64(1e-3)'
  (tmp_path / 'x.py').write_text(f'{head}{BASE}  c.model.dim = Sizes().dim\n{rate}\n  return c')
  config = load_config(str(tmp_path / 'x.py'))
  assert config.model.dim == 128 and type(config.train.learning_rate) is float
