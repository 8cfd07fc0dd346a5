"""Reads a compiled XLA module's text: which kernels it runs, how often, and what each must read, write and multiply.

What is counted, for each kernel that the scheduled module starts (a fusion, a library call, a copy):

  runs      once for each trip of the loops around it; a conditional counts its costliest branch
  bytes     its operands and its results once each, as if nothing stayed in a cache between kernels. Of an operand that
            a kernel only slices or gathers from, what it takes, and never more than there is. Of a table that a scatter
            or an update of a slice changes in place, what is changed: read and written by a scatter, written by an
            update. Scratch space (s8 and u8 results of library calls) is not counted
  products  2 x multiplications of every dot, in a library call or in a fusion; cuDNN attention 4 B N T S H forward and
            2.5 times that backward, half where causal. Sums and element-wise work are not products
  sends     of a collective over n devices, what a device must send: (n - 1) / n of what is gathered, scattered or
            exchanged, twice that of an all-reduce, all of a permutation

Source of the format: openxla/xla, docs/operation_semantics and the text that `compiled.as_text()` gives on NVIDIA.
"""

import dataclasses
import json
import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterator

from mmjax.run import nvidia

BITS = {'pred': 8, 's4': 4, 'u4': 4, 'token': 0, 'opaque': 0}  # the others carry their width in their name
FREE = {
  'parameter', 'get-tuple-element', 'tuple', 'bitcast', 'constant', 'after-all', 'partition-id', 'replica-id',
  'opt-barrier', 'optimization-barrier', 'add-dependency', 'domain',
}  # fmt: skip
HELPER = 'matmul.py'  # multiplies for everybody: its callers say more
IN_PLACE = ('dynamic-update-slice', 'scatter')  # what changes a part of its first operand
COLLECTIVES = ('all-reduce', 'all-gather', 'reduce-scatter', 'all-to-all', 'collective-permute', 'ragged-all-to-all')
_COMPUTATION = re.compile(r'^(ENTRY )?%?([\w.\-]+) \(.*\{$')
_INSTRUCTION = re.compile(r'^\s+(ROOT )?%?([\w.\-]+) = (.*)$')
_LEAF = re.compile(r'\b(pred|token|opaque|[a-z]+\d+\w*)\[([\d,<=]*)\](?:\{([\d,]*)[^}]*\})?')


@dataclasses.dataclass(frozen=True)
class Shape:
  """An array: its dtype as HLO names it, its sizes, and its layout, the fastest axis first."""

  dtype: str
  dims: tuple[int, ...]
  layout: tuple[int, ...] = ()

  @property
  def size(self) -> int:
    """Elements."""
    return math.prod(self.dims)

  @property
  def bytes(self) -> float:
    """Bytes, without padding."""
    bits = BITS[self.dtype] if self.dtype in BITS else int(re.search(r'\d+', self.dtype)[0])
    return self.size * bits / 8

  def __str__(self) -> str:
    return f'{self.dtype}[{",".join(map(str, self.dims))}]'


@dataclasses.dataclass(frozen=True)
class Instruction:
  """A line of a computation."""

  name: str
  opcode: str
  shapes: tuple[Shape, ...]  # of a tuple, those of its leaves
  operands: tuple[str, ...]  # their names; of a parameter, its number
  rest: str  # all that stands behind the operands
  root: bool

  def attribute(self, name: str) -> str | None:
    """Returns `name=VALUE` where VALUE has no blanks, such as a computation's name."""
    found = re.search(rf'\b{name}=%?([\w.\-$]+|"[^"]*"|\{{[^}}]*\}})', self.rest)
    return found[1].strip('"') if found else None

  def numbers(self, name: str) -> tuple[int, ...]:
    """Returns `name={0,1}` as numbers."""
    found = re.search(rf'\b{name}=\{{([\d,]*)\}}', self.rest)
    return tuple(int(n) for n in found[1].split(',') if n) if found else ()

  @property
  def size(self) -> int:
    """Elements of the result."""
    return sum(shape.size for shape in self.shapes)

  @property
  def bytes(self) -> float:
    """Bytes of the result."""
    return sum(shape.bytes for shape in self.shapes)

  @property
  def branches(self) -> list[str]:
    """The computations of which a call runs its only one, a conditional one."""
    called = re.findall(r'(?:to_apply|calls|_computations?)=\{?%?([\w.\-, %]+)', self.rest)
    return [name.strip(' %') for names in called for name in names.split(',')]

  @property
  def op_name(self) -> str:
    """Where JAX says it comes from: 'jit(train_step)/while/body/transpose(jvp(gate))/dot_general'."""
    return self.attribute('op_name') or ''


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


