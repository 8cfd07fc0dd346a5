"""Whole runs, tiny: resume is exact, signals save, broken updates are survived, several devices agree with one."""

import contextlib
import itertools
import json
import math
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest

import mmjax
from mmjax.data.loader import train_batches
from mmjax.errors import DivergedError, StoppedError, StorageError, UserError
from mmjax.report.write import write_report
from mmjax.run.checkpoint import Checkpoints
from mmjax.run.directory import RunDir
from mmjax.run.log import read_metrics
from mmjax.run.placement import place
from mmjax.run.sharding import make_mesh, put_batch
from mmjax.run.text import training_data
from mmjax.training import loop
from mmjax.training.first_state import restore_state
from mmjax.training.learner import Learner
from mmjax.training.loop import fit
from mmjax.training.out_of_memory import explain_out_of_memory
from mmjax.training.recorder import Recorder
from mmjax.training.setup import open_inputs
from tests.helpers import (
  REPOSITORY,
  StopAfter,
  command,
  final_state,
  rarely,
  run_config,
  tiny_config,
  wait_for,
  xla_flags,
)
from tests.test_loader import write_split


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
  assert Checkpoints(a, read_only=True).best_step == Checkpoints(b, read_only=True).best_step
  assert [line['tokens'] for line in logs[0]][-1] == [line['tokens'] for line in logs[1]][-1]


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


@pytest.mark.parametrize('stops', rarely([(1,), (3, 8), (8,), (9,)], (8,)))
def test_stopped_and_resumed_run_ends_bit_for_bit_the_same(text, undisturbed, tmp_path, monkeypatch, stops):
  for step in stops:
    monkeypatch.setattr(loop, 'StopSignals', lambda step=step: StopAfter(step))
    with pytest.raises(StoppedError, match=f'step {step} of 10'):
      fit(run_config(text), tmp_path)
  monkeypatch.undo()
  fit(run_config(text), tmp_path)
  assert_same_run(undisturbed, tmp_path)
  with pytest.raises(UserError, match='has made 10 updates, more than the 9 that train.max_steps'):
    fit(run_config(text, train__max_steps=9), tmp_path, allow_config_change=True)
  assert RunDir(tmp_path).read_config().train.max_steps == 10


@pytest.mark.thorough
@pytest.mark.parametrize('looks_before', [1, 2], ids=['evaluation', 'save'])
def test_stop_within_an_evaluation_or_a_save_makes_no_more_updates(text, tmp_path, monkeypatch, looks_before):
  class Within(StopAfter):
    asked = 0

    def requested(self, step: int) -> bool:
      self.asked += step >= self.step
      return self.asked > looks_before

  monkeypatch.setattr(loop, 'StopSignals', lambda: Within(1))
  with pytest.raises(StoppedError, match='step 1 of 10'):
    fit(run_config(text, train__eval_interval=1), tmp_path)
  assert RunDir(tmp_path).steps() == [1]


@pytest.mark.thorough
def test_stop_within_a_save_that_fails_makes_another_update_and_saves_that(text, tmp_path, monkeypatch):
  class AfterTheSave(StopAfter):
    asked = 0

    def requested(self, step: int) -> bool:
      self.asked += 1
      return self.asked > 2

  save, failures = Checkpoints.save, [StorageError('the disk is full')]

  def failing(*arguments):
    if failures:
      raise failures.pop()
    save(*arguments)

  monkeypatch.setattr(loop, 'StopSignals', lambda: AfterTheSave(1))
  monkeypatch.setattr(Checkpoints, 'save', failing)
  with pytest.raises(StoppedError, match='step 2 of 10'):
    fit(run_config(text, train__eval_interval=1), tmp_path)
  assert RunDir(tmp_path).steps() == [2]


