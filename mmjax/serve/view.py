"""What the page shows of one run, as JSON can hold it; `inspect` and the Python API compute it with the same code."""

import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from mmjax.errors import UserError
from mmjax.inference.api import LanguageModel
from mmjax.inference.measure import open_text
from mmjax.inference.memory_reads import MemoryReader, token_text
from mmjax.inference.settings import Sampling
from mmjax.inference.taught import taught_rows
from mmjax.model.cost import count_params
from mmjax.run.compressed import compressed_remark
from mmjax.run.directory import RunDir
from mmjax.run.identity import bank_texts
from mmjax.run.log import read_metrics
from mmjax.serve.corpus import CorpusReads

MOST_TOKENS = 1024  # of a text
HEAD_READS, LAYER_READS = 16, 32  # shown of a token: of each head, of each layer
CONTINUES = bytes(range(0x80, 0xC0))  # of a character of several bytes all but the first are one of these
LIKELY = 8  # next tokens that are shown
CONTEXTS = 16  # of a row: shown, and the effect of its value is measured on
NEAREST = 8
FARTHEST = 16  # taught rows
MAP_SIDE = 256  # cells of the map's side
MOST_POINTS = 400  # of a curve


@dataclasses.dataclass(frozen=True)
class Change:
  """One change of the bank: a row's value times `scale` (0: switched off), or exchanged with that of row `other`.

  `row` None: all rows.
  """

  row: int | None
  scale: float = 1.0
  other: int | None = None


