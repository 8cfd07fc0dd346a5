"""The plots of a run's report: one idea each, drawn from the lines of metrics.jsonl."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np

from mmjax.config.sublayers import layer_name
from mmjax.report.draw import BLUE, INK, RED, Line, Panel, draw, smoothed

Records = Sequence[dict[str, Any]]
# A number of each layer's memory between two reports -> (title, unit on the axis, scale).
BANK_PLOTS = {
  'used_share': ('Rows of the bank that were read', 'share of all rows', 'zero'),
  'effective_rows': ('Effective number of rows read', 'rows, exp(entropy of usage)', 'log'),
  'kl_to_uniform': ('Distance of row usage from uniform', 'KL divergence, nats', 'zero'),
  'hottest_share': ('Reads that went to the most read row', 'share of all reads', 'zero'),
  'gate_grad_norm': ("Gradient norm of the gate's query projection", 'L2 norm before clipping', 'log'),
  'key_grad_norm': ('Gradient norm of the sub-keys', 'L2 norm before clipping', 'log'),
}
# The same at evaluations -> (title, unit on the axis, a number to compare it with, drawn dashed, and what that is).
EVAL_PLOTS = {
  'kl_weighted': (
    'Distance of row usage from uniform, weighted', 'KL divergence, nats', 'kl_to_uniform', 'not weighted'
  ),
  'head_overlap': ('Rows that two heads of a token have in common', 'share of their rows', '', ''),
  'row_agreement': (
    'Positions with the same next token that have the same best row', 'share of positions', 'row_agreement_chance',
    'any two',
  ),
}  # fmt: skip
TRAIN_PLOTS = {
  'learning_rate': ('Learning rate', 'step size', 'zero', 'Learning rate.'),
  'grad_norm': ('Gradient norm', 'global L2 norm before clipping', 'log', 'Norm of the gradient before clipping.'),
  'tokens_per_second': ('Training speed', 'tokens per second', 'zero', 'Tokens per second, padding not counted.'),
}
SHARES = ('share', 'overlap', 'agreement')  # ends of names of numbers between 0 and 1


class Plot(NamedTuple):
  """A plot with its file's name and its caption."""

  name: str
  caption: str
  panel: Panel


def write_plots(records: Records, folder: Path) -> dict[str, str]:
  """Draws what the records hold into PNG files.

  Args:
    records: lines of metrics.jsonl.
    folder: created if it does not exist.

  Returns:
    File name -> caption, in the order of a report; empty if there is nothing to draw.
  """
  train, valid = ([r for r in records if r['kind'] == kind] for kind in ('train', 'eval'))
  if not train:
    return {}
  folder.mkdir(exist_ok=True)
  plots = [*_of_training(train, valid), *_of_memory(train, valid)]
  for plot in plots:
    draw(folder / plot.name, plot.panel)
  return {plot.name: plot.caption for plot in plots}


def _panel(title: str, unit: str, lines: list[Line], scale: str, **more: bool) -> Panel:
  return Panel(title, 'optimizer updates', unit, lines, scale, **more)


def _of_training(train: Records, valid: Records) -> Iterator[Plot]:
  steps, loss = _series(train, 'loss')
  at, mean, width = smoothed(steps, loss, parts=75)
  label = f'training, mean of {width} reports' if width > 1 else 'training'
  faint = [Line(steps, loss, {'color': BLUE, 'linewidth': 0.8, 'alpha': 0.4, 'label': 'training'})] if width > 1 else []
  lines = [*faint, Line(at, mean, {'color': BLUE, 'linewidth': 1.6, 'label': label})]
  if valid:
    steps, loss = _series(valid, 'loss')
    lines.append(Line(steps, loss, {'color': RED, 'marker': 'o', 'label': f'validation, {loss[-1]:.3f} at the end'}))
  panel = _panel('Loss', 'nats per token', lines, 'auto')
  yield Plot('loss.png', 'Loss on the training batches and on the validation set.', panel)
  for name, (title, unit, scale, caption) in TRAIN_PLOTS.items():
    yield Plot(f'{name}.png', caption, _panel(title, unit, [_line(train, name)], scale))


def _of_memory(train: Records, valid: Records) -> Iterator[Plot]:
  probed = [r | r['probes'] for r in valid if 'loss_zeroed' in r.get('probes', {}) and r['probes']['loss'] is not None]
  if probed:
    title, unit = 'What the model loses without its bank', 'nats per token more'
    caption = f'{title}: loss with the bank zeroed, and with its rows exchanged, over the loss as it is.'
    whole = _series(probed, 'loss')[1]
    lines = []
    for name, label, colour in (('loss_zeroed', 'bank zeroed', BLUE), ('loss_shuffled', 'rows exchanged', RED)):
      steps, loss = _series(probed, name)
      lines.append(Line(steps, loss - whole, {'color': colour, 'marker': 'o', 'label': label}))
    yield Plot('bank_changed.png', caption, _panel(title, unit, lines, 'auto', zero_line=True))
  for name, (title, unit, compared, what) in EVAL_PLOTS.items():
    if lines := _layer_lines(valid, name, compared, what):
      panel = _panel(title, unit, lines, 'zero', percent=name.endswith(SHARES))
      yield Plot(f'bank_{name}.png', f'{title}; on the validation set, by layer.', panel)
  for name, (title, unit, scale) in BANK_PLOTS.items():
    if lines := _layer_lines(train, name):
      panel = _panel(title, unit, lines, scale, percent=name.endswith(SHARES))
      yield Plot(f'bank_{name}.png', f'{title}, between two reports on the training batches, by layer.', panel)
  if moved := [r | r['probes'] for r in train if r.get('probes')]:
    title = 'How far an update moves the rows that it reads'
    panel = _panel(title, 'update over weight', [_line(moved, 'row_update_ratio')], 'log')
    yield Plot('bank_row_update_ratio.png', f'{title}: norm of the update over norm of the rows.', panel)


def _line(records: Records, name: str) -> Line:
  steps, values = _series(records, name)
  return Line(steps, values, {'color': BLUE, 'linewidth': 1.4 if len(steps) < 300 else 0.8})


def _layer_lines(records: Records, name: str, compared: str = '', what: str = '') -> list[Line]:
  """Returns a line for each layer that has a number of the bank: older logs, or a model with one head, may not."""
  known = [r for r in records if r.get('bank') and any(health.get(name) is not None for health in r['bank'])]
  layers = [health['layer'] for health in known[0]['bank'] if health.get(name) is not None] if known else []
  marker = {'marker': 'o'} if known and known[0]['kind'] == 'eval' else {}  # few and far between
  lines = []
  for layer, colour in zip(layers, matplotlib.colormaps['viridis'](np.linspace(0.0, 0.9, len(layers))), strict=True):
    of_layer = [{'step': r['step']} | next(h for h in r['bank'] if h['layer'] == layer) for r in known]
    lines.append(Line(*_series(of_layer, name), {'color': colour, 'label': layer_name(layer)} | marker))
    if compared:
      lines.append(Line(*_series(of_layer, compared), {'color': colour, 'linestyle': '--'} | marker))
  return lines + ([Line([], [], {'color': INK, 'linestyle': '--', 'label': what})] if compared and lines else [])


def _series(records: Records, name: str) -> tuple[np.ndarray, np.ndarray]:
  """Returns steps and values; a value that was not finite is null in the log and a gap in the line."""
  values = [np.nan if r.get(name) is None else r[name] for r in records]
  return np.array([r['step'] for r in records]), np.array(values, float)
