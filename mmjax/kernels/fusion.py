"""The gated projection of concat(m, rows), without the concatenation: z @ W == m @ W[:D] + rows @ W[D:]."""

import jax
import jax.numpy as jnp
from jax import Array

from mmjax.kernels.matmul import matmul


def gated_projection(m_BTD: Array, rows_BTF: Array, gate_kernel: Array, up_kernel: Array) -> Array:
  """Returns silu(z @ gate) * (z @ up) for z = concat(m, rows), which is not built, except for single tokens.

  Args:
    m_BTD: float, the compute dtype; the result has it too.
    rows_BTF: retrieved rows, flattened: F = R * P.
    gate_kernel: [D + F, width], cast to the compute dtype.
    up_kernel: the same shape.
  """
  D = m_BTD.shape[-1]
  if m_BTD.shape[1] == 1:  # decoding: one token is small, slices of the kernels are not: it takes half the time
    z_B1Z = jnp.concatenate((m_BTD, rows_BTF), axis=-1)
    return _gate(matmul(z_B1Z, gate_kernel), matmul(z_B1Z, up_kernel))
  gate = matmul(m_BTD, gate_kernel[:D]) + matmul(rows_BTF, gate_kernel[D:])
  up = matmul(m_BTD, up_kernel[:D]) + matmul(rows_BTF, up_kernel[D:])
  return _gate(gate, up)


def gated_projection_reference(m_BTD: Array, rows_BTF: Array, gate_kernel: Array, up_kernel: Array) -> Array:
  """The definition, in float32; autodiff gives its gradients."""
  z_BTZ = jnp.concatenate((m_BTD, rows_BTF), axis=-1).astype(jnp.float32)
  return jax.nn.silu(z_BTZ @ gate_kernel) * (z_BTZ @ up_kernel)


@jax.checkpoint  # keeps two arrays for the backward pass instead of four, and recomputes what costs nothing
def _gate(gate: Array, up: Array) -> Array:
  return jax.nn.silu(gate) * up
