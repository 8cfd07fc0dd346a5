"""Cuts token shards into rows of T tokens and serves them in batches that depend on (seed, step) only.

Packed: the documents of a split are one stream, each ending in EOS; row i predicts stream[i*T : (i+1)*T] from the same
stream shifted right by one, so every token is a target exactly once. Padded: row d predicts the first T tokens of
document d from BOS and what precedes them; the rest of a long document is not used.
"""

import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from fractions import Fraction
from pathlib import Path
from typing import Any

import grain
import numpy as np

from mmjax.config import Config
from mmjax.data.index import counts_bytes, open_shards, verify
from mmjax.data.tokenizer import Tokenizer, load_tokenizer
from mmjax.errors import UserError

PADDING = -1  # the target where there is nothing to predict: no token, whatever the tokenizer
PREFETCHED_BATCHES = 4  # made ahead in one background thread
MOST_ROWS = 2**52  # that training may see: "without end", and exact as a float


class TokenSplit:
  """One split of a prepared directory, as rows. Nothing is read before it is asked for: shards are memory-mapped.

  Attributes:
    max_seq_len: T.
    layout: 'packed' or 'padded'.
    n_rows, n_tokens, n_documents, text_bytes: sizes, whatever the layout; tokens count an EOS for each document.
    vocab_size, bos_id, eos_id: those of the tokenizer. pad_id fills up inputs, where targets are PADDING.
    document_start: int64 (documents + 1,), where each document begins in the stream, and its end.
  """

  def __init__(self, directory: Path, index: dict, split: str, max_seq_len: int, layout: str, isolate_documents: bool):
    entry, tokenizer = index['splits'][split], index['tokenizer']
    self.split, self.directory = split, directory
    self.max_seq_len, self.layout, self.isolate_documents = max_seq_len, layout, isolate_documents
    self.n_tokens, self.n_documents, self.text_bytes = entry['tokens'], entry['documents'], entry['text_bytes']
    self.vocab_size = index['vocab_size']
    self.pad_id, self.bos_id, self.eos_id = tokenizer['pad_id'], tokenizer['bos_id'], tokenizer['eos_id']
    self._tokens, offsets = zip(*open_shards(directory, entry, index['dtype']), strict=True)
    self._shard_start = np.cumsum([0, *map(len, self._tokens)])
    starts = [start + part[:-1] for start, part in zip(self._shard_start, offsets, strict=False)]
    self.document_start = np.concatenate([*starts, self._shard_start[-1:]])
    self.n_rows = count_rows(entry, max_seq_len, layout)
    self.index = index

  @functools.cached_property
  def tokenizer(self) -> Tokenizer:
    """What made tokens of the text."""
    return load_tokenizer(self.directory / self.index['tokenizer']['file'])

  @functools.cached_property
  def scored_bytes(self) -> int:
    """UTF-8 bytes of the text that the targets of all rows stand for: all of it but what padded rows cut off.

    Raises:
      UserError: if text was cut off, and an earlier version did not count the bytes that this tokenizer changes.
    """
    length = np.diff(self.document_start)
    cut = np.flatnonzero(length > self.max_seq_len) if self.layout == 'padded' else ()
    if not len(cut):
      return self.text_bytes
    if not counts_bytes(self.index):
      raise UserError(
        f"'{self.directory}' was prepared by an earlier version, which did not count the bytes of cut documents "
        f'({len(cut)} at model.max_seq_len={self.max_seq_len}) of a tokenizer that changes text; prepare it again'
      )
    piece_bytes = self.tokenizer.bytes_per_token()
    parts = [np.zeros((2, 0), np.int64)]
    for shard, start in zip(self.index['splits'][self.split]['shards'], self._shard_start[:-1], strict=True):
      if 'bytes_file' in shard:
        parts.append(np.load(self.directory / shard['bytes_file'], allow_pickle=False) + [[start], [0]])
    position_X, more_X = np.concatenate(parts, axis=1)
    sums_X = np.concatenate([[0], np.cumsum(more_X)])
    left_out = 0
    for start, stop in zip(self.document_start[cut] + self.max_seq_len, self.document_start[cut + 1] - 1, strict=True):
      first, last = np.searchsorted(position_X, (start, stop))
      left_out += int(piece_bytes[self.stream(start, stop)].sum(dtype=np.int64) + sums_X[last] - sums_X[first])
    return self.text_bytes - left_out

  def cut_off(self) -> tuple[int, int]:
    """Returns how many documents the layout cuts, and how many of their tokens are therefore never read."""
    over = np.maximum(np.diff(self.document_start) - self.max_seq_len, 0) * (self.layout == 'padded')
    return int(np.count_nonzero(over)), int(over.sum())

  @property
  def read_tokens(self) -> int:
    """How many tokens its rows hold."""
    return self.n_tokens - self.cut_off()[1]

  def stream(self, start: int, stop: int) -> np.ndarray:
    """Returns int32 tokens start..stop of the split's stream, whatever shards they lie in."""
    first, last = np.searchsorted(self._shard_start, (start, stop - 1), 'right') - 1
    parts = [np.empty(0, np.int32)]
    for tokens, base in zip(self._tokens[first : last + 1], self._shard_start[first:], strict=False):
      parts.append(tokens[max(start - base, 0) : stop - base])
    return np.concatenate(parts).astype(np.int32)

  def spans(self) -> tuple[np.ndarray, np.ndarray]:
    """Returns where the targets of each row begin and end in the stream, int64 (rows,) each, ascending."""
    if self.layout == 'padded':
      start = self.document_start[:-1]
      return start, np.minimum(start + self.max_seq_len, self.document_start[1:])
    start = np.arange(self.n_rows) * self.max_seq_len
    return start, np.minimum(start + self.max_seq_len, self.n_tokens)

  def row(self, row_id: int) -> np.ndarray:
    """Returns the token that precedes a row and its targets without padding, int (X,), X at most T + 1."""
    if self.layout == 'padded':
      start, stop = self.document_start[row_id], self.document_start[row_id + 1]
      return np.append(self.bos_id, self.stream(start, min(stop, start + self.max_seq_len)))
    start, stop = row_id * self.max_seq_len, min((row_id + 1) * self.max_seq_len, self.n_tokens)
    return self.stream(start - 1, stop) if start else np.append(self.eos_id, self.stream(0, stop))

  def rows(self, row_ids: np.ndarray) -> dict[str, np.ndarray]:
    """Returns a batch.

    Args:
      row_ids: int (B,); -1 gives a row of padding.

    Returns:
      input, target, segment: int32 (B, T); target is PADDING where there is nothing to predict. segment numbers the
      documents of a row where isolate_documents is set, else it is 0. row_id: int64 (B,).
    """
    shape = (len(row_ids), self.max_seq_len)
    inputs, targets = np.full(shape, self.pad_id, np.int32), np.full(shape, PADDING, np.int32)
    segment = np.zeros(shape, np.int32)
    for at, row_id in enumerate(row_ids):
      if row_id >= 0:
        tokens = self.row(int(row_id))
        targets[at, : len(tokens) - 1] = tokens[1:]
        inputs[at, : len(tokens)] = tokens[: self.max_seq_len]
        if self.isolate_documents and self.layout == 'packed':  # the EOS before a document opens its segment
          places = int(row_id) * self.max_seq_len + np.arange(self.max_seq_len)
          segment[at] = np.searchsorted(self.document_start, places, 'right')
          segment[at] -= np.searchsorted(self.document_start, places[0])
    return {'input': inputs, 'target': targets, 'segment': segment, 'row_id': np.asarray(row_ids, np.int64)}


