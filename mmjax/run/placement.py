"""How a model runs on a machine: devices, attention, dtype, compiler options; decided here for all that runs one.

A run states it in `runtime` and `train.dtype`. Training takes it as it stands, or is refused. What reads a trained
model (evaluation, generation, inspection) may be elsewhere: it takes the run's attention where that can run, else
'auto'; what a user asks for instead, as it stands. Evaluation has the run's dtype, so that its losses are those of
training; generation and inspection have float32, so that what they show does not hang on the machine.

Without Triton is a promise of this package, and XLA has a Triton of its own for matrix products, normalisations and
reductions on NVIDIA: it is off unless `runtime.triton_gemm` asks for it. `TRITON` in
mmjax/run/nvidia.py finds what is left of it in a compiled module.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.stages import Compiled
from jax.typing import DTypeLike

from mmjax.config import CHOICES, Config
from mmjax.environment import return_freed_memory
from mmjax.errors import UserError
from mmjax.kernels.forms import traced_for
from mmjax.run.sharding import make_mesh, one_device

# The passes of XLA that make Triton fusions of what is no matrix product.
TRITON_PASSES = 'triton-softmax-rewriter,fusion-block-level-rewriter'
CUDNN_HEAD_DIM = 128  # the most channels of a head that its flash attention takes on every GPU


@dataclasses.dataclass(frozen=True)
class Placement:
  """How a model runs: on the devices of `mesh`, with a backend of mmjax.kernels.attention, with matrix products
  in `dtype`, and with these options of XLA's.
  """

  mesh: Mesh
  attention: str
  dtype: Any
  options: dict[str, bool | str]

  @property
  def platform(self) -> str:
    """JAX's name of what the devices are: 'cpu', 'gpu', 'cuda', ..."""
    return platform_of(self.mesh)

  def jit(self, function: Callable, **settings: Any) -> Callable:
    """Returns `jax.jit(function, **settings)` with these compiler options."""
    return jax.jit(function, compiler_options=self.options, **settings)

  def compile(self, function: Callable, *inputs: Any, options: dict | None = None, **settings: Any) -> Compiled:
    """Compiles `jax.jit(function, **settings)` for such inputs and these devices, which need not be here.

    `options` are XLA's, beside those of the placement. What the compiler needed is not kept.
    """
    with traced_for(self.platform):
      compiled = jax.jit(function, **settings).lower(*inputs).compile(self.options | (options or {}))
    return_freed_memory()
    return compiled


def place(config: Config, devices: Sequence[jax.Device] | None = None) -> Placement:
  """Returns how a run's settings say that its model runs, on these devices or JAX's.

  Raises:
    UserError: if there are too few devices, they do not divide the batch, or attention cannot run there.
  """
  return _place(config, make_mesh(config, devices), config.runtime.attention, config.train.dtype)


def place_reader(config: Config, *, dtype: DTypeLike, attention: str | None = None) -> Placement:
  """Returns how a trained model is read, on one device of this machine.

  Args:
    config: of the run.
    dtype: of the matrix products.
    attention: backend to use instead of the run's; None: the run's, or 'auto' where that cannot run here.

  Raises:
    UserError: if there is no such backend or dtype, or the backend cannot run here.
  """
  with contextlib.suppress(TypeError):  # of what is no dtype at all
    dtype = jnp.dtype(dtype).name
  wanted = config.runtime.attention if attention is None else attention
  for name, value in {'train.dtype': dtype, 'runtime.attention': wanted}.items():
    if value not in CHOICES[name]:
      raise UserError(f'{name.partition(".")[2]}={value!r} must be one of {", ".join(CHOICES[name])}')
  try:
    return _place(config, one_device(), wanted, dtype)
  except UserError:
    if attention is not None:
      raise
    return _place(config, one_device(), 'auto', dtype)


def _place(config: Config, mesh: Mesh, attention: str, dtype: DTypeLike) -> Placement:
  platform = platform_of(mesh)
  masked = config.model.max_seq_len if config.data.isolate_documents else None
  backend = attention_backend(attention, dtype, platform, mesh.size, config.model.head_dim, masked)
  return Placement(mesh, backend, jnp.dtype(dtype), compiler_options(config, platform))


def platform_of(mesh: Mesh) -> str:
  """Returns JAX's name of what a mesh's devices are."""
  return mesh.devices.flat[0].platform


def is_nvidia(platform: str) -> bool:
  """Says whether JAX's name of a platform means an NVIDIA GPU."""
  return platform in ('gpu', 'cuda')


def compiler_options(config: Config, platform: str) -> dict[str, bool | str]:
  """Returns XLA's options for this platform, as `jax.jit` and `compile` take them."""
  if not is_nvidia(platform):
    return {}
  if config.runtime.triton_gemm:
    return {'xla_gpu_enable_triton_gemm': True}
  return {
    'xla_gpu_enable_triton_gemm': False,
    'xla_disable_hlo_passes': TRITON_PASSES,
    'xla_gpu_experimental_enable_fusion_autotuner': False,  # or it tries Triton for each fusion, on a real GPU only
  }


def use_compilation_cache(config: Config) -> None:
  """Keeps compiled programs in runtime.compilation_cache_dir; to be called before the first is compiled.

  Raises:
    UserError: if it is a file.
  """
  if not (folder := config.runtime.compilation_cache_dir):
    return
  if Path(folder).exists() and not Path(folder).is_dir():
    raise UserError(f'runtime.compilation_cache_dir={folder!r} is a file and must be a folder')
  jax.config.update('jax_compilation_cache_dir', str(Path(folder).absolute()))


def attention_backend(
  name: str, dtype: DTypeLike, platform: str, n_devices: int, head_dim: int, masked_length: int | None = None
) -> str:
  """Resolves 'auto' to the fastest backend for the machine, and refuses what cannot run there.

  Args:
    name: 'auto', 'xla', 'xla_blocked' or 'cudnn'.
    dtype: the compute dtype.
    platform: of the devices: 'cpu', 'gpu', 'cuda', ...
    n_devices: in the mesh.
    head_dim: H.
    masked_length: T of rows whose documents are isolated; None: no rows are.

  Raises:
    UserError: if the backend cannot run there.
  """
  is_half_on_nvidia = is_nvidia(platform) and jnp.dtype(dtype).itemsize == 2
  fits_cudnn = head_dim % 8 == 0 and head_dim <= CUDNN_HEAD_DIM
  odd_mask = masked_length is not None and masked_length % 2 == 1  # see causal_attention
  if name == 'auto':
    if is_half_on_nvidia and fits_cudnn and not odd_mask:
      return 'cudnn'
    return 'xla_blocked' if platform == 'cpu' and n_devices == 1 else 'xla'
  if name == 'cudnn' and not is_half_on_nvidia:
    needs = f'an NVIDIA GPU and bfloat16 (train.dtype), not {platform} and {jnp.dtype(dtype).name}'
  elif name == 'cudnn' and not fits_cudnn:
    needs = (
      f'heads whose width is a multiple of 8 and at most {CUDNN_HEAD_DIM}, not {head_dim} (model.dim / model.n_heads)'
    )
  elif name == 'cudnn' and odd_mask:
    needs = f'rows of an even length where data.isolate_documents is on, not model.max_seq_len={masked_length}'
  elif name == 'xla_blocked' and n_devices > 1:
    needs = f'one device, not {n_devices}'
  else:
    return name
  raise UserError(f"attention '{name}' (runtime.attention) needs {needs}; 'auto' picks what runs here")
