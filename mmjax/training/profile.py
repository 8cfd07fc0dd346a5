"""Where a step's time goes: a trace that Perfetto opens, and its operations summed by the scopes of the model.

The trace says how long each operation ran, and mmjax/run/scopes.py to which scope it belongs. An operation's time is
that of its own thread or stream, without the operations that ran within it, so that sums over threads may exceed the
clock. A step from a compilation cache has the scopes of the source that it was compiled from.
"""

import time
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import jax

from mmjax.run.scopes import operation_scopes

UNKNOWN = 'not attributed'


class StepProfiler:
  """Traces steps of a run from its second on, at most to an evaluation or a save, and says where their time went."""

  def __init__(self, folder: Path, steps: int, compiled: Any, show: Callable[[str], None]):
    """Plans the trace.

    Args:
      folder: where the trace goes.
      steps: to trace, at most; 0: none.
      compiled: the train step, which knows what its operations belong to.
      show: takes the table.
    """
    self._folder, self._steps, self._compiled, self._show = folder, steps, compiled, show
    self._seen = self._traced = 0
    self._start: float | None = None

  def before_step(self, waits_for: Any) -> None:
    """Starts the trace, once the first step, `waits_for`, is done; call before each step."""
    if self._seen == 1 and self._steps:
      jax.block_until_ready(waits_for)
      options = jax.profiler.ProfileOptions()
      options.python_tracer_level = 0  # Python's calls would fill the trace
      jax.profiler.start_trace(self._folder, profiler_options=options)
      self._start = time.perf_counter()
    self._seen += 1

  def after_step(self, waits_for: Any) -> None:
    """Ends the trace after its last step; call after each step with arrays that it makes."""
    if self._start is not None:
      self._traced += 1
      if self._traced == self._steps:
        self.stop(waits_for)

  def close(self) -> None:
    """Ends the trace, and says so if there is none."""
    self.stop()
    if self._steps and not self._traced:
      self._show('Nothing was profiled: the trace begins with the second step that a start makes.')

  def stop(self, waits_for: Any = ()) -> None:
    """Ends the trace, also one of fewer steps than planned, once `waits_for` is done, and shows the table."""
    if self._start is None:
      return
    jax.block_until_ready(waits_for)
    seconds, self._start = time.perf_counter() - self._start, None
    jax.profiler.stop_trace()
    if self._traced:
      trace = max(self._folder.rglob('*.xplane.pb'), key=lambda path: path.stat().st_mtime)
      scopes, times = operation_scopes(self._compiled.as_text()), Counter()
      for name, spent in operation_times(trace).items():
        times[scopes.get(name, UNKNOWN)] += spent
      opened = next(trace.parent.glob('*.trace.json.gz'), trace)
      self._show(describe(times, seconds, self._traced, opened))


def operation_times(trace: Path) -> Counter[str]:
  """Returns the seconds of each operation of the train step, without those that ran within it, from an .xplane.pb."""
  planes = list(jax.profiler.ProfileData.from_file(str(trace)).planes)
  devices = [plane for plane in planes if plane.name.startswith('/device:')]
  seconds = Counter()
  for plane in devices or planes:  # a CPU's operations are events of the host
    for line in plane.lines:
      events = ((event, dict(event.stats)) for event in line.events)
      own = [
        (stats['hlo_op'], event.start_ns, event.duration_ns)
        for event, stats in events
        if 'hlo_op' in stats and 'train_step' in str(stats.get('hlo_module', ''))
      ]
      seconds.update(self_times(own))
  return seconds


def self_times(events: Iterable[tuple[str, float, float]]) -> Counter[str]:
  """Returns seconds by name of events (name, start_ns, duration_ns) of one thread, without those nested in them."""
  seconds, open_events = Counter(), []
  for name, start, duration in sorted(events, key=lambda event: (event[1], -event[2])):
    while open_events and open_events[-1][1] <= start:
      open_events.pop()
    if open_events:
      seconds[open_events[-1][0]] -= duration / 1e9
    seconds[name] += duration / 1e9
    open_events.append((name, start + duration))
  return seconds


def describe(times: Counter[str], seconds: float, steps: int, trace: Path) -> str:
  """Returns the table: milliseconds a step and share of each scope, the longest first."""
  total = sum(times.values())
  lines = [f'Profile of {steps} steps, {1e3 * seconds / steps:.1f} ms each; for ui.perfetto.dev: {trace}']
  for scope, spent in sorted(times.items(), key=lambda item: (item[0] == UNKNOWN, -item[1])):
    lines.append(f'  {scope:<15} {1e3 * spent / steps:9.2f} ms a step {spent / total:7.1%}')
  lines.append(f'  {"all operations":<15} {1e3 * total / steps:9.2f} ms a step, summed over threads or streams')
  return '\n'.join(lines)
