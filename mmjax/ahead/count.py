"""What an update must cost by its compiled kernels: bytes, products, and the least time that these take on a card.

The time is a bound and no measurement: every kernel takes at least its bytes over the memory's bandwidth, its products
over their rate, or what it sends over the link, whichever is most; kernels run one after another. What keeps a real
kernel from those rates, and the time to start it, is not counted; what a cache keeps between two kernels is not either.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

from mmjax.ahead.cards import Card
from mmjax.ahead.kernels import Kernel


def least_seconds(kernel: Kernel, card: Card) -> float:
  """Returns the least time of all runs of a kernel in an update."""
  products = sum(flops / card.rate(dtype) for dtype, flops in kernel.flops.items())
  return kernel.runs * max(kernel.bytes / card.bandwidth, products, kernel.sends / card.link)


def bound_seconds(kernels: Iterable[Kernel], card: Card) -> float:
  """Returns the least time of an update."""
  return sum(least_seconds(kernel, card) for kernel in kernels)


def describe_kernels(kernels: Sequence[Kernel], card: Card, top: int) -> dict[str, Any]:
  """Returns what an update costs by its kernels, as JSON can hold it: sums, and parts, the longest first.

  Each of `kinds`, and of `costliest`, the `top` source lines, has `seconds`, the least time, `bytes` and `runs`.
  """
  by_kind, by_line = defaultdict(Counter), defaultdict(Counter)
  for kernel in kernels:
    cost = {'seconds': least_seconds(kernel, card), 'bytes': kernel.runs * kernel.bytes, 'runs': kernel.runs}
    by_kind[kernel.kind].update(cost)
    by_line[kernel.kind, short_name(kernel), kernel.source].update(cost)

  def longest(parts: dict[Any, Counter]) -> list[tuple[Any, Counter]]:
    return sorted(parts.items(), key=lambda part: -part[1]['seconds'])

  return {
    'products': {dtype: sum(k.runs * k.flops.get(dtype, 0) for k in kernels) for dtype in ('bf16', 'tf32', 'f32')},
    'bytes': sum(kernel.runs * kernel.bytes for kernel in kernels),
    'sends': sum(kernel.runs * kernel.sends for kernel in kernels),
    'kernels': sum(kernel.runs for kernel in kernels),
    'different_kernels': len(kernels),
    'triton': sum(kernel.kind == 'triton' for kernel in kernels),
    'kinds': [{'kind': kind} | cost for kind, cost in longest(by_kind)],
    'costliest': [
      cost | {'kind': kind, 'operation': operation, 'line': line}
      for (kind, operation, line), cost in longest(by_line)[:top]
    ],
    'collectives': [
      {'kind': k.target, 'runs': k.runs, 'sends': k.sends, 'arrays': list(map(str, k.shapes)), 'line': k.source}
      for k in kernels
      if k.kind == 'collective'
    ],
  }


def short_name(kernel: Kernel) -> str:
  """Returns 'backward norm/reduce_sum' for 'jit(train_step)/while/body/transpose(jvp(norm))/reduce_sum'."""
  parts = [
    part for part in kernel.op_name.split(';')[0].split('/') if part not in ('while', 'body', 'eval_jaxpr', 'cond')
  ]
  parts = [part for part in parts if not part.startswith(('jit(', 'branch_', 'closed_call'))]
  backward = any(part.startswith('transpose(') for part in parts)
  scopes = [part.replace('transpose(', '').replace('jvp(', '').rstrip(')') for part in parts]
  said = '/'.join(dict.fromkeys(scope for scope in scopes if scope))
  return f'{"backward " if backward else ""}{said}' or kernel.name
