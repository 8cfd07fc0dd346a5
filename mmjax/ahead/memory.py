"""What lies in the device's memory when it is fullest, by part of the model, from a scheduled module's text.

A buffer lives from the kernel that writes it to the last that reads it. What a loop carries, and what a donated
argument gives its place to, has one place. The sum is the compiler's own `peak_memory_in_bytes` within some percent
(tests/test_ahead.py).
"""

from collections import Counter

from mmjax.ahead.kernels import FREE, base_of_update, results_of
from mmjax.run.hlo import Instruction, Module
from mmjax.run.scopes import innermost_scope

ALIASES = FREE - {'parameter', 'constant', 'tuple', 'get-tuple-element', 'after-all', 'partition-id', 'replica-id'}


def live_at_peak(module: Module) -> Counter[str]:
  """Returns bytes by part: 'state', which includes the batch; 'gradients'; scopes of the model, such as 'attention'.

  What is in no scope counts for the source file that it comes from.
  """
  return _Liveness(module, module.entry, entry=True).peak()


class _Liveness:
  """Buffers of one computation, from when and until when they live."""

  def __init__(self, module: Module, computation: str, *, entry: bool):
    self.module, self.entry = module, entry
    self.body = module.computations[computation]
    self.buffers: list[list] = []  # [bytes, part, first, last]
    self.places: dict[str, list[int]] = {}  # of a value: the buffers of its leaves
    self.inside: dict[int, Counter[str]] = {}  # what a loop or a branch needs while it runs
    for now, instruction in enumerate(self.body.values()):
      self._add(now, instruction)
    end = len(self.body)
    for instruction in self.body.values():
      if instruction.root:
        self._use(instruction.name, end)
        for place in self.places[instruction.name]:  # goes where what came in was
          self.buffers[place][0] = self.buffers[place][0] if self.buffers[place][1] == 'state' else 0

  def peak(self) -> Counter[str]:
    """Returns what lives when most does."""
    changes = Counter()
    for size, _, first, last in self.buffers:
      changes[first] += size
      changes[last + 1] -= size
    best, best_at, alive = -1.0, 0, 0.0
    for now in range(len(self.body) + 1):
      alive += changes[now]
      here = alive + sum(self.inside.get(now, Counter()).values())
      if here > best:
        best, best_at = here, now
    parts = Counter(self.inside.get(best_at, Counter()))
    for size, part, first, last in self.buffers:
      if first <= best_at <= last:
        parts[part] += size
    return parts

  def _new(self, size: float, part: str, now: int) -> int:
    self.buffers.append([size, part, now, now])
    return len(self.buffers) - 1

  def _use(self, name: str, now: int) -> None:
    for place in self.places.get(name, ()):
      self.buffers[place][3] = max(self.buffers[place][3], now)

  def _add(self, now: int, instruction: Instruction) -> None:
    name, opcode, operands = instruction.name, instruction.opcode, instruction.operands
    for operand in operands if opcode != 'get-tuple-element' else ():  # which looks at one of many
      self._use(operand, now)
    if opcode == 'parameter':
      sizes = [shape.bytes if self.entry else 0 for shape in instruction.shapes]
      self.places[name] = [self._new(size, 'state', 0) for size in sizes]
      for place in self.places[name]:
        self.buffers[place][3] = len(self.body)
    elif opcode == 'tuple':
      self.places[name] = [place for operand in operands for place in self.places[operand]]
    elif opcode == 'get-tuple-element':
      places, index = self.places[operands[0]], int(instruction.attribute('index'))
      self.places[name] = places[index : index + len(instruction.shapes)] if index < len(places) else []
    elif opcode == 'while':
      self.places[name] = self.places[operands[0]]
      self.inside[now] = _Liveness(self.module, instruction.attribute('body'), entry=False).peak()
      if self.entry:
        for place in self.places[name]:
          if self.buffers[place][1] != 'state':
            self.buffers[place][1] = 'gradients'
    elif opcode in ALIASES or opcode.endswith('-done'):
      self.places[name] = self.places[operands[0]]
    elif opcode == 'constant':
      self.places[name] = [self._new(0, 'other', now)]
    else:
      if opcode in ('call', 'conditional'):
        inner = [_Liveness(self.module, branch, entry=False).peak() for branch in instruction.branches]
        self.inside[now] = max(inner, key=lambda parts: sum(parts.values()), default=Counter())
      part = innermost_scope(self.module.name_of(instruction)) or _file(self.module.line_of(instruction))
      inputs = [self.body[operand] for operand in operands if operand in self.body]
      bases = base_of_update(self.module, instruction)
      self.places[name] = [
        self.places[operands[bases[leaf]]][0] if leaf in bases else self._new(shape.bytes, part, now)
        for leaf, shape in enumerate(results_of(instruction, inputs))
      ]


def _file(line: str) -> str:
  """Returns 'fusion' for 'mmjax/kernels/fusion.py:28', 'other' for nothing."""
  return line.split(':')[0].split('/')[-1].removesuffix('.py') or 'other'
