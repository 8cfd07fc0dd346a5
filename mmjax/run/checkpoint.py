"""Checkpoints that are whole or not used: the last two and the best, each verified leaf by leaf when it is read.

Orbax writes a step into a temporary directory and renames it when it is complete, so a directory named by a number
was whole once, and nothing is handed out before every leaf was compared with its checksum (mmjax/run/orbax_io.py).
Parameters, counts of what the memory read, and the rest (optimizer state, counters) are items of one step: written
together, and readable apart.

Saving is synchronous: the next train step donates the buffers, and an asynchronous write would report a full disk
only one save later. Nothing is decided by intervals here; the caller says when to save.
"""

import contextlib
import math
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from mmjax.choices import CHECKPOINT
from mmjax.errors import CommandError, StorageError, UserError, first_line
from mmjax.files import free_bytes, megabytes, storage_errors, write_file
from mmjax.run.directory import NEWEST, RunDir
from mmjax.run.orbax_io import MANIFEST, TMP_PATTERN, CorruptError, read_manifest, read_step, write_step
from mmjax.run.processes import barrier, in_any_process, is_main

KEEP_LAST = 2
START_STEP = 0  # the step that a run from another's weights saves before its first update
TOKENIZER_SHA256 = 'tokenizer_sha256'  # in the metadata of an import, where its file said which its tokenizer was
NO_TRAINING = {'tokens': 0, 'seconds': 0.0}  # the counters of the training loop, which it saves as a step's metadata
APART = ('params', 'reads')  # entries of a state that are items of their own
REMOVED_SUFFIX = '.orbax-checkpoint-tmp-removed'  # a step on its way out; matches TMP_PATTERN


def checkpoint_name(checkpoint: str | int) -> str | int:
  """Returns 'best', 'last' or the number of a step, from what a user typed; raises UserError if it is none of these."""
  text = str(checkpoint)
  if text in ('best', 'last'):
    return text
  if text.isascii() and text.isdigit():
    return int(text)
  raise UserError(f"checkpoint={checkpoint!r} must be 'best', 'last' or the number of a step")


