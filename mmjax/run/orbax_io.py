"""A step of a checkpoint on the disk: all that touches Orbax. It is written whole, and read without being trusted.

Orbax is given flat dicts of named leaves. Nothing then depends on how it stores tree structure, which turns integer
keys into strings, and a step stays readable when a library adds an empty node to the optimizer's state. What Orbax does
not notice is rot: a flipped bit restores as a wrong number. So a sealed manifest lies beside the arrays, with dtype,
shape and checksum of every leaf.

A manager is made for each call, so that it knows what lies on disk now and nothing else: after a failed save a
longer-lived one still offers the failed step.
"""

import contextlib
import errno
import gc
import json
import logging
import re
import sys
import threading
import time
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import preservation_policy

from mmjax.errors import StorageError, UserError, first_line
from mmjax.files import first_three, named_leaves, read_json, seal
from mmjax.run.leaves import describe_leaves, type_of
from mmjax.run.processes import LOST_WORDS, in_any_process

FORMAT = 1
MANIFEST = Path('metadata', 'metadata')  # item and file name under a step, as Orbax lays them out
TMP_PATTERN = '*.orbax-checkpoint-tmp*'
WAIT_SECONDS = 5
# What a machine can lack for the moment, as opposed to what is wrong with a file for good.
PASSING_ERRNOS = (errno.EACCES, errno.EPERM, errno.EMFILE, errno.ENFILE, errno.ENOMEM)
PASSING_WORDS = ('RESOURCE_EXHAUSTED', 'PERMISSION_DENIED', 'Permission denied', 'Too many open files', *LOST_WORDS)


class CorruptError(Exception):
  """A step is not what was saved; the message names the leaf or the file."""


def write_step(directory: Path, step: int, items: Mapping[str, Any], **facts: Any) -> None:
  """Writes pytrees as a step, completely or not at all, with `facts` in its manifest, as JSON can hold them.

  Raises:
    Exception: of whatever type the writer stumbled over; a full disk comes as several.
  """
  leaves = {name: describe_leaves(tree) for name, tree in items.items()}
  manifest = seal({'format': FORMAT, 'step': step, **facts, 'leaves': leaves})
  args = {name: ocp.args.StandardSave(dict(named_leaves(tree, '.'))) for name, tree in items.items()}
  args[MANIFEST.parts[0]] = ocp.args.JsonSave(manifest)
  threads = set(threading.enumerate())
  with _quiet():
    try:
      with _open_manager(directory) as manager:
        manager.save(step, args=ocp.args.Composite(**args), force=True)
    except Exception:  # a save that failed in one item still writes the others in the background
      deadline = time.monotonic() + WAIT_SECONDS
      for thread in set(threading.enumerate()) - threads:
        threading.Thread.join(thread, max(0, deadline - time.monotonic()))  # Orbax's own raises what the thread raised
      raise


def read_step(
  directory: Path, step: int, abstract_items: Mapping[str, Any], newer: Sequence[str] = ()
) -> tuple[dict[str, Any], dict[str, Any]]:
  """Reads pytrees of a step and compares every leaf with its checksum.

  Args:
    directory: where the steps are.
    step: which of them.
    abstract_items: pytrees of `jax.ShapeDtypeStruct` with shardings, by item name.
    newer: items, and entries of these trees, that are left out where the step was saved without them.

  Returns:
    the items, and the step's manifest.

  Raises:
    CorruptError: if anything is not what was saved.
    UserError: if the step holds other leaves than `abstract_items`.
    StorageError: if it could not be read for a reason that may pass (memory, permissions, open files).
  """
  manifest = read_manifest(directory / str(step) / MANIFEST, step)
  if newer:
    saved = manifest['leaves']
    abstract_items = {
      name: _without(tree, newer, saved[name])
      for name, tree in abstract_items.items()
      if name in saved or name not in newer
    }
  names = {item: _saved_names(tree, manifest['leaves'][item]) for item, tree in abstract_items.items()}
  wanted = {item: dict(zip(names[item], jax.tree.leaves(tree), strict=True)) for item, tree in abstract_items.items()}
  _check_fits(manifest, wanted)
  items = _read_items(directory, step, wanted, manifest)
  found = {name: describe_leaves(tree) for name, tree in items.items()}
  wrong = [f'{i}.{name}' for i in items for name, leaf in found[i].items() if manifest['leaves'][i][name] != leaf]
  if wrong:
    raise CorruptError(f'{first_three(wrong)} failed the checksum')
  trees = {
    item: jax.tree.unflatten(jax.tree.structure(tree), [items[item][name] for name in names[item]])
    for item, tree in abstract_items.items()
  }
  return trees, manifest