@pytest.mark.thorough
def test_run_goes_on_wherever_its_text_is(text, undisturbed, tmp_path, monkeypatch):
  def go_on(stop, **data):
    monkeypatch.setattr(loop, 'StopSignals', lambda: StopAfter(stop))
    with pytest.raises(StoppedError) if stop < 10 else contextlib.nullcontext():
      fit(run_config(text, **{f'data__{name}': value for name, value in data.items()}), tmp_path / 'run')

  go_on(1)
  for name in ('here', 'other'):
    (tmp_path / name).mkdir()
  shutil.copy(text / 'text.jsonl', tmp_path / 'here' / 'same.jsonl')
  monkeypatch.chdir(tmp_path / 'here')
  go_on(3, train_files=f'{tmp_path}/here/same.jsonl', prepared_dir=tmp_path / 'new')  # made again, with its tokenizer
  go_on(5, train_files='same.jsonl', prepared_dir='../new')
  with pytest.raises(UserError, match="was started on the text of data.train_files='same.jsonl'; say where it is now"):
    (tmp_path / 'new').rename(tmp_path / 'copy')
    go_on(7, train_files='', prepared_dir='new')
  go_on(7, train_files='', prepared_dir=next((tmp_path / 'copy').glob('same-*')))  # on a machine without the text
  with pytest.raises(UserError, match='was started with other data than data.prepared_dir='):
    write_split(tmp_path / 'other', [[5] * 40] * 9)
    go_on(10, train_files='', prepared_dir=tmp_path / 'other')
  (tmp_path / 'here' / 'same.jsonl').rename(tmp_path / 'gone.jsonl')
  with pytest.raises(UserError, match='other.jsonl'):
    go_on(10, train_files='other.jsonl', prepared_dir='nowhere')
  go_on(9, train_files='', prepared_dir='nowhere')  # where it was at the last start
  go_on(10, train_files=RunDir(tmp_path / 'run').read_config().data.train_files, prepared_dir='nowhere')
  assert_same_run(undisturbed, tmp_path / 'run')
  assert not list((tmp_path / 'here').iterdir())


@pytest.mark.thorough
def test_text_that_grew_is_refused_and_the_shards_of_the_run_are_named(text, tmp_path, monkeypatch, capsys):
  shutil.copy(text / 'text.jsonl', tmp_path / 'text.jsonl')
  data = {'data__train_files': f'{tmp_path}/text.jsonl', 'data__prepared_dir': str(tmp_path / 'prepared')}
  monkeypatch.setattr(loop, 'StopSignals', lambda: StopAfter(1))
  with pytest.raises(StoppedError):
    fit(run_config(text, **data), tmp_path / 'run')
  with (tmp_path / 'text.jsonl').open('a') as file:
    file.write('\n{"text": "one more"}')
  with pytest.raises(UserError, match='the text itself has changed.; its own are in (.*): give that as') as refused:
    fit(run_config(text, **data), tmp_path / 'run')
  own = str(refused.value).partition('its own are in ')[2].partition(':')[0]
  with pytest.raises(UserError, match=r'started on the text of data.train_files=.*prepared_dir=DIR$'):
    (tmp_path / 'text.jsonl').unlink()
    (tmp_path / 'prepared').rename(tmp_path / 'moved')
    fit(run_config(text, **data), tmp_path / 'run')
  (tmp_path / 'moved').rename(tmp_path / 'prepared')
  (tmp_path / 'run' / 'metrics.jsonl').unlink()
  fit(run_config(text, data__train_files='', data__prepared_dir=own), tmp_path / 'run')
  assert 'at step 1 of 10. metrics.jsonl is gone, and with it what was measured until then' in capsys.readouterr().out


@pytest.mark.thorough
def test_text_that_is_cut_or_in_both_splits_is_said_once_and_in_the_report(text, tmp_path, capsys):
  lines = (text / 'text.jsonl').read_text().splitlines()
  (tmp_path / 'valid.jsonl').write_text('\n'.join([*lines[:30], json.dumps({'text': 'new'})]))
  data = {'valid_files': f'{tmp_path}/valid.jsonl', 'valid_fraction': 0.01, 'layout': 'padded'}
  fit(
    run_config(text, train__max_steps=2, **{f'data__{name}': value for name, value in data.items()}), tmp_path / 'run'
  )
  out = capsys.readouterr().out
  splits = json.loads((tmp_path / 'run' / 'data.json').read_text())['splits']
  for said in (
    'of 300 training documents are cut',
    f'{splits["train"]["tokens"]:,} tokens',
    '30 of 31 validation documents',
  ):
    assert out.count(said) == 1 and write_report(tmp_path / 'run').read_text().count(said) == 1


def test_run_that_was_better_before_its_end_says_so():
  ends = SimpleNamespace(checkpoints=SimpleNamespace(best=(4.25, 10)), tokens=5000, seconds=90.0)
  said = '5,000 tokens, 1 min 30 s of training'
  assert Recorder.describe_end(ends, 4.255) == Recorder.describe_end(ends, math.nan) == said
  more = 'The validation loss was 4.2500 at step 10 and is 4.5000 now: eval.py and mmjax.load take the checkpoint of '
  assert Recorder.describe_end(ends, 4.5).startswith(f'{said}\n{more}')


