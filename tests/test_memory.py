"""The memories as a library: alone in a base install, the same in every form, and what a selection bias does."""

import dataclasses
import importlib.metadata
import math
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from mmjax.environment import TRAIN_PACKAGES
from mmjax.evaluation.probes import bank_health
from mmjax.files import path_name
from mmjax.kernels.forms import traced_for
from mmjax.kernels.product_key import BALANCING_SLOPE
from mmjax.memory import (
  CrossAttention,
  EngramBag,
  GatedFusion,
  Memory,
  MemoryBag,
  MemoryLayer,
  NgramBag,
  NgramBucket,
  TappedBank,
  cached_last_tokens,
  init_bank,
  last_tokens,
  no_reads,
)
from mmjax.memory.gate import RowsMemory
from tests.helpers import rarely

BANK = {'n_rows': 64, 'row_dim': 8}
SIZES = BANK | {'dim': 32, 'n_heads': 2, 'rows_per_head': 3}
MEMORIES = {
  'bag': MemoryBag(**SIZES),
  'fusion': GatedFusion(**SIZES),
  'cross_attention': CrossAttention(**SIZES, attention_heads=4),
  'ngrams': NgramBag(**SIZES, ngrams=(1, 2)),
  'buckets': NgramBucket(**SIZES, ngrams=(1, 2), key_dim=4),
  'signs': NgramBag(**SIZES, ngrams=(1, 2), vocab_size=9, signs=True),
  'engram': EngramBag(**SIZES, ngrams=(1, 2), vocab_size=9, signs=True),
}
SENTENCE = "This needs grain, which is not installed: type  pip install -e '.[train]'  in the checkout of mmjax\n"


def inputs(memory):
  rng = np.random.default_rng(0)
  x_BTD = jnp.asarray(rng.standard_normal((2, 5, memory.dim)), jnp.float32)
  tokens_BT = jnp.asarray(rng.integers(0, 9, (2, 5)), jnp.int32)
  ngrams = (None, None)
  if isinstance(memory, NgramBag):
    ngrams = memory.rows(tokens_BT), memory.signs_of(last_tokens(tokens_BT, max(memory.ngrams)))
  return x_BTD, init_bank(jax.random.key(1), **BANK), *ngrams


@pytest.mark.parametrize('kind', [CrossAttention, GatedFusion, MemoryBag, NgramBag, NgramBucket, EngramBag])
def test_help_describes_every_size(kind):
  described = re.findall(r'^  (\w+): ', kind.__doc__, re.MULTILINE)
  assert sorted(described) == sorted(field.name for field in dataclasses.fields(kind))


def test_base_class_is_no_memory_itself():
  with pytest.raises(TypeError, match='abstract class Memory'):
    Memory(dim=32, **BANK)


@pytest.mark.parametrize('name', rarely(MEMORIES, 'bag', 'buckets'))
def test_every_parameter_and_the_bank_learn(name):
  memory = MEMORIES[name]
  x_BTD, bank_MP, *ngrams = inputs(memory)

  def loss(params, bank_MP):
    out = memory.apply(params, x_BTD, bank_MP, *ngrams)
    return jnp.sum(jnp.sin(out.delta_BTD)) + out.aux_loss, out

  (_, out), slopes = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(memory.init(jax.random.key(0)), bank_MP)
  assert out.delta_BTD.shape == x_BTD.shape and out.row_BTR.shape == out.score_BTR.shape == (2, 5, 6)
  for path, slope in jax.tree_util.tree_leaves_with_path(slopes):
    at_start = name == 'buckets' and 'query' in path_name(path)  # of keys that are 0
    assert np.any(slope) != at_start, path_name(path)
  assert np.any(jax.grad(lambda bank_MP: loss(memory.init(jax.random.key(0)), bank_MP)[0])(0 * bank_MP))  # from 0 too


