"""Signals: the first one is remembered, the second ends the process at once, and what was there before comes back."""

import os
import pty
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mmjax.run.signals import StopSignals

CHILD = """
import sys, time
import jax
if len(sys.argv) > 1:
  jax.distributed.initialize(f'localhost:{sys.argv[1]}', num_processes=1, process_id=0)
from mmjax.run.signals import StopSignals
with StopSignals() as stop:
  print('ready', flush=True)
  for step in range(1200):
    if stop.requested(step):
      print('stopping', flush=True)
      if len(sys.argv) > 1:
        break
    time.sleep(0.05)
"""


def start_child(*args: str, before: str = 'exec "$@"', code: str = CHILD) -> subprocess.Popen:
  env = os.environ | {'PYTHONPATH': str(Path(__file__).parents[1]), 'JAX_PLATFORMS': 'cpu'}
  pipes = {'stdout': subprocess.PIPE, 'stderr': subprocess.PIPE, 'text': True}
  child = subprocess.Popen(['sh', '-c', before, 'sh', sys.executable, '-c', code, *args], env=env, **pipes)
  assert child.stdout.readline() == 'ready\n'
  return child


@pytest.mark.parametrize(
  'number', [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGXCPU]
)
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


def test_second_signal_shows_the_cursor_that_a_bar_has_hidden():
  code = """
import time
from mmjax.console import Progress
from mmjax.run.signals import StopSignals
with StopSignals():
  progress = Progress()
  progress.update('training', 1, 2)
  time.sleep(60)
"""
  ours, terminal = pty.openpty()
  env = os.environ | {'PYTHONPATH': str(Path(__file__).parents[1]), 'JAX_PLATFORMS': 'cpu', 'TERM': 'xterm'}
  child = subprocess.Popen([sys.executable, '-c', code], env=env, stdin=terminal, stdout=terminal, stderr=terminal)
  os.close(terminal)
  shown = b''
  for awaited in (b'\x1b[?25l', b'finishing this step'):
    while awaited not in shown:
      shown += os.read(ours, 4096)
    child.send_signal(signal.SIGINT)
  assert child.wait(timeout=10) == 130
  shown += os.read(ours, 4096)
  os.close(ours)
  assert b'Second signal' in shown and shown.rindex(b'\x1b[?25h') > shown.rindex(b'\x1b[?25l')


def test_signals_are_heard_within_a_long_update():
  """As an update of minutes on a CPU: the main thread waits in the runtime and runs no handler of Python."""
  code = """
import jax
from mmjax.run.signals import StopSignals
endless = jax.jit(lambda x: jax.lax.while_loop(lambda x: x > 0, lambda x: x + 1 - 1e-9, x)).lower(1.0).compile()
with StopSignals():
  print('ready', flush=True)
  endless(1.0).block_until_ready()
"""
  child = start_child(code=code)
  time.sleep(0.5)
  child.send_signal(signal.SIGTERM)
  assert 'SIGTERM: finishing this step, then saving' in child.stderr.readline() + child.stderr.readline()
  child.send_signal(signal.SIGTERM)
  child.communicate(timeout=10)
  assert child.returncode == 130


def test_warnings_of_a_batch_system_never_end_a_run_at_once():
  child = start_child()
  for number in (signal.SIGUSR1, signal.SIGHUP, signal.SIGHUP, signal.SIGTERM, signal.SIGUSR1):
    child.send_signal(number)
    time.sleep(0.1)
    assert child.poll() is None
  assert child.stdout.readline() == 'stopping\n'
  child.send_signal(signal.SIGTERM)
  _, err = child.communicate(timeout=10)
  assert child.returncode == 130 and err.count('finishing this step') == 1


def test_hangup_that_is_ignored_stays_so():
  child = start_child(before='trap "" HUP; exec "$@"')
  child.send_signal(signal.SIGHUP)
  time.sleep(0.3)
  child.send_signal(signal.SIGUSR1)
  assert child.stdout.readline() == 'stopping\n'
  assert child.stderr.readline() == '\n' and child.stderr.readline().startswith('SIGUSR1')  # the first that is said
  child.kill()
  child.communicate()


@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
@pytest.mark.thorough
def test_under_jax_distributed_processes_agree_on_a_step(number):
  with socket.socket() as free:
    free.bind(('localhost', 0))
    port = free.getsockname()[1]
  child = start_child(str(port))
  child.send_signal(number)
  out, err = child.communicate(timeout=60)
  assert (child.returncode, out) == (0, 'stopping\n'), err
