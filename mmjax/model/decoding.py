"""Running a model step by step: prompts fill a cache of keys and values, and new tokens attend to it.

Its results are those of whole rows (mmjax/model/lm.py), but for the order of sums.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike

from mmjax.config import ModelConfig
from mmjax.memory.ngram import cached_last_tokens
from mmjax.model.layers import Attention, LayerCache, RMSNorm, rope_angles
from mmjax.model.lm import LM


class Cache(NamedTuple):
  """What decoding remembers: slot s of every array holds position s.

  Attributes:
    token_BS: int32.
    layers: their keys and values, (B, S, K, H).
  """

  token_BS: Array
  layers: list[LayerCache]


def init_cache(model: ModelConfig, batch: int, length: int, dtype: DTypeLike) -> Cache:
  """Returns an empty cache for `length` positions, all zeros."""
  shape = (batch, length, model.n_kv_heads, model.head_dim)
  layers: list[LayerCache] = [
    {'k': jnp.zeros(shape, dtype), 'v': jnp.zeros(shape, dtype)} for _ in range(model.n_layers)
  ]
  return Cache(jnp.zeros((batch, length), jnp.int32), layers)


def prefill(model: LM, tokens_BT: Array, cache: Cache, *, dtype: DTypeLike, attention: str) -> tuple[Array, Cache]:
  """Reads int32 prompts from position 0 on, padded on the right; returns hidden_BTD in `dtype` and the filled cache.

  What padding writes into the cache, which comes from `init_cache` with S >= T, is overwritten before it is seen.
  """
  out = model(tokens_BT, dtype=dtype, attention=attention)

  def fill(slots: Array, found: Array) -> Array:
    return jax.lax.dynamic_update_slice(slots, found.astype(slots.dtype), (0,) * slots.ndim)

  return out.hidden_BTD, jax.tree.map(fill, cache, Cache(tokens_BT, out.kvs))


def decode(model: LM, tokens_BT: Array, cache: Cache, position_B: Array, *, dtype: DTypeLike) -> tuple[Array, Cache]:
  """Continues rows by T int32 tokens each, usually one; returns hidden_BTD in `dtype` and the updated cache.

  `position_B`, int32, is the position of each row's first new token, with position_B + T <= S.
  """
  position_BT = position_B[:, None] + jnp.arange(tokens_BT.shape[1])
  angle_BTa = rope_angles(position_BT, model.head_dim, model.rope_theta)
  bank_MP = None if model.memory_bank is None else model.memory_bank[...]
  token_BS = cache.token_BS.at[jnp.arange(len(tokens_BT))[:, None], position_BT].set(tokens_BT)
  last_BTn = cached_last_tokens(token_BS, position_BT, model.n_last) if model.n_last else None
  sum_BThP = model.value_bag.sums_of(last_BTn, bank_MP)[1] if model.value_bag else None
  x_BTD = model.embedding[...][tokens_BT]
  layers = []
  for layer, kv in zip(model.layers, cache.layers, strict=True):

    def attend(layer: Attention, x_BTD: Array, norm: RMSNorm, kv: LayerCache = kv) -> tuple[Array, LayerCache]:
      return layer.decode(x_BTD, norm, angle_BTa, tokens_BT, kv, position_BT, dtype, sum_BThP)

    x_BTD, _, kv = layer(x_BTD, bank_MP, last_BTn, None, attend=attend, dtype=dtype)
    layers.append(kv)
  return model.norm(x_BTD, dtype).astype(dtype), Cache(token_BS, layers)
