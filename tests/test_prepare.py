"""Preparing text: what is written, said and refused."""

import io
import json
import os
import sys

import numpy as np
import pytest

from mmjax import console
from mmjax.config import DataConfig
from mmjax.console import Progress
from mmjax.data import prepare as prepare_module
from mmjax.data.index import read_index
from mmjax.data.loader import PADDING, open_split
from mmjax.data.prepare import prepare
from mmjax.data.tokenizer import load_tokenizer
from mmjax.data.worker import is_held_out
from mmjax.errors import UserError, run_command
from mmjax.tools import prepare as prepare_command
from tests.helpers import rarely
from tests.preparing import VOCAB, documents, run, settings, small_shards, write
from tests.test_tokenizer import KINDS, MIXED, hugging_face, make_tokenizer


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


def test_prepared_text_says_that_it_was_divided_by_another_share(tmp_path, corpus):
  directory, _ = run(tmp_path, corpus)  # with 0.1
  for share, times in ((0.1, 0), (0.5, 1)):
    screen = io.StringIO()
    prepare(DataConfig(prepared_dir=str(directory), valid_fraction=share), VOCAB, Progress(screen))
    said = 'data.valid_fraction=0.5 is not used: this text was prepared with data.valid_fraction=0.1'
    assert screen.getvalue().count(said) == times and 'using prepared data' in screen.getvalue()


def test_copies_of_a_text_stay_on_one_side_of_the_split(tmp_path, texts):
  directory, _ = run(tmp_path, write(tmp_path / 'train.jsonl', texts * 2))
  train, valid = documents(directory, 'train'), documents(directory, 'valid')
  assert not set(train) & set(valid) and len(train) + len(valid) == 800


def test_tokenizer_is_not_trained_on_held_out_text(tmp_path, corpus, texts, monkeypatch):
  samples, real = [], prepare_module.train_tokenizer
  monkeypatch.setattr(prepare_module, 'train_tokenizer', lambda sample, v: samples.append(sample) or real(sample, v))
  run(tmp_path, corpus)
  assert samples == [[text for text in texts if not is_held_out(text.encode(), 0.1)]]


def test_no_validation_data_can_be_asked_for_but_does_not_just_happen(tmp_path, texts):
  few = write(tmp_path / 'few.jsonl', texts[:40])
  directory, _ = run(tmp_path, few, vocab_size=300, valid_fraction=0.0)
  assert list(read_index(directory)['splits']) == ['train']
  for copies in (1, 2):
    same = write(tmp_path / 'one.jsonl', [' '.join(texts)] * copies)
    with pytest.raises(UserError, match='one document, of which data.valid_fraction=1e-06 can hold nothing out'):
      run(tmp_path, same, vocab_size=300, valid_fraction=1e-6)


@pytest.mark.parametrize(('share', 'which'), [(1e-6, 0), (0.1, 1), (1 - 1e-9, 3)])
@pytest.mark.parametrize('given', [True, False])
def test_of_few_documents_the_one_of_that_size_is_held_out(tmp_path, texts, share, which, given):
  """Of 20, 100, 300 and 580 letters, the first one twice: 2, 10, 29 and 57 % of the text, each of a byte."""
  letters = ''.join(char for text in texts for char in text if char.isascii() and char.isalpha())
  for start in range(100):  # until the hash takes none, or all
    alone = [letters[start + a : start + b] for a, b in ((0, 20), (20, 120), (120, 420), (420, 1000))]
    if len({is_held_out(text.encode(), share) for text in alone}) == 1:
      break
  few, first = [alone[0], *alone], alone[which]
  path = write(tmp_path / 'few.jsonl', few)
  tokenizer = str(run(tmp_path, path, vocab_size=300, valid_fraction=0.0)[0] / 'tokenizer.model') if given else ''
  directory, said = run(tmp_path, path, tokenizer=tokenizer, vocab_size=300, valid_fraction=share)
  assert documents(directory, 'valid') == [text for text in few if text == first]
  assert documents(directory, 'train') == [text for text in few if text != first]
  size = len(first) * few.count(first)
  which = 'all' if share > 0.9 else 'none'
  assert f'={share:g} would hold out {which} of 4 documents; the one with {size:,} of the 1,020 bytes is' in str(said)


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


