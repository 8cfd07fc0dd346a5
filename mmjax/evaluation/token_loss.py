"""The loss of each target alone, for what sorts targets into groups; mmjax/evaluation/loss.py has their sum."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax import Array

from mmjax.config import Config
from mmjax.data.loader import PADDING
from mmjax.evaluation.loss import run_model
from mmjax.model.params import Params


def make_token_loss(
  config: Config, graphdef: nnx.GraphDef, attention: str
) -> Callable[[Params, dict[str, Array]], Array]:
  """Returns f(params, rows) -> float32 (B, T): the negative log-likelihood of each target, in nats; 0 at PADDING.

  It is what `make_loss` sums, from float32 logits, a row of the batch at a time.
  """

  def token_loss(params: Params, rows: dict[str, Array]) -> Array:
    model, out = run_model(config, graphdef, attention, params, rows)

    def of_row(row: tuple[Array, Array]) -> Array:
      hidden_TD, target_T = row
      nll_T = optax.softmax_cross_entropy_with_integer_labels(model.logits(hidden_TD), jnp.maximum(target_T, 0))
      return jnp.where(target_T == PADDING, 0.0, nll_T)

    return jax.lax.map(of_row, (out.hidden_BTD, rows['target']))

  return token_loss
