"""scripts/environment.sh with stand-ins for interpreters, pip and nvidia-smi: Python, extras, and what it says."""

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers import REPOSITORY

STUBS = """
. scripts/environment.sh
make_venv() { rm -rf "$VENV"; mkdir -p "$VENV/bin"; cp "$1" "$VENV/bin/python"; echo "made $VENV with $1"; }
pip_install() { echo "pip $*"; ! grep -q "no packages" "$VENV/bin/python" || { echo "ERROR: $REASON"; return 1; }; }
set_up_environment "$@"
echo "uses $(command -v python)"
"""


@pytest.fixture
def machine(tmp_path):
  """A checkout on a machine whose PATH has the tools of the system and the interpreters that a test lays there."""
  for name in ('scripts/environment.sh', 'mmjax/run/nvidia.py', 'pyproject.toml'):
    (tmp_path / 'checkout' / name).parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(REPOSITORY / name, tmp_path / 'checkout' / name)
  (tmp_path / 'bin').mkdir()
  for tool in (
    'bash',
    'sh',
    'cat',
    'cp',
    'cut',
    'grep',
    'head',
    'mkdir',
    'rm',
    'sed',
    'sha256sum',
    'tee',
    'touch',
    'uname',
  ):
    (tmp_path / 'bin' / tool).symlink_to(shutil.which(tool))

  class Machine:
    def lay(self, path: str, note: str = '', body: str = f'exec {sys.executable} "$@"') -> Path:
      """Lays an executable script; `note` is a comment that pip's stand-in reads."""
      script = tmp_path / path
      script.parent.mkdir(parents=True, exist_ok=True)
      script.write_text(f'#!/bin/sh\n# {note}\n{body}\n')
      script.chmod(0o755)
      return script

    def set_up(self, extras: str = '', oldest: str = '3.11', **variables: str) -> subprocess.CompletedProcess:
      variables = {'PATH': str(tmp_path / 'bin'), 'HOME': str(tmp_path / 'home'), 'REASON': '', **variables}
      command = ['bash', '-euo', 'pipefail', '-c', STUBS, 'set-up', extras, oldest]
      return subprocess.run(command, cwd=tmp_path / 'checkout', env=variables, capture_output=True, text=True)

  return Machine()


def broken(machine, path: str) -> None:
  machine.lay(path, body='echo "pyenv: command not found" >&2; exit 127')


def test_newest_python_that_really_runs_is_taken_wherever_it_lies(machine):
  broken(machine, 'bin/python3.14')
  broken(machine, 'bin/python3.13')
  machine.lay('bin/python3.11')
  assert 'made .venv with' in (done := machine.set_up()).stdout and 'bin/python3.11' in done.stdout
  shutil.rmtree(Path(done.stdout.split('uses ')[1].strip()).parents[1])
  of_uv = machine.lay('home/.local/share/uv/python/cpython-3.12.4-linux/bin/python3.12')
  assert f'made .venv with {of_uv}\n' in machine.set_up().stdout
  shutil.rmtree(of_uv.parents[6] / '../checkout/.venv')
  of_pyenv = machine.lay('home/.pyenv/versions/3.13.0/bin/python3.13')
  assert f'made .venv with {of_pyenv}\n' in machine.set_up().stdout


def test_second_call_installs_nothing_and_another_python_makes_it_anew(machine):
  first = machine.lay('bin/python3.11')
  assert f'made .venv with {first}\n' in machine.set_up().stdout
  again = machine.set_up()
  assert 'made' not in again.stdout and 'pip' not in again.stdout and '.venv/bin/python' in again.stdout
  assert 'made' not in machine.set_up(PYTHON='python3.11').stdout
  other = machine.lay(
    'bin/other', body=f'case "$2" in *base_prefix*) echo other;; *) exec {sys.executable} "$@";; esac'
  )
  done = machine.set_up(PYTHON=str(other))
  assert 'is another: .venv is made anew' in done.stdout and f'made .venv with {other}\n' in done.stdout
  assert 'made .venv-2 with' in machine.set_up(PYTHON=str(first), VENV='.venv-2').stdout


def test_python_that_does_not_do_is_one_sentence(machine):
  machine.lay('bin/python3.11')
  broken(machine, 'bin/python3.12')
  for variables, oldest, said in (
    ({'PYTHON': 'python3.12'}, '3.11', 'python3.12 does not run'),
    ({'PYTHON': 'python3.9'}, '3.11', 'No python3.9 found'),
    ({'PYTHON': 'python3.11'}, '3.99', 'needs CPython 3.99 or newer'),
    ({}, '3.99', 'No Python 3.99 or newer found'),
  ):
    done = machine.set_up('', oldest, **variables)
    assert done.returncode == 2 and said in done.stderr and done.stderr.count('\n') == 1, done


def test_older_python_is_taken_where_the_newest_has_no_packages(machine):
  newest, older = machine.lay('bin/python3.14', note='no packages'), machine.lay('bin/python3.11')
  done = machine.set_up(REASON='No matching distribution found for grain')
  assert f'made .venv with {newest}\n' in done.stdout and f'made .venv with {older}\n' in done.stdout
  assert done.returncode == 0
  alone = machine.set_up(PYTHON=str(newest), VENV='.venv-2', REASON='No matching distribution found for grain')
  assert alone.returncode == 2 and 'Set PYTHON to another' in alone.stderr


