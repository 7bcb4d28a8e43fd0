// The plan of the backward: the cheapest prediction (cost_backward.cpp) among what its rules allow.
#include <algorithm>
#include <limits>

#include "cuda/plan/cost.h"
#include "cuda/plan/plan.h"
#include "cuda/plan/sizes.h"

namespace sn::cuda {
namespace {

constexpr int kWarp = 32;
constexpr int kPack = 16;  // bytes of the widest load

// A warp's counters, one a bucket, lie in shared memory of the kernels that fill buckets, so the number of these
// is limited.
constexpr int kBucketShift = 6;
constexpr std::int64_t kMostBuckets = 4096;

// A warp counts and places a part. There are few enough parts that the histogram is at most 16 MB, and a multiple of
// the warps of a block.
constexpr std::int64_t kSmallestPart = 256;
constexpr std::int64_t kMostParts = 1024;
constexpr std::int64_t kPartsMultiple = 8;

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
  plan->histogram = take(plan->buckets * plan->parts * 4);
  plan->totals = take(plan->buckets * 4);
  plan->begins = take((plan->buckets + 1) * 4);
  plan->placed_targets = take(edges * 4);
  plan->placed_sources = take(edges * 4);
  plan->placed_weights = take(edges * accumulator_bytes(problem.dtype));
  plan->listed_own = problem.symmetric && problem.edges <= kMergedSlots ? problem.edges : 0;
  const std::int64_t listed = edges + targets * plan->listed_own;
  plan->list_begins = take((targets + 1) * 4);
  plan->list_rests = take(targets * 4);
  plan->list_sources = take(listed * 4);
  plan->list_weights = take(listed * accumulator_bytes(problem.dtype));
}

// How wide a slice is. Blocks of one slice are neighbours in the grid (gather.cuh), so the slice of all rows that are
// read is what the second-level cache should hold near: kNearBytes, which is 1 KB a row of 24576 rows, 512 bytes of
// 49152, 384 of 65536, 256 of 98304.
//
// Narrow slices are near but many, and every slice costs the lanes of a target some 320 instructions and 5 a row beside
// its elements, whatever its width. So half a warp serves a target where a slice is narrow: two targets share these.
// With 9 rows a target a kilobyte of a row takes 550 instructions of a warp in slices of 1 KB, 590 in slices of 512
// bytes, 710 of 384, 960 of 256 (counted, not measured; whole warps in slices of 512 would take 910). Far rows come at
// 0.7 of the cache's rate on an H200. So a slice is near up to 65536 rows, and beyond these not wider than 384 bytes a
// row; 256 serve where the prediction says so. Of candidates of their own, such as a large bank, most have few edges,
// or none, and narrower slices lose more: 512 bytes may be far. Of what serves the prediction takes the cheapest.
//
// The order of sums follows from D and the type alone: target_lanes / row_lanes groups of lanes share a list, which is
// one group for rows of more than 256 bytes, whatever the width. Shorter rows are one slice. Where blocks search, every
// slice does so anew, and rows are few: any width serves.
constexpr int kMostFar = 384;  // bytes of a row
constexpr int kMostFarOfBank = 512;

struct Width {
  int lane_bytes;
  int target_lanes;
};
constexpr Width kWidths[] = {{2 * kPack, 32}, {kPack + kPack / 2, 32}, {kPack, 32},
                             {2 * kPack, 16}, {kPack + kPack / 2, 16}, {kPack, 16}};

void choose_slices(const BackwardProblem& problem, const DeviceFacts& device, BackwardPlan* plan) {
  const int lanes = lanes_of_row(problem.D, problem.dtype);
  const BackwardPlan any = *plan;
  double least = std::numeric_limits<double>::infinity();
  for (const Width& width : kWidths) {
    if (!gather_serves(problem.dtype, width.lane_bytes, width.target_lanes, any.searches)) continue;
    if (lanes < kWarp && (width.lane_bytes != kPack || width.target_lanes < kWarp)) continue;
    BackwardPlan slices = any;
    slices.target_lanes = width.target_lanes;
    slices.row_lanes = std::min(lanes, width.target_lanes);
    slices.lane_bytes = width.lane_bytes;
    slices.slice_elements = slices.lane_bytes / element_bytes(problem.dtype) * slices.row_lanes;
    slices.slices = divide_up(problem.D, slices.slice_elements);
    const bool narrow = slices.lane_bytes * slices.row_lanes <= (problem.symmetric ? kMostFar : kMostFarOfBank);
    if (!any.searches && !narrow && slice_bytes(slices, problem) > kNearBytes) continue;
    const double us = predict_backward(slices, problem, device).total();
    if (us < least) {
      *plan = slices;
      least = us;
    }
  }
}

// All rows, the graph and its lists in shared memory of each block, if a slice of some width fits. Lists are made again
// in every block, so slices as wide as give each multiprocessor one, or narrower: the prediction says which.
bool choose_resident(const BackwardProblem& problem, const DeviceFacts& device, BackwardPlan* plan) {
  const ResidentShape shape = resident_shape(problem);
  const std::int64_t accumulator = accumulator_bytes(problem.dtype);
  if (resident_shared_bytes(shape, accumulator) > device.shared_bytes) return false;
  const int lanes = lanes_of_row(problem.D, problem.dtype);
  double least = std::numeric_limits<double>::infinity();
  for (int packs = 1; resident_serves(shape, packs, lanes); packs *= 2) {
    BackwardPlan resident;
    resident.launches = 1;
    resident.resident = true;
    resident.row_packs = packs;
    resident.dependent = launches_dependents(device);
    resident.row_lanes = lanes;
    resident.slice_elements = packs * kPack / accumulator;
    resident.slices = divide_up(problem.D, resident.slice_elements);
    for (resident.thread_packs = 1; resident_threads_serve(resident); resident.thread_packs *= 2) {
      const double us = predict_backward(resident, problem, device).total();
      if (us < least) {
        *plan = resident;
        least = us;
      }
    }
  }
  return plan->resident;
}

}  // namespace

