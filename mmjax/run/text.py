"""Where the text of a run is: its shards are known by their hash, so they and what they are made of may lie anywhere.

They are looked for where data.prepared_dir says, from here and from the folders above the run, and where they were at
the run's last start; in a prepared directory that is given itself, there alone.
"""

import dataclasses
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mmjax.config import Config
from mmjax.console import Progress
from mmjax.data.index import INDEX, counts_bytes, data_sha256, find_prepared, read_index
from mmjax.data.prepare import prepare
from mmjax.data.reader import find_files
from mmjax.errors import UserError
from mmjax.run.directory import RunDir
from mmjax.run.identity import differences
from mmjax.run.processes import is_main


def training_data(run: RunDir, config: Config, tokenizer: str = '') -> Path:
  """Returns the prepared directory of a run that starts or goes on, made now or found.

  Args:
    run: its directory, whose tokenizer is used where the settings name none.
    config: its settings.
    tokenizer: of the run whose weights it starts from, where its directory has none yet.

  Raises:
    UserError: if the text is not what it must be, or not that of the run's earlier starts, or the run is an import
      without a tokenizer and none is named.
  """
  own = config.data.tokenizer or (str(run.tokenizer_path) if run.tokenizer_path.exists() else tokenizer)
  if not run.run_path.exists():
    if not own and run.steps() and not _is_given(config):
      raise UserError(
        'the weights were imported without a tokenizer, and a new one would give their token ids other meanings; name '
        'the one that they were trained with: --config.data.tokenizer=FILE'
      )
    return _prepare(config, own)
  files, earlier = ((data.train_files, data.valid_files) for data in (config.data, _earlier(run, config).data))
  gone = _what_is_gone(config) if files == earlier else ''
  if gone or not any(files):
    if found := find_run_data(run, config):
      return found
    _check_other(run, config)
    if named := earlier[0]:
      raise UserError(
        f'{run.path} was started on the text of data.train_files={named!r}{gone}; say where it is now with '
        '--config.data.train_files=..., or where its prepared directory is with --config.data.prepared_dir=DIR'
      )
  return _prepare_again(run, config, own)


def evaluation_data(run: RunDir, config: Config) -> Path:
  """Returns the prepared directory with a run's validation text; made again only of text that the settings name.

  Raises:
    UserError: if it is not to be found, or the text is not what the run was trained with.
  """
  if found := find_run_data(run, config):
    return found
  missing = _what_is_gone(config)
  # data.tokenizer says where the run's tokenizer was when it was started. An import has no text that it learned.
  if not missing and (config.data.train_files or (_is_given(config) and not run.run_path.exists())):
    return _prepare_again(run, config, str(run.tokenizer_path))
  _check_other(run, config)
  if not run.run_path.exists():
    raise UserError(
      f'{run.path} holds imported weights and no text; give text (eval.py: --valid_files, inspect: --corpus), or '
      '--config.data.prepared_dir=DIR, a prepared directory'
    )
  raise UserError(
    f'the validation text of {run.path} cannot be found{missing}; give --config.data.prepared_dir=DIR, the '
    'directory that was prepared for it, or other text (eval.py: --valid_files, inspect: --corpus)'
  )


def find_run_data(run: RunDir, config: Config) -> Path | None:
  """Returns the prepared directory that holds what a run was trained with, or None where it is nowhere to be found."""
  wanted = run.read_record()['identity'].get('data_sha256')

  def fits(index: dict[str, Any]) -> bool:
    return data_sha256(index) == wanted and (config.data.layout == 'packed' or counts_bytes(index))

  return wanted and next(filter(None, (find_prepared(place, fits) for place in _places(run, config))), None)


def place_for_shards(run: RunDir, config: Config) -> str:
  """Returns the folder for shards of other text: beside those of the run, where these are and may be written."""
  folders = [place.parent for place in _recorded(run)]
  return next((str(folder) for folder in folders if os.access(folder, os.W_OK | os.X_OK)), config.data.prepared_dir)


def _earlier(run: RunDir, config: Config) -> Config:
  """Returns a run's settings at its last start, or `config` where a kill came before the first were written."""
  return run.read_config() if run.config_path.exists() else config


def _what_is_gone(config: Config) -> str:
  """Returns in brackets why the text that the settings name cannot be read; '' if it can, or they name none."""
  try:
    for files in filter(None, (config.data.train_files, config.data.valid_files)):
      find_files(files)
  except UserError as error:
    return f' ({error})'
  return ''


def _places(run: RunDir, config: Config) -> Iterator[Path]:
  place = Path(config.data.prepared_dir)
  yield place
  if not _is_given(config):
    yield from (*_recorded(run), *(folder / place for folder in run.path.absolute().parents))


def _is_given(config: Config) -> bool:
  """Whether data.prepared_dir is a finished prepared directory and no folder for such."""
  return not config.data.train_files and (Path(config.data.prepared_dir) / INDEX).is_file()


def _check_other(run: RunDir, config: Config) -> None:
  if _is_given(config):
    raise UserError(
      f'{run.path} was started with other data than data.prepared_dir={config.data.prepared_dir!r} holds; give its own'
    )


def _recorded(run: RunDir) -> Iterator[Path]:
  """Yields where the shards were at the last start that noted it."""
  starts = run.read_record()['starts']
  yield from (Path(start['prepared_dir']) for start in starts[:-2:-1] if 'prepared_dir' in start)


def _prepare(config: Config, tokenizer: str) -> Path:
  data = dataclasses.replace(config.data, tokenizer=tokenizer)
  return prepare(data, config.model.vocab_size, None if is_main() else Progress(quiet=True))


def _prepare_again(run: RunDir, config: Config, tokenizer: str) -> Path:
  """Prepares the text of a run and compares it with what the run was trained with."""
  prepared = _prepare(config, tokenizer)
  recorded = run.read_record()['identity'].get('data_sha256')
  if recorded and data_sha256(read_index(prepared)) != recorded:
    settings = differences(_earlier(run, config), config).items()
    different = '; '.join(f'{name} {old} -> {new}' for name, (old, new) in settings if name.startswith('data.'))
    way = 'name the text that it was started with'
    if own := find_run_data(run, config):
      way = f'its own are in {own}: give that as data.prepared_dir, and leave data.train_files and valid_files empty'
    raise UserError(
      f'{run.path} was started with other data: the text that the settings name makes other shards '
      f'({different or "the text itself has changed"}); {way}, or choose other text to evaluate on or another --workdir'
    )
  return prepared
