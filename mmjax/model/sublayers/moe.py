"""Mixture of SwiGLU experts: each token uses its best few, and one shared expert.

Source: the shared expert and the auxiliary loss per sequence follow Dai et al. 2024, arXiv:2401.06066.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.typing import DTypeLike

from mmjax.config import MemoryConfig, ModelConfig
from mmjax.kernels.forms import recomputed_on_gpu
from mmjax.model.layers import Linear, RMSNorm
from mmjax.model.sublayers import SublayerInput, SublayerOutput
from mmjax.model.sublayers.dense import SwiGLU


class MoEFFN(nnx.Module):
  """sum of the chosen experts, weighted by their renormalised gate probabilities, + the shared expert.

  Every expert runs on every token and the unchosen get weight 0: with 4 experts that is twice the multiplications
  of a dispatch, and none of its sorting.
  """

  def __init__(
    self,
    dim: int,
    hidden_dim: int,
    norm_eps: float,
    *,
    n_experts: int,
    experts_per_token: int,
    aux_loss_weight: float,
    rngs: nnx.Rngs,
  ):
    self.norm = RMSNorm(dim, norm_eps)
    self.router = Linear(dim, n_experts, rngs=rngs)
    self.experts = nnx.List([SwiGLU(dim, hidden_dim, rngs=rngs) for _ in range(n_experts)])
    self.shared_expert = SwiGLU(dim, hidden_dim, rngs=rngs)
    self.experts_per_token, self.aux_loss_weight = experts_per_token, aux_loss_weight

  @jax.named_scope('router')
  def __call__(self, inputs: SublayerInput, dtype: DTypeLike) -> SublayerOutput:
    """See mmjax.model.sublayers."""
    x_BTD = self.norm(inputs.h_BTD, dtype)
    logits_BTE = jnp.matmul(x_BTD, self.router.kernel[...], precision=jax.lax.Precision.HIGHEST)
    probability_BTE = jax.nn.softmax(logits_BTE, axis=-1)  # float32: the choice must not hang on rounding
    best_BTe, expert_BTe = jax.lax.top_k(probability_BTE, self.experts_per_token)
    chosen_BTE = jax.nn.one_hot(expert_BTe, len(self.experts), dtype=jnp.float32).sum(axis=-2)
    weight_BTE = chosen_BTE * probability_BTE / best_BTe.sum(axis=-1, keepdims=True)
    out_BTD = self.shared_expert.transform(x_BTD, dtype)
    for e, expert in enumerate(self.experts):

      def weighted(weight_BT1: Array, x_BTD: Array, expert: SwiGLU = expert) -> Array:
        return weight_BT1.astype(dtype) * expert.transform(x_BTD, dtype)

      out_BTD += recomputed_on_gpu(weighted)(weight_BTE[..., e, None], x_BTD)
    return SublayerOutput(out_BTD, aux_loss=self._balance(chosen_BTE, probability_BTE))

  def flops(self) -> dict[str, int]:
    """See mmjax.model.sublayers; counts the experts that a token uses, not all that are computed."""
    return {'moe': (self.experts_per_token + 1) * self.shared_expert.flops()['ffn'] + self.router.flops()}

  def _balance(self, chosen_BTE: Array, probability_BTE: Array) -> Array:
    """Returns the auxiliary loss: per sequence, expert load (1 when even) times mean probability, summed over E."""
    load_BE = chosen_BTE.mean(axis=1) * len(self.experts) / self.experts_per_token
    return self.aux_loss_weight * jnp.mean(jnp.sum(load_BE * probability_BTE.mean(axis=1), axis=-1))


def moe(model: ModelConfig, memory: MemoryConfig, *, rngs: nnx.Rngs) -> MoEFFN:
  """Experts of the size of 1.4.0's feed-forward layer."""
  return MoEFFN(
    model.dim,
    model.dense_hidden_dim,
    model.norm_eps,
    n_experts=model.n_experts,
    experts_per_token=model.experts_per_token,
    aux_loss_weight=model.aux_loss_weight,
    rngs=rngs,
  )
