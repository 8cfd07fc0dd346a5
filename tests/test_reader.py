"""Reading lines and plain text: what is kept, and the sentence for each way a file can be wrong."""

import gzip
import importlib
import io
import json
import lzma
import os
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from mmjax.data import blocks
from mmjax.data.blocks import LONGEST_LINE_BYTES, TEXT_DOCUMENT_BYTES, Block
from mmjax.data.formats import parse_block
from mmjax.data.reader import Place, Tally, find_files, read_documents, read_files, split_names
from mmjax.data.unpack import ZSTD, open_xz
from mmjax.errors import UserError
from tests.helpers import rarely

zstd = importlib.import_module(ZSTD)
GOOD = b'{"text": "one"}\n'
BAD_LINES = {
  'cut line': (b'{"text": "tw', 'not JSON: Unterminated string', 9),
  'not JSON': (b'hello', 'not JSON: Expecting value', 0),
  'not UTF-8': (b'{"text": "a\xffb"}', 'not UTF-8: invalid start byte 0xff', 11),
  'byte order mark': (b'\xef\xbb\xbf{"text": "a"}', 'a byte order mark that is not at the start of the file', 0),
  'nested deep': (b'{"text": ' + b'[' * 100_000 + b']' * 100_000 + b'}', 'nested too deep', 0),
  'long number': (
    b'{"n": 1' + b'0' * 4300 + b', "text": "a"}',
    'not usable JSON: a number has more than 4,300 digits',
    0,
  ),
  'lone surrogate': (b'{"text": "a\\ud800b"}', 'a lone surrogate \\ud800', 0),
  'no key': (b'{"body": "a", "title": 3}', "no key 'text'; keys present: 'body', 'title'; another may hold", 0),
  'no string': (b'{"text": ["a"]}', "the value of 'text' must be a string, not a list", 0),
  'null': (b'{"text": null}', "the value of 'text' must be a string, not null", 0),
  'no object': (b'["text"]', 'must be a JSON object', 0),
  'CR alone': (GOOD.strip() + b'\r' + GOOD.strip(), 'lines must end in LF or CRLF, not in CR alone', 16),
  'NUL byte': (b'{"text": "a\0b"}', 'a NUL byte', 11),
  'lone NUL bytes': (b'\0' * 50, 'a NUL byte', 0),
  'raw control character': (b'{"text": "a\x01b"}', 'not JSON: Invalid control character', 11),
}
PACK = {
  '.gz': gzip.compress,
  '.xz': lzma.compress,
  '.zst': lambda data: zstd.compress(data, options={zstd.CompressionParameter.checksum_flag: 1}),  # as its command does
}


def write(tmp_path, data: bytes, name: str = 'a.jsonl'):
  path = tmp_path / name
  path.write_bytes(PACK.get(path.suffix, bytes)(data))
  return path


def read(*paths, on_bad_line: str = 'fail', text_key: str = 'text'):
  return list(read_documents(list(paths), text_key, Tally(on_bad_line)))


@pytest.mark.parametrize('name', ['a.jsonl', 'a.jsonl.gz', 'a.jsonl.xz', 'a.jsonl.zst'])
def test_jsonl_documents_are_read_in_order(tmp_path, name):
  texts = ['one', 'zwei\nLinien', '三\u2028\x0b', 'NUL \0 inside', '\U0001f600', ' ']
  data = '\n'.join(json.dumps({'id': 1, 'text': text}, ensure_ascii=n % 2 == 0) for n, text in enumerate(texts))
  assert read(write(tmp_path, data.encode(), name)) == texts


def test_blank_lines_crlf_and_leading_byte_order_mark_are_accepted(tmp_path):
  data = b'\xef\xbb\xbf{"text": "one"}\r\n\r\n \t\n{"text": "two"}\r\n{"text": "\\r\\n"}'
  assert read(write(tmp_path, data)) == ['one', 'two', '\r\n']


def test_other_key_is_read_and_empty_text_is_counted(tmp_path):
  tally = Tally('fail')
  path = write(tmp_path, b'{"body": "one"}\n{"body": ""}\n')
  assert list(read_documents([path], 'body', tally)) == ['one']
  assert tally.files[str(path)] == {'lines': 2, 'empty': 1, 'skipped': {}}


