"""A run made of weights computes what torch computes, is sampled and trained on, with a tokenizer and without."""

import json
import random
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip('torch')

import mmjax  # noqa: E402
from mmjax.config import config_from_dict  # noqa: E402
from mmjax.data.loader import PADDING, open_split, train_batches  # noqa: E402
from mmjax.data.spm_tokenizer import train_tokenizer  # noqa: E402
from mmjax.errors import UserError  # noqa: E402
from mmjax.interop.convert import export_run, import_run, read_header  # noqa: E402
from mmjax.interop.files import read_tensors  # noqa: E402
from mmjax.model.params import abstract_params, model_graph  # noqa: E402
from mmjax.run.checkpoint import Checkpoints  # noqa: E402
from mmjax.run.directory import open_run  # noqa: E402
from mmjax.run.log import read_metrics  # noqa: E402
from mmjax.training.loop import fit  # noqa: E402
from tests.helpers import tiny_config  # noqa: E402
from tests.parity import build_pair, jax_forward, random_tokens, torch_logits  # noqa: E402
from tests.torch_reference import Sizes, TorchLM  # noqa: E402
from tests.weights import BASE_CONFIG, assert_same_bits, make_state, save, take  # noqa: E402


def write_text(folder: Path) -> None:
  """Writes text.jsonl, to be trained on, and spm.model, its tokenizer."""
  words = 'the memory reads a row of its bank and writes what it learned into the stream again'.split()
  draw = random.Random(0)
  documents = [' '.join(draw.choices(words, k=20)) for _ in range(200)]
  (folder / 'text.jsonl').write_text('\n'.join(json.dumps({'text': text}) for text in documents))
  (folder / 'spm.model').write_bytes(train_tokenizer(documents, 300))


def test_imported_run_computes_what_torch_computes(tmp_path):
  model, _, _ = build_pair(tiny_config())
  take(save(dict(model.state_dict()), tmp_path / 'model.safetensors'), tmp_path / 'run')
  config = config_from_dict(json.loads((tmp_path / 'run' / 'config.json').read_text()))
  params, metadata, step = Checkpoints(tmp_path / 'run', read_only=True).restore_params(abstract_params(config), 'best')
  assert step == 0 and metadata == {'tokens': 0, 'seconds': 0.0}
  tokens_BT = random_tokens(config, 2, 16)
  got_BTV, _ = jax_forward(model_graph(config), params, tokens_BT)
  np.testing.assert_allclose(got_BTV, torch_logits(model, tokens_BT), atol=1e-5)


@pytest.mark.thorough
def test_weights_stay_with_the_tokenizer_that_their_file_names(tiny_run, tmp_path):
  write_text(tmp_path)
  file, again = tmp_path / 'model.safetensors', tmp_path / 'again.safetensors'
  export_run(tiny_run, file, 'best', None)
  take(file, tmp_path / 'without')
  take(file, tmp_path / 'with', tokenizer=f'{tiny_run}/tokenizer.model')
  export_run(tmp_path / 'without', again, 'best', None)
  assert read_header(again)['tokenizer_sha256'] == read_header(file)['tokenizer_sha256']
  config = open_run(tiny_run).read_config()
  data = {'train_files': f'{tmp_path}/text.jsonl', 'valid_fraction': 0.1, 'prepared_dir': f'{tmp_path}/prepared'}
  config = config.with_settings({f'data.{name}': value for name, value in data.items()} | {'train.max_steps': 1})
  wrong = config.with_settings({'data.tokenizer': f'{tmp_path}/spm.model'})
  for run, origin in (('without', None), ('with', None), ('new', f'{tmp_path}/without')):
    with pytest.raises(UserError, match='belong to the tokenizer with the sha256 .*, and the text was prepared with '):
      fit(wrong, tmp_path / run, init_from=origin)
  fit(config.with_settings({'data.tokenizer': f'{tiny_run}/tokenizer.model'}), tmp_path / 'without')


