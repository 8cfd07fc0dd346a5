"""Attention: every backend against float64 loops over heads, against torch, and under what training does to it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmjax.errors import UserError
from mmjax.kernels import attention
from mmjax.kernels.attention import cached_attention, causal_attention
from mmjax.run.placement import attention_backend
from tests import references
from tests.helpers import rarely

BACKENDS = ('xla', 'xla_blocked')
SHAPES = [  # B, T, N, K, H
  (1, 1, 1, 1, 2),
  (2, 2, 2, 1, 4),
  (1, 127, 8, 8, 6),
  (2, 129, 8, 2, 4),
  (3, 5, 4, 1, 3),
]


def make_inputs(B, T, N, K, H, dtype=jnp.float32, seed=0):
  rng = np.random.default_rng(seed)
  return tuple(
    jnp.asarray(rng.standard_normal((B, T, n, H)), dtype) for n in (N, K, K, N)
  )  # q, k, v and the gradient of out


def make_segments(B, T, seed=0):
  return jnp.asarray(np.random.default_rng(seed).integers(0, 3, (B, T)), jnp.int32)


def attention_float64(q, k, v, segment, dout):
  """Out and the gradients of q, k, v by loops over rows and heads, written from the definition."""
  q, k, v, dout = (np.asarray(x, np.float64) for x in (q, k, v, dout))
  B, T, N, H = q.shape
  out, dq, dk, dv = np.zeros_like(q), np.zeros_like(q), np.zeros_like(k), np.zeros_like(v)
  for b in range(B):
    hidden = np.triu(np.ones((T, T), bool), 1) | (segment[b][:, None] != segment[b][None])
    for n in range(N):
      kv = n // (N // k.shape[2])
      score = np.where(hidden, -np.inf, q[b, :, n] @ k[b, :, kv].T * H**-0.5)
      weight = np.exp(score - score.max(1, keepdims=True))
      weight /= weight.sum(1, keepdims=True)
      out[b, :, n] = weight @ v[b, :, kv]
      dweight = dout[b, :, n] @ v[b, :, kv].T
      dscore = weight * (dweight - (weight * dweight).sum(1, keepdims=True)) * H**-0.5
      dq[b, :, n] = dscore @ k[b, :, kv]
      dk[b, :, kv] += dscore.T @ q[b, :, n]
      dv[b, :, kv] += weight.T @ dout[b, :, n]
  return out, dq, dk, dv


@functools.partial(jax.jit, static_argnums=5)
def out_and_gradients(q, k, v, segment, dout, backend):
  out, pullback = jax.vjp(lambda *qkv: causal_attention(*qkv, segment, backend=backend), q, k, v)
  return out, *pullback(dout)


def assert_all_close(actual, expected, **tolerance):
  for a, e in zip(actual, expected, strict=True):
    np.testing.assert_allclose(np.asarray(a, np.float64), np.asarray(e, np.float64), **tolerance)


@pytest.mark.parametrize('shape', rarely(SHAPES, *SHAPES[2:4]))
@pytest.mark.parametrize('backend, with_segments', [('xla', True), ('xla_blocked', False), ('xla_blocked', True)])
def test_values_and_gradients_match_float64(backend, shape, with_segments):
  q, k, v, dout = make_inputs(*shape)
  segment = make_segments(*shape[:2]) if with_segments else None
  expected = attention_float64(q, k, v, make_segments(*shape[:2]) * with_segments, dout)
  actual = out_and_gradients(q, k, v, segment, dout, backend)
  assert_all_close(actual, expected, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize('backend', BACKENDS)
def test_bfloat16_stays_within_its_rounding(backend):
  inputs = make_inputs(2, 129, 8, 2, 16, jnp.bfloat16)
  segment = make_segments(2, 129)
  actual = out_and_gradients(*inputs[:3], segment, inputs[3], backend)
  assert all(x.dtype == jnp.bfloat16 for x in actual)
  expected = attention_float64(*inputs[:3], segment, inputs[3])
  assert_all_close(actual, expected, rtol=2e-2, atol=4e-2)


@pytest.mark.parametrize('backend', BACKENDS)
def test_backends_match_the_reference(backend):
  q, k, v, dout = make_inputs(2, 33, 6, 3, 8)
  segment = make_segments(2, 33)

  @jax.jit
  def reference(q, k, v):
    out, pullback = jax.vjp(lambda *qkv: references.causal_attention(*qkv, segment), q, k, v)
    return out, *pullback(dout)

  actual = out_and_gradients(q, k, v, segment, dout, backend)
  assert_all_close(actual, reference(q, k, v), rtol=1e-5, atol=1e-5)


def test_matches_torch():
  torch = pytest.importorskip('torch')
  q, k, v, dout = make_inputs(2, 130, 8, 2, 16)
  heads = [torch.tensor(np.asarray(x)).transpose(1, 2).requires_grad_() for x in (q, k, v)]
  repeated = [heads[0], *(x.repeat_interleave(4, 1) for x in heads[1:])]
  out = torch.nn.functional.scaled_dot_product_attention(*repeated, is_causal=True)
  grads = torch.autograd.grad(out, heads, torch.tensor(np.asarray(dout)).transpose(1, 2))
  expected = [x.detach().transpose(1, 2).numpy() for x in (out, *grads)]
  assert_all_close(out_and_gradients(q, k, v, None, dout, 'xla_blocked'), expected, rtol=2e-5, atol=2e-5)


def test_blocked_keeps_large_scores_finite():
  q, k, v, dout = make_inputs(1, 130, 2, 1, 4)
  q, k = 100 * q, 100 * k  # scores of thousands: exp without the maximum taken off overflows or vanishes
  segment = make_segments(1, 130)
  actual = out_and_gradients(q, k, v, segment, dout, 'xla_blocked')
  expected = attention_float64(q, k, v, segment, dout)
  assert_all_close(actual[:1], expected[:1], rtol=1e-3, atol=1e-2)
  assert all(np.isfinite(x).all() for x in actual)


def test_blocked_splits_long_sequences_into_few_blocks(monkeypatch):
  assert len(list(attention._blocks(100_000))) <= attention.MAX_BLOCKS
  monkeypatch.setattr(attention, 'BLOCK_TOKENS', 2)
  monkeypatch.setattr(attention, 'MAX_BLOCKS', 4)
  q, k, v, dout = make_inputs(1, 43, 2, 1, 4)  # of a shape that no other test has compiled
  segment = make_segments(1, 43)
  assert list(attention._blocks(43)) == [(0, 11), (11, 22), (22, 33), (33, 43)]
  actual = out_and_gradients(q, k, v, segment, dout, 'xla_blocked')
  assert_all_close(actual, attention_float64(q, k, v, segment, dout), rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize('backend', BACKENDS)
def test_works_rematerialised_inside_a_scan(backend):
  q, k, v, _ = make_inputs(2, 9, 4, 2, 4)

  def two_layers(layer, q):
    return jnp.sum(jax.lax.scan(lambda x, _: (x + layer(x), None), q, length=2)[0] ** 2)

  def layer(x):
    return causal_attention(x, k, v, backend=backend)

  def reference(x):
    return references.causal_attention(x, k, v, jnp.zeros((2, 9), jnp.int32))

  actual = jax.jit(jax.grad(functools.partial(two_layers, jax.checkpoint(layer))))(q)
  expected = jax.jit(jax.grad(functools.partial(two_layers, reference)))(q)
  np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-4)


def test_cached_attention_equals_the_last_position_of_a_row():
  q, k, v, _ = make_inputs(2, 7, 4, 2, 4)
  slots = jnp.zeros((2, 12, 2, 4))
  visible = jnp.broadcast_to(jnp.arange(12) <= 6, (2, 1, 12))
  actual = jax.jit(cached_attention)(q[:, -1:], slots.at[:, :7].set(k), slots.at[:, :7].set(v), visible)
  expected = out_and_gradients(q, k, v, None, q, 'xla')[0][:, -1:]
  np.testing.assert_allclose(actual, expected, rtol=1e-6, atol=1e-6)


def test_auto_picks_by_platform_dtype_and_devices():
  assert attention_backend('auto', jnp.float32, 'cpu', 1, 16) == 'xla_blocked'
  assert attention_backend('auto', jnp.bfloat16, 'cpu', 8, 16) == 'xla'
  assert attention_backend('auto', jnp.bfloat16, 'gpu', 8, 16) == 'cudnn'
  assert attention_backend('auto', jnp.bfloat16, 'gpu', 1, 20) == 'xla'
  assert attention_backend('auto', jnp.bfloat16, 'gpu', 1, 256) == 'xla'
  assert attention_backend('auto', jnp.float32, 'gpu', 1, 16) == 'xla'
  assert attention_backend('xla', jnp.float32, 'cpu', 1, 16) == 'xla'
  assert attention_backend('auto', jnp.bfloat16, 'gpu', 1, 16, masked_length=512) == 'cudnn'
  assert attention_backend('auto', jnp.bfloat16, 'gpu', 1, 16, masked_length=513) == 'xla'


@pytest.mark.parametrize(
  'name, dtype, platform, n_devices, head_dim',
  [
    ('cudnn', jnp.bfloat16, 'cpu', 1, 16), ('cudnn', jnp.float32, 'gpu', 1, 16), ('cudnn', jnp.bfloat16, 'gpu', 1, 20),
    ('xla_blocked', jnp.float32, 'cpu', 2, 16),
  ],
)  # fmt: skip
def test_backend_that_cannot_run_is_refused(name, dtype, platform, n_devices, head_dim):
  with pytest.raises(UserError, match=name):
    attention_backend(name, dtype, platform, n_devices, head_dim)


def test_cudnn_is_refused_where_isolated_rows_are_odd():
  with pytest.raises(UserError, match='rows of an even length where data.isolate_documents is on, not .*=513'):
    attention_backend('cudnn', jnp.bfloat16, 'gpu', 1, 16, masked_length=513)


def test_unknown_backend_is_refused():
  q, k, v, _ = make_inputs(1, 2, 1, 1, 2)
  with pytest.raises(ValueError, match='flash'):
    causal_attention(q, k, v, backend='flash')