def row_settings(config: Config) -> dict[str, Any]:
  """Returns how a config cuts text into rows, as `open_split` takes it."""
  data = config.data
  return {'max_seq_len': config.model.max_seq_len, 'layout': data.layout, 'isolate_documents': data.isolate_documents}


def open_split(
  prepared_dir: str | Path, split: str, *, max_seq_len: int, layout: str, isolate_documents: bool
) -> TokenSplit:
  """Opens one split of a prepared directory, after checking its files against the index.

  Args:
    prepared_dir: as `prepare` returns it.
    split: 'train' or 'valid'.
    max_seq_len: T, tokens in a row.
    layout: 'packed' or 'padded'.
    isolate_documents: whether documents in a packed row get segments of their own.

  Raises:
    UserError: if the directory is not whole, or has no such split.
  """
  index = verify(prepared_dir)
  if split not in index['splits']:
    raise UserError(
      f"'{prepared_dir}' has no {split!r} documents; set --config.data.valid_files or a valid_fraction > 0"
    )
  return TokenSplit(Path(prepared_dir), index, split, max_seq_len, layout, isolate_documents)


def cut_remark(splits: Mapping[str, TokenSplit]) -> str:
  """Says how much text the layout cuts off of splits, which are called by what they are for; '' where it is none."""
  cut = {name: split.cut_off() for name, split in splits.items()}
  if not any(documents for documents, _ in cut.values()):
    return ''
  said = [
    f'{documents:,} of {splits[name].n_documents:,} {name} documents are cut, {tokens:,} of '
    f'{splits[name].n_tokens:,} tokens ({tokens / splits[name].n_tokens:.1%}) never read'
    for name, (documents, tokens) in cut.items()
  ]
  length = next(iter(splits.values())).max_seq_len
  return (
    f"data.layout='padded' takes the first model.max_seq_len={length} tokens of each document: {'; '.join(said)}; "
    "data.layout='packed' reads all"
  )


