#!/usr/bin/env bash
# Fresh machine -> environment with the test extras, linter, whole fast suite. Arguments go to pytest.
#   ./run_tests.sh -m thorough      rarer variants and longer runs
#   ./run_tests.sh -m campaign      processes killed 20 times; --faults=1000 for more
#   ./run_tests.sh -m slow          parity at full size, every experiment through every command, several processes
set -euo pipefail
cd "$(dirname "$0")"
. scripts/environment.sh
set_up_environment "test,torch"

ruff check .
ruff format --check .
exec python -m pytest -q -n 2 --dist worksteal "$@"
