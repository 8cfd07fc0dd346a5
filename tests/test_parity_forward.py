"""Forward parity with the PyTorch port: logits, selected rows, shapes of every kind, bf16.

`pytest -m slow tests/test_parity_forward.py -s` runs the full sizes of experiment 1.4.2 and prints what was measured.
"""

import jax
import numpy as np
import pytest
from flax import nnx

torch = pytest.importorskip('torch')

from mmjax.config import Config, load_config  # noqa: E402
from tests.helpers import rarely, tiny_config  # noqa: E402
from tests.parity import (  # noqa: E402
  build_pair,
  jax_forward,
  random_tokens,
  relative_l2,
  same_selection,
  torch_logits,
)

SUBLAYERS = ('dense', 'cross_attention', 'gated_fusion', 'moe')
EXPERIMENTS = ('exp_1_4_2', 'exp_1_4_1', 'exp_1_4_0', 'exp_moe')


def compare_logits(config: Config, batch: int, length: int, attention: str = 'xla', seed: int = 0) -> None:
  """Asserts parity of logits and rows, and prints what was measured."""
  model, graphdef, params = build_pair(config, seed)
  tokens_BT = random_tokens(config, batch, length, seed)
  got_BTV, row_LBTR = jax_forward(graphdef, params, tokens_BT, attention=attention)
  with same_selection(model, row_LBTR) as seen:
    want_BTV = torch_logits(model, tokens_BT)
  difference = np.abs(got_BTV - want_BTV).max()
  print(
    f'{config.model.sublayer} B={batch} T={length}: logits (std {want_BTV.std():.2f}) differ by at most '
    f'{difference:.1e}; {seen["flips"]} of {seen["selections"]} selections differ, by scores {seen["gap"]:.1e} apart'
  )
  assert 0.1 < want_BTV.std() < 10  # of order 1, so that an absolute bound means something
  assert difference <= 1e-4
  assert seen['flips'] <= 1e-3 * seen['selections']


@pytest.mark.parametrize('sublayer', SUBLAYERS)
def test_logits_and_rows_equal_torch(sublayer):
  compare_logits(tiny_config(model__sublayer=sublayer), 4, 16, 'xla_blocked')


@pytest.mark.parametrize('n_kv_heads', rarely([1, 2, 8, 16], 2))
def test_grouped_query_heads_equal_torch(n_kv_heads):
  config = tiny_config(model__dim=64, model__n_heads=16, model__n_kv_heads=n_kv_heads)
  compare_logits(config, 2, 16)


@pytest.mark.parametrize(('batch', 'length'), [(1, 1), (3, 2), (3, 511), (1, 512)])
def test_lengths_and_batches_equal_torch(batch, length):
  config = tiny_config(model__max_seq_len=512, model__n_layers=1)
  compare_logits(config, batch, length, 'xla_blocked' if length == 511 else 'xla')


@pytest.mark.thorough
@pytest.mark.parametrize('sublayer', rarely(('dense', 'gated_fusion'), 'gated_fusion'))
def test_gradient_reaches_only_earlier_tokens_in_both_models(sublayer):
  config = tiny_config(model__sublayer=sublayer)
  model, graphdef, params = build_pair(config)
  tokens_BT = np.arange(16, dtype=np.int32)[None] + 4  # each token once: its embedding's gradient is its position's

  model.output.weight = torch.nn.Parameter(model.output.weight.detach().clone())  # untied, or all tokens get one
  model(torch.from_numpy(tokens_BT).long()).logits[0, 9].square().sum().backward()
  want_TD = model.tok_embeddings.weight.grad[4:20].numpy()

  def loss(params: dict) -> jax.Array:
    out = nnx.merge(graphdef, params)(tokens_BT)
    head_VD = jax.lax.stop_gradient(params['embedding'])
    return ((out.hidden_BTD[0, 9] @ head_VD.T) ** 2).sum()

  got_TD = np.asarray(jax.grad(loss)(params)['embedding'][4:20])
  assert (got_TD[10:] == 0).all() and (want_TD[10:] == 0).all()
  assert (np.abs(got_TD[:10]).max(-1) > 0).all()
  assert relative_l2(got_TD, want_TD) < 1e-4


def bfloat16_errors(config: Config, batch: int, length: int) -> tuple[float, float]:
  """Returns the relative error of bf16 logits against float32 ones: of mmjax, and of torch's autocast."""
  model, graphdef, params = build_pair(config)
  tokens_BT = random_tokens(config, batch, length)
  exact_BTV = torch_logits(model, tokens_BT)
  with torch.autocast('cpu', torch.bfloat16):
    autocast_BTV = torch_logits(model, tokens_BT)
  ours_BTV, _ = jax_forward(graphdef, params, tokens_BT, dtype=jax.numpy.bfloat16)
  ours, autocast = relative_l2(ours_BTV, exact_BTV), relative_l2(autocast_BTV, exact_BTV)
  print(f'{config.model.sublayer}: relative error of bf16 logits {ours:.4f}, of torch autocast {autocast:.4f}')
  return ours, autocast


@pytest.mark.parametrize('sublayer', rarely(SUBLAYERS, 'gated_fusion'))
def test_bfloat16_error_is_no_larger_than_autocasts(sublayer):
  bank = {} if sublayer in ('dense', 'moe') else {'model__knowledge_num': 1024}
  ours, autocast = bfloat16_errors(tiny_config(model__sublayer=sublayer, **bank), 8, 16)
  assert 0 < ours <= 1.5 * autocast


@pytest.mark.slow
@pytest.mark.parametrize('experiment', EXPERIMENTS)
def test_full_size_logits_and_rows_equal_torch(experiment):
  config = load_config(f'configs/{experiment}.py')
  for seed, attention in ((0, 'xla'), (1, 'xla_blocked')):
    compare_logits(config, 4, 512, attention, seed)


@pytest.mark.slow
@pytest.mark.parametrize('n_kv_heads', [1, 2, 32])
def test_full_size_grouped_query_heads_equal_torch(n_kv_heads):
  compare_logits(load_config('configs/exp_1_4_2.py', [f'--config.model.n_kv_heads={n_kv_heads}']), 1, 512)


@pytest.mark.slow
@pytest.mark.parametrize('experiment', EXPERIMENTS)
def test_full_size_bfloat16_error_is_no_larger_than_autocasts(experiment):
  ours, autocast = bfloat16_errors(load_config(f'configs/{experiment}.py'), 4, 512)
  assert 0 < ours <= 1.5 * autocast
