"""Own learning rates of the embedding and the bank, and the decay of the bank, against AdamW in numpy."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmjax.files import path_name
from mmjax.model.params import abstract_params
from mmjax.training.optimizer import make_optimizer
from tests.helpers import tiny_config

STEPS = 5
OPTIONS = {
  'as_the_rest': {},
  'rate': {'memory__bank_lr_multiplier': 4.0},
  'rising_rate': {'memory__bank_lr_multiplier': 0.0, 'memory__bank_lr_final_multiplier': 2.0},
  'no_decay': {'memory__bank_decay_multiplier': 0.0},
  'embedding': {'train__embedding_lr_multiplier': 4.0},
  'square': {'memory__bank_moments': 'square', 'train__parameters': 'memory_bank beta2=0.9'},
  'row': {'memory__bank_moments': 'row', 'train__parameters': 'memory_bank beta2=0.9'},
  'row_beside_others_without_momentum': {'memory__bank_moments': 'row', 'train__beta1': 0.0, 'train__beta2': 0.9},
  'all': {
    'train__embedding_lr_multiplier': 0.5,
    'memory__bank_lr_multiplier': 4.0,
    'memory__bank_lr_final_multiplier': 0.5,
    'memory__bank_decay_multiplier': 0.5,
  },
}


def adamw_numpy(config, params, gradients):
  """Returns the parameters after all updates; names ending in gate/keys and gate/query/kernel stay."""
  train, memory = config.train, config.memory
  params = {name: value.astype(np.float64) for name, value in params.items()}
  mean, square = ({name: np.zeros_like(value) for name, value in params.items()} for _ in range(2))
  learns = [name for name in params if '/gate/keys' not in name and '/gate/query/' not in name]
  for t, gradient in enumerate(gradients):
    norm = math.sqrt(sum((slope.astype(np.float64) ** 2).sum() for slope in gradient.values()))
    rate = 0.5 * train.learning_rate * (1 + math.cos(math.pi * t / STEPS))
    for name in learns:
      is_bank = name == 'memory_bank'
      share = t / (STEPS - 1)
      multiplier = (1 - share) * memory.bank_lr_multiplier + share * memory.bank_lr_final_multiplier
      own_rate = rate * {'memory_bank': multiplier, 'embedding': train.embedding_lr_multiplier}.get(name, 1)
      decay = train.weight_decay * (memory.bank_decay_multiplier if is_bank else 1)
      clipped = gradient[name] * min(1, train.grad_clip / norm)
      mean[name] = train.beta1 * mean[name] + (1 - train.beta1) * clipped
      kept = memory.bank_moments if is_bank else 'full'
      beta2 = train.beta2 if kept == 'full' else 0.9
      squared = (clipped**2).mean(axis=1, keepdims=True) if kept == 'row' else clipped**2
      square[name] = beta2 * square[name] + (1 - beta2) * squared
      corrected = np.sqrt(square[name] / (1 - beta2 ** (t + 1))) + train.eps
      step = (mean[name] / (1 - train.beta1 ** (t + 1)) if kept == 'full' else clipped) / corrected
      params[name] = params[name] - own_rate * (step + decay * params[name])
  return params


@pytest.mark.parametrize('option', OPTIONS)
@pytest.mark.thorough
def test_updates_equal_numpy(option):
  config = tiny_config(train__weight_decay=0.2, train__grad_clip=1.0, model__n_layers=1, **OPTIONS[option])
  leaves, treedef = jax.tree_util.tree_flatten_with_path(abstract_params(config))
  names = [path_name(path) for path, _ in leaves]
  rng = np.random.default_rng(0)

  def draw(scale):
    return {
      name: (scale * rng.standard_normal(leaf.shape)).astype(np.float32)
      for name, (_, leaf) in zip(names, leaves, strict=True)
    }

  first, gradients = draw(1.0), [draw(0.01 * (i + 1)) for i in range(STEPS)]
  for i, gradient in enumerate(gradients):
    gradient['memory_bank'] *= 100 / (i + 1) ** 2  # so that it matters in which norm it counts
    for name in names:
      if '/gate/keys' in name or '/gate/query/' in name:
        gradient[name][:] = 0  # as they are
  as_tree = lambda values: jax.tree.unflatten(treedef, [jnp.asarray(values[name]) for name in names])  # noqa: E731
  optimizer = make_optimizer(config, STEPS)

  @jax.jit
  def train(params, gradients):
    def update(carry, gradient):
      params, state = carry
      updates, state = optimizer.update(gradient, state, params)
      return (jax.tree.map(jnp.add, params, updates), state), None

    return jax.lax.scan(update, (params, optimizer.init(params)), gradients)[0][0]

  stacked = jax.tree.map(lambda *x: jnp.stack(x), *map(as_tree, gradients))
  got = dict(zip(names, jax.tree.leaves(train(as_tree(first), stacked)), strict=True))
  for name, want in adamw_numpy(config, first, gradients).items():
    np.testing.assert_allclose(got[name], want, rtol=1e-4, atol=1e-5, err_msg=name)


def test_faithful_settings_keep_the_layout_of_the_optimizer_state():
  """Checkpoints of runs with the faithful memory hold the state of these four parts."""
  config = tiny_config()
  state = make_optimizer(config, STEPS).init(jax.tree.map(jnp.zeros_like, abstract_params(config)))
  names = [type(part).__name__ for part in state]
  assert names == ['EmptyState', 'ScaleByAdamState', 'MaskedState', 'ScaleByScheduleState']
