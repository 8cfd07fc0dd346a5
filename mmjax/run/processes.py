"""A run in several processes: how they join, what only the first one does, and how all end when one is lost.

Each process is started with the same command but for its number, `runtime.process_id`. Each reads all the text, holds
its devices' part of every array, and writes its part of every checkpoint into the one work directory, which all must
see. Metrics, settings and messages are the first one's.

Who loses a peer learns of it in the next collective operation (at once, on a CPU) or, where that only hangs, from
JAX's heartbeat, which aborts the process.
"""

import contextlib
import json
import os
import sys
import zlib
from collections.abc import Iterator

import jax
import numpy as np
from jax.experimental import multihost_utils

from mmjax.config import Config
from mmjax.errors import CommandError, DivergedError, PeerLostError, StoppedError, UserError, first_line

HEARTBEAT_SECONDS = 10  # without a sign of life, after which a process counts as lost
JOIN_SECONDS = 120  # that a process waits for the others at the start
END_SECONDS = 60  # that it waits for them at the end: the first writes the report by then
# In errors of collective operations and of JAX's coordination service.
LOST_WORDS = ('Gloo', 'NCCL', 'coordination service', 'closed by peer', 'reset by peer', 'heartbeat', 'Barrier')


def is_main() -> bool:
  """Whether this is the process that writes metrics, settings and messages."""
  return jax.process_index() == 0


def in_any_process(flag: bool) -> bool:
  """Whether `flag` is set in any process; all must ask."""
  if jax.process_count() == 1:
    return flag
  return bool(np.any(multihost_utils.process_allgather(np.array(flag))))


def barrier(name: str) -> None:
  """Waits until all processes have come here."""
  if jax.process_count() > 1:
    multihost_utils.sync_global_devices(name)


@contextlib.contextmanager
def joined(config: Config) -> Iterator[None]:
  """Makes this process one of a run's, for as long as the program lives; does nothing where the run has only one.

  An error in one process alone must not leave the others waiting for it: it is printed and ends the process at once,
  without the farewell that JAX otherwise waits for.

  Raises:
    UserError: if the others do not appear, or have other settings.
    StoppedError, DivergedError: from within; all processes come to them at the same step.
  """
  if not config.runtime.coordinator:
    yield
    return
  _connect(config)
  try:
    _compare_settings(config)
    yield
  except (StoppedError, DivergedError):
    raise
  except Exception as error:  # noqa: BLE001 - whatever it is, the others must not wait
    _exit(error)


def _connect(config: Config) -> None:
  if jax.distributed.is_initialized():
    return
  runtime, where = config.runtime, {}
  if runtime.coordinator != 'auto':
    where = {name: getattr(runtime, name) for name in ('num_processes', 'process_id')}
    where['coordinator_address'] = runtime.coordinator
  # Said before: where the others do not appear, JAX aborts the process.
  said = f'Joining the processes of the run at {runtime.coordinator} within {JOIN_SECONDS} s'
  print(said, file=sys.stderr, flush=True)
  try:
    jax.distributed.initialize(
      **where,
      initialization_timeout=JOIN_SECONDS,
      heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
      shutdown_timeout_seconds=END_SECONDS,
    )
  except (RuntimeError, ValueError) as error:
    said = f'the processes of the run did not find each other by runtime.coordinator={runtime.coordinator!r}'
    typed = '; give --config.runtime.coordinator=HOST:PORT, runtime.num_processes and runtime.process_id'
    raise UserError(f'{said}: {first_line(error)}{typed if runtime.coordinator == "auto" else ""}') from error


def _compare_settings(config: Config) -> None:
  settings = config.to_dict()
  settings['runtime'].pop('process_id')
  own = zlib.crc32(json.dumps(settings, sort_keys=True).encode())
  different = np.flatnonzero((found := multihost_utils.process_allgather(np.array(own, np.uint32))) != found.flat[0])
  if different.size:
    said = f'process {different[0]} was started with other settings than process 0'
    raise UserError(f'{said}; give all the same, but for runtime.process_id')


def _exit(error: Exception) -> None:
  """Says what happened and ends this process alone."""
  causes = [error]
  while causes[-1].__cause__ is not None:
    causes.append(causes[-1].__cause__)
  if any(not isinstance(cause, UserError) and any(word in str(cause) for word in LOST_WORDS) for cause in causes):
    error = PeerLostError(
      f'Another process of this run was lost ({first_line(error)}); the same commands go on from the last checkpoint.'
    )
  try:
    if isinstance(error, CommandError):
      print(f'{error}', file=sys.stderr)
    else:
      sys.excepthook(type(error), error, error.__traceback__)
    sys.stdout.flush()
    sys.stderr.flush()
  finally:  # whoever read the output may be gone
    os._exit(error.exit_code if isinstance(error, CommandError) else 1)
