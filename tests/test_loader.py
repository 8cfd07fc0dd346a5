"""Rows and batches: no token lost, none invented, and the same batch for the same (seed, step)."""

import itertools
import threading
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmjax.data.index import write_index
from mmjax.data.loader import PADDING, cut_remark, eval_batches, open_split, steps_of_epochs, train_batches
from mmjax.errors import UserError
from mmjax.files import sha256_of

PAD, BOS, EOS, VOCAB = 0, 1, 2, 50


def write_split(directory, documents, shard_documents=3, split='train', tokenizer=b'x'):
  """Writes a prepared directory by hand; documents are lists of ids without EOS."""
  entry = {'tokens': 0, 'documents': 0, 'text_bytes': 0, 'shards': []}
  for number, start in enumerate(range(0, len(documents), shard_documents)):
    part = [[*document, EOS] for document in documents[start : start + shard_documents]]
    files = {'file': f'{split}-{number}.bin', 'offsets_file': f'{split}-{number}.offsets.npy'}
    tokens = np.array([token for document in part for token in document], '<u2')
    tokens.tofile(directory / files['file'])
    np.save(directory / files['offsets_file'], np.cumsum([0, *map(len, part)]))
    shard = {'tokens': len(tokens), 'documents': len(part), 'text_bytes': 0}
    for key in shard:
      entry[key] += shard[key]
    entry['shards'].append(shard | files | {'sha256': sha(directory, files['file']),
                                            'offsets_sha256': sha(directory, files['offsets_file'])})  # fmt: skip
  (directory / 'tokenizer.model').write_bytes(tokenizer)
  write_index(directory, {
    'format': 1, 'vocab_size': VOCAB, 'dtype': 'uint16', 'splits': {split: entry}, 'inexact_documents': 0,
    'tokenizer': {'file': 'tokenizer.model', 'sha256': sha(directory, 'tokenizer.model'),
                  'pad_id': PAD, 'bos_id': BOS, 'eos_id': EOS},
  })  # fmt: skip
  return directory


def sha(directory, name):
  return sha256_of(directory / name)


def open_rows(directory, length, layout='packed', isolate=False):
  return open_split(directory, 'train', max_seq_len=length, layout=layout, isolate_documents=isolate)


def all_rows(split, rows=3):
  batches = list(eval_batches(split, rows))
  return {key: np.concatenate([batch[key] for batch in batches]) for key in batches[0]}


DOCUMENTS = st.lists(st.lists(st.integers(EOS + 1, VOCAB - 1), max_size=12), min_size=1, max_size=12)


@settings(max_examples=60, deadline=None)
@given(DOCUMENTS, st.integers(2, 9), st.integers(1, 4))
def test_packed_rows_hold_every_token_once_as_target(tmp_path_factory, documents, length, shard_documents):
  directory = write_split(tmp_path_factory.mktemp('split'), documents, shard_documents)
  rows = all_rows(open_rows(directory, length))
  stream = [token for document in documents for token in [*document, EOS]]
  targets = rows['target'].ravel()
  assert targets[: len(stream)].tolist() == stream
  assert (targets[len(stream) :] == PADDING).all()  # only after the end
  inputs = rows['input'].ravel()
  assert inputs[: len(stream)].tolist() == [EOS, *stream[:-1]]
  assert set(inputs[len(stream) + 1 :]) <= {PAD}
  assert not rows['segment'].any()


@settings(max_examples=60, deadline=None)
@given(DOCUMENTS, st.integers(2, 9), st.integers(1, 4))
def test_padded_rows_hold_the_start_of_each_document(tmp_path_factory, documents, length, shard_documents):
  directory = write_split(tmp_path_factory.mktemp('split'), documents, shard_documents)
  split = open_rows(directory, length, 'padded', isolate=True)
  rows = all_rows(split)
  assert split.n_rows == len(documents)
  for number, document in enumerate(documents):
    target = [*document, EOS][:length]
    rest = length - len(target)
    assert rows['target'][number].tolist() == target + [PADDING] * rest
    assert rows['input'][number].tolist() == ([BOS, *target] + [PAD] * rest)[:length]
  assert not rows['segment'].any()