@pytest.mark.parametrize('name', BAD_LINES)
def test_bad_line_is_named_with_file_line_and_byte(tmp_path, name):
  line, what, at = BAD_LINES[name]
  path = write(tmp_path, GOOD * 2 + line + b'\n' + GOOD)
  with pytest.raises(UserError) as caught:
    read(path)
  message = str(caught.value)
  assert f'{path}:3: ' in message and what in message and f'(byte {2 * len(GOOD) + at})' in message
  assert '\n' not in message and len(message) < 400
  assert ('at most one in 1,000: --config.data.on_bad_line=skip' in message) == ('UTF-16' not in what)


@pytest.mark.parametrize('name', BAD_LINES)
def test_bad_line_is_skipped_and_counted(tmp_path, name):
  tally = Tally('skip')
  path = write(tmp_path, GOOD * 1500 + BAD_LINES[name][0] + b'\n' + GOOD * 500)
  assert list(read_documents([path], 'text', tally)) == ['one'] * 2000
  assert sum(tally.skipped().values()) == 1 and f'{path}:1501: ' in tally.report()


@pytest.mark.parametrize(
  ('data', 'hint', 'skip'),
  [
    (b'{"content": "abc"}\n', "keys present: 'content'; another may hold the text: --config.data.text_key=NAME", False),
    ('{"text": "caf\xe9"}\n'.encode('latin-1'), 'iconv -f WINDOWS-1252 -t UTF-8 OLD > NEW (GB18030,', True),
  ],
)
def test_what_helps_a_bad_first_line_is_said(tmp_path, data, hint, skip):
  with pytest.raises(UserError) as caught:
    read(write(tmp_path, data))
  assert hint in str(caught.value) and ('on_bad_line=skip' in str(caught.value)) == skip


def test_more_than_a_thousandth_of_bad_lines_fails_with_both_numbers(tmp_path):
  path = write(tmp_path, GOOD * 997 + b'x\n' * 2)
  with pytest.raises(
    UserError, match=r'2 of 999 lines \(of plain text: documents\) are bad \(0.20%\), more than the 0.1%.*2 x not JSON'
  ):
    read(path, on_bad_line='skip')


def test_tally_goes_on_from_its_saved_state():
  tally = Tally('skip')
  tally.add('a', 5000, 1, parse_block(Block('a.jsonl', 1, 0, b'x\n'), 'text').bad)
  saved = json.dumps({'files': tally.files, 'examples': tally.examples})
  again = Tally('skip', **json.loads(saved))
  again.add('a', 10, 0, [])
  assert again.files == {'a': {'lines': 5010, 'empty': 1, 'skipped': {'not JSON': 1}}}
  assert again.report() == tally.report() and tally.files['a']['lines'] == 5000


@pytest.mark.parametrize('data', [b'', b'\n \r\n\n', b'\xef\xbb\xbf'])
@pytest.mark.parametrize('name', ['a.jsonl', 'a.jsonl.xz', 'a.jsonl.zst'])
def test_blank_file_is_refused(tmp_path, data, name):
  good, blank = write(tmp_path, GOOD, 'good.jsonl'), write(tmp_path, data, name)
  with pytest.raises(UserError, match=f'{name}:1: the file is empty or blank .byte 0.$'):
    read(good, blank, good)


@pytest.mark.parametrize('data', [b'', b'\n \r\n\n', b'\xef\xbb\xbf'])
def test_blank_plain_text_is_counted(tmp_path, data):
  files = [write(tmp_path, data, name) for name in ('__init__.py', 'note.md', 'a.txt.gz')]
  tally = Tally('fail')
  assert list(read_documents([*files, write(tmp_path, b'text', 'b.txt')], 'text', tally)) == ['text']
  assert [tally.files[str(file)]['empty'] for file in files] == [1, 1, 1]


