"""What a compiled module's kernels must read, write, multiply and send, and how often each runs.

What is counted, for each kernel that the scheduled module starts (a fusion, a library call, a copy):

  runs      once for each trip of the loops around it. Of a loop whose trips the compiler does not know one is
            counted, or none if it lies in the scope SELDOM. A conditional counts its costliest branch
  bytes     its operands and its results once each, as if nothing stayed in a cache between kernels. Of an operand that
            a kernel only slices or gathers from, what it takes, and never more than there is. Of a table that a scatter
            or an update of a slice changes in place, what is changed: read and written by a scatter, written by an
            update. Scratch space (s8 and u8 results of library calls) is not counted
  products  2 x multiplications of every dot, in a library call or in a fusion; cuDNN attention 4 B N T S H forward and
            2.5 times that backward, half where causal. Sums and element-wise work are not products
  sends     of a collective over n devices, what a device must send: (n - 1) / n of what is gathered, scattered or
            exchanged, twice that of an all-reduce, all of a permutation
"""

import dataclasses
import json
import math
import re
from collections import Counter
from collections.abc import Iterator

from mmjax.kernels import SELDOM
from mmjax.run import nvidia
from mmjax.run.hlo import Instruction, Module, Shape

FREE = {
  'parameter', 'get-tuple-element', 'tuple', 'bitcast', 'constant', 'after-all', 'partition-id', 'replica-id',
  'opt-barrier', 'optimization-barrier', 'add-dependency', 'domain',
}  # fmt: skip
IN_PLACE = ('dynamic-update-slice', 'scatter')  # what changes a part of its first operand
COLLECTIVES = ('all-reduce', 'all-gather', 'reduce-scatter', 'all-to-all', 'collective-permute', 'ragged-all-to-all')


@dataclasses.dataclass(frozen=True)
class Kernel:
  """One thing that the device is told to do.

  `kind` is one of product, attention, sort, scatter, gather, cast, copy, reduction, element-wise, collective, triton,
  library; `loops` the op_names of the loops around it, outermost first; the counts are those of one run.
  """

  name: str
  kind: str
  target: str  # of a library call or a collective: which
  runs: int
  bytes: float
  flops: dict[str, float]  # products by dtype: 'bf16', 'tf32', 'f32'
  sends: float
  shapes: tuple[Shape, ...]
  op_name: str
  source: str  # 'mmjax/kernels/bank.py:123'
  loops: tuple[str, ...]


def kernels_of(module: Module) -> list[Kernel]:
  """Returns every kernel of a module with what it costs, in the order in which they are started."""
  return list(_walk(module, module.entry, 1, ()))


def _walk(module: Module, computation: str, runs: int, loops: tuple[str, ...]) -> Iterator[Kernel]:
  for instruction in module.computations[computation].values():
    opcode = instruction.opcode
    if opcode == 'while':
      known = re.search(r'"known_trip_count":\{"n":"(\d+)"', instruction.rest)
      trips = int(known[1]) if known else SELDOM not in instruction.op_name.split('/')
      around = (*loops, instruction.op_name or instruction.name)
      yield from _walk(module, instruction.attribute('body'), runs * trips, around)
    elif opcode in ('call', 'async-start', 'conditional'):
      costs = [list(_walk(module, branch, runs, loops)) for branch in instruction.branches]
      yield from max(costs, key=lambda kernels: sum(kernel.bytes * kernel.runs for kernel in kernels))
    elif opcode not in FREE and not opcode.endswith(('-done', '-update')):
      yield _kernel(module, module.computations[computation], instruction, runs, loops)


def _kernel(module: Module, around: dict, instruction: Instruction, runs: int, loops: tuple[str, ...]) -> Kernel:
  opcode = instruction.opcode.removesuffix('-start')
  inputs = [around[name] for name in instruction.operands if name in around]
  flops, sends, target = Counter(), 0.0, ''
  results = results_of(instruction, inputs)
  if opcode in COLLECTIVES:
    kind, target = 'collective', opcode
    size = sum(operand.bytes for operand in inputs)
    sends, moved = _collective(opcode, size, _group_size(instruction))
  elif opcode == 'custom-call':
    kind, target, found = _library_call(around, instruction)
    flops.update(found)
    scratch = results[-1].bytes if len(results) > 1 and str(results[-1]).startswith(('s8[', 'u8[')) else 0
    moved = sum(x.bytes for x in (*inputs, instruction)) - scratch
  else:
    inner = module.computations[instruction.attribute('calls')] if opcode == 'fusion' else _alone(instruction, inputs)
    kind, moved = _fusion_kind(inner), _fusion_bytes(inner)
    for part in inner.values():
      flops.update(_dot_flops(inner, part))
      if part.opcode == 'custom-call':  # it may be wrapped together with the slice that it writes
        kind, target, found = _library_call(inner, part)
        flops.update(found)
  if nvidia.calls_triton(instruction.rest):
    kind = 'triton'
  return Kernel(
    instruction.name, kind, target, runs, moved, dict(flops), sends, results,
    module.name_of(instruction), module.line_of(instruction), loops,
  )  # fmt: skip


