"""What the benchmarks share: the repository on the path, statistics, tables and JSON.

`import common` comes before anything that imports JAX, because it sets JAX's allocator.
"""

import argparse
import datetime
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # for a bare checkout, and for the port in tests/; the next line for child processes
os.environ['PYTHONPATH'] = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get('PYTHONPATH')])])
os.environ.setdefault('XLA_PYTHON_CLIENT_PREALLOCATE', 'false')  # or nothing would be left for torch on a GPU

Statistics = dict[str, float]


def environment() -> dict[str, Any]:
  """Returns what a table needs beside its numbers: time, commit, command, device, versions, load."""
  from mmjax.environment import count_cores

  versions = {}
  for name in ('jax', 'jaxlib', 'flax', 'optax', 'torch'):
    try:
      versions[name] = metadata.version(name)
    except metadata.PackageNotFoundError:
      continue
  return {
    'time': datetime.datetime.now(datetime.UTC).isoformat(timespec='seconds'),
    'commit': commit(),
    'command': ' '.join(['python', *sys.argv]),
    'device': device_name(),
    'threads': count_cores(),  # of XLA's pool on a CPU
    'load_average': os.getloadavg()[0],
    'versions': {'python': platform.python_version(), **versions},
  }


def commit() -> str:
  """Returns $COMMIT or the commit of this checkout; 'unknown' where there is no git, or no repository."""
  if given := os.environ.get('COMMIT'):
    return given
  try:
    found = subprocess.run(['git', '-C', ROOT, 'rev-parse', '--short', 'HEAD'], capture_output=True, text=True)
  except OSError:
    return 'unknown'
  return found.stdout.strip() or 'unknown'


def device_name() -> str:
  """Returns JAX's name of the device; of a CPU, which it does not name, the processor's model."""
  import jax

  if jax.default_backend() != 'cpu':
    return jax.devices()[0].device_kind
  models = [line for line in Path('/proc/cpuinfo').read_text().splitlines() if line.startswith('model name')]
  return models[0].split(':')[1].strip() if models else 'cpu'


def program_bytes(memory: Any) -> int:
  """Returns all that a program needs, from `compiled.memory_analysis()`; donated arrays count once."""
  return (
    memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes + memory.temp_size_in_bytes
  )


def seconds_of(run: Callable[[], Any]) -> float:
  """Times one call."""
  start = time.perf_counter()
  run()
  return time.perf_counter() - start


def spread(values: Sequence[float]) -> Statistics:
  """Returns median, min and max."""
  return {'median': statistics.median(values), 'min': min(values), 'max': max(values)}


def print_row(row: dict[str, Any]) -> None:
  """Prints one row of a Markdown table."""
  print('| ' + ' | '.join(map(str, row.values())) + ' |', flush=True)


def print_table(rows: Iterable[dict[str, Any]]) -> None:
  """Prints rows with equal keys as a Markdown table."""
  rows = list(rows)
  print('| ' + ' | '.join(rows[0]) + ' |')
  print('|' + '---|' * len(rows[0]))
  for row in rows:
    print_row(row)


def write_json(path: Path | None, content: dict[str, Any]) -> None:
  """Writes a file, if one is wanted."""
  if path:
    path.write_text(json.dumps(content, indent=2) + '\n', encoding='utf-8')


def parser(doc: str, config: str = 'configs/exp_1_4_2.py') -> argparse.ArgumentParser:
  """Returns a parser with the flags that all of these benchmarks have."""
  made = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
  made.add_argument('--config', default=config)
  made.add_argument('--repeats', type=int, default=5, help='turns of each side')
  made.add_argument('--json', type=Path, help='file to write the measurements to')
  return made


def resident_bytes(field: str) -> int:
  """Returns VmRSS (now) or VmHWM (peak) of this process; 0 where /proc is missing."""
  status = Path('/proc/self/status')
  lines = status.read_text().splitlines() if status.exists() else []
  return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(field + ':')), 0)


def reset_resident_peak() -> None:
  """Makes VmHWM start again from now."""
  path = Path('/proc/self/clear_refs')
  if path.exists():
    path.write_text('5')
