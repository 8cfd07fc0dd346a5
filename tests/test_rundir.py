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
from types import SimpleNamespace

import pytest

from mmjax.data.index import INDEX
from mmjax.errors import StorageError, UserError
from mmjax.files import read_json, write_file, write_json
from mmjax.interop.convert import export_run
from mmjax.interop.llama import export_llama
from mmjax.report.write import write_report
from mmjax.run.directory import RunDir, open_run
from mmjax.run.identity import compare_configs
from mmjax.training import setup
from mmjax.training.setup import settle_config
from tests.helpers import tiny_config

HOLD_LOCK = """
import sys, time
from mmjax.run.directory import RunDir
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
    for use in (RunDir(tmp_path / 'run').__enter__, RunDir(tmp_path / 'run').check_usable):
      with pytest.raises(UserError, match=rf'is in use by process {holder.pid} on \S+ since 20\d\d-') as caught:
        use()
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
  for use in (RunDir(tmp_path / name).__enter__, RunDir(tmp_path / name).check_usable):
    with pytest.raises(UserError, match=f'cannot be a run directory: {tmp_path}/file is a file'):
      use()
  (tmp_path / 'link').symlink_to(tmp_path / 'gone')
  with pytest.raises(UserError, match='cannot be a run directory: .*/link is a link that leads nowhere'):
    RunDir(tmp_path / 'link').check_usable()


@pytest.mark.skipif(not sys.platform.startswith('linux'), reason='needs /proc')
def test_place_where_nothing_can_be_made_is_refused_before_the_text_is_prepared():
  with pytest.raises(UserError, match='/proc/no/run cannot be a run directory: '):
    RunDir('/proc/no/run').check_usable()


def test_name_that_is_too_long_or_no_text_is_one_sentence(tmp_path):
  with pytest.raises(UserError, match='cannot be a run directory: File name too long'):
    RunDir(tmp_path / ('n' * 300)).check_usable()
  with pytest.raises(UserError, match=r'udcff. cannot be a run directory: the name is not UTF-8'):
    RunDir(os.fsdecode(b'\xff')).check_usable()


@pytest.mark.parametrize(
  ('code', 'kind'),
  [
    (errno.EROFS, StorageError),
    (errno.EIO, StorageError),
    (errno.EACCES, UserError),
    (errno.ENOSPC, StorageError),
  ],
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
  write_json(path, {'x': [1, float('nan'), float('inf')], 'y': 'é'})
  assert read_json(path) == {'x': [1, None, None], 'y': 'é'}
  with open(path, 'rb') as reader:  # a reader in the middle of the file keeps the old one
    write_file(path, b'new')
    assert reader.read() != b'new' and path.read_bytes() == b'new'
  before = path.read_bytes()
  with file_size_limit(1000), pytest.raises(StorageError, match=r"a\.json' cannot be written: File too large"):
    write_file(path, b'x' * 5000)
  assert path.read_bytes() == before
  assert [p.name for p in tmp_path.iterdir()] == ['a.json']


def test_interrupted_write_leaves_nothing(tmp_path, monkeypatch):
  monkeypatch.setattr(os, 'fsync', lambda _: (_ for _ in ()).throw(KeyboardInterrupt))
  with pytest.raises(KeyboardInterrupt):
    write_file(tmp_path / 'a.json', b'x')
  assert not list(tmp_path.iterdir())


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


def test_any_changed_character_of_a_sealed_file_is_noticed(tmp_path):
  with RunDir(tmp_path) as run:
    run.write_config(tiny_config())
    run.record_start({'data_sha256': 'a1', 'tokenizer_sha256': 'b2'}, 0)
    for path, read in ((run.config_path, run.read_config), (run.run_path, lambda: read_json(run.run_path))):
      whole, value = path.read_bytes(), read()
      for at in range(0, len(whole), 7):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        if whole[at : at + 1].isspace() or b'"sha256"' in whole[at - 7 : at + 8]:
          continue  # what is between the values, and the name of the seal, which says nothing about them
        with pytest.raises(UserError, match=path.name):
          read()
      path.write_bytes(whole)
      assert read() == value
    settings = json.loads(run.config_path.read_bytes())
    settings['model']['rope_theta'] = 5e5
    run.config_path.write_text(json.dumps(settings))
    with pytest.raises(UserError, match="changed after it was written; if that was on purpose, remove 'sha256'"):
      run.read_config()
    del settings['sha256']
    run.config_path.write_text(json.dumps(settings))
    assert run.read_config().model.rope_theta == 5e5


def test_lost_file_of_a_trained_run_is_missed(tmp_path):
  with RunDir(tmp_path) as run:
    run.record_start({'data_sha256': 'a1'}, 0)
    run.run_path.unlink()
    (tmp_path / 'checkpoints' / '5').mkdir(parents=True)
    with pytest.raises(UserError, match=r'run\.json is missing'):
      run.record_start({'data_sha256': 'other'}, 5)
  with pytest.raises(UserError, match=r'config\.json is missing'):
    settle_config(run, tiny_config(), allow_config_change=False)


def link(path: Path, target: Path | str) -> Path:
  path.parent.mkdir(parents=True, exist_ok=True)
  path.symlink_to(target)
  return path


@pytest.mark.parametrize(
  ('name', 'target'),
  [
    *((name, '{}/outside') for name in ('metrics.jsonl', 'checkpoints', 'tensorboard', 'checkpoints/10/params')),
    ('plots', '../../outside'),
    ('report.md', '../../nothing'),
  ],
)
def test_link_out_of_the_directory_is_refused_by_name(tmp_path, name, target):
  (tmp_path / 'outside').mkdir()
  target = target.format(tmp_path)
  run = tmp_path / 'a' / 'run'
  path = link(run / name, target)
  write_json(run / 'config.json', tiny_config().to_dict())
  file = tmp_path / 'weights.safetensors'
  for use in (
    RunDir(run).__enter__,
    lambda: open_run(run),
    lambda: write_report(run),
    lambda: export_run(run, file, 'best', None),
    lambda: export_llama(run, tmp_path / 'llama', 'best', None),
  ):
    with pytest.raises(UserError, match=f'{path} is a link out of the run directory, to .*{target}; remove it'):
      use()
  assert not list((tmp_path / 'outside').iterdir()) and not (run / 'lock').exists()


def test_directory_that_is_a_link_and_links_within_it_are_used(tmp_path):
  link(tmp_path / 'run', make_run(tmp_path / 'disk'))
  link(tmp_path / 'disk' / 'best', 'checkpoints/10')
  with RunDir(tmp_path / 'run'):
    assert open_run(tmp_path / 'run').read_config() == tiny_config()


def test_nothing_is_written_through_a_link_that_was_laid(tmp_path):
  (tmp_path / 'victim').write_text('precious')
  with RunDir(tmp_path / 'run') as run:
    for name in ('config.json', f'.config.json.{os.getpid()}.tmp'):
      link(run.path / name, tmp_path / 'victim')
    run.write_config(tiny_config())
    assert not run.config_path.is_symlink() and run.read_config() == tiny_config()
  assert (tmp_path / 'victim').read_text() == 'precious'


@pytest.mark.parametrize('text', ['', '{"seed": 1', '[' * 100_000, '{"seed": 1}', '[]', '\ufeff{}'])
def test_damaged_config_is_refused_by_name(tmp_path, text):
  (tmp_path / 'config.json').write_text(text)
  with pytest.raises(UserError, match=r'config\.json'):
    open_config(tmp_path)


def test_config_from_before_a_setting_existed_reads_as_the_run_was(tmp_path):
  config = tiny_config()
  settings = config.to_dict()
  del settings['train']['max_loss_factor'], settings['runtime']['coordinator'], settings['runtime']['process_id']
  write_json(tmp_path / 'config.json', settings)
  old = RunDir(tmp_path).read_config()
  assert old == config
  compare_configs(old, config, allow_config_change=False)
  with pytest.raises(UserError, match=r'max_loss_factor 0\.0 -> 3\.0; --allow_config_change'):
    compare_configs(old, tiny_config(train__max_loss_factor=3), allow_config_change=False)
  del settings['train']['learning_rate']  # was always there
  write_json(tmp_path / 'config.json', settings)
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


def test_schedule_that_a_later_start_changes_is_recorded(tmp_path, monkeypatch):
  (tmp_path / INDEX).write_text('{}')
  monkeypatch.setattr(setup, 'write_tokenizer', lambda path, tokenizer: None)
  tokenizer = SimpleNamespace(sha256='b2', path=Path('tokenizer.model'))
  inputs = setup.Inputs(tokenizer, SimpleNamespace(directory=tmp_path), None, 'a1', 10, [])
  with RunDir(tmp_path / 'run') as run:
    for step, rate in ((0, 0.1), (4, 0.2), (6, 0.2)):
      setup.record_run(run, tiny_config(train__learning_rate=rate, train__log_interval=step + 1), inputs, step)
    starts = run.read_record()['starts']
  assert [start.get('changed') for start in starts] == [None, ['train.learning_rate 0.1 -> 0.2'], []]


@pytest.mark.parametrize(
  'free',
  [
    {'train__log_interval': 3},
    {'train__eval_interval': 3},
    {'train__checkpoint_interval': 3},
    {'train__max_skipped_updates': 3},
    {'data__workers': 1},
    {'data__on_bad_line': 'skip', 'data__train_files': 'elsewhere.jsonl'},
    {'data__prepared_dir': 'elsewhere'},
    {'runtime__row_devices': 2},
    {'runtime__remat': 'block'},
    {'train__batch_size': 2, 'train__accumulation_steps': 4},
    {'train__batch_size': 8, 'train__accumulation_steps': 1, 'runtime__remat': 'block'},
    {},
  ],
)
def test_free_settings_may_change_on_resume(free):
  text = {'data__train_files': 'text.jsonl'}
  compare_configs(tiny_config(**text), tiny_config(**(text | free)), allow_config_change=False)


def test_settings_that_do_nothing_may_change_on_resume():
  bag, gateless = {'model__sublayer': 'ngram_bag'}, {'model__sublayer': 'ngram_bag', 'memory__bag_gate': False}
  old = tiny_config(**gateless).with_settings({'memory.input': 'residual'})  # once accepted
  compare_configs(old, tiny_config(**gateless), allow_config_change=False)
  with pytest.raises(UserError, match="memory.input 'residual' -> 'attention'"):
    compare_configs(tiny_config(**bag, memory__input='residual'), tiny_config(**bag), allow_config_change=False)


def test_length_of_snippets_may_change_on_resume():  # which only building a bank looks at
  bank = {'memory__bank_init': 'file', 'memory__bank_file': 'bank.safetensors'}
  compare_configs(tiny_config(**bank), tiny_config(**bank, memory__knowledge_length=99), allow_config_change=False)


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
    ({'train__batch_size': 8}, 'batch_size 4 -> 8 (train.batch_size x train.accumulation_steps must stay 8); undo'),
    (
      {'train__batch_size': 2, 'train__accumulation_steps': 5},
      'batch_size 4 -> 2; train.accumulation_steps 2 -> 5 (train',
    ),
    ({'train__accumulation_steps': 1}, 'train.accumulation_steps 2 -> 1'),
    ({'train__dtype': 'bfloat16'}, "train.dtype 'float32' -> 'bfloat16'"),
    ({'train__optimizer': 'muon'}, "train.optimizer 'adamw' -> 'muon'"),
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
  with pytest.raises(UserError, match=r"no run directory .*/exp_1_42; did you mean '.*/exp_1_4_2'\?"):
    open_run(tmp_path / 'exp_1_42')
  with pytest.raises(UserError, match='no run directory /nowhere/at/all'):
    open_run('/nowhere/at/all')
  with pytest.raises(UserError, match='is a file; a run is a directory'):
    open_run(tmp_path / 'exp_1_4_2' / 'config.json')
  (tmp_path / 'empty').mkdir()
  with pytest.raises(UserError, match=r'it has no config\.json and no tokenizer\.model and no checkpoints'):
    open_run(tmp_path / 'empty')
  checkpoints = tmp_path / 'exp_1_4_2' / 'checkpoints'
  (checkpoints / '10').rename(checkpoints / '10.corrupt')
  with pytest.raises(StorageError, match='has no whole checkpoint left'):
    open_run(tmp_path / 'exp_1_4_2')
  (checkpoints / '10.corrupt').rename(checkpoints / '10.orbax-checkpoint-tmp')
  with pytest.raises(UserError, match='has no checkpoint yet'):
    open_run(tmp_path / 'exp_1_4_2')
