"""Which form of a kernel to trace: that for a CPU, which computes slowly and has a cache, or that for a GPU.

A GPU computes much faster than it moves memory, so that its forms count what is read, written and kept. The
choice is made here alone, while a program is traced: for the devices that JAX has, unless `traced_for` names others.
"""

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar

import jax
from jax.ad_checkpoint import checkpoint_name

_platform = ContextVar('platform', default='')


def on_cpu() -> bool:
  """Tells whether what is being traced is for a CPU."""
  return (_platform.get() or jax.default_backend()) == 'cpu'


def recomputed_on_gpu(function: Callable) -> Callable:
  """Keeps nothing of a function for the backward pass but its inputs, where memory is what bounds a batch."""
  return function if on_cpu() else jax.checkpoint(function)


def kept(x: jax.Array) -> jax.Array:
  """Marks what rematerialisation keeps of a block: it takes few bytes, or to compute it again takes long."""
  return checkpoint_name(x, 'kept')


KEEP = jax.checkpoint_policies.save_only_these_names('kept')  # the policy for jax.checkpoint


@contextlib.contextmanager
def traced_for(platform: str) -> Iterator[None]:
  """Traces for another platform than JAX's own here: 'cpu', 'gpu', 'cuda', ...

  JAX keeps what it has traced, whatever it was traced for: a function must not be traced for two.
  """
  token = _platform.set(platform)
  try:
    yield
  finally:
    _platform.reset(token)
