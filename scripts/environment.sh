# Sourced by quickstart.sh, run_tests.sh and .ci/run: makes an environment, installs mmjax with extras, puts it on the PATH.
# A second call with the same pyproject.toml reuses what is there. Whoever calls may set
#   PYTHON    the interpreter; without it, that of the environment that is there, else the newest that works
#   VENV      where the environment lies (default: .venv)

VENV=${VENV:-.venv}

fail() {
  echo "$*" >&2
  exit 2
}

# Whether an interpreter runs, is a released CPython with the usual lock (others find no wheels), is as new as $2 and can
# import what mmjax does, and the module $3.
works() {
  [ -n "$1" ] && OLDEST=$2 "$1" -c "import os, sys, sysconfig, bz2, ctypes, lzma, ssl, venv, zlib, ${3:-os}
oldest = tuple(map(int, os.environ['OLDEST'].split('.')))
sys.exit(sys.version_info < oldest or sys.version_info.releaselevel != 'final'
         or sys.implementation.name != 'cpython' or bool(sysconfig.get_config_var('Py_GIL_DISABLED')))" >/dev/null 2>&1
}

# Lists interpreters that work, newest version first: on the PATH, of pyenv (whose names on the PATH may not run), of uv.
find_pythons() {
  local oldest=$1 minor python found=''
  for minor in 14 13 12 11; do
    for python in "$(command -v python3.$minor)" "${PYENV_ROOT:-$HOME/.pyenv}"/versions/3.$minor.*/bin/python3.$minor \
      "${UV_PYTHON_INSTALL_DIR:-$HOME/.local/share/uv/python}"/cpython-3.$minor.*/bin/python3.$minor; do
      works "$python" "$oldest" ensurepip && found=yes && echo "$python" && break
    done
  done
  [ "$found" ] || { python=$(command -v python3) && works "$python" "$oldest" && echo "$python"; }  # see make_venv
  return 0
}

# Says which Python an interpreter is, the same for an environment as for what it was made of; nothing if it does not run.
origin_of() {
  "$1" -c 'import os, sys; print(sys.version, os.path.realpath(sys.base_prefix))' 2>/dev/null
}

make_venv() {
  local python=$1
  rm -rf "$VENV"
  "$python" -m venv "$VENV" >/dev/null 2>&1 && return
  # Debian without python3-venv has the venv module but no ensurepip: let the system's pip fill the environment.
  rm -rf "$VENV"
  "$python" -m pip --version >/dev/null 2>&1 && "$python" -m venv --without-pip "$VENV" >/dev/null 2>&1 &&
    "$python" -m pip --python "$VENV/bin/python" install -q pip && return
  rm -rf "$VENV"
  "$python" -m virtualenv -q "$VENV" >/dev/null 2>&1 && return
  if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
    echo "Installing python3-venv with apt-get ..."
    apt-get update -qq && apt-get install -y -qq python3-venv >/dev/null
    rm -rf "$VENV"
    "$python" -m venv "$VENV" && return
  fi
  rm -rf "$VENV"
  fail "No virtual environment can be made with $python: install the package python3-venv (or pip) and run this again."
}

# The CUDA extra for this machine's driver and an interpreter, or nothing, with the reason on stderr where there is one.
cuda_extra() {
  "$1" -I mmjax/run/nvidia.py
}

pip_install() {
  "$VENV/bin/python" -m pip install -q --disable-pip-version-check "$@"
}

