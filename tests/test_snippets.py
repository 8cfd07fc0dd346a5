"""From text to the rows of a bank: cutting, encoding, choosing, and the file that a run starts from."""

import json
import sys
from types import SimpleNamespace

import numpy as np
import pytest

from mmjax.config import load_config
from mmjax.data.bank_file import read_bank
from mmjax.data.snippets import (
  balanced_leaves,
  choose_rows,
  cut_snippets,
  latent_semantic_vectors,
  reduce_dim,
  standardize,
)
from mmjax.errors import UserError
from mmjax.files import write_file
from mmjax.tools import bank, bank_stages
from mmjax.training.loop import fit
from tests.helpers import TINY


class FakeSplit:
  """A stream of documents, as TokenSplit shows it."""

  def __init__(self, lengths):
    self.document_start = np.concatenate([[0], np.cumsum(lengths)])


def test_snippets_lie_within_documents_and_are_spread_evenly():
  split = FakeSplit([10, 3, 8, 33, 5])
  starts = cut_snippets(split, 4, most=1000)
  assert starts.tolist() == [0, 4, 21 - 8, 21, 25, 29, 33, 37, 41, 45, 49, 54]
  ends = split.document_start[1:] - 1  # the last token of a document is its EOS
  for start in starts:
    document = np.searchsorted(split.document_start, start, side='right') - 1
    assert start + 4 <= ends[document]
  few = cut_snippets(split, 4, most=4)
  assert len(few) == 4 and set(few) <= set(starts)


def test_latent_semantic_vectors_equal_a_dense_svd_and_group_topics():
  draw = np.random.default_rng(0)
  topics = [np.arange(5, 15), np.arange(20, 30)]
  tokens = np.stack([draw.choice(topics[i % 2], 12) for i in range(60)])
  vectors = latent_semantic_vectors(tokens, 40, 4)
  counts = np.stack([np.bincount(row, minlength=40) for row in tokens]).astype(float)
  weighted = np.log1p(counts) * np.log(61 / (1 + (counts > 0).sum(axis=0)))
  left, size, _ = np.linalg.svd(weighted, full_matrices=False)
  want = left[:, :4] * size[:4]
  want /= np.linalg.norm(want, axis=1, keepdims=True)
  np.testing.assert_allclose(vectors @ vectors.T, want @ want.T, atol=1e-3)  # equal up to signs
  like = vectors @ vectors.T
  same = np.arange(60)[:, None] % 2 == np.arange(60) % 2
  assert like[same].mean() > like[~same].mean() + 0.3


def test_leaves_are_balanced_and_hold_everything_once():
  vectors = np.random.default_rng(0).normal(size=(1003, 6)).astype(np.float32)
  leaves = list(balanced_leaves(vectors, np.arange(1003), 7, np.ones(6, np.float32)))
  assert sorted(np.concatenate(leaves)) == list(range(1003))
  assert len(leaves) == 7 and max(map(len, leaves)) - min(map(len, leaves)) <= 3


def test_rows_that_share_a_sub_key_are_more_alike_than_others():
  vectors = np.random.default_rng(0).normal(size=(2000, 4)).astype(np.float32)
  chosen = choose_rows(vectors, 10, lambda done: None)
  assert len(set(chosen)) == 100
  rows = vectors[chosen].reshape(10, 10, 4)
  within = ((rows - rows.mean(axis=1, keepdims=True)) ** 2).sum(-1).mean()
  overall = ((rows - rows.mean(axis=(0, 1))) ** 2).sum(-1).mean()
  shuffled = vectors[np.random.default_rng(1).permutation(chosen)].reshape(10, 10, 4)
  by_chance = ((shuffled - shuffled.mean(axis=1, keepdims=True)) ** 2).sum(-1).mean()
  assert within < 0.6 * by_chance and by_chance > 0.8 * overall
  # The second index is ordered alike in every branch: rows j of different branches are alike, too.
  across = ((rows - rows.mean(axis=0, keepdims=True)) ** 2).sum(-1).mean()
  assert across < 0.95 * overall


def test_too_few_snippets_are_refused_with_both_numbers():
  with pytest.raises(UserError, match='gives 5 snippets.*knowledge_num=9.*or --config.model.knowledge_num=4$'):
    choose_rows(np.zeros((5, 2), np.float32), 3, lambda done: None)
  with pytest.raises(UserError, match='gives 0 snippets.* a smaller memory.knowledge_length$'):
    choose_rows(np.zeros((0, 2), np.float32), 3, lambda done: None)


