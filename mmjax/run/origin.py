"""The run whose weights a new run starts from:   train.py --init_from RUN[@best|last|STEP]

All parameters come along, a selection bias and the bank among them, and so does the tokenizer. The optimizer's state
begins anew. Data and schedule are the config's. So are model and memory, but a setting that decides the shape or the
meaning of a parameter must equal the other run's, and one that says how parameters start is refused unless it is at
its default or says the same.

Before its first update the new run saves what it starts from as its own step 0, and run.json notes where that came
from. From then on the other run is not needed.
"""

from pathlib import Path
from typing import Any, NamedTuple

from jax.sharding import Mesh

from mmjax.choices import CHECKPOINT
from mmjax.config import Config, default_settings, flatten, user_path
from mmjax.config.wording import quote
from mmjax.data.tokenizer import load_tokenizer
from mmjax.errors import UserError
from mmjax.model.params import Params, abstract_params
from mmjax.run.checkpoint import TOKENIZER_SHA256, Checkpoints, checkpoint_name
from mmjax.run.compressed import refuse_compressed
from mmjax.run.directory import RunDir, open_run
from mmjax.run.identity import BANK_SHA256, TEXTS_SHA256, bank_identity, compare_models
from mmjax.run.leaves import leaves_sha256, refuse_non_finite
from mmjax.run.sharding import placed, replicated

# How parameters start, where they do not come from another run.
STARTS = ('memory.bank_init', 'memory.bank_file', 'memory.bank_std')


class Origin(NamedTuple):
  """A checkpoint of another run: its directory, absolute, and 'best', 'last' or the number of a step."""

  path: Path
  checkpoint: str | int

  @property
  def tokenizer(self) -> str:
    """The path of its tokenizer; '' where it has none."""
    path = RunDir(self.path).tokenizer_path
    return str(path) if path.exists() else ''

  def __str__(self) -> str:
    return f'{self.path}@{self.checkpoint}'


def parse_origin(text: str) -> Origin:
  """Reads RUN[@best|last|STEP]; the best checkpoint where nothing is said. A directory may have an @ in its name.

  Raises:
    UserError: if RUN is no path, or what follows the @ names no checkpoint.
  """
  path, at, checkpoint = text.rpartition('@')
  if not at or '/' in checkpoint or user_path(text).is_dir():
    path, checkpoint = text, CHECKPOINT
  return Origin(user_path(path).resolve(), checkpoint_name(checkpoint))


def check_origin(asked: Origin, run: RunDir) -> None:
  """Raises UserError if a directory that is in use was not started from the checkpoint that is asked for."""
  found = run.read_record().get('init_from')
  if found and str(asked.path) == found['run'] and asked.checkpoint in (found['checkpoint'], found['step']):
    return
  if asked.path == run.path.resolve():
    raise UserError(f'--init_from names {run.path}, the work directory itself; give the new run another --workdir')
  began = f'from {found["run"]}, step {found["step"]}' if found else 'without --init_from'
  raise UserError(
    f'{run.path} was started {began}, not from {asked}; leave --init_from out to go on, or choose another --workdir'
  )


def settle_origin(origin: Origin, config: Config) -> Config:
  """Returns the settings of a new run, which say of its bank how that of the other run once started.

  Raises:
    UserError: if there is no such run, or the config contradicts its model or its tokenizer.
  """
  other = open_run(origin.path, needs_tokenizer=not config.data.tokenizer)
  refuse_compressed(other, 'trained on')
  old = other.read_config()
  compare_models(old, config, str(other.path))
  refuse_starts(other, old, config)
  if other.tokenizer_path.exists():  # else it is an import without one: the config's it is
    own = other.load_tokenizer(old.model.vocab_size)
    if config.data.tokenizer and load_tokenizer(config.data.tokenizer).sha256 != own.sha256:
      raise UserError(
        f'data.tokenizer={config.data.tokenizer!r} is not the tokenizer of {other.path}, whose model reads no other; '
        'leave it out'
      )
  return with_bank_of(old, config)


def refuse_starts(other: RunDir, old: Config, config: Config) -> None:
  """Raises UserError for a setting that says how parameters start, and not as those of the other run once did.

  One at its default says nothing. A bank file may lie elsewhere now: its hash decides.
  """
  before, after, usual = flatten(old.to_dict()), flatten(config.to_dict()), default_settings()
  free = {name: (before[name], usual[name]) for name in STARTS}
  found, recorded = bank_identity(config).get(BANK_SHA256), other.read_record()['identity'].get(BANK_SHA256)
  if found and recorded:
    free['memory.bank_file'] = (config.memory.bank_file if found == recorded else '',)
  for name, values in free.items():
    if after[name] not in values:
      instead = 'memory.bank_init' if name == 'memory.bank_file' else name
      flag = f'--config.{instead}={usual[instead]}'
      raise UserError(
        f'{name}={quote(after[name])} does nothing when parameters come from {other.path}; leave it out or type {flag}'
      )


def with_bank_of(old: Config, config: Config) -> Config:
  """Returns a config that says how its bank started; one that says nothing of it, as another does."""
  if config.memory.bank_init != default_settings()['memory.bank_init']:
    return config
  return config.with_settings({'memory.bank_init': old.memory.bank_init, 'memory.bank_file': old.memory.bank_file})


def load_origin(origin: Origin, config: Config, mesh: Mesh) -> tuple[Params, dict[str, Any], dict[str, Any]]:
  """Reads the parameters and the counts of reads onto a mesh, and what run.json says of them.

  Raises:
    UserError: if there is no such checkpoint. StorageError: if it is not whole.
  """
  other, target = RunDir(origin.path), placed(mesh, abstract_params(config))
  checkpoints = Checkpoints(other.path, read_only=True)
  params, counters, step = checkpoints.restore_params(target, origin.checkpoint)
  refuse_non_finite(params, f'step {step} of {origin.path} cannot be trained on; choose another with @STEP')
  reads, record = checkpoints.restore_reads(step, replicated(mesh)), other.read_record()
  described = {
    'run': str(origin.path),
    'checkpoint': origin.checkpoint,
    'step': step,
    'tokens': counters['tokens'],
    'params_sha256': leaves_sha256(params),
    'bank': {name: record['identity'][name] for name in (BANK_SHA256, TEXTS_SHA256) if name in record['identity']},
    'init_from': record.get('init_from'),
  } | {name: counters[name] for name in (TOKENIZER_SHA256,) if name in counters}
  return params, reads, described
