// The gather of gradients (gather.cuh has what is computed, and in which order) from lists of incoming edges by target.
// It also serves problems without incoming edges.
//
// 1. The lanes of each warp read where the lists of the block's targets begin.
//
// 2. Where one has a chunk of edges (a hub, or many neighbours), the lanes of each target sum chunks of all targets in
//    turn, and those of the target add its chunk sums in order. No block waits for a single warp.
//
// 3. The lanes of each target sum what stands behind its chunks, and its own edges where these are not listed.
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
// asks for. Of half a warp's widest slices two do, of 16 lists and as many sums.
static_assert(kMinBlocks * (sum_shared_bytes<float, kWideLane, Place, kWarpSize>() + 1024) <= 100 * 1024);
static_assert(kMinBlocks * (sum_shared_bytes<float, kMiddleLane, Place, kHalfWarp>() + 1024) <= 100 * 1024);
static_assert(2 * (sum_shared_bytes<float, kWideLane, Place, kHalfWarp>() + 1024) <= 100 * 1024);
static_assert(sum_shared_bytes<double, kWideLane, Place, kWarpSize>() <= kPlainSharedBytes);
static_assert(sum_shared_bytes<double, kWideLane, Place, kHalfWarp>() <= kPlainSharedBytes);

// ---- kernel ---------------------------------------------------------------------------------------------------------

// Where the incoming edges of the block's targets are listed: a lane has those of target lane % kTargets.
template <int kLanes>
struct GroupLists {
  static constexpr int kTargets = kBlockTargets<kLanes>;
  static_assert(kTargets <= kLanes, "the lanes of each target see all");

  std::uint32_t rBegin = 0;
  std::uint32_t rEdges = 0;

  __device__ __forceinline__ GroupLists(const Lists& lists, const GatherBlock& block) {
    if (lists.begins == nullptr || !block.side.takes_incoming) return;
    const int mine = thread_id() & (kTargets - 1);
    const std::uint32_t* gBegins = lists.begins + block.first;
    rBegin = load(gBegins + (mine < block.targets ? mine : block.targets));
    rEdges = load(gBegins + (mine < block.targets ? mine + 1 : block.targets)) - rBegin;
  }
};

// All full chunks of all targets, in turn.
template <int kLanes, typename TargetSums>
__device__ __forceinline__ void sum_chunks(const Lists& lists, const GroupLists<kLanes>& group, TargetSums& sums) {
  constexpr int kTargets = kBlockTargets<kLanes>;
  constexpr int kLoads = kEdgeChunk / kLanes;
  using Acc = typename TargetSums::Acc;
  const std::uint32_t rChunks = group.rEdges / kEdgeChunk;
  const std::uint32_t rUpTo = shuffle(prefix_sum(lane_id() < kTargets ? rChunks : 0), thread_id() & (kTargets - 1));
  const std::uint32_t chunks = shuffle(rUpTo, kTargets - 1);
  const std::uint32_t own_end = shuffle(rUpTo, sums.local);
  const std::uint32_t own_begin = own_end - shuffle(rChunks, sums.local);
  for (std::uint32_t round = 0; round < chunks; round += kTargets) {
    const std::uint32_t chunk = round + static_cast<std::uint32_t>(sums.local);
    if (any_lane(chunk < chunks)) {
      const bool earlier = target_lane<kLanes>() < kTargets && rUpTo <= chunk;
      // A number beyond all chunks is read as the first target's, and adds nothing.
      const int of = popcount(ballot(earlier) & target_lanes<kLanes>()) % kTargets;
      const std::uint32_t number = chunk - (shuffle(rUpTo, of) - shuffle(rChunks, of));
      const std::uint32_t target = sums.block.first + static_cast<std::uint32_t>(of);
      const std::uint32_t begin = shuffle(group.rBegin, of) + number * kEdgeChunk;
      std::int32_t rSources[kLoads];
      Acc rWeights[kLoads];
#pragma unroll
      for (int l = 0; l < kLoads; ++l) {
        const std::int64_t edge = lists.offset(begin, target) + l * kLanes + target_lane<kLanes>();
        rSources[l] = chunk < chunks ? load(lists.sources + edge) : 0;
        rWeights[l] = chunk < chunks ? load(static_cast<const Acc*>(lists.weights) + edge) : Acc(0);
      }
      int count = 0;
#pragma unroll
      for (int l = 0; l < kLoads; ++l) sums.list.append(count, rWeights[l] != Acc(0), rSources[l], rWeights[l]);
      sums.sum_chunk(target, count);
    }
    sync_block();
#pragma unroll 1  // registers: unrolled it spills on sm_120
    for (int by = 0; by < kTargets; ++by) {
      const std::uint32_t served = round + static_cast<std::uint32_t>(by);
      if (served >= own_begin && served < own_end) sums.add_chunk(by);
    }
    sync_block();
  }
}

