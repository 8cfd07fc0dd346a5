"""The Python API on a tiny run: what it returns, what it refuses, and that streamed text is the generated text."""

import json
import shutil
import warnings
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import log_softmax

import mmjax
from mmjax.errors import UserError
from mmjax.inference.measure import measure_text
from mmjax.model.params import model_graph
from mmjax.run.directory import RunDir
from mmjax.training.loop import fit
from tests.helpers import rarely


@pytest.fixture(scope='module')
def lm(tiny_run):
  return mmjax.load(tiny_run)


@pytest.mark.thorough
def test_training_from_python_is_that_of_the_command(tiny_run, tmp_path):
  changes = {'train.max_steps': 2, 'train.warmup_steps': 0, 'train.grad_clip': 0.5, 'data.isolate_documents': True}
  path = mmjax.train(tiny_run / 'config.json', tmp_path / 'run', changes)
  config = RunDir(tiny_run).read_config().with_settings(changes)
  fit(config, tmp_path / 'other')
  runs = [mmjax.load(tmp_path / name) for name in ('run', 'other')]
  assert path == tmp_path / 'run' and [lm.step for lm in runs] == [2, 2]
  jax.tree.map(np.testing.assert_array_equal, *(lm.params for lm in runs))
  assert RunDir(path).read_config() == config and (path / 'report.md').exists()
  mmjax.train(path / 'config.json', tmp_path / 'third', init_from=path)
  assert json.loads((tmp_path / 'third' / 'run.json').read_text())['init_from']['run'] == str(path)
  for wrong, said in (
    ({'train.max_step': 2}, "no setting 'train.max_step'; did you mean 'train.max_steps'"),
    ({'data.train_files': ['a', 'b']}, r"data.train_files=\['a', 'b'\] must be a number, a switch or text"),
    ({'data.valid_files': None}, 'data.valid_files=None must be'),
    (['--config.seed=1'], 'settings must be a dict'),
  ):
    with pytest.raises(UserError, match=said):
      mmjax.train(tiny_run / 'config.json', tmp_path / 'fourth', wrong)


@pytest.mark.parametrize('shape', [(1, 1), (3, 40)])
def test_logits_equal_the_model(lm, shape):
  tokens = np.random.default_rng(0).integers(0, lm.config.model.vocab_size, shape)
  model = nnx.merge(model_graph(lm.config), lm.params)
  whole = jax.jit(lambda tokens_BT: model.logits(model(tokens_BT).hidden_BTD))
  got = lm.logits(tokens)
  assert got.shape == (*shape, lm.config.model.vocab_size)
  assert got.dtype == jnp.float32
  np.testing.assert_allclose(got, whole(jnp.asarray(tokens)), atol=2e-5)


@pytest.mark.parametrize(
  ('tokens', 'said'),
  [
    ([[1, 300]], 'token id 300 is not in the vocabulary, which is 0..299'),
    ([[-1]], 'token id -1'),
    ([1, 2], r'shape \(2,\)'),
    (None, 'must be integers from 0 to 299, not None'),
    ('text', "must be integers from 0 to 299, not 'text'"),
    (b'text', "not b'text'"),
    ([[1, None]], 'not None'),
    ([[True]], 'not True'),
    ([[10**30]], 'not 1000000000'),
    (np.array([[2**63]], np.uint64), 'token id 9223372036854775808 is not in the vocabulary'),
    ([[]], r'shape \(1, 0\)'),
    ([[1.0]], 'must be integers'),
    ([[1, 2], [1]], 'rows of one length'),
  ],
)
def test_tokens_that_are_none_are_refused(lm, tokens, said):
  with pytest.raises(UserError, match=said):
    lm.logits(tokens)


def test_prompts_of_bad_ids_are_refused(lm):
  with pytest.raises(UserError, match='token id 300'):
    lm.generate_tokens([[1, 300]])
  with pytest.raises(UserError, match='at least one token'):
    lm.generate_tokens([[]])
  for prompts, said in (([1, 2], r'shape \(\) must be a list of token ids'), (None, 'not NoneType'), ('ab', 'not str'),
                        (b'ab', 'not bytes'), (['ab'], 'must be integers'), ([[None]], 'not None'), (5, 'not int'),
                        ([[[1]]], r'shape \(1, 1\)')):  # fmt: skip
    with pytest.raises(UserError, match=said):
      lm.generate_tokens(prompts)


