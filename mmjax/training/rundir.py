"""A run's directory: one process at a time, files written whole, settings that may not change under a resumed run.

Layout: config.json run.json tokenizer.model metrics.jsonl tensorboard/ checkpoints/<step>/ newest_checkpoint eval.json
report.md plots/ lock. The lock is flock(2) on `lock`: the kernel drops it when its process dies, however it dies.
config.json and run.json carry a sha256 of themselves. A directory may come from anywhere, so no link in it is followed
out of it; the directory itself may be a link.
"""

import contextlib
import datetime
import difflib
import errno
import fcntl
import hashlib
import json
import math
import os
import platform
import socket
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import jax

from mmjax.config import Config, config_from_dict, flatten
from mmjax.data.files import sha256_path, write_file
from mmjax.data.tokenizer import Tokenizer
from mmjax.errors import StorageError, UserError
from mmjax.training.processes import is_main

# On resume: these may differ, all other settings of train need --allow_config_change, everything else must be equal.
FREE = (
  'experiment', 'data.workers', 'data.on_bad_line', 'data.prepared_dir', 'train.log_interval', 'train.eval_interval',
  'train.checkpoint_interval', 'train.max_skipped_updates', 'train.profile_steps',
)  # fmt: skip
FREE_SECTIONS = ('runtime.',)
# What an imported model does not bind: how it started, and how it learns.
FREE_OF_IMPORTS = (
  'model.dropout', 'model.aux_loss_weight', 'memory.keys_init', 'memory.knowledge_length', 'memory.balance_loss_weight',
  'memory.revive_after', 'memory.revive_noise', 'memory.revive_keys',
)  # fmt: skip
# What runs did before a setting existed, so that a config.json from then stays readable. These are no defaults, which
# configs/base.py alone states: they stay when a default changes.
BEFORE = {
  'memory.bank_update': 'dense',
  'memory.revive_after': 0,
  'memory.selection_bias': False,
  'memory.revive_noise': 0.1,
  'memory.revive_keys': True,
  'train.max_loss_factor': 0.0,
  'train.profile_steps': 0,
  'runtime.scan_layers': False,
  'runtime.triton_gemm': False,
  'runtime.coordinator': '',
  'runtime.num_processes': 1,
  'runtime.process_id': 0,
}
BATCH = ('train.batch_size', 'train.accumulation_steps', 'train.dtype')
# A file with the number of the last step saved, so that a step that vanished is missed, also when all of them did: it
# lies beside checkpoints/, not in it.
NEWEST = 'newest_checkpoint'
SEAL = 'sha256'  # key of a JSON object's hash, taken without it
PACKAGES = ('jax', 'jaxlib', 'flax', 'optax', 'orbax-checkpoint', 'grain', 'numpy', 'sentencepiece')
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class RunDir:
  """Paths and files of one run. `with RunDir(path) as run:` creates the directory and locks it."""

  def __init__(self, path: Path | str):
    """Names a run directory; nothing is touched before `with`."""
    self.path = Path(path)
    self._lock_fd: int | None = None

  @property
  def config_path(self) -> Path:
    return self.path / 'config.json'

  @property
  def run_path(self) -> Path:
    return self.path / 'run.json'

  @property
  def tokenizer_path(self) -> Path:
    """The tokenizer's file: tokenizer.model, or tokenizer.json where that is what the run was given."""
    given = self.path / 'tokenizer.json'
    return given if given.exists() else self.path / 'tokenizer.model'

  @property
  def metrics_path(self) -> Path:
    return self.path / 'metrics.jsonl'

  @property
  def checkpoints_path(self) -> Path:
    return self.path / 'checkpoints'

  @property
  def was_trained(self) -> bool:
    """Whether train.py ever started here; an imported model, which is step 0, lies in a directory where it did not."""
    return self.run_path.exists() or self.has_steps

  @property
  def has_steps(self) -> bool:
    """Whether a checkpoint of a trained model lies here."""
    names = (path.name for path in self.checkpoints_path.glob('[0-9]*'))
    return any(name.isdigit() and int(name) > 0 for name in names)

  def check_usable(self) -> None:
    """Looks whether a run may live here, and writes nothing: what takes long need not be done before it is refused.

    Raises:
      UserError: if the path is a file, may not be written, holds a link out of it or belongs to a running process.
    """
    self._check_path()
    lock = self.path / 'lock'
    if jax.process_index() == 0 and lock.exists():
      os.close(_lock(lock, fcntl.LOCK_SH))

  def _check_path(self) -> None:
    try:
      with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        os.stat(self.path)  # a name that is too long, a folder that may not be entered
      nearest = next(path for path in (self.path.absolute(), *self.path.absolute().parents) if os.path.lexists(path))
      if not nearest.is_dir():
        raise UserError(f'{self.path} cannot be a run directory: {nearest} is a file')
      if not os.access(nearest, os.W_OK | os.X_OK):
        raise UserError(f'{self.path} cannot be a run directory: {nearest} may not be written')
      refuse_links_out(self.path)
      str(self.path.absolute()).encode()
    except UnicodeEncodeError:
      raise UserError(f'{ascii(str(self.path))} cannot be a run directory: the name is not UTF-8') from None
    except OSError as error:
      raise _explain(error, f'{self.path} cannot be a run directory') from error

  def __enter__(self) -> Self:
    """Creates and locks the directory.

    Raises:
      UserError: if the path is a file, may not be written, or belongs to a running process.
      StorageError: if the disk is full.
    """
    self._check_path()
    try:
      self.path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
      raise _explain(error, f'run directory {self.path} cannot be created') from error
    if is_main():  # of several processes of one run, the first stands for all
      self._lock_fd = _lock(self.path / 'lock')
      for leftover in self.path.glob('.*.tmp'):
        leftover.unlink(missing_ok=True)
    return self

  def __exit__(
    self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
  ) -> None:
    if self._lock_fd is not None:
      with contextlib.suppress(OSError):
        os.ftruncate(self._lock_fd, 0)
      os.close(self._lock_fd)
      self._lock_fd = None

  def write_config(self, config: Config) -> None:
    """Writes config.json."""
    atomic_write_json(self.config_path, seal(config.to_dict()))

  def read_config(self) -> Config:
    """Reads and checks config.json.

    Raises:
      UserError: if it is not a config of this version or an earlier one.
    """
    settings = read_json(self.config_path)
    try:
      return config_from_dict(_with_settings_before(settings))
    except UserError as error:
      raise UserError(f'{self.config_path}: {error}') from error

  def record_start(self, identity: Mapping[str, str], step: int) -> None:
    """Writes run.json, or adds this start to it.

    Args:
      identity: what the run is made of, for instance {'data_index_sha256': ..., 'tokenizer_sha256': ...}.
      step: the step that this start continues from.

    Raises:
      UserError: if run.json names another identity, with the differences, or is missing where a run has been.
    """
    if self.was_trained:
      run = read_json(self.run_path)
    else:
      run = {'identity': dict(identity), 'starts': []}
    differences = _differences(run['identity'], identity)
    if differences:
      raise UserError(f'{self.path} was started with other data: {"; ".join(differences)}; choose another --workdir')
    run['starts'].append({'step': step, **describe_environment()})
    atomic_write_json(self.run_path, seal(run))


