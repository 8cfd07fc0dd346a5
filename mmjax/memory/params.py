"""Parameters of a memory: how they and a bank start, and how they are a module of Flax NNX."""

import math
import numbers

import jax
import jax.numpy as jnp
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict
from jax import Array
from jax.typing import DTypeLike

from mmjax.kernels.matmul import uniform
from mmjax.memory.base import Memory
from mmjax.memory.checks import MOST_ROWS, check_size, param_shapes
from mmjax.memory.types import Bank, Params, SublayerOutput


def init_kernels(rngs: nnx.Rngs, **shapes: tuple[int, int]) -> Params:
  """Returns float32 kernels (in, out) of linear layers, by name, random as torch's."""
  return {name: {'kernel': uniform(rngs.params(), shape, fan_in=shape[0])} for name, shape in shapes.items()}


def init_bank(key: Array, *, n_rows: int, row_dim: int, std: float | None = None) -> Array:
  """Returns the first values of a bank, float32 (M, P), normal.

  Args:
    key: of `jax.random`.
    n_rows: M; a square, for a memory that has a gate.
    row_dim: P.
    std: standard deviation; None: P^-0.5, so that rows have length 1.

  Raises:
    ValueError: if a size is no whole number from 1 on (rows: of int32), or `std` is negative or not finite.
  """
  check_size('n_rows', n_rows, int)
  check_size('row_dim', row_dim, int)
  n_rows, row_dim = int(n_rows), int(row_dim)
  std = row_dim**-0.5 if std is None else std
  if n_rows > MOST_ROWS:
    raise ValueError(f'n_rows={n_rows} must be at most {MOST_ROWS}: rows have numbers of int32')
  if isinstance(std, bool) or not isinstance(std, numbers.Real) or not 0 <= std < math.inf:
    raise ValueError(f'std={std!r} must be a finite number of Python or NumPy, 0 or above')
  return float(std) * jax.random.normal(key, (n_rows, row_dim), jnp.float32)


class ParamTree(nnx.Module):
  """A nested dict of float32 arrays, `params`, as modules under the same names."""

  def __init__(self, params: Params):
    for name, value in params.items():
      setattr(self, name, ParamTree(value) if isinstance(value, dict) else nnx.Param(value))


class MemoryLayer(ParamTree):
  """A memory with its parameters.

  Args:
    memory: of any kind.
    rngs: of flax.nnx; its stream `params` draws the first values.
  """

  def __init__(self, memory: Memory, *, rngs: nnx.Rngs):
    super().__init__(memory.init(rngs))
    self.memory = memory

  def __call__(
    self,
    x_BTD: Array,
    bank_MP: Bank,
    row_BThr: Array | None = None,
    sign_BTh: Array | None = None,
    kept_BTh: Array | None = None,
    *,
    dtype: DTypeLike = jnp.float32,
  ) -> SublayerOutput:
    """Does what `Memory.apply` does, and raises what it raises."""
    return self.memory.apply(params_of(self, self.memory), x_BTD, bank_MP, row_BThr, sign_BTh, kept_BTh, dtype=dtype)


def params_of(module: nnx.Module, memory: Memory) -> Params:
  """Returns the parameters of a memory, a nested dict of arrays, of a module that may have others, too."""
  found = flatten_dict(nnx.to_pure_dict(nnx.state(module)))
  return unflatten_dict({path: value for path, value in found.items() if path in param_shapes(memory)})
