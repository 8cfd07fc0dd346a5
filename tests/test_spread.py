"""The gradient of an update on eight devices is that on one, and they meet once an update."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers import seldom, xla_flags

REPOSITORY = Path(__file__).parent.parent
WITHOUT_BANK = 'moe', 'dense'
KINDS = {
  'gated_fusion': {'data__isolate_documents': True},
  'memory_bag': {
    'memory__n_heads': 2,
    'model__num_selected': 4,
    'memory__selection_bias': True,
    'runtime__remat': 'block',
  },
  'ngram_bag': {'memory__n_heads': 2, 'memory__ngrams': '1,2', 'memory__ngram_signs': True},
  'ngram_bucket': {'memory__value_layers': 'all'},
  'engram_bag': {'memory__n_heads': 2, 'memory__ngrams': '1,2'},
  'cross_attention': {},
  'moe': {},
  'dense': {},
}
ROWS = ('all-to-all',)
OF_ROWS = {'memory_bag': ('all-gather', 'reduce-scatter')}  # sums of as many rows as there are devices


@pytest.mark.parametrize('kind', seldom(KINDS, 'gated_fusion', 'memory_bag', 'ngram_bucket'))
def test_gradient_of_eight_devices_is_that_of_one_and_is_added_up_once(kind):
  flags = {'XLA_FLAGS': xla_flags(8), 'JAX_PLATFORMS': 'cpu', 'PYTHONPATH': str(REPOSITORY)}
  run = subprocess.run(
    [sys.executable, __file__, kind],
    cwd=REPOSITORY,
    env=os.environ | flags,
    capture_output=True,
    text=True,
    check=False,
  )
  assert run.returncode == 0, run.stderr
  assert run.stdout.split() == (['1'] if kind in WITHOUT_BANK else ['1', '4'])


def main(kind: str) -> None:
  import jax
  import numpy as np

  from mmjax.ahead.kernels import kernels_of
  from mmjax.run.hlo import Module
  from mmjax.run.sharding import make_mesh, put_batch, shardings
  from mmjax.training.step import make_gradient
  from tests.helpers import build_model, random_batch, tiny_config

  settings = {'model__sublayer': kind, 'train__batch_size': 8} | KINDS[kind]
  for row_devices in (1,) if kind in WITHOUT_BANK else (1, 4):
    config = tiny_config(runtime__row_devices=row_devices, **settings)
    graphdef, params = build_model(config)
    batch = random_batch(config)
    batch['segment'] = batch['segment'].at[..., 5:].set(1)
    mesh = make_mesh(config)
    flat = {name: np.asarray(rows).reshape(-1, rows.shape[-1]) for name, rows in batch.items()}
    inputs = (np.float32(100), np.int32(3))
    expected = jax.jit(make_gradient(config, graphdef, 'xla'))(params, batch, *inputs)
    spread = jax.jit(make_gradient(config, graphdef, 'xla', mesh))
    inputs = jax.device_put(params, shardings(mesh, params)), put_batch(mesh, flat, 2), *inputs
    compiled = spread.lower(*inputs).compile()
    for found, one in zip(*map(jax.tree.leaves, (compiled(*inputs), expected)), strict=True):
      np.testing.assert_allclose(np.asarray(found), np.asarray(one), rtol=1e-4, atol=2e-6)
    sent = [kernel for kernel in kernels_of(Module(compiled.as_text())) if kernel.kind == 'collective']
    assert any(kernel.target == 'all-reduce' for kernel in sent)
    for kernel in sent:  # a row-sharded bank alone is asked in every micro-batch, and only for rows
      at_the_end = kernel.target == 'all-reduce' and not kernel.loops
      n_rounds = kernel.target == 'all-reduce' and not any(shape.dims for shape in kernel.shapes)
      assert at_the_end or (row_devices > 1 and (n_rounds or kernel.target in OF_ROWS.get(kind, ROWS))), kernel
    print(row_devices)


if __name__ == '__main__':
  main(sys.argv[1])
