"""A run's directory: one process at a time, its files and where they lie, and a record of every start.

Layout: config.json run.json data.json tokenizer.model (with its .sha256) metrics.jsonl tensorboard/ checkpoints/<step>/
newest_checkpoint eval.json report.md plots/ lock; profile/ and diverged/ where there is something to hold; and of a run
that `convert compress` made, compressed.json. That, config.json, run.json and data.json are sealed. A directory may
come from anywhere, so no link in it is followed out of it; the directory itself may be a link.
"""

import contextlib
import errno
import json
import os
import platform
import socket
import tempfile
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any, Self

import jax

from mmjax.config import Config, as_of_today, config_from_dict, user_path
from mmjax.config.wording import nearest
from mmjax.data.tokenizer import Tokenizer, load_tokenizer
from mmjax.errors import StorageError, UserError, file_error
from mmjax.files import lock, read_json, sha256_path, utc_now, write_file, write_json
from mmjax.run.processes import is_main

# A file with the number of the last step saved, so that a step that vanished is missed, also when all of them did: it
# lies beside checkpoints/, not in it.
NEWEST = 'newest_checkpoint'
PACKAGES = ('jax', 'jaxlib', 'flax', 'optax', 'orbax-checkpoint', 'grain', 'numpy', 'sentencepiece')


NO_TOKENIZER = (
  'the run was imported without a tokenizer, so it reads and writes token ids (logits, generate_tokens); '
  'import it with --tokenizer'
)


class InUseError(UserError):
  """A running process has the run directory."""


