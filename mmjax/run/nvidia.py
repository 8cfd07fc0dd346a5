"""Which NVIDIA driver this machine has, which of JAX's CUDA builds it runs, what a run computes on, its datasheet peak.

It needs the standard library alone: scripts/environment.sh runs this file before anything is installed, and prints the
extra of pyproject.toml to install. Source of the limits: https://docs.jax.dev/en/latest/installation.html
"""

import ctypes
import dataclasses
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from importlib import util
from pathlib import Path
from typing import Any

# Custom calls of Triton, Pallas and Mosaic (what Pallas becomes on NVIDIA), and XLA's own Triton fusions.
TRITON = re.compile(r'triton|pallas|mosaic', re.IGNORECASE)
PROC = Path('/proc/driver/nvidia/version')
OLDEST_PYTHON = (3, 12)  # of the builds that the extras cuda12 and cuda13 name
CUDA13_CAPABILITY = 7.5  # of the oldest GPU that CUDA 13 knows

# Dense (not sparse) bf16 peaks with float32 accumulation, FLOP/s, from the makers' datasheets.
BF16_PEAKS = {
  'B200': 2250e12, 'GH200': 989e12, 'H200': 989e12, 'H100 NVL': 835e12, 'H100 PCIe': 756e12, 'H100': 989e12,
  'A100': 312e12, 'A800': 312e12, 'H800': 989e12, 'A10': 125e12, 'A10G': 70e12, 'A30': 165e12, 'A40': 149.7e12,
  'L4': 121e12, 'L40': 181e12, 'L40S': 362e12, 'RTX A6000': 154.8e12, 'RTX 6000 Ada': 364.2e12,
  'RTX 3060': 25.5e12, 'RTX 3080': 59.5e12, 'RTX 3090': 71e12, 'RTX 4070': 58.3e12, 'RTX 4080': 97.5e12,
  'RTX 4090': 165.2e12, 'RTX 5090': 209.5e12,
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Driver:
  """What a driver says of itself: `cuda` is the newest CUDA that it runs, `capability` that of its oldest GPU."""

  name: str
  cuda: int
  capability: float = CUDA13_CAPABILITY


def find_driver() -> Driver | None:
  """Asks nvidia-smi, the kernel, libcuda; None where no driver runs or the environment keeps JAX from the GPUs."""
  hidden = os.environ.get('CUDA_VISIBLE_DEVICES', '0').strip() in ('', '-1')
  unwanted = os.environ.get('JAX_PLATFORMS', '').split(',')[0] not in ('', 'cuda', 'gpu')
  if hidden or unwanted or not sys.platform.startswith('linux'):
    return None
  query = ['nvidia-smi', '--query-gpu=driver_version,compute_cap', '--format=csv,noheader']
  try:
    found = subprocess.run(query, capture_output=True, text=True, timeout=20, check=False).stdout
  except (OSError, subprocess.SubprocessError, UnicodeDecodeError):
    found = ''
  if rows := re.findall(r'^\s*(\d+)([\d.]*)(?:\s*,\s*(\d+\.\d+))?', found, re.MULTILINE):
    capabilities = [float(capability) for _, _, capability in rows if capability]
    return _numbered(rows[0][0] + rows[0][1], min(capabilities, default=CUDA13_CAPABILITY))
  try:
    if row := re.search(r'\s(\d{3,}\.[\d.]+)\s', PROC.read_text()):
      return _numbered(row[1])
  except OSError:
    pass
  try:
    libcuda, version = ctypes.CDLL('libcuda.so.1'), ctypes.c_int()
    if libcuda.cuInit(0) == 0 and libcuda.cuDriverGetVersion(ctypes.byref(version)) == 0:
      return Driver(f'for CUDA {version.value // 1000}', version.value // 1000)
  except (OSError, AttributeError):
    pass
  return None


def _numbered(version: str, capability: float = CUDA13_CAPABILITY) -> Driver:
  major = int(version.split('.')[0])
  return Driver(version, 13 if major >= 580 else 12 if major >= 525 else 11, capability)


def cuda_extra(driver: Driver, python: tuple[int, ...] = sys.version_info) -> tuple[str, str]:
  """Returns the extra that makes JAX use the GPU, or '' and one sentence that says why there is none."""
  if driver.cuda < 12:
    return '', f'NVIDIA driver {driver.name} is too old for JAX, which needs 525 or later: the CPU is used.'
  if tuple(python[:2]) < OLDEST_PYTHON:
    return '', (
      f'NVIDIA driver {driver.name} is here, but JAX for its GPU needs Python 3.12 or newer and this is '
      f'{python[0]}.{python[1]}: the CPU is used; install one, or set PYTHON to it, and run ./quickstart.sh again.'
    )
  return ('cuda13' if driver.cuda >= 13 and driver.capability >= CUDA13_CAPABILITY else 'cuda12'), ''


def describe_devices(devices: Sequence[Any]) -> str:
  """Says what a run computes on and, where that is a CPU although an NVIDIA driver runs, what to type."""
  from mmjax.environment import count_cores  # here, since this file also runs alone

  many = f'{len(devices)} x ' if len(devices) > 1 else ''
  if devices[0].platform != 'cpu':
    return f'Device: {many}{devices[0].device_kind}'
  cores = count_cores()
  said, driver = f'Device: {many}CPU, {cores} core{"s" if cores > 1 else ""}', find_driver()
  if driver is None:
    return said
  extra, why_not = cuda_extra(driver)
  if why_not:
    return f'{said}. {why_not}'
  if any(util.find_spec(f'jax_{name}_plugin') for name in ('cuda12', 'cuda13')):
    return f'{said}, although NVIDIA driver {driver.name} runs and JAX has a CUDA build: JAX_PLATFORMS=cuda shows why.'
  return (
    f'{said}, although NVIDIA driver {driver.name} runs: JAX uses the GPU after  '
    f"{Path(sys.executable).name} -m pip install 'jax[{extra}]'"
  )


def device_peak_flops(device_kind: str, dtype: str) -> float | None:
  """Returns a device's peak in FLOP/s for matrix products in `dtype`, or None where it is not known.

  Args:
    device_kind: as `jax.devices()[0].device_kind` gives it, 'NVIDIA H100 80GB HBM3'.
    dtype: only 'bfloat16' has a peak here; float32 products run at a speed that depends on the TF32 setting.
  """
  if dtype != 'bfloat16' or 'Laptop' in device_kind:
    return None
  names = [name for name in BF16_PEAKS if re.search(rf'\b{name}\b', device_kind)]
  return BF16_PEAKS[max(names, key=len)] if names else None


def count_triton(module: str) -> int:
  """Counts the instructions of a compiled module that call Triton, Pallas or Mosaic, whatever its source is called."""
  return sum(calls_triton(line) for line in module.splitlines() if ' = ' in line)


def calls_triton(instruction: str) -> bool:
  """Tells whether an instruction calls one of them, in the text of a compiled module."""
  return bool(TRITON.search(re.sub(r'metadata=\{[^}]*\}', '', instruction)))


if __name__ == '__main__' and (seen := find_driver()):
  extra, why_not = cuda_extra(seen)
  print(extra)
  print(why_not, end='\n' if why_not else '', file=sys.stderr)
