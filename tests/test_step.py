"""The train step against plain routes: one big batch, torch's AdamW in numpy, a closed-form schedule."""

import dataclasses
import functools
import math
import operator

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from mmjax.config.sublayers import SUBLAYERS
from mmjax.data.loader import PADDING
from mmjax.evaluation.loss import make_loss
from mmjax.files import path_name
from mmjax.kernels.bank import sum_by_row
from mmjax.kernels.cross_entropy import fitting_chunk
from mmjax.model.params import init_params, model_graph
from mmjax.training.optimizer import gets_gradient, learning_rate_schedule, make_optimizer, may_overflow
from mmjax.training.state import init_state
from mmjax.training.step import make_train_step
from tests import helpers
from tests.helpers import STEPS, compiled, random_batch, rarely, seldom

tiny_config = functools.partial(helpers.tiny_config, model__n_layers=1)  # half the compile time; layers are alike
DECAYED = {'train__weight_decay': 0.1, 'train__grad_clip': 0.05}


def run_updates(config, n_steps, batches=None):
  step, state = compiled(config)
  losses = []
  for i in range(n_steps):
    state, metrics = step(state, batches[i] if batches else random_batch(config, seed=i))
    losses.append(float(metrics['loss']))
  return state, metrics, losses


def loss_and_gradients(config, dtype='float32'):
  config = config.with_settings({'train.dtype': dtype})
  batch = jax.tree.map(lambda x: x[0], random_batch(config))
  params = init_state(config, make_optimizer(config, STEPS))['params']
  noise = np.random.default_rng(0)  # norms that are not all 1
  params = jax.tree.map(lambda x: x + 0.1 * jnp.asarray(noise.standard_normal(x.shape), jnp.float32), params)
  objective = make_loss(config, model_graph(config), 'xla')
  (loss, _), grads = jax.jit(jax.value_and_grad(objective, has_aux=True))(params, batch, jnp.float32(100), None)
  return loss, grads


@pytest.mark.parametrize('sublayer', seldom(SUBLAYERS, 'gated_fusion', 'memory_bag', 'ngram_bucket'))
def test_forms_of_a_gpu_give_the_loss_and_gradients_of_those_of_a_cpu(sublayer, request):
  config = tiny_config(model__sublayer=sublayer)
  loss, grads = loss_and_gradients(config)
  request.getfixturevalue('gpu_forms')
  # A CPU has no bfloat16 product for the gradients of sub-scores.
  for dtype, tolerance in (('float32', 1e-5), ('bfloat16', 0.01))[: 1 + (sublayer != 'memory_bag')]:
    found, found_grads = loss_and_gradients(config, dtype)
    assert float(found) == pytest.approx(float(loss), rel=tolerance)
    if dtype == 'float32':
      for ours, theirs in zip(jax.tree.leaves(found_grads), jax.tree.leaves(grads), strict=True):
        assert jnp.linalg.norm(ours - theirs) <= 1e-5 * jnp.linalg.norm(theirs) + 1e-8


