"""Runs put into rows that differ only in their seed, and what a row comes to.

A row's loss is the mean over its finished runs. Its difference to the first row is taken over the `paired_seeds`: runs
of one seed saw the same batches in the same order.
"""

import math
import os
import re
import statistics
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from mmjax.config import Config, flatten, idle_settings, user_path
from mmjax.config.history import REMOVED
from mmjax.data.loader import row_settings
from mmjax.data.overlap import overlap_remark
from mmjax.errors import UserError
from mmjax.files import first_three
from mmjax.model.cost import count_params, flops_per_token
from mmjax.model.params import abstract_params
from mmjax.report.found import FoundRun, read_ended
from mmjax.run.identity import CUT, FREE_SECTIONS, FREE_SETTINGS

NO_LOSS = ('last loss not finite', 'last evaluation missing from its log')  # of finished runs


class Row(NamedTuple):
  """Runs that differ only in their seed, and their name."""

  name: str
  runs: list[FoundRun]

  @property
  def counted(self) -> list[FoundRun]:
    """The finished runs; all where none is."""
    return [run for run in self.runs if run.finished] or self.runs

  @property
  def evals(self) -> dict[int, dict[str, Any]]:
    """The evaluation that counts of each run that does, by seed."""
    return {run.config.seed: run.last_eval for run in self.counted if run.last_eval}

  @property
  def lowest(self) -> float | None:
    """The lowest validation loss of each run that `losses` has, mean over runs."""
    return _mean([min(e['loss'] for e in run.finite_evals) for run in self.counted if run.last_eval])

  @property
  def losses(self) -> dict[int, float]:
    """The last validation loss by seed."""
    return {seed: found['loss'] for seed, found in self.evals.items()}

  @property
  def probes(self) -> dict[str, float | None]:
    """What its last evaluations found without the bank, and with it, mean over runs."""
    return _means([found['probes'] for found in self.evals.values() if found.get('probes')])


def find_runs(paths: Sequence[str | Path]) -> list[FoundRun]:
  """Returns runs; a folder of runs, as a sweep makes it, stands for all that it holds, in their order.

  Raises:
    UserError: if a path is neither, or a run never trained.
  """
  found: list[Path] = []
  for path in map(user_path, paths):
    inside = [path]
    if not (path / 'config.json').is_file():
      inside = [config.parent for config in path.glob('*/config.json')]
      order = list(read_ended(path))
      inside.sort(key=lambda p: (order.index(p.name) if p.name in order else len(order), _natural(p.name)))
    if not inside:
      raise UserError(f'{path} is neither a run directory, which holds config.json, nor a folder of them')
    found += [path for path in inside if path not in found]
  runs = [FoundRun(path) for path in found]
  for run in runs:
    if not run.dir.was_trained:
      raise UserError(f'{run.path} was never trained: {run.dir.run_path.name} is missing')
  return runs


def make_rows(runs: Sequence[FoundRun]) -> list[Row]:
  """Puts runs that differ only in their seed together, in the order of their first.

  Raises:
    UserError: if two runs are the same, seed included.
  """
  rows: list[list[FoundRun]] = []
  for run in runs:
    same = (row for row in rows if _what_counts(row[0]) == _what_counts(run))
    row = next((row for row in same if not other_origin(row[0], run)), None)
    if row is None:
      rows.append(row := [])
    twin = next((other for other in row if other.config.seed == run.config.seed), None)
    if twin:
      raise UserError(f'{twin.path} and {run.path} have the same settings and the same seed; leave one out')
    row.append(run)
  names = [_common_name(row) for row in rows]
  ends = distinct_ends([run.path for run in runs])
  full = [', '.join(ends[run.path] for run in row) for row in rows]
  unique = [name if names.count(name) == 1 else whole for name, whole in zip(names, full, strict=True)]
  return [Row(name, row) for name, row in zip(unique, rows, strict=True)]


def _common_name(runs: Sequence[FoundRun]) -> str:
  """Returns what the names of the directories have in common, without the seed at their end.

  In the name of a single run a number without -s or -seed before it may be anything: exp_1_4_0.
  """
  mark = r'[-_.](s|seed)[-_.]?' if len(runs) == 1 else r'[-_.]?(s|seed)?[-_.]?'
  full = [Path(os.path.abspath(run.path)).name for run in runs]
  names = {re.sub(f'{mark}{run.config.seed}$', '', name) or name for name, run in zip(full, runs, strict=True)}
  return names.pop() if len(names) == 1 else ', '.join(full)


