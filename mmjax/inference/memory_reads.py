"""What a model's memory does with text: the rows that tokens take, the contexts that take a row, and what it changes.

The effect of a row in a layer is measured and not read off its weights, because between a row and the next token stand
a fusion that is not linear, later layers and the final norm: the model runs twice over real contexts, as it is and with
this row, in this layer alone, replaced by the mean of all rows of the bank. What changes in the next token's
probability is the effect of this row's value over an average one, on every path through the model.
"""

import dataclasses
import itertools
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from mmjax.choices import TOP
from mmjax.config import Config
from mmjax.config.sublayers import VALUE_ROWS, Sublayer, bank_readers
from mmjax.console import share_shown
from mmjax.data.loader import PADDING, TokenSplit, eval_batches
from mmjax.data.tokenizer import Tokenizer
from mmjax.environment import own_jax_settings
from mmjax.errors import UserError
from mmjax.inference.api import LanguageModel
from mmjax.inference.generate import padded_length
from mmjax.inference.sampling import only_pieces
from mmjax.memory import NgramBag
from mmjax.model.lm import LM, Output
from mmjax.model.params import BANK, Params, model_graph
from mmjax.model.sublayers import row_weights
from mmjax.run.placement import Placement

MOST_TOKENS = 4096  # of a text
ROWS_AT_A_TIME = 8  # of a corpus, read at a time
KEPT_CONTEXTS = 64  # of a row and layer: those that it is measured on
BEFORE, AFTER = 16, 8  # tokens of a context around the one that took the row


