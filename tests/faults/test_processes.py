"""Runs of two real processes over JAX's CPU collectives: same losses as one, stop together, end when one is lost."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mmjax.run.log import read_metrics
from mmjax.training.loop import fit
from tests.helpers import REPOSITORY, command, run_config, wait_for

SETTINGS = {
  'train__batch_size': 4,
  'train__accumulation_steps': 2,
  'train__log_interval': 1,
  'train__learning_rate': 1e-3,
}
LONG = {'train__eval_interval': 10**6, 'train__checkpoint_interval': 20, 'train__max_steps': 10**6}


def start_two(text, workdir: Path, *each: dict[str, object], **settings: object) -> list[subprocess.Popen]:
  """Starts both processes of a run; `each` holds what is set for one of them alone."""
  with socket.socket() as free:
    free.bind(('localhost', 0))
    port = free.getsockname()[1]
  processes = []
  for number in (0, 1):
    own = {'runtime__coordinator': f'localhost:{port}', 'runtime__num_processes': 2, 'runtime__process_id': number}
    own |= each[number] if each else {}
    pipes = {'stdout': subprocess.PIPE, 'stderr': subprocess.PIPE, 'text': True}
    start = command(text, workdir, **SETTINGS, **settings, **own)
    processes.append(subprocess.Popen(start, cwd=REPOSITORY, env=os.environ | {'JAX_PLATFORMS': 'cpu'}, **pipes))
  return processes


def outcome(process: subprocess.Popen) -> tuple[int, str, str]:
  out, err = process.communicate(timeout=60)
  return process.returncode, out, err


@pytest.mark.slow
@pytest.mark.parametrize('row_devices', [1, 2])
def test_two_processes_stop_together_and_train_as_one(text, tmp_path, row_devices):
  length = {'train__max_steps': 60, 'train__eval_interval': 30, 'train__checkpoint_interval': 60}
  processes = start_two(text, tmp_path / 'two', runtime__row_devices=row_devices, **length)
  try:
    wait_for(tmp_path / 'two' / 'metrics.jsonl', '"step": 3,', processes[0])
    processes[1].send_signal(signal.SIGTERM)
    (code0, out0, err0), (code1, out1, err1) = map(outcome, processes)
  finally:
    for process in processes:
      process.kill()
  assert (code0, code1) == (75, 75), err0 + err1
  stopped = [re.search(r'Stopped at step (\d+) of 60', err) for err in (err0, err1)]
  assert stopped[0] and stopped[1] and stopped[0][1] == stopped[1][1]
  assert 'Attention:' in out0 and 'Attention:' not in out1  # messages are the first one's
  # What two processes saved, one goes on with; the losses are those of a run that had one from the beginning.
  fit(run_config(text, **SETTINGS, **length), tmp_path / 'two')
  fit(run_config(text, **SETTINGS, **length), tmp_path / 'one')
  two, one = (read_metrics(tmp_path / name / 'metrics.jsonl') for name in ('two', 'one'))
  assert [line['step'] for line in two] == [line['step'] for line in one]
  assert len([line for line in one if line['kind'] == 'train']) == 60
  for a, b in zip(two, one, strict=True):
    assert a['kind'] == b['kind'] and a['loss'] == pytest.approx(b['loss'], rel=1e-4)
    assert a['tokens'] == b['tokens']
  assert two[-1]['bank'][0]['used_share'] == one[-1]['bank'][0]['used_share'] > 0


@pytest.mark.slow
@pytest.mark.parametrize('victim', [0, 1])
def test_process_that_is_killed_ends_the_other_within_seconds(text, tmp_path, victim):
  processes = start_two(text, tmp_path, **LONG)
  try:
    wait_for(tmp_path / 'metrics.jsonl', '"step": 25,', processes[0])
    processes[victim].send_signal(signal.SIGKILL)
    start = time.monotonic()
    code, _, err = outcome(processes[1 - victim])
    seconds = time.monotonic() - start
  finally:
    for process in processes:
      process.kill()
      process.communicate()
  assert seconds < 20
  assert (code == 75 and 'Another process of this run was lost' in err) or (
    code == -signal.SIGABRT and 'another task died' in err
  ), (code, err)
  resumed = start_two(text, tmp_path, **LONG)
  try:
    deadline = time.monotonic() + 60
    while resumed[0].poll() is None and time.monotonic() < deadline:
      if 'Resuming' in (line := resumed[0].stdout.readline()):
        break
    assert re.search(r'Resuming .* at step \d*[02468]0 of', line)
  finally:
    for process in resumed:
      process.kill()
      process.communicate()


@pytest.mark.slow
def test_processes_with_different_settings_are_refused(text, tmp_path):
  processes = start_two(text, tmp_path / 'run', {'seed': 1}, {'seed': 2}, **LONG)
  results = [outcome(process) for process in processes]
  assert {code for code, _, _ in results} <= {2, 75, -signal.SIGABRT} and 2 in {code for code, _, _ in results}
  assert any('process 1 was started with other settings than process 0' in err for _, _, err in results)
  assert not (tmp_path / 'run').exists()


@pytest.mark.parametrize('message', ['', ' \n ', 'Gloo connectFullMesh failed\nmore'])
def test_end_of_a_process_that_lost_another_survives_any_message(message):
  code = f"""
import sys
from mmjax.run.processes import _exit
cause = RuntimeError('connection reset by peer')
error = RuntimeError({message!r})
error.__cause__ = cause
sys.stdout.close()
_exit(error)
"""
  done = subprocess.run([sys.executable, '-c', code], cwd=REPOSITORY, capture_output=True, text=True, timeout=60)
  assert done.returncode == 75 and 'Another process of this run was lost (RuntimeError: ' in done.stderr