@pytest.mark.parametrize('form', ['cpu', 'gpu'])
@pytest.mark.parametrize('name', rarely([*MEMORIES, 'bias'], 'bag'))
def test_program_that_promotes_nothing_implicitly_may_use_it(name, form):
  memory = (MEMORIES | {'bias': MemoryBag(**SIZES, query_key_norm='l2', selection_bias=True)})[name]
  with jax.numpy_rank_promotion('raise'), jax.numpy_dtype_promotion('strict'), traced_for(form):
    x_BTD, bank_MP, *ngrams = inputs(memory)

    def loss(params, bank_MP):
      out = memory.apply(params, x_BTD.astype(jnp.bfloat16), bank_MP, *ngrams, dtype=jnp.bfloat16)
      return jnp.sum(out.delta_BTD.astype(jnp.float32)) + out.aux_loss

    jaxpr = jax.make_jaxpr(jax.grad(loss, argnums=(0, 1)))(memory.init(jax.random.key(0)), bank_MP)
    assert cached_last_tokens(jnp.ones((2, 8), jnp.int32), jnp.zeros((2, 4), jnp.int32), 2).shape == (2, 4, 2)
  assert jaxpr.out_avals[-1].shape == bank_MP.shape


@pytest.mark.parametrize('name', MEMORIES)
def test_module_of_nnx_equals_the_pure_functions(name):
  memory = MEMORIES[name]
  x_BTD, bank_MP, *ngrams = inputs(memory)
  layer = MemoryLayer(memory, rngs=nnx.Rngs(jax.random.key(0)))
  params = memory.init(jax.random.key(0))
  jax.tree.map(np.testing.assert_array_equal, nnx.to_pure_dict(nnx.state(layer)), params)
  for got, want in zip(layer(x_BTD, bank_MP, *ngrams), memory.apply(params, x_BTD, bank_MP, *ngrams), strict=True):
    np.testing.assert_array_equal(got, want)


def test_layer_finds_parameters_of_other_kinds_of_variables():
  memory = MEMORIES['bag']
  x_BTD, bank_MP, *_ = inputs(memory)
  layer = MemoryLayer(memory, rngs=nnx.Rngs(0))
  want = layer(x_BTD, bank_MP).delta_BTD
  layer.down.kernel = nnx.Variable(layer.down.kernel[...])  # to keep it from an optimizer of nnx.Param
  np.testing.assert_array_equal(layer(x_BTD, bank_MP).delta_BTD, want)


@pytest.mark.parametrize('name', rarely(MEMORIES, 'fusion'))
def test_gradient_in_bf16_is_exported_for_any_batch_and_length(name):
  memory = MEMORIES[name]
  _, bank_MP, *_ = inputs(memory)
  B, T = jax.export.symbolic_shape('B, T')

  def loss(params, x_BTD, tokens_BS, position_BT):
    ngrams = (None, None)
    if isinstance(memory, NgramBag):
      ngrams = memory.addresses(cached_last_tokens(tokens_BS, position_BT, max(memory.ngrams)))
    return jnp.sum(memory.apply(params, x_BTD, bank_MP, *ngrams, dtype='bfloat16').delta_BTD.astype(jnp.float32))

  params, number_BT = memory.init(jax.random.key(0)), jax.ShapeDtypeStruct((B, T), jnp.int32)
  x_BTD = jax.ShapeDtypeStruct((B, T, memory.dim), jnp.float32)
  shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params)
  exported = jax.export.export(jax.jit(jax.grad(loss)))(shapes, x_BTD, number_BT, number_BT)
  x_BTD, number_BT = jnp.ones((3, 7, memory.dim)), jnp.tile(jnp.arange(7), (3, 1))
  want = jax.jit(jax.grad(loss))(params, x_BTD, number_BT, number_BT)
  got = exported.call(params, x_BTD, number_BT, number_BT)
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=0.02, atol=0.02 * np.abs(y).max()), got, want)


