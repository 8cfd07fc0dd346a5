"""The memory grid: what its models are, that none costs more than G0, and that its data travel."""

import dataclasses
import json
import os
import random
import re
import runpy
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from mmjax.config import flatten, idle_settings, load_config
from mmjax.console import Progress
from mmjax.data.index import read_index
from mmjax.data.prepare import prepare
from mmjax.errors import UserError
from mmjax.model.cost import flops_per_token, matching_width
from mmjax.tools.sweep_file import read_sweep
from tests.helpers import rarely

GRID = 'sweeps/memory.py'
RATES = {'small': '0.004', 'cpu': '0.004', 'gpu': '0.001', 'tiny': '0.002'}


@pytest.fixture(scope='module', params=rarely(RATES, 'small'))
def models(request):
  """The config of every model of a scale, by name."""
  runs = read_sweep(GRID, [f'scale={request.param}', f'learning_rate={RATES[request.param]}'])
  kept = [run for run in runs if f'-lr{RATES[request.param]}-' in run.name]
  return {run.name.partition('-')[0]: run.config for run in kept}


@pytest.mark.thorough
def test_no_model_costs_more_than_the_baseline(models):
  budget = flops_per_token(models['g0'])['total']
  for name, config in models.items():
    cost = flops_per_token(config)['total']
    assert cost <= budget, name
    if config.memory.ffn_dim:
      assert cost > 0.98 * budget and matching_width(config, budget) == config.memory.ffn_dim, name


@pytest.mark.thorough
def test_models_differ_as_the_experiment_says(models):
  settings = {name: flatten(config.to_dict()) for name, config in models.items()}

  def changes(a: str, b: str) -> dict:
    names = {n for n in settings[a] if settings[a][n] != settings[b][n]} - {'experiment', 'memory.ffn_dim'}
    idle = idle_settings(models[a]) | idle_settings(models[b])  # sizes that a scale has for one of them alone
    return {name: settings[b][name] for name in names - idle.keys()}

  width = models['g1'].model.knowledge_dim
  assert changes('g0', 'g1') == {'model.sublayer': 'gated_fusion'}
  assert changes('g1', 'g2') == {
    'memory.input': 'residual', 'memory.bank_std': width**-0.5, 'memory.bank_lr_multiplier': 4.0,
    'memory.bank_decay_multiplier': 0.0,
  }  # fmt: skip
  assert models['g2'].memory.bank_lr_final_multiplier == 1
  assert changes('g2', 'g3') == {'memory.scores': 'scale', 'memory.query_key_norm': 'l2'}
  assert changes('g3', 'g4') == {'memory.layers': 'middle'}
  assert changes('g4', 'g5') == {
    'model.sublayer': 'memory_bag', 'model.num_selected': 16, 'memory.n_heads': 4
  }  # fmt: skip
  assert changes('g5', 'g6') == {'model.knowledge_num': 256}
  assert changes('g5', 'g7') == {'memory.score_activation': 'relu'}
  assert changes('g15', 'g13') == {'memory.layers': 'all'}
  assert changes('g5', 'g15') == {'memory.selection_bias': True}
  assert changes('g15', 'g16') == {'memory.n_heads': 2}
  assert changes('g15', 'g18') == {'memory.bank_lr_multiplier': 1.0}
  assert changes('g38', 'g41') == {'memory.bank_update': 'lazy'}
  assert changes('g13', 'g23') == {'memory.bank_lr_multiplier': 16.0}
  assert changes('g13', 'g25') == {'memory.bank_lr_multiplier': 64.0}
  assert changes('g23', 'g26') == {'model.knowledge_num': 2**20, 'memory.n_heads': 3}
  wide = models['g8']
  assert (wide.model.knowledge_num, wide.model.knowledge_dim, wide.memory.n_heads) == (2**14, 4 * width, 1)
  assert wide.memory.bank_std == pytest.approx((4 * width) ** -0.5)


