"""Every choice of the memory section against a second route in float64: values, gradients, and what does not learn."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mmjax.config import load_config
from mmjax.config.sublayers import SUBLAYERS, layer_kinds, memory_layers
from mmjax.errors import UserError
from mmjax.evaluation.loss import make_loss
from mmjax.files import path_name
from mmjax.memory.ngram import sign_vectors
from mmjax.model.params import abstract_params, model_graph
from mmjax.model.sublayers import SublayerInput
from mmjax.training.optimizer import gets_gradient
from tests.helpers import build_model, random_batch, rarely, tiny_config

THOROUGH = pytest.mark.thorough
PLUS = {
  'model__sublayer': 'memory_bag',
  'model__n_layers': 4,
  'memory__layers': 'middle',
  'memory__input': 'residual',
  'memory__n_heads': 2,
  'memory__query_key_norm': 'l2',
  'memory__ffn_dim': 16,
}
NGRAMS = ('ngram_bag', 'ngram_bucket', 'engram_bag')
CHOICES = {  # sublayer and what differs from the faithful memory
  'faithful': {},
  'residual': {'input': 'residual'},
  'scale': {'scores': 'scale'},
  'scale_relu': {'scores': 'scale', 'score_activation': 'relu'},
  'two_heads': {'scores': 'scale', 'n_heads': 2, 'query_key_norm': 'l2'},
  'bag': {'sublayer': 'memory_bag', 'n_heads': 2, 'query_key_norm': 'l2', 'input': 'residual', 'ffn_dim': 12},
  'bag_relu': {'sublayer': 'memory_bag', 'n_heads': 3, 'score_activation': 'relu'},
  'bag_bias': {'sublayer': 'memory_bag', 'n_heads': 2, 'selection_bias': True},
  'bag_cheap': {'sublayer': 'memory_bag', 'n_heads': 2, 'query_key_norm': 'l2', 'key_dim': 4, 'bag_gate': False},
  'ngram': {'sublayer': 'ngram_bag', 'n_heads': 2, 'ngrams': '2', 'ffn_dim': 12},
  'bucket': {'sublayer': 'ngram_bucket', 'n_heads': 2, 'ngrams': '2', 'key_dim': 6, 'input': 'residual', 'ffn_dim': 12},
  'signs': {'sublayer': 'ngram_bag', 'n_heads': 2, 'ngrams': '2', 'ngram_ranges': 'own', 'ngram_signs': True},
  'bucket_signs': {'sublayer': 'ngram_bucket', 'n_heads': 2, 'ngrams': '2', 'ngram_ranges': 'own', 'ngram_signs': True},
  'engram': {'sublayer': 'engram_bag', 'n_heads': 2, 'ngrams': '2', 'input': 'residual', 'ffn_dim': 12},
  'engram_signs': {'sublayer': 'engram_bag', 'n_heads': 2, 'ngrams': '2', 'ngram_ranges': 'own', 'ngram_signs': True},
  'cross_attention': {'sublayer': 'cross_attention', 'n_heads': 2, 'scores': 'scale', 'input': 'residual'},
  'eight_heads': {'scores': 'scale', 'n_heads': 8, 'query_key_norm': 'l2', 'ffn_dim': 12},
}


def silu(x):
  return x / (1 + np.exp(-x))


def rms(x, params):
  return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5) * params['scale']


def swiglu(x, params):
  return (silu(x @ params['gate']['kernel']) * (x @ params['up']['kernel'])) @ params['down']['kernel']


def numpy_attention(config, params, m, rows):
  """Attention of each token to its own rows (B, T, R, P)."""
  query, key, value = (
    (x @ params[name]['kernel']).reshape(*x.shape[:-1], config.model.n_heads, -1)
    for name, x in (('wq', m), ('wk', rows), ('wv', rows))
  )
  score = np.einsum('btnh,btrnh->btnr', query, key) / np.sqrt(query.shape[-1])
  weight = np.exp(score) / np.exp(score).sum(-1, keepdims=True)
  return np.einsum('btnr,btrnh->btnh', weight, value).reshape(m.shape) @ params['wo']['kernel']


def numpy_engram_gate(params, m, y):
  match = (m * rms(y @ params['key']['kernel'], params['key_norm'])).sum(-1, keepdims=True) / np.sqrt(m.shape[-1])
  return 1 / (1 + np.exp(-np.sign(match) * np.sqrt(np.abs(match))))


def numpy_bag(memory, params, m, sums):
  """The output of a bag from its heads' sums."""
  y = np.concatenate(sums, -1)
  if 'key' in params:
    return numpy_engram_gate(params, m, y) * (y @ params['down']['kernel'])
  return (y * (silu(m @ params['up']['kernel']) if memory.bag_gate else 1)) @ params['down']['kernel']


