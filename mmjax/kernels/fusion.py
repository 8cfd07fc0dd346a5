"""Gated MLPs: down(silu(x @ gate) * (x @ up)), where x may be a concatenation that is not built.

z @ W == m @ W[:D] + rows @ W[D:] for z = concat(m, rows). Source: Shazeer 2020, arXiv:2002.05202.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike

from mmjax.kernels.forms import on_cpu
from mmjax.kernels.matmul import dot, matmul, together, weight_gradient
from mmjax.kernels.norm import over_rms, rms_norm


def normed_gated_mlp(
  x: Array,
  scale: Array,
  others: tuple[Array, ...],
  gate_kernel: Array,
  up_kernel: Array,
  down_kernel: Array,
  eps: float,
  dtype: DTypeLike,
) -> Array:
  """Returns `gated_mlp` of (rms_norm(x), *others); a GPU multiplies the kernels by the norm's scale, not x.

  Args:
    x: float (..., D).
    scale: float32 (D,), of the norm.
    others: nothing, or (rows_BTX,).
    gate_kernel: as of `gated_mlp`, as are `up_kernel`, `down_kernel` and `dtype`.
    eps: of the norm.
  """
  if on_cpu():
    return gated_mlp((rms_norm(x, scale, eps), *others), gate_kernel, up_kernel, down_kernel, dtype)
  kernels, D = jnp.concatenate((gate_kernel, up_kernel), axis=1), len(scale)
  kernels = jnp.concatenate((scale[:, None] * kernels[:D], kernels[D:]))
  both = matmul(over_rms(x, others, eps, jnp.dtype(dtype)), kernels)
  # Beside rows, what the second product reads is narrow: kept, it takes little memory and spares a pass over `both`.
  return _gate_and_project(both, down_kernel, bool(others))


def gated_mlp(
  inputs: tuple[Array, ...], gate_kernel: Array, up_kernel: Array, down_kernel: Array, dtype: DTypeLike
) -> Array:
  """Returns (silu(z @ gate) * (z @ up)) @ down in `dtype`.

  Args:
    inputs: z, or m_BTD and rows_BTX for z = concat(m, rows); float.
    gate_kernel: float (width of z, F), cast to the compute dtype, as the others are.
    up_kernel: of the same shape.
    down_kernel: (F, D).
    dtype: of the products.
  """
  if not on_cpu():  # the concatenation, made while its parts are, and one product for gate and up, which is kept
    z = jnp.concatenate([x.astype(dtype) for x in inputs], axis=-1)
    return _gate_and_project(matmul(z, jnp.concatenate((gate_kernel, up_kernel), axis=1)), down_kernel, False)
  if len(inputs) == 1:
    # Cast for each product alone, so that their gradients are added up in float32.
    gate_BTF, up_BTF = (matmul(inputs[0].astype(dtype), kernel) for kernel in (gate_kernel, up_kernel))
    return matmul(jax.nn.silu(gate_BTF) * up_BTF, down_kernel)
  m_BTD, rows_BTX = (x.astype(dtype) for x in inputs)
  D = m_BTD.shape[-1]
  if m_BTD.shape[1] == 1:  # decoding: to join one token is little work, to slice the kernels is much
    z = jnp.concatenate((m_BTD, rows_BTX), axis=-1)
    gate_BTF, up_BTF = matmul(z, gate_kernel), matmul(z, up_kernel)
  else:
    kernels = (gate_kernel, up_kernel)
    gate_BTF, up_BTF = (matmul(m_BTD, kernel[:D]) + matmul(rows_BTX, kernel[D:]) for kernel in kernels)
  return matmul(_gate(gate_BTF, up_BTF), down_kernel)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def _gate_and_project(both: Array, down_kernel: Array, keep: bool) -> Array:
  """Returns (silu(gate) * up) @ down for both = concat(gate, up), keeping the first product too or `both` alone."""
  return _gate_and_project_fwd(both, down_kernel, keep)[0]


def _gate_and_project_fwd(both, down_kernel, keep):
  gate, up = (x.astype(jnp.float32) for x in jnp.split(both, 2, axis=-1))
  product = (jax.nn.silu(gate) * up).astype(both.dtype)
  return matmul(product, down_kernel), (both, product if keep else None, down_kernel)


def _gate_and_project_bwd(keep, residuals, grad_out):
  both, product, down_kernel = residuals
  both = jax.lax.optimization_barrier(both)  # or XLA would keep what can be had again from it
  grad = dot(grad_out, down_kernel.astype(both.dtype), both.ndim - 1, 1, both.dtype).astype(jnp.float32)
  gate, up = (x.astype(jnp.float32) for x in jnp.split(both, 2, axis=-1))
  sigmoid = jax.nn.sigmoid(gate)
  grad_gate = grad * up * sigmoid * (1 + gate * (1 - sigmoid))
  grad_both = jnp.concatenate((grad_gate, grad * gate * sigmoid), axis=-1).astype(both.dtype)
  if not keep:
    product = (gate * sigmoid * up).astype(both.dtype)
  return together(grad_both, weight_gradient(product, grad_out))


_gate_and_project.defvjp(_gate_and_project_fwd, _gate_and_project_bwd)


@jax.checkpoint  # keeps two arrays for the backward pass instead of four, and recomputes what costs nothing
def _gate(gate: Array, up: Array) -> Array:
  return jax.nn.silu(gate) * up
