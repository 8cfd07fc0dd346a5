"""Rows taught to a model: which they are, that nothing else moves, that they can be taken out again, and the counts."""

import json
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import eval as eval_command
import mmjax
from mmjax.console import Progress
from mmjax.errors import StoppedError, UserError
from mmjax.inference.measure import open_text
from mmjax.inference.memory_reads import MemoryReader
from mmjax.inference.taught import taught_rows
from mmjax.interop.convert import export_run, import_run
from mmjax.model.params import model_graph
from mmjax.run.checkpoint import Checkpoints
from mmjax.run.directory import RunDir, open_run
from mmjax.run.origin import Origin
from mmjax.run.placement import place
from mmjax.serve.view import RunView
from mmjax.tools.inspect import taught_table
from mmjax.training import background, loop, setup
from mmjax.training.learner import Learner
from mmjax.training.loop import fit
from mmjax.training.optimizer import make_optimizer
from mmjax.training.state import init_state
from mmjax.training.step import make_train_step
from mmjax.training.teach import rows_to_teach
from tests.helpers import StopAfter, random_batch, rarely, run_config, run_main, tiny_config
from tests.test_origin import new_text

STEPS = 4
TEACH = {'memory__teach_rows': 5, 'train__optimizer': 'sgd', 'train__max_steps': STEPS, 'train__learning_rate': 1.0}


def test_rows_are_those_of_the_largest_score():
  rng = np.random.default_rng(0)
  usage_LM, updates = rng.integers(0, 4, (2, 40)), 80
  background_M = rng.permutation(updates)[:40]  # no two alike
  background_M[:3] = updates  # every update read these: they are never taught
  usage_LM[:, :3] = 100
  reads = {'background_M': jnp.asarray(background_M), 'background_updates': jnp.int32(updates)}
  score_M = usage_LM.sum(axis=0) / usage_LM.sum() * np.log((updates + 1) / (background_M + 1))
  for most in (1, 7, 40):
    taught = np.flatnonzero(rows_to_teach(reads, jnp.asarray(usage_LM), most))
    best = [row for row in np.argsort(-score_M)[:most] if score_M[row] > 0]
    assert taught.tolist() == sorted(best) and not set(taught) & {0, 1, 2}


@pytest.mark.thorough
@pytest.mark.parametrize('optimizer', rarely(('sgd', 'adamw', 'adamw, row'), 'sgd'))
def test_update_moves_rows_that_are_taught_and_nothing_else(optimizer):
  name, _, kept = optimizer.partition(', ')
  config = tiny_config(
    **TEACH | {'train__optimizer': name, 'train__grad_clip': 0.005, 'memory__bank_moments': kept or 'full'}
  )
  transformation = make_optimizer(config, STEPS)
  step = jax.jit(make_train_step(config, model_graph(config), transformation, attention='xla', total_steps=STEPS))
  background = {'count_M': jnp.arange(64) % 7, 'updates': jnp.int32(7)}
  state = jax.jit(lambda reads: init_state(config, transformation, None, reads))(background)
  before = jax.device_get(state['params'])
  state['params']['embedding'] = state['params']['embedding'].at[0, 0].set(-0.0)  # which an addition of 0 would change
  after, metrics = step(state, random_batch(config))
  taught_M = np.asarray(rows_to_teach(state['reads'], metrics['usage_LM'], 5))
  moved_M = np.any(np.asarray(after['params']['memory_bank']) != before['memory_bank'], axis=1)
  assert taught_M.sum() == 5 and np.array_equal(moved_M, taught_M)
  others = [jax.tree.leaves({n: x for n, x in s['params'].items() if n != 'memory_bank'}) for s in (state, after)]
  for a, b in zip(*others, strict=True):
    assert np.asarray(a).tobytes() == np.asarray(b).tobytes()
  assert float(metrics['grad_norm']) > 0.005  # of the rows alone; so it was clipped, and the step is as long as this
  if optimizer == 'sgd':
    step_length = np.linalg.norm(np.asarray(after['params']['memory_bank']) - before['memory_bank'])
    assert step_length == pytest.approx(0.005, rel=1e-3)
  assert after['reads']['count_M'].sum() > background['count_M'].sum() and int(after['reads']['updates']) == 8
  np.testing.assert_array_equal(after['reads']['background_M'], background['count_M'])
  later, metrics = step(after, random_batch(config, seed=1))
  moved_M = np.any(later['params']['memory_bank'] != after['params']['memory_bank'], axis=1)
  also_M = np.asarray(rows_to_teach(after['reads'], metrics['usage_LM'], 5))
  assert also_M[~taught_M].any() and np.array_equal(moved_M, also_M | taught_M if optimizer == 'adamw' else also_M)


