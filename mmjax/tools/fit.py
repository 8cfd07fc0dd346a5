"""Says whether a config fits on a GPU and the least time it takes there, without one.

python -m mmjax.tools.fit --config configs/exp_1_4_2.py --gpu rtx4090 [--devices 8] [--config.section.field=value ...]

The whole train step is compiled for the card (10 to 30 s); nothing runs. Times are a bound by counted bytes and
products (mmjax/ahead/count.py), not a measurement. Exit codes: 0 done, 2 user error.
"""

import argparse

from mmjax.ahead.cards import CARDS, find_card
from mmjax.ahead.compiler import compile_for, prepare_environment
from mmjax.ahead.count import bound_seconds, costliest, seconds_by_kind
from mmjax.ahead.hlo import Module
from mmjax.config import load_config
from mmjax.errors import run_command

GB = 1e9


def main() -> None:
  """Flags -> config -> compile -> count -> print."""
  parser = argparse.ArgumentParser(
    prog='python -m mmjax.tools.fit', description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('--config', required=True, help='config file')
  parser.add_argument('--gpu', required=True, help=f'{", ".join(CARDS)}, or a file that describes a card')
  parser.add_argument('--devices', type=int, default=1, help='how many of them, in one machine')
  parser.add_argument('--top', type=int, default=10, help='how many operations to show')
  arguments, overrides = parser.parse_known_args()
  config, card = load_config(arguments.config, overrides), find_card(arguments.gpu)
  prepare_environment()
  compiled = compile_for(config, card, arguments.devices)
  kernels = Module(compiled.as_text()).kernels()
  memory = compiled.memory_analysis()
  seconds = bound_seconds(kernels, card)
  train = config.train
  tokens = train.batch_size * train.accumulation_steps * config.model.max_seq_len
  flops = {d: sum(k.runs * k.flops.get(d, 0) for k in kernels) / 1e12 for d in ('bf16', 'tf32', 'f32')}
  print(
    f'{config.experiment} on {arguments.devices} x {card.name}: {train.batch_size} x {config.model.max_seq_len} x '
    f'{train.accumulation_steps}, remat {config.runtime.remat}'
  )
  print(f'peak memory {memory.peak_memory_in_bytes / GB:.2f} GB of {card.memory_bytes / GB:.1f}')
  print(
    f'bound {1e3 * seconds:.1f} ms an update, {tokens / seconds:,.0f} tokens/s, '
    f'share of peak {sum(flops.values()) * 1e12 / seconds / card.bf16_rate:.1%}, '
    f'record in {3.788e9 / tokens * seconds / 3600:.2f} h'
  )
  print(
    f'products {flops} TFLOP; {sum(k.runs * k.bytes for k in kernels) / GB:.1f} GB; '
    f'{sum(k.runs for k in kernels)} kernels, {len(kernels)} different; '
    f'triton or pallas: {sum(k.kind == "triton" for k in kernels)}'
  )
  for kind, spent in seconds_by_kind(kernels, card).most_common():
    print(f'  {kind:14} {1e3 * spent:8.2f} ms  {sum(k.runs for k in kernels if k.kind == kind):6} runs')
  for spent, moved, runs, kind, name, source in costliest(kernels, card)[: arguments.top]:
    print(f'  {1e3 * spent:8.2f} ms {moved / GB:8.2f} GB {runs:6} x {kind:12} {name:50} {source}')
  for k in kernels:
    if k.kind == 'collective':
      print(
        f'  {k.target:18} {k.runs:3} x sends {k.sends / 1e6:8.2f} MB, in {len(k.loops)} loops, '
        f'{", ".join(map(str, k.shapes))[:60]:60} {k.source}'
      )


if __name__ == '__main__':
  run_command(main)
