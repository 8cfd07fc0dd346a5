"""JSON files of a run: written whole, some with a hash of themselves, which reading checks."""

import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mmjax.errors import UserError
from mmjax.files import write_file

SEAL = 'sha256'  # key of a JSON object's hash, taken without it


def atomic_write_text(path: Path, text: str) -> None:
  """Writes UTF-8 like `mmjax.files.write_file`."""
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


def finite(value: Any) -> Any:
  """Returns nested dicts and lists with every NaN and infinity replaced by None."""
  if isinstance(value, Mapping):
    return {name: finite(item) for name, item in value.items()}
  if isinstance(value, list | tuple):
    return [finite(item) for item in value]
  return None if isinstance(value, float) and not math.isfinite(value) else value