def test_standardize_and_reduce():
  values = np.random.default_rng(0).normal(3, 2, (50, 8))
  rows = standardize(values, 0.5)
  assert rows.std() == pytest.approx(0.5, rel=1e-5) and abs(rows.mean(axis=0)).max() < 1e-6
  plane = np.random.default_rng(1).normal(size=(50, 2)) @ np.random.default_rng(2).normal(size=(2, 8))
  reduced = reduce_dim([plane[:7], plane[7:]], 2)
  distance = lambda x: np.linalg.norm(x[:, None] - x, axis=-1)  # noqa: E731
  np.testing.assert_allclose(distance(reduced), distance(plane), atol=1e-4)


def test_text_that_says_nothing_is_refused():
  with pytest.raises(UserError, match='every token of the 30 snippets is in all of them, so none says anything'):
    latent_semantic_vectors(np.tile([1, 2, 3], (30, 1)), 8, 4)
  with pytest.raises(UserError, match='all 6 rows are alike'):
    standardize(np.tile(np.float32([0.1, 0.7, 0.3]), (6, 1)), 0.5)


def test_rows_of_text_that_repeats_itself_are_counted(tmp_path, capsys):
  documents = ['the memory reads a row of its bank and writes what it learned', 'a gate picks rows of the bank by keys']
  (tmp_path / 'text.jsonl').write_text('\n'.join(json.dumps({'text': documents[n % 2]}) for n in range(100)))
  sizes = {'model.knowledge_num': 64, 'model.knowledge_dim': 2, 'model.num_selected': 4, 'model.vocab_size': 290}
  files = {'data.train_files': tmp_path / 'text.jsonl', 'data.prepared_dir': tmp_path / 'data'}
  more = {'memory.knowledge_length': 6, 'data.valid_fraction': 0, 'data.workers': 1}
  flags = [f'--config.{name}={value}' for name, value in (sizes | files | more).items()]
  config = load_config('configs/exp_1_4_3.py', flags, bank.USED_SETTINGS)
  bank.build_bank(config, tmp_path / 'bank.safetensors', 'lsa')
  rows = [json.loads(line) for line in (tmp_path / 'bank.jsonl').read_text().splitlines()]
  different = len({row['text'] for row in rows})
  assert len(rows) == 64 > different
  assert f'The text repeats itself: {different} of the rows differ from each other' in capsys.readouterr().err


def test_more_dimensions_than_there_are_are_refused():
  with pytest.raises(UserError, match='knowledge_dim=9 must be at most 8'):
    reduce_dim([np.zeros((50, 8))], 9)
  with pytest.raises(UserError, match='knowledge_dim=8 must be at most 7'):
    latent_semantic_vectors(np.zeros((50, 4), int), 8, 8)


@pytest.fixture(scope='module')
def built(tmp_path_factory):
  folder = tmp_path_factory.mktemp('bank')
  draw = np.random.default_rng(0)
  words = [f'{a}{b}' for a in ('ba', 'co', 'di', 'fu') for b in ('ran', 'sel', 'tim', 'pol', 'nug')]
  lines = [json.dumps({'text': ' '.join(draw.choice(words, 80))}) for _ in range(40)]
  (folder / 'text.jsonl').write_text('\n'.join(lines))
  settings = TINY | {
    'data.train_files': f'{folder}/text.jsonl',
    'data.prepared_dir': f'{folder}/data',
    'data.workers': 1,
    'data.valid_fraction': 0.1,
    'memory.knowledge_length': 8,
    'memory.bank_init': 'file',
    'memory.bank_file': f'{folder}/bank.safetensors',
  }
  flags = [f'--config.{name}={value}' for name, value in settings.items()]
  config = load_config('configs/base.py', [*flags, '--config.memory.bank_std=0.25'], used=bank.USED_SETTINGS)
  bank.build_bank(config, folder / 'bank.safetensors', 'lsa')
  with pytest.raises(UserError, match="memory.bank_std=0.25 does nothing when memory.bank_init='file' gives the rows"):
    load_config('configs/base.py', [*flags, '--config.memory.bank_std=0.25'])
  return config, folder


def test_bank_file_has_scaled_rows_and_their_texts(built):
  _, folder = built
  rows = read_bank(folder / 'bank.safetensors', (64, 8))
  assert rows.std() == pytest.approx(0.25, rel=1e-4)
  texts = [json.loads(line) for line in (folder / 'bank.jsonl').read_text().splitlines()]
  assert [line['row'] for line in texts] == list(range(64))
  corpus = (folder / 'text.jsonl').read_text()
  assert all(line['text'].strip() in corpus for line in texts)
  assert not (folder / 'bank.safetensors.work').exists()


