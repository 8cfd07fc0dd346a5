"""How a lead lasts: how far models are below the first one after few and after many tokens, and at equal time.

Each run is trained to its end with a schedule of its own, and counts with its last held-out loss. Runs of one model
have one name, but for their tokens and their seed: g42-3e6-s0 and g42-12e6-s1, or runs of one name in several folders.
Two forms with two parameters each, both straight lines against log(tokens), are fitted by least squares: a power law,
log(lead) = log(a) - b log(tokens), and lead = a + b log(tokens).
"""

import math
import re
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from mmjax.config import Config
from mmjax.errors import UserError
from mmjax.report.found import FoundRun
from mmjax.report.rows import difference, paired_seeds, same_batches

FAR = (1e8, 1e9)  # tokens at which a fit says something
SEED = re.compile(r'[-_.](s|seed)[-_.]?\d+$')
TOKENS = re.compile(r'[-_](\d+(?:\.\d+)?(?:e\+?\d+)?)([kMG]?)(?=[-_]|$)')  # the -12e6 of g42-muon-12e6
ABOUT = 0.05  # how far the tokens of a run may be from those that its name says: updates are whole
UNITS = {'': 1, 'k': 1e3, 'M': 1e6, 'G': 1e9}


class Form(NamedTuple):
  """A straight line against ln(tokens): how it is written, what of the lead is on it, and the lead from that."""

  written: str
  to_line: Callable[[np.ndarray], np.ndarray]
  to_lead: Callable[[np.ndarray], np.ndarray]
  parameters: Callable[[float, float], tuple[float, float]]  # of the line's value at ln(tokens) = 0, and its slope


FORMS = {
  'power': Form('a tokens^-b', np.log, np.exp, lambda start, slope: (math.exp(start), -slope)),
  'log': Form('a + b ln(tokens)', lambda x: x, lambda x: x, lambda start, slope: (start, slope)),
}


class Point(NamedTuple):
  """A model trained on a number of tokens: loss by seed, settings, and how long it took, None where no log says."""

  tokens: float
  losses: dict[int, float]
  config: Config
  seconds: float | None


Points = dict[float, Point]  # by tokens, rounded: of runs of equal length


def find_lead(runs: Sequence[FoundRun], patterns: str = '') -> dict[str, Any] | None:
  """Returns the leads of models over the first, and what is fitted to them.

  Args:
    runs: those that are finished and were evaluated count.
    patterns: 'g0=g0-*,g42=g42-*' names models, the first to lead over, and the runs of each; '': by their names.

  Returns:
    None where no model and the first have two lengths of training in common, or names do not tell models apart. Else
    baseline, a name, and models: for each other its points (tokens, loss, lead and its standard_error by
    `difference`, leads of the `paired_seeds`, seconds), fits (by form: a, b, b_range, refits_without, residual in nats,
    at: tokens -> lead and its range), and equal_time (the tokens and seconds of the baseline, its loss, and that of the
    model after as many seconds).

  Raises:
    UserError: if a pattern fits no run, two runs of a model have the same tokens and seed, or the models that patterns
      name have no two lengths of training in common.
  """
  named = _models(runs, patterns)
  if twins := next(filter(None, map(_twins, named.values())), None):
    if not patterns:
      return None  # runs of one name in several folders, which are no models then
    same = 'are of one model by --models, and have the same tokens and the same seed'
    raise UserError(f'{" and ".join(twins)} {same}; leave one of them out of its pattern')
  models = {name: _points(own) for name, own in named.items()}
  baseline, *others = models
  leads = {name: _lead_points(models[baseline], models[name]) for name in others}
  leads = {name: points for name, points in leads.items() if len(points) > 1}
  if not leads:
    if patterns:
      of_first = ', '.join(f'{point.tokens:g}' for point in models[baseline].values()) or 'none'
      raise UserError(
        f'--models {patterns}: no model was trained on two numbers of tokens that {baseline} was too, '
        f'which was on {of_first}'
      )
    return None
  return {
    'baseline': baseline,
    'models': {
      name: {
        'points': points,
        'fits': {form: fit(FORMS[form], points) for form in FORMS},
        'equal_time': _equal_time(models[baseline], models[name]),
      }
      for name, points in leads.items()
    },
  }