def numpy_sublayer(config, params, h, h_attn, bank, fixed_rows=None, signs=None):
  """What a memory sublayer adds and the rows it takes, (B, T, heads, rows), in float64 with all M scores built.

  `fixed_rows` are taken instead of those with the best scores; n-grams have no scores. `signs`, (B, T, heads, P), are
  those of n-grams.
  """
  memory, heads = config.memory, config.memory.n_heads
  m = rms(h if memory.input == 'residual' else h_attn, params['norm'])
  if config.model.sublayer in NGRAMS:
    sums = [bank[fixed_rows[:, :, head]].mean(-2) for head in range(heads)]
    if 'gate' in params:
      query, keys = (m @ params['gate']['query']['kernel']).reshape(*m.shape[:2], heads, -1), params['gate']['keys']
      score = np.einsum('bthp,bthrp->bthr', query, keys[fixed_rows]) / np.sqrt(keys.shape[-1])
      weight = np.exp(score) / np.exp(score).sum(-1, keepdims=True)
      sums = [(weight[:, :, head, :, None] * bank[fixed_rows[:, :, head]]).sum(-2) for head in range(heads)]
    if signs is not None:
      sums = [signs[:, :, head] * y for head, y in enumerate(sums)]
    out = numpy_bag(memory, params, m, sums)
    return out + (swiglu(rms(h, params['ffn']['norm']), params['ffn']) if memory.ffn_dim else 0), fixed_rows
  query = (m @ params['gate']['query']['kernel']).reshape(*m.shape[:2], 2 * heads, -1)
  keys = params['gate']['keys']
  if memory.query_key_norm == 'l2':
    query, keys = (x / np.linalg.norm(x, axis=-1, keepdims=True) for x in (query, keys))
    query = query * params['gate']['norm']['scale'][:, None]
  taken, weighted = [], []
  for head in range(heads):
    first, second = (query[:, :, 2 * head + i] @ keys[2 * head + i].T for i in range(2))
    scores = (first[..., :, None] + second[..., None, :]).reshape(*m.shape[:2], -1)
    order = scores
    if memory.selection_bias:
      one, two = (keys.shape[-1] ** 0.5 * params['gate']['bias'][2 * head + i] for i in range(2))
      order = scores + (one[:, None] + two).ravel()
    row = np.argsort(-order, axis=-1)[..., : config.model.num_selected]
    row = row if fixed_rows is None else fixed_rows[:, :, head]
    score = np.take_along_axis(scores, row, -1)
    softmax = np.exp(score) / np.exp(score).sum(-1, keepdims=True)
    weight = {'softmax': softmax, 'relu': np.maximum(score, 0)}[memory.score_activation]
    taken.append(row)
    weighted.append((weight[..., None], bank[row]))
  if config.model.sublayer == 'memory_bag':
    out = numpy_bag(memory, params, m, [(w * rows).sum(-2) for w, rows in weighted])
  else:
    if memory.scores == 'scale':
      times = config.model.num_selected if memory.score_activation == 'softmax' else 1
      weighted = [(None, times * w * rows) for w, rows in weighted]
    if config.model.sublayer == 'cross_attention':
      out = numpy_attention(config, params['attention'], m, np.concatenate([rows for _, rows in weighted], -2))
    else:
      flat = [rows.reshape(*m.shape[:2], -1) for _, rows in weighted]
      out = swiglu(np.concatenate([m, *flat], -1), params['fusion'])
  if memory.ffn_dim:
    out = out + swiglu(rms(h, params['ffn']['norm']), params['ffn'])
  return out, np.stack(taken, axis=2)


