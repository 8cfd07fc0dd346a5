"""A bank in 8 or 4 bits a value, read without unpacking it: rows are gathered as integers, then multiplied out.

A value is code * scale. In 8 bits each column of the bank has a scale, and codes go from -127 to 127: no value is off
by more than half a scale, which is the column's largest absolute value / 127. In 4 bits each GROUP values of a row have
a scale, in bfloat16, and codes go from -8 to 7: the largest value of a group is -8 scales, whatever its sign.

Source: blocks of values with a scale each, as in Dettmers et al. 2022, arXiv:2110.02861.
"""

import dataclasses
import functools
from types import EllipsisType
from typing import Self

import jax
import jax.numpy as jnp
from jax import Array

from mmjax.choices import BANK_BITS

GROUP = 32  # values of a row that share a scale, in 4 bits


@functools.partial(jax.tree_util.register_dataclass, data_fields=['code', 'scale'], meta_fields=['row_dim'])
@dataclasses.dataclass(frozen=True)
class PackedBank:
  """A bank for reading alone; `bank_lookup` and `bank_bag` take it as they take an array.

  Attributes:
    code: int8 (M, P); or uint8 (M, P / 2, rounded up): code + 8 of a value of the row's first half in the lower four
      bits, of its second half in the upper four.
    scale: float32 (1, P); or bfloat16 (M, P / GROUP, rounded up).
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
    code_XP, scale = self.code[row_X], self.scale[0]
    if self.code.dtype == jnp.uint8:
      code_XP = jnp.concatenate((code_XP & 15, code_XP >> 4), axis=-1)[..., : self.row_dim].astype(jnp.int8) - 8
      scale = jnp.repeat(self.scale[row_X].astype(jnp.float32), GROUP, axis=-1)[..., : self.row_dim]
    return code_XP.astype(jnp.float32) * scale


def pack_bank(bank_MP: Array, bits: int) -> PackedBank:
  """Rounds a bank's values to integers of 8 or 4 bits.

  Args:
    bank_MP: float32, finite.
    bits: one of BANK_BITS.

  Raises:
    ValueError: if it is another.
  """
  if bits not in BANK_BITS:
    raise ValueError(f'bits={bits!r} must be one of {", ".join(map(str, BANK_BITS))}')
  n_rows, row_dim = bank_MP.shape
  if bits == 8:
    scale_1P = jnp.max(jnp.abs(bank_MP), axis=0, keepdims=True) / 127
    return PackedBank(_codes(bank_MP, scale_1P, -127, 127), scale_1P, row_dim)
  groups = jnp.pad(bank_MP, ((0, 0), (0, -row_dim % GROUP))).reshape(n_rows, -1, GROUP)
  most, least = jnp.max(groups, axis=-1), jnp.min(groups, axis=-1)
  scale_MX = (jnp.where(most > -least, most, least) / -8).astype(jnp.bfloat16)
  code_MP = _codes(groups, scale_MX[..., None].astype(jnp.float32), -8, 7).reshape(n_rows, -1)[:, :row_dim]
  lower, upper = jnp.split(jnp.pad(code_MP + 8, ((0, 0), (0, row_dim % 2))).astype(jnp.uint8), 2, axis=1)
  return PackedBank(lower | upper << 4, scale_MX, row_dim)


def _codes(value: Array, scale: Array, least: int, most: int) -> Array:
  return jnp.clip(jnp.round(value / jnp.where(scale == 0, 1, scale)), least, most).astype(jnp.int8)


def unpack_bank(bank_MP: Array | PackedBank) -> Array:
  """Returns a bank's values, float32 (M, P); an array as it is."""
  return bank_MP[jnp.arange(bank_MP.shape[0])] if isinstance(bank_MP, PackedBank) else bank_MP
