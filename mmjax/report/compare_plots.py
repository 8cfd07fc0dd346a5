"""Plots that compare rows of runs: loss against tokens, FLOPs and seconds, and the difference to the first row."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np

from mmjax.model.cost import flops_per_token
from mmjax.report.draw import INK, Line, Panel, draw, smoothed
from mmjax.report.found import FoundRun
from mmjax.report.rows import Row, paired_seeds, same_batches

AXES = {  # x of a curve -> (title, unit on the axis)
  'tokens': ('Loss against tokens', 'training tokens'),
  'flops': ('Loss against compute', 'FLOPs, forward and backward'),
  'seconds': ('Loss against time', 'seconds of training'),
}
START_SHARE = 0.15  # of the x-axis: losses higher than any beyond it are cut off, or the ends could not be told apart
GREY = 7  # of tab10: too near to the first row's ink
MARKED = {'eval': {'marker': 'o'}, 'train': {}}
PANELS = {'eval': 'validation', 'train': 'training, smoothed'}


class Curve(NamedTuple):
  """A run's losses: `x` by axis, one value for each of `y`."""

  x: dict[str, np.ndarray]
  y: np.ndarray


Curves = Sequence[Sequence[Curve]]  # of each row, of each run


def write_plots(rows: Sequence[Row], folder: Path, other_data: Sequence[bool]) -> dict[str, str]:
  """Draws PNG files.

  Args:
    rows: in the order of the table; the first is what the others are compared with.
    folder: where to write; it exists.
    other_data: of each row, whether it has no difference to the first because its text is another.

  Returns:
    File name -> caption; empty if no run reported anything.
  """
  curves = {kind: [[curve(run, kind) for run in row.runs] for row in rows] for kind in PANELS}
  if not any(len(c.y) for row in curves['train'] for c in row):
    return {}
  curves['train'] = [[_smooth(c) for c in row] for row in curves['train']]
  styles, captions = row_styles(len(rows)), {}
  legend = _legend(rows, styles)
  for axis, (title, unit) in AXES.items():
    panels = [
      Panel(f'{title}: {what}', unit, 'nats per token', *_loss_lines(curves[kind], axis, styles, MARKED[kind]))
      for kind, what in PANELS.items()
    ]
    draw(folder / f'loss_{axis}.png', *panels, legend=legend)
    captions[f'loss_{axis}.png'] = f'{title}, one line a run, one colour a row; the start is cut off.'
  if len(rows) > 1 and any(len(c.y) for c in curves['eval'][0]):
    title, unit = f'Loss minus that of {rows[0].name}', AXES['tokens'][1]
    panels = []
    for kind, what in PANELS.items():
      lines = difference_lines(curves[kind], rows, styles, MARKED[kind], other_data)
      ends = [value for line in lines for value in line.y[line.x >= START_SHARE * line.x[-1]]]
      limits = _limits([0, *ends], 0.12)
      panels.append(Panel(f'{title}: {what}', unit, 'nats per token', lines, limits=limits, zero_line=True))
    draw(folder / 'difference.png', *panels, legend=legend)
    captions['difference.png'] = (
      f'Loss minus that of {rows[0].name} at equal tokens, below 0 is better: the mean over the seeds that are '
      'paired, as in the table, with one standard error of several; else the difference of the means.'
    )
  return captions


def curve(run: FoundRun, kind: str) -> Curve:
  """Returns a run's losses of a kind of record, 'train' or 'eval'; those that were not finite are left out."""
  train = {record['step']: record for record in run.of_kind('train')}
  # A run reports at every step at which it evaluates. Where it was stopped, it reported over a step or two: noise.
  every, last = run.config.train.log_interval if kind == 'train' else 1, max(train, default=0)
  points = [r for r in run.of_kind(kind) if r['step'] % every == 0 or r['step'] == last]
  points = [r for r in points if r['loss'] is not None and r['step'] in train]
  cost = run.config.update_positions * flops_per_token(run.config)['total']
  x = {name: np.array([train[r['step']][name] for r in points], float) for name in ('tokens', 'seconds')}
  x['flops'] = np.array([r['step'] * cost for r in points], float)
  return Curve(x, np.array([r['loss'] for r in points], float))


