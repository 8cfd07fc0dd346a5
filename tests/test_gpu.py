"""What only a GPU can show: `python -m pytest -m gpu tests/test_gpu.py`; benchmarks/run_gpu.sh runs it, too."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmjax.kernels.attention import causal_attention
from mmjax.kernels.bank import bank_bag, bank_lookup
from mmjax.kernels.forms import traced_for
from mmjax.kernels.product_key import product_key_topk
from mmjax.model.params import model_graph
from mmjax.run.nvidia import count_triton
from mmjax.run.placement import attention_backend, compiler_options
from mmjax.training.optimizer import make_optimizer
from mmjax.training.state import init_state
from mmjax.training.step import make_train_step
from tests import references
from tests.helpers import random_batch, tiny_config

pytestmark = pytest.mark.gpu
SIZES = {'model__dim': 128, 'model__n_heads': 8, 'model__n_kv_heads': 2, 'model__max_seq_len': 64}


@pytest.mark.parametrize('documents', [1, 3])
@pytest.mark.parametrize(('N', 'K', 'H'), [(8, 2, 16), (4, 4, 64)])
def test_cudnn_attention_and_its_gradients_equal_all_scores(N, K, H, documents):
  rng = np.random.default_rng(0)
  q, k, v = (jnp.asarray(rng.standard_normal((2, 128, heads, H)), jnp.bfloat16) for heads in (N, K, K))
  segment_BT = jnp.asarray(np.sort(rng.integers(0, documents, (2, 128)), axis=1), jnp.int32)
  assert attention_backend('auto', jnp.bfloat16, 'gpu', 1, H) == 'cudnn'

  def run(attend, *inputs):
    out, pullback = jax.vjp(lambda *inputs: attend(*inputs).astype(jnp.float32), *inputs)
    return out, *pullback(jnp.ones_like(out))

  exact = [x.astype(jnp.float32) for x in (q, k, v)]
  want = run(lambda *inputs: references.causal_attention(*inputs, segment_BT), *exact)
  got = run(lambda *inputs: causal_attention(*inputs, segment_BT, backend='cudnn'), q, k, v)
  for ours, theirs in zip(got, want, strict=True):
    assert jnp.linalg.norm(ours.astype(jnp.float32) - theirs) < 0.02 * jnp.linalg.norm(theirs)


@pytest.mark.parametrize('heads', [1, 4])
def test_rows_selected_are_those_of_all_sums_also_where_scores_tie(heads):
  rng = np.random.default_rng(0)
  # Whole numbers: sums are exact, and many are equal.
  query, keys = rng.integers(-2, 3, (4, 64, 2 * heads, 8)), rng.integers(-1, 2, (2 * heads, 32, 8))
  inputs = jnp.asarray(query, jnp.float32), jnp.asarray(keys, jnp.float32)
  for ours, theirs in zip(product_key_topk(*inputs, 8), references.product_key_topk(*inputs, 8), strict=True):
    np.testing.assert_array_equal(ours, theirs)


def test_gradient_of_the_bank_equals_a_float64_sum_where_rows_repeat():
  rng = np.random.default_rng(0)
  bank, row = rng.standard_normal((256, 16)), rng.integers(0, 4, (2, 512, 2, 8))
  weight, slope = rng.standard_normal(row.shape), rng.standard_normal((*row.shape[:3], 16))
  inputs = jnp.asarray(bank, jnp.float32), jnp.asarray(row)
  want = np.zeros_like(bank)
  np.add.at(want, row, weight[..., None] * slope[..., None, :])
  total = lambda bank: jnp.vdot(bank_bag(bank, inputs[1], jnp.asarray(weight, jnp.float32)), slope)  # noqa: E731
  np.testing.assert_allclose(jax.grad(total)(inputs[0]), want, rtol=1e-4, atol=1e-3)
  plain = np.zeros_like(bank)
  np.add.at(plain, row, slope[..., None, :])
  looked = lambda bank: jnp.vdot(bank_lookup(bank, inputs[1], jnp.float32).sum(-2), slope)  # noqa: E731
  np.testing.assert_allclose(jax.grad(looked)(inputs[0]), plain, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize('sublayer', ['dense', 'gated_fusion', 'memory_bag'])
def test_step_learns_as_on_a_cpu_and_calls_no_triton(sublayer):
  config = tiny_config(model__sublayer=sublayer, train__dtype='bfloat16', **SIZES)
  optimizer, batch = make_optimizer(config, 20), random_batch(config)
  losses = {}
  for platform, attention in (('gpu', 'cudnn'), ('cpu', 'xla')):
    jax.clear_caches()  # of rules that were traced for the other platform
    step = make_train_step(
      config, model_graph(config), optimizer, attention=attention, total_steps=20
    )  # fmt: skip
    with jax.default_device(jax.devices(platform)[0]), traced_for(platform):
      state = jax.jit(lambda: init_state(config, optimizer))()
      compiled = jax.jit(step).lower(state, batch).compile(compiler_options(config, platform))
      losses[platform] = []
      for _ in range(10):
        state, metrics = compiled(state, batch)
        losses[platform].append(float(metrics['loss']))
    if platform == 'gpu':
      assert count_triton(compiled.as_text()) == 0
  np.testing.assert_allclose(losses['gpu'], losses['cpu'], atol=0.05)
  assert losses['gpu'][-1] < losses['gpu'][0]
