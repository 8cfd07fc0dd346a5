"""The table of text formats: what the end of a file's name says about how it is unpacked, cut into blocks and parsed.

A new format is one row of FORMATS, a new packing one of PACKINGS; nothing else knows an ending. The name that was
given decides, in any case of its letters, and never that of what a link leads to. .jsonl: one JSON object a line; the
document is the string under the text key. Blank lines, CRLF and a UTF-8 byte order mark at the start of a file are
accepted. .parquet: the same of its rows. .txt, .md and .py: see mmjax.data.blocks. What is wrong with a bad line is
said with file, line, byte and reason.
"""

import codecs
import gzip
import json
import lzma
import os
import sys
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

from mmjax.data.blocks import LONGEST_LINE_BYTES, Block, cut_lines, cut_text
from mmjax.data.unpack import ZSTD, open_parquet, open_xz, open_zst

WIDE_MARKS = {  # those of UTF-32 first: the little-endian one begins with that of UTF-16
  codecs.BOM_UTF32_LE: 'UTF-32',
  codecs.BOM_UTF32_BE: 'UTF-32',
  codecs.BOM_UTF16_LE: 'UTF-16',
  codecs.BOM_UTF16_BE: 'UTF-16',
}
UNMARKED = ('UTF-16LE', 'UTF-16BE', 'UTF-32LE', 'UTF-32BE')  # what text that is not UTF-8 may be, without a mark
NO_KEY, NO_UTF8, TOO_LONG = 'no text key', 'not UTF-8', 'too long'
KINDS = {dict: 'an object', list: 'a list', str: 'a string', bool: 'a boolean', int: 'a number', float: 'a number'}


class BadLine(NamedTuple):
  """A line that cannot be used. `byte` is an offset in the uncompressed file."""

  file: str
  line: int
  byte: int
  kind: str
  what: str

  def __str__(self) -> str:
    return f'{self.file}:{self.line}: {self.what} (byte {self.byte})'


class Parsed(NamedTuple):
  """What a block holds. `empty` counts what is no document: a line whose text is '', a blank stretch of a .txt."""

  documents: list[str]
  bad: list[BadLine]
  lines: int
  empty: int


class NotText(Exception):
  """What is wrong with a line or a text, and at which of its bytes."""

  def __init__(self, kind: str, what: str, byte: int = 0):
    super().__init__(what)
    self.kind, self.what, self.byte = kind, what, byte


class Format(NamedTuple):
  """How a file's bytes become documents, once they are unpacked.

  Attributes:
    cut: unpacked file -> the data of its blocks, from where it stands; of what is too long to keep, the size.
    text_of: (data, text_key) -> the document in it, '' for none; raises NotText where it can be none.
    one_a_line: whether each line of a block holds a document; else the whole block is one.
  """

  cut: Callable[[BinaryIO], Iterator[bytes | int]]
  text_of: Callable[[bytes, str], str]
  one_a_line: bool = True


class Packing(NamedTuple):
  """How a file is unpacked.

  Attributes:
    unpack: packed file -> what is in it, to be read forwards.
    token_bytes: about how many bytes of token shards a byte of it makes: for the look at the room.
    package: a module of the extra `formats` that this needs.
    holds: a key of FORMATS, where that does not stand in the name.
  """

  unpack: Callable[[BinaryIO], BinaryIO]
  token_bytes: float
  package: str = ''
  holds: str = ''


def ending_of(file: str | os.PathLike) -> str | None:
  """Returns which of ENDINGS a file's name has, None where it has none."""
  name = os.path.basename(file).lower()
  return next((ending for ending in ENDINGS if name.endswith(ending)), None)


def may_be_blank(file: str | os.PathLike) -> bool:
  """Whether a file without any text is no mistake: an __init__.py, a note to be written, a part without rows."""
  content, packing = ENDINGS[ending_of(file)]
  return bool(PACKINGS[packing].holds) or not FORMATS[content].one_a_line


def expected_token_bytes(file: Path) -> int:
  """Returns about how many bytes of token shards a file makes."""
  _, packing = ENDINGS[ending_of(file)]
  return int(file.stat().st_size * PACKINGS[packing].token_bytes)


def parse_block(block: Block, text_key: str) -> Parsed:
  """Returns the documents and the bad lines of a block; raises nothing for bad content."""
  if block.too_long:
    bad = _too_long(block.too_long)
    return Parsed([], [BadLine(block.file, block.line, block.byte, bad.kind, bad.what)], 1, 0)
  content, _ = ENDINGS[ending_of(block.file)]
  _, text_of, one_a_line = FORMATS[content]
  marked = not block.byte and block.data.startswith(codecs.BOM_UTF8)
  data, byte = (block.data[3:], 3) if marked else (block.data, block.byte)
  documents, bad_lines, lines, empty = [], [], 0, 0
  for number, raw in enumerate(data.split(b'\n') if one_a_line else [data], block.line):
    if raw.strip():
      lines += 1
      try:
        if len(raw) > LONGEST_LINE_BYTES:
          raise _too_long(len(raw))
        text = text_of(raw, text_key)
      except NotText as bad:
        line = number + raw.count(b'\n', 0, bad.byte)
        bad_lines.append(BadLine(block.file, line, byte + bad.byte, bad.kind, bad.what))
      else:
        empty += not text
        documents += [text] if text else []
    elif not one_a_line:
      empty += 1
    byte += len(raw) + 1
  return Parsed(documents, bad_lines, lines, empty)


