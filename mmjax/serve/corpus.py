"""Who reads a row: the reads of the validation text, collected a batch at a time, so that one can ask meanwhile."""

from collections import Counter
from typing import Any, NamedTuple

import numpy as np

from mmjax.data.loader import PADDING, TokenSplit, eval_batches
from mmjax.inference.memory_reads import ROWS_AT_A_TIME, MemoryReader, seen_tokens, strongest, token_text

MOST_POSITIONS = 65536
MOST_READS = 2**24  # kept, of all layers together: 8 bytes each
STRIP = 96  # parts that the text is cut into, to show where in it a row is read


class Part(NamedTuple):
  """The positions of one batch that predict a token, and what they read."""

  corpus_row_X: np.ndarray
  position_X: np.ndarray
  row_LXR: np.ndarray
  strength_LXR: np.ndarray


class CorpusReads:
  """The rows that the first positions of a corpus read. Call `grow` until `done`; all else may be asked before.

  Attributes:
    done: whether all is read that will be.
    positions: read so far.
    usage_LM: int64, reads of each row by each layer.
  """

  def __init__(self, reader: MemoryReader, split: TokenSplit):
    """Reads nothing yet."""
    self.reader, self.split = reader, split
    config, layers = reader.lm.config, len(reader.layers)
    reads = layers * config.memory.n_heads * config.model.num_selected
    wanted = min(MOST_POSITIONS, MOST_READS // reads)
    self.usage_LM = np.zeros((layers, config.model.knowledge_num), np.int64)
    self.positions, self.done = 0, False
    self._parts: list[Part] = []
    self._batches = eval_batches(split, ROWS_AT_A_TIME, most=-(-wanted // (ROWS_AT_A_TIME * split.max_seq_len)))

  def grow(self) -> None:
    """Reads one batch more."""
    batch = next(self._batches, None)
    if batch is None:
      self.done = True
      return
    row_LBTR, strength_LBTR = self.reader.read_batch(self.split, batch)
    batch_row_X, at_X = np.nonzero(batch['target'] != PADDING)
    part = Part(batch['row_id'][batch_row_X], at_X, row_LBTR[:, batch_row_X, at_X], strength_LBTR[:, batch_row_X, at_X])
    self.usage_LM += [np.bincount(row_XR.ravel(), minlength=self.usage_LM.shape[1]) for row_XR in part.row_LXR]
    self._parts.append(part)
    self.positions += len(at_X)

  def readers(self, row: int, layer: int | str, most: int) -> dict[str, Any]:
    """Finds the positions that read a row in a layer.

    Returns:
      `taken`, how many; `strip`, how many in each of STRIP equal parts of what was read; `contexts`, as
      `MemoryReader.describe_row` takes them, at most `most`; `ngrams`, where these address rows: texts and counts.
    """
    at, found, before = self.reader.layers.index(layer), [], 0
    # Of how many tokens the address of each read is made; of none where a gate picks rows.
    n_of_R = np.repeat(self.reader.ngrams[layer], self.reader.lm.config.model.num_selected).astype(int)
    for part in self._parts:
      hit_XR = part.row_LXR[at] == row
      for x in np.flatnonzero(hit_XR.any(axis=-1)):
        strength = float(part.strength_LXR[at, x][hit_XR[x]].max())
        n = int(n_of_R[hit_XR[x]].max()) if len(n_of_R) else 0
        found.append((strength, int(part.corpus_row_X[x]), int(part.position_X[x]), before + int(x), n))
      before += len(part.position_X)
    strip = np.histogram([place for *_, place, _ in found], STRIP, (0, max(1, before)))[0].tolist()
    return {
      'taken': len(found),
      'strip': strip,
      'contexts': strongest((reader[:3] for reader in found), most),
      'ngrams': self._ngrams([(corpus_row, position, n) for _, corpus_row, position, _, n in found if n]),
    }

  def _ngrams(self, places: list[tuple[int, int, int]]) -> list[tuple[str, int]]:
    corpus_rows, at_X = np.unique([corpus_row for corpus_row, *_ in places], return_inverse=True)
    rows, ids = self.split.rows(corpus_rows) if places else {}, Counter()
    for at, (_, position, n) in zip(at_X, places, strict=True):
      ids[tuple(seen_tokens(rows, at, max(0, position + 1 - n), position + 1))] += 1
    counts = Counter()
    for tokens, count in ids.items():
      counts[''.join(token_text(self.reader.lm.tokenizer, token) for token in tokens)] += count
    return counts.most_common(8)
