"""Run directories: one process at a time, files whole or untouched, settings that may not change refused by name."""

import contextlib
import errno
import json
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from mmjax.data.files import write_file
from mmjax.errors import StorageError, UserError
from mmjax.training.rundir import RunDir, atomic_write_json, compare_configs, open_run, read_json
from tests.helpers import tiny_config

HOLD_LOCK = """
import sys, time
from mmjax.training.rundir import RunDir
with RunDir(sys.argv[1]):
  print('locked', flush=True)
  time.sleep(60)
"""


@contextlib.contextmanager
def file_size_limit(n_bytes: int):
  """Lets no file grow beyond `n_bytes`: writes then fail half-way, as on a full disk."""
  limits = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, limits[1]))
  try:
    yield
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def start_holder(path: Path) -> subprocess.Popen:
  env = os.environ | {'PYTHONPATH': str(Path(__file__).parents[1]), 'JAX_PLATFORMS': 'cpu'}
  holder = subprocess.Popen([sys.executable, '-c', HOLD_LOCK, path], env=env, stdout=subprocess.PIPE, text=True)
  assert holder.stdout.readline() == 'locked\n'
  return holder


def test_second_process_is_refused_and_a_dead_ones_lock_taken_over(tmp_path):
  holder = start_holder(tmp_path / 'run')
  try:
    with pytest.raises(UserError, match=rf'is in use by process {holder.pid} on \S+ since 20\d\d-') as caught:
      RunDir(tmp_path / 'run').__enter__()
    assert caught.value.exit_code == 2
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    with RunDir(tmp_path / 'run') as run:
      assert json.loads((run.path / 'lock').read_text())['pid'] == os.getpid()
  finally:
    holder.kill()
    holder.communicate()


def test_lock_is_released_on_the_way_out_of_an_error(tmp_path):
  with pytest.raises(KeyError), RunDir(tmp_path):
    raise KeyError
  with RunDir(tmp_path), pytest.raises(UserError, match=f'in use by process {os.getpid()}'):
    RunDir(tmp_path).__enter__()


def test_lock_without_a_name_in_it_is_still_a_lock(tmp_path):
  with RunDir(tmp_path):
    os.truncate(tmp_path / 'lock', 0)
    with pytest.raises(UserError, match='another process that just started'):
      RunDir(tmp_path).__enter__()


@pytest.mark.parametrize('name', ['file', 'file/run', 'file/deeper/run'])
def test_path_that_is_a_file_is_refused(tmp_path, name):
  (tmp_path / 'file').touch()
  with pytest.raises(UserError, match=f'cannot be a run directory: {tmp_path}/file is a file'):
    RunDir(tmp_path / name).__enter__()


@pytest.mark.parametrize(
  ('code', 'kind'), [(errno.EROFS, UserError), (errno.EACCES, UserError), (errno.ENOSPC, StorageError)]
)
def test_directory_that_cannot_be_made_is_one_sentence(tmp_path, monkeypatch, code, kind):
  def fail(*args, **kwargs):
    raise OSError(code, os.strerror(code))

  monkeypatch.setattr(Path, 'mkdir', fail)
  with pytest.raises(kind, match=f'run directory .*/run cannot be created: {os.strerror(code)}'):
    RunDir(tmp_path / 'run').__enter__()


def test_full_disk_at_the_lock_is_one_sentence(tmp_path):
  with file_size_limit(0), pytest.raises(StorageError, match='lock cannot be locked'):
    RunDir(tmp_path).__enter__()


def test_file_is_replaced_whole_or_not_at_all(tmp_path):
  path = tmp_path / 'a.json'
  atomic_write_json(path, {'x': [1, float('nan'), float('inf')], 'y': 'é'})
  assert read_json(path) == {'x': [1, None, None], 'y': 'é'}
  with open(path, 'rb') as reader:  # a reader in the middle of the file keeps the old one
    write_file(path, b'new')
    assert reader.read() != b'new' and path.read_bytes() == b'new'
  before = path.read_bytes()
  with file_size_limit(1000), pytest.raises(StorageError, match=r"a\.json' cannot be written: File too large"):
    write_file(path, b'x' * 5000)
  assert path.read_bytes() == before
  assert [p.name for p in tmp_path.iterdir()] == ['a.json']


def test_half_written_files_of_a_killed_process_are_removed(tmp_path):
  (tmp_path / '.config.json.123.tmp').write_text('{')
  with RunDir(tmp_path):
    assert not list(tmp_path.glob('.*'))


def test_config_comes_back_equal(tmp_path):
  with RunDir(tmp_path) as run:
    run.write_config(tiny_config())
  assert open_config(tmp_path) == tiny_config()


def open_config(path: Path):
  return RunDir(path).read_config()


@pytest.mark.parametrize('text', ['', '{"seed": 1', '[' * 100_000, '{"seed": 1}', '[]', '\ufeff{}'])
def test_damaged_config_is_refused_by_name(tmp_path, text):
  (tmp_path / 'config.json').write_text(text)
  with pytest.raises(UserError, match=r'config\.json'):
    open_config(tmp_path)


