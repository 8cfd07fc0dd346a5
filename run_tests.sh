#!/usr/bin/env bash
# Fresh machine -> environment with the test extras, linter, whole fast suite, on the CPU. Arguments go to pytest.
#   ./run_tests.sh -m thorough      rarer variants and longer runs
#   ./run_tests.sh -m campaign      processes killed 20 times; --faults=1000 for more
#   ./run_tests.sh -m slow          parity at full size, every experiment through every command, several processes
#   ./run_tests.sh -m ahead         train steps compiled for GPUs that are not there: in .venv-ahead, made with JAX's CUDA
#                                   build (Python 3.12, several GB, no driver needed), or with the interpreter
#                                   AHEAD_PYTHON=..., which has JAX's CUDA build and pytest
# PYTHON=python3.12 ./run_tests.sh chooses the interpreter.
set -euo pipefail
cd "$(dirname "$0")"
[[ " $* " == *' -m gpu '* ]] || export JAX_PLATFORMS=cpu
if [[ " $* " == *' -m ahead '* ]]; then
  export JAX_SKIP_CUDA_CONSTRAINTS_CHECK=1
  if [ -n "${AHEAD_PYTHON:-}" ]; then
    exec "$AHEAD_PYTHON" -m pytest -q "$@"
  fi
  VENV=.venv-ahead
  . scripts/environment.sh
  set_up_environment test,cuda12 3.12
  exec python -m pytest -q "$@"
fi

. scripts/environment.sh
set_up_environment test,torch
python -c 'import importlib.util, sys; sys.exit(importlib.util.find_spec("torch") is None)' ||
  echo "Tests that compare with PyTorch are skipped: no CPU build of it is at hand for $(python --version)" \
    "(pip install -e '.[torch]' takes another, of several GB on Linux)."
ruff check .
ruff format --check .
exec python -m pytest -q -n 2 --dist worksteal "$@"