def open_run(path: Path | str) -> RunDir:
  """Opens an existing run for reading, without locking it.

  Raises:
    UserError: if there is no such directory, it is not a run, or it has no checkpoint yet.
    StorageError: if all its checkpoints were set aside as corrupt.
  """
  path = Path(path)
  if not path.is_dir():
    if path.exists():
      raise UserError(f'{path} is a file; a run is a directory, as train.py makes it')
    siblings = [str(p) for p in path.parent.iterdir() if p.is_dir()] if path.parent.is_dir() else []
    nearest = difflib.get_close_matches(str(path), siblings, n=1, cutoff=0.5)
    raise UserError(f'no run directory {path}{f"; did you mean {nearest[0]}?" if nearest else ""}')
  refuse_links_out(path)
  run = RunDir(path)
  missing = [p.name for p in (run.config_path, run.tokenizer_path, run.checkpoints_path) if not p.exists()]
  if missing:
    raise UserError(f'{path} is not a run directory: {", ".join(missing)} is missing')
  steps = [p.name for p in run.checkpoints_path.iterdir() if p.is_dir()]
  saved = (path / NEWEST).exists() or any('.corrupt' in name for name in steps)
  if saved and not any(name.isdigit() for name in steps):
    raise StorageError(f'run {path} has no whole checkpoint left; those set aside end in .corrupt')
  if not any(name.isdigit() for name in steps):
    raise UserError(f'run {path} has no checkpoint yet; it saves the first after train.checkpoint_interval updates')
  return run


