"""The bank updated row by row: its gradient against the dense one, its rule against float64, whole updates."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mmjax.files import named_leaves
from mmjax.kernels.bank import Reads
from mmjax.model.params import model_graph
from mmjax.training import row_gradients
from mmjax.training.lazy_bank import init_moments, of_rows, update_read_rows
from mmjax.training.row_gradients import RowReads, RowSums, add_rows, no_rows
from mmjax.training.state import init_state
from mmjax.training.step import make_gradient
from tests.helpers import compiled, make_step, random_batch, rarely, tiny_config

BAG = {'model__sublayer': 'memory_bag', 'memory__n_heads': 2}
MODELS = {
  'lookup': {},
  'scaled': {'memory__scores': 'scale', 'memory__n_heads': 2, 'runtime__remat': 'block', 'train__dtype': 'bfloat16'},
  'cross_attention': {'model__sublayer': 'cross_attention', 'memory__layers': '1'},
  'bag': BAG | {'memory__layers': '1', 'memory__ffn_dim': 8, 'memory__score_activation': 'relu'},
  'values': BAG | {'memory__layers': '1', 'memory__value_layers': 'all', 'runtime__remat': 'block'},
  'ngrams_and_a_gate': BAG | {'memory__ngram_layers': '0', 'memory__ngrams': '1,2', 'memory__ngram_signs': True},
}


def pairs(**changes):
  return (tiny_config(memory__bank_update=update, **changes) for update in ('dense', 'lazy'))


def as_dense(sums, M):
  """What the slots hold, as an (M, P) array."""
  used = int(sums.used)
  dense = np.zeros((M, sums.sum_UP.shape[1]), np.float32)
  dense[np.asarray(sums.row_U[:used])] = sums.sum_UP[:used]
  return dense


@pytest.mark.parametrize('model', rarely(MODELS, 'bag'))  # the tests of whole updates see most of the others
@pytest.mark.thorough
def test_gradients_equal_those_of_the_dense_route(model):
  dense, lazy = pairs(**MODELS[model])
  batch = random_batch(dense)
  params = jax.jit(lambda: init_state(dense, optax.identity()))()['params']
  found = []
  for config in (dense, lazy):
    # XLA leaves out roundings to bfloat16 where it can, and not the same ones in both.
    exactly = {'xla_allow_excess_precision': False}
    gradient = jax.jit(make_gradient(config, model_graph(config), 'xla'), compiler_options=exactly)
    found.append(gradient(params, batch, jnp.float32(64), jnp.int32(0)))
  (parts, grads), (lazy_parts, lazy_grads) = found
  np.testing.assert_array_equal(parts['usage_LM'], lazy_parts['usage_LM'])
  sums = lazy_grads['memory_bank']
  read = np.flatnonzero(np.asarray(sums.slot_M) >= 0)
  assert 0 < int(sums.used) == len(read) and set(np.flatnonzero(np.any(parts['usage_LM'], axis=0))) <= set(read)
  assert not np.any(sums.sum_UP[int(sums.used) :])
  lazy_grads['memory_bank'] = as_dense(sums, dense.model.knowledge_num)
  assert np.abs(grads['memory_bank']).max() > 0
  for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(lazy_grads), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


def test_rows_get_slots_in_several_micro_batches():
  config = tiny_config(model__knowledge_num=400, model__n_layers=2, memory__n_heads=1)
  P, rng = config.model.knowledge_dim, np.random.default_rng(0)
  sums, want, read = no_rows(config), np.zeros((400, P)), set()
  for micro in range(3):
    row_LBThr = rng.integers(0, 40 * (micro + 1), (2, 2, 5, 1, 3))
    grad, bag_grad = rng.standard_normal((2, 5, 1, 3, P)), rng.standard_normal((2, 5, 1, P))
    weight = rng.standard_normal((2, 5, 1, 3))
    np.add.at(want, row_LBThr[0], grad)
    np.add.at(want, row_LBThr[1], weight[..., None] * bag_grad[..., None, :])
    read |= set(row_LBThr.ravel().tolist())
    layers = [Reads(jnp.asarray(grad, jnp.float32), None)]
    layers.append(Reads(jnp.asarray(bag_grad, jnp.float32), jnp.asarray(weight, jnp.float32)))
    sums = jax.jit(add_rows)(sums, RowReads(jnp.asarray(row_LBThr), layers))
  assert int(sums.used) == len(read) and set(np.asarray(sums.row_U[: len(read)]).tolist()) == read
  assert len(set(np.asarray(sums.row_U).tolist())) == len(sums.row_U) and min(sums.row_U[len(read) :]) >= 400
  np.testing.assert_allclose(as_dense(sums, 400), want, rtol=1e-5, atol=1e-5)


def test_slots_are_as_many_as_an_update_can_read():
  small, large = tiny_config(), tiny_config(model__knowledge_num=10**6)
  assert no_rows(small).sum_UP.shape == (64, 8)
  reads = 2 * 2 * 4 * 16 * 3  # layers, micro-batches, rows of one, positions, rows of the bank each
  assert no_rows(large).sum_UP.shape == (reads, 8)


def test_row_that_is_read_at_even_intervals_is_where_dense_adam_has_it_when_it_is_read():
  config = tiny_config(train__beta2=0.9, train__eps=1e-9, train__weight_decay=0.0)
  rng, interval, P = np.random.default_rng(0), 5, 3
  bank = rng.standard_normal((2, P)).astype(np.float32)
  moments, start = jax.device_get(init_moments(jnp.asarray(bank))), 1000  # so late that no moment needs a correction
  dense, mean, square = bank[0].astype(np.float64), 0.0, 0.0
  step = jax.jit(functools.partial(update_read_rows, config, lambda count: jnp.float32(0.1)))
  for update in range(40):
    gradient = rng.standard_normal(P).astype(np.float32) if update % interval == 0 else np.zeros(P, np.float32)
    if update % interval == 0:
      if update > interval:  # from the second read on the forecast is right
        np.testing.assert_allclose(bank[0], dense, rtol=1e-5, atol=1e-5)
      sums = RowSums(gradient[None], np.int32([0]), np.int32([0, -1]), np.int32(1))
      bank, moments, _ = jax.device_get(step(bank, moments, sums, 1.0, jnp.int32(start + update), jnp.bool_(True)))
    mean, square = 0.9 * mean + 0.1 * gradient, 0.9 * square + 0.1 * np.float64(gradient) ** 2
    dense = dense - 0.1 * mean / np.sqrt(square)


@pytest.mark.parametrize('kept', ['full', 'square', 'row'])
def test_rule_equals_float64_row_by_row(kept, monkeypatch):
  """The oracle keeps dense moments, and moves a row by their steps only where it was read."""
  monkeypatch.setattr(row_gradients, 'CHUNK_ROWS', 4)
  M, P, updates = 11, 3, 25
  decay = {'train__weight_decay': 0.3, 'memory__bank_decay_multiplier': 0.5}
  betas = {'train__beta1': 0.5, 'train__parameters': f'memory_bank {"beta1=0.9 " * (kept == "full")}beta2=0.95'}
  config = tiny_config(train__eps=1e-3, memory__bank_moments=kept, **betas, **decay)
  rate = optax.linear_schedule(0.2, 0.01, updates)
  rng = np.random.default_rng(0)
  first = rng.standard_normal((M, P)).astype(np.float32)
  bank, moments = first, jax.device_get(init_moments(jnp.asarray(first), kept))
  step = jax.jit(functools.partial(update_read_rows, config, rate))
  want, mean, square, count = first.astype(np.float64), 0.0, 0.0, 0
  last_read, forecast, last_step = np.zeros(M, int), np.zeros(M, int), np.zeros((M, P))

  def drift(n):
    return sum((0.9 / 0.95**0.5) ** k for k in range(1, n + 1))

  for update in range(updates):
    finite, rows = update % 7 != 3, rng.choice(M - 1, rng.integers(1, 9), replace=False)  # the last row is never read
    gradient = np.zeros((M, P), np.float32)
    gradient[rows] = rng.standard_normal((len(rows), P))
    slots = 12
    row_U, sum_UP = M + np.arange(slots), np.zeros((slots, P), np.float32)
    row_U[: len(rows)], sum_UP[: len(rows)] = rows, 4 * gradient[rows]  # clipping makes it a quarter
    sums = RowSums(sum_UP, row_U.astype(np.int32), np.zeros(M, np.int32), np.int32(len(rows)))
    np.testing.assert_allclose(sums.norm(), 4 * np.linalg.norm(gradient), rtol=1e-6)
    before, before_moments = bank, moments
    bank, moments, ratio = jax.device_get(step(bank, moments, sums, 0.25, jnp.int32(count), jnp.bool_(finite)))
    moved = np.linalg.norm(bank[rows] - before[rows]) / np.linalg.norm(before[rows])
    np.testing.assert_allclose(ratio, moved, rtol=1e-4)
    untouched = np.setdiff1d(np.arange(M), rows) if finite else np.arange(M)
    for new, old in ((bank, before), *((moments[n], before_moments[n]) for n in of_rows(moments))):
      np.testing.assert_array_equal(new[untouched], old[untouched])
    if not finite:
      continue
    lr, count = float(rate(count)), count + 1
    squared = gradient.astype(np.float64) ** 2
    squared = squared.mean(axis=1, keepdims=True) if kept == 'row' else squared
    mean, square = 0.9 * mean + 0.1 * gradient, 0.95 * square + 0.05 * squared
    corrected = mean / (1 - 0.9**count) if kept == 'full' else gradient
    adam = corrected / (np.sqrt(square / (1 - 0.95**count)) + 1e-3)
    late, now = np.zeros((M, P)), np.zeros((M, P))
    for row in rows:
      missed = count - last_read[row] - 1
      if kept != 'full':
        now[row] = adam[row]
        continue
      late[row] = (drift(missed) - drift(forecast[row])) * last_step[row]
      now[row] = (1 + drift(missed)) * adam[row]
      forecast[row], last_step[row], last_read[row] = missed, adam[row], count
    want = want - lr * late
    want = want - lr * (now + 0.15 * want)
    np.testing.assert_allclose(bank[rows], want[rows], rtol=2e-5, atol=2e-5)
    np.testing.assert_allclose(moments['square_MP'][rows], square[rows], rtol=2e-5, atol=1e-6)
    if kept == 'full':
      np.testing.assert_allclose(moments['mean_MP'][rows], mean[rows], rtol=2e-5, atol=1e-6)
  np.testing.assert_array_equal(bank[M - 1], first[M - 1])


@pytest.mark.parametrize('rate', rarely(('everyones', 'own'), 'own'))
@pytest.mark.thorough
def test_where_every_row_is_read_it_equals_dense_adamw(rate):
  own = {'memory__bank_decay_multiplier': 0.5, 'memory__bank_lr_multiplier': 4.0}
  changes = BAG | {
    'model__n_layers': 1,
    'model__knowledge_num': 9,
    'train__weight_decay': 0.2,
    'train__grad_clip': 0.1,
    'train__eps': 1e-4,
  }
  states = []
  for config in pairs(**changes, **(own if rate == 'own' else {})):
    step, state = compiled(config)
    for i in range(4):
      state, metrics = step(state, random_batch(config, seed=i))
      assert np.all(np.any(metrics['usage_LM'], axis=0)) and metrics['grad_norm'] > 0.1  # so that it clips
    states.append(state)
  dense, lazy = states
  for a, b in zip(jax.tree.leaves(dense['params']), jax.tree.leaves(lazy['params']), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-3, atol=2e-5)
  moments = next(part for part in dense['opt_state'] if hasattr(part, 'mu'))
  np.testing.assert_allclose(moments.mu['memory_bank'], lazy['bank_moments']['mean_MP'], rtol=1e-3, atol=1e-7)
  np.testing.assert_allclose(moments.nu['memory_bank'], lazy['bank_moments']['square_MP'], rtol=1e-3, atol=1e-9)
  assert 'memory_bank' not in str(jax.tree_util.tree_structure(lazy['opt_state']))


@pytest.mark.thorough
@pytest.mark.parametrize('kept', ['square', 'row'])
def test_without_a_mean_a_lazy_update_is_the_dense_one_though_most_rows_are_not_read(kept):
  states, updates = [], 4
  for config in pairs(**BAG, memory__bank_moments=kept, train__weight_decay=0.0, model__knowledge_num=1024):
    step, state = compiled(config)
    read = 0
    for i in range(updates):
      state, metrics = step(state, random_batch(config, seed=i))
      read += np.any(jax.device_get(metrics['usage_LM']), axis=0).astype(int)
    assert {0, 1, updates} <= set(read)
    states.append(jax.device_get(state))
  dense, lazy = states
  for a, b in zip(jax.tree.leaves(dense['params']), jax.tree.leaves(lazy['params']), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-3, atol=2e-5)
  [of_bank] = [value for name, value in named_leaves(dense['opt_state']) if name.endswith('memory_bank')]
  moments = lazy['bank_moments']
  square = moments['square_MP'] * 0.999 ** (updates - moments['count_M'])[:, None]
  np.testing.assert_allclose(of_bank, square, rtol=1e-3, atol=1e-12)
  assert of_bank.shape == (1024, 1 if kept == 'row' else 8) and not moments.keys() & {'mean_MP', 'missed_M'}


@pytest.mark.thorough
def test_rows_that_were_not_read_stay_bit_for_bit_and_skipped_updates_leave_all():
  config = tiny_config(
    memory__bank_update='lazy', model__knowledge_num=1024, train__weight_decay=0.2, model__n_layers=1
  )
  step, state = compiled(config)
  batch = random_batch(config)
  after, metrics = step(state, batch | {'target': jnp.maximum(batch['target'], 4)})  # reads at padding do not count
  read = np.any(metrics['usage_LM'], axis=0)
  moved = np.any(np.asarray(after['params']['memory_bank'] != state['params']['memory_bank']), axis=1)
  assert 0 < read.sum() < 1024 and np.array_equal(moved, read)
  assert np.array_equal(np.asarray(after['bank_moments']['count_M']) == 1, read)
  infinite = {**after['params'], 'norm': {'scale': after['params']['norm']['scale'] * jnp.inf}}
  broken, metrics = step({**after, 'params': infinite}, random_batch(config))
  assert not metrics['finite']
  for part in ('opt_state', 'bank_moments'):
    jax.tree.map(np.testing.assert_array_equal, broken[part], after[part])
  np.testing.assert_array_equal(broken['params']['memory_bank'], after['params']['memory_bank'])


@pytest.mark.thorough
def test_step_makes_no_array_of_the_size_of_the_bank():
  """A dense update of this bank needs its gradient beside it; XLA's own count of what a program needs."""
  bytes_of = []
  for config in pairs(**BAG, model__knowledge_num=2**16, model__knowledge_dim=32):
    step, first = make_step(config)
    lowered = jax.jit(step, donate_argnums=0).lower(jax.eval_shape(first), random_batch(config))
    memory = lowered.compile().memory_analysis()
    bytes_of.append(memory.temp_size_in_bytes)
  bank_bytes = 2**16 * 32 * 4
  assert bytes_of[0] > bank_bytes > 2 * bytes_of[1]


