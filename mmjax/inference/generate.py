"""Continuing token sequences: prompts are read at once, then one token a step comes out of a key-value cache.

Both parts are compiled for a few shapes only: prompts are padded to the next size of a short list, so that a new
length rarely needs a new compilation. A block of steps is one call; the host sees tokens after each block, which is
what streaming needs, and asks the device no more often than that. How a token is chosen: mmjax/inference/sampling.py.
"""

import copy
import dataclasses
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from mmjax.config import Config, ModelConfig
from mmjax.environment import own_jax_settings
from mmjax.inference.sampling import Sampler, only_pieces
from mmjax.inference.settings import Sampling
from mmjax.model import decoding
from mmjax.model.decoding import Cache, init_cache
from mmjax.model.params import BANK, Params, model_graph
from mmjax.run.placement import Placement, place_reader

BLOCK_STEPS = 16  # tokens between two looks of the host: smooth to read, and the call costs 1/16 of its time a token
MOST_ROWS = 32  # continued at the same time; more prompts wait, so that the caches stay small
LEAST_TOKENS = 16  # shortest padded prompt
NO_EOS = -1  # every row goes on to its last token


class Rows(NamedTuple):
  """Where each row stands: last token and its place, int32, not yet in the cache; tokens seen, bool; its PRNG key."""

  token_B: Array
  position_B: Array
  seen_BV: Array
  done_B: Array
  key_B: Array
  step: Array


class Decoder:
  """Continues prompts with one model; keeps the compiled functions between calls."""

  def __init__(
    self, config: Config, params: Params, *, eos_id: int, n_ids: int | None = None, placement: Placement | None = None
  ):
    """Takes a model; its functions are compiled when the first prompt comes.

    Args:
      config: of the run that made the parameters.
      params: the nested dict.
      eos_id: the token that ends a row; NO_EOS: none does.
      n_ids: pieces of the tokenizer, where the embedding has more rows; these are never chosen.
      placement: how to run it; None: in float32, which is also the fastest on a CPU, and with the run's attention.
    """
    placement = placement or place_reader(config, dtype='float32')
    steps = _DecoderSteps(model_graph(config), config.model, placement, eos_id, n_ids)
    self._prefill = placement.jit(steps.prefill, static_argnames='length')
    self._decode = placement.jit(steps.decode, donate_argnames=('rows', 'cache'))
    self._params = jax.tree.map(jnp.asarray, params)  # once: arrays of NumPy would be copied at every call
    self._eos_id, self._vocab_size = eos_id, config.model.vocab_size

  def with_bank(self, bank_MP: Array) -> 'Decoder':
    """Returns this decoder with another bank, of the same shape and dtype; the compiled functions are the same."""
    other = copy.copy(self)
    other._params = self._params | {BANK: bank_MP}
    return other

  def generate(self, prompts: Sequence[Sequence[int]], sampling: Sampling) -> list[list[int]]:
    """Continues every prompt to its end.

    Args:
      prompts: token ids in [0, V), at least one each.
      sampling: how.

    Returns:
      For each prompt its new tokens; EOS is the last one where the row ended by itself.
    """
    new = [[] for _ in prompts]
    for first in range(0, len(prompts), MOST_ROWS):
      part = slice(first, first + MOST_ROWS)
      for block in self.stream(prompts[part], sampling, first):
        for row, tokens in zip(new[part], block, strict=True):
          row += tokens
    return new

  def stream(
    self, prompts: Sequence[Sequence[int]], sampling: Sampling, first_row: int = 0
  ) -> Iterator[list[list[int]]]:
    """Yields new tokens as they are made, the first as soon as the prompts are read.

    Args:
      prompts: at most MOST_ROWS lists of token ids in [0, V), at least one each.
      sampling: how.
      first_row: number of the first prompt; the random numbers of a row depend on its number and the seed only.

    Yields:
      For each prompt the tokens made since the last time, EOS included; nothing after EOS.
    """
    with own_jax_settings():  # left before each yield: they are not the caller's
      sampler = Sampler.of(sampling)
      tokens_BT, rows = self._pad(prompts, sampling, first_row)
      # Room for whole blocks: the shape of the cache, and with it the compiled function, changes rarely.
      length = padded_length(tokens_BT.shape[1] + sampling.max_new_tokens)
      rows, cache = self._prefill(self._params, tokens_BT, rows, sampler, length=length)
    yield self._cut(np.asarray(rows.token_B)[:, None], ended := [False] * len(prompts))
    made = 1
    while made < sampling.max_new_tokens and not all(ended):
      steps = min(BLOCK_STEPS, sampling.max_new_tokens - made)
      with own_jax_settings():
        block_BX, rows, cache = self._decode(self._params, rows, cache, sampler, steps)
      yield self._cut(np.asarray(block_BX)[:, :steps], ended)
      made += steps

  def _pad(self, prompts: Sequence[Sequence[int]], sampling: Sampling, first_row: int) -> tuple[np.ndarray, Rows]:
    """Returns tokens_BT padded on the right, and rows before their first new token; those without a prompt are done."""
    n_rows = 1 << (len(prompts) - 1).bit_length()
    tokens_BT = np.zeros((n_rows, padded_length(max(map(len, prompts)))), np.int32)
    length_B = np.zeros(n_rows, np.int32)
    seen_BV = np.zeros((n_rows, self._vocab_size), bool)
    for row, prompt in enumerate(prompts):
      tokens_BT[row, : len(prompt)] = prompt
      length_B[row] = len(prompt)
      seen_BV[row, prompt] = True
    if not sampling.seed_sampling and self._eos_id != NO_EOS:
      seen_BV[:, self._eos_id] = False  # prompts may open with it; a penalty on it would put off the end
    key, number_B = jax.random.key(sampling.seed), jnp.arange(first_row, first_row + n_rows)
    key_B = jax.vmap(jax.random.fold_in, (None, 0))(key, number_B)
    return tokens_BT, Rows(tokens_BT[:, 0], length_B - 1, seen_BV, length_B == 0, key_B, np.int32(0))

  def _cut(self, block_BX: np.ndarray, ended: list[bool]) -> list[list[int]]:
    """Returns the tokens of each row that has a prompt up to its EOS, and notes in `ended` which rows had it."""
    block = block_BX[: len(ended)].tolist()
    for row, tokens in enumerate(block):
      if ended[row]:
        block[row] = []
      elif self._eos_id in tokens:
        block[row], ended[row] = tokens[: tokens.index(self._eos_id) + 1], True
    return block


