"""Plots that compare rows of runs: loss against tokens, FLOPs and seconds, and the difference to the first row."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import EngFormatter, Formatter, MaxNLocator, StrMethodFormatter

from mmjax.model.cost import flops_per_token
from mmjax.tools.compare_runs import FoundRun, Row, same_batches
from mmjax.tools.plots import GRID, INK

# x of a curve -> (title, unit on the axis, how numbers are written there)
WITH_PREFIX = EngFormatter(sep=' ')
AXES = {
  'tokens': ('Loss against tokens', 'training tokens', WITH_PREFIX),
  'flops': ('Loss against compute', 'FLOPs, forward and backward', WITH_PREFIX),
  'seconds': ('Loss against time', 'seconds of training', StrMethodFormatter('{x:,.0f}')),
}
START_SHARE = 0.15  # of the x-axis: losses higher than any beyond it are cut off, or the ends could not be told apart
FAINT = 0.35
GREY = 7  # of tab10: too near to the first row's ink


class Curve(NamedTuple):
  """A run's losses: `x` by axis, one value for each of `y`."""

  x: dict[str, np.ndarray]
  y: np.ndarray


def write_plots(rows: Sequence[Row], folder: Path, other_data: Sequence[bool]) -> dict[str, str]:
  """Draws PNG files.

  Args:
    rows: in the order of the table; the first is what the others are compared with.
    folder: where to write; it exists.
    other_data: of each row, whether it has no difference to the first because its text is another.

  Returns:
    File name -> caption; empty if no run reported anything.
  """
  curves = {kind: [[curve(run, kind) for run in row.runs] for row in rows] for kind in ('eval', 'train')}
  if not any(len(c.y) for row in curves['train'] for c in row):
    return {}
  smoothed = [[smooth(c) for c in row] for row in curves['train']]
  styles, captions = _styles(len(rows)), {}
  for axis, (title, unit, formatter) in AXES.items():
    figure = Figure(figsize=(11.5, 4.6), dpi=140, layout='constrained')
    left, right = figure.subplots(1, 2)
    _draw_losses(left, curves['eval'], axis, styles, marker='o')
    _draw_losses(right, smoothed, axis, styles, marker='')
    _finish(left, f'{title}: validation', unit, formatter, 'nats per token')
    _finish(right, f'{title}: training, smoothed', unit, formatter, '')
    _legend(figure, rows, styles)
    figure.savefig(folder / f'loss_{axis}.png')
    captions[f'loss_{axis}.png'] = f'{title}, one line a run, one colour a row; the start is cut off.'
  if len(rows) > 1 and any(len(c.y) for c in curves['eval'][0]):
    figure = Figure(figsize=(11.5, 4.6), dpi=140, layout='constrained')
    left, right = figure.subplots(1, 2)
    draw_differences(left, curves['eval'], rows, styles, 'o', other_data)
    draw_differences(right, smoothed, rows, styles, '', other_data)
    for axes in (left, right):
      axes.axhline(0, **styles[0], linewidth=2.2, zorder=3)
    title, (_, unit, formatter) = f'Loss minus that of {rows[0].name}', AXES['tokens']
    _finish(left, f'{title}: validation', unit, formatter, 'nats per token')
    _finish(right, f'{title}: training, smoothed', unit, formatter, '')
    _legend(figure, rows, styles)
    figure.savefig(folder / 'difference.png')
    captions['difference.png'] = (
      f'Loss minus that of {rows[0].name} at equal tokens, below 0 is better: the mean over common seeds '
      '(else over all), with one standard error where several are common.'
    )
  return captions


def curve(run: FoundRun, kind: str) -> Curve:
  """Returns a run's losses of a kind of record, 'train' or 'eval'; those that were not finite are left out."""
  train = {record['step']: record for record in run.of_kind('train')}
  # A run reports at every step at which it evaluates. Where it was stopped, it reported over a step or two: noise.
  every, last = run.config.train.log_interval if kind == 'train' else 1, max(train, default=0)
  points = [r for r in run.of_kind(kind) if r['step'] % every == 0 or r['step'] == last]
  points = [r for r in points if r['loss'] is not None and r['step'] in train]
  positions = run.config.train.update_rows * run.config.model.max_seq_len
  cost = positions * flops_per_token(run.config)['total']
  x = {
    'tokens': np.array([train[r['step']]['tokens'] for r in points], float),
    'flops': np.array([r['step'] * cost for r in points], float),
    'seconds': np.array([train[r['step']]['seconds'] for r in points], float),
  }
  return Curve(x, np.array([r['loss'] for r in points], float))


