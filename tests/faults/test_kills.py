"""kill -9 at random moments: whatever was killed and resumed ends as what was never disturbed, bit for bit.

    python -m pytest -m campaign tests/faults/test_kills.py --faults=1000 -s

A third of the kills hit `prepare`, the others training: its start, updates, evaluations and saves.
"""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from mmjax.config import Config
from mmjax.run.log import read_metrics
from tests.helpers import REPOSITORY, final_state, run_config

pytestmark = pytest.mark.campaign

KILLS_PER_RUN = 7  # then a run may finish, and is compared
TIMING = ('seconds', 'tokens_per_second', 'peak_bytes')  # what no two runs have in common
SETTINGS = {
  'model__n_layers': 1,
  'train__accumulation_steps': 1,
  'train__max_steps': 12,
  'train__log_interval': 1,
  'train__eval_interval': 5,
  'train__checkpoint_interval': 2,
}


class ForkServer:
  """The other end of fork_server.py."""

  def __init__(self, folder: Path):
    self.output = folder / 'output.txt'
    command = [sys.executable, '-m', 'tests.faults.fork_server']
    environment = os.environ | {'PYTHONPATH': str(REPOSITORY), 'JAX_PLATFORMS': 'cpu'}
    pipes = {'stdin': subprocess.PIPE, 'stdout': subprocess.PIPE}
    self._process = subprocess.Popen(command, cwd=REPOSITORY, env=environment, text=True, **pipes)
    assert self._process.stdout.readline() == 'ready\n'

  def run(
    self, what: str, config: Config, workdir: Path, kill_at: int | None = None, delay_seconds: float = 0.0
  ) -> int:
    """Returns how a child ended: its exit code, or minus the signal that it died of."""
    request = {'what': what, 'config': config.to_dict(), 'workdir': str(workdir), 'output': str(self.output)}
    request |= {'kill_at': kill_at, 'delay_seconds': delay_seconds}
    self._process.stdin.write(json.dumps(request) + '\n')
    self._process.stdin.flush()
    return int(self._process.stdout.readline())

  def run_whole(self, what: str, config: Config, workdir: Path) -> int:
    """Runs undisturbed and returns how many changes to the file system that took."""
    assert self.run(what, config, workdir) == 0, self.output.read_text()
    return int(self.output.with_suffix('.changes').read_text())

  def close(self) -> None:
    self._process.stdin.close()
    self._process.wait(timeout=60)


@pytest.fixture(scope='module')
def server(tmp_path_factory) -> Iterator[ForkServer]:
  server = ForkServer(tmp_path_factory.mktemp('server'))
  yield server
  server.close()


def draw_delay(draw: random.Random) -> float:
  """At the change itself, while what it began goes on in other threads, or some time later."""
  return draw.choice([0.0, draw.uniform(0, 0.01), draw.uniform(0, 0.2)])


def kill_until_done(
  server: ForkServer, what: str, config: Config, workdir: Path, *, changes: int, kills: int, draw: random.Random
) -> int:
  """Starts again and again, killed at random, at most `kills` times; then lets it finish. Returns the kills."""
  for killed in range(kills):
    code = server.run(what, config, workdir, draw.randint(1, changes // 4), draw_delay(draw))
    assert code in (0, -signal.SIGKILL), server.output.read_text()
    if code == 0:  # it was done before the moment came
      return killed
  assert server.run(what, config, workdir) == 0, server.output.read_text()
  return kills


def campaign(
  server: ForkServer,
  what: str,
  settings: Callable[[Path], Config],
  folder: Path,
  *,
  changes: int,
  kills: int,
  seed: int,
) -> Iterator[Path]:
  """Yields finished runs that were killed on the way, until there were so many kills."""
  done, number = 0, seed
  while done < kills:
    path = folder / f'killed-{number}'
    most = min(KILLS_PER_RUN, kills - done)
    killed = kill_until_done(
      server, what, settings(path), path, changes=changes, kills=most, draw=random.Random(number)
    )
    print(f'{what}: seed {number}, {killed} kills')
    yield path
    shutil.rmtree(path)
    done += killed
    number += 1


def comparable_log(workdir: Path) -> list[dict]:
  lines = read_metrics(workdir / 'metrics.jsonl')
  return [{name: value for name, value in line.items() if name not in TIMING} for line in lines]


def names_in(run: Path) -> set[str]:
  """Names of the files and steps of a run; TensorBoard makes a file for each start."""
  return {str(path.relative_to(run)) for path in [*run.glob('*'), *run.glob('checkpoints/*'), *run.rglob('*tmp*')]}


@pytest.fixture
def shares(request) -> tuple[int, int, int]:
  """Kills of training, kills of prepare, and the first seed."""
  kills = request.config.getoption('faults')
  return kills - kills // 3, kills // 3, request.config.getoption('faults_seed')


def test_killed_training_ends_as_if_undisturbed(server, text, tmp_path, shares):
  config = run_config(text, **SETTINGS)
  server.run_whole('train', config, tmp_path / 'first')  # prepares the text and fills the compilation cache
  calm = tmp_path / 'calm'
  changes = server.run_whole('train', config, calm)
  state, log = final_state(calm), comparable_log(calm)
  assert [line['step'] for line in log if line['kind'] == 'eval'] == [5, 10, 12] and len(state) > 20
  runs = campaign(server, 'train', lambda _: config, tmp_path, changes=changes, kills=shares[0], seed=shares[2])
  for run in runs:
    assert comparable_log(run) == log
    found = final_state(run)
    assert found.keys() == state.keys()
    for name, value in state.items():
      assert found[name].tobytes() == value.tobytes(), name
    assert names_in(run) == names_in(calm)


def test_killed_prepare_ends_as_if_undisturbed(server, text, tmp_path, shares):
  def settings(folder: Path) -> Config:
    return run_config(text, data__prepared_dir=folder)

  changes = server.run_whole('prepare', settings(tmp_path / 'calm'), tmp_path)
  calm = contents(tmp_path / 'calm')
  assert len(calm) > 10
  runs = campaign(server, 'prepare', settings, tmp_path, changes=changes, kills=shares[1], seed=shares[2])
  for run in runs:
    assert contents(run) == calm
  said = server.output.read_text()
  assert shares[1] < 6 or 'going on after the last whole shard' in said


def contents(folder: Path) -> dict[str, bytes]:
  """All files but the one that notes times."""
  files = [path for path in folder.rglob('*') if path.is_file() and path.name != 'verified.json']
  return {str(path.relative_to(folder)): path.read_bytes() for path in files}
