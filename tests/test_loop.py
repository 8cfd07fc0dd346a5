"""Whole runs, tiny: resume is exact, signals save, broken updates are survived, several devices agree with one."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from mmjax.config import Config
from mmjax.errors import DivergedError, StoppedError, UserError
from mmjax.training import loop
from mmjax.training.loop import fit
from mmjax.training.metrics import read_metrics
from tests.helpers import TINY, rarely, tiny_config, xla_flags

WORDS = 'the memory reads a row of its bank and writes what it learned into the stream again'.split()
REPOSITORY = Path(__file__).parent.parent


@pytest.fixture(scope='module')
def text(tmp_path_factory):
  """A few hundred short documents, as jsonl, and where their shards may go."""
  folder = tmp_path_factory.mktemp('text')
  draw = random.Random(0)
  documents = [' '.join(draw.choices(WORDS, k=draw.randint(5, 60))) for _ in range(300)]
  (folder / 'text.jsonl').write_text('\n'.join(json.dumps({'text': d}) for d in documents))
  return folder


def overrides(text, **more: object) -> dict[str, object]:
  return {
    'data__train_files': f'{text}/text.jsonl',
    'data__valid_fraction': 0.1,
    'data__prepared_dir': f'{text}/prepared',
    'data__workers': 1,
    'train__log_interval': 2,
    'train__eval_interval': 4,
    'train__checkpoint_interval': 3,
    **more,
  }


def run_config(text, **more: object) -> Config:
  return tiny_config(**overrides(text, **more))


def final_state(workdir: Path) -> dict[str, np.ndarray]:
  """Every array of the last checkpoint, by name, read without mmjax."""
  import orbax.checkpoint as ocp

  last = max((p for p in (workdir / 'checkpoints').iterdir() if p.name.isdigit()), key=lambda p: int(p.name))
  arrays = {}
  for item in ('params', 'rest'):
    tree = ocp.StandardCheckpointer().restore(last / item)
    arrays |= {f'{item}{jax.tree_util.keystr(p)}': np.asarray(x) for p, x in jax.tree_util.tree_leaves_with_path(tree)}
  return arrays


def assert_same_run(a: Path, b: Path) -> None:
  left, right = final_state(a), final_state(b)
  assert left.keys() == right.keys() and len(left) > 20
  for name in left:
    np.testing.assert_array_equal(left[name], right[name], err_msg=name)
  timing = ('seconds', 'tokens_per_second', 'peak_bytes')
  logs = [
    [{k: v for k, v in line.items() if k not in timing} for line in read_metrics(w / 'metrics.jsonl')] for w in (a, b)
  ]
  evals = [[line for line in log if line['kind'] == 'eval'] for log in logs]
  assert evals[0] == evals[1] and len(evals[0]) == 3
  assert [line['tokens'] for line in logs[0]][-1] == [line['tokens'] for line in logs[1]][-1]


class StopAfter:
  """Stands in for StopSignals: asks to stop after one given step."""

  def __init__(self, step: int):
    self.step = step

  def __enter__(self):
    return self

  def __exit__(self, *_):
    return None

  def requested(self, step: int) -> bool:
    return step == self.step


@pytest.fixture(scope='module')
def undisturbed(text, tmp_path_factory):
  workdir = tmp_path_factory.mktemp('undisturbed')
  fit(run_config(text), workdir)
  return workdir


def test_run_leaves_what_it_promises(undisturbed):
  names = {p.name for p in undisturbed.iterdir()}
  assert {'config.json', 'run.json', 'tokenizer.model', 'metrics.jsonl', 'tensorboard', 'checkpoints'} <= names
  log = read_metrics(undisturbed / 'metrics.jsonl')
  train = [line for line in log if line['kind'] == 'train']
  assert [line['step'] for line in train] == [2, 3, 4, 6, 8, 9, 10]
  assert train[-1]['tokens'] <= 10 * 8 * 16 and train[-1]['loss'] < train[0]['loss']
  assert len(train[0]['bank']) == 2 and 0 < train[0]['bank'][0]['used_share'] <= 1
  assert [line['step'] for line in log if line['kind'] == 'eval'] == [4, 8, 10]
  assert any((undisturbed / 'tensorboard').iterdir())


@pytest.mark.parametrize('stops', rarely([(1,), (3, 7), (9,)], (3, 7)))
def test_stopped_and_resumed_run_ends_bit_for_bit_the_same(text, undisturbed, tmp_path, monkeypatch, stops):
  for step in stops:
    monkeypatch.setattr(loop, 'StopSignals', lambda step=step: StopAfter(step))
    with pytest.raises(StoppedError, match=f'step {step} of 10'):
      fit(run_config(text), tmp_path)
  monkeypatch.undo()
  fit(run_config(text), tmp_path)
  assert_same_run(undisturbed, tmp_path)


def test_resumed_run_revives_and_updates_rows_as_an_undisturbed_one(text, tmp_path, monkeypatch):
  config = run_config(text, **ROW_BY_ROW)
  fit(config, tmp_path / 'whole')
  monkeypatch.setattr(loop, 'StopSignals', lambda: StopAfter(6))  # within the second window of four updates
  with pytest.raises(StoppedError):
    fit(config, tmp_path / 'stopped')
  monkeypatch.undo()
  fit(config, tmp_path / 'stopped')
  assert_same_run(tmp_path / 'whole', tmp_path / 'stopped')
  for workdir in (tmp_path / 'whole', tmp_path / 'stopped'):
    train = [line for line in read_metrics(workdir / 'metrics.jsonl') if line['kind'] == 'train']
    assert {line['step'] for line in train if line['revived_rows']} == {4, 8}
    assert all(0 <= line['revived_rows'] < 256 and line['revived_keys'] >= 0 for line in train)


def test_finished_run_is_left_alone(text, undisturbed):
  before = final_state(undisturbed)
  fit(run_config(text), undisturbed)
  after = final_state(undisturbed)
  assert all(np.array_equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize(
  ('change', 'said'),
  [
    ({'model__n_layers': 3}, 'model.n_layers 2 -> 3'),
    ({'data__valid_fraction': 0.2}, 'data.valid_fraction 0.1 -> 0.2'),
    ({'train__max_steps': 12}, '--allow_config_change'),
  ],
)
def test_other_settings_in_a_used_workdir_are_refused(text, undisturbed, change, said):
  with pytest.raises(UserError, match=said):
    fit(run_config(text, **change), undisturbed)


@pytest.mark.slow  # test_eight_devices_give_the_losses_of_one changes one too
def test_changed_schedule_is_accepted_when_asked_for(text, tmp_path):
  fit(run_config(text, train__max_steps=2), tmp_path)
  fit(run_config(text, train__max_steps=4), tmp_path, allow_config_change=True)
  assert read_metrics(tmp_path / 'metrics.jsonl')[-1]['step'] == 4


def broken_step(real, bad_steps):
  """A train step whose loss is NaN at the given steps: the batch there has its weights poisoned through the norm."""

  def make(*args, **kwargs):
    step = real(*args, **kwargs)

    def poisoned(state, batch):
      bad = jax.numpy.isin(state['step'], jax.numpy.array(bad_steps))
      scale = state['params']['norm']['scale']
      worse = {**state, 'params': {**state['params'], 'norm': {'scale': scale * jax.numpy.where(bad, np.nan, 1.0)}}}
      after, metrics = step(worse, batch)
      kept = jax.numpy.where(bad, scale, after['params']['norm']['scale'])
      return {**after, 'params': {**after['params'], 'norm': {'scale': kept}}}, metrics

    return poisoned

  return make


def test_non_finite_update_is_skipped_logged_and_survived(text, tmp_path, monkeypatch):
  from mmjax.training import setup

  monkeypatch.setattr(setup, 'make_train_step', broken_step(setup.make_train_step, [3, 4]))
  fit(run_config(text), tmp_path)
  log = read_metrics(tmp_path / 'metrics.jsonl')
  skipped = [line for line in log if line['kind'] == 'skipped']
  assert [(line['step'], line['in_a_row'], line['loss']) for line in skipped] == [(4, 1, None), (5, 2, None)]
  assert all(len(line['row_ids']) == 8 for line in skipped)
  assert all(np.isfinite(x).all() for x in final_state(tmp_path).values())


def test_too_many_non_finite_updates_end_the_run_with_a_dump(text, tmp_path, monkeypatch):
  from mmjax.training import setup

  monkeypatch.setattr(setup, 'make_train_step', broken_step(setup.make_train_step, [4, 5, 6, 7]))
  with pytest.raises(DivergedError, match='3 non-finite updates in a row up to step 7'):
    fit(run_config(text, train__max_skipped_updates=3), tmp_path)
  dump = json.loads((tmp_path / 'diverged' / 'step-7.json').read_text())
  batch = np.load(tmp_path / 'diverged' / 'batch-7.npz')
  assert dump['row_ids'] == batch['row_id'].tolist() and batch['input'].shape == (8, 16)
  assert dump['parameter_norms']['memory_bank'] > 0


def command(text, workdir, **more: object) -> list[str]:
  settings = TINY | {name.replace('__', '.'): value for name, value in overrides(text, **more).items()}
  flags = [f'--config.{name}={value}' for name, value in settings.items()]
  return [sys.executable, 'train.py', '--config', 'configs/base.py', '--workdir', str(workdir), *flags]


def wait_for(path: Path, text: str, process: subprocess.Popen, seconds: float = 90) -> None:
  deadline = time.monotonic() + seconds
  while not (path.exists() and text in path.read_text()):
    assert process.poll() is None and time.monotonic() < deadline, f'{text!r} never appeared in {path}'
    time.sleep(0.05)


def test_sigterm_saves_and_exits_75_and_a_second_run_is_refused(text, tmp_path):
  endless = {'train__max_steps': 1_000_000, 'train__eval_interval': 1_000_000, 'train__checkpoint_interval': 1_000_000}
  start = command(text, tmp_path, **endless)
  process = subprocess.Popen(start, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
  try:
    wait_for(tmp_path / 'metrics.jsonl', '"kind"', process)
    with pytest.raises(UserError, match=f'in use by process {process.pid}'):
      fit(run_config(text, **endless), tmp_path)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
  finally:
    process.kill()
  assert process.returncode == 75
  assert 'the same command goes on from there' in errors and 'Traceback' not in errors
  assert any((tmp_path / 'checkpoints').glob('[0-9]*'))


ONE_BATCH = {'train__batch_size': 8, 'train__accumulation_steps': 1, 'train__max_steps': 5}
ROW_BY_ROW = {
  'memory__bank_update': 'lazy', 'memory__revive_after': 4, 'model__knowledge_num': 256, 'model__n_layers': 1,
}  # fmt: skip
DEVICES = """
import json, pathlib, sys
from tests.test_loop import run_config
from mmjax.training.loop import fit
text, workdir, settings = sys.argv[1:]
fit(run_config(pathlib.Path(text), **json.loads(settings)), pathlib.Path(workdir))
"""


@pytest.mark.parametrize(
  ('row_devices', 'more'),
  [pytest.param(1, {}, marks=pytest.mark.slow), (4, {}), pytest.param(4, ROW_BY_ROW, marks=pytest.mark.slow)],
)
def test_eight_devices_give_the_losses_of_one(text, tmp_path, row_devices, more):
  settings = ONE_BATCH | more
  fit(run_config(text, **settings), tmp_path / 'one')
  flags = {'XLA_FLAGS': xla_flags(8), 'PYTHONPATH': str(REPOSITORY)}
  subprocess.run(
    [sys.executable, '-c', DEVICES, str(text), str(tmp_path / 'eight'),
     json.dumps(settings | {'runtime__row_devices': row_devices})],
    cwd=REPOSITORY, env=os.environ | flags, check=True, timeout=300,
  )  # fmt: skip
  one, eight = (read_metrics(tmp_path / name / 'metrics.jsonl') for name in ('one', 'eight'))
  assert len(one) == len(eight) == 6
  for a, b in zip(one, eight, strict=True):
    assert a['step'] == b['step'] and a['loss'] == pytest.approx(b['loss'], abs=1e-4)
  # What eight devices wrote, one device goes on with.
  longer = run_config(text, **(settings | {'train__max_steps': 6}))
  fit(longer, tmp_path / 'eight', allow_config_change=True)
  assert read_metrics(tmp_path / 'eight' / 'metrics.jsonl')[-1]['step'] == 6


@pytest.mark.parametrize(
  ('settings', 'said'),
  [
    ({'train__batch_size': 6}, r'train.batch_size=6 must be divisible by the 8 devices; nearest: 8'),
    ({'train__batch_size': 20}, r'nearest: 16 and 24'),
    (
      {'train__batch_size': 8, 'runtime__row_devices': 8, 'model__knowledge_num': 100},
      r'knowledge_num=100 must be divisible by the runtime.row_devices=8; nearest: 96 and 104',
    ),
    ({'runtime__row_devices': 3, 'runtime__data_devices': 3}, r'needs 9 devices; there are 8'),
  ],
)
def test_indivisible_batch_is_refused_with_the_nearest_sizes(monkeypatch, settings, said):
  from mmjax.training.sharding import make_mesh

  monkeypatch.setattr(jax, 'device_count', lambda: 8)
  with pytest.raises(UserError, match=said):
    make_mesh(tiny_config(**settings))


def test_too_little_text_is_refused_before_anything_is_written(text, tmp_path):
  with pytest.raises(UserError, match='one batch'):
    fit(run_config(text, train__batch_size=100_000), tmp_path / 'new')
  assert not (tmp_path / 'new').exists()
