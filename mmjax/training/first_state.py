"""The first state of a start: new, made of the parameters of another run, or the newest saved."""

from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from mmjax.data.bank_file import read_bank
from mmjax.model.params import BANK, Params
from mmjax.run.checkpoint import Checkpoints
from mmjax.run.leaves import refuse_non_finite
from mmjax.run.sharding import replicated
from mmjax.training.learner import Learner
from mmjax.training.state import TrainState, init_state
from mmjax.training.teach import RowCounts, first_reads


def new_state(learner: Learner, params: Params | None = None, reads: RowCounts | None = None) -> TrainState:
  """Returns the state before the first update, all where the rules put it: a new one, or of what is given.

  Args:
    learner: of the run.
    params: of another run.
    reads: what that run counted.
  """
  init = jax.jit(partial(init_state, learner.config, learner.optimizer), out_shardings=learner.places)
  if params is not None:
    return init(params, reads)
  state = init()
  if learner.config.memory.bank_init == 'file' and BANK in state['params']:
    bank_MP = read_bank(Path(learner.config.memory.bank_file), state['params'][BANK].shape)
    state['params'][BANK] = jax.device_put(bank_MP, learner.places['params'][BANK])
  return state


def restore_state(learner: Learner, checkpoints: Checkpoints) -> tuple[TrainState, dict[str, Any]]:
  """Returns the newest whole state, and its metadata; of an import, which is step 0, the parameters.

  Raises:
    UserError: if there is NaN or infinity in it, with the leaves.
  """
  if checkpoints.steps() == [0]:
    params, metadata, step = checkpoints.restore_params(learner.shapes['params'], 'last')
    state = new_state(learner, params, checkpoints.restore_reads(step, replicated(learner.placement.mesh)))
  else:
    state, metadata, step = checkpoints.restore(learner.shapes, 'last', newer=('loss_average', 'reads'))
  if 'loss_average' not in state:  # saved before there was one: it begins with the next loss
    state['loss_average'] = jax.device_put(np.float32(0), learner.places['loss_average'])
  if 'reads' in learner.shapes and 'reads' not in state:  # saved before reads were counted
    state['reads'] = jax.device_put(first_reads(learner.config), learner.places['reads'])
  refuse_non_finite(state, f'step {step} in {checkpoints.directory} cannot be trained on; begin again elsewhere')
  return state, metadata
