"""What several tests need: a tiny config and random rows."""

import os
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterable
from functools import cache, partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import Array

from mmjax.config import Config, idle_settings, load_config
from mmjax.data.loader import PADDING
from mmjax.errors import run_command
from mmjax.model.params import Params, init_params, model_graph
from mmjax.training.optimizer import make_optimizer
from mmjax.training.state import TrainState, TrainStep, init_state
from mmjax.training.step import make_train_step
from tests.tiny import TINY as TINY

REPOSITORY = Path(__file__).parent.parent
TINY_CONFIG = 'tests/tiny.py'
STEPS = 10  # updates of the run that `compiled` makes a step of


def rarely(values: Iterable, *always: object) -> list:
  """Returns values as parameters of a test, all but `always` marked thorough."""
  return [value if value in always else pytest.param(value, marks=pytest.mark.thorough) for value in values]


def seldom(values: Iterable, *thorough: object) -> list:
  """Returns values as parameters of a test, `thorough` marked so and the others slow."""
  marks = {True: pytest.mark.thorough, False: pytest.mark.slow}
  return [pytest.param(value, marks=marks[value in thorough]) for value in values]


def tiny_config(file: str | Path = REPOSITORY / TINY_CONFIG, **overrides: object) -> Config:
  """Returns the config of a file (a model of a few thousand parameters); `section__field=value` overrides it."""
  return load_config(str(file), [f'--config.{name.replace("__", ".")}={value}' for name, value in overrides.items()])


def flags_for(config_file: str, settings: dict[str, object]) -> list[str]:
  """Returns overrides of a config file, without those that do nothing in its model."""
  idle = idle_settings(load_config(config_file))
  return [f'--config.{name}={value}' for name, value in settings.items() if name not in idle]


def xla_flags(n_devices: int) -> str:
  """Returns XLA_FLAGS for a process with so many CPU devices that otherwise compiles as this one does."""
  # A machine that is busy keeps a thread waiting for others longer than the 40 s after which XLA aborts the process.
  patient = '--xla_cpu_collective_call_terminate_timeout_seconds=600'
  return f'{os.environ.get("XLA_FLAGS", "")} --xla_force_host_platform_device_count={n_devices} {patient}'


def build_model(config: Config) -> tuple[nnx.GraphDef, Params]:
  """Returns the graph definition and the first parameters."""
  return model_graph(config), jax.jit(partial(init_params, config))()


def random_batch(config: Config, seed: int = 0) -> dict[str, Array]:
  """Returns one batch of random tokens, (A, B, T), whose last row is half padding."""
  shape = (config.train.accumulation_steps, config.train.batch_size, config.model.max_seq_len + 1)
  tokens = jax.random.randint(jax.random.key(seed), shape, 4, config.model.vocab_size)
  tokens = tokens.at[-1, -1, shape[-1] // 2 :].set(0)
  return {
    'input': tokens[..., :-1],
    'target': tokens.at[-1, -1, shape[-1] // 2 :].set(PADDING)[..., 1:],
    'segment': jnp.zeros_like(tokens[..., 1:]),
  }


def make_step(config: Config, total_steps: int = STEPS) -> tuple[TrainStep, Callable[[], TrainState]]:
  """Returns the update, not yet compiled, and what makes its first state."""
  optimizer = make_optimizer(config, total_steps)
  step = make_train_step(config, model_graph(config), optimizer, attention='xla', total_steps=total_steps)
  return step, lambda: init_state(config, optimizer)


@cache
def compiled(config: Config) -> tuple[TrainStep, TrainState]:
  """Returns the update of a run of STEPS, compiled at its first call, and its first state."""
  step, first = make_step(config)
  return jax.jit(step), jax.jit(first)()


def overrides(text: Path, **more: object) -> dict[str, object]:
  """Returns the settings of a short run on the fixture `text`."""
  return {
    'data__train_files': f'{text}/text.jsonl',
    'data__valid_fraction': 0.1,
    'data__prepared_dir': f'{text}/prepared',
    'data__workers': 1,
    'train__log_interval': 2,
    'train__eval_interval': 4,
    'train__checkpoint_interval': 3,
    **more,
  }


def run_config(text: Path, **more: object) -> Config:
  """Returns the config of a short run on the fixture `text`."""
  return tiny_config(**overrides(text, **more))


def command(text: Path, workdir: Path, **more: object) -> list[str]:
  """Returns the command line of a short run on the fixture `text`; run it in REPOSITORY."""
  flags = [f'--config.{name.replace("__", ".")}={value}' for name, value in overrides(text, **more).items()]
  return [sys.executable, 'train.py', '--config', TINY_CONFIG, '--workdir', str(workdir), *flags]


def run_main(main: Callable[[], None], monkeypatch, capture, *flags: object) -> tuple[int, str, str]:
  """Runs a command's `main` in this process; returns exit code, stdout and stderr, from capsys or capfd."""
  monkeypatch.setattr(sys, 'argv', ['command', *map(str, flags)])
  monkeypatch.setattr(warnings, 'showwarning', warnings.showwarning)  # a command may set it; this puts it back
  code = 0
  try:
    run_command(main)
  except SystemExit as stop:
    code = stop.code
  return code, *capture.readouterr()


def wait_for(path: Path, text: str, process: subprocess.Popen, seconds: float = 90) -> None:
  """Waits until a running process has written `text` into a file."""
  deadline = time.monotonic() + seconds
  while not (path.exists() and text in path.read_text()):
    assert process.poll() is None and time.monotonic() < deadline, f'{text!r} never appeared in {path}'
    time.sleep(0.05)


def final_state(workdir: Path) -> dict[str, np.ndarray]:
  """Every array of the last checkpoint, by name, read without mmjax."""
  last = max(int(p.name) for p in (workdir / 'checkpoints').iterdir() if p.name.isdigit())
  items = [item for item in ('params', 'reads', 'rest') if (workdir / 'checkpoints' / str(last) / item).is_dir()]
  return {name: array for item in items for name, array in arrays_of(workdir, last, item).items()}


def arrays_of(workdir: Path, step: int, item: str = 'params') -> dict[str, np.ndarray]:
  """Every array of one item of a checkpoint, by name, read without mmjax."""
  import orbax.checkpoint as ocp

  tree = ocp.StandardCheckpointer().restore(workdir.absolute() / 'checkpoints' / str(step) / item)
  return {f'{item}{jax.tree_util.keystr(p)}': np.asarray(x) for p, x in jax.tree_util.tree_leaves_with_path(tree)}


class StopAfter:
  """Stands in for StopSignals: asks to stop after one given step."""

  def __init__(self, step: int):
    self.step = step

  def __enter__(self):
    return self

  def __exit__(self, *_):
    return None

  def requested(self, step: int) -> bool:
    return step == self.step