def test_init_is_a_function_of_the_key_old_or_new():
  memory = MEMORIES['bag']
  made = [memory.init(key) for key in (jax.random.key(3), jax.random.PRNGKey(3))] + [
    jax.jit(memory.init)(jax.random.key(3))
  ]
  for other in made[1:]:
    jax.tree.map(np.testing.assert_array_equal, made[0], other)
  assert np.any(memory.init(jax.random.key(4))['gate']['keys'] != made[0]['gate']['keys'])


def test_compute_dtype_changes_no_row_on_a_cpu():
  memory = MEMORIES['bag']
  x_BTD, bank_MP, *_ = inputs(memory)
  outs = [memory.apply(memory.init(jax.random.key(0)), x_BTD, bank_MP, dtype=d) for d in (jnp.float32, jnp.bfloat16)]
  assert outs[1].delta_BTD.dtype == jnp.bfloat16
  np.testing.assert_array_equal(outs[0].row_BTR, outs[1].row_BTR)


@pytest.mark.parametrize(
  ('kind', 'sizes', 'said'),
  [
    (MemoryBag, {'n_rows': 65}, 'n_rows=65 must be a square; nearest: 64 and 81'),
    (CrossAttention, {'attention_heads': 5}, 'dim=.* must be divisible by attention_heads=5'),
    (GatedFusion, {'row_dim': 7}, 'row_dim=7 must be even: .*; nearest: 8'),
    (MemoryBag, {'activation': 'gelu'}, "activation='gelu' must be one of softmax, relu"),
    (MemoryBag, {'rows_per_head': 9}, 'rows_per_head=9 must be at most 8, the sub-keys of each half'),
    (MemoryBag, {'rows_per_head': 1}, "rows_per_head=1 must be at least 2: the softmax .*'relu'"),
    (GatedFusion, {'rows_per_head': 1}, 'rows_per_head=1 must be at least 2'),
    (NgramBag, {'rows_per_head': 0}, 'rows_per_head=0 must be a whole number of at least 1'),
    (MemoryBag, {'dim': '32'}, "dim='32' must be a whole number of at least 1"),
    (NgramBag, {'ngrams': (0,)}, r'ngrams=\(0,\) must be a tuple of numbers of tokens, from 1'),
    (NgramBag, {'ngrams': (1, 2, 3)}, 'no more than n_heads=2'),
    (NgramBag, {'ngrams': '1,2'}, "ngrams='1,2' must be a tuple"),
    (NgramBag, {'vocab_size': 0}, 'vocab_size=0 must be a whole number of at least 1'),
    (NgramBag, {'ngrams': (True,)}, r'ngrams=\(True,\) must be a tuple of numbers of tokens'),
    (NgramBag, {'n_heads': True}, 'n_heads=True must be a whole number of at least 1'),
    (NgramBag, {'signs': 1}, 'signs=1 must be True or False'),
    (MemoryBag, {'norm_eps': math.nan}, 'norm_eps=nan must be a finite number above 0'),
    (MemoryBag, {'query_dim': -2}, 'query_dim=-2 must be a whole number of at least 1, or None'),
    (NgramBag, {'vocab_size': 10, 'ngrams': (1, 2), 'n_rows': 35}, 'n_rows=35 must be at least 36, so that each head'),
    (NgramBucket, {'vocab_size': 10, 'n_rows': 59}, 'n_rows=59 must be at least 60, so that each head'),
    (CrossAttention, {'scores': 'bag'}, "scores='bag' must be one of none, scale"),
    (NgramBag, {'n_rows': 2**31}, 'n_rows=2147483648 must be at most 2147483647: rows have numbers of int32'),
    (MemoryBag, {'query_key_norm': 'l1'}, "query_key_norm='l1' must be one of none, l2"),
  ],
)
def test_sizes_that_make_no_memory_are_refused(kind, sizes, said):
  with pytest.raises(ValueError, match=said):
    kind(**SIZES | sizes)


