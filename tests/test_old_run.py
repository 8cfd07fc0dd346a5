"""A run directory of an earlier version is whole, evaluates to what it recorded, and goes on as it would have.

tests/data/old_run was made by commit 1e0ca4d on made-up sentences. Training was killed after update 3 of 4, so that the
last checkpoint is that of update 2; `after_4` is what the same commit logged when it went on.
"""

import json
import shutil
from pathlib import Path

import pytest

import mmjax
from mmjax.data.index import verify
from mmjax.errors import StorageError
from mmjax.inference.api import load_run
from mmjax.inference.measure import measure_text
from mmjax.run.checkpoint import Checkpoints
from mmjax.run.directory import RunDir, open_run
from mmjax.run.log import read_metrics
from mmjax.training.loop import fit
from tests.helpers import rarely

OLD = Path('tests/data/old_run')


@pytest.fixture
def old(tmp_path):
  """A copy of the run, and its settings, which say where the copy's text is."""
  shutil.copytree(OLD, tmp_path, dirs_exist_ok=True)
  run = RunDir(tmp_path / 'run')
  config = run.read_config()
  return run, config.with_settings({'data.train_files': '', 'data.prepared_dir': str(tmp_path / 'prepared')})


def last_evaluation(run: RunDir) -> dict:
  return [record for record in read_metrics(run.metrics_path) if record['kind'] == 'eval'][-1]


def assert_same_losses(found: dict, recorded: dict) -> None:
  for name in ('loss', 'bits_per_byte', 'accuracy', 'tokens', 'text_bytes'):
    assert found[name] == pytest.approx(recorded[name], rel=1e-5), name


def test_old_files_are_sealed_as_they_were(old):
  run, _ = old
  manifest = json.loads((run.checkpoints_path / '2' / 'metadata' / 'metadata').read_text())
  assert 'crc32' in manifest and 'sha256' not in manifest
  assert 'revive_after' in json.loads(run.config_path.read_text())['memory']
  assert [verify(path.parent)['format'] for path in (run.path.parent / 'prepared').glob('*/index.json')] == [1]
  assert open_run(run.path).steps() == [2] and run.newest_step == 2


def test_damage_to_an_old_manifest_is_noticed(old):
  run, _ = old
  manifest = run.checkpoints_path / '2' / 'metadata' / 'metadata'
  manifest.write_text(manifest.read_text().replace('"step": 2', '"step": 2, "more": 1'))
  with pytest.raises(StorageError, match='no whole checkpoint is left'):
    mmjax.load(run.path)


def test_old_run_evaluates_to_what_it_recorded(old):
  run, config = old
  lm = load_run(run, config, 'best')
  recorded = last_evaluation(run)
  assert lm.step == recorded['step'] == 2
  assert_same_losses(measure_text(lm, run).to_dict(), recorded)


@pytest.mark.thorough
@pytest.mark.parametrize('text', rarely(['shards', 'sentences'], 'shards'))
def test_old_run_goes_on_as_it_would_have(old, text):
  run, config = old
  if text == 'sentences':  # prepared again, to the same tokens
    source, prepared = run.path.parent / 'text.jsonl', run.path.parent / 'again'
    config = config.with_settings({'data.train_files': str(source), 'data.prepared_dir': str(prepared)})
  fit(config, run.path)
  found = last_evaluation(run)
  assert found['step'] == 4 and len(run.read_record()['starts']) == 2
  assert_same_losses(found, json.loads((OLD / 'after_4.json').read_text()))
  assert Checkpoints(run.path).steps() == [2, 4]
