"""Sampling: penalty, top-p and draws against brute force in float64.

The PyTorch code's rule is compared with in test_parity_generation.py.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmjax.errors import UserError
from mmjax.inference.sampling import Sampler, keep_top_p, penalise
from mmjax.inference.settings import Sampling


def random_logits(seed: int, rows: int = 3, vocab: int = 50, scale: float = 3.0) -> np.ndarray:
  return np.random.default_rng(seed).normal(0, scale, (rows, vocab)).astype(np.float32)


jitted_top_p = jax.jit(keep_top_p)


def brute_force_nucleus(logits_V: np.ndarray, top_p: float) -> set[int]:
  share_V = np.exp(logits_V.astype(np.float64) - logits_V.max())
  share_V /= share_V.sum()
  return {i for i in range(len(share_V)) if share_V[logits_V > logits_V[i]].sum() <= top_p}


@settings(max_examples=60, deadline=None)
@given(
  seed=st.integers(0, 10_000),
  top_p=st.sampled_from([0.0, 0.01, 0.3, 0.5, 0.9, 0.999]),
  scale=st.sampled_from([1e-3, 1.0, 30.0]),
)
def test_top_p_equals_brute_force(seed, top_p, scale):
  logits = random_logits(seed, scale=scale)
  kept = np.isfinite(np.asarray(jitted_top_p(jnp.asarray(logits), jnp.float32(top_p))))
  for row in range(len(logits)):
    assert set(np.flatnonzero(kept[row])) == brute_force_nucleus(logits[row], top_p)


def test_top_p_of_one_keeps_everything_and_of_zero_the_best():
  logits = jnp.asarray(random_logits(0))
  np.testing.assert_array_equal(keep_top_p(logits, jnp.float32(1)), logits)
  best = np.isfinite(np.asarray(keep_top_p(logits, jnp.float32(0))))
  np.testing.assert_array_equal(best.argmax(-1), logits.argmax(-1))
  assert (best.sum(-1) == 1).all()


def test_top_p_keeps_equal_logits_together_and_bears_extreme_ones():
  logits = jnp.array([[2.0, 2.0, 0.0, -jnp.inf], [3e38, -3e38, 0.0, -0.0], [-5.0, -5.0, -5.0, -5.0]])
  kept = np.isfinite(np.asarray(keep_top_p(logits, jnp.float32(0.6))))
  np.testing.assert_array_equal(kept, [[1, 1, 0, 0], [1, 0, 0, 0], [1, 1, 1, 1]])


def test_penalty_lowers_seen_tokens_of_their_own_row_only():
  logits = jnp.array([[2.0, -2.0, 1.0], [2.0, -2.0, 1.0]])
  seen = jnp.array([[True, True, False], [False, False, True]])
  got = penalise(logits, seen, jnp.float32(2), seed_sampling=False)
  np.testing.assert_array_equal(got, [[1, -4, 1], [2, -2, 0.5]])
  seeds = penalise(logits, seen, jnp.float32(2), seed_sampling=True)
  np.testing.assert_array_equal(seeds, [[1, -1, 1], [2, -2, 0.5]])


def choose(logits, seen=None, key=0, **settings):
  logits = jnp.asarray(logits)
  seen = jnp.zeros(logits.shape, bool) if seen is None else jnp.asarray(seen)
  keys = jax.random.split(jax.random.key(key), len(logits))
  return np.asarray(Sampler.of(Sampling(**settings)).choose(logits, seen, keys))


def test_greedy_takes_the_best_after_the_penalty():
  logits = [[2.0, 1.5, 0.0], [-1.0, -1.5, -9.0]]
  seen = [[True, False, False], [True, False, False]]
  np.testing.assert_array_equal(choose(logits, temperature=0), [0, 0])
  np.testing.assert_array_equal(choose(logits, seen, temperature=0, repetition_penalty=2), [1, 1])
  np.testing.assert_array_equal(choose(logits, seen, temperature=0, repetition_penalty=2, seed_sampling=True), [1, 0])


def test_draws_have_the_shares_of_the_distribution():
  logits = np.log(np.array([0.5, 0.3, 0.15, 0.05], np.float32))
  drawn = choose(np.tile(logits, (20_000, 1)), temperature=1, top_p=0.6)
  shares = np.bincount(drawn, minlength=4) / len(drawn)
  np.testing.assert_allclose(shares, [0.625, 0.375, 0, 0], atol=0.015)  # 3 standard deviations are 0.010
  warm = choose(np.tile(logits, (20_000, 1)), temperature=2, top_p=1)
  roots = np.sqrt([0.5, 0.3, 0.15, 0.05])
  np.testing.assert_allclose(np.bincount(warm) / len(warm), roots / roots.sum(), atol=0.015)


@pytest.mark.parametrize('temperature', [1e-3, 1e-30, 1e-37, 1e-38, 1e-40, 1e-45, 1e-300, 5e-324])
def test_the_smaller_the_temperature_the_more_it_is_the_most_likely_token(temperature):
  logits = random_logits(3, rows=64, scale=30.0)
  logits[:, 7] = -np.inf  # as of spare rows
  for top_p in (1.0, 0.9, 1e-300, 0.0):
    np.testing.assert_array_equal(choose(logits, temperature=temperature, top_p=top_p), logits.argmax(-1))


@pytest.mark.parametrize('temperature', [1e6, 1e38, 1e39, 1e300, 1.7e308])
def test_a_huge_temperature_draws_evenly_from_what_is_not_ruled_out(temperature):
  logits = np.tile(np.array([5.0, -3.0, -np.inf, 0.0], np.float32), (4000, 1))
  drawn = choose(logits, temperature=temperature, top_p=1)
  np.testing.assert_allclose(np.bincount(drawn, minlength=4) / 4000, [1 / 3, 1 / 3, 0, 1 / 3], atol=0.03)


def test_what_is_ruled_out_is_never_picked():
  logits = random_logits(4, rows=64)
  logits[:, 40:] = -np.inf
  seen = np.ones(logits.shape, bool)
  for numbers in ({'temperature': 0}, {'temperature': 1e-40}, {'temperature': 1e38, 'top_p': 1}, {'top_p': 0}):
    assert choose(logits, seen, repetition_penalty=2, **numbers).max() < 40


def test_other_numbers_are_another_argument_and_no_other_function():
  traced = []
  jitted = jax.jit(lambda sampler, logits, keys: traced.append(1) or sampler.choose(logits, logits > 0, keys))
  logits, keys = jnp.asarray(random_logits(0)), jax.random.split(jax.random.key(0), 3)
  for numbers in ({}, {'temperature': 0.2, 'top_p': 0.3}, {'repetition_penalty': 2.0}, {'seed': 5}):
    jitted(Sampler.of(Sampling(**numbers)), logits, keys)
  assert len(traced) == 1
  jitted(Sampler.of(Sampling(temperature=0)), logits, keys)
  assert len(traced) == 2


def test_the_same_key_draws_the_same_tokens():
  logits = random_logits(2, rows=64)
  np.testing.assert_array_equal(choose(logits, key=1), choose(logits, key=1))
  assert (choose(logits, key=1) != choose(logits, key=2)).any()


@pytest.mark.parametrize(
  ('field', 'value'),
  [
    ('temperature', -0.1),
    ('temperature', float('nan')),
    ('top_p', 1.1),
    ('repetition_penalty', 0),
    ('max_new_tokens', 0),
    ('max_new_tokens', 1.5),
    ('max_new_tokens', 10**9),
    ('seed', -1),
  ],
)
def test_a_bad_setting_is_named_with_its_value(field, value):
  with pytest.raises(UserError, match=f'^{field}={value} must be '):
    Sampling(**{field: value})