class RunDir:
  """Paths and files of one run. `with RunDir(path) as run:` creates the directory and locks it."""

  def __init__(self, path: Path | str):
    """Names a run directory; nothing is touched before `with`."""
    self.path = user_path(path)
    self.config_path, self.run_path = self.path / 'config.json', self.path / 'run.json'
    self.metrics_path, self.checkpoints_path = self.path / 'metrics.jsonl', self.path / 'checkpoints'
    self._lock_fd: int | None = None

  @property
  def tokenizer_path(self) -> Path:
    """The tokenizer's file: tokenizer.model, or tokenizer.json where that is what the run was given."""
    given = self.path / 'tokenizer.json'
    return given if given.exists() else self.path / 'tokenizer.model'

  @property
  def was_trained(self) -> bool:
    """Whether train.py ever started here; an imported model, which is step 0, lies in a directory where it did not."""
    return self.run_path.exists() or any(self.steps())

  def steps(self) -> list[int]:
    """Returns the steps whose saving was completed, oldest first; 0 is an import."""
    names = [path.name for path in self.checkpoints_path.glob('[0-9]*') if path.is_dir()]
    return sorted(int(name) for name in names if name.isascii() and name.isdigit())

  @property
  def newest_step(self) -> int | None:
    """The step that was saved last, whether it is still there or not."""
    try:
      return int((self.path / NEWEST).read_text())
    except (OSError, ValueError):
      return None

  @property
  def ever_saved(self) -> bool:
    """Whether a step was ever saved here, and not only an attempt was made: a run must restore, not start afresh."""
    return bool(self.steps()) or self.newest_step is not None or any(self.checkpoints_path.glob('*.corrupt*'))

  def check_usable(self) -> None:
    """Looks whether a run may live here, and writes nothing: what takes long need not be done before it is refused.

    Raises:
      UserError: if the path is a file, may not be written, holds a link out of it or belongs to a running process.
    """
    try:
      with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        os.stat(self.path)  # a name that is too long, a folder that may not be entered
      nearest = next(path for path in (self.path.absolute(), *self.path.absolute().parents) if os.path.lexists(path))
      if not nearest.is_dir():
        what = 'is a file' if nearest.exists() else 'is a link that leads nowhere'
        raise UserError(f'{self.path} cannot be a run directory: {nearest} {what}')
      if not os.access(nearest, os.W_OK | os.X_OK):
        code = errno.EROFS if os.statvfs(nearest).f_flag & os.ST_RDONLY else errno.EACCES
        raise file_error(OSError(code, os.strerror(code)), f'{self.path} cannot be a run directory: {nearest}')
      if nearest != self.path.absolute():
        tempfile.TemporaryDirectory(dir=nearest).cleanup()  # os.access may agree where this fails: in /proc
      refuse_links_out(self.path)
      str(self.path.absolute()).encode()
    except UnicodeEncodeError:
      raise UserError(f'{ascii(str(self.path))} cannot be a run directory: the name is not UTF-8') from None
    except OSError as error:
      raise file_error(error, f'{self.path} cannot be a run directory') from error
    if is_main() and (self.path / 'lock').exists():
      os.close(_lock(self.path / 'lock', shared=True))

  def __enter__(self) -> Self:
    """Creates and locks the directory.

    Raises:
      UserError: if the path is a file, may not be written, or belongs to a running process.
      StorageError: if the disk is full.
    """
    self.check_usable()
    try:
      self.path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
      raise file_error(error, f'run directory {self.path} cannot be created') from error
    if is_main():  # of several processes of one run, the first stands for all
      self._lock_fd = _lock(self.path / 'lock')
      for leftover in self.path.glob('.*.tmp'):
        leftover.unlink(missing_ok=True)
    return self

  def __exit__(self, *_: object) -> None:
    if self._lock_fd is not None:
      with contextlib.suppress(OSError):
        os.ftruncate(self._lock_fd, 0)
      os.close(self._lock_fd)
      self._lock_fd = None

  def write_config(self, config: Config) -> None:
    """Writes config.json."""
    write_json(self.config_path, config.to_dict(), sealed=True)

  def read_config(self, *, to_train: bool = False) -> Config:
    """Reads and checks config.json; `to_train`: so that the run goes on.

    Raises:
      UserError: if it is not a config of this version or an earlier one, or trains with what there is no more.
    """
    settings = read_json(self.config_path)
    try:
      return config_from_dict(as_of_today(settings, to_train=to_train))
    except UserError as error:
      raise UserError(f'{self.config_path}: {error}') from error

  def load_tokenizer(self, vocab_size: int) -> Tokenizer:
    """Reads the run's tokenizer.

    Raises:
      UserError: if it is not the one that belongs to the model.
    """
    tokenizer = load_tokenizer(self.tokenizer_path, most=vocab_size)
    trained_with = self.read_record()['identity'].get('tokenizer_sha256', tokenizer.sha256)  # none for an import
    if tokenizer.sha256 != trained_with:
      raise UserError(
        f'{self.tokenizer_path} is not the tokenizer that the run was trained with (sha256 '
        f'{tokenizer.sha256[:12]}..., not {trained_with[:12]}...); copy that one back'
      )
    return tokenizer

  def read_record(self) -> dict[str, Any]:
    """Reads run.json: `identity`, the hashes of what the run is made of; `starts`; `init_from`, the run before it.

    That of a directory in which no training was started is empty.
    """
    return read_json(self.run_path) if self.run_path.exists() else {'identity': {}, 'starts': []}

  def record_start(
    self, identity: Mapping[str, str], step: int, origin: Mapping[str, Any] | None = None, **facts: Any
  ) -> None:
    """Writes run.json, or adds this start to it.

    Args:
      identity: what the run is made of, for instance {'data_index_sha256': ..., 'tokenizer_sha256': ...}.
      step: the step that this start continues from.
      origin: where its weights come from, if this start read them from another run.
      **facts: what else is to be known of this start.

    Raises:
      UserError: if run.json names another identity, with the differences, or is missing where a run has been.
    """
    new = {'identity': dict(identity), **({'init_from': dict(origin)} if origin else {}), 'starts': []}
    run = read_json(self.run_path) if self.was_trained else new
    # What an earlier version did not record, and what a start that goes on from a checkpoint does not read, is free.
    recorded = run['identity'].items()
    if differences := [f'{name} {old} -> {identity[name]}' for name, old in recorded if identity.get(name, old) != old]:
      raise UserError(f'{self.path} was started with other data: {"; ".join(differences)}; choose another --workdir')
    if origin and run['init_from']['params_sha256'] != origin['params_sha256']:  # a kill came before they were saved
      raise UserError(f'{origin["run"]} changed since {self.path} was started from it; choose another --workdir')
    run['starts'].append({'step': step, **facts, **describe_environment()})
    write_json(self.run_path, run, sealed=True)


