"""Cross entropy of a large vocabulary."""

import jax
import jax.numpy as jnp
from jax import Array


def cross_entropy_sums(
  hidden_BTD: Array, output_VD: Array, target_BT: Array, weight_BT: Array, chunk_tokens: int
) -> tuple[Array, Array]:
  """Sums weighted negative log-likelihoods and weighted hits of the arg-max.

  Args:
    hidden_BTD: float, the compute dtype.
    output_VD: the output projection, cast to the compute dtype.
    target_BT: int32 in [0, V).
    weight_BT: float32; 0 leaves a position out.
    chunk_tokens: positions of T whose logits exist at the same time.

  Returns:
    nll_sum: float32, nats. correct_sum: float32.
  """
  logits_BTV = jnp.einsum('btd,vd->btv', hidden_BTD, output_VD.astype(hidden_BTD.dtype)).astype(jnp.float32)
  picked_BT = jnp.take_along_axis(logits_BTV, target_BT[..., None], axis=-1)[..., 0]
  nll_BT = jax.nn.logsumexp(logits_BTV, axis=-1) - picked_BT
  correct_BT = jnp.argmax(logits_BTV, axis=-1) == target_BT
  return jnp.sum(weight_BT * nll_BT), jnp.sum(weight_BT * correct_BT)
