"""Completions that are written together: a new one joins the batch that is running, one that ends makes room.

The batch has SLOTS rows of one length, whatever stands in them, so that one compiled function serves it and every bit
of a row is what it would be alone. On a CPU, where products of 4 and of 16 rows have the same bits, few rows are
computed as FEW. A row's random numbers come from its own seed, choice and step.
Source: iteration-level scheduling, Yu et al. 2022, Orca.
"""

import asyncio
import dataclasses
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from mmjax.config import Config
from mmjax.environment import own_jax_settings
from mmjax.inference.api import LanguageModel
from mmjax.inference.generate import padded_length
from mmjax.inference.sampling import keep_top_p
from mmjax.inference.settings import Sampling
from mmjax.model.lm import Cache, Params, init_cache, model_graph

SLOTS, FEW = 16, 4
BLOCK = 8  # tokens of each row between two looks of the host
TOP = 5  # likeliest tokens that are told of each position
MOST_JOBS = 256  # written or waiting


class Token(NamedTuple):
  """A token that was written, the log of its probability, and the likeliest tokens with theirs."""

  id: int
  log_prob: float
  top: list[tuple[int, float]]


@dataclasses.dataclass(eq=False)
class Job:
  """One continuation: what it is of, how tokens are drawn, the number of the choice; tokens arrive in `written`."""

  prompt: Sequence[int]
  sampling: Sampling
  choice: int = 0
  made: int = 0
  left: bool = False
  written: asyncio.Queue = dataclasses.field(default_factory=asyncio.Queue)


class Batch:
  """The running batch of one model."""

  def __init__(self, lm: LanguageModel, worker: Callable[..., Awaitable]):
    """Compiles nothing yet.

    Args:
      lm: the model.
      worker: computes in a thread of its own what it is given.
    """
    self._lm, self._worker = lm, worker
    self._length = padded_length(lm.config.model.max_seq_len + BLOCK)
    steps = _Steps(
      model_graph(lm.config), lm.config, lm.placement.dtype, lm.placement.attention, lm.tokenizer.vocab_size
    )
    self._admit = lm.placement.jit(steps.admit, donate_argnames='cache')
    self._decode = lm.placement.jit(steps.decode, donate_argnames='cache')
    self._cache: Cache | None = None
    self._jobs: list[Job | None] = [None] * SLOTS
    self._state = _empty_state()
    self._waiting: deque[Job] = deque()
    self._running: asyncio.Task | None = None

  @property
  def full(self) -> bool:
    """Whether no more jobs are taken now."""
    return len(self._waiting) + sum(job is not None for job in self._jobs) >= MOST_JOBS

  async def write(self, job: Job) -> AsyncIterator[Token]:
    """Yields tokens as they are written, EOS included; who stops asking frees the place."""
    self._waiting.append(job)
    if self._running is None or self._running.done():
      self._running = asyncio.create_task(self._run())
    try:
      for _ in range(job.sampling.max_new_tokens):
        token = await job.written.get()
        if isinstance(token, BaseException):
          raise token
        yield token
        if token.id == self._lm.tokenizer.eos_id:
          return
    finally:
      job.left = True

  async def _run(self) -> None:
    """Goes round while there is anything to write."""
    try:
      while self._waiting or any(self._jobs):
        for job, tokens in await self._worker(self._round):
          for token in tokens:
            job.written.put_nowait(token)
    except BaseException as error:
      for job in (*filter(None, self._jobs), *self._waiting):
        job.written.put_nowait(error)
      self._jobs, self._cache = [None] * SLOTS, None
      self._waiting.clear()
      raise

  @own_jax_settings()
  def _round(self) -> list[tuple[Job, list[Token]]]:
    """Frees places and fills them, and writes BLOCK tokens in each row."""
    for slot, job in enumerate(self._jobs):
      if job is not None and (job.left or job.made >= job.sampling.max_new_tokens):
        self._jobs[slot], self._state['position_B'][slot] = None, 0
      while self._jobs[slot] is None and self._waiting:
        job = self._waiting.popleft()
        if not job.left:
          self._place(slot, job)
    if not any(self._jobs):
      return []
    last = max(slot for slot, job in enumerate(self._jobs) if job)
    rows = FEW if last < FEW and jax.default_backend() == 'cpu' else SLOTS
    state = {name: values[:rows] for name, values in self._state.items()}
    self._cache, written = self._decode(self._lm.params, self._cache, state)
    token_XB, log_XB, top_XBK, top_log_XBK = map(np.asarray, written)
    self._state['token_B'][:rows] = token_XB[-1]
    self._state['position_B'][:rows] += BLOCK
    self._state['step_B'][:rows] += BLOCK
    found = []
    for slot, job in enumerate(self._jobs[:rows]):
      if job is None:  # such a row writes into its own place, from the start again and again
        self._state['position_B'][slot] = 0
        continue
      job.made += BLOCK
      tops = (list(zip(top_XBK[x, slot].tolist(), top_log_XBK[x, slot].tolist(), strict=True)) for x in range(BLOCK))
      of_row = zip(token_XB[:, slot].tolist(), log_XB[:, slot].tolist(), tops, strict=True)
      found.append((job, [Token(*token) for token in of_row]))
    return found

  def _place(self, slot: int, job: Job) -> None:
    """Reads a job's prompt into a row; its last token is read again by the first step, which draws what follows."""
    self._jobs[slot] = job
    if self._cache is None:
      self._cache = init_cache(self._lm.config.model, SLOTS, self._length, self._lm.placement.dtype)
    padding = padded_length(len(job.prompt)) - len(job.prompt)
    tokens_1T = np.pad(np.asarray(job.prompt, np.int32), (0, padding))[None]
    self._cache = self._admit(self._lm.params, self._cache, tokens_1T, slot)
    key = jax.random.fold_in(jax.random.key(job.sampling.seed), job.choice)
    row = {
      'token_B': job.prompt[-1],
      'position_B': len(job.prompt) - 1,
      'key_B2': np.asarray(jax.random.key_data(key)),
      'step_B': 0,
      'temperature_B': job.sampling.temperature,
      'top_p_B': job.sampling.top_p,
    }
    for name, value in row.items():
      self._state[name][slot] = value


