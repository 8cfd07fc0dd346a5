"""Measures training: python benchmarks/throughput.py --config configs/exp_1_4_2.py --against torch [--torch_compile]

One update (forward, backward, clip, AdamW) of mmjax and of the PyTorch port take turns in one process on the device at
hand, with the same number of threads on a CPU; `--config.section.field=value` overrides settings of both. On NVIDIA
mmjax is also compiled with `runtime.triton_gemm` the other way round, and Triton calls in each program are counted.

FLOPs a token are counted by mmjax/model/cost.py, which has the derivation; MFU is their rate over the device's peak
(where the datasheet is known), and over the best rate of a large matrix product measured in the same run, by JAX or
torch. Peak memory: on a GPU that of JAX's and of torch's allocator; on a CPU (--process_memory) the growth, after
imports, of the resident memory of a process of its own for each side, at its peak while it steps. Hours are for the
record's 3.79 G positions at this speed. At the end mmjax makes the same update twice and says whether its results are
equal bit for bit, which sums in an order of the device's choice (atomic additions) would prevent.
"""

import argparse
import contextlib
import hashlib
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import common
import jax
import jax.numpy as jnp

from mmjax.ahead.estimate import RECORD_POSITIONS
from mmjax.ahead.trial import Trial, random_rows
from mmjax.config import Config, load_config
from mmjax.environment import count_cores
from mmjax.errors import UserError, run_command
from mmjax.model.cost import flops_per_token
from mmjax.run.nvidia import count_triton, device_peak_flops
from mmjax.run.placement import is_nvidia
from mmjax.training.out_of_memory import explain_out_of_memory

GIB = 1 << 30
Update = Callable[[], None]


def main() -> None:
  """Reads flags, measures, prints the table, writes the JSON file."""
  parser = common.parser(__doc__)
  parser.add_argument('--against', choices=('torch',), help='also run the PyTorch port')
  parser.add_argument('--torch_compile', action='store_true', help='run the port compiled, too')
  parser.add_argument('--dtype', choices=('float32', 'bfloat16'), help='overrides train.dtype; torch runs in autocast')
  parser.add_argument('--seq_len', type=int, help='overrides model.max_seq_len')
  parser.add_argument('--updates', type=int, default=1, help='updates in a turn')
  parser.add_argument('--one_program', action='store_true', help='do not also compile with the other triton_gemm')
  parser.add_argument('--matmul_size', type=int, help='default 2048 on a CPU, 8192 on a GPU')
  parser.add_argument('--process_memory', action='store_true', help='measure resident memory too')
  parser.add_argument('--memory_of', choices=('mmjax', 'torch'), help=argparse.SUPPRESS)
  arguments, overrides = parser.parse_known_args()
  if arguments.dtype:
    overrides.append(f'--config.train.dtype={arguments.dtype}')
  if arguments.seq_len:
    overrides.append(f'--config.model.max_seq_len={arguments.seq_len}')
  config = load_config(arguments.config, overrides)
  if arguments.memory_of:
    print(json.dumps(resident_growth(config, arguments.memory_of)))
    return
  report(config, arguments)


def report(config: Config, arguments: argparse.Namespace) -> None:
  """Measures everything and prints it."""
  step, updates, facts = mmjax_sides(config, compare_triton=not arguments.one_program)
  on_torch = arguments.against == 'torch'
  if on_torch:
    torch_updates, torch_memory = torch_sides(config, arguments.torch_compile)
    updates |= torch_updates
  seconds = take_turns(updates, arguments.repeats, arguments.updates)
  facts['mmjax'] |= same_update_twice(step)
  if on_torch:
    facts |= {name: {'peak_bytes': bytes_} for name, bytes_ in torch_memory.items()}
  if arguments.process_memory:
    for name in ('mmjax', 'torch') if on_torch else ('mmjax',):
      facts[name]['resident_growth_bytes'] = measure_in_own_process(name)
  peaks = matmul_rates(config.train.dtype, arguments.matmul_size, on_torch)
  lines = [line(config, name, seconds, facts[name], max(peaks.values())) for name in updates]
  common.print_table([row(entry) for entry in lines])
  rates = ', '.join(f'{name} {rate / 1e12:.2f} TFLOP/s' for name, rate in peaks.items())
  shape = f'{config.train.accumulation_steps} x {config.train.batch_size} x {config.model.max_seq_len}'
  print(f'\n{config.experiment}, {config.train.dtype}, {shape} tokens an update, {arguments.repeats} turns.')
  print(
    f'{flops_per_token(config)["total"] / 1e6:.1f} MFLOPs a token; measured {config.train.dtype} products: {rates}.'
  )
  found = common.environment()
  differ, arrays = facts['mmjax']['differing_arrays'], facts['mmjax']['arrays']
  found_out = 'no memory for a second state' if differ is None else f'{differ} of {arrays} arrays of the state differ'
  print(f'The same update of mmjax twice: {found_out}.')
  print(f'{found["device"]}, {found["threads"]} threads, load {found["load_average"]:.1f}, commit {found["commit"]}')
  common.write_json(
    arguments.json,
    found | {'config': config.to_dict(), 'matmul_flops': peaks, 'flops_parts': flops_per_token(config), 'sides': lines},
  )


