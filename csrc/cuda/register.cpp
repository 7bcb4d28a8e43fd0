// The library `_C_cuda`: registers the CUDA kernels behind the schemas that `_C` defines, through the stable ABI. Every
// framework call of the CUDA backend is in this file; the kernels know no framework.
#include <cuda_runtime_api.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cstddef>
#include <cstdint>

#include "cuda/backend.h"
#include "cuda/plan/sizes.h"
#include "cuda/plan/sizes_small.h"
#include "cuda/slots.h"
#include "cuda/stages.h"
#include "operators.h"
#include "sn_types.h"

namespace {

using sn::cuda::ForwardPath;
using sn::operators::Output;
using sn::operators::Place;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Tests set this to reach every path.
std::atomic<ForwardPath> forced_path{ForwardPath::kAuto};

// The path of the last forward. A forced path that cannot serve is not taken.
std::atomic<ForwardPath> taken_path{ForwardPath::kAuto};

std::int64_t last_path() {
  return static_cast<std::int64_t>(taken_path.load());
}

void force_path(std::int64_t path) {
  sn::checks::expect_between("cuda_force_path", "path", path, 0, static_cast<std::int64_t>(ForwardPath::kSquare));
  forced_path = static_cast<ForwardPath>(path);
}

cudaStream_t current_stream(std::int32_t device) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  return static_cast<cudaStream_t>(stream);
}

int attribute(cudaDeviceAttr name, std::int32_t device) {
  int value = 0;
  STD_CUDA_CHECK(cudaDeviceGetAttribute(&value, name, device));
  return value;
}

// The compute capability that the library's code for this device was compiled for. The driver loads the code to answer,
// so the answer is kept.
int compiled_major(std::int32_t device) {
  static std::array<std::atomic<int>, 64> known{};
  int capability = 0;
  if (static_cast<std::size_t>(device) < known.size()) capability = known[device];
  if (capability == 0) {
    STD_CUDA_CHECK(sn::cuda::compiled_capability(&capability));
    if (static_cast<std::size_t>(device) < known.size()) known[device] = capability;
  }
  return capability / 10;
}

// Limits of clusters on the current device, kept as well. Two threads may ask at the same time and get one answer.
struct Clusters {
  sn::cuda::ClusterLimits limits;
  int wide;
};
Clusters clusters_of(std::int32_t device, int shared_bytes) {
  constexpr int kKnown = 1 << 30;
  constexpr int kBits = 20;      // of bytes
  constexpr int kWideBits = 24;  // and below these blocks
  constexpr int kMostWide = 63;
  static std::array<std::atomic<int>, 64> answers{};
  int answer = 0;
  if (static_cast<std::size_t>(device) < answers.size()) answer = answers[device];
  if (answer == 0) {
    const sn::cuda::ClusterLimits limits = sn::cuda::cluster_limits(shared_bytes);
    const int wide = std::min(sn::cuda::wide_clusters(shared_bytes), kMostWide);
    answer = kKnown | wide << kWideBits | limits.blocks << kBits | limits.bytes;
    if (static_cast<std::size_t>(device) < answers.size()) answers[device] = answer;
  }
  const auto bits = [&](int from, int to) { return (answer & ((1 << to) - 1)) >> from; };
  return {.limits = {.blocks = bits(kBits, kWideBits), .bytes = bits(0, kBits)}, .wide = bits(kWideBits, 30)};
}

// Attributes come from the driver's table without a synchronisation. Four look-ups cost less than a cache's lock.
sn::cuda::DeviceFacts device_facts(std::int32_t device) {
  sn::cuda::DeviceFacts facts{
      .major = std::min(attribute(cudaDevAttrComputeCapabilityMajor, device), compiled_major(device)),
      .minor = attribute(cudaDevAttrComputeCapabilityMinor, device),
      .multiprocessors = attribute(cudaDevAttrMultiProcessorCount, device),
      .shared_bytes = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device),
      .largest_cluster = 0,
      .cluster_bytes = 0,
      .wide_clusters = 0};
  if (facts.major >= sn::cuda::kClusterMajor) {
    const Clusters clusters = clusters_of(device, facts.shared_bytes);
    facts.largest_cluster = clusters.limits.blocks;
    facts.cluster_bytes = clusters.limits.bytes;
    facts.wide_clusters = clusters.wide;
  }
  return facts;
}

