"""A run from another's weights: all of them and the tokenizer come along, and what contradicts them is refused."""

import json
import random
import shutil
from pathlib import Path

import numpy as np
import pytest

from mmjax.config import load_config
from mmjax.data.prepare import prepare
from mmjax.errors import StoppedError, UserError
from mmjax.files import read_json
from mmjax.interop.files import write_tensors
from mmjax.run.directory import RunDir
from mmjax.run.identity import bank_texts
from mmjax.run.log import read_metrics
from mmjax.run.origin import parse_origin
from mmjax.training import loop
from mmjax.training.loop import fit
from mmjax.training.setup import settle_config
from tests.helpers import StopAfter, arrays_of, run_config, seldom, tiny_config

BAG = {'model__sublayer': 'memory_bag', 'memory__n_heads': 2, 'memory__selection_bias': True, 'memory__ffn_dim': 8}
NGRAMS = {'model__sublayer': 'ngram_bag', 'memory__n_heads': 2, 'memory__ngrams': '1,2', 'memory__layers': '1'}
KINDS = {
  'dense': {'model__sublayer': 'dense'},
  'cross_attention': {'model__sublayer': 'cross_attention'},
  'moe': {'model__sublayer': 'moe', 'model__hidden_dim': 16},
  'lazy bag': BAG | {'memory__bank_update': 'lazy'},
  'n-grams': NGRAMS,
  'bag and n-grams': BAG | {'memory__ngram_layers': '1'},
}


def new_text(folder: Path) -> dict[str, str]:
  """Writes other documents than the fixture's and returns the settings that read them."""
  draw = random.Random(1)
  words = 'every engine of a ship needs oil and a hand that knows when'.split()
  (folder / 'new.jsonl').write_text(
    '\n'.join(json.dumps({'text': ' '.join(draw.choices(words, k=30))}) for _ in range(200))
  )
  return {'data__train_files': f'{folder}/new.jsonl', 'data__prepared_dir': f'{folder}/prepared'}


