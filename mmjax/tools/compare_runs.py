"""Runs read from their directories, put into rows that differ only in their seed, and what a row comes to.

A row's loss is the mean over its finished runs. Its difference to the first row is taken seed by seed where both have
runs with the same seeds, because these saw the same batches in the same order.
"""

import dataclasses
import math
import os
import re
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from mmjax.config import Config, flatten, user_path
from mmjax.errors import UserError
from mmjax.files import read_json
from mmjax.model.cost import flops_per_token
from mmjax.model.lm import abstract_params, count_params
from mmjax.run.directory import RunDir
from mmjax.run.identity import BANK_SHA256, FREE, FREE_SECTIONS
from mmjax.run.log import read_metrics
from mmjax.tools.run_state import RunState, run_state

# Where the data lie says nothing: which they are, their hashes say. These two decide how they are cut into rows.
DATA_THAT_COUNTS = ('data.layout', 'data.isolate_documents')


@dataclasses.dataclass(frozen=True)
class FoundRun:
  """A run as its directory holds it.

  `origin` is what must be equal for its losses to be compared with others'; `bank` says which file its bank started
  from, by its hash, by its name in runs that did not note it.
  """

  path: Path
  config: Config
  state: RunState
  records: list[dict[str, Any]]
  origin: dict[str, Any]
  bank: str
  device: str

  def of_kind(self, kind: str) -> list[dict[str, Any]]:
    """Returns the records of a kind."""
    return [record for record in self.records if record['kind'] == kind]

  @property
  def last_eval(self) -> dict[str, Any] | None:
    """The last evaluation with a finite loss."""
    finite = [record for record in self.of_kind('eval') if record['loss'] is not None]
    return finite[-1] if finite else None


class Difference(NamedTuple):
  """A row's loss minus the first row's, with its standard error: None where there are too few seeds for one.

  `kind` is 'paired' (over `n` seeds that both have) or 'Welch' (over `n` and `n_first` runs).
  """

  mean: float
  standard_error: float | None
  kind: str
  n: int
  n_first: int


class Row(NamedTuple):
  """Runs that differ only in their seed, and their name."""

  name: str
  runs: list[FoundRun]

  @property
  def counted(self) -> list[FoundRun]:
    """The finished runs; all where none is."""
    return [run for run in self.runs if run.state.finished] or self.runs

  @property
  def finished(self) -> bool:
    """Whether a run of it is."""
    return any(run.state.finished for run in self.runs)

  def losses(self) -> dict[int, float]:
    """Returns the last validation loss by seed."""
    return {run.config.seed: run.last_eval['loss'] for run in self.counted if run.last_eval}


def find_runs(paths: Sequence[str | Path]) -> list[Path]:
  """Returns run directories; a folder of runs, as a sweep makes it, stands for all that it holds, in their order.

  Raises:
    UserError: if a path is neither.
  """
  found: list[Path] = []
  for path in map(user_path, paths):
    inside = [path]
    if not (path / 'config.json').is_file():
      inside = [config.parent for config in path.glob('*/config.json')]
      sweep = read_json(path / 'sweep.json')['runs'] if (path / 'sweep.json').is_file() else {}
      order = list(sweep)
      inside.sort(key=lambda p: (order.index(p.name) if p.name in order else len(order), _natural(p.name)))
    if not inside:
      raise UserError(f'{path} is neither a run directory, which holds config.json, nor a folder of them')
    found += [run for run in inside if run not in found]
  return found


