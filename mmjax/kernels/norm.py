"""Root-mean-square norm, alone and with the product that follows it (Zhang and Sennrich 2019, arXiv:1910.07467).

A norm moves memory and computes little. On a GPU the normed input of a product need not exist: dividing by the root
mean square commutes with the product, so x, rounded to the compute dtype, is multiplied by a kernel that holds the
norm's scale, and the result is divided; x is also all that the backward pass keeps. Where other columns stand beside x,
or several products read it, the normed x is made once, and kept instead of x.
"""

import itertools
from functools import partial

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike

from mmjax.kernels.forms import kept, on_cpu
from mmjax.kernels.matmul import at_least_float32, dot, matmul, together, weight_gradient

UNIT_EPS = 1e-6  # added to the sum of squares


@jax.named_scope('norm')
def rms_norm(x: Array, scale: Array, eps: float, dtype: DTypeLike = jnp.float32) -> Array:
  """Returns x / rms(x) * scale, float32.

  Args:
    x: float (..., D).
    scale: float32 (D,).
    eps: added to the mean of squares.
    dtype: of the products that read the result. Elsewhere than on a CPU x is rounded to it first, so that the backward
      pass keeps and reads half as much of a float32 stream.
  """
  if not on_cpu():
    x = _rounded(x, dtype)
  x = x.astype(jnp.float32)  # the mean of squares loses too much in bf16
  return x * inverse_rms(x, eps) * jnp.expand_dims(scale, range(x.ndim - 1))  # a program may refuse to promote ranks


@jax.named_scope('norm')
def normed_matmul(x: Array, scale: Array, kernel: Array, eps: float, dtype: DTypeLike) -> Array:
  """Returns rms_norm(x) @ kernel in `dtype`, with float32 sums; the gradient of `kernel` is float32.

  Args:
    x: float (..., in).
    scale: float32 (in,).
    kernel: float32 (in, out).
    eps: added to the mean of squares.
    dtype: of the product.
  """
  if on_cpu():
    return matmul(rms_norm(x, scale, eps).astype(dtype), kernel)
  return _divided_product(x, scale, kernel, eps, jnp.dtype(dtype), False)


@jax.named_scope('norm')
def exact_normed_matmul(x: Array, scale: Array, kernel: Array, eps: float, dtype: DTypeLike) -> Array:
  """Returns rms_norm(x) @ kernel in float32, for choices that must not hang on rounding.

  Elsewhere than on a CPU x is rounded to `dtype` first, and gradients are computed in it, as those of other products.
  Arguments as of `normed_matmul`.
  """
  if on_cpu():
    return jnp.matmul(rms_norm(x, scale, eps), kernel, precision=jax.lax.Precision.HIGHEST)
  return _divided_product(x, scale, kernel, eps, jnp.dtype(dtype), True)


def unit(x: Array) -> Array:
  """Returns x / |x|, float32 (..., p), of length 1 along the last axis."""
  x = at_least_float32(x)
  return x * jax.lax.rsqrt(jnp.sum(x * x, axis=-1, keepdims=True) + UNIT_EPS)


def inverse_rms(x: Array, eps: float) -> Array:
  """Returns 1 / rms(x) along the last axis, float32 (..., 1), of a float32 x; `eps` is added to the mean of squares."""
  return jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + eps)


def _rounded(x: Array, dtype: DTypeLike) -> Array:
  if x.dtype == dtype:
    return x
  # A barrier, or XLA would keep the wide x and round it again wherever it is read.
  rounded = jax.lax.optimization_barrier(x.astype(dtype))
  return kept(rounded) if rounded.dtype.itemsize < x.dtype.itemsize else rounded  # half the bytes of the stream


@partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def _divided_product(x: Array, scale: Array, kernel: Array, eps: float, dtype: jnp.dtype, exact: bool) -> Array:
  return _divided_product_fwd(x, scale, kernel, eps, dtype, exact)[0]


def _divided_product_fwd(x, scale, kernel, eps, dtype, exact):
  inverse, narrow = inverse_rms(x.astype(jnp.float32), eps), _rounded(x, dtype)
  if narrow is not x:
    inverse = kept(inverse)
  scaled = scale[:, None] * kernel
  if exact:
    out = _exact_product(narrow, scaled) * inverse
  else:
    product = dot(narrow, scaled.astype(dtype), x.ndim - 1, 0, dtype)
    out = (product.astype(jnp.float32) * inverse).astype(dtype)
  return out, (narrow, inverse, scale, kernel, jnp.zeros((), x.dtype))


