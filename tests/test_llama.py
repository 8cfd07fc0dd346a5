"""A run written as a Llama: the same logits and the same ids, by hand and with the real transformers."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

import mmjax
from mmjax.data.spm_tokenizer import train_tokenizer
from mmjax.data.tokenizer import load_tokenizer
from mmjax.errors import UserError
from mmjax.interop.llama import export_llama
from mmjax.model.params import abstract_params
from mmjax.run.checkpoint import Checkpoints
from mmjax.run.directory import RunDir, write_tokenizer
from tests.helpers import tiny_config
from tests.test_tokenizer_json import write_tokenizer as write_tokenizer_json

TEXTS = (
  'the memory reads a row', ' a leading space', '  two  and\n\n\tlines\r\n', '记忆 读取。', '🙂👩‍👩‍👧 naïve e\u0301',
  'literally \u2581 and </s> and <0x41>', '\x00', '',
)  # fmt: skip


def make_run(path: Path, tokenizer: Path | None = None, **changes: object) -> Path:
  """Makes a run of a dense model with random weights, norms too."""
  draw = np.random.default_rng(0)
  config = tiny_config(**{'model__sublayer': 'dense', 'model__rope_theta': 100.0, 'model__norm_eps': 1e-3} | changes)
  params = jax.tree.map(lambda x: draw.normal(x.ndim == 1, 0.3, x.shape).astype(np.float32), abstract_params(config))
  with RunDir(path) as run:
    Checkpoints(path).save(0, {'params': params, 'step': np.int32(0)}, {'tokens': 0, 'seconds': 0.0})
    if tokenizer:
      write_tokenizer(path / ('tokenizer' + tokenizer.suffix), load_tokenizer(tokenizer))
    run.write_config(config)
  return path


@pytest.fixture(params=['.model', '.json'])
def tokenizer_file(request, tmp_path, texts) -> Path:
  path = tmp_path / f'given{request.param}'
  if request.param == '.model':
    path.write_bytes(train_tokenizer(texts, 400))
  else:
    write_tokenizer_json(path, texts)
  return path


def llama_logits(folder: Path, tokens_T: np.ndarray) -> np.ndarray:
  """Runs a Llama as its paper and transformers describe it: halves of a head's channels rotate with each other."""
  config, weights = json.loads((folder / 'config.json').read_text()), load_file(folder / 'model.safetensors')
  N, K, H, T = config['num_attention_heads'], config['num_key_value_heads'], config['head_dim'], len(tokens_T)
  angle_TH = np.arange(T)[:, None] * np.tile(config['rope_theta'] ** -(np.arange(0, H, 2) / H), 2)

  def norm(x: np.ndarray, name: str) -> np.ndarray:
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + config['rms_norm_eps']) * weights[f'model.{name}.weight']

  def rotate(x_NTH: np.ndarray) -> np.ndarray:
    first, second = np.split(x_NTH, 2, axis=-1)
    return x_NTH * np.cos(angle_TH) + np.concatenate((-second, first), axis=-1) * np.sin(angle_TH)

  x_TD = weights['model.embed_tokens.weight'][tokens_T].astype(np.float64)
  for layer in range(config['num_hidden_layers']):

    def linear(x: np.ndarray, name: str, layer: int = layer) -> np.ndarray:
      return x @ weights[f'model.layers.{layer}.{name}.weight'].T

    m_TD = norm(x_TD, f'layers.{layer}.input_layernorm')
    q, k, v = (linear(m_TD, f'self_attn.{x}_proj').reshape(T, -1, H).swapaxes(0, 1) for x in 'qkv')
    k, v = (np.repeat(x, N // K, axis=0) for x in (rotate(k), v))
    score_NTS = np.where(np.tri(T, dtype=bool), rotate(q) @ k.swapaxes(1, 2) / H**0.5, -np.inf)
    weight_NTS = np.exp(score_NTS - score_NTS.max(-1, keepdims=True))
    read_NTH = weight_NTS / weight_NTS.sum(-1, keepdims=True) @ v
    x_TD = x_TD + linear(read_NTH.swapaxes(0, 1).reshape(T, -1), 'self_attn.o_proj')
    m_TD = norm(x_TD, f'layers.{layer}.post_attention_layernorm')
    gate_TF = linear(m_TD, 'mlp.gate_proj')
    x_TD = x_TD + linear(gate_TF / (1 + np.exp(-gate_TF)) * linear(m_TD, 'mlp.up_proj'), 'mlp.down_proj')
  assert config['tie_word_embeddings']
  return norm(x_TD, 'norm') @ weights['model.embed_tokens.weight'].T


def test_the_written_llama_computes_the_logits_of_the_run(tmp_path):
  run, folder = make_run(tmp_path / 'run'), tmp_path / 'llama'
  folder.mkdir()  # an empty one will do
  export_llama(run, folder, 'best', None)
  tokens_T = np.random.default_rng(1).integers(0, 300, 16)
  ours = np.asarray(mmjax.load(run).logits(tokens_T[None]))[0]
  np.testing.assert_allclose(llama_logits(folder, tokens_T), ours, rtol=0, atol=1e-4)
  with pytest.raises(UserError, match='already exists; choose another --to'):
    export_llama(run, folder, 'best', None)
  (folder / 'model.safetensors').rename(folder / '.model.safetensors.7.tmp')  # as a kill leaves it
  with pytest.raises(UserError, match='already exists, and what wrote it was stopped: remove it'):
    export_llama(run, folder, 'best', None)


def test_the_written_tokenizer_cuts_every_text_alike(tokenizer_file, tmp_path, texts):
  run, folder = make_run(tmp_path / 'run', tokenizer_file, model__vocab_size=400), tmp_path / 'llama'
  export_llama(run, folder, 'best', 'bfloat16')
  ours, back = RunDir(run).load_tokenizer(400), load_tokenizer(folder / 'tokenizer.json')
  for text in (*TEXTS, *texts[:50]):
    assert back.encode(text) == ours.encode(text), text
    assert back.decode(ours.encode(text)) == ours.decode(ours.encode(text)), text
  config, settings = (json.loads((folder / f'{name}.json').read_text()) for name in ('config', 'tokenizer_config'))
  assert (config['bos_token_id'], config['eos_token_id'], config['dtype']) == (ours.eos_id, ours.eos_id, 'bfloat16')
  assert (settings['bos_token'], settings['eos_token']) == ('</s>', '</s>')


def test_a_tokenizer_that_changes_text_is_refused(tmp_path):
  import sentencepiece

  path = tmp_path / 'other.model'
  sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=iter(['the memory of a model'] * 9), model_prefix=str(path.with_suffix('')), vocab_size=290,
    byte_fallback=True, hard_vocab_limit=False, model_type='bpe', minloglevel=2,
  )  # fmt: skip
  with pytest.raises(UserError, match='cannot be written as a tokenizer.json that cuts text alike'):
    export_llama(make_run(tmp_path / 'run', path), tmp_path / 'llama', 'best', None)
  assert not (tmp_path / 'llama').exists()


@pytest.mark.parametrize(
  ('name', 'value', 'reason'),
  [
    ('model.sublayer', 'moe', 'neither a memory nor experts'),
    ('model.sublayer', 'gated_fusion', 'neither a memory nor experts'),
    ('model.qk_norm', True, 'does not norm queries and keys'),
    ('model.value_embeddings', 'all', 'takes the values of attention from the stream alone'),
    ('memory.value_layers', 'all', 'takes the values of attention from the stream alone'),
  ],
)
def test_what_no_llama_can_be_is_refused_with_the_reason(name, value, reason, tmp_path):
  with RunDir(tmp_path) as run:
    ngrams = {'memory__ngrams': '2'} if name == 'memory.value_layers' else {}
    run.write_config(tiny_config(**{'model__sublayer': 'dense', name.replace('.', '__'): value} | ngrams))
    (run.checkpoints_path / '1').mkdir(parents=True)
  with pytest.raises(UserError, match=f'{name}={value!r} cannot be written as a Llama, which .*{reason}'):
    export_llama(tmp_path, tmp_path / 'llama', 'best', None)


@pytest.mark.thorough
def test_transformers_loads_it_and_agrees(tokenizer_file, tmp_path, texts):
  transformers = pytest.importorskip('transformers', reason='needs the package transformers, and torch')
  torch = pytest.importorskip('torch')
  run, folder = make_run(tmp_path / 'run', tokenizer_file, model__vocab_size=400), tmp_path / 'llama'
  export_llama(run, folder, 'best', None)
  lm, model = mmjax.load(run), transformers.AutoModelForCausalLM.from_pretrained(folder)
  tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
  assert type(model).__name__ == 'LlamaForCausalLM'
  for text in (*TEXTS, *texts[:50]):
    ids = lm.tokenizer.encode(text)
    assert tokenizer(text, add_special_tokens=False).input_ids == ids
    assert tokenizer(text).input_ids == [lm.tokenizer.eos_id, *ids]
    assert tokenizer.decode(ids) == lm.tokenizer.decode(ids)
  tokens_BT = np.random.default_rng(1).integers(0, 400, (2, 16))
  ours = np.asarray(lm.logits(tokens_BT))
  with torch.no_grad():
    theirs = model(torch.tensor(tokens_BT)).logits.numpy()
  np.testing.assert_allclose(theirs, ours, rtol=0, atol=1e-4)