def _too_long(n_bytes: int) -> NotText:
  return NotText(TOO_LONG, f'a line of {n_bytes} bytes is longer than the limit of {LONGEST_LINE_BYTES}')


def decode(data: bytes) -> str:
  """Returns UTF-8 text.

  Raises:
    NotText: if it is none, or holds a NUL byte, which no text does; UTF-16 and UTF-32 are named, with what to type.
  """
  try:
    if b'\0' not in data:
      return data.decode('utf-8')
    bad = NotText('NUL byte', 'a NUL byte: this is not a text file', data.index(b'\0'))
  except UnicodeDecodeError as error:
    bad = NotText(NO_UTF8, f'{NO_UTF8}: {error.reason} 0x{data[error.start]:02x}', error.start)
  if encoding := _wide_encoding(data):
    bad = NotText(encoding, f'the text is {encoding}; it must be UTF-8 (iconv -f {encoding} -t UTF-8 OLD > NEW)')
  raise bad from None


def _wide_encoding(data: bytes) -> str:
  """Returns the encoding of two or four bytes a character that bytes seem to have, else ''.

  Without a byte order mark it is the one that makes most sense of them, if there are NUL bytes, as in all ASCII.
  """
  marked = next((encoding for mark, encoding in WIDE_MARKS.items() if data.startswith(mark)), '')
  if marked or b'\0' not in data:
    return marked
  text = data[:4096].decode('utf-8', 'replace')
  if sum('\t' <= char != '\ufffd' for char in text) > 0.7 * len(text):  # few of its characters are control or damaged
    return ''
  sense = {encoding: _sense(data[:4096].decode(encoding, 'replace')) for encoding in UNMARKED}
  likely = max(sense, key=sense.get)
  return likely if sense[likely] > 0.9 else ''


def _sense(text: str) -> float:
  """Returns the share of characters that are common in text, 0 where there is no ASCII: no text is without any."""
  common = [
    char in '\t\n\r' or (' ' <= char <= '\u06ff' and char.isprintable()) or '\u3000' <= char <= '\ud7a3'
    for char in text
  ]
  return sum(common) / len(common) if any('\t' <= char <= '~' for char in text) else 0.0


def json_text(raw: bytes, text_key: str) -> str:
  """Returns the document of one line of a .jsonl.

  Raises:
    NotText: if it is no JSON object with a string under the text key.
  """
  if raw.startswith(codecs.BOM_UTF8):
    raise NotText('byte order mark', 'a byte order mark that is not at the start of the file')
  line = decode(raw)
  try:
    record = json.loads(line)
  except json.JSONDecodeError as error:
    byte = len(line[: error.pos].encode())
    ends = '; lines must end in LF or CRLF, not in CR alone' if '\r' in line.strip() else ''
    raise NotText('not JSON', f'not JSON: {error.msg}, character {error.pos} of the line{ends}', byte) from None
  except ValueError:  # of int, which takes so many
    digits = sys.get_int_max_str_digits()
    raise NotText('number too long', f'not usable JSON: a number has more than {digits:,} digits') from None
  except RecursionError:
    raise NotText('nested too deep', 'not usable JSON: nested too deep') from None
  if not isinstance(record, dict):
    raise NotText('not an object', f'the line must be a JSON object with the key {text_key!r}, not {_kind(record)}')
  if text_key not in record:
    present = ', '.join([ascii(name[:40]) for name in list(record)[:10]] + ['...'] * (len(record) > 10))
    other = '; another may hold the text: --config.data.text_key=NAME (prepare: --text_key NAME)' if record else ''
    raise NotText(NO_KEY, f'no key {text_key!r}; keys present: {present or "none"}{other}')
  text = record[text_key]
  if not isinstance(text, str):
    raise NotText('text is no string', f'the value of {text_key!r} must be a string, not {_kind(text)}')
  try:
    text.encode('utf-8')
  except UnicodeEncodeError as error:
    what = f'a lone surrogate \\u{ord(text[error.start]):04x} in {text_key!r}, character {error.start}, is not text'
    raise NotText('lone surrogate', what) from None
  return text


def _kind(value: object) -> str:
  return KINDS.get(type(value), 'null')


PLAIN_TEXT = Format(cut_text, lambda data, text_key: decode(data), one_a_line=False)
FORMATS = {
  '.jsonl': Format(cut_lines, json_text),
  '.txt': PLAIN_TEXT,
  '.md': PLAIN_TEXT,
  '.py': PLAIN_TEXT,
}
PACKINGS = {
  '': Packing(lambda file: file, 1.0),
  '.gz': Packing(lambda file: gzip.GzipFile(fileobj=file), 3.0),
  '.xz': Packing(open_xz, 3.0),
  '.zst': Packing(open_zst, 3.0, ZSTD),
  '.parquet': Packing(open_parquet, 3.0, 'pyarrow', holds='.jsonl'),
}
# How a name may end -> keys of FORMATS and PACKINGS.
ENDINGS = {content + end: (content, end) for content in FORMATS for end in PACKINGS if not PACKINGS[end].holds}
ENDINGS |= {end: (packing.holds, end) for end, packing in PACKINGS.items() if packing.holds}
DAMAGED = (EOFError, lzma.LZMAError, zlib.error, gzip.BadGzipFile)  # what unpacking raises, beside NotUnpacked
