"""Unpacks .xz files of any number of streams, and refuses what is no stream behind the first.

Python's own lzma.LZMAFile takes anything behind the first stream that does not begin one for the end of the file, also
a second stream that is damaged, and padding between streams.
Source: The .xz File Format 1.2.1, sections 2.1 and 2.2, https://tukaani.org/xz/xz-file-format.txt.
"""

import io
import lzma
from typing import BinaryIO

PACKED_BYTES = 2**16  # read at once


def open_xz(packed: BinaryIO) -> io.BufferedReader:
  """Returns the unpacked bytes of a file, to be read forwards.

  Reading raises EOFError if the file ends within a stream, and lzma.LZMAError if it is damaged.
  """
  return io.BufferedReader(_Unpacked(packed))


class _Unpacked(io.RawIOBase):
  def __init__(self, packed: BinaryIO):
    self._packed, self._at = packed, 0
    self._stream, self._next = lzma.LZMADecompressor(), b''

  def readable(self) -> bool:
    return True

  def seekable(self) -> bool:
    return True

  def tell(self) -> int:
    return self._at

  def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
    if whence != io.SEEK_SET or offset < self._at:
      raise io.UnsupportedOperation(f'seek({offset}, {whence}) at {self._at}: it goes forward only')
    while self._at < offset and self.read(min(offset - self._at, PACKED_BYTES)):
      pass
    return self._at

  def readinto(self, buffer: memoryview) -> int:
    data = b''
    while not data:
      if self._stream.eof and not self._has_another():
        return 0
      packed = b''
      if self._stream.needs_input:
        packed, self._next = self._next or self._packed.read(PACKED_BYTES), b''
        if not packed:
          raise EOFError('Compressed file ended before the end-of-stream marker was reached')
      data = self._stream.decompress(packed, len(buffer))
    buffer[: len(data)] = data
    self._at += len(data)
    return len(data)

  def _has_another(self) -> bool:
    """Goes on to the next stream, if there is one; between streams stand zeros, a multiple of four."""
    zeros, packed = 0, self._stream.unused_data
    while not (rest := packed.lstrip(b'\0')):
      zeros += len(packed)
      if not (packed := self._packed.read(PACKED_BYTES)):
        break
    if (zeros + len(packed) - len(rest)) % 4:
      raise lzma.LZMAError('what stands behind a stream is neither another one nor padding')
    if rest:
      self._stream, self._next = lzma.LZMADecompressor(), rest
    return bool(rest)