def distinct_ends(paths: Sequence[str | Path]) -> dict[str | Path, str]:
  """Returns the shortest end of each path that no other path has: A/run and B/run, but only `other` of C/other."""
  parts = {path: Path(os.path.abspath(path)).parts for path in paths}

  def end(own: tuple[str, ...]) -> str:
    lengths = range(1, len(own) + 1)
    least = next((n for n in lengths if sum(other[-n:] == own[-n:] for other in parts.values()) == 1), len(own))
    return str(Path(*own[-least:]))

  return {path: end(own) for path, own in parts.items()}


def _natural(name: str) -> list[tuple[int, str]]:
  """Sorts g2 before g10."""
  return [(int(part), '') if part.isdecimal() else (-1, part) for part in re.split(r'(\d+)', name)]


def overlaps(runs: Sequence[FoundRun]) -> list[str]:
  """Says how much of their validation text runs were trained on, by name where that is not the same of all."""
  found: dict[str, list[str]] = {}
  for run, name in zip(runs, distinct_ends([run.path for run in runs]).values(), strict=True):
    valid = (run.index or {'splits': {}})['splits'].get('valid', {})
    found.setdefault(overlap_remark(valid, valid.get('also_in_train'), run.config.data.layout), []).append(name)
  return [(f'{first_three(names, "runs")}: ' if len(found) > 1 else '') + said for said, names in found.items() if said]


def other_origin(first: FoundRun, run: FoundRun) -> str:
  """Says in what the text that a run learned from or was evaluated on differs from the first's; '' if in nothing.

  A run that was not evaluated yet says nothing of the size of its validation text.
  """
  pairs = ((name, first.origin[name], run.origin[name]) for name in first.origin)
  return ', '.join(f'{name} {_short(a)} and {_short(b)}' for name, a, b in pairs if None not in (a, b) and a != b)


def _short(value: Any) -> str:
  return value[:12] if isinstance(value, str) else f'{value:,}'


def _what_counts(run: FoundRun) -> dict[str, Any]:
  return (
    run.gone
    | {'memory.bank_file': run.bank, 'changed on the way': run.changed}
    | {
      name: value
      for name, value in flatten(run.config.to_dict()).items()
      if name not in ('seed', *FREE_SETTINGS)
      and not name.startswith(FREE_SECTIONS)
      and (not name.startswith('data.') or name in CUT)  # which data they are, and not where, their hashes say
    }
  )


def same_batches(first: Config, config: Config) -> bool:
  """Whether runs of one seed saw the same rows of text at each update."""
  a, b = ((c.train.update_rows, row_settings(c)) for c in (first, config))
  return a == b


class Difference(NamedTuple):
  """How much higher one model's loss is than another's.

  Attributes:
    mean: nats a token.
    standard_error: None where there are too few seeds for one.
    kind: 'paired' (over the `n` seeds that both have) or 'Welch' (over `n` and `n_first` runs).
    n: runs of the one.
    n_first: runs of the other.
  """

  mean: float
  standard_error: float | None
  kind: str
  n: int
  n_first: int


def paired_seeds(a: Mapping[int, Any], b: Mapping[int, Any], *, same: bool) -> list[int]:
  """Returns the seeds that are compared one by one; [] where means over all runs are compared.

  A single common seed gives no standard error: where both have several runs, their means are taken instead.

  Args:
    a: anything by seed.
    b: of another model.
    same: whether runs of one seed saw the `same_batches`.
  """
  common = [seed for seed in b if seed in a] if same else []
  return common if len(common) > 1 or min(len(a), len(b)) == 1 else []


def difference(a: Mapping[int, float], b: Mapping[int, float], *, same: bool) -> Difference | None:
  """Returns how much higher the losses `b`, by seed, are than `a`, see `paired_seeds`; None where there are none."""
  if not a or not b:
    return None
  if common := paired_seeds(a, b, same=same):
    differences = [b[seed] - a[seed] for seed in common]
    error = statistics.stdev(differences) / math.sqrt(len(common)) if len(common) > 1 else None
    return Difference(statistics.fmean(differences), error, 'paired', len(common), len(common))
  error = None
  if min(len(a), len(b)) > 1:
    error = math.sqrt(sum(statistics.variance(x.values()) / len(x) for x in (a, b)))
  return Difference(statistics.fmean(b.values()) - statistics.fmean(a.values()), error, 'Welch', len(b), len(a))


