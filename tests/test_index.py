"""The index of a prepared directory: damage is named, and what was checked is not hashed again."""

import os

import pytest

from mmjax import files
from mmjax.data import index
from mmjax.data.index import read_index, verify
from mmjax.data.loader import open_split
from mmjax.data.tokenizer import load_tokenizer
from mmjax.errors import UserError
from tests.preparing import damage, run, small_shards, write
from tests.test_tokenizer import MIXED, make_tokenizer


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
    with pytest.raises(UserError, match=r'index\.json (is not JSON|must be|was changed).*; delete .* to prepare again'):
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
  with pytest.raises(UserError, match='did not count the bytes of cut documents .* prepare it again'):
    open_split(directory, layout='padded', **rows).scored_bytes  # noqa: B018
  assert run(tmp_path, corpus, **settings | {'layout': 'packed'})[0] == directory
  again, _ = run(tmp_path, corpus, **settings)
  assert again != directory and read_index(again)['splits'] == before['splits']


@pytest.mark.thorough
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
