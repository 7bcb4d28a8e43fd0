// Gradients of features: a sparse gather by target row, without atomics on floating-point numbers.
//
//   out_t = sum over the edges e of target t of  w_e (x_t - other_e),     w_e = acc(upstream * coefficient_e)
//
// The difference comes first: the factored form (sum w) x_t - sum w other cancels for near neighbours. A target has
// incoming edges (from anchors that selected it, by ascending edge id) and own edges (in slot order). A side of the
// problem has one kind; in the symmetric case it has both. There, an incoming edge whose reverse is an own edge is the
// same vector: its weight is added to the own edge's weight, and the row is fetched once, unless own edges are more
// than kMergedSlots. Edges without an index or with weight 0 do not count.
//
// ONE order of summation, whatever the plan, the schedule and the other rows are:
//   1. The incoming edges of a target, those that do not count included, are cut into chunks of kEdgeChunk.
//   2. A full chunk is summed from zero by fused multiply-adds in order; chunk sums are added in order to the total.
//      So are the weights of the edges that an own edge merges, those of the rest one by one.
//   3. The rest is summed in the same way, and up to kMergedSlots own edges continue that sum, which is added to the
//      total last. Of more own edges, that sum is added to the total first, and each kEdgeChunk of them are a chunk as
//      well. The result is rounded once.
//   4. Where a row is at most L < 32 packs of 16 bytes, L a power of two, 32 / L groups of lanes share the list: of the
//      edges that are left in it group g takes number g, g + 32 / L, ..., and the groups meet in a butterfly before the
//      rounding. L depends on D and the type alone.
//
// A block of 8 warps serves 8 targets, a warp each, or 16, half a warp each, in a slice of D. Blocks of one slice are
// neighbours in the grid, so the slice of all rows stays in the second-level cache while they run, as far as it fits
// (plan_backward.cpp). Lanes fetch 2 to 8 rows at a time: 96 to 128 bytes a lane, in half precision 64 or 72, of rows
// that are not aligned 32 or 48. Chunks of a hub are shared by all targets' lanes.
//
// What a target's lanes do before its first row and behind its last is as much in a narrow slice as in a wide one.
// So in narrow slices two targets share a warp. Narrow slices are for rows so many that wide ones would not stay in
// the cache.
//
// Two kernels find a target's incoming edges: gather.cu reads them in a list, search.cu searches the graph. This file
// has what comes then.
#pragma once

#include <cstdint>

#include "cuda/backward/graph.cuh"
#include "cuda/backward/rows.cuh"
#include "cuda/memory.cuh"
#include "cuda/plan/sizes.h"
#include "cuda/ptx.cuh"
#include "cuda/stages.h"

namespace sn::cuda {

inline constexpr int kGroupWarps = static_cast<int>(kBackwardGroup);  // of a gather block
inline constexpr int kGroupThreads = kGroupWarps * kWarpSize;
template <int kLanes>
inline constexpr int kBlockTargets = kGroupThreads / kLanes;

// Bytes of a slice that a lane may have instead of one pack.
inline constexpr int kWideLane = 2 * kPackBytes;
inline constexpr int kMiddleLane = kPackBytes + kPackBytes / 2;

// 80 registers a thread: up to 24 warps with 2 to 4 KB under way each are more than what hides the latency of the
// second-level cache at a multiprocessor's share of its bandwidth.
// Unaligned rows need an address an element.
inline constexpr int kMinBlocks = 3;
inline constexpr int kMinBlocksUnaligned = 2;

struct BackwardSide {
  const void* own;  // rows of the targets
  std::int64_t own_stride;
  const void* other;
  std::int64_t other_stride;
  std::int64_t rows;
  std::int64_t other_rows;
  std::int64_t groups;
  void* out;
  bool takes_own;
  bool takes_incoming;
};

struct GatherArgs {
  Graph graph;
  BackwardSide sides[2];
  std::int64_t first_blocks;  // that serve sides[0]
  std::int64_t slice_elements;
  int row_shift;  // log2 of the lanes of a row
};

// The targets of a block, and its slice.
struct GatherBlock {
  const BackwardSide& side;
  std::uint32_t slice;
  std::uint32_t first;  // target
  int targets;

