"""The log of a run: JSON lines, which are the truth about it, mirrored to TensorBoard files.

A log that cannot be written (a full disk) is told once and never ends a run.
"""

import contextlib
import json
import math
import os
import resource
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax

from mmjax.errors import UserError
from mmjax.files import finite, write_file

if TYPE_CHECKING:
  from tensorboardX.event_file_writer import EventsWriter


class MetricsLog:
  """Appends records to `workdir`/metrics.jsonl and their numbers to `workdir`/tensorboard."""

  def __init__(self, workdir: Path | str):
    """Opens the log; call `truncate_after` before the first `write`."""
    self.path = Path(workdir) / 'metrics.jsonl'
    self._events: EventsWriter | None = None
    self._purge_step = 0
    self._failed: set[str] = set()
    if not jax.process_index():  # at the first report it would count as time of a step that is profiled
      import tensorboardX.event_file_writer  # noqa: F401

  def write(self, record: Mapping[str, Any]) -> None:
    """Appends one record, with NaN and infinities as null.

    Args:
      record: {'kind': 'train' | 'eval' | 'skipped', 'step': int, ...}, as JSON can hold it.
    """
    if jax.process_index():  # the log is that of the first process
      return
    line = json.dumps(finite(record), allow_nan=False) + '\n'
    self._attempt('metrics.jsonl', lambda: _append(self.path, line.encode()))
    self._attempt('TensorBoard files', lambda: self._write_events(record))

  def truncate_after(self, step: int) -> None:
    """Removes the records of later steps, and a line that a killed process left half-written.

    TensorBoard files cannot be cut; they are told to hide what lies beyond.

    Args:
      step: the step that the run continues from; -1 for a run that starts.
    """
    self.close()
    self._purge_step = step + 1
    if jax.process_index() or not self.path.exists():
      return
    data = self.path.read_bytes()
    lines = (line for line, record in _parse(data) if record is not None and record.get('step', -1) <= step)
    kept = b''.join(line if line.endswith(b'\n') else line + b'\n' for line in lines)
    if data.startswith(kept):  # the usual case needs no space, so it works on a full disk
      os.truncate(self.path, len(kept))
    else:
      write_file(self.path, kept)

  def close(self) -> None:
    """Closes the TensorBoard file; the JSON lines are on disk already."""
    if self._events is not None:
      with contextlib.suppress(OSError):
        self._events.close()
      self._events = None

  def _attempt(self, what: str, action: Callable[[], None]) -> None:
    try:
      action()
      self._failed.discard(what)
    except OSError as error:
      if what not in self._failed:
        self._failed.add(what)
        print(f'Warning: {what} cannot be written ({error.strerror}); the run goes on', file=sys.stderr, flush=True)

  def _write_events(self, record: Mapping[str, Any]) -> None:
    # Imported here: most who import this module only read logs. And no SummaryWriter of tensorboardX, which writes from
    # a thread that dies on a full disk, and then blocks the run for good.
    from tensorboardX.event_file_writer import EventsWriter
    from tensorboardX.proto.event_pb2 import Event, SessionLog
    from tensorboardX.summary import scalar

    if self._events is None:
      folder = self.path.parent / 'tensorboard'
      folder.mkdir(exist_ok=True)
      self._events = EventsWriter(str(folder / 'events'), f'.{os.getpid()}.{self._purge_step}')
      self._events.write_event(Event(step=self._purge_step, session_log=SessionLog(status=SessionLog.START)))
    for name, value in _scalars(record):
      self._events.write_event(Event(step=record['step'], summary=scalar(name, value)))
    self._events.flush()


def read_metrics(path: Path | str) -> list[dict[str, Any]]:
  """Reads metrics.jsonl, if it is there; a half-written last line, as a killed process leaves it, is left out.

  Raises:
    UserError: if another line is damaged.
  """
  path = Path(path)
  records, damaged = [], ''
  for number, (line, record) in enumerate(_parse(path.read_bytes()) if path.exists() else (), 1):
    if damaged:  # and not the last line
      raise UserError(damaged)
    if record is None:
      damaged = f'{path}:{number} must be a JSON object, not {line!r:.40}; resuming the run removes this line'
    else:
      records.append(record)
  return records


def peak_memory() -> tuple[int, str]:
  """Returns the peak memory in bytes and what it is of: 'device' (the fullest one) or, on a CPU, 'process'."""
  stats = [device.memory_stats() or {} for device in jax.local_devices()]
  if peaks := [stat['peak_bytes_in_use'] for stat in stats if 'peak_bytes_in_use' in stat]:
    return max(peaks), 'device'
  unit = 1 if sys.platform == 'darwin' else 1024  # getrusage counts bytes there, KiB elsewhere
  return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit, 'process'


def _append(path: Path, data: bytes) -> None:
  """Appends all of `data` or nothing, so that a full disk leaves no half line before the next one."""
  with path.open('ab', buffering=0) as file:
    size = file.tell()
    try:
      while data:
        data = data[file.write(data) :]
    except OSError:
      file.truncate(size)
      raise


def _parse(data: bytes) -> Iterator[tuple[bytes, dict[str, Any] | None]]:
  """Yields every line with its record, None where it is not a whole line of one JSON object."""
  for line in data.splitlines(keepends=True):
    try:
      record = json.loads(line)  # one that ends the data may lack its \n, as some editors leave it
    except (ValueError, RecursionError):
      record = None
    yield line, record if isinstance(record, dict) else None


def _scalars(record: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
  """Yields the finite numbers of a record under TensorBoard names: 'train/loss', 'train/layer_3/used_share'."""
  kind = record['kind']
  groups = {kind: record, f'{kind}/probes': record.get('probes', {})}
  groups |= {f'{kind}/layer_{health["layer"]}': health for health in record.get('bank', ())}
  for group, values in groups.items():
    for name, value in values.items():
      is_number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
      if is_number and name not in ('step', 'layer'):  # tensorboardX warns of each that is not finite
        yield f'{group}/{name}', value