@pytest.mark.parametrize('stopped', [False, True])
@pytest.mark.thorough
def test_taught_rows_are_taken_out_again_bit_for_bit(text, tiny_run, tmp_path, monkeypatch, capfd, stopped):
  """The counts of reads go on from those of the run that is taught."""
  run = tmp_path / 'run'
  config = run_config(text, **TEACH | new_text(tmp_path), train__checkpoint_interval=1)
  if stopped:
    monkeypatch.setattr(loop, 'StopSignals', lambda: StopAfter(2))
    with pytest.raises(StoppedError):
      fit(config, run, init_from=str(tiny_run))
    monkeypatch.undo()
  fit(config, run, init_from=str(tiny_run))
  said = capfd.readouterr().out
  assert Checkpoints(run, read_only=True).steps()[0] == 0
  taught, without = mmjax.load(run, 'last').params, mmjax.load(run, without_taught=True).params
  start = mmjax.load(tiny_run).params
  for a, b in zip(jax.tree.leaves(start), jax.tree.leaves(without), strict=True):
    np.testing.assert_array_equal(a, b)
  bank, taught_bank = start.pop('memory_bank'), taught.pop('memory_bank')
  for a, b in zip(jax.tree.leaves(start), jax.tree.leaves(taught), strict=True):
    np.testing.assert_array_equal(a, b)
  moved = int(np.any(np.asarray(bank) != np.asarray(taught_bank), axis=1).sum())
  assert 5 <= moved <= 5 * STEPS and f'Rows taught: {moved}\n' in said
  before = Checkpoints(tiny_run, read_only=True).restore_reads(6)
  after = Checkpoints(run, read_only=True).restore_reads(STEPS)
  assert int(before['updates']) == int(after['background_updates']) == 6 and int(after['updates']) == 6 + STEPS
  np.testing.assert_array_equal(before['count_M'], after['background_M'])
  found = taught_rows(mmjax.load(run, 'last'), open_run(run))
  assert len(found) == moved and found[0]['moved'] >= found[-1]['moved'] > 0
  for row in found:
    assert row['before'] == np.asarray(bank)[row['row']].tolist() != row['after']
    assert row['usual'] == after['background_M'][row['row']] / 6 < 1 and 0 < row['new'] <= 1
  taught_bank = np.array(taught_bank)
  taught_bank[[row['row'] for row in found]] = [row['before'] for row in found]
  np.testing.assert_array_equal(taught_bank, bank)  # the list alone takes them out too
  assert taught_table(found, 2).rows[0][0] == str(found[0]['row'])
  shown = RunView(mmjax.load(run, 'last'), open_run(run)).describe()['taught']
  assert shown == {'rows': moved, 'farthest': [row['row'] for row in found[:16]]}
  with pytest.raises(UserError, match='taught no rows'):
    mmjax.load(tiny_run, without_taught=True)
  # Away from its run nobody can tell what was taught.
  export_run(run, tmp_path / 'taught.safetensors', 'last', None)
  import_run(tmp_path / 'taught.safetensors', tmp_path / 'back', 'configs/base.py', [], None, None)
  back, last = mmjax.load(tmp_path / 'back'), mmjax.load(run, 'last')
  np.testing.assert_array_equal(back.params['memory_bank'], last.params['memory_bank'])
  with pytest.raises(UserError, match='taught no rows'):
    mmjax.load(tmp_path / 'back', without_taught=True)
  with pytest.raises(UserError, match='memory.teach_rows=2 must be 0 in an import'):
    flags = ['--config.memory.teach_rows=2']
    import_run(tmp_path / 'taught.safetensors', tmp_path / 'other', 'configs/base.py', flags, None, None)


@pytest.mark.thorough
def test_evaluation_and_report_say_whether_the_taught_rows_are_in(text, tiny_run, tmp_path, monkeypatch, capfd):
  run = tmp_path / 'run'
  fit(run_config(text, **TEACH | new_text(tmp_path)), run, init_from=str(tiny_run))

  def evaluate(*flags: str) -> tuple[dict, str, str]:
    code, out, err = run_main(eval_command.main, monkeypatch, capfd, '--workdir', run, '--max_new_tokens', 2, *flags)
    assert code == 0, err
    return json.loads((run / 'eval.json').read_text()), out, (run / 'report.md').read_text()

  (found, out, report), without = evaluate(), 'without the rows that the run taught'
  assert (found['checkpoint'], found['without_taught']) == (STEPS, False) and without not in out + report
  for flags in (('--without',), ('--checkpoint', '0')):  # the same model
    found, out, report = evaluate(*flags)
    assert (found['checkpoint'], found['without_taught']) == (0, True)
    assert f'0, {without}' in out and f'| checkpoint (update) | 0, {without} |' in report
    assert f'From eval.json, checkpoint 0, {without}.' in report


