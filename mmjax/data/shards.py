"""Writes token shards, so that whatever stops it, the next start goes on after the last whole shard."""

import contextlib
import hashlib
import io
import json
import os
from pathlib import Path
from typing import Any

import numpy as np

from mmjax.console import Progress
from mmjax.data.index import shard_files
from mmjax.data.plan import Plan
from mmjax.data.reader import START, Meter, Place, Tally, read_files
from mmjax.data.tokenizer import Tokenizer
from mmjax.data.worker import TokenBlock, tokenize_blocks
from mmjax.files import check_room, flush_directory, sha256_of, storage_errors, write_file, write_json

SHARD_TOKENS = 2**24  # a shard ends with the block that fills it: 32 MB of uint16, seconds of work to lose
STATE = 'progress.json'


class ShardWriter:
  """Writes one shard: tokens as they come, offsets and hashes at the end.

  Raises:
    StorageError: if the disk has no room for it.
  """

  def __init__(self, directory: Path, name: str, dtype: np.dtype):
    self._directory, self._name = directory, name
    self._path = directory / f'{name}.bin'
    check_room(self._path, SHARD_TOKENS * dtype.itemsize)
    with storage_errors(self._path):
      self._path.unlink(missing_ok=True)  # and a new file, so that nothing is written through a link
      self._handle = self._path.open('xb')
    self._sha256 = hashlib.sha256()
    self._lengths: list[np.ndarray] = []
    self._more_bytes: list[np.ndarray] = []
    self.tokens = self._text_bytes = 0

  def add(self, block: TokenBlock) -> None:
    """Appends whole documents."""
    self._more_bytes.append(block.more_bytes + np.array([[self.tokens], [0]]))
    with storage_errors(self._path):
      self._handle.write(block.tokens)
    self._sha256.update(block.tokens)
    self._lengths.append(block.length)
    self.tokens += len(block.tokens)
    self._text_bytes += int(block.text_bytes.sum())

  def finish(self) -> dict[str, Any]:
    """Flushes everything to the disk and returns the shard's entry in the index."""
    with storage_errors(self._path):
      self._handle.flush()
      os.fsync(self._handle.fileno())
      self._handle.close()
    offsets = np.concatenate([np.zeros(1, np.int64), *self._lengths]).cumsum()
    return {
      'file': self._path.name,
      'sha256': self._sha256.hexdigest(),
      **self._write_array('offsets', offsets),
      **self._write_array('bytes', np.concatenate(self._more_bytes, axis=1)),
      'tokens': self.tokens,
      'documents': len(offsets) - 1,
      'text_bytes': self._text_bytes,
    }

  def _write_array(self, kind: str, array: np.ndarray) -> dict[str, str]:
    """Writes an array beside the shard and returns what the index says of it."""
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    name = f'{self._name}.{kind}.npy'
    write_file(self._directory / name, buffer.getvalue())
    return {f'{kind}_file': name, f'{kind}_sha256': hashlib.sha256(buffer.getvalue()).hexdigest()}

  def abandon(self) -> None:
    """Closes an unfinished shard; the next start writes over it."""
    with contextlib.suppress(OSError):  # what is still buffered may not fit either
      self._handle.close()


class ShardBuilder:
  """Turns the files of a plan into shards in its directory, split by split.

  After each round of whole shards, progress.json says what is done and where in the input it ended.
  """

  def __init__(self, plan: Plan, tokenizer: Tokenizer, held_out: tuple[float, str]):
    self._directory, self._settings, self._tokenizer = plan.directory, plan.settings, tokenizer
    self._held_out = held_out  # see is_held_out
    self._passes = [(split, files) for split, files in plan.files.items() if files]
    self._writers: dict[str, ShardWriter] = {}
    self.state = self._read_state() or {
      'tokenizer_sha256': tokenizer.sha256,
      'files': self._names(),
      'shards': {'train': [], 'valid': []},
      'tallies': {split: {'files': {}, 'examples': {}} for split, _ in self._passes},
      'inexact': 0,
      'pass': 0,
      'place': START,
    }

  @property
  def resumed(self) -> bool:
    """Whether an earlier start left whole shards."""
    return any(self.state['shards'].values())

  def _names(self) -> list[list[str]]:
    return [[str(file) for file in files] for _, files in self._passes]

  def _read_state(self) -> dict[str, Any] | None:
    """Returns what an earlier start left, if its shards are whole and its tokenizer and the files' names are these."""
    try:
      state = json.loads((self._directory / STATE).read_bytes())
      files = [file for shards in state['shards'].values() for shard in shards for file in shard_files(shard)]
      whole = all(sha256_of(self._directory / name) == sha256 for name, sha256 in files)
      same = (state['tokenizer_sha256'], state['files']) == (self._tokenizer.sha256, self._names())
      return state if whole and same else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
      return None  # not there, or damaged: everything is made again

  def build(self, workers: int, progress: Progress) -> None:
    """Reads and tokenizes everything that is not done yet; leaves the result in `state`.

    Raises:
      UserError: for bad input.
      StorageError: if a shard cannot be written.
    """
    try:
      for number in range(self.state['pass'], len(self._passes)):
        self._build_pass(*self._passes[number], workers, progress)
        self._finish_shards({'pass': number + 1, 'place': START})
    finally:
      for writer in self._writers.values():
        writer.abandon()

  def _build_pass(self, split: str, files: list[Path], workers: int, progress: Progress) -> None:
    settings, names = self._settings, [str(file) for file in files]
    tally = Tally(settings['on_bad_line'], **self.state['tallies'][split])
    meter = Meter(f'tokenizing {split}', files, progress)
    blocks = read_files(files, Place(*self.state['place']), meter)
    tokenized = tokenize_blocks(blocks, self._tokenizer, settings['text_key'], self._held_out, workers)
    with contextlib.closing(tokenized):  # ends the processes at once, also when a line is bad
      for block, done in tokenized:
        tally.add(block.file, done.lines, done.empty, done.bad)
        self.state['inexact'] += done.inexact
        self._add(split, done)
        meter.add(int(done.text_bytes.sum()), len(done.tokens))
        if any(writer.tokens >= SHARD_TOKENS for writer in self._writers.values()):
          self._finish_shards({'place': Place(names.index(block.file), *block.end)})
    tally.end()

  def _add(self, split: str, done: TokenBlock) -> None:
    for name, document in ((split, ~done.held_out), ('valid', done.held_out)):
      if document.any():
        if name not in self._writers:
          number = len(self.state['shards'][name])
          self._writers[name] = ShardWriter(self._directory, f'{name}-{number:05d}', done.tokens.dtype)
        self._writers[name].add(done.only(document))

  def _finish_shards(self, position: dict[str, Any]) -> None:
    """Makes the open shards whole, then notes them and the position in the input that they reach."""
    for split, writer in self._writers.items():
      self.state['shards'][split].append(writer.finish())
    self._writers = {}
    with storage_errors(self._directory):
      flush_directory(self._directory)
    self.state |= position
    write_json(self._directory / STATE, self.state)
