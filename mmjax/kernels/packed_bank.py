"""A bank in 8 or 4 bits a value, read without unpacking it: rows are gathered as integers, then multiplied out.

A value is code * scale. In 8 bits a row has one scale and codes from -127 to 127; in 4 bits each GROUP values of a row
have one, with codes from -7 to 7. A scale is the largest absolute value over the largest code, in bfloat16, so no value
is off by more than half a scale, but for what rounding the scale itself adds.

Source: blocks of values with a scale each, as in Dettmers et al. 2022, arXiv:2110.02861.
"""

import dataclasses
import functools
from types import EllipsisType
from typing import Self

import jax
import jax.numpy as jnp
from jax import Array

BITS = (8, 4)
GROUP = 32  # values of a row that share a scale, in 4 bits


@functools.partial(jax.tree_util.register_dataclass, data_fields=['code', 'scale'], meta_fields=['row_dim'])
@dataclasses.dataclass(frozen=True)
class PackedBank:
  """A bank for reading alone; `bank_lookup` and `bank_bag` take it as they take an array.

  Attributes:
    code: int8 (M, P); or uint8 (M, P / 2, rounded up): code + 8 of a value of the row's first half in the lower four
      bits, of its second half in the upper four.
    scale: bfloat16, one for each row (M, 1), or for each GROUP of it (M, P / GROUP, rounded up).
    row_dim: P.
  """

  code: Array
  scale: Array
  row_dim: int

  @property
  def shape(self) -> tuple[int, int]:
    """Of the bank."""
    return self.code.shape[0], self.row_dim

  @property
  def nbytes(self) -> int:
    """Of codes and scales."""
    return self.code.nbytes + self.scale.nbytes

  def __getitem__(self, row_X: Array | EllipsisType) -> Array | Self:
    """Returns the values of rows, float32 (..., P); for `[...]`, which modules ask parameters for, the bank itself."""
    if row_X is ...:
      return self
    code_XP, scale = self.code[row_X], self.scale[row_X].astype(jnp.float32)
    if self.code.dtype == jnp.uint8:
      code_XP = jnp.concatenate((code_XP & 15, code_XP >> 4), axis=-1)[..., : self.row_dim].astype(jnp.int8) - 8
      scale = jnp.repeat(scale, GROUP, axis=-1)[..., : self.row_dim]
    return code_XP.astype(jnp.float32) * scale


def pack_bank(bank_MP: Array, bits: int) -> PackedBank:
  """Rounds a bank's values to integers of 8 or 4 bits.

  Args:
    bank_MP: float32, finite.
    bits: one of BITS.
  """
  n_rows, row_dim = bank_MP.shape
  group, largest = (row_dim, 127) if bits == 8 else (GROUP, 7)
  value = jnp.pad(bank_MP, ((0, 0), (0, -row_dim % group))).reshape(n_rows, -1, group)
  scale = (jnp.max(jnp.abs(value), axis=-1) / largest).astype(jnp.bfloat16)
  step = jnp.where(scale == 0, 1, scale).astype(jnp.float32)[..., None]  # as it is read: its rounding costs nothing
  code_MP = jnp.clip(jnp.round(value / step), -largest, largest).reshape(n_rows, -1)[:, :row_dim].astype(jnp.int8)
  if bits == 8:
    return PackedBank(code_MP, scale, row_dim)
  code_MP = jnp.pad(code_MP + 8, ((0, 0), (0, row_dim % 2))).astype(jnp.uint8)
  lower, upper = jnp.split(code_MP, 2, axis=1)
  return PackedBank(lower | upper << 4, scale, row_dim)


def unpack_bank(bank_MP: Array | PackedBank) -> Array:
  """Returns a bank's values, float32 (M, P); an array as it is."""
  return bank_MP[jnp.arange(bank_MP.shape[0])] if isinstance(bank_MP, PackedBank) else bank_MP
