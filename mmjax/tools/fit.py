"""Says whether a config fits on an NVIDIA GPU, and the least time that it takes there; needs no GPU, driver or network.

python -m mmjax.tools.fit --config configs/exp_1_4_2.py --gpu rtx4090 [--devices 8] [--config.section.field=value ...]

The whole train step is compiled for the card, and again to find the largest micro-batch that fits, without and with
rematerialisation: four to seven times in all, once with --no_search, 10 to 30 s each, two at a time (product_key_bag
takes longer). Times are a bound from counted bytes and products (mmjax/ahead/count.py), not a measurement. On a machine
with an NVIDIA GPU the same command also measures. --markdown prints rows as in BENCHMARKS.md, for several cards with
commas between them. Exit codes: 0 done, 2 user error.
"""

import importlib
import json
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from mmjax.ahead.cards import CARDS, find_card
from mmjax.ahead.compiler import compile_for, measured_here, prepare_environment
from mmjax.ahead.count import describe_kernels
from mmjax.ahead.estimate import Estimate, check_card, estimate, largest_batch, memory_share, peak_bytes, same_update
from mmjax.config import load_config
from mmjax.console import Table, command_parser, markdown, show
from mmjax.errors import UserError, interrupt_ends_at_once, run_command
from mmjax.run.nvidia import find_driver

GB = 1e9


def main() -> None:
  """Flags -> config -> compile -> count -> print."""
  parser = command_parser('fit', __doc__)
  parser.add_argument('--config', required=True, help='config file')
  parser.add_argument('--gpu', required=True, help=f'{", ".join(CARDS)}, or a file that describes a card')
  parser.add_argument('--devices', type=int, default=1, help='how many of them, in one machine')
  parser.add_argument('--top', type=int, default=10, help='how many operations to show')
  parser.add_argument('--no_search', action='store_true', help='do not look for the largest micro-batch')
  form = parser.add_mutually_exclusive_group()
  form.add_argument('--json', action='store_true', help='print everything as JSON')
  form.add_argument('--markdown', action='store_true', help='print a row of a table for each card')
  arguments, overrides = parser.parse_known_args()
  config = load_config(arguments.config, overrides)
  names = arguments.gpu.split(',') if arguments.markdown else [arguments.gpu]
  cards = [find_card(name) for name in names]
  for name, least in (('devices', 1), ('top', 0)):
    if (value := getattr(arguments, name)) < least:
      raise UserError(f'--{name}={value} must be at least {least}')
  for card in cards:
    check_card(config, card)
  has_gpu = find_driver() is not None
  prepare_environment()  # which hides a GPU from this process, and must come before JAX does
  with interrupt_ends_at_once():
    importlib.import_module('mmjax.training.learner')  # and JAX with it
  rows = []
  for card in cards:
    found = estimate(config, card, arguments.devices)
    batches = {} if arguments.no_search else search(found)
    if arguments.markdown:
      rows.append(markdown_row(found, batches))
      continue
    measured = measured_here(arguments.config, overrides, arguments.devices) if has_gpu else None
    content = as_dict(found, batches, arguments.top) | {'measured': measured}
    if arguments.json:
      print(json.dumps(content, indent=2))
    else:
      print_report(found, content)
  if rows:
    print(markdown(Table(list(rows[0]), [list(row.values()) for row in rows])), end='')


