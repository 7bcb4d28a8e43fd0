// Edges listed by target, so that every slice of the gather reads what it needs and none searches for it. lists.cu
// makes the lists from the buckets (buckets.cuh).
#pragma once

#include <cstdint>

#include "cuda/plan/plan_types.h"
#include "cuda/ptx.cuh"

namespace sn::cuda {

// Incoming edges of all targets, target by target, each target's in the order of the graph: by ascending edge, so by
// ascending source. A list of E incoming edges has, in this order: its chunks (gather.cuh), the first E - E %
// kEdgeChunk, among which are still some that weigh 0 and do not count; those of the rest that count; and, where edges
// are merged, own edges that count. There each list has room for own_slots more, and an incoming edge whose reverse is
// an own edge has given it its weight.
struct Lists {
  std::uint32_t* begins;  // [targets + 1], of incoming edges alone; null: there are no lists
  std::uint32_t* rests;   // [targets]: how many edges stand behind the chunks
  std::int32_t* sources;
  void* weights;
  std::uint32_t own_slots;  // room for own edges; 0: they are not listed

  // Where the list of a target begins.
  __device__ __forceinline__ std::int64_t offset(std::uint32_t begin, std::int64_t target) const {
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
