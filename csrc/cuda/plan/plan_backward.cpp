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

// How wide a slice is: two packs of 16 bytes a lane, one and a half, one, or half of one. Blocks of one slice are
// neighbours in the grid (gather.cuh), so the slice of all rows that are read is what the second-level cache should
// hold: kNearBytes, which is two packs, 1 KB a row, of 24576 rows, one and a half of 32768, one of 49152. Lanes of a
// row are given by D and the type alone: these fix the order of the sums.
//
// Narrow slices are near but many, and every slice costs a warp some 340 instructions and 8 a row before its first
// element, whatever its width: with 9 rows a target 590 instructions by the model for two packs, 550 for one and a
// half, 500 for one, 460 for half of one (counted, not measured). Far rows come at 0.7 of the cache's rate on an
// H200. So:
//
//   * Slices wider than a pack are near, as a rule, though the prediction alone would let them grow a little beyond:
//     how much slower far rows are was measured in another kernel. Where they are not near, they serve only if one pack
//     would lose more than kMostLoss even if distance cost nothing: where targets have few rows (k below 10, more
//     candidates than anchors). Likewise one and a half packs where they hold whole rows, of which one pack would leave
//     less than half for a second slice, and where blocks search the graph, as they do in every slice anew.
//   * One pack always serves. Of 65536 x 2048 its slices are 32 MB. On an H200 half packs, 16 MB, would take 1.4 times
//     as long, and 12 bytes a lane, 24 MB, 1.12 times (two packs, 64 MB, 0.92 times). Where memory is slow beside the
//     cache half packs do pay, from some 70000 rows on, and here and there where they leave fewer lanes beyond D.
//
// What is considered depends on how rows and neighbours relate, beside what is near, and on D only where a slice holds
// whole rows: more rows, or dimensions, are never cheaper, and one row more is dearer by less than 1.3 in all that the
// tests walk.
constexpr double kMostLoss = 1.26;

// Elements that slices of every width divide.
std::int64_t even_dims(DType dtype) {
  return kWarp * 6 * kPack / element_bytes(dtype);
}

void choose_slices(const BackwardProblem& problem, const DeviceFacts& device, BackwardPlan* plan) {
  const std::int64_t element = element_bytes(problem.dtype);
  const std::int64_t packs = std::max<std::int64_t>(1, divide_up(problem.D * element, kPack));
  plan->row_lanes = 1;
  while (plan->row_lanes < kWarp && plan->row_lanes < packs) plan->row_lanes *= 2;
  const auto of_width = [&](int lane_bytes) {
    BackwardPlan slices = *plan;
    set_lane_bytes(problem, lane_bytes, &slices);
    return slices;
  };
  const auto near = [&](const BackwardPlan& of) { return slice_bytes(of, problem) <= kNearBytes; };

  const BackwardPlan whole = of_width(kPack);
  BackwardPlan best = whole;
  double least = predict_backward(whole, problem, device).total();
  const auto consider = [&](const BackwardPlan& slices) {
    const double us = predict_backward(slices, problem, device).total();
    if (us < least) {
      best = slices;
      least = us;
    }
  };
  // A half-precision pack has 8 elements already.
  if (element > 2 && packs > kWarp) {
    BackwardProblem even = problem;
    even.D = even_dims(problem.dtype);
    const auto near_us = [&](BackwardPlan of) {
      set_lane_bytes(even, of.lane_bytes, &of);
      return near_gather_us(of, even, device);
    };
    for (const int lane_bytes : {2 * kPack, kPack + kPack / 2}) {
      const BackwardPlan wide = of_width(lane_bytes);
      const bool rest = lane_bytes < 2 * kPack && wide.slices == 1;  // of rows little longer than a slice of one pack
      if (plan->searches || rest || near(wide) || near_us(whole) > kMostLoss * near_us(wide)) consider(wide);
    }
  }
  if (!plan->searches) consider(of_width(kPack / 2));
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