def build(name):
  choice = dict(CHOICES[name])
  config = tiny_config(
    model__sublayer=choice.pop('sublayer', 'gated_fusion'), **{f'memory__{k}': v for k, v in choice.items()}
  )
  sublayer = SUBLAYERS[config.model.sublayer].build(config.model, config.memory, rngs=nnx.Rngs(0))
  graphdef, state = nnx.split(sublayer)
  rng = np.random.default_rng(1)
  shape = (2, 5, config.model.dim)
  h, h_attn, direction = (rng.standard_normal(shape) for _ in range(3))
  bank = rng.standard_normal((config.model.knowledge_num, config.model.knowledge_dim))
  return config, graphdef, nnx.to_pure_dict(state), h, h_attn, bank, direction


@pytest.mark.parametrize('name', CHOICES)
@pytest.mark.thorough
def test_sublayer_and_its_gradients_equal_a_float64_route(name):
  config, graphdef, params, h, h_attn, bank, direction = build(name)
  # A learned scale of 1 or one value everywhere would hide that it is ignored.
  params = jax.tree.map(lambda x: x * np.random.default_rng(2).uniform(0.8, 1.2, x.shape).astype(np.float32), params)
  if config.model.sublayer == 'ngram_bucket':  # so do the keys
    params['gate']['keys'] = np.random.default_rng(6).normal(size=params['gate']['keys'].shape).astype(np.float32)
  if config.memory.selection_bias:  # it starts at 0
    params['gate']['bias'] += np.random.default_rng(4).normal(size=params['gate']['bias'].shape).astype(np.float32)

  last = ngrams = signs = None
  if config.model.sublayer in NGRAMS:
    last = np.random.default_rng(5).integers(0, 99, (2, 5, 2), np.int32)
    memory = nnx.merge(graphdef, params).memory
    ngrams = np.asarray(memory.rows_of(last))
    if config.memory.ngram_signs:
      signs = np.asarray(sign_vectors(config.model.knowledge_dim))[np.asarray(memory.signs_of(last))]

  @jax.jit
  def run(params, bank):
    inputs = (jnp.asarray(x, jnp.float32) for x in (h, h_attn))
    out = nnx.merge(graphdef, params)(SublayerInput(*inputs, bank, last), jnp.float32)
    return jnp.sum(out.delta_BTD * direction), out

  (_, out), gradient = jax.value_and_grad(run, argnums=(0, 1), has_aux=True)(params, jnp.asarray(bank, jnp.float32))
  exact = (jax.tree.map(lambda x: np.asarray(x, np.float64), params), bank)
  delta, rows = numpy_sublayer(config, exact[0], h, h_attn, bank, ngrams, signs)
  np.testing.assert_array_equal(out.row_BTR, rows.reshape(2, 5, -1))
  if config.model.sublayer == 'engram_bag':
    y = (bank[ngrams].mean(-2) * (1 if signs is None else signs)).reshape(2, 5, -1)
    m = rms(h if config.memory.input == 'residual' else h_attn, exact[0]['norm'])
    np.testing.assert_allclose(out.score_BTR - numpy_engram_gate(exact[0], m, y), 0, atol=1e-5)
  np.testing.assert_allclose(out.delta_BTD, delta, atol=1e-4 * np.abs(delta).max())
  rng = np.random.default_rng(3)
  leaves, treedef = jax.tree.flatten(exact)
  for i, (leaf, slope) in enumerate(zip(leaves, jax.tree.leaves(gradient), strict=True)):
    step = rng.standard_normal(leaf.shape) * 1e-5

    def loss(sign, i=i, step=step):
      moved = [x + sign * step if j == i else x for j, x in enumerate(leaves)]
      tree, moved_bank = jax.tree.unflatten(treedef, moved)
      return (numpy_sublayer(config, tree, h, h_attn, moved_bank, rows, signs)[0] * direction).sum()

    want, got = (loss(1) - loss(-1)) / 2, float((np.asarray(slope, np.float64) * step).sum())
    assert got == pytest.approx(want, rel=2e-3, abs=2e-8), i