# Fills the environment. Fails only where packages are not to be had for its Python; everything else ends the script.
install() {
  local extras=$1 log=$VENV/install.log
  echo "Installing packages into $VENV with $("$VENV/bin/python" --version) (once; a few minutes, most of it download) ..."
  if [[ ,$extras, == *,torch,* && $(uname) == Linux ]]; then
    local torch
    # The usual build for Linux brings several GB of CUDA; this one comes from where pip is set up to look.
    torch=$(sed -n 's/^torch = \["\(.*\)"\]/\1/p' pyproject.toml)+cpu
    pip_install "$torch" 2>/dev/null || { echo "No CPU build of torch is at hand for it."; return 1; }
  fi
  pip_install -e ".${extras:+[$extras]}" 2>&1 | tee "$log" >&2
  [ "${PIPESTATUS[0]}" != 0 ] || return 0
  if grep -qiE 'no matching distribution|conflicting dependencies|failed to build|subprocess-exited' "$log" &&
    ! grep -qiE 'connection|timed out|no space left' "$log"; then
    return 1
  fi
  fail "Packages could not be installed; the lines above say why. Run this again to go on."
}

# set_up_environment EXTRAS [OLDEST]
#   EXTRAS  of pyproject.toml; `gpu` stands for `train` with the CUDA build that this machine's driver runs, if it has
#           one, and `torch` is left out where there is no CPU build of it
#   OLDEST  Python version that can be used
set_up_environment() {
  local extras=$1 oldest=${2:-3.11} python stamp
  if [ -n "${PYTHON:-}" ]; then
    command -v "$PYTHON" >/dev/null || fail "No $PYTHON found: install Python $oldest or newer, or set PYTHON to one."
    [ -n "$(origin_of "$PYTHON")" ] || fail "$PYTHON does not run: set PYTHON to another Python, $oldest or newer."
    works "$PYTHON" "$oldest" || fail \
      "$PYTHON ($("$PYTHON" --version)) cannot be used: mmjax needs CPython $oldest or newer with bz2, ctypes, lzma," \
      "ssl and venv. Set PYTHON to one."
    set -- "$PYTHON"
  else
    IFS=$'\n'
    set -- $(find_pythons "$oldest")
    IFS=$' \t\n'
    [ $# != 0 ] || fail "No Python $oldest or newer found that runs and has bz2, ctypes, lzma, ssl and venv: install one," \
      "or set PYTHON to it."
  fi
  python="$VENV/bin/python"
  if works "$python" "$oldest" pip; then
    if [ -n "${PYTHON:-}" ] && [ "$(origin_of "$python")" != "$(origin_of "$1")" ]; then
      echo "$VENV holds $("$python" --version) and PYTHON=$PYTHON is another: $VENV is made anew."
    elif [ "$extras" = gpu ] && [ -z "$(cuda_extra "$python" 2>/dev/null)" ] && [ -n "$(cuda_extra "$1" 2>/dev/null)" ]; then
      echo "$VENV holds $("$python" --version), which is too old for JAX on this machine's GPU: $VENV is made anew."
    else
      set -- "$python"
    fi
  fi
  if [ "$extras" = gpu ]; then
    local cuda
    cuda=$(cuda_extra "$1")
    extras=train${cuda:+,$cuda}
    [ -z "$cuda" ] || echo "An NVIDIA driver is here: JAX with its ${cuda/cuda/CUDA } build is installed, several GB" \
      "(JAX_PLATFORMS=cpu ./quickstart.sh avoids that)."
  fi
  stamp="$VENV/installed-${extras:-base}-$(cat pyproject.toml | sha256sum | cut -c1-16)"
  if [ "$1" != "$python" ] || [ ! -e "$stamp" ]; then
    try_all "$extras" "$@" || { [[ $extras == *,torch ]] && try_all "${extras%,torch}" "$@"; } ||
      fail "Packages could not be installed for $*; the lines above say why. Set PYTHON to another."
    touch "$stamp"
  fi
  PATH="$(cd "$VENV/bin" && pwd):$PATH"
  export PATH
}

# Installs EXTRAS with the first of the interpreters for which packages are at hand.
try_all() {
  local extras=$1 python
  shift
  for python in "$@"; do
    [ "$python" = "$VENV/bin/python" ] || { echo "Making an environment in $VENV with $python ..." && make_venv "$python"; }
    install "$extras" && return
  done
  return 1
}
