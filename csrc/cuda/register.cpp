// The library `_C_cuda`: registers the CUDA kernels behind the schemas that `_C` defines, through the stable
// ABI. It holds every framework call of the CUDA backend; the kernels know none.
#include <cuda_runtime_api.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <tuple>

#include "../checks.h"
#include "../sn_types.h"
#include "prepare.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

cudaStream_t current_stream(std::int32_t device) {
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  return static_cast<cudaStream_t>(stream);
}

std::tuple<Tensor, Tensor> cuda_prepare(const Tensor& feats) {
  constexpr const char* op = "cuda_prepare";
  sn::checks::expect_cuda(op, "feats", feats);
  sn::checks::expect_dim(op, "feats", feats, 2);
  const sn::DType dtype = sn::checks::feature_dtype(op, "feats", feats);
  sn::checks::expect_rows(op, "feats", feats.size(0));

  const std::int32_t device = feats.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  const Tensor rows = sn::checks::unit_stride(feats);
  const std::int64_t count = rows.size(0);
  const Tensor squared_norms = torch::stable::new_empty(rows, {count}, sn::checks::accumulation_type(dtype));
  const Tensor nonfinite = torch::stable::new_empty(rows, {count}, ScalarType::Int);
  const sn::cuda::PrepareArgs args{
      .dtype = dtype,
      .dims = rows.size(1),
      .features = sn::checks::feature_view(rows),
      .squared_norms = squared_norms.mutable_data_ptr(),
      .nonfinite = static_cast<std::int32_t*>(nonfinite.mutable_data_ptr()),
  };
  STD_CUDA_CHECK(sn::cuda::prepare(args, current_stream(device)));
  return {squared_norms, nonfinite};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(sn_ops, CUDA, library) {
  library.impl("cuda_prepare", TORCH_BOX(&cuda_prepare));
}
