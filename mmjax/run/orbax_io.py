"""All that touches Orbax: writing one step of a checkpoint, and reading one without trusting it.

Orbax is given flat dicts of named leaves. Nothing then depends on how it stores tree structure, which turns integer
keys into strings, and a step stays readable when a library adds an empty node to the optimizer's state.

A manager is made for each call, so that it knows what lies on disk now and nothing else: after a failed save a
longer-lived one still offers the failed step.
"""

import contextlib
import errno
import gc
import json
import logging
import sys
import threading
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import preservation_policy

from mmjax.errors import StorageError, first_line
from mmjax.run.manifest import CorruptError, check_fits, named_leaves, read_manifest, verify
from mmjax.run.processes import LOST_WORDS, in_any_process

MANIFEST = Path('metadata', 'metadata')  # item and file name under a step, as Orbax lays them out
TMP_PATTERN = '*.orbax-checkpoint-tmp*'
WAIT_SECONDS = 5
# What a machine can lack for the moment, as opposed to what is wrong with a file for good.
PASSING_ERRNOS = (errno.EACCES, errno.EPERM, errno.EMFILE, errno.ENFILE, errno.ENOMEM)
PASSING_WORDS = ('RESOURCE_EXHAUSTED', 'PERMISSION_DENIED', 'Permission denied', 'Too many open files', *LOST_WORDS)


def write_step(directory: Path, step: int, items: Mapping[str, Any], manifest: Mapping[str, Any]) -> None:
  """Writes a step completely or not at all.

  Raises:
    Exception: of whatever type the writer stumbled over; a full disk comes as several.
  """
  args = {name: ocp.args.StandardSave(dict(named_leaves(tree))) for name, tree in items.items()}
  args[MANIFEST.parts[0]] = ocp.args.JsonSave(dict(manifest))
  threads = set(threading.enumerate())
  with _quiet():
    try:
      with _open_manager(directory) as manager:
        manager.save(step, args=ocp.args.Composite(**args), force=True)
    except Exception:
      _join_threads_but(threads)  # a save that failed in one item still writes the others in the background
      raise


def read_step(
  directory: Path, step: int, abstract_items: Mapping[str, Any], newer: Sequence[str] = ()
) -> tuple[dict[str, Any], dict[str, Any]]:
  """Reads pytrees of a step and compares every leaf with its checksum.

  Args:
    directory: where the steps are.
    step: which of them.
    abstract_items: pytrees of `jax.ShapeDtypeStruct` with shardings, by item name.
    newer: entries of these trees that are left out where the step was saved without them.

  Returns:
    the items, and the step's manifest.

  Raises:
    CorruptError: if anything is not what was saved.
    UserError: if the step holds other leaves than `abstract_items`.
    StorageError: if it could not be read for a reason that may pass (memory, permissions, open files).
  """
  manifest = read_manifest(directory / str(step) / MANIFEST, step)
  if newer:
    abstract_items = {name: _without(tree, newer, manifest['leaves'][name]) for name, tree in abstract_items.items()}
  check_fits(manifest, abstract_items)
  items, problem = {}, None
  with _quiet():
    for name, tree in abstract_items.items():
      try:
        with _open_manager(directory) as manager:
          target = ocp.args.StandardRestore(dict(named_leaves(tree)))
          restored = manager.restore(step, args=ocp.args.Composite(**{name: target}))[name]
        items[name] = jax.tree.unflatten(jax.tree.structure(tree), [restored[leaf] for leaf, _ in named_leaves(tree)])
      except Exception as error:  # noqa: BLE001 - damage surfaces as whatever the reader stumbles over
        text = first_line(error)
        if _may_pass(error):
          problem = StorageError(f'checkpoint {step} in {directory} cannot be read: {text}')
        else:
          where = _locate(directory / str(step) / name, manifest['leaves'][name], error)
          problem = CorruptError(f'{where} cannot be read: {text}')
      if in_any_process(problem is not None):  # all leave together: reading the next item is a collective operation
        problem = problem or CorruptError('another process cannot read it')
        break
    if problem is not None:
      raise problem  # outside `except`, so that nothing keeps the failed tasks alive
  verify(manifest, items)
  return items, manifest


def _without(tree: Mapping[str, Any], names: Sequence[str], saved: Mapping[str, Any]) -> dict[str, Any]:
  """Returns `tree` without those of the entries `names` that no leaf in `saved` belongs to."""
  present = {leaf.partition('.')[0] for leaf in saved}
  return {name: entry for name, entry in tree.items() if name in present or name not in names}


def _open_manager(directory: Path) -> ocp.CheckpointManager:
  options = ocp.CheckpointManagerOptions(
    enable_async_checkpointing=False,
    save_root_metadata=False,
    preservation_policy=preservation_policy.PreserveAll(),  # Orbax removes a step file by file
  )
  return ocp.CheckpointManager(directory, options=options)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
  """Keeps a failing reader from printing screens of tracebacks; whoever catches its error says what went wrong."""
  loggers = [logging.getLogger('absl'), logging.getLogger('asyncio')]
  before = [logger.disabled for logger in loggers]
  hook = sys.unraisablehook
  try:
    sys.unraisablehook = lambda _: None
    for logger in loggers:
      logger.disabled = True
    yield
  except Exception:
    with warnings.catch_warnings(action='ignore'):
      gc.collect()  # tasks that failed beside the first report their errors when they are collected: now, unheard
    raise
  finally:
    sys.unraisablehook = hook
    for logger, disabled in zip(loggers, before, strict=True):
      logger.disabled = disabled


def _join_threads_but(threads: set[threading.Thread]) -> None:
  deadline = time.monotonic() + WAIT_SECONDS
  for thread in set(threading.enumerate()) - threads:
    thread.join(max(0, deadline - time.monotonic()))


def _may_pass(error: Exception) -> bool:
  """Whether another try might succeed, so that the step must not be set aside."""
  if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno in PASSING_ERRNOS):
    return True
  return any(word in str(error) for word in PASSING_WORDS)


def _locate(item_dir: Path, names: Mapping[str, Any], error: Exception) -> str:
  """Names the leaf that an error is about, or else the damaged file."""
  text = str(error)
  found = [name for name in names if f"'{name}/'" in text or f'"{name}/' in text]
  if found:
    return f'{item_dir.name}.{max(found, key=len)}'
  for path in (item_dir / '_METADATA', item_dir / '_sharding', *item_dir.glob('array_metadatas/*')):
    try:
      json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
      return f'file {path.relative_to(item_dir.parent)}'
  return f'item {item_dir.name}'