def _smooth(c: Curve) -> Curve:
  return Curve({name: smoothed(x, c.y, parts=30)[0] for name, x in c.x.items()}, smoothed(c.y, c.y, parts=30)[1])


def _loss_lines(curves: Curves, axis: str, styles: Sequence[dict], marked: dict) -> tuple[list[Line], str, Any]:
  """Returns a line for each run, the others of a row fainter than its first; the kind of scale, and its limits."""
  lines, ends = [], []
  for row, style in zip(curves, styles, strict=True):
    for at, c in enumerate(row):
      if len(c.y):
        lines.append(Line(c.x[axis], c.y, style | marked | {'alpha': 0.35 if at else 1}))
        shown = c.y[c.x[axis] >= START_SHARE * c.x[axis][-1]]
        ends += [shown.min(), shown.max()]
  return lines, 'auto', _limits(ends, 0.04)


def difference_lines(
  curves: Curves, rows: Sequence[Row], styles: Sequence[dict], marked: dict, other_data: Sequence[bool]
) -> list[Line]:
  """Returns a line for each row but the first and those on other data, with its standard error where seeds pair up."""
  by_seed = [
    {run.config.seed: c for run, c in zip(row.runs, cs, strict=True) if len(c.y) and run in row.counted}
    for row, cs in zip(rows, curves, strict=True)
  ]
  first, lines = by_seed[0], []
  for row, by, style, other in list(zip(rows, by_seed, styles, other_data, strict=True))[1:]:
    common = paired_seeds(first, by, same=same_batches(rows[0].runs[0].config, row.runs[0].config))
    pairs = [(first[seed], by[seed]) for seed in common]
    if not common:  # any with any: their mean is the difference of the means
      pairs = [(a, b) for a in first.values() for b in by.values()]
    if not pairs or other:
      continue
    x, found = differences(*zip(*pairs, strict=True))
    error = found.std(axis=0, ddof=1) / len(common) ** 0.5 if len(common) > 1 else None
    if len(x):
      lines.append(Line(x, found.mean(axis=0), style | marked, error))
  return lines


def differences(first: Sequence[Curve], others: Sequence[Curve]) -> tuple[np.ndarray, np.ndarray]:
  """Returns tokens and, for each pair of curves, how much higher the second is; the first is interpolated.

  Args:
    first: curves of the first row.
    others: as many curves, of the same seeds in the same order.

  Returns:
    tokens, numbers (points,), and difference, float64 (pairs, points), over the tokens that all have reached.
  """
  least = max(c.x['tokens'][0] for c in (*first, *others))
  most = min(c.x['tokens'][-1] for c in (*first, *others))
  x = others[0].x['tokens']
  x = x[(x >= least) & (x <= most)]
  pairs = zip(first, others, strict=True)
  return x, np.array([np.interp(x, b.x['tokens'], b.y) - np.interp(x, a.x['tokens'], a.y) for a, b in pairs])


def _limits(values: Sequence[float], room: float) -> tuple[float, float] | None:
  """Returns the least and the greatest value with some room around them."""
  if not values:
    return None
  space = room * (max(values) - min(values)) or 0.1
  return min(values) - space, max(values) + space


def row_styles(n: int) -> list[dict[str, Any]]:
  """Colour and dashes for each row: ink for the first, then the colours one after the other, then again, dashed."""
  colours = [colour for at, colour in enumerate(matplotlib.colormaps['tab10'].colors) if at != GREY]
  dashes = ('-', '--', ':', '-.')
  first = {'color': INK, 'linestyle': '-', 'linewidth': 2.2, 'zorder': 3}
  return [first] + [
    {'color': colours[at % len(colours)], 'linestyle': dashes[at // len(colours) % len(dashes)]} for at in range(n - 1)
  ]


def _legend(rows: Sequence[Row], styles: Sequence[dict]) -> list[tuple[str, dict[str, Any]]]:
  """Names the rows, the best first, with their loss."""
  losses = [np.mean(list(row.losses.values())) if row.losses else np.inf for row in rows]
  return [
    (f'{rows[at].name}  {losses[at]:.3f}' if np.isfinite(losses[at]) else rows[at].name, styles[at])
    for at in np.argsort(losses, kind='stable')
  ]
