"""Revival: what starts again, from what, what stays, and what it does to the share of rows in use."""

import functools
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmjax.model.lm import model_graph
from mmjax.training import revival
from mmjax.training.metrics import bank_health
from mmjax.training.optimizer import make_optimizer, path_name
from mmjax.training.revival import count_sub_keys, revive
from mmjax.training.step import init_state, make_train_step
from tests.helpers import random_batch, tiny_config

M, C = 64, 8
USED_ROWS, USED_KEYS = [3, 17, 40], [1, 4, 5]


@functools.cache
def after_windows(finite=(True, True), total_steps=10, **changes):
  """State before and after updates, in windows of two; the first reads USED_ROWS and takes USED_KEYS of each set."""
  config = tiny_config(memory__revive_after=2, memory__n_heads=2, **changes)
  shapes = jax.eval_shape(lambda: init_state(config, make_optimizer(config, 10)))
  rng = np.random.default_rng(0)
  state = jax.tree.map(lambda x: (1 + rng.random(x.shape)).astype(x.dtype), shapes)
  state['revival'] = jax.tree.map(np.zeros_like, state['revival'])
  usage_LM = np.zeros((2, M), np.int32)
  usage_LM[0, USED_ROWS[:2]], usage_LM[1, USED_ROWS[2]] = 5, 1
  count_LKC = np.zeros((2, 4, C), np.int32)
  count_LKC[..., USED_KEYS] = (7, 2, 9)  # 5 is used most, then 1, then 4
  after, counts = state, []
  with mock.patch.object(revival, 'CHUNK_ROWS', 16):
    run = jax.jit(lambda *inputs: revive(config, *inputs, total_steps))
    for step, is_finite in enumerate(finite, 1):
      after, revived = jax.device_get(run(after | {'step': np.int32(step)}, usage_LM, count_LKC, is_finite))
      counts.append(revived)
      usage_LM, count_LKC = 0 * usage_LM, 0 * count_LKC  # the first update alone reads
  return state, after, counts


def leaves_named(tree, ending):
  named = jax.tree_util.tree_leaves_with_path(tree)
  return {path_name(path): np.asarray(leaf) for path, leaf in named if path_name(path).endswith(ending)}


@pytest.mark.parametrize('update', ['dense', 'lazy'])
def test_dead_rows_become_used_ones_plus_noise_without_moments(update):
  before, after, counts = after_windows(memory__revive_noise=0.01, memory__bank_update=update)
  assert [int(c['revived_rows']) for c in counts] == [0, M - 3]
  old, new = (np.asarray(state['params']['memory_bank']) for state in (before, after))
  np.testing.assert_array_equal(new[USED_ROWS], old[USED_ROWS])
  dead = np.setdiff1d(np.arange(M), USED_ROWS)
  distance = np.abs(new[dead, None] - old[USED_ROWS]).max(-1)
  source, nearest = np.argmin(distance, axis=1), distance.min(axis=1)
  assert set(source) == {0, 1, 2} and nearest.min() > 0 and nearest.max() < 0.1
  noise = (new[dead] - old[USED_ROWS][source]) / np.sqrt((old[USED_ROWS][source] ** 2).mean(-1, keepdims=True))
  assert noise.std() == pytest.approx(0.01, rel=0.2) and abs(noise.mean()) < 0.003
  moments = leaves_named(after['opt_state'], 'memory_bank') | leaves_named(after.get('bank_moments', {}), '_MP')
  assert len(moments) == 2
  for name, value in moments.items():
    assert not value[dead].any() and value[USED_ROWS].all(), name
  if update == 'lazy':
    caught_up = np.asarray(after['bank_moments']['log_decay_M'] == after['bank_moments']['log_decay'])
    assert caught_up[dead].all() and not caught_up[USED_ROWS].any()