@pytest.mark.thorough
def test_numbers_and_arrays_of_numpy_and_jax_are_as_good_as_pythons(lm):
  settings = {'max_new_tokens': 5, 'temperature': 0.5, 'top_p': 0.75, 'seed': 3}
  want = lm.generate_tokens([[5, 6, 7], [8, 9, 10]], **settings)
  for number in (np.float32, np.array, jnp.asarray):
    given = {name: np.int64(value) if isinstance(value, int) else number(value) for name, value in settings.items()}
    for prompts in (np.array([[5, 6, 7], [8, 9, 10]], np.uint8), jnp.array([[5, 6, 7], [8, 9, 10]]),
                    ((5, np.int16(6), 7), [8, 9, 10]), iter([[5, 6, 7], [8, 9, 10]])):  # fmt: skip
      assert lm.generate_tokens(prompts, **given) == want
  texts = lm.generate(['the memory', ''], max_new_tokens=np.uint8(5))
  assert lm.generate(np.array(['the memory', '']), max_new_tokens=5.0) == texts
  assert lm.generate(iter(('the memory', '')), max_new_tokens=5) == texts
  assert lm.generate(np.str_('the memory'), max_new_tokens=5) == texts[:1]
  np.testing.assert_array_equal(lm.logits(jnp.array([[5, 6]])), lm.logits([[np.int8(5), 6]]))
  assert lm.tokenizer.decode(np.array(lm.tokenizer.encode('the bank'))) == 'the bank'


@pytest.mark.parametrize(
  'settings',
  [
    {'max_new_tokens': None}, {'max_new_tokens': '5'}, {'max_new_tokens': True}, {'max_new_tokens': np.array([5, 6])},
    {'temperature': None}, {'temperature': b'1'}, {'temperature': 10**400}, {'temperature': 1 + 0j},
    {'top_p': np.nan}, {'seed': -1}, {'seed': 0.5}, {'seed_sampling': 'yes'}, {'repetition_penalty': 1e-38},
  ],
)  # fmt: skip
def test_settings_of_another_kind_are_refused_in_a_sentence(lm, settings):
  with pytest.raises(UserError, match=f'^{next(iter(settings))}=.* must be (a|True)'):
    lm.generate('the memory', **settings)


def test_what_is_no_run_and_no_dtype_is_refused_in_a_sentence(tiny_run):
  for path in (None, 5, ['out']):
    with pytest.raises(UserError, match=f'a path must be text, not {type(path).__name__}'):
      mmjax.load(path)
  for dtype in ('float', 'int32', object()):
    with pytest.raises(UserError, match='^dtype=.* must be one of float32, bfloat16'):
      mmjax.load(tiny_run, dtype=dtype)
  for checkpoint in (None, b'best', 1.0, True):
    with pytest.raises(UserError, match="must be 'best', 'last' or the number of a step"):
      mmjax.load(tiny_run, checkpoint)
  assert mmjax.load(str(tiny_run).encode(), np.int64(mmjax.load(tiny_run).step)).step == mmjax.load(tiny_run).step


