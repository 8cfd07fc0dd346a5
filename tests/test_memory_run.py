"""Whole tiny runs with every choice of product_key_bag.py and ngram_rows.py: train, restore, evaluate, report."""

import json
import random

import numpy as np
import pytest

import mmjax
from mmjax.config import load_config
from mmjax.config.sublayers import layer_kinds, memory_layers
from mmjax.inference.measure import measure_text
from mmjax.report.write import write_report
from mmjax.run.directory import RunDir
from mmjax.run.log import read_metrics
from mmjax.training.loop import fit
from tests.helpers import TINY, seldom

SMALLER = TINY | {
  'memory.ffn_dim': 16,
  'data.valid_fraction': 0.1,
  'data.workers': 1,
  'train.dtype': 'bfloat16',
  'train.log_interval': 2,
  'train.eval_interval': 4,
  'train.checkpoint_interval': 2,
  'train.max_steps': 4,
}


RUNS = {  # config file, and what differs
  'gate': ('product_key_bag', {'memory.layers': '1'}),
  'ngrams': ('ngram_rows', {'memory.layers': '1'}),
  'values': ('ngram_rows', {'memory.layers': '0', 'memory.value_layers': '1'}),
  'grown': (
    'ngram_rows',
    {'memory.layers': '1', 'memory.ngram_ranges': 'own', 'memory.ngram_signs': True, 'model.knowledge_num': 1900}
    | {'memory.row_dropout': 0.2}
    | {'memory.bank_std': 0.0, 'memory.bank_update': 'lazy', 'train.parameters': 'memory_bank beta1=0.75 beta2=0.95'},
  ),
  'both': ('product_key_bag', {'memory.ngram_layers': '0', 'memory.ngrams': '2'}),
}


# Tests of the model, the optimizer and of generation cover the parts.
@pytest.fixture(scope='module', params=seldom(RUNS, 'grown', 'both'))
def run(request, tmp_path_factory):
  """A finished run directory of four updates."""
  folder = tmp_path_factory.mktemp('plus')
  draw = random.Random(0)
  documents = [' '.join(draw.choices('the bank holds rows that a gate finds'.split(), k=40)) for _ in range(150)]
  (folder / 'text.jsonl').write_text('\n'.join(json.dumps({'text': d}) for d in documents))
  name, changes = RUNS[request.param]
  settings = SMALLER | changes | {'data.train_files': f'{folder}/text.jsonl', 'data.prepared_dir': f'{folder}/data'}
  config = load_config(f'configs/{name}.py', [f'--config.{k}={v}' for k, v in settings.items()])
  fit(config, folder / 'run')
  return folder / 'run'


def test_metrics_name_the_layers_that_have_a_memory(run):
  records = read_metrics(run / 'metrics.jsonl')
  config = RunDir(run).read_config()
  kinds = layer_kinds(config.model, config.memory)
  assert {record['kind'] for record in records} == {'train', 'eval'}
  for record in records:
    assert [health['layer'] for health in record['bank']] == memory_layers(config)
    assert all(0 < health['used_share'] <= 1 for health in record['bank'])
    assert np.isfinite(record['loss'])
    gated = [h for h in record['bank'] if h['layer'] != 'values' and kinds[h['layer']] == 'memory_bag']
    assert all(health['gate_grad_norm'] > 0 and health['key_grad_norm'] > 0 for health in gated)
    assert [health for health in record['bank'] if 'gate_grad_norm' in health] == gated
    assert 0 < record['probes']['row_update_ratio'] < 2  # the bank learns 16 times as fast as the rest
  trained = [record for record in records if record['kind'] == 'train']
  assert all(record['aux_loss'] == 0 for record in trained)
  [probes] = [record['probes'] for record in records if record['kind'] == 'eval']
  assert len({probes['loss'], probes['loss_zeroed'], probes['loss_shuffled']}) == 3


def test_trained_run_evaluates_generates_and_is_reported(run):
  lm, directory = mmjax.load(run), RunDir(run)
  assert len(lm.generate('the bank', max_new_tokens=5, temperature=0)) == 1
  logged = read_metrics(run / 'metrics.jsonl')[-1]
  measured = measure_text(lm, directory)
  assert measured.loss == pytest.approx(logged['loss'], rel=1e-3)
  assert [health['layer'] for health in measured.bank] == memory_layers(lm.config)
  report = write_report(run).read_text()
  assert 'memory.n_heads' in report and 'bag reads' in report
  assert ('plots/bank_gate_grad_norm.png' in report) == ('memory_bag' in layer_kinds(lm.config.model, lm.config.memory))


def test_state_of_the_banks_own_optimizer_is_restored(run, capsys):
  fit(RunDir(run).read_config(), run)
  assert 'is finished: all 4 steps are done' in capsys.readouterr().out