def mmjax_sides(config: Config, *, compare_triton: bool) -> tuple[Trial, dict[str, Update], dict[str, dict[str, Any]]]:
  """Returns the trial, the update of each program, warmed up, and what the compiler says of it."""
  step = Trial(config)
  updates, facts = {}, {}
  variants = {'mmjax': config}
  if compare_triton and is_nvidia(jax.devices()[0].platform):
    other = not config.runtime.triton_gemm
    variants[f'mmjax, triton_gemm={other}'] = config.with_settings({'runtime.triton_gemm': other})
  for name, variant in variants.items():
    compiled = step.compiled if variant is config else step.compile(variant)
    updates[name] = lambda compiled=compiled: step.run(compiled)
    updates[name]()
    memory, stats = compiled.memory_analysis(), jax.devices()[0].memory_stats() or {}
    facts[name] = {
      'attention': step.learner.placement.attention,
      'triton_calls': count_triton(compiled.as_text()),
      'analysis_bytes': common.program_bytes(memory),
      'peak_bytes': stats.get('peak_bytes_in_use') if variant is config else None,  # of all programs after the first
    }
  return step, updates, facts


def same_update_twice(step: Trial) -> dict[str, int | None]:
  """Returns how many arrays of the state differ in a bit after two equal updates of the same state, of how many.

  How many differ is None where the device has no memory for a second state.
  """
  ends = []
  try:
    with explain_out_of_memory(step.learner.config):
      for _ in range(2):
        state, _metrics = step.compiled(jax.tree.map(jnp.copy, step.state), step.batch)  # which overwrites the copy
        ends.append([hashlib.sha256(jax.device_get(array).tobytes()).digest() for array in jax.tree.leaves(state)])
        del state  # a third would be alive in the second turn
  except UserError:
    return {'differing_arrays': None, 'arrays': len(jax.tree.leaves(step.state))}
  return {'differing_arrays': sum(one != two for one, two in zip(*ends, strict=True)), 'arrays': len(ends[0])}


def torch_sides(config: Config, compiled_too: bool) -> tuple[dict[str, Update], dict[str, int | None]]:
  """Returns the update of the eager port, and of the compiled one, warmed up, and their peak memory on a GPU."""
  import torch

  torch.set_num_threads(count_cores())  # as many as XLA's pool has
  updates, memory = {}, {}
  for name in ('torch', 'torch.compile')[: 1 + compiled_too]:
    if torch.cuda.is_available():
      torch.cuda.reset_peak_memory_stats()
      held = torch.cuda.memory_allocated()
    update = torch_update(config, compile_model=name == 'torch.compile')
    try:
      for _ in range(2):
        update()
    except Exception as error:  # noqa: BLE001 - torch.compile wants a C compiler and more; the rest is worth measuring
      if name == 'torch':
        raise
      print(f'torch.compile failed, and is left out: {type(error).__name__}: {" ".join(str(error).split())[:600]}\n')
      continue
    updates[name] = update
    memory[name] = torch.cuda.max_memory_allocated() - held if torch.cuda.is_available() else None
  return updates, memory


def torch_update(config: Config, compile_model: bool) -> Update:
  """Returns one update of the port: autocast for bf16, clipping, fused AdamW."""
  import torch

  from tests.torch_reference import Sizes, TorchLM

  place, train = 'cuda' if torch.cuda.is_available() else 'cpu', config.train
  torch.manual_seed(config.seed)
  torch.set_float32_matmul_precision('high')  # TF32, which JAX uses too
  model = TorchLM(Sizes.of(config.model)).to(place)
  betas, settings = (train.beta1, train.beta2), {'eps': train.eps, 'weight_decay': train.weight_decay, 'fused': True}
  optimizer = torch.optim.AdamW(model.parameters(), lr=train.learning_rate, betas=betas, **settings)
  rows = random_rows(config)
  micros = [torch.from_numpy(rows[key]).long().to(place).chunk(train.accumulation_steps) for key in ('input', 'target')]

  def loss_of(tokens_BT: Any, target_BT: Any) -> Any:
    out = model(tokens_BT)
    loss = torch.nn.functional.cross_entropy(out.logits.flatten(0, 1), target_BT.flatten())
    return loss + out.aux_loss

  objective = torch.compile(loss_of) if compile_model else loss_of
  half = train.dtype == 'bfloat16'

  def update() -> None:
    for tokens_BT, target_BT in zip(*micros, strict=True):
      with torch.autocast(place, torch.bfloat16) if half else contextlib.nullcontext():
        loss = objective(tokens_BT, target_BT) / train.accumulation_steps
      loss.backward()
    if train.grad_clip:
      torch.nn.utils.clip_grad_norm_(model.parameters(), train.grad_clip)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    if place == 'cuda':
      torch.cuda.synchronize()

  return update


