"""The runs of a sweep, made one after the other: a process for each, and what became of it in sweep.json."""

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from mmjax.config import overrides_of
from mmjax.console import Progress, Table, format_seconds, number, show
from mmjax.errors import CommandError, DivergedError, StoppedError, UserError
from mmjax.files import utc_now, write_json
from mmjax.report.found import FoundRun, read_ended
from mmjax.run.directory import InUseError
from mmjax.run.identity import names_other_text, settings_changed
from mmjax.run.signals import StopSignals
from mmjax.tools.sweep_file import Planned

CHILD = (sys.executable, '-m', 'mmjax.tools.sweep_child')
LOOK_SECONDS = 0.5  # between looks at the process and its metrics
STATES = {0: 'done', DivergedError.exit_code: 'diverged', StoppedError.exit_code: 'stopped'}  # others: failed


class Sweep:
  """The runs of a sweep in their folder, and how each ended: `ended`, by name, as sweep.json holds it."""

  def __init__(self, folder: Path, runs: Sequence[Planned]):
    self.folder, self.runs = folder, runs
    self.path = folder / 'sweep.json'
    self.ended = read_ended(folder)
    self.progress = Progress()

  def refuse(self) -> None:
    """Raises UserError; called where another process holds the folder."""
    raise UserError(f'another sweep works in {self.folder}; wait for it or choose another --out')

  def find(self, run: Planned) -> FoundRun:
    """Returns what there is of a run.

    Raises:
      UserError: if its directory holds a run with other settings.
    """
    found = FoundRun(self.folder / run.name, run.config)
    if found.dir.was_trained and found.dir.config_path.exists():
      fixed, schedule = settings_changed(found.dir.read_config(), run.config)
      if fixed or schedule:
        different = '; '.join(fixed + schedule)
        raise UserError(
          f'{found.path} was made with other settings: {different}; remove it to make it anew, or choose another --out'
        )
    return found

  def make(self, stop: StopSignals, deadline: float, retry: bool) -> str:
    """Makes every run that is not done; returns where it was stopped, '' if it was not.

    Args:
      stop: tells when a signal asks to stop.
      deadline: on time.monotonic(); to stop there.
      retry: whether a run that diverged is started again.
    """
    all_found = [self.find(run) for run in self.runs]  # so that a changed setting is refused before any starts
    for at, (run, found) in enumerate(zip(self.runs, all_found, strict=True), 1):
      label = f'[{at}/{len(self.runs)}] {run.name}'
      outcome = self.ended[run.name]['state'] if run.name in self.ended else ''
      # Where the settings may mean another text, the run itself looks whether it is another.
      if found.finished and not names_other_text(found.dir.read_config(), run.config):
        if outcome != 'done':
          self.note(run, 0, 0.0)
        self.progress.say(f'{label}  was done before')
        continue
      if outcome == 'diverged' and not retry:
        self.progress.say(f'{label}  diverged before; --retry starts it again')
        continue
      self.wait_until_free(run, label, stop, deadline)
      if stop.requested(0) or time.monotonic() > deadline:
        return f'before {run.name}'
      if self.make_one(run, label, stop, deadline) == 'stopped':
        return f'in {run.name}, step {self.find(run).step:,}'
    return ''

  def wait_until_free(self, run: Planned, label: str, stop: StopSignals, deadline: float) -> None:
    """Waits while a process has the run's directory, as one that outlived its sweep has until it has saved."""
    said = False
    while not stop.requested(0) and time.monotonic() < deadline:
      try:
        self.find(run).dir.check_usable()
        break
      except InUseError as error:
        if not said:
          self.progress.say(f'{label}  waits: {error}')
        said = True
        time.sleep(LOOK_SECONDS)
      except CommandError:
        break  # the run itself will say it

  def make_one(self, run: Planned, label: str, stop: StopSignals, deadline: float) -> str:
    """Makes one run and prints its line; returns how it ended."""
    start, begun, asked = time.monotonic(), time.time(), False
    with self.child(run) as child, contextlib.closing(self.progress):
      if not self.progress.has_bar:
        self.progress.say(f'{label}  runs; its output: {self.log_path(run)}')
      while child.poll() is None:
        if not asked and (stop.requested(0) or time.monotonic() > deadline):
          child.terminate()  # once: a second signal would end it without saving
          asked = True
        if self.progress.has_bar:
          self.show(run, f'{label}  stopping' if asked else label, begun)
        with contextlib.suppress(subprocess.TimeoutExpired):
          child.wait(LOOK_SECONDS)
    # A run that has not begun to train has nothing to save: there the signal ends it.
    code = StoppedError.exit_code if asked and child.returncode < 0 else child.returncode
    ended = self.note(run, code, time.monotonic() - start)
    self.progress.say(f'{label}  {one_line(ended)}')
    return ended['state']

  def show(self, run: Planned, label: str, begun: float) -> None:
    """Shows how far a run is that began to run at a time, in seconds since 1970."""
    found = FoundRun(self.folder / run.name, run.config)
    train = found.last_reports().get('train')
    if train is None or found.dir.metrics_path.stat().st_mtime < begun:
      self.progress.update(label, note='starting')
      return
    loss = 'loss not finite' if train['loss'] is None else f'loss {train["loss"]:.4f}'
    steps = f'{label}  step {train["step"]:,}/{found.total or 0:,}'
    self.progress.update(run.name, train['step'], found.total, loss, shown=steps)

  @contextlib.contextmanager
  def child(self, run: Planned) -> Iterator[subprocess.Popen]:
    """Starts a run's process. Ctrl-C does not reach it: it is told to stop once, and not twice."""
    self.log_path(run).parent.mkdir(exist_ok=True)
    command = [*CHILD, *run.arguments, '--workdir', str(self.folder / run.name)]
    with open(self.log_path(run), 'ab') as log:
      pipes = {'stdin': subprocess.DEVNULL, 'stdout': log, 'stderr': log}
      child = subprocess.Popen(command, **pipes, start_new_session=True)
      try:
        yield child
      finally:
        if child.poll() is None:
          child.terminate()
          child.wait()

  def log_path(self, run: Planned) -> Path:
    """Where a run's output goes."""
    return self.folder / 'logs' / f'{run.name}.log'

  def note(self, run: Planned, code: int, seconds: float) -> dict[str, Any]:
    """Writes into sweep.json how a run ended, and returns that."""
    reports = FoundRun(self.folder / run.name, run.config).last_reports()
    trained, evaluated = reports.get('train', {}), reports.get('eval', {})
    spent = self.ended[run.name]['seconds'] if run.name in self.ended else 0.0
    said = f'killed by signal {-code}' if code < 0 else last_line(self.log_path(run)) if code else ''
    self.ended[run.name] = {
      'state': STATES.get(code, 'failed'),
      'exit_code': code,
      'step': trained.get('step'),
      'tokens': trained.get('tokens'),
      'train_loss': trained.get('loss'),
      'loss': evaluated.get('loss'),
      'bits_per_byte': evaluated.get('bits_per_byte'),
      'seconds': spent + seconds,  # of all starts, compiling and evaluating included
      'said': said,
      'time': utc_now(),
    }
    # As the sweep file orders them, whatever --only picked: compare measures against the first.
    ordered = [*run.order, *(name for name in self.ended if name not in run.order)]
    write_json(self.path, {'runs': {name: self.ended[name] for name in ordered if name in self.ended}})
    return self.ended[run.name]

  def print_plan(self) -> None:
    """Prints every run, how far it is, and what it changes in its config file; what all change stands below."""
    changed = [
      {name: str(value) for name, value in overrides_of(run.config, run.arguments[1]).items() if name != 'experiment'}
      for run in self.runs
    ]
    common = dict(set.intersection(*(set(settings.items()) for settings in changed)))
    rows = []
    for run, settings in zip(self.runs, changed, strict=True):
      found = self.find(run)
      outcome = self.ended[run.name]['state'] if run.name in self.ended and not found.finished else ''
      step = f'{found.step:,} of {found.total:,}' if found.step and found.total else ''
      done = 'done' if found.finished else ' '.join((outcome, step)).strip() or 'new'
      own = ' '.join(f'{name}={value}' for name, value in settings.items() if name not in common)
      rows.append((run.name, done, os.path.relpath(run.arguments[1]), own))
    show(Table(('run', 'so far', 'config', 'settings'), rows))
    everywhere = ' '.join(f'{name}={common[name]}' for name in sorted(common))
    print(f'{len(self.runs)} runs, in {self.folder}; all with {everywhere or "their own settings"}')

  def print_summary(self) -> None:
    """Prints how every run stands."""
    rows = []
    for ended in (self.ended.get(run.name) for run in self.runs):
      if ended is None:
        rows.append(['not begun'] + [''] * 5)
        continue
      numbers = [number(ended[name]) for name in ('step', 'tokens', 'loss', 'bits_per_byte')]
      rows.append([ended['state'], *numbers, format_seconds(ended['seconds'])])
    header = ('run', 'state', 'updates', 'tokens', 'validation loss', 'bits per byte', 'time')
    show(Table(header, [(run.name, *row) for run, row in zip(self.runs, rows, strict=True)]))

  def raise_first_failure(self) -> None:
    """Raises what stands for the first run that is not done."""
    bad = [(run, self.ended[run.name]) for run in self.runs if self.ended[run.name]['state'] != 'done']
    if bad:
      run, ended = bad[0]
      where = f'{ended["said"] or "nothing was said"} (log: {self.log_path(run)})'
      error = CommandError(f'{len(bad)} of {len(self.runs)} runs are not done; {run.name} {ended["state"]}: {where}')
      error.exit_code = max(ended['exit_code'], 1)  # killed by a signal: 1
      raise error


def one_line(ended: dict[str, Any]) -> str:
  """Says how a run ended."""
  parts = [ended['state']]
  if ended['step'] is not None:
    parts.append(f'{ended["step"]:,} updates')
  if ended['state'] == 'done' and ended['loss'] is not None:
    parts.append(f'validation loss {ended["loss"]:.4f}, {ended["bits_per_byte"]:.4f} bits per byte')
  elif ended['train_loss'] is not None:
    parts.append(f'training loss {ended["train_loss"]:.4f}')
  parts.append(format_seconds(ended['seconds']))
  if ended['state'] not in ('done', 'stopped'):
    parts.append(f'exit code {ended["exit_code"]}: {ended["said"]}')
  return '  '.join(parts)


def last_line(path: Path) -> str:
  """Returns the last line of a log that says something."""
  lines = path.read_text(encoding='utf-8', errors='replace').split('\n') if path.exists() else []
  return next((line.strip() for line in reversed(lines) if line.strip()), '')
