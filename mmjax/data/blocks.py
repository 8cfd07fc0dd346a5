"""Cuts unpacked text into blocks, in bounded memory, whatever its length.

A block is about a megabyte of whole lines with their place in the file; mmjax.data.formats makes documents of it. The
two steps are apart so that several processes can do the second.

A .txt file is one document, kept byte for byte; one longer than `TEXT_DOCUMENT_BYTES` becomes several, cut at the last
paragraph end before that limit (else line end, else space, else character).
"""

from collections.abc import Iterator
from typing import BinaryIO, NamedTuple

BLOCK_BYTES = 2**20  # read at once; a block of lines is about this long
LONGEST_LINE_BYTES = 8 * 2**20  # a longer line is passed over without being held in memory
TEXT_DOCUMENT_BYTES = 64 * 2**10  # a longer .txt file is cut into documents of at most this


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


def cut_lines(file: str, handle: BinaryIO, line: int, byte: int) -> Iterator[Block]:
  """Yields blocks that end at the last line end before each multiple of BLOCK_BYTES, wherever reading began."""
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


def cut_text(file: str, handle: BinaryIO, line: int, byte: int) -> Iterator[Block]:
  """Yields the documents of a plain text, the first from where `handle` stands, at `line` and `byte` of the file."""
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
