"""Finds text files and reads them in blocks: .jsonl and .txt, plain, .gz or .xz, any length, in bounded memory.

A block is about a megabyte of whole lines with their place in the file; mmjax.data.reader makes documents of it. The
two steps are apart so that several processes can do the second.

A .txt file is one document, kept byte for byte; one longer than `TEXT_DOCUMENT_BYTES` becomes several, cut at the last
paragraph end before that limit (else line end, else space, else character).
"""

import glob
import gzip
import lzma
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO, NamedTuple

from mmjax.errors import UserError

BLOCK_BYTES = 2**20  # read at once; a block of lines is about this long
LONGEST_LINE_BYTES = 8 * 2**20  # a longer line is passed over without being held in memory
TEXT_DOCUMENT_BYTES = 64 * 2**10  # a longer .txt file is cut into documents of at most this
SUFFIXES = ('.jsonl', '.jsonl.gz', '.jsonl.xz', '.txt', '.txt.gz', '.txt.xz')


class Block(NamedTuple):
  """A stretch of one file: whole lines of a .jsonl, or one document of a .txt.

  `too_long` > 0 stands for a line of that many bytes that was not kept; `data` is empty then.
  """

  file: str
  line: int  # number of the first line, from 1
  byte: int  # offset of the first byte in the uncompressed file
  data: bytes
  too_long: int = 0

  @property
  def end(self) -> tuple[int, int]:
    """Line and byte of what follows the block."""
    if self.too_long:
      return self.line + 1, self.byte + self.too_long
    return self.line + self.data.count(b'\n'), self.byte + len(self.data)


def find_files(patterns: str) -> list[Path]:
  """Returns the files that comma-separated paths and globs name: a glob's sorted, each file once, in the order given.

  Raises:
    UserError: if a path does not exist, is a directory or has another ending, or a pattern matches nothing.
  """
  files: dict[Path, None] = {}
  for pattern in filter(None, (part.strip() for part in patterns.split(','))):
    path = Path(pattern).expanduser()
    if glob.has_magic(pattern) and not path.exists():
      found = [Path(name) for name in sorted(glob.glob(str(path), recursive=True))]
      if not found:
        raise UserError(f'no file matches the pattern {pattern!r}')
    else:
      found = [path]
    for file in found:
      if not _is_utf8(str(file)):
        raise UserError(f'the file name {ascii(str(file))} is not UTF-8; rename the file')
      try:
        _check_file(file)
      except OSError as error:  # a name that is too long, a folder that may not be entered
        raise UserError(f"'{file}' cannot be read: {error.strerror or error}") from None
      files[file.resolve()] = None
  if not files:
    raise UserError(f'no file is named in {patterns!r}')
  return list(files)


def _is_utf8(name: str) -> bool:
  try:
    return bool(name.encode())
  except UnicodeEncodeError:  # bytes that are no text reach Python as lone surrogates
    return False


def _check_file(path: Path) -> None:
  if path.is_dir():
    raise UserError(f"'{path}' is a directory; name its files, for example '{path}/*.jsonl'")
  if not path.exists():
    raise UserError(f"no file '{path}'")
  if not path.is_file():
    raise UserError(f"'{path}' is not a regular file")
  if not path.name.endswith(SUFFIXES):
    raise UserError(f"'{path}' must end in .jsonl or .txt, alone or followed by .gz or .xz")


class Place(NamedTuple):
  """Where in a list of files reading begins: number of the file from 0, of the line from 1, uncompressed offset."""

  file: int = 0
  line: int = 1
  byte: int = 0


START = Place()


def read_files(
  files: Sequence[Path], start: Place = START, on_read: Callable[[int], None] = lambda disk_bytes: None
) -> Iterator[Block]:
  """Yields the blocks of all files in order.

  Args:
    files: as `find_files` gives them.
    start: where to begin; where a block ended.
    on_read: called with the bytes read so far, as they lie on the disk, before each block.

  Raises:
    UserError: if a file cannot be opened, is damaged, or ends before its compressed data do.
  """
  before = sum(file.stat().st_size for file in files[: start.file])
  line, byte = start.line, start.byte
  for file in files[start.file :]:
    yield from _read_file(file, line, byte, lambda disk_bytes, before=before: on_read(before + disk_bytes))
    before += file.stat().st_size
    line, byte = 1, 0


