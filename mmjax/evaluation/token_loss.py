"""The loss of each target alone, for what sorts targets into groups or takes the bank from one reader.

mmjax/evaluation/loss.py has the sum that training minimises.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax import Array

from mmjax.config import Config
from mmjax.data.loader import PADDING, TokenSplit, eval_batches
from mmjax.evaluation.loss import run_model
from mmjax.evaluation.probes import plan_probe
from mmjax.memory.types import Bank
from mmjax.model.params import Params
from mmjax.run.placement import Placement


def make_token_loss(config: Config, graphdef: nnx.GraphDef, attention: str) -> Callable[..., Array]:
  """Returns f(params, rows, zeroed=None) -> float32 (B, T): the negative log-likelihood of each target, 0 at PADDING.

  It is what `make_loss` sums, in nats, from float32 logits, a row of the batch at a time. The reader number
  `zeroed`, an int32 place in `memory_layers`, reads a bank of zeros.
  """

  def token_loss(params: Params, rows: dict[str, Array], zeroed: Array | None = None) -> Array:
    def bank_of(reader: int, bank: Bank) -> Bank:
      return jax.tree.map(lambda x: jnp.where(reader == zeroed, jnp.zeros_like(x), x), bank)

    changed = {} if zeroed is None else {'bank_of_reader': bank_of}
    model, out = run_model(config, graphdef, attention, params, rows, **changed)

    def of_row(row: tuple[Array, Array]) -> Array:
      hidden_TD, target_T = row
      nll_T = optax.softmax_cross_entropy_with_integer_labels(model.logits(hidden_TD), jnp.maximum(target_T, 0))
      return jnp.where(target_T == PADDING, 0.0, nll_T)

    return jax.lax.map(of_row, (out.hidden_BTD, rows['target']))

  return token_loss


def losses_without_one_reader(
  config: Config,
  graphdef: nnx.GraphDef,
  placement: Placement,
  params: Params,
  split: TokenSplit,
  show: Callable[[float], None],
) -> list[float]:
  """Returns for each of `memory_layers` the loss, in nats a token, of a model in which it alone reads a bank of zeros.

  The mean is over the positions that an evaluation probes, so that it compares with `EvalResult.probes`; `show` is told
  the share that is done.
  """
  plan = plan_probe(config, split)
  token_loss = placement.jit(make_token_loss(config, graphdef, placement.attention))
  nlls, positions = np.zeros(len(plan.layers)), 0
  for batch in eval_batches(split, config.train.batch_size, show, plan.batches):
    rows = {name: batch[name] for name in ('input', 'target', 'segment')}
    positions += int(np.sum(batch['target'] != PADDING))
    nlls += [np.asarray(token_loss(params, rows, np.int32(i)), np.float64).sum() for i in range(len(plan.layers))]
  return (nlls / positions).tolist()
