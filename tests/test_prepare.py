"""Preparing text: what is written, found again, resumed after a kill, and refused."""

import dataclasses
import io
import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from mmjax import files
from mmjax.config import load_config
from mmjax.data import blocks, index, progress, shards, worker
from mmjax.data import prepare as prepare_module
from mmjax.data.index import read_index, verify
from mmjax.data.loader import PADDING, open_split
from mmjax.data.prepare import prepare
from mmjax.data.progress import SilentProgress
from mmjax.data.tokenizer import load_tokenizer
from mmjax.data.worker import is_held_out
from mmjax.errors import StorageError, UserError, run_command
from mmjax.tools import prepare as prepare_command
from tests.helpers import rarely
from tests.test_tokenizer import KINDS, MIXED, hugging_face, make_tokenizer

ROOT = Path(__file__).resolve().parents[1]
WORDS = 'the memory of a model holds rows that keys select and a gate mixes 知识 由 键 选择 \u2581'.split()
VOCAB = 400
# Prepares in small blocks and shards, so that there is something to interrupt; arguments: directory, train files.
RUNNER = """
import sys
from mmjax.data import blocks, shards
from mmjax.errors import run_command
from mmjax.tools import prepare
blocks.BLOCK_BYTES, shards.SHARD_TOKENS = 4000, 3000
sys.argv = ['prepare', '--out', sys.argv[1], '--train_files', sys.argv[2], '--vocab_size', '400',
  '--valid_fraction', '0.1', '--workers', '1']
if __name__ == '__main__':
  run_command(prepare.main)
"""


class Said(SilentProgress):
  """Keeps what was said."""

  def __init__(self):
    self.lines = []

  def say(self, message):
    self.lines.append(message)

  def __str__(self):
    return '\n'.join(self.lines)


@pytest.fixture(scope='module')
def texts():
  rng = random.Random(0)
  return [f'{n} ' + ' '.join(rng.choices(WORDS, k=rng.randint(1, 120))) for n in range(400)]


@pytest.fixture
def corpus(tmp_path, texts):
  return write(tmp_path / 'train.jsonl', texts)


@pytest.fixture(scope='module')
def shared(tmp_path_factory, texts):
  """A prepared directory and its input; not to be changed."""
  folder = tmp_path_factory.mktemp('shared')
  corpus = write(folder / 'train.jsonl', texts)
  return run(folder, corpus)[0], corpus


@pytest.fixture
def prepared(shared, tmp_path):
  """A copy of it, and its input, which finds it again."""
  shutil.copytree(shared[0], tmp_path / 'out' / shared[0].name)
  return tmp_path / 'out' / shared[0].name, shared[1]


def write(path, texts):
  path.write_text(''.join(json.dumps({'text': text}, ensure_ascii=False) + '\n' for text in texts), encoding='utf-8')
  return path


def settings(tmp_path, train, **changes):
  data = load_config(str(ROOT / 'configs' / 'base.py')).data
  defaults = {'train_files': str(train), 'prepared_dir': str(tmp_path / 'out'), 'workers': 1, 'valid_fraction': 0.1}
  return dataclasses.replace(data, **defaults | changes)


def run(tmp_path, train, vocab_size=VOCAB, **changes):
  said = Said()
  return prepare(settings(tmp_path, train, **changes), vocab_size, said), said


def documents(directory, split):
  """Decodes a split independently of the loader."""
  entry = read_index(directory)
  pieces = load_tokenizer(directory / entry['tokenizer']['file'])
  found = []
  for shard in entry['splits'][split]['shards']:
    tokens = np.fromfile(directory / shard['file'], entry['dtype']).tolist()
    offsets = np.load(directory / shard['offsets_file']).tolist()
    assert offsets[0] == 0 and offsets[-1] == len(tokens) == shard['tokens']
    for start, stop in zip(offsets[:-1], offsets[1:], strict=True):
      assert tokens[stop - 1] == pieces.eos_id and pieces.eos_id not in tokens[start : stop - 1]
      found.append(pieces.decode(tokens[start : stop - 1]))
  return found


