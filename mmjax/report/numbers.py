"""The numbers of evaluations and of costs: each with its name and how it is written, stated once for every table."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import jax

from mmjax.config import Config
from mmjax.config.sublayers import VALUES, layer_name
from mmjax.console import Table, number
from mmjax.model.cost import bytes_per_token, count_params, flops_per_token
from mmjax.model.params import abstract_params
from mmjax.training.optimizer import make_optimizer
from mmjax.training.state import init_state

# Of mmjax.evaluation.evaluate.EvalResult: field -> (name, format).
QUALITY = {
  'loss': ('loss, nats a token', '.4f'),
  'perplexity': ('perplexity, exp(loss)', ',.2f'),
  'bits_per_byte': ('bits per byte', '.4f'),
  'accuracy': ('accuracy', '.2%'),
}
HELD_OUT = {'tokens': ('tokens', ','), 'text_bytes': ('UTF-8 bytes', ',')} | QUALITY
# Of each layer's memory, as mmjax.evaluation.probes and bank_health define them.
READS = {
  'used_share': ('share of rows read', '.1%'),
  'kl_to_uniform': ('KL to uniform, nats', '.3f'),
  'kl_weighted': ('the same, weighted', '.3f'),
  'effective_rows': ('effective rows', ',.0f'),
  'hottest_share': ('share of the hottest row', '.2%'),
  'head_overlap': ('rows that two heads share', '.1%'),
}
MEANING = {
  'row_agreement': ('same best row, same next token', '.2%'),
  'row_agreement_chance': ('the same by chance', '.2%'),
  'gate_grad_norm': ('gradient norm of the gate', '.2e'),
  'key_grad_norm': ('gradient norm of the sub-keys', '.2e'),
}
BANKS = {'loss': 'as it is', 'loss_zeroed': 'all rows zero', 'loss_shuffled': 'rows exchanged'}


def written(found: Mapping[str, Any], fields: Mapping[str, tuple[str, str]]) -> list[str]:
  """Writes the fields of a record; what an older log does not have, or was not finite, is '-'."""
  return [number(found.get(field), spec) for field, (_, spec) in fields.items()]


def names(fields: Mapping[str, tuple[str, str]]) -> list[str]:
  """Returns the names of fields."""
  return [name for name, _ in fields.values()]


def memory_tables(bank: Sequence[Mapping[str, Any]], probes: Mapping[str, Any]) -> list[Table]:
  """Returns what one evaluation found out about a memory, as tables.

  Args:
    bank: of an eval line of metrics.jsonl or of eval.json; [] for a model without a memory, which has no tables.
    probes: of the same.
  """
  if not bank:
    return []
  found = [
    Table(['layer', *names(fields)], [[b['layer'], *written(b, fields)] for b in bank], title)
    for title, fields in (('What each layer reads of the bank', READS), ('What its rows stand for', MEANING))
  ]
  if 'positions' in probes:
    rows = [
      [what, number(probes[name], '.4f'), '-' if name == 'loss' else probe_difference(probes, name)]
      for name, what in BANKS.items()
    ]
    for reader in bank:
      if 'loss_zeroed' in reader:  # only eval.py looks at readers one by one
        one = probes | {'zeroed': reader['loss_zeroed']}
        place = 'attention in its values' if reader['layer'] == VALUES else layer_name(reader['layer'])
        rows.append([f'zero for {place} alone', number(one['zeroed'], '.4f'), probe_difference(one, 'zeroed')])
    title = f'Loss on the first {probes["positions"]:,} positions with the bank changed'
    found.append(Table(['bank', 'nats a token', 'difference'], rows, title))
  return found


def probe_difference(probes: Mapping[str, Any], name: str) -> str:
  """Writes how far a probe's loss is above that with the bank as it is; '-' where one of them is not known."""
  return '-' if None in (probes.get(name), probes.get('loss')) else f'{probes[name] - probes["loss"]:+.4f}'


def costs(config: Config) -> dict[str, float]:
  """Returns what a config costs, by name; float32, and FLOPs of the forward and the backward pass."""
  touched = bytes_per_token(config)
  total, without_bank = count_params(abstract_params(config))
  flops = {f'FLOPs a token, {name.replace("_", " ")}': value for name, value in flops_per_token(config).items()}
  return flops | {
    'parameters': total,
    'parameters not in the bank': without_bank,
    'bytes of parameters and optimizer state': _state_bytes(config),
    'bytes of rows that a token reads': touched['bank'],
    'bytes of other parameters that a token reads': touched['weights'],
  }


def _state_bytes(config: Config) -> int:
  """Counts parameters and what the optimizer keeps of them."""
  state = jax.eval_shape(partial(init_state, config, make_optimizer(config, total_steps=1)))
  kept = jax.tree.leaves([state.get(name) for name in ('params', 'opt_state', 'bank_moments')])
  return sum(leaf.size * leaf.dtype.itemsize for leaf in kept if leaf.ndim)  # counters of updates are no arrays


def cost_table(columns: Mapping[str, Mapping[str, float]]) -> Table:
  """Returns a column of costs for each config; a part that a config does not have is left empty."""
  labels = dict.fromkeys(label for column in columns.values() for label in column)
  order = sorted(labels, key=lambda label: (not label.startswith('FLOPs'), label.endswith('total')))
  rows = [[label, *(f'{c[label]:,.0f}' if label in c else '' for c in columns.values())] for label in order]
  return Table(['float32; FLOPs forward and backward', *columns], rows)