@pytest.mark.thorough
def test_another_tokenizer_than_the_one_in_the_header_is_refused(tiny_run, tmp_path):
  file, other = tmp_path / 'model.safetensors', tmp_path / 'other.model'
  export_run(tiny_run, file, 'best', 'bfloat16')
  other.write_bytes(train_tokenizer(['some other text of a few words'] * 9, 300))
  with pytest.raises(UserError, match='other.model. is not that of .*, as the hash in its header shows'):
    import_run(file, tmp_path / 'back', BASE_CONFIG, [], str(other), 'float32')
  import_run(file, tmp_path / 'back', BASE_CONFIG, [], f'{tiny_run}/tokenizer.model', 'float32')
  assert mmjax.load(tmp_path / 'back').generate('the memory', max_new_tokens=3)


@pytest.mark.thorough
def test_imported_run_is_trained_on_from_its_weights(tmp_path):
  """Fine-tuning at learning rate 0 reports the loss that torch has on the same rows."""
  write_text(tmp_path)
  model, _, _ = build_pair(tiny_config())
  data = {
    'data.train_files': tmp_path / 'text.jsonl', 'data.valid_fraction': 0.1, 'data.prepared_dir': tmp_path / 'prepared',
    'data.workers': 1, 'train.max_steps': 2, 'train.batch_size': 4, 'train.accumulation_steps': 1,
    'train.dtype': 'float32', 'train.learning_rate': 0.0, 'train.eval_interval': 2, 'train.log_interval': 1,
  }  # fmt: skip
  path, run = save(dict(model.state_dict()), tmp_path / 'model.safetensors'), tmp_path / 'run'
  overrides = [f'--config.{name}={value}' for name, value in data.items()]
  take(path, run, *overrides, tokenizer=str(tmp_path / 'spm.model'))
  config = config_from_dict(json.loads((run / 'config.json').read_text()))
  fit(config, run)

  split = open_split(
    next((tmp_path / 'prepared').glob('text*')), 'train', max_seq_len=16, layout='packed', isolate_documents=False
  )
  batch = next(iter(train_batches(split, global_batch_rows=4, seed=config.seed, start_step=0)))
  logits_BTV = torch.from_numpy(torch_logits(model, batch['input']))
  target = torch.from_numpy(batch['target']).long()
  want = torch.nn.functional.cross_entropy(logits_BTV.flatten(0, 1), target.flatten(), ignore_index=PADDING)
  first = next(line for line in read_metrics(run / 'metrics.jsonl') if line['kind'] == 'train')
  assert first['step'] == 1 and first['loss'] == pytest.approx(want.item(), rel=1e-5)


def test_tokenizer_of_another_size_is_refused(tmp_path):
  (tmp_path / 'spm.model').write_bytes(train_tokenizer([__doc__, *map(str, range(3000))], 301))
  with pytest.raises(UserError, match='has 301 pieces but the model has 300'):
    take(save(make_state(), tmp_path / 'model.pth'), tmp_path / 'run', tokenizer=str(tmp_path / 'spm.model'))
  assert not (tmp_path / 'run').exists()


@pytest.mark.thorough
def test_spare_rows_of_an_embedding_are_imported_trained_on_and_never_sampled(tmp_path, capsys):
  write_text(tmp_path)
  (tmp_path / 'spm.model').write_bytes(train_tokenizer(['some text of a few words'] * 9, 280))
  state = make_state()
  state['tok_embeddings.weight'][280:] *= 100.0  # these would always win
  state['output.weight'] = state['tok_embeddings.weight']
  take(save(state, tmp_path / 'model.pth'), tmp_path / 'run', tokenizer=str(tmp_path / 'spm.model'))
  assert 'The tokenizer has 280 pieces, so 20 rows of the embedding are spare' in capsys.readouterr().out
  lm = mmjax.load(tmp_path / 'run')
  best = np.asarray(lm.logits([[5, 6, 7]])[0]).argmax(-1)
  assert best.max() >= 280
  for knobs in ({'temperature': 0}, {'temperature': 2.0, 'top_p': 1}, {'seed_sampling': True}):
    assert max(lm.generate_tokens([[5, 6, 7]], max_new_tokens=40, **knobs)[0]) < 280
  data = {'data__train_files': tmp_path / 'text.jsonl', 'data__valid_fraction': 0.1, 'data__workers': 1,
          'data__prepared_dir': tmp_path / 'prepared', 'train__max_steps': 1}  # fmt: skip
  fit(tiny_config(**data), tmp_path / 'run')
  assert mmjax.load(tmp_path / 'run', 'last').step == 1


