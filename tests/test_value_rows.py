"""Rows of n-grams in the values of attention: against numpy and loops, with and without other readers of the bank."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import mmjax
from mmjax.config import load_config
from mmjax.config.sublayers import memory_layers
from mmjax.errors import UserError
from mmjax.inference.api import LanguageModel
from mmjax.inference.measure import open_text
from mmjax.inference.memory_reads import MemoryReader
from mmjax.interop.names import not_in_pytorch, tensor_shapes
from mmjax.memory.ngram import (
  FIRST_OF_SIGNS,
  NO_TOKEN,
  SIGN_VECTORS,
  sign_vectors,
)
from mmjax.model.cost import bytes_per_token, flops_per_token
from mmjax.run.directory import open_run
from mmjax.training.row_gradients import RowSums
from mmjax.training.step import make_gradient
from tests.helpers import build_model, random_batch, tiny_config
from tests.test_model import numpy_forward
from tests.test_ngram import rows_by_hand

READ = {'model__num_selected': 2, 'memory__n_heads': 3, 'memory__ngrams': '1,2'}
VALUES = READ | {'model__sublayer': 'dense', 'memory__value_layers': '1'}
BOTH = READ | {'model__sublayer': 'ngram_bag', 'memory__layers': '1', 'memory__value_layers': 'all'}


def test_model_equals_numpy_with_rows_hashed_and_averaged_by_hand():
  config = tiny_config(**VALUES, memory__ngram_signs=True)
  graphdef, params = build_model(config)
  assert memory_layers(config) == ['values'] and 'value_rows' not in params['layers'][0]['attention']
  added = params['layers'][1]['attention']['value_rows']
  assert added['kernel'].shape == (3 * 8, 2 * 8) and not np.any(added['gate'])
  added['gate'] = jax.random.normal(jax.random.key(0), added['gate'].shape)  # not as it starts
  tokens = np.asarray(random_batch(config)['input'][0])
  model = nnx.merge(graphdef, params)
  out = jax.jit(model)(jnp.asarray(tokens))
  rows = np.zeros((*tokens.shape, 6), int)
  signs = np.zeros((*tokens.shape, 3), int)
  for b, t, i in np.ndindex(rows.shape):
    ngram = [int(tokens[b, t]), int(tokens[b, t - 1]) if t else NO_TOKEN][: (1, 2, 1)[i // 2]]
    rows[b, t, i] = rows_by_hand(ngram, i, config.model.knowledge_num)
    signs[b, t, i // 2] = rows_by_hand(ngram, FIRST_OF_SIGNS + i // 2, SIGN_VECTORS)
  np.testing.assert_array_equal(out.row_LBTR, rows[None])
  assert not np.any(out.score_LBTR)
  read = np.asarray(params['memory_bank'], np.float64)[rows].reshape(*tokens.shape, 3, 2, 8).mean(axis=3)
  read = read * np.asarray(sign_vectors(8))[signs]
  params = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
  want, _ = numpy_forward(config.model, params, tokens, read.reshape(*tokens.shape, -1))
  np.testing.assert_allclose(model.logits(out.hidden_BTD), want, atol=2e-5)


@pytest.mark.thorough
@pytest.mark.parametrize('remat', ['none', 'block'])
def test_bank_gets_the_sum_of_all_gradients_also_row_by_row(remat):
  """A layer that reads rows after attention, too: each reader's gradient against that of a bank of its own."""
  changes = BOTH | {'train__accumulation_steps': 1, 'runtime__remat': remat}
  dense, lazy = (tiny_config(**changes, memory__bank_update=update) for update in ('dense', 'lazy'))
  graphdef, params = build_model(dense)
  batch = random_batch(dense)
  inputs = (params, batch, jnp.float32(9), jnp.int32(0))
  (parts, grads), (_, lazy_grads) = (jax.jit(make_gradient(c, graphdef, 'xla'))(*inputs) for c in (dense, lazy))

  def loss(banks):
    model = nnx.merge(graphdef, params)
    out = model(batch['input'][0], bank_of_reader=lambda reader, _: banks[reader])
    log_BTV, target_BT = jax.nn.log_softmax(model.logits(out.hidden_BTD)), batch['target'][0]
    nll_BT = -jnp.take_along_axis(log_BTV, target_BT[..., None], -1)[..., 0]
    return jnp.sum(jnp.where(target_BT >= 0, nll_BT, 0)) / 9

  values, layer = jax.jit(jax.grad(loss))([params['memory_bank']] * 2)
  assert memory_layers(dense) == ['values', 1] and min(np.abs(values).max(), np.abs(layer).max()) > 1e-3
  np.testing.assert_allclose(grads['memory_bank'], values + layer, rtol=1e-4, atol=1e-6)
  sums = lazy_grads['memory_bank']
  assert isinstance(sums, RowSums) and np.any(parts['usage_LM'], axis=0)[sums.row_U[: int(sums.used)]].all()
  found = np.zeros_like(values)
  found[sums.row_U[: int(sums.used)]] = sums.sum_UP[: int(sums.used)]
  np.testing.assert_allclose(found, values + layer, rtol=1e-4, atol=1e-6)


