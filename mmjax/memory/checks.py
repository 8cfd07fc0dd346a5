"""What a memory refuses, because it would read other rows without a word, or fail far from here."""

import dataclasses
import functools
import math
import numbers
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.core import FrozenDict
from flax.traverse_util import flatten_dict
from jax import Array
from jax.typing import DTypeLike

from mmjax.choices import ONE_ROW, QUERY_KEY_NORM, SCORE_ACTIVATION, SCORES, not_even, not_square
from mmjax.kernels.packed_bank import PackedBank
from mmjax.memory.ngram import SIGN_VECTORS
from mmjax.memory.types import Bank, Params, outside, shape_of

if TYPE_CHECKING:
  from mmjax.memory.base import Memory
  from mmjax.memory.gate import GatedMemory

WORDS = {'query_key_norm': QUERY_KEY_NORM, 'activation': SCORE_ACTIVATION, 'scores': SCORES}
MOST_ROWS = 2**31 - 1


def check_sizes(memory: 'Memory') -> None:
  """Raises ValueError if a field that mmjax's classes give a memory is no number of its kind above 0, or no bool.

  Numbers become Python's: those of NumPy would overflow, and decide dtypes.
  """
  for field in dataclasses.fields(memory):
    if field.name in _own_fields(type(memory)):
      value = getattr(memory, field.name)
      check_size(field.name, value, field.type)
      if isinstance(value, np.number):
        object.__setattr__(memory, field.name, value.item())
  if memory.n_rows > MOST_ROWS:
    raise ValueError(f'n_rows={memory.n_rows} must be at most {MOST_ROWS}: rows have numbers of int32')


def check_gate(memory: 'GatedMemory') -> None:
  """Raises ValueError if a gate cannot have such sizes, or would not learn."""
  name, root = 'query_dim' if memory.query_dim else 'row_dim', math.isqrt(memory.n_rows)
  if said := not_square('n_rows', memory.n_rows) or not_even(name, getattr(memory, name)):
    raise ValueError(said)
  if memory.rows_per_head > root:
    raise ValueError(f'rows_per_head={memory.rows_per_head} must be at most {root}, the sub-keys of each half')
  for field in dataclasses.fields(memory):
    value, words = getattr(memory, field.name), WORDS.get(field.name)
    if words and value not in words:
      raise ValueError(f'{field.name}={value!r} must be one of {", ".join(words)}')
  if memory.rows_per_head == 1 and memory.activation == 'softmax' and memory.gate_learns:
    raise ValueError(f"rows_per_head=1 must be at least 2: {ONE_ROW}; or activation must be 'relu'")


def check_inputs(
  memory: 'Memory',
  params: Params,
  x_BTD: Array,
  bank_MP: Bank,
  row_BThr: Array | None,
  sign_BTh: Array | None,
  kept_BTh: Array | None,
  dtype: DTypeLike,
) -> None:
  """Raises ValueError if what `Memory.apply` takes has not the shapes that the sizes of a memory say, or no floats."""
  if not _is_float(dtype):
    raise ValueError(f"dtype={dtype!r} must be a floating-point dtype, such as 'float32' or 'bfloat16'")
  _check_floats('the input', x_BTD)
  if x_BTD.ndim != 3 or x_BTD.shape[-1] != memory.dim:
    raise ValueError(f'the input must have the shape (B, T, dim={memory.dim}), not {x_BTD.shape}')
  if not x_BTD.size:
    raise ValueError(f'the input of shape {x_BTD.shape} has no position')
  check_bank(memory, bank_MP)
  if not isinstance(params, dict | FrozenDict):
    raise ValueError(f'the parameters must be a nested dict as `init` returns it, not of type {type(params).__name__}')
  given = flatten_dict(params)
  for path, shape in param_shapes(memory).items():
    found = shape_of(given.get(path))
    if found != shape:
      raise ValueError(f'the parameter {"/".join(path)} must have the shape {shape}, not {found}')
    _check_floats(f'the parameter {"/".join(path)}', given[path])
  for path in given:
    if path not in param_shapes(memory):
      raise ValueError(f'the parameter {"/".join(map(str, path))} is none of this memory, which would leave it out')
  if isinstance(found := shape_of(row_BThr), str):  # its shape is looked at where it is read
    raise ValueError(f'row_BThr must be an array of whole numbers, not of type {found}; a dtype is given as dtype=')
  heads = *x_BTD.shape[:2], memory.n_heads
  sign_shape = heads if memory.signs else None
  if (found := shape_of(sign_BTh)) != sign_shape:
    must = f'have the shape {sign_shape}' if sign_shape else 'be None'
    raise ValueError(f'the numbers of signs must {must}, not {found}: see NgramBag.signs_of')
  if sign_BTh is not None:
    check_numbers('sign_BTh', sign_BTh, SIGN_VECTORS)
  if kept_BTh is not None:
    if (found := shape_of(kept_BTh)) != heads:
      raise ValueError(f'the factors of heads must have the shape {heads}, not {found}')
    _check_floats('the factors of heads', kept_BTh)


