#!/usr/bin/env bash
# Everything a GPU can tell about this checkout, in one command: build for the local GPU, GPU tests, compute-sanitizer
# on a small set, benchmark with its record. Each step under a time limit; the exit status says whether all passed.
#
#   benchmarks/gpu_check.sh [folder for logs and records, default benchmarks/results/gpu [step...]]
#
# Steps, all of them by default: install, facts, tests, sanitizers, benchmark, triton. On a machine that gives a command
# less time than all of them need, name some: what `install` built stays.
#
# Needs nvcc, cmake, ninja, pytest and a torch with CUDA in the current Python environment, and no network. Tests that
# need a package which is not there are skipped, by name.
set -uo pipefail
cd "$(dirname "$0")/.." || exit 1
out=$(mkdir -p "${1:-benchmarks/results/gpu}" && cd "${1:-benchmarks/results/gpu}" && pwd)
shift
steps=("${@:-all}")
export python=${PYTHON:-python3}
failed=()

wanted() { # step
  local each
  for each in "${steps[@]}"; do [ "$each" = all ] || [ "$each" = "$1" ] && return; done
  return 1
}

limited() { # seconds, log, command or function...: for functions timeout needs a shell of its own
  timeout -k 10 "$1" bash -c '"$@"' _ "${@:3}" >"$out/$2.log" 2>&1
}

step() { # seconds, name, command...: output to a log of that name, its end shown
  local started=$SECONDS status=0
  printf '==== %s\n' "$2"
  limited "$@" || status=$?
  if [ $status = 0 ]; then
    tail -n 4 "$out/$2.log"
  else
    failed+=("$2 (exit $status)")
    tail -n 40 "$out/$2.log"
  fi
  printf '==== %s: %d s\n' "$2" $((SECONDS - started))
}

install() {
  SN_OPS_CUDA=1 "$python" -m pip install --no-deps --no-build-isolation -e .
}

facts() {
  nvidia-smi --query-gpu=name,driver_version,compute_cap,clocks.max.sm,memory.total --format=csv
  git rev-parse HEAD
  git status --short
  nvcc --version
  cd / && "$python" -m sn_ops && "$python" -c '
import sn_ops
for name in ("cuda", "triton"):
    assert sn_ops.backends()[name].usable, sn_ops.backends()[name].reason'
}

# The emulator's own tests and the trainer's learn nothing from a GPU. Several processes where pytest-xdist is there:
# most of a test's time is its oracle on the CPU.
tests() { # expression, file...
  local parallel=()
  "$python" -c 'import xdist' 2>/dev/null && parallel=(-n 8)
  "$python" -m pytest -q -rfE --durations=10 "${parallel[@]}" -k "$@"
}

# The sanitizer slows a kernel a hundredfold: small shapes, one call on every path and a backward. Our kernels alone
# (names are mangled: namespace sn::cuda) but for initcheck, which has to see what PyTorch's kernels write.
sanitized() { # tool
  local ours=(--kernel-name kns=2sn4cuda)
  [ "$1" = initcheck ] && ours=()
  compute-sanitizer --tool "$1" --error-exitcode 1 "${ours[@]}" "$python" benchmarks/sanitize.py
}

sanitizers() { # at once: most of their time is one CPU thread's
  local tool status=0
  declare -A running=()
  for tool in memcheck racecheck initcheck synccheck; do
    sanitized "$tool" >"$out/sanitizer-$tool.log" 2>&1 &
    running[$tool]=$!
  done
  for tool in "${!running[@]}"; do
    wait "${running[$tool]}" || { status=1; printf '%s failed\n' "$tool"; tail -n 15 "$out/sanitizer-$tool.log"; }
    tail -n 1 "$out/sanitizer-$tool.log"
  done
  return $status
}
export out
export -f install facts tests sanitized sanitizers

common=(tests --ignore=tests/test_simt.py --ignore=tests/reid --ignore=tests/test_full_size.py)
shapes=64x2048,128x2048,256x2048,1024x2048,8192x512,8192x2048,65536x128

wanted install && step 240 install install
wanted facts && step 60 facts facts
wanted tests && step 180 tests tests "cuda and not triton" "${common[@]}"
if wanted sanitizers; then
  if command -v compute-sanitizer >/dev/null; then
    step 180 sanitizers sanitizers
  else
    failed+=("compute-sanitizer is not on PATH")
  fi
fi
if wanted benchmark; then
  step 150 benchmark "$python" benchmarks/bench_loss.py --device cuda --shapes $shapes --json "$out/bench_loss.json"
  step 60 benchmark-bf16 "$python" benchmarks/bench_loss.py --device cuda --shapes 8192x2048,65536x128 \
    --dtype bfloat16 --rivals none --json "$out/bench_loss_bf16.json"
fi
wanted triton && step 240 triton tests triton "${common[@]}"

# One file for whoever may take only a few home.
(cd "$out" && tar cf logs.tar ./*.log)
printf '\n'
if [ ${#failed[@]} -gt 0 ]; then
  printf 'FAILED   %s\n' "${failed[@]}"
  exit 1
fi
printf 'all passed; records in %s\n' "$out"