def test_tokenizer_that_loses_text_is_reported(tmp_path, corpus):
  path = hugging_face(tmp_path / 'lossy.json')
  stored = json.loads(path.read_text())
  path.write_text(json.dumps(stored | {'normalizer': {'type': 'Lowercase'}}))
  _, said = run(tmp_path, write(tmp_path / 'a.jsonl', ['low', 'High', 'low \u2581'] * 9), vocab_size=401,
    tokenizer=str(path), valid_fraction=0.0)  # fmt: skip
  assert '9 documents are not reproduced exactly' in str(said)


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
    handle.write('{"text": 3}\n' + '{"text": ""}\n\n' * 2)
  directory, said = run(tmp_path, path, on_bad_line='skip')
  [counts] = read_index(directory)['inputs']['train']
  assert counts['skipped'] == {'text is no string': 1} and counts['lines'] == len(texts) * 3 + 3
  assert 'train: skipped lines: 1 x text is no string (first: ' in str(said)
  assert 'train: empty texts left out: 2' in str(said)


def test_input_that_changes_while_it_is_read_is_refused(tmp_path, corpus):
  class Changing(Progress):
    def say(self, message):
      os.utime(corpus, (1, 1))

  with pytest.raises(UserError, match='train.jsonl. was changed while it was read'):
    prepare(settings(tmp_path, corpus), VOCAB, Changing(quiet=True))


def test_validation_text_that_is_training_text_is_counted(tmp_path, corpus, texts):
  valid = write(tmp_path / 'valid.jsonl', [*texts[:3], 'new', texts[0] + ' ', texts[7]])
  directory, _ = run(tmp_path, corpus, valid_files=str(valid))
  split = read_index(directory)['splits']['valid']
  pieces = load_tokenizer(directory / 'tokenizer.model')
  tokens = sum(len(pieces.encode(text)) + 1 for text in [*texts[:3], texts[7]])
  assert split['also_in_train'] == {'documents': 4, 'tokens': tokens} and split['documents'] == 6
  directory, _ = run(tmp_path, corpus)
  assert read_index(directory)['splits']['valid']['also_in_train'] == {'documents': 0, 'tokens': 0}


def test_prepared_dir_that_is_a_file_is_one_sentence(tmp_path, corpus):
  (tmp_path / 'out').write_text('x')
  with pytest.raises(UserError, match=r'out.* cannot be written: (Not a directory|File exists)'):
    run(tmp_path, corpus)


@pytest.mark.parametrize('terminal', [True, False])
def test_progress_is_a_bar_on_a_terminal_and_lines_elsewhere(tmp_path, corpus, monkeypatch, terminal):
  screen = io.StringIO()
  screen.isatty = lambda: terminal
  monkeypatch.setattr(console, 'LINE_SECONDS', 0)
  monkeypatch.setenv('COLUMNS', '100')
  prepare(settings(tmp_path, corpus), VOCAB, Progress(screen))
  shown = screen.getvalue()
  assert 'sampling text: ' in shown and 'tokenizing train: ' in shown and 'MB/s' in shown and 'prepared' in shown
  assert ('\x1b[' in shown) == terminal


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
    (['--valid_fraction', '2'], 'data.valid_fraction=2.0 must be at most 0.999999'),
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


def test_nothing_but_blank_text_is_refused(tmp_path):
  (tmp_path / '__init__.py').write_text('')
  (tmp_path / 'note.md').write_text('\n \n')
  with pytest.raises(UserError, match='no document is left of .*__init__.py, .*note.md: '):
    run(tmp_path, f'{tmp_path}/__init__.py,{tmp_path}/note.md', vocab_size=300)
