"""The gated MLP against the concatenation it stands for, and the matrix product under it."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmjax.kernels.fusion import gated_mlp, normed_gated_mlp
from mmjax.kernels.matmul import dot, matmul, weight_gradient
from tests import references
from tests.helpers import rarely

SHAPES = [(2, 5, 4, 6, 3), (1, 1, 8, 16, 8), (3, 127, 2, 1, 5), (2, 64, 16, 24, 7)]  # B, T, D, F, width


def make_inputs(B, T, D, F, width, seed=0):
  rng = np.random.default_rng(seed)
  shapes = ((B, T, D), (B, T, F), (D + F, width), (D + F, width), (B, T, width))
  return [rng.standard_normal(shape) for shape in shapes]


def projection_float64(m, rows, gate_kernel, up_kernel, dout):
  """Out and all four gradients, by hand."""
  z = np.concatenate((m, rows), axis=-1)
  gate, up = z @ gate_kernel, z @ up_kernel
  sigmoid = 1 / (1 + np.exp(-gate))
  dup = dout * gate * sigmoid
  dgate = dout * up * sigmoid * (1 + gate * (1 - sigmoid))
  dz = dgate @ gate_kernel.T + dup @ up_kernel.T
  D = m.shape[-1]
  kernels = (np.einsum('btz,btw->zw', z, d) for d in (dgate, dup))
  return gate * sigmoid * up, dz[..., :D], dz[..., D:], *kernels


def out_and_gradients(function, *inputs_and_dout):
  @jax.jit
  def run(*inputs_and_dout):
    *inputs, dout = inputs_and_dout
    out, pullback = jax.vjp(function, *inputs)
    return out, *pullback(dout.astype(out.dtype))

  return run(*inputs_and_dout)


@pytest.mark.parametrize('shape', rarely(SHAPES, *SHAPES[::2]))
@pytest.mark.parametrize('dtype, tolerance', [(jnp.float32, 2e-4), (jnp.bfloat16, 0.05)])
def test_gated_mlp_and_gradients_match_float64(forms, shape, dtype, tolerance):
  m, rows, gate, up, dout = make_inputs(*shape)
  D, width = m.shape[-1], gate.shape[-1]
  down = np.random.default_rng(1).standard_normal((width, D))
  exact = [np.asarray(jnp.asarray(x, dtype), np.float64) for x in (m, rows, gate, up, down)]
  dout = np.random.default_rng(2).standard_normal(m.shape)
  for inputs, kernels in ((exact[:2], exact[2:]), (exact[:1], [exact[2][:D], exact[3][:D], exact[4]])):
    other = inputs[1] if len(inputs) > 1 else np.zeros((*m.shape[:2], 0))
    dz = dout @ kernels[2].T
    z, dm, drows, dgate, dup = projection_float64(inputs[0], other, *kernels[:2], dz)
    want = [z @ kernels[2], dm, *([drows] if len(inputs) > 1 else []), dgate, dup, np.einsum('btw,btd->wd', z, dout)]
    given = [jnp.asarray(x, dtype) for x in inputs] + [jnp.asarray(x, jnp.float32) for x in kernels]
    count = len(inputs)
    got = out_and_gradients(lambda *x, n=count: gated_mlp(x[:n], *x[n:], dtype), *given, jnp.asarray(dout, jnp.float32))
    assert [x.dtype for x in got[1:]] == [dtype] * count + [jnp.float32] * 3
    for a, e in zip(got, want, strict=True):
      np.testing.assert_allclose(np.asarray(a, np.float64), e, rtol=tolerance, atol=tolerance * max(np.abs(e).max(), 1))


@pytest.mark.parametrize('others', rarely([0, 1], 1))
@pytest.mark.parametrize('dtype, tolerance', [(jnp.float32, 1e-4), (jnp.bfloat16, 0.05)])
def test_normed_gated_mlp_and_gradients_match_autodiff_in_float64(forms, dtype, tolerance, others):
  m, rows, gate, up, _ = make_inputs(2, 5, 24, 16 * others, 8)
  rng = np.random.default_rng(1)
  scale, down, dout = rng.uniform(-1, 2, 24), rng.standard_normal((8, 24)), rng.standard_normal(m.shape)
  scale[3] = 0
  inputs = (3 * m, scale, (rows,) * others, gate, up, down)

  def plain(x, scale, others, gate, up, down):
    z = jnp.concatenate((x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + 1e-5) * scale, *others), axis=-1)
    return (jax.nn.silu(z @ gate) * (z @ up)) @ down

  with jax.enable_x64(True):
    want = jax.tree.map(np.asarray, out_and_gradients(plain, *inputs, dout))
  given = [jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), each) for each in (*inputs, dout)]
  got = out_and_gradients(lambda *x: normed_gated_mlp(*x, 1e-5, dtype), *given)
  assert got[0].dtype == dtype and {x.dtype for x in jax.tree.leaves(got[1:])} == {jnp.dtype('float32')}
  for a, e in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    np.testing.assert_allclose(np.asarray(a, np.float64), e, rtol=tolerance, atol=tolerance * np.abs(e).max())


def test_gated_mlp_works_rematerialised_inside_a_scan():
  m, rows, gate, up, _ = (jnp.asarray(x, jnp.float32) for x in make_inputs(2, 3, 4, 2, 4))
  down = jnp.asarray(np.random.default_rng(1).standard_normal((4, 4)), jnp.float32)

  def loss(function, m):
    layer = jax.checkpoint(lambda x: x + function((x, rows), gate, up, down))
    return jnp.sum(jax.lax.scan(lambda x, _: (layer(x), None), m, length=2)[0])

  actual = jax.jit(jax.grad(lambda m: loss(partial(gated_mlp, dtype=jnp.float32), m)))(m)
  expected = jax.grad(lambda m: loss(references.gated_mlp, m))(m)
  np.testing.assert_allclose(actual, expected, rtol=1e-3)


@pytest.mark.parametrize('shape', [(2, 3, 4, 5), (1, 1, 1, 1), (1, 127, 3, 2), (4, 64, 16, 48)])  # B, T, in, out
def test_matmul_and_gradients_in_bfloat16_match_float64(shape):
  B, T, n_in, n_out = shape
  rng = np.random.default_rng(0)
  x, dout = (jnp.asarray(rng.standard_normal((B, T, n)), jnp.bfloat16) for n in (n_in, n_out))
  kernel = jnp.asarray(rng.standard_normal((n_in, n_out)), jnp.float32)
  out, dx, dkernel = out_and_gradients(matmul, x, kernel, dout)
  x64, dout64, kernel64 = (np.asarray(a, np.float64) for a in (x, dout, kernel.astype(jnp.bfloat16)))
  bf16 = {'rtol': 0.01, 'atol': 0.02}
  np.testing.assert_allclose(np.asarray(out, np.float64), x64 @ kernel64, **bf16)
  np.testing.assert_allclose(np.asarray(dx, np.float64), dout64 @ kernel64.T, **bf16)
  assert dkernel.dtype == jnp.float32  # as exact as float32 sums of bf16 products are
  np.testing.assert_allclose(dkernel, np.einsum('bti,bto->io', x64, dout64), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize('T', (1, 3, 64))
def test_transposed_products_run(T):
  """XLA's CPU backend merges a transpose into a product that it then cannot run in bf16; ours must not let it."""
  x, grad = jnp.ones((2, T, 4), jnp.bfloat16), jnp.ones((2, T, 6), jnp.bfloat16)
  np.testing.assert_array_equal(jax.jit(lambda x, g: weight_gradient(x, g).T)(x, grad), jnp.full((6, 4), 2.0 * T))
  kernel = jnp.ones((4, 6), jnp.bfloat16)
  transposed = jax.jit(lambda x, k: dot(x[0], k, 1, 0, jnp.float32).T)(x, kernel)
  np.testing.assert_array_equal(transposed, jnp.full((6, T), 4.0))