class RunView:
  """Everything that the page shows of one run.

  Attributes:
    name: of its directory.
    reader: into its memory; None where it has none.
    taught: rows that the run taught, those that moved farthest first.
    corpus: reads of its validation text; None without a memory or that text.
  """

  def __init__(self, lm: LanguageModel, run: RunDir):
    """Opens the run's text, and reads nothing of it yet."""
    self.lm, self.run, self.name = lm, run, run.path.absolute().name
    self.reader = self.corpus = None
    self.remarks, self.snippets, self.taught = [], {}, []
    try:
      self.reader = MemoryReader(lm)
    except UserError as error:
      self.remarks.append(f'No rows are read here: {error}. Surprise and continuations work all the same.')
      return
    if lm.config.memory.teach_rows:
      self.taught = [found['row'] for found in taught_rows(lm, run)]
    self.snippets, remark = bank_texts(run, lm.config)
    self.remarks += filter(None, (remark, compressed_remark(run)))
    try:
      self.corpus = CorpusReads(self.reader, open_text(lm.config, run))
    except UserError as error:
      self.remarks.append(f'Nothing can be said of who reads a row: {error}')

  def describe(self) -> dict[str, Any]:
    """Returns names and sizes; `memory` is None without one; how many rows were `taught`, which moved farthest."""
    config, reader = self.lm.config, self.reader
    memory = reader and {
      'layers': reader.layers,
      'ngrams': {layer: reader.ngrams[layer] for layer in reader.layers},
      'heads': config.memory.n_heads,
      'own_ranges': config.memory.ngram_ranges == 'own',
      'reads': config.memory.n_heads * config.model.num_selected,
      'rows': config.model.knowledge_num,
      'width': config.model.knowledge_dim,
    }
    return {
      'name': self.name,
      'sublayer': config.model.sublayer,
      'step': self.lm.step,
      'parameters': count_params(self.lm.params)[0],
      'n_layers': config.model.n_layers,
      'max_seq_len': config.model.max_seq_len,
      'memory': memory,
      'remarks': self.remarks,
      'taught': {'rows': len(self.taught), 'farthest': self.taught[:FARTHEST]},
      'corpus': self.corpus is not None,
    }

  def read(self, text: str) -> dict[str, Any]:
    """Reads a text.

    Returns:
      `tokens`: for each, the one that rows begin with included, `token`; `shown`, its part of the text, see `_shown`;
      `nats`, how surprising it was, None for the first; `likely`: the tokens that seemed most likely in its stead, with
      their probabilities; `layers`: for each that has a memory, reads as [row, head, score, weight, n-gram], strongest
      first. `bytes`: UTF-8, of the text that they stand for, though the tokenizer may have changed it. `cut`: whether
      the text was longer. `snippets`: of these rows, those that started from text.
    """
    ids, text_bytes, cut = self._ids(text)
    nats_T, likely = self._surprise(self.lm, ids)
    layers = [[]] * len(ids)
    if self.reader:
      reads = self.reader.read_text(text)[: len(ids)]
      layers = [[self._strongest(entry['rows']) for entry in token['layers']] for token in reads]
    pieces = [self.lm.tokenizer.decode_bytes([token]) for token in ids]
    tokens = [
      {'token': name, 'shown': _shown(pieces, t) or name, 'nats': nats_T[t], 'likely': likely[t], 'layers': layers[t]}
      for t, name in enumerate(map(self._text, ids))
    ]
    shown = {row for reads in layers for layer in reads for row, *_ in layer}
    snippets = {row: self.snippets[row] for row in shown & self.snippets.keys()}
    return {'tokens': tokens, 'bytes': text_bytes, 'cut': cut, 'snippets': snippets}

  def next(self, text: str, changes: Sequence[Change]) -> dict[str, Any]:
    """Returns what follows a text, by the model as it is and by the changed one.

    Returns:
      `next`: [token, probability, probability when changed] of those that are most likely by either; `nats`: of each
      token of the text but the first, when changed. Without changes both are None.
    """
    prompt = self.lm.encode_prompt(text)
    log_V = self.lm.next_log_probs(prompt)[-1]
    if not changes:
      return {'next': [[self._text(at), float(np.exp(log_V[at])), None] for at in _largest(log_V)], 'nats': None}
    changed = self.changed(changes)
    changed_V = changed.next_log_probs(prompt)[-1]
    either = sorted({*_largest(log_V), *_largest(changed_V)}, key=lambda at: -max(log_V[at], changed_V[at]))
    found = [[self._text(at), float(np.exp(log_V[at])), float(np.exp(changed_V[at]))] for at in either[: LIKELY + 4]]
    return {'next': found, 'nats': self._surprise(changed, self._ids(text)[0])[0]}

  def stream(self, text: str, changes: Sequence[Change], sampling: Sampling) -> Iterator[str]:
    """Yields a continuation in pieces, as `LanguageModel.stream` does."""
    return self.changed(changes).stream(text, **dataclasses.asdict(sampling))

  def row(self, row: int, layer: int | str) -> dict[str, Any]:
    """Returns all that is known of a row in a layer: what `MemoryReader.describe_row` and `CorpusReads.readers` say.

    Also `range`, see `MemoryReader.range_of`; `rank` of 1 for the row that the layer reads most; `snippet`; and
    `nearest`: [row, cosine, reads] of the rows whose values point the same way.

    Raises:
      UserError: if there is no such row or layer.
    """
    reader = self._needed_reader()
    reader.check_row(row)
    if layer is None:
      raise UserError(f'layer=None must be a layer with a memory: {", ".join(map(str, reader.layers))}')
    reader.chosen_layers(layer)
    found = {'row': row, 'layer': layer, 'range': reader.range_of(row, layer), 'snippet': self.snippets.get(row)}
    found['nearest'] = self._nearest(row, layer)
    if self.corpus is None or not self.corpus.positions:
      return found
    readers = self.corpus.readers(row, layer, CONTEXTS)
    usage_M = self.corpus.usage_LM[reader.layers.index(layer)]
    found |= {'positions': self.corpus.positions, 'rank': 1 + int(np.sum(usage_M > usage_M[row]))}
    return found | readers | reader.describe_row(row, layer, self.corpus.split, readers['contexts'], CONTEXTS)

  def map(self, layer: int | str | None) -> dict[str, Any]:
    """Returns how often each row is read, by a layer or by all, as a square picture.

    Row i of the bank is cell i: with a gate, line and column are its two sub-keys. A bank too large for the picture has
    several rows in a cell.

    Returns:
      `side` and `cells`, reads line by line; `line`, rows in a line; `rows_per_cell`, on a side; `hottest`: [row,
      reads] of the rows read most; `used`: how many rows are read at all; `positions` read so far; `done`: whether
      these are all.

    Raises:
      UserError: if the model or the layer has no memory, or there is no text to count reads in.
    """
    self._needed_reader()
    if self.corpus is None:
      raise UserError(self.remarks[-1])
    at = slice(None) if layer is None else [self.reader.layers.index(self.reader.chosen_layers(layer)[0])]
    usage_M = self.corpus.usage_LM[at].sum(axis=0)
    side = math.isqrt(len(usage_M) - 1) + 1
    pooled = -(-side // MAP_SIDE)
    square = np.pad(usage_M, (0, side * side - len(usage_M))).reshape(side, side)
    padded = np.pad(square, (0, -side % pooled))
    cells = padded.reshape(len(padded) // pooled, pooled, -1, pooled).sum(axis=(1, 3))
    hottest = np.argsort(-usage_M, kind='stable')[:16]
    return {
      'side': len(cells),
      'cells': cells.ravel().tolist(),
      'line': side,
      'rows_per_cell': pooled,
      'hottest': [[int(at), int(usage_M[at])] for at in hottest if usage_M[at]],
      'used': int(np.count_nonzero(usage_M)),
      'positions': self.corpus.positions,
      'done': self.corpus.done,
    }

  def health(self) -> dict[str, Any]:
    """Returns curves of the run's log: `train` loss, and of the evaluations loss, `probes` and each layer's `bank`."""
    records = read_metrics(self.run.metrics_path)
    train = [[r['step'], r['loss']] for r in records if r['kind'] == 'train' and r.get('loss') is not None]
    evals = [r for r in records if r['kind'] == 'eval']
    kept = ('used_share', 'effective_rows', 'row_agreement')
    return {
      'train': _thinned(train),
      'evals': [
        {
          'step': r['step'],
          'loss': r['loss'],
          'probes': {name: r.get('probes', {}).get(name) for name in ('loss', 'loss_zeroed')},
          'bank': [{'layer': b['layer']} | {name: b.get(name) for name in kept} for b in r.get('bank', [])],
        }
        for r in _thinned(evals)
      ],
    }

  def changed(self, changes: Sequence[Change]) -> LanguageModel:
    """Returns the model with changes made to its bank, one after the other.

    Raises:
      UserError: if a row is not in the bank, or there is none.
    """
    if not changes:
      return self.lm
    reader = self._needed_reader()
    bank_MP = np.array(self.lm.bank_MP)
    for change in changes:
      if change.row is None:
        bank_MP *= change.scale
        continue
      reader.check_row(change.row)
      if change.other is not None:
        reader.check_row(change.other)
        bank_MP[[change.row, change.other]] = bank_MP[[change.other, change.row]]
      bank_MP[change.row] *= change.scale
    return self.lm.with_bank(bank_MP)

  def _needed_reader(self) -> MemoryReader:
    if self.reader is None:
      raise UserError(f'{self.name}: {self.remarks[0]}')
    return self.reader

  def _ids(self, text: str) -> tuple[list[int], int, bool]:
    """Returns the first tokens, of how many bytes of the text they are, and whether there are more."""
    tokenizer = self.lm.tokenizer
    ids, bytes_T = [tokenizer.start_id(self.lm.config.data.layout)], [0]
    for part in tokenizer.encode_slices(text):
      ids += part.ids
      bytes_T += (tokenizer.bytes_per_token()[part.ids] + part.more_bytes).tolist()
    return ids[:MOST_TOKENS], sum(bytes_T[:MOST_TOKENS]), len(ids) > MOST_TOKENS

  def _strongest(self, rows: list[dict[str, Any]]) -> list[list[Any]]:
    kept, of_head = [], [0] * self.lm.config.memory.n_heads
    for read in rows:
      if of_head[read['head']] < HEAD_READS and len(kept) < LAYER_READS:
        of_head[read['head']] += 1
        kept.append([read[name] for name in ('row', 'head', 'score', 'weight', 'ngram')])
    return kept

  def _surprise(self, lm: LanguageModel, ids: Sequence[int]) -> tuple[list[float | None], list[list[list[Any]]]]:
    """Returns for each token -log of its probability, in nats, and what seemed most likely in its stead."""
    log_TV = lm.next_log_probs(ids)[:-1]
    nats_T = -log_TV[np.arange(len(log_TV)), ids[1:]]
    best = [[[self._text(at), float(np.exp(log_V[at]))] for at in _largest(log_V, 5)] for log_V in log_TV]
    return [None, *nats_T.tolist()], [[], *best]

  def _text(self, token: int) -> str:
    return token_text(self.lm.tokenizer, int(token))

  def _nearest(self, row: int, layer: int | str) -> list[list[float]]:
    bank_MP = np.asarray(self.lm.bank_MP)
    with np.errstate(divide='ignore', invalid='ignore'):
      cosine_M = np.nan_to_num(bank_MP @ bank_MP[row] / np.linalg.norm(bank_MP, axis=1) / np.linalg.norm(bank_MP[row]))
    cosine_M[row] = -np.inf
    usage_M = None if self.corpus is None else self.corpus.usage_LM[self.reader.layers.index(layer)]
    best = _largest(cosine_M, NEAREST)
    return [[int(at), float(cosine_M[at]), None if usage_M is None else int(usage_M[at])] for at in best]


def _largest(values_X: np.ndarray, most: int = LIKELY) -> list[int]:
  """Returns where the largest values stand, the largest first."""
  most = min(most, len(values_X))
  at_X = np.argpartition(-values_X, most - 1)[:most]
  return at_X[np.argsort(-values_X[at_X], kind='stable')].tolist()


def _shown(pieces: Sequence[bytes], t: int) -> str:
  """Returns a token's part of a text: characters that begin in it, whole; a dot if none does; '' if it has no text."""
  begun, behind = pieces[t].lstrip(CONTINUES), b''.join(pieces[t + 1 : t + 4])
  rest = behind[: len(behind) - len(behind.lstrip(CONTINUES))]
  return (begun + rest).decode(errors='replace') if begun else '·' * bool(pieces[t])


def _thinned(points: list[Any]) -> list[Any]:
  """Returns at most MOST_POINTS of them, the first and the last included."""
  keep = np.unique(np.linspace(0, len(points) - 1, min(len(points), MOST_POINTS)).round().astype(int))
  return [points[at] for at in keep]
