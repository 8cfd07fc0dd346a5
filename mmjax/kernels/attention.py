"""Causal grouped-query attention: one function, three backends.

'xla' builds all T x T scores and runs anywhere. 'cudnn' is NVIDIA's flash attention. 'xla_blocked' is for one CPU: the
scores of one kv head and a block of queries stay in the cache, only the causal prefix is computed, and the backward
pass recomputes scores from their logsumexp (Rabe and Staats 2021, arXiv:2112.05682; Dao et al. 2022, arXiv:2205.14135).
"""

from collections.abc import Iterator

import jax
import jax.numpy as jnp
from jax import Array

from mmjax.choices import ATTENTION_BACKENDS

MASKED = float(jnp.finfo(jnp.float32).min)  # finite, so that no difference of scores is a NaN
BLOCK_TOKENS = 128  # queries whose scores exist at a time
MAX_BLOCKS = 16  # blocks are unrolled: long sequences get longer ones, or compilation would take long


def causal_attention(
  q_BTNH: Array, k_BTKH: Array, v_BTKH: Array, segment_BT: Array | None = None, *, backend: str
) -> Array:
  """Lets each token see itself and the earlier tokens of its segment.

  Args:
    q_BTNH: float queries; query head n uses kv head n // (N / K).
    k_BTKH: float keys.
    v_BTKH: float values.
    segment_BT: int32; tokens of different segments do not see each other. None: one segment.
    backend: 'xla', 'xla_blocked' or 'cudnn', as `attention_backend` gives it.

  Returns:
    out_BTNH in the dtype of q; scores are scaled by H**-0.5 and their softmax is float32.

  Raises:
    ValueError: if there is no such backend.
  """
  if backend == 'xla_blocked':
    return _blocked(q_BTNH, k_BTKH, v_BTKH, segment_BT)
  T = q_BTNH.shape[1]
  same_BTS = None if segment_BT is None else segment_BT[:, :, None] == segment_BT[:, None, :]
  if backend == 'cudnn' and (same_BTS is None or T % 2 == 0):  # with a mask it trains for even T only
    mask = None if same_BTS is None else same_BTS[:, None]
    return jax.nn.dot_product_attention(q_BTNH, k_BTKH, v_BTKH, mask=mask, is_causal=True, implementation='cudnn')
  if backend not in ATTENTION_BACKENDS:
    raise ValueError(f'backend={backend!r} must be one of {", ".join(ATTENTION_BACKENDS)}')
  causal_1TS = jnp.tril(jnp.ones((1, T, T), bool))
  return cached_attention(q_BTNH, k_BTKH, v_BTKH, causal_1TS if same_BTS is None else causal_1TS & same_BTS)


