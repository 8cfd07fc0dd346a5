"""The file that a run's bank started from: recorded by its hash in run.json, and checked wherever it is used again."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mmjax.config import Config
from mmjax.data.bank_file import read_texts, texts_path
from mmjax.errors import UserError
from mmjax.files import read_json, sha256_of
from mmjax.run.directory import RunDir

BANK, TEXTS = 'bank_sha256', 'bank_texts_sha256'


def bank_identity(config: Config) -> dict[str, str]:
  """Returns the hashes of the bank file that the settings name and of its texts, of those that are there."""
  return {name: sha256_of(path) for name, path in _files(config).items() if path.is_file()}


def recorded_bank(run: RunDir) -> dict[str, str]:
  """Returns what a run noted of these hashes."""
  return {name: value for name, value in _identity(run).items() if name in (BANK, TEXTS)}


def check_bank(run: RunDir, config: Config) -> None:
  """Raises UserError if the bank file that the settings name is there and is not what the run started from.

  Going on needs no such file: the checkpoints hold the bank.
  """
  recorded, path = _identity(run), Path(config.memory.bank_file)
  if BANK in recorded and _files(config) and path.is_file() and (found := sha256_of(path)) != recorded[BANK]:
    raise UserError(
      f"memory.bank_file='{path}' is not the bank that the run in {run.path} started from (sha256 {found[:12]}..., not "
      f'{recorded[BANK][:12]}...); name that one or, as the checkpoints hold the bank, a file that is not there, or '
      'choose another --workdir'
    )


def bank_texts(run: RunDir, config: Config) -> tuple[dict[int, str], str]:
  """Returns the texts that the rows of a run's bank started from, where they are known, and what is to be said of that.

  Raises:
    UserError: if their file is damaged.
  """
  path = _files(config).get(TEXTS)
  if path is None:
    return {}, ''
  if not path.is_file():
    return {}, f"The texts that the rows started from are not shown: there is no '{path}'."
  recorded = _identity(run).get(TEXTS)
  if recorded is None:
    return read_texts(path), f"{_unrecorded(run)}: the texts shown are those in '{path}' now."
  if sha256_of(path) != recorded:
    return {}, f"The texts that the rows started from are not shown: '{path}' is not what it was when the run started."
  return read_texts(path), ''


def bank_remark(run: RunDir, config: Config, identity: Mapping[str, Any]) -> str:
  """Returns a sentence about the file that a run's bank started from; '' where there is none."""
  if not _files(config):
    return ''
  if BANK not in identity:
    return f"{_unrecorded(run)}; the settings name '{config.memory.bank_file}'."
  now = bank_identity(config).get(BANK)
  state = 'is gone' if now is None else 'is still that file' if now == identity[BANK] else 'is another file now'
  return f"The bank started from the file with the hash bank_sha256; '{config.memory.bank_file}' {state}."


def _files(config: Config) -> dict[str, Path]:
  if config.memory.bank_init != 'file':
    return {}
  path = Path(config.memory.bank_file)
  return {BANK: path, TEXTS: texts_path(path)}


def _identity(run: RunDir) -> Mapping[str, Any]:
  return read_json(run.run_path)['identity'] if run.run_path.exists() else {}


def _unrecorded(run: RunDir) -> str:
  return f'{run.run_path} does not say which bank file the run started from'