def contents(directory):
  """Returns every file's bytes, but for times and places in the index."""
  files = {path.name: path.read_bytes() for path in Path(directory).iterdir()}
  entry = json.loads(files.pop('index.json'))
  files.pop('verified.json')
  return files | {'splits': entry['splits'], 'tokenizer': entry['tokenizer']}


def small_shards(monkeypatch):
  monkeypatch.setattr(blocks, 'BLOCK_BYTES', 4000)
  monkeypatch.setattr(shards, 'SHARD_TOKENS', 3000)


def test_every_document_is_in_the_shards_once_and_in_order(tmp_path, corpus, texts, monkeypatch):
  small_shards(monkeypatch)
  directory, _ = run(tmp_path, corpus)
  held_out = [is_held_out(text.encode(), 0.1) for text in texts]
  assert documents(directory, 'train') == [text for text, held in zip(texts, held_out, strict=True) if not held]
  assert documents(directory, 'valid') == [text for text, held in zip(texts, held_out, strict=True) if held]
  entry = read_index(directory)
  assert len(entry['splits']['train']['shards']) > 3 and entry['dtype'] == 'uint16'
  assert 10 < entry['splits']['valid']['documents'] < 80 and entry['inexact_documents'] == 0
  for split in entry['splits'].values():
    assert split['tokens'] == sum(shard['tokens'] for shard in split['shards'])
  text_bytes = sum(split['text_bytes'] for split in entry['splits'].values())
  assert text_bytes == sum(len(text.encode()) for text in texts)
  assert entry['inputs']['train'][0]['lines'] == 400 and entry['settings']['text_key'] == 'text'


def test_result_does_not_depend_on_the_number_of_workers(tmp_path, corpus, monkeypatch):
  small_shards(monkeypatch)
  one, _ = run(tmp_path, corpus, prepared_dir=str(tmp_path / 'one'), workers=1)
  three, _ = run(tmp_path, corpus, prepared_dir=str(tmp_path / 'three'), workers=3)
  assert contents(one) == contents(three)


def test_prepared_data_are_found_again_until_input_or_settings_change(tmp_path, corpus, texts, monkeypatch):
  directory, said = run(tmp_path, corpus)
  assert 'prepared' in str(said)
  monkeypatch.setattr(files, 'sha256_of', None)  # nor is anything hashed again
  again, said = run(tmp_path, corpus)
  assert again == directory and 'found prepared data' in str(said)
  monkeypatch.undo()
  others = [run(tmp_path, corpus, vocab_size=410)[0], run(tmp_path, corpus, valid_fraction=0.2)[0]]
  write(corpus, texts[1:])
  others.append(run(tmp_path, corpus)[0])
  assert len({directory, *others}) == 4 and all(other.name.startswith('train-') for other in others)


def test_copies_of_a_text_stay_on_one_side_of_the_split(tmp_path, texts):
  directory, _ = run(tmp_path, write(tmp_path / 'train.jsonl', texts * 2))
  train, valid = documents(directory, 'train'), documents(directory, 'valid')
  assert not set(train) & set(valid) and len(train) + len(valid) == 800


def test_tokenizer_is_not_trained_on_held_out_text(tmp_path, corpus, texts, monkeypatch):
  samples, real = [], prepare_module.train_tokenizer
  monkeypatch.setattr(prepare_module, 'train_tokenizer', lambda sample, v: samples.append(sample) or real(sample, v))
  run(tmp_path, corpus)
  assert samples == [[text for text in texts if not is_held_out(text.encode(), 0.1)]]


def test_given_validation_files_are_used_whole(tmp_path, corpus, texts):
  valid = tmp_path / 'held.txt'
  valid.write_text('Held out.\n')
  directory, _ = run(tmp_path, corpus, valid_files=str(valid))
  assert documents(directory, 'train') == texts and documents(directory, 'valid') == ['Held out.\n']
  with pytest.raises(UserError, match='is in data.train_files and in data.valid_files'):
    run(tmp_path, corpus, valid_files=str(corpus))
  with pytest.raises(UserError, match='needs data.train_files'):
    run(tmp_path, '', valid_files=str(valid))


