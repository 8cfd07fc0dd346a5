"""Whole tiny runs with every choice of memory_bag.py and memory_plus.py: train, restore, evaluate, generate, report."""

import json
import random

import numpy as np
import pytest

import mmjax
from mmjax.config import load_config
from mmjax.inference.measure import measure_text
from mmjax.tools.report import write_report
from mmjax.training.loop import fit
from mmjax.training.metrics import read_metrics
from mmjax.training.rundir import RunDir
from tests.helpers import TINY

pytestmark = pytest.mark.thorough  # tests of the model, the optimizer and of generation cover the parts

SMALLER = TINY | {
  'memory.layers': '1',
  'memory.ffn_dim': 16,
  'memory.balance_loss_weight': 0.01,
  'memory.bank_grad_clip': 1.0,
  'data.valid_fraction': 0.1,
  'data.workers': 1,
  'train.dtype': 'bfloat16',
  'train.log_interval': 2,
  'train.eval_interval': 4,
  'train.checkpoint_interval': 2,
  'train.max_steps': 4,
}


@pytest.fixture(scope='module', params=['memory_bag', 'memory_plus'])
def run(request, tmp_path_factory):
  """A finished run directory of four updates."""
  folder = tmp_path_factory.mktemp('plus')
  draw = random.Random(0)
  documents = [' '.join(draw.choices('the bank holds rows that a gate finds'.split(), k=40)) for _ in range(150)]
  (folder / 'text.jsonl').write_text('\n'.join(json.dumps({'text': d}) for d in documents))
  settings = SMALLER | {'data.train_files': f'{folder}/text.jsonl', 'data.prepared_dir': f'{folder}/data'}
  config = load_config(f'configs/{request.param}.py', [f'--config.{k}={v}' for k, v in settings.items()])
  fit(config, folder / 'run')
  return folder / 'run'


def test_metrics_name_the_layers_that_have_a_memory(run):
  records = read_metrics(run / 'metrics.jsonl')
  has_gate = RunDir(run).read_config().model.sublayer == 'memory_bag'
  assert {record['kind'] for record in records} == {'train', 'eval'}
  for record in records:
    assert [health['layer'] for health in record['bank']] == [1]
    assert all(0 < health['used_share'] <= 1 for health in record['bank'])
    assert np.isfinite(record['loss'])
    if has_gate:
      assert all(health['gate_grad_norm'] > 0 and health['key_grad_norm'] > 0 for health in record['bank'])
    else:
      assert not any('gate_grad_norm' in health for health in record['bank'])
    assert 0 < record['probes']['row_update_ratio'] < 2  # the bank learns 16 times as fast as the rest
  trained = [record for record in records if record['kind'] == 'train']
  assert all((record['aux_loss'] > 0) == has_gate for record in trained)
  [probes] = [record['probes'] for record in records if record['kind'] == 'eval']
  assert len({probes['loss'], probes['loss_zeroed'], probes['loss_shuffled']}) == 3


def test_trained_run_evaluates_generates_and_is_reported(run):
  lm, directory = mmjax.load(run), RunDir(run)
  assert len(lm.generate('the bank', max_new_tokens=5, temperature=0)) == 1
  logged = read_metrics(run / 'metrics.jsonl')[-1]
  measured = measure_text(lm, directory)
  assert measured.loss == pytest.approx(logged['loss'], rel=1e-3)
  assert [health['layer'] for health in measured.bank] == [1]
  report = write_report(run).read_text()
  assert 'memory.n_heads' in report and 'bag reads' in report


def test_state_of_the_banks_own_optimizer_is_restored(run, capsys):
  fit(RunDir(run).read_config(), run)
  assert 'is finished: all 4 steps are done' in capsys.readouterr().out