@dataclasses.dataclass(frozen=True, eq=False)
class _DecoderSteps:
  """What is compiled: `prefill` reads prompts, and `decode` makes tokens."""

  graphdef: nnx.GraphDef
  sizes: ModelConfig
  placement: Placement
  eos_id: int
  n_ids: int | None

  def prefill(self, params: Params, tokens_BT: Array, rows: Rows, sampler: Sampler, length: int) -> tuple[Rows, Cache]:
    """Reads the prompts, int32, into a cache of `length` positions and chooses the first new token of every row."""
    model, dtype = nnx.merge(self.graphdef, params), self.placement.dtype
    cache = init_cache(self.sizes, len(tokens_BT), length, dtype)
    hidden_BTD, cache = decoding.prefill(model, tokens_BT, cache, dtype=dtype, attention=self.placement.attention)
    last_B11 = jnp.maximum(rows.position_B, 0)[:, None, None]
    logits_BV = model.logits(jnp.take_along_axis(hidden_BTD, last_B11, axis=1)[:, 0])
    return self.advance(rows, logits_BV, sampler), cache

  def decode(
    self, params: Params, rows: Rows, cache: Cache, sampler: Sampler, steps: Array
  ) -> tuple[Array, Rows, Cache]:
    """Makes up to `steps` tokens a row, fewer if all end; returns int32 (B, BLOCK_STEPS), EOS behind the last."""

    def goes_on(carry: tuple) -> Array:
      made, rows, *_ = carry
      return (made < steps) & ~jnp.all(rows.done_B)

    def step(carry: tuple) -> tuple:
      made, rows, cache, block_BX = carry
      model = nnx.merge(self.graphdef, params)
      hidden_B1D, cache = decoding.decode(
        model, rows.token_B[:, None], cache, rows.position_B, dtype=self.placement.dtype
      )
      rows = self.advance(rows, model.logits(hidden_B1D[:, 0]), sampler)
      return made + 1, rows, cache, block_BX.at[:, made].set(rows.token_B)

    block_BX = jnp.full((len(rows.token_B), BLOCK_STEPS), self.eos_id, jnp.int32)
    _, rows, cache, block_BX = jax.lax.while_loop(goes_on, step, (jnp.int32(0), rows, cache, block_BX))
    return block_BX, rows, cache

  def advance(self, rows: Rows, logits_BV: Array, sampler: Sampler) -> Rows:
    """Chooses the next token of every row that has not ended, from float32 logits."""
    key_B = jax.vmap(jax.random.fold_in, (0, None))(rows.key_B, rows.step)
    token_B = jnp.where(
      rows.done_B, self.eos_id, sampler.choose(only_pieces(logits_BV, self.n_ids), rows.seen_BV, key_B)
    )
    seen_BV = rows.seen_BV.at[jnp.arange(len(token_B)), token_B].set(True)
    done_B = rows.done_B | (token_B == self.eos_id)
    return Rows(token_B, rows.position_B + 1, seen_BV, done_B, rows.key_B, rows.step + 1)


def padded_length(length: int) -> int:
  """Returns the next of 16, 20, 24, 28, 32, 40, ...: four sizes an octave, so that at most a fifth is padding."""
  step = max(LEAST_TOKENS, 1 << (length - 1).bit_length()) // 8
  return max(LEAST_TOKENS, -(-length // step) * step)
