"""What a run begins with: its state, new, of the parameters of another run, or the newest saved; and its update."""

from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from mmjax.data.bank_file import read_bank
from mmjax.model.params import BANK, Params
from mmjax.run.checkpoint import START_STEP, Checkpoints
from mmjax.run.leaves import refuse_non_finite
from mmjax.run.sharding import replicated
from mmjax.training.learner import Learner
from mmjax.training.out_of_memory import describe_memory, explain_out_of_memory
from mmjax.training.progress import MicroBatchWatch, has_slow_updates
from mmjax.training.recorder import Recorder
from mmjax.training.setup import Start, record_run
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


def begin(recorder: Recorder, source: Start) -> TrainState:
  """Returns the state to go on from, and records this start: the state is the newest saved, or made of `source`."""
  learner, run, inputs, checkpoints = recorder.learner, recorder.run, recorder.inputs, recorder.checkpoints
  with explain_out_of_memory(learner.config):
    if checkpoints.ever_saved:
      state, counters = restore_state(learner, checkpoints)
      recorder.tokens, recorder.seconds = counters['tokens'], counters['seconds']
    else:
      state = new_state(learner, source.params, source.reads)
  start = int(state['step'])
  record_run(run, learner.config, inputs, start, source.read_from)
  if checkpoints.ever_saved:
    recorder.progress.say(f'Resuming {run.path} at step {start} of {inputs.total_steps}')
  if read_from := source.read_from:  # saved at once, so that the other run is not read again
    checkpoints.save(START_STEP, state, {'tokens': 0, 'seconds': 0.0})
    recorder.progress.say(f'Starting from {read_from["run"]}, step {read_from["step"]} ({read_from["checkpoint"]})')
  recorder.log.truncate_after(start if checkpoints.ever_saved else -1)
  return state


def compile_update(recorder: Recorder, state: TrainState) -> jax.stages.Compiled:
  """Returns the update, and says what is to be known before the first."""
  learner, inputs, progress = recorder.learner, recorder.inputs, recorder.progress
  for remark in inputs.remarks:
    progress.say(remark)
  config, placement = learner.config, learner.placement
  watch = MicroBatchWatch(config.train, config.model.max_seq_len, int(state['step']), inputs.total_steps, progress)
  progress.update('compiling')
  compiled = learner.compile(state, watch if has_slow_updates(config, placement) else None)
  progress.say(f'Attention: {placement.attention}. The step needs {describe_memory(compiled.memory_analysis())}.')
  return compiled
