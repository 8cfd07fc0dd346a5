"""Reading rows of the memory bank, and adding up their gradients.

A row that several tokens read gets the sum of their gradients, in float32 whatever the compute dtype is: a popular row
is read thousands of times in a batch, and bf16 would stop counting after a few hundred.
"""

import functools

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike


@jax.named_scope('lookup')
def bank_lookup(bank_MP: Array, row_BTR: Array, dtype: DTypeLike, *, backward: str = 'scatter') -> Array:
  """Gathers rows of the bank.

  Args:
    bank_MP: float32; may be sharded by rows under jit.
    row_BTR: int32 in [0, M), in any order and number, any number of axes.
    dtype: of the result.
    backward: how gradients are added up: 'scatter' as they come, 'sorted' after sorting them by row.

  Returns:
    rows_BTRP in `dtype`.

  Raises:
    ValueError: if there is no such backward.
  """
  if backward not in BACKWARD:
    raise ValueError(f'backward={backward!r} must be one of {", ".join(BACKWARD)}')
  return _lookup(bank_MP, row_BTR, dtype, backward)


def bank_lookup_reference(bank_MP: Array, row_BTR: Array, dtype: DTypeLike) -> Array:
  """The definition; autodiff gives its gradient."""
  return jnp.take(bank_MP, row_BTR, axis=0).astype(dtype)


def _add_scatter(sums_MP: Array, row_X: Array, grad_XP: Array) -> Array:
  return sums_MP.at[row_X].add(grad_XP.astype(sums_MP.dtype))


def _add_sorted(sums_MP: Array, row_X: Array, grad_XP: Array) -> Array:
  order_X = jnp.argsort(row_X)
  grad_XP = grad_XP[order_X].astype(sums_MP.dtype)
  return sums_MP.at[row_X[order_X]].add(grad_XP, indices_are_sorted=True)


BACKWARD = {'scatter': _add_scatter, 'sorted': _add_sorted}


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _lookup(bank_MP: Array, row_BTR: Array, dtype: DTypeLike, backward: str) -> Array:
  return bank_MP[row_BTR].astype(dtype)


def _lookup_fwd(bank_MP, row_BTR, dtype, backward):
  shape_M0 = jnp.zeros((len(bank_MP), 0), bank_MP.dtype)  # all that the backward pass needs of the bank
  return _lookup(bank_MP, row_BTR, dtype, backward), (shape_M0, row_BTR)


def _lookup_bwd(dtype, backward, residuals, grad_BTRP):
  shape_M0, row_BTR = residuals
  grad_XP = grad_BTRP.reshape(-1, grad_BTRP.shape[-1])
  zeros_MP = jnp.zeros((len(shape_M0), grad_XP.shape[1]), jnp.float32)
  return BACKWARD[backward](zeros_MP, row_BTR.reshape(-1), grad_XP).astype(shape_M0.dtype), None


_lookup.defvjp(_lookup_fwd, _lookup_bwd)
