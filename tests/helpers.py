"""What several tests need: a tiny config and random rows."""

import os
from collections.abc import Iterable

import jax
import jax.numpy as jnp
import pytest
from jax import Array

from mmjax.config import Config, load_config

TINY = {
  'model.vocab_size': 300,
  'model.dim': 32,
  'model.n_layers': 2,
  'model.n_heads': 4,
  'model.n_kv_heads': 2,
  'model.max_seq_len': 16,
  'model.knowledge_num': 64,
  'model.knowledge_dim': 8,
  'model.num_selected': 3,
  'train.batch_size': 4,
  'train.accumulation_steps': 2,
  'train.max_steps': 10,
  'train.dtype': 'float32',
  'train.learning_rate': 1e-2,
}


def rarely(values: Iterable, *always: object) -> list:
  """Returns values as parameters of a test, all but `always` marked slow."""
  return [value if value in always else pytest.param(value, marks=pytest.mark.slow) for value in values]


def tiny_config(**overrides: object) -> Config:
  """Returns a config of a model of a few thousand parameters; `section__field=value` overrides it."""
  settings = TINY | {name.replace('__', '.'): value for name, value in overrides.items()}
  return load_config('configs/base.py', [f'--config.{name}={value}' for name, value in settings.items()])


def xla_flags(n_devices: int) -> str:
  """Returns XLA_FLAGS for a process with so many CPU devices that otherwise compiles as this one does."""
  return f'{os.environ.get("XLA_FLAGS", "")} --xla_force_host_platform_device_count={n_devices}'


def random_batch(config: Config, seed: int = 0) -> dict[str, Array]:
  """Returns one batch of random tokens, (A, B, T), whose last row is half padding (token 0)."""
  shape = (config.train.accumulation_steps, config.train.batch_size, config.model.max_seq_len + 1)
  tokens = jax.random.randint(jax.random.key(seed), shape, 4, config.model.vocab_size)
  tokens = tokens.at[-1, -1, shape[-1] // 2 :].set(0)
  return {
    'input': tokens[..., :-1],
    'target': tokens[..., 1:],
    'segment': jnp.zeros_like(tokens[..., 1:]),
  }


class StopAfter:
  """Stands in for StopSignals: asks to stop after one given step."""

  def __init__(self, step: int):
    self.step = step

  def __enter__(self):
    return self

  def __exit__(self, *_):
    return None

  def requested(self, step: int) -> bool:
    return step == self.step