@pytest.mark.thorough
def test_run_that_goes_on_with_other_micro_batches_sees_the_same_rows(text, undisturbed, tmp_path, monkeypatch):
  monkeypatch.setattr(loop, 'StopSignals', lambda: StopAfter(5))
  with pytest.raises(StoppedError):
    fit(run_config(text), tmp_path)
  monkeypatch.undo()
  seen = []

  def watch(mesh, batch, steps):
    seen.append((batch['row_id'], steps))
    return put_batch(mesh, batch, steps)

  monkeypatch.setattr(loop, 'put_batch', watch)
  fit(run_config(text, train__batch_size=2, train__accumulation_steps=4, runtime__remat='block'), tmp_path)
  inputs = open_inputs(run_config(text), training_data(RunDir(tmp_path), run_config(text)))
  batches = train_batches(inputs.train, global_batch_rows=8, seed=0, start_step=0)
  expected = [batch['row_id'] for batch in itertools.islice(batches, 10)]
  assert [steps for _, steps in seen] == [4] * 5
  np.testing.assert_array_equal([rows for rows, _ in seen], expected[5:])
  lines = [read_metrics(w / 'metrics.jsonl') for w in (undisturbed, tmp_path)]
  whole, moved = ({(line['kind'], line['step']): line for line in log} for log in lines)
  for at in [('train', 8), ('train', 10), ('eval', 8), ('eval', 10)]:
    assert whole[at]['loss'] == pytest.approx(moved[at]['loss'], abs=1e-5), at
    assert whole[at]['tokens'] == moved[at]['tokens'], at


@pytest.mark.thorough
def test_resumed_run_updates_rows_as_an_undisturbed_one(text, tmp_path, monkeypatch):
  config = run_config(text, **ROW_BY_ROW)
  fit(config, tmp_path / 'whole')
  monkeypatch.setattr(loop, 'StopSignals', lambda: StopAfter(5))  # within the second window of three updates
  with pytest.raises(StoppedError):
    fit(config, tmp_path / 'stopped')
  monkeypatch.undo()
  fit(config, tmp_path / 'stopped')
  assert_same_run(tmp_path / 'whole', tmp_path / 'stopped')


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


@pytest.mark.thorough  # what may change is tested in test_rundir
def test_changed_schedule_is_accepted_when_asked_for(text, tmp_path):
  fit(run_config(text, train__max_steps=2), tmp_path)
  fit(run_config(text, train__max_steps=4), tmp_path, allow_config_change=True)
  assert read_metrics(tmp_path / 'metrics.jsonl')[-1]['step'] == 4


def broken_step(real, bad_steps, factor=np.nan):
  """A train step whose last norm is multiplied by `factor` at the given steps, so that the loss is NaN or spikes."""

  def make(*args, **kwargs):
    step = real(*args, **kwargs)

    def poisoned(state, batch):
      bad = jax.numpy.isin(state['step'], jax.numpy.array(bad_steps))
      scale = state['params']['norm']['scale']
      worse = {**state, 'params': {**state['params'], 'norm': {'scale': scale * jax.numpy.where(bad, factor, 1.0)}}}
      after, metrics = step(worse, batch)
      kept = jax.numpy.where(bad, scale, after['params']['norm']['scale'])
      return {**after, 'params': {**after['params'], 'norm': {'scale': kept}}}, metrics

    return poisoned

  return make


@pytest.mark.thorough
def test_non_finite_update_is_skipped_logged_and_survived(text, tmp_path, monkeypatch):
  from mmjax.training import learner

  monkeypatch.setattr(learner, 'make_train_step', broken_step(learner.make_train_step, [3, 4]))
  fit(run_config(text), tmp_path)
  log = read_metrics(tmp_path / 'metrics.jsonl')
  skipped = [line for line in log if line['kind'] == 'skipped']
  assert [(line['step'], line['in_a_row'], line['loss']) for line in skipped] == [(4, 1, None), (5, 2, None)]
  assert {line['reason'] for line in skipped} == {'not finite'}
  assert all(len(line['row_ids']) == 8 for line in skipped)
  assert all(np.isfinite(x).all() for x in final_state(tmp_path).values())


