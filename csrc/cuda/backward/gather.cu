// The gather of gradients (gather.cuh has what is computed, and in which order) from lists of incoming edges by target.
// It also serves problems without incoming edges.
//
// 1. The lanes of each warp read where the lists of the block's 8 targets begin.
//
// 2. Where one has a chunk of edges (a hub, or many neighbours), all warps sum chunks of all targets in turn, and the
//    warp of a target adds its chunk sums in order. No block waits for a single warp.
//
// 3. Each warp sums what is left of its list, and its own edges.
#include <cstdint>

#include "cuda/backward/gather.cuh"
#include "cuda/backward/lists.cuh"
#include "cuda/launch.cuh"
#include "cuda/memory.cuh"
#include "cuda/ptx.cuh"
#include "cuda/stages.h"
#include "cuda/warp.cuh"

namespace sn::cuda {
namespace {

// ---- traits ---------------------------------------------------------------------------------------------------------

using Place = std::int64_t;  // of a listed edge's row

// Three blocks of float fit the 100 KB of the smallest multiprocessors, of which a block costs 1 KB more than it
// asks for.
static_assert(kMinBlocks * (sum_shared_bytes<float, kWideLane, Place>() + 1024) <= 100 * 1024);
static_assert(sum_shared_bytes<double, kWideLane, Place>() <= kPlainSharedBytes);

// ---- kernel ---------------------------------------------------------------------------------------------------------

// Where the lists of the block's targets lie: lane l has that of target l of the group.
struct GroupLists {
  std::uint32_t rBegin = 0;
  std::uint32_t rEdges = 0;