def test_no_validation_data_can_be_asked_for_but_does_not_just_happen(tmp_path, texts):
  few = write(tmp_path / 'few.jsonl', texts[:40])
  directory, _ = run(tmp_path, few, vocab_size=300, valid_fraction=0.0)
  assert list(read_index(directory)['splits']) == ['train']
  with pytest.raises(UserError, match='data.valid_fraction=1e-06 holds out none of the 40 documents'):
    run(tmp_path, few, vocab_size=300, valid_fraction=1e-6)
  for given in (str(directory / 'tokenizer.model'), ''):
    with pytest.raises(UserError, match='no training document is left'):
      run(tmp_path, few, tokenizer=given, vocab_size=300, valid_fraction=1 - 1e-9)
  with pytest.raises(UserError, match='nothing can be held out of a single document'):
    run(tmp_path, write(tmp_path / 'one.jsonl', [' '.join(texts)]), vocab_size=300, valid_fraction=1e-6)


def test_given_tokenizer_is_used_and_must_have_the_size_of_the_model(tmp_path, corpus, texts):
  path = hugging_face(tmp_path / 'minimind.json')
  with pytest.raises(
    UserError, match=r'model.vocab_size=400 .*which has 401 pieces; set --config.model.vocab_size=401'
  ):
    run(tmp_path, corpus, tokenizer=str(path))
  assert not (tmp_path / 'out').exists()
  directory, _ = run(tmp_path, corpus, vocab_size=401, tokenizer=str(path))
  entry = read_index(directory)
  assert entry['tokenizer'] | {'sha256': ''} == {
    'file': 'tokenizer.json', 'kind': 'huggingface', 'sha256': '', 'pad_id': 0, 'bos_id': 1, 'eos_id': 2,
  }  # fmt: skip
  assert sorted(documents(directory, 'train') + documents(directory, 'valid')) == sorted(texts)


@pytest.mark.parametrize('kind', rarely(KINDS, 'no_bytes', 'prepended', 'sentencepiece_defaults'))
def test_every_token_is_a_target_and_every_byte_of_its_text_counts_once(tmp_path, kind, monkeypatch):
  small_shards(monkeypatch)
  folder, texts = tmp_path, [*MIXED, *(f'{text} {n}' for n in range(60) for text in MIXED)]
  path = make_tokenizer(folder, kind)
  pieces = load_tokenizer(path)
  files = {'train_files': str(write(folder / 'train.jsonl', texts)), 'valid_fraction': 0.3, 'tokenizer': str(path)}
  directory, _ = run(tmp_path, files.pop('train_files'), vocab_size=pieces.vocab_size + 7, **files)
  for split in ('train', 'valid'):
    own = [text for text in texts if is_held_out(text.encode(), 0.3) == (split == 'valid')]
    for layout, isolate, length in (
      ('packed', False, 7),
      ('packed', True, 1000),
      ('padded', False, 9),
      ('padded', False, 99),
    ):
      cut = open_split(directory, split, max_seq_len=length, layout=layout, isolate_documents=isolate)
      rows = cut.rows(np.arange(cut.n_rows))
      n_tokens = [len(pieces.encode(text)) + 1 for text in own]
      assert (rows['target'] != PADDING).sum() == sum(
        n_tokens if layout == 'packed' else [min(n, length) for n in n_tokens]
      )
      n_bytes = 0
      for text in own:
        [part] = pieces.encode_slices(text)
        whole = layout == 'packed' or len(part.ids) <= length
        bytes_X = pieces.bytes_per_token()[part.ids] + part.more_bytes
        n_bytes += len(text.encode()) if whole else int(bytes_X[:length].sum())
      assert cut.scored_bytes == n_bytes


