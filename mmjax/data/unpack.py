"""Unpacks files forwards, in bounded memory: .xz and .zst to the bytes that were packed, .parquet to lines of JSON.

An .xz may have any number of streams, and what is no stream behind the first is refused. Python's own lzma.LZMAFile
takes anything there that does not begin one for the end of the file, also a second stream that is damaged, and padding
between streams. Source: The .xz File Format 1.2.1, sections 2.1 and 2.2, https://tukaani.org/xz/xz-file-format.txt.

A row of a .parquet is a line: an object with the row's strings. Of other values only the kind is there, so that a
text_key that names one is refused as in a .jsonl. The number of a line is that of its row, from 1.
"""

import importlib
import io
import json
import lzma
import sys
from collections.abc import Iterator
from typing import Any, BinaryIO

READ_BYTES = 2**16  # packed, read at once
UNPACKED_BYTES = 2**20  # made at once
MOST_ROWS = 256  # of a .parquet, unpacked at once; fewer where they are long
ZSTD = 'compression.zstd' if sys.version_info >= (3, 14) else 'backports.zstd'  # the same code


class NotUnpacked(Exception):
  """Why a file does not unpack."""


def open_xz(packed: BinaryIO) -> io.BufferedReader:
  """Returns the unpacked bytes of a file, to be read forwards.

  Reading raises EOFError if the file ends within a stream, and lzma.LZMAError if it is damaged.
  """
  return io.BufferedReader(_Forwards(_unpack_xz(packed)))


def open_zst(packed: BinaryIO) -> io.BufferedReader:
  """Does so for a .zst of any number of frames; reading raises EOFError or NotUnpacked. Needs the package ZSTD."""
  return io.BufferedReader(_Forwards(_unpack_zst(packed)))


def open_parquet(packed: BinaryIO) -> io.BufferedReader:
  """Returns the rows of a .parquet as lines of JSON, to be read forwards; reading raises NotUnpacked. Needs pyarrow."""
  return io.BufferedReader(_Forwards(_lines_of_parquet(packed)))


class _Forwards(io.RawIOBase):
  """A file of chunks, made as they are read."""

  def __init__(self, chunks: Iterator[bytes]):
    self._chunks, self._rest, self._at = chunks, memoryview(b''), 0

  def readable(self) -> bool:
    return True

  def seekable(self) -> bool:
    return True

  def tell(self) -> int:
    return self._at

  def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
    if whence != io.SEEK_SET or offset < self._at:
      raise io.UnsupportedOperation(f'seek({offset}, {whence}) at {self._at}: it goes forward only')
    while self._at < offset and self.read(min(offset - self._at, UNPACKED_BYTES)):
      pass
    return self._at

  def readinto(self, buffer: memoryview) -> int:
    while not self._rest:
      if (chunk := next(self._chunks, None)) is None:
        return 0
      self._rest = memoryview(chunk)
    size = min(len(buffer), len(self._rest))
    buffer[:size], self._rest = self._rest[:size], self._rest[size:]
    self._at += size
    return size


def _unpack_xz(packed: BinaryIO) -> Iterator[bytes]:
  begins, stream = b'', None
  while stream is None or begins:
    stream = lzma.LZMADecompressor()
    while not stream.eof:
      part = b''
      if stream.needs_input:
        part, begins = begins or packed.read(READ_BYTES), b''
        if not part:
          raise EOFError('Compressed file ended before the end-of-stream marker was reached')
      yield stream.decompress(part, UNPACKED_BYTES)
    begins = _next_stream(packed, stream.unused_data)


def _next_stream(packed: BinaryIO, part: bytes) -> bytes:
  """Returns bytes that begin with the next stream, b'' without one; between streams are zeros, a multiple of four."""
  zeros = 0
  while not (rest := part.lstrip(b'\0')):
    zeros += len(part)
    if not (part := packed.read(READ_BYTES)):
      break
  if (zeros + len(part) - len(rest)) % 4:
    raise lzma.LZMAError('what stands behind a stream is neither another one nor padding')
  return rest


def _unpack_zst(packed: BinaryIO) -> Iterator[bytes]:
  zstd = importlib.import_module(ZSTD)
  try:
    # As for zstd --long=31, which takes as much memory as the file says, up to 2 GiB; by default it is 128 MiB.
    with zstd.ZstdFile(packed, options={zstd.DecompressionParameter.window_log_max: 31}) as file:
      while chunk := file.read1(UNPACKED_BYTES):
        yield chunk
  except zstd.ZstdError as error:
    raise NotUnpacked(str(error)) from error


def _lines_of_parquet(packed: BinaryIO) -> Iterator[bytes]:
  import pyarrow
  from pyarrow import parquet

  try:
    file = parquet.ParquetFile(packed, buffer_size=UNPACKED_BYTES, pre_buffer=False)
    types = {field.name: field.type for field in file.schema_arrow}
    texts = [name for name, type_ in types.items() if _is_text(type_)]
    others = {name: _stand_in(type_) for name, type_ in types.items() if name not in texts}
    for batch in file.iter_batches(_rows_at_once(file.metadata), columns=texts, use_threads=False):
      columns = [_as_bytes(batch.column(name)) for name in texts]
      rows = zip(*columns, strict=True) if columns else [()] * batch.num_rows
      for row in rows:
        yield _line(dict(zip(texts, row, strict=True)), others)
  except (pyarrow.ArrowException, OSError, KeyError) as error:  # KeyError: two columns of one name
    if isinstance(error, OSError) and error.errno is not None:  # not of its content
      raise
    raise NotUnpacked(' '.join(str(error).split())) from error


def _rows_at_once(metadata: Any) -> int:
  """Returns how many rows of a .parquet have about UNPACKED_BYTES."""
  size = sum(metadata.row_group(number).total_byte_size for number in range(metadata.num_row_groups))
  return max(1, min(MOST_ROWS, UNPACKED_BYTES * metadata.num_rows // max(size, 1)))


def _is_text(type_: Any) -> bool:
  from pyarrow import types

  if types.is_dictionary(type_):
    type_ = type_.value_type
  return types.is_string(type_) or types.is_large_string(type_) or types.is_string_view(type_)


def _stand_in(type_: Any) -> Any:
  """Returns a value of JSON for one that is no text: null, a list, a boolean or a number as that is, else an object."""
  from pyarrow import types

  if types.is_null(type_):
    return None
  if types.is_list(type_) or types.is_large_list(type_) or types.is_fixed_size_list(type_):
    return []
  if types.is_boolean(type_):
    return False
  is_number = types.is_integer(type_) or types.is_floating(type_) or types.is_decimal(type_)
  return 0 if is_number else {}


def _as_bytes(column: Any) -> list[bytes | None]:
  """Returns strings as they lie in the file, which may not be UTF-8."""
  import pyarrow

  if pyarrow.types.is_dictionary(column.type):
    column = column.dictionary_decode()
  return column.cast(pyarrow.large_string()).cast(pyarrow.large_binary()).to_pylist()


def _line(texts: dict[str, bytes | None], others: dict[str, Any]) -> bytes:
  """Returns a line of JSON; bytes that are not UTF-8 stay what they are, for who reads it to refuse."""
  values = {name: raw if raw is None else raw.decode('utf-8', 'surrogateescape') for name, raw in texts.items()}
  return json.dumps(values | others, ensure_ascii=False).encode('utf-8', 'surrogateescape') + b'\n'