@pytest.mark.thorough
def test_reads_of_the_old_text_are_counted_where_training_did_not(tiny_run, monkeypatch):
  config = tiny_config(**TEACH, train__batch_size=3)
  learner, lm, quiet = Learner(config, place(config), STEPS), mmjax.load(tiny_run), Progress(quiet=True)
  reads = background.count_background(learner, lm.params, open_run(tiny_run), quiet, 'it has not counted')
  reader, split = MemoryReader(lm), open_text(lm.config, open_run(tiny_run))
  count_M = np.zeros(64, np.int64)
  for first in range(0, split.n_rows, 3):
    batch = split.rows(np.arange(first, min(first + 3, split.n_rows)))
    row_LBTR, _ = reader.read_batch(split, batch)
    count_M[np.unique(row_LBTR[:, batch['target'] >= 0])] += 1
  assert int(reads['updates']) == -(-split.n_rows // 3) > 1
  np.testing.assert_array_equal(reads['count_M'], count_M)

  def gone(*_):
    raise UserError('it is gone')

  monkeypatch.setattr(background, 'evaluation_data', gone)
  with pytest.raises(UserError, match='but it has not counted, and its validation text is not found: put it back to'):
    background.count_background(learner, lm.params, open_run(tiny_run), quiet, 'it has not counted')


@pytest.mark.thorough
def test_of_counts_that_tell_no_rows_apart_the_validation_text_is_read(tiny_run, capsys, monkeypatch):
  """An update of the old run may read the whole bank, where a batch of the new one does not."""
  config = tiny_config(**TEACH, train__batch_size=1)
  learner, lm, progress = Learner(config, place(config), STEPS), mmjax.load(tiny_run), Progress(quiet=False)
  all_read = {'count_M': jnp.full(64, 9).at[:2].set(8), 'updates': jnp.array(9)}
  start = background.Start(lm.params, all_read, {'run': str(tiny_run)})
  found = background.with_background(start, learner, Origin(tiny_run, 'best'), progress).reads
  said = ''.join(capsys.readouterr())
  assert 'only 2 of its rows were not read by every update' in said
  usual = background.count_background(learner, lm.params, open_run(tiny_run), Progress(quiet=True), '')
  np.testing.assert_array_equal(found['count_M'], usual['count_M'])
  left = int((np.asarray(usual['count_M']) < int(usual['updates'])).sum())
  assert f'Rows that can be taught: {left} of 64' in said and left > 5
  few_left = start._replace(reads=all_read | {'count_M': jnp.full(64, 9).at[:5].set(8)})  # enough for an update
  assert background.with_background(few_left, learner, Origin(tiny_run, 'best'), progress).reads == few_left.reads

  def gone(*_):
    raise UserError('it is gone')

  monkeypatch.setattr(background, 'evaluation_data', gone)
  assert background.with_background(start, learner, Origin(tiny_run, 'best'), progress).reads == all_read
  assert 'Rows that can be taught: 2 of 64' in ''.join(capsys.readouterr())


def test_rows_that_are_all_usual_are_refused(tiny_run, monkeypatch):
  config = tiny_config(**TEACH)
  monkeypatch.setattr(background, 'count_background', lambda *_: {'count_M': jnp.full(64, 3), 'updates': jnp.array(3)})
  start = background.Start({}, {}, {'run': str(tiny_run)})
  with pytest.raises(UserError, match=r'there is no row to teach, .* a smaller train.batch_size or a larger bank'):
    background.with_background(start, SimpleNamespace(config=config), Origin(tiny_run, 'best'), Progress(quiet=True))


@pytest.mark.parametrize(
  ('changes', 'said'),
  [
    ({}, 'memory.teach_rows=5 needs --init_from RUN: rows are taught to a model that has learned'),
    ({'memory__teach_rows': 65}, 'memory.teach_rows=65 must be at most model.knowledge_num=64, all rows of the bank'),
    ({'memory__bank_update': 'lazy', 'train__optimizer': 'adamw'}, "needs memory.bank_update='dense', not 'lazy'"),
    ({'memory__teach_rows': 0, 'memory__bank_update': 'lazy'}, "with train.optimizer='sgd' it must be 'dense'"),
    ({'train__optimizer': 'muon'}, "needs train.optimizer='adamw' or 'sgd', not 'muon', which is for matrices"),
    ({'model__sublayer': 'dense'}, 'memory.teach_rows=5 does nothing in a model of dense layers'),
  ],
)
def test_settings_that_cannot_teach_are_refused(tmp_path, changes, said):
  with pytest.raises(UserError, match=said):
    setup.settle_config(RunDir(tmp_path / 'run'), tiny_config(**TEACH | changes), False)
