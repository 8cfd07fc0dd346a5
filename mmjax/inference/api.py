"""The Python API: `lm = mmjax.load(workdir)`, then `lm.generate(...)`, `lm.stream(...)`, `lm.logits(...)`."""

import codecs
import contextlib
import copy
import itertools
import os
import sys
import traceback
import warnings
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from jax.typing import ArrayLike, DTypeLike
from scipy.special import log_softmax

from mmjax.choices import CHECKPOINT
from mmjax.config import Config
from mmjax.data.tokenizer import Tokenizer
from mmjax.environment import own_jax_settings
from mmjax.errors import UserError, refuse_wrong_jaxlib
from mmjax.inference.generate import NO_EOS, Decoder, padded_length
from mmjax.inference.settings import Sampling
from mmjax.kernels.packed_bank import unpack_bank
from mmjax.model.params import BANK, Params, model_graph
from mmjax.run.checkpoint import START_STEP
from mmjax.run.compressed import read_params, refuse_compressed
from mmjax.run.directory import NO_TOKENIZER, RunDir, open_run
from mmjax.run.placement import place_reader

NAMED_CHARS = 40  # of a prompt, in a warning
PACKAGE = f'{Path(__file__).parents[1]}{os.sep}'


class LanguageModel:
  """A trained model with its tokenizer.

  Attributes:
    config: settings of the run.
    tokenizer: text to token ids and back; a UserError where the run has none.
    params: nested dict of float32 arrays; a compressed run's bank is a PackedBank.
    step: optimizer updates that the parameters have seen.
    attention, dtype: how it was asked to run instead of as it does by itself, or None.
    placement: how it runs.
  """

  def __init__(
    self,
    config: Config,
    tokenizer: Tokenizer | None,
    params: Params,
    *,
    step: int = 0,
    dtype: DTypeLike | None = None,
    attention: str | None = None,
  ):
    """Joins the parts; `load` reads them from a run directory.

    Raises:
      UserError: if `dtype` or `attention` is not a known one, or cannot be used here.
    """
    self.config, self._tokenizer, self.params, self.step = config, tokenizer, params, step
    self.attention, self.dtype = attention, dtype
    self.placement = place_reader(config, dtype=jnp.float32 if dtype is None else dtype, attention=attention)
    eos_id, n_ids = (tokenizer.eos_id, tokenizer.vocab_size) if tokenizer else (NO_EOS, None)
    self._decoder = Decoder(config, params, eos_id=eos_id, n_ids=n_ids, placement=self.placement)
    forward = partial(_logits, model_graph(config), self.placement.dtype, self.placement.attention)
    self._logits = self.placement.jit(forward)

  def __repr__(self) -> str:
    """Names the experiment, what follows attention, and the update."""
    return f'LanguageModel({self.config.experiment}, {self.config.model.sublayer}, step {self.step:,})'

  @property
  def tokenizer(self) -> Tokenizer:
    """Text to token ids and back; raises UserError where the run has none."""
    if self._tokenizer is None:
      raise UserError(NO_TOKENIZER)
    return self._tokenizer

  @property
  def bank_MP(self) -> Array:
    """The values of its bank, float32, unpacked if the run is compressed; a UserError without one."""
    self._refuse_without_bank()
    return unpack_bank(self.params[BANK])

  def with_bank(self, bank_MP: ArrayLike) -> 'LanguageModel':
    """Returns this model with other values, float (M, P), in its bank, to hold against it.

    Nothing is compiled again, unless the run is compressed.

    Raises:
      UserError: if it has no bank, or one of another shape.
    """
    self._refuse_without_bank()
    bank_MP, shape = jnp.asarray(bank_MP, jnp.float32), self.params[BANK].shape
    if bank_MP.shape != shape:
      raise UserError(f'a bank of shape {bank_MP.shape} does not fit: the model has one of {shape}')
    other = copy.copy(self)
    other.params, other._decoder = self.params | {BANK: bank_MP}, self._decoder.with_bank(bank_MP)
    return other

  def _refuse_without_bank(self) -> None:
    if BANK not in self.params:
      raise UserError(f'a model with model.sublayer={self.config.model.sublayer!r} has no bank')

  @own_jax_settings()
  def logits(self, tokens_BT: ArrayLike) -> Array:
    """Predicts the token after each position.

    Args:
      tokens_BT: integers in [0, V); rows begin with `tokenizer.start_id(config.data.layout)` as in training.
        Rows longer than model.max_seq_len work, with a warning: the model was not trained on such positions.

    Returns:
      float32 (B, T, V); row b, position t scores what follows tokens_BT[b, :t + 1].

    Raises:
      UserError: if tokens_BT is not two-dimensional, has no token, or holds what is not a token id.
    """
    tokens = self._token_ids(tokens_BT)
    if tokens.ndim != 2 or not tokens.size:
      raise UserError(f'tokens of shape {tokens.shape} must be (rows, positions), with at least one of each')
    self._warn_beyond(tokens.shape[1])
    padding = padded_length(tokens.shape[1]) - tokens.shape[1]  # causal: what stands behind changes nothing
    return self._logits(self.params, np.pad(tokens.astype(np.int32), ((0, 0), (0, padding))))[:, : tokens.shape[1]]

  def log_probs(self, texts: str | Sequence[str], after: str = '') -> list[np.ndarray]:
    """Tells how probable each token of one text or several is after those before it.

    A text stands after the token that rows begin with, as in training, and the EOS behind it is not scored. Each is
    read alone.

    Args:
      texts: of more than model.max_seq_len tokens, each row of so many is read alone, as packed documents are.
      after: a prompt that stands before each and is not scored. It is encoded by itself, as `generate` does it, so a
        space between both belongs to the text: log_probs([' Paris', ' Rome'], after='The capital of France is').

    Returns:
      For each text natural logarithms, float32 (T,), one for each of `tokenizer.encode(text)`.

    Raises:
      UserError: if a text or the prompt is none, or the run has no tokenizer.
    """
    texts = [texts] if isinstance(texts, str) else _listed(texts, 'texts must be a str or a sequence of them')
    before = [self.tokenizer.start_id(self.config.data.layout), *self.tokenizer.encode(after)]
    length, found = self.config.model.max_seq_len, []
    for ids in (before + self.tokenizer.encode(text) for text in texts):
      rows = [np.zeros(0, np.float32)]
      for at in range(0, len(ids) - 1, length):
        targets = ids[at + 1 : at + 1 + length]
        rows.append(self.next_log_probs(ids[at : at + len(targets)])[np.arange(len(targets)), targets])
      found.append(np.concatenate(rows)[len(before) - 1 :])
    return found

  def next_log_probs(self, ids: Sequence[int]) -> np.ndarray:
    """Returns natural logarithms of the probabilities of what follows each token, float32 (T, V).

    Args:
      ids: beginning with `tokenizer.start_id(config.data.layout)`; T of them. Of more than model.max_seq_len, each row
        of so many is read alone.

    Returns:
      V is `tokenizer.vocab_size`: ids that stand for no piece of text are not counted.

    Raises:
      UserError: if there is none, or one is no token id.
    """
    ids = self._token_ids(ids)
    if ids.ndim != 1 or not ids.size:
      raise UserError(f'token ids of shape {ids.shape} must be a list of them, of at least one')
    length, n_ids = self.config.model.max_seq_len, self.tokenizer.vocab_size
    parts = [np.asarray(self.logits([ids[at : at + length]]))[0, :, :n_ids] for at in range(0, len(ids), length)]
    return log_softmax(np.concatenate(parts), axis=-1)

  def generate(self, prompts: str | Sequence[str], **settings: float) -> list[str]:
    """Continues one prompt or several, together.

    Args:
      prompts: text. Of more than model.max_seq_len tokens the last ones are used. The continuation may go on beyond
        max_seq_len, at positions that the model was not trained on. A warning says either.
      **settings: fields of `mmjax.inference.settings.Sampling`: max_new_tokens, temperature, top_p,
        repetition_penalty, seed, seed_sampling.

    Returns:
      For each prompt its continuation, without the prompt.

    Raises:
      UserError: if a prompt is no text, a setting breaks its rule, or the run has no tokenizer.
    """
    prompts = [prompts] if isinstance(prompts, str) else _listed(prompts, 'prompts must be a str or a sequence of them')
    rows = self.generate_tokens([self.encode_prompt(prompt) for prompt in prompts], **settings)
    return [self.tokenizer.decode(row) for row in rows]

  def generate_tokens(self, prompts: Sequence[Sequence[int]], **settings: float) -> list[list[int]]:
    """Continues lists of token ids, as `encode_prompt` makes them, and returns the new ids, EOS included.

    Raises:
      UserError: if a list is empty or holds what is not a token id, or a setting breaks its rule.
    """
    rows = [self._token_ids(prompt) for prompt in _listed(prompts, 'prompts must be a sequence of lists of token ids')]
    for row in rows:
      if row.ndim != 1:
        raise UserError(f'a prompt of shape {row.shape} must be a list of token ids; prompts are [[5, 6, 7], ...]')
      if not row.size:
        raise UserError('a prompt needs at least one token; begin with tokenizer.start_id(config.data.layout)')
    new = self._decoder.generate(rows, Sampling.of(settings))
    self._warn_beyond(max((len(row) + len(more) - 1 for row, more in zip(rows, new, strict=True)), default=0))
    return new

  def stream(self, prompt: str, **settings: float) -> Iterator[str]:
    """Yields the continuation of a prompt in pieces as they are made; together they are what `generate` returns.

    A character whose bytes are spread over several tokens is held back until it is whole. For the arguments see
    `generate`.

    Raises:
      UserError: at once, as `generate` does.
    """
    sampling, tokens = Sampling.of(settings), self.encode_prompt(prompt)
    return self._pieces(tokens, sampling)

  def _pieces(self, tokens: list[int], sampling: Sampling) -> Iterator[str]:
    decoder, length = codecs.getincrementaldecoder('utf-8')('replace'), len(tokens)
    for [new] in self._decoder.stream([tokens], sampling):
      length += len(new)
      if piece := decoder.decode(self.tokenizer.decode_bytes(new)):
        yield piece
    if piece := decoder.decode(b'', final=True):
      yield piece
    self._warn_beyond(length - 1)  # the last one is not read

  def encode_prompt(self, prompt: str) -> list[int]:
    """Returns the token that rows begin with and the prompt's tokens; of a long prompt the last max_seq_len tokens.

    Raises:
      UserError: if the prompt is no text, or the run has no tokenizer.
    """
    if not isinstance(prompt, str):
      raise UserError(f'a prompt must be a str, not {type(prompt).__name__}')
    most = self.config.model.max_seq_len
    # A token stands for a limited number of bytes, and a character is at least one: no need to tokenize megabytes.
    end = prompt[-most * int(self.tokenizer.bytes_per_token().max()) :]
    tokens = [self.tokenizer.start_id(self.config.data.layout), *self.tokenizer.encode(end)]
    if len(end) < len(prompt) or len(tokens) > most:
      named = f'the prompt that begins with {prompt[:NAMED_CHARS]!r}'
      _warn(f'{named} is longer than model.max_seq_len={most} tokens; its end is used')
    return tokens[-most:]

  def _warn_beyond(self, length: int) -> None:
    """Warns where so many tokens are read, some of them at positions that the model was not trained on."""
    if length > (most := self.config.model.max_seq_len):
      _warn(f'{length} tokens are more than model.max_seq_len={most}, up to which the model was trained')

  def _token_ids(self, values: ArrayLike) -> np.ndarray:
    """Returns token ids as an array of any shape.

    Raises:
      UserError: if they are none.
    """
    size = self.config.model.vocab_size
    try:
      ids = np.asarray(values)
    except ValueError as error:
      raise UserError(f'tokens={str(values):.60} must be rows of one length') from error
    if ids.size and not np.issubdtype(ids.dtype, np.integer):
      first = next((x for x in ids.flat if not isinstance(x, int | np.integer) or isinstance(x, bool)), ids.flat[0])
      first = repr(first.item() if isinstance(first, np.generic) else first)
      raise UserError(f'token ids must be integers from 0 to {size - 1}, not {first:.40}')
    wrong = ids[(ids < 0) | (ids >= size)]
    if wrong.size:
      raise UserError(f'token id {wrong.flat[0]} is not in the vocabulary, which is 0..{size - 1}')
    return ids