@settings(max_examples=60, deadline=None)
@given(DOCUMENTS, st.integers(2, 9))
def test_segments_part_the_documents_of_a_row(tmp_path_factory, documents, length):
  rows = all_rows(open_rows(write_split(tmp_path_factory.mktemp('split'), documents), length, isolate=True))
  owner = [number for number, document in enumerate(documents) for _ in range(len(document) + 1)]
  segment, target = rows['segment'], rows['target']
  for row in range(len(target)):
    own = owner[row * length : (row + 1) * length]
    same_segment = segment[row][: len(own), None] == segment[row][None, : len(own)]
    assert (same_segment == (np.array(own)[:, None] == np.array(own)[None])).all()


@pytest.fixture(scope='module')
def directory(tmp_path_factory):
  rng = np.random.default_rng(0)
  documents = [rng.integers(3, VOCAB, rng.integers(1, 60)).tolist() for _ in range(100)]
  return write_split(tmp_path_factory.mktemp('split'), documents, 30)


def take(batches, count):
  found = list(itertools.islice(batches, count))
  batches.close()
  return found


@pytest.mark.parametrize('layout', ['packed', 'padded'])
def test_batch_depends_on_seed_and_step_only(directory, layout):
  split = open_rows(directory, 16, layout, isolate=True)
  whole = take(train_batches(split, global_batch_rows=8, seed=7), 60)
  for step in (0, 1, 31, 59):
    again = take(train_batches(split, global_batch_rows=8, seed=7, start_step=step), 1)[0]
    assert {key: value.tolist() for key, value in again.items()} == {
      key: value.tolist() for key, value in whole[step].items()
    }
  other = take(train_batches(split, global_batch_rows=8, seed=8), 1)[0]
  assert other['row_id'].tolist() != whole[0]['row_id'].tolist()
  expected = split.rows(whole[5]['row_id'])
  assert all((expected[key] == whole[5][key]).all() for key in expected)


