// Counts edges: the first of three kernels that sort edges into buckets (buckets.cuh).
#include "cuda/backward/buckets.cuh"
#include "cuda/backward/graph.cuh"
#include "cuda/launch.cuh"
#include "cuda/memory.cuh"
#include "cuda/ptx.cuh"
#include "cuda/stages.h"

namespace sn::cuda {
namespace {

// ---- kernel ---------------------------------------------------------------------------------------------------------

// gHistogram[bucket][part]: edges of the part in the bucket.
__global__ void __launch_bounds__(kPartThreads)
    count_kernel(__grid_constant__ const Graph graph, __grid_constant__ const Buckets buckets) {
  const int warps = thread_count() / kWarpSize;
  const int count = static_cast<int>(buckets.count);
  SharedArena arena;
  const auto sCounts = arena.take<std::uint32_t>(warps * count);
  const auto sOwn = sCounts.offset(warp_id() * count);
  const std::int64_t first_part = block_id() * warps;

  for (int bucket = lane_id(); bucket < count; bucket += kWarpSize) sOwn.set(bucket, 0);
  sync_warp();
  const PartRange range(graph, buckets, first_part + warp_id());
  for (std::int64_t base = range.begin; base < range.end; base += kPartLoads * kWarpSize) {
    std::int32_t rTargets[kPartLoads];
#pragma unroll
    for (int l = 0; l < kPartLoads; ++l) {
      const std::int64_t edge = base + l * kWarpSize + lane_id();
      rTargets[l] = edge < range.end ? load(graph.indices + edge) : -1;
    }
#pragma unroll
    for (int l = 0; l < kPartLoads; ++l) {
      const std::uint32_t bucket = bucket_of(graph, buckets, rTargets[l]);
      if (bucket != kNoBucket) sOwn.atomic_add(static_cast<int>(bucket), 1u);
    }
  }
  sync_block();
  for (int at = thread_id(); at < warps * count; at += thread_count()) {
    const int bucket = at / warps;
    const int part = at % warps;
    buckets.histogram[bucket * buckets.parts + first_part + part] = sCounts.get(part * count + bucket);
  }
}

}  // namespace

// ---- launch ---------------------------------------------------------------------------------------------------------

cudaError_t enqueue_bucket_counts(const BackwardArgs& args, const BackwardPlan& plan, char* workspace,
                                  cudaStream_t stream) {
  const LaunchShape shape = part_shape(plan);
  if (shape.blocks == 0) return cudaErrorInvalidValue;
  return launch(count_kernel, shape, stream, graph_of(args), buckets_of(plan, workspace));
}

}  // namespace sn::cuda
