"""Compiles a config's whole train step for a card that this machine does not have.

JAX must be told before it is imported: `prepare_environment`.
"""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from typing import Any

from mmjax.ahead.cards import Card
from mmjax.config import Config
from mmjax.errors import UserError

WHEELS = "pip install -e '.[train,cuda12]'"
NO_GPU = {'JAX_PLATFORMS': 'cpu', 'JAX_SKIP_CUDA_CONSTRAINTS_CHECK': '1'}


def prepare_environment() -> None:
  """Makes JAX use the CPU and load the CUDA plugin without a driver; before JAX is imported.

  Raises:
    UserError: if the CUDA plugin is not installed, with the command that installs it.
  """
  if sys.version_info < (3, 12):
    raise UserError(
      f'compiling for a GPU needs Python 3.12 or newer, and this is {sys.version.split()[0]}; '
      f'with it: python3.12 -m venv .venv-ahead && .venv-ahead/bin/{WHEELS} && '
      '.venv-ahead/bin/python -m mmjax.tools.fit ...'
    )
  if not any(_has(f'jax_plugins.xla_cuda{version}') for version in (12, 13)):
    raise UserError(f"JAX's CUDA plugin is not installed (3 GB, no GPU or driver needed): {WHEELS}")
  os.environ.update(NO_GPU)
  os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '2')  # warnings that nothing can be timed here


def _has(module: str) -> bool:
  try:
    return find_spec(module) is not None
  except ModuleNotFoundError:  # not even its package
    return False


def compile_for(config: Config, card: Card, devices: int = 1) -> Any:
  """Returns the compiled train step of a config for so many cards in one machine.

  Args:
    config: as a run would have it.
    card: what to compile for.
    devices: how many of them.

  Raises:
    UserError: if the settings do not divide by the devices or leave some idle, attention does not run there, or only
      a GPU can compile it.
  """
  if config.runtime.triton_gemm:
    raise UserError('runtime.triton_gemm=True cannot be compiled without a GPU: XLA would have to time products on it')
  from jax.experimental import topologies

  from mmjax.run.placement import place
  from mmjax.training.learner import Learner

  topology = topologies.get_topology_desc(platform='cuda', target_config=card.description(), topology=f'1x1x{devices}')
  steps = config.train.max_steps or 1  # of a schedule: two lengths differ in a constant
  placement = place(config, topology.devices)
  if (used := placement.mesh.size) != devices:
    raise UserError(
      f'--devices {devices} must be {used}, as many as runtime.data_devices and runtime.row_devices use: a run leaves '
      'the others idle'
    )
  learner = Learner(config, placement, steps)
  return learner.compile(learner.shapes, options={'xla_gpu_autotune_level': 0})  # which would run kernels


def measured_here(config: str, overrides: list[str], devices: int) -> dict[str, Any] | None:
  """Returns what mmjax.ahead.trial measures on the GPU of this machine, which its process may use; None if it fails."""
  environment = {name: value for name, value in os.environ.items() if name not in NO_GPU}
  command = [sys.executable, '-m', 'mmjax.ahead.trial', '--config', config, f'--devices={devices}', *overrides]
  done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True)
  return json.loads(done.stdout.splitlines()[-1]) if done.returncode == 0 else None
