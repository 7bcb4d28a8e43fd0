// Edges listed by target, so that every slice of the gather reads what it needs and none searches for it, or sorts out
// what does not count. lists.cu makes the lists from the buckets (buckets.cuh).
#pragma once

#include <cstdint>

#include "cuda/plan/plan_types.h"
#include "cuda/ptx.cuh"

namespace sn::cuda {

// Incoming edges of all targets, target by target, each target's in the order of the graph: by ascending edge, so by
// ascending source. Of a target with E edges the first E - E % kEdgeChunk are its chunks (gather.cuh), in which what
// weighs 0 does not count. What counts of the rest stands without gaps behind them, and own edges behind that, where
// edges are merged: there each target has room for these, and an incoming edge whose reverse is an own edge has given
// it its weight.
struct Lists {
  std::uint32_t* begins;  // [targets + 1], of incoming edges alone; null: no target has any
  std::uint32_t* rests;   // [targets]: how many edges stand behind the chunks
  std::int32_t* sources;
  void* weights;
  std::uint32_t own_slots;  // room for own edges; 0: they are not listed

  // Where the list of a target begins.
  __device__ __forceinline__ std::int64_t place(std::uint32_t begin, std::int64_t target) const {
    return begin + target * own_slots;
  }
};

inline Lists lists_of(const BackwardPlan& plan, char* workspace) {
  if (!plan.partitioned) return {};
  return {.begins = piece<std::uint32_t>(workspace, plan.list_begins),
          .rests = piece<std::uint32_t>(workspace, plan.list_rests),
          .sources = piece<std::int32_t>(workspace, plan.list_sources),
          .weights = workspace + plan.list_weights.offset,
          .own_slots = static_cast<std::uint32_t>(plan.listed_own)};
}

}  // namespace sn::cuda
