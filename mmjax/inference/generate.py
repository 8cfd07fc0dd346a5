"""Continuing token sequences: prompts are read at once, then one token a step comes out of a key-value cache.

Both parts are compiled for a few shapes only: prompts are padded to the next size of a short list, so that a new
length rarely needs a new compilation. A block of steps is one call; the host sees tokens after each block, which is
what streaming needs, and asks the device no more often than that.
"""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from jax.typing import DTypeLike

from mmjax.config import Config, ModelConfig
from mmjax.environment import own_jax_settings
from mmjax.inference.sampling import Knobs, choose_tokens, knobs_of
from mmjax.inference.settings import Sampling
from mmjax.model.lm import Cache, Params, init_cache, model_graph
from mmjax.run.placement import Placement, place_reader

BLOCK_STEPS = 16  # tokens between two looks of the host: smooth to read, and the call costs 1/16 of its time a token
MOST_ROWS = 32  # continued at the same time; more prompts wait, so that the caches stay small
LEAST_TOKENS = 16  # shortest padded prompt
NO_EOS = -1  # every row goes on to its last token


class DecodeState(NamedTuple):
  """Where each row stands: its last token and that token's position, not yet in the cache."""

  token_B: Array
  position_B: Array
  seen_BV: Array
  done_B: Array
  step: Array
  cache: Cache


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
    params = jax.tree.map(jnp.asarray, params)  # once: arrays of NumPy would be copied at every call
    self._params, self._eos_id, self._vocab_size = params, eos_id, config.model.vocab_size
    graphdef = model_graph(config)
    placement = placement or place_reader(config, dtype='float32')
    dtype = placement.dtype
    modes = ('greedy', 'seed_sampling')
    self._prefill = placement.jit(
      partial(_prefill, graphdef, config.model, dtype, placement.attention, eos_id, n_ids),
      static_argnames=('length', *modes),
    )
    # A CPU reads (out, in) matrices faster where a product has a single row: 1.16 times the tokens/s of 1.4.2.
    transposed = jax.default_backend() == 'cpu'
    self._decode_params = _transpose_kernels(params) if transposed else params
    self._decode = placement.jit(
      partial(_decode, graphdef, dtype, eos_id, n_ids, transposed), static_argnames=modes, donate_argnames='state'
    )

  def generate(self, prompts: Sequence[Sequence[int]], sampling: Sampling) -> list[list[int]]:
    """Continues every prompt to its end.

    Args:
      prompts: token ids in [0, V), at least one each.
      sampling: how.

    Returns:
      For each prompt its new tokens; EOS is the last one where the row ended by itself.
    """
    rows = []
    for first in range(0, len(prompts), MOST_ROWS):
      part = prompts[first : first + MOST_ROWS]
      new = [[] for _ in part]
      for block in self.stream(part, sampling, first):
        for row, tokens in zip(new, block, strict=True):
          row += tokens
      rows += new
    return rows

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
    mode = {'greedy': sampling.greedy, 'seed_sampling': sampling.seed_sampling}
    knobs = knobs_of(sampling)
    with own_jax_settings():  # left before each yield: they are not the caller's
      tokens_BT, length_B, seen_BV, key_B = self._pad(prompts, sampling, first_row)
      # Room for whole blocks: the shape of the cache, and with it the compiled function, changes rarely.
      length = padded_length(tokens_BT.shape[1] + sampling.max_new_tokens)
      state = self._prefill(self._params, tokens_BT, length_B, seen_BV, key_B, knobs, length=length, **mode)
    yield self._cut(np.asarray(state.token_B)[:, None], len(prompts), ended := [False] * len(prompts))
    made = 1
    while made < sampling.max_new_tokens and not all(ended):
      steps = min(BLOCK_STEPS, sampling.max_new_tokens - made)
      with own_jax_settings():
        block_BX, state = self._decode(self._decode_params, state, key_B, knobs, steps, **mode)
      yield self._cut(np.asarray(block_BX)[:, :steps], len(prompts), ended)
      made += steps

  def _pad(
    self, prompts: Sequence[Sequence[int]], sampling: Sampling, first_row: int
  ) -> tuple[np.ndarray, np.ndarray, np.ndarray, Array]:
    """Returns tokens_BT padded on the right, lengths (0 for rows without a prompt), tokens seen, and keys."""
    rows = 1 << (len(prompts) - 1).bit_length()
    tokens_BT = np.zeros((rows, padded_length(max(map(len, prompts)))), np.int32)
    length_B = np.zeros(rows, np.int32)
    seen_BV = np.zeros((rows, self._vocab_size), bool)
    for row, prompt in enumerate(prompts):
      tokens_BT[row, : len(prompt)] = prompt
      length_B[row] = len(prompt)
      seen_BV[row, prompt] = True
    if not sampling.seed_sampling and self._eos_id != NO_EOS:
      seen_BV[:, self._eos_id] = False  # prompts may open with it; a penalty on it would put off the end
    keys = jax.vmap(jax.random.fold_in, (None, 0))(
      jax.random.key(sampling.seed), jnp.arange(first_row, first_row + rows)
    )
    return tokens_BT, length_B, seen_BV, keys

  def _cut(self, block_BX: np.ndarray, n_rows: int, ended: list[bool]) -> list[list[int]]:
    """Returns each row's tokens up to its EOS, and notes in `ended` which rows had it."""
    block = []
    for row, tokens in enumerate(block_BX[:n_rows].tolist()):
      if ended[row]:
        tokens = []
      elif self._eos_id in tokens:
        tokens, ended[row] = tokens[: tokens.index(self._eos_id) + 1], True
      block.append(tokens)
    return block


