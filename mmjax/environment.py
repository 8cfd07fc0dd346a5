"""What a process sets: JAX's global settings, which decide numbers, and how malloc treats memory that is freed.

A command ignores such settings of JAX in its environment (`ignore_jax_settings`). In somebody else's program mmjax
changes nothing: what it computes on its own account (`mmjax.load`, `fit`) runs within `own_jax_settings`, and its
modules and kernels name the dtypes that they mean.
"""

import ctypes
import os
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from importlib.util import find_spec

# As jax.config names them without `jax_`, with JAX's own defaults. They change results, or stop a run that would go on.
JAX_SETTINGS = {
  'enable_x64': False,
  'default_matmul_precision': None,
  'default_prng_impl': 'threefry2x32',
  'threefry_partitionable': True,
  'numpy_dtype_promotion': 'standard',
  'numpy_rank_promotion': 'allow',
  'softmax_custom_jvp': False,
  'debug_nans': False,
  'debug_infs': False,
  'disable_jit': False,
}
# What else commands do not use; JAX has no context manager for most of these.
IN_COMMANDS = {
  'disable_most_optimizations': False,
  'enable_custom_prng': False,
  'legacy_prng_key': 'allow',
  'optimization_level': 'UNKNOWN',
  'random_seed_offset': 0,
  'transfer_guard': 'allow',
  'use_direct_linearize': True,
}

# Modules of the extra `train`. mmjax.memory needs none of them.
TRAIN_PACKAGES = (
  'grain', 'matplotlib', 'ml_collections', 'optax', 'orbax', 'rich', 'safetensors', 'scipy', 'sentencepiece',
  'tensorboardX',
)  # fmt: skip

# For mallopt of the GNU C library, malloc.h: what to set, and the value.
MALLOC = (
  (-8, 1),  # M_ARENA_MAX: or each thread has a heap of its own, and no block of 64 MiB fits into it
  (-3, 512 << 20),  # M_MMAP_THRESHOLD: larger blocks alone are the kernel's; older versions take at most 32 MiB
  (-1, 1 << 30),  # M_TRIM_THRESHOLD: what may be free at the end of the heap
)


def count_cores() -> int:
  """Returns how many of the machine's cores this process may use."""
  return len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1


def missing_packages() -> str | None:
  """Returns one sentence where packages of the base or of the extra `train` are not installed, else None."""
  missing = [name for name in ('jax', 'flax', 'numpy', *TRAIN_PACKAGES) if find_spec(name) is None]
  if not missing:
    return None
  return (
    f'This needs {", ".join(missing)}, which {"is" if len(missing) == 1 else "are"} not installed: type  '
    "pip install -e '.[train]'  in the checkout of mmjax"
  )


def ignore_jax_settings() -> str | None:
  """Removes JAX's settings from the environment, and from JAX if it has read them; says in one sentence which."""
  found = []
  for name, value in (JAX_SETTINGS | IN_COMMANDS).items():
    variable = f'JAX_{name}'.upper()
    if variable in os.environ:
      found.append(f'{variable}={os.environ.pop(variable)}')
      if jax := sys.modules.get('jax'):
        jax.config.update(f'jax_{name}', value)
  return f'Not used, because results must not depend on it: {", ".join(found)}' if found else None


def keep_freed_memory() -> None:
  """Lets this process use memory again that it freed, where glibc would return it to the kernel; on Linux.

  XLA frees what a program on a CPU needs at its end and takes it at the next start. Of blocks of 32 MiB or more the
  kernel would then clear every page anew, which took up to a quarter of an update. Where the environment sets something
  of malloc, that holds instead.
  """
  mallopt = sys.platform == 'linux' and getattr(ctypes.CDLL(None), 'mallopt', None)
  told = any(name.startswith('MALLOC_') for name in os.environ) or 'malloc' in os.environ.get('GLIBC_TUNABLES', '')
  for parameter, value in () if told or not mallopt else MALLOC:
    mallopt(parameter, value)


def return_freed_memory() -> None:
  """Returns to the kernel what this process freed and has not used again, as after a compiler; on Linux, with glibc."""
  trim = sys.platform == 'linux' and getattr(ctypes.CDLL(None), 'malloc_trim', None)
  if trim:
    trim(0)


@contextmanager
def own_jax_settings() -> Iterator[None]:
  """Computes with JAX's default settings, in this thread, whatever the program around it has set; a decorator, too."""
  import jax

  with ExitStack() as stack:
    for name, value in JAX_SETTINGS.items():
      stack.enter_context(getattr(jax, name)(value))
    yield


if __name__ == '__main__':
  sys.exit(missing_packages())