def take_turns(updates: dict[str, Update], repeats: int, updates_a_turn: int) -> dict[str, list[float]]:
  """Returns seconds an update of each turn; sides alternate, so that all see the same machine."""
  seconds = {name: [] for name in updates}
  for _ in range(repeats):
    for name, update in updates.items():
      turn = common.seconds_of(lambda update=update: [update() for _ in range(updates_a_turn)])
      seconds[name].append(turn / updates_a_turn)
  return seconds


def matmul_rates(dtype: str, size: int | None, on_torch: bool) -> dict[str, float]:
  """Returns the best FLOP/s of a square matrix product with results in float32 (torch: in `dtype`)."""
  on_cpu = jax.default_backend() == 'cpu'
  n = size or (2048 if on_cpu else 8192)
  a = jax.random.normal(jax.random.key(0), (n, n)).astype(dtype)
  # Float32 results are the CPU's fast form; on a GPU the model's products round to bf16.
  multiply = jax.jit(lambda a: jnp.matmul(a, a, preferred_element_type=jnp.float32 if on_cpu else dtype))
  found = {'jax': lambda: multiply(a).block_until_ready()}
  if on_torch:
    import torch

    b = torch.randn(n, n, device='cuda' if torch.cuda.is_available() else 'cpu').to(getattr(torch, dtype))
    found['torch'] = lambda: (b @ b).ravel()[0].item()
  seconds = take_turns(found, 8, 1 if on_cpu else 10)
  return {name: 2 * n**3 / min(times) for name, times in seconds.items()}


def line(
  config: Config, name: str, seconds: dict[str, list[float]], facts: dict[str, Any], matmul_rate: float
) -> dict[str, Any]:
  """Returns the measurements of one side."""
  tokens = config.update_positions
  rate = common.spread([tokens / s for s in seconds[name]])
  flops = flops_per_token(config)['total'] * rate['median']
  peak = device_peak_flops(jax.devices()[0].device_kind, config.train.dtype)
  ratios = [theirs / ours for theirs, ours in zip(seconds.get('torch', []), seconds[name], strict=False)]
  return {
    'side': name,
    'tokens_per_second': rate,
    'times_torch': common.spread(ratios) if ratios else None,  # of the turns beside each other
    'mfu': flops / peak if peak else None,
    'share_of_matmul': flops / matmul_rate,
    'hours_of_record': RECORD_POSITIONS / rate['median'] / 3600,
    'seconds_per_update': seconds[name],
    **facts,
  }


def row(entry: dict[str, Any]) -> dict[str, str]:
  """Returns a line of the table."""
  rate, ratio = entry['tokens_per_second'], entry['times_torch']

  def shown(value: float | None, scale: float, form: str) -> str:
    return '' if value is None else f'{value * scale:{form}}'

  return {
    'side': entry['side'],
    'tokens/s': f'{rate["median"]:,.0f}',
    'range': f'{rate["min"]:,.0f}-{rate["max"]:,.0f}',
    'times torch': f'{ratio["median"]:.2f} ({ratio["min"]:.2f}-{ratio["max"]:.2f})' if ratio else '',
    'MFU, datasheet': shown(entry['mfu'], 1, '.1%'),
    'of measured product': shown(entry['share_of_matmul'], 1, '.1%'),
    'peak GiB, allocator': shown(entry.get('peak_bytes'), 1 / GIB, '.2f'),
    'GiB, compiler': shown(entry.get('analysis_bytes'), 1 / GIB, '.2f'),
    'GiB, resident growth': shown(entry.get('resident_growth_bytes'), 1 / GIB, '.2f'),
    'Triton calls': str(entry.get('triton_calls', '')),
    'record, hours': f'{entry["hours_of_record"]:.1f}',
  }


def measure_in_own_process(side: str) -> int:
  """Runs this command for one side alone and returns its resident growth in bytes."""
  command = [sys.executable, str(Path(__file__).resolve()), *sys.argv[1:], '--memory_of', side]
  out = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
  return json.loads(out.splitlines()[-1])


def resident_growth(config: Config, side: str) -> int:
  """Returns by how much the resident memory at its peak, while stepping, exceeds that after imports."""
  import torch  # by both, so that both start from the same

  before = common.resident_bytes('VmRSS')
  if side == 'mmjax':
    step = Trial(config)
    update = step.run
  else:
    torch.set_num_threads(count_cores())
    update = torch_update(config, compile_model=False)
  update()
  common.reset_resident_peak()  # what compiling took is over
  update()
  return common.resident_bytes('VmHWM') - before


if __name__ == '__main__':
  run_command(main)