def test_fault_of_the_network_does_not_make_another_environment(machine):
  machine.lay('bin/python3.14', note='no packages')
  older = machine.lay('bin/python3.11')
  done = machine.set_up(REASON='Connection broken. No matching distribution found for grain')
  assert done.returncode == 2 and str(older) not in done.stdout and 'Run this again' in done.stderr


@pytest.mark.skipif(sys.platform != 'linux', reason='an NVIDIA driver')
@pytest.mark.parametrize(
  ('driver', 'extra', 'said'),
  [('570.86.15, 8.9', 'cuda12', ''), ('580.65.06, 9.0', 'cuda13', ''), ('470.57, 3.5', '', 'too old for JAX')],
)
def test_driver_decides_what_quickstart_installs(machine, driver, extra, said):
  machine.lay('bin/python3')
  machine.lay('bin/nvidia-smi', body=f"echo '{driver}'")
  if sys.version_info < (3, 12):
    extra, said = '', said or 'needs Python 3.12 or newer'
  done = machine.set_up('gpu')
  assert done.returncode == 0 and said in done.stderr and done.stderr.count('\n') == 1 + bool(said)
  assert f'pip -e .[train{"," * bool(extra)}{extra}]\n' in done.stderr
  left_alone = machine.set_up('gpu', JAX_PLATFORMS='cpu').stderr
  assert left_alone == ('pip -e .[train]\n' if extra else '')


@pytest.mark.parametrize('first', ['old', 'new'])
def test_ci_runs_the_suite_on_two_pythons_and_ahead_where_it_can(machine, tmp_path, first):
  bodies = {'old': '[ "$OLDEST" = 3.11 ]', 'new': 'exit 0'}  # whether it is as new as `works` asks
  shutil.copytree(REPOSITORY / '.ci', tmp_path / 'checkout/.ci')
  machine.lay('checkout/run_tests.sh', body='echo "$PYTHON $VENV $*"')
  for path in ('bin/python3.14', 'bin/python3.13', 'checkout/.venv-ahead/bin/python'):
    machine.lay(path, body=bodies['new'])
  machine.lay('bin/python3.11', body=bodies['old'])
  machine.lay('checkout/.venv/bin/python', body=bodies[first])
  for tool in ('dirname', 'tail'):
    (tmp_path / 'bin' / tool).symlink_to(shutil.which(tool))
  variables = {'PATH': str(tmp_path / 'bin'), 'HOME': str(tmp_path)}
  done = subprocess.run(['bash', '.ci/run'], cwd=tmp_path / 'checkout', env=variables, capture_output=True, text=True)
  other = tmp_path / 'bin' / {'old': 'python3.14', 'new': 'python3.11'}[first]
  lines = [line.strip() for line in done.stdout.splitlines()]
  thorough = lines.pop(2).split()
  runs = ['-m not slow and not gpu and not ahead', f'{other} .venv-other', '-m ahead']
  assert lines == runs and done.returncode == 0, done
  assert thorough[:4] == [str(other), '.venv-other', '-m', 'thorough'] and len(thorough) > 4
  assert all((REPOSITORY / file).is_file() for file in thorough[4:])


def test_quickstart_trains_and_evaluates_and_says_what_to_type_next(tmp_path, monkeypatch):
  monkeypatch.delenv('VENV', raising=False)  # of the tests themselves
  shutil.copy(REPOSITORY / 'quickstart.sh', tmp_path)
  (tmp_path / 'scripts').mkdir()
  (tmp_path / 'scripts/environment.sh').write_text(
    'set_up_environment() { echo "set up $1"; }; python() { echo "$@"; }'
  )
  config = 'configs/quickstart_ngram_rows.py'
  assert (REPOSITORY / config).is_file()
  (tmp_path / 'else').mkdir()
  for given, workdir in (
    ([], 'out/quickstart'),
    (["out/it's mine"], f"{tmp_path}/else/out/it's mine"),
    (['/tmp/mine'], '/tmp/mine'),
  ):
    command = ['bash', tmp_path / 'quickstart.sh', *given]
    done = subprocess.run(command, cwd=tmp_path / 'else', capture_output=True, text=True, check=True)
    lines = done.stdout.splitlines()
    assert lines[:3] == [
      'set up gpu',
      f'train.py --config {config} --workdir {workdir}',
      f'eval.py --workdir {workdir}',
    ]
    sample = next(line for line in lines if 'tools.sample' in line)
    assert shlex.split(sample)[-1] == workdir
    assert sum(workdir.replace("'", r'\'').replace(' ', r'\ ') in line for line in lines[3:]) >= 3
    assert f'(after  cd {tmp_path}; source .venv/bin/activate)' in done.stdout
    place = workdir if workdir.startswith('/') else f'{tmp_path}/{workdir}'
    assert f'Everything lies in {place}:' in done.stdout.replace('\\', '')
  done = subprocess.run(['bash', 'quickstart.sh'], cwd=tmp_path, capture_output=True, text=True, check=True)
  assert '(after  source .venv/bin/activate)' in done.stdout


def test_scripts_are_bash_that_parses():
  for script in ('quickstart.sh', 'run_tests.sh', '.ci/run', 'scripts/environment.sh'):
    subprocess.run(['bash', '-n', REPOSITORY / script], check=True)
    assert script.startswith('scripts') or os.access(REPOSITORY / script, os.X_OK)
