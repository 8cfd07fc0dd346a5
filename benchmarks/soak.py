"""Trains for long, killed at random, beside an undisturbed run:   python benchmarks/soak.py --minutes 30 [--seed N]

Both runs train, evaluate and save every few updates, on the embedded corpus. The first is left alone, and the memory
and open files of its process are watched (Linux). The second gets kill -9 at random moments and is started again until
it is done. In the end every array of both last checkpoints and all lines of both logs (but for times) must be equal.
Prints one row of a Markdown table; exit code 1 if anything differs, or grows (which some minutes cannot tell).
"""

import argparse
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import common
import numpy as np

SETTINGS = {
  'model.vocab_size': 1000, 'model.dim': 64, 'model.n_layers': 2, 'model.n_heads': 4, 'model.n_kv_heads': 2,
  'model.max_seq_len': 64, 'model.knowledge_num': 4096, 'model.knowledge_dim': 32, 'data.valid_fraction': 0.002,
  'train.batch_size': 8, 'train.accumulation_steps': 2, 'train.dtype': 'float32', 'train.log_interval': 5,
  'train.eval_interval': 50, 'train.checkpoint_interval': 10,
}  # fmt: skip
TIMING = ('seconds', 'tokens_per_second', 'mfu', 'peak_bytes')
UNDISTURBED_SHARE = 0.4  # of the time; the killed run needs as long and its starts
LONGEST_LIFE_STARTS = 5  # a process lives up to so many times what a start takes
# A save leaks about 40 KB in tensorstore 0.1: its list of metrics, which Orbax asks for, is never freed.
MOST_KB_A_SAVE = 100
FEWEST_SAVES = 200  # fewer tell nothing about growth: the first evaluations and saves fill pools


class Run:
  """One work directory and the processes that train in it."""

  def __init__(self, workdir: Path, steps: int):
    flags = [f'--config.{name}={value}' for name, value in (SETTINGS | {'train.max_steps': steps}).items()]
    flags += [f'--config.data.prepared_dir={workdir.parent}/data', f'--workdir={workdir}']
    flags += [f'--config.runtime.compilation_cache_dir={workdir.parent}/cache']
    self.command = [sys.executable, str(common.ROOT / 'train.py'), '--config', f'{common.ROOT}/configs/base.py', *flags]
    self.workdir, self.log, self.output = workdir, workdir / 'metrics.jsonl', workdir.with_suffix('.txt')

  def start(self) -> subprocess.Popen:
    """Starts the run, or goes on with it."""
    with self.output.open('a') as output:
      return subprocess.Popen(self.command, stdout=output, stderr=output, cwd=common.ROOT)

  def lines(self) -> list[dict]:
    """Returns the whole lines of the log, without what no two runs have in common."""
    lines = self.log.read_bytes().split(b'\n')[:-1] if self.log.exists() else []
    return [{name: value for name, value in json.loads(line).items() if name not in TIMING} for line in lines]

  def last_step(self) -> int:
    """Returns the last step that the log tells of."""
    return max((line['step'] for line in self.lines()), default=0)

  def arrays(self) -> dict[str, np.ndarray]:
    """Returns every array of the last checkpoint, read without mmjax."""
    import jax
    import orbax.checkpoint as ocp

    last = max((p for p in (self.workdir / 'checkpoints').iterdir() if p.name.isdigit()), key=lambda p: int(p.name))
    trees = {item: ocp.StandardCheckpointer().restore(last / item) for item in ('params', 'rest')}
    return {jax.tree_util.keystr(p): np.asarray(x) for p, x in jax.tree_util.tree_leaves_with_path(trees)}