@pytest.mark.parametrize('n_words', rarely([3, 200], 200))  # within a row, and of several
def test_log_probs_sum_to_the_loss_of_an_evaluation(lm, tiny_run, tmp_path, n_words, monkeypatch):
  text = ' '.join(f'the {word} of' for word in range(n_words))
  (tmp_path / 'text.jsonl').write_text(json.dumps({'text': text}))
  result = measure_text(lm, RunDir(tiny_run), str(tmp_path / 'text.jsonl'))
  ids = lm.tokenizer.encode(text)
  short, [found], [none] = lm.log_probs(['a', text])[0], lm.log_probs(text), lm.log_probs('')
  assert found.shape == (len(ids),) and found.dtype == np.float32 and none.shape == (0,)
  after = lm.next_log_probs([lm.tokenizer.start_id(lm.config.data.layout), *ids])
  assert result.tokens == len(ids) + 1
  assert -(found.sum() + after[-1, lm.tokenizer.eos_id]) / result.tokens == pytest.approx(result.loss, rel=1e-5)
  assert short == pytest.approx(lm.log_probs('a')[0])
  begun, ended = text[:9], text[9:]
  [after] = lm.log_probs(ended, after=begun)
  prompt, ids = lm.encode_prompt(begun), lm.tokenizer.encode(ended)
  row = [*prompt, *ids][: lm.config.model.max_seq_len]
  logits = np.asarray(lm.logits([row])[0, :-1, : lm.tokenizer.vocab_size])
  want = log_softmax(logits, axis=-1)[np.arange(len(row) - 1), row[1:]][len(prompt) - 1 :]
  assert len(after) == len(ids)
  np.testing.assert_allclose(after[: len(want)], want, atol=1e-5)
  for none in ([], [[1]], [0.5], None):
    with pytest.raises(UserError):
      lm.next_log_probs(none)
  for wrong, said in ((b'a', 'texts must be a str or a sequence of them, not bytes'), (['a', 5], 'not int')):
    with pytest.raises(UserError, match=said):
      lm.log_probs(wrong)
  monkeypatch.setattr(lm, '_tokenizer', SimpleNamespace(vocab_size=100))  # whose other ids stand for no text
  fewer = lm.next_log_probs(prompt)
  assert fewer.shape == (len(prompt), 100)
  np.testing.assert_allclose(np.exp(fewer).sum(axis=-1), 1, rtol=1e-5)


@pytest.mark.thorough
def test_generate_returns_one_continuation_a_prompt(lm):
  texts = lm.generate(['the memory', '', 'Ä漢🙂\x00\x1b'], max_new_tokens=9)
  assert len(texts) == 3
  assert lm.generate('the memory', max_new_tokens=9) == texts[:1]
  assert lm.generate([], max_new_tokens=9) == []
  tokens = lm.generate_tokens([lm.encode_prompt('the memory')], max_new_tokens=9)
  assert texts[0] == lm.tokenizer.decode(tokens[0])


def test_generation_starts_as_rows_do_in_training(lm):
  assert lm.encode_prompt('') == [lm.tokenizer.eos_id]  # packed rows: the end of the document before
  assert lm.encode_prompt('the bank')[1:] == lm.tokenizer.encode('the bank')


@pytest.mark.thorough
def test_stream_adds_up_to_generate(lm):
  options = {'max_new_tokens': 40, 'temperature': 1.5, 'top_p': 1.0, 'seed': 5}
  assert ''.join(lm.stream('the memory', **options)) == lm.generate('the memory', **options)[0]


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 299), max_size=40), st.integers(1, 5))
def test_streamed_pieces_join_to_the_decoded_whole(lm, ids, block):
  with pytest.MonkeyPatch.context() as patch:
    blocks = [[ids[i : i + block]] for i in range(0, len(ids), block)]
    patch.setattr(lm._decoder, 'stream', lambda *_: iter(blocks))
    assert ''.join(lm.stream('')) == lm.tokenizer.decode(ids)


def test_a_character_of_several_tokens_is_streamed_whole(lm):
  text = 'é漢🙂'
  byte_ids = [lm.tokenizer.encode(char) for char in text]
  assert [len(ids) for ids in byte_ids] == [2, 3, 4]  # this vocabulary has none of them: bytes
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(lm._decoder, 'stream', lambda *_: ([[token]] for ids in byte_ids for token in ids))
    assert list(lm.stream('')) == list(text)


def test_a_long_prompt_is_cut_to_its_end_with_a_warning(lm):
  most = lm.config.model.max_seq_len
  words = ' '.join(f'word{i}' for i in range(100))
  with pytest.warns(UserWarning, match=f'max_seq_len={most}') as warned:
    tokens = lm.encode_prompt(words)
  assert warned[0].filename == __file__
  assert tokens == lm.tokenizer.encode(words)[-most:]
  with pytest.warns(UserWarning, match=f"the prompt that begins with '{'x' * 40}' is longer .* its end is used"):
    assert lm.encode_prompt('x' * 10_000_000 + words) == tokens


@pytest.mark.thorough
def test_positions_beyond_those_of_training_are_said(lm):
  row = [5] * lm.config.model.max_seq_len
  for ask in (
    lambda: lm.logits([[*row, 5]]),
    lambda: lm.generate_tokens([row], max_new_tokens=2),
    lambda: list(lm.stream('word ' * 100, max_new_tokens=2)),
  ):
    with pytest.warns(UserWarning, match=f'{len(row) + 1} tokens are more than model.max_seq_len={len(row)}') as warned:
      ask()
    assert {warning.filename for warning in warned} == {__file__}
  with warnings.catch_warnings(action='error'):
    lm.logits([row])
    lm.generate_tokens([row], max_new_tokens=1)


