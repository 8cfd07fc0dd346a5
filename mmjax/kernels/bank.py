"""Reading rows of the memory bank, and adding up their gradients."""

import functools

import jax
import jax.numpy as jnp
from jax import Array


def bank_lookup(bank_MP: Array, row_BTR: Array, dtype: jnp.dtype, *, backward: str = 'scatter') -> Array:
  """Gathers rows of the bank.

  Args:
    bank_MP: float32 rows.
    row_BTR: int32 in [0, M).
    dtype: of the result.
    backward: 'scatter', how the gradients of a row's uses are added up, in float32 whatever `dtype` is.

  Returns:
    rows_BTRP in `dtype`.

  Raises:
    ValueError: if there is no such backward.
  """
  if backward not in ('scatter',):
    raise ValueError(f'backward={backward!r} must be scatter')
  return _lookup(bank_MP, row_BTR, jnp.dtype(dtype).name)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _lookup(bank_MP: Array, row_BTR: Array, dtype: str) -> Array:
  return bank_MP[row_BTR].astype(dtype)


def _lookup_fwd(bank_MP, row_BTR, dtype):
  return _lookup(bank_MP, row_BTR, dtype), (row_BTR, jnp.zeros_like(bank_MP, shape=(bank_MP.shape[0], 0)))


def _lookup_bwd(dtype, residuals, grad_BTRP):
  row_BTR, empty_M0 = residuals
  P = grad_BTRP.shape[-1]
  grad_MP = jnp.zeros((empty_M0.shape[0], P), jnp.float32).at[row_BTR].add(grad_BTRP.astype(jnp.float32))
  return grad_MP.astype(empty_M0.dtype), None


_lookup.defvjp(_lookup_fwd, _lookup_bwd)