def compare_configs(old: Config, new: Config, allow_config_change: bool) -> None:
  """Refuses to resume a run with settings that would make it another run.

  Raises:
    UserError: listing every difference as old -> new; those of the schedule only without `allow_config_change`.
  """
  fixed, schedule = [], []
  before, after = flatten(old.to_dict()), flatten(new.to_dict())
  for name in before:
    if before[name] == after[name] or name in FREE or name.startswith(FREE_SECTIONS):
      continue
    is_schedule = name.startswith('train.') and name not in BATCH
    (schedule if is_schedule else fixed).append(f'{name} {before[name]!r} -> {after[name]!r}')
  if fixed:
    raise UserError(
      f'the run was started with other settings: {"; ".join(fixed)}; undo them or choose another --workdir'
    )
  if schedule and not allow_config_change:
    raise UserError(
      f'the run was started with another schedule: {"; ".join(schedule)}; --allow_config_change accepts that'
    )


def compare_models(old: Config, new: Config) -> None:
  """Refuses to train an imported model under settings that describe another architecture.

  Raises:
    UserError: listing every difference as old -> new.
  """
  before, after = flatten(old.to_dict()), flatten(new.to_dict())
  names = [n for n in before if n.startswith(('model.', 'memory.')) and not n.startswith('memory.bank_')]
  names = [n for n in names if n not in FREE_OF_IMPORTS]
  differences = _differences(*({name: settings[name] for name in names} for settings in (before, after)))
  if differences:
    raise UserError(f'the imported model has other settings: {"; ".join(differences)}; give it those that it has')


def write_tokenizer(path: Path, tokenizer: Tokenizer) -> None:
  """Copies a tokenizer's file, with its hash beside it, which `load_tokenizer` checks."""
  write_file(path, tokenizer.path.read_bytes())
  atomic_write_text(sha256_path(path), f'{tokenizer.sha256}  {path.name}\n')


def describe_environment() -> dict[str, Any]:
  """Returns time (UTC), host, process, device and library versions, as run.json holds them."""
  device = jax.devices()[0]
  return {
    'time': datetime.datetime.now(datetime.UTC).isoformat(timespec='seconds'),
    'host': socket.gethostname(),
    'pid': os.getpid(),
    'platform': device.platform,
    'device': device.device_kind,
    'device_count': jax.device_count(),
    'versions': {'python': platform.python_version(), **{name: metadata.version(name) for name in PACKAGES}},
  }


def atomic_write_text(path: Path, text: str) -> None:
  """Writes UTF-8 like `mmjax.data.files.write_file`."""
  write_file(path, text.encode())


def atomic_write_json(path: Path, value: Any) -> None:
  """Writes indented JSON like `write_file`; NaN and infinities become null, which JSON has no number for."""
  atomic_write_text(path, json.dumps(finite(value), indent=2, ensure_ascii=False, allow_nan=False) + '\n')