def train_batches(
  split: TokenSplit, *, global_batch_rows: int, seed: int, start_step: int = 0
) -> Iterator[dict[str, np.ndarray]]:
  """Yields batches of `TokenSplit.rows` without end, all rows in a new random order each epoch.

  Batch number `step` depends on (seed, step) and the rows only, and may span two epochs. Close the generator to end its
  background thread.

  Args:
    split: the rows.
    global_batch_rows: rows in a batch, over all devices and accumulation steps.
    seed: of the order.
    start_step: number of the first batch to yield.

  Raises:
    UserError: if the split has fewer rows than a batch.
  """
  check_fills_batch(split, global_batch_rows)
  return _prefetched(row_order(split.n_rows, seed).batch(global_batch_rows).map(split.rows), start_step)


def row_order(n_rows: int, seed: int) -> grain.MapDataset:
  """Returns the numbers of the rows in the order in which training reads them, epoch after epoch."""
  epochs = MOST_ROWS // n_rows  # without a number, batches of one row would be more than Grain can count
  return grain.MapDataset.range(n_rows).seed(seed).shuffle().repeat(epochs)


def check_fills_batch(split: TokenSplit, global_batch_rows: int) -> None:
  """Raises UserError if the split has fewer rows than one batch."""
  if split.n_rows < global_batch_rows:
    fits = 1 << max(min(split.n_rows, 8).bit_length() - 1, 0)
    small = ' (configs/quickstart_ngram_rows.py is for small texts)' if global_batch_rows > 8 else ''
    raise UserError(
      f'the {split.split} data have {split.n_rows} rows of {split.max_seq_len} tokens, fewer than one batch of '
      f'{global_batch_rows} (train.batch_size x train.accumulation_steps); use more text or a smaller batch, such as '
      f'--config.train.batch_size={fits} --config.train.accumulation_steps=1{small}'
    )


def eval_batches(
  split: TokenSplit, rows: int, show: Callable[[float], None] = lambda share: None, most: int | None = None
) -> Iterator[dict[str, np.ndarray]]:
  """Yields all rows in order, `rows` at a time, as `TokenSplit.rows` does; rows of padding fill the last batch.

  `show` is told the share of the batches that is done, after each; there are at most `most`, which None does not limit.
  """
  row_ids = np.full(-(-split.n_rows // rows) * rows, -1)
  row_ids[: split.n_rows] = np.arange(split.n_rows)
  dataset = grain.MapDataset.source(row_ids.reshape(-1, rows)[:most]).map(split.rows)
  with closing(_prefetched(dataset, 0)) as batches:
    for done, batch in enumerate(batches, 1):
      yield batch
      show(done / len(dataset))


def _prefetched(dataset: grain.MapDataset, start_step: int) -> Iterator[dict[str, np.ndarray]]:
  options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=PREFETCHED_BATCHES)
  iterator = iter(dataset.to_iter_dataset(options))
  iterator.set_state({'next_index': start_step})
  try:
    yield from iterator
  finally:
    iterator.close()


def count_rows(entry: Mapping[str, Any], max_seq_len: int, layout: str) -> int:
  """Returns how many rows of T tokens a split gives, from its entry in the index."""
  return entry['documents'] if layout == 'padded' else -(-entry['tokens'] // max_seq_len)


def steps_of_epochs(n_rows: int, global_batch_rows: int, epochs: float) -> int:
  """Returns how many whole batches `epochs` passes over the rows give, at least 1; 1.14 x 150 rows are 171."""
  return max(1, int(Fraction(repr(epochs)) * n_rows) // global_batch_rows)
