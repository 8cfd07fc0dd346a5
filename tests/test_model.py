"""The model: its sizes, its start, what each part computes, and what it must not see."""

import dataclasses
import math
from collections import Counter
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mmjax.config import load_config
from mmjax.model import decoding
from mmjax.model.cost import count_params
from mmjax.model.decoding import init_cache
from mmjax.model.layers import RMSNorm, apply_rope, dropout, rope_angles
from mmjax.model.params import abstract_params
from tests.helpers import build_model, random_batch, rarely, tiny_config

THOROUGH = pytest.mark.thorough  # parity with torch covers them in the fast suite
MAIN_FIRST = rarely(['gated_fusion', 'dense', 'cross_attention', 'moe'], 'gated_fusion', 'dense')
HEADS_AND_FFN = {'memory__n_heads': 2, 'memory__layers': '1', 'memory__ffn_dim': 8, 'memory__input': 'residual'}
NORMED = HEADS_AND_FFN | {'memory__query_key_norm': 'l2'}
SCALED = NORMED | {'memory__scores': 'scale'}
OWN = {'memory__ngrams': '1,2', 'memory__ngram_ranges': 'own', 'memory__ngram_signs': True, 'model__knowledge_num': 999}
VALUE_ROWS = {
  'memory__n_heads': 2, 'memory__ngrams': '1,2', 'memory__value_layers': '1'
}  # fmt: skip
ATTENTION = {'model__qk_norm': True, 'model__value_embeddings': 'all'}
OTHER_DECODED = [('dense', {}), ('cross_attention', SCALED), ('moe', {}), ('gated_fusion', SCALED)]


@pytest.mark.parametrize(
  ('experiment', 'overrides', 'total', 'without_bank'),
  [
    ('exp_1_4_2', [], 32_383_488, 23_994_880),
    ('exp_1_4_2', ['--config.model.n_kv_heads=2'], 31_597_056, 23_208_448),
    ('exp_1_4_0', [], 25_829_888, 25_829_888),
    # 1.4.1 is 1.4.2 with 2 D D + 2 P D weights instead of the fusion's 2 (D + R P) D + D D.
    ('exp_1_4_1', [], 23_994_880 + 8_388_608 - 8 * 1_835_008 + 8 * 655_360, 23_994_880 - 8 * (1_835_008 - 655_360)),
    ('exp_moe', [], 25_829_888 + 8 * (4 * 3 * 512 * 1408 + 4 * 512), 25_829_888 + 8 * (4 * 3 * 512 * 1408 + 4 * 512)),
  ],
)
def test_parameter_counts_are_the_records(experiment, overrides, total, without_bank):
  config = load_config(f'configs/{experiment}.py', overrides)
  assert count_params(abstract_params(config)) == (total, without_bank)


def test_initial_values_follow_torch_defaults():
  config = tiny_config(model__dim=64, model__n_heads=4, model__knowledge_num=4096)
  _, params = build_model(config)
  layer = params['layers'][0]
  width = config.model.dim + config.model.num_selected * config.model.knowledge_dim
  for values, fan_in in (
    (params['embedding'], 64),
    (layer['attention']['wq']['kernel'], 64),
    (layer['sublayer']['fusion']['up']['kernel'], width),
    (layer['sublayer']['gate']['query']['kernel'], 64),
  ):
    bound = fan_in**-0.5
    assert np.abs(values).max() <= bound
    assert values.std() == pytest.approx(bound / math.sqrt(3), rel=0.1)  # of U(-bound, bound)
  for values in (params['memory_bank'], layer['sublayer']['gate']['keys']):
    assert values.std() == pytest.approx(1.0, rel=0.1)
  assert (params['norm']['scale'] == 1).all()
  assert not np.array_equal(layer['attention']['wq']['kernel'], params['layers'][1]['attention']['wq']['kernel'])


@pytest.mark.thorough
def test_bank_std_scales_the_bank():
  (_, small), (_, normal) = build_model(tiny_config(memory__bank_std=0.1)), build_model(tiny_config())
  np.testing.assert_allclose(small['memory_bank'], 0.1 * normal['memory_bank'], rtol=1e-6)


def test_rms_norm_equals_float64():
  x = np.random.default_rng(0).normal(size=(3, 5, 32)).astype(np.float32)
  want = x / np.sqrt((x.astype(np.float64) ** 2).mean(-1, keepdims=True) + 1e-5)
  norm = RMSNorm(32, 1e-5)
  np.testing.assert_allclose(norm(jnp.array(x)), want, rtol=1e-5)
  assert norm(jnp.array(x, jnp.bfloat16)).dtype == jnp.float32


