"""Which part of the model an operation of a compiled step belongs to: the `jax.named_scope` that it came from.

The compiler keeps that scope in the operation's name. A fused operation counts for the scope of its result, or for that
of most of its parts. It needs no JAX: what compiles for another machine tells JAX of it before JAX is imported.
"""

import re

from mmjax.config.sublayers import SUBLAYERS
from mmjax.run.hlo import Module

# The named scopes of model and step; that of a sublayer is its kind, and there are more within. The innermost counts.
SCOPES = (
  'embedding', 'norm', 'attention', 'value_embedding', 'value_rows', 'gate', 'ngram', 'lookup', 'bag', 'fusion',
  'feed_forward', 'router', 'loss', 'bank_usage', 'optimizer', *SUBLAYERS,
)  # fmt: skip
_SCOPE = re.compile(rf'(?:^|[/(])({"|".join(SCOPES)})(?=[/)]|$)')


def operation_scopes(hlo_text: str) -> dict[str, str]:
  """Returns the scope of every instruction of a compiled module that has one.

  Args:
    hlo_text: as `compiled.as_text()` gives it.
  """
  module, scopes = Module(hlo_text), {}
  for _, instruction in module.instructions():
    own = innermost_scope(instruction.op_name)
    if scope := own or module.common(instruction, lambda part: innermost_scope(part.op_name)):
      scopes[instruction.name] = scope
  return scopes


def innermost_scope(op_name: str) -> str | None:
  """Returns 'gate' for 'jit(train_step)/while/body/transpose(jvp(gate))/dot_general'."""
  found = _SCOPE.findall(op_name)
  return found[-1] if found else None