def results_of(instruction: Instruction, inputs: list[Instruction]) -> tuple[Shape, ...]:
  """Returns the shapes that a kernel writes; one that is only started also has its operands and a context."""
  if instruction.opcode != 'fusion-start':
    return instruction.shapes
  return instruction.shapes[sum(len(operand.shapes) for operand in inputs) : -1]


def _collective(opcode: str, size: float, devices: int) -> tuple[float, float]:
  """Returns what a device sends, and what it reads and writes in its own memory, in bytes."""
  share = (devices - 1) / devices if devices else 0
  if opcode == 'all-reduce':
    return 2 * share * size, 2 * size
  if opcode == 'all-gather':
    return share * size * devices, size + size * devices
  if opcode == 'reduce-scatter':
    return share * size, size + size / max(devices, 1)
  return (size if opcode == 'collective-permute' else share * size), 2 * size


def _group_size(instruction: Instruction) -> int:
  """Returns how many devices take part in each group of a collective."""
  if found := re.search(r'replica_groups=mesh\[(.*?)\] \{(.*?)\}', instruction.rest):  # axes, and those it runs over
    sizes = {axis: int(size) for axis, size in re.findall(r"'(\w+)'=(\d+)", found[1])}
    return math.prod(int(part or sizes[axis]) for axis, part in re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", found[2]))
  if found := re.search(r'replica_groups=\[(\d+),(\d+)\]', instruction.rest):
    return int(found[2])
  if found := re.search(r'replica_groups=\{\{([\d,]*)\}', instruction.rest):
    return found[1].count(',') + 1
  if found := re.search(r'source_target_pairs=\{(.*?)\}\}', instruction.rest):
    return found[1].count('{')
  return 1


def _library_call(around: dict, instruction: Instruction) -> tuple[str, str, dict[str, float]]:
  """Returns kind, target and products of a custom call."""
  target = instruction.attribute('custom_call_target') or ''
  config = re.search(r'backend_config=(\{.*\})', instruction.rest)
  try:
    config = json.loads(config[1]) if config else {}
  except json.JSONDecodeError:
    config = {}
  if 'gemm_backend_config' in config:
    gemm = config['gemm_backend_config']
    lhs = around[instruction.operands[0]].shapes[0]
    summed = math.prod(lhs.dims[int(n)] for n in gemm['dot_dimension_numbers']['lhs_contracting_dimensions'])
    exact = 'HIGHEST' in gemm.get('precision_config', {}).get('operand_precision', [])
    return 'product', target, {_rate(lhs.dtype, exact): 2.0 * summed * instruction.shapes[0].size}
  if 'cudnn_fmha_backend_config' in config:
    fmha = config['cudnn_fmha_backend_config']
    B, N, T, S = (int(n) for n in fmha['intermediate_tensor_shape']['dimensions'])
    H = around[instruction.operands[0]].shapes[0].dims[-1]
    flops = 4.0 * B * N * T * S * H * (2.5 if 'Backward' in target else 1) / (2 if 'CAUSAL' in fmha['mask_type'] else 1)
    return 'attention', target, {'bf16': flops}
  return 'library', target, {}


def _rate(dtype: str, exact: bool) -> str:
  """Returns which of the device's rates a product runs at; float32 as TF32 unless it was asked to be exact."""
  return ('f32' if exact else 'tf32') if dtype == 'f32' else 'bf16'


def _dot_flops(around: dict, instruction: Instruction) -> dict[str, float]:
  if instruction.opcode != 'dot':
    return {}
  lhs = around[instruction.operands[0]].shapes[0]
  summed = math.prod(lhs.dims[n] for n in instruction.numbers('lhs_contracting_dims'))
  exact = 'highest' in (instruction.attribute('operand_precision') or '')
  return {_rate(lhs.dtype, exact): 2.0 * summed * instruction.shapes[0].size}


def _alone(instruction: Instruction, inputs: list[Instruction]) -> dict[str, Instruction]:
  """Returns the fused computation that an instruction would be, on its own."""
  inner = {operand.name: dataclasses.replace(operand, opcode='parameter', rest='') for operand in inputs}
  return inner | {instruction.name: dataclasses.replace(instruction, root=True)}


def _fusion_kind(inner: dict) -> str:
  """Names what a fused computation does by its most telling operation."""
  opcodes = {part.opcode for part in inner.values()}
  for kind in ('sort', 'scatter', 'gather'):
    if kind in opcodes:
      return kind
  if 'dot' in opcodes:
    return 'product'
  if opcodes & {'reduce', 'reduce-window'}:
    return 'reduction'
  moves = opcodes - FREE - {'transpose', 'reshape', 'copy', 'broadcast', 'slice', 'dynamic-slice', 'concatenate'}
  moves -= {'dynamic-update-slice', 'pad', 'iota'}
  if not moves:
    return 'copy'
  return 'cast' if moves == {'convert'} else 'element-wise'


def _fusion_bytes(inner: dict) -> float:
  """Returns what a fused computation reads of its parameters and writes of its results, by the rules at the top."""
  need: Counter[str] = Counter()  # elements of each value that are used
  written = 0.0
  for output in _outputs(inner):
    source = _behind(inner, output)
    made = _changed(inner, source) if source.opcode in IN_PLACE else output.size
    need[output.name] = max(need[output.name], made)
    written += made * output.bytes / max(output.size, 1)
  for part in reversed(list(inner.values())):
    wanted = need[part.name]
    for position, name in enumerate(part.operands):
      if name in inner and wanted:
        size = inner[name].size
        need[name] = min(size, need[name] + _used(inner, part, position, wanted, size))
  parameters = [part for part in inner.values() if part.opcode == 'parameter']
  return sum(need[part.name] / max(part.size, 1) * part.bytes for part in parameters) + written


def _outputs(inner: dict) -> list[Instruction]:
  root = next(part for part in inner.values() if part.root)
  return [inner[name] for name in root.operands] if root.opcode == 'tuple' else [root]


def base_of_update(module: Module, instruction: Instruction) -> dict[int, int]:
  """Returns, for results that are an operand changed in place, the numbers of the result and of that operand."""
  inner = module.computations.get(instruction.attribute('calls') or '', {})
  if not instruction.opcode.startswith('fusion') or not inner:
    return {0: 0} if instruction.opcode in IN_PLACE else {}
  numbers = {part.name: int(part.operands[0]) for part in inner.values() if part.opcode == 'parameter'}
  bases = {}
  for leaf, output in enumerate(_outputs(inner)):
    source = _behind(inner, output)
    if source.opcode in IN_PLACE:
      base = _behind(inner, inner[source.operands[0]])
      if base.name in numbers and base.shapes == output.shapes:
        bases[leaf] = numbers[base.name]
  return bases


def _behind(inner: dict, part: Instruction) -> Instruction:
  """Returns what gives an output its values, behind casts and changes of shape."""
  while part.opcode in ('bitcast', 'convert', 'copy', 'reshape', 'transpose') and part.operands[0] in inner:
    part = inner[part.operands[0]]
  return part


def _changed(inner: dict, part: Instruction) -> float:
  """Returns how many elements a scatter or an update of a slice writes, at most all."""
  updates = part.operands[len(part.operands) // 2 + 1] if part.opcode == 'scatter' else part.operands[1]
  return min(inner[updates].shapes[0].size, part.shapes[0].size)


def _used(inner: dict, part: Instruction, position: int, wanted: float, size: float) -> float:
  """Returns how many elements of its operand at `position` an instruction uses to give `wanted` elements."""
  opcode = part.opcode
  if opcode in ('slice', 'dynamic-slice', 'gather', 'scatter') and position == 0:
    return wanted
  if opcode == 'dynamic-update-slice' and position == 0:
    return max(wanted - _changed(inner, part), 0)
  if opcode in (*IN_PLACE, 'reduce', 'dot', 'sort', 'broadcast', 'concatenate', 'gather'):
    return size
  return size * wanted / part.size if part.size else 0