@pytest.mark.thorough
@pytest.mark.parametrize('scale', ['small', 'cpu', 'gpu'])
def test_models_that_should_last_train_like_the_baseline_and_cost_no_more(scale):
  runs = {run.name: run.config for run in read_sweep('sweeps/lasting.py', [f'scale={scale}', 'tokens=3e6,12e6'])}
  strong = runs['g0-3M-s0']
  budget = flops_per_token(strong.with_settings({'model.value_embeddings': ''}))['total']
  for name, config in runs.items():
    if name.startswith('g1-'):  # 1.4.2 as it is
      continue
    longer = {'max_steps': strong.train.max_steps, 'warmup_steps': strong.train.warmup_steps}
    longer |= {'eval_interval': strong.train.eval_interval, 'checkpoint_interval': strong.train.checkpoint_interval}
    longer['parameters'] = strong.train.parameters  # which give the keys of g60 a rate
    assert dataclasses.replace(config.train, **longer) == strong.train, name
    bare = config.with_settings({'model.value_embeddings': ''})
    assert 0.98 * budget < flops_per_token(bare)['total'] <= budget, name
  assert len(runs) == 2 * len({name.partition('-')[0] for name in runs})


def test_mistakes_in_the_settings_of_the_longer_runs_are_named():
  with pytest.raises(UserError, match="scale='large' must be one of small, cpu, gpu, tiny"):
    read_sweep('sweeps/lasting.py', ['scale=large'])
  with pytest.raises(UserError, match="tokens='many' must be a number above 0"):
    read_sweep('sweeps/lasting.py', ['tokens=many'])
  with pytest.raises(UserError, match="seeds='a' must be whole numbers, comma-separated"):
    read_sweep('sweeps/lasting.py', ['seeds=a'])


@pytest.mark.parametrize(('name', 'model'), [('product_key_bag', 'g23'), ('ngram_rows', 'g42')])
@pytest.mark.thorough
def test_configs_are_the_best_of_the_grid_at_the_sizes_of_the_record(name, model):
  runs = read_sweep(GRID, ['scale=gpu', 'learning_rate=1e-3'])
  [best] = [run.config for run in runs if run.name == f'{model}-lr0.001-s0']
  config = load_config(f'configs/{name}.py')
  assert (config.model, config.memory) == (best.model, best.memory)


@pytest.mark.thorough
def test_the_best_of_the_longer_runs_is_a_config_at_the_sizes_of_the_record():
  runs = {run.name: run.config for run in read_sweep('sweeps/lasting.py', ['scale=gpu'])}
  best = runs['g74-3M-s0']
  config = load_config('configs/ngram_rows_4m.py')
  assert (config.model, config.memory) == (best.model, best.memory)
  assert load_config('configs/ngram_rows_1m.py').model == runs['g52-3M-s0'].model
  names = ['optimizer', 'learning_rate', 'muon_lr_multiplier', 'embedding_lr_multiplier', 'schedule', 'warmdown_share']
  names += ['beta1', 'beta2', 'parameters']
  assert [getattr(config.train, name) for name in names] == [getattr(best.train, name) for name in names]