def test_one_row_is_allowed_where_its_weight_is_no_softmax():
  assert MemoryBag(**SIZES | {'rows_per_head': 1}, activation='relu').gate_learns
  assert not GatedFusion(**SIZES | {'rows_per_head': 1}, scores='none').gate_learns


@pytest.mark.parametrize('name', MEMORIES)
def test_empty_input_is_refused(name):
  memory = MEMORIES[name]
  params, bank_MP = memory.init(jax.random.key(0)), init_bank(jax.random.key(1), **BANK)
  for shape in ((0, 3), (3, 0)):
    with pytest.raises(ValueError, match=rf'the input of shape \({shape[0]}, {shape[1]}, {memory.dim}\) has no'):
      memory.apply(params, jnp.ones((*shape, memory.dim)), bank_MP)


@pytest.mark.parametrize('name', MEMORIES)
def test_arrays_that_are_not_of_floats_are_refused(name):
  memory = MEMORIES[name]
  x_BTD, bank_MP, *ngrams = inputs(memory)
  params = memory.init(jax.random.key(0))
  whole = jax.tree.map(lambda leaf: leaf.astype(jnp.int32), params)
  for given, said in (
    ((whole, x_BTD, bank_MP), 'the parameter .* must be an array of floats, not int32'),
    ((params, x_BTD.astype(jnp.complex64), bank_MP), 'the input must be an array of floats, not complex64'),
    ((params, x_BTD.tolist(), bank_MP), 'the input must be an array of floats, not list'),
    ((params, x_BTD, bank_MP.astype(jnp.int8)), 'the bank must be an array of floats, not int8'),
    ((list(params), x_BTD, bank_MP), 'the parameters must be a nested dict as `init` returns it, not of type list'),
  ):
    with pytest.raises(ValueError, match=said):
      memory.apply(*given, *ngrams)
  for dtype in ('int32', 'bf16', None):
    with pytest.raises(ValueError, match=f'dtype={dtype!r} must be a floating-point dtype, such'):
      memory.apply(params, x_BTD, bank_MP, *ngrams, dtype=dtype)
  with pytest.raises(ValueError, match='row_BThr must be an array of whole numbers, not of type str; a dtype is given'):
    memory.apply(params, x_BTD, bank_MP, 'bfloat16')


def test_numbers_of_rows_and_signs_are_looked_at():
  memory = MEMORIES['signs']
  x_BTD, bank_MP, row_BThr, sign_BTh = inputs(memory)
  params = memory.init(jax.random.key(0))
  for wrong, said in (
    ((row_BThr, 1 - 2 * (sign_BTh % 2)), 'sign_BTh must hold numbers from 0 to 255, not -1'),
    ((row_BThr, sign_BTh + 256), 'sign_BTh must hold numbers from 0 to 255'),
    ((row_BThr, sign_BTh * 1.0), 'sign_BTh must hold whole numbers, not float32'),
    ((row_BThr * 1.0, sign_BTh), 'row_BThr must hold whole numbers, not float32'),
    ((row_BThr + 64, sign_BTh), 'row_BThr must hold numbers from 0 to 63'),
  ):
    with pytest.raises(ValueError, match=said):
      memory.apply(params, x_BTD, bank_MP, *wrong)
  with pytest.raises(ValueError, match='sign_BTh must hold whole numbers, not bool'):
    jax.jit(memory.apply)(params, x_BTD, bank_MP, row_BThr, sign_BTh > 0)


@pytest.mark.parametrize('name', ['bag', 'fusion'])
def test_tap_of_other_reads_is_refused(name):
  memory = MEMORIES[name]
  x_BTD, bank_MP, *_ = inputs(memory)
  params, shape = memory.init(jax.random.key(0)), (2, 5, 2, 3)
  is_bag = name == 'bag'
  memory.apply(params, x_BTD, TappedBank(bank_MP, no_reads(shape, 8, jnp.float32, bag=is_bag)))
  for tap in (
    no_reads(shape, 8, jnp.float32, bag=not is_bag), no_reads((1, 5, 2, 3), 8, jnp.float32, bag=is_bag),
    no_reads((2, 5, 2, 2), 8, jnp.float32, bag=is_bag), None
  ):  # fmt: skip
    said = rf'the tap of this bank must be no_reads\(\(2, 5, 2, 3\), 8, dtype, bag={is_bag}\)'
    with pytest.raises(ValueError, match=said):
      memory.apply(params, x_BTD, TappedBank(bank_MP, tap))