BackwardPlan plan_backward(const BackwardProblem& problem, const DeviceFacts& device) {
  const bool candidates = problem.need_candidates && !problem.symmetric;
  const std::int64_t anchor_groups = problem.need_anchors ? divide_up(problem.N, kBackwardGroup) : 0;
  const std::int64_t candidate_groups = candidates ? divide_up(problem.M, kBackwardGroup) : 0;
  if ((anchor_groups + candidate_groups) * problem.D == 0) return {};

  const auto us = [&](const BackwardPlan& of) { return predict_backward(of, problem, device).total(); };
  BackwardPlan resident;
  const bool fits = choose_resident(problem, device, &resident);
  if (fits && problem.partition == Partition::kResident) return resident;
  const auto cheaper = [&](const BackwardPlan& plan) {
    const bool asked = problem.partition == Partition::kNever || problem.partition == Partition::kAlways;
    return fits && !asked && us(resident) < us(plan) ? resident : plan;
  };

  BackwardPlan plan;
  plan.launches = 1;
  // Own edges are found by their anchor; only incoming ones have to be searched, or listed.
  const bool incoming = (problem.symmetric ? anchor_groups : candidate_groups) * problem.N * problem.edges > 0;
  if (!incoming) {
    choose_slices(problem, device, &plan);
    return cheaper(plan);
  }
  BackwardPlan listed = plan;
  add_buckets_and_lists(problem, &listed);
  choose_slices(problem, device, &listed);
  if (problem.partition == Partition::kAlways) return listed;
  plan.searches = true;
  choose_slices(problem, device, &plan);
  if (problem.partition == Partition::kNever) return plan;
  return cheaper(us(plan) <= us(listed) ? plan : listed);
}

}  // namespace sn::cuda