def test_dead_sub_keys_become_the_most_used_ones_plus_noise_without_moments():
  before, after, counts = after_windows(memory__revive_noise=0.01, memory__bank_update='dense')
  assert [int(c['revived_keys']) for c in counts] == [0, 2 * 4 * 3]  # layers, sets, as many as there are used ones
  old, new = (leaves_named(state['params'], 'gate/keys') for state in (before, after))
  moments = leaves_named(after['opt_state'], 'gate/keys')
  assert len(old) == 2 and len(moments) == 4
  started, sources, still_dead = [0, 2, 3], [5, 1, 4], [6, 7]
  for name in old:
    np.testing.assert_array_equal(new[name][:, USED_KEYS + still_dead], old[name][:, USED_KEYS + still_dead])
    distance = np.abs(new[name][:, started] - old[name][:, sources])
    assert distance.max(-1).min() > 0 and distance.max() < 0.1
  for value in moments.values():
    assert not value[:, started].any() and value[:, USED_KEYS + still_dead].all()


def test_sub_keys_stay_where_only_rows_are_revived():
  before, after, counts = after_windows(memory__revive_keys=False)
  assert int(counts[1]['revived_rows']) == M - 3 and int(counts[1]['revived_keys']) == 0
  for name, value in leaves_named(before['params'], 'gate/keys').items():
    np.testing.assert_array_equal(leaves_named(after['params'], 'gate/keys')[name], value)


def test_new_window_has_seen_nothing():
  _, after, _ = after_windows(memory__revive_noise=0.01, memory__bank_update='dense')
  assert not np.any(after['revival']['read_M']) and not np.any(after['revival']['share_LKC'])


@pytest.mark.parametrize(
  ('finite', 'read', 'rows'),
  [((True, False), True, [0, 0]), ((True, False, True, True), False, [0, 0, 0, M - 3]), ((False, True), False, [0, 0])],
)
def test_skipped_updates_do_not_count_as_reading_and_revive_nothing(finite, read, rows):
  before, after, counts = after_windows(finite=finite)
  assert [int(c['revived_rows']) for c in counts] == rows
  assert np.any(after['revival']['read_M']) == read
  if not any(rows):  # also where nothing was read: there is nothing to start from
    for part in ('params', 'opt_state'):
      jax.tree.map(np.testing.assert_array_equal, after[part], before[part])


@pytest.mark.parametrize(('total_steps', 'rows'), [(3, 0), (4, M - 3)])
def test_nothing_starts_again_with_less_than_a_window_left(total_steps, rows):
  _, _, counts = after_windows(total_steps=total_steps)
  assert [int(c['revived_rows']) for c in counts] == [0, rows]


def test_counts_of_sub_keys_equal_bincount():
  rng = np.random.default_rng(0)
  row_LBThr, weight = rng.integers(0, C * C, (2, 3, 4, 2, 5)), rng.integers(0, 2, (3, 4))
  got = count_sub_keys(jnp.asarray(row_LBThr.reshape(2, 3, 4, 10)), jnp.asarray(weight, jnp.float32), 2, C)
  for layer, head, half in np.ndindex(2, 2, 2):
    rows = row_LBThr[layer, :, :, head][weight == 1].ravel()
    np.testing.assert_array_equal(got[layer, 2 * head + half], np.bincount(np.divmod(rows, C)[half], minlength=C))


@pytest.mark.thorough
def test_revival_raises_the_share_of_rows_in_use():
  """Random tokens, a gate that learns, 1024 rows; the use of the last five updates."""
  shares = {}
  for window in (0, 5):
    config = tiny_config(
      memory__revive_after=window, memory__scores='scale', memory__input='residual', model__knowledge_num=1024,
      model__num_selected=2, model__n_layers=1, train__learning_rate=3e-3,
    )  # fmt: skip
    optimizer = make_optimizer(config, 40)
    step = jax.jit(make_train_step(config, model_graph(config), optimizer, attention='xla', total_steps=40))
    state, usage_M, rows = jax.jit(lambda c=config, o=optimizer: init_state(c, o))(), 0, 0
    for i in range(30):
      state, metrics = step(state, random_batch(config, seed=i))
      usage_M += np.asarray(metrics['usage_LM'])[0] * (i >= 25)
      rows += int(metrics.get('revived_rows', 0))
      assert ('revived_rows' in metrics) == bool(window)
    assert bool(rows) == bool(window)
    shares[window] = bank_health(usage_M)['used_share']
  assert shares[5] > 1.2 * shares[0], shares
