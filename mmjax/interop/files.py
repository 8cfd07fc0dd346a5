"""Files of named tensors: safetensors, and PyTorch's zip files (.pth, .pt) where torch is installed.

A file may come from anywhere: nothing in it is executed, and only plain floating tensors are accepted. The header of
a safetensors file is checked by its library.
"""

import dataclasses
import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from mmjax.config.wording import nearest_file
from mmjax.errors import UserError
from mmjax.files import check_sha256, sha256_path, storage_errors, write_file
from mmjax.interop.names import is_buffer
from mmjax.interop.torch_files import DTYPES, read_torch, torch_bytes

_SAFETENSORS_DTYPES = ('F32', 'F16', 'BF16', 'F64')


def read_tensors(path: Path) -> dict[str, np.ndarray]:
  """Reads every tensor of a file, under the names it has there; known buffers are left out.

  Args:
    path: ends in .safetensors, .pth or .pt. If `<path>.sha256` is there, the file must have that hash.

  Returns:
    name -> array of float32, float16, bfloat16 or float64.

  Raises:
    UserError: if the file is missing, damaged, altered, or holds anything but floating tensors.
  """
  if path.name.endswith('.index.json'):
    raise UserError(f'{path} lists the parts of a model; join these in one file, and name that')
  file_format = format_of(path)
  if not path.is_file():
    raise UserError(f'no file {str(path)!r}{nearest_file(path)}')
  if (part := re.search(r'-\d{5}-of-(\d{5})$', path.stem)) and int(part[1]) > 1:
    raise UserError(f'{path} is one of {int(part[1])} parts of a model; join them in one file')
  check_sha256(path)
  tensors = file_format.read(path)
  if not tensors:
    raise UserError(f'{path}: no tensors in this file; it must hold those of a model')
  return tensors


def read_metadata(path: Path) -> dict[str, str]:
  """Returns the texts that a file holds beside its tensors; {} for a format that has no place for them.

  Raises:
    UserError: if the file is damaged.
  """
  read = format_of(path).read_metadata
  return read(path) if read else {}


def write_tensors(path: Path, tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str] | None = None) -> str:
  """Writes a file of tensors and `<path>.sha256` beside it; the file appears whole or not at all.

  Args:
    path: ends in .safetensors, .pth or .pt.
    tensors: name -> array of float32, float16, bfloat16 or float64, of any shape.
    metadata: texts to keep beside them, where the format has a place for them.

  Returns:
    The sha256, as hexadecimal digits.

  Raises:
    UserError: if there is such a file already, or torch is needed and missing. StorageError: if it cannot be written.
  """
  file_format = format_of(path)
  if path.exists():
    raise UserError(f'{str(path)!r} already exists; remove it or choose another name')
  data = file_format.to_bytes(tensors, dict(metadata or {}))
  digest = hashlib.sha256(data).hexdigest()
  with storage_errors(path):
    path.parent.mkdir(parents=True, exist_ok=True)
  write_file(sha256_path(path), f'{digest}  {path.name}\n'.encode())  # first: no file is ever without it
  try:
    write_file(path, data)
  except BaseException:
    if not path.exists():
      sha256_path(path).unlink(missing_ok=True)
    raise
  return digest


def _safetensors_bytes(tensors: Mapping[str, np.ndarray], metadata: dict[str, str]) -> bytes:
  plain = {name: np.ascontiguousarray(value) for name, value in tensors.items()}  # save ignores strides
  return _in_order(save(plain, metadata or None))


def _in_order(data: bytes) -> bytes:
  """Returns a .safetensors file with its metadata sorted: the library's order varies, and with it the hash."""
  end = 8 + int.from_bytes(data[:8], 'little')
  header = json.loads(data[8:end])
  ordered = {name: dict(sorted(entry.items())) if name == '__metadata__' else entry for name, entry in header.items()}
  text = json.dumps(ordered, ensure_ascii=False, separators=(',', ':')).encode()
  return b''.join((data[:8], text.ljust(end - 8), memoryview(data)[end:]))


def _read_safetensors(path: Path) -> dict[str, np.ndarray]:
  tensors = {}
  with _open_safetensors(path) as file:
    for name in file.keys():  # noqa: SIM118 - not a dict
      if not is_buffer(name):
        dtype = file.get_slice(name).get_dtype()
        if dtype not in _SAFETENSORS_DTYPES:
          raise UserError(f'{path}: tensor {name[:80]!r} is {dtype}, must be one of {", ".join(DTYPES)}')
        tensors[name] = file.get_tensor(name)
  return tensors


def _read_safetensors_metadata(path: Path) -> dict[str, str]:
  with _open_safetensors(path) as file:
    return file.metadata() or {}


@contextmanager
def _open_safetensors(path: Path) -> Iterator[Any]:
  try:
    with safe_open(path, framework='numpy') as file:
      yield file
  except UserError:
    raise
  except (SafetensorError, OSError, ValueError) as error:
    raise UserError(f'{path}: not a whole safetensors file: {error}') from error


@dataclasses.dataclass(frozen=True)
class Format:
  """How one format of files is read and written; a row of FORMATS.

  Attributes:
    read: path -> name -> array of one of DTYPES, without known buffers; raises UserError for anything else.
    to_bytes: (tensors, metadata) -> what a file of them holds.
    read_metadata: path -> the texts beside the tensors; None if the format has no place for them.
  """

  read: Callable[[Path], dict[str, np.ndarray]]
  to_bytes: Callable[[Mapping[str, np.ndarray], dict[str, str]], bytes]
  read_metadata: Callable[[Path], dict[str, str]] | None = None


_TORCH = Format(read_torch, lambda tensors, metadata: torch_bytes(tensors))
FORMATS = {  # how a file's name ends -> format
  '.safetensors': Format(_read_safetensors, _safetensors_bytes, _read_safetensors_metadata),
  '.pth': _TORCH,
  '.pt': _TORCH,
}


def format_of(path: Path) -> Format:
  """Returns the format that a file's name names; raises UserError if it names none."""
  if path.suffix.lower() not in FORMATS:
    raise UserError(f'{str(path)!r} must end in one of {", ".join(FORMATS)}')
  return FORMATS[path.suffix.lower()]