def test_cost_is_a_projection_and_a_gate_for_each_layer_and_one_read():
  config, plain = tiny_config(**VALUES), tiny_config(model__sublayer='dense')
  flops = flops_per_token(config)
  assert flops['value_rows'] == 3 * 2 * (3 * 8 * 16 + 12 * 2) and flops['bag_reads'] == 3 * 2 * 3 * 2 * 8
  assert flops['total'] - flops_per_token(plain)['total'] == flops['value_rows'] + flops['bag_reads']
  assert (
    flops_per_token(tiny_config(**VALUES | {'memory__value_layers': 'all'}))['value_rows'] == 2 * flops['value_rows']
  )
  assert bytes_per_token(config)['bank'] == 3 * 2 * 8 * 4
  assert bytes_per_token(config)['weights'] - bytes_per_token(plain)['weights'] == 4 * (3 * 8 * 16 + 12 * 2)


@pytest.mark.thorough
def test_rows_of_values_are_shown_and_exchanged_for_values_alone(tiny_run):
  config = tiny_config(**BOTH, memory__bank_std=3.0)
  graphdef, params = build_model(config)
  reader, run = MemoryReader(LanguageModel(config, mmjax.load(tiny_run).tokenizer, params)), open_run(tiny_run)
  token = reader.read_text('the memory')[-1]
  assert [entry['layer'] for entry in token['layers']] == ['values', 1]
  read = token['layers'][0]['rows'][-1]
  assert read['ngram'] == token['token'] and read['score'] is None and read['weight'] is None
  split = open_text(mmjax.load(tiny_run).config, run)
  [found] = reader.read_row(read['row'], split, layer='values', top=64)['layers']
  assert found['layer'] == 'values' and found['strength_is'] == '' and found['effect']['contexts'] > 0
  tokens = split.rows(np.array([context['corpus_row'] for context in found['contexts']]))['input']
  at = np.array([context['position'] for context in found['contexts']])
  bank_MP = params['memory_bank']

  @jax.jit
  def log_probabilities(banks):
    model = nnx.merge(graphdef, params)
    out = model(tokens, bank_of_reader=lambda reader, _: banks[reader])
    return jax.nn.log_softmax(model.logits(out.hidden_BTD))[np.arange(len(at)), at]

  changed_MP = bank_MP.at[read['row']].set(bank_MP.mean(axis=0))
  change_V = (log_probabilities([bank_MP] * 2) - log_probabilities([changed_MP, bank_MP])).mean(axis=0)
  for shown in found['effect']['up']:
    assert shown['log_change'] == pytest.approx(float(change_V[shown['id']]), abs=1e-5)
  assert np.abs(change_V).max() > 1e-3
  with pytest.raises(UserError, match='layer values has no memory; layers that have one: 0, 1'):
    MemoryReader(mmjax.load(tiny_run)).chosen_layers('values')


@pytest.mark.parametrize(
  ('sublayer', 'overrides', 'said'),
  [
    (
      'dense',
      ['memory.value_layers=2', 'memory.ffn_dim=8'],
      'memory.ffn_dim=8 does nothing in a model of dense layers',
    ),
    (
      'dense',
      ['memory.value_layers=2', 'memory.layers=1'],
      "memory.layers='1' does nothing in a model of dense layers",
    ),
    ('dense', ['memory.ngrams=2'], "'ngram_bag', 'ngram_bucket', 'engram_bag' and memory.value_layers$"),
    ('dense', ['memory.value_layers=8'], "memory.value_layers='8' must be 'all', 'alternate' or different layers"),
    ('dense', ['memory.value_layers=1', 'memory.ngram_ranges=own', 'model.knowledge_num=9999'], 'at least 51200 with'),
    ('dense', ['memory.value_layers=1', 'model.knowledge_num=7'], 'model.num_selected=8 must be at most model.knowl'),
  ],
)
def test_settings_against_a_rule_are_refused(sublayer, overrides, said):
  flags = [f'--config.{override}' for override in (f'model.sublayer={sublayer}', *overrides)]
  with pytest.raises(UserError, match=said):
    load_config('configs/base.py', flags)


def test_settings_of_the_bank_count_and_files_hold_the_models_own_names():
  more = {'memory__bank_lr_multiplier': 8.0, 'memory__bank_decay_multiplier': 0.0, 'memory__bank_update': 'lazy'}
  config = tiny_config(**VALUES | {'memory__value_layers': 'alternate'}, memory__bank_std=0.5, **more)
  assert config.memory.value_layer_numbers(2) == (1,) and config.memory.value_layer_numbers(5) == (0, 2, 4)
  assert not_in_pytorch(config) == "memory.value_layers='alternate'"
  assert tensor_shapes(config)['layers/1/attention/value_rows/kernel'] == (3 * 8, 16)
  assert tensor_shapes(config)['memory_bank'] == (64, 8)