  __device__ __forceinline__ GatherBlock(const GatherArgs& args, int most_targets)
      : side(args.sides[block_id() >= args.first_blocks ? 1 : 0]) {
    const bool second = block_id() >= args.first_blocks;
    const std::uint32_t block = static_cast<std::uint32_t>(block_id() - (second ? args.first_blocks : 0));
    slice = block / static_cast<std::uint32_t>(side.groups);
    first = (block - slice * static_cast<std::uint32_t>(side.groups)) * static_cast<std::uint32_t>(most_targets);
    const std::int64_t rest = side.rows - first;
    targets = static_cast<int>(rest < most_targets ? rest : most_targets);
  }
};

template <typename T, int kLaneBytes>
inline constexpr int kBlockSums = kGroupThreads * kLaneBytes / static_cast<int>(sizeof(T));

template <typename T, int kLaneBytes, typename Place, int kLanes>
constexpr int sum_shared_bytes() {
  using Acc = sn::cuda::Acc<T>;
  return shared_bytes<Place>(kBlockTargets<kLanes> * kList) + shared_bytes<Acc>(kBlockTargets<kLanes> * kList) +
         2 * shared_bytes<Acc>(kBlockSums<T, kLaneBytes>) + shared_bytes<double>(1);
}

template <typename T, int kLaneBytes, typename Place, int kLanes>
struct SumMemory {
  using Acc = sn::cuda::Acc<T>;

  Shared<Place> sPlaces;
  Shared<Acc> sWeights;
  Shared<Acc> sTotals;
  Shared<Acc> sPartials;  // chunk sums
  Shared<double> sUpstream;

  __device__ __forceinline__ explicit SumMemory(SharedArena& arena)
      : sPlaces(arena.take<Place>(kBlockTargets<kLanes> * kList)),
        sWeights(arena.take<Acc>(kBlockTargets<kLanes> * kList)),
        sTotals(arena.take<Acc>(kBlockSums<T, kLaneBytes>)),
        sPartials(arena.take<Acc>(kBlockSums<T, kLaneBytes>)),
        sUpstream(arena.take<double>(1)) {}

  // By the first warp; seen by others behind a barrier.
  __device__ __forceinline__ void bring_upstream(const Graph& graph) const {
    if (warp_id() != 0) return;
    const double upstream = shared_upstream<Acc>(graph);
    if (lane_id() == 0) sUpstream.set(0, upstream);
  }
};

// The kLanes lanes of a target, and the sums of its slice. What is not said to be for some is done by all lanes of
// a warp.
template <typename T, int kLaneBytes, bool kVector, typename Place, int kLanes>
struct TargetSums {
  using Row = RowStrip<T, kLaneBytes, kVector>;
  using Acc = typename Row::Acc;
  using Sums = LaneSums<Acc, Row::kValues, kLanes>;
  using Values = Acc[Row::kValues];

  const GatherArgs& args;
  const GatherBlock& block;
  const SumMemory<T, kLaneBytes, Place, kLanes>& memory;
  const int local;  // number of the target in the block
  const std::uint32_t target;
  const int row_shift;  // log2 of the lanes of a row
  const bool held;      // own edges fit the list beside a chunk
  const Row strip;
  const EdgeList<Acc, Place, kLanes> list;
  bool summed = false;  // chunks have been added to the total

  __device__ __forceinline__ TargetSums(const GatherArgs& gather_args, const GatherBlock& gather_block,
                                        const SumMemory<T, kLaneBytes, Place, kLanes>& sum_memory)
      : args(gather_args),
        block(gather_block),
        memory(sum_memory),
        local(kLanes == kWarpSize ? warp_id() : thread_id() >> kHalfWarpShift),
        target(block.first + static_cast<std::uint32_t>(local)),
        row_shift(kLanes < kWarpSize ? kHalfWarpShift : args.row_shift),
        held(args.graph.edges <= kOwnSlots),
        strip(args.graph.dims, block.slice * args.slice_elements, row_shift),
        list{memory.sPlaces.offset(local * kList), memory.sWeights.offset(local * kList),
             block.side.other_stride * static_cast<std::int64_t>(sizeof(Place) == 8 ? sizeof(T) : 1), row_shift} {}

  // Whether the target exists. Warps that have none leave before they gather.
  __device__ __forceinline__ bool exists() const { return kLanes == kWarpSize || local < block.targets; }

  // Adds the listed edges of a target.
  __device__ __forceinline__ void gather(std::uint32_t of, int count, Values& rSum) const {
    const T* gOwn = static_cast<const T*>(block.side.own) + std::int64_t{of} * block.side.own_stride + strip.begin;
    gather_list(strip, list, count, gOwn, static_cast<const T*>(block.side.other) + strip.begin, rSum);
  }

  // Sums the listed edges, a chunk of some target, into these lanes' partial sums.
  __device__ __forceinline__ void sum_chunk(std::uint32_t of, int count) const {
    Acc rSum[Row::kValues] = {};
    gather(of, count, rSum);
    Sums::store(memory.sPartials, local, rSum);
  }

  // Adds partial sums, a chunk of this target, to the total. By the target's lanes.
  __device__ __forceinline__ void add_chunk(int by) {
    Acc rSum[Row::kValues] = {};
    Sums::add_to(memory.sPartials, by, rSum);
    add_to_total(rSum);
  }