def _models(runs: Sequence[FoundRun], patterns: str) -> dict[str, list[FoundRun]]:
  """Returns the runs of each model, the baseline first."""
  found: dict[str, list[FoundRun]] = {}
  for pair in filter(None, patterns.split(',')):
    name, equals, pattern = pair.partition('=')
    if name in found:
      raise UserError(f'--models {patterns}: {name} is named twice; one pattern of a model may be such as g0-[0-9]*')
    found[name] = [run for run in runs if run.path.match(pattern or name)]
    if not equals or not found[name]:
      raise UserError(f'--models {pair}: {"no run fits it" if equals else "must be NAME=PATTERN, such as g0=g0-*"}')
  for run in () if patterns else runs:
    found.setdefault(_model_name(run), []).append(run)
  return found


def _model_name(run: FoundRun) -> str:
  """Returns the name of a run without its seed and its tokens: of g52-4M-12e6-s0, which read 12 M, g52-4M."""

  def without(match: re.Match) -> str:
    return '' if math.isclose(float(match[1]) * UNITS[match[2]], _tokens(run), rel_tol=ABOUT) else match[0]

  return TOKENS.sub(without, SEED.sub('', run.path.resolve().name))


def _twins(runs: Sequence[FoundRun]) -> list[str]:
  """Returns two runs that differ neither in their tokens nor in their seed; [] if there are none."""
  seen: dict[tuple[float, int], FoundRun] = {}
  for run in (run for run in runs if run.finished and run.last_eval):
    if (twin := seen.setdefault((length_of(_tokens(run)), run.config.seed), run)) is not run:
      return [str(twin.path), str(run.path)]
  return []


def _points(runs: Sequence[FoundRun]) -> Points:
  groups: dict[float, list[FoundRun]] = {}
  for run in runs:
    if run.finished and run.last_eval:
      groups.setdefault(length_of(_tokens(run)), []).append(run)
  found = {}
  for key, group in sorted(groups.items()):
    rates = [record['tokens_per_second'] for run in group for record in run.of_kind('train')]
    tokens = statistics.fmean(run.tokens or _tokens(run) for run in group)
    losses = {run.config.seed: run.last_eval['loss'] for run in group}
    found[key] = Point(tokens, losses, group[0].config, tokens / statistics.median(rates) if rates else None)
  return found


def length_of(tokens: float) -> float:
  """Returns tokens to two digits: runs that agree in them are of equal length, whole updates or not."""
  return float(f'{tokens:.2g}')


def _tokens(run: FoundRun) -> int:
  """Returns the positions of all updates, padding too: the same for runs of one length, whatever their seed."""
  return run.config.update_positions * (run.total or 0)


def _lead_points(first: Points, model: Points) -> list[dict[str, Any]]:
  found = []
  for key in (key for key in model if key in first):
    a, b = first[key].losses, model[key].losses
    same = same_batches(first[key].config, model[key].config)
    lead = difference(b, a, same=same)
    found.append(
      {
        'tokens': model[key].tokens,
        'loss': statistics.fmean(b.values()),
        'lead': lead.mean,
        'standard_error': lead.standard_error,
        'seeds': {seed: a[seed] - b[seed] for seed in paired_seeds(a, b, same=same)},
        'seconds': model[key].seconds,
      }
    )
  return found


