"""Which CUDA build a driver runs, found with stand-ins for nvidia-smi and /proc, and what a run says of its device."""

from types import SimpleNamespace

import pytest

from mmjax.run import nvidia
from mmjax.run.nvidia import Driver, cuda_extra, describe_devices, find_driver

CPU = [SimpleNamespace(platform='cpu', device_kind='cpu')]


@pytest.fixture
def smi(tmp_path, monkeypatch):
  """A machine whose nvidia-smi says what it is given, and which has no other sign of a driver."""
  for name in ('CUDA_VISIBLE_DEVICES', 'JAX_PLATFORMS'):
    monkeypatch.delenv(name, raising=False)
  monkeypatch.setattr(nvidia, 'PROC', tmp_path / 'version')
  monkeypatch.setenv('PATH', str(tmp_path))

  def no_library(name: str) -> None:
    raise OSError(name)

  monkeypatch.setattr(nvidia.ctypes, 'CDLL', no_library)

  def says(text: str, code: int = 0) -> None:
    script = tmp_path / 'nvidia-smi'
    script.write_text(f"#!/bin/sh\necho '{text}'\nexit {code}\n")
    script.chmod(0o755)

  return says


@pytest.mark.parametrize(
  ('text', 'extra'),
  [
    ('525.60.13, 8.6', 'cuda12'),
    ('570.86.15, 8.9', 'cuda12'),
    ('580.65.06, 9.0', 'cuda13'),
    ('580.65.06, 7.0', 'cuda12'),  # CUDA 13 knows no V100
    ('580.65.06, 9.0\n580.65.06, 6.1', 'cuda12'),
    ('595.10, 12.0', 'cuda13'),
    ('610.1', 'cuda13'),  # an nvidia-smi that does not know compute_cap
    ('470.57, 3.5', ''),
    ('390.157', ''),
  ],
)
def test_driver_decides_which_build_is_installed(smi, text, extra):
  smi(text)
  found, why_not = cuda_extra(find_driver(), (3, 12))
  assert found == extra and bool(why_not) == (not extra) and why_not.count('. ') == 0


def test_python_that_is_too_old_is_named(smi):
  smi('570.86.15, 8.9')
  extra, why_not = cuda_extra(find_driver(), (3, 11, 7))
  assert not extra and '3.12' in why_not and '3.11' in why_not and why_not.count('. ') == 0


def test_driver_is_found_without_nvidia_smi(smi, monkeypatch):
  assert find_driver() is None
  nvidia.PROC.write_text('NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.104.05  Sat Aug 19 01:15:15 UTC 2023\n')
  assert find_driver() == Driver('535.104.05', 12)
  nvidia.PROC.write_text(
    'NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.65.06  Release Build  (dvs-builder@U22)\n'
  )
  assert find_driver().cuda == 13


def test_driver_is_found_by_its_library_alone(smi, monkeypatch):
  def version(at: object) -> int:
    at._obj.value = 12040
    return 0

  libcuda = SimpleNamespace(cuInit=lambda flags: 0, cuDriverGetVersion=version)
  monkeypatch.setattr(nvidia.ctypes, 'CDLL', lambda name: libcuda)
  assert cuda_extra(find_driver(), (3, 13)) == ('cuda12', '')
  libcuda.cuInit = lambda flags: 100  # CUDA_ERROR_NO_DEVICE
  assert find_driver() is None


def test_nvidia_smi_without_a_driver_is_no_driver(smi):
  smi('NVIDIA-SMI has failed because it could not communicate with the NVIDIA driver.', 9)
  assert find_driver() is None


@pytest.mark.parametrize(
  ('name', 'value'), [('CUDA_VISIBLE_DEVICES', ''), ('CUDA_VISIBLE_DEVICES', '-1'), ('JAX_PLATFORMS', 'cpu')]
)
def test_gpu_that_is_left_alone_on_purpose_is_not_spoken_of(smi, monkeypatch, name, value):
  smi('570.86.15, 8.9')
  assert find_driver()
  monkeypatch.setenv(name, value)
  assert find_driver() is None
  assert describe_devices(CPU).startswith('Device: CPU, ')
  for cores, said in ((1, '1 core'), (2, '2 cores')):
    monkeypatch.setattr('mmjax.environment.count_cores', lambda cores=cores: cores)
    assert describe_devices(CPU) == f'Device: CPU, {said}'


def test_run_says_its_device_and_what_makes_it_a_gpu(smi, monkeypatch):
  assert describe_devices([SimpleNamespace(platform='gpu', device_kind='NVIDIA L4')] * 2) == 'Device: 2 x NVIDIA L4'
  assert 'NVIDIA' not in describe_devices(CPU)
  smi('570.86.15, 8.9')
  monkeypatch.setattr(nvidia, 'OLDEST_PYTHON', (3, 11))
  monkeypatch.setattr(nvidia.util, 'find_spec', lambda name: None)
  assert "install 'jax[cuda12]'" in describe_devices(CPU)
  monkeypatch.setattr(nvidia.util, 'find_spec', lambda name: name == 'jax_cuda12_plugin' or None)
  assert 'JAX_PLATFORMS=cuda shows why' in describe_devices(CPU)
  smi('470.57, 3.5')
  assert 'too old' in describe_devices(CPU)