def smooth(c: Curve) -> Curve:
  """Returns the running mean over about a thirtieth of a curve."""
  width = 2 * (len(c.y) // 60) + 1  # odd, so that the mean is centred on a report
  if width == 1:
    return c
  inner = slice(width // 2, len(c.y) - width // 2)
  mean = np.convolve(c.y, np.ones(width) / width, mode='valid')
  return Curve({name: x[inner] for name, x in c.x.items()}, mean)


def differences(first: Sequence[Curve], others: Sequence[Curve]) -> tuple[np.ndarray, np.ndarray]:
  """Returns tokens and, for each pair of curves, how much higher the second is; the first is interpolated.

  Args:
    first: curves of the first row.
    others: as many curves, of the same seeds in the same order.

  Returns:
    tokens (points,), difference (pairs, points), over the tokens that all have reached.
  """
  least = max(c.x['tokens'][0] for c in (*first, *others))
  most = min(c.x['tokens'][-1] for c in (*first, *others))
  x = others[0].x['tokens']
  x = x[(x >= least) & (x <= most)]
  pairs = zip(first, others, strict=True)
  return x, np.array([np.interp(x, b.x['tokens'], b.y) - np.interp(x, a.x['tokens'], a.y) for a, b in pairs])


def _draw_losses(axes: Axes, rows: Sequence[Sequence[Curve]], axis: str, styles: Sequence[dict], marker: str) -> None:
  top, bottom = [], []
  for at, (row, style) in enumerate(zip(rows, styles, strict=True)):
    for number, c in enumerate(row):
      if not len(c.y):
        continue
      axes.plot(
        c.x[axis], c.y, **style, linewidth=2.2 if at == 0 else 1.5, alpha=1 if number == 0 else FAINT,
        marker=marker, markersize=3.5, zorder=3 if at == 0 else 2,
      )  # fmt: skip
      shown = c.y[c.x[axis] >= START_SHARE * c.x[axis][-1]]
      top.append(shown.max())
      bottom.append(shown.min())
  if top:
    room = 0.04 * (max(top) - min(bottom)) or 0.1
    axes.set_ylim(min(bottom) - room, max(top) + room)


def draw_differences(
  axes: Axes,
  curves: Sequence[Sequence[Curve]],
  rows: Sequence[Row],
  styles: Sequence[dict],
  marker: str,
  other_data: Sequence[bool],
) -> None:
  """Draws a line for each row but the first and those on other data, with a band of one standard error."""
  by_seed = [
    {run.config.seed: c for run, c in zip(row.runs, cs, strict=True) if len(c.y)}
    for row, cs in zip(rows, curves, strict=True)
  ]
  shown = []
  for at, (row, style) in enumerate(zip(by_seed, styles, strict=True)):
    if at == 0 or other_data[at]:
      continue
    common = [seed for seed in row if seed in by_seed[0]] if same_batches(rows[0], rows[at]) else []
    pairs = [(by_seed[0][seed], row[seed]) for seed in common]
    if not common and row:  # any with any: their mean is the difference of the means
      pairs = [(a, b) for a in by_seed[0].values() for b in row.values()]
    if not pairs:
      continue
    x, found = differences(*zip(*pairs, strict=True))
    mean = found.mean(axis=0)
    axes.plot(x, mean, **style, linewidth=1.5, marker=marker, markersize=3.5)
    if len(common) > 1:
      error = found.std(axis=0, ddof=1) / len(common) ** 0.5
      axes.fill_between(x, mean - error, mean + error, color=style['color'], alpha=0.2, linewidth=0)
    shown += [value for tokens, value in zip(x, mean, strict=True) if tokens >= START_SHARE * x[-1]]
  if shown:
    low, high = min(0, *shown), max(0, *shown)
    room = 0.12 * (high - low) or 0.1
    axes.set_ylim(low - room, high + room)


def _styles(n: int) -> list[dict]:
  """Colour and dashes for each row: ink for the first, then the colours one after the other, then again, dashed."""
  colours = [colour for at, colour in enumerate(matplotlib.colormaps['tab10'].colors) if at != GREY]
  dashes = ('-', '--', ':', '-.')
  others = [
    {'color': colours[at % len(colours)], 'linestyle': dashes[at // len(colours) % len(dashes)]} for at in range(n - 1)
  ]
  return [{'color': INK, 'linestyle': '-'}, *others]


def _legend(figure: Figure, rows: Sequence[Row], styles: Sequence[dict]) -> None:
  """Names the rows beside the plots, the best first, with their loss."""
  losses = [np.mean(list(row.losses().values())) if row.losses() else np.inf for row in rows]
  order = np.argsort(losses, kind='stable')
  lines = [Line2D([], [], **styles[at], linewidth=2.2) for at in order]
  names = [f'{rows[at].name}  {losses[at]:.3f}' if np.isfinite(losses[at]) else rows[at].name for at in order]
  figure.legend(lines, names, loc='outside right center', frameon=False, fontsize=9, labelcolor=INK)


def _finish(axes: Axes, title: str, x_unit: str, formatter: Formatter, y_unit: str) -> None:
  axes.set_title(title, loc='left', fontsize=11, color=INK)
  axes.set_xlabel(x_unit, color=INK)
  axes.set_ylabel(y_unit, color=INK)
  axes.set_xlim(left=0)
  axes.xaxis.set_major_locator(MaxNLocator(nbins=6, steps=[1, 2, 5, 10]))
  axes.xaxis.set_major_formatter(formatter)
  axes.yaxis.set_major_locator(MaxNLocator(steps=[1, 2, 5, 10]))
  axes.grid(color=GRID, linewidth=0.8)
  axes.set_axisbelow(True)
  axes.spines[['top', 'right']].set_visible(False)
