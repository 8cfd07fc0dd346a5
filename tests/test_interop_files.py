"""Files of tensors from anywhere: nothing in them is run, only plain floating tensors come in, hashes are checked."""

import json
import os
import struct
import subprocess
import zipfile
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip('torch')

from mmjax.errors import StorageError, UserError  # noqa: E402
from mmjax.files import write_file  # noqa: E402
from mmjax.interop.files import read_metadata, read_tensors, write_tensors  # noqa: E402


class Malicious:
  """Unpickling this runs a shell command."""

  def __init__(self, target: Path):
    self.target = target

  def __reduce__(self):
    return os.system, (f'touch {self.target}',)


@pytest.mark.parametrize('wrap', [lambda x: x, lambda x: {'model': x}, lambda x: {'a': torch.ones(3), 'b': x}])
def test_a_pickle_that_runs_code_is_refused_by_name_and_not_run(wrap, tmp_path):
  path, target = tmp_path / 'model.pth', tmp_path / 'was-run'
  torch.save(wrap(Malicious(target)), path)
  with pytest.raises(UserError, match=r'(posix|nt)\.system'):
    read_tensors(path)
  assert not target.exists()
  torch.load(path, weights_only=False)  # the file is what it says: opened carelessly, it does run
  assert target.exists()


def rewrite_zip(path: Path, compression: int = zipfile.ZIP_STORED, extra: str = '') -> None:
  with zipfile.ZipFile(path) as archive:
    records = [(name, archive.read(name)) for name in archive.namelist()]
  with zipfile.ZipFile(path, 'w', compression) as archive:
    for name, data in records + ([(extra, b'x')] if extra else []):
      archive.writestr(name, data)


def test_damaged_and_disguised_torch_files_are_refused(tmp_path):
  def refused(name: str, message: str, damage) -> None:
    path = tmp_path / f'{name}.pth'
    torch.save({'norm.weight': torch.arange(64.0)}, path)
    damage(path)
    with pytest.raises(UserError, match=message):
      read_tensors(path)

  refused('cut', 'damaged or cut short', lambda p: p.write_bytes(p.read_bytes()[:-200]))
  refused('empty', 'empty', lambda p: p.write_bytes(b''))
  refused('part-00001-of-00002', 'is one of 2 parts of a model; join them in one file', lambda p: None)
  refused('junk', 'not a PyTorch zip file', lambda p: p.write_bytes(b'junk'))
  refused('bomb', 'is compressed', lambda p: rewrite_zip(p, zipfile.ZIP_DEFLATED))
  refused('dots', 'names a file outside the archive', lambda p: rewrite_zip(p, extra='../outside'))
  refused('old', 'not a PyTorch zip file', lambda p: torch.save({}, p, _use_new_zipfile_serialization=False))
  refused(
    'pickle', 'not a whole PyTorch file', lambda p: p.write_bytes(p.read_bytes().replace(b'\x80\x02}', b'\x80\x02('))
  )
  refused('vast', 'more than the file holds', lambda p: torch.save({'a': torch.zeros(1).expand(10**6, 10**6)}, p))
  refused('sparse', 'not a tensor|must be dense', lambda p: torch.save({'a': torch.eye(3).to_sparse()}, p))
  refused('list', 'holds a list', lambda p: torch.save([torch.ones(2)], p))
  refused('number', "'a' is a int, not a tensor", lambda p: torch.save({'a': 1}, p))


def safetensors_bytes(header: dict, data: bytes, length: int | None = None) -> bytes:
  text = json.dumps(header).encode()
  return struct.pack('<Q', len(text) if length is None else length) + text + data


@pytest.mark.parametrize(
  'content',
  [
    b'',
    b'abc',
    safetensors_bytes({'a': {'dtype': 'F32', 'shape': [2**40, 2**40], 'data_offsets': [0, 8]}}, b'0' * 8),
    safetensors_bytes({'a': {'dtype': 'F32', 'shape': [4], 'data_offsets': [0, 16]}}, b'0' * 8),
    safetensors_bytes({'a': {'dtype': 'F32', 'shape': [2], 'data_offsets': [0, 8]}}, b'0' * 80),
    safetensors_bytes({'a': {'dtype': 'F32', 'shape': [2], 'data_offsets': [0, 8]}}, b'0' * 8, length=2**60),
    safetensors_bytes({'a': {'dtype': 'F32', 'shape': [-2], 'data_offsets': [0, 8]}}, b'0' * 8),
    safetensors_bytes({'a': {'dtype': 'I64', 'shape': [1], 'data_offsets': [0, 8]}}, b'0' * 8),
  ],
)
def test_lying_safetensors_are_refused(content, tmp_path):
  path = tmp_path / 'model.safetensors'
  path.write_bytes(content)
  with pytest.raises(UserError, match='not a whole safetensors file|must be one of'):
    read_tensors(path)


@pytest.mark.parametrize('suffix', ['.safetensors', '.pth'])
def test_a_changed_byte_is_noticed_by_the_hash_beside_it(suffix, tmp_path):
  path = tmp_path / f'model{suffix}'
  digest = write_tensors(path, {'a': np.arange(50, dtype=np.float32)})
  beside = Path(f'{path}.sha256')
  assert beside.read_text() == f'{digest}  {path.name}\n'
  assert path.stat().st_mode == beside.stat().st_mode
  assert subprocess.run(['sha256sum', '-c', beside.name], cwd=tmp_path, capture_output=True).returncode == 0
  content = bytearray(path.read_bytes())
  content[-100] ^= 1
  path.write_bytes(content)
  with pytest.raises(UserError, match=f'sha256 is .*; it is damaged, .*: then remove {path.name}.sha256'):
    read_tensors(path)


@pytest.mark.parametrize('error', [StorageError, KeyboardInterrupt])
def test_file_that_is_not_written_to_its_end_leaves_no_hash(tmp_path, monkeypatch, error):
  def write(path, data):
    if path.suffix == '.safetensors':
      raise error
    write_file(path, data)

  monkeypatch.setattr('mmjax.interop.files.write_file', write)
  with pytest.raises(error):
    write_tensors(tmp_path / 'a.safetensors', {'a': np.zeros(9, np.float32)})
  assert not list(tmp_path.iterdir())


def test_same_content_is_written_as_the_same_bytes(tmp_path):
  texts = {name: 'ä"\n\x01\u2028' for name in 'zyxabc'}
  tensors = {'b': np.ones((2, 3), np.float32), 'ä': np.zeros(5, np.float16)}
  found = {write_tensors(tmp_path / f'{i}.safetensors', tensors, texts) for i in range(8)}
  assert len(found) == 1
  assert read_metadata(tmp_path / '0.safetensors') == texts
  np.testing.assert_array_equal(read_tensors(tmp_path / '0.safetensors')['b'], tensors['b'])


def test_transposed_arrays_are_written_as_they_read(tmp_path):
  value = np.arange(6, dtype=np.float32).reshape(2, 3).T
  write_tensors(tmp_path / 'a.safetensors', {'a': value})
  np.testing.assert_array_equal(read_tensors(tmp_path / 'a.safetensors')['a'], value)
