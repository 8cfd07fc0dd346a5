"""Reads a compiled XLA module's text: its computations, their instructions, and the source lines that these come from.

Source of the format: openxla/xla, docs/operation_semantics and the text that `compiled.as_text()` gives on NVIDIA. What
the kernels in it cost: mmjax/ahead/kernels.py.
"""

import dataclasses
import math
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator

BITS_OF_TYPE = {'pred': 8, 's4': 4, 'u4': 4, 'token': 0, 'opaque': 0}  # the others carry their width in their name
HELPER = 'matmul.py'  # multiplies for everybody: its callers say more
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
    bits = BITS_OF_TYPE[self.dtype] if self.dtype in BITS_OF_TYPE else int(re.search(r'\d+', self.dtype)[0])
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
    called = re.findall(r'\b(?:to_apply|calls|\w+_computation)=%?([\w.\-]+)', self.rest)
    listed = re.findall(r'\bbranch_computations=\{([^}]*)\}', self.rest)
    return called + [name.strip(' %') for names in listed for name in names.split(',')]

  @property
  def op_name(self) -> str:
    """Where JAX says it comes from: 'jit(train_step)/while/body/transpose(jvp(gate))/dot_general'."""
    return self.attribute('op_name') or ''


class Module:
  """A compiled module's computations and its table of source lines."""

  def __init__(self, text: str):
    """Reads the text, as `compiled.as_text()` gives it."""
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
    self._lines = _source_lines(tables)

  def instructions(self) -> Iterator[tuple[str, Instruction]]:
    """Yields every instruction with the name of its computation."""
    for name, computation in self.computations.items():
      yield from ((name, instruction) for instruction in computation.values())

  def line_of(self, instruction: Instruction) -> str:
    """Returns the source line that an instruction comes from, of a fusion without one that of most of its parts."""
    frame = re.search(r'stack_frame_id=(\d+)', instruction.rest)
    if frame and self._lines.get(int(frame[1])):
      return self._lines[int(frame[1])]
    return self.common(instruction, self.line_of)

  def name_of(self, instruction: Instruction) -> str:
    """Returns an instruction's op_name, of a fusion without one that of most of its parts."""
    return instruction.op_name or self.common(instruction, lambda part: part.op_name)

  def common(self, instruction: Instruction, read: Callable[[Instruction], str | None]) -> str:
    """Returns what is read off most parts of a fusion; '' where that is nothing, or there are no parts."""
    inner = self.computations.get(instruction.attribute('calls') or '', {})
    found = Counter(said for part in inner.values() if (said := read(part)))
    return found.most_common(1)[0][0] if found else ''


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


def _source_lines(tables: dict[str, dict[int, str]]) -> dict[int, str]:
  """Returns 'mmjax/model/lm.py:123' by stack frame: the innermost line of this package, '' where there is none."""
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
      cut = len(parts) - 1 - parts[::-1].index('mmjax') if 'mmjax' in parts else 0
      if cut and 'site-packages' not in parts and parts[-1] != HELPER:
        return f'{"/".join(parts[cut:])}:{place["line"]}'
      frame = frames[frame].get('parent_frame_id', 0) - shift
    return ''

  return {frame: find(frame) for frame in frames}
