"""What every memory is: sizes, how its parameters start, and what it computes from them, its input and the bank."""

import dataclasses
import functools
import math
import numbers
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from flax.traverse_util import flatten_dict
from jax import Array
from jax.typing import DTypeLike

from mmjax.choices import NORM_EPS
from mmjax.kernels.bank import BankShard, TappedBank
from mmjax.kernels.matmul import uniform
from mmjax.kernels.packed_bank import PackedBank

Params = dict[str, Any]
Bank = Array | BankShard | TappedBank | PackedBank


class Selection(NamedTuple):
  """What is read at each position.

  Attributes:
    row_BThr: int32 in [0, M), best first; with a selection bias in the order of score plus bias.
    score_BThr: float32, before any softmax and without a bias.
    aux_loss: float32, of the choice.
    sign_BTh: int32, the numbers of the signs that n-grams have; None without signs.
    kept_BTh: float32 factors of the heads' sums, 0 where one is dropped; None without dropout.
  """

  row_BThr: Array
  score_BThr: Array
  aux_loss: Array | float = 0.0
  sign_BTh: Array | None = None
  kept_BTh: Array | None = None


class SublayerInput(NamedTuple):
  """What a sublayer may read.

  Attributes:
    h_BTD: float32 residual stream after attention was added.
    h_attn_BTD: what attention added to it, in the compute dtype.
    bank_MP: the shared bank, float32, perhaps tapped (mmjax.kernels.bank), or None in a model without one.
    last_BTn: int32, the last tokens at each position (mmjax.memory.ngram); None in a model where they address no row.
    key: a PRNG key, in training with dropout; otherwise None.
  """

  h_BTD: Array
  h_attn_BTD: Array
  bank_MP: Bank | None = None
  last_BTn: Array | None = None
  key: Array | None = None


class SublayerOutput(NamedTuple):
  """What a memory, or another sublayer, adds to the residual stream and to the training loss, and what it read.

  Rows are int32, head by head and best first in each; their scores are float32, before any activation.
  Rows that n-grams address are in no order, and their scores are 0.
  """

  delta_BTD: Array
  row_BTR: Array | None = None
  score_BTR: Array | None = None
  aux_loss: Array | float = 0.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Memory:
  """Sizes of a memory, which norms its input, selects rows for each token and reads them.

  A subclass has three methods more: `init_read(rngs)` returns the parameters of what becomes of the rows, float32;
  `select(params, x_BTD, row_BThr, dtype)` returns a Selection, of `row_BThr` (int32) if the last tokens address rows;
  and `read(params, x_BTD, selection, bank_MP, dtype)` returns delta_BTD in `dtype`. `x_BTD` is still to be normed.

  Attributes:
    dim: D, of the residual stream.
    n_rows: M, of the bank.
    row_dim: P, of the bank.
    n_heads: h; each selects rows of its own.
    rows_per_head: r.
    norm_eps: of the root-mean-square norm of the input.
  """

  dim: int
  n_rows: int
  row_dim: int
  n_heads: int = 1
  rows_per_head: int = 1
  norm_eps: float = NORM_EPS

  signs = False  # of a class, whether it takes those of n-grams

  def __post_init__(self):
    for field in dataclasses.fields(self):
      if field.name in _own_fields(type(self)):
        _check_size(field.name, getattr(self, field.name), field.type)

  def init(self, key: Array | nnx.Rngs) -> Params:
    """Returns the first parameters, a nested dict of float32 arrays.

    Args:
      key: a key of `jax.random`; or streams of keys, which move on.
    """
    rngs = key if isinstance(key, nnx.Rngs) else nnx.Rngs(key)
    return self.init_gate(rngs) | self.init_read(rngs)

  def apply(
    self,
    params: Params,
    x_BTD: Array,
    bank_MP: Bank,
    row_BThr: Array | None = None,
    sign_BTh: Array | None = None,
    kept_BTh: Array | None = None,
    *,
    dtype: DTypeLike = jnp.float32,
  ) -> SublayerOutput:
    """Reads the bank.

    Args:
      params: as `init` makes them.
      x_BTD: float, the residual stream; it is normed here.
      bank_MP: float32; as `mmjax.kernels.bank` describes, it may be sharded by rows, a part, tapped, or packed.
      row_BThr: int32, the rows that n-grams address, for a memory that reads those; see `NgramBag.rows`.
      sign_BTh: int32, the numbers of their signs, for a memory that has signs; see `NgramBag.signs_of`.
      kept_BTh: float32, factors of what the rows of each head of a bag say: 0 drops them. None: 1.
      dtype: of the matrix products. Rows are selected in float32 whatever it is, of an input that a GPU rounds to it.

    Returns:
      SublayerOutput. Add `delta_BTD`, in `dtype`, to the stream, and `aux_loss` to the loss: its value is 0, and with a
      selection bias its gradient evens out the use of the rows.

    Raises:
      ValueError: if an array has not the shape that the sizes say, or rows or signs of n-grams are missing or not read.
    """
    self._check_inputs(params, x_BTD, bank_MP, sign_BTh, kept_BTh)
    run = functools.partial(self._apply, dtype=dtype)
    return _on_any_mesh(run, x_BTD, params, bank_MP, row_BThr, sign_BTh, kept_BTh)

  def _check_inputs(
    self, params: Params, x_BTD: Array, bank_MP: Bank, sign_BTh: Array | None, kept_BTh: Array | None
  ) -> None:
    """Raises ValueError for a wrong shape, which would read other rows without a word, or fail far from here."""
    if x_BTD.ndim != 3 or x_BTD.shape[-1] != self.dim:
      raise ValueError(f'the input must have the shape (B, T, dim={self.dim}), not {x_BTD.shape}')
    if not x_BTD.size:
      raise ValueError(f'the input of shape {x_BTD.shape} has no position')
    bank_shape = None if bank_MP is None else bank_MP.shape
    if bank_shape != (self.n_rows, self.row_dim):
      raise ValueError(f'the bank must have the shape (n_rows, row_dim)={self.n_rows, self.row_dim}, not {bank_shape}')
    given = flatten_dict(params)
    for path, shape in _shapes(self).items():
      found = jnp.shape(given[path]) if path in given else None
      if found != shape:
        raise ValueError(f'the parameter {"/".join(path)} must have the shape {shape}, not {found}')
    sign_shape = (*x_BTD.shape[:2], self.n_heads) if self.signs else None
    found = None if sign_BTh is None else sign_BTh.shape
    if found != sign_shape:
      raise ValueError(f'the numbers of signs must have the shape {sign_shape}, not {found}: see NgramBag.signs_of')
    if kept_BTh is not None and kept_BTh.shape != (heads := (*x_BTD.shape[:2], self.n_heads)):
      raise ValueError(f'the factors of heads must have the shape {heads}, not {kept_BTh.shape}')

  def _apply(
    self,
    x_BTD: Array,
    params: Params,
    bank_MP: Bank,
    row_BThr: Array | None,
    sign_BTh: Array | None,
    kept_BTh: Array | None,
    dtype: DTypeLike,
  ) -> SublayerOutput:
    selection = self.select(params, x_BTD, row_BThr, dtype)._replace(sign_BTh=sign_BTh, kept_BTh=kept_BTh)
    delta_BTD = self.read(params, x_BTD, selection, bank_MP, dtype)
    row_BTR, score_BTR = (x.reshape(*x_BTD.shape[:-1], -1) for x in selection[:2])
    return SublayerOutput(delta_BTD, row_BTR, score_BTR, selection.aux_loss)

  def addresses(self, last_BTn: Array | None) -> tuple[Array | None, Array | None]:
    """Returns what `apply` takes, int32 `row_BThr` and `sign_BTh`, from the last tokens at each position: here none."""
    return None, None

  def flops(self) -> dict[str, int]:
    """Returns the FLOPs of a training step for a token by part: of its matrix products, as in mmjax.model.cost."""
    return {}

  def init_gate(self, rngs: nnx.Rngs) -> Params:
    """Returns the parameters of the norm, `scale`, float32 (D,), and of what selects rows, here none."""
    return {'norm': {'scale': jnp.ones(self.dim, jnp.float32)}}


