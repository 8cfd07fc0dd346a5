"""What learns: a model and its optimizer on a mesh. It compiles their update, step.py, which is next on the way."""

import dataclasses
from collections.abc import Callable
from functools import cached_property, partial
from typing import Any

import jax
import optax

from mmjax.config import Config
from mmjax.evaluation.evaluate import EvalStep, make_eval_step
from mmjax.model.params import model_graph
from mmjax.run.placement import Placement
from mmjax.run.sharding import batch_shapes, placed, replicated
from mmjax.training.optimizer import make_optimizer
from mmjax.training.out_of_memory import explain_out_of_memory
from mmjax.training.state import TrainState, init_state
from mmjax.training.step import make_train_step


@dataclasses.dataclass(frozen=True)
class Learner:
  """A model that learns in `total_steps` updates, and where its state lies."""

  config: Config
  placement: Placement
  total_steps: int

  @cached_property
  def optimizer(self) -> optax.GradientTransformation:
    """What makes updates of gradients, see optimizer.py."""
    return make_optimizer(self.config, self.total_steps)

  @cached_property
  def shapes(self) -> TrainState:
    """The state as jax.ShapeDtypeStructs, each with its sharding."""
    return placed(self.placement.mesh, jax.eval_shape(partial(init_state, self.config, self.optimizer)))

  @property
  def places(self) -> Any:
    """The sharding of each leaf of the state."""
    return jax.tree.map(lambda x: x.sharding, self.shapes)

  def compile(
    self, state: TrainState, on_micro_batch: Callable | None = None, options: dict[str, Any] | None = None
  ) -> jax.stages.Compiled:
    """Compiles the update.

    Args:
      state: as the update will take it, or its `shapes`; the update reuses its memory.
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

  @cached_property
  def eval_step(self) -> EvalStep:
    """The evaluation of a batch, which is compiled at its first call."""
    return make_eval_step(model_graph(self.config), self.config, self.placement)
