"""A list of runs to make: a Python file in the style of configs/, whose get_runs() returns `Run`s; see sweeps/.

get_runs() may take arguments, all with defaults; on the command line they are --set name=value, and text.
"""

import dataclasses
import fnmatch
import numbers
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from mmjax.choices import EVERY_RUN
from mmjax.config import Config, call_python_file, load_config
from mmjax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Run:
  """One run as a sweep file states it.

  Attributes:
    name: what is trained; runs that differ only in their seed share it.
    config: path of a config file.
    overrides: by setting, {'train.learning_rate': 1e-3}; seed and experiment are set from the other fields.
    seed: of the run.
  """

  name: str
  config: str
  overrides: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  seed: int = 0


class Planned(NamedTuple):
  """One run, checked.

  Attributes:
    name: of its directory.
    config: its settings.
    arguments: that train.py would take for them.
    order: names of all runs of the sweep file, also of those that are not made.
  """

  name: str
  config: Config
  arguments: list[str]
  order: tuple[str, ...] = ()


def read_sweep(
  path: str, settings: Sequence[str] = (), overrides: Sequence[str] = (), only: str = EVERY_RUN
) -> list[Planned]:
  """Reads a sweep file and checks the settings of every run that is kept before one is started.

  Args:
    path: of the file.
    settings: 'name=value' arguments for its get_runs().
    overrides: `--config.section.field=value` arguments that apply to every run that is kept, after its own.
    only: shell patterns, comma-separated, of the runs to keep: 'g0-*,g5-*'.

  Raises:
    UserError: if the file, a setting or a name is not right, or no run is left.
  """
  split = [setting.partition('=') for setting in settings]
  for i, (name, equals, _) in enumerate(split):
    if not equals:
      raise UserError(f'--set {name!r} is not understood; it looks like --set scale=gpu')
    if name in [other for other, *_ in split[:i]]:
      raise UserError(f'--set {name}=... is given twice')
  runs = call_python_file(path, 'sweep file', 'get_runs', {name: value for name, _, value in split})
  if not isinstance(runs, list | tuple) or not all(isinstance(run, Run) for run in runs):
    raise UserError(
      f'sweep file {path!r}: get_runs() must return a list of mmjax.tools.sweep_file.Run, not {runs!r:.80}'
    )
  for run in runs:
    _check_run(run, path)
  names = [f'{run.name}-s{run.seed}' for run in runs]
  twice = next((name for name in names if names.count(name) > 1), None)
  if twice:
    raise UserError(f'sweep file {path!r}: two runs are called {twice!r}; give one another name or seed')
  patterns = [pattern.strip() for pattern in only.split(',')]
  for pattern in patterns:
    if not fnmatch.filter(names, pattern):
      raise UserError(f'sweep file {path!r}: no run matches {pattern!r}; there are {", ".join(names) or "none"}')
  return [
    _plan(name, run, overrides, tuple(names))
    for name, run in zip(names, runs, strict=True)
    if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)
  ]


def _check_run(run: Run, path: str) -> None:
  """Raises UserError for a run whose overrides or seed are not what `Run` says."""
  if not isinstance(run.overrides, Mapping):
    raise UserError(f'sweep file {path!r}: overrides of run {run.name!r} must be a dict, not {run.overrides!r:.80}')
  if not isinstance(run.seed, numbers.Integral) or isinstance(run.seed, bool):
    raise UserError(f'sweep file {path!r}: seed={run.seed!r} of run {run.name!r} must be an int')
  for setting, argument in (('seed', 'seed'), ('experiment', 'name')):
    if setting in run.overrides:
      raise UserError(
        f'sweep file {path!r}: run {run.name!r} has {setting!r} in its overrides; give it as Run({argument}=...)'
      )


def _plan(name: str, run: Run, overrides: Sequence[str], order: tuple[str, ...]) -> Planned:
  settings = dict(run.overrides) | {'experiment': run.name, 'seed': run.seed}
  arguments = [f'--config.{setting}={value}' for setting, value in settings.items()] + list(overrides)
  try:
    config = load_config(run.config, arguments)
  except UserError as error:
    raise UserError(f'run {run.name!r}: {error}') from error
  for setting, given, own in (('experiment', config.experiment, run.name), ('seed', config.seed, run.seed)):
    if given != own:
      raise UserError(f'--config.{setting}={given} must be left out: each run of a sweep has its own, as {own!r} here')
  return Planned(name, config, ['--config', run.config, *arguments], order)
