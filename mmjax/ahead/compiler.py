"""Compiles a config's whole train step for a card that this machine does not have.

JAX must be told before it is imported: `prepare_environment`.
"""

import os
import sys
from functools import partial
from importlib.util import find_spec
from typing import Any

from mmjax.ahead.cards import Card
from mmjax.config import Config
from mmjax.errors import UserError

WHEELS = "pip install -e '.[cuda12]'"


def prepare_environment() -> None:
  """Makes JAX use the CPU and load the CUDA plugin without a driver; before JAX is imported.

  Raises:
    UserError: if the CUDA plugin is not installed, with the command that installs it.
  """
  if sys.version_info < (3, 12):
    raise UserError(
      f'compiling for a GPU needs Python 3.12 or newer, this is {sys.version.split()[0]}; '
      f'with it: python3.12 -m venv .venv-ahead && .venv-ahead/bin/{WHEELS}'
    )
  if not any(_has(f'jax_plugins.xla_cuda{version}') for version in (12, 13)):
    raise UserError(f"JAX's CUDA plugin is not installed (3 GB, no GPU or driver needed): {WHEELS}")
  os.environ['JAX_SKIP_CUDA_CONSTRAINTS_CHECK'] = '1'
  os.environ['JAX_PLATFORMS'] = 'cpu'
  os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '2')  # warnings that nothing can be timed here


def _has(module: str) -> bool:
  try:
    return find_spec(module) is not None
  except ModuleNotFoundError:  # not even its package
    return False


def compile_for(config: Config, card: Card, devices: int = 1, total_steps: int = 14449) -> Any:
  """Returns the compiled train step of a config for so many cards in one machine.

  Args:
    config: as a run would have it.
    card: what to compile for.
    devices: how many of them.
    total_steps: of the learning rate's schedule.

  Raises:
    UserError: if the settings do not divide by the devices, or attention does not run there.
  """
  import jax
  from jax.experimental import topologies

  from mmjax.run.placement import place
  from mmjax.run.sharding import placed
  from mmjax.training.optimizer import make_optimizer
  from mmjax.training.setup import compile_step
  from mmjax.training.step import init_state

  topology = topologies.get_topology_desc(platform='cuda', target_config=card.description(), topology=f'1x1x{devices}')
  placement = place(config, topology.devices)
  optimizer = make_optimizer(config, total_steps)
  state = placed(placement.mesh, jax.eval_shape(partial(init_state, config, optimizer)))
  options = {'xla_gpu_autotune_level': 0}  # which would run kernels
  return compile_step(config, placement, optimizer, state, total_steps=total_steps, options=options)