def test_zero_byte_compressed_file_is_refused(tmp_path):
  path = tmp_path / 'a.jsonl.gz'
  path.write_bytes(b'')
  with pytest.raises(UserError, match='the file is empty or blank'):
    read(path)


@pytest.mark.parametrize('suffix', ['gz', 'xz', 'zst'])
@pytest.mark.parametrize('on_bad_line', ['fail', 'skip'])
def test_truncated_or_damaged_compressed_file_is_refused_whatever_the_mode(tmp_path, suffix, on_bad_line):
  said = 'damaged or cut short|cannot be unpacked' if suffix == 'zst' else 'damaged or cut short'
  path = write(tmp_path, os.urandom(5000).hex().join(['{"text": "', '"}\n']).encode() * 3, f'a.jsonl.{suffix}')
  whole = path.read_bytes()
  for data in (whole[:-7], whole[: len(whole) // 2], whole[:200] + b'XX' + whole[202:]):
    path.write_bytes(data)
    with pytest.raises(UserError, match=rf'({said}).*after byte \d+'):
      read(path, on_bad_line=on_bad_line)


def test_long_line_is_passed_over_in_bounded_memory(tmp_path):
  path = tmp_path / 'a.jsonl'
  with path.open('wb') as handle:
    handle.write(GOOD + b'{"text": "')
    for _ in range(50):
      handle.write(b'x' * 10**6)
    handle.write(b'"}\n')
    handle.write(GOOD * 1000)
  with pytest.raises(UserError, match=r'a.jsonl:2: a line of 50000013 bytes is longer .*; cut the document into'):
    read(path)
  tracemalloc.start()
  tally = Tally('skip')
  assert sum(1 for _ in read_documents([path], 'text', tally)) == 1001
  assert tracemalloc.get_traced_memory()[1] < 4 * LONGEST_LINE_BYTES
  tracemalloc.stop()
  assert tally.skipped() == {'too long': 1}


def test_longest_line_is_kept_and_one_byte_more_is_not(tmp_path):
  for extra in (0, 1):
    text = 'x' * (LONGEST_LINE_BYTES - len('{"text": ""}') + extra)
    path = write(tmp_path, GOOD + json.dumps({'text': text}).encode() + b'\n' + GOOD)
    tally = Tally('skip')
    found = []
    with pytest.raises(UserError) if extra else open(os.devnull):
      found.extend(read_documents([path], 'text', tally))
    assert tally.skipped() == ({'too long': 1} if extra else {})
    assert extra or found == ['one', text, 'one']


def test_txt_is_one_document_and_a_long_one_is_cut_at_paragraphs_without_loss(tmp_path):
  assert read(write(tmp_path, b'One.\r\n\r\nTwo.\n', 'a.txt')) == ['One.\r\n\r\nTwo.\n']
  text = '\n\n'.join(f'Paragraph {n}: ' + 'wörter 字 ' * 300 for n in range(400))
  documents = read(write(tmp_path, text.encode(), 'b.txt.xz'))
  assert ''.join(documents) == text
  assert len(documents) > 10 and all(len(part.encode()) <= TEXT_DOCUMENT_BYTES for part in documents)
  assert all(part.startswith('Paragraph') for part in documents)


@pytest.mark.parametrize('unit', ['字', '\U0001f600', 'ab\n', 'word '])
def test_txt_without_paragraphs_is_cut_between_characters(tmp_path, unit):
  text = unit * (5 * TEXT_DOCUMENT_BYTES // len(unit.encode()))
  documents = read(write(tmp_path, b'x' + text.encode(), 'a.txt'))
  assert ''.join(documents) == 'x' + text and len(documents) >= 5


def test_txt_that_is_no_text_is_named_with_line_and_byte(tmp_path):
  with pytest.raises(UserError, match=r'a.txt:2: a NUL byte: this is not a text file \(byte 5\)'):
    read(write(tmp_path, b'one\nt\0wo', 'a.txt'))
  with pytest.raises(UserError, match=r'b.txt:1: not UTF-8: .* 0xe9 \(byte 3\)'):
    read(write(tmp_path, b'caf\xe9 au lait', 'b.txt'))


WIDE_TEXTS = ('{"text": "one"}\n', 'Hello.\n', '一天，一个人去学习。\n', 'Он читает книгу.\n', 'Ça va\r\nbien\r\n')


@pytest.mark.parametrize('name', ['a.txt', 'a.jsonl', 'a.txt.gz', 'a.jsonl.xz'])
@pytest.mark.parametrize('encoding', ['utf-16', 'utf-16-le', 'utf-16-be', 'utf-32', 'utf-32-le', 'utf-32-be'])
@pytest.mark.parametrize('on_bad_line', ['fail', 'skip'])
def test_utf16_is_named_with_what_to_type(tmp_path, name, encoding, on_bad_line):
  for text in WIDE_TEXTS:
    with pytest.raises(UserError) as caught:
      text = text if '.txt' in name else json.dumps({'text': text}, ensure_ascii=False) + '\n'
      read(write(tmp_path, (text * 3).encode(encoding), name), on_bad_line=on_bad_line)
    shown = encoding.upper().replace('-LE', 'LE').replace('-BE', 'BE')
    what = f'{name}:1: the text is {shown}; it must be UTF-8 (iconv -f {shown} -t UTF-8 OLD > NEW)'
    assert what in str(caught.value) and (on_bad_line == 'skip' or 'to leave out such lines' not in str(caught.value))


@settings(max_examples=200, deadline=None)
@given(st.text(st.characters(exclude_categories=['Cs'], min_codepoint=32), min_size=1), st.integers(0))
@example('\U0001f642' * 20, 26)
@example('\x80' * 7, 26)
def test_utf8_text_with_a_nul_byte_is_not_taken_for_utf16(text, at):
  data = f'the text "{text}" is here'.encode()
  data = data[: at % len(data)] + b'\0' + data[at % len(data) :]
  [bad] = parse_block(Block('a.txt', 1, 0, data), 'text').bad
  assert bad.kind == 'NUL byte'


def test_file_name_that_is_no_text_is_refused_before_anything_is_read(tmp_path):
  name = os.fsencode(tmp_path) + b'/\xff.jsonl'
  with open(name, 'wb') as handle:
    handle.write(GOOD)
  for pattern in (os.fsdecode(name), f'{tmp_path}/*.jsonl'):
    with pytest.raises(UserError, match=r'the file name .*udcff.jsonl. is not UTF-8; rename the file'):
      find_files(pattern)


@pytest.mark.parametrize('packing', rarely(list(PACK), '.xz'))
def test_file_that_unpacks_to_a_thousand_times_its_size_is_read_in_bounded_memory(tmp_path, packing):
  path = write(tmp_path, GOOD + b'[' * 64 * 2**20, f'bomb.jsonl{packing}')
  assert path.stat().st_size < 2**17
  tracemalloc.start()
  with pytest.raises(UserError, match=rf'bomb.jsonl{packing}:2: a line of 67108864 bytes is longer than the limit'):
    read(path)
  assert tracemalloc.get_traced_memory()[1] < 4 * LONGEST_LINE_BYTES
  tracemalloc.stop()


def test_every_stream_of_an_xz_file_is_read_or_refused(tmp_path):
  path, one, two = tmp_path / 'a.jsonl.xz', lzma.compress(GOOD), lzma.compress(GOOD.replace(b'one', b'two') * 9)
  for packed in (one + two, one + bytes(8) + two + bytes(4), lzma.compress(b'') + one + two):
    path.write_bytes(packed)
    assert read(path) == ['one'] + 9 * ['two']
  for packed in (one + GOOD, one + bytes(3), one + bytes(3) + two, bytes(4) + one, one + two[:-1], one + two + b'\0x'):
    path.write_bytes(packed)
    with pytest.raises(UserError, match="a.jsonl.xz' is damaged or cut short: "):
      read(path)
  for byte in range(len(two)):
    damaged = bytearray(two)
    damaged[byte] ^= 1
    path.write_bytes(one + damaged)
    try:  # byte 29 says how much of the letter before counts for the next, and here one bit less does as well
      assert read(path) == ['one'] + 9 * ['two']
      assert byte == 29
    except UserError as error:
      assert "a.jsonl.xz' is damaged or cut short: " in str(error)


def test_every_frame_of_a_zst_file_is_read_or_refused(tmp_path):
  one, two = (PACK['.zst'](data) for data in (GOOD, GOOD.replace(b'one', b'two') * 9))
  skipped = bytes.fromhex('502a4d18 03000000') + b'abc'  # a frame of user data, RFC 8878, section 3.1.2
  path = tmp_path / 'a.jsonl.zst'
  for packed in (one + two, skipped + one + skipped + two + skipped, PACK['.zst'](b'') + one + two):
    path.write_bytes(packed)
    assert read(path) == ['one'] + 9 * ['two']
  for packed in (one + GOOD, one + bytes(3), one + two[:-1], GOOD, one[1:]):
    path.write_bytes(packed)
    with pytest.raises(UserError, match="a.jsonl.zst' (is damaged or cut short|cannot be unpacked): "):
      read(path)


def test_zst_of_a_long_window_is_read(tmp_path):
  options = {zstd.CompressionParameter.window_log: 30, zstd.CompressionParameter.enable_long_distance_matching: 1}
  with zstd.ZstdFile(tmp_path / 'a.jsonl.zst', 'w', options=options) as file:
    file.write(GOOD)
  assert read(tmp_path / 'a.jsonl.zst') == ['one']


def test_xz_is_read_on_from_any_byte_as_whole_blocks(tmp_path):
  data, path = np.random.default_rng(0).bytes(2**18) * 3, tmp_path / 'a.xz'
  path.write_bytes(lzma.compress(data[: 2**19]) + lzma.compress(data[2**19 :]))
  for start in (0, 2**19 - 5, 2**19 + 5):
    with path.open('rb') as packed, open_xz(packed) as file:
      file.seek(start)
      assert file.read(2**17) == data[start : start + 2**17] and file.tell() == start + 2**17
      assert file.read() == data[start + 2**17 :] and not file.read(1)
      with pytest.raises(io.UnsupportedOperation):
        file.seek(0)


@pytest.mark.parametrize(
  'name', ['A.JSONL', 'a.Jsonl.Gz', 'a.jsonl.XZ', 'a.JSONL.Zst', '.jsonl', 'a.txt.jsonl', 'x.gz.jsonl']
)
def test_ending_of_a_name_decides_in_any_case(tmp_path, name):
  path = tmp_path / name
  path.write_bytes(PACK.get(path.suffix.lower(), bytes)(GOOD * 2))
  assert read(*find_files(str(path))) == ['one', 'one']


@pytest.mark.parametrize(
  'name', ['A.TXT', 'how.jsonl.works.txt', 'a.jsonl.TXT', '.txt', 'README.md', 'setup.py', 'a.MD.zst']
)
def test_text_may_be_called_after_anything(tmp_path, name):
  path = write(tmp_path, GOOD * 2, name)
  assert read(*find_files(str(path))) == [(GOOD * 2).decode()]


def test_name_that_is_given_decides_and_not_what_it_leads_to(tmp_path):
  blob = write(tmp_path, GOOD * 2, 'blob.txt')
  for name in ('a.jsonl', 'b.txt', 'c'):
    (tmp_path / name).symlink_to(blob.name)
  (tmp_path / 'twice.jsonl').symlink_to('a.jsonl')
  assert find_files(f'{tmp_path}/a.jsonl') == [tmp_path / 'a.jsonl']
  assert read(*find_files(f'{tmp_path}/twice.jsonl')) == ['one', 'one']
  assert read(*find_files(f'{tmp_path}/b.txt')) == [(GOOD * 2).decode()]
  with pytest.raises(UserError, match='/c. must end in .jsonl or .txt'):
    find_files(f'{tmp_path}/c')
  (tmp_path / 'gone.jsonl').symlink_to('nowhere/x')
  (tmp_path / 'circle.jsonl').symlink_to('circle.jsonl')
  with pytest.raises(UserError, match="gone.jsonl', a link to 'nowhere/x', leads nowhere"):
    find_files(f'{tmp_path}/gone.jsonl')
  with pytest.raises(UserError, match="circle.jsonl' cannot be read: Too many levels"):
    find_files(f'{tmp_path}/circle.jsonl')


def test_names_are_cut_apart_as_they_are_read_and_none_may_be_named_twice(tmp_path):
  for name in ('a.txt', 'b,c.txt'):
    write(tmp_path, GOOD, name)
  names = [f'{tmp_path}/b,c.txt', f'{tmp_path}/a.txt']
  assert split_names(','.join(names)) == names and split_names('') == []
  with pytest.raises(UserError, match=r'/a.txt. is named twice in '):
    split_names(f'{tmp_path}/a.txt,{tmp_path}/*.txt')


def test_path_that_is_given_twice_is_refused_and_globs_may_overlap(tmp_path):
  a, b = (write(tmp_path, GOOD, name) for name in ('a.jsonl', 'b.jsonl'))
  (tmp_path / 'link.jsonl').symlink_to('a.jsonl')
  assert find_files(f'{b},{tmp_path}/*.jsonl,{tmp_path}/a*.jsonl') == [b, a]
  for again in (a, f'{tmp_path}/./a.jsonl', tmp_path / 'link.jsonl'):
    with pytest.raises(UserError, match=r'(a|link)\.jsonl. is named twice in .*; each file is read once'):
      find_files(f'{a},{b},{again}')


def test_brackets_and_commas_that_are_in_names_are_meant_as_they_are(tmp_path):
  (tmp_path / 'x[1]').mkdir()
  (tmp_path / 'x1').mkdir()
  (tmp_path / 'a').mkdir()
  names = ('x[1]/a.jsonl', 'x[1]/b.jsonl', 'x1/c.jsonl', 'one,two.jsonl', 'a,b.jsonl', 'three, four.jsonl')
  for name in names:
    write(tmp_path, GOOD, name)

  def found(*patterns):
    return [str(path.relative_to(tmp_path)) for path in find_files(','.join(f'{tmp_path}/{p}' for p in patterns))]

  assert found('x[1]/*.jsonl') == ['x[1]/a.jsonl', 'x[1]/b.jsonl']
  assert found('x[12]/*.jsonl') == ['x1/c.jsonl']
  assert found('*/?.jsonl') == ['x1/c.jsonl', 'x[1]/a.jsonl', 'x[1]/b.jsonl']
  assert found('one,two.jsonl', 'x[1]/a.jsonl') == ['one,two.jsonl', 'x[1]/a.jsonl']
  assert found('x1/c.jsonl', 'a,b.jsonl', 'three, four.jsonl') == ['x1/c.jsonl', 'a,b.jsonl', 'three, four.jsonl']
  assert found('*,*.jsonl') == ['a,b.jsonl', 'one,two.jsonl', 'three, four.jsonl']
  assert found('**/c.jsonl') == ['x1/c.jsonl'] and len(found('**/*.jsonl')) == len(names)
  with pytest.raises(UserError, match="no file '.*none'"):
    found('none', 'x1/c.jsonl')


def test_space_at_either_end_of_a_name_is_meant_where_there_is_such_a_file(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  for name in (' a.jsonl', 'b.jsonl', ' c.txt'):
    write(tmp_path, GOOD, name)
  assert [str(path) for path in find_files(' a.jsonl, b.jsonl, *.txt')] == [' a.jsonl', 'b.jsonl', ' c.txt']


def test_home_is_meant_by_a_leading_tilde(tmp_path, monkeypatch):
  monkeypatch.setenv('HOME', str(tmp_path))
  paths = [write(tmp_path, GOOD, name) for name in ('a.jsonl', 'b.jsonl')]
  assert find_files('~/a.jsonl, ~/b.jsonl') == find_files('~/*.jsonl') == paths
  with pytest.raises(UserError, match="no home is known for '~nobody-here'"):
    find_files('~nobody-here/a.jsonl')
  monkeypatch.chdir(tmp_path)
  write(tmp_path, GOOD, '~old.jsonl')
  assert find_files('~old.jsonl') == [Path('~old.jsonl')]


def test_find_files_sorts_globs_and_keeps_the_given_order(tmp_path):
  paths = [write(tmp_path, GOOD, name) for name in ('c.jsonl', 'b2.txt', 'b1.txt', 'a[1].jsonl')]
  c, b2, b1, a = paths
  assert find_files(f'{c}, {tmp_path}/b*.txt,{a},{b1}') == [c, b1, b2, a]


@pytest.mark.parametrize(
  ('pattern', 'what'),
  [
    ('none.jsonl', "no file '.*none.jsonl'$"),
    ('pipes.jsonl', "no file '.*pipes.jsonl'; did you mean '.*/pipe.jsonl'"),
    ('report.jsonlx', "no file '.*report.jsonlx'; did you mean '.*/report.jsonl'"),
    ('none/a.jsonl', "no file '.*none/a.jsonl'; there is no folder '.*none'$"),
    ('*.gz', r"no file matches the pattern '.*\*.gz'"),
    ('folder', "is a directory; name its files, for example '.*folder/\\*.jsonl'"),
    ('texts', "is a directory; name its files, for example '.*texts/\\*.TXT.gz'"),
    ('a.csv', 'must end in .jsonl or .txt'),
    ('n' * 300 + '.jsonl', 'cannot be read: File name too long'),
    ('pipe.jsonl', 'must be a regular file'),
  ],
)
def test_find_files_explains_what_is_wrong(tmp_path, pattern, what):
  (tmp_path / 'folder').mkdir()
  (tmp_path / 'texts').mkdir()
  for name in ('texts/a.TXT.gz', 'texts/b.TXT.gz', 'texts/c.jsonl', 'a.csv', 'report.jsonl', 'report.md', 'report.txt'):
    (tmp_path / name).write_text('x')
  os.mkfifo(tmp_path / 'pipe.jsonl')
  with pytest.raises(UserError, match=what):
    find_files(str(tmp_path / pattern))
  with pytest.raises(UserError, match='no file is named'):
    find_files(' , ')


@pytest.mark.parametrize('name', ['a.jsonl', 'a.jsonl.gz', 'a.jsonl.xz', 'a.jsonl.zst', 'a.txt', 'a.txt.xz'])
def test_reading_can_go_on_where_any_block_ended(tmp_path, name, monkeypatch):
  monkeypatch.setattr(blocks, 'BLOCK_BYTES', 64)
  monkeypatch.setattr(blocks, 'TEXT_DOCUMENT_BYTES', 50)
  monkeypatch.setattr(blocks, 'LONGEST_LINE_BYTES', 100)
  lines = [b'{"text": "%d"}\n' % n for n in range(40)]
  lines[30] = b'x' * 300 + b'\n'
  first = write(tmp_path, b''.join(lines), name)
  second = write(tmp_path, GOOD * 3, 'second.jsonl')
  files = [first, second]
  whole = list(read_files(files))
  assert len(whole) > 8
  for number, block in enumerate(whole):
    place = Place([str(file) for file in files].index(block.file), *block.end)
    assert list(read_files(files, place)) == whole[number + 1 :]


@settings(max_examples=200, deadline=None)
@given(st.lists(st.binary(max_size=40) | st.sampled_from([GOOD, *(bad[0] for bad in BAD_LINES.values())])))
def test_any_bytes_are_documents_or_counted(lines):
  data = b'\n'.join(lines)
  parsed = parse_block(Block('a.jsonl', 1, 0, data), 'text')
  mark = data.removeprefix(b'\xef\xbb\xbf')
  assert parsed.lines == sum(1 for line in mark.split(b'\n') if line.strip())
  assert parsed.lines == len(parsed.documents) + len(parsed.bad) + parsed.empty
  for bad in parsed.bad:  # the place is right: that line, and a byte in it
    start = sum(len(line) + 1 for line in data.split(b'\n')[: bad.line - 1])
    assert start <= bad.byte <= start + len(data.split(b'\n')[bad.line - 1])
  parse_block(Block('a.txt', 1, 0, data), 'text')
