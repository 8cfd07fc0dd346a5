"""Reading .parquet: the rows that pyarrow wrote, refused as lines are, in bounded memory, from any place on."""

import json
import os
import sys
import tracemalloc

import pyarrow
import pytest
from pyarrow import parquet

from mmjax.data import unpack
from mmjax.data.reader import Place, Tally, find_files, read_documents, read_files
from mmjax.errors import UserError

TEXTS = ['one', 'zwei\nLinien', '三\u2028\x0b', 'NUL \0 inside', '\U0001f600', ' ', '"quoted" \\ text', '\r\n']


def write(tmp_path, columns, name='a.parquet', **settings):
  table = pyarrow.table(columns)
  parquet.write_table(table, tmp_path / name, **settings)
  return tmp_path / name


def read(path, text_key='text', tally=None):
  return list(read_documents(find_files(str(path)), text_key, tally or Tally('fail')))


@pytest.mark.parametrize('compression', ['snappy', 'zstd', 'gzip', 'none'])
@pytest.mark.parametrize(
  'kind', [pyarrow.string(), pyarrow.large_string(), pyarrow.dictionary(pyarrow.int32(), pyarrow.string())]
)
def test_rows_are_read_in_order_whatever_lies_beside_them(tmp_path, compression, kind):
  texts = TEXTS * 30
  columns = {
    'id': range(len(texts)),
    'text': pyarrow.array(texts, pyarrow.string()).cast(kind),
    'url': ['x'] * len(texts),
    'scores': [[0.5, 1.0]] * len(texts),
    'raw': [b'\xff'] * len(texts),
  }
  assert read(write(tmp_path, columns, 'A.Parquet', compression=compression, row_group_size=50)) == texts


def test_a_parquet_file_is_what_its_rows_are_as_jsonl(tmp_path):
  texts = [*TEXTS, '', '']
  lines = tmp_path / 'a.jsonl'
  lines.write_text('\n'.join(json.dumps({'body': text}) for text in texts))
  counts = []
  for path in (lines, write(tmp_path, {'body': texts})):
    tally = Tally('fail')
    assert read(path, 'body', tally) == TEXTS
    counts += tally.files.values()
  assert counts[0] == counts[1] == {'lines': 10, 'empty': 2, 'skipped': {}}


@pytest.mark.parametrize(
  ('key', 'what'),
  [
    (
      'content',
      "1: no key 'content'; keys present: 'text', 'n', 'tags', 'seen', 'day', 'raw', 'none'; another may hold",
    ),
    ('n', "1: the value of 'n' must be a string, not a number"),
    ('tags', "1: the value of 'tags' must be a string, not a list"),
    ('seen', "1: the value of 'seen' must be a string, not a boolean"),
    ('day', "1: the value of 'day' must be a string, not an object"),
    ('raw', "1: the value of 'raw' must be a string, not an object"),
    ('none', "1: the value of 'none' must be a string, not null"),
    ('text', "3: the value of 'text' must be a string, not null"),
  ],
)
def test_row_without_a_text_is_named(tmp_path, key, what):
  columns = {
    'text': ['a', 'b', None],
    'n': [1, 2, 3],
    'tags': [['x'], [], None],
    'seen': [True, False, None],
    'day': pyarrow.array([0, 1, 2], pyarrow.date32()),
    'raw': [b'a', b'b', b'c'],
    'none': [None] * 3,
  }
  path = write(tmp_path, columns)
  with pytest.raises(UserError) as caught:
    read(path, key)
  assert str(caught.value).startswith(f'{path}:{what}')


def test_file_without_any_text_names_its_columns(tmp_path):
  with pytest.raises(UserError, match="a.parquet:1: no key 'text'; keys present: 'n'"):
    read(write(tmp_path, {'n': [1, 2]}))


def test_bytes_that_are_no_text_are_refused_by_row_or_left_out(tmp_path):
  raw = pyarrow.array([b'good', b'bad \xff', b'good'] + [b'good'] * 2000)
  column = pyarrow.StringArray.from_buffers(len(raw), raw.buffers()[1], raw.buffers()[2])  # not checked
  path = write(tmp_path, {'text': column})
  with pytest.raises(UserError, match='a.parquet:2: not UTF-8: invalid start byte 0xff'):
    read(path)
  tally = Tally('skip')
  assert read(path, tally=tally) == ['good'] * 2002
  assert tally.skipped() == {'not UTF-8': 1}


def test_damaged_file_is_refused_in_one_sentence(tmp_path):
  path = write(
    tmp_path, {'text': [f'row {n} of many' for n in range(500)]}, compression='none', write_page_checksum=False
  )
  whole = path.read_bytes()
  for data in (b'', b'PAR1', whole[:-9], whole[: len(whole) // 2], b'{"text": "a"}\n' * 9, whole[:-30] + bytes(30)):
    path.write_bytes(data)
    with pytest.raises(UserError) as caught:
      read(path)
    assert f"'{path}' cannot be unpacked: " in str(caught.value) and '\n' not in str(caught.value)


def test_two_columns_of_one_name_are_refused(tmp_path):
  table = pyarrow.Table.from_arrays([pyarrow.array(['a']), pyarrow.array(['b'])], ['text', 'text'])
  parquet.write_table(table, tmp_path / 'a.parquet')
  with pytest.raises(UserError, match='a.parquet. cannot be unpacked: .*text'):
    read(tmp_path / 'a.parquet')


def test_reading_can_go_on_where_any_block_ended(tmp_path, monkeypatch):
  monkeypatch.setattr('mmjax.data.blocks.BLOCK_BYTES', 64)
  path = write(tmp_path, {'n': range(99), 'text': [f'row {n}' for n in range(99)]})
  whole = list(read_files([path]))
  assert len(whole) > 20
  for number, block in enumerate(whole):
    assert list(read_files([path], Place(0, *block.end))) == whole[number + 1 :]


def test_large_file_is_read_in_bounded_memory(tmp_path):
  texts = [os.urandom(2**16).hex() for _ in range(256)]  # 34 MB that do not pack, in 8 groups
  path = write(tmp_path, {'text': texts}, compression='none', row_group_size=32, write_batch_size=8)
  assert path.stat().st_size > 2**25
  before = pyarrow.total_allocated_bytes()
  tracemalloc.start()
  most = max(pyarrow.total_allocated_bytes() - before for _ in read_files([path]))
  traced = tracemalloc.get_traced_memory()[1]
  tracemalloc.stop()
  assert most + traced < 1.5e7


@pytest.mark.parametrize(('name', 'package'), [('a.parquet', 'pyarrow'), ('a.jsonl.zst', unpack.ZSTD)])
def test_missing_package_is_named_before_anything_is_read(tmp_path, monkeypatch, name, package):
  (tmp_path / name).write_bytes(b'')
  monkeypatch.setitem(sys.modules, package, None)
  with pytest.raises(UserError, match=f"{name}' needs the package {package}: pip install 'mmjax\\[formats\\]'"):
    find_files(str(tmp_path / name))


def test_part_without_rows_is_no_mistake(tmp_path):
  none = write(tmp_path, {'text': pyarrow.array([], pyarrow.string())}, 'part-0.parquet')
  some = write(tmp_path, {'text': ['one']}, 'part-1.parquet')
  assert list(read_documents([none, some, none], 'text', Tally('fail'))) == ['one']
