"""Tokenizes blocks of text in other processes.

A worker is `python -m mmjax.data.worker`, fed over pipes with length-prefixed frames. It is no `multiprocessing` child:
those run the caller's main script again (which may import JAX, or lack a __main__ guard), and a fork of a process that
runs JAX can deadlock. A worker ends when its pipe closes, so none outlives its parent, however that dies.
"""

import collections
import contextlib
import json
import os
import queue
import signal
import struct
import subprocess
import sys
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from mmjax.data.blocks import Block
from mmjax.data.formats import BadLine, parse_block
from mmjax.data.split import is_held_out
from mmjax.data.tokenizer import Tokenizer, load_tokenizer
from mmjax.errors import UserError

BLOCKS_PER_WORKER = 3  # in flight: keeps workers busy while the parent waits for the oldest


class TokenBlock(NamedTuple):
  """A tokenized block: its documents one after the other, each ending in EOS.

  tokens: uint16 or uint32[sum(length)].   length: int64[documents], tokens with EOS.   text_bytes: int64[documents],
  UTF-8.   held_out: bool[documents].   more_bytes: int64[2, X], which tokens stand for more bytes of the text than
  their piece has, and how many more.   inexact: documents that do not decode to themselves.
  """

  tokens: np.ndarray
  length: np.ndarray
  text_bytes: np.ndarray
  held_out: np.ndarray
  more_bytes: np.ndarray
  lines: int
  empty: int
  inexact: int
  bad: list[BadLine]


def token_dtype(vocab_size: int) -> np.dtype:
  """Returns the type that token ids are stored in, little-endian."""
  return np.dtype('<u2' if vocab_size <= 2**16 else '<u4')


def tokenize_block(block: Block, tokenizer: Tokenizer, text_key: str, held_out_share: float) -> TokenBlock:
  """Reads and tokenizes the documents of a block.

  Args:
    block: a stretch of a file.
    tokenizer: the tokenizer.
    text_key: key of the text in a jsonl line.
    held_out_share: share of the documents to mark as held out, 0 for none.
  """
  parsed = parse_block(block, text_key)
  dtype = token_dtype(tokenizer.vocab_size)
  parts, length, text_bytes, held_out, more_bytes = [np.empty(0, dtype)], [], [], [], [np.empty((2, 0), np.int64)]
  inexact = end = 0
  for text in parsed.documents:
    raw, start, exact = text.encode(), end, True
    for part in tokenizer.encode_slices(text):
      parts.append(np.array(part.ids, dtype))
      at_X = np.flatnonzero(part.more_bytes)
      more_bytes.append(np.stack([end + at_X, part.more_bytes[at_X]]))
      end += len(part.ids)
      exact &= part.exact
    parts.append(np.array([tokenizer.eos_id], dtype))
    end += 1
    length.append(end - start)
    text_bytes.append(len(raw))
    held_out.append(is_held_out(raw, held_out_share))
    inexact += not exact
  return TokenBlock(
    np.concatenate(parts),
    np.array(length, np.int64),
    np.array(text_bytes, np.int64),
    np.array(held_out, bool),
    np.concatenate(more_bytes, axis=1),
    parsed.lines,
    parsed.empty,
    inexact,
    parsed.bad,
  )


def tokenize_blocks(
  blocks: Iterable[Block], tokenizer: Tokenizer, text_key: str, held_out_share: float, workers: int
) -> Iterator[tuple[Block, TokenBlock]]:
  """Tokenizes blocks in other processes and yields them in order; few are in flight, so memory is bounded.

  Args:
    blocks: what to tokenize.
    tokenizer: read anew from its file in each process.
    text_key: key of the text in a jsonl line.
    held_out_share: share of the documents to mark as held out, 0 for none.
    workers: number of processes. They end when the generator is closed.

  Raises:
    UserError: if a worker process died.
  """
  settings = {'tokenizer': str(tokenizer.path), 'text_key': text_key, 'held_out_share': held_out_share}
  pending: collections.deque[tuple[Block, Future]] = collections.deque()
  with contextlib.closing(_Pool(settings, workers, token_dtype(tokenizer.vocab_size))) as pool:
    for block in blocks:
      pending.append((block, pool.submit(block)))
      if len(pending) >= BLOCKS_PER_WORKER * workers:
        first, future = pending.popleft()
        yield first, future.result()
    while pending:
      first, future = pending.popleft()
      yield first, future.result()


