#!/usr/bin/env bash
# Everything a GPU can tell about this checkout, in one command: build for the local GPU, GPU tests, compute-sanitizer
# on a small set, benchmark with its record. Each step under a time limit; the exit status says whether all passed.
#
#   benchmarks/gpu_check.sh [folder for logs and records, default benchmarks/results/gpu]
#
# Needs nvcc and a torch with CUDA in the current Python environment. Where there is no index to install the test extra
# from, SN_OPS_WHEELS names a folder of wheels.
set -uo pipefail
cd "$(dirname "$0")/.." || exit 1
out=$(mkdir -p "${1:-benchmarks/results/gpu}" && cd "${1:-benchmarks/results/gpu}" && pwd)
python=${PYTHON:-python3}
failed=()

step() { # seconds, name, command...: output to a log of that name, its end shown
  local limit=$1 name=$2 started=$SECONDS
  shift 2
  printf '==== %s\n' "$name"
  if timeout -k 10 "$limit" "$@" >"$out/$name.log" 2>&1; then
    tail -n 4 "$out/$name.log"
  else
    failed+=("$name (exit $?)")
    tail -n 40 "$out/$name.log"
  fi
  printf '==== %s: %d s\n' "$name" $((SECONDS - started))
}

install() {
  local offline=()
  [ -n "${SN_OPS_WHEELS:-}" ] && offline=(--no-index --find-links "$SN_OPS_WHEELS")
  "$python" -m pip install "${offline[@]}" 'cmake>=3.26' ninja 'setuptools>=77' &&
    SN_OPS_CUDA=1 "$python" -m pip install "${offline[@]}" --no-build-isolation -e '.[test]'
}

facts() {
  nvidia-smi --query-gpu=name,driver_version,compute_cap,clocks.max.sm,memory.total --format=csv
  git rev-parse HEAD
  git status --short
  (cd / && "$python" -m sn_ops)
}

# The sanitizer slows a kernel a hundredfold: small shapes, one call on every path and a backward.
sanitized() { # tool
  compute-sanitizer --tool "$1" --error-exitcode 1 --kernel-name-exclude kernel_substring=at:: \
    "$python" benchmarks/sanitize.py
}

step 240 install install
step 60 facts facts
step 240 tests "$python" -m pytest -q -x --maxfail=25 -k "cuda or triton" --deselect tests/test_full_size.py tests
if command -v compute-sanitizer >/dev/null; then
  for tool in memcheck racecheck initcheck synccheck; do step 60 "sanitizer-$tool" sanitized "$tool"; done
else
  failed+=("compute-sanitizer is not on PATH")
fi
shapes=64x2048,128x2048,256x2048,1024x2048,8192x512,8192x2048,65536x128
step 200 benchmark "$python" benchmarks/bench_loss.py --device cuda --shapes $shapes --json "$out/bench_loss.json"
step 60 benchmark-bf16 "$python" benchmarks/bench_loss.py --device cuda --shapes 8192x2048,65536x128 --dtype bfloat16 \
  --rivals none --json "$out/bench_loss_bf16.json"

printf '\n'
if [ ${#failed[@]} -gt 0 ]; then
  printf 'FAILED   %s\n' "${failed[@]}"
  exit 1
fi
printf 'all passed; records in %s\n' "$out"
