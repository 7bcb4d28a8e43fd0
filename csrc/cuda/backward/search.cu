// The gather of gradients (gather.cuh has what is computed, and in which order) of small problems, in one kernel: each
// block searches the whole graph for the incoming edges of its 8 targets. For every window of 2048 edges:
//
// 1. Each warp reads an eighth of the window and lists, in shared memory, the edges that belong to one of the
//    8 targets.
//
// 2. Each warp walks the 8 lists and appends the edges of its own target to that target's tail.
//
// 3. Once a tail holds a chunk (a hub, or many neighbours), the edges are listed target by target. All warps sum chunks
//    of all targets in turn, and the warp of a target adds its chunk sums in order. No block waits for a single warp.
//
// At the end each warp sums its tail and its own edges.
#include <cstdint>

#include "cuda/backward/edges.cuh"
#include "cuda/backward/gather.cuh"
#include "cuda/launch.cuh"
#include "cuda/memory.cuh"
#include "cuda/ptx.cuh"
#include "cuda/stages.h"

namespace sn::cuda {
namespace {

// ---- traits ---------------------------------------------------------------------------------------------------------

using Place = std::int32_t;  // of a listed edge's row

template <typename T, int kLaneBytes>
constexpr int search_shared_bytes() {
  using Acc = sn::cuda::Acc<T>;
  static_assert(shared_bytes<Acc>(kBlockSums<T, kLaneBytes>) >= shared_bytes<std::uint16_t>(kWindow),
                "matches lie where chunk sums will");
  return sum_shared_bytes<T, kLaneBytes, Place, kWarpSize>() + shared_bytes<std::uint16_t>(kSorted) +
         2 * shared_bytes<int>(kGroupWarps) + shared_bytes<std::uint32_t>(kGroupWarps * kEdgeChunk) +
         shared_bytes<std::int32_t>(kGroupWarps * kOwnSlots) + shared_bytes<Acc>(kGroupWarps * kOwnSlots);
}
// Three blocks of float fit the 100 KB of the smallest multiprocessors, of which a block costs 1 KB more than it
// asks for.
static_assert(kMinBlocks * (search_shared_bytes<float, kWideLane>() + 1024) <= 100 * 1024);
static_assert(search_shared_bytes<double, kWideLane>() <= kPlainSharedBytes);

template <typename T, int kLaneBytes>
struct SearchMemory {
  using Acc = sn::cuda::Acc<T>;

  SumMemory<T, kLaneBytes, Place, kWarpSize> sums;
  Shared<std::uint16_t> sSorted;  // edges target by target: in the window, or in the tail
  Shared<int> sMatchCounts;
  Shared<int> sLengths;          // edges of a target that wait
  Shared<std::uint32_t> sTails;  // their positions, less than a chunk
  Shared<std::int32_t> sOwnIndices;
  Shared<Acc> sMerged;  // of a chunk: weights that belong to own edges
  // Edges of the window that hit the group, warp by warp; done with before there are chunk sums.
  Shared<std::uint16_t> sMatches;

  __device__ __forceinline__ explicit SearchMemory(SharedArena& arena)
      : sums(arena),
        sSorted(arena.take<std::uint16_t>(kSorted)),
        sMatchCounts(arena.take<int>(kGroupWarps)),
        sLengths(arena.take<int>(kGroupWarps)),
        sTails(arena.take<std::uint32_t>(kGroupWarps * kEdgeChunk)),
        sOwnIndices(arena.take<std::int32_t>(kGroupWarps * kOwnSlots)),
        sMerged(arena.take<Acc>(kGroupWarps * kOwnSlots)),
        sMatches(sums.sPartials.template view<std::uint16_t>()) {}
};

// ---- kernel ---------------------------------------------------------------------------------------------------------

// Puts into shared memory what lanes and warps ask each other for: a warp the own edges of its target, one a lane, and
// the first warp the upstream gradient.
template <typename T, int kLaneBytes>
__device__ __forceinline__ void bring_own_edges(const Graph& graph, const GatherBlock& block,
                                                const SearchMemory<T, kLaneBytes>& memory) {
  const std::uint32_t target = block.first + static_cast<std::uint32_t>(warp_id());
  const bool holds = block.side.takes_own && warp_id() < block.targets && graph.edges <= kOwnSlots &&
                     static_cast<std::uint32_t>(lane_id()) < graph.edges;
  std::int32_t rIndex = holds ? load(graph.indices + target * graph.edges + lane_id()) : -1;
  if (rIndex >= block.side.other_rows) rIndex = -1;
  memory.sOwnIndices.set(warp_id() * kOwnSlots + lane_id(), rIndex);
  memory.sums.bring_upstream(graph);
}

// A warp of the block, and what has been found of its target so far.
template <typename T, int kLaneBytes, bool kVector>
struct SearchWarp {
  using Target = TargetSums<T, kLaneBytes, kVector, Place, kWarpSize>;
  using Acc = typename Target::Acc;