def test_rope_equals_complex_rotation_of_interleaved_pairs():
  x = np.random.default_rng(0).normal(size=(2, 7, 3, 8)).astype(np.float32)
  frequency = 1e6 ** (-np.arange(0, 8, 2) / 8)
  turn = np.exp(1j * np.arange(7)[:, None] * frequency)[None, :, None, :]
  want = (x[..., 0::2] + 1j * x[..., 1::2]) * turn
  got = np.asarray(apply_rope(jnp.array(x), rope_angles(jnp.arange(7)[None], 8, 1e6)))
  np.testing.assert_allclose(got[..., 0::2], want.real, atol=1e-5)
  np.testing.assert_allclose(got[..., 1::2], want.imag, atol=1e-5)


@pytest.mark.parametrize(
  ('sublayer', 'more'), [('gated_fusion', {}), ('dense', {}), ('dense', {'qk_norm': True, 'value_embeddings': '1'})]
)
def test_whole_model_equals_a_second_numpy_route(sublayer, more):
  config = tiny_config(model__sublayer=sublayer, **{f'model__{name}': value for name, value in more.items()})
  graphdef, params = build_model(config)
  if more:  # scales and gates that are not at their start
    for name, parts in params['layers'][1]['attention'].items():
      if name in ('q_norm', 'k_norm', 'value_embedding'):
        leaf = 'gate' if name == 'value_embedding' else 'scale'
        parts[leaf] = jax.random.normal(jax.random.key(ord(name[0])), parts[leaf].shape)
  tokens = np.asarray(random_batch(config)['input'][0])
  model = nnx.merge(graphdef, params)
  out = jax.jit(model)(jnp.array(tokens))
  want, rows = numpy_forward(config.model, jax.tree.map(lambda x: np.asarray(x, np.float64), params), tokens)
  np.testing.assert_allclose(model.logits(out.hidden_BTD), want, atol=2e-5)
  if sublayer == 'gated_fusion':
    np.testing.assert_array_equal(out.row_LBTR, rows)
  else:
    assert out.row_LBTR is None


def numpy_forward(model, params, tokens, read_BTF=None):
  """The block of experiment 1.4.2 or 1.4.0 in float64, all M scores and the concatenation built."""
  B, T = tokens.shape
  silu = lambda x: x / (1 + np.exp(-x))  # noqa: E731
  norm = lambda x, p: x / np.sqrt((x**2).mean(-1, keepdims=True) + model.norm_eps) * p['scale']  # noqa: E731
  x, rows = params['embedding'][tokens], []
  turn = np.exp(1j * np.arange(T)[:, None] * model.rope_theta ** (-np.arange(0, model.head_dim, 2) / model.head_dim))
  for layer in params['layers'].values():
    a, z = layer['attention'], norm(x, layer['attention_norm'])
    heads = []
    for n in range(model.n_heads):
      k = n // (model.n_heads // model.n_kv_heads)
      part = lambda w, i: (z @ w['kernel'])[..., i * model.head_dim : (i + 1) * model.head_dim]  # noqa: B023, E731
      q, key, value = part(a['wq'], n), part(a['wk'], k), part(a['wv'], k)
      if 'q_norm' in a:
        q, key = norm(q, a['q_norm']), norm(key, a['k_norm'])
      if 'value_embedding' in a:
        e = a['value_embedding']
        own = e['table'][tokens][..., k * model.head_dim : (k + 1) * model.head_dim]
        value = value + own * 2 / (1 + np.exp(-z[..., : len(e['gate'])] @ e['gate'][:, k]))[..., None]
      if 'value_rows' in a:
        e = a['value_rows']
        own = (read_BTF @ e['kernel'])[..., k * model.head_dim : (k + 1) * model.head_dim]
        value = value + own * 2 / (1 + np.exp(-z[..., : len(e['gate'])] @ e['gate'][:, k]))[..., None]
      q, key = ((y[..., 0::2] + 1j * y[..., 1::2]) * turn for y in (q, key))
      scores = (q @ np.conj(key).transpose(0, 2, 1)).real * model.head_dim**-0.5
      scores = np.where(np.tri(T, dtype=bool), scores, -np.inf)
      weights = np.exp(scores - scores.max(-1, keepdims=True))
      heads.append(weights / weights.sum(-1, keepdims=True) @ value)
    h_attn = np.concatenate(heads, -1) @ a['wo']['kernel']
    h, s = x + h_attn, layer['sublayer']
    if 'fusion' in s:
      m = norm(h_attn, s['norm'])
      q = (m @ s['gate']['query']['kernel']).reshape(B, T, 2, -1)
      first, second = (q[:, :, i] @ s['gate']['keys'][i].T for i in range(2))
      scores = (first[..., :, None] + second[..., None, :]).reshape(B, T, -1)
      row = np.argsort(-scores, axis=-1, kind='stable')[..., : model.num_selected]
      rows.append(row)
      z = np.concatenate([m, params['memory_bank'][row].reshape(B, T, -1)], -1)
      s = s['fusion']
    else:
      z = norm(h, s['norm'])
    x = h + (silu(z @ s['gate']['kernel']) * (z @ s['up']['kernel'])) @ s['down']['kernel']
  return norm(x, params['norm']) @ params['embedding'].T, np.array(rows)