def test_room_is_needed_for_the_snippets_that_there_are(built, tmp_path):
  bank.build_bank(built[0], tmp_path / 'bank.safetensors', 'lsa', snippets_a_row=10**12)
  assert read_bank(tmp_path / 'bank.safetensors', (64, 8)).std() == pytest.approx(0.25, rel=1e-4)


@pytest.mark.thorough
def test_run_starts_from_the_file(built, tmp_path):
  from mmjax.run.placement import place
  from mmjax.training.first_state import new_state
  from mmjax.training.learner import Learner

  config, folder = built
  state = new_state(Learner(config, place(config), 10))
  np.testing.assert_array_equal(state['params']['memory_bank'], read_bank(folder / 'bank.safetensors', (64, 8)))


def test_stopped_build_goes_on_after_the_last_stage(built, monkeypatch):
  config, folder = built
  out = folder / 'again.safetensors'
  monkeypatch.setattr(bank_stages, 'choose_rows', lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
  with pytest.raises(KeyboardInterrupt):
    bank.build_bank(config, out, 'lsa')
  monkeypatch.undo()
  monkeypatch.setattr(bank_stages, 'latent_semantic_vectors', lambda *_: pytest.fail('the vectors were there already'))
  bank.build_bank(config, out, 'lsa')
  assert out.read_bytes() == (folder / 'bank.safetensors').read_bytes()


@pytest.mark.parametrize('files', [1, 2, 3, 4])
def test_build_that_is_stopped_between_its_files_goes_on_or_says_that_it_is_done(built, tmp_path, monkeypatch, files):
  config, folder = built
  out, written = tmp_path / 'bank.safetensors', []

  def write(path, data):
    write_file(path, data)
    written.append(path.name)
    if len(written) == files:
      raise KeyboardInterrupt

  with monkeypatch.context() as stopped:
    for module in ('data.bank_file', 'interop.files'):
      stopped.setattr(f'mmjax.{module}.write_file', write)
    with pytest.raises(KeyboardInterrupt):
      bank.build_bank(config, out, 'lsa')
  assert written == ['texts.jsonl', 'bank.jsonl', 'bank.safetensors.sha256', 'bank.safetensors'][:files]
  if files == 4:
    with pytest.raises(UserError, match='already exists'):
      bank.build_bank(config, out, 'lsa')
  else:
    bank.build_bank(config, out, 'lsa')
  names = ['bank.jsonl', 'bank.safetensors', 'bank.safetensors.sha256']
  assert sorted(path.name for path in tmp_path.iterdir()) == names
  assert all((tmp_path / name).read_bytes() == (folder / name).read_bytes() for name in names)


def test_text_that_was_put_beside_a_stopped_build_is_not_replaced(built, tmp_path, monkeypatch):
  config, _ = built
  with monkeypatch.context() as stopped:
    stopped.setattr(bank_stages, 'write_tensors', lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
      bank.build_bank(config, tmp_path / 'bank.safetensors', 'lsa')
  (tmp_path / 'bank.jsonl').write_text('mine')
  with pytest.raises(UserError, match='would replace .*bank.jsonl'):
    bank.build_bank(config, tmp_path / 'bank.safetensors', 'lsa')
  assert (tmp_path / 'bank.jsonl').read_text() == 'mine'


@pytest.fixture
def encoder(tmp_path, monkeypatch):
  """The name of an encoder, which counts how often each letter occurs, and the list of how many texts it was given."""
  given = []

  class Counter:
    def __init__(self, directory, local_files_only):
      assert directory == str(tmp_path) and local_files_only

    def encode(self, texts, **_):
      given.append(len(texts))
      return np.array([[text.count(letter) for letter in 'abcdefghijklmnop'] for text in texts])

  monkeypatch.setitem(sys.modules, 'sentence_transformers', SimpleNamespace(SentenceTransformer=Counter))
  monkeypatch.setattr(bank_stages, 'SNIPPETS_A_PART', 100)
  return f'sentence-transformers:{tmp_path}', given


def test_rows_are_the_encoders_and_a_stopped_build_encodes_only_what_is_left(built, encoder, monkeypatch):
  config, folder = built
  name, given = encoder
  out = folder / 'encoded.safetensors'
  with monkeypatch.context() as stopped:
    stopped.setattr(bank_stages, 'reduce_dim', lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
      bank.build_bank(config, out, name)
  parts = sorted((folder / 'encoded.safetensors.work').rglob('embedded-*.npy'))
  assert len(parts) == len(given) > 2 and set(given[:-1]) == {100}
  parts[1].unlink()
  bank.build_bank(config, out, name)
  assert given[len(parts) :] == [100]

  rows = read_bank(out, (64, 8))
  texts = [json.loads(line)['text'] for line in (folder / 'encoded.jsonl').read_text().splitlines()]
  letters = np.array([[text.count(letter) for letter in 'abcdefghijklmnop'] for text in texts], float)
  between = lambda x: np.linalg.norm(x[:, None] - x, axis=-1).ravel()  # noqa: E731
  assert np.corrcoef(between(rows), between(letters))[0, 1] > 0.5  # rows are near where their texts' letters are


def test_bank_that_is_there_already_is_refused_and_keeps_its_texts(built):
  config, folder = built
  files = [folder / 'bank.safetensors', folder / 'bank.jsonl']
  before = [path.read_bytes() for path in files]
  with pytest.raises(UserError, match='already exists'):
    bank.build_bank(config.with_settings({'seed': 1}), files[0], 'lsa')
  assert [path.read_bytes() for path in files] == before


def test_text_of_the_banks_name_is_not_replaced(built, tmp_path):
  config, folder = built
  text = tmp_path / 'own.jsonl'
  text.write_bytes((folder / 'text.jsonl').read_bytes())
  own = config.with_settings({'data.train_files': str(text)})
  with pytest.raises(UserError, match='own.safetensors. would replace .*own.jsonl. with its rows. texts'):
    bank.build_bank(own, tmp_path / 'own.safetensors', 'lsa')
  assert text.read_bytes() == (folder / 'text.jsonl').read_bytes() and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize(
  ('damage', 'said'),
  [
    (lambda path: path.unlink(), 'no memory.bank_file'),
    (lambda path: path.write_bytes(path.read_bytes()[:-1]), 'sha256 is'),
    (lambda path: path.with_name(path.name + '.sha256').unlink() or path.write_bytes(b'xxxxxxxxxxx'), 'is not a bank'),
  ],
)
def test_damaged_bank_file_is_refused(built, tmp_path, damage, said):
  _, folder = built
  for name in ('bank.safetensors', 'bank.safetensors.sha256'):
    (tmp_path / name).write_bytes((folder / name).read_bytes())
  damage(tmp_path / 'bank.safetensors')
  with pytest.raises(UserError, match=said):
    read_bank(tmp_path / 'bank.safetensors', (64, 8))


def test_bank_of_another_shape_is_refused(built):
  _, folder = built
  with pytest.raises(UserError, match=r'\(64, 8\), but model.knowledge_num and knowledge_dim need \(81, 8\)'):
    read_bank(folder / 'bank.safetensors', (81, 8))


def test_run_with_a_bank_that_does_not_fit_is_refused_before_anything_is_written(built, tmp_path):
  config, _ = built
  config = config.with_settings({'model.knowledge_num': 81})
  with pytest.raises(UserError, match=r'holds a bank of \(64, 8\)'):
    fit(config, tmp_path / 'run')
  assert not (tmp_path / 'run').exists()


def test_text_that_is_held_out_is_the_users_and_the_other_that_of_files(built, monkeypatch):
  _, folder = built
  seen = []
  monkeypatch.setattr(bank, 'build_bank', lambda config, *_: seen.append(config.data))
  flags = ['bank', 'build', '--files', 'a.jsonl', '--out', str(folder / 'other.safetensors')]
  for more in ([], ['--config.data.valid_files=held.jsonl']):
    monkeypatch.setattr(sys, 'argv', flags + more)
    bank.main()
  assert [(data.train_files, data.valid_files) for data in seen] == [('a.jsonl', ''), ('a.jsonl', 'held.jsonl')]
  monkeypatch.setattr(sys, 'argv', [*flags, '--config.data.train_files=b.jsonl'])
  with pytest.raises(UserError, match='train_files=b.jsonl cannot be given here: the text is what --files names'):
    bank.main()


def test_unknown_encoder_and_missing_model_are_refused(built):
  config, folder = built
  with pytest.raises(UserError, match='must be lsa or'):
    bank.build_bank(config, folder / 'x.safetensors', 'bert')
  with pytest.raises(UserError, match='--encoder'):
    bank.build_bank(config, folder / 'x.safetensors', 'sentence-transformers:/nowhere')