def summary(first: Row, row: Row) -> dict[str, Any]:
  """Returns what a comparison shows of a row, and what must be said of it, `marks`.

  Numbers are means over its counted runs, None where there are none. Against the first row: the difference of the loss,
  how far the loss without the bank is above that of the whole first model, and the settings that differ.
  """
  runs, config = row.counted, row.runs[0].config
  evals, losses = list(row.evals.values()), list(row.losses.values())
  train = [run.of_kind('train') for run in runs]
  last = [records[-1] for records in train if records]
  total, without_bank = count_params(abstract_params(config))
  rates = [record['tokens_per_second'] for records in train for record in records]
  marks = ['other data'] if any(other_origin(first.runs[0], run) for run in row.runs) else []
  comparable = row is not first and not marks and all(any(run.finished for run in r.runs) for r in (first, row))
  probes, whole = row.probes, first.probes if comparable else {}
  zeroed = probes.get('loss_zeroed'), whole.get('loss')
  known = None not in zeroed and probes['positions'] == whole['positions']
  settings, idle = _what_counts(row.runs[0]), idle_settings(config)
  over_first = None
  if comparable:
    over_first = difference(first.losses, row.losses, same=same_batches(first.runs[0].config, config))
  return {
    'name': row.name,
    'runs': [str(run.path) for run in row.runs],
    'seeds': [run.config.seed for run in runs],
    'loss': _mean(losses),
    'lowest_loss': row.lowest,
    'loss_deviation': statistics.stdev(losses) if len(losses) > 1 else None,
    **{name: _mean([e[name] for e in evals]) for name in ('bits_per_byte', 'accuracy')},
    **{name: _mean([record[name] for record in last]) for name in ('tokens', 'seconds')},
    'flops_per_token': flops_per_token(config)['total'],
    'parameters': total,
    'parameters_without_bank': without_bank,
    'tokens_per_second': statistics.median(rates) if rates else None,
    'peak_bytes': max((r['peak_bytes'] or 0 for records in train for r in records), default=None),
    'bank': [_means(layer) for layer in zip(*(e['bank'] for e in evals), strict=True)],
    'probes': probes,
    'skipped_updates': sum(len(run.of_kind('skipped')) for run in row.runs),
    'devices': sorted({run.devices for run in row.runs}),
    'difference': over_first and over_first._asdict(),
    'zeroed_over_first': zeroed[0] - zeroed[1] if known else None,
    'changed': _changed(_what_counts(first.runs[0]), settings, idle),
    'marks': marks + list(filter(None, map(_mark, row.runs))),
  }


def _changed(first: Mapping[str, Any], settings: Mapping[str, Any], idle: Collection[str]) -> dict[str, Any]:
  """Returns what is other than in the first; one of both may have settings that mmjax no longer has."""
  old, new = ({name: found.get(name, REMOVED.get(name)) for name in first | settings} for found in (first, settings))
  return {name: new[name] for name in new if new[name] != old[name] and name not in idle}


def _mark(run: FoundRun) -> str:
  """Says of a run that it is not finished, or lost its loss; '' of others."""
  if run.finished:
    last = [e['step'] for e in run.of_kind('eval')][-1:]
    return '' if run.last_eval or not last else f'seed {run.config.seed} {NO_LOSS[last != [run.total]]}'
  logged = [record['step'] for record in run.of_kind('train')][-1:]
  step = run.step or max(logged, default=0)  # its checkpoints may have been left behind
  how_far = f'{step:,} of {run.total:,} updates' if run.total else 'not begun'
  return f'seed {run.config.seed} {"diverged" if _has_diverged(run) else "not finished"}, {how_far}'


def _has_diverged(run: FoundRun) -> bool:
  """Whether a run ended as train.max_skipped_updates says, and did not go on."""
  last = run.records[-1] if run.records else {}
  return last.get('kind') == 'skipped' and last['in_a_row'] >= run.config.train.max_skipped_updates


def _means(found: Sequence[Mapping[str, Any]]) -> dict[str, float | None]:
  """Returns the mean of each number over runs; the number of a layer is the same in all."""
  names = found[0] if found else {}
  return {n: found[0][n] if n == 'layer' else _mean([numbers[n] for numbers in found]) for n in names}


def _mean(values: Sequence[float | None]) -> float | None:
  known = [value for value in values if value is not None]
  return statistics.fmean(known) if known else None
