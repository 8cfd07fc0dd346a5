"""Makes documents of text files and says what is wrong with a bad line: file, line, byte, reason.

.jsonl: one JSON object a line; the document is the string under the text key. Blank lines, CRLF and a UTF-8 byte order
mark at the start of a file are accepted. .txt: see mmjax.data.blocks. Nothing is dropped without being counted.
"""

import codecs
import copy
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from mmjax.data.blocks import LONGEST_LINE_BYTES, Block, read_files
from mmjax.errors import UserError

MOST_DIGITS = 4300  # of an integer; CPython's own limit, whatever PYTHONINTMAXSTRDIGITS says
BLANK_FILE = 'blank file'
SKIP_HINT = '; to leave such lines out: --config.data.on_bad_line=skip (prepare: --on_bad_line skip)'
MOST_SKIPPED = 0.001  # share of lines that on_bad_line='skip' may leave out


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


class Tally:
  """Counts lines by file; in 'fail' mode the first bad line ends the reading, in 'skip' mode too many bad lines do.

  `files` maps each file to {'lines', 'empty', 'skipped': {kind: count}}; plain values, so that they can be saved.
  """

  def __init__(self, on_bad_line: str, files: dict | None = None, examples: dict | None = None):
    self.on_bad_line = on_bad_line
    self.files: dict[str, dict] = copy.deepcopy(files or {})
    self.examples: dict[str, str] = dict(examples or {})

  def to_dict(self) -> dict[str, dict]:
    """Returns what a new Tally needs to go on from here."""
    return copy.deepcopy({'files': self.files, 'examples': self.examples})

  def add(self, file: str, lines: int, empty: int, bad: Sequence[BadLine]) -> None:
    """Counts one block. Raises UserError for a bad line in 'fail' mode."""
    counts = self.files.setdefault(file, {'lines': 0, 'empty': 0, 'skipped': {}})
    counts['lines'] += lines
    counts['empty'] += empty
    for line in bad:
      if self.on_bad_line == 'fail':
        raise UserError(f'{line}{SKIP_HINT if line.kind != BLANK_FILE else ""}')
      counts['skipped'][line.kind] = counts['skipped'].get(line.kind, 0) + 1
      self.examples.setdefault(line.kind, str(line))

  def end_file(self, file: str) -> None:
    """Counts a file without a single line that is not blank as one bad line."""
    if not self.files[file]['lines']:
      self.add(file, 1, 0, [BadLine(file, 1, 0, BLANK_FILE, 'the file is empty or blank')])

  def check(self) -> None:
    """Raises UserError if more than MOST_SKIPPED of all lines were skipped."""
    lines, skipped = sum(counts['lines'] for counts in self.files.values()), sum(self.skipped().values())
    if skipped > MOST_SKIPPED * lines:
      raise UserError(
        f'{skipped} of {lines} lines are bad ({skipped / lines:.2%}), more than the {MOST_SKIPPED:.1%} '
        f'that on_bad_line=skip leaves out: {self.report()}'
      )

  def skipped(self) -> dict[str, int]:
    """Returns how many lines of each kind were skipped, over all files."""
    total: dict[str, int] = {}
    for counts in self.files.values():
      for kind, n in counts['skipped'].items():
        total[kind] = total.get(kind, 0) + n
    return total

  def report(self) -> str:
    """Returns '3 x not JSON (first: FILE:LINE: ...), ...', or '' where nothing was skipped."""
    return ', '.join(f'{n} x {kind} (first: {self.examples[kind]})' for kind, n in sorted(self.skipped().items()))


def read_documents(
  files: Sequence[Path], text_key: str, tally: Tally, on_read: Callable[[int], None] = lambda disk_bytes: None
) -> Iterator[str]:
  """Yields the documents of all files in order, never more than a block of them in memory.

  Raises:
    UserError: for a bad file, and for bad lines as `tally` decides.
  """
  current = ''
  for block in read_files(files, on_read=on_read):
    if current and block.file != current:
      tally.end_file(current)
    current = block.file
    parsed = parse_block(block, text_key)
    tally.add(block.file, parsed.lines, parsed.empty, parsed.bad)
    yield from parsed.documents
  tally.end_file(current)
  tally.check()


def parse_block(block: Block, text_key: str) -> Parsed:
  """Returns the documents and the bad lines of a block; raises nothing for bad content."""
  if block.too_long:
    what = f'a line of {block.too_long} bytes is longer than the limit of {LONGEST_LINE_BYTES}'
    return Parsed([], [BadLine(block.file, block.line, block.byte, 'too long', what)], 1, 0)
  if '.jsonl' in Path(block.file).suffixes:
    return _parse_lines(block, text_key)
  return _parse_text(block)