def _read_items(
  directory: Path, step: int, wanted: Mapping[str, dict[str, Any]], manifest: dict[str, Any]
) -> dict[str, dict[str, Any]]:
  """Returns the leaves of each item by their names, not yet checked; raises as `read_step` does."""
  items, problem = {}, None
  with _quiet():
    for name, leaves in wanted.items():
      try:
        items[name] = _read_item(directory, step, name, leaves)
      except Exception as error:  # noqa: BLE001 - damage surfaces as whatever the reader stumbles over
        problem = _explain(error, directory / str(step) / name, manifest['leaves'][name])
      if in_any_process(problem is not None):  # all leave together: reading the next item is a collective operation
        problem = problem or CorruptError('another process cannot read it')
        break
    if problem is not None:
      raise problem  # outside `except`, so that nothing keeps the failed tasks alive
  return items


def _saved_names(tree: Any, saved: Iterable[str]) -> list[str]:
  """Returns the names that the leaves of `tree` have in a step, given all names there.

  They differ where optax numbers the parts of its chain otherwise: settings of the schedule, such as train.grad_clip,
  put parts that have no leaves among the others.
  """
  own, place = [name for name, _ in named_leaves(tree, '.')], re.compile(r'(?<=^opt_state)(\.\d+)+')
  new, old = ([name for name in names if place.search(name)] for names in (own, saved))
  same = [place.sub('', name) for name in new] == [place.sub('', name) for name in old]
  renamed = dict(zip(new, old, strict=True)) if same else {}
  return [renamed.get(name, name) for name in own]


def _read_item(directory: Path, step: int, name: str, leaves: dict[str, Any]) -> dict[str, Any]:
  """Returns those leaves of an item of a step that are described, by their names; nobody has checked them yet."""
  with _open_manager(directory) as manager:
    restored = manager.restore(step, args=ocp.args.Composite(**{name: ocp.args.StandardRestore(leaves)}))[name]
  return {leaf: restored[leaf] for leaf in leaves}


def _explain(error: Exception, item_dir: Path, names: Mapping[str, Any]) -> StorageError | CorruptError:
  """Returns what it means that an item with leaves of these names cannot be read."""
  step = item_dir.parent
  if _may_pass(error):
    return StorageError(f'checkpoint {step.name} in {step.parent} cannot be read: {first_line(error)}')
  return CorruptError(f'{_locate(item_dir, names, str(error))} cannot be read: {first_line(error)}')


def read_manifest(path: Path, step: int) -> dict[str, Any]:
  """Reads the manifest of a step.

  Raises:
    CorruptError: if it is missing, is not what was saved, or belongs to another step.
    UserError: if its format is not FORMAT.
  """
  try:
    manifest = read_json(path, sealed=True)
  except UserError:
    manifest = {}
  if manifest.get('step') != step:
    raise CorruptError(f'file {"/".join(path.parts[-2:])} is not what was saved')
  if manifest['format'] != FORMAT:
    raise UserError(f'checkpoint {step} has format {manifest["format"]}; this version reads format {FORMAT}')
  return manifest


def _check_fits(manifest: Mapping[str, Any], abstract_items: Mapping[str, Any]) -> None:
  """Raises UserError if the leaves of a step differ from what a caller wants to restore in name, dtype or shape.

  Orbax would cast another dtype without a word, and a wrong shape is the caller's mistake, not corruption.
  """
  saved, wanted = {}, {}
  for item, tree in abstract_items.items():
    saved |= {f'{item}.{name}': _format_type(*leaf[:2]) for name, leaf in manifest['leaves'][item].items()}
    wanted |= {f'{item}.{name}': _format_type(*type_of(leaf)) for name, leaf in named_leaves(tree, '.')}
  names = [name for name in {**wanted, **saved} if saved.get(name) != wanted.get(name)]
  if names:
    said = [f'{n}: {saved.get(n, "absent")} saved, {wanted.get(n, "absent")} expected' for n in names]
    raise UserError(f'checkpoint {manifest["step"]} does not fit this model and optimizer: {first_three(said)}')


def _format_type(dtype: str, shape: list[int]) -> str:
  return f'{dtype}[{",".join(map(str, shape))}]'


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
  hook, level = sys.unraisablehook, logging.root.manager.disable
  try:
    sys.unraisablehook = lambda _: None
    logging.disable()
    yield
  except Exception:
    with warnings.catch_warnings(action='ignore'):
      gc.collect()  # tasks that failed beside the first report their errors when they are collected: now, unheard
    raise
  finally:
    sys.unraisablehook = hook
    logging.disable(level)


def _may_pass(error: Exception) -> bool:
  """Whether another try might succeed, so that the step must not be set aside."""
  if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno in PASSING_ERRNOS):
    return True
  return any(word in str(error) for word in PASSING_WORDS)


def _locate(item_dir: Path, names: Mapping[str, Any], said: str) -> str:
  """Names the leaf that an error is about, or else the damaged file."""
  if found := [name for name in names if f"'{name}/'" in said or f'"{name}/' in said]:
    return f'{item_dir.name}.{max(found, key=len)}'
  for path in (item_dir / '_METADATA', item_dir / '_sharding', *item_dir.glob('array_metadatas/*')):
    try:
      json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
      return f'file {path.relative_to(item_dir.parent)}'
  return f'item {item_dir.name}'