class MemoryReader:
  """Looks into the memory of one model.

  Attributes:
    layers: numbers of the layers that have a memory; 'values' first, if rows go into the values of attention.
    scores: by layer, whether rows have scores that tell one from another.
    weighs: by layer, whether rows count by their scores or a gate; weights are None where they do not.
    ngrams: by layer, how many of the last tokens address the rows of each head; () where a gate with scores picks them.
  """

  def __init__(self, lm: LanguageModel):
    """Takes a model; nothing is compiled before it is asked.

    Raises:
      UserError: if it has no memory.
    """
    config = lm.config
    self.lm, readers = lm, bank_readers(config)
    self.layers = list(readers)
    if not self.layers:
      raise UserError(f'the model has no memory to look into: model.sublayer={config.model.sublayer!r}')
    self.ngrams = {
      layer: config.memory.ngram_of_heads() if reader.reads_ngrams else () for layer, reader in readers.items()
    }
    self.scores = {layer: reader.has_gate or reader.scores_weigh(config.memory) for layer, reader in readers.items()}
    self.weighs = {
      layer: reader.scores_weigh(config.memory) or reader.gates_tokens for layer, reader in readers.items()
    }
    self._addressed = {layer: _addressed_memory(config, reader) for layer, reader in readers.items()}
    self._weighs_L111 = np.array(list(self.weighs.values()))[:, None, None, None]
    forward = _Forward(model_graph(config), lm.placement, config, lm.tokenizer.vocab_size)
    self._reads, self._log_probs = map(lm.placement.jit, (forward.reads, forward.log_probs))

  def chosen_layers(self, layer: int | str | None) -> list[int | str]:
    """Returns that layer, or all that have a memory for None.

    Raises:
      UserError: if it has no memory.
    """
    if layer is None:
      return self.layers
    if layer not in self.layers:
      raise UserError(f'layer {layer} has no memory; layers that have one: {", ".join(map(str, self.layers))}')
    return [layer]

  def check_row(self, row: int) -> None:
    """Raises UserError if the bank has no such row."""
    last = self.lm.config.model.knowledge_num - 1
    if not 0 <= row <= last:
      raise UserError(f'row {row} is not in the bank, which has rows 0 to {last}')

  def range_of(self, row: int, layer: int | str) -> dict[str, Any] | None:
    """Returns in whose range of a layer a row is: its `head`, and the `token` that reads it, None if a hash finds it.

    None where a gate selects rows or heads share them, and for a row that no head reads.
    """
    memory = self._addressed[layer]
    found = None if memory is None else memory.range_of(row)
    if found is None:
      return None
    head, token = found
    return {'head': head, 'token': None if token is None else token_text(self.lm.tokenizer, token)}

  @own_jax_settings()
  def read_text(self, text: str, *, layer: int | str | None = None, top: int | None = None) -> list[dict[str, Any]]:
    """Finds the rows that each token of a text takes.

    The text stands after the token that rows begin with in training. Longer text than model.max_seq_len is cut into
    rows as packed documents are; of more than MOST_TOKENS tokens the first are read.

    Args:
      text: not empty.
      layer: one layer; None: all that have a memory.
      top: rows for each token and layer, those of the largest absolute weight, or score where scores do not weigh;
        None: all.

    Returns:
      For each token, the first one included: `id`, `token` (its text), and `layers`, a list of `layer` and `rows`, each
      a `row`, its `head`, its `score` (before any activation; None where n-grams address rows and nothing scores
      them), its `weight` (None where neither scores nor a gate of the token weigh rows), and `ngram`, the text of the
      tokens that address it (None where a gate selects rows).

    Raises:
      UserError: if the text is empty, the layer has no memory, or `top` is less than 1.
    """
    layers, tokenizer = self.chosen_layers(layer), self.lm.tokenizer
    _check_counts(1 if top is None else top)
    if not text:
      raise UserError('the text is empty and must hold a character at least: there is no token to look at')
    start = tokenizer.start_id(self.lm.config.data.layout)
    ids = itertools.chain([start], (token for part in tokenizer.encode_slices(text) for token in part.ids))
    ids = list(itertools.islice(ids, MOST_TOKENS))
    found = []
    for first in range(0, len(ids), self.lm.config.model.max_seq_len):
      found += self._read_tokens(ids[first : first + self.lm.config.model.max_seq_len], layers, top)
    return found

  def _read_tokens(self, ids: Sequence[int], layers: list[int | str], top: int | None) -> list[dict[str, Any]]:
    padding = padded_length(len(ids)) - len(ids)
    arrays = self._reads(self.lm.params, np.pad(np.asarray(ids, np.int32), (0, padding))[None], None)
    row_LTR, score_LTR, weight_LTR = (np.asarray(x)[:, 0] for x in arrays)
    strength_LTR = np.where(self._weighs_L111[..., 0], np.abs(weight_LTR), score_LTR)
    order_LTR = np.argsort(-strength_LTR, axis=-1, kind='stable')[..., :top]
    head_R = np.repeat(np.arange(self.lm.config.memory.n_heads), self.lm.config.model.num_selected)
    text = partial(token_text, self.lm.tokenizer)

    def read(layer: int | str, t: int, slot: int) -> dict[str, Any]:
      at, ngrams, head = self.layers.index(layer), self.ngrams[layer], int(head_R[slot])
      return {
        'row': int(row_LTR[at, t, slot]),
        'head': head,
        'score': float(score_LTR[at, t, slot]) if self.scores[layer] else None,
        'weight': float(weight_LTR[at, t, slot]) if self.weighs[layer] else None,
        'ngram': ''.join(map(text, ids[max(0, t + 1 - ngrams[head]) : t + 1])) if ngrams else None,
      }

    def rows(layer: int | str, t: int) -> dict[str, Any]:
      return {'layer': layer, 'rows': [read(layer, t, slot) for slot in order_LTR[self.layers.index(layer), t]]}

    return [
      {'id': int(token), 'token': text(token), 'layers': [rows(layer, t) for layer in layers]}
      for t, token in enumerate(ids)
    ]

  @own_jax_settings()
  def read_row(
    self, row: int, split: TokenSplit, *, layer: int | str | None = None, top: int = TOP, positions: int = 0
  ) -> dict[str, Any]:
    """Finds the contexts of a corpus that take a row most, and what its value changes there.

    A context takes the row the more, the larger its absolute weight is, or its score where scores do not weigh rows.
    Where n-grams address rows that nothing weighs, it is a sample, see `strongest`.
    The effect (see the top of this file) is the mean over the up to KEPT_CONTEXTS contexts that take it most.

    Args:
      row: of the bank.
      split: the corpus.
      layer: one layer; None: all that have a memory.
      top: contexts and tokens to return for each layer.
      positions: read at most about so many positions of the corpus, its first; 0: all.

    Returns:
      `row`; `positions`, how many were read; and `layers`, for each its `layer`; `range`, see `range_of`; `taken`, how
      many positions took the row; `strength_is`: 'weight', 'score', or '' where nothing tells reads apart; `contexts`:
      `before`, `token`, `after` (texts; the token after which the model read the row), `strength`, `corpus_row` and
      `position`; and `effect`, None where no position took it: `contexts` it is the mean over; `next_token_gain`, the
      change of the log-probability of the token that really follows, nats; `up` and `down`, tokens with the largest
      rise and fall of their mean probability: `id`, `token`, `log_change` in nats, `probability` and
      `probability_without`.

    Raises:
      UserError: if there is no such row, the layer has no memory, `top` is less than 1, or `positions` less than 0.
    """
    self.check_row(row)
    _check_counts(top, positions)
    layers = self.chosen_layers(layer)
    with share_shown('reading the corpus') as show:
      best, taken, read = self._best_contexts(row, split, layers, positions, show)
    found = [self.describe_row(row, number, split, best[number], top) | {'taken': taken[number]} for number in layers]
    return {'row': row, 'positions': read, 'layers': found}

  @own_jax_settings()
  def describe_row(
    self, row: int, layer: int | str, split: TokenSplit, contexts: Sequence[tuple[float, int, int]], top: int
  ) -> dict[str, Any]:
    """Returns what `read_row` says of one layer, but for `taken`.

    Args:
      row: of the bank.
      layer: one that has a memory.
      split: the corpus.
      contexts: (strength, corpus row, position) of those that take it most, strongest first; the effect is measured on
        all of them.
      top: contexts and tokens to return.
    """
    return {
      'layer': layer,
      'range': self.range_of(row, layer),
      'strength_is': 'weight' if self.weighs[layer] else '' if self.ngrams[layer] else 'score',
      'contexts': [self._context(split, *context) for context in contexts[:top]],
      'effect': self._effect(row, layer, split, contexts, top) if contexts else None,
    }

  @own_jax_settings()
  def read_batch(self, split: TokenSplit, batch: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Returns which rows of the bank the positions of a corpus take, and how much.

    Args:
      split: the corpus.
      batch: from its `rows`.

    Returns:
      row_LBTR: int32. strength_LBTR: float32, absolute weights, or scores where scores do not weigh.
    """
    row_LBTR, score_LBTR, weight_LBTR = self._reads(self.lm.params, *_inputs(split, batch))
    return np.asarray(row_LBTR), np.where(self._weighs_L111, np.abs(weight_LBTR), score_LBTR)

  def _best_contexts(
    self, row: int, split: TokenSplit, layers: list[int | str], positions: int, show: Callable[[float], None]
  ) -> tuple[dict[int | str, list[tuple[float, int, int]]], Counter, int]:
    """Returns for each layer (strength, corpus row, position), strongest first; how many there were; positions read."""
    best, taken, read = {layer: [] for layer in layers}, Counter(), 0
    most = -(-positions // (ROWS_AT_A_TIME * split.max_seq_len)) if positions else None
    for batch in eval_batches(split, ROWS_AT_A_TIME, show, most):
      row_LBTR, strength_LBTR = self.read_batch(split, batch)
      strength_LBT = np.max(strength_LBTR, axis=-1, initial=-np.inf, where=row_LBTR == row)
      predicted_BT = batch['target'] != PADDING
      read += int(predicted_BT.sum())
      for layer in layers:
        strength_BT = np.where(predicted_BT, strength_LBT[self.layers.index(layer)], -np.inf)
        places = np.argwhere(strength_BT > -np.inf)
        taken[layer] += len(places)
        best[layer] += [(float(strength_BT[b, t]), int(batch['row_id'][b]), int(t)) for b, t in places]
        best[layer] = strongest(best[layer], KEPT_CONTEXTS)
    return best, taken, read

  def _context(self, split: TokenSplit, strength: float, corpus_row: int, position: int) -> dict[str, Any]:
    rows = split.rows(np.array([corpus_row]))
    inputs, targets = rows['input'][0], rows['target'][0]
    after = targets[position : position + AFTER]
    if split.isolate_documents:
      after = after[np.cumsum(after == self.lm.tokenizer.eos_id) == 0]  # what is of this document
    return {
      'before': self.lm.tokenizer.decode(seen_tokens(rows, 0, max(0, position - BEFORE), position + 1)[:-1]),
      'token': token_text(self.lm.tokenizer, int(inputs[position])),
      'after': self.lm.tokenizer.decode(after[after != PADDING].tolist()),
      'strength': strength,
      'corpus_row': corpus_row,
      'position': position,
    }

  def _effect(
    self, row: int, layer: int | str, split: TokenSplit, contexts: Sequence[tuple[float, int, int]], top: int
  ) -> dict[str, Any]:
    bank_MP = self.lm.bank_MP
    mean_P, params = jnp.mean(bank_MP, axis=0), self.lm.params | {BANK: bank_MP}
    found = []
    for first in range(0, len(contexts), ROWS_AT_A_TIME):
      part = list(contexts[first : first + ROWS_AT_A_TIME])
      filled = part + part[:1] * (ROWS_AT_A_TIME - len(part))  # one shape, one compilation
      _, corpus_row_B, position_B = map(np.array, zip(*filled, strict=True))
      batch = split.rows(corpus_row_B)
      log_with_BV, log_without_BV = (
        self._log_probs(params, *_inputs(split, batch), position_B, changed, row, mean_P)
        for changed in (-1, self.layers.index(layer))
      )
      next_B = batch['target'][np.arange(ROWS_AT_A_TIME), position_B]
      found.append([np.asarray(x)[: len(part)] for x in (log_with_BV, log_without_BV, next_B)])
    log_with_XV, log_without_XV, next_X = map(np.concatenate, zip(*found, strict=True))
    n_ids = self.lm.tokenizer.vocab_size
    log_with_XV, log_without_XV = (x[:, :n_ids].astype(np.float64) for x in (log_with_XV, log_without_XV))
    change_XV = log_with_XV - log_without_XV
    change_V, with_V, without_V = change_XV.mean(0), np.exp(log_with_XV).mean(0), np.exp(log_without_XV).mean(0)

    def token(at: int) -> dict[str, Any]:
      return {
        'id': int(at),
        'token': token_text(self.lm.tokenizer, int(at)),
        'log_change': float(change_V[at]),
        'probability': float(with_V[at]),
        'probability_without': float(without_V[at]),
      }

    order = np.argsort(without_V - with_V, kind='stable')
    return {
      'contexts': len(contexts),
      'next_token_gain': float(change_XV[np.arange(len(next_X)), next_X].mean()),
      'up': [token(at) for at in order[:top]],
      'down': [token(at) for at in order[::-1][:top]],
    }


def _check_counts(top: int, positions: int = 0) -> None:
  for name, value, least in (('top', top, 1), ('positions', positions, 0)):
    if value < least:
      raise UserError(f'{name}={value} must be at least {least}')


def strongest(contexts: Iterable[tuple[float, int, int]], most: int) -> list[tuple[float, int, int]]:
  """Returns the contexts of the largest strength, at most `most`; among equals a sample, the same each time."""
  return sorted(contexts, key=lambda c: (-c[0], zlib.crc32(f'{c[1]} {c[2]}'.encode())))[:most]


def seen_tokens(rows: dict[str, np.ndarray], row: int, first: int, stop: int) -> list[int]:
  """Returns those tokens of a row of `TokenSplit.rows`, from `first` to `stop`, that the model sees at the last one."""
  token_X, segment_X = rows['input'][row, first:stop], rows['segment'][row, first:stop]
  return token_X[segment_X == segment_X[-1]].tolist()


def token_text(tokenizer: Tokenizer, token: int) -> str:
  """Returns the text of one token; control tokens and bytes of a character have a name: <eos>, <0xE4>."""
  raw = tokenizer.decode_bytes([token])
  try:
    text = raw.decode()
  except UnicodeDecodeError:
    return ''.join(f'<0x{byte:02X}>' for byte in raw)
  names = {tokenizer.pad_id: '<pad>', tokenizer.bos_id: '<bos>', tokenizer.eos_id: '<eos>'}
  return text or names.get(token, f'<{token}>')


def _addressed_memory(config: Config, reader: Sublayer) -> NgramBag | None:
  """Returns the sizes of the memory whose rows n-grams address in a layer; None where a gate selects them."""
  if not reader.reads_ngrams:
    return None
  if reader is VALUE_ROWS:
    return reader.build(config.model, config.memory, rngs=nnx.Rngs(0))
  return nnx.eval_shape(lambda: reader.build(config.model, config.memory, rngs=nnx.Rngs(0))).memory


def _inputs(split: TokenSplit, batch: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray | None]:
  """Returns tokens and segments of a batch, None where a row is one segment."""
  return batch['input'], batch['segment'] if split.isolate_documents else None


@dataclasses.dataclass(frozen=True, eq=False)
class _Forward:
  """What is compiled: the model, and what is read off it."""

  graphdef: nnx.GraphDef
  placement: Placement
  config: Config
  n_ids: int  # pieces of the tokenizer; the embedding may have more rows

  def run(self, params: Params, tokens_BT: Array, segment_BT: Array | None, **settings: Any) -> tuple[LM, Output]:
    model = nnx.merge(self.graphdef, params)
    place = {'dtype': self.placement.dtype, 'attention': self.placement.attention}
    return model, model(tokens_BT, segment_BT, **place, **settings)

  def reads(self, params: Params, tokens_BT: Array, segment_BT: Array | None) -> tuple[Array, Array, Array]:
    """Returns int32 rows, and float32 scores and weights, each (L, B, T, R)."""
    _, out = self.run(params, tokens_BT, segment_BT)
    return out.row_LBTR, out.score_LBTR, row_weights(self.config, out.score_LBTR)

  def log_probs(
    self,
    params: Params,
    tokens_BT: Array,
    segment_BT: Array | None,
    position_B: Array,
    changed: Array,
    row: Array,
    value_P: Array,
  ) -> Array:
    """Returns float32 log-probabilities (B, V) of what follows, the row's value replaced for a reader (-1: none)."""

    def replace(reader: int, bank_MP: Array) -> Array:
      return bank_MP.at[row].set(jnp.where(reader == changed, value_P, bank_MP[row]))

    model, out = self.run(params, tokens_BT, segment_BT, bank_of_reader=replace)
    hidden_BD = out.hidden_BTD[jnp.arange(len(position_B)), position_B]
    return jax.nn.log_softmax(only_pieces(model.logits(hidden_BD), self.n_ids), axis=-1)