def assert_same_params(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> None:
  assert a.keys() == b.keys() and len(a) > 10
  for name in a:
    np.testing.assert_array_equal(a[name], b[name], err_msg=name)


@pytest.fixture
def source(tiny_run, tmp_path):
  """A copy of a finished run, which a test may take away."""
  return shutil.copytree(tiny_run, tmp_path / 'source')


@pytest.mark.thorough
def test_run_goes_on_from_its_start_without_the_other_run(text, source, tmp_path, monkeypatch, capsys):
  """With a learning rate of 0 the weights that end the run are those that it started from, bit for bit."""
  origin = f'{source}@3'
  start, frozen = arrays_of(source, 3), {'train__learning_rate': 0.0, 'train__max_steps': 4, **new_text(tmp_path)}
  config = run_config(text, **frozen, model__max_seq_len=24, train__grad_clip=0.0, seed=5)
  monkeypatch.setattr(loop, 'StopSignals', lambda: StopAfter(1))
  with pytest.raises(StoppedError):
    fit(config, tmp_path / 'run', init_from=origin)
  assert f'Starting from {source}, step 3' in capsys.readouterr().out
  tokenizer = (source / 'tokenizer.model').read_bytes()
  shutil.rmtree(source)
  monkeypatch.undo()
  fit(config, tmp_path / 'run', init_from=origin)  # the same command
  assert 'step 1 of 4' in capsys.readouterr().out
  (tmp_path / 'run').rename(tmp_path / 'moved')
  fit(load_config(f'{tmp_path}/moved/config.json'), tmp_path / 'moved')  # without the flag, elsewhere
  (tmp_path / 'moved').rename(tmp_path / 'run')
  assert_same_params(arrays_of(tmp_path / 'run', 4), start)
  assert (tmp_path / 'run' / 'tokenizer.model').read_bytes() == tokenizer
  assert [line['step'] for line in read_metrics(tmp_path / 'run' / 'metrics.jsonl') if line['kind'] == 'eval'] == [4]
  record = read_json(tmp_path / 'run' / 'run.json')
  assert record['init_from'] | {'params_sha256': ''} == {
    'run': str(source), 'checkpoint': 3, 'step': 3, 'tokens': 384, 'params_sha256': '', 'bank': {}, 'init_from': None,
  }  # fmt: skip
  assert [begun['step'] for begun in record['starts']] == [0, 1, 4]


@pytest.mark.parametrize('kind', seldom(KINDS, 'lazy bag', 'n-grams'))
def test_every_kind_of_model_is_trained_on_with_all_its_parameters(text, tmp_path, kind):
  changes = KINDS[kind]
  other_rule = {} if kind in ('dense', 'moe') else {'memory__bank_update': 'lazy'}
  fit(run_config(text, **changes, train__max_steps=3), tmp_path / 'source')
  still = changes | {'train__learning_rate': 0.0, 'train__max_steps': 2, 'seed': 7}
  fit(run_config(text, **still, **new_text(tmp_path)), tmp_path / 'still', init_from=f'{tmp_path}/source@last')
  start = arrays_of(tmp_path / 'source', 3)
  assert_same_params(arrays_of(tmp_path / 'still', 2), start)
  moving = changes | other_rule | {'train__max_steps': 2, 'train__dtype': 'bfloat16'}
  fit(run_config(text, **moving, **new_text(tmp_path)), tmp_path / 'moving', init_from=f'{tmp_path}/still')
  end = arrays_of(tmp_path / 'moving', 2)
  assert any((end[name] != start[name]).any() for name in start)
  lineage = read_json(tmp_path / 'moving' / 'run.json')['init_from']
  assert lineage['run'] == f'{tmp_path}/still' and lineage['init_from']['run'] == f'{tmp_path}/source'


@pytest.mark.thorough
def test_run_killed_before_it_saved_its_start_still_starts_from_there(text, source, tmp_path, monkeypatch):
  config = run_config(text, **new_text(tmp_path), train__learning_rate=0.0, train__max_steps=1)

  def die(*_: object) -> None:
    raise ZeroDivisionError

  monkeypatch.setattr(loop.Checkpoints, 'save', die)
  with pytest.raises(ZeroDivisionError):
    fit(config, tmp_path / 'run', init_from=f'{source}@3')
  monkeypatch.undo()
  other = shutil.copytree(source, tmp_path / 'other')
  with pytest.raises(UserError, match=f'was started from {source}, step 3, not from {other}@3; leave --init_from out'):
    fit(config, tmp_path / 'run', init_from=f'{other}@3')
  fit(config, tmp_path / 'run')
  assert_same_params(arrays_of(tmp_path / 'run', 1), arrays_of(source, 3))


@pytest.mark.thorough
def test_bank_from_a_file_comes_from_the_run_and_not_from_the_file(text, tmp_path, capsys):
  """Nor is it the file's that the config names: what the rows once were is still known, by its hash."""
  bank = {'memory__bank_init': 'file', 'memory__bank_file': f'{tmp_path}/bank.safetensors'}
  write_tensors(tmp_path / 'bank.safetensors', {'memory_bank': np.ones((64, 8), np.float32)})
  (tmp_path / 'bank.jsonl').write_text('{"row": 5, "text": "what row 5 was"}')
  fit(run_config(text, **bank, train__max_steps=1), tmp_path / 'source')
  moved = shutil.copy(tmp_path / 'bank.safetensors', tmp_path / 'moved.safetensors')
  same = run_config(text, **bank | {'memory__bank_file': moved}, **new_text(tmp_path))
  assert settle_config(RunDir(tmp_path / 'run'), same, False, f'{tmp_path}/source')[0].memory == same.memory
  (tmp_path / 'bank.safetensors').write_text('no more a bank')
  for named in (bank, bank | {'memory__bank_file': '/nowhere'}):
    with pytest.raises(UserError, match=r'bank_file=.* does nothing .*; leave it out or type --\S*bank_init=normal'):
      fit(run_config(text, **named, **new_text(tmp_path)), tmp_path / 'run', init_from=f'{tmp_path}/source')
  for _ in range(2):  # and goes on
    fit(run_config(text, **new_text(tmp_path), train__max_steps=1), tmp_path / 'run', init_from=f'{tmp_path}/source')
  run = RunDir(tmp_path / 'run')
  assert bank_texts(run, run.read_config()) == ({5: 'what row 5 was'}, '')
  (tmp_path / 'bank.jsonl').write_text('{"row": 5, "text": "of a new bank"}')
  assert bank_texts(run, run.read_config())[0] == {}


@pytest.mark.parametrize(
  ('changes', 'said'),
  [
    ({'model__dim': 64}, 'model.dim 32 -> 64; type --config.model.dim=32, or begin with --config .*/config.json'),
    ({'model__n_heads': 8}, 'model.n_heads 4 -> 8'),
    ({'model__n_heads': 2}, 'model.n_heads 4 -> 2'),
    ({'model__rope_theta': 1e4}, r'model.rope_theta 1000000.0 -> 10000.0'),
    ({'model__num_selected': 4}, 'model.num_selected 3 -> 4'),
    ({'model__vocab_size': 400}, 'model.vocab_size 300 -> 400'),
    ({'model__sublayer': 'dense'}, 'model.sublayer gated_fusion -> dense'),
    ({'memory__scores': 'scale'}, 'memory.scores none -> scale; type --config.memory.scores=none'),
    ({'memory__selection_bias': True, 'memory__layers': '1'}, 'memory.layers all -> 1; memory.selection_bias False'),
    (
      {'memory__bank_init': 'file', 'memory__bank_file': '/x'},
      r"bank_init='file' does nothing .*type --\S*bank_init=normal",
    ),
    (
      {'memory__bank_std': 0.3},
      'memory.bank_std=0.3 does nothing when parameters come from .*; leave it out or',
    ),
    ({'data__tokenizer': 'OTHER'}, "data.tokenizer='.*' is not the tokenizer of .*; leave it out"),
    ({'data__tokenizer': '/nowhere'}, "no tokenizer file '/nowhere'"),
  ],
)
def test_what_contradicts_the_model_is_refused_by_name(source, tmp_path, changes, said):
  from mmjax.data.spm_tokenizer import train_tokenizer

  if changes.get('data__tokenizer') == 'OTHER':
    (tmp_path / 'other.model').write_bytes(train_tokenizer(['some other text of a few words'] * 9, 300))
    changes = {'data__tokenizer': f'{tmp_path}/other.model'}
  with pytest.raises(UserError, match=said):
    fit(tiny_config(**changes), tmp_path / 'run', init_from=str(source))
  assert not (tmp_path / 'run').exists()


@pytest.mark.thorough
def test_text_that_another_tokenizer_cut_is_not_used(text, source, tmp_path):
  config = run_config(text, data__prepared_dir=f'{tmp_path}/a')
  brought = prepare(config.data, 300)
  config = run_config(text, data__train_files='', data__prepared_dir=str(brought))
  with pytest.raises(UserError, match='was made with another tokenizer than .*source/tokenizer.model.; prepare'):
    fit(config, tmp_path / 'run', init_from=str(source))
  config = run_config(text, data__prepared_dir=f'{tmp_path}/a', train__max_steps=1)
  fit(config, tmp_path / 'run', init_from=str(source))
  assert len(list((tmp_path / 'a').glob('text-*'))) == 2


@pytest.mark.parametrize(
  'changes',
  [
    {'model__max_seq_len': 64, 'model__dropout': 0.1},
    {'memory__layers': '0,1', 'memory__key_dim': 8},  # said otherwise, the same
    {'memory__bank_update': 'lazy'},
    {'train__dtype': 'bfloat16', 'seed': 3, 'data__layout': 'padded'},
  ],
)
def test_what_does_not_change_the_model_is_free(source, tmp_path, changes):
  config, _ = settle_config(RunDir(tmp_path / 'run'), tiny_config(**changes), False, str(source))
  assert config.memory == tiny_config(**changes).memory and config.model == tiny_config(**changes).model


def test_config_of_a_run_is_a_config_file(source, tmp_path):
  settings = json.loads((source / 'config.json').read_text())
  del settings['memory']['key_dim'], settings['train']['profile_steps'], settings['sha256']  # an old one
  (source / 'config.json').write_text(json.dumps(settings))
  config = load_config(f'{source}/config.json', ['--config.train.max_steps=77'])
  assert config.train.max_steps == 77 and config.model == tiny_config().model
  settle_config(RunDir(tmp_path / 'run'), config, False, str(source))
  (source / 'config.json').write_text('[')
  with pytest.raises(UserError, match='config.json. is not JSON'):
    load_config(f'{source}/config.json')


def test_place_of_the_new_run_must_be_free_and_another(text, source, tmp_path):
  with pytest.raises(UserError, match='names .*/source, the work directory itself; give the new run another --workdir'):
    fit(run_config(text), source, init_from=str(source))
  used = shutil.copytree(source, tmp_path / 'used')
  with pytest.raises(UserError, match='used was started without --init_from, not from .*/source@best; leave'):
    fit(run_config(text), used, init_from=str(source))
  with pytest.raises(UserError, match=f'no checkpoint 5 in {source}/checkpoints; there are'):
    fit(run_config(text), tmp_path / 'run', init_from=f'{source}@5')
  assert not (tmp_path / 'run').exists()


def test_directory_and_checkpoint_are_told_apart(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  monkeypatch.setenv('HOME', f'{tmp_path}/home')
  (tmp_path / 'a@7').mkdir()
  for written, path, checkpoint in (
    ('a', 'a', 'best'), ('a@best', 'a', 'best'), ('a@last', 'a', 'last'), ('a@12', 'a', 12), ('a@7', 'a@7', 'best'),
    ('a@7@8', 'a@7', 8), ('me@host/run', 'me@host/run', 'best'), ('~/r@3', 'home/r', 3), (f'{tmp_path}/b', 'b', 'best'),
  ):  # fmt: skip
    found = parse_origin(written)
    assert (found.path, found.checkpoint) == (tmp_path / path, checkpoint), written
  with pytest.raises(UserError, match="'newest' must be 'best', 'last' or the number of a step"):
    parse_origin('a@newest')
