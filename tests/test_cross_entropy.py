"""Chunked cross entropy against float64, torch and itself in one piece."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmjax.kernels.cross_entropy import cross_entropy_sums
from tests import references

# B, T, D, V, chunk
SHAPES = [(2, 5, 4, 7, 2), (1, 1, 3, 5, 1), (1, 127, 2, 13, 64), (3, 8, 8, 33, 8), (2, 6, 4, 3, 100), (2, 9, 4, 300, 1)]


def make_inputs(B, T, D, V, seed=0):
  rng = np.random.default_rng(seed)
  hidden, output = rng.standard_normal((B, T, D)), rng.standard_normal((V, D))
  weight = rng.uniform(size=(B, T)) * rng.integers(0, 2, (B, T))  # some are 0
  return (
    jnp.asarray(hidden, jnp.float32), jnp.asarray(output, jnp.float32),
    jnp.asarray(rng.integers(0, V, (B, T)), jnp.int32), jnp.asarray(weight, jnp.float32),
  )  # fmt: skip


def sums_float64(hidden, output, target, weight):
  """Both sums, and the gradients of the first, from the definition."""
  hidden, output, weight = (np.asarray(x, np.float64) for x in (hidden, output, weight))
  logits = hidden @ output.T
  p = np.exp(logits - logits.max(-1, keepdims=True))
  p /= p.sum(-1, keepdims=True)
  one_hot = np.eye(len(output))[np.asarray(target)]
  d = (p - one_hot) * weight[..., None]
  nll = -(weight * np.log((p * one_hot).sum(-1))).sum()
  correct = (weight * (logits.argmax(-1) == target)).sum()
  return nll, correct, d @ output, np.einsum('btv,btd->vd', d, hidden)


@functools.partial(jax.jit, static_argnums=4)
def sums_and_gradients(hidden, output, target, weight, chunk):
  grad = jax.value_and_grad(cross_entropy_sums, argnums=(0, 1), has_aux=True)
  (nll, correct), (dhidden, doutput) = grad(hidden, output, target, weight, chunk)
  return nll, correct, dhidden, doutput


@pytest.mark.parametrize('B, T, D, V, chunk', SHAPES)
@pytest.mark.thorough
def test_sums_and_gradients_match_float64(forms, B, T, D, V, chunk):
  inputs = make_inputs(B, T, D, V)
  expected = sums_float64(*inputs)
  for a, e in zip(sums_and_gradients(*inputs, chunk), expected, strict=True):
    np.testing.assert_allclose(a, e, rtol=2e-5, atol=2e-5)
  without_gradient = jax.jit(cross_entropy_sums, static_argnums=4)(*inputs, chunk)
  np.testing.assert_allclose(without_gradient, expected[:2], rtol=2e-5, atol=2e-5)
  np.testing.assert_allclose(references.cross_entropy_sums(*inputs), expected[:2], rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize('B, T, D, V, chunk', SHAPES[:3])
def test_bfloat16_hidden_states_give_float32_output_gradients(forms, B, T, D, V, chunk):
  hidden, output, target, weight = make_inputs(B, T, D, V)
  hidden = hidden.astype(jnp.bfloat16)
  nll, _, dhidden, doutput = sums_and_gradients(hidden, output, target, weight, chunk)
  expected = sums_float64(hidden, output.astype(jnp.bfloat16), target, weight)
  assert nll.dtype == doutput.dtype == jnp.float32 and dhidden.dtype == jnp.bfloat16
  bound = 0.02 if forms == 'gpu' else 1e-4  # logits are rounded there
  np.testing.assert_allclose(nll, expected[0], rtol=bound, atol=bound)
  for a, e in zip((dhidden, doutput), expected[2:], strict=True):
    np.testing.assert_allclose(np.asarray(a, np.float64), e, rtol=0.02, atol=0.01)


def test_matches_torch():
  torch = pytest.importorskip('torch')
  hidden, output, target, weight = make_inputs(2, 9, 4, 30)
  leaves = [torch.tensor(np.asarray(x)).requires_grad_() for x in (hidden, output)]
  logits = (leaves[0] @ leaves[1].T).reshape(-1, 30)
  each = torch.nn.functional.cross_entropy(logits, torch.tensor(np.asarray(target)).long().ravel(), reduction='none')
  loss = (each * torch.tensor(np.asarray(weight)).ravel()).sum()
  nll, _, *grads = sums_and_gradients(hidden, output, target, weight, 4)
  np.testing.assert_allclose(nll, loss.detach(), rtol=1e-5)
  for a, e in zip(grads, torch.autograd.grad(loss, leaves), strict=True):
    np.testing.assert_allclose(a, e, rtol=1e-4, atol=1e-5)


def test_gradient_is_scaled_by_what_follows():
  inputs = make_inputs(2, 5, 4, 7)
  loss = jax.jit(jax.grad(lambda h, o: 3 * cross_entropy_sums(h, o, *inputs[2:], 2)[0] + 5.0, argnums=(0, 1)))
  for scaled, gradient in zip(loss(*inputs[:2]), sums_and_gradients(*inputs, 2)[2:], strict=True):
    np.testing.assert_allclose(scaled, 3 * gradient, rtol=1e-6)


def test_first_of_equal_logits_is_the_prediction(forms):
  hidden, output = jnp.ones((5, 2, 1)), jnp.asarray([[0.0], [1.0], [1.0], [1.0], [0.0]])
  target = jnp.broadcast_to(jnp.arange(5)[:, None], (5, 2))
  each = jax.jit(jax.vmap(lambda h, t: cross_entropy_sums(h[None], output, t[None], jnp.ones((1, 2)), 2)[1]))
  np.testing.assert_array_equal(each(hidden, target), [0, 2, 0, 0, 0])


def test_large_logits_and_zero_weights_stay_finite(forms):
  hidden, output, target, _ = make_inputs(1, 5, 4, 7)
  result = sums_and_gradients(1e4 * hidden, output, target, jnp.zeros((1, 5)), 2)
  assert all(float(jnp.abs(x).max()) == 0 for x in result)
  result = sums_and_gradients(1e4 * hidden, output, target, jnp.ones((1, 5)), 2)
  assert all(np.isfinite(x).all() for x in result)


def test_works_rematerialised_inside_a_scan(forms):
  hidden, output, target, weight = make_inputs(4, 6, 4, 9)
  micro_batches = jax.tree.map(lambda x: x.reshape(2, 2, *x.shape[1:]), (hidden, target, weight))

  def loss(output):
    def add(total, rows):
      h, t, w = rows
      return total + jax.checkpoint(lambda o: cross_entropy_sums(h, o, t, w, 4)[0])(output), None

    return jax.lax.scan(add, 0.0, micro_batches)[0]

  expected = sums_float64(hidden, output, target, weight)
  total, doutput = jax.jit(jax.value_and_grad(loss))(output)
  np.testing.assert_allclose(total, expected[0], rtol=1e-5)
  np.testing.assert_allclose(doutput, expected[3], rtol=1e-4, atol=1e-5)


def test_all_logits_never_exist_at_once():
  hidden, output, target, weight = make_inputs(4, 256, 8, 1000)

  def temporary_bytes(chunk):
    compiled = sums_and_gradients.lower(hidden, output, target, weight, chunk).compile()
    return compiled.memory_analysis().temp_size_in_bytes

  assert temporary_bytes(8) < temporary_bytes(256) / 8
