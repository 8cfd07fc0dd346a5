"""Completions that are written together: a new one joins the batch that is running, one that ends makes room.

Rows are computed in groups of one size and length, whatever stands in them, so that one compiled function serves them
and every bit of a row is what it would be alone. On a CPU groups are small, because a row that is free costs what any
other does. A row's random numbers come from its own seed, choice and step.
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
from mmjax.inference.sampling import LEAST_TEMPERATURE, MOST_TEMPERATURE, draw, only_pieces
from mmjax.inference.settings import Sampling
from mmjax.model import decoding
from mmjax.model.decoding import Cache, init_cache
from mmjax.model.params import Params, model_graph

SLOTS = 16  # written at the same time
CPU_ROWS = 4  # of a group on a CPU; elsewhere all are one group
BLOCK_STEPS = 8  # tokens of each row between two looks of the host
MOST_LOGPROBS = 5  # likeliest tokens that are told of each position
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
    rows = CPU_ROWS if jax.default_backend() == 'cpu' else SLOTS
    self._groups = [_Group(rows) for _ in range(SLOTS // rows)]
    steps = _BatchSteps(
      model_graph(lm.config), lm.config, lm.placement.dtype, lm.placement.attention, lm.tokenizer.vocab_size
    )
    self._admit = lm.placement.jit(steps.admit, donate_argnames='cache')
    self._decode = lm.placement.jit(steps.decode, donate_argnames='cache')
    self._waiting: deque[Job] = deque()
    self._running: asyncio.Task | None = None

  @property
  def full(self) -> bool:
    """Whether no more jobs are taken now."""
    return len(self._waiting) + len(self._written()) >= MOST_JOBS

  def _written(self) -> list[Job]:
    return [job for group in self._groups for job in group.jobs if job]

  async def write(self, job: Job) -> AsyncIterator[Token]:
    """Yields tokens as they are written, EOS included, and raises what broke the batch. Who leaves frees the place."""
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
      while self._waiting or self._written():
        for group in self._groups:
          for job, tokens in await self._worker(self._round, group):
            for token in tokens:
              job.written.put_nowait(token)
    except BaseException as error:
      for job in (*self._written(), *self._waiting):
        job.written.put_nowait(error)
      self._groups = [_Group(len(group.jobs)) for group in self._groups]
      self._waiting.clear()
      raise

  def _empty(self, group: '_Group') -> Cache:
    model = self._lm.config.model
    return init_cache(model, len(group.jobs), padded_length(model.max_seq_len + BLOCK_STEPS), self._lm.placement.dtype)

  @own_jax_settings()
  def _round(self, group: '_Group') -> list[tuple[Job, list[Token]]]:
    """Frees places of a group and fills them, and writes BLOCK_STEPS tokens in each row."""
    for row, job in enumerate(group.jobs):
      if job is not None and (job.left or job.made >= job.sampling.max_new_tokens):
        group.jobs[row] = None
      while group.jobs[row] is None and self._waiting:
        job = self._waiting.popleft()
        if not job.left:
          tokens_1T = np.pad(job.prompt, (0, padded_length(len(job.prompt)) - len(job.prompt)))[None].astype(np.int32)
          group.cache = self._admit(self._lm.params, group.cache or self._empty(group), tokens_1T, row)
          group.place(row, job)
    if not any(group.jobs):
      return []
    group.cache, written = self._decode(self._lm.params, group.cache, group.state)
    token_XB, *told = map(np.asarray, written)
    group.advance(token_XB[-1])
    found = []
    for row, job in enumerate(group.jobs):
      if job is not None:
        job.made += BLOCK_STEPS
        of_row = zip(*(x[:, row].tolist() for x in (token_XB, *told)), strict=True)
        found.append((job, [Token(id, log, list(zip(top, logs, strict=True))) for id, log, logs, top in of_row]))
    return found


class _Group:
  """Rows that are computed together, and where each stands; those without a job write into their own place.

  Attributes:
    jobs: of each row, or None.
    state: on the host, what `_BatchSteps.decode` takes.
    cache: on the device; None before the first job.
  """

  def __init__(self, rows: int):
    self.jobs: list[Job | None] = [None] * rows
    ints, floats = ('token_B', 'position_B', 'step_B'), ('temperature_B', 'top_p_B')
    self.state = {name: np.zeros(rows, np.int32) for name in ints} | {
      name: np.ones(rows, np.float32) for name in floats
    }
    self.state['key_B2'] = np.zeros((rows, 2), np.uint32)
    self.cache: Cache | None = None

  def place(self, row: int, job: Job) -> None:
    """Puts a job into a row whose cache has its prompt: the last token is read again by the first step."""
    self.jobs[row] = job
    key = jax.random.fold_in(jax.random.key(job.sampling.seed), job.choice)
    self.state['key_B2'][row] = jax.random.key_data(key)
    self.state['token_B'][row], self.state['position_B'][row] = job.prompt[-1], len(job.prompt) - 1
    self.state['temperature_B'][row] = min(job.sampling.temperature, MOST_TEMPERATURE)
    self.state['top_p_B'][row] = job.sampling.top_p
    self.state['step_B'][row] = 0

  def advance(self, token_B: np.ndarray) -> None:
    """Notes that BLOCK_STEPS tokens were written, which end in these, int32."""
    busy_B = np.array([job is not None for job in self.jobs])
    self.state['token_B'] = np.where(busy_B, token_B, 0).astype(np.int32)
    self.state['position_B'] = np.where(busy_B, self.state['position_B'] + BLOCK_STEPS, 0).astype(np.int32)
    self.state['step_B'] += BLOCK_STEPS


@dataclasses.dataclass(frozen=True, eq=False)
class _BatchSteps:
  """What is compiled."""

  graphdef: nnx.GraphDef
  config: Config
  dtype: jnp.dtype
  attention: str
  n_ids: int

  def admit(self, params: Params, cache: Cache, tokens_1T: Array, slot: Array) -> Cache:
    """Returns the cache with a prompt, int32, in one of its rows."""
    row = init_cache(self.config.model, 1, cache.token_BS.shape[1], self.dtype)
    model = nnx.merge(self.graphdef, params)
    _, row = decoding.prefill(model, tokens_1T, row, dtype=self.dtype, attention=self.attention)
    return jax.tree.map(lambda whole, one: jax.lax.dynamic_update_slice_in_dim(whole, one, slot, 0), cache, row)

  def decode(self, params: Params, cache: Cache, state: dict[str, Array]) -> tuple[Cache, tuple[Array, ...]]:
    """Writes BLOCK_STEPS tokens in each row.

    Returns:
      The cache and, with X = BLOCK_STEPS, int32 token_XB and their float32 log-probabilities; of the likeliest tokens
      log-probabilities and ids, (X, B, MOST_LOGPROBS).
    """
    model = nnx.merge(self.graphdef, params)
    key_B = jax.random.wrap_key_data(state['key_B2'])
    temperature_B1, top_p_B1 = state['temperature_B'][:, None], state['top_p_B'][:, None]

    def step(carry: tuple, at: Array) -> tuple[tuple, tuple[Array, ...]]:
      token_B, cache = carry
      hidden_B1D, cache = decoding.decode(model, token_B[:, None], cache, state['position_B'] + at, dtype=self.dtype)
      logits_BV = only_pieces(model.logits(hidden_B1D[:, 0]), self.n_ids)
      log_BV = jax.nn.log_softmax(logits_BV, axis=-1)
      step_key_B = jax.vmap(jax.random.fold_in)(key_B, state['step_B'] + at)
      drawn_B = draw(logits_BV, jnp.maximum(temperature_B1, LEAST_TEMPERATURE), top_p_B1, step_key_B)
      token_B = jnp.where(temperature_B1[:, 0] == 0, jnp.argmax(logits_BV, axis=-1).astype(jnp.int32), drawn_B)
      log_B = jnp.take_along_axis(log_BV, token_B[:, None], axis=-1)[:, 0]
      return (token_B, cache), (token_B, log_B, *jax.lax.top_k(log_BV, MOST_LOGPROBS))

    (_, cache), written = jax.lax.scan(step, (state['token_B'], cache), jnp.arange(BLOCK_STEPS, dtype=jnp.int32))
    return cache, written
