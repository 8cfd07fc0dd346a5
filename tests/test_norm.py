"""The norm, and the products that follow it, against float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmjax.kernels.norm import exact_normed_matmul, normed_matmul, rms_norm
from mmjax.model.layers import add_to_stream

EPS = 1e-5
BF16 = jnp.bfloat16


def make_inputs(shape=(2, 5, 24), width=7):
  rng = np.random.default_rng(0)
  x, scale = 3 * rng.standard_normal(shape), rng.uniform(0.5, 2, shape[-1])
  return x, scale, rng.standard_normal((shape[-1], width)), rng.standard_normal((*shape[:-1], width))


def float64(x, scale, kernel, grad):
  """rms_norm(x) @ kernel and its gradients, by hand."""
  inverse = 1 / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + EPS)
  whitened = x * inverse
  d_whitened = grad @ kernel.T * scale
  dx = inverse * (d_whitened - whitened * np.mean(d_whitened * whitened, axis=-1, keepdims=True))
  dscale = np.einsum('btd,btd->d', whitened, grad @ kernel.T)
  return whitened * scale @ kernel, dx, dscale, np.einsum('btd,bto->do', whitened * scale, grad)


@pytest.mark.parametrize('dtype, tolerance', [(jnp.float32, 1e-5), (BF16, 0.03)])
@pytest.mark.parametrize('function', [normed_matmul, exact_normed_matmul])
@pytest.mark.thorough
def test_product_and_gradients_match_float64(forms, function, dtype, tolerance):
  inputs = make_inputs()
  x, scale, kernel, grad = (jnp.asarray(each, jnp.float32) for each in inputs)
  out, pullback = jax.vjp(lambda *each: function(*each, EPS, dtype), x, scale, kernel)
  got = out, *pullback(grad.astype(out.dtype))
  assert [each.dtype for each in got[1:]] == [jnp.float32] * 3
  for ours, exact in zip(got, float64(*inputs), strict=True):
    size = np.abs(exact).max()
    np.testing.assert_allclose(np.asarray(ours, np.float64), exact, rtol=tolerance, atol=tolerance * size)


@pytest.mark.thorough
def test_exact_product_of_bfloat16_values_is_as_good_as_float32(gpu_forms):
  x, scale, kernel, _ = make_inputs((2, 64, 256), 16)
  x = jnp.asarray(x, BF16)
  exact = float64(np.asarray(x, np.float64), np.float32(scale), np.float32(kernel), np.zeros((2, 64, 16)))[0]
  ours = exact_normed_matmul(x, jnp.asarray(scale, jnp.float32), jnp.asarray(kernel, jnp.float32), EPS, BF16)
  assert np.abs(ours - exact).max() < 3e-6 * np.abs(exact).max()


def test_norm_of_a_float32_stream_is_read_in_the_compute_dtype_on_a_gpu_alone(forms):
  x, scale, *_ = (jnp.asarray(each, jnp.float32) for each in make_inputs())
  read = x.astype(BF16).astype(jnp.float32) if forms == 'gpu' else x
  want = read / np.sqrt(np.mean(np.square(read), axis=-1, keepdims=True) + EPS) * scale
  np.testing.assert_allclose(rms_norm(x, scale, EPS, BF16), want, rtol=1e-5)
  np.testing.assert_allclose(rms_norm(x, scale, EPS), rms_norm(x, scale, EPS, jnp.float32))


def test_stream_gets_the_whole_gradient_and_what_is_added_its_dtype(forms):
  x, delta = jnp.ones((2, 3)), jnp.full((2, 3), 0.5, BF16)
  out, pullback = jax.vjp(add_to_stream, x, delta)
  grad = jnp.asarray(np.random.default_rng(0).standard_normal((2, 3)), jnp.float32)
  dx, ddelta = pullback(grad)
  assert out.dtype == jnp.float32 and ddelta.dtype == BF16
  np.testing.assert_array_equal(out, 1.5)
  np.testing.assert_array_equal(dx, grad)
  np.testing.assert_array_equal(ddelta, grad.astype(BF16))
