// Writes edges to their places: the last of three kernels that sort edges into buckets (buckets.cuh).
#include "cuda/backward/buckets.cuh"
#include "cuda/backward/graph.cuh"
#include "cuda/launch.cuh"
#include "cuda/memory.cuh"
#include "cuda/ptx.cuh"
#include "cuda/stages.h"
#include "cuda/warp.cuh"

namespace sn::cuda {
namespace {

// ---- kernel ---------------------------------------------------------------------------------------------------------

// Puts target, source and weight of the edges into their buckets, in the order of the graph.
template <typename Acc>
__global__ void __launch_bounds__(kPartThreads)
    place_kernel(__grid_constant__ const Graph graph, __grid_constant__ const Buckets buckets) {
  const int warps = thread_count() / kWarpSize;
  const int count = static_cast<int>(buckets.count);
  SharedArena arena;
  const auto sNext = arena.take<std::uint32_t>(warps * count);  // where the part's next edge of a bucket goes
  const auto sSums = arena.take<std::uint32_t>(kWarpSize);
  const auto sUpstream = arena.take<double>(1);
  const auto sOwn = sNext.offset(warp_id() * count);
  const std::int64_t first_part = block_id() * warps;

  if (warp_id() == 0) {
    const double upstream = shared_upstream<Acc>(graph);
    if (lane_id() == 0) sUpstream.set(0, upstream);
  }
  // Every block adds up the sizes of earlier buckets itself: a few thousand at most. A thread has neighbouring buckets.
  const int each = (count + thread_count() - 1) / thread_count();
  const int begin = thread_id() * each < count ? thread_id() * each : count;
  const int end = begin + each < count ? begin + each : count;
  std::uint32_t rSum = 0;
  for (int bucket = begin; bucket < end; ++bucket) rSum += load(buckets.totals + bucket);
  const std::uint32_t rUpTo = prefix_sum(rSum);
  if (lane_id() == kWarpSize - 1) sSums.set(warp_id(), rUpTo);
  sync_block();
  std::uint32_t rBegin = rUpTo - rSum;
  for (int warp = 0; warp < warp_id(); ++warp) rBegin += sSums.get(warp);
  for (int bucket = begin; bucket < end; ++bucket) {
    const std::uint32_t* gBefore = buckets.histogram + bucket * buckets.parts + first_part;
    for (int part = 0; part < warps; ++part) sNext.set(part * count + bucket, rBegin + load(gBefore + part));
    if (block_id() == 0) buckets.begins[bucket] = rBegin;
    rBegin += load(buckets.totals + bucket);
    if (block_id() == 0 && bucket == count - 1) buckets.begins[count] = rBegin;
  }
  sync_block();

  const PartRange range(graph, buckets, first_part + warp_id());
  Acc* gWeights = static_cast<Acc*>(buckets.placed_weights);
  for (std::int64_t base = range.begin; base < range.end; base += kPartLoads * kWarpSize) {
    std::int32_t rTargets[kPartLoads];
    Acc rWeights[kPartLoads];
#pragma unroll
    for (int l = 0; l < kPartLoads; ++l) {
      const std::int64_t edge = base + l * kWarpSize + lane_id();
      rTargets[l] = edge < range.end ? load(graph.indices + edge) : -1;
      rWeights[l] = 0;
      if (edge < range.end) {
        const std::uint32_t position = static_cast<std::uint32_t>(edge);
        rWeights[l] = edge_weight<Acc>(graph, sUpstream.get(0), position / graph.edges, position);
      }
    }
#pragma unroll
    for (int l = 0; l < kPartLoads; ++l) {
      const std::uint32_t bucket = bucket_of(graph, buckets, rTargets[l]);
      const std::uint32_t peers = match_any(bucket);
      const std::uint32_t before = static_cast<std::uint32_t>(popcount(peers & lanes_below()));
      const std::uint32_t next = bucket != kNoBucket ? sOwn.get(static_cast<int>(bucket)) : 0;
      sync_warp();
      if (bucket != kNoBucket) {
        if (before == 0) sOwn.set(static_cast<int>(bucket), next + static_cast<std::uint32_t>(popcount(peers)));
        const std::int64_t at = std::int64_t{next} + before;
        const std::uint32_t position = static_cast<std::uint32_t>(base + l * kWarpSize + lane_id());
        buckets.placed_targets[at] = rTargets[l];
        buckets.placed_sources[at] = static_cast<std::int32_t>(position / graph.edges);
        gWeights[at] = rWeights[l];
      }
      sync_warp();
    }
  }
}

}  // namespace

// ---- launch ---------------------------------------------------------------------------------------------------------

cudaError_t enqueue_bucket_placement(const BackwardArgs& args, const BackwardPlan& plan, char* workspace,
                                     cudaStream_t stream) {
  LaunchShape shape = part_shape(plan);
  if (shape.blocks == 0) return cudaErrorInvalidValue;
  shape.shared_bytes += shared_bytes<std::uint32_t>(kWarpSize) + shared_bytes<double>(1);
  const auto kernel = args.dtype == DType::kFloat64 ? place_kernel<double> : place_kernel<float>;
  return launch(kernel, shape, stream, graph_of(args), buckets_of(plan, workspace));
}

}  // namespace sn::cuda
