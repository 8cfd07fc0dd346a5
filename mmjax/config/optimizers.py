"""The table of optimizers: what turns a gradient into a step, before decay and rate, which all of them share.

A new one is a function anywhere and a row here. The row names the function and does not import it: the table can be
read without JAX.
"""

import dataclasses
import pkgutil
from typing import Any


@dataclasses.dataclass(frozen=True)
class Optimizer:
  """A row of the table.

  Attributes:
    path: what makes the step, 'package.module:name', called as `make(train, beta1, beta2)` with the train section of a
      config and the betas of a parameter; it returns an optax.GradientTransformation.
    is_adam: whether that is Adam: betas mean something, and memory.bank_update and memory.bank_moments may give a
      bank another form of it.
    matrices: what makes the step of matrices of layers instead, called as `make(train)`; '' where nothing does.
    rate_of_matrices: the setting of the train section that multiplies their learning rate; '' where none does.
  """

  path: str
  is_adam: bool = False
  matrices: str = ''
  rate_of_matrices: str = ''

  def make(self, train: Any, betas: tuple[float, float]) -> Any:
    """Returns the step of parameters that `make_of_matrices` does not move."""
    return pkgutil.resolve_name(self.path)(train, *betas)

  def make_of_matrices(self, train: Any) -> Any:
    """Returns the step of matrices of layers."""
    return pkgutil.resolve_name(self.matrices)(train)


OPTIMIZERS = {
  'adamw': Optimizer('mmjax.training.optimizer:adam_step', is_adam=True),
  'muon': Optimizer(
    'mmjax.training.optimizer:adam_step',
    is_adam=True,
    matrices='mmjax.training.optimizer:muon_step',
    rate_of_matrices='muon_lr_multiplier',
  ),
  'sgd': Optimizer('mmjax.training.optimizer:gradient_step'),
}
