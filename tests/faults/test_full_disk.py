"""A disk that fills up: a real one of a few megabytes where mounting is allowed, else the sizes are made up."""

import dataclasses
import errno
import json
import os
import shutil
import subprocess
from pathlib import Path

import jax
import numpy as np
import pytest

import mmjax
from mmjax.config import Config
from mmjax.console import Progress
from mmjax.data import prepare as prepare_module
from mmjax.data import shards
from mmjax.data.index import verify
from mmjax.data.prepare import prepare
from mmjax.errors import StorageError, UserError
from mmjax.files import storage_errors
from mmjax.run.checkpoint import Checkpoints
from mmjax.run.directory import RunDir
from mmjax.run.log import read_metrics
from mmjax.training.loop import fit

DISK_BYTES = 6 * 2**20


@pytest.fixture
def small_disk(tmp_path):
  """A file system of a few megabytes."""
  path = tmp_path / 'disk'
  path.mkdir()
  try:
    mounted = subprocess.run(['mount', '-t', 'tmpfs', '-o', f'size={DISK_BYTES}', 'tmpfs', path], capture_output=True)
  except OSError:
    pytest.skip('there is no mount command here')
  if mounted.returncode:
    pytest.skip('mounting is not allowed here')
  yield path
  subprocess.run(['umount', '--lazy', path], check=True)


def fill(disk: Path) -> Path:
  """Leaves not one free page on a disk; returns the file that takes the room."""
  ballast = disk / 'ballast'
  with open(ballast, 'wb', buffering=0) as handle:
    for size in (2**16, 1):
      try:
        while handle.write(b'\0' * size) == size:
          pass
      except OSError:
        continue
  assert shutil.disk_usage(disk).free == 0
  return ballast


def settings(tiny_run: Path) -> Config:
  """The settings of a finished run, but for a checkpoint at each step, which changes nothing that is compiled."""
  config = RunDir(tiny_run).read_config()
  return config.with_settings({'train.checkpoint_interval': 1})


def full_before(monkeypatch, full_steps: list[int], take: callable, give: callable) -> None:
  """Lets the disk be full while the given steps are saved."""
  real = Checkpoints.save

  def save(self, step, *args):
    (take if step in full_steps else give)()
    real(self, step, *args)

  monkeypatch.setattr(Checkpoints, 'save', save)


def assert_same_end(run: Path, tiny_run: Path) -> None:
  lm = mmjax.load(run, 'last')
  assert lm.step == 6
  jax.tree.map(np.testing.assert_array_equal, lm.params, mmjax.load(tiny_run, 'last').params)


@pytest.mark.thorough
def test_too_little_room_is_survived_twice_and_ends_the_run_the_third_time(tiny_run, tmp_path, monkeypatch, capsys):
  real, free = shutil.disk_usage, {'bytes': 10**12}
  monkeypatch.setattr(shutil, 'disk_usage', lambda path: real(path)._replace(free=free['bytes']))
  full, room = lambda: free.update(bytes=1000), lambda: free.update(bytes=10**12)
  with monkeypatch.context() as patch:  # three times, but never three in a row
    full_before(patch, [1, 3, 4], full, room)
    fit(settings(tiny_run), tmp_path / 'survives')
  assert_same_end(tmp_path / 'survives', tiny_run)
  capsys.readouterr()
  full_before(monkeypatch, [3, 4, 5], full, room)
  with pytest.raises(StorageError, match=r'step 5 was not saved: it needs 1\.\d MB and .* has 0\.0 MB free') as caught:
    fit(settings(tiny_run), tmp_path / 'ends')
  assert caught.value.exit_code == 4
  said = capsys.readouterr().out
  assert all(f'Checkpoint {step} failed ({n} in a row)' in said for n, step in enumerate((3, 4, 5), 1))
  assert Checkpoints(tmp_path / 'ends').steps() == [1, 2]  # the last good steps stay


