#!/usr/bin/env bash
# All benchmarks that concern a GPU, in less than 9 minutes a call:   benchmarks/run_gpu.sh [--quick] [--force] [OUT]
#
# From a bare checkout: nothing of mmjax needs to be installed, its dependencies do (PYTHON=... chooses the interpreter,
# COMMIT=... names the checkout where there is no git). torch and pytest join where they are installed. OUT (default
# out/gpu) gets a .md and a .json for each part, logs of what failed, and summary.md. Each part has a time limit, and all
# together have one: a second run skips the parts that are done, does those that failed or had no time left, and finds
# compiled programs in CACHE (default OUT/cache). --force does all parts again; PARTS='decode tests' does these alone.
# --quick runs tiny sizes on any device: a test of this script, not a measurement.
set -uo pipefail
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
PYTHON=${PYTHON:-python3}
LIMIT_SECONDS=${LIMIT_SECONDS:-525}
QUICK=0 FORCE=0 OUT=$ROOT/out/gpu
for argument in "$@"; do
  case $argument in
    --quick) QUICK=1 ;;
    --force) FORCE=1 ;;
    -*) echo "argument $argument is not understood; see the first lines of $0" >&2; exit 2 ;;
    *) OUT=$argument ;;
  esac
done
mkdir -p "$OUT" || exit 2
OUT=$(cd "$OUT" && pwd)
cd "$ROOT" || exit 2
export PYTHONPATH=$ROOT${PYTHONPATH:+:$PYTHONPATH}
export JAX_COMPILATION_CACHE_DIR=${CACHE:-$OUT/cache} XLA_PYTHON_CLIENT_PREALLOCATE=false
"$PYTHON" mmjax/environment.py || exit 2  # says which packages are missing

SIZES=() TURNS=(--repeats 5 --updates 3)
KERNELS=() SUBLAYER=(--only sublayer) DECODE=(--new_tokens 512 --dtype bfloat16) ROWS=65536,1048576,4194304 SELECTED=1,64 BATCHES=(64 256)
if ((QUICK)); then
  SIZES=(--config.model.dim=32 --config.model.n_layers=1 --config.model.n_heads=4 --config.model.n_kv_heads=2
    --config.model.max_seq_len=32)
  TURNS=(--repeats 1 --matmul_size 128) KERNELS=(--batch 1 --repeats 1 --only sublayer) SUBLAYER=() BATCHES=(2 4)
  DECODE=(--new_tokens 4 --repeats 1) ROWS=4096,16384 SELECTED=2
fi
AGAINST=() COMPILED=()
if "$PYTHON" -c 'import torch' 2>/dev/null; then
  AGAINST=(--against torch) COMPILED=(--torch_compile)
  ((QUICK)) && COMPILED=()
fi
MIB=$(nvidia-smi --query-gpu=memory.total --format=csv,noheader,nounits 2>/dev/null | head -n 1)
LIMIT_24GB=$(awk -v mib="${MIB:-0}" 'BEGIN { printf "%.4f", (mib > 22889 ? 24e9 / (mib * 1048576) : 0.95) }')

part() { # name, limit in seconds, command
  local name=$1 seconds=$2 left=$((LIMIT_SECONDS - SECONDS)) code
  shift 2
  [[ " ${PARTS:-$name} " == *" $name "* ]] || return
  if [[ -s $OUT/$name.md ]] && ! ((FORCE)); then
    echo "$name: done before"
    return
  fi
  if ((left < 10)); then
    echo "$name: no time left; run again"
    FAILED=1
    return
  fi
  ((seconds > left)) && seconds=$left
  rm -f "$OUT/$name.md" "$OUT/$name.json"
  echo "$name: at most $seconds s"
  timeout -k 5 "$seconds" "$@" > "$OUT/$name.partial" 2> "$OUT/$name.log"
  code=$?
  if ((code)); then
    echo "$name: failed or out of time (exit code $code); see $OUT/$name.log and $name.partial"
    FAILED=1
    return
  fi
  mv "$OUT/$name.partial" "$OUT/$name.md"
}

throughput() { # name, limit in seconds, batch size, more arguments
  local name=$1 seconds=$2 batch=$3
  shift 3
  part "$name" "$seconds" env "${ENVIRONMENT[@]}" "$PYTHON" benchmarks/throughput.py --dtype bfloat16 "${TURNS[@]}" \
    --config.train.batch_size="$batch" --json "$OUT/$name.json" \
    "${SIZES[@]}" "$@"
}

FAILED=0
ENVIRONMENT=()
# What has a target comes first.
throughput throughput_1_4_2 220 "${BATCHES[0]}" --config configs/exp_1_4_2.py --one_program "${AGAINST[@]}" \
  "${COMPILED[@]}"
throughput throughput_1_4_0 120 "${BATCHES[0]}" --config configs/exp_1_4_0.py --one_program "${AGAINST[@]}"
throughput remat_1_4_2 90 "${BATCHES[0]}" --config configs/exp_1_4_2.py --one_program --config.runtime.remat=block
ENVIRONMENT=(XLA_PYTHON_CLIENT_MEM_FRACTION="$LIMIT_24GB")
throughput limit_24gb_1_4_2 90 "${BATCHES[1]}" --config configs/exp_1_4_2.py --one_program --config.runtime.remat=block
ENVIRONMENT=()
throughput triton_1_4_2 90 "${BATCHES[0]}" --config configs/exp_1_4_2.py
part sublayer 90 "$PYTHON" benchmarks/kernels.py --json "$OUT/sublayer.json" "${KERNELS[@]}" "${SUBLAYER[@]}"
part memory_scaling 240 "$PYTHON" benchmarks/memory_scaling.py --rows "$ROWS" --selected "$SELECTED" \
  --repeats "${TURNS[1]}" --json "$OUT/memory_scaling.json" --config.train.batch_size="${BATCHES[0]}" "${SIZES[@]}"
if "$PYTHON" -c 'import pytest' 2>/dev/null && "$PYTHON" -c 'import jax, sys; sys.exit(jax.default_backend() != "gpu")'; then
  part tests 120 "$PYTHON" -m pytest -q -m gpu tests/test_gpu.py
fi
part kernels 120 "$PYTHON" benchmarks/kernels.py --json "$OUT/kernels.json" "${KERNELS[@]}"
part decode 90 "$PYTHON" benchmarks/decode.py --json "$OUT/decode.json" "${DECODE[@]}" "${SIZES[@]}"
part cold_start 120 "$PYTHON" benchmarks/cold_start.py --repeats 1 --json "$OUT/cold_start.json" \
  --config.train.batch_size="${BATCHES[0]}" --config.train.accumulation_steps=1 "${SIZES[@]}"

for file in "$OUT"/*.md; do
  [[ $file == "$OUT/summary.md" || ! -e $file ]] && continue
  printf '## %s\n\n' "$(basename "$file" .md)"
  cat "$file"
  echo
done > "$OUT/summary.md"
echo "$OUT/summary.md after $SECONDS s"
exit $FAILED
