// Turns counts into places: the second of three kernels that sort edges into buckets (buckets.cuh).
#include "cuda/backward/buckets.cuh"
#include "cuda/launch.cuh"
#include "cuda/memory.cuh"
#include "cuda/ptx.cuh"
#include "cuda/stages.h"
#include "cuda/warp.cuh"

namespace sn::cuda {
namespace {

// ---- traits ---------------------------------------------------------------------------------------------------------

constexpr int kWarps = 8;
constexpr int kThreads = kWarps * kWarpSize;
constexpr int kPrefixPack = Pack<std::uint32_t>::kElements;

// ---- kernel ---------------------------------------------------------------------------------------------------------

// A warp a bucket: gHistogram[bucket][part] becomes the number of the bucket's edges in earlier parts, gTotals[bucket]
// the number of all its edges. (Records of measurements know the kernel by this name.)
__global__ void __launch_bounds__(kThreads) scan_kernel(__grid_constant__ const Buckets buckets) {
  const std::int64_t bucket = block_id() * kWarps + warp_id();
  if (bucket >= buckets.count) return;
  std::uint32_t* gRow = buckets.histogram + bucket * buckets.parts;
  std::uint32_t rBefore = 0;
  for (std::int64_t base = 0; base < buckets.parts; base += kWarpSize * kPrefixPack) {
    const std::int64_t at = base + lane_id() * kPrefixPack;
    Pack<std::uint32_t> rPack{};
    if (at < buckets.parts) {
      // Not through the read-only path: this kernel writes here.
#pragma unroll
      for (int e = 0; e < kPrefixPack; ++e) rPack.elements[e] = gRow[at + e];
    }
    std::uint32_t rLane = 0;
#pragma unroll
    for (int e = 0; e < kPrefixPack; ++e) {
      const std::uint32_t edges = rPack.elements[e];
      rPack.elements[e] = rLane;
      rLane += edges;
    }
    const std::uint32_t rUpTo = prefix_sum(rLane);
#pragma unroll
    for (int e = 0; e < kPrefixPack; ++e) rPack.elements[e] += rBefore + rUpTo - rLane;
    if (at < buckets.parts) store_pack(gRow + at, rPack);
    rBefore += shuffle(rUpTo, kWarpSize - 1);
  }
  if (lane_id() == 0) buckets.totals[bucket] = rBefore;
}

}  // namespace

// ---- launch ---------------------------------------------------------------------------------------------------------

cudaError_t enqueue_bucket_prefix_sums(const BackwardPlan& plan, char* workspace, cudaStream_t stream) {
  if (plan.parts % kPrefixPack != 0) return cudaErrorInvalidValue;
  const LaunchShape shape{divide_up(plan.buckets, kWarps), kThreads, 0};
  return launch(scan_kernel, shape, stream, buckets_of(plan, workspace));
}

}  // namespace sn::cuda
