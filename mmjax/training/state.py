"""The state of a run, which an update takes and returns."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import optax
from jax import Array

from mmjax.config import Config
from mmjax.config.parameters import moments_of
from mmjax.model.params import BANK, Params, init_params
from mmjax.training.lazy_bank import init_moments
from mmjax.training.row_gradients import is_lazy
from mmjax.training.teach import RowCounts, first_reads

TrainState = dict[str, Any]  # see init_state
TrainStep = Callable[[TrainState, dict[str, Array]], tuple[TrainState, dict[str, Array]]]


def init_state(
  config: Config, optimizer: optax.GradientTransformation, params: Params | None = None, reads: RowCounts | None = None
) -> TrainState:
  """Returns the state before the first update, of new parameters or of those given; may run under jax.jit.

  `step` counts batches seen, `skipped` updates thrown away in a row, `skipped_total` all of them; `loss_average` is
  the running average of the loss over the updates that were applied, 0 before the first. A memory model also has
  `reads`, see teach.py, which goes on from those given; they are the background if rows are taught.
  """
  params = init_params(config) if params is None else params
  counts = {name: jnp.zeros((), jnp.int32) for name in ('step', 'skipped', 'skipped_total')}
  state = {'params': params, 'opt_state': optimizer.init(params), **counts, 'loss_average': jnp.float32(0)}
  if BANK in params:
    state['reads'] = first_reads(config, reads)
  return state | ({'bank_moments': init_moments(params[BANK], moments_of(config, BANK))} if is_lazy(config) else {})