@pytest.mark.parametrize(
  ('sizes', 'said'),
  [
    ({'n_rows': 0}, 'n_rows=0 must be a whole number of at least 1'),
    ({'row_dim': 2.5}, 'row_dim=2.5 must be a whole number of at least 1'),
    ({'n_rows': 2**31}, 'n_rows=2147483648 must be at most 2147483647'),
    ({'std': math.nan}, 'std=nan must be a finite number of Python or NumPy, 0 or above'),
    ({'std': '1'}, "std='1' must be a finite number of Python"),
  ],
)
def test_bank_of_no_size_is_refused(sizes, said):
  with pytest.raises(ValueError, match=said):
    init_bank(jax.random.key(0), **BANK | sizes)


@pytest.mark.thorough
def test_gradients_of_a_float64_bank_are_those_of_float32():
  memory = NgramBucket(**SIZES)
  with jax.enable_x64(True):
    params, bank_MP = memory.init(jax.random.key(0)), init_bank(jax.random.key(1), **BANK)
    params['gate']['keys'] = jax.random.normal(jax.random.key(3), params['gate']['keys'].shape, jnp.float32)
    rows = memory.rows(jnp.ones((1, 2), jnp.int32))
    x_BTD = jax.random.normal(jax.random.key(2), (1, 2, memory.dim), jnp.float32)

    def loss(params, bank_MP):
      return memory.apply(params, x_BTD, bank_MP, rows).delta_BTD.sum()

    found = [jax.grad(loss, argnums=(0, 1))(params, bank_MP.astype(dtype)) for dtype in (jnp.float32, jnp.float64)]
  jax.tree.map(lambda one, other: np.testing.assert_allclose(one, other, atol=1e-5), *found)


@pytest.mark.parametrize('dtype', ['bfloat16', 'float16'])
@pytest.mark.parametrize('name', rarely(MEMORIES, 'bag'))
def test_narrow_parameters_count_as_the_float32_that_they_stand_for(name, dtype):
  memory = MEMORIES[name]
  x_BTD, bank_MP, *ngrams = inputs(memory)
  params = memory.init(jax.random.key(0))
  if 'bias' in params.get('gate', {}):
    params['gate']['bias'] = 0.3 * jax.random.normal(jax.random.key(4), params['gate']['bias'].shape)
  narrow = jax.tree.map(lambda x: x.astype(dtype), params)

  def loss(params):
    out = memory.apply(params, x_BTD, bank_MP, *ngrams)
    return jnp.sum(out.delta_BTD**2), out

  wide = jax.tree.map(lambda x: x.astype(jnp.float32), narrow)
  (grad, out), (wide_grad, wide_out) = (jax.jit(jax.grad(loss, has_aux=True))(x) for x in (narrow, wide))
  jax.tree.map(np.testing.assert_array_equal, out, wide_out)
  jax.tree.map(lambda x, y: np.testing.assert_array_equal(x, y.astype(dtype), strict=True), grad, wide_grad)


@pytest.mark.parametrize('name', MEMORIES)
def test_numpy_arrays_are_taken_as_constants_of_a_traced_function(name):
  memory = MEMORIES[name]
  x_BTD, bank_MP, *ngrams = inputs(memory)
  params = memory.init(jax.random.key(0))
  numpy_params, numpy_bank_MP = jax.tree.map(np.asarray, (params, bank_MP))
  found = jax.jit(lambda x_BTD, *ngrams: memory.apply(numpy_params, x_BTD, numpy_bank_MP, *ngrams))(x_BTD, *ngrams)
  want = memory.apply(params, x_BTD, bank_MP, *ngrams)
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-6), found, want)


