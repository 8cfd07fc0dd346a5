"""What an update must cost by its compiled kernels: bytes, products, and the least time that these take on a card.

The time is a bound and no measurement: every kernel takes at least its bytes over the memory's bandwidth, its products
over their rate, or what it sends over the link, whichever is most; kernels run one after another. What keeps a real
kernel from those rates, and the time to start it, is not counted; what a cache keeps between two kernels is not either.
"""

from collections import Counter
from collections.abc import Iterable

from mmjax.ahead.cards import Card
from mmjax.ahead.kernels import Kernel


def least_seconds(kernel: Kernel, card: Card) -> float:
  """Returns the least time of all runs of a kernel in an update."""
  products = sum(flops / card.rate(dtype) for dtype, flops in kernel.flops.items())
  return kernel.runs * max(kernel.bytes / card.bandwidth, products, kernel.sends / card.link)


def bound_seconds(kernels: Iterable[Kernel], card: Card) -> float:
  """Returns the least time of an update."""
  return sum(least_seconds(kernel, card) for kernel in kernels)


def seconds_by_kind(kernels: Iterable[Kernel], card: Card) -> Counter[str]:
  """Returns the least time of each kind of kernel."""
  seconds = Counter()
  for kernel in kernels:
    seconds[kernel.kind] += least_seconds(kernel, card)
  return seconds


def costliest(kernels: Iterable[Kernel], card: Card) -> list[tuple[float, float, int, str, str, str]]:
  """Returns (least seconds, bytes, runs, kind, operation, source line) of each line's kernels, the longest first."""
  seconds, moved, runs = Counter(), Counter(), Counter()
  for kernel in kernels:
    key = kernel.kind, short_name(kernel), kernel.source
    seconds[key] += least_seconds(kernel, card)
    moved[key] += kernel.runs * kernel.bytes
    runs[key] += kernel.runs
  return [(spent, moved[key], runs[key], *key) for key, spent in seconds.most_common()]


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