// A slot of tickets for a launch on the stream, kNoSlot where there is none left, or where the runtime does not tell
// what it takes to know: the stream's number, and whether it is being captured.
int slot_for(std::int32_t device, cudaStream_t stream) {
  static sn::cuda::SlotRegistry registry;
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  unsigned long long number = 0;
  cudaError_t error = cudaStreamIsCapturing(stream, &status);
  if (error == cudaSuccess && status != cudaStreamCaptureStatusNone) return registry.of_captured(device);
  if (error == cudaSuccess) error = cudaStreamGetId(stream, &number);
  if (error == cudaSuccess) return registry.of_stream(device, number);
  static_cast<void>(cudaGetLastError());
  return sn::cuda::kNoSlot;
}

std::int64_t wide_clusters(std::int64_t device) {
  const auto index = static_cast<std::int32_t>(device);
  const torch::stable::accelerator::DeviceGuard guard(index);
  return device_facts(index).wide_clusters;
}

class CudaCall {
 public:
  CudaCall(const char* op, const Tensor& feats) : device_(device_of(op, feats)), guard_(device_) {}
  Place place() const { return Place::cuda_device(device_); }
  void forward(const sn::ForwardArgs& args) const {
    const sn::cuda::Problem problem = sn::cuda::problem_of(args);
    const sn::cuda::DeviceFacts facts = device_facts(device_);
    const ForwardPath wanted = forced_path;
    const cudaStream_t stream = current_stream(device_);
    sn::cuda::ForwardPlan plan =
        sn::cuda::plan_forward(problem, facts, sn::cuda::serves(wanted, problem, facts) ? wanted : ForwardPath::kAuto);
    const int slot = sn::cuda::takes_slot(plan) ? slot_for(device_, stream) : sn::cuda::kNoSlot;
    if (sn::cuda::takes_slot(plan) && slot == sn::cuda::kNoSlot) {
      plan = sn::cuda::plan_forward(problem, facts, ForwardPath::kDirect);
    }
    const Output workspace(place(), {plan.workspace_bytes}, ScalarType::Byte);
    STD_CUDA_CHECK(sn::cuda::forward(args, plan, workspace.data<char>(), slot, stream));
    taken_path = plan.path;
  }
  void backward(const sn::BackwardArgs& args) const {
    const sn::cuda::BackwardPlan plan = sn::cuda::plan_backward(sn::cuda::problem_of(args), device_facts(device_));
    const Output workspace(place(), {plan.workspace_bytes}, ScalarType::Byte);
    STD_CUDA_CHECK(sn::cuda::backward(args, plan, workspace.data<char>(), current_stream(device_)));
  }

 private:
  static std::int32_t device_of(const char* op, const Tensor& feats) {
    sn::checks::expect_cuda(op, "feats", feats);
    return feats.get_device_index();
  }

  std::int32_t device_;
  torch::stable::accelerator::DeviceGuard guard_;
};

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(sn_ops, CUDA, library) {
  library.impl("forward", TORCH_BOX(&sn::operators::forward<CudaCall>));
  library.impl("backward", TORCH_BOX(&sn::operators::backward<CudaCall>));
  library.impl("loss", TORCH_BOX(&sn::operators::loss<CudaCall>));
  library.impl("loss_backward", TORCH_BOX(&sn::operators::loss_backward<CudaCall>));
}

STABLE_TORCH_LIBRARY_IMPL(sn_ops, CompositeExplicitAutograd, library) {
  library.impl("cuda_force_path", TORCH_BOX(&force_path));
  library.impl("cuda_last_path", TORCH_BOX(&last_path));
  library.impl("cuda_wide_clusters", TORCH_BOX(&wide_clusters));
}
