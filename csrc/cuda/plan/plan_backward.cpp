// The plan of the backward: the cheapest prediction (cost_backward.cpp) among what its rules allow.
#include <algorithm>

#include "cuda/plan/cost.h"
#include "cuda/plan/plan.h"
#include "cuda/plan/sizes.h"

namespace sn::cuda {
namespace {

constexpr std::int64_t kWarp = 32;
constexpr int kPack = 16;  // bytes of the widest load

// A block of the list kernel sorts a bucket. Counters of a bucket lie in shared memory of the kernels that fill them,
// so the number of buckets is limited.
constexpr int kBucketShift = 6;
constexpr std::int64_t kMostBuckets = 4096;

// A warp counts and places a part. There are few enough parts that the histogram stays below 16 MB, and a multiple of
// the warps of a block.
constexpr std::int64_t kSmallestPart = 256;
constexpr std::int64_t kMostParts = 1024;
constexpr std::int64_t kPartsMultiple = 8;

void set_lane_bytes(const BackwardProblem& problem, int lane_bytes, BackwardPlan* plan) {
  plan->lane_bytes = lane_bytes;
  plan->slice_elements = lane_bytes / element_bytes(problem.dtype) * plan->row_lanes;
  plan->slices = divide_up(problem.D, plan->slice_elements);
}

void add_buckets_and_lists(const BackwardProblem& problem, BackwardPlan* plan) {
  const std::int64_t edges = problem.N * problem.edges;
  const std::int64_t targets = problem.symmetric ? problem.N : problem.M;
  plan->partitioned = true;
  plan->launches += 4;
  plan->bucket_shift = kBucketShift;
  while (divide_up(targets, std::int64_t{1} << plan->bucket_shift) > kMostBuckets) ++plan->bucket_shift;
  plan->buckets = divide_up(targets, std::int64_t{1} << plan->bucket_shift);
  plan->part_edges = std::max(kSmallestPart, round_up(divide_up(edges, kMostParts), kWarp));
  plan->parts = round_up(divide_up(edges, plan->part_edges), kPartsMultiple);

  const auto take = [plan](std::int64_t bytes) {
    const Piece piece{plan->workspace_bytes, bytes};
    plan->workspace_bytes += round_up(bytes, kWorkspaceAlignment);
    return piece;
  };
  const std::int64_t weights = edges * accumulator_bytes(problem.dtype);
  plan->histogram = take(plan->buckets * plan->parts * 4);
  plan->totals = take(plan->buckets * 4);
  plan->begins = take((plan->buckets + 1) * 4);
  plan->placed_targets = take(edges * 4);
  plan->placed_sources = take(edges * 4);
  plan->placed_weights = take(weights);
  plan->list_begins = take((targets + 1) * 4);
  plan->list_sources = take(edges * 4);
  plan->list_weights = take(weights);
  if (problem.symmetric && problem.edges <= kMergedSlots) plan->own_weights = take(weights);
}

// How wide a slice is. Blocks of one slice are neighbours in the grid (gather.cuh), so the slice of all rows that are
// read is what the second-level cache should hold: kNearBytes, which is two packs a lane, 1 KB a row, of 24576 rows,
// one pack of 49152, half a pack of 98304. Lanes of a row are given by D and the type alone: these fix the order of
// the sums.
//
// What is not near comes slower, so two packs give way to one where their slice is not near. Every slice costs a warp
// some 340 instructions and 8 a row before its first element, though, whatever its width: with 9 rows a target 670
// instructions for two packs, 560 for one, 540 for half of one (counted, not measured). So half a pack must save as
// much distance as a second pass over all targets takes, which the cost model weighs. On an H200 it never does: its
// memory brings 0.7 of what the cache does, and 65536 x 2048 in half packs, 17 MB a slice, would take 1.5 times as long
// as in whole ones, 34 MB. Where memory is slow beside the cache it does, from some 70000 rows on.
void choose_slices(const BackwardProblem& problem, const DeviceFacts& device, BackwardPlan* plan) {
  const std::int64_t element = element_bytes(problem.dtype);
  const std::int64_t packs = std::max<std::int64_t>(1, divide_up(problem.D * element, kPack));
  plan->row_lanes = 1;
  while (plan->row_lanes < kWarp && plan->row_lanes < packs) plan->row_lanes *= 2;
  BackwardPlan best;
  double least = 0.0;
  const auto consider = [&](int lane_bytes) {
    set_lane_bytes(problem, lane_bytes, plan);
    const double us = predict_backward(*plan, problem, device).total();
    if (best.launches == 0 || us < least) {
      best = *plan;
      least = us;
    }
  };
  consider(kPack);
  // A half-precision pack has 8 elements already.
  const std::int64_t wide = 2 * kPack * plan->row_lanes;
  if (element > 2 && packs > kWarp && shared_rows(problem) * wide <= kNearBytes) consider(2 * kPack);
  if (!plan->searches && shared_rows(problem) * std::min(wide / 2, problem.D * element) > kNearBytes) {
    consider(kPack / 2);
  }
  *plan = best;
}

}  // namespace

BackwardPlan plan_backward(const BackwardProblem& problem, const DeviceFacts& device) {
  const bool candidates = problem.need_candidates && !problem.symmetric;
  const std::int64_t anchor_groups = problem.need_anchors ? divide_up(problem.N, kBackwardGroup) : 0;
  const std::int64_t candidate_groups = candidates ? divide_up(problem.M, kBackwardGroup) : 0;
  if ((anchor_groups + candidate_groups) * problem.D == 0) return {};

  BackwardPlan plan;
  plan.launches = 1;
  // Own edges are found by their anchor; only incoming ones have to be searched, or listed.
  const bool incoming = (problem.symmetric ? anchor_groups : candidate_groups) * problem.N * problem.edges > 0;
  if (!incoming) {
    choose_slices(problem, device, &plan);
    return plan;
  }
  BackwardPlan listed = plan;
  add_buckets_and_lists(problem, &listed);
  choose_slices(problem, device, &listed);
  if (problem.partition == Partition::kAlways) return listed;
  plan.searches = true;
  choose_slices(problem, device, &plan);
  if (problem.partition == Partition::kNever) return plan;
  const auto us = [&](const BackwardPlan& of) { return predict_backward(of, problem, device).total(); };
  return us(plan) <= us(listed) ? plan : listed;
}

}  // namespace sn::cuda