def _divided_product_bwd(eps, dtype, exact, residuals, grad):
  narrow, inverse, scale, kernel, like_x = residuals
  grad = (grad.astype(jnp.float32) * inverse).astype(dtype)
  grad_narrow = dot(grad, (scale[:, None] * kernel).astype(dtype), grad.ndim - 1, 1, dtype)
  grad_scaled = weight_gradient(narrow, grad)
  grad_narrow, grad_scaled = together(grad_narrow, grad_scaled)
  wide, grad_x = narrow.astype(jnp.float32), grad_narrow.astype(jnp.float32)
  grad_x -= wide * (inverse**2 * jnp.mean(wide * grad_x, axis=-1, keepdims=True))
  return grad_x.astype(like_x.dtype), jnp.sum(grad_scaled * kernel, axis=1), scale[:, None] * grad_scaled


_divided_product.defvjp(_divided_product_fwd, _divided_product_bwd)


def _exact_product(x: Array, kernel: Array) -> Array:
  """Returns x @ kernel in float32; of a narrow x, whose values are exact, by products of its dtype.

  A float32 is the sum of three bf16, so that three such products, side by side, are as good as one in float32, which a
  GPU computes far more slowly: BENCHMARKS.md, "A GPU: bound, not measured".
  """
  if x.dtype != jnp.bfloat16:
    return jnp.matmul(x.astype(jnp.float32), kernel, precision=jax.lax.Precision.HIGHEST)
  parts = []
  for _ in range(3):
    # Not a cast there and back, which XLA may drop.
    part = jax.lax.reduce_precision(kernel, exponent_bits=8, mantissa_bits=7)
    parts.append(part.astype(x.dtype))
    kernel -= part
  product = dot(x, jnp.concatenate(parts, axis=1), x.ndim - 1, 0, jnp.float32)
  return sum(reversed(jnp.split(product, 3, axis=-1)))


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def over_rms(x: Array, others: tuple[Array, ...], eps: float, dtype: DTypeLike) -> Array:
  """Returns concat(x / rms(x), *others) in `dtype`, for a GPU, whose backward pass reads no x but this.

  Args:
    x: float (..., D), rounded to `dtype` first.
    others: float (..., any width), none or some.
    eps: added to the mean of squares.
    dtype: of the product that reads the result.
  """
  return _over_rms_fwd(x, others, eps, dtype)[0]


def _over_rms_fwd(x, others, eps, dtype):
  narrow = _rounded(x, dtype).astype(jnp.float32)
  inverse = inverse_rms(narrow, eps)
  z = jnp.concatenate([(narrow * inverse).astype(dtype), *(other.astype(dtype) for other in others)], axis=-1)
  return z, (z, inverse, [jnp.zeros((0, each.shape[-1]), each.dtype) for each in (x, *others)])


def _over_rms_bwd(eps, dtype, residuals, grad):
  z, inverse, (like_x, *like_others) = residuals
  D, ends = like_x.shape[1], list(itertools.accumulate(each.shape[1] for each in (like_x, *like_others)))
  # A barrier, or XLA would keep x, too, and compute this again from it.
  unit = jax.lax.optimization_barrier(z)[..., :D].astype(jnp.float32)
  grad_x, *grad_others = jnp.split(grad, ends[:-1], axis=-1)
  grad_x = grad_x.astype(jnp.float32)
  grad_x = inverse * (grad_x - unit * jnp.mean(unit * grad_x, axis=-1, keepdims=True))
  others = tuple(x.astype(like.dtype) for x, like in zip(grad_others, like_others, strict=True))
  return grad_x.astype(dtype).astype(like_x.dtype), others


over_rms.defvjp(_over_rms_fwd, _over_rms_bwd)


def ratio_of_norms(square: Array, of_square: Array) -> Array:
  """Returns the ratio of two norms, given their squares, float32 of one shape; 0 where the second is 0."""
  return jnp.where(of_square > 0, jnp.sqrt(square / jnp.maximum(of_square, jnp.finfo(jnp.float32).tiny)), 0.0)