  const SearchMemory<T, kLaneBytes>& memory;
  Target& sums;
  const IncomingEdges<Acc> incoming;
  const WindowMatches matches;
  Acc rMerged = 0;  // of own edge `lane`: weights of incoming edges that have it as their reverse
  int waiting = 0;  // edges in the tail

  __device__ __forceinline__ SearchWarp(const Graph& graph, const SearchMemory<T, kLaneBytes>& search_memory,
                                        Target& target_sums)
      : memory(search_memory),
        sums(target_sums),
        incoming{graph, memory.sOwnIndices, memory.sums.sUpstream, sums.block.side.takes_own && sums.held},
        matches{memory.sMatches, memory.sMatchCounts} {}

  // Appends the edges of the window that hit this warp's target to its tail. Returns how many then wait, of which the
  // tail holds less than a chunk.
  __device__ __forceinline__ int find_matches(std::uint32_t window) const {
    const Shared<std::uint32_t> sTails = memory.sTails;
    const int found = matches.walk([&](int rank, int place) {
      if (waiting + rank < kEdgeChunk) {
        sTails.set(warp_id() * kEdgeChunk + waiting + rank, window + static_cast<std::uint32_t>(place));
      }
    });
    const int length = waiting + found;
    if (lane_id() == 0) memory.sLengths.set(warp_id(), length);
    return length;
  }

  // Lists the edges that wait, target by target: the tails are what they were up to `waiting`, what find_matches has
  // appended is listed again. Returns all targets' full chunks.
  __device__ __forceinline__ int sort_edges(int& sorted_begin) const {
    int chunks = 0;
    sorted_begin = 0;
    for (int of = 0; of < kGroupWarps; ++of) {
      const int edges = memory.sLengths.get(of);
      chunks += edges / kEdgeChunk;
      sorted_begin += of < warp_id() ? edges : 0;
    }
    for (int at = lane_id(); at < waiting; at += kWarpSize) {
      memory.sSorted.set(sorted_begin + at, static_cast<std::uint16_t>(kWindow + at));
    }
    const int begin = sorted_begin + waiting;
    matches.walk([&](int rank, int place) { memory.sSorted.set(begin + rank, static_cast<std::uint16_t>(place)); });
    return chunks;
  }

  // Sums the chunk of this number, which is some target's, into this warp's partial sums.
  __device__ __forceinline__ void sum_chunk(int chunk, const SortedEdges& sorted) const {
    int of = 0;
    int begin = 0;
    for (; of < kGroupWarps; ++of) {
      const int edges = memory.sLengths.get(of);
      if (chunk < edges / kEdgeChunk) break;
      chunk -= edges / kEdgeChunk;
      begin += edges;
    }
    if (of == kGroupWarps) return;
    int count = 0;
    Acc merged = 0;
    for (int at = lane_id(); at < kEdgeChunk; at += kWarpSize) {
      incoming.append(sums.list, count, of, true, sorted.position(of, begin + chunk * kEdgeChunk + at), merged);
    }
    memory.sMerged.set(warp_id() * kOwnSlots + lane_id(), merged);
    sums.sum_chunk(sums.block.first + static_cast<std::uint32_t>(of), count);
  }

  // Adds the chunks of this warp's target that the warps have summed in this round, in order.
  __device__ __forceinline__ void add_chunks(int round, int length) {
    int chunk = 0;
    for (int before = 0; before < warp_id(); ++before) chunk += memory.sLengths.get(before) / kEdgeChunk;
    const int end = chunk + length / kEdgeChunk;
    for (int by = 0; by < kGroupWarps; ++by) {
      if (round + by < chunk || round + by >= end) continue;
      sums.add_chunk(by);
      rMerged = add(rMerged, memory.sMerged.get(by * kOwnSlots + lane_id()));
    }
  }

  // All full chunks of all targets, a warp each in turn. What is left of this warp's edges is its tail.
  __device__ __forceinline__ void serve_chunks(std::uint32_t window, int length) {
    int sorted_begin;
    const int chunks = sort_edges(sorted_begin);
    const SortedEdges sorted{memory.sSorted, memory.sTails, window};
    sync_block();
    for (int round = 0; round < chunks; round += kGroupWarps) {
      sum_chunk(round + warp_id(), sorted);
      sync_block();
      add_chunks(round, length);
      sync_block();
    }
    waiting = length % kEdgeChunk;
    if (length < kEdgeChunk) return;  // the tail is right: what find_matches appended belongs there
    for (int at = lane_id(); at < waiting; at += kWarpSize) {
      memory.sTails.set(warp_id() * kEdgeChunk + at, sorted.position(warp_id(), sorted_begin + length - waiting + at));
    }
  }

