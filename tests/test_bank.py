"""Bank lookup: values, and gradients that add up in float32 however often a row is read."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mmjax.kernels.bank import TappedBank, add_reads, bank_bag, bank_lookup, no_reads
from tests import references


def make_inputs(M, P, shape, seed=0):
  rng = np.random.default_rng(seed)
  bank = jnp.asarray(rng.standard_normal((M, P)), jnp.float32)
  return bank, jnp.asarray(rng.integers(0, M, shape), jnp.int32), rng.standard_normal((*shape, P))


def gradient(bank, row, grad, dtype):
  def pull(bank, grad):
    rows, pullback = jax.vjp(lambda b: bank_lookup(b, row, dtype), bank)
    return pullback(grad.astype(rows.dtype))[0]

  return jax.jit(pull)(bank, grad)


def gradient_float64(M, row, grad):
  expected = np.zeros((M, grad.shape[-1]))
  np.add.at(expected, np.asarray(row), np.asarray(grad, np.float64))
  return expected


@pytest.mark.parametrize('dtype', (jnp.float32, jnp.bfloat16))
def test_values_are_the_rows(dtype):
  bank, row, _ = make_inputs(9, 3, (2, 5, 4))
  rows = jax.jit(lambda b, r: bank_lookup(b, r, dtype))(bank, row)
  assert rows.dtype == dtype and rows.shape == (2, 5, 4, 3)
  np.testing.assert_array_equal(rows, references.bank_lookup(bank, row, dtype))
  np.testing.assert_array_equal(rows, np.asarray(bank.astype(dtype))[np.asarray(row)])


@pytest.mark.parametrize(
  'M, P, shape', [(9, 3, (2, 5, 4)), (1, 1, (1, 1, 1)), (4, 8, (3, 127, 1)), (1000, 2, (1, 3, 2))]
)
def test_gradient_matches_float64(M, P, shape):
  bank, row, grad = make_inputs(M, P, shape)
  actual = gradient(bank, row, jnp.asarray(grad, jnp.float32), jnp.float32)
  assert actual.dtype == jnp.float32
  np.testing.assert_allclose(actual, gradient_float64(M, row, grad), rtol=1e-5, atol=1e-4)


def test_bfloat16_gradients_of_one_row_add_up_in_float32():
  bank, row = jnp.zeros((5, 2)), jnp.full((4, 512, 8), 3, jnp.int32)
  grad = jnp.ones((4, 512, 8, 2), jnp.bfloat16)  # in bf16, adding 1 stops at 256
  actual = gradient(bank, row, grad, jnp.bfloat16)
  np.testing.assert_array_equal(actual, gradient_float64(5, row, grad))
  assert actual[3, 0] == 4 * 512 * 8


def test_works_rematerialised_inside_a_scan():
  bank, row, grad = make_inputs(7, 3, (2, 4, 2))

  def loss(bank, look_up):
    def layer(sum_, r):
      return sum_ + jnp.sum(grad[0] * jnp.sin(look_up(bank, r))), None

    return jax.lax.scan(layer, 0.0, row)[0]

  actual = jax.jit(jax.grad(lambda b: loss(b, jax.checkpoint(lambda b, r: bank_lookup(b, r, jnp.float32)))))(bank)
  expected = gradient_float64(7, row, grad[0] * np.cos(np.asarray(bank)[np.asarray(row)]))
  np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('M, P, shape', [(9, 3, (2, 5, 2, 4)), (1, 1, (1, 1)), (5, 8, (3, 17, 1, 3))])
@pytest.mark.parametrize('platform', ('cpu', 'default'))
def test_bag_and_its_gradients_match_float64(M, P, shape, platform, monkeypatch):
  monkeypatch.setattr(jax.lax, 'platform_dependent', lambda *inputs, **forms: forms[platform](*inputs))
  bank, row, _ = make_inputs(M, P, shape)
  rng = np.random.default_rng(1)
  weight, grad = rng.standard_normal(shape), rng.standard_normal((*shape[:-1], P))

  def run(function):
    def pull(bank, weight, grad):
      sums, pullback = jax.vjp(lambda b, w: function(b, row, w), bank, weight)
      return sums, *pullback(grad)

    return jax.jit(pull)(bank, *(jnp.asarray(x, jnp.float32) for x in (weight, grad)))

  rows = np.asarray(bank, np.float64)[np.asarray(row)]
  expected = (
    (weight[..., None] * rows).sum(-2),
    gradient_float64(M, row, weight[..., None] * grad[..., None, :]),
    (rows * grad[..., None, :]).sum(-1),
  )
  for function in (bank_bag, references.bank_bag):
    for actual, want in zip(run(function), expected, strict=True):
      assert actual.dtype == jnp.float32
      np.testing.assert_allclose(actual, want, rtol=1e-5, atol=1e-5)


def test_bag_keeps_no_rows_for_the_backward_pass():
  bank, row, weight = jnp.ones((9, 4)), jnp.zeros((3, 5, 2, 7), jnp.int32), jnp.ones((3, 5, 2, 7))
  kept = jax.eval_shape(lambda b, w: jax.vjp(lambda b, w: bank_bag(b, row, w), b, w)[1], bank, weight)
  assert max(leaf.size for leaf in jax.tree.leaves(kept)) == row.size


@pytest.mark.parametrize('bag', (False, True))
def test_reads_of_a_tapped_bank_add_up_to_its_gradient(bag):
  bank, row, _ = make_inputs(9, 3, (2, 5, 2, 4))
  weight = jnp.asarray(np.random.default_rng(1).standard_normal(row.shape), jnp.float32)

  def loss(bank, weight):
    return jnp.sum(jnp.sin(bank_bag(bank, row, weight) if bag else bank_lookup(bank, row, jnp.float32)))

  def tapped_loss(tap, bank, weight):
    return loss(TappedBank(bank, tap), weight)

  value, (want, want_weight) = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))(bank, weight)
  tap = no_reads(row.shape, 3, jnp.float32, bag=bag)
  run = jax.jit(jax.value_and_grad(tapped_loss, argnums=(0, 1, 2)))
  tapped_value, (reads, none, got_weight) = run(tap, bank, weight)
  assert value == tapped_value and not np.any(none)
  for zeros in (np.zeros((9, 3), np.float32), nnx.Param(jnp.zeros((9, 3)))):
    np.testing.assert_allclose(add_reads(zeros, row, reads), want, rtol=1e-5, atol=1e-6)
  np.testing.assert_allclose(got_weight, want_weight, rtol=1e-5, atol=1e-6)
  with pytest.raises(ValueError, match=r'rows of shape \(5, 2, 2, 4\) must have that of their reads, \(2, 5, 2, 4\)'):
    add_reads(jnp.zeros((9, 3)), row.swapaxes(0, 1), reads)
  with pytest.raises(ValueError, match=r'sums of shape \(9, 6\) must have the width of the reads, 3'):
    add_reads(jnp.zeros((9, 6)), row, reads)
  with pytest.raises(ValueError, match='sums of bfloat16 must be float32'):
    add_reads(jnp.zeros((9, 3), jnp.bfloat16), row, reads)
  with pytest.raises(ValueError, match='row_BThr must hold no negative number, not -1'):
    add_reads(jnp.zeros((9, 3)), np.where(row == row[0, 0, 0, 0], -1, row), reads)
  with pytest.raises(ValueError, match='reads must be the Reads of a tapped bank, not of type ndarray'):
    add_reads(jnp.zeros((9, 3)), row, np.zeros((2, 5, 2, 4, 3), np.float32))


@pytest.mark.parametrize('bag', [False, True])
def test_gradients_of_a_narrow_bank_add_up_in_float32(bag):
  bank_MP = jax.random.normal(jax.random.key(0), (4, 3))
  row_X1 = jnp.repeat(jnp.arange(4), jnp.array([3000, 5, 1, 0]), total_repeat_length=3006)[:, None]

  def gradient(bank_MP):
    def total(bank_MP):
      if bag:
        return bank_bag(bank_MP, row_X1, jnp.ones(row_X1.shape)).sum()
      return bank_lookup(bank_MP, row_X1, jnp.float32).sum()

    return jax.jit(jax.grad(total))(bank_MP)

  narrow_MP = gradient(bank_MP.astype(jnp.bfloat16))
  assert narrow_MP.dtype == jnp.bfloat16
  np.testing.assert_array_equal(narrow_MP, gradient(bank_MP).astype(jnp.bfloat16))
  np.testing.assert_allclose(narrow_MP[:, 0].astype(jnp.float32), [3000, 5, 1, 0], rtol=1 / 256)