def padded_length(length: int) -> int:
  """Returns the next of 16, 20, 24, 28, 32, 40, ...: four sizes an octave, so that at most a fifth is padding."""
  step = max(LEAST_TOKENS, 1 << (length - 1).bit_length()) // 8
  return max(LEAST_TOKENS, -(-length // step) * step)


def _prefill(
  graphdef: nnx.GraphDef,
  config: ModelConfig,
  dtype: DTypeLike,
  attention: str,
  eos_id: int,
  n_ids: int | None,
  params: Params,
  tokens_BT: Array,
  length_B: Array,
  seen_BV: Array,
  key_B: Array,
  knobs: Knobs,
  *,
  length: int,
  greedy: bool,
  seed_sampling: bool,
) -> DecodeState:
  """Reads the prompts into a cache of `length` positions and chooses the first new token of every row."""
  model = nnx.merge(graphdef, params)
  cache = init_cache(config, len(tokens_BT), length, dtype)
  hidden_BTD, cache = model.prefill(tokens_BT, cache, dtype=dtype, attention=attention)
  last_B11 = jnp.maximum(length_B - 1, 0)[:, None, None]
  logits_BV = model.logits(jnp.take_along_axis(hidden_BTD, last_B11, axis=1)[:, 0])
  state = DecodeState(length_B, length_B - 1, seen_BV, length_B == 0, jnp.int32(0), cache)
  return _advance(state, logits_BV, key_B, knobs, eos_id, n_ids, greedy, seed_sampling)


def _decode(
  graphdef: nnx.GraphDef,
  dtype: DTypeLike,
  eos_id: int,
  n_ids: int | None,
  transposed: bool,
  params: Params,
  state: DecodeState,
  key_B: Array,
  knobs: Knobs,
  steps: Array,
  *,
  greedy: bool,
  seed_sampling: bool,
) -> tuple[Array, DecodeState]:
  """Makes up to `steps` tokens a row, fewer if all rows end; returns them as (B, BLOCK_STEPS), EOS behind the last.

  `transposed`: whether the matrices in `params` are.
  """

  def goes_on(carry: tuple) -> Array:
    made, state, _ = carry
    return (made < steps) & ~jnp.all(state.done_B)

  def step(carry: tuple) -> tuple:
    made, state, block_BX = carry
    # Turned back here and not before the loop, so that XLA makes it part of the products.
    model = nnx.merge(graphdef, _transpose_kernels(params) if transposed else params)
    hidden_B1D, cache = model.decode(state.token_B[:, None], state.cache, state.position_B, dtype=dtype)
    state = state._replace(cache=cache)
    state = _advance(state, model.logits(hidden_B1D[:, 0]), key_B, knobs, eos_id, n_ids, greedy, seed_sampling)
    return made + 1, state, block_BX.at[:, made].set(state.token_B)

  block_BX = jnp.full((len(state.token_B), BLOCK_STEPS), eos_id, jnp.int32)
  _, state, block_BX = jax.lax.while_loop(goes_on, step, (jnp.int32(0), state, block_BX))
  return block_BX, state


def _transpose_kernels(params: Params) -> Params:
  """Returns the parameters with (out, in) in place of (in, out) matrices, or the other way round."""

  def transpose(path: tuple, leaf: Array) -> Array:
    return leaf.T if path[-1].key == 'kernel' and leaf.ndim == 2 else leaf

  return jax.tree_util.tree_map_with_path(transpose, params)


def _advance(
  state: DecodeState,
  logits_BV: Array,
  key_B: Array,
  knobs: Knobs,
  eos_id: int,
  n_ids: int | None,
  greedy: bool,
  seed_sampling: bool,
) -> DecodeState:
  """Chooses the next token of every row that has not ended."""
  key_B = jax.vmap(jax.random.fold_in, (0, None))(key_B, state.step)
  modes = {'greedy': greedy, 'seed_sampling': seed_sampling, 'n_ids': n_ids}
  token_B = choose_tokens(logits_BV, state.seen_BV, key_B, knobs, **modes)
  token_B = jnp.where(state.done_B, eos_id, token_B)
  seen_BV = state.seen_BV.at[jnp.arange(len(token_B)), token_B].set(True)
  done_B = state.done_B | (token_B == eos_id)
  return DecodeState(token_B, state.position_B + 1, seen_BV, done_B, state.step + 1, state.cache)