def search(found: Estimate) -> dict[str, dict[str, Any]]:
  """Finds the largest micro-batch by `runtime.remat`; what it is, its peak, and settings for the same update."""
  config, train = found.config, found.config.train
  rows = train.update_rows
  room = (found.usable_bytes - found.fixed_bytes) / (found.peak_bytes - found.fixed_bytes) * train.batch_size
  step = found.devices * (1 if room < 64 * found.devices else 8)

  def largest(remat: str) -> dict[str, Any]:
    def peak_of(batch: int) -> int:
      other = config.with_settings({'train.batch_size': batch, 'runtime.remat': remat})
      return peak_bytes(compile_for(other, found.card, found.devices))

    known: dict[int, float] = {0: found.fixed_bytes}
    if remat == config.runtime.remat:
      known[train.batch_size] = found.peak_bytes
    else:  # a guess to start from: with recomputed blocks more fit
      start = int(max(room * (2.5 if remat == 'block' else 0.4) // step * step, step))
      known[start] = peak_of(start)
    batch, peaks = largest_batch(peak_of, known, found.usable_bytes, step)
    same = same_update(rows, batch, found.devices)
    sizes = same and f'--config.train.batch_size={same[0]} --config.train.accumulation_steps={same[1]}'
    settings = sizes and f'{sizes} --config.runtime.remat={remat}'
    return {'batch_size': batch, 'peak_bytes': peaks[batch], 'settings': settings}

  with ThreadPoolExecutor(2) as pool:  # a compilation keeps little more than one core busy
    return dict(zip(('none', 'block'), pool.map(largest, ('none', 'block')), strict=True))


def as_dict(found: Estimate, batches: dict[str, dict[str, Any]], top: int) -> dict[str, Any]:
  """Returns everything that there is to say, as --json prints it; times in seconds."""
  train = found.config.train
  return {
    'experiment': found.config.experiment,
    'card': found.card.name,
    'devices': found.devices,
    'micro_batch': [train.batch_size, found.config.model.max_seq_len, train.accumulation_steps],
    'remat': found.config.runtime.remat,
    'fits': found.fits,
    'peak_bytes': found.peak_bytes,
    'usable_bytes': found.usable_bytes,
    'memory_bytes': found.card.memory_bytes,
    'peak_parts': found.parts,
    'largest_micro_batch': batches,
    'bound': {
      'seconds_an_update': found.seconds,
      'tokens_per_second': found.config.update_positions / found.seconds,
      'share_of_peak': found.share_of_peak,
      'positions': found.positions,
      'hours': found.hours,
    },
    'model_flops': found.model_flops,
    **describe_kernels(found.kernels, found.card, top),
  }


def print_report(found: Estimate, content: dict[str, Any]) -> None:
  """Prints what `as_dict` holds for people."""
  devices = f'{found.devices} x ' if found.devices > 1 else ''
  shape = ' x '.join(map(str, content['micro_batch']))
  print(
    f'{found.config.experiment} on {devices}{found.card.name}, {shape} tokens an update, remat {content["remat"]}\n\n'
    f'{"Fits" if found.fits else "Does not fit"}: {found.peak_bytes / GB:.2f} GB at the peak, of '
    f'{found.usable_bytes / GB:.1f} GB that JAX takes ({memory_share():.0%} of the card; XLA_CLIENT_MEM_FRACTION '
    'changes it)'
  )
  show(memory_table(found))
  for remat, batch in content['largest_micro_batch'].items():
    same = f'; the same update: {batch["settings"]}' if batch['settings'] else ''
    fits = f'{batch["batch_size"]} rows ({batch["peak_bytes"] / GB:.2f} GB){same}'
    print(f'Largest micro-batch, remat {remat}: {fits if batch["batch_size"] else "none fits"}')
  print(cost_sentences(found, content))
  if measured := content['measured']:
    seconds, peak = measured['seconds_an_update'], measured['peak_bytes']
    at_the_peak = f', {peak / GB:.2f} GB at the peak' if peak else ''
    rate = f'{as_ms(seconds)} ms an update, {found.config.update_positions / seconds:,.0f} tokens/s'
    print(f'Measured here, on {measured["device"]}: {rate}{at_the_peak}')
  show(*kernel_tables(content))


def memory_table(found: Estimate) -> Table:
  """What lies in memory at the peak, without what is less than 0.5 % of it."""
  names = {'state': 'state and batch', 'gradients': 'gradients, summed up', 'loss': 'loss'}
  parts = [(part, size) for part, size in found.parts.items() if size >= found.peak_bytes / 200]
  rows = [(names.get(part, f'activations: {part}'), f'{size / GB:.2f}') for part, size in parts]
  return Table(('at the peak', 'GB'), rows)


def cost_sentences(found: Estimate, content: dict[str, Any]) -> str:
  """What an update multiplies, moves and starts, and the least time of that."""
  several, bound = found.devices > 1, content['bound']
  products = ', '.join(f'{flops / 1e12:.2f} TFLOP {dtype}' for dtype, flops in content['products'].items() if flops)
  sent = f' moved, {content["sends"] / GB:.2f} GB sent' if several else ' moved'
  run = 'the configured run' if found.config.train.max_steps else "as many tokens as the record's"
  return (
    f'\nAn update{" on each device" if several else ""}: {products} in products, {content["bytes"] / GB:.1f} GB{sent}, '
    f'{content["kernels"]:,} kernels; Triton or Pallas: {content["triton"]}\n'
    f'Bound, not measured: at least {as_ms(found.seconds)} ms an update, at most '
    f'{bound["tokens_per_second"]:,.0f} tokens/s, {found.share_of_peak:.0%} of {found.devices} x '
    f'{found.card.peak_rate / 1e12:.0f} TFLOP/s; {found.hours:.3g} h for {run} ({found.positions:,.0f})'
  )


def as_ms(seconds: float) -> str:
  """Writes a time in milliseconds, with a tenth of one, or three digits of what is shorter than 10 ms."""
  return f'{1e3 * seconds:.1f}' if seconds >= 0.01 else f'{1e3 * seconds:.3g}'


def kernel_tables(content: dict[str, Any]) -> list[Table]:
  """Time by kind of kernel, the costliest lines, and what devices send each other."""

  def ms(entry: dict[str, Any]) -> str:
    return f'{1e3 * entry["seconds"]:.2f}'

  costly = [
    (ms(entry), f'{entry["bytes"] / GB:.2f}', f'{entry["runs"]:,}', *(entry[n] for n in ('kind', 'operation', 'line')))
    for entry in content['costliest']
  ]
  sent = [
    (entry['kind'], entry['runs'], f'{entry["sends"] / 1e6:.1f}', ', '.join(entry['arrays'][:3]), entry['line'])
    for entry in content['collectives']
  ]
  return [
    Table(('kernels', 'ms', 'runs'), [(kind['kind'], ms(kind), f'{kind["runs"]:,}') for kind in content['kinds']]),
    Table(('ms', 'GB', 'runs', 'kind', 'operation', 'line'), costly),
    Table(('collective', 'runs', 'MB sent', 'array', 'line'), sent),
  ]


def markdown_row(found: Estimate, batches: dict[str, dict[str, Any]]) -> dict[str, Any]:
  """Returns a row for BENCHMARKS.md."""
  content = as_dict(found, batches, 0)
  return {
    'config': found.config.experiment + (', remat' if content['remat'] == 'block' else ''),
    'card': f'{found.devices} x {found.card.name}' if found.devices > 1 else found.card.name,
    'peak, GB': f'{found.peak_bytes / GB:.2f}',
    'bound, ms': as_ms(found.seconds),
    'tokens/s': f'{content["bound"]["tokens_per_second"]:,.0f}',
    'of peak': f'{found.share_of_peak:.0%}',
    'hours': f'{found.hours:.2f}',
    'largest micro-batch': batches['none']['batch_size'] if batches else '-',
    'the same with remat': batches['block']['batch_size'] if batches else '-',
    'kernels': f'{content["kernels"]:,}',
    'sent, MB': f'{content["sends"] / 1e6:.0f}',
  }


if __name__ == '__main__':
  run_command(main)
