"""Matrix products of activations and weights, in the forms that each platform runs fast.

On CPUs with bf16 instructions XLA is fast only for row-major operands with a float32 result, and autodiff writes down
other products: BENCHMARKS.md, "Kernels". On every platform a weight's gradient leaves here in float32, as it was
summed, instead of being rounded to bf16 on its way to the float32 optimizer.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike

from mmjax.errors import refuse_wrong_jaxlib
from mmjax.kernels.forms import on_cpu

TRAINED = 3  # products that training makes of one: the forward pass, and the gradients of both factors


def uniform(key: Array, shape: tuple[int, ...], *, fan_in: int) -> Array:
  """Returns torch's default for the weight of a linear layer: U(-1/sqrt(fan_in), 1/sqrt(fan_in)), float32."""
  return jax.random.uniform(key, shape, jnp.float32, -(fan_in**-0.5), fan_in**-0.5)


def at_least_float32(x: Array) -> Array:
  """Returns an array of floats as JAX's, narrower ones in float32."""
  x = jnp.asarray(x)
  return x.astype(jnp.float32) if x.dtype.itemsize < 4 else x


def matmul(x: Array, kernel: Array) -> Array:
  """Returns x @ kernel, computed in the dtype of x with float32 sums.

  Args:
    x: float (..., in), at least two axes.
    kernel: float (in, out), cast to the dtype of x; its gradient is computed in float32.

  Returns:
    (..., out) in the dtype of x.
  """
  refuse_wrong_jaxlib()
  return _matmul(x, kernel)


@jax.custom_vjp
def _matmul(x: Array, kernel: Array) -> Array:
  return dot(x, kernel.astype(x.dtype), x.ndim - 1, 0, x.dtype)


def _matmul_fwd(x, kernel):
  return _matmul(x, kernel), (x, kernel)


def _matmul_bwd(residuals, grad):
  x, kernel = residuals
  grad_x = dot(grad, kernel.astype(x.dtype), grad.ndim - 1, 1, x.dtype)
  return together(grad_x, weight_gradient(x, grad).astype(kernel.dtype))


def together(grad_x: Array, grad_kernel: Array) -> tuple[Array, Array]:
  """Returns both gradients of a product, float (..., in) and (in, out), as they are; on a GPU when both are there.

  XLA would leave the gradients of kernels there for the end of the backward pass, and keep what they are made of.
  """
  return (grad_x, grad_kernel) if on_cpu() else jax.lax.optimization_barrier((grad_x, grad_kernel))


_matmul.defvjp(_matmul_fwd, _matmul_bwd)


def dot(a: Array, b: Array, a_axis: int, b_axis: int, dtype: DTypeLike) -> Array:
  """Contracts one axis of `a` with one of the matrix `b`, floats of the same dtype; returns `dtype`.

  The result has the other axes of `a`, then the other axis of `b`. Not differentiable in the CPU's fast form: for
  use inside custom gradients.
  """

  def run(result_dtype, a, b):
    dimensions = (((a_axis,), (b_axis,)), ((), ()))
    return jax.lax.dot_general(a, b, dimensions, preferred_element_type=result_dtype).astype(dtype)

  return jax.lax.platform_dependent(
    a, b, cpu=lambda a, b: _keep_form(run(jnp.float32, a, b)), default=functools.partial(run, dtype)
  )


def weight_gradient(x: Array, grad: Array) -> Array:
  """Sums x[..., in] * grad[..., out], floats of one dtype, over all leading axes: float32 (in, out)."""
  lead = tuple(range(x.ndim - 1))

  def run(x, grad):
    return jax.lax.dot_general(x, grad, ((lead, lead), ((), ())), preferred_element_type=jnp.float32)

  def run_cpu(x, grad):
    if x.dtype == jnp.float32:
      # Barriers, or XLA would merge what makes an operand into its transposition, and transpose slowly: BENCHMARKS.md,
      # "Training step against PyTorch".
      x, grad = jax.lax.optimization_barrier((x.reshape(-1, x.shape[-1]), grad.reshape(-1, grad.shape[-1])))
      # The first operand is the one that gets transposed: the narrower of the two.
      if x.shape[-1] < grad.shape[-1]:
        return _keep_form(_contract_rows(x, grad))
      return _keep_form(_contract_rows(grad, x).T)
    # x is transposed in two steps: XLA would fold a single one into the product, and fall back to a slow form of it.
    columns, length = x.shape[-1], x.shape[-2]
    step = math.gcd(length, 64) if isinstance(length, int) else 1  # symbolic, in a program that is exported
    x_columns = x.reshape(-1, step, columns).transpose(2, 0, 1).reshape(columns, -1)
    grad = grad.reshape(-1, grad.shape[-1])
    return _keep_form(jnp.matmul(x_columns, grad, preferred_element_type=jnp.float32))

  return jax.lax.platform_dependent(x, grad, cpu=run_cpu, default=run)


def _contract_rows(a: Array, b: Array) -> Array:
  """Returns a.T @ b."""
  return jax.lax.dot_general(a, b, (((0,), (0,)), ((), ())))


def _keep_form(product: Array) -> Array:
  """Keeps XLA from merging what follows into a product; the CPU backend has no bf16 product for a transposed result."""
  return jax.lax.optimization_barrier(product)
