#!/usr/bin/env bash
# Writes csrc/cuda/resources.txt and instructions.txt anew, after kernels or the list of architectures have changed:
# launches from the kernels on the host, registers from nvcc, instructions from what it made. Takes some 15 minutes on 2
# cores, and needs nvcc, cmake, ninja, a Python with torch, and cuobjdump, of the toolkit or of that Python's Triton.
set -uo pipefail
cd "$(dirname "$0")/.." || exit 1
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
. .ci/native.sh
kernels_on_the_host && TORCH_CUDA_ARCH_LIST='' cuda_kernels --write