@pytest.mark.parametrize('prompt', ['a\ud800b', 'a' * 100 + '\udfff'])
def test_a_lone_surrogate_is_refused_in_a_sentence(lm, prompt):
  with pytest.raises(UserError, match='lone surrogate'):
    lm.generate(prompt)


def test_what_is_no_text_and_no_setting_is_refused(lm):
  with pytest.raises(UserError, match='must be a str, not bytes'):
    lm.generate([b'bytes'])
  for prompt in (None, b'bytes', 5, {'a': 1}):
    with pytest.raises(UserError, match=f'prompts must be a str or a sequence of them, not {type(prompt).__name__}'):
      lm.generate(prompt)
    with pytest.raises(UserError, match=f'a prompt must be a str, not {type(prompt).__name__}'):
      lm.stream(prompt)
  with pytest.raises(UserError, match="no sampling setting 'temprature'"):
    lm.generate('', temprature=1)
  with pytest.raises(UserError, match='top_p=2'):
    lm.stream('', top_p=2)  # at once, not when the first piece is asked for


def test_checkpoints_are_chosen_by_name_or_number(tiny_run):
  steps = sorted(int(p.name) for p in (tiny_run / 'checkpoints').iterdir() if p.name.isdigit())
  assert mmjax.load(tiny_run, 'last').step == steps[-1]
  assert mmjax.load(tiny_run, steps[0]).step == mmjax.load(tiny_run, str(steps[0])).step == steps[0]
  with pytest.raises(UserError, match=r'no checkpoint 77 in .*; there are \['):
    mmjax.load(tiny_run, 77)
  with pytest.raises(UserError, match="checkpoint='newest' must be 'best', 'last' or"):
    mmjax.load(tiny_run, 'newest')


@pytest.mark.parametrize('checkpoint', ['last', 3])
def test_checkpoint_is_not_chosen_of_the_model_without_the_taught_rows(tiny_run, checkpoint):
  with pytest.raises(UserError, match=f'whatever checkpoint={checkpoint} says; give one of them'):
    mmjax.load(tiny_run, checkpoint, without_taught=True)


def test_best_is_the_checkpoint_with_the_lowest_validation_loss(tiny_run):
  lines = [json.loads(line) for line in (tiny_run / 'metrics.jsonl').read_text().splitlines()]
  losses = {line['step']: line['loss'] for line in lines if line['kind'] == 'eval'}
  assert mmjax.load(tiny_run).step == min(losses, key=losses.get)


def test_a_directory_that_is_no_run_is_refused(tmp_path, tiny_run):
  with pytest.raises(UserError, match='no run directory'):
    mmjax.load(tmp_path / 'nothing')
  with pytest.raises(UserError, match='config.json'):
    mmjax.load(tmp_path)


def test_another_tokenizer_is_refused(tmp_path, tiny_run):
  copy = tmp_path / 'run'
  shutil.copytree(tiny_run, copy)
  run = json.loads((copy / 'run.json').read_text())
  run['identity']['tokenizer_sha256'] = 64 * '0'
  del run['sha256']
  (copy / 'run.json').write_text(json.dumps(run))
  with pytest.raises(UserError, match='is not the tokenizer that the run was trained with'):
    mmjax.load(copy)


def test_the_package_has_no_other_names():
  with pytest.raises(AttributeError, match='lode'):
    mmjax.lode  # noqa: B018


def test_a_notebook_is_offered_what_is_imported_later(tiny_run):
  assert {'load', 'train', 'LanguageModel'} <= set(dir(mmjax))
  lm = mmjax.load(tiny_run)
  assert repr(lm) == f'LanguageModel({lm.config.experiment}, {lm.config.model.sublayer}, step {lm.step:,})'


@pytest.mark.parametrize('config', [{'train.max_steps': 1}, None, 7])
def test_a_config_that_is_no_file_is_refused(tmp_path, config):
  with pytest.raises(UserError, match='config must be a config file, such as the config.json'):
    mmjax.train(config, tmp_path / 'run')