  __device__ __forceinline__ GroupLists(const Lists& lists, const GatherBlock& block) {
    if (lists.begins == nullptr || !block.side.takes_incoming) return;
    rBegin = lane_id() <= block.targets ? load(lists.begins + block.first + lane_id()) : 0;
    const std::uint32_t next = shuffle_down(rBegin, 1);
    rEdges = lane_id() < block.targets ? next - rBegin : 0;
  }
};

// Lists, for gathering, the edges of [begin, begin + edges) that count: at most a chunk.
template <typename Acc>
__device__ __forceinline__ void append_incoming(const Lists& lists, const EdgeList<Acc, Place>& list,
                                                std::uint32_t begin, int edges, int& count) {
  constexpr int kLoads = kEdgeChunk / kWarpSize;
  std::int32_t rSources[kLoads];
  Acc rWeights[kLoads];
#pragma unroll
  for (int l = 0; l < kLoads; ++l) {
    const int at = l * kWarpSize + lane_id();
    const std::int64_t edge = std::int64_t{begin} + at;
    rSources[l] = at < edges ? load(lists.sources + edge) : 0;
    rWeights[l] = at < edges ? load(static_cast<const Acc*>(lists.weights) + edge) : Acc(0);
  }
#pragma unroll
  for (int l = 0; l < kLoads; ++l) {
    if (l * kWarpSize < edges) list.append(count, rWeights[l] != Acc(0), rSources[l], rWeights[l]);
  }
}

// All full chunks of all targets, a warp each in turn.
template <typename TargetSums>
__device__ __forceinline__ void sum_chunks(const Lists& lists, const GroupLists& group, TargetSums& sums) {
  const std::uint32_t rChunks = group.rEdges / kEdgeChunk;
  const std::uint32_t rUpTo = prefix_sum(rChunks);
  const std::uint32_t chunks = shuffle(rUpTo, kGroupWarps - 1);
  const std::uint32_t own_end = shuffle(rUpTo, warp_id());
  const std::uint32_t own_begin = own_end - shuffle(rChunks, warp_id());
  for (std::uint32_t round = 0; round < chunks; round += kGroupWarps) {
    const std::uint32_t chunk = round + static_cast<std::uint32_t>(warp_id());
    if (chunk < chunks) {
      const int of = popcount(ballot(lane_id() < kGroupWarps && rUpTo <= chunk));
      const std::uint32_t number = chunk - (shuffle(rUpTo, of) - shuffle(rChunks, of));
      int count = 0;
      append_incoming(lists, sums.list, shuffle(group.rBegin, of) + number * kEdgeChunk, kEdgeChunk, count);
      sums.sum_chunk(sums.block.first + static_cast<std::uint32_t>(of), count);
    }
    sync_block();
#pragma unroll 1  // registers: unrolled it spills on sm_120
    for (int by = 0; by < kGroupWarps; ++by) {
      const std::uint32_t served = round + static_cast<std::uint32_t>(by);
      if (served >= own_begin && served < own_end) sums.add_chunk(by);
    }
    sync_block();
  }
}

template <typename T, int kLaneBytes, bool kVector>
__global__ void __launch_bounds__(kGroupThreads, kVector ? kMinBlocks : kMinBlocksUnaligned)
    gather_kernel(__grid_constant__ const GatherArgs args, __grid_constant__ const Lists lists) {
  using Warp = TargetSums<T, kLaneBytes, kVector, Place>;
  using Acc = typename Warp::Acc;
  const Graph& graph = args.graph;
  SharedArena arena;
  const SumMemory<T, kLaneBytes, Place> memory(arena);
  const GatherBlock block(args);
  Warp sums(args, block, memory);

  // 1. Lists.
  const GroupLists group(lists, block);
  const bool brings = block.side.takes_own && lists.own_weights == nullptr;
  if (brings) {
    memory.bring_upstream(graph);
    sync_block();
  }

  // 2. Chunks.
  if (any_lane(group.rEdges >= kEdgeChunk)) sum_chunks(lists, group, sums);
  if (warp_id() >= block.targets) return;

  // 3. The rest, and an own edge a lane: all loads are under way before the first one is waited for.
  const double poison = load(graph.stats + kPoison);
  const std::uint32_t own_edge = sums.target * graph.edges + static_cast<std::uint32_t>(lane_id());
  const bool holds = sums.takes_own && sums.held && static_cast<std::uint32_t>(lane_id()) < graph.edges;
  const std::int32_t rIndex = holds ? load(graph.indices + own_edge) : -1;
  Acc rWeight = 0;
  if (holds) {
    rWeight = brings ? edge_weight<Acc>(graph, memory.sUpstream.get(0), sums.target, own_edge)
                     : load(static_cast<const Acc*>(lists.own_weights) + own_edge);
  }
  const std::uint32_t edges = shuffle(group.rEdges, warp_id());
  const int rest = static_cast<int>(edges % kEdgeChunk);
  int count = 0;
  append_incoming(lists, sums.list, shuffle(group.rBegin, warp_id()) + edges - static_cast<std::uint32_t>(rest), rest,
                  count);
  sums.append_own(count, rIndex, rWeight);
  Acc rSum[Warp::Row::kValues] = {};
  sums.gather(sums.target, count, rSum);
  if (sums.takes_own && !sums.held) sums.sum_own_chunks(rSum);
  sums.store(rSum, poison);
}

// ---- launch ---------------------------------------------------------------------------------------------------------

template <typename T, int kLaneBytes>
cudaError_t launch_lanes(const BackwardArgs& args, const BackwardPlan& plan, const Lists& lists, cudaStream_t stream) {
  const GatherArgs gather = gather_args_of(args, plan);
  const LaunchShape shape{gather_blocks(gather, plan), kGroupThreads, sum_shared_bytes<T, kLaneBytes, Place>()};
  const auto kernel = gathers_packs(args) ? gather_kernel<T, kLaneBytes, true> : gather_kernel<T, kLaneBytes, false>;
  return launch(kernel, shape, stream, gather, lists);
}

}  // namespace

// ---- dispatch -------------------------------------------------------------------------------------------------------

cudaError_t enqueue_gather(const BackwardArgs& args, const BackwardPlan& plan, char* workspace, cudaStream_t stream) {
  const Lists lists = lists_of(plan, workspace);
  return for_type(args.dtype, [&]<class T>() {
    if constexpr (sizeof(T) > 2) {
      if (plan.lane_bytes == kWideLane) return launch_lanes<T, kWideLane>(args, plan, lists, stream);
      if (plan.lane_bytes == kMiddleLane) return launch_lanes<T, kMiddleLane>(args, plan, lists, stream);
    }
    if (plan.lane_bytes == kNarrowLane) return launch_lanes<T, kNarrowLane>(args, plan, lists, stream);
    return plan.lane_bytes == kPackBytes ? launch_lanes<T, kPackBytes>(args, plan, lists, stream)
                                         : cudaErrorInvalidValue;
  });
}

}  // namespace sn::cuda