def _on_any_mesh(run: Callable[..., SublayerOutput], x_BTD: Array, *others: Any) -> SublayerOutput:
  """Runs a memory. Explicit axes of a mesh are left to the compiler too, and the output lies as the input does."""
  shardings = [jax.typeof(leaf).sharding for leaf in jax.tree.leaves((x_BTD, others))]
  on_mesh = [sharding for sharding in shardings if sharding.mesh.explicit_axes]  # as `jax.make_mesh` makes them
  if on_mesh:
    spec = shardings[0].spec if shardings[0].mesh.explicit_axes else ()
    like_x, like_rows, whole = (on_mesh[0].update(spec=axes) for axes in (spec, spec[:2], ()))
    run = jax.sharding.auto_axes(run, out_sharding=SublayerOutput(like_x, like_rows, like_rows, whole))
  return run(x_BTD, *others)


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
def _shapes(memory: Memory) -> dict[tuple[str, ...], tuple[int, ...]]:
  """Returns the shapes of the parameters of a memory, by the names on the way to them."""
  params = jax.eval_shape(lambda: memory.init(jax.random.key(0)))
  return {path: leaf.shape for path, leaf in flatten_dict(params).items()}


class ParamTree(nnx.Module):
  """A nested dict of float32 parameters as modules, under the same names."""

  def __init__(self, params: Params):
    for name, value in params.items():
      setattr(self, name, ParamTree(value) if isinstance(value, dict) else nnx.Param(value))


class MemoryLayer(ParamTree):
  """A memory with its parameters."""

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
    """See `Memory.apply`."""
    params = nnx.to_pure_dict(nnx.state(self, nnx.Param))
    return self.memory.apply(params, x_BTD, bank_MP, row_BThr, sign_BTh, kept_BTh, dtype=dtype)


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
  """
  return (row_dim**-0.5 if std is None else std) * jax.random.normal(key, (n_rows, row_dim), jnp.float32)
