"""What depends on the maker of the device: compiler options and known faults of its compiler.

Without Triton is a promise of this package, and XLA has a Triton of its own for matrix products, normalisations and
reductions on NVIDIA: it is off unless `runtime.triton_gemm` asks for it. `TRITON` finds what is left of it, or of
Pallas, in a lowered or compiled module.
"""

import re
from pathlib import Path

import jax

from mmjax.config import Config

# Custom calls of Triton, Pallas and Mosaic (what Pallas becomes on NVIDIA), and XLA's own Triton fusions.
TRITON = re.compile(r'triton|pallas|mosaic', re.IGNORECASE)
# The passes of XLA that make Triton fusions of what is no matrix product.
TRITON_PASSES = 'triton-softmax-rewriter,fusion-block-level-rewriter'
SLOW_SCATTER = (0, 10, 2), (0, 11, 0)  # first and last version of jaxlib


def is_nvidia(platform: str) -> bool:
  """Says whether JAX's name of a platform means an NVIDIA GPU."""
  return platform in ('gpu', 'cuda')


def compiler_options(config: Config, platform: str) -> dict[str, bool | str]:
  """Returns XLA's options for this platform, as `jax.jit` and `compile` take them."""
  if not is_nvidia(platform):
    return {}
  if config.runtime.triton_gemm:
    return {'xla_gpu_enable_triton_gemm': True}
  return {'xla_gpu_enable_triton_gemm': False, 'xla_disable_hlo_passes': TRITON_PASSES}


def use_compilation_cache(config: Config) -> None:
  """Keeps compiled programs in runtime.compilation_cache_dir; to be called before the first is compiled."""
  if config.runtime.compilation_cache_dir:
    jax.config.update('jax_compilation_cache_dir', str(Path(config.runtime.compilation_cache_dir).absolute()))


def count_triton(module: str) -> int:
  """Counts the lines of a compiled module in which Triton, Pallas or Mosaic is called."""
  return sum(bool(TRITON.search(line)) for line in module.splitlines())


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
