// Edges sorted into buckets of targets. It is a stable counting sort: edges keep their order within a bucket. count.cu
// counts the edges of each bucket in each part of the graph, prefix_sum.cu turns counts into places, place.cu writes
// the edges there. Then lists.cu sorts each bucket by target, (lists.cuh).
#pragma once

#include <cstdint>

#include "cuda/backward/graph.cuh"
#include "cuda/launch.cuh"
#include "cuda/memory.cuh"
#include "cuda/plan/plan_types.h"
#include "cuda/ptx.cuh"

namespace sn::cuda {

inline constexpr int kPartThreads = 256;         // of a block that counts or places, at most
inline constexpr int kCounterBytes = 32 * 1024;  // of such a block: fewer warps where there are many buckets
inline constexpr std::int64_t kMostPartBuckets = kCounterBytes / 4;
inline constexpr int kPartLoads = 4;  // of a lane, at once

struct Buckets {
  int shift;
  std::int64_t count;
  std::int64_t parts;
  std::int64_t part_edges;
  std::uint32_t* histogram;
  std::uint32_t* totals;
  std::uint32_t* begins;
  std::int32_t* placed_targets;
  std::int32_t* placed_sources;
  void* placed_weights;
};

// The bucket of an edge, or none.
inline constexpr std::uint32_t kNoBucket = 0xffffffffu;

__device__ __forceinline__ std::uint32_t bucket_of(const Graph& graph, const Buckets& buckets, std::int32_t target) {
  return target >= 0 && target < graph.targets ? static_cast<std::uint32_t>(target) >> buckets.shift : kNoBucket;
}

// The edges of this warp's part.
struct PartRange {
  std::int64_t begin;
  std::int64_t end;

  __device__ __forceinline__ PartRange(const Graph& graph, const Buckets& buckets, std::int64_t part) {
    const std::int64_t all = graph.all_edges;
    begin = part * buckets.part_edges;
    end = begin + buckets.part_edges < all ? begin + buckets.part_edges : all;
  }
};

inline Buckets buckets_of(const BackwardPlan& plan, char* workspace) {
  return {.shift = plan.bucket_shift,
          .count = plan.buckets,
          .parts = plan.parts,
          .part_edges = plan.part_edges,
          .histogram = piece<std::uint32_t>(workspace, plan.histogram),
          .totals = piece<std::uint32_t>(workspace, plan.totals),
          .begins = piece<std::uint32_t>(workspace, plan.begins),
          .placed_targets = piece<std::int32_t>(workspace, plan.placed_targets),
          .placed_sources = piece<std::int32_t>(workspace, plan.placed_sources),
          .placed_weights = workspace + plan.placed_weights.offset};
}

// Blocks that count or place, a warp a part, with a counter of each bucket for each warp; no blocks: the plan does not
// fit the kernels.
inline LaunchShape part_shape(const BackwardPlan& plan) {
  if (plan.buckets > kMostPartBuckets) return {};
  int warps = kPartThreads / kWarpSize;
  while (warps * plan.buckets > kMostPartBuckets) warps /= 2;
  if (plan.parts % warps != 0) return {};
  return {plan.parts / warps, warps * kWarpSize, shared_bytes<std::uint32_t>(warps * static_cast<int>(plan.buckets))};
}

}  // namespace sn::cuda
