"""Measures starting: python benchmarks/cold_start.py --config configs/exp_1_4_2.py [--config.section.field=value ...]

The time from the start of `train.py` to its first finished update, with an empty compilation cache ("cold") and with
the one that the cold start left behind ("warm"). Text is prepared before and not counted. Each start has a work
directory of its own; it is ended once its first update is logged.
"""

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import common

from mmjax.config import load_config
from mmjax.data.prepare import prepare

POLL_SECONDS = 0.02


def main() -> None:
  """Starts a run several times, prints the table, writes the JSON file."""
  parser = common.parser(__doc__)
  arguments, overrides = parser.parse_known_args()
  config = load_config(arguments.config, overrides)
  prepare(config.data, config.model.vocab_size)
  command = [sys.executable, str(common.ROOT / 'train.py'), '--config', arguments.config, *overrides]
  seconds = {'cold': [], 'warm': []}
  for _ in range(arguments.repeats):
    with tempfile.TemporaryDirectory() as folder:
      cache = f'--config.runtime.compilation_cache_dir={folder}/cache'
      for kind in seconds:
        seconds[kind].append(seconds_to_first_step([*command, cache], Path(folder) / kind))
  spreads = {kind: common.spread(found) for kind, found in seconds.items()}
  shape = f'{config.train.accumulation_steps} x {config.train.batch_size} x {config.model.max_seq_len}'
  common.print_table(
    {
      'start': kind,
      'tokens an update': shape,
      'seconds': f'{s["median"]:.1f}',
      'range': f'{s["min"]:.1f}-{s["max"]:.1f}',
    }
    for kind, s in spreads.items()
  )
  found = common.environment()
  common.write_json(arguments.json, found | {'config': config.to_dict(), 'seconds': seconds})


def seconds_to_first_step(command: list[str], workdir: Path) -> float:
  """Starts the command and waits for the first line of its log; then ends it."""
  # Not with a cache that the environment names, which JAX would take before that of the settings.
  environment = {name: value for name, value in os.environ.items() if name != 'JAX_COMPILATION_CACHE_DIR'}
  start = time.perf_counter()
  with open(workdir.with_suffix('.txt'), 'w+', encoding='utf-8') as output:
    process = subprocess.Popen(
      [*command, '--config.train.log_interval=1', '--workdir', str(workdir)],
      stdout=output, stderr=subprocess.STDOUT, env=environment,
    )  # fmt: skip
    log = workdir / 'metrics.jsonl'
    while not (log.exists() and log.stat().st_size):
      if process.poll() is not None:
        output.seek(0)
        sys.exit(f'train.py ended before its first update:\n{output.read()}')
      time.sleep(POLL_SECONDS)
    seconds = time.perf_counter() - start
    process.kill()
    process.wait()
  return seconds


if __name__ == '__main__':
  main()