def fit(form: Form, points: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
  """Fits a form to the leads of at least two points; None where its line cannot hold one, as no log is below 0.

  Ranges are those of the fits that leave out one point of three or more, and that take one of the `paired_seeds` at
  each point, where it has any: of the refits. They are None where the form cannot hold one of these; `refits_without`
  says how many of how many.
  """
  tokens, lead = (np.array([point[name] for point in points], float) for name in ('tokens', 'lead'))
  line = fit_line(form, tokens, lead)
  if line is None:
    return None
  lines, without, refits = _refits(form, tokens, lead, points)
  known = [] if without else lines  # a range of what is left would hide what speaks against the form
  a, b = form.parameters(*line)
  slopes = [form.parameters(*other)[1] for other in known]
  predictions = {}
  for far in FAR:
    ends = [float(at(form, other, far)) for other in known]
    predictions[f'{far:g}'] = {'lead': float(at(form, line, far)), 'range': _range(ends)}
  residual = float(np.sqrt(np.mean(np.square(at(form, line, tokens) - lead))))
  ranges = {'b_range': _range(slopes), 'refits_without': [without, refits]}
  return {'a': a, 'b': b, **ranges, 'residual': residual, 'at': predictions}


def fit_line(form: Form, tokens: np.ndarray, lead: np.ndarray) -> tuple[float, float] | None:
  """Returns value at ln(tokens) = 0 and slope of a line through floats; None where the form cannot hold a lead."""
  y = _on_line(form, lead)
  if not np.isfinite(y).all():
    return None
  slope, start = np.polyfit(np.log(tokens), y, 1)
  return float(start), float(slope)


def _on_line(form: Form, lead: np.ndarray) -> np.ndarray:
  with np.errstate(invalid='ignore', divide='ignore'):
    return form.to_line(lead)


def at(form: Form, line: tuple[float, float], tokens: np.ndarray | float) -> np.ndarray:
  """Returns the lead that a fitted line says after so many tokens, nats, float64."""
  return form.to_lead(line[0] + line[1] * np.log(tokens))


def _refits(
  form: Form, tokens: np.ndarray, lead: np.ndarray, points: Sequence[Mapping[str, Any]]
) -> tuple[list[tuple[float, float] | None], int, int]:
  """Fits without one of three or more points, and with one seed at each point.

  Returns:
    The lines, of all choices of seeds only those that say the most and the least; how many refits the form cannot hold;
    how many there are.
  """
  lines = [fit_line(form, np.delete(tokens, i), np.delete(lead, i)) for i in range(len(tokens)) if len(tokens) > 2]
  without, refits = lines.count(None), len(lines)
  seeds = [list(point['seeds'].values()) or [point['lead']] for point in points]
  if any(len(own) > 1 for own in seeds):
    choices = math.prod(map(len, seeds))
    held = math.prod(int(np.isfinite(_on_line(form, np.array(own))).sum()) for own in seeds)
    without, refits = without + choices - held, refits + choices
    # What a line says is a sum over its points, which tokens alone weigh: it is at an end where each point is at one.
    low_X, high_X = (np.array([end(own) for own in seeds]) for end in (min, max))
    x = np.log(tokens)
    slope_X = (x - x.mean()) / np.sum(np.square(x - x.mean()))
    for weight_X in (slope_X, *(1 / len(x) + (math.log(far) - x.mean()) * slope_X for far in FAR)):
      lines += [fit_line(form, tokens, np.where(up_X, high_X, low_X)) for up_X in (weight_X > 0, weight_X < 0)]
  return lines, without, refits


def _range(values: Sequence[float]) -> list[float] | None:
  return [min(values), max(values)] if values else None


def _equal_time(first: Points, model: Points) -> list[dict[str, Any]]:
  """Returns its loss after the time that each run of the first took, between its own runs by log(seconds)."""
  timed = [(np.log(p.seconds), statistics.fmean(p.losses.values())) for p in model.values() if p.seconds]
  timed = np.array(sorted(timed))  # a longer run may have had a faster machine
  found = []
  for point in (p for p in first.values() if p.seconds):
    loss = np.interp(np.log(point.seconds), *timed.T, math.nan, math.nan) if len(timed) else math.nan
    found.append(
      {
        'tokens': point.tokens,
        'seconds': point.seconds,
        'loss_first': statistics.fmean(point.losses.values()),
        'loss': None if math.isnan(loss) else float(loss),
      }
    )
  return found
