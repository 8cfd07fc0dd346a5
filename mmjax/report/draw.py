"""Draws lines into PNG files; every plot of a report and of a comparison looks like this."""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import EngFormatter, FuncFormatter, LogLocator, MaxNLocator, NullFormatter, PercentFormatter

from mmjax.files import write_file

INK, BLUE, RED, GRID = '#333333', '#4c78a8', '#e45756', '#e6e6e6'
FEW_LABELS = 3  # more of them stand beside the plot
LEAST_RATIO = 5  # of the largest value to the least, for a logarithmic axis: then it has two labels of 1, 2, 5, 10
LEAST_SPAN = 0.01  # of an axis that does not begin at 0, over its largest value: what hardly varies is drawn so


class Line(NamedTuple):
  """A curve: matplotlib's `style` of it and, where it has one, its error, which is drawn as a band."""

  x: Any
  y: Any
  style: dict[str, Any]
  error: np.ndarray | None = None


class Panel(NamedTuple):
  """One plot of a figure.

  `scale`: 'log', where all values are positive and far apart, else as 'zero'; 'zero', from 0 on; 'auto', where the
  values are or within `limits`.
  """

  title: str
  x_unit: str
  y_unit: str
  lines: Sequence[Line]
  scale: str = 'auto'
  limits: tuple[float, float] | None = None
  percent: bool = False
  zero_line: bool = False
  log_x: bool = False


def draw(path: Path, *panels: Panel, legend: Sequence[tuple[str, dict[str, Any]]] = ()) -> None:
  """Draws panels side by side, with a legend of names and styles for all; without one, each labels its own lines."""
  figure = Figure(figsize=(7.2, 4.0) if len(panels) == 1 else (11.5, 4.6), dpi=140, layout='constrained')
  for axes, panel in zip(np.ravel(figure.subplots(1, len(panels))), panels, strict=True):
    if panel.zero_line:
      axes.axhline(0, color=INK, linewidth=0.8)
    for line in panel.lines:
      axes.plot(line.x, line.y, **{'linewidth': 1.4, 'markersize': 3.5} | line.style)
      if line.error is not None:
        low, high = line.y - line.error, line.y + line.error
        axes.fill_between(line.x, low, high, color=line.style['color'], alpha=0.2, linewidth=0)
    _finish(axes, panel)
    labels = axes.get_legend_handles_labels()[1]
    if labels and not legend:
      beside = {'loc': 'center left', 'bbox_to_anchor': (1.0, 0.5)} if len(labels) > FEW_LABELS else {}
      axes.legend(frameon=False, **beside)
  if legend:
    handles = [Line2D([], [], label=name, **style | {'linewidth': 2.2}) for name, style in legend]
    figure.legend(handles=handles, loc='outside right center', frameon=False, fontsize=9, labelcolor=INK)
  png = io.BytesIO()
  figure.savefig(png, format='png')
  write_file(path, png.getvalue())


def _finish(axes: Axes, panel: Panel) -> None:
  axes.set_title(panel.title, loc='left', fontsize=11, color=INK)
  axes.set_xlabel(panel.x_unit, color=INK)
  axes.set_ylabel(panel.y_unit, color=INK)
  if panel.log_x:
    axes.set_xscale('log')
  else:
    axes.set_xlim(left=0)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True, steps=[1, 2, 5, 10]))
  axes.xaxis.set_major_formatter(EngFormatter(sep=' '))
  values = np.array([value for line in panel.lines for value in line.y], float)
  values = values[np.isfinite(values)]  # NaN is a gap
  least, most = values.min(initial=np.inf), values.max(initial=-np.inf)
  if panel.scale == 'log' and 0 < LEAST_RATIO * least <= most:
    axes.set_yscale('log')
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if most < 1e3 * least else (1,)))
    axes.yaxis.set_minor_formatter(NullFormatter())
  else:
    axes.yaxis.set_major_locator(MaxNLocator(steps=[1, 2, 5, 10]))
    low, high = axes.get_ylim()
    if panel.limits:
      low, high = panel.limits
    elif panel.scale == 'auto':
      room = max(0, LEAST_SPAN * max(abs(low), abs(high)) - (high - low)) / 2
      low, high = low - room, high + room
    else:
      low = 0 if least > 0 else -0.03 * high  # or the axis would hide a line at 0
    axes.set_ylim(low, high)
  axes.yaxis.set_major_formatter(PercentFormatter(1.0) if panel.percent else FuncFormatter(_number))
  axes.grid(color=GRID, linewidth=0.8)
  axes.set_axisbelow(True)
  axes.spines[['top', 'right']].set_visible(False)


def _number(value: float, _: int) -> str:
  """Writes 0.0002 as 2e-04, 0.25 as 0.25 and 14000 as 14,000."""
  if value and abs(value) < 1e-3:
    return f'{value:.1e}'.replace('.0e', 'e')
  return f'{value:,.0f}' if abs(value) >= 1000 else f'{value:g}'


def smoothed(x: np.ndarray, y: np.ndarray, parts: int) -> tuple[np.ndarray, np.ndarray, int]:
  """Returns x and the running mean of y, float (X,), over about 1/`parts` of it, and over how many values that is."""
  width = 2 * (len(y) // (2 * parts)) + 1  # odd, so that the mean is centred on a value
  inner = slice(width // 2, len(y) - width // 2)
  return x[inner], np.convolve(y, np.ones(width) / width, mode='valid') if len(y) else y, width