  // The edges that wait, then own edges held one a lane.
  __device__ __forceinline__ void sum_rest(typename Target::Values& rSum) {
    const Graph& graph = sums.args.graph;
    int count = 0;
    for (int base = 0; base < waiting; base += kWarpSize) {
      const int at = base + lane_id();
      const bool valid = at < waiting;
      incoming.append(sums.list, count, warp_id(), valid, valid ? memory.sTails.get(warp_id() * kEdgeChunk + at) : 0,
                      rMerged);
    }
    if (sums.block.side.takes_own && sums.held) {
      const std::int32_t index = memory.sOwnIndices.get(warp_id() * kOwnSlots + lane_id());
      Acc weight = 0;
      if (index >= 0) {
        const std::uint32_t edge = sums.target * graph.edges + static_cast<std::uint32_t>(lane_id());
        weight = add(edge_weight<Acc>(graph, memory.sums.sUpstream.get(0), sums.target, edge), rMerged);
      }
      sums.append_own(count, index, weight);
    }
    sums.gather(sums.target, count, rSum);
  }
};

template <typename T, int kLaneBytes, bool kVector>
__global__ void __launch_bounds__(kGroupThreads, kVector ? kMinBlocks : kMinBlocksUnaligned)
    search_kernel(__grid_constant__ const GatherArgs args) {
  const Graph& graph = args.graph;
  SharedArena arena;
  const SearchMemory<T, kLaneBytes> memory(arena);
  const GatherBlock block(args, kBlockTargets<kWarpSize>);
  const std::uint32_t edges = block.side.takes_incoming ? graph.all_edges : 0;

  // All first loads are under way before the first one is waited for.
  WindowTargets rWindow;
  rWindow.read(graph.indices, 0, edges);
  bring_own_edges(graph, block, memory);
  using Warp = SearchWarp<T, kLaneBytes, kVector>;
  typename Warp::Target sums(args, block, memory.sums);
  Warp warp(graph, memory, sums);

  for (std::uint32_t window = 0; window < edges;) {
    // 1. Which edges belong to the group. The next window is under way while this one's matches are sorted out.
    warp.matches.list(rWindow, block.first, block.targets);
    const std::uint32_t next = edges - window > kWindow ? window + kWindow : edges;
    sync_block();
    rWindow.read(graph.indices, next, edges);
    // 2. What hits this warp's target.
    const int length = warp.find_matches(window);
    sync_block();
    if (!any_lane(lane_id() < kGroupWarps && memory.sLengths.get(lane_id() % kGroupWarps) >= kEdgeChunk)) {
      warp.waiting = length;
      window = next;
      continue;
    }
    // 3. Chunks.
    warp.serve_chunks(window, length);
    window = next;
    rWindow.read(graph.indices, window, edges);  // once more, rather than in registers all the while
  }
  sync_block();

  if (warp_id() >= block.targets) return;
  const double poison = load(graph.stats + kPoison);
  typename Warp::Acc rSum[Warp::Target::Row::kValues] = {};
  warp.sum_rest(rSum);
  if (sums.block.side.takes_own && !sums.held) sums.sum_own_chunks(rSum);
  sums.store(rSum, poison);
}

// ---- launch ---------------------------------------------------------------------------------------------------------

template <typename T, int kLaneBytes>
cudaError_t launch_lanes(const BackwardArgs& args, const BackwardPlan& plan, cudaStream_t stream) {
  const GatherArgs gather = gather_args_of(args, plan);
  const LaunchShape shape{gather_blocks(gather, plan), kGroupThreads, search_shared_bytes<T, kLaneBytes>()};
  const auto kernel = gathers_packs(args) ? search_kernel<T, kLaneBytes, true> : search_kernel<T, kLaneBytes, false>;
  return launch(kernel, shape, stream, gather);
}

}  // namespace

// ---- dispatch -------------------------------------------------------------------------------------------------------

cudaError_t enqueue_search(const BackwardArgs& args, const BackwardPlan& plan, cudaStream_t stream) {
  if (plan.target_lanes != kWarpSize) return cudaErrorInvalidValue;
  return for_type(args.dtype, [&]<class T>() {
    if constexpr (sizeof(T) > 2) {
      if (plan.lane_bytes == kWideLane) return launch_lanes<T, kWideLane>(args, plan, stream);
      if (plan.lane_bytes == kMiddleLane) return launch_lanes<T, kMiddleLane>(args, plan, stream);
    }
    return plan.lane_bytes == kPackBytes ? launch_lanes<T, kPackBytes>(args, plan, stream) : cudaErrorInvalidValue;
  });
}

}  // namespace sn::cuda