def named_leaves(tree):
  return {path_name(path): np.asarray(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def test_first_loss_is_near_log_vocabulary_and_training_lowers_it():
  config = tiny_config()
  batch = random_batch(config)
  _, _, losses = run_updates(config, STEPS, [batch] * STEPS)
  assert losses[0] == pytest.approx(math.log(config.model.vocab_size), abs=0.5)
  assert losses[-1] < losses[0] - 1


def test_gate_of_1_4_2_gets_no_gradient_and_never_moves():
  config = tiny_config(**DECAYED)
  step, state = compiled(config)
  rows = jax.tree.map(lambda x: x[0], random_batch(config))
  loss = make_loss(config, model_graph(config), 'xla')
  gradients = named_leaves(jax.jit(jax.grad(loss, has_aux=True))(state['params'], rows, 1.0, None)[0])
  trained, _, _ = run_updates(config, 3)
  before, after = named_leaves(state['params']), named_leaves(trained['params'])
  mask = {path_name(p): v for p, v in jax.tree_util.tree_leaves_with_path(gets_gradient(config, state['params']))}
  for name in before:
    is_gate = '/gate/keys' in name or '/gate/query/' in name
    assert mask[name] != is_gate, name
    assert (np.abs(gradients[name]).max() == 0) == is_gate, name
    assert np.array_equal(before[name], after[name]) == is_gate, name
  assert sum('gate/keys' in name for name in before) == config.model.n_layers


def test_accumulated_micro_batches_equal_one_big_batch():
  many = tiny_config(train__accumulation_steps=4, train__batch_size=2)
  one = tiny_config(train__accumulation_steps=1, train__batch_size=8)
  batch = random_batch(many)
  big = jax.tree.map(lambda x: x.reshape(1, -1, x.shape[-1]), batch)
  (state_a, metrics_a, _), (state_b, metrics_b, _) = run_updates(many, 1, [batch]), run_updates(one, 1, [big])
  for name in ('loss', 'grad_norm', 'accuracy', 'tokens'):
    np.testing.assert_allclose(metrics_a[name], metrics_b[name], rtol=1e-5)
  np.testing.assert_array_equal(metrics_a['usage_LM'], metrics_b['usage_LM'])
  # Adam's first update is the gradient's sign: where a gradient is mere rounding, the signs may differ.
  moments = zip(
    named_leaves(state_a['opt_state'][1].mu).items(), named_leaves(state_b['opt_state'][1].mu).items(), strict=True
  )
  for (name, a), (_, b) in moments:
    np.testing.assert_allclose(a, b, atol=1e-6 * max(1, np.abs(b).max()), err_msg=name)


@pytest.mark.parametrize('settings', [{}, {'memory__bank_update': 'lazy'}, {'train__accumulation_steps': 1}])
@pytest.mark.thorough
def test_host_hears_of_every_micro_batch_and_the_result_stays_the_same(settings):
  config, heard = tiny_config(**settings), []
  optimizer = make_optimizer(config, STEPS)
  told = jax.jit(
    make_train_step(
      config,
      model_graph(config),
      optimizer,
      attention='xla',
      total_steps=STEPS,
      on_micro_batch=lambda index, loss: heard.append((int(index), float(loss))),
    )
  )
  step, state = compiled(config)
  expected, actual = step(state, random_batch(config)), told(state, random_batch(config))
  jax.effects_barrier()
  for a, b in zip(jax.tree.leaves(expected), jax.tree.leaves(actual), strict=True):
    np.testing.assert_array_equal(a, b)
  assert [index for index, _ in heard] == list(range(config.train.accumulation_steps))
  assert sum(loss for _, loss in heard) == pytest.approx(float(actual[1]['loss']), rel=1e-6)


def test_padding_weighs_nothing():
  config = tiny_config()
  batch = random_batch(config)
  padded = batch['target'] == PADDING
  assert 0 < padded.sum() < padded.size / 2
  other = batch | {'input': jnp.where(padded, 7, batch['input'])}  # what stands where the target is padding
  (_, a, _), (_, b, _) = run_updates(config, 1, [batch]), run_updates(config, 1, [other])
  assert int(a['tokens']) == (~padded).sum()
  np.testing.assert_allclose(a['loss'], b['loss'], rtol=1e-6)
  np.testing.assert_array_equal(a['usage_LM'], b['usage_LM'])
  reads = int(a['tokens']) * config.model.num_selected
  assert a['usage_LM'].sum(axis=1).tolist() == [reads] * config.model.n_layers


def test_rows_that_were_read_move_by_the_ratio_that_is_reported():
  config = tiny_config()
  _, state = compiled(config)
  after, metrics, _ = run_updates(config, 1)
  read = np.asarray(metrics['usage_LM']).any(axis=0)
  assert 0 < read.sum() < len(read)
  before, after = (np.asarray(s['params']['memory_bank'], np.float64)[read] for s in (state, after))
  want = np.linalg.norm(after - before) / np.linalg.norm(before)
  assert float(metrics['row_update_ratio']) == pytest.approx(want, rel=1e-4)
  assert list(metrics['gate_norms']) == list(range(config.model.n_layers)) and not any(
    jax.tree.leaves(metrics['gate_norms'])
  )


def test_loss_equals_log_softmax_over_all_logits():
  config = tiny_config()
  _, state = compiled(config)
  rows = jax.tree.map(lambda x: x[0], random_batch(config))
  model = nnx.merge(model_graph(config), state['params'])
  logits = np.asarray(jax.jit(lambda tokens_BT: model.logits(model(tokens_BT).hidden_BTD))(rows['input']), np.float64)
  nll = np.log(np.exp(logits).sum(-1)) - np.take_along_axis(logits, np.asarray(rows['target'])[..., None], -1)[..., 0]
  keep = np.asarray(rows['target']) != PADDING
  loss_of = jax.jit(make_loss(config, model_graph(config), 'xla'))
  loss, _ = loss_of(state['params'], rows, jnp.float32(keep.sum()), None)
  assert float(loss) == pytest.approx(nll[keep].mean(), rel=1e-5)


def test_update_equals_torch_adamw_in_numpy():
  config = tiny_config(**DECAYED)
  train = config.train
  _, state = compiled(config)
  loss = make_loss(config, model_graph(config), 'xla')

  def batch_loss(tree, batch):
    first, second = (jax.tree.map(operator.itemgetter(i), batch) for i in (0, 1))
    return loss(tree, first, 64.0, None)[0] + loss(tree, second, 64.0, None)[0]

  grad = jax.jit(jax.grad(batch_loss))
  params = {k: v.astype(np.float64) for k, v in named_leaves(state['params']).items()}
  mean, square = ({k: np.zeros_like(v) for k, v in params.items()} for _ in range(2))
  batches = [random_batch(config, seed=i) for i in range(3)]
  tokens = [float((b['target'] != PADDING).sum()) for b in batches]
  tree = state['params']
  for t, batch in enumerate(batches):
    g = {k: v * 64.0 / tokens[t] for k, v in named_leaves(grad(tree, batch)).items()}
    norm = math.sqrt(sum((v.astype(np.float64) ** 2).sum() for v in g.values()))
    rate = 0.5 * train.learning_rate * (1 + math.cos(math.pi * t / STEPS))
    for k in params:
      if '/gate/keys' in k or '/gate/query/' in k:
        continue
      clipped = g[k] * min(1, train.grad_clip / norm)
      mean[k] = train.beta1 * mean[k] + (1 - train.beta1) * clipped
      square[k] = train.beta2 * square[k] + (1 - train.beta2) * clipped**2
      params[k] *= 1 - rate * train.weight_decay
      corrected = np.sqrt(square[k] / (1 - train.beta2 ** (t + 1))) + train.eps
      params[k] -= rate * mean[k] / (1 - train.beta1 ** (t + 1)) / corrected
    tree = jax.tree_util.tree_map_with_path(lambda p, _: jnp.array(params[path_name(p)], jnp.float32), tree)
  trained, _, _ = run_updates(config, 3, batches)
  for name, value in named_leaves(trained['params']).items():
    moved = np.abs(params[name] - named_leaves(state['params'])[name]).max()
    # Adam turns rounding of a near-zero gradient into a step of the learning rate: compare in the mean.
    assert np.abs(value - params[name]).mean() <= 1e-3 * max(moved, 1e-6), name


def test_schedule_is_warmup_then_cosine_to_the_final_rate():
  train = tiny_config(train__warmup_steps=4, train__learning_rate=0.8, train__final_learning_rate=0.08).train
  schedule = learning_rate_schedule(train, 24)
  np.testing.assert_allclose([schedule(i) for i in range(5)], [0.2, 0.4, 0.6, 0.8, 0.8], rtol=1e-6)
  np.testing.assert_allclose(schedule(14), (0.8 + 0.08) / 2, rtol=1e-6)
  np.testing.assert_allclose(schedule(24), 0.08, rtol=1e-6)
  rising = learning_rate_schedule(dataclasses.replace(train, warmup_steps=0, learning_rate=1e-300), 20)
  np.testing.assert_allclose([rising(0), rising(10), rising(20)], [0, 0.04, 0.08], atol=1e-8)
  plain = learning_rate_schedule(tiny_config().train, 20)
  np.testing.assert_allclose([plain(0), plain(10), plain(20)], [1e-2, 5e-3, 0], atol=1e-9)


def test_warm_down_stays_at_the_peak_and_falls_in_a_line():
  more = {'train__schedule': 'warmdown', 'train__warmdown_share': 0.25, 'train__final_learning_rate': 0.08}
  schedule = learning_rate_schedule(tiny_config(train__warmup_steps=4, train__learning_rate=0.8, **more).train, 24)
  expected = np.interp(range(25), [0, 3, 18, 24], [0.2, 0.8, 0.8, 0.08])
  np.testing.assert_allclose([schedule(i) for i in range(25)], expected, rtol=1e-6)
  all_of_it = learning_rate_schedule(tiny_config(**more | {'train__warmdown_share': 1.0}).train, 24)
  np.testing.assert_allclose([all_of_it(0), all_of_it(12), all_of_it(24)], [1e-2, 0.045, 0.08], rtol=1e-6)


@pytest.mark.thorough
def test_muon_moves_matrices_of_the_layers_by_orthogonal_steps_and_the_rest_by_adam():
  more = {'model__n_layers': 1, 'memory__scores': 'scale', 'train__weight_decay': 0.0, 'train__grad_clip': 0.0}
  configs = [tiny_config(train__optimizer=name, **more) for name in ('adamw', 'muon')]
  params = init_params(configs[0])
  gradient = jax.tree.map(lambda x: jax.random.normal(jax.random.key(x.size), x.shape), params)
  adamw, muon = (make_optimizer(config, 10) for config in configs)
  moved = [named_leaves(optimizer.update(gradient, optimizer.init(params), params)[0]) for optimizer in (adamw, muon)]
  rate = configs[0].train.learning_rate * 5.0
  matrices = 0
  for name, step in moved[1].items():
    if name.startswith('layers/') and name.endswith('kernel'):
      matrices += 1
      singular = np.linalg.svd(np.asarray(step) / rate / max(1.0, step.shape[1] / step.shape[0]) ** 0.5)[1]
      assert singular.min() > 0.6 and singular.max() < 1.3, name  # what five Newton-Schulz iterations reach
    else:
      np.testing.assert_array_equal(step, moved[0][name], err_msg=name)
  assert matrices >= 7


def test_plain_gradient_descent_moves_by_the_rate_times_the_gradient_and_keeps_no_moments():
  config = tiny_config(train__optimizer='sgd', train__weight_decay=0.0, train__grad_clip=0.0, model__n_layers=1)
  params = jax.tree.map(jnp.zeros_like, init_params(config))
  gradient = jax.tree.map(lambda x: jax.random.normal(jax.random.key(x.size), x.shape), params)
  optimizer = make_optimizer(config, 10)
  state = optimizer.init(params)
  step, _ = optimizer.update(gradient, state, params)
  assert all(jnp.size(leaf) == 1 for leaf in jax.tree.leaves(state))  # counters
  for name, moved in named_leaves(step).items():
    if name in ('embedding', 'memory_bank'):
      np.testing.assert_allclose(moved, -config.train.learning_rate * named_leaves(gradient)[name], rtol=1e-6)
  assert may_overflow(config) and not may_overflow(tiny_config(train__optimizer='sgd'))


def test_non_finite_gradient_skips_the_update_and_is_counted():
  config = tiny_config()
  step, state = compiled(config)
  state = jax.tree.map(lambda x: x, state)
  broken = {**state, 'params': {**state['params'], 'norm': {'scale': state['params']['norm']['scale'] * jnp.inf}}}
  after, metrics = step(broken, random_batch(config))
  assert not metrics['finite'] and int(after['skipped']) == 1 and int(after['skipped_total']) == 1
  assert int(after['step']) == 1
  for part in ('params', 'opt_state'):
    for a, b in zip(jax.tree.leaves(after[part]), jax.tree.leaves(broken[part]), strict=True):
      np.testing.assert_array_equal(a, b)
  healed, metrics = step({**after, 'params': state['params']}, random_batch(config))
  assert metrics['finite'] and int(healed['skipped']) == 0 and int(healed['skipped_total']) == 1
  assert float(metrics['learning_rate']) == pytest.approx(config.train.learning_rate)  # the schedule did not move


@pytest.mark.parametrize('bank_update', ['dense', 'lazy'])
@pytest.mark.thorough
def test_update_that_would_not_be_finite_is_skipped_and_counted(bank_update):
  config = tiny_config(memory__bank_update=bank_update).with_settings({'train.eps': 0.0})  # 0 / 0 without a gradient
  step, state = compiled(config)
  after, metrics = step(state, random_batch(config))
  assert np.isfinite(metrics['loss']) and np.isfinite(metrics['grad_norm'])
  assert not metrics['finite'] and not metrics['applied'] and int(metrics['skipped']) == 1
  assert [int(after[name]) for name in ('step', 'skipped', 'skipped_total')] == [1, 1, 1]
  for a, b in zip(jax.tree.leaves(without_counters(after)), jax.tree.leaves(without_counters(state)), strict=True):
    np.testing.assert_array_equal(a, b)


def without_counters(state):
  return {name: value for name, value in state.items() if name not in ('step', 'skipped', 'skipped_total')}


@settings(max_examples=30, deadline=None)
@given(
  st.sampled_from([0.0, 0.5, 0.9, 0.99, 0.999999]),
  st.sampled_from([0.0, 0.5, 0.9, 0.999, 0.999999]),
  st.sampled_from([1e-30, 1e-15, 1e-8, 1.0]),
  st.sampled_from([0.0, 1e-6, 1.0]),
  st.integers(0, 2**32 - 1),
)
def test_step_of_adam_is_finite_wherever_the_settings_are_not_said_to_overflow(beta1, beta2, eps, clip, seed):
  """Gradients of any size that Adam was not made for: with huge ones first, none, or what float32 cannot square."""
  config = tiny_config()
  train = dataclasses.replace(config.train, beta1=beta1, beta2=beta2, eps=eps, grad_clip=clip)
  if may_overflow(dataclasses.replace(config, train=train)):
    return
  draw = np.random.default_rng(seed)
  adam = optax.scale_by_adam(beta1, beta2, eps)
  state = adam.init(jnp.zeros(64))
  for _ in range(30):
    gradient = np.float32(10.0 ** draw.uniform(-44, 17, 64) * draw.choice([-1, 0, 1], 64) * draw.choice([0, 1, 1]))
    scale = min(1, clip / max(np.linalg.norm(gradient), 1e-30)) if clip else 1
    step, state = adam.update(jnp.asarray(gradient * np.float32(scale)), state)
    assert np.abs(step).max() < 1e21, (step, state)


def test_spike_skips_the_update_and_leaves_the_average():
  config, off = tiny_config(train__max_loss_factor=2.5), tiny_config()
  step, state = compiled(config)
  batch = random_batch(config)
  first, metrics = step(state, batch)
  assert float(first['loss_average']) == float(metrics['loss']) and metrics['applied']  # nothing to compare with yet
  loss = float(metrics['loss'])
  assert 5 < loss < 7.5
  after, metrics = step({**state, 'loss_average': jnp.float32(2)}, batch)
  assert metrics['finite'] and not metrics['applied'] and float(metrics['loss']) == loss
  assert [int(after[name]) for name in ('step', 'skipped', 'skipped_total')] == [1, 1, 1]
  for part in ('params', 'opt_state', 'loss_average'):
    expected = jnp.float32(2) if part == 'loss_average' else state[part]
    for a, b in zip(jax.tree.leaves(after[part]), jax.tree.leaves(expected), strict=True):
      np.testing.assert_array_equal(a, b)
  for same_step, average in ((step, 3.0), (compiled(off)[0], 2.0)):
    after, metrics = same_step({**state, 'loss_average': jnp.float32(average)}, batch)
    assert metrics['applied'] and int(after['skipped']) == 0
    assert float(after['loss_average']) == pytest.approx(0.98 * average + 0.02 * loss, rel=1e-5)


@pytest.mark.thorough
def test_bf16_step_is_close_to_float32_and_keeps_float32_state():
  exact, rough = tiny_config(), tiny_config(train__dtype='bfloat16')
  batch = random_batch(exact)
  (_, a, _), (state, b, _) = run_updates(exact, 1, [batch]), run_updates(rough, 1, [batch])
  assert float(b['loss']) == pytest.approx(float(a['loss']), rel=1e-2)
  assert all(x.dtype in (jnp.float32, jnp.int32) for x in jax.tree.leaves(state))


def test_dropout_changes_the_loss_and_is_a_function_of_seed_and_step():
  config = tiny_config(model__dropout=0.2)
  batch = random_batch(config)
  (_, _, a), (_, _, b) = (run_updates(config, 2, [batch] * 2) for _ in range(2))
  _, _, plain = run_updates(tiny_config(), 1)
  assert a == b and a[0] != plain[0]


def test_dense_model_has_no_bank_metrics():
  config = tiny_config(model__sublayer='dense')
  _, metrics, _ = run_updates(config, 1)
  assert 'usage_LM' not in metrics


def test_sum_by_row_equals_bincount():
  rows, values = (np.random.default_rng(seed).integers(0, 9, (2, 3, 4, 5)) for seed in (0, 1))
  got = sum_by_row(jnp.array(rows), jnp.array(values), 9)
  for layer in range(2):
    np.testing.assert_array_equal(got[layer], np.bincount(rows[layer].ravel(), values[layer].ravel(), minlength=9))


def test_chunk_of_the_loss_keeps_logits_small():
  assert fitting_chunk(64, 6400, 512) * 64 * 6400 <= 1 << 23
  assert fitting_chunk(4, 300, 16) == 16
  assert fitting_chunk(10**6, 10**6, 512) == 1


GOLDEN = {  # three losses and the last gradient norm
  'gated_fusion': ([6.041910, 5.845805, 5.918069], 1.344173),  # experiment 1.4.2
  'dense': ([5.886193, 5.775892, 5.814783], 1.306456),  # experiment 1.4.0
  'ngram_bag': ([5.823647, 5.748643, 5.854560], 1.232992),  # ngram_rows
}
NGRAMS = {'memory__n_heads': 2, 'memory__ngrams': '1,2', 'memory__bank_std': 0.5}


@pytest.mark.parametrize('sublayer', rarely(GOLDEN, 'gated_fusion'))
def test_first_steps_give_the_golden_numbers(sublayer):
  """Golden: python -m pytest tests/test_step.py -k golden. Change them only with what is meant to change numbers."""
  config = helpers.tiny_config(model__sublayer=sublayer, **(NGRAMS if sublayer == 'ngram_bag' else {}))
  _, metrics, losses = run_updates(config, 3)
  np.testing.assert_allclose(losses, GOLDEN[sublayer][0], rtol=1e-5)
  assert float(metrics['grad_norm']) == pytest.approx(GOLDEN[sublayer][1], rel=1e-4)