def read_run(path: Path) -> FoundRun:
  """Reads a run directory.

  Raises:
    UserError: if it is no run, or never trained.
  """
  run = RunDir(path)
  if not run.was_trained:
    raise UserError(f'{path} was never trained: {run.run_path.name} is missing')
  config, history = run.read_config(), read_json(run.run_path)
  records = read_metrics(run.metrics_path) if run.metrics_path.exists() else []
  evaluated = next((r for r in records if r['kind'] == 'eval'), {'tokens': None})
  identity = history['identity']
  origin = {name: identity[name] for name in ('data_sha256', 'tokenizer_sha256')}
  origin |= {'validation_tokens': evaluated['tokens']}  # not bytes: earlier versions counted some otherwise
  bank = identity.get(BANK_SHA256, config.memory.bank_file)
  last = history['starts'][-1]
  device = f'{last["device_count"]} x {last["device"]} ({last["host"]})'
  return FoundRun(path, config, run_state(path, config), records, origin, bank, device)


def make_rows(runs: Sequence[FoundRun]) -> list[Row]:
  """Puts runs that differ only in their seed together, in the order of their first.

  Raises:
    UserError: if two runs are the same, seed included.
  """
  rows: list[list[FoundRun]] = []
  for run in runs:
    same = (row for row in rows if _what_counts(row[0]) == _what_counts(run))
    others = next((row for row in same if not other_origin(row[0], run)), None)
    if others is None:
      rows.append(others := [])
    twin = next((other for other in others if other.config.seed == run.config.seed), None)
    if twin:
      raise UserError(f'{twin.path} and {run.path} have the same settings and the same seed; leave one out')
    others.append(run)
  names = [_common_name(row) for row in rows]
  ends = dict(zip([run.path for run in runs], distinct_ends([run.path for run in runs]), strict=True))
  full = [', '.join(ends[run.path] for run in row) for row in rows]
  unique = [name if names.count(name) == 1 else whole for name, whole in zip(names, full, strict=True)]
  return [Row(name, row) for name, row in zip(unique, rows, strict=True)]


def distinct_ends(paths: Sequence[Path]) -> list[str]:
  """Returns the shortest end of each path that no other path has: A/run and B/run, but only `other` of C/other."""
  parts = [Path(os.path.abspath(path)).parts for path in paths]

  def end(own: tuple[str, ...]) -> str:
    lengths = range(1, len(own) + 1)
    least = next((n for n in lengths if sum(other[-n:] == own[-n:] for other in parts) == 1), len(own))
    return str(Path(*own[-least:]))

  return [end(own) for own in parts]


def other_origin(first: FoundRun, run: FoundRun) -> str:
  """Says in what the text that a run learned from or was evaluated on differs from the first's; '' if in nothing.

  A run that was not evaluated yet says nothing of the size of its validation text.
  """
  different = [name for name in first.origin if first.origin[name] is not None and run.origin[name] is not None]
  different = [name for name in different if first.origin[name] != run.origin[name]]
  return ', '.join(f'{name} {_short(first.origin[name])} and {_short(run.origin[name])}' for name in different)


def difference(first: Row, row: Row) -> Difference | None:
  """Returns how much higher a row's loss is than the first's; None where one of them has none.

  Paired over common seeds, if these saw the same batches. A single common seed gives no standard error: where both rows
  have several runs, Welch's is taken instead.
  """
  a, b = first.losses(), row.losses()
  if not a or not b:
    return None
  common = [seed for seed in b if seed in a] if same_batches(first, row) else []
  if len(common) > 1 or (common and min(len(a), len(b)) == 1):
    differences = [b[seed] - a[seed] for seed in common]
    error = statistics.stdev(differences) / math.sqrt(len(common)) if len(common) > 1 else None
    return Difference(statistics.fmean(differences), error, 'paired', len(common), len(common))
  mean, error = statistics.fmean(b.values()) - statistics.fmean(a.values()), None
  if min(len(a), len(b)) > 1:
    error = math.sqrt(sum(statistics.variance(x.values()) / len(x) for x in (a, b)))
  return Difference(mean, error, 'Welch', len(b), len(a))