@pytest.mark.parametrize(
  ('changes', 'learns'),
  [
    pytest.param({}, False, marks=THOROUGH),  # tests/test_step.py has it
    pytest.param({'memory__scores': 'scale'}, True, marks=THOROUGH),
    ({'memory__selection_bias': True}, False),
    pytest.param({'model__sublayer': 'cross_attention', 'memory__query_key_norm': 'l2'}, False, marks=THOROUGH),
    pytest.param(PLUS, True, marks=THOROUGH),
    ({'model__sublayer': 'ngram_bag', 'memory__bag_gate': False, 'memory__ffn_dim': 16}, None),  # no gate, no input
  ],
)
@pytest.mark.thorough
def test_gate_gets_a_gradient_where_the_optimizer_says_so(changes, learns):
  config = tiny_config(**changes)
  params = build_model(config)[1]
  rows = jax.tree.map(lambda x: x[0], random_batch(config))
  loss = make_loss(config, model_graph(config), 'xla')
  gradient = jax.jit(jax.grad(loss, has_aux=True))(params, rows, 64.0, None)[0]
  expected = jax.tree.leaves(gets_gradient(config, params))
  for (path, slope), moves in zip(jax.tree_util.tree_leaves_with_path(gradient), expected, strict=True):
    name = path_name(path)
    assert moves == (np.abs(slope).max() > 0), name
    if 'sublayer/gate/keys' in name:
      assert moves == learns, name


@pytest.mark.parametrize(
  ('layers', 'n_layers', 'numbers'),
  [
    ('all', 3, (0, 1, 2)),
    ('middle', 4, (1, 2)),
    ('middle', 8, (2, 3, 4, 5)),
    ('middle', 1, (0,)),
    ('2, 0', 3, (0, 2)),
  ],
)
def test_layers_with_a_memory_are_those_asked_for(layers, n_layers, numbers):
  config = tiny_config(memory__layers=layers, model__n_layers=n_layers)
  assert config.memory.layer_numbers(n_layers) == numbers
  kinds = layer_kinds(config.model, config.memory)
  assert [i for i, kind in enumerate(kinds) if kind == 'gated_fusion'] == list(numbers)
  assert set(kinds) <= {'gated_fusion', 'dense'}


@pytest.mark.parametrize('layers', ['', '3', '1,1', '-1', 'first', '0,,1', '²'])
def test_layers_that_are_not_there_are_refused(layers):
  with pytest.raises(UserError, match=r"must be 'all', 'middle' or different layers .* from 0 to 2"):
    tiny_config(memory__layers=layers, model__n_layers=3)


def test_layers_of_usage_are_those_with_a_memory():
  config = tiny_config(**PLUS)
  graphdef, params = model_graph(config), abstract_params(config)
  assert memory_layers(config) == [1, 2]
  out = jax.eval_shape(lambda p: nnx.merge(graphdef, p)(jnp.ones((1, 3), jnp.int32)), params)
  assert out.row_LBTR.shape == (2, 1, 3, 2 * config.model.num_selected)
  dense = tiny_config(model__sublayer='dense')
  assert memory_layers(dense) == [] and set(layer_kinds(dense.model, dense.memory)) == {'dense'}


@pytest.mark.parametrize('widths', rarely([(0, 4), (2, 1), (12, 6)], (12, 6)))
def test_width_of_sub_keys_is_that_of_half_a_row_or_the_one_asked_for(widths):
  key_dim, half = widths
  gate = build_model(tiny_config(memory__key_dim=key_dim, memory__n_heads=2))[1]['layers'][0]['sublayer']['gate']
  assert gate['keys'].shape == (4, 8, half) and gate['query']['kernel'].shape == (32, 4 * half)


@pytest.mark.parametrize(
  ('override', 'said'),
  [
    ('memory.n_heads=65', 'memory.n_heads=65 must be at most 64'),
    ('memory.n_heads=0', 'memory.n_heads=0 must be a finite number of at least 1'),
    ('memory.scores=bag', 'memory.scores=.bag. must be one of none, scale'),
    ('memory.key_dim=5', 'memory.key_dim=5 must be even: a query is two sub-keys; nearest: 6'),
  ],
)
def test_memory_settings_against_a_rule_are_refused(override, said):
  with pytest.raises(UserError, match=said):
    load_config('configs/base.py', [f'--config.{override}'])