def main() -> None:
  """Measures the pace, runs both, compares, prints the row."""
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--minutes', type=float, default=30, help='for everything, about')
  parser.add_argument('--seed', type=int, default=random.randrange(10**6), help='of the moments of the kills')
  arguments = parser.parse_args()
  with tempfile.TemporaryDirectory(prefix='soak-') as name:
    folder = Path(name)
    start_seconds, seconds_a_step = measure_pace(Run(folder / 'pace', 10**6))
    steps = max(100, int(60 * arguments.minutes * UNDISTURBED_SHARE / seconds_a_step) // 50 * 50)
    print(
      f'start {start_seconds:.1f} s, {seconds_a_step * 1000:.0f} ms an update: {steps} updates, seed {arguments.seed}'
    )
    calm, killed = Run(folder / 'calm', steps), Run(folder / 'killed', steps)
    growth_kb, files = watch(calm, steps)
    kills = kill_until_done(killed, start_seconds * LONGEST_LIFE_STARTS, random.Random(arguments.seed))
    same_log = calm.lines() == killed.lines()
    a, b = calm.arrays(), killed.arrays()
    same_state = a.keys() == b.keys() and all(a[name].tobytes() == b[name].tobytes() for name in a)
  row = {
    'updates': steps,
    'saves': steps // 10,
    'evaluations': steps // 50,
    'kill -9': kills,
    'final arrays equal': f'{len(a)} of {len(a)}' if same_state else 'NO',
    'log equal': 'yes' if same_log else 'NO',
    'KB a save': f'{growth_kb:.0f}',
    'open files': f'{files[0]} to {files[1]}',
    'commit': common.commit(),
  }
  common.print_table([row])
  grows = steps // 10 >= FEWEST_SAVES and (growth_kb > MOST_KB_A_SAVE or files[1] > files[0])
  sys.exit(not same_log or not same_state or grows)


def measure_pace(run: Run) -> tuple[float, float]:
  """Returns how many seconds a start takes, and an update with its share of saves and evaluations."""
  process = run.start()  # prepares the text and fills the compilation cache
  wait_for_step(run, process, 20)
  kill(process)
  begin, at = time.monotonic(), run.last_step()
  process = run.start()
  wait_for_step(run, process, at + 5)
  first, at = time.monotonic(), run.last_step()
  wait_for_step(run, process, at + 100)
  seconds = (time.monotonic() - first) / (run.last_step() - at)
  kill(process)
  return first - begin, seconds


def wait_for_step(run: Run, process: subprocess.Popen, step: int) -> None:
  """Waits until the log tells of a step."""
  while run.last_step() < step:
    if process.poll() is not None:
      sys.exit(f'the run ended with code {process.returncode}:\n{run.output.read_text()[-2000:]}')
    time.sleep(0.05)


def watch(run: Run, steps: int) -> tuple[float, tuple[int, int]]:
  """Lets a run finish; returns the growth of its memory in KB a save, and its open files, early and late.

  Early and late are the medians of the second and the last quarter of the time after the first evaluation.
  """
  process, samples = run.start(), []
  while process.poll() is None:
    try:
      pages = int(Path(f'/proc/{process.pid}/statm').read_text().split()[1])
      files = len(os.listdir(f'/proc/{process.pid}/fd'))
    except (OSError, IndexError):  # it just ended
      continue
    if 50 < (step := run.last_step()) < steps:  # the report at the end needs memory of its own
      samples.append((step, pages * os.sysconf('SC_PAGE_SIZE') / 1024, files))
    time.sleep(1)
  if process.returncode or len(samples) < 8:
    sys.exit(f'the run ended with code {process.returncode}:\n{run.output.read_text()[-2000:]}')
  quarter = len(samples) // 4
  parts = samples[quarter : 2 * quarter], samples[-quarter:]
  step, kb, files = ([statistics.median(sample[i] for sample in part) for part in parts] for i in range(3))
  print(f'memory: {kb[0]:.0f} KB at update {step[0]:.0f}, {kb[1]:.0f} KB at {step[1]:.0f}', flush=True)
  return (kb[1] - kb[0]) / max((step[1] - step[0]) / 10, 1), (int(files[0]), int(files[1]))


def kill_until_done(run: Run, longest_seconds: float, draw: random.Random) -> int:
  """Kills a run at random moments and starts it again until it is done; returns how often."""
  kills = 0
  while True:
    process = run.start()
    try:
      code = process.wait(timeout=draw.uniform(0, longest_seconds))
    except subprocess.TimeoutExpired:
      kill(process)
      kills += 1
      continue
    if code:
      sys.exit(f'the run ended with code {code}:\n{run.output.read_text()[-2000:]}')
    return kills


def kill(process: subprocess.Popen) -> None:
  """Kills a process that this script started."""
  process.send_signal(signal.SIGKILL)
  process.wait()


if __name__ == '__main__':
  main()