def cached_attention(q_BTNH: Array, k_BSKH: Array, v_BSKH: Array, visible_BTS: Array) -> Array:
  """Lets each query see the keys that `visible_BTS` allows, as decoding needs it.

  Args:
    q_BTNH: float queries; query head n uses kv head n // (N / K).
    k_BSKH: float keys, for example a cache of which only a part is filled.
    v_BSKH: float values.
    visible_BTS: bool, B may be 1; at least one key for each query.

  Returns:
    out_BTNH in the dtype of q; the softmax is float32.
  """
  B, T, N, H = q_BTNH.shape
  K = k_BSKH.shape[2]
  # The queries of all heads that share a kv head, X = G * T, are the rows of one product.
  q_BKXH = q_BTNH.reshape(B, T, K, N // K, H).transpose(0, 2, 3, 1, 4).reshape(B, K, -1, H)
  # The softmax needs scores that were not rounded to bf16.
  score_BKXS = jnp.einsum('BKXH,BSKH->BKXS', q_BKXH, k_BSKH, preferred_element_type=jnp.float32) * H**-0.5
  score_BKGTS = score_BKXS.reshape(B, K, N // K, T, -1)
  weight_BKGTS = jax.nn.softmax(jnp.where(visible_BTS[:, None, None], score_BKGTS, MASKED), axis=-1)
  weight_BKXS = weight_BKGTS.astype(v_BSKH.dtype).reshape(score_BKXS.shape)
  out_BKXH = jnp.einsum('BKXS,BSKH->BKXH', weight_BKXS, v_BSKH)
  return out_BKXH.reshape(B, K, N // K, T, H).transpose(0, 3, 1, 2, 4).reshape(B, T, N, H)


# 'xla_blocked'. Z is every pair of sequence and kv head; X is the queries of all G heads in a block, side by side.
# Scores are [S, X], keys on the long axis: all large products then multiply row-major matrices as they lie, sums over
# keys vectorise along X, and masks and statistics broadcast without index arithmetic, which would keep XLA from
# vectorising exp. Everything is float32: on a CPU without AMX, rounding scores to bf16 costs more than it saves.


@jax.custom_vjp
def _blocked(q_BTNH: Array, k_BTKH: Array, v_BTKH: Array, segment_BT: Array | None) -> Array:
  return _blocked_fwd(q_BTNH, k_BTKH, v_BTKH, segment_BT)[0]


def _blocked_fwd(q_BTNH, k_BTKH, v_BTKH, segment_BT):
  B, _, K, H = k_BTKH.shape
  G = q_BTNH.shape[2] // K
  q_ZHGT, k_ZTH, v_ZTH = _split(q_BTNH, K) * H**-0.5, _split_rows(k_BTKH), _split_rows(v_BTKH)
  heads = q_ZHGT, k_ZTH, v_ZTH.swapaxes(1, 2), _split_segments(segment_BT, K, G)
  out_ZHGT, lse_ZGT = jax.lax.map(lambda head: _head_forward(*head), heads)
  out_BTNH = _join(out_ZHGT, B).astype(q_BTNH.dtype)
  return out_BTNH, (q_BTNH, k_BTKH, v_BTKH, segment_BT, out_BTNH, lse_ZGT)


def _blocked_bwd(residuals, dout_BTNH):
  q_BTNH, k_BTKH, v_BTKH, segment_BT, out_BTNH, lse_ZGT = residuals
  B, T, K, H = k_BTKH.shape
  G = q_BTNH.shape[2] // K
  delta_BTN = jnp.sum(dout_BTNH.astype(jnp.float32) * out_BTNH.astype(jnp.float32), axis=-1)
  delta_ZGT = delta_BTN.reshape(B, T, K, G).transpose(0, 2, 3, 1).reshape(lse_ZGT.shape)
  heads = (
    _split(q_BTNH, K) * H**-0.5, lse_ZGT, _split(dout_BTNH, K), delta_ZGT,
    _split_rows(k_BTKH), _split_rows(v_BTKH), _split_segments(segment_BT, K, G),
  )  # fmt: skip
  dq_ZHGT, dk_ZTH, dv_ZTH = jax.lax.map(lambda head: _head_backward(*head), heads)
  dk_BTKH, dv_BTKH = (x.reshape(B, K, T, H).swapaxes(1, 2).astype(k_BTKH.dtype) for x in (dk_ZTH, dv_ZTH))
  return (_join(dq_ZHGT, B) * H**-0.5).astype(q_BTNH.dtype), dk_BTKH, dv_BTKH, None


_blocked.defvjp(_blocked_fwd, _blocked_bwd)


def _head_forward(q_HGT, k_TH, v_HT, segments):
  """Attention of the G scaled query heads that share a kv head: out_HGT and the scores' logsumexp_GT."""
  H, G, T = q_HGT.shape
  outs, lses = [], []
  for start, end in _blocks(T):
    score_SX = k_TH[:end] @ q_HGT[:, :, start:end].reshape(H, -1)
    score_SX = jnp.where(_visible(start, end, G, segments), score_SX, MASKED)
    max_X = jnp.max(score_SX, axis=0)
    weight_SX = jnp.exp(score_SX - max_X)
    sum_X = jnp.sum(weight_SX, axis=0)
    outs.append((v_HT[:, :end] @ weight_SX / sum_X).reshape(H, G, -1))
    lses.append((max_X + jnp.log(sum_X)).reshape(G, -1))
  return jnp.concatenate(outs, axis=2), jnp.concatenate(lses, axis=1)


def _head_backward(q_HGT, lse_GT, dout_HGT, delta_GT, k_TH, v_TH, segments):
  """Gradients of q_HGT (times the scale), k_TH and v_TH, given delta = sum over H of out * dout."""
  H, G, T = q_HGT.shape
  # A key of one more channel, 1, lets the products subtract lse and delta: two passes over [S, X] fewer.
  q_less_lse, dout_less_delta = (jnp.concatenate((x, -y[None])) for x, y in ((q_HGT, lse_GT), (dout_HGT, delta_GT)))
  k_one, v_one = (jnp.concatenate((x, jnp.ones((T, 1), jnp.float32)), axis=1) for x in (k_TH, v_TH))
  dqs, dk_TH, dv_TH = [], jnp.zeros((T, H), jnp.float32), jnp.zeros((T, H), jnp.float32)
  for start, end in _blocks(T):
    q_HX, dout_HX = (x[:, :, start:end].reshape(H, -1) for x in (q_HGT, dout_HGT))
    log_weight_SX = k_one[:end] @ q_less_lse[:, :, start:end].reshape(H + 1, -1)
    weight_SX = jnp.where(_visible(start, end, G, segments), jnp.exp(log_weight_SX), 0)
    dscore_SX = weight_SX * (v_one[:end] @ dout_less_delta[:, :, start:end].reshape(H + 1, -1))
    dqs.append((k_TH[:end].T @ dscore_SX).reshape(H, G, -1))
    dk_TH = dk_TH.at[:end].add(jnp.einsum('SX,HX->SH', dscore_SX, q_HX))
    dv_TH = dv_TH.at[:end].add(jnp.einsum('SX,HX->SH', weight_SX, dout_HX))
  return jnp.concatenate(dqs, axis=2), dk_TH, dv_TH


def _blocks(T: int) -> Iterator[tuple[int, int]]:
  size = max(BLOCK_TOKENS, -(-T // MAX_BLOCKS))
  for start in range(0, T, size):
    yield start, min(start + size, T)


def _visible(start: int, end: int, G: int, segments: tuple[Array, Array] | None) -> Array:
  """Which of the keys before `end` each query of the block sees, (S, X)."""
  visible_SX = jnp.arange(end)[:, None] <= jnp.tile(jnp.arange(start, end), G)
  if segments is None:
    return visible_SX
  key_S, query_X = segments[0], segments[1][G * start : G * end]
  return visible_SX & (key_S[:end, None] == query_X)


def _split(x_BTNH: Array, K: int) -> Array:
  """Float32 x_ZHGT, tokens last."""
  B, T, N, H = x_BTNH.shape
  x_BTKGH = x_BTNH.astype(jnp.float32).reshape(B, T, K, N // K, H)
  return x_BTKGH.transpose(0, 2, 4, 3, 1).reshape(B * K, H, N // K, T)


def _join(x_ZHGT: Array, B: int) -> Array:
  """Undoes `_split`."""
  Z, H, G, T = x_ZHGT.shape
  return x_ZHGT.reshape(B, Z // B, H, G, T).transpose(0, 4, 1, 3, 2).reshape(B, T, Z // B * G, H)


def _split_rows(x_BTKH: Array) -> Array:
  """Float32 x_ZTH."""
  B, T, K, H = x_BTKH.shape
  return x_BTKH.astype(jnp.float32).swapaxes(1, 2).reshape(B * K, T, H)


def _split_segments(segment_BT: Array | None, K: int, G: int) -> tuple[Array, Array] | None:
  """Segments of keys, (Z, T), and of queries in the order of all blocks, (Z, G * T)."""
  if segment_BT is None:
    return None
  query_BX = jnp.concatenate([jnp.tile(segment_BT[:, i:j], (1, G)) for i, j in _blocks(segment_BT.shape[1])], axis=1)
  return jnp.repeat(segment_BT, K, axis=0), jnp.repeat(query_BX, K, axis=0)
