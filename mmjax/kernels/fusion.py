"""The gated projection of concat(m, rows), without the concatenation: z @ W == m @ W[:D] + rows @ W[D:]."""

import jax
import jax.numpy as jnp
from jax import Array


def gated_projection(m_BTD: Array, rows_BTF: Array, gate_kernel: Array, up_kernel: Array) -> Array:
  """Returns silu(z @ gate) * (z @ up) for z = concat(m, rows), which is not built, except for single tokens.

  Args:
    m_BTD: float, the compute dtype; the result has it too.
    rows_BTF: retrieved rows, flattened: F = R * P.
    gate_kernel: [D + F, width], cast to the compute dtype.
    up_kernel: the same shape.
  """
  D, dtype = m_BTD.shape[-1], m_BTD.dtype
  gate_kernel, up_kernel = gate_kernel.astype(dtype), up_kernel.astype(dtype)
  if m_BTD.shape[1] == 1:  # decoding: one token is small, slices of the kernels are not: it takes half the time
    z_B1X = jnp.concatenate((m_BTD, rows_BTF), axis=-1)
    return jax.nn.silu(z_B1X @ gate_kernel) * (z_B1X @ up_kernel)
  gate = m_BTD @ gate_kernel[:D] + rows_BTF @ gate_kernel[D:]
  up = m_BTD @ up_kernel[:D] + rows_BTF @ up_kernel[D:]
  return jax.nn.silu(gate) * up