@pytest.mark.thorough
def test_state_that_is_not_finite_is_never_saved(text, tmp_path, monkeypatch):
  from mmjax.training import learner

  def poisoned(real):
    def make(*args, **kwargs):
      step = real(*args, **kwargs)

      def poison(state, batch):  # as a fault of the optimizer would
        after, metrics = step(state, batch)
        bank_MP = after['params']['memory_bank'].at[3, :2].set(jax.numpy.where(state['step'] == 4, np.nan, 0))
        return {**after, 'params': {**after['params'], 'memory_bank': bank_MP}}, metrics

      return poison

    return make

  monkeypatch.setattr(learner, 'make_train_step', poisoned(learner.make_train_step))
  monkeypatch.setattr(loop, 'StopSignals', lambda: StopAfter(5))
  with pytest.raises(DivergedError, match='Step 5 was not saved: values that are not finite: 2 in params.memory_bank;'):
    fit(run_config(text), tmp_path)
  assert sorted(int(path.name) for path in (tmp_path / 'checkpoints').iterdir()) == [3, 4]


@pytest.mark.thorough
def test_checkpoint_that_holds_nan_says_so_and_is_not_trained_on(run, tmp_path, capfd):
  config, checkpoints = RunDir(run).read_config(), Checkpoints(run)
  state, metadata = restore_state(Learner(config, place(config), 6), checkpoints)
  state['params']['memory_bank'] = state['params']['memory_bank'].at[1, 1].set(np.inf)
  checkpoints.save(7, state, metadata)
  assert mmjax.load(run, 'last').step == 7
  assert f'Warning: step 7 of {run} holds values that are not finite: 1 in memory_bank' in capfd.readouterr().err
  with pytest.raises(UserError, match='step 7 in .* cannot be trained on; .* 1 in params.memory_bank'):
    fit(config, run)
  with pytest.raises(UserError, match='step 7 of .* cannot be trained on; .* 1 in memory_bank'):
    fit(config, tmp_path / 'new', init_from=f'{run}@last')


@pytest.mark.thorough
@pytest.mark.parametrize(('reason', 'factor'), [('spike', 100.0), ('not finite', np.nan)])
def test_too_many_skipped_updates_end_the_run_with_a_dump(text, tmp_path, monkeypatch, reason, factor):
  from mmjax.training import learner

  monkeypatch.setattr(learner, 'make_train_step', broken_step(learner.make_train_step, [1, 4, 5, 6], factor))
  with pytest.raises(DivergedError, match='3 updates in a row .* up to step 7 .train.max_skipped_updates=3.; batch'):
    fit(run_config(text, train__max_skipped_updates=3, train__max_loss_factor=3), tmp_path)
  log = read_metrics(tmp_path / 'metrics.jsonl')
  skipped = [line for line in log if line['kind'] == 'skipped']
  assert [(line['step'], line['in_a_row'], line['reason']) for line in skipped] == [
    (2, 1, reason), (5, 1, reason), (6, 2, reason), (7, 3, reason)
  ]  # fmt: skip
  for line in log:
    if line['kind'] == 'train' and line['loss'] is not None:  # it is, where all since the last line were skipped
      assert line['loss'] < 2 * np.log(300)
  dump = json.loads((tmp_path / 'diverged' / 'step-7.json').read_text())
  batch = np.load(tmp_path / 'diverged' / 'batch-7.npz')
  assert dump['row_ids'] == batch['row_id'].tolist() == skipped[-1]['row_ids'] and batch['input'].shape == (8, 16)
  # Updates 5 to 7 were skipped, so step 7 had what was saved at 6; the good batch of step 8 was seen before 7 was.
  saved = {name: value for name, value in final_state(tmp_path).items() if name.startswith('params')}
  norms = {name[len("params['") : -2].replace('.', '/'): np.linalg.norm(value) for name, value in saved.items()}
  assert dump['parameter_norms'] == pytest.approx(norms, rel=1e-5)
  assert dump['gradient_norms'].keys() == dump['parameter_norms'].keys() and len(dump['gradient_norms']) > 10
  if reason == 'spike':
    assert dump['loss'] > 3 * dump['loss_average'] > 0
    total = sum(norm**2 for norm in dump['gradient_norms'].values()) ** 0.5
    assert total == pytest.approx(dump['grad_norm'], rel=1e-4)
    assert dump['gradient_norms']['layers/0/sublayer/gate/keys'] == 0 < dump['gradient_norms']['memory_bank']


