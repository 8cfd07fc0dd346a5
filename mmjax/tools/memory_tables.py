"""What an evaluation found out about a memory, as tables of text that eval.py prints and the report holds."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

# number of mmjax.evaluation.probes or bank_health -> (heading, format)
READS = {
  'used_share': ('share of rows read', '.1%'),
  'kl_to_uniform': ('KL to uniform, nats', '.3f'),
  'kl_weighted': ('the same, weighted by scores', '.3f'),
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
BANKS = {'loss': 'as it is', 'loss_zeroed': 'all values zero', 'loss_shuffled': 'rows exchanged'}


class TextTable(NamedTuple):
  """A table, everything in it as text."""

  title: str
  header: tuple[str, ...]
  rows: list[tuple[str, ...]]


def memory_tables(bank: Sequence[Mapping[str, Any]], probes: Mapping[str, Any]) -> list[TextTable]:
  """Returns the tables of one evaluation; what an older log does not have, or was not finite, is '-'.

  Args:
    bank: of an eval line of metrics.jsonl or of eval.json; [] for a model without a memory, which has no tables.
    probes: of the same.
  """
  if not bank:
    return []
  tables = [
    TextTable(
      title,
      ('layer', *(heading for heading, _ in columns.values())),
      [(str(b['layer']), *(_text(b.get(name), spec) for name, (_, spec) in columns.items())) for b in bank],
    )
    for title, columns in (('What each layer reads of the bank', READS), ('What its rows stand for', MEANING))
  ]
  if 'positions' in probes:
    rows = [
      (what, _text(probes[name], '.4f'), '-' if name == 'loss' else probe_difference(probes, name))
      for name, what in BANKS.items()
    ]
    title = f'Loss on the first {probes["positions"]:,} positions with the bank changed'
    tables.append(TextTable(title, ('bank', 'nats a token', 'difference'), rows))
  return tables


def update_ratio_sentence(probes: Mapping[str, Any]) -> str:
  """Says how far an update moves the rows that it reads; '' where nobody measured it."""
  ratio = probes.get('row_update_ratio')
  if ratio is None:
    return ''
  return f'The last update before it moved the rows that it read by {ratio:.1e} of their norm, at its learning rate.'


def probe_difference(probes: Mapping[str, Any], name: str) -> str:
  """Writes how far a probe's loss is above that with the bank as it is; '-' where one of them is not known."""
  return '-' if None in (probes.get(name), probes.get('loss')) else f'{probes[name] - probes["loss"]:+.4f}'


def _text(value: float | None, spec: str) -> str:
  return '-' if value is None else format(value, spec)