@own_jax_settings()
def load(
  workdir: str | Path,
  checkpoint: str | int = CHECKPOINT,
  *,
  dtype: DTypeLike | None = None,
  attention: str | None = None,
  without_taught: bool = False,
) -> LanguageModel:
  """Loads a model from a run directory, which may be in use by a training process.

  Args:
    workdir: as train.py makes it.
    checkpoint: 'best' (lowest validation loss), 'last', or the number of a step.
    dtype: of the matrix products, 'float32' or 'bfloat16'; None: float32, on a CPU also the fastest.
    attention: a value of runtime.attention; None: the run's, or 'auto' where that cannot run here.
    without_taught: whether the rows that the run taught (memory.teach_rows) are what they were before; nothing else
      has changed since, so that at any checkpoint this is the model that the run started from, bit for bit, and none
      can be chosen.

  Raises:
    UserError: if there is no such run, it has no checkpoint yet, it taught no rows that could be left out, a checkpoint
      is chosen although they are to be, or the tokenizer is not the one it was trained with.
    StorageError: if no whole checkpoint is left, or not the one that was asked for.
  """
  refuse_wrong_jaxlib()
  run = open_run(workdir, needs_tokenizer=RunDir(workdir).was_trained)  # an import may have none
  placement = {'dtype': dtype, 'attention': attention}
  return load_run(run, run.read_config(), checkpoint, without_taught=without_taught, **placement)