def seal(value: Mapping[str, Any]) -> dict[str, Any]:
  """Returns a JSON object with its own sha256 in it; `read_json` checks it and takes it off."""
  return {**value, SEAL: _sha256(value)}


def read_json(path: Path) -> dict[str, Any]:
  """Reads a JSON object that belongs to a run.

  Raises:
    UserError: if it is missing, no JSON object, or is sealed and was changed.
  """
  try:
    value = json.loads(path.read_bytes())
  except FileNotFoundError as error:
    raise UserError(f'{path} is missing') from error
  except (ValueError, RecursionError) as error:
    raise UserError(f'{path} is not JSON: {error}') from error
  if not isinstance(value, dict):
    raise UserError(f'{path} must be a JSON object')
  if SEAL in value and value.pop(SEAL) != _sha256(value):
    raise UserError(f'{path} was changed after it was written; if that was on purpose, remove {SEAL!r} from it')
  return value


def _sha256(value: Mapping[str, Any]) -> str:
  return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def refuse_links_out(directory: Path) -> None:
  """Raises UserError, naming it, if a link below a directory leads out of it: nothing is read or written there."""
  root = directory.resolve()
  for folder, folders, files in os.walk(root):  # follows no links
    for path in (Path(folder, name) for name in (*folders, *files)):
      if path.is_symlink() and not path.resolve().is_relative_to(root):
        raise UserError(f'{path} is a link out of the run directory, to {os.readlink(path)}; remove it')


def finite(value: Any) -> Any:
  """Returns nested dicts and lists with every NaN and infinity replaced by None."""
  if isinstance(value, Mapping):
    return {name: finite(item) for name, item in value.items()}
  if isinstance(value, list | tuple):
    return [finite(item) for item in value]
  return None if isinstance(value, float) and not math.isfinite(value) else value


def _with_settings_before(settings: Any) -> Any:
  """Returns the content of a config.json with the settings that did not exist when it was written."""
  if not isinstance(settings, Mapping):
    return settings
  settings = {name: dict(value) if isinstance(value, Mapping) else value for name, value in settings.items()}
  for name, value in BEFORE.items():
    section, _, field = name.partition('.')
    if isinstance(settings.get(section), dict):
      settings[section].setdefault(field, value)
  return settings


def _lock(path: Path, kind: int = fcntl.LOCK_EX) -> int:
  """Locks a file for this process and returns its descriptor; a shared lock only asks and leaves no name in it."""
  try:
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
  except OSError as error:
    raise _explain(error, f'{path} cannot be opened') from error
  try:
    fcntl.flock(fd, kind | fcntl.LOCK_NB)
    if kind == fcntl.LOCK_EX:
      os.ftruncate(fd, 0)
      os.write(fd, json.dumps(_owner()).encode())
  except BlockingIOError as error:
    holder = _read_holder(fd)
    os.close(fd)
    raise UserError(f'{path.parent} is in use by {holder}; wait for it or choose another --workdir') from error
  except OSError as error:
    os.close(fd)
    raise _explain(error, f'{path} cannot be locked') from error
  return fd


def _owner() -> dict[str, Any]:
  now = datetime.datetime.now(datetime.UTC).isoformat(timespec='seconds')
  return {'pid': os.getpid(), 'host': socket.gethostname(), 'start': now}


def _read_holder(fd: int) -> str:
  try:
    owner = json.loads(os.pread(fd, 4096, 0))
    return f'process {owner["pid"]} on {owner["host"]} since {owner["start"]}'
  except (ValueError, TypeError, KeyError):  # it locked the file and has not written its name yet
    return 'another process that just started'


def _explain(error: OSError, what: str) -> StorageError | UserError:
  """Returns the exception for a failure at a path that the user chose."""
  kind = StorageError if error.errno in FULL else UserError
  return kind(f'{what}: {error.strerror}')


def _differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
  return [f'{name} {old.get(name)} -> {new.get(name)}' for name in {**old, **new} if old.get(name) != new.get(name)]
