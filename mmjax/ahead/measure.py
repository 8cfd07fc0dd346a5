"""Measures an update on the GPU of this machine, in a process of its own: this one has JAX on the CPU.

python -m mmjax.ahead.measure --config configs/exp_1_4_2.py [--devices 8] [--config.section.field=value ...]

It prints one line of JSON: device, seconds_an_update (median), peak_bytes.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from typing import Any

from mmjax.config import Config, load_config
from mmjax.errors import run_command

WARM_UPDATES, UPDATES = 2, 5


def measured_here(config: str, overrides: list[str], devices: int) -> dict[str, Any] | None:
  """Returns what `main` prints, from a process that may use the GPU; None where it cannot."""
  hidden = ('JAX_PLATFORMS', 'JAX_SKIP_CUDA_CONSTRAINTS_CHECK')
  environment = {name: value for name, value in os.environ.items() if name not in hidden}
  command = [sys.executable, '-m', 'mmjax.ahead.measure', '--config', config, f'--devices={devices}', *overrides]
  done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True)
  return json.loads(done.stdout.splitlines()[-1]) if done.returncode == 0 else None


def main() -> None:
  """Flags -> config -> updates -> JSON."""
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--config', required=True)
  parser.add_argument('--devices', type=int, default=1)
  arguments, overrides = parser.parse_known_args()
  print(json.dumps(measure(load_config(arguments.config, overrides), arguments.devices)))


def measure(config: Config, devices: int) -> dict[str, Any]:
  """Makes some updates with JAX's first devices and returns what they took."""
  import jax

  from mmjax.training.trial import Trial

  trial, seconds = Trial(config, jax.devices()[:devices]), []
  for _ in range(WARM_UPDATES + UPDATES):
    start = time.perf_counter()
    trial.run()
    seconds.append(time.perf_counter() - start)
  return {
    'device': jax.devices()[0].device_kind,
    'seconds_an_update': statistics.median(seconds[WARM_UPDATES:]),
    'peak_bytes': (jax.devices()[0].memory_stats() or {}).get('peak_bytes_in_use'),
  }


if __name__ == '__main__':
  run_command(main)