@pytest.mark.parametrize('name', MEMORIES)
def test_parameters_of_other_sizes_are_refused(name):
  memory = MEMORIES[name]
  x_BTD, bank_MP, *ngrams = inputs(memory)
  params = memory.init(jax.random.key(0))
  for path, leaf in jax.tree_util.tree_leaves_with_path(params):
    changed = jax.tree_util.tree_map_with_path(lambda at, x, path=path: x[:-1] if at == path else x, params)
    shapes = f'{path_name(path)} must have the shape {leaf.shape}, not {leaf[:-1].shape}'
    with pytest.raises(ValueError, match=re.escape(shapes)):
      memory.apply(changed, x_BTD, bank_MP, *ngrams)
  with pytest.raises(ValueError, match='must have the shape .*, not None'):
    memory.apply({}, x_BTD, bank_MP, *ngrams)
  with pytest.raises(ValueError, match=r'norm/scale must have the shape \(32,\), not str'):
    memory.apply(params | {'norm': {'scale': 'ones'}}, x_BTD, bank_MP, *ngrams)
  with pytest.raises(ValueError, match='the parameter gate/other is none of this memory'):
    memory.apply(params | {'gate': {**params.get('gate', {}), 'other': x_BTD}}, x_BTD, bank_MP, *ngrams)
  with pytest.raises(ValueError, match='the bank must have the shape .*, not dict'):
    memory.apply(bank_MP, x_BTD, params, *ngrams)
  with pytest.raises(
    ValueError, match='the numbers of signs must ' + ('have the shape' if memory.signs else 'be None')
  ):
    memory.apply(params, x_BTD, bank_MP, ngrams[0], None if memory.signs else jnp.zeros((2, 5, 2), jnp.int32))
  with pytest.raises(ValueError, match=r'the factors of heads must have the shape \(2, 5, 2\), not \(2, 5\)'):
    memory.apply(params, x_BTD, bank_MP, *ngrams, jnp.ones((2, 5)))
  if isinstance(memory, RowsMemory):
    with pytest.raises(ValueError, match='only a bag takes factors of its heads'):
      memory.apply(params, x_BTD, bank_MP, *ngrams, jnp.ones((2, 5, 2)))
  if ngrams[0] is None:
    with pytest.raises(ValueError, match='selects its rows itself'):
      memory.apply(params, x_BTD, bank_MP, jnp.zeros((2, 5, 2, 3), jnp.int32))


@pytest.mark.parametrize('bank', [jnp.zeros((6, 8)), jnp.zeros((64, 9)), jnp.zeros((64, 8), jnp.int32), [[0.0]]])
def test_sums_of_another_bank_are_refused_as_apply_does(bank):
  memory, tokens_BT = MEMORIES['ngrams'], jnp.asarray([[5, 7, 8]])
  with pytest.raises(ValueError, match=r'the bank must (have the shape .*\(64, 8\), not|be an array of floats)'):
    memory.sums_of(last_tokens(tokens_BT, 2), bank)


def test_factors_of_heads_that_are_no_floats_are_refused():
  memory = MEMORIES['bag']
  x_BTD, bank, *_ = inputs(memory)
  for kept in (jnp.ones((2, 5, 2), complex), jnp.ones((2, 5, 2), bool)):
    with pytest.raises(ValueError, match='the factors of heads must be an array of floats'):
      memory.apply(memory.init(jax.random.key(0)), x_BTD, bank, kept_BTh=kept)