@pytest.mark.parametrize('kept', rarely(['full', 'square', 'row'], 'full'))
def test_nothing_with_a_part_for_each_row_is_copied(kept):
  """XLA copies an array, in every turn of a loop, that might be written before it is read."""
  config = tiny_config(memory__bank_update='lazy', memory__bank_moments=kept, model__knowledge_num=101**2)
  step, first = make_step(config)
  lowered = jax.jit(step, donate_argnums=0).lower(jax.eval_shape(first), random_batch(config))
  made = re.findall(r' = \w+\[10201\b[^ ]* ([a-z-]+)\(', lowered.compile().as_text())
  assert 'parameter' in made and 'copy' not in made, made


@pytest.mark.thorough
def test_nothing_passes_over_slots_that_are_free():
  """They are filled with zeros; after that only loops over those in use read them."""
  config = tiny_config(memory__bank_update='lazy', model__knowledge_num=10**6)
  step, first = make_step(config)
  shape = no_rows(config).sum_UP.shape
  made = [
    eqn.primitive.name for eqn in outside_of_loops(jax.make_jaxpr(step)(first(), random_batch(config)).jaxpr, shape)
  ]
  assert made == ['broadcast_in_dim', 'scan', 'while', 'while'], made  # the loops: norm, and update


def outside_of_loops(jaxpr, shape):
  """Yields what reads or makes an array of this shape, loops as a whole."""
  for eqn in jaxpr.eqns:
    values = [x for value in eqn.params.values() for x in (value if isinstance(value, tuple) else (value,))]
    inner = [x.jaxpr for x in values if hasattr(x, 'jaxpr')]
    if inner and eqn.primitive.name not in ('scan', 'while'):
      for each in inner:
        yield from outside_of_loops(each, shape)
    elif any(getattr(x.aval, 'shape', None) == shape for x in (*eqn.invars, *eqn.outvars)):
      yield eqn