def open_run(path: Path | str, *, needs_tokenizer: bool = True) -> RunDir:
  """Opens an existing run for reading, without locking it.

  Args:
    path: its directory.
    needs_tokenizer: whether it is refused without one, which an import may lack.

  Raises:
    UserError: if there is no such directory, it is not a run, or it has no checkpoint yet.
    StorageError: if all its checkpoints were set aside as corrupt.
  """
  path = user_path(path)
  if not path.is_dir():
    if path.exists():
      raise UserError(f'{path} is a file; a run is a directory, as train.py makes it')
    runs = [str(config.parent) for config in path.parent.glob('*/config.json')]
    raise UserError(f'no run directory {path}{nearest(str(path), runs)}')
  run = RunDir(path)
  refuse_links_of_run(run)
  tokenizer = [run.tokenizer_path] if needs_tokenizer else []
  missing = [p.name for p in (run.config_path, *tokenizer, run.checkpoints_path) if not p.exists()]
  if missing == [run.tokenizer_path.name] and not run.was_trained:
    raise UserError(f'{path}: {NO_TOKENIZER}')
  if missing:
    raise UserError(f'{path} is not a run directory: it has no {" and no ".join(missing)}')
  if run.ever_saved and not run.steps():
    raise StorageError(f'run {path} has no whole checkpoint left; the names of damaged ones end in .corrupt')
  if not run.steps():
    raise UserError(f'run {path} has no checkpoint yet; it saves the first after train.checkpoint_interval updates')
  return run


def write_tokenizer(path: Path, tokenizer: Tokenizer) -> None:
  """Copies a tokenizer's file, with its hash beside it, which `load_tokenizer` checks."""
  write_file(path, tokenizer.path.read_bytes())
  write_file(sha256_path(path), f'{tokenizer.sha256}  {path.name}\n')


def describe_environment() -> dict[str, Any]:
  """Returns time (UTC), host, process, device and library versions, as run.json holds them."""
  device = jax.devices()[0]
  return {
    'time': utc_now(),
    'host': socket.gethostname(),
    'pid': os.getpid(),
    'platform': device.platform,
    'device': device.device_kind,
    'versions': {'python': platform.python_version(), **{name: metadata.version(name) for name in PACKAGES}},
  }


def refuse_used(out: Path, flag: str = '--out', first: str = 'checkpoints', last: str = 'config.json') -> None:
  """Raises UserError if a new directory cannot be made at the path that a flag gives, because something is there.

  `first` and `last` are what is written there first and last: what has the one alone was not finished.
  """
  if not out.exists() or (out.is_dir() and not any(out.iterdir())):
    return
  is_part = (out / first).exists() and not (out / last).exists()
  left = ', and what wrote it was stopped: remove it and repeat the command, or' if is_part else ';'
  raise UserError(f'{str(out)!r} already exists{left} choose another {flag}')


def refuse_links_of_run(run: RunDir) -> None:
  """Does what `refuse_links_out` does with a directory that holds a run; one that holds none may be large."""
  if run.config_path.exists():
    refuse_links_out(run.path)


def refuse_links_out(directory: Path) -> None:
  """Raises UserError, naming it, if a link below a directory leads out of it: nothing is read or written there."""
  root = directory.resolve()
  for folder, folders, files in os.walk(root):  # follows no links
    for path in (Path(folder, name) for name in (*folders, *files)):
      if path.is_symlink() and not path.resolve().is_relative_to(root):
        said = f'{path} is a link out of the run directory, to {os.readlink(path)}'
        raise UserError(f'{said}; remove it, or put what it leads to in its place')


def _lock(path: Path, shared: bool = False) -> int:
  """Locks a file for this process and returns its descriptor; a shared lock only asks and leaves no name in it."""
  try:
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
    try:
      lock(fd, lambda: _refuse(path.parent, fd), shared)
      if not shared:
        os.ftruncate(fd, 0)
        os.write(fd, json.dumps({'pid': os.getpid(), 'host': socket.gethostname(), 'start': utc_now()}).encode())
    except BaseException:
      os.close(fd)
      raise
  except OSError as error:
    raise file_error(error, f'{path} cannot be locked') from error
  return fd


def _refuse(directory: Path, fd: int) -> None:
  try:
    owner = json.loads(os.pread(fd, 4096, 0))
    holder = f'process {owner["pid"]} on {owner["host"]} since {owner["start"]}'
  except (ValueError, TypeError, KeyError):  # it locked the file and has not written its name yet
    holder = 'another process that just started'
  raise InUseError(f'{directory} is in use by {holder}; wait for it or choose another --workdir')