def test_data_of_an_earlier_version_are_counted_where_they_can_be(tmp_path):
  path, texts = make_tokenizer(tmp_path, 'prepended'), [f'{text} {n}' for n in range(30) for text in MIXED]
  size, corpus = load_tokenizer(path).vocab_size, write(tmp_path / 'train.jsonl', texts)
  settings = {'tokenizer': str(path), 'vocab_size': size, 'layout': 'padded'}
  directory, _ = run(tmp_path, corpus, **settings)
  before, old = read_index(directory), read_index(directory)
  for split in old['splits'].values():
    for shard in split['shards']:
      (directory / shard.pop('bytes_file')).unlink()
      del shard['bytes_sha256']
  index.write_index(directory, old)
  directory = directory.rename(directory.with_name('train-of-old'))
  rows = {'split': 'train', 'max_seq_len': 5, 'isolate_documents': False}
  assert open_split(directory, layout='packed', **rows).scored_bytes == before['splits']['train']['text_bytes']
  with pytest.raises(UserError, match='did not count the bytes of documents that are cut .* prepare it again'):
    open_split(directory, layout='padded', **rows).scored_bytes  # noqa: B018
  assert run(tmp_path, corpus, **settings | {'layout': 'packed'})[0] == directory
  again, _ = run(tmp_path, corpus, **settings)
  assert again != directory and read_index(again)['splits'] == before['splits']


def test_spare_rows_and_small_vocabularies_are_allowed_and_told(tmp_path, corpus):
  path = hugging_face(tmp_path / 'small.json', vocab_size=259)
  directory, said = run(tmp_path, corpus, vocab_size=320, tokenizer=str(path))
  assert 'model.vocab_size=320: the tokenizer has 259 pieces, 61 rows are spare' in str(said)
  again, _ = run(tmp_path, corpus, vocab_size=259, tokenizer=str(path))
  assert again == directory and read_index(directory)['vocab_size'] == 259
  with pytest.raises(UserError, match='model.vocab_size=260 must be above 260 for a tokenizer that is trained'):
    run(tmp_path, corpus, vocab_size=260)
  with pytest.raises(UserError, match=r'least possible: (\d+)') as caught:
    run(tmp_path, corpus, vocab_size=261)
  least = int(re.search(r'least possible: (\d+)', str(caught.value))[1])
  assert read_index(run(tmp_path, corpus, vocab_size=least)[0])['vocab_size'] == least


def test_tokenizer_that_loses_text_is_reported(tmp_path, corpus):
  path = hugging_face(tmp_path / 'lossy.json')
  stored = json.loads(path.read_text())
  path.write_text(json.dumps(stored | {'normalizer': {'type': 'Lowercase'}}))
  _, said = run(tmp_path, write(tmp_path / 'a.jsonl', ['low', 'High', 'low \u2581'] * 9), vocab_size=401,
    tokenizer=str(path), valid_fraction=0.0)  # fmt: skip
  assert '9 documents are not reproduced exactly' in str(said)


def test_large_vocabulary_is_stored_in_four_bytes():
  assert worker.token_dtype(2**16) == np.uint16 and worker.token_dtype(2**16 + 1) == np.uint32


def test_bad_line_leaves_nothing_behind(tmp_path, corpus, shared):
  model = shared[0] / 'tokenizer.model'
  with corpus.open('a') as handle:
    handle.write('{"text": 3}\n')
  for given in ('', str(model)):
    out = tmp_path / 'other'
    with pytest.raises(UserError, match="train.jsonl:401: the value of 'text' must be a string, not a number"):
      run(tmp_path, corpus, tokenizer=given, prepared_dir=str(out))
    assert list(out.iterdir()) == []


def test_skipped_lines_are_counted_in_the_index(tmp_path, texts):
  path = write(tmp_path / 'train.jsonl', texts * 3)
  with path.open('a') as handle:
    handle.write('{"text": 3}\n')
  directory, said = run(tmp_path, path, on_bad_line='skip')
  assert read_index(directory)['inputs']['train'][0]['skipped'] == {'text is no string': 1}
  assert 'train: skipped lines: 1 x text is no string (first: ' in str(said)


def test_input_that_changes_while_it_is_read_is_refused(tmp_path, corpus):
  class Changing(SilentProgress):
    def say(self, message):
      os.utime(corpus, (1, 1))

  with pytest.raises(UserError, match='train.jsonl. was changed while it was read'):
    prepare(settings(tmp_path, corpus), VOCAB, Changing())


