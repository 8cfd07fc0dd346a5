"""Cuts unpacked text into blocks, in bounded memory, whatever its length.

A block is about a megabyte of whole lines with their place in the file; mmjax.data.formats makes documents of it. The
two steps are apart so that several processes can do the second.

A plain text is one document, kept byte for byte; one longer than `TEXT_DOCUMENT_BYTES` becomes several, cut at the last
paragraph end before that limit (else line end, else space, else character). One of these that is blank is left out.
"""

from collections.abc import Iterator
from typing import BinaryIO, NamedTuple

BLOCK_BYTES = 2**20  # read at once; a block of lines is about this long
LONGEST_LINE_BYTES = 8 * 2**20  # a longer line is passed over without being held in memory
TEXT_DOCUMENT_BYTES = 64 * 2**10  # a longer plain text is cut into documents of at most this


class Block(NamedTuple):
  """A stretch of one file: whole lines, or one document.

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


def cut_lines(handle: BinaryIO) -> Iterator[bytes | int]:
  """Yields whole lines, up to the last line end before each multiple of BLOCK_BYTES, wherever reading began.

  Of a line that is too long, and is passed over, it yields the size.
  """
  rest = b''
  while chunk := handle.read(BLOCK_BYTES - handle.tell() % BLOCK_BYTES):
    if len(rest) > LONGEST_LINE_BYTES:
      size = len(rest)
      while chunk and not (cut := chunk.find(b'\n') + 1):
        size += len(chunk)
        chunk = handle.read(BLOCK_BYTES)
      yield size + cut
      rest, chunk = b'', chunk[cut:]
    cut = chunk.rfind(b'\n') + 1
    if cut:
      yield rest + chunk[:cut]
      rest = b''
    rest += chunk[cut:]
  if rest:
    yield rest


def cut_text(handle: BinaryIO) -> Iterator[bytes]:
  """Yields the documents of a plain text, from where `handle` stands."""
  data = b''
  while chunk := handle.read(BLOCK_BYTES):
    data += chunk
    while len(data) > TEXT_DOCUMENT_BYTES:
      cut = _document_end(data)
      yield data[:cut]
      data = data[cut:]
  if data:
    yield data


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