def test_config_from_before_a_setting_existed_reads_as_the_run_was(tmp_path):
  config = tiny_config()
  settings = config.to_dict()
  del settings['train']['max_loss_factor'], settings['runtime']['coordinator'], settings['runtime']['process_id']
  atomic_write_json(tmp_path / 'config.json', settings)
  old = RunDir(tmp_path).read_config()
  assert old == config
  compare_configs(old, config, allow_config_change=False)
  with pytest.raises(UserError, match=r'max_loss_factor 0\.0 -> 3\.0; --allow_config_change'):
    compare_configs(old, tiny_config(train__max_loss_factor=3), allow_config_change=False)
  del settings['train']['learning_rate']  # was always there
  atomic_write_json(tmp_path / 'config.json', settings)
  with pytest.raises(UserError, match="config.json: setting 'train.learning_rate' is missing"):
    RunDir(tmp_path).read_config()


def test_start_is_recorded_and_other_data_refused(tmp_path):
  identity = {'data_sha256': 'a1', 'tokenizer_sha256': 'b2'}
  with RunDir(tmp_path) as run:
    run.record_start(identity, 0)
    run.record_start(identity, 40)
    recorded = read_json(run.run_path)
    with pytest.raises(UserError, match='other data: tokenizer_sha256 b2 -> c3; choose'):
      run.record_start(identity | {'tokenizer_sha256': 'c3'}, 40)
    assert read_json(run.run_path) == recorded
  assert recorded['identity'] == identity
  assert [start['step'] for start in recorded['starts']] == [0, 40]
  assert recorded['starts'][0]['versions']['jax'] and recorded['starts'][0]['pid'] == os.getpid()


@pytest.mark.parametrize(
  'free',
  [
    {'train__log_interval': 3},
    {'train__eval_interval': 3},
    {'train__checkpoint_interval': 3},
    {'train__max_skipped_updates': 3},
    {'data__workers': 1},
    {'data__on_bad_line': 'skip'},
    {'data__prepared_dir': 'elsewhere'},
    {'runtime__row_devices': 2},
    {'runtime__remat': 'block'},
    {},
  ],
)
def test_free_settings_may_change_on_resume(free):
  compare_configs(tiny_config(), tiny_config(**free), allow_config_change=False)


def test_schedule_may_change_only_on_request():
  old, new = tiny_config(), tiny_config(train__max_steps=20, train__learning_rate=0.5)
  with pytest.raises(UserError, match=r'learning_rate 0.01 -> 0.5.*--allow_config_change') as caught:
    compare_configs(old, new, allow_config_change=False)
  assert 'train.max_steps 10 -> 20' in str(caught.value)
  compare_configs(old, new, allow_config_change=True)


@pytest.mark.parametrize(
  ('fixed', 'said'),
  [
    ({'seed': 5}, 'seed 0 -> 5'),
    ({'model__dim': 64}, 'model.dim 32 -> 64'),
    ({'memory__bank_std': 0.5}, 'memory.bank_std 1.0 -> 0.5'),
    ({'data__layout': 'padded'}, "data.layout 'packed' -> 'padded'"),
    ({'data__train_files': 'x.txt'}, "data.train_files '' -> 'x.txt'"),
    ({'train__batch_size': 8}, 'train.batch_size 4 -> 8'),
    ({'train__accumulation_steps': 1}, 'train.accumulation_steps 2 -> 1'),
    ({'train__dtype': 'bfloat16'}, "train.dtype 'float32' -> 'bfloat16'"),
  ],
)
def test_settings_that_make_another_run_never_change(fixed, said):
  with pytest.raises(UserError) as caught:
    compare_configs(tiny_config(), tiny_config(**fixed), allow_config_change=True)
  assert said in str(caught.value)


def make_run(path: Path) -> Path:
  with RunDir(path) as run:
    run.write_config(tiny_config())
  (path / 'tokenizer.model').touch()
  (path / 'checkpoints' / '10').mkdir(parents=True)
  return path


def test_run_is_opened_without_its_lock(tmp_path):
  make_run(tmp_path / 'a')
  with RunDir(tmp_path / 'a'):
    assert open_run(tmp_path / 'a').read_config() == tiny_config()
  (tmp_path / 'a' / 'tokenizer.model').rename(tmp_path / 'a' / 'tokenizer.json')
  assert open_run(tmp_path / 'a').tokenizer_path.name == 'tokenizer.json'


def test_what_is_no_run_is_refused_with_what_is_missing(tmp_path):
  make_run(tmp_path / 'exp_1_4_2')
  with pytest.raises(UserError, match=r'no run directory .*/exp_1_42; did you mean .*/exp_1_4_2\?'):
    open_run(tmp_path / 'exp_1_42')
  with pytest.raises(UserError, match='no run directory /nowhere/at/all'):
    open_run('/nowhere/at/all')
  with pytest.raises(UserError, match='is a file; a run is a directory'):
    open_run(tmp_path / 'exp_1_4_2' / 'config.json')
  (tmp_path / 'empty').mkdir()
  with pytest.raises(UserError, match=r'not a run directory: config\.json, tokenizer\.model, checkpoints is missing'):
    open_run(tmp_path / 'empty')
  checkpoints = tmp_path / 'exp_1_4_2' / 'checkpoints'
  (checkpoints / '10').rename(checkpoints / '10.corrupt')
  with pytest.raises(StorageError, match='has no whole checkpoint left'):
    open_run(tmp_path / 'exp_1_4_2')
  (checkpoints / '10.corrupt').rename(checkpoints / '10.orbax-checkpoint-tmp')
  with pytest.raises(UserError, match='has no checkpoint yet'):
    open_run(tmp_path / 'exp_1_4_2')
