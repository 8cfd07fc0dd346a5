"""What depends on the maker of the device: compiler options and known faults of its compiler.

Without Triton is a promise of this package, and XLA has a Triton of its own for matrix products on NVIDIA: it is off
unless `runtime.triton_gemm` asks for it. `TRITON` finds what is left of it, or of Pallas, in a lowered or compiled
module.
"""

import re

from mmjax.config import Config

# Custom calls of Triton, Pallas and Mosaic (what Pallas becomes on NVIDIA), and XLA's own Triton fusions.
TRITON = re.compile(r'triton|pallas|mosaic', re.IGNORECASE)
SLOW_SCATTER = (0, 10, 2), (0, 11, 0)  # first and last version of jaxlib


def is_nvidia(platform: str) -> bool:
  """Says whether JAX's name of a platform means an NVIDIA GPU."""
  return platform in ('gpu', 'cuda')


def compiler_options(config: Config, platform: str) -> dict[str, bool]:
  """Returns XLA's options for a step on this platform, as `jax.jit` and `compile` take them."""
  return {'xla_gpu_enable_triton_gemm': config.runtime.triton_gemm} if is_nvidia(platform) else {}


def slow_scatter_warning(platform: str, jaxlib_version: str) -> str | None:
  """Returns one sentence where float32 scatter-adds are slow, else None.

  Sorting the rows first does not help: what is slow is every addition to memory, not their order.

  Args:
    platform: of the devices: 'cpu', 'gpu', 'cuda', ...
    jaxlib_version: '0.11.1' or '0.11.1.dev20260101'.
  """
  version = tuple(int(n) for n in re.findall(r'\d+', jaxlib_version)[:3])
  if not is_nvidia(platform) or not SLOW_SCATTER[0] <= version <= SLOW_SCATTER[1]:
    return None
  return (
    f'Warning: jaxlib {jaxlib_version} adds up the gradient of the bank and of the embedding by compare-and-swap on '
    'NVIDIA GPUs, up to hundreds of times slower where rows repeat; install jaxlib 0.11.1 or later.'
  )