class _Pool:
  """As many threads as processes; a thread lends an idle process, feeds it one block and waits for the answer."""

  def __init__(self, settings: dict[str, Any], workers: int, dtype: np.dtype):
    self._dtype = dtype
    self._processes = [_start_worker(settings) for _ in range(workers)]
    self._idle: queue.SimpleQueue[subprocess.Popen] = queue.SimpleQueue()
    for process in self._processes:
      self._idle.put(process)
    self._threads = ThreadPoolExecutor(workers, thread_name_prefix='tokenize')

  def submit(self, block: Block) -> Future:
    return self._threads.submit(self._ask, block)

  def _ask(self, block: Block) -> TokenBlock:
    process = self._idle.get()
    try:
      return _ask_worker(process, block, self._dtype)
    finally:
      self._idle.put(process)

  def close(self) -> None:
    self._threads.shutdown(wait=False, cancel_futures=True)
    for process in self._processes:
      process.kill()  # nothing is in it that anybody still waits for
    self._threads.shutdown(wait=True)
    for process in self._processes:
      process.communicate()


def _start_worker(settings: dict[str, Any]) -> subprocess.Popen:
  root = str(Path(__file__).resolve().parents[2])
  paths = [root, *filter(None, [os.environ.get('PYTHONPATH')])]
  environment = os.environ | {'PYTHONPATH': os.pathsep.join(paths), 'OPENBLAS_NUM_THREADS': '1'}
  command = [sys.executable, '-m', 'mmjax.data.worker']
  process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment)
  _write_frames(process.stdin, json.dumps(settings).encode())
  return process


def _ask_worker(process: subprocess.Popen, block: Block, dtype: np.dtype) -> TokenBlock:
  try:
    _write_frames(process.stdin, json.dumps([block.file, block.line, block.byte, block.too_long]).encode(), block.data)
    counts, tokens, length, text_bytes, held_out, more_bytes = (_read_frame(process.stdout) for _ in range(6))
  except (OSError, EOFError):
    raise UserError(
      f'a tokenizer process ended with code {process.wait()} in {block.file}, line {block.line} and following '
      '(-9 is mostly too little memory: set --config.data.workers=1; prepare: --workers 1)'
    ) from None
  lines, empty, inexact, bad = json.loads(counts)
  return TokenBlock(
    np.frombuffer(tokens, dtype),
    np.frombuffer(length, np.int64),
    np.frombuffer(text_bytes, np.int64),
    np.frombuffer(held_out, bool),
    np.frombuffer(more_bytes, np.int64).reshape(2, -1),
    lines,
    empty,
    inexact,
    [BadLine(*line) for line in bad],
  )


def _write_frames(handle: BinaryIO, *frames: bytes) -> None:
  for frame in frames:
    handle.write(struct.pack('<q', len(frame)))
    handle.write(frame)
  handle.flush()


def _read_frame(handle: BinaryIO) -> bytes:
  size = _read_exactly(handle, 8)
  return _read_exactly(handle, struct.unpack('<q', size)[0])


def _read_exactly(handle: BinaryIO, size: int) -> bytes:
  data = handle.read(size)
  if len(data) < size:
    raise EOFError
  return data


def main() -> None:
  """Serves blocks from stdin until it closes."""
  signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent decides
  signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # the parent is gone: no traceback
  source = sys.stdin.buffer
  sink = os.fdopen(os.dup(sys.stdout.fileno()), 'wb')
  os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # a stray print must not land among the frames
  settings = json.loads(_read_frame(source))
  tokenizer = load_tokenizer(settings['tokenizer'])
  while True:
    try:
      header = _read_frame(source)
    except EOFError:
      return
    file, line, byte, too_long = json.loads(header)
    block = Block(file, line, byte, _read_frame(source), too_long)
    done = tokenize_block(block, tokenizer, settings['text_key'], settings['held_out_share'])
    counts = json.dumps([done.lines, done.empty, done.inexact, done.bad]).encode()
    _write_frames(sink, counts, *(array.tobytes() for array in done[:5]))


if __name__ == '__main__':
  main()