@pytest.mark.thorough
def test_a_kill_before_the_first_config_was_written_is_no_loss(text, tmp_path, monkeypatch):
  class Killed(BaseException):
    pass

  def killed(*_):
    raise Killed

  with monkeypatch.context() as patch, pytest.raises(Killed):
    patch.setattr(RunDir, 'write_config', killed)
    fit(run_config(text, train__max_steps=2), tmp_path)
  assert RunDir(tmp_path).was_trained and not RunDir(tmp_path).config_path.exists()
  fit(run_config(text, train__max_steps=2), tmp_path)
  assert list(RunDir(tmp_path).steps())[-1] == 2


def test_sigterm_saves_and_exits_75_and_a_second_run_is_refused(text, tmp_path):
  endless = {'train__max_steps': 30_000, 'train__eval_interval': 30_000, 'train__checkpoint_interval': 30_000}
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


TERMINAL = """
import contextlib, os, pathlib, pty, signal, sys, threading, time
log, number, *command = sys.argv[1:]
child, terminal = pty.fork()
if not child:
  os.execv(command[0], command)
def read():
  with contextlib.suppress(OSError):
    while os.read(terminal, 4096):
      pass
threading.Thread(target=read, daemon=True).start()
while not pathlib.Path(log).exists():
  time.sleep(0.1)
if int(number) == signal.SIGHUP:
  os.close(terminal)  # the kernel then sends it
else:
  os.kill(child, int(number))
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@pytest.mark.parametrize('number', rarely([signal.SIGUSR1, signal.SIGHUP], signal.SIGHUP))
@pytest.mark.thorough
def test_terminal_that_closes_or_a_warning_saves_and_exits_75(text, tmp_path, number):
  """In a terminal of its own, which is gone by the time the run writes its last lines."""
  endless = {'train__max_steps': 30_000, 'train__eval_interval': 30_000, 'train__checkpoint_interval': 30_000}
  start = [sys.executable, '-c', TERMINAL, str(tmp_path / 'metrics.jsonl'), str(int(number))]
  done = subprocess.run([*start, *command(text, tmp_path, **endless)], cwd=REPOSITORY, timeout=300, check=False)
  assert done.returncode == 75
  assert any((tmp_path / 'checkpoints').glob('[0-9]*'))


ONE_BATCH = {'train__batch_size': 8, 'train__accumulation_steps': 1, 'train__max_steps': 6}
ROW_BY_ROW = {
  'memory__bank_update': 'lazy', 'model__knowledge_num': 256, 'model__n_layers': 1,
}  # fmt: skip
FEW_MOMENTS = {'memory__bank_moments': 'row', 'train__optimizer': 'muon'}
DEVICES = """
import json, pathlib, sys
from mmjax.errors import StoppedError
from mmjax.training import loop
from tests.helpers import run_config
from tests.test_loop import StopAfter
text, workdir, settings = sys.argv[1:]
loop.StopSignals = lambda: StopAfter(5)
try:
  loop.fit(run_config(pathlib.Path(text), **json.loads(settings)), pathlib.Path(workdir))
except StoppedError:
  print('stopped')