// Lists, for gathering, `count` edges that stand ready. By the lanes of the target.
template <typename Acc, int kLanes>
__device__ __forceinline__ void list_ready(const Lists& lists, const EdgeList<Acc, Place, kLanes>& list,
                                           std::int64_t begin, int count) {
  const std::int32_t* gSources = lists.sources + begin;
  const Acc* gWeights = static_cast<const Acc*>(lists.weights) + begin;
#pragma unroll 1
  for (int edge = target_lane<kLanes>(); edge < count; edge += kLanes) {
    list.set(edge, load(gSources + edge), load(gWeights + edge));
  }
}

template <typename T, int kLaneBytes, bool kVector, int kLanes>
__global__ void __launch_bounds__(kGroupThreads, kVector ? kMinBlocks : kMinBlocksUnaligned)
    gather_kernel(__grid_constant__ const GatherArgs args, __grid_constant__ const Lists lists) {
  using Target = TargetSums<T, kLaneBytes, kVector, Place, kLanes>;
  using Acc = typename Target::Acc;
  const Graph& graph = args.graph;
  SharedArena arena;
  const SumMemory<T, kLaneBytes, Place, kLanes> memory(arena);
  const GatherBlock block(args, kBlockTargets<kLanes>);
  Target sums(args, block, memory);

  // 1. Lists.
  const GroupLists<kLanes> group(lists, block);
  const bool sorts_own = block.side.takes_own && lists.own_slots == 0;
  if (sorts_own) {
    memory.bring_upstream(graph);
    sync_block();
  }

  // 2. Chunks.
  if (any_lane(group.rEdges >= kEdgeChunk)) sum_chunks(lists, group, sums);
  if (!any_lane(sums.local < block.targets)) return;

  // 3. The rest.
  const double poison = load(graph.stats + kPoison);
  const std::uint32_t begin = shuffle(group.rBegin, sums.local);
  const std::uint32_t edges = shuffle(group.rEdges, sums.local);
  int count = 0;
  if (lists.begins != nullptr && block.side.takes_incoming && sums.exists()) {
    count = static_cast<int>(load(lists.rests + sums.target));
    list_ready(lists, sums.list, lists.offset(begin + edges / kEdgeChunk * kEdgeChunk, sums.target), count);
  }
  if (sorts_own && sums.held) sums.template append_own_edges<kOwnSlots>(count, 0);
  Acc rSum[Target::Row::kValues] = {};
  sums.gather(sums.target, count, rSum);
  if (sorts_own && !sums.held) sums.sum_own_chunks(rSum);
  sums.store(rSum, poison);
}

// ---- launch ---------------------------------------------------------------------------------------------------------

template <typename T, int kLaneBytes, int kLanes>
cudaError_t launch_lanes(const BackwardArgs& args, const BackwardPlan& plan, const Lists& lists, cudaStream_t stream) {
  const GatherArgs gather = gather_args_of(args, plan);
  const LaunchShape shape{gather_blocks(gather, plan), kGroupThreads, sum_shared_bytes<T, kLaneBytes, Place, kLanes>()};
  const auto kernel =
      gathers_packs(args) ? gather_kernel<T, kLaneBytes, true, kLanes> : gather_kernel<T, kLaneBytes, false, kLanes>;
  return launch(kernel, shape, stream, gather, lists);
}

}  // namespace

// ---- dispatch -------------------------------------------------------------------------------------------------------

cudaError_t enqueue_gather(const BackwardArgs& args, const BackwardPlan& plan, char* workspace, cudaStream_t stream) {
  if (!gather_serves(args.dtype, plan.lane_bytes, plan.target_lanes, false)) return cudaErrorInvalidValue;
  const Lists lists = lists_of(plan, workspace);
  return for_type(args.dtype, [&]<class T>() {
    constexpr bool kWide = sizeof(T) > 2;  // a half-precision pack has 8 elements already
    if (plan.target_lanes == kHalfWarp) {
      if constexpr (kWide) {
        if (plan.lane_bytes == kWideLane) return launch_lanes<T, kWideLane, kHalfWarp>(args, plan, lists, stream);
      }
      return plan.lane_bytes == kMiddleLane ? launch_lanes<T, kMiddleLane, kHalfWarp>(args, plan, lists, stream)
                                            : launch_lanes<T, kPackBytes, kHalfWarp>(args, plan, lists, stream);
    }
    if constexpr (kWide) {
      if (plan.lane_bytes == kWideLane) return launch_lanes<T, kWideLane, kWarpSize>(args, plan, lists, stream);
    }
    return launch_lanes<T, kPackBytes, kWarpSize>(args, plan, lists, stream);
  });
}

}  // namespace sn::cuda