@settings(max_examples=10, deadline=None)
@given(st.data(), st.sampled_from(['packed', 'padded']), st.integers(1, 12), st.integers(0, 2**31 - 1))
def test_batches_from_any_step_are_the_tail_of_all(directory, data, layout, rows, seed):
  split = open_rows(directory, 16, layout, isolate=True)
  count = data.draw(st.integers(1, 3 * split.n_rows // max(rows, 6)))  # up to three epochs, wherever a batch ends
  step = data.draw(st.integers(0, count - 1))
  whole = take(train_batches(split, global_batch_rows=rows, seed=seed), count)
  tail = take(train_batches(split, global_batch_rows=rows, seed=seed, start_step=step), count - step)
  assert len(tail) == count - step
  for a, b in zip(whole[step:], tail, strict=True):
    assert a.keys() == b.keys() and all(np.array_equal(a[key], b[key]) for key in a)


def test_batches_have_the_types_and_shapes_promised(directory):
  batch = take(train_batches(open_rows(directory, 16), global_batch_rows=8, seed=0), 1)[0]
  assert {key: (value.dtype.name, value.shape) for key, value in batch.items()} == {
    'input': ('int32', (8, 16)), 'target': ('int32', (8, 16)), 'segment': ('int32', (8, 16)), 'row_id': ('int64', (8,)),
  }  # fmt: skip


def test_each_epoch_has_every_row_once_in_another_order(directory):
  split = open_rows(directory, 16)
  rows, epochs = split.n_rows, 3
  batches = take(train_batches(split, global_batch_rows=7, seed=1), -(-epochs * rows // 7))
  row_ids = np.concatenate([batch['row_id'] for batch in batches])[: epochs * rows].reshape(epochs, rows)
  assert (np.sort(row_ids) == np.arange(rows)).all()
  assert len({tuple(order) for order in row_ids.tolist()}) == epochs
  for order in row_ids:  # a global shuffle: neighbours are far apart
    assert np.abs(np.diff(order)).mean() > rows / 5


def test_evaluation_goes_through_all_rows_in_order_and_fills_up_with_padding(directory):
  split = open_rows(directory, 16, isolate=True)
  shown = []
  batches = list(eval_batches(split, 9, shown.append))
  assert len(batches) > 2 and shown == [n / len(batches) for n in range(1, len(batches) + 1)]
  assert len(list(eval_batches(split, 9, most=2))) == 2
  row_ids = np.concatenate([batch['row_id'] for batch in batches])
  assert all(len(batch['row_id']) == 9 for batch in batches)
  assert row_ids[: split.n_rows].tolist() == list(range(split.n_rows)) and (row_ids[split.n_rows :] == -1).all()
  assert (np.concatenate([batch['target'] for batch in batches])[split.n_rows :] == PADDING).all()


def test_fewer_rows_than_a_batch_is_refused_with_both_numbers(directory):
  split = open_rows(directory, 16)
  with pytest.raises(
    UserError, match=f'have {split.n_rows} rows of 16 tokens, fewer than one batch of 1000 .*batch_size=8 '
  ):
    train_batches(split, global_batch_rows=1000, seed=0)
  few = open_rows(directory, 1 << 20)
  with pytest.raises(
    UserError, match=r'fewer than one batch of 8 .*accumulation_steps=1$'
  ):  # no larger config is meant
    train_batches(few, global_batch_rows=8, seed=0)
  take(train_batches(split, global_batch_rows=split.n_rows, seed=0), 2)


def test_missing_split_is_refused(directory):
  with pytest.raises(UserError, match="has no 'valid' documents"):
    open_split(directory, 'valid', max_seq_len=8, layout='packed', isolate_documents=False)


def test_changed_shard_is_refused_when_opened(tmp_path):
  directory = write_split(tmp_path, [[5, 6, 7]] * 9)
  path = directory / 'train-1.bin'
  path.write_bytes(path.read_bytes()[:-2] + b'\1\0')
  with pytest.raises(UserError, match='train-1.bin'):
    open_rows(directory, 8)


def test_text_that_is_cut_off_is_counted(tmp_path):
  directory = write_split(tmp_path, [[5] * length for length in (1, 6, 7, 8, 20)])  # and an EOS each
  assert open_rows(directory, 8, 'padded').cut_off() == (2, 1 + 13)
  assert open_rows(directory, 8).cut_off() == (0, 0)
  said = cut_remark({'training': open_rows(directory, 8, 'padded')})
  assert (
    'model.max_seq_len=8 tokens of each document: 2 of 5 training documents are cut, 14 of 47 tokens (29.8%)' in said
  )
  assert cut_remark({'x': open_rows(directory, 8)}) == cut_remark({'x': open_rows(directory, 21, 'padded')}) == ''


def test_steps_of_epochs_counts_whole_batches_over_all_epochs(directory):
  split = open_rows(directory, 16, 'padded')  # 100 rows
  assert [steps_of_epochs(split.n_rows, 32, epochs) for epochs in (1, 3, 0.5, 0.01)] == [3, 9, 1, 1]
  assert steps_of_epochs(150, 1, 1.14) == 171  # a little less in floats


def test_closed_batches_leave_no_thread(directory):
  before = set(threading.enumerate())
  for _ in range(5):
    take(train_batches(open_rows(directory, 16), global_batch_rows=8, seed=0), 3)
    next(eval_batches(open_rows(directory, 16), 8))  # dropped half-way
  deadline = time.monotonic() + 5
  while set(threading.enumerate()) - before and time.monotonic() < deadline:
    time.sleep(0.01)
  assert not set(threading.enumerate()) - before  # which, not how many: a thread of an earlier test may end meanwhile