@pytest.mark.parametrize('checked', [True, False])
@pytest.mark.thorough
def test_disk_that_is_really_full_is_survived(tiny_run, small_disk, monkeypatch, capsys, checked):
  def give():
    (small_disk / 'ballast').unlink(missing_ok=True)

  full_before(monkeypatch, [2, 3], lambda: fill(small_disk), give)
  if not checked:  # as if another process took the room after the look at it
    monkeypatch.setattr(Checkpoints, '_check_space', lambda *_: None)
  run = small_disk / 'run'
  fit(settings(tiny_run), run)
  out, err = capsys.readouterr()
  assert 'Checkpoint 2 failed (1 in a row)' in out and 'Checkpoint 3 failed (2 in a row)' in out
  assert err.count('TensorBoard files cannot be written (No space left on device); the run goes on') == 1
  steps = [record['step'] for record in read_metrics(run / 'metrics.jsonl')]  # every line is whole
  assert steps[:2] == [1, 2] and steps[-1] == 6  # the line of step 3 may have fitted in the last page
  assert not list(run.rglob('*.tmp')) and not list(run.glob('checkpoints/*tmp*'))
  assert_same_end(run, tiny_run)


def test_run_directory_on_a_full_disk_is_one_sentence_and_code_4(tiny_run, small_disk):
  fill(small_disk)
  with pytest.raises(StorageError, match='(lock cannot be locked|cannot be created): No space left on device'):
    fit(settings(tiny_run), small_disk / 'run')


def test_read_only_disk_is_refused_for_a_run_and_read_from(tiny_run, small_disk):
  run = Path(shutil.copytree(tiny_run, small_disk / 'run'))
  subprocess.run(['mount', '-o', 'remount,ro', small_disk], check=True)
  with pytest.raises(StorageError, match='run: Read-only file system') as caught:
    fit(settings(tiny_run), run)
  assert caught.value.exit_code == 4
  assert mmjax.load(run).step == mmjax.load(tiny_run).step


def test_disk_that_fills_up_while_text_is_prepared_ends_with_code_4_and_goes_on(tiny_run, small_disk, monkeypatch):
  config = settings(tiny_run)
  data = dataclasses.replace(config.data, prepared_dir=f'{small_disk}/out', tokenizer=f'{tiny_run}/tokenizer.model')
  with pytest.raises(StorageError, match=r'needs about \d+\.\d MB but 6\.\d MB are free') as caught:
    prepare(data, 300, Progress(quiet=True))
  assert caught.value.exit_code == 4 and not list(small_disk.glob('out/*/*'))
  monkeypatch.setattr(prepare_module, 'check_room', lambda *_: None)  # as if the room went after the look at it
  monkeypatch.setattr(shards, 'check_room', lambda *_: None)
  monkeypatch.setattr('mmjax.data.blocks.BLOCK_BYTES', 4000)
  monkeypatch.setattr(shards, 'SHARD_TOKENS', 3000)
  finish_shards, rounds = shards.ShardBuilder._finish_shards, []

  def fill_up(self, position):
    rounds.append(position)
    if len(rounds) == 2:
      fill(small_disk)
    finish_shards(self, position)

  with monkeypatch.context() as patch:
    patch.setattr(shards.ShardBuilder, '_finish_shards', fill_up)
    with pytest.raises(StorageError, match='cannot be written: No space left on device'):
      prepare(data, 300, Progress(quiet=True))
  (small_disk / 'ballast').unlink()
  [directory] = (small_disk / 'out').iterdir()
  assert not (directory / 'index.json').exists()  # nothing half-written is taken for whole
  assert prepare(data, 300, Progress(quiet=True)) == directory
  found, whole = verify(directory), json.loads((tiny_run / 'data.json').read_text())
  for split in ('train', 'valid'):
    assert {key: found['splits'][split][key] for key in ('tokens', 'documents')} == {
      key: whole['splits'][split][key] for key in ('tokens', 'documents')
    }


@pytest.mark.parametrize(
  ('number', 'kind', 'tells'),
  [
    (errno.ENOSPC, StorageError, True),
    (errno.EDQUOT, StorageError, True),
    (errno.EROFS, StorageError, False),
    (errno.EFBIG, StorageError, False),
    (errno.EACCES, UserError, False),
  ],
)
def test_room_is_told_where_there_is_too_little(tmp_path, number, kind, tells):
  with pytest.raises(kind) as caught, storage_errors(tmp_path / 'file'):
    raise OSError(number, os.strerror(number))
  assert str(tmp_path / 'file') in str(caught.value) and ('MB free' in str(caught.value)) == tells
