// First pass of the CUDA backend over a feature matrix: which rows are not finite, and each row's squared
// norm.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "../sn_types.h"

namespace sn::cuda {

struct PrepareArgs {
  DType dtype;
  std::int64_t dims;     // D
  FeatureView features;  // [N, D]

  void* squared_norms;      // acc [N]; meaningless for a row that is not finite
  std::int32_t* nonfinite;  // [N]; 1 where a value of the row is NaN or Inf, else 0
};

// Enqueues on `stream`, which belongs to the current device. No rows: nothing is launched.
cudaError_t prepare(const PrepareArgs& args, cudaStream_t stream);

}  // namespace sn::cuda
