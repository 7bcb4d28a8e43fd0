#!/usr/bin/env bash
# Writes csrc/cuda/resources.txt anew, after kernels or the list of architectures have changed: launches from the
# kernels on the host, registers from nvcc. Takes some 15 minutes on 2 cores, and needs nvcc, cmake, ninja and a
# Python with torch.
set -uo pipefail
cd "$(dirname "$0")/.." || exit 1
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
. .ci/native.sh
kernels_on_the_host && TORCH_CUDA_ARCH_LIST='' cuda_kernels --write
