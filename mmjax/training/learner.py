"""What learns: states of a run and its update, compiled for a mesh. The update itself, step.py, is next on the way."""

import dataclasses
from collections.abc import Callable
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax

from mmjax.config import Config
from mmjax.data.bank_file import read_bank
from mmjax.evaluation.evaluate import EvalStep, make_eval_step
from mmjax.model.lm import BANK, Params, model_graph
from mmjax.run.checkpoint import Checkpoints
from mmjax.run.leaves import refuse_non_finite
from mmjax.run.placement import Placement
from mmjax.run.sharding import batch_shapes, placed, replicated
from mmjax.training.optimizer import make_optimizer
from mmjax.training.out_of_memory import explain_out_of_memory
from mmjax.training.step import TrainState, init_state, make_train_step
from mmjax.training.teach import RowCounts, first_reads


@dataclasses.dataclass(frozen=True)
class Learner:
  """Makes states and updates of a model, for a run of so many updates."""

  config: Config
  placement: Placement
  total_steps: int

  @cached_property
  def optimizer(self) -> optax.GradientTransformation:
    return make_optimizer(self.config, self.total_steps)

  @cached_property
  def shapes(self) -> TrainState:
    """The state as jax.ShapeDtypeStructs, each with its sharding."""
    return placed(self.placement.mesh, jax.eval_shape(partial(init_state, self.config, self.optimizer)))

  @property
  def places(self) -> Any:
    """The sharding of each leaf of the state."""
    return jax.tree.map(lambda x: x.sharding, self.shapes)

  def new_state(self, params: Params | None = None, reads: RowCounts | None = None) -> TrainState:
    """Returns the state before the first update, all where the rules put it: a new one, or of what is given.

    Args:
      params: of another run.
      reads: what that run counted.
    """
    init = jax.jit(partial(init_state, self.config, self.optimizer), out_shardings=self.places)
    if params is not None:
      return init(params, reads)
    state = init()
    if self.config.memory.bank_init == 'file' and BANK in state['params']:
      bank_MP = read_bank(Path(self.config.memory.bank_file), state['params'][BANK].shape)
      state['params'][BANK] = jax.device_put(bank_MP, self.places['params'][BANK])
    return state

  def restore_state(self, checkpoints: Checkpoints) -> tuple[TrainState, dict[str, Any]]:
    """Returns the newest whole state, and its metadata; of an import, which is step 0, the parameters.

    Raises:
      UserError: if there is NaN or infinity in it, with the leaves.
    """
    if checkpoints.steps() == [0]:
      params, metadata, step = checkpoints.restore_params(self.shapes['params'], 'last')
      state = self.new_state(params, checkpoints.restore_reads(step, replicated(self.placement.mesh)))
    else:
      state, metadata, step = checkpoints.restore(self.shapes, 'last', newer=('loss_average', 'reads'))
    if 'loss_average' not in state:  # saved before there was one: it begins with the next loss
      state['loss_average'] = jax.device_put(np.float32(0), self.places['loss_average'])
    if 'reads' in self.shapes and 'reads' not in state:  # saved before reads were counted
      state['reads'] = jax.device_put(first_reads(self.config), self.places['reads'])
    refuse_non_finite(state, f'step {step} in {checkpoints.directory} cannot be trained on; begin again elsewhere')
    return state, metadata

  def compile(
    self, state: TrainState, on_micro_batch: Callable | None = None, options: dict[str, Any] | None = None
  ) -> jax.stages.Compiled:
    """Compiles the update.

    Args:
      state: which the update takes over, or its `shapes`.
      on_micro_batch: see `make_gradient`.
      options: of the compiler, beside those of the placement.

    Raises:
      UserError: if the device has too little memory, with the settings to change.
    """
    config, mesh, attention = self.config, self.placement.mesh, self.placement.attention
    settings = {'attention': attention, 'total_steps': self.total_steps, 'mesh': mesh, 'on_micro_batch': on_micro_batch}
    step = make_train_step(config, model_graph(config), self.optimizer, **settings)
    places = {'donate_argnums': 0, 'out_shardings': (self.places, replicated(mesh))}
    with explain_out_of_memory(config):
      return self.placement.compile(step, state, batch_shapes(mesh, config), options=options, **places)

  def eval_step(self) -> EvalStep:
    """Returns the evaluation of a batch, which is compiled at its first call."""
    return make_eval_step(model_graph(self.config), self.config, self.placement)
