"""From logits to the next token: repetition penalty, temperature, top-p.

Two rules exist. The default penalises a repeated token whatever the sign of its logit. `seed_sampling` does what the
PyTorch code of experiment 1.4.2 does: it divides every repeated logit, which raises the negative ones.
"""

import dataclasses
from functools import partial
from typing import Self

import jax
import jax.numpy as jnp
from jax import Array

from mmjax.inference.settings import Sampling

# Of float32, where 1 / temperature must be neither infinite nor 0: below the one the most likely token is taken, above
# the other all are as likely, however far apart logits are.
LEAST_TEMPERATURE, MOST_TEMPERATURE = 1e-37, 1e30


@partial(
  jax.tree_util.register_dataclass,
  data_fields=('temperature', 'top_p', 'repetition_penalty'),
  meta_fields=('greedy', 'seed_sampling'),
)
@dataclasses.dataclass(frozen=True)
class Sampler:
  """How the next token is chosen; an argument of compiled functions, which other numbers do not compile again.

  Attributes:
    temperature, top_p, repetition_penalty: float32 scalars.
    greedy: take the most likely token.
    seed_sampling: see the top of this file.
  """

  temperature: Array
  top_p: Array
  repetition_penalty: Array
  greedy: bool
  seed_sampling: bool

  @classmethod
  def of(cls, sampling: Sampling) -> Self:
    """Takes the settings. The temperature of `seed_sampling` is that of the record's code: 1e-9 above the given one."""
    temperature = sampling.temperature + 1e-9 if sampling.seed_sampling else sampling.temperature
    temperature = min(max(temperature, LEAST_TEMPERATURE), MOST_TEMPERATURE)
    numbers = map(jnp.float32, (temperature, sampling.top_p, sampling.repetition_penalty))
    return cls(*numbers, greedy=sampling.temperature == 0, seed_sampling=sampling.seed_sampling)

  def choose(self, logits_BV: Array, seen_BV: Array, key_B: Array) -> Array:
    """Picks the next token of every row.

    Args:
      logits_BV: float32; -inf is never picked.
      seen_BV: bool; tokens of the row's prompt and continuation.
      key_B: a PRNG key for each row; unused if greedy.

    Returns:
      token_B: int32.
    """
    logits_BV = penalise(logits_BV, seen_BV, self.repetition_penalty, seed_sampling=self.seed_sampling)
    if self.greedy:
      return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
    return draw(logits_BV, self.temperature, self.top_p, key_B)


def only_pieces(logits_BV: Array, n_ids: int | None) -> Array:
  """Returns float32 logits with -inf for what is no piece of the tokenizer, which has `n_ids`; None: all are."""
  return logits_BV if n_ids is None else jnp.where(jnp.arange(logits_BV.shape[-1]) < n_ids, logits_BV, -jnp.inf)


def draw(logits_BV: Array, temperature: Array, top_p: Array, key_B: Array) -> Array:
  """Draws a token for every row, int32 token_B; temperature, above 0, and top_p are scalars or (B, 1)."""
  logits_BV -= jnp.max(logits_BV, axis=-1, keepdims=True)  # however small the temperature, the best stays a number
  logits_BV = keep_top_p(logits_BV / temperature, top_p)
  return jax.vmap(jax.random.categorical)(key_B, logits_BV).astype(jnp.int32)


def penalise(logits_BV: Array, seen_BV: Array, penalty: Array, *, seed_sampling: bool) -> Array:
  """Makes tokens that a row has seen less likely (penalty > 1), each row by its own tokens.

  Args:
    logits_BV: float32.
    seen_BV: bool.
    penalty: scalar > 0.
    seed_sampling: divide negative logits too, as the record's code does; that makes those tokens more likely.

  Returns:
    logits_BV.

  Source: Keskar et al. 2019, arXiv:1909.05858, section 4.1, which divides; multiplying negative logits keeps its aim.
  """
  lowered_BV = logits_BV / penalty
  if not seed_sampling:
    lowered_BV = jnp.where(logits_BV > 0, lowered_BV, logits_BV * penalty)
  return jnp.where(seen_BV, lowered_BV, logits_BV)


def keep_top_p(logits_BV: Array, top_p: Array) -> Array:
  """Sets to -inf what lies outside the nucleus: tokens whose more likely ones together hold more than `top_p`.

  The smallest logit inside is found by bisection over the 2^32 float32 values, exactly: a CPU makes 32 sums over V
  sooner than it sorts V logits.

  Args:
    logits_BV: float32. Equal logits stay or go together.
    top_p: scalar, or (B, 1); from 1 on everything stays. The most likely token always stays.

  Returns:
    logits_BV.

  Source: Holtzman et al. 2020, arXiv:1904.09751.
  """
  share_BV = jax.nn.softmax(logits_BV, axis=-1)
  bits_BV = jax.lax.bitcast_convert_type(logits_BV, jnp.int32)
  rank_BV = bits_BV ^ ((bits_BV >> 31) & 0x7FFFFFFF)  # integers in the order of the floats

  def halve(_: int, bounds_B1: tuple[Array, Array]) -> tuple[Array, Array]:
    low_B1, high_B1 = bounds_B1  # what ranks above high holds at most top_p; what ranks above low holds more
    middle_B1 = (low_B1 & high_B1) + ((low_B1 ^ high_B1) >> 1)  # the mean, without overflow
    held_B1 = jnp.sum(jnp.where(rank_BV > middle_B1, share_BV, 0), axis=-1, keepdims=True)
    within_B1 = held_B1 <= top_p
    return jnp.where(within_B1, low_B1, middle_B1), jnp.where(within_B1, middle_B1, high_B1)

  high_B1 = jnp.max(rank_BV, axis=-1, keepdims=True)
  low_B1 = jnp.full_like(high_B1, jnp.iinfo(jnp.int32).min)
  _, least_B1 = jax.lax.fori_loop(0, 32, halve, (low_B1, high_B1))
  return jnp.where((rank_BV >= least_B1) | (top_p >= 1), logits_BV, -jnp.inf)
