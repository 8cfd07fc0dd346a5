"""A run whose files rot: every command says which, uses what is whole, and never computes with something else."""

import os
import random
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

import mmjax
import train
from mmjax.config import flatten
from mmjax.errors import CommandError, StorageError, UserError
from mmjax.report.write import write_report
from mmjax.run.directory import RunDir
from mmjax.training.loop import fit
from tests.helpers import rarely, run_main, tiny_config


def files_of(directory: Path) -> list[Path]:
  return sorted(path for path in directory.rglob('*') if path.is_file())


def damage(path: Path, kind: str, draw: random.Random) -> None:
  data = bytearray(path.read_bytes())
  if kind == 'delete':
    path.unlink()
  elif kind == 'truncate':
    os.truncate(path, draw.randrange(len(data)) if data else 0)
  elif data:
    data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    path.write_bytes(data)


def damage_checkpoints(run: Path) -> None:
  """Flips a bit in the biggest file of every checkpoint: in the middle of its values."""
  for step in (run / 'checkpoints').glob('[0-9]*'):
    path = max(files_of(step / 'params'), key=lambda p: p.stat().st_size * (p.parent.name == 'd'))
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 16
    path.write_bytes(data)


def train_again(run: Path, monkeypatch, capsys) -> tuple[int, str]:
  """Types the command that made a run once more; returns exit code and stderr."""
  flags = [f'--config.{name}={value}' for name, value in flatten(RunDir(run).read_config().to_dict()).items()]
  code, _, err = run_main(train.main, monkeypatch, capsys, '--config', 'configs/base.py', '--workdir', run, *flags)
  return code, err


@pytest.mark.parametrize('how', ['flipped', 'removed'])
@pytest.mark.thorough
def test_run_without_a_whole_checkpoint_ends_with_code_4_and_never_starts_afresh(run, how, monkeypatch, capsys):
  before = (run / 'metrics.jsonl').read_bytes()
  if how == 'flipped':
    damage_checkpoints(run)
  else:
    shutil.rmtree(run / 'checkpoints')
  for _ in range(2):
    code, err = train_again(run, monkeypatch, capsys)
    assert code == 4 and 'no whole checkpoint is left' in err.splitlines()[-1]
  assert (run / 'metrics.jsonl').read_bytes() == before
  assert sorted(path.name for path in (run / 'checkpoints').iterdir()) == (
    ['3.corrupt', '6.corrupt'] if how == 'flipped' else []
  )
  with pytest.raises(StorageError, match='no whole checkpoint'):
    mmjax.load(run)


@pytest.mark.parametrize(
  'kind', [pytest.param(kind, marks=pytest.mark.slow) for kind in ('flip', 'truncate', 'delete')]
)
def test_damage_to_any_file_of_a_run_is_refused_or_changes_nothing(tiny_run, tmp_path, kind, capsys):
  whole = {step: mmjax.load(tiny_run, step).params for step in (3, 6)}
  config = RunDir(tiny_run).read_config()
  draw = random.Random(kind)
  refused = []
  for file in files_of(tiny_run):
    run = Path(shutil.copytree(tiny_run, tmp_path / 'run'))
    damage(run / file.relative_to(tiny_run), kind, draw)
    try:
      lm = mmjax.load(run, 'last')
      assert lm.config == config
      jax.tree.map(np.testing.assert_array_equal, lm.params, whole[lm.step])
      fit(config, run)
    except CommandError as error:
      assert str(run) in str(error), error
      refused.append(file.name)
    try:
      write_report(run)
    except CommandError as error:
      assert str(run) in str(error), error
    shutil.rmtree(run)
  assert {'config.json', 'run.json', 'tokenizer.model'} <= set(refused)
  assert len(refused) < len(files_of(tiny_run)) / 3


@pytest.mark.parametrize('year', rarely([1971, 2170], 2170))
@pytest.mark.thorough
def test_files_from_another_time_are_used_as_they_are(run, year, monkeypatch):
  for path in [run, *run.rglob('*')]:
    os.utime(path, ns=(0, int((year - 1970) * 365.25 * 86400e9)))
  fit(RunDir(run).read_config(), run)
  assert mmjax.load(run).step == 6


@pytest.mark.slow
def test_clock_that_jumps_changes_no_result(tiny_run, tmp_path, monkeypatch):
  clock = iter(random.Random(0).choices([0.0, 1e9, 4e9, -1e6], k=10_000))
  monkeypatch.setattr('time.time', lambda: next(clock))
  monkeypatch.setattr('time.time_ns', lambda: int(next(clock) * 1e9))
  fit(RunDir(tiny_run).read_config(), tmp_path)
  monkeypatch.undo()
  jax.tree.map(np.testing.assert_array_equal, mmjax.load(tmp_path).params, mmjax.load(tiny_run).params)


@pytest.mark.thorough
def test_directory_that_may_not_be_written_is_refused_before_data_are_prepared(tiny_run, tmp_path, monkeypatch):
  monkeypatch.setattr(os, 'access', lambda path, mode: False)  # root may write anywhere, so it is made up
  monkeypatch.setattr('mmjax.run.text.prepare', None)
  with pytest.raises(UserError, match=f'run cannot be a run directory: {tmp_path}: Permission denied'):
    fit(RunDir(tiny_run).read_config(), tmp_path / 'run')
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize('line', ['{"kind": "train", "step": 1}', '{"kidn": "train", "step": 1}', '{"kind": "eval"}'])
def test_report_of_damaged_records_is_one_sentence(tmp_path, line):
  RunDir(tmp_path).write_config(tiny_config())
  (tmp_path / 'metrics.jsonl').write_text(line + '\n')
  with pytest.raises(UserError, match=f'{tmp_path}: a record in metrics.jsonl or eval.json is damaged'):
    write_report(tmp_path)
