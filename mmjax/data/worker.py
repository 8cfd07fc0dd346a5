"""Tokenizes blocks of text in other processes.

A worker is `python -m mmjax.data.worker`, fed through a pipe. It is no `multiprocessing.Process`: those run the
caller's main script again (which may import JAX, or lack a __main__ guard), and a fork of a process that runs JAX can
deadlock. A worker ends when its pipe closes, so none outlives its parent, however that dies.
"""

import collections
import contextlib
import hashlib
import json
import os
import queue
import signal
import subprocess
import sys
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection, Pipe
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mmjax.data.blocks import Block
from mmjax.data.formats import BadLine, parse_block
from mmjax.data.tokenizer import Tokenizer, load_tokenizer
from mmjax.errors import UserError

BLOCKS_PER_WORKER = 3  # in flight: keeps workers busy while the parent waits for the oldest


class TokenBlock(NamedTuple):
  """A tokenized block: its documents one after the other, each ending in EOS.

  Attributes:
    tokens: uint16 or uint32 (sum(length),).
    length: int64 (documents,), tokens with EOS.
    text_bytes: int64 (documents,), UTF-8.
    held_out: bool (documents,).
    more_bytes: int64 (2, X), which tokens stand for more bytes of the text than their piece has, and how many more.
    lines, empty: how many there were, and how many held no text.
    inexact: documents that do not decode to themselves.
    bad: lines that could not be read.
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

  def only(self, document: np.ndarray) -> 'TokenBlock':
    """Returns the block with some of its documents alone, given by `document`, bool (documents,)."""
    if document.all():
      return self
    token = np.repeat(document, self.length)
    at_X, more_X = self.more_bytes[:, token[self.more_bytes[0]]]
    return self._replace(
      tokens=self.tokens[token],
      length=self.length[document],
      text_bytes=self.text_bytes[document],
      held_out=self.held_out[document],
      more_bytes=np.stack([np.cumsum(token)[at_X] - 1, more_X]),
    )


def token_dtype(vocab_size: int) -> np.dtype:
  """Returns the type that token ids are stored in, little-endian."""
  return np.dtype('<u2' if vocab_size <= 2**16 else '<u4')


def is_held_out(text_utf8: bytes, share: float, one: str = '') -> bool:
  """Tells whether a document is held out, as about `share` of all are, in [0, 1); or as the one with this sha256 is.

  Its text alone decides, so that copies of it fall on the same side.
  """
  digest = hashlib.sha256(text_utf8)
  return digest.hexdigest() == one if one else int.from_bytes(digest.digest()[:8], 'big') < share * 2**64


def tokenize_block(block: Block, tokenizer: Tokenizer, text_key: str, held_out: tuple[float, str]) -> TokenBlock:
  """Reads and tokenizes the documents of a block, and marks those that `is_held_out(text, *held_out)`."""
  parsed = parse_block(block, text_key)
  dtype = token_dtype(tokenizer.vocab_size)
  parts, length, text_bytes, is_out, more_bytes = [np.empty(0, dtype)], [], [], [], [np.empty((2, 0), np.int64)]
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
    is_out.append(is_held_out(raw, *held_out))
    inexact += not exact
  sizes = np.array(length, np.int64), np.array(text_bytes, np.int64), np.array(is_out, bool)
  more_bytes_2X = np.concatenate(more_bytes, axis=1)
  return TokenBlock(np.concatenate(parts), *sizes, more_bytes_2X, parsed.lines, parsed.empty, inexact, parsed.bad)


def tokenize_blocks(
  blocks: Iterable[Block], tokenizer: Tokenizer, text_key: str, held_out: tuple[float, str], workers: int
) -> Iterator[tuple[Block, TokenBlock]]:
  """Tokenizes blocks in `workers` other processes and yields them in order, see `tokenize_block`.

  Few are in flight, so memory is bounded. The processes read the tokenizer from its file, and end when the generator is
  closed.

  Raises:
    UserError: if one of them died.
  """
  settings = {'tokenizer': str(tokenizer.path), 'text_key': text_key, 'held_out': held_out}
  dtype = token_dtype(tokenizer.vocab_size)
  pending = collections.deque()
  idle: queue.SimpleQueue[_Worker] = queue.SimpleQueue()

  def ask(block: Block) -> tuple[Block, TokenBlock]:
    worker = idle.get()  # there are as many threads as workers
    try:
      return block, worker.ask(block, dtype)
    finally:
      idle.put(worker)

  with contextlib.ExitStack() as ends:  # from the last to the first: nothing is in them that anybody still waits for
    threads = ends.enter_context(ThreadPoolExecutor(workers, thread_name_prefix='tokenize'))
    for _ in range(workers):
      idle.put(worker := _Worker(settings))
      ends.callback(worker.close)
    ends.callback(threads.shutdown, wait=False, cancel_futures=True)
    for block in blocks:
      pending.append(threads.submit(ask, block))
      if len(pending) >= BLOCKS_PER_WORKER * workers:
        yield pending.popleft().result()
    while pending:
      yield pending.popleft().result()


class _Worker:
  """The parent's side of a worker: a thread at a time sends it one block and waits for the answer."""

  def __init__(self, settings: dict[str, Any]):
    self._pipe, other_end = Pipe()
    paths = [str(Path(__file__).resolve().parents[2]), *filter(None, [os.environ.get('PYTHONPATH')])]
    environment = os.environ | {'PYTHONPATH': os.pathsep.join(paths), 'OPENBLAS_NUM_THREADS': '1'}
    command = [sys.executable, '-m', 'mmjax.data.worker', str(other_end.fileno())]
    with other_end:
      fds = {'stdin': subprocess.DEVNULL, 'stdout': 2, 'pass_fds': [other_end.fileno()]}  # 2: stderr
      self.process = subprocess.Popen(command, env=environment, **fds)
    self._pipe.send_bytes(json.dumps(settings).encode())

  def ask(self, block: Block, dtype: np.dtype) -> TokenBlock:
    try:
      self._pipe.send_bytes(json.dumps([block.file, block.line, block.byte, block.too_long]).encode())
      self._pipe.send_bytes(block.data)
      counts, tokens, length, text_bytes, held_out, more_bytes = (self._pipe.recv_bytes() for _ in range(6))
    except (OSError, EOFError):
      raise UserError(
        f'a tokenizer process ended with code {self.process.wait()} in {block.file}, from line {block.line} on '
        '(-9 usually means too little memory: set --config.data.workers=1; prepare: --workers 1)'
      ) from None
    lines, empty, inexact, bad = json.loads(counts)
    sizes = np.frombuffer(length, np.int64), np.frombuffer(text_bytes, np.int64), np.frombuffer(held_out, bool)
    more_bytes_2X, bad = np.frombuffer(more_bytes, np.int64).reshape(2, -1), [BadLine(*line) for line in bad]
    return TokenBlock(np.frombuffer(tokens, dtype), *sizes, more_bytes_2X, lines, empty, inexact, bad)

  def close(self) -> None:
    self.process.kill()
    self.process.wait()


def main() -> None:
  """Serves blocks from the pipe that the first argument names until it closes."""
  signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent decides
  pipe = Connection(int(sys.argv[1]))

  def receive() -> bytes:
    try:
      return pipe.recv_bytes()
    except (EOFError, OSError):  # the parent is gone, perhaps in the middle of a message
      sys.exit()

  settings = json.loads(receive())
  tokenizer = load_tokenizer(settings['tokenizer'])
  with contextlib.suppress(ConnectionError):  # also gone
    while True:
      file, line, byte, too_long = json.loads(receive())
      block = Block(file, line, byte, receive(), too_long)
      done = tokenize_block(block, tokenizer, settings['text_key'], settings['held_out'])
      pipe.send_bytes(json.dumps([done.lines, done.empty, done.inexact, done.bad]).encode())
      for array in done[:5]:
        pipe.send_bytes(array.tobytes())


if __name__ == '__main__':
  main()
