// Edges listed by target, so that every slice of the gather reads what it needs and none searches for it. lists.cu
// makes the lists from the buckets (buckets.cuh).
#pragma once

#include <cstdint>

#include "cuda/plan/plan_types.h"

namespace sn::cuda {

// Incoming edges of all targets, target by target, each target's in the order of the graph: by ascending edge, so by
// ascending source. What weighs 0 does not count.
struct Lists {
  std::uint32_t* begins;  // [targets + 1]; null: no target has incoming edges
  std::int32_t* sources;
  void* weights;
  // Own edges [targets][edges], where edges are merged: an incoming edge whose reverse is an own edge has given it its
  // weight, and has weight 0 in the list. Null: own edges weigh what the graph says.
  void* own_weights;
};

inline Lists lists_of(const BackwardPlan& plan, char* workspace) {
  if (!plan.partitioned) return {};
  return {.begins = piece<std::uint32_t>(workspace, plan.list_begins),
          .sources = piece<std::int32_t>(workspace, plan.list_sources),
          .weights = workspace + plan.list_weights.offset,
          .own_weights = plan.own_weights.bytes > 0 ? workspace + plan.own_weights.offset : nullptr};
}

}  // namespace sn::cuda