@pytest.mark.parametrize('sublayer', MAIN_FIRST)
def test_logits_do_not_depend_on_later_tokens(sublayer):
  config = tiny_config(model__sublayer=sublayer)
  graphdef, params = build_model(config)

  def logit_sum(x_BTD):
    model = nnx.merge(graphdef, {**params, 'embedding': x_BTD[0]})
    return model(jnp.arange(16)[None]).hidden_BTD[0, 7].sum()

  gradient = jax.jit(jax.grad(logit_sum))(params['embedding'][None])[0]
  assert (np.abs(gradient[:8]).sum(-1) > 0).all()
  assert (gradient[8:] == 0).all()


@pytest.mark.parametrize(
  'changes', rarely([{}, VALUE_ROWS | {'model__sublayer': 'dense'}], {}), ids=['fusion', 'values']
)
def test_segments_are_computed_as_if_alone(changes):
  config = tiny_config(**changes)
  graphdef, params = build_model(config)
  model = jax.jit(nnx.merge(graphdef, params))
  tokens = random_batch(config)['input'][0]
  segment = jnp.broadcast_to(jnp.array([0] * 5 + [1] * 11), tokens.shape)
  together = model(tokens, segment)
  alone = model(tokens[:, :5])
  np.testing.assert_allclose(together.hidden_BTD[:, :5], alone.hidden_BTD, atol=1e-5)
  # RoPE is relative: the second segment, moved to the start, gives the same.
  np.testing.assert_allclose(together.hidden_BTD[:, 5:], model(tokens[:, 5:]).hidden_BTD, atol=1e-4)
  assert not np.allclose(model(tokens).hidden_BTD[:, 5:], together.hidden_BTD[:, 5:], atol=1e-2)


@pytest.mark.parametrize(
  ('sublayer', 'changes'),
  [
    ('gated_fusion', {}),
    ('memory_bag', NORMED),
    pytest.param('ngram_bag', HEADS_AND_FFN | {'memory__ngrams': '2,3'}, marks=THOROUGH),
    pytest.param('ngram_bucket', HEADS_AND_FFN | {'memory__ngrams': '1,2', 'memory__key_dim': 4}, marks=THOROUGH),
    pytest.param('ngram_bucket', HEADS_AND_FFN | OWN | {'memory__key_dim': 4}, marks=THOROUGH),
    pytest.param('engram_bag', HEADS_AND_FFN | OWN, marks=THOROUGH),
    pytest.param('dense', ATTENTION, marks=THOROUGH),
    ('dense', OWN | VALUE_ROWS),
    pytest.param('ngram_bucket', VALUE_ROWS, marks=THOROUGH),
  ]
  + [pytest.param(name, changes, marks=THOROUGH) for name, changes in OTHER_DECODED],
)
def test_cached_decoding_equals_whole_rows(sublayer, changes):
  config = tiny_config(model__sublayer=sublayer, **changes)
  graphdef, params = build_model(config)
  model = nnx.merge(graphdef, params)
  tokens = random_batch(config)['input'][0]
  whole = jax.jit(model)(tokens).hidden_BTD
  cache = init_cache(config.model, len(tokens), 20, jnp.float32)
  prefill = jax.jit(partial(decoding.prefill, model, dtype=jnp.float32, attention='xla'))
  decode = jax.jit(partial(decoding.decode, model, dtype=jnp.float32))
  start, cache = prefill(tokens[:, :6], cache)
  np.testing.assert_allclose(start, whole[:, :6], atol=1e-5)
  # Rows at different positions: each goes on from its own length.
  lengths = jnp.array([6, 3, 4, 1])
  for step in range(8):
    position = lengths + step
    token = jnp.take_along_axis(tokens, position[:, None], axis=1)
    hidden, cache = decode(token, cache, position)
    want = jnp.take_along_axis(whole, position[:, None, None], axis=1)
    np.testing.assert_allclose(hidden, want, atol=1e-5)