def _parse_text(block: Block) -> Parsed:
  data, start = _without_mark(block)
  if not data.strip():
    return Parsed([], [], 0, 1)
  try:
    if b'\0' in data:
      raise _Bad('NUL byte', 'a NUL byte: this is not a text file', data.index(b'\0'))
    return Parsed([_decode(data)], [], 1, 0)
  except _Bad as bad:
    line = block.line + data.count(b'\n', 0, bad.byte)
    return Parsed([], [BadLine(block.file, line, block.byte + start + bad.byte, bad.kind, bad.what)], 1, 0)


def _parse_lines(block: Block, text_key: str) -> Parsed:
  documents, bad_lines, lines, empty = [], [], 0, 0
  data, start = _without_mark(block)
  byte = block.byte + start
  for number, raw in enumerate(data.split(b'\n'), block.line):
    if raw.strip():
      lines += 1
      try:
        text = _text_of(raw, text_key)
      except _Bad as bad:
        bad_lines.append(BadLine(block.file, number, byte + bad.byte, bad.kind, bad.what))
      else:
        empty += not text
        documents += [text] if text else []
    byte += len(raw) + 1
  return Parsed(documents, bad_lines, lines, empty)


def _without_mark(block: Block) -> tuple[bytes, int]:
  """Returns a block's data without the byte order mark that may open a file, and how many bytes were taken off."""
  if not block.byte and block.data.startswith(codecs.BOM_UTF8):
    return block.data[3:], 3
  return block.data, 0


class _Bad(Exception):
  """What is wrong with a line, and at which of its bytes."""

  def __init__(self, kind: str, what: str, byte: int = 0):
    super().__init__(what)
    self.kind, self.what, self.byte = kind, what, byte


def _decode(data: bytes) -> str:
  try:
    return data.decode('utf-8')
  except UnicodeDecodeError as error:
    hint = '; it looks like UTF-16' if data[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE) else ''
    what = f'not UTF-8: {error.reason} 0x{data[error.start]:02x}{hint}'
    raise _Bad('not UTF-8', what, error.start) from None


def _text_of(raw: bytes, text_key: str) -> str:
  """Returns the document of one line of a .jsonl, or raises _Bad."""
  if len(raw) > LONGEST_LINE_BYTES:
    raise _Bad('too long', f'a line of {len(raw)} bytes is longer than the limit of {LONGEST_LINE_BYTES}')
  if b'\0' in raw:
    raise _Bad('NUL byte', 'a NUL byte', raw.index(b'\0'))
  if raw.startswith(codecs.BOM_UTF8):
    raise _Bad('byte order mark', 'a byte order mark that is not at the start of the file')
  line = _decode(raw)
  try:
    record = json.loads(line, parse_int=_parse_int)
  except json.JSONDecodeError as error:
    byte = len(line[: error.pos].encode())
    raise _Bad('not JSON', f'not JSON: {error.msg}, character {error.pos} of the line', byte) from None
  except RecursionError:
    raise _Bad('nested too deep', 'not usable JSON: nested too deep') from None
  if not isinstance(record, dict):
    raise _Bad('not an object', f'the line must be a JSON object with the key {text_key!r}, not {_kind(record)}')
  if text_key not in record:
    raise _Bad('no text key', f'no key {text_key!r}; keys present: {_names(record)}')
  text = record[text_key]
  if not isinstance(text, str):
    raise _Bad('text is no string', f'the value of {text_key!r} must be a string, not {_kind(text)}')
  try:
    text.encode('utf-8')
  except UnicodeEncodeError as error:
    what = f'a lone surrogate \\u{ord(text[error.start]):04x} in {text_key!r}, character {error.start}, is no text'
    raise _Bad('lone surrogate', what) from None
  return text


def _parse_int(digits: str) -> int:
  count = len(digits.lstrip('-'))
  if count > MOST_DIGITS:
    raise _Bad('number too long', f'a number of {count} digits is longer than the limit of {MOST_DIGITS}')
  return int(digits)


def _kind(value: object) -> str:
  names = {
    dict: 'an object',
    list: 'a list',
    str: 'a string',
    bool: 'a boolean',
    int: 'a number',
    float: 'a number',
  }
  return names.get(type(value), 'null')


def _names(record: dict) -> str:
  """Returns the first keys of a record, short and printable."""
  names = [ascii(name[:40]) for name in list(record)[:10]]
  return (', '.join(names) or 'none') + (', ...' if len(record) > 10 else '')
