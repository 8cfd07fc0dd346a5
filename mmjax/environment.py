"""What around mmjax decides its numbers, and is not left to chance: the version of jaxlib, and JAX's global settings.

A command ignores such settings in its environment (`ignore_jax_settings`). In somebody else's program mmjax changes
nothing: what it computes on its own account (`mmjax.load`, `fit`) runs within `own_jax_settings`, and its modules and
kernels name the dtypes that they mean.
"""

import functools
import os
import re
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from importlib import metadata

# As jax.config names them without `jax_`, with JAX's own defaults. They change results, or stop a run that would go on.
SETTINGS = {
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


def ignore_jax_settings() -> str | None:
  """Removes JAX's settings from the environment, and from JAX if it has read them; says in one sentence which."""
  found = []
  for name, value in (SETTINGS | IN_COMMANDS).items():
    variable = f'JAX_{name}'.upper()
    if variable in os.environ:
      found.append(f'{variable}={os.environ.pop(variable)}')
      if jax := sys.modules.get('jax'):
        jax.config.update(f'jax_{name}', value)
  return f'Not used, because results must not depend on it: {", ".join(found)}' if found else None


@contextmanager
def own_jax_settings() -> Iterator[None]:
  """Computes with JAX's default settings, in this thread, whatever the program around it has set; a decorator, too."""
  import jax

  with ExitStack() as stack:
    for name, value in SETTINGS.items():
      stack.enter_context(getattr(jax, name)(value))
    yield


@functools.cache
def wrong_jaxlib() -> str | None:
  """Returns one sentence where the jaxlib that is installed computes wrong results, else None.

  0.10.2 does on CPUs, where a jitted product over a few columns is reduced: sum((A @ x) ** 2), A 3 x 3, for 40,000 x.
  Source: jax-ml/jax#39103; 0.10.1, 0.11.0, 0.11.1 and 0.11.2 were found right.
  """
  version = metadata.version('jaxlib')
  if [int(n) for n in re.findall(r'\d+', version)[:3]] != [0, 10, 2]:
    return None
  return (
    f'jaxlib {version} computes wrong results on CPUs (jax-ml/jax#39103); install another with  '
    "pip install 'jax!=0.10.2,<0.12'"
  )