def _empty_state() -> dict[str, np.ndarray]:
  """Returns where each row stands, on the host."""
  ints, floats = {'token_B', 'position_B', 'step_B'}, {'temperature_B', 'top_p_B'}
  state = {name: np.zeros(SLOTS, np.int32) for name in ints} | {name: np.ones(SLOTS, np.float32) for name in floats}
  return state | {'key_B2': np.zeros((SLOTS, 2), np.uint32)}


@dataclasses.dataclass(frozen=True, eq=False)
class _Steps:
  """What is compiled."""

  graphdef: nnx.GraphDef
  config: Config
  dtype: jnp.dtype
  attention: str
  n_ids: int

  def admit(self, params: Params, cache: Cache, tokens_1T: Array, slot: Array) -> Cache:
    """Returns the cache with a prompt in one of its rows."""
    row = init_cache(self.config.model, 1, cache.token_BS.shape[1], self.dtype)
    _, row = nnx.merge(self.graphdef, params).prefill(tokens_1T, row, dtype=self.dtype, attention=self.attention)
    return jax.tree.map(lambda whole, one: jax.lax.dynamic_update_slice_in_dim(whole, one, slot, 0), cache, row)

  def decode(self, params: Params, cache: Cache, state: dict[str, Array]) -> tuple[Cache, tuple[Array, ...]]:
    """Writes BLOCK tokens in each of the first rows, as many as `state` has.

    Returns:
      The cache and, with X = BLOCK and K = TOP, token_XB, their log-probabilities, and the likeliest ones' (X, B, K).
    """
    model, whole = nnx.merge(self.graphdef, params), cache
    cache = jax.tree.map(lambda leaf: leaf[: len(state['token_B'])], whole)
    key_B = jax.random.wrap_key_data(state['key_B2'])
    temperature_B1, top_p_B1 = state['temperature_B'][:, None], state['top_p_B'][:, None]

    def step(carry: tuple, at: Array) -> tuple[tuple, tuple[Array, ...]]:
      token_B, cache = carry
      hidden_B1D, cache = model.decode(token_B[:, None], cache, state['position_B'] + at, dtype=self.dtype)
      logits_BV = model.logits(hidden_B1D[:, 0])
      logits_BV = jnp.where(jnp.arange(logits_BV.shape[-1]) < self.n_ids, logits_BV, -jnp.inf)
      log_BV = jax.nn.log_softmax(logits_BV, axis=-1)
      top_log_BK, top_BK = jax.lax.top_k(log_BV, TOP)
      scaled_BV = (logits_BV - jnp.max(logits_BV, axis=-1, keepdims=True)) / jnp.maximum(temperature_B1, 1e-37)
      step_key_B = jax.vmap(jax.random.fold_in)(key_B, state['step_B'] + at)
      drawn_B = jax.vmap(jax.random.categorical)(step_key_B, keep_top_p(scaled_BV, top_p_B1)).astype(jnp.int32)
      token_B = jnp.where(temperature_B1[:, 0] == 0, jnp.argmax(logits_BV, axis=-1).astype(jnp.int32), drawn_B)
      log_B = jnp.take_along_axis(log_BV, token_B[:, None], axis=-1)[:, 0]
      return (token_B, cache), (token_B, log_B, top_BK, top_log_BK)

    (_, cache), written = jax.lax.scan(step, (state['token_B'], cache), jnp.arange(BLOCK, dtype=jnp.int32))
    return jax.tree.map(lambda leaf, part: leaf.at[: len(part)].set(part), whole, cache), written