def _read_file(file: Path, line: int, byte: int, on_read: Callable[[int], None]) -> Iterator[Block]:
  at = byte
  try:
    with file.open('rb') as raw, _decompress(file, raw) as handle:
      handle.seek(byte)
      blocks = _line_blocks if '.jsonl' in file.suffixes else _text_blocks
      for block in blocks(str(file), handle, line, byte):
        at = block.end[1]
        on_read(raw.tell())
        yield block
  except (EOFError, lzma.LZMAError, zlib.error, gzip.BadGzipFile) as error:
    raise UserError(f"'{file}' is damaged or cut short: {error} (after byte {at} of its uncompressed text)") from error
  except OSError as error:
    raise UserError(f"'{file}' cannot be read: {error.strerror or error}") from error


def _decompress(file: Path, raw: BinaryIO) -> BinaryIO:
  if file.suffix == '.gz':
    return gzip.GzipFile(fileobj=raw)
  if file.suffix == '.xz':
    return lzma.LZMAFile(raw)
  return raw


def _line_blocks(file: str, handle: BinaryIO, line: int, byte: int) -> Iterator[Block]:
  """Ends a block at the last line end before each multiple of BLOCK_BYTES, wherever reading began."""
  rest = b''
  for chunk in _chunks(handle):
    cut = chunk.rfind(b'\n') + 1
    if len(rest) > LONGEST_LINE_BYTES:
      after, chunk = _skip_line(handle, chunk)
      block = Block(file, line, byte, b'', len(rest) + after)
      line, byte = block.end
      yield block
      rest, cut = b'', chunk.rfind(b'\n') + 1
    rest += chunk[:cut]
    if cut:
      block = Block(file, line, byte, rest)
      line, byte = block.end
      yield block
      rest = b''
    rest += chunk[cut:]
  if rest or not byte:  # an empty file gives one empty block
    yield Block(file, line, byte, rest)


def _chunks(handle: BinaryIO) -> Iterator[bytes]:
  while chunk := handle.read(BLOCK_BYTES - handle.tell() % BLOCK_BYTES):
    yield chunk


def _skip_line(handle: BinaryIO, chunk: bytes) -> tuple[int, bytes]:
  """Passes over the rest of an overlong line, which begins with `chunk`.

  Returns:
    How many bytes it was, and what was read after it.
  """
  size = 0
  while chunk:
    cut = chunk.find(b'\n') + 1
    if cut:
      return size + cut, chunk[cut:]
    size += len(chunk)
    chunk = handle.read(BLOCK_BYTES)
  return size, b''


def _text_blocks(file: str, handle: BinaryIO, line: int, byte: int) -> Iterator[Block]:
  data = b''
  while chunk := handle.read(BLOCK_BYTES):
    data += chunk
    while len(data) > TEXT_DOCUMENT_BYTES:
      cut = _document_end(data)
      block = Block(file, line, byte, data[:cut])
      data = data[cut:]
      line, byte = block.end
      yield block
  if data or not byte:
    yield Block(file, line, byte, data)


def _document_end(data: bytes) -> int:
  """Returns where to cut: after the last paragraph end (else line end, else space) in the second half of the limit."""
  for end in (b'\n\n', b'\r\n\r\n', b'\n', b' '):
    at = data.rfind(end, TEXT_DOCUMENT_BYTES // 2, TEXT_DOCUMENT_BYTES)
    if at >= 0:
      return at + len(end)
  at = TEXT_DOCUMENT_BYTES
  while at > TEXT_DOCUMENT_BYTES - 4 and data[at] & 0xC0 == 0x80:  # never inside a UTF-8 character
    at -= 1
  return at