@pytest.mark.thorough
def test_import_without_a_tokenizer_takes_and_gives_token_ids(tmp_path):
  state = make_state()
  take(save(state, tmp_path / 'model.pth'), tmp_path / 'run')
  lm = mmjax.load(tmp_path / 'run')
  tokens = np.arange(24).reshape(2, 12)
  model = TorchLM(Sizes.of(lm.config.model))
  model.load_state_dict(state)
  np.testing.assert_allclose(lm.logits(tokens), torch_logits(model, tokens), atol=1e-4)
  assert [len(row) for row in lm.generate_tokens([[5, 6], [7]], max_new_tokens=20)] == [20, 20]
  write_text(tmp_path)
  data = {'data__train_files': tmp_path / 'text.jsonl', 'data__valid_fraction': 0.1, 'data__workers': 1,
          'data__prepared_dir': tmp_path / 'prepared', 'train__max_steps': 1}  # fmt: skip
  with pytest.raises(UserError, match='a new one would give their token ids other meanings; name .*tokenizer=FILE'):
    fit(tiny_config(**data), tmp_path / 'run')
  for use in (lambda: lm.generate('text'), lambda: lm.stream('text'), lambda: lm.tokenizer,
              lambda: open_run(tmp_path / 'run')):  # fmt: skip
    with pytest.raises(UserError, match='imported without a tokenizer, so it reads and writes token ids'):
      use()


@pytest.mark.thorough
def test_imported_run_trains_under_other_data_and_training_settings(tmp_path):
  """Nothing but the architecture is bound: not the clip, which changes the optimizer's state."""
  write_text(tmp_path)
  state = make_state()
  take(save(state, tmp_path / 'm.safetensors'), tmp_path / 'first', tokenizer=str(tmp_path / 'spm.model'))
  (tmp_path / 'first').rename(tmp_path / 'run')  # its tokenizer, which nothing names below, goes with it
  settings = {
    'data__train_files': tmp_path / 'text.jsonl', 'data__valid_fraction': 0.1, 'data__workers': 1,
    'data__prepared_dir': tmp_path / 'prepared', 'train__max_steps': 2, 'train__grad_clip': 0.0,
    'train__learning_rate': 0.0, 'seed': 3,
  }  # fmt: skip
  with pytest.raises(UserError, match='memory.bank_std=0.5 does nothing when parameters come from'):
    fit(tiny_config(**settings, memory__bank_std=0.5), tmp_path / 'run')
  with pytest.raises(UserError, match='model.num_selected 3 -> 4; type --config.model.num_selected=3'):
    fit(tiny_config(**settings, model__num_selected=4), tmp_path / 'run')
  assert not (tmp_path / 'run' / 'run.json').exists()
  fit(tiny_config(**settings), tmp_path / 'run')
  export_run(tmp_path / 'run', tmp_path / 'back.safetensors', 'last', None)
  assert_same_bits(read_tensors(tmp_path / 'back.safetensors'), state)
  assert (tmp_path / 'run' / 'tokenizer.model').read_bytes() == (tmp_path / 'spm.model').read_bytes()
  with pytest.raises(UserError, match='seed 3 -> 4'):  # from here on it is a run like any other
    fit(tiny_config(**settings | {'seed': 4}), tmp_path / 'run')
