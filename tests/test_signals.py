"""Signals: the first one is remembered, the second ends the process at once, and what was there before comes back."""

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from mmjax.training.signals import StopSignals

CHILD = """
import sys, time
import jax
if len(sys.argv) > 1:
  jax.distributed.initialize(f'localhost:{sys.argv[1]}', num_processes=1, process_id=0)
from mmjax.training.signals import StopSignals
with StopSignals() as stop:
  print('ready', flush=True)
  for step in range(1200):
    if stop.requested(step):
      print('stopping', flush=True)
      if len(sys.argv) > 1:
        break
    time.sleep(0.05)
"""


def start_child(*args: str) -> subprocess.Popen:
  env = os.environ | {'PYTHONPATH': str(Path(__file__).parents[1]), 'JAX_PLATFORMS': 'cpu'}
  pipes = {'stdout': subprocess.PIPE, 'stderr': subprocess.PIPE, 'text': True}
  child = subprocess.Popen([sys.executable, '-c', CHILD, *args], env=env, **pipes)
  assert child.stdout.readline() == 'ready\n'
  return child


@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT])
def test_first_signal_is_remembered_and_handlers_come_back(number, capfd):
  before = signal.getsignal(number)
  with StopSignals() as stop:
    assert not stop.requested(1)
    os.kill(os.getpid(), number)
    assert stop.requested(2) and stop.requested(3)
  assert signal.getsignal(number) is before
  assert f'{number.name}: finishing this step, then saving' in capfd.readouterr().err


def test_second_signal_exits_at_once():
  child = start_child()
  child.send_signal(signal.SIGTERM)
  assert child.stdout.readline() == 'stopping\n'
  child.send_signal(signal.SIGINT)
  _, err = child.communicate(timeout=10)
  assert child.returncode == 130
  assert 'Second signal' in err


@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT])
def test_under_jax_distributed_processes_agree_on_a_step(number):
  with socket.socket() as free:
    free.bind(('localhost', 0))
    port = free.getsockname()[1]
  child = start_child(str(port))
  child.send_signal(number)
  out, err = child.communicate(timeout=60)
  assert (child.returncode, out) == (0, 'stopping\n'), err
