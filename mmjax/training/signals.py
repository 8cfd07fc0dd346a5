"""Stopping politely: the first SIGTERM or Ctrl-C lets the step finish and the state be saved, the second exits at once.

Under jax.distributed all processes must stop at the same step, and JAX's own SIGTERM handler agrees on one; a Python
handler installed after it would disable it. So exactly one of the two is in place, and Ctrl-C is passed on to it.
"""

import os
import signal
import threading
from types import FrameType, TracebackType
from typing import Self

import jax
from jax.experimental import multihost_utils

EXIT_AT_ONCE = 130


class StopSignals:
  """`with StopSignals() as stop:` and, after each step, `if stop.requested(step): save and leave`."""

  def __init__(self) -> None:
    self._count = 0
    self._distributed = jax.distributed.is_initialized()
    self._previous: dict[int, object] = {}

  def __enter__(self) -> Self:
    if threading.current_thread() is threading.main_thread():  # Python lets no other thread install handlers
      numbers = (signal.SIGINT,) if self._distributed else (signal.SIGINT, signal.SIGTERM)
      self._previous = {number: signal.signal(number, self._handle) for number in numbers}
    return self

  def __exit__(
    self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
  ) -> None:
    for number, handler in self._previous.items():
      signal.signal(number, handler)
    self._previous = {}

  def requested(self, step: int) -> bool:
    """Whether to stop after this step. Several processes must all ask after every step; they get the same answer."""
    if self._distributed:
      return multihost_utils.reached_preemption_sync_point(step)
    return self._count > 0

  def _handle(self, number: int, frame: FrameType | None) -> None:
    self._count += 1
    if self._count > 1:
      os.write(2, b'\nSecond signal: exiting at once, without saving.\n')
      os._exit(EXIT_AT_ONCE)
    # os.write, since print may be interrupted in the middle of itself and is not reentrant.
    name = signal.Signals(number).name.encode()
    os.write(2, b'\n' + name + b': finishing this step, then saving. A second signal exits at once.\n')
    if self._distributed:
      os.kill(os.getpid(), signal.SIGTERM)