def check_bank(memory: 'Memory', bank_MP: Bank) -> None:
  """Raises ValueError if a bank has not the shape that a memory says, or no floats."""
  size = memory.n_rows, memory.row_dim
  if (found := shape_of(bank_MP)) != size:
    raise ValueError(f'the bank must have the shape (n_rows, row_dim)={size}, not {found}')
  if not isinstance(bank_MP, PackedBank):
    _check_floats('the bank', getattr(bank_MP, 'part_MP', getattr(bank_MP, 'bank_MP', bank_MP)))


def check_numbers(name: str, number: Array, end: int) -> None:
  """Raises ValueError unless they are whole and in [0, end); of traced ones nobody can look at the values."""
  if not jnp.issubdtype(number.dtype, jnp.integer):
    raise ValueError(f'{name} must hold whole numbers, not {number.dtype}')
  if (wrong := outside(number, 0, end)) is not None:
    raise ValueError(f'{name} must hold numbers from 0 to {end - 1}, not {wrong}')


def _is_float(dtype: DTypeLike) -> bool:
  try:
    return dtype is not None and jnp.issubdtype(dtype, jnp.floating)  # NumPy takes None as float64
  except TypeError:  # it is no dtype
    return False


def _check_floats(name: str, value: Any) -> None:
  """Raises ValueError for what is no array of floats: JAX would compute with integers, and drop imaginary parts."""
  dtype = getattr(value, 'dtype', None)
  if dtype is None or not _is_float(dtype):
    raise ValueError(f'{name} must be an array of floats, not {type(value).__name__ if dtype is None else dtype}')


@functools.cache
def _own_fields(cls: type) -> set[str]:
  """Returns the fields that mmjax's classes give a memory; those of others' subclasses may mean anything."""
  bases = (base for base in cls.__mro__ if base.__module__.startswith('mmjax.'))
  return {field.name for base in bases if dataclasses.is_dataclass(base) for field in dataclasses.fields(base)}


def check_size(name: str, value: Any, kind: Any) -> None:
  """Raises ValueError if a field of a memory is no number of its kind, or no bool; other kinds are not looked at."""
  whole = isinstance(value, numbers.Integral) and not isinstance(value, bool) and value >= 1
  if kind is int and not whole:
    raise ValueError(f'{name}={value!r} must be a whole number of at least 1')
  if kind == int | None and not (whole or value is None):
    raise ValueError(f'{name}={value!r} must be a whole number of at least 1, or None')
  number = isinstance(value, numbers.Real) and not isinstance(value, bool)
  if kind is float and not (number and 0 < value < math.inf):
    raise ValueError(f'{name}={value!r} must be a finite number above 0')
  if kind is bool and type(value) is not bool:
    raise ValueError(f'{name}={value!r} must be True or False')


@functools.cache
def param_shapes(memory: 'Memory') -> dict[tuple[str, ...], tuple[int, ...]]:
  """Returns the shapes of the parameters of a memory, by the names on the way to them."""
  params = jax.eval_shape(lambda: memory.init(jax.random.key(0)))
  return {path: leaf.shape for path, leaf in flatten_dict(params).items()}
