# The steps of .ci/run that compile C++, CUDA and Triton, and run what needs no Python. Sourced; see steps.sh.

has_nvcc() { command -v nvcc >/dev/null || [ -n "${CUDA_HOME:-}" ]; }

# cmake and ninja from their Python packages, outside the environment that the README's commands fill.
prepare_native() {
  python3 -m venv "$work/tools" && "$work/tools/bin/pip" install -q cmake ninja && mkdir "$work/bin" &&
    ln -s "$work/tools/bin/cmake" "$work/tools/bin/ninja" "$work/bin/" || return
  ! has_nvcc || disassembler || return
  [ "$(uname -m)" = aarch64 ] ||
    { need g++-aarch64-linux-gnu aarch64-linux-gnu-g++ && need qemu-user-static qemu-aarch64-static; } || true
}

# Not every toolkit has cuobjdump; Triton's package brings one.
disassembler() {
  [ -x "${CUDA_HOME:-}/bin/cuobjdump" ] || command -v cuobjdump >/dev/null && return
  "$work/tools/bin/pip" install -q "$(python .ci/requirements.py test | grep ^triton)" || return
  ln -s "$work"/tools/lib/python*/site-packages/triton/backends/nvidia/bin/cuobjdump "$work/bin/"
}

configure() { # folder, options...
  local tree=$1
  shift
  cmake -S . -B "$tree" -G Ninja -DSN_OPS_WERROR=ON "$@" >"$tree.log" || { cat "$tree.log"; return 1; }
}

# Code compiled for one instruction set must not define anything the linker could share with the rest of the program:
# an inline function it keeps from an AVX-512 object would be an illegal instruction on a lesser machine. The objects
# are those of the installed library, which setup.py keeps in the checkout: to compile them anew would take minutes.
private_symbols() { # folder with the objects
  local object capability shared seen=0 status=0
  for object in $(find "$1" -path '*/sn_cpu_*.dir/*' -name kernels.cpp.o); do
    capability=${object##*/sn_cpu_}
    capability=${capability%%.dir*}
    seen=$((seen + 1))
    nm -C --defined-only "$object" >"$work/symbols.txt" && grep -q "sn::cpu::$capability::" "$work/symbols.txt" ||
      { printf '%s: no symbol of its own\n' "$object"; status=1; }
    shared=$(awk '$2 ~ /[WVuBDRTi]/' "$work/symbols.txt" | grep -v "sn::cpu::$capability::")
    [ -z "$shared" ] || { printf '%s shares symbols:\n%s\n' "$capability" "$shared"; status=1; }
  done
  printf '%d instruction sets\n' $seen
  [ $seen -gt 0 ] || { echo "no kernels.cpp.o of a target sn_cpu_* in $1"; status=1; }
  return $status
}
# Of the Python whose environment is active.
installed_objects() { echo "build/cmake-$(python -c "import sysconfig; print(sysconfig.get_config_var('SOABI'))")"; }

configure_sanitized() { [ -f "$work/sanitize/build.ninja" ] || configure "$work/sanitize" -DSN_OPS_SANITIZE=ON; }
cpp_core() {
  configure_sanitized && cmake --build "$work/sanitize" --target sn_cpu_test && "$work/sanitize/sn_cpu_test" --few
}
# The CUDA kernels compiled for this CPU, on emulated threads: tests/simt/simt.h says what that proves.
kernels_on_the_host() {
  configure_sanitized &&
    cmake --build "$work/sanitize" --target sn_simt_test sn_simt_loss_test &&
    SN_SIMT_LAUNCH_LOG="$work/launches.txt" "$work/sanitize/sn_simt_test" &&
    SN_SIMT_LAUNCH_LOG="$work/launches.txt" "$work/sanitize/sn_simt_loss_test"
}

aarch64() {
  configure "$work/aarch64" -DCMAKE_SYSTEM_NAME=Linux -DCMAKE_SYSTEM_PROCESSOR=aarch64 \
    -DCMAKE_CXX_COMPILER=aarch64-linux-gnu-g++ -DCMAKE_EXE_LINKER_FLAGS=-static &&
    cmake --build "$work/aarch64" --target sn_cpu_test && qemu-aarch64-static "$work/aarch64/sn_cpu_test"
}

cuda_kernels() { # --write: the tables of registers and instructions anew, in place of a comparison
  configure "$work/cuda" -DSN_OPS_CUDA_OBJECTS=ON -DSN_OPS_PTXAS_VERBOSE=ON \
    -DSN_OPS_TORCH_DIR="$(python -c 'import torch; print(torch.__path__[0])')" &&
    if ! cmake --build "$work/cuda" --target sn_cuda_objects sn_cuda_registration >"$work/ptxas.log" 2>&1; then
      grep -v 'ptxas info' "$work/ptxas.log"
      return 1
    fi && python .ci/cuda_resources.py "$work/ptxas.log" "$work/launches.txt" "$work/cuda" "$@" &&
    cmake --build "$work/cuda" --target sn_gpu_probe sn_gpu_micro
}

native_steps() {
  PATH=$work/bin:$PATH
  # ninja's own choice is two more: these would only take turns, on processors that the suite beside them needs too.
  export CMAKE_BUILD_PARALLEL_LEVEL=${CMAKE_BUILD_PARALLEL_LEVEL:-$(nproc)}
  if compgen -G 'tests/cpp/*.cpp' >/dev/null; then
    step "C++ core under ASan and UBSan" cpp_core
  else
    skip "C++ core under ASan and UBSan" "tests/cpp has no test"
  fi
  step "CUDA kernels on the host, under ASan and UBSan" kernels_on_the_host
  if has_nvcc; then
    TORCH_CUDA_ARCH_LIST='' step "CUDA kernels, every architecture" cuda_kernels
  else
    skip "CUDA kernels, every architecture" "no nvcc here"
  fi
  if ! compgen -G 'tests/cpp/*.cpp' >/dev/null; then
    skip "C++ core on aarch64" "tests/cpp has no test"
  elif [ "$(uname -m)" = aarch64 ]; then
    skip "C++ core on aarch64" "this machine is one: the steps above ran on it"
  elif command -v aarch64-linux-gnu-g++ >/dev/null && command -v qemu-aarch64-static >/dev/null; then
    step "C++ core on aarch64" aarch64
  else
    skip "C++ core on aarch64" "no aarch64-linux-gnu-g++ and qemu-aarch64-static here"
  fi
}

triton_steps() {
  step "Triton kernels, ahead of time" python .ci/triton_resources.py
  PYTHONPATH=$work/triton step "Triton kernels by Triton $TRITON_OLDEST" python .ci/triton_resources.py sm_90 --table
}
