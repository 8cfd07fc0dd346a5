# Sourced by quickstart.sh and run_tests.sh: makes .venv, installs mmjax with the extras in $1 and puts it on the PATH.
# A second call with the same pyproject.toml and Python reuses what is there. PYTHON chooses the interpreter.

fail() {
  echo "$*" >&2
  exit 2
}

make_venv() {
  local python=$1
  "$python" -m venv .venv >/dev/null 2>&1 && return
  # Debian without python3-venv has the venv module but no ensurepip: let the system's pip fill the environment.
  rm -rf .venv
  "$python" -m pip --version >/dev/null 2>&1 && "$python" -m venv --without-pip .venv >/dev/null 2>&1 &&
    "$python" -m pip --python .venv/bin/python install -q pip && return
  rm -rf .venv
  "$python" -m virtualenv -q .venv >/dev/null 2>&1 && return
  if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
    echo "Installing python3-venv with apt-get ..."
    apt-get update -qq && apt-get install -y -qq python3-venv >/dev/null
    rm -rf .venv
    "$python" -m venv .venv && return
  fi
  rm -rf .venv
  fail "No virtual environment can be made with $python: install the package python3-venv (or pip) and run this again."
}

set_up_environment() {
  local extras=$1 python=${PYTHON:-python3} stamp
  command -v "$python" >/dev/null || fail "No $python found: install Python 3.11 or newer, or set PYTHON to one."
  "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
    fail "$("$python" --version) is too old: mmjax needs Python 3.11 or newer. Set PYTHON to one."
  [ -x .venv/bin/python ] && .venv/bin/python -c 'import pip' 2>/dev/null || { rm -rf .venv; make_venv "$python"; }
  stamp=".venv/installed-${extras:-base}-$(cat pyproject.toml | sha256sum | cut -c1-16)"
  if [ ! -e "$stamp" ]; then
    echo "Installing packages into .venv (once; a few minutes, most of it download) ..."
    .venv/bin/python -m pip install -q --disable-pip-version-check -e ".${extras:+[$extras]}" ||
      fail "Packages could not be installed; the lines above say why. Run this again to go on."
    touch "$stamp"
  fi
  export PATH="$PWD/.venv/bin:$PATH"
}