class Module:
  """A compiled module's computations and its table of source lines."""

  def __init__(self, text: str, package: str = 'mmjax'):
    """Reads the text.

    Args:
      text: as `compiled.as_text()` gives it.
      package: folder of the source files whose lines are wanted; frames elsewhere give way to their callers.
    """
    self.computations: dict[str, dict[str, Instruction]] = {}
    self.entry = ''
    tables: dict[str, dict[int, str]] = defaultdict(dict)
    current, table = None, ''
    for line in text.splitlines():
      if found := _COMPUTATION.match(line):
        current = self.computations[found[2]] = {}
        self.entry = found[2] if found[1] else self.entry
      elif current is not None and (found := _INSTRUCTION.match(line)):
        current[found[2]] = _instruction(found[2], found[3], bool(found[1]))
      elif line in ('FileNames', 'FunctionNames', 'FileLocations', 'StackFrames'):
        table = line
      elif table and (found := re.match(r'(\d+) (.*)$', line)):
        tables[table][int(found[1])] = found[2]
    self._lines = _source_lines(tables, package)

  def kernels(self) -> list[Kernel]:
    """Returns every kernel of the module with what it costs, in the order in which they are started."""
    return list(self._walk(self.entry, 1, ()))

  def instructions(self) -> Iterator[tuple[str, Instruction]]:
    """Yields every instruction with the name of its computation."""
    for name, computation in self.computations.items():
      yield from ((name, instruction) for instruction in computation.values())

  def line_of(self, instruction: Instruction) -> str:
    """Returns the source line that an instruction comes from, of a fusion without one that of most of its parts."""
    frame = re.search(r'stack_frame_id=(\d+)', instruction.rest)
    if frame and self._lines.get(int(frame[1])):
      return self._lines[int(frame[1])]
    return self._common(instruction, self.line_of)

  def name_of(self, instruction: Instruction) -> str:
    """Returns an instruction's op_name, of a fusion without one that of most of its parts."""
    return instruction.op_name or self._common(instruction, lambda part: part.op_name)

  def _common(self, instruction: Instruction, read) -> str:
    inner = self.computations.get(instruction.attribute('calls') or '', {})
    found = Counter(said for part in inner.values() if (said := read(part)))
    return found.most_common(1)[0][0] if found else ''

  def _walk(self, computation: str, runs: int, loops: tuple[str, ...]) -> Iterator[Kernel]:
    for instruction in self.computations[computation].values():
      opcode = instruction.opcode
      if opcode == 'while':
        trips = re.search(r'"known_trip_count":\{"n":"(\d+)"', instruction.rest)
        around = (*loops, instruction.op_name or instruction.name)
        yield from self._walk(instruction.attribute('body'), runs * (int(trips[1]) if trips else 1), around)
      elif opcode in ('call', 'async-start', 'conditional'):
        costs = [list(self._walk(branch, runs, loops)) for branch in instruction.branches]
        yield from max(costs, key=lambda kernels: sum(kernel.bytes * kernel.runs for kernel in kernels))
      elif opcode not in FREE and not opcode.endswith(('-done', '-update')):
        yield self._kernel(self.computations[computation], instruction, runs, loops)

  def _kernel(self, around: dict, instruction: Instruction, runs: int, loops: tuple[str, ...]) -> Kernel:
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
      inner = self.computations[instruction.attribute('calls')] if opcode == 'fusion' else _alone(instruction, inputs)
      kind, moved = _fusion_kind(inner), _fusion_bytes(inner)
      for part in inner.values():
        flops.update(_dot_flops(inner, part))
        if part.opcode == 'custom-call':  # it may be wrapped together with the slice that it writes
          kind, target, found = _library_call(inner, part)
          flops.update(found)
    if nvidia.TRITON.search(re.sub(r'metadata=\{[^}]*\}', '', instruction.rest)):
      kind = 'triton'
    return Kernel(
      instruction.name, kind, target, runs, moved, dict(flops), sends, results,
      self.name_of(instruction), self.line_of(instruction), loops,
    )  # fmt: skip


def _instruction(name: str, text: str, root: bool) -> Instruction:
  """Reads 'f32[8]{0} add(%a, %b), metadata=...'."""
  end = _closing(text, 0) if text.startswith('(') else text.index(' ')
  shapes, text = text[:end], text[end:].lstrip()
  opening = text.index('(')
  closing = _closing(text, opening)
  opcode, inside = text[:opening], text[opening:closing]
  operands = [inside[1:-1]] if opcode == 'parameter' else re.findall(r'%([\w.\-]+)', inside)
  leaves = tuple(
    Shape(
      dtype, tuple(int(n.lstrip('<=')) for n in dims.split(',') if n), tuple(int(n) for n in layout.split(',') if n)
    )
    for dtype, dims, layout in _LEAF.findall(shapes)
  )
  return Instruction(name, opcode, leaves, tuple(operands), text[closing:], root)


def _closing(text: str, opening: int) -> int:
  """Returns the index behind the parenthesis that closes the one at `opening`."""
  depth = 0
  for found in re.finditer(r'[()]', text[opening:]):
    depth += 1 if found[0] == '(' else -1
    if not depth:
      return opening + found.end()
  raise ValueError(f'no closing parenthesis in {text[:80]!r}')


def _source_lines(tables: dict[str, dict[int, str]], package: str) -> dict[int, str]:
  """Returns 'mmjax/model/lm.py:123' by stack frame: the innermost line of the package, '' where there is none."""
  files = {n: name.strip('"') for n, name in tables['FileNames'].items()}

  def numbers(text: str) -> dict[str, int]:
    return {name: int(value) for name, value in re.findall(r'(\w+)=(\d+)', text)}

  places = {n: numbers(text) for n, text in tables['FileLocations'].items()}
  frames = {n: numbers(text) for n, text in tables['StackFrames'].items()}
  shift = int(frames.get(1, {}).get('parent_frame_id') == 1)  # XLA writes the parent's number plus one

  def find(frame: int) -> str:
    while frame in frames:
      place = places.get(frames[frame]['file_location_id'], {})
      file = files.get(place.get('file_name_id', 0), '')
      parts = file.split('/')
      cut = len(parts) - 1 - parts[::-1].index(package) if package in parts else 0
      if cut and 'site-packages' not in parts and parts[-1] != HELPER:
        return f'{"/".join(parts[cut:])}:{place["line"]}'
      frame = frames[frame].get('parent_frame_id', 0) - shift
    return ''

  return {frame: find(frame) for frame in frames}


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


def base_of_update(module: 'Module', instruction: Instruction) -> dict[int, int]:
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
