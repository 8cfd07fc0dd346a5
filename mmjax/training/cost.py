"""What a token costs, counted from the sizes of the model, and what a device can do at best: the two halves of MFU.

Counted are the multiplications and additions of matrix products, 2 for each weight and token; norms, softmax, RoPE,
top-k and the gather of rows are left out, as is recomputation (`runtime.remat`), so that MFU measures useful work.
"""

import re
from collections.abc import Callable

import jax.numpy as jnp
from jax.typing import DTypeLike

from mmjax.config import Config, ModelConfig

TRAINED = 3  # forward, gradient with respect to the input, gradient with respect to the weight
FORWARD_ONLY = 1

# Dense (not sparse) bf16 peaks with float32 accumulation, FLOP/s, from the makers' datasheets.
BF16_PEAKS = {
  'B200': 2250e12, 'GH200': 989e12, 'H200': 989e12, 'H100 NVL': 835e12, 'H100 PCIe': 756e12, 'H100': 989e12,
  'A100': 312e12, 'A800': 312e12, 'H800': 989e12, 'A10': 125e12, 'A10G': 70e12, 'A30': 165e12, 'A40': 149.7e12,
  'L4': 121e12, 'L40': 181e12, 'L40S': 362e12, 'RTX A6000': 154.8e12, 'RTX 6000 Ada': 364.2e12,
  'RTX 3080': 59.5e12, 'RTX 3090': 71e12, 'RTX 4080': 97.5e12, 'RTX 4090': 165.2e12, 'RTX 5090': 209.5e12,
}  # fmt: skip


def flops_per_token(config: Config) -> dict[str, float]:
  """Counts the FLOPs of one training step for each token position of a full row.

  With D, N, K, H, T, V, C, P, R, F as in the axis legend, for each layer and in the forward pass:
    attention projections  2 (D NH + 2 D KH + NH D)
    attention              2 * 2 NH (T + 1) / 2: scores and values over the (T + 1) / 2 positions seen on average
    gate                   2 (D P + 2 C P/2): the query, and scores against C sub-keys in each half
    gated fusion           2 ((D + R P) D + (D + R P) D + D D)
    cross attention        2 (2 D D + 2 D P + 2 N R P)
    dense                  2 * 3 D F
    experts                2 (3 D F (chosen + shared) + D E): those a token uses, not all that are computed
  and 2 D V for the head. The backward pass doubles it, giving 3 times the forward pass; the gate of
  gated_fusion and cross_attention gets no gradient and counts once. The embedding lookup multiplies nothing.

  Args:
    config: every position counts, padding too: it is computed.

  Returns:
    FLOPs of each part over all layers, and their sum as 'total'.
  """
  model = config.model
  heads, kv_heads = model.n_heads * model.head_dim, model.n_kv_heads * model.head_dim
  layer = {
    'attention_projections': TRAINED * 2 * (2 * model.dim * heads + 2 * model.dim * kv_heads),
    'attention': TRAINED * 2 * heads * (model.max_seq_len + 1),
    **SUBLAYER_FLOPS[model.sublayer](model),
  }
  parts = {name: float(model.n_layers * flops) for name, flops in layer.items()}
  parts['head'] = float(TRAINED * 2 * model.dim * model.vocab_size)
  return {**parts, 'total': sum(parts.values())}


def device_peak_flops(device_kind: str, dtype: DTypeLike) -> float | None:
  """Returns a device's peak in FLOP/s for matrix products in `dtype`, or None where it is not known.

  Args:
    device_kind: as `jax.devices()[0].device_kind` gives it, 'NVIDIA H100 80GB HBM3'.
    dtype: only bfloat16 has a peak here; float32 products run at a speed that depends on the TF32 setting.
  """
  if jnp.dtype(dtype) != jnp.bfloat16 or 'Laptop' in device_kind:
    return None
  names = [name for name in BF16_PEAKS if re.search(rf'\b{name}\b', device_kind)]
  return BF16_PEAKS[max(names, key=len)] if names else None


def _dense(model: ModelConfig) -> dict[str, int]:
  return {'ffn': TRAINED * 2 * 3 * model.dim * model.dense_hidden_dim}


def _gate(model: ModelConfig) -> dict[str, int]:
  return {'gate': FORWARD_ONLY * 2 * (model.dim * model.knowledge_dim + model.n_sub_keys * model.knowledge_dim)}


def _gated_fusion(model: ModelConfig) -> dict[str, int]:
  fused = model.dim + model.num_selected * model.knowledge_dim
  return _gate(model) | {
    'fusion': TRAINED * 2 * (2 * fused * model.dim + model.dim * model.dim),
  }


def _cross_attention(model: ModelConfig) -> dict[str, int]:
  projections = 2 * model.dim * model.dim + 2 * model.dim * model.knowledge_dim  # wq, wo; wk, wv on the query's side
  reads = 2 * model.n_heads * model.num_selected * model.knowledge_dim  # scores, weighted sum
  return _gate(model) | {'cross_attention': TRAINED * 2 * (projections + reads)}


def _moe(model: ModelConfig) -> dict[str, int]:
  experts = (model.experts_per_token + 1) * 3 * model.dim * model.dense_hidden_dim
  return {'moe': TRAINED * 2 * (experts + model.dim * model.n_experts)}


SUBLAYER_FLOPS: dict[str, Callable[[ModelConfig], dict[str, int]]] = {
  'dense': _dense,
  'cross_attention': _cross_attention,
  'gated_fusion': _gated_fusion,
  'moe': _moe,
}
