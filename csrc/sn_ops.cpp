// Operator schemas and their CPU kernels, on LibTorch's stable ABI: one binary serves every supported version of torch.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <exception>

#include "checks.h"
#include "cpu/cpu.h"
#include "cpu/memory.h"
#include "operators.h"
#include "sn_types.h"

namespace {

using sn::operators::Place;
using torch::stable::Tensor;

constexpr const char* kForwardSchema =
    "forward(Tensor feats, Tensor labels, Tensor? candidates, Tensor? candidate_labels, Tensor? self_index, "
    "SymInt self_offset, SymInt k, float alpha, float weight, int squeeze, int reduction, bool "
    "want_squared) -> "
    "(Tensor loss, Tensor indices, Tensor coefficients, Tensor nearest_positive, Tensor farthest_positive, "
    "Tensor squared, Tensor stats)";
constexpr const char* kBackwardSchema =
    "backward(Tensor grad_loss, Tensor feats, Tensor? candidates, Tensor indices, Tensor coefficients, "
    "Tensor stats, int reduction, bool need_feats, bool need_candidates) -> "
    "(Tensor grad_feats, Tensor grad_candidates)";
constexpr const char* kLossSchema =
    "loss(Tensor feats, Tensor labels, Tensor? candidates, Tensor? candidate_labels, Tensor? self_index, "
    "SymInt self_offset, SymInt k, float alpha, float weight, int squeeze, int reduction) -> "
    "(Tensor loss, Tensor graph, Tensor stats)";
constexpr const char* kLossBackwardSchema =
    "loss_backward(Tensor grad_loss, Tensor feats, Tensor? candidates, Tensor graph, Tensor stats, SymInt k, "
    "int reduction, bool need_feats, bool need_candidates) -> Tensor[]";
// For tests: forces the path of the CUDA forward, a sn::cuda::ForwardPath. `_C_cuda` implements it.
constexpr const char* kCudaForcePathSchema = "cuda_force_path(int path) -> ()";
// The path of the last CUDA forward of this process, 0 before the first.
constexpr const char* kCudaLastPathSchema = "cuda_last_path() -> int";
// For records: clusters of 16 blocks that the device holds at once, of the kernel that has such. 0: none.
constexpr const char* kCudaWideClustersSchema = "cuda_wide_clusters(int device) -> int";

// ---- the framework's threads ----------------------------------------------------------------------------------------

// Carries an exception past the C entry below and past other threads' frames, which it must not unwind.
struct GuardedBody {
  void (*body)(std::int64_t, std::int64_t, void*);
  void* context;
  std::atomic_flag failed = ATOMIC_FLAG_INIT;
  std::exception_ptr error;
};

void run_guarded(std::int64_t begin, std::int64_t end, void* opaque) {
  auto* guarded = static_cast<GuardedBody*>(opaque);
  try {
    guarded->body(begin, end, guarded->context);
  } catch (...) {
    if (!guarded->failed.test_and_set()) guarded->error = std::current_exception();
  }
}

void parallel_for(std::int64_t begin, std::int64_t end, std::int64_t grain,
                  void (*body)(std::int64_t, std::int64_t, void*), void* context) {
  GuardedBody guarded{body, context, ATOMIC_FLAG_INIT, nullptr};
  TORCH_ERROR_CODE_CHECK(torch_parallel_for(begin, end, grain, run_guarded, &guarded));
  if (guarded.error) std::rethrow_exception(guarded.error);
}

sn::ThreadPool thread_pool() {
  return {static_cast<int>(torch::stable::get_num_threads()), parallel_for};
}

// ---- the CPU's operators --------------------------------------------------------------------------------------------

// Asks for huge pages for a large output, which is written once: its first touch then costs less.
void prefer_huge_pages(void* output, std::int64_t elements, sn::DType dtype) {
  constexpr std::int64_t kHugeFrom = std::int64_t{4} << 20;
  const std::int64_t bytes = elements * sn::element_bytes(dtype);
  if (output != nullptr && bytes >= kHugeFrom) sn::cpu::prefer_huge_pages(output, static_cast<std::size_t>(bytes));
}

class CpuCall {
 public:
  CpuCall(const char* op, const Tensor& feats) { sn::checks::expect_cpu(op, "feats", feats); }
  Place place() const { return Place::cpu(); }
  void forward(const sn::ForwardArgs& args) const { sn::cpu::forward(args, thread_pool()); }
  void backward(const sn::BackwardArgs& args) const {
    prefer_huge_pages(args.grad_anchors, args.anchors.rows * args.dims, args.dtype);
    prefer_huge_pages(args.grad_candidates, args.candidates.rows * args.dims, args.dtype);
    sn::cpu::backward(args, thread_pool());
  }
};

}  // namespace

STABLE_TORCH_LIBRARY(sn_ops, library) {
  library.def(kForwardSchema);
  library.def(kBackwardSchema);
  library.def(kLossSchema);
  library.def(kLossBackwardSchema);
  library.def(kCudaForcePathSchema);
  library.def(kCudaLastPathSchema);
  library.def(kCudaWideClustersSchema);
}

STABLE_TORCH_LIBRARY_IMPL(sn_ops, CPU, library) {
  library.impl("forward", TORCH_BOX(&sn::operators::forward<CpuCall>));
  library.impl("backward", TORCH_BOX(&sn::operators::backward<CpuCall>));
  library.impl("loss", TORCH_BOX(&sn::operators::loss<CpuCall>));
  library.impl("loss_backward", TORCH_BOX(&sn::operators::loss_backward<CpuCall>));
}
