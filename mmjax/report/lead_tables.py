"""What is shown of leads that last or do not: tables, a word on what the fits are worth, and a plot."""

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mmjax.console import Table, number, rounded_tokens
from mmjax.report.draw import INK, Line, Panel, draw
from mmjax.report.lead import FAR, FORMS, at, fit_line, length_of

DASHES = {'power': '-', 'log': ':'}
EQUAL_TIME = (
  'The loss of a model after as many seconds as the run of {} took is that between its own finished runs, by '
  'log(seconds); "-" where that is before the first or after the last of them. It holds for runs on one machine that '
  'had it to themselves.'
)


def lead_blocks(found: Mapping[str, Any]) -> list[Table | str]:
  """Returns the tables and sentences that say what `find_lead` found."""
  models, first = found['models'], found['baseline']
  lengths = sorted({length_of(point['tokens']) for model in models.values() for point in model['points']})
  leads, fits, times = [], [], []
  for name, model in models.items():
    by_length = {length_of(point['tokens']): point for point in model['points']}
    kept = [(by_length.get(a), by_length.get(b)) for a, b in itertools.pairwise(lengths)]
    shares = [number(b['lead'] / a['lead'], '.0%') if a and b and a['lead'] > 0 else '-' for a, b in kept]
    leads.append([name, *(_lead(by_length.get(length)) for length in lengths), *shares])
    fits += [[name, FORMS[form].written, *_fit_cells(fitted)] for form, fitted in model['fits'].items()]
    cells = [_time_cell(entry) for entry in model['equal_time']]
    rates = [point['tokens'] / point['seconds'] for point in model['points'] if point['seconds']]
    times.append([name, number(float(np.median(rates)) if rates else None, ',.0f'), *cells])
  header = [rounded_tokens(length) for length in lengths]
  kept = [f'{b} over {a}' for a, b in itertools.pairwise(header)]
  far = [f'at {rounded_tokens(tokens)}' for tokens in FAR]
  own = next(iter(models.values()))['equal_time']  # of the first model, so the same in all
  rates = ', '.join(number(entry['tokens'] / entry['seconds'], ',.0f') for entry in own)
  after = [f'as long as {first} on {rounded_tokens(entry["tokens"])}' for entry in own]
  return [
    Table(['model', *header, *kept], leads, f'Lead over {first}, nats a token, after so many training tokens'),
    Table(['model', 'lead', 'a', 'b', 'residual', *far], fits, 'Fits of the lead, their ranges in brackets'),
    _worth(found),
    Table(['model', 'tokens/s', *after], times, f'Lead over {first} ({rates} tokens/s) after equal time of training'),
    EQUAL_TIME.format(first),
  ]


def _worth(found: Mapping[str, Any]) -> str:
  """Says how much the fits are worth."""
  points = max((model['points'] for model in found['models'].values()), key=len)
  least, most = points[0]['tokens'], points[-1]['tokens']
  beyond = f', and {rounded_tokens(FAR[-1])} is a factor of {FAR[-1] / most:.3g} beyond the last' * (FAR[-1] > most)
  return (
    f'What a fit is worth: it has two parameters and at most {len(points)} points, which leaves {len(points) - 2} to '
    f'contradict a form. The points span a factor of {most / least:.3g} in tokens{beyond}. A range is that of the '
    'refits, which leave out one of three or more points, or take one seed for each. It is not given where one of them '
    'cannot be: no power of tokens is negative, and a lead may be. It holds only as far as the form does. Where the '
    'two forms differ, these points do not tell which of them is right.'
  )


def _lead(point: Mapping[str, Any] | None) -> str:
  return '-' if point is None else number(point['lead'], '+.4f', point['standard_error'])


def _fit_cells(fitted: Mapping[str, Any] | None) -> list[str]:
  if fitted is None:
    return ['-'] * (3 + len(FAR))
  ends = [f'{x["lead"]:+.3f}{_brackets(x["range"])}' for x in fitted['at'].values()]
  without, refits = fitted['refits_without']
  b_range = f' [{without} of {refits} refits cannot be]' if without else _brackets(fitted['b_range'])
  return [f'{fitted["a"]:.4g}', f'{fitted["b"]:.3f}{b_range}', f'{fitted["residual"]:.4f}', *ends]


def _brackets(ends: Sequence[float] | None) -> str:
  return f' [{ends[0]:.3f}, {ends[1]:.3f}]' if ends else ''


def _time_cell(entry: Mapping[str, Any]) -> str:
  return '-' if entry['loss'] is None else number(entry['loss_first'] - entry['loss'], '+.4f')


def draw_lead(found: Mapping[str, Any], path: Path, styles: Sequence[Mapping[str, Any]]) -> str:
  """Draws leads and fits against tokens into a PNG file; returns its caption.

  Args:
    found: from `find_lead`.
    path: of the file.
    styles: of matplotlib, one for each model.
  """
  lines, legend = [], []
  end = max(FAR[-1], *(model['points'][-1]['tokens'] for model in found['models'].values()))
  for (name, model), style in zip(found['models'].items(), styles, strict=True):
    tokens, lead = (np.array([point[key] for point in model['points']]) for key in ('tokens', 'lead'))
    colour = {'color': style['color']}
    errors = [point['standard_error'] for point in model['points']]
    error = None if None in errors else np.array(errors)
    lines.append(Line(tokens, lead, colour | {'marker': 'o', 'linestyle': 'none', 'markersize': 6}, error))
    legend.append((name, colour))
    x = np.geomspace(tokens[0], end, 100)
    for name, form in FORMS.items():
      if line := fit_line(form, tokens, lead):
        lines.append(Line(x, at(form, line, x), colour | {'linestyle': DASHES[name]}))
  legend += [(form.written, {'color': INK, 'linestyle': DASHES[name]}) for name, form in FORMS.items()]
  title = f'Lead over {found["baseline"]} against tokens'
  draw(path, Panel(title, 'training tokens', 'nats per token', lines, zero_line=True, log_x=True), legend=legend)
  return f'{title}; beyond the last points stand the fits alone, as far as {rounded_tokens(end)}.'