def test_slope_of_the_selection_bias_equals_counting_and_adds_nothing_to_the_loss():
  memory = MEMORIES['bag']
  params, (x_BTD, bank_MP, *_) = memory.init(jax.random.key(0)), inputs(memory)
  params['gate']['bias'] = jnp.asarray(np.random.default_rng(1).standard_normal((4, 8)), jnp.float32)

  def loss(params):
    out = memory.apply(params, x_BTD, bank_MP)
    return out.aux_loss, out.row_BTR

  (value, row_BTR), slope = jax.value_and_grad(loss, has_aux=True)(params)
  assert value == 0 and not np.any(slope['gate']['keys']) and not np.any(slope['gate']['query']['kernel'])
  for k in range(4):
    sub_key = np.divmod(np.asarray(row_BTR).reshape(2, 5, 2, 3)[:, :, k // 2], 8)[k % 2]
    share = np.bincount(sub_key.ravel(), minlength=8) / sub_key.size
    want = BALANCING_SLOPE * 4**0.5 * (share - 1 / 8)  # 4: half of a row
    np.testing.assert_allclose(slope['gate']['bias'][k], want, rtol=1e-5)
    assert np.linalg.norm(want) < 1e-3  # takes no part in clipping


def test_use_of_sub_keys_becomes_more_even():
  """Inputs that share a direction, as hidden states do, all take the sub-keys along it until something spreads them."""
  memory = MemoryBag(dim=32, **BANK, rows_per_head=4, query_key_norm='none')
  rng, bank_MP = np.random.default_rng(0), jnp.zeros((64, 8))
  x_BTD = jnp.asarray(rng.standard_normal((8, 32, 32)) + 2 * rng.standard_normal(32), jnp.float32)
  optimizer = optax.adam(0.05)

  def descend(state, _):
    params, moments = state

    def loss(params):
      out = memory.apply(params, x_BTD, bank_MP)
      return out.aux_loss, out.row_BTR

    (_, row_BTR), slope = jax.value_and_grad(loss, has_aux=True)(params)
    update, moments = optimizer.update(slope, moments)
    return (optax.apply_updates(params, update), moments), row_BTR

  start = memory.init(jax.random.key(0))
  _, rows = jax.jit(lambda params: jax.lax.scan(descend, (params, optimizer.init(params)), length=100))(start)
  first, last = (bank_health(np.bincount(np.ravel(r), minlength=64)) for r in (rows[0], rows[-1]))
  assert last['kl_to_uniform'] < 0.5 * first['kl_to_uniform'] and last['used_share'] > 1.5 * first['used_share']


ALONE = """
import sys
class Blocked:
  def find_spec(self, name, path=None, target=None):
    if name.split('.')[0] in {blocked!r}:
      raise ModuleNotFoundError(f'No module named {{name!r}}', name=name)
sys.meta_path.insert(0, Blocked())
import jax
from mmjax.memory import *
bank = init_bank(jax.random.key(0), n_rows=16, row_dim=4)
x, tokens = jax.numpy.ones((1, 2, 8)), jax.numpy.ones((1, 2), int)
for kind in (MemoryBag, GatedFusion, CrossAttention, NgramBag, NgramBucket, EngramBag):
  memory = kind(dim=8, n_rows=16, row_dim=4, rows_per_head=2)
  rows = memory.rows(tokens) if issubclass(kind, NgramBag) else None
  print(kind.__name__, memory.apply(memory.init(jax.random.key(1)), x, bank, rows).delta_BTD.shape)
print(sorted({{name.split('.')[1] for name in sys.modules if name.startswith('mmjax.')}}))
"""


@pytest.mark.thorough
def test_base_install_is_enough():
  """All that training needs beside it is blocked, but for what JAX and Flax themselves import."""
  needed = [line for package in ('jax', 'flax') for line in importlib.metadata.requires(package)]
  needed = {re.match(r'\w+', line)[0] for line in needed if 'extra ==' not in line}
  blocked = {name for name in TRAIN_PACKAGES if name not in needed}
  assert {'grain', 'ml_collections', 'safetensors', 'sentencepiece', 'matplotlib'} <= blocked
  run = subprocess.run([sys.executable, '-c', ALONE.format(blocked=blocked)], capture_output=True, text=True)
  assert run.returncode == 0, run.stderr
  *memories, packages = run.stdout.splitlines()
  assert [line.split()[0] for line in memories] == [
    'MemoryBag',
    'GatedFusion',
    'CrossAttention',
    'NgramBag',
    'NgramBucket',
    'EngramBag',
  ]
  assert packages == "['choices', 'environment', 'errors', 'kernels', 'memory']"


def test_extra_names_every_package_that_a_base_install_lacks():
  extras = tomllib.loads(Path('pyproject.toml').read_text())['project']
  name = lambda line: re.match(r'[\w-]+', line)[0].replace('-', '_')  # noqa: E731
  assert {name(line) for line in extras['dependencies']} == {'jax', 'flax', 'numpy'}
  modules = {'orbax_checkpoint': 'orbax'}
  packages = {name(line) for line in extras['optional-dependencies']['train']}
  assert {modules.get(package, package) for package in packages} == set(TRAIN_PACKAGES)


@pytest.mark.parametrize(
  'command', ['train.py --config configs/base.py', 'eval.py --workdir x', '-m mmjax.tools.sample']
)
def test_command_without_the_extra_says_what_to_type(command):
  block = 'import sys; sys.modules["grain"] = None\n'
  run = f'import runpy; sys.argv = {command.removeprefix("-m ").split()!r}\n'
  run += (
    'runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)'
    if '-m' in command
    else ('runpy.run_path(sys.argv[0], run_name="__main__")')
  )
  done = subprocess.run([sys.executable, '-c', block + run], capture_output=True, text=True)
  assert done.returncode == 2 and done.stderr == SENTENCE, done.stderr


def test_load_without_the_extra_says_what_to_type():
  code = "import sys; sys.modules['grain'] = None\nimport mmjax\nmmjax.load('x')"
  done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
  assert done.returncode == 1 and done.stderr.splitlines()[-1] == f'mmjax.errors.UserError: {SENTENCE.strip()}'


@pytest.mark.thorough
def test_bank_and_sizes_from_numpy_are_taken():
  memory = MemoryBag(dim=np.int64(16), n_rows=64, row_dim=8, n_heads=2, rows_per_head=np.int32(4))
  params, x_BTD = memory.init(jax.random.key(0)), jax.random.normal(jax.random.key(1), (2, 3, 16))
  bank_MP = init_bank(jax.random.key(2), n_rows=64, row_dim=8)

  def loss(bank_MP):
    return jnp.sin(memory.apply(params, x_BTD, bank_MP).delta_BTD).sum()

  np.testing.assert_array_equal(jax.grad(loss)(np.asarray(bank_MP)), jax.grad(loss)(bank_MP))


def test_sizes_from_numpy_decide_neither_dtypes_nor_overflow():
  narrow = NgramBag(dim=np.uint8(20), n_rows=np.uint8(64), row_dim=np.uint8(50), n_heads=np.uint8(6))
  plain = NgramBag(dim=20, n_rows=64, row_dim=50, n_heads=6)
  assert narrow == plain and narrow.init(jax.random.key(0))['down']['kernel'].shape == (300, 20)
  sizes = {'dim': 8192, 'n_rows': 4096, 'row_dim': 1024, 'n_heads': 4, 'rows_per_head': 8}
  as_numpy = GatedFusion(**{name: np.int32(size) for name, size in sizes.items()})
  assert as_numpy.flops() == GatedFusion(**sizes).flops()
  assert NgramBag(**SIZES, ngrams=(np.int64(2),)) == NgramBag(**SIZES, ngrams=(2,))
  with jax.enable_x64(True):
    for bank_MP in (
      init_bank(jax.random.key(0), n_rows=4, row_dim=np.int64(8)),
      init_bank(jax.random.key(0), n_rows=4, row_dim=8, std=1 / np.sqrt(8)),
    ):
      assert bank_MP.dtype == jnp.float32