@pytest.mark.thorough
def test_list_grows_with_what_is_known():
  def names(*settings: str) -> list[str]:
    return [run.name for run in read_sweep(GRID, ['scale=tiny', *settings])]

  tuning, all_models = names(), names('learning_rate=2e-3')
  assert tuning == ['g0-lr0.001-s0', 'g0-lr0.002-s0', 'g0-lr0.004-s0']
  page = Path('docs/first_experiments.md').read_text()
  measured = {int(number) for number in re.findall(r'^\| \*{0,2}G(\d+)', page, re.M)}
  assert all_models == tuning + [f'g{i}-lr0.002-s0' for i in sorted(measured) if i]  # what ran, and nothing else
  seeds = [f'{name}-lr0.002-s{seed}' for name in ('g0', 'g5', 'g4') for seed in (1, 2)]
  checked = ['g5-lr0.001-s0', 'g5-lr0.004-s0']
  assert names('learning_rate=2e-3', 'winners=g5,g4') == all_models + seeds + checked
  steps = {run.config.train.max_steps for run in read_sweep(GRID, ['scale=tiny', 'tokens=1280'])}
  assert steps == {1280 // (4 * 32)}


@pytest.mark.parametrize(
  ('settings', 'said'),
  [
    (['scale=huge'], "scale='huge' must be one of small, cpu, gpu, tiny"),
    (['winners=g5'], "winners='g5' need a learning_rate too"),
    (['learning_rate=2e-3', 'winners=g55'], "winners='g55': no model 'g55'; there are g0, g1"),
  ],
)
def test_mistakes_in_the_settings_are_named(settings, said):
  with pytest.raises(UserError, match=said):
    read_sweep(GRID, settings)


def pack(folder: Path, share: float, **documents: int) -> Path:
  """Packs a share of some documents, of each split so many, and returns the archive."""
  draw = random.Random(0)
  words = 'a grid of models reads what was packed elsewhere'.split()
  for name, n in documents.items():
    texts = [json.dumps({'text': ' '.join(draw.choices(words, k=30)) + f' {i}'}) for i in range(n)]
    (folder / f'{name}.jsonl').write_text('\n'.join(texts))
  files = [f'--{split}_files={folder}/{split}.jsonl' for split in documents]
  out = folder / 'deeper' / 'data.tar.xz'
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(sys, 'argv', ['grid_data', *files, f'--share={share}', '--vocab_size=300', f'--out={out}'])
    runpy.run_path('benchmarks/grid_data.py', run_name='__main__')
  return out


@pytest.fixture(scope='module')
def archive(tmp_path_factory):
  """A packed prepared directory of about half of some documents."""
  return pack(tmp_path_factory.mktemp('packed'), 0.5, train=400, valid=20)


@pytest.mark.thorough
def test_of_what_is_kept_one_document_in_a_hundred_is_held_out(tmp_path):
  with tarfile.open(pack(tmp_path, 0.2, train=5000)) as file:
    index = json.load(file.extractfile('index.json'))
  train, valid = (index['splits'][split]['documents'] for split in ('train', 'valid'))
  assert 900 < train + valid < 1100 and 3 <= valid <= 20  # the same hash decides both; of all documents it were 50


def test_packed_data_are_used_where_they_are_unpacked(archive, tmp_path):
  with tarfile.open(archive) as file:
    file.extractall(tmp_path, filter='data')
  index = read_index(tmp_path)
  assert 150 < index['splits']['train']['documents'] < 250 and index['splits']['valid']['documents'] == 20
  data = dataclasses.replace(load_config('configs/base.py').data, prepared_dir=str(tmp_path))
  assert prepare(data, 300, Progress(quiet=True)) == tmp_path
  with pytest.raises(UserError, match=r'model.vocab_size=299 does not fit .* set --config.model.vocab_size=300'):
    prepare(data, 299, Progress(quiet=True))
  (tmp_path / 'train-00000.bin').write_bytes(b'other')
  with pytest.raises(UserError, match='is not what index.json describes'):
    prepare(data, 300, Progress(quiet=True))


def test_script_names_what_is_missing(archive, tmp_path):
  def run(*arguments: object, **environment: str) -> subprocess.CompletedProcess:
    command = ['benchmarks/grid_gpu.sh', '--quick', *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env={'PATH': '/usr/bin:/bin', **environment})

  no_data = run(tmp_path / 'none', tmp_path / 'work', tmp_path / 'results', PYTHON=sys.executable)
  assert (no_data.returncode, no_data.stderr.count('\n')) == (2, 1) and 'no data archive' in no_data.stderr
  bare = tmp_path / 'python'  # an interpreter that finds the standard library alone
  bare.write_text(f'#!/bin/sh\nexec {sys.executable} -S -I "$@"\n')
  bare.chmod(0o755)
  missing = run(archive, tmp_path / 'work', tmp_path / 'results', PYTHON=str(bare))
  assert missing.returncode == 2 and 'This needs jax, flax, numpy, grain' in missing.stderr
  assert not (tmp_path / 'work' / 'data').exists()


@pytest.mark.thorough
def test_script_trains_the_models_of_the_longer_runs_and_goes_on(archive, tmp_path):
  def run(**environment: str) -> subprocess.CompletedProcess:
    command = ['benchmarks/grid_gpu.sh', '--quick', str(archive), f'{tmp_path}/work', f'{tmp_path}/results']
    variables = {'PATH': '/usr/bin:/bin', 'PYTHON': sys.executable, 'JAX_PLATFORMS': 'cpu', 'SPARE_SECONDS': '5'}
    variables |= {'XLA_FLAGS': os.environ['XLA_FLAGS'], 'TOKENS': '2e3', 'ONLY': 'g0-*,g1-*', **environment}
    return subprocess.run(command, capture_output=True, text=True, env=variables)

  assert 'SWEEP=other must be memory or lasting' in run(SWEEP='other').stderr
  late = run(SWEEP='lasting', LIMIT_SECONDS='1')
  assert late.returncode == 75, late
  done = run(SWEEP='lasting')
  assert done.returncode == 0, done
  compared = (tmp_path / 'results' / 'compare.md').read_text()
  assert 'g0-0.002M' in compared and 'g1-0.002M' in compared
