// The names of the CUDA runtime that host code of this backend uses: from the toolkit or, with SN_SIMT defined, from
// the host harness (tests/simt), which runs the kernels on a CPU. Host headers include this file, never the toolkit's.
#pragma once

#if defined(SN_SIMT)
#include "simt_platform.h"
#else
#include <cuda_runtime_api.h>
#endif
