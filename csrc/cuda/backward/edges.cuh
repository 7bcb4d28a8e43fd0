// Edges of a group of targets that search.cu finds: which edges of a window belong to the group, in which order, and
// their weights.
#pragma once

#include <cstdint>

#include "cuda/backward/gather.cuh"
#include "cuda/backward/graph.cuh"
#include "cuda/backward/rows.cuh"
#include "cuda/memory.cuh"
#include "cuda/plan/plan_types.h"
#include "cuda/ptx.cuh"

namespace sn::cuda {

inline constexpr int kWindowLoads = 8;  // of a lane, at once
inline constexpr int kWarpWindow = kWindowLoads * kWarpSize;
inline constexpr int kWindow = kGroupWarps * kWarpWindow;
inline constexpr int kGroupBits = 3;  // of a listed edge: which of the targets; the rest: where in the window
static_assert((1 << kGroupBits) == kBackwardGroup);
static_assert(kWindow << kGroupBits <= 0x10000, "a listed edge has 16 bits");

inline constexpr int kSorted = kWindow + kGroupWarps * kEdgeChunk;
static_assert(kSorted <= 0x10000, "a sorted edge has 16 bits");

template <typename Acc>
struct IncomingEdges {
  const Graph& graph;
  Shared<std::int32_t> sOwnIndices;
  Shared<double> sUpstream;
  bool merge;

  // Appends the edge at `position` of the graph, one a lane, to the list if it counts and has no reverse among the own
  // edges of `target`. Otherwise adds its weight to `merged` of the lane that holds the reverse.
  __device__ __forceinline__ void append(const EdgeList<Acc, std::int32_t, kWarpSize>& list, int& count, int target,
                                         bool valid, std::uint32_t position, Acc& merged) const {
    std::int32_t source = 0;
    Acc weight = 0;
    if (valid) {
      const std::uint32_t anchor = position / graph.edges;
      source = static_cast<std::int32_t>(anchor);
      weight = edge_weight<Acc>(graph, sUpstream.get(0), anchor, position);
    }
    int reverse = -1;
    if (merge) {
      for (int slot = static_cast<int>(graph.edges) - 1; slot >= 0; --slot) {
        if (sOwnIndices.get(target * kOwnSlots + slot) == source) reverse = slot;
      }
    }
    const bool counts = weight != Acc(0);
    for (std::uint32_t merging = ballot(counts && reverse >= 0); merging != 0; merging &= merging - 1) {
      const int from = find_first(merging);
      const int into = shuffle(reverse, from);
      const Acc more = shuffle(weight, from);
      if (lane_id() == into) merged = add(merged, more);
    }
    list.append(count, counts && reverse < 0, source, weight);
  }
};

// Targets of the edges of a window that this lane looks at. The warps share the window equally, so their lists are
// equally long; the last window may be short.
struct WindowTargets {
  int share = 0;  // edges of a warp
  std::uint32_t targets[kWindowLoads];

  __device__ __forceinline__ void read(const std::int32_t* gTargets, std::uint32_t window, std::uint32_t range_count) {
    const std::uint32_t here = range_count - window < kWindow ? range_count - window : kWindow;
    share = static_cast<int>((here + kGroupThreads - 1) / kGroupThreads) * kWarpSize;
#pragma unroll
    for (int l = 0; l < kWindowLoads; ++l) {
      const std::uint32_t at = static_cast<std::uint32_t>(warp_id() * share + l * kWarpSize + lane_id());
      const bool exists = l * kWarpSize < share && at < here;
      targets[l] = exists ? static_cast<std::uint32_t>(load(gTargets + window + at)) : 0xffffffffu;
    }
  }
};

// The edges of a window that hit the group, in a list for each warp that read them.
struct WindowMatches {
  Shared<std::uint16_t> sMatches;
  Shared<int> sCounts;

  // Lists this warp's.
  __device__ __forceinline__ void list(const WindowTargets& window, std::uint32_t first, int targets) const {
    int count = 0;
#pragma unroll
    for (int l = 0; l < kWindowLoads; ++l) {
      if (l * kWarpSize >= window.share) break;
      const std::uint32_t target = window.targets[l] - first;
      const bool hit = target < static_cast<std::uint32_t>(targets);
      const std::uint32_t hits = ballot(hit);
      if (hit) {
        const int place = warp_id() * window.share + l * kWarpSize + lane_id();
        sMatches.set(warp_id() * kWarpWindow + count + popcount(hits & lanes_below()),
                     static_cast<std::uint16_t>((place << kGroupBits) | static_cast<int>(target)));
      }
      count += popcount(hits);
    }
    if (lane_id() == 0) sCounts.set(warp_id(), count);
  }

  // keep(rank, place in the window) of those that hit this warp's target, in order. Returns how many.
  template <typename Keep>
  __device__ __forceinline__ int walk(const Keep& keep) const {
    int found = 0;
    const auto take = [&](int from, int at, bool exists) {
      const int match = exists ? sMatches.get(from * kWarpWindow + at) : 0;
      const bool mine = exists && (match & (kGroupWarps - 1)) == warp_id();
      const std::uint32_t all = ballot(mine);
      if (mine) keep(found + popcount(all & lanes_below()), match >> kGroupBits);
      found += popcount(all);
    };
    const int longest = static_cast<int>(
        reduce_max(lane_id() < kGroupWarps ? static_cast<std::uint32_t>(sCounts.get(lane_id() % kGroupWarps)) : 0u));
    if (longest <= kWarpSize) {
      // The usual case, with all reads under way at once.
#pragma unroll
      for (int from = 0; from < kGroupWarps; ++from) take(from, lane_id(), lane_id() < sCounts.get(from));
    } else {
      for (int from = 0; from < kGroupWarps; ++from) {
        const int count = sCounts.get(from);
        for (int base = 0; base < count; base += kWarpSize) take(from, base + lane_id(), base + lane_id() < count);
      }
    }
    return found;
  }
};

// The edges of a window and of the tails, target by target.
struct SortedEdges {
  Shared<std::uint16_t> sSorted;
  Shared<std::uint32_t> sTails;
  std::uint32_t window;

  __device__ __forceinline__ std::uint32_t position(int target, int at) const {
    const int place = sSorted.get(at);
    return place < kWindow ? window + static_cast<std::uint32_t>(place)
                           : sTails.get(target * kEdgeChunk + place - kWindow);
  }
};

}  // namespace sn::cuda