def damage(path, how):
  data = bytearray(path.read_bytes())
  if how == 'flipped':
    data[len(data) // 2] ^= 1
  path.write_bytes(data[:-3] if how == 'cut' else data)
  if how == 'deleted':
    path.unlink()


@pytest.mark.parametrize('how', ['flipped', 'cut', 'deleted'])
@pytest.mark.parametrize('name', ['tokenizer.model', 'train-00000.bin', 'valid-00000.offsets.npy'])
def test_damaged_file_is_named(tmp_path, prepared, name, how):
  directory, corpus = prepared
  verify(directory)
  damage(directory / name, how)
  what = 'is missing' if how == 'deleted' else 'is not what index.json describes'
  with pytest.raises(UserError, match=f'{name}. {what}'):
    verify(directory)
  with pytest.raises(UserError, match=name):
    run(tmp_path, corpus)


def test_swapped_shards_and_damaged_index_are_noticed(tmp_path, corpus, monkeypatch):
  small_shards(monkeypatch)
  directory, _ = run(tmp_path, corpus)
  first, second = directory / 'train-00000.bin', directory / 'train-00001.bin'
  first.rename(directory / 'x')
  second.rename(first)
  (directory / 'x').rename(second)
  with pytest.raises(UserError, match='train-00000.bin. is not what'):
    verify(directory)
  path = directory / 'index.json'
  whole = path.read_text()
  for text in (whole.replace('"tokens": ', '"tokens": 1', 1), whole[:-20], '', '[]', '[' * 10**5, '{}', '\xff'):
    path.write_text(text, encoding='latin-1')
    with pytest.raises(UserError, match='index.json. (is damaged|was changed)'):
      verify(directory)
  path.unlink()
  with pytest.raises(UserError, match='is not a finished prepared directory'):
    verify(directory)


def test_index_that_names_files_elsewhere_is_refused(prepared):
  directory, _ = prepared
  described = read_index(directory)
  (directory.parent / 'tokenizer.model').write_bytes((directory / 'tokenizer.model').read_bytes())
  described['tokenizer']['file'] = '../tokenizer.model'
  index.write_index(directory, described)
  with pytest.raises(UserError, match=r'index.json. names files outside'):
    verify(directory)


def test_nothing_is_written_through_a_link_that_was_laid(tmp_path, corpus):
  directory, _ = run(tmp_path, corpus)
  victim = tmp_path / 'victim'
  victim.write_text('precious')
  for path in list(directory.iterdir()):
    path.unlink()
    path.symlink_to(victim)
    path.with_name(f'{path.name}.{os.getpid()}.tmp').symlink_to(victim)
  (directory / 'index.json').unlink()
  (directory / 'tokenizer.model').unlink()
  assert run(tmp_path, corpus)[0] == directory and verify(directory)
  assert victim.read_text() == 'precious'


def test_verified_files_are_hashed_again_only_when_they_change(prepared, monkeypatch):
  directory, _ = prepared
  verify(directory)
  hashed, real = [], files.sha256_of
  monkeypatch.setattr(files, 'sha256_of', lambda path: hashed.append(path.name) or real(path))
  verify(directory)
  assert hashed == []
  os.utime(directory / 'train-00000.bin')
  verify(directory)
  verify(directory)
  assert hashed == ['train-00000.bin']
  (directory / 'verified.json').write_text('[' * 10**5)
  verify(directory)
  assert len(hashed) == 8


def lay_as_a_cache_does(folder, path):
  """Lays a file as the Hugging Face cache, DVC or git-annex do: a name that leads, by two links, to a hash."""
  blob, name = folder / 'blobs' / '5fab01', folder / 'hub' / 'snap' / path.name
  for made in (blob, folder / 'objects' / 'x', name):
    made.parent.mkdir(parents=True)
  blob.write_bytes(path.read_bytes())
  (folder / 'objects' / 'x').symlink_to('../blobs/5fab01')
  name.symlink_to('../../objects/x')
  return name


@pytest.mark.parametrize('pattern', ['hub/snap/train.jsonl', 'hub/*/*.jsonl', 'link/*.jsonl', 'hub/**/*.jsonl'])
def test_links_name_the_same_text_as_the_file_itself(tmp_path, shared, pattern):
  directory, corpus = shared
  name = lay_as_a_cache_does(tmp_path, corpus)
  (tmp_path / 'link').symlink_to(name.parent)
  found, said = run(tmp_path, f'{tmp_path}/{pattern}', prepared_dir=str(directory.parent))
  assert found == directory and 'found prepared data' in str(said)  # by its bytes, wherever they lie
  with name.open('a') as handle:
    handle.write('{"text": 3}\n')
  with pytest.raises(UserError, match=r'(snap|link)/train.jsonl:401: '):  # and messages show the name that was given
    run(tmp_path, f'{tmp_path}/{pattern}')


def test_link_that_leads_to_other_bytes_of_the_same_size_and_time_is_other_text(tmp_path, texts):
  folder = tmp_path / 'store'
  folder.mkdir()
  for name, first in (('a', 'x'), ('b', 'y')):
    os.utime(write(folder / name, [first, *texts[:200]]), (1, 1))  # as a Nix store has them
  link = tmp_path / 'train.jsonl'
  found = []
  for name in ('a', 'b'):
    link.unlink(missing_ok=True)
    link.symlink_to(folder / name)
    found.append(run(tmp_path, link, valid_fraction=0.0)[0])
  assert [documents(directory, 'train')[0] for directory in found] == ['x', 'y']


def test_same_bytes_under_another_kind_of_name_are_other_text(tmp_path, texts):
  lines = write(tmp_path / 'a.jsonl', texts)
  (tmp_path / 'a.txt').write_bytes(lines.read_bytes())
  found = [run(tmp_path, tmp_path / name, valid_fraction=0.0)[0] for name in ('a.jsonl', 'a.txt')]
  assert [read_index(directory)['splits']['train']['documents'] > 100 for directory in found] == [True, False]


def test_moved_touched_and_relative_text_is_found_again(tmp_path, corpus, monkeypatch):
  directory, _ = run(tmp_path, corpus)
  os.utime(corpus)
  (tmp_path / 'new').mkdir()
  corpus.rename(tmp_path / 'new' / 'other.jsonl')
  monkeypatch.chdir(tmp_path / 'new')
  for train in ('other.jsonl', '../new/other.jsonl', f'{tmp_path}/new/*.jsonl'):
    found, said = run(tmp_path, train)
    assert found == directory and 'found prepared data' in str(said)


def test_given_tokenizer_that_was_trained_on_the_text_is_no_other(tmp_path, prepared):
  directory, corpus = prepared
  own = shutil.copy(directory / 'tokenizer.model', tmp_path / 'own.model')
  assert run(tmp_path, corpus, tokenizer=str(own))[0] == directory


def test_directory_of_an_earlier_version_is_found_again(tmp_path, prepared):
  directory, corpus = prepared
  described = read_index(directory)
  for file in described['inputs']['train']:
    del file['sha256']
    del described['splits']['valid']['also_in_train']
    file['path'] = str(Path(file['path']).resolve())
  index.write_index(directory, described)
  directory = directory.rename(directory.with_name('train-0123456789ab'))
  assert run(tmp_path, corpus)[0] == directory
  corpus = Path(shutil.copy(corpus, tmp_path / 'elsewhere.jsonl'))  # its bytes were not hashed then
  assert run(tmp_path, corpus)[0] != directory


def test_directory_that_read_a_link_as_what_it_leads_to_is_not_found_again(tmp_path, prepared):
  directory, corpus = prepared
  described = read_index(directory)
  name = lay_as_a_cache_does(tmp_path / 'cache', corpus)
  for file in described['inputs']['train']:
    del file['sha256']
    file |= {'path': str(name.resolve()), 'mtime_ns': name.stat().st_mtime_ns}
  index.write_index(directory, described)
  directory = directory.rename(directory.with_name('train-0123456789ab'))
  assert run(tmp_path, name)[0] != directory


def test_name_of_the_greatest_length_is_used(tmp_path, texts):
  name = '知' * 82 + '.jsonl'
  assert len(name.encode()) == 252
  directory, _ = run(tmp_path, write(tmp_path / name, texts))
  assert directory.name.startswith('知' * 20) and documents(directory, 'valid')
  files.write_file(tmp_path / ('字' * 85), b'x')
  assert (tmp_path / ('字' * 85)).read_bytes() == b'x'


def test_validation_text_that_is_training_text_is_counted(tmp_path, corpus, texts):
  valid = write(tmp_path / 'valid.jsonl', [*texts[:3], 'new', texts[0] + ' ', texts[7]])
  directory, _ = run(tmp_path, corpus, valid_files=str(valid))
  split = read_index(directory)['splits']['valid']
  pieces = load_tokenizer(directory / 'tokenizer.model')
  tokens = sum(len(pieces.encode(text)) + 1 for text in [*texts[:3], texts[7]])
  assert split['also_in_train'] == {'documents': 4, 'tokens': tokens} and split['documents'] == 6
  directory, _ = run(tmp_path, corpus)
  assert read_index(directory)['splits']['valid']['also_in_train'] == {'documents': 0, 'tokens': 0}


def test_link_to_the_training_file_is_no_validation_file(tmp_path, corpus):
  (tmp_path / 'valid.jsonl').symlink_to(corpus)
  with pytest.raises(UserError, match="valid.jsonl' leads to the same file as '.*train.jsonl'"):
    run(tmp_path, corpus, valid_files=str(tmp_path / 'valid.jsonl'))


def start(out, train, **options):
  environment = os.environ | {'PYTHONPATH': str(ROOT)}
  command = [sys.executable, '-c', RUNNER, str(out), str(train)]
  return subprocess.Popen(
    command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options
  )


def finish(process):
  out, err = process.communicate(timeout=60)
  return process.returncode, out.strip(), err


@pytest.mark.thorough
def test_killed_at_any_time_it_goes_on_and_ends_with_the_same_files(tmp_path, corpus):
  code, undisturbed, _ = finish(start(tmp_path / 'calm', corpus))
  assert code == 0
  out, resumed = tmp_path / 'killed', 0
  for name in ('tokenizer.model', 'train-00001.bin', 'progress.json', 'train-00003.bin', 'train-00005.bin'):
    process = start(out, corpus)
    while process.poll() is None and not list(out.glob(f'*/{name}')):
      time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    resumed += 'going on after the last whole shard' in finish(process)[2]
  code, directory, err = finish(start(out, corpus))
  assert code == 0 and resumed + ('going on' in err) >= 2, err
  assert contents(directory) == contents(undisturbed)


def test_interrupted_shards_that_were_damaged_are_made_again(tmp_path, corpus, monkeypatch):
  small_shards(monkeypatch)
  whole, _ = run(tmp_path, corpus, prepared_dir=str(tmp_path / 'whole'))
  monkeypatch.setattr(shards.ShardBuilder, '_finish_shards', stop_after(3))
  with pytest.raises(KeyboardInterrupt):
    run(tmp_path, corpus)
  damage(next((tmp_path / 'out').glob('*/train-00001.bin')), 'flipped')
  monkeypatch.undo()
  small_shards(monkeypatch)
  directory, said = run(tmp_path, corpus)
  assert 'going on' not in str(said) and contents(directory) == contents(whole)


def stop_after(rounds):
  real, done = shards.ShardBuilder._finish_shards, []

  def finish_shards(self, position):
    if len(done) == rounds:
      raise KeyboardInterrupt
    done.append(1)
    real(self, position)

  return finish_shards


def test_write_that_fails_ends_with_exit_code_4_and_can_go_on(tmp_path, corpus):

  def limit():
    resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, 30_000))  # stands in for a full disk

  command = [sys.executable, '-m', 'mmjax.tools.prepare', '--out', str(tmp_path / 'out'), '--train_files', str(corpus),
    '--vocab_size', '400', '--valid_fraction', '0.1']  # fmt: skip
  done = subprocess.run(command, cwd=ROOT, preexec_fn=limit, capture_output=True, text=True, check=False)
  assert done.returncode == 4, done.stderr
  assert "train-00000.bin' cannot be written: File too large (" in done.stderr and 'Traceback' not in done.stderr
  done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
  assert done.returncode == 0 and verify(done.stdout.strip())