@pytest.mark.thorough
@pytest.mark.parametrize(
  'memory', [{}, {'model__sublayer': 'memory_bag', 'memory__ngram_layers': '1'}], ids=['gate', 'both']
)
def test_recomputing_blocks_changes_neither_rows_nor_loss_nor_gradient(forms, memory):
  # One dense layer and two with a memory; dropout, so that every layer must get the key that it had.
  settings = {'model__n_layers': 3, 'model__dropout': 0.2, 'memory__layers': '1,2'}
  config = tiny_config(**settings, **memory)
  graphdef, params = build_model(config)
  tokens = random_batch(config)['input'][0]
  rounds = forms == 'gpu' and not memory  # a CPU has not all bf16 products of the other
  dtype = jnp.bfloat16 if rounds else jnp.float32

  def total(params, change):
    out = nnx.merge(graphdef, params)(tokens, dtype=dtype, dropout_key=jax.random.key(0), **change)
    return (out.hidden_BTD**3).sum() + out.aux_loss, out.row_LBTR

  (plain, plain_rows), (again, rows) = (
    jax.jit(jax.grad(partial(total, change=change), has_aux=True))(params) for change in ({}, {'remat': 'block'})
  )
  np.testing.assert_array_equal(plain_rows, rows)
  for a, b in zip(jax.tree.leaves(plain), jax.tree.leaves(again), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5 * float(jnp.abs(a).max()))


@pytest.mark.thorough
@pytest.mark.parametrize('settings', [{}, {'model__qk_norm': True}], ids=['1.4.2', 'qk_norm'])
def test_recomputing_blocks_keeps_one_stream_a_layer_and_on_a_gpu_a_rounded_one(forms, capsys, settings):
  def kept(n_layers):
    config = tiny_config(model__n_layers=n_layers, **settings)
    graphdef, params = build_model(config)
    tokens = random_batch(config)['input'][0]

    def total(params):
      out = nnx.merge(graphdef, params)(tokens, dtype=jnp.bfloat16, remat='block')
      return out.hidden_BTD.astype(jnp.float32).sum()

    jax.ad_checkpoint.print_saved_residuals(total, params)
    arrays = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    shape = ','.join(map(str, tokens.shape))
    return Counter(array for array in arrays if f'[{shape},' in array)

  one = {'bf16[4,16,32]': 1, 'f32[4,16,1]': 1} if forms == 'gpu' else {'f32[4,16,32]': 1}
  assert kept(3) - kept(2) == one


@pytest.mark.thorough
def test_recomputing_blocks_does_not_select_rows_again(forms):
  config = tiny_config(model__n_layers=2)
  graphdef, params = build_model(config)
  tokens = random_batch(config)['input'][0]

  def total(params, remat):
    return nnx.merge(graphdef, params)(tokens, remat=remat).hidden_BTD.sum()

  def count(jaxpr, name):
    inside = [
      x for eqn in jaxpr.eqns for value in eqn.params.values() for x in jax.tree.leaves(value) if hasattr(x, 'eqns')
    ]
    return sum(eqn.primitive.name == name for eqn in jaxpr.eqns) + sum(count(x, name) for x in inside)

  selects = 'top_k' if forms == 'cpu' else 'reduce'
  plain, again = (count(jax.make_jaxpr(jax.grad(partial(total, remat=x)))(params), selects) for x in ('none', 'block'))
  assert plain == again > 0


def test_dropout_zeroes_its_share_and_keeps_the_mean():
  x = jnp.ones((100, 100))
  dropped = dropout(x, 0.25, jax.random.key(0))
  assert float((dropped == 0).mean()) == pytest.approx(0.25, abs=0.02)
  assert float(dropped.mean()) == pytest.approx(1.0, abs=0.03)
  assert dropout(x, 0.25, None) is x


@pytest.mark.thorough
def test_init_is_a_function_of_the_seed():
  config = tiny_config()
  (_, first), (_, again) = build_model(config), build_model(config)
  _, other = build_model(dataclasses.replace(config, seed=1))
  assert all(jax.tree.leaves(jax.tree.map(lambda a, b: bool((a == b).all()), first, again)))
  assert not np.array_equal(first['memory_bank'], other['memory_bank'])
