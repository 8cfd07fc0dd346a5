#!/usr/bin/env bash
# The models of a sweep file at the record's size on a GPU, in pieces that each end in time:
#
#   benchmarks/grid_gpu.sh [--quick] DATA.tar.xz WORK RESULTS [EARLIER.tar.gz]
#
# DATA is made beforehand, where the text is, with benchmarks/grid_data.py. WORK holds the runs between calls: the same
# call goes on where the last one stopped, in the middle of a run. On a machine that does not have that WORK any more,
# EARLIER, the runs.tar.gz of an earlier call, spares the runs that were finished. RESULTS gets compare.md, compare.json,
# four plots and runs.tar.gz: settings, metrics and logs of all runs, without checkpoints.
#
# Of sweeps/memory.py it tunes the learning rate on G0, trains every model at the best rate, then G0 and the two best
# models with two more seeds, and the best one at the other rates. SWEEP=lasting: it trains those of sweeps/lasting.py,
# whose rates are known. LIMIT_SECONDS (540) for one call, TOKENS for each model, ONLY='g0-*,g5-*' for some models,
# PYTHON for the interpreter. From a bare checkout: mmjax need not be installed, its dependencies must.
# --quick runs tiny sizes on any device: a test of this script.
#
# Exit codes: 0 all is done; 75 the time was over, the same call goes on; 2 bad input; others: of a run that failed.
set -uo pipefail
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
PYTHON=${PYTHON:-python3}
LIMIT_SECONDS=${LIMIT_SECONDS:-540}
SPARE_SECONDS=${SPARE_SECONDS:-75} # to compile, save and stop, compare and pack
TOKENS=${TOKENS:-} ONLY=${ONLY:-*} SWEEP=${SWEEP:-memory} SCALE=gpu

fail() {
  echo "$*" >&2
  exit 2
}

if [[ ${1:-} == --quick ]]; then
  SCALE=tiny
  shift
fi
(($# == 3 || $# == 4)) || fail "usage: benchmarks/grid_gpu.sh [--quick] DATA.tar.xz WORK RESULTS [EARLIER.tar.gz]"
[[ $SWEEP == memory || $SWEEP == lasting ]] || fail "SWEEP=$SWEEP must be memory or lasting"
[[ -f $1 ]] || fail "no data archive $1: benchmarks/grid_data.py makes one"
[[ $# == 3 || -f $4 ]] || fail "no archive of earlier runs $4"
mkdir -p "$2" "$3" || exit 2
DATA=$(realpath "$1") WORK=$(realpath "$2") RESULTS=$(realpath "$3") EARLIER=${4:+$(realpath "$4")}
cd "$ROOT" || exit 2
export PYTHONPATH=$ROOT${PYTHONPATH:+:$PYTHONPATH} JAX_COMPILATION_CACHE_DIR=$WORK/cache

"$PYTHON" mmjax/environment.py || exit 2  # says which packages are missing

"$PYTHON" - "$DATA" "$WORK" "$EARLIER" <<'CODE' || exit 2
import sys, tarfile
from pathlib import Path
data, work, earlier = sys.argv[1], Path(sys.argv[2]), sys.argv[3]
for archive, folder, mark in ((data, work / 'data', 'index.json'), (earlier, work / 'runs', 'sweep.json')):
  if archive and not (folder / mark).exists():
    with tarfile.open(archive) as file:
      file.extractall(folder, filter='data')
CODE

best() { # what: 'rate' or 'models'; rate for the latter. Reads what the sweep recorded; empty where it is not there yet.
  "$PYTHON" - "$WORK/runs/sweep.json" "$@" <<'CODE'
import json, re, sys
runs = json.load(open(sys.argv[1]))['runs']
done = {re.fullmatch(r'(g\d+)-lr(.*)-s0', name).groups(): run['loss']
  for name, run in runs.items() if name.endswith('-s0') and run['state'] == 'done' and run['loss'] is not None}
if sys.argv[2] == 'rate':
  rates = {rate: loss for (model, rate), loss in done.items() if model == 'g0'}
  print(min(rates, key=rates.get, default=''))
else:
  models = {model: loss for (model, rate), loss in done.items() if model != 'g0' and float(rate) == float(sys.argv[3])}
  print(','.join(sorted(models, key=models.get)[:2]))
CODE
}

sweep() { # patterns of the runs; arguments of the sweep file
  local only=$1 left=$((LIMIT_SECONDS - SPARE_SECONDS - SECONDS)) settings=()
  shift
  ((left > 0)) || return 75
  for setting in "scale=$SCALE" ${TOKENS:+"tokens=$TOKENS"} "$@"; do settings+=(--set "$setting"); done
  "$PYTHON" -m mmjax.tools.sweep "sweeps/$SWEEP.py" --out "$WORK/runs" --only "$only" "${settings[@]}" \
    --max_minutes "$(awk -v s="$left" 'BEGIN { print s / 60 }')" --config.data.prepared_dir="$WORK/data"
}

grid() { # All that there is to do; a run that failed does not keep the others from being made.
  local rate models code=0
  if [[ $SWEEP == lasting ]]; then
    sweep "$ONLY"
    return
  fi
  sweep '*' || { code=$?; ((code == 75)) && return 75; }
  rate=$(best rate)
  [[ $rate ]] || return $code
  sweep "$ONLY" "learning_rate=$rate" || { code=$?; ((code == 75)) && return 75; }
  models=$(best models "$rate")
  [[ $models ]] || return $code
  sweep "$ONLY" "learning_rate=$rate" "winners=$models" || code=$?
  return $code
}

grid
CODE=$?
if compgen -G "$WORK/runs/*/metrics.jsonl" >/dev/null; then
  if [[ $SWEEP == lasting ]]; then # what all others are compared with
    FIRST=("$WORK"/runs/g0-*-s0)
  else
    FIRST=("$WORK/runs/g0-lr$(best rate)-s0")
  fi
  [[ -d ${FIRST[0]} ]] || FIRST=()
  "$PYTHON" -m mmjax.tools.compare "${FIRST[@]}" "$WORK/runs" --out "$RESULTS" || CODE=$?
  tar -czf "$RESULTS/runs.tar.gz" -C "$WORK/runs" --exclude=checkpoints --exclude=newest_checkpoint \
    --exclude=tensorboard --exclude=lock .
fi
echo "After $SECONDS s, exit code $CODE; results in $RESULTS:"
ls -l "$RESULTS"
exit $CODE