def load_run(
  run: RunDir, config: Config, checkpoint: str | int, *, without_taught: bool = False, **placement: Any
) -> LanguageModel:
  """Does what `load` does, and raises what it raises.

  Args:
    run: the run's directory.
    config: the run's settings, with the places where its text and bank are now.
    checkpoint: as in `load`.
    without_taught: as in `load`.
    placement: dtype and attention, as in `load`.
  """
  tokenizer = run.load_tokenizer(config.model.vocab_size) if run.tokenizer_path.exists() else None
  params, _, step = read_params(run, config, checkpoint_to_read(run, config, checkpoint, without_taught))
  return LanguageModel(config, tokenizer, params, step=step, **placement)


def checkpoint_to_read(run: RunDir, config: Config, checkpoint: str | int, without_taught: bool) -> str | int:
  """Returns which checkpoint `load` reads by its arguments.

  Raises:
    UserError: if the run taught no rows that could be left out, or a checkpoint is chosen although they are to be.
  """
  if not without_taught:
    return checkpoint
  if checkpoint != CHECKPOINT:
    raise UserError(
      f'--without (without_taught) gives the model that the run started from, whatever checkpoint={checkpoint} says; '
      'give one of them'
    )
  refuse_compressed(run, 'read without the rows that it taught')
  if not config.memory.teach_rows:
    raise UserError(f'{run.path} taught no rows: its memory.teach_rows is 0, so there is none to leave out or to list')
  return START_STEP


def _listed(values: Sequence, rule: str) -> list:
  """Returns prompts or texts as a list; bytes and what has no elements break the rule."""
  if not isinstance(values, str | bytes | bytearray | Mapping):
    with contextlib.suppress(TypeError):
      return list(values)
  raise UserError(f'{rule}, not {type(values).__name__}')


def _warn(sentence: str) -> None:
  """Warns at the line that called mmjax, past decorators and comprehensions within."""
  files = [frame.f_code.co_filename for frame, _ in traceback.walk_stack(sys._getframe())]
  first = max(level for level, file in enumerate(files) if file.startswith(PACKAGE)) + 1
  decorators = itertools.takewhile(contextlib.__file__.__eq__, files[first:])
  warnings.warn(sentence, stacklevel=first + len(list(decorators)) + 1)


def _logits(graphdef: nnx.GraphDef, dtype: DTypeLike, attention: str, params: Params, tokens_BT: Array) -> Array:
  model = nnx.merge(graphdef, params)
  return model.logits(model(tokens_BT, dtype=dtype, attention=attention).hidden_BTD)
