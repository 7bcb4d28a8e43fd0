// The plan of the backward. Traffic decides it: the figures below are bytes through the second-level cache, which
// bounds the gather.
#include <algorithm>

#include "cuda/plan/plan.h"

namespace sn::cuda {
namespace {

constexpr std::int64_t kWarp = 32;
constexpr std::int64_t kPack = 16;  // bytes of the widest load

// Without buckets every block searches all edges. The three kernels that make buckets cost about 7 us, in which the
// second-level cache of an H200 delivers some 40 MB. And a block that searches more than 16 windows of 2048 edges waits
// longer for them than that, however many blocks there are.
constexpr std::int64_t kSearchBytes = std::int64_t{48} << 20;
constexpr std::int64_t kSearchEdges = std::int64_t{1} << 15;

// A group of 8 targets searches its bucket: with 64 targets a bucket these are 8 (K + 2) entries of 4 bytes for some 2
// (K + 2) rows of up to 1 KB, below 3 %. Counters of a bucket lie in shared memory, so their number is limited.
constexpr int kBucketShift = 6;
constexpr std::int64_t kMostBuckets = 4096;
static_assert((1 << kBucketShift) % kBackwardGroup == 0, "a group of targets lies in one bucket");

// A warp counts and places a part. There are few enough parts that the histogram stays below 16 MB, and a multiple of
// the warps of a block.
constexpr std::int64_t kSmallestPart = 256;
constexpr std::int64_t kMostParts = 1024;
constexpr std::int64_t kPartsMultiple = 8;

// How wide a slice is. Blocks of one slice are neighbours in the grid (gather.cu), so a slice of all rows that are
// read, N of them or M, is what the second-level cache should hold. One of its two partitions on an H200 is 30 MB, so
// 24 MB are kept near: two packs a lane, 1 KB a row, up to 24576 rows. Lanes of a row are given by D and the type alone
// (they fix the order of the sums), so the only narrower slice is one pack a lane: 24 MB at 49152 rows, 34 MB at 65536.
//
// It was counted whether that pays, from times of the gather in the record nvidia-h200/2026-11-26-d45aac1840-measure,
// divided by blocks. It does not, however many rows there are, since a block spends most of its time on finding its
// edges (its bucket of 64 targets: 3 KB of 768 edges, lists, weights), whatever its slice is:
//
//   8192 x 2048, bf16 or fp32, 256 elements, a slice of 4 or 8 MB      18.4 ns a block
//   65536 x 128, bf16, 128 elements, 17 MB                             17.0 ns
//   65536 x 2048, fp32, 256 elements, 67 MB                            22.2 ns, so 3.8 for what is not near
//
// Half the slice saves 1.4 ns of elements and at most 3.8 of distance, and costs a second block of 17.0. A gather that
// found its edges once for several slices would change this: narrower slices pay once a block of 128 elements takes
// less than half of 22.2 ns.
constexpr double kWideBlock = 18.4;    // ns, near
constexpr double kNarrowBlock = 17.0;  // ns, near
constexpr double kFarBlock = 22.2;     // ns, wide, 67 MB
static_assert(2 * kNarrowBlock > kFarBlock && 2 * kNarrowBlock > kWideBlock, "else choose slices of at most 24 MB");

void choose_slices(const BackwardProblem& problem, const DeviceFacts& device, std::int64_t groups, BackwardPlan* plan) {
  const std::int64_t pack_elements = kPack / element_bytes(problem.dtype);
  const std::int64_t packs = std::max<std::int64_t>(1, divide_up(problem.D, pack_elements));
  plan->packs_per_lane = 1;
  plan->row_lanes = 1;
  while (plan->row_lanes < kWarp && plan->row_lanes < packs) plan->row_lanes *= 2;
  // Two packs a lane halve the searches and the walks over edge lists; half inputs have 8 elements in one pack already.
  // Small problems take one pack: twice as many blocks fill the device.
  constexpr std::int64_t kBlocksEach = 2;
  if (element_bytes(problem.dtype) > 2 && packs > kWarp &&
      groups * divide_up(packs, 2 * kWarp) >= kBlocksEach * device.multiprocessors) {
    plan->packs_per_lane = 2;
  }
  plan->slice_elements = plan->packs_per_lane * plan->row_lanes * pack_elements;
  plan->slices = divide_up(problem.D, plan->slice_elements);
}

}  // namespace

BackwardPlan plan_backward(const BackwardProblem& problem, const DeviceFacts& device) {
  BackwardPlan plan;
  const bool candidates = problem.need_candidates && !problem.symmetric;
  const std::int64_t anchor_groups = problem.need_anchors ? divide_up(problem.N, kBackwardGroup) : 0;
  const std::int64_t candidate_groups = candidates ? divide_up(problem.M, kBackwardGroup) : 0;
  choose_slices(problem, device, anchor_groups + candidate_groups, &plan);
  if ((anchor_groups + candidate_groups) * plan.slices == 0) return plan;
  plan.launches = 1;

  // Own edges are found by their anchor; only incoming ones have to be searched.
  const std::int64_t searching = (problem.symmetric ? anchor_groups : candidate_groups) * plan.slices;
  const std::int64_t edges = problem.N * problem.edges;
  if (searching == 0 || edges == 0 || problem.partition == Partition::kNever) return plan;
  const double search_bytes = 4.0 * static_cast<double>(searching) * static_cast<double>(edges);
  if (problem.partition == Partition::kAuto && edges <= kSearchEdges &&
      search_bytes <= static_cast<double>(kSearchBytes)) {
    return plan;
  }

  plan.partitioned = true;
  plan.launches += 3;
  const std::int64_t targets = problem.symmetric ? problem.N : problem.M;
  plan.bucket_shift = kBucketShift;
  while (divide_up(targets, std::int64_t{1} << plan.bucket_shift) > kMostBuckets) ++plan.bucket_shift;
  plan.buckets = divide_up(targets, std::int64_t{1} << plan.bucket_shift);
  plan.part_edges = std::max(kSmallestPart, round_up(divide_up(edges, kMostParts), kWarp));
  plan.parts = round_up(divide_up(edges, plan.part_edges), kPartsMultiple);

  const auto take = [&plan](std::int64_t bytes) {
    const Piece piece{plan.workspace_bytes, bytes};
    plan.workspace_bytes += round_up(bytes, kWorkspaceAlignment);
    return piece;
  };
  plan.histogram = take(plan.buckets * plan.parts * 4);
  plan.totals = take(plan.buckets * 4);
  plan.begins = take((plan.buckets + 1) * 4);
  plan.placed_targets = take(edges * 4);
  plan.placed_sources = take(edges * 4);
  plan.placed_weights = take(edges * accumulator_bytes(problem.dtype));
  return plan;
}

}  // namespace sn::cuda
