"""Which prepared directory it is: known by its text and settings, found again wherever these lie."""

import os
import re
import shutil
from pathlib import Path

import pytest

from mmjax import files
from mmjax.data import index
from mmjax.data.index import read_index
from mmjax.errors import UserError
from tests.preparing import documents, run, write
from tests.test_tokenizer import hugging_face


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


def test_given_validation_files_are_used_whole(tmp_path, corpus, texts):
  valid = tmp_path / 'held.txt'
  valid.write_text('Held out.\n')
  directory, _ = run(tmp_path, corpus, valid_files=str(valid))
  assert documents(directory, 'train') == texts and documents(directory, 'valid') == ['Held out.\n']
  with pytest.raises(UserError, match='is in data.train_files and in data.valid_files'):
    run(tmp_path, corpus, valid_files=str(corpus))
  with pytest.raises(UserError, match='needs data.train_files'):
    run(tmp_path, '', valid_files=str(valid))


def test_link_to_the_training_file_is_no_validation_file(tmp_path, corpus):
  (tmp_path / 'valid.jsonl').symlink_to(corpus)
  with pytest.raises(UserError, match="valid.jsonl' leads to the same file as '.*train.jsonl'"):
    run(tmp_path, corpus, valid_files=str(tmp_path / 'valid.jsonl'))


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


def test_spare_rows_and_small_vocabularies_are_allowed_and_told(tmp_path, corpus):
  path = hugging_face(tmp_path / 'small.json', vocab_size=259)
  directory, said = run(tmp_path, corpus, vocab_size=320, tokenizer=str(path))
  assert 'model.vocab_size=320: the tokenizer has 259 pieces, 61 rows are spare' in str(said)
  again, _ = run(tmp_path, corpus, vocab_size=259, tokenizer=str(path))
  assert again == directory and read_index(directory)['vocab_size'] == 259
  with pytest.raises(UserError, match='model.vocab_size=260 must be above 260 if mmjax trains the tokenizer'):
    run(tmp_path, corpus, vocab_size=260)
  with pytest.raises(UserError, match=r'least possible: (\d+)') as caught:
    run(tmp_path, corpus, vocab_size=261)
  least = int(re.search(r'least possible: (\d+)', str(caught.value))[1])
  assert read_index(run(tmp_path, corpus, vocab_size=least)[0])['vocab_size'] == least
