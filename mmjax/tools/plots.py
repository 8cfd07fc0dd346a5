"""The plots of a run's report: one idea each, drawn from the lines of metrics.jsonl."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter, PercentFormatter

Records = Sequence[dict[str, Any]]

INK, TRAIN, VALID, GRID = '#333333', '#4c78a8', '#e45756', '#e6e6e6'
# A number of each layer's memory between two reports -> (title, unit on the axis, logarithmic).
BANK_PLOTS = {
  'used_share': ('Rows of the bank that were read', 'share of all rows', False),
  'effective_rows': ('Effective number of rows read', 'rows, exp(entropy of usage)', True),
  'kl_to_uniform': ('Distance of row usage from uniform', 'KL divergence, nats', False),
  'hottest_share': ('Reads that went to the most read row', 'share of all reads', False),
  'gate_grad_norm': ("Gradient norm of the gate's query projection", 'L2 norm before clipping', True),
  'key_grad_norm': ('Gradient norm of the sub-keys', 'L2 norm before clipping', True),
}
# The same at evaluations -> (title, unit on the axis, a number to compare it with, drawn dashed, and what that is).
EVAL_PLOTS = {
  'kl_weighted': (
    'Distance of row usage from uniform, weighted by scores', 'KL divergence, nats', 'kl_to_uniform', 'not weighted'
  ),
  'head_overlap': ('Rows that two heads of a token have in common', 'share of their rows', None, ''),
  'row_agreement': (
    'Positions with the same next token that have the same best row', 'share of positions', 'row_agreement_chance',
    'any two',
  ),
}  # fmt: skip


def write_plots(records: Records, folder: Path) -> dict[str, str]:
  """Draws what the records hold into PNG files.

  Args:
    records: lines of metrics.jsonl.
    folder: created if it does not exist.

  Returns:
    File name -> caption, in the order of a report; empty if there is nothing to draw.
  """
  train = [r for r in records if r['kind'] == 'train']
  valid = [r for r in records if r['kind'] == 'eval']
  if not train:
    return {}
  folder.mkdir(exist_ok=True)
  captions = {}

  def save(name: str, caption: str, draw: Callable[[Axes], None], title: str, unit: str) -> None:
    figure = Figure(figsize=(7.2, 4.0), dpi=140, layout='constrained')
    axes = figure.subplots()
    draw(axes)
    _finish(axes, title, unit)
    figure.savefig(folder / name)
    captions[name] = caption

  caption = 'Loss on the training batches and on the validation set.'
  save('loss.png', caption, lambda axes: _draw_loss(axes, train, valid), 'Loss', 'nats per token')
  for name, title, unit, log, caption in (
    ('learning_rate', 'Learning rate', 'step size', False, 'Learning rate.'),
    ('grad_norm', 'Gradient norm', 'global L2 norm before clipping', True, 'Norm of the gradient before clipping.'),
    ('tokens_per_second', 'Training speed', 'tokens per second', False, 'Tokens per second, padding not counted.'),
  ):
    save(f'{name}.png', caption, lambda axes, n=name, g=log: _draw_line(axes, train, n, g), title, unit)
  probed = [r for r in valid if r.get('probes', {}).get('loss') is not None]
  if probed:
    title = 'What the model loses without its bank'
    caption = f'{title}: loss with the bank zeroed, and with its rows exchanged, over the loss as it is.'
    save('bank_changed.png', caption, lambda axes: _draw_changed(axes, probed), title, 'nats per token more')
  for name, (title, unit, *compared) in EVAL_PLOTS.items():
    if lines := _with_bank(valid, name):
      caption = f'{title}; on the validation set, by layer.'
      save(
        f'bank_{name}.png', caption, lambda axes, r=lines, n=name, c=compared: _draw_layers(axes, r, n, *c), title, unit
      )
  for name, (title, unit, log) in BANK_PLOTS.items():
    if lines := _with_bank(train, name):
      caption = f'{title}, between two reports on the training batches, by layer.'
      save(
        f'bank_{name}.png', caption, lambda axes, r=lines, n=name, g=log: _draw_layers(axes, r, n, log=g), title, unit
      )
  moved = [{'step': r['step']} | r['probes'] for r in train if r.get('probes')]
  if moved:
    title = 'How far an update moves the rows that it reads'
    save(
      'bank_row_update_ratio.png',
      f'{title}: norm of the update over norm of the rows.',
      lambda axes: _draw_line(axes, moved, 'row_update_ratio', True),
      title,
      'update over weight',
    )
  return captions


def _draw_loss(axes: Axes, train: Records, valid: Records) -> None:
  steps, loss = _series(train, 'loss')
  width = 2 * (len(loss) // 150) + 1  # odd, so that the mean is centred on a report
  axes.plot(
    steps, loss, color=TRAIN, linewidth=1.4 if width == 1 else 0.8, alpha=0.4 if width > 1 else 1, label='training'
  )
  if width > 1:
    mean = np.convolve(loss, np.ones(width) / width, mode='valid')
    centre = steps[width // 2 : len(steps) - width // 2]
    axes.plot(centre, mean, color=TRAIN, linewidth=1.6, label=f'training, mean of {width} reports')
  if valid:
    steps, loss = _series(valid, 'loss')
    axes.plot(steps, loss, color=VALID, linewidth=1.6, marker='o', markersize=4, label='validation')
    axes.annotate(f'{loss[-1]:.3f}', (steps[-1], loss[-1]), (0, 7), textcoords='offset points', ha='right', color=VALID)
  axes.legend(frameon=False)


def _draw_line(axes: Axes, train: Records, name: str, log: bool) -> None:
  steps, values = _series(train, name)
  axes.plot(steps, values, color=TRAIN, linewidth=1.4 if len(steps) < 300 else 0.8)
  if log and not (values <= 0).any():  # a gap, NaN, is not
    axes.set_yscale('log')
  else:
    axes.set_ylim(bottom=0)


def _draw_layers(
  axes: Axes, records: Records, name: str, compared: str | None = None, what: str = '', log: bool = False
) -> None:
  steps = [r['step'] for r in records]
  layers = [health['layer'] for health in records[0]['bank'] if health.get(name) is not None]
  colours = matplotlib.colormaps['viridis'](np.linspace(0.0, 0.9, len(layers)))
  marker = 'o' if records[0]['kind'] == 'eval' else None  # few and far between
  lowest = np.inf
  for layer, colour in zip(layers, colours, strict=True):
    of_layer = [next(health for health in r['bank'] if health['layer'] == layer) for r in records]
    for number, style, label in ((name, '-', f'layer {layer}'), (compared, '--', None)):
      if number is not None:
        values = np.array([health.get(number) for health in of_layer], float)
        axes.plot(steps, values, style, color=colour, linewidth=1.4, marker=marker, markersize=3, label=label)
        lowest = min(lowest, np.nanmin(values, initial=np.inf))
  if compared is not None:
    axes.plot([], [], '--', color=INK, linewidth=1.4, label=what)
  if log and lowest > 0:
    axes.set_yscale('log')
  else:
    axes.set_ylim(bottom=0)
  if name.endswith(('share', 'overlap', 'agreement')):
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
  axes.legend(frameon=False, loc='center left', bbox_to_anchor=(1.0, 0.5))


def _with_bank(records: Records, name: str) -> list[dict[str, Any]]:
  """Returns the records that have a number of the bank in some layer: older logs, or a model with one head, may not."""
  return [r for r in records if r.get('bank') and any(health.get(name) is not None for health in r['bank'])]


def _draw_changed(axes: Axes, probed: Records) -> None:
  steps = [r['step'] for r in probed]
  axes.axhline(0, color=INK, linewidth=0.8)
  for name, label, colour in (('loss_zeroed', 'bank zeroed', TRAIN), ('loss_shuffled', 'rows exchanged', VALID)):
    more = [np.nan if r['probes'][name] is None else r['probes'][name] - r['probes']['loss'] for r in probed]
    axes.plot(steps, more, color=colour, linewidth=1.6, marker='o', markersize=4, label=label)
  axes.legend(frameon=False)


def _series(records: Records, name: str) -> tuple[np.ndarray, np.ndarray]:
  """Returns steps and values; a value that was not finite is null in the log and a gap in the line."""
  values = [np.nan if r[name] is None else r[name] for r in records]
  return np.array([r['step'] for r in records]), np.array(values, float)


def _finish(axes: Axes, title: str, unit: str) -> None:
  axes.set_title(title, loc='left', fontsize=12, color=INK)
  axes.set_xlabel('optimizer updates', color=INK)
  axes.set_ylabel(unit, color=INK)
  axes.set_xlim(left=0)
  axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
  axes.xaxis.set_major_formatter(FuncFormatter(_number))
  if axes.get_yscale() == 'log':
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5)))
    axes.yaxis.set_minor_formatter(NullFormatter())
  else:
    axes.yaxis.set_major_locator(MaxNLocator(steps=[1, 2, 5, 10]))
  if not isinstance(axes.yaxis.get_major_formatter(), PercentFormatter):
    axes.yaxis.set_major_formatter(FuncFormatter(_number))
  axes.grid(color=GRID, linewidth=0.8)
  axes.set_axisbelow(True)
  axes.spines[['top', 'right']].set_visible(False)


def _number(value: float, _: int) -> str:
  """Writes 0.0002 as 2e-04, 0.25 as 0.25 and 14000 as 14,000."""
  if value and abs(value) < 1e-3:
    return f'{value:.1e}'.replace('.0e', 'e')
  return f'{value:,.0f}' if abs(value) >= 1000 else f'{value:g}'
