"""PyTorch's zip files (.pth, .pt), read without running anything in them. Torch is imported only when asked for one.

The file goes through torch's restricted unpickler (`weights_only=True`), memory-mapped, so that no record is read
beyond the file's end and none is decompressed. Only plain floating tensors are accepted.
"""

import io
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from mmjax.errors import UserError, first_line
from mmjax.interop.names import is_buffer

DTYPES = ('float32', 'float16', 'bfloat16', 'float64')
NESTED = ('model', 'state_dict', 'model_state_dict')  # keys under which training scripts keep the state dict


def read_torch(path: Path) -> dict[str, np.ndarray]:
  """Reads a .pth without running anything in it; see mmjax.interop.files.read_tensors.

  Raises:
    UserError: if torch is missing, or the file is no whole zip file of torch.save with nothing but floating tensors.
  """
  torch = _import_torch()
  _check_zip(path)
  try:
    content = torch.load(path, map_location='cpu', weights_only=True, mmap=True)
  except Exception as error:  # noqa: BLE001 - a damaged pickle makes the unpickler raise anything
    if code := re.search(r'GLOBAL (\S+)', str(error)):
      what = f'holds {code[1][:80]} besides tensors; nothing in it was run or imported'
    else:
      what = f'not a whole PyTorch file: {first_line(error)}'
    raise UserError(f'{path}: {what}') from error
  state = _state_dict(content, path)
  return {name: _to_numpy(torch, name, value, path) for name, value in state.items() if not is_buffer(name)}


def torch_bytes(tensors: Mapping[str, np.ndarray]) -> bytes:
  """Returns a .pth of arrays, any of DTYPES and any shape, that `load_state_dict(torch.load(path))` takes."""
  torch, file = _import_torch(), io.BytesIO()
  torch.save({name: _to_torch(torch, value) for name, value in tensors.items()}, file)
  return file.getvalue()


def _import_torch() -> Any:
  try:
    import torch
  except ImportError as error:
    raise UserError("reading and writing .pth needs torch: pip install 'mmjax[torch]', or use .safetensors") from error
  return torch


def _check_zip(path: Path) -> None:
  """Refuses archives that torch.save does not write: compressed, overlapping or with paths that leave them."""
  try:
    with zipfile.ZipFile(path) as archive:
      entries = archive.infolist()
  except (zipfile.BadZipFile, ValueError, NotImplementedError) as error:
    with path.open('rb') as file:
      start = file.read(4)
    other = 'not a PyTorch zip file; re-save older ones with torch.save(state_dict, PATH)'
    what = {b'': 'empty', b'PK\x03\x04': 'damaged or cut short'}
    raise UserError(f'{path}: {what.get(start, other)}') from error
  for entry in entries:
    if entry.compress_type != zipfile.ZIP_STORED or entry.file_size != entry.compress_size:
      raise UserError(f'{path}: record {entry.filename[:80]!r} is compressed, which torch.save never does')
    if '..' in entry.filename.split('/') or entry.filename.startswith('/'):
      raise UserError(f'{path}: record {entry.filename[:80]!r} names a file outside the archive')
  if sum(entry.file_size for entry in entries) > path.stat().st_size:
    raise UserError(f'{path}: its records overlap, which torch.save never does')


def _state_dict(content: Any, path: Path) -> dict[str, Any]:
  for key in NESTED:
    if isinstance(content, dict) and isinstance(content.get(key), dict):
      others = [str(other)[:80] for other in content if other != key]
      if others:
        raise UserError(
          f'{path}: holds {", ".join(others)} in addition to {key!r}; save the weights alone: '
          f'torch.save(checkpoint[{key!r}], PATH)'
        )
      content = content[key]
  if not isinstance(content, dict) or not all(isinstance(name, str) for name in content):
    raise UserError(f'{path}: holds a {type(content).__name__}; it must be a dict of named tensors')
  return content


def _to_numpy(torch: Any, name: str, value: Any, path: Path) -> np.ndarray:
  where = f'{path}: {name[:80]!r}'
  if type(value) not in (torch.Tensor, torch.nn.Parameter):
    raise UserError(f'{where} is a {type(value).__name__}, not a tensor')
  dtype = str(value.dtype).removeprefix('torch.')
  if dtype not in DTYPES or value.layout != torch.strided or value.device.type != 'cpu':
    raise UserError(f'{where} is {dtype}, {value.layout}, on {value.device}; it must be dense {" or ".join(DTYPES)}')
  # An expanded tensor of a few bytes may claim any shape.
  if value.numel() * value.element_size() > value.untyped_storage().nbytes():
    raise UserError(f'{where} claims the shape {tuple(value.shape)}, which is more than the file holds')
  value = value.detach().resolve_neg().contiguous()
  if dtype == 'bfloat16':  # numpy has no such type of its own
    return value.view(torch.int16).numpy().view(ml_dtypes.bfloat16).copy()
  return value.numpy().copy()  # leaves the memory map


def _to_torch(torch: Any, value: np.ndarray) -> Any:
  value = np.array(value, order='C')
  if value.dtype == ml_dtypes.bfloat16:
    return torch.from_numpy(value.view(np.int16)).view(torch.bfloat16)
  return torch.from_numpy(value)