def test_too_little_room_is_noticed_before_anything_is_written(tmp_path, corpus, monkeypatch):
  monkeypatch.setattr('mmjax.files.free_bytes', lambda path: 1000)
  with pytest.raises(StorageError, match=r'needs about \d+ MB, 0 MB are free'):
    run(tmp_path, corpus)
  assert not list((tmp_path / 'out').glob('*/*'))


def test_prepared_dir_that_is_a_file_is_one_sentence(tmp_path, corpus):
  (tmp_path / 'out').write_text('x')
  with pytest.raises(UserError, match=r'out.* cannot be written: (Not a directory|File exists)'):
    run(tmp_path, corpus)


def test_two_at_once_make_it_once(tmp_path, corpus):
  first, second = start(tmp_path / 'out', corpus), start(tmp_path / 'out', corpus)
  (code, directory, err), other = finish(first), finish(second)
  assert (code, other[0]) == (0, 0) and directory == other[1]
  assert sorted(('found prepared data' in err, 'found prepared data' in other[2])) == [False, True]


def test_dead_worker_is_one_sentence_and_no_process_is_left(tmp_path, corpus, monkeypatch):
  started, real = [], subprocess.Popen
  monkeypatch.setattr(subprocess, 'Popen', lambda *args, **more: started.append(real(*args, **more)) or started[-1])
  prepare(settings(tmp_path, corpus, workers=2), VOCAB, Said())
  assert len(started) == 2 and all(process.returncode is not None for process in started)

  def ask(self, *_):
    self.process.kill()
    return real_ask(self, *_)

  real_ask = worker._Worker.ask
  monkeypatch.setattr(worker._Worker, 'ask', ask)
  with pytest.raises(UserError, match='a tokenizer process ended with code -9 in .*train.jsonl, line 1'):
    run(tmp_path, corpus, valid_fraction=0.2)
  assert len(started) == 3 and started[-1].returncode == -signal.SIGKILL