def summary(row: Row) -> dict[str, Any]:
  """Returns what the table shows of a row; numbers are means over its counted runs, None where there are none."""
  runs, config = row.counted, row.runs[0].config
  evals = [run.last_eval for run in runs if run.last_eval]
  train = [run.of_kind('train') for run in runs]
  losses = list(row.losses().values())
  total, without_bank = count_params(abstract_params(config))
  rates = [record['tokens_per_second'] for records in train for record in records]
  return {
    'name': row.name,
    'runs': [str(run.path) for run in row.runs],
    'seeds': [run.config.seed for run in runs],
    'loss': _mean(losses),
    'loss_deviation': statistics.stdev(losses) if len(losses) > 1 else None,
    'bits_per_byte': _mean([e['bits_per_byte'] for e in evals]),
    'accuracy': _mean([e['accuracy'] for e in evals]),
    'tokens': _mean([records[-1]['tokens'] for records in train if records]),
    'seconds': _mean([records[-1]['seconds'] for records in train if records]),
    'flops_per_token': flops_per_token(config)['total'],
    'parameters': total,
    'parameters_without_bank': without_bank,
    'tokens_per_second': statistics.median(rates) if rates else None,
    'peak_bytes': max((r['peak_bytes'] or 0 for records in train for r in records), default=None),
    'bank': _bank([e['bank'] for e in evals]),
    'probes': _means([e['probes'] for e in evals if e.get('probes')]),
    'skipped_updates': sum(len(run.of_kind('skipped')) for run in row.runs),
    'devices': sorted({run.device for run in row.runs}),
  }


def changed(first: Row, row: Row) -> dict[str, Any]:
  """Returns the settings in which a row differs from the first."""
  a, b = _what_counts(first.runs[0]), _what_counts(row.runs[0])
  return {name: b[name] for name in b if b[name] != a[name]}


def _what_counts(run: FoundRun) -> dict[str, Any]:
  settings = flatten(run.config.to_dict())
  return {'memory.bank_file': run.bank} | {
    name: value
    for name, value in settings.items()
    if name != 'seed'
    and name not in FREE
    and not name.startswith(FREE_SECTIONS)
    and (not name.startswith('data.') or name in DATA_THAT_COUNTS)
  }


def same_batches(first: Row, row: Row) -> bool:
  """Whether runs of one seed saw the same rows of text at each update."""

  def cut(config: Config) -> tuple:
    rows = config.train.update_rows
    return rows, config.model.max_seq_len, config.data.layout, config.data.isolate_documents

  return cut(first.runs[0].config) == cut(row.runs[0].config)


def _bank(by_run: Sequence[Sequence[Mapping[str, Any]]]) -> list[dict[str, Any]]:
  """Returns the bank's health by layer, each number the mean over runs."""
  layers = zip(*by_run, strict=True)
  return [
    {'layer': layer[0]['layer']} | _means([{name: x for name, x in h.items() if name != 'layer'} for h in layer])
    for layer in layers
  ]


def _means(found: Sequence[Mapping[str, Any]]) -> dict[str, float | None]:
  return {name: _mean([numbers[name] for numbers in found]) for name in found[0]} if found else {}


def _mean(values: Sequence[float | None]) -> float | None:
  known = [value for value in values if value is not None]
  return statistics.fmean(known) if known else None


def _common_name(runs: Sequence[FoundRun]) -> str:
  """Returns what the names of the directories have in common, without the seed at their end.

  In the name of a single run a number without -s or -seed before it may be anything: exp_1_4_0.
  """
  mark = r'[-_.](s|seed)[-_.]?' if len(runs) == 1 else r'[-_.]?(s|seed)?[-_.]?'
  full = [Path(os.path.abspath(run.path)).name for run in runs]
  names = {re.sub(f'{mark}{run.config.seed}$', '', name) or name for name, run in zip(full, runs, strict=True)}
  return names.pop() if len(names) == 1 else ', '.join(full)


def _natural(name: str) -> list[tuple[int, str]]:
  """Sorts g2 before g10."""
  return [(int(part), '') if part.isdecimal() else (-1, part) for part in re.split(r'(\d+)', name)]


def _short(value: Any) -> str:
  return value[:12] if isinstance(value, str) else f'{value:,}'
