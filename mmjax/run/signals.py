"""Stopping politely: a signal lets the step finish and the state be saved; a second SIGTERM or Ctrl-C exits at once.

SIGHUP says that the terminal was closed; SIGUSR1, SIGUSR2 and SIGXCPU are what batch systems send before they kill.
These may come twice, or before a SIGTERM, and nobody means "at once" by them. Under nohup SIGHUP stays ignored.

Under jax.distributed all processes must stop at the same step, and JAX's own SIGTERM handler agrees on one; a Python
handler installed after it would disable it. So exactly one of the two is in place, and the other signals are passed on
to it.
"""

import contextlib
import os
import signal
import socket
import threading
from types import FrameType
from typing import Self

import jax
from jax.experimental import multihost_utils

from mmjax.errors import end_at_once

URGENT = (signal.SIGINT, signal.SIGTERM)
WARNINGS = (signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGXCPU)


class StopSignals:
  """`with StopSignals() as stop:` and, after each step, `if stop.requested(step): save and leave`."""

  def __init__(self) -> None:
    self._asked = self._told = self._urged = False
    self._distributed = jax.distributed.is_initialized()
    self._previous: dict[int, object] = {}

  def __enter__(self) -> Self:
    if threading.current_thread() is threading.main_thread():  # Python lets no other thread install handlers
      numbers = {*URGENT, *WARNINGS} - ({signal.SIGTERM} if self._distributed else set())
      if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
        numbers.remove(signal.SIGHUP)
      # A thread hears of a signal at once; Python's own handlers wait while the main one is within a long update.
      self._reader, self._writer = socket.socketpair()
      self._writer.setblocking(False)
      self._thread = threading.Thread(target=self._listen, daemon=True)
      self._thread.start()
      self._wakeup = signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
      self._previous = {number: signal.signal(number, self._note) for number in numbers}
    return self

  def __exit__(self, *_: object) -> None:
    if not self._previous:
      return
    for number, handler in self._previous.items():
      signal.signal(number, handler)
    signal.set_wakeup_fd(self._wakeup)
    self._writer.close()
    self._thread.join()
    self._reader.close()
    self._previous = {}

  def requested(self, step: int) -> bool:
    """Whether to stop after this step. Several processes must all ask after every step; they get the same answer."""
    if self._distributed:
      return multihost_utils.reached_preemption_sync_point(step)
    return self._asked

  def _note(self, number: int, frame: FrameType | None) -> None:
    self._asked = True

  def _listen(self) -> None:
    while number := self._reader.recv(1):
      self._handle(number[0])

  def _handle(self, number: int) -> None:
    if number == signal.SIGHUP:
      _leave_terminal()
    if number in URGENT and self._urged:
      end_at_once('\nSecond signal: exiting at once, without saving.')
    self._urged |= number in URGENT
    if not self._told:
      self._told = True
      _say(
        f'{signal.Signals(number).name}: finishing this step, then saving. A second Ctrl-C or SIGTERM exits at once.'
      )
      if self._distributed:
        os.kill(os.getpid(), signal.SIGTERM)


def _leave_terminal() -> None:
  """Lets what is printed from now on vanish where the terminal is gone: writing to it would be an error."""
  for descriptor in (1, 2):
    try:
      os.write(descriptor, b'')
    except OSError:
      os.dup2(os.open(os.devnull, os.O_WRONLY), descriptor)


def _say(text: str) -> None:
  """Writes past Python's buffers: print may be interrupted in the middle of itself and is not reentrant."""
  with contextlib.suppress(OSError):
    os.write(2, f'\n{text}\n'.encode())