@pytest.mark.parametrize('terminal', [True, False])
def test_progress_is_a_bar_on_a_terminal_and_lines_elsewhere(tmp_path, corpus, monkeypatch, terminal):
  screen = io.StringIO()
  monkeypatch.setattr(progress, 'LINE_SECONDS', 0)
  monkeypatch.setattr(progress, 'Console', lambda **_: Console(file=screen, force_terminal=terminal, width=100))
  prepare(settings(tmp_path, corpus), VOCAB)
  shown = screen.getvalue()
  assert 'sampling text' in shown and 'tokenizing train' in shown and 'MB/s' in shown and 'prepared' in shown
  assert ('\x1b[' in shown) == terminal


def test_worker_imports_no_jax():
  code = 'import sys, mmjax.data.worker, mmjax.tools.prepare; print("jax" in sys.modules)'
  done = subprocess.run([sys.executable, '-c', code], cwd=ROOT, capture_output=True, text=True, check=True)
  assert done.stdout == 'False\n'


@pytest.mark.parametrize(
  ('flags', 'what'),
  [
    (['--train_files', 'none.jsonl'], "no file 'none.jsonl'"),
    (
      ['--train_files', 'x', '--on_bad_line', 'skp'],
      "data.on_bad_line='skp' must be one of fail, skip; did you mean 'skip'",
    ),
    (['--tokenizer', 'none.model'], "no tokenizer file 'none.model'"),
    (['--vocab_size', '100'], 'model.vocab_size=100 must be'),
    (['--valid_fraction', '2'], 'data.valid_fraction=2.0 must be at least 0 and below 1'),
    (['--wrokers', '2'], "argument '--wrokers' is not understood"),
  ],
)
def test_command_refuses_bad_flags_in_one_sentence(flags, what, tmp_path, monkeypatch, capsys):
  monkeypatch.setattr(sys, 'argv', ['prepare', '--out', str(tmp_path / 'out'), *flags])
  with pytest.raises(SystemExit) as stopped:
    run_command(prepare_command.main)
  err = capsys.readouterr().err
  assert stopped.value.code == 2 and what in err and err.count('\n') == 1
  assert not (tmp_path / 'out').exists()