class Checkpoints:
  """The steps saved under `workdir`/checkpoints: the last two and the one with the lowest metric."""

  def __init__(self, workdir: Path | str, *, read_only: bool = False, keep_start: bool = False):
    """Opens the directory and removes what killed saves left there.

    Args:
      workdir: run directory; only the process that holds its lock may open it for writing.
      read_only: nothing is removed, renamed or saved: for commands that look at a run while it trains.
      keep_start: step START_STEP stays, whatever is saved after it.
    """
    self._run = RunDir(Path(workdir).absolute())
    self.directory = self._run.checkpoints_path
    self._read_only, self._keep_start = read_only, keep_start
    self._rejected: set[int] = set()
    if not read_only:
      with storage_errors(self.directory):
        self.directory.mkdir(parents=True, exist_ok=True)
      self._remove_leftovers()
      self._remove_superseded()

  def steps(self) -> list[int]:
    """Returns the steps whose saving was completed and that were not found corrupt, oldest first."""
    return [step for step in self._run.steps() if step not in self._rejected]

  @property
  def best_step(self) -> int | None:
    """The step with the lowest metric, the earliest of equals; None where no step has a metric."""
    return self.best[1] if self.best else None

  @property
  def best(self) -> tuple[float, int] | None:
    """The lowest metric and its step, the earliest of equals; None where no step has a metric."""
    metrics, _ = self._read_metrics()
    return min(((metric, step) for step, metric in metrics.items()), default=None)

  def save(self, step: int, state: Mapping[str, Any], metadata: Mapping[str, Any], metric: float | None = None) -> None:
    """Writes a step, then removes those that are neither the last two nor the best; a step that exists stays as it is.

    Args:
      step: number of the step; the directory's name.
      state: dict of pytrees of arrays with a 'params' entry.
      metadata: whatever JSON can hold, without NaN; `restore` returns it.
      metric: evaluation loss at this very step, lower is better; without a finite one a step is never the best.

    Raises:
      StorageError: if there is too little space or writing fails; the steps saved before stay as they were.
    """
    assert not self._read_only, 'these checkpoints were opened for reading'
    if step in self.steps():
      return
    items = _split(jax.block_until_ready(dict(state)))
    self._remove_leftovers()
    self._check_space(step, items)
    metric = metric if metric is not None and math.isfinite(metric) else None
    try:
      write_step(self.directory, step, items, metric=metric, metadata=dict(metadata))
    except Exception as error:  # noqa: BLE001 - a full disk comes as OSError, ValueError or a runtime error
      self._remove_leftovers()
      raise StorageError(f'step {step} could not be saved in {self.directory}: {first_line(error)}') from error
    self._remove_superseded()
    if is_main():
      with contextlib.suppress(CommandError):  # the step is whole; what may be missed is that it vanished
        write_file(self._run.path / NEWEST, f'{step}\n')

  def restore(
    self, abstract_state: Mapping[str, Any], which: str | int = 'last', newer: Sequence[str] = ()
  ) -> tuple[dict[str, Any], dict[str, Any], int]:
    """Reads and verifies a whole state; returns it, its metadata and its step.

    A step that is not what was saved is named on stderr, set aside as `<step>.corrupt`, and the one before is used.

    Args:
      abstract_state: the state's structure with `jax.ShapeDtypeStruct` leaves. Their shardings say where the leaves
        go, whatever mesh they were saved from; a leaf without one goes to the first device.
      which: 'last'; 'best' (where it is corrupt the next best, without metrics the last); or the number of a step,
        which nothing replaces.
      newer: entries of the state that steps of earlier versions lack; they are missing from what is returned then.

    Raises:
      UserError: if nothing was saved yet, or leaves differ from `abstract_state` in name, shape or dtype.
      StorageError: if no whole step is left, or this process may not read it.
    """
    items, metadata, step = self._restore(_split(abstract_state), which, newer)
    return items.pop('rest') | items, metadata, step

  def restore_params(self, abstract_params: Any, which: str | int = CHECKPOINT) -> tuple[Any, dict[str, Any], int]:
    """Reads and verifies `state['params']` as `restore` does, without reading the optimizer's state."""
    items, metadata, step = self._restore({'params': abstract_params}, which)
    return items['params'], metadata, step

  def restore_reads(self, step: int, sharding: jax.sharding.Sharding | None = None) -> dict[str, Any]:
    """Reads and verifies `state['reads']` alone; {} where the step was saved without."""
    leaves = read_manifest(self.directory / str(step) / MANIFEST, step)['leaves'].get('reads', {})
    abstract = {name: jax.ShapeDtypeStruct(leaf[1], leaf[0], sharding=sharding) for name, leaf in leaves.items()}
    return self._restore({'reads': abstract}, step)[0]['reads'] if leaves else {}

  def _restore(
    self, abstract_items: Mapping[str, Any], which: str | int, newer: Sequence[str] = ()
  ) -> tuple[dict[str, Any], dict[str, Any], int]:
    abstract_items = {name: jax.tree.map(_with_sharding, tree) for name, tree in abstract_items.items()}
    found_corrupt = False
    while True:
      step = self.choose(which)
      problem = None
      try:
        items, manifest = read_step(self.directory, step, abstract_items, newer)
      except CorruptError as error:
        problem = str(error)
      if not in_any_process(problem is not None):
        if found_corrupt:
          _warn(f'checkpoint {step} is used instead')
        return items, manifest['metadata'], step
      found_corrupt = True
      self._set_aside(step, problem or 'another process found it corrupt')

  def choose(self, which: str | int) -> int:
    """Returns the step that `restore` would try first; raises what it raises."""
    if which == 'best':  # a step whose metric cannot be read may be the best, which nobody can tell any more
      for step, problem in self._read_metrics()[1].items():
        self._set_aside(step, problem)
    newest = self._run.newest_step  # before the steps: the run that trains here may save one meanwhile
    steps = self.steps()
    if isinstance(which, int):
      if which in steps:
        return which
      if self._was_corrupt(which):
        raise StorageError(f'no whole checkpoint {which} in {self.directory}; there are {steps}')
      raise UserError(f'no checkpoint {which} in {self.directory}; there are {steps}')
    if not steps:
      if not (self._run.ever_saved or self._rejected):
        raise UserError(f'no checkpoint was saved in {self.directory} yet; wait for train.checkpoint_interval updates')
      raise StorageError(
        f'no whole checkpoint is left in {self.directory}; to begin again, choose another --workdir or remove this one'
      )
    best = self.best_step if which == 'best' else None
    step = steps[-1] if best is None else best
    if newest is not None and newest > steps[-1] and not self._was_corrupt(newest):
      using = f'using {step}' if best is None else f'the best of those left is {step}'
      _warn(f'checkpoint {newest} is gone from {self.directory}; {using}')
    return step

  def _was_corrupt(self, step: int) -> bool:
    return step in self._rejected or any(self.directory.glob(f'{step}.corrupt*'))

  def _set_aside(self, step: int, problem: str) -> None:
    self._rejected.add(step)
    if not (self.directory / str(step)).exists():  # the run that trains here removed it while it was read
      return
    if self._read_only:
      _warn(f'checkpoint {step} in {self.directory} is corrupt ({problem}) and is not used')
      return
    taken = len(list(self.directory.glob(f'{step}.corrupt*')))
    target = self.directory / f'{step}.corrupt{taken + 1 if taken else ""}'
    _warn(f'checkpoint {step} in {self.directory} is corrupt ({problem}); set aside as {target.name}')
    if is_main():
      with storage_errors(target):
        (self.directory / str(step)).rename(target)
    barrier(f'checkpoint_{step}_set_aside')
    self._rejected.discard(step)

  def _read_metrics(self) -> tuple[dict[int, float], dict[int, str]]:
    """Returns the metric of every step that has one, and what is wrong with each step whose manifest is corrupt."""
    metrics, problems = {}, {}
    for step in self.steps():
      try:
        metric = read_manifest(self.directory / str(step) / MANIFEST, step)['metric']
        metrics |= {} if metric is None else {step: metric}
      except CorruptError as error:
        problems[step] = str(error)
    return metrics, problems

  def _check_space(self, step: int, items: Mapping[str, Any]) -> None:
    needed = int(1.05 * sum(leaf.nbytes for leaf in jax.tree.leaves(items))) + 2**20
    free = free_bytes(self.directory)
    if in_any_process(free < needed):
      raise StorageError(
        f'step {step} was not saved: it needs {megabytes(needed, up=True)} and {self.directory} has {megabytes(free)} '
        'free'
      )

  def _remove_leftovers(self) -> None:
    """Removes what killed and failed saves left half-written."""
    if is_main():
      for path in self.directory.glob(TMP_PATTERN):
        shutil.rmtree(path, ignore_errors=True)
    barrier('checkpoint_leftovers_removed')

  def _remove_superseded(self) -> None:
    """Removes all steps but those to keep and those that cannot be read, each whole: by a rename first."""
    if is_main():
      steps, unreadable = self.steps(), self._read_metrics()[1]
      start = [START_STEP] if self._keep_start else []
      for step in set(steps) - {*steps[-KEEP_LAST:], *unreadable, *start, self.best_step}:
        doomed = self.directory / f'{step}{REMOVED_SUFFIX}'
        with contextlib.suppress(OSError):  # it stays, and the next save tries again
          (self.directory / str(step)).rename(doomed)
        shutil.rmtree(doomed, ignore_errors=True)


def _split(state: Mapping[str, Any]) -> dict[str, Any]:
  items = {name: state[name] for name in APART if name in state}
  return items | {'rest': {name: tree for name, tree in state.items() if name not in APART}}


def _with_sharding(leaf: Any) -> jax.ShapeDtypeStruct:
  sharding = getattr(leaf, 'sharding', None) or jax.sharding.SingleDeviceSharding(jax.devices()[0])
  try:
    sharding.shard_shape(leaf.shape)
  except ValueError as error:  # the caller's mistake: told apart here from a step that cannot be read
    raise UserError(f'a leaf of shape {leaf.shape} cannot be sharded over this mesh: {first_line(error)}') from error
  return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _warn(text: str) -> None:
  print(f'Warning: {text}', file=sys.stderr, flush=True)
