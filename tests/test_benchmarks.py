"""The benchmark scripts at tiny sizes: that they run, what they write, and that a second call goes on. No timing."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

EACH_SCRIPT = {'throughput_1_4_2', 'sublayer', 'memory_scaling', 'decode', 'cold_start'}
PARTS = EACH_SCRIPT | {'throughput_1_4_0', 'remat_1_4_2', 'limit_24gb_1_4_2', 'triton_1_4_2', 'kernels'}


def run_gpu(*arguments: object, **environment: str) -> subprocess.CompletedProcess:
  command = ['benchmarks/run_gpu.sh', *map(str, arguments)]
  variables = {'PATH': '/usr/bin:/bin', 'PYTHON': sys.executable, 'JAX_PLATFORMS': 'cpu'}
  variables |= {'XLA_FLAGS': os.environ['XLA_FLAGS'], **environment}  # with which tiny programs compile faster
  return subprocess.run(command, capture_output=True, text=True, env=variables)


@pytest.mark.parametrize(
  'asked, parts',
  [
    pytest.param({'PARTS': ' '.join(EACH_SCRIPT)}, EACH_SCRIPT, marks=pytest.mark.thorough, id='each script'),
    pytest.param({}, PARTS, marks=pytest.mark.slow, id='all'),
  ],
)
def test_all_that_a_gpu_is_asked_runs_and_is_not_done_twice(asked, parts, tmp_path):
  first = run_gpu('--quick', tmp_path, COMMIT='abc', **asked)
  assert first.returncode == 0, first.stdout + first.stderr
  assert {path.stem for path in tmp_path.glob('*.json')} == parts
  assert {path.stem for path in tmp_path.glob('*.md')} == parts | {'summary'}
  summary = (tmp_path / 'summary.md').read_text()
  assert all(f'## {name}\n' in summary for name in parts)
  speeds = json.loads((tmp_path / 'throughput_1_4_2.json').read_text())
  assert speeds['commit'] == 'abc'
  assert speeds['sides'][0]['differing_arrays'] == 0 and speeds['sides'][0]['arrays'] > 20
  written = {path: path.stat().st_mtime_ns for path in tmp_path.glob('*.json')}
  again = run_gpu('--quick', tmp_path, **asked)
  assert again.returncode == 0 and again.stdout.count('done before') == len(parts)
  assert written == {path: path.stat().st_mtime_ns for path in tmp_path.glob('*.json')}


@pytest.mark.thorough
def test_a_part_without_time_is_named_and_left_to_the_next_call(tmp_path):
  late = run_gpu('--quick', tmp_path, LIMIT_SECONDS='0')
  assert late.returncode == 1 and late.stdout.count('no time left; run again') == len(PARTS)
  assert not list(tmp_path.glob('*.json'))
  wrong = run_gpu('--fast', tmp_path)
  assert wrong.returncode == 2 and 'argument --fast is not understood' in wrong.stderr
  assert Path('benchmarks/run_gpu.sh').stat().st_mode & 0o111
