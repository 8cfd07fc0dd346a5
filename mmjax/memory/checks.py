"""What a memory refuses, because it would read other rows without a word, or fail far from here."""

import dataclasses
import functools
import math
import numbers
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict
from jax import Array

from mmjax.choices import ONE_ROW, QUERY_KEY_NORM, SCORE_ACTIVATION, SCORES, nearest_squares

if TYPE_CHECKING:
  from mmjax.memory.base import Bank, Memory, Params
  from mmjax.memory.gate import GatedMemory

WORDS = {'query_key_norm': QUERY_KEY_NORM, 'activation': SCORE_ACTIVATION, 'scores': SCORES}


def check_sizes(memory: 'Memory') -> None:
  """Raises ValueError if a field that mmjax's classes give a memory is no number of its kind above 0, or no bool."""
  for field in dataclasses.fields(memory):
    if field.name in _own_fields(type(memory)):
      _check_size(field.name, getattr(memory, field.name), field.type)


def check_gate(memory: 'GatedMemory') -> None:
  """Raises ValueError if a gate cannot have such sizes, or would not learn."""
  root = math.isqrt(memory.n_rows)
  if root * root != memory.n_rows:
    raise ValueError(f'n_rows={memory.n_rows} must be a square; nearest: {nearest_squares(memory.n_rows)}')
  if memory.rows_per_head > root:
    raise ValueError(f'rows_per_head={memory.rows_per_head} must be at most {root}, the sub-keys of each half')
  name = 'query_dim' if memory.query_dim else 'row_dim'
  if (width := getattr(memory, name)) % 2:
    raise ValueError(f'{name}={width} must be even, because a query is two sub-keys; nearest: {width + 1}')
  for field in dataclasses.fields(memory):
    value, words = getattr(memory, field.name), WORDS.get(field.name)
    if words and value not in words:
      raise ValueError(f'{field.name}={value!r} must be one of {", ".join(words)}')
  if memory.rows_per_head == 1 and memory.activation == 'softmax' and memory.gate_learns:
    raise ValueError(f"rows_per_head=1 must be at least 2: {ONE_ROW}; or activation must be 'relu'")


def check_inputs(
  memory: 'Memory', params: 'Params', x_BTD: Array, bank_MP: 'Bank', sign_BTh: Array | None, kept_BTh: Array | None
) -> None:
  """Raises ValueError if what `Memory.apply` takes has not the shapes that the sizes of a memory say."""
  if x_BTD.ndim != 3 or x_BTD.shape[-1] != memory.dim:
    raise ValueError(f'the input must have the shape (B, T, dim={memory.dim}), not {x_BTD.shape}')
  if not x_BTD.size:
    raise ValueError(f'the input of shape {x_BTD.shape} has no position')
  size = memory.n_rows, memory.row_dim
  bank_shape = None if bank_MP is None else bank_MP.shape
  if bank_shape != size:
    raise ValueError(f'the bank must have the shape (n_rows, row_dim)={size}, not {bank_shape}')
  given = flatten_dict(params)
  for path, shape in _shapes(memory).items():
    found = jnp.shape(given[path]) if path in given else None
    if found != shape:
      raise ValueError(f'the parameter {"/".join(path)} must have the shape {shape}, not {found}')
  heads = *x_BTD.shape[:2], memory.n_heads
  sign_shape = heads if memory.signs else None
  found = None if sign_BTh is None else sign_BTh.shape
  if found != sign_shape:
    raise ValueError(f'the numbers of signs must have the shape {sign_shape}, not {found}: see NgramBag.signs_of')
  if kept_BTh is not None and kept_BTh.shape != heads:
    raise ValueError(f'the factors of heads must have the shape {heads}, not {kept_BTh.shape}')


@functools.cache
def _own_fields(cls: type) -> set[str]:
  """Returns the fields that mmjax's classes give a memory; those of others' subclasses may mean anything."""
  bases = (base for base in cls.__mro__ if base.__module__.startswith('mmjax.'))
  return {name for base in bases for name in base.__dict__.get('__annotations__', {})}


def _check_size(name: str, value: Any, kind: Any) -> None:
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
def _shapes(memory: 'Memory') -> dict[tuple[str, ...], tuple[int, ...]]:
  """Returns the shapes of the parameters of a memory, by the names on the way to them."""
  params = jax.eval_shape(lambda: memory.init(jax.random.key(0)))
  return {path: leaf.shape for path, leaf in flatten_dict(params).items()}
