"""What a config costs: bytes by hand, the width that meets a budget, the table. tests/test_metrics.py counts FLOPs."""

import sys

import pytest

from mmjax.config import load_config
from mmjax.errors import UserError
from mmjax.model.cost import bytes_per_token, flops_per_token, matching_width, width_field, with_width
from mmjax.report.numbers import costs
from mmjax.tools import cost as cost_tool
from tests.helpers import tiny_config

RECORD = 'configs/exp_1_4_0.py'


@pytest.mark.parametrize(
  'changes',
  [
    {'model__sublayer': 'memory_bag', 'memory__n_heads': 2, 'memory__layers': '1', 'memory__ffn_dim': 999},
    {'model__sublayer': 'gated_fusion', 'memory__scores': 'scale'},
    {'model__sublayer': 'dense'},
    {'model__sublayer': 'moe'},
  ],
)
def test_matching_width_is_the_widest_within_the_budget(changes):
  config = tiny_config(**changes)
  for budget in (400_000, 1_234_567):
    width = matching_width(config, budget)
    costs = [flops_per_token(with_width(config, w))['total'] for w in (width, width + 8)]
    assert width % 8 == 0 and costs[0] <= budget < costs[1]
  exact = flops_per_token(with_width(config, 40))['total']
  assert matching_width(config, exact) == 40


def test_memory_may_leave_nothing_for_the_layer_beside_it():
  config = tiny_config(memory__n_heads=2)
  alone = flops_per_token(config)['total']
  assert matching_width(config, alone) == 0
  with pytest.raises(UserError, match=rf'memory.ffn_dim: even without it a token costs {alone:,.0f} FLOPs, more than'):
    matching_width(config, alone - 1)


def test_dense_model_needs_at_least_one_step_of_width():
  config = tiny_config(model__sublayer='dense')
  least = flops_per_token(with_width(config, 8))['total']
  assert matching_width(config, least) == 8 and width_field(config) == 'model.hidden_dim'
  with pytest.raises(UserError, match=r'model.hidden_dim'):
    matching_width(config, least - 1)


@pytest.mark.parametrize(
  ('name', 'baseline'), [('memory_bag', RECORD), ('memory_plus', RECORD), ('quickstart_plus', 'configs/quickstart.py')]
)
def test_best_memories_cost_what_the_feed_forward_baseline_costs(name, baseline):
  config = load_config(f'configs/{name}.py')
  budget = flops_per_token(load_config(baseline, ['--config.model.sublayer=dense']))['total']
  assert matching_width(config, budget) == config.memory.ffn_dim
  assert 0.99 * budget < flops_per_token(config)['total'] <= budget


@pytest.mark.thorough
def test_bytes_are_those_of_rows_and_weights():
  config = load_config('configs/exp_1_4_2.py')
  assert bytes_per_token(config) == {
    'bank': 8 * 8 * 128 * 4,
    'weights': 4 * 23_994_880,
    'total': 4 * (8 * 8 * 128 + 23_994_880),
  }
  many, few = (bytes_per_token(load_config(f'configs/{name}.py')) for name in ('memory_bag', 'memory_plus'))
  assert many['bank'] == 8 * 4 * 16 * 128 * 4  # layers, heads, rows, values, bytes
  assert few['bank'] == 4 * 4 * 1 * 128 * 4
  assert bytes_per_token(load_config(RECORD))['bank'] == 0


def test_of_tables_only_the_rows_of_the_token_count_as_read():
  config = tiny_config(model__value_embeddings='all')
  values = config.model.n_kv_heads * config.model.head_dim + 12 * config.model.n_kv_heads  # a row, and the gate
  plain = tiny_config(model__value_embeddings='')
  more = bytes_per_token(config)['weights'] - bytes_per_token(plain)['weights']
  assert more == 4 * config.model.n_layers * values
  sizes = {'model__num_selected': 4, 'memory__n_heads': 2}
  bag, bucket = (tiny_config(model__sublayer=f'ngram_{kind}', **sizes) for kind in ('bag', 'bucket'))
  queries_and_keys = bucket.model.dim * 2 * bucket.memory.query_dim(bucket.model)
  queries_and_keys += 2 * 4 * bucket.memory.query_dim(bucket.model)
  more = bytes_per_token(bucket)['weights'] - bytes_per_token(bag)['weights']
  assert more == 4 * bucket.model.n_layers * queries_and_keys


@pytest.mark.thorough
@pytest.mark.parametrize(('optimizer', 'moments'), [('adamw', 2), ('sgd', 0)])
def test_state_is_what_the_optimizer_keeps(optimizer, moments):
  found = costs(tiny_config(train__optimizer=optimizer))
  assert found['bytes of parameters and optimizer state'] == 4 * (1 + moments) * found['parameters']


@pytest.mark.thorough
def test_tool_prints_the_costs_and_the_width_that_matches(monkeypatch, capsys):
  flags = ['--config', 'configs/product_key_bag.py', '--match', RECORD, '--config.memory.ffn_dim=8']
  monkeypatch.setattr(sys, 'argv', ['cost', *flags])
  monkeypatch.setenv('COLUMNS', '200')
  cost_tool.main()
  said = capsys.readouterr().out
  config = load_config('configs/product_key_bag.py', ['--config.memory.ffn_dim=8'])
  shown = [config, load_config('configs/product_key_bag.py'), load_config(RECORD)]
  total = next(line for line in said.splitlines() if 'FLOPs a token, total' in line)
  assert [f'{flops_per_token(c)["total"]:,.0f}' in total for c in shown] == [True] * 3
  assert '--config.memory.ffn_dim=800 costs 99.77% of the FLOPs a token of configs/exp_1_4_0.py' in said