  // The list continues with an own edge a lane.
  __device__ __forceinline__ void append_own(int& count, std::int32_t index, Acc weight) const {
    list.append(count, index >= 0 && index < block.side.other_rows && weight != Acc(0), index, weight);
  }

  // The list continues with own edges as the graph has them: kMost from this one on, as far as there are any.
  template <int kMost>
  __device__ __forceinline__ void append_own_edges(int& count, std::uint32_t slots) const {
    const Graph& graph = args.graph;
    for (std::uint32_t at = static_cast<unsigned>(target_lane<kLanes>()); at < kMost; at += kLanes) {
      std::int32_t index = -1;
      Acc weight = 0;
      if (exists() && slots + at < graph.edges) {
        const std::uint32_t edge = target * graph.edges + slots + at;
        index = load(graph.indices + edge);
        weight = edge_weight<Acc>(graph, memory.sUpstream.get(0), target, edge);
      }
      append_own(count, index, weight);
    }
  }

  // Own edges too many for a list: chunks as well.
  __device__ __forceinline__ void sum_own_chunks(Values& rSum) {
    for (std::uint32_t slots = 0; slots < args.graph.edges; slots += kEdgeChunk) {
      add_to_total(rSum);
      int count = 0;
      append_own_edges<kEdgeChunk>(count, slots);
#pragma unroll
      for (int v = 0; v < Row::kValues; ++v) rSum[v] = 0;
      gather(target, count, rSum);
    }
  }

  // Joins the total and the groups of lanes that shared the rest, and rounds.
  __device__ __forceinline__ void store(Values& rSum, double poison) const {
    if (summed) Sums::add_to(memory.sTotals, local, rSum);
    for (int mask = 1 << row_shift; mask < kLanes; mask *= 2) {
#pragma unroll
      for (int v = 0; v < Row::kValues; ++v) rSum[v] = add(rSum[v], shuffle_xor(rSum[v], mask));
    }
    if (is_nan(poison)) {
#pragma unroll
      for (int v = 0; v < Row::kValues; ++v) rSum[v] = quiet_nan<Acc>();
    }
    if (exists() && target_lane<kLanes>() >> row_shift == 0) {
      strip.store_row(static_cast<T*>(block.side.out) + target * args.graph.dims + strip.begin, rSum);
    }
  }

 private:
  __device__ __forceinline__ void add_to_total(Values& rSum) {
    if (summed) Sums::add_to(memory.sTotals, local, rSum);
    Sums::store(memory.sTotals, local, rSum);
    summed = true;
  }
};

// ---- launch ---------------------------------------------------------------------------------------------------------

inline BackwardSide side_of(const FeatureView& own, const FeatureView& other, void* out, bool takes_own,
                            bool takes_incoming, std::int64_t block_targets) {
  return {.own = own.data,
          .own_stride = own.row_stride,
          .other = other.data,
          .other_stride = other.row_stride,
          .rows = own.rows,
          .other_rows = other.rows,
          .groups = out == nullptr ? 0 : divide_up(own.rows, block_targets),
          .out = out,
          .takes_own = takes_own,
          .takes_incoming = takes_incoming};
}

inline GatherArgs gather_args_of(const BackwardArgs& args, const BackwardPlan& plan) {
  GatherArgs gather{};
  gather.graph = graph_of(args);
  const std::int64_t block_targets = kGroupThreads / plan.target_lanes;
  if (args.symmetric) {
    gather.sides[0] = side_of(args.anchors, args.anchors, args.grad_anchors, true, true, block_targets);
  } else {
    gather.sides[0] = side_of(args.anchors, args.candidates, args.grad_anchors, true, false, block_targets);
    gather.sides[1] = side_of(args.candidates, args.anchors, args.grad_candidates, false, true, block_targets);
  }
  gather.first_blocks = gather.sides[0].groups * plan.slices;
  gather.slice_elements = plan.slice_elements;
  while ((1 << gather.row_shift) < plan.row_lanes) ++gather.row_shift;
  return gather;
}

inline std::int64_t gather_blocks(const GatherArgs& gather, const BackwardPlan& plan) {
  return (gather.sides[0].groups + gather.sides[1].groups) * plan.slices;
}

// Whether all rows can be read and written in packs.
inline bool gathers_packs(const BackwardArgs& args) {
  bool packs = args.dims * element_bytes(args.dtype) % kPackBytes == 0 && rows_aligned(args.anchors, args.dtype) &&
               rows_aligned(args.candidates, args.dtype);
  for (const void* out : {args.grad_anchors, args.grad_candidates}) {
    packs = packs && reinterpret_cast<std::uintptr_t>(out) % kPackBytes == 0;
  }
  return packs;
}

}  // namespace sn::cuda