"""


@pytest.mark.parametrize(
  ('row_devices', 'first', 'more'),
  [
    pytest.param(4, 2, ROW_BY_ROW, marks=pytest.mark.thorough),
    pytest.param(4, 2, ROW_BY_ROW | FEW_MOMENTS, marks=pytest.mark.thorough),
    pytest.param(4, 0, {}, marks=pytest.mark.thorough),
    pytest.param(1, 2, {}, marks=pytest.mark.slow),
  ],
)
def test_run_that_moves_between_one_device_and_eight_keeps_its_losses(
  text, tmp_path, monkeypatch, row_devices, first, more
):
  """The first `first` updates on one device, then eight devices, from update 5 on one again."""
  one, moved = tmp_path / 'one', tmp_path / 'moved'
  config = run_config(text, **ONE_BATCH, **more)
  fit(config, one)
  if first:
    monkeypatch.setattr(loop, 'StopSignals', lambda: StopAfter(first))
    with pytest.raises(StoppedError):
      fit(config, moved)
    monkeypatch.undo()
  flags = {'XLA_FLAGS': xla_flags(8), 'PYTHONPATH': str(REPOSITORY)}
  eight = subprocess.run(
    [sys.executable, '-c', DEVICES, str(text), str(moved),
     json.dumps(ONE_BATCH | more | {'runtime__row_devices': row_devices})],
    cwd=REPOSITORY, env=os.environ | flags, timeout=600, capture_output=True, text=True, check=False,
  )  # fmt: skip
  assert 'stopped' in eight.stdout, eight.stderr[-3000:]
  fit(config, moved)
  starts = json.loads((moved / 'run.json').read_text())['starts']
  assert [(start['step'], start['device_count']) for start in starts][-2:] == [(first, 8), (5, 1)]
  logs = [
    {(line['kind'], line['step']): line for line in read_metrics(path / 'metrics.jsonl')} for path in (one, moved)
  ]
  assert [step for kind, step in logs[0] if kind == 'train'] == [2, 3, 4, 6]
  for at in [('train', 2), ('train', 3), ('train', 4), ('eval', 4), ('eval', 6)]:
    assert logs[0][at]['loss'] == pytest.approx(logs[1][at]['loss'], abs=1e-4), at
    assert logs[0][at]['tokens'] == logs[1][at]['tokens'], at  # the same rows, whatever the devices


@pytest.mark.parametrize(
  ('settings', 'said'),
  [
    (
      {'train__batch_size': 6},
      r'train.batch_size=6 must be divisible by the 8 devices; nearest: 8; or runtime.data_devices=6',
    ),
    ({'train__batch_size': 20}, r'nearest: 16 and 24; or runtime.data_devices=5'),
    (
      {'train__batch_size': 8, 'runtime__row_devices': 8, 'model__knowledge_num': 100},
      r'knowledge_num=100 must be divisible by the runtime.row_devices=8; nearest: 64 and 144',  # squares, too
    ),
    (
      {'train__batch_size': 8, 'runtime__row_devices': 8, 'model__knowledge_num': 100, 'model__sublayer': 'ngram_bag'},
      r'nearest: 96 and 104',
    ),
    (
      {'train__batch_size': 8, 'runtime__row_devices': 3, 'model__knowledge_num': 81},
      r'batch_size=8 must be divisible by the 6 devices \(2 x runtime.row_devices=3\); nearest: 6 and 12',
    ),
    ({'runtime__row_devices': 3, 'runtime__data_devices': 3}, r'needs 9 devices; there are 8'),
  ],
)
def test_indivisible_batch_is_refused_with_the_nearest_sizes(settings, said):
  with pytest.raises(UserError, match=said):
    make_mesh(tiny_config(**settings), jax.devices() * 8)


def test_too_little_text_is_refused_before_anything_is_written(text, tmp_path):
  with pytest.raises(UserError, match='one batch'):
    fit(run_config(text, train__batch_size=100_000), tmp_path / 'new')
  assert not (tmp_path / 'new').exists()


def test_out_of_memory_names_the_settings_and_what_the_compiler_found(tiny_run, monkeypatch):
  config = RunDir(tiny_run).read_config()

  def needs_3_gib(x):  # compiled, never run: two dependent arrays of 1.5 GiB each
    return jax.lax.fori_loop(0, 3, lambda _, y: jax.numpy.roll(y, 1) + y.mean(), jax.numpy.full(3 << 27, x)).sum()

  memory = jax.jit(needs_3_gib).lower(1.0).compile().memory_analysis()
  assert memory.temp_size_in_bytes >= 3 << 30
  gib = f'{memory.temp_size_in_bytes / 2**30:.2f} GiB for activations'
  with (
    pytest.raises(UserError, match=r'Out of memory\. The step needs') as device,
    explain_out_of_memory(config, memory),
  ):
    jax.numpy.zeros(1 << 52, jax.numpy.int8).block_until_ready()  # more than any address space
  for said in (gib, 'train.batch_size=4', 'train.accumulation_steps=2', "runtime.remat='block'", 'max_seq_len=16'):
    assert said in str(device.value)
  with pytest.raises(UserError, match='Out of memory'), explain_out_of_memory(config):
    np.zeros(1 << 52, np.int8)  # the host's
  assert 'mmjax.tools.fit' not in str(device.value)
  monkeypatch.setattr(jax, 'default_backend', lambda: 'gpu')
  with pytest.raises(UserError, match=r'mmjax\.tools\.fit.* finds the largest'), explain_out_of_memory(config):
    raise MemoryError
  with pytest.raises(ValueError, match='^other$'), explain_out_of_memory(config):
    raise ValueError('other')
