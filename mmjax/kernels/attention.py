"""Causal grouped-query attention: one function, three backends."""

import jax
import jax.numpy as jnp
from jax import Array

from mmjax.errors import UserError


def attention_backend(name: str, dtype: jnp.dtype, platform: str, n_devices: int) -> str:
  """Resolves 'auto' to the fastest backend for the machine, and refuses what cannot run there.

  Args:
    name: 'auto', 'xla', 'xla_blocked' or 'cudnn'.
    dtype: the compute dtype.
    platform: of the devices, as `jax.default_backend()` gives it.
    n_devices: in the mesh.

  Raises:
    UserError: if the backend cannot run there.
  """
  on_nvidia = platform in ('gpu', 'cuda')
  half = jnp.dtype(dtype).itemsize == 2
  if name == 'auto':
    if on_nvidia and half:
      return 'cudnn'
    return 'xla_blocked' if platform == 'cpu' and n_devices == 1 else 'xla'
  if name == 'cudnn' and not (on_nvidia and half):
    raise UserError(
      f"runtime.attention='cudnn' needs an NVIDIA GPU and train.dtype='bfloat16', not {platform} and "
      f"{jnp.dtype(dtype).name}; 'auto' picks what runs here"
    )
  if name == 'xla_blocked' and n_devices > 1:
    raise UserError(f"runtime.attention='xla_blocked' works on one device, not {n_devices}; use 'xla' or 'auto'")
  return name


def causal_attention(
  q_BTNH: Array, k_BTKH: Array, v_BTKH: Array, segment_BT: Array | None = None, *, backend: str
) -> Array:
  """Lets each token see itself and the earlier tokens of its segment.

  Args:
    q_BTNH: queries; query head n uses kv head n // (N / K).
    k_BTKH: keys.
    v_BTKH: values.
    segment_BT: int32; tokens of different segments do not see each other. None: one segment.
    backend: 'xla', 'xla_blocked' or 'cudnn', as `attention_backend` gives it.

  Returns:
    out_BTNH in the dtype of q; scores are scaled by H**-0.5 and their softmax is float32.
  """
  B, T = q_BTNH.shape[:2]
  visible_BTS = jnp.broadcast_to(jnp.tril(jnp.ones((T, T), bool)), (B, T, T))
  if segment_BT is not None:
    visible_BTS &= segment_BT[:, :, None] == segment_BT[:, None, :]
  return cached_attention(q_BTNH, k_BTKH, v_BTKH, visible_BTS)


def cached_attention(q_BTNH: Array, k_BSKH: Array, v_BSKH: Array, visible_BTS: Array) -> Array:
  """Lets each query see the keys that `visible_BTS` allows, as decoding needs it.

  Args:
    q_BTNH: queries; query head n uses kv head n // (N / K).
    k_BSKH: keys, for example a cache of which only a part is filled.
    v_BSKH: values.
    visible_BTS: bool; at least one key for each query.

  Returns:
    out_BTNH in the dtype of q; the softmax is float32.
  """
  B, T, N, H = q_BTNH.shape
  K = k_BSKH.shape[2]
  q_BTKGH = q_BTNH.reshape(B, T, K, N // K, H)
  score_BKGTS = jnp.einsum('btkgh,bskh->bkgts', q_BTKGH, k_BSKH).astype(jnp.float32) * H**-0.5
  score_BKGTS = jnp.where(visible_BTS[:, None, None], score_BKGTS, jnp.finfo(jnp.float32).min)
  weight_BKGTS = jax.nn.softmax(score_BKGTS, axis=-1).astype(q_BTNH.dtype)
  return jnp.einsum('bkgts,bskh->btkgh', weight_BKGTS, v_BSKH).reshape(B, T, N, H)
