// Arguments of the kernels behind the screening: the problem, pieces of the workspace, constants of the bounds.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "cuda/memory.cuh"
#include "cuda/plan/plan_types.h"
#include "cuda/plan/sizes.h"
#include "cuda/screen/bound.cuh"
#include "cuda/screen/prepare.h"
#include "cuda/stages.h"
#include "sn_types.h"

namespace sn::cuda {

struct RescreenTile;

struct RefineArgs {
  ForwardArgs forward;
  std::int64_t K;
  bool aligned;    // rows of both matrices start at multiples of 16 bytes
  bool many_rows;  // rows alone fill the machine
  bool dense;      // entries are the scores of all candidates; there are no thresholds and no far buffer
  bool bank;       // candidates have n and rho only where the scores wrote them

  // The strip.
  std::int64_t row_begin;
  std::int64_t rows;

  const float* gAnchorN;  // [N]
  const float* gAnchorRho;
  const float* gCandidateN;  // [M]
  const float* gCandidateRho;
  Thresholds thresholds;
  const std::int32_t* gPositiveLeader;  // [N]
  const std::int32_t* gPositiveCount;   // [N]
  const std::int32_t* gPositiveList;    // [N][kPositiveEntries]

  const float* gScores;  // [rows][columns], or least upper bounds [rows][groups]; where the buffer is
  std::int64_t columns;
  std::int64_t column_stride;
  std::int64_t groups;
  std::uint32_t* gCounts;     // [strip_rows]
  std::uint32_t* gFarCounts;  // [strip_rows]
  std::uint64_t* gBuffer;     // [strip_rows][capacity]
  std::int64_t capacity;
  std::int64_t most_segments;  // of the fallback
  std::uint64_t* gFarBuffer;   // [strip_rows][far_capacity]
  std::int64_t far_capacity;

  std::int32_t* gQueue;  // [strip_rows]
  // Rows that wait for the second refinement (rescreen/rescreen.cuh).
  bool rescreen;
  std::int64_t many_survivors;  // more of them make a row wait, or fall back at once
  std::int32_t* gWaiting;       // [strip_rows] entries of the queue
  std::int32_t* gLeaders;       // [strip_rows] of them
  std::int32_t* gOrder;         // [strip_rows] rows by leader
  RescreenTile* gTiles;
  Control* gControl;
  AnchorRecord* gRecords;    // [N]
  PartialRecord* gPartials;  // [kPartials], null: one block sums over all anchors
  bool last_strip;

  // Constants of the bounds (certificate.cuh).
  float eta;
  float stretch;
  float shrink;
  float underflow_distance;
  float underflow_key;
  // Of copies that are made anew (rescreen/rescreen.cuh).
  float row_slack;
  float rounding_floor;
};

// What the refinement has resolved of a queued row stands in the place of the fallback's first segment.
__device__ __forceinline__ std::int64_t segment_places(std::int64_t K) {
  return K + 2;
}
// Segments of the candidates, where so many rows are queued. Few tiles have more, so that all multiprocessors are busy.
__device__ __forceinline__ std::int64_t fallback_segments(const RefineArgs& args, std::int64_t queued) {
  if (queued <= kFewQueued) return kFallbackSegments;
  const std::int64_t wanted = kFallbackBlocks * kDirectTile / queued;
  const std::int64_t most = wanted < args.most_segments ? wanted : args.most_segments;
  return most > kFallbackSegments ? most : kFallbackSegments;
}
__device__ __forceinline__ std::int64_t near_place(std::int64_t K) {
  return K;
}
__device__ __forceinline__ std::int64_t far_place(std::int64_t K) {
  return K + 1;
}

// The positives of an anchor.
struct ListedPositives {
  std::int32_t count;         // without its own row
  std::int32_t entries;       // of the list, in any order, its own row among them if that has its label
  const std::int32_t* gList;  // [min(entries, kPositiveEntries)]
  __device__ __forceinline__ bool all_listed() const { return count <= kListedPositives; }
};
__device__ __forceinline__ ListedPositives positives_of(const RefineArgs& args, std::int64_t anchor, std::int64_t self,
                                                        std::int64_t label) {
  const std::int64_t leader = load(args.gPositiveLeader + anchor);
  const bool own = self >= 0 && load(args.forward.candidate_labels + self) == label;
  const std::int32_t entries = load(args.gPositiveCount + leader);
  return {entries - (own ? 1 : 0), entries, args.gPositiveList + leader * kPositiveEntries};
}

// certificate.cuh derives the constants.
inline RefineArgs refine_args(const ForwardArgs& args, const ForwardPlan& plan, char* workspace, const Strip& strip) {
  const ScreenSide anchors = anchor_side(args, plan, workspace);
  const ScreenSide candidates = candidate_side(args, plan, workspace);
  auto* counts = piece<std::uint32_t>(workspace, plan.counts);
  const auto D = static_cast<double>(args.dims);
  const double sections = std::ceil(D / static_cast<double>(kSection));
  const double gamma = (64.0 + 5.0 + sections + 4.0) * 0x1p-24;
  const auto up = [](double value) { return std::nextafter(static_cast<float>(value), 2.0f); };
  const auto down = [](double value) { return std::nextafter(static_cast<float>(value), 0.0f); };
  return {.forward = args,
          .K = plan.K,
          .aligned = rows_aligned(args.anchors, args.dtype) && rows_aligned(args.candidates, args.dtype),
          .many_rows = plan.path == ForwardPath::kScreen && strip.rows > plan.few_rows,
          .dense = plan.path == ForwardPath::kDense,
          .bank = plan.path == ForwardPath::kBank,
          .row_begin = strip.begin,
          .rows = strip.rows,
          .gAnchorN = anchors.n,
          .gAnchorRho = anchors.rho,
          .gCandidateN = candidates.n,
          .gCandidateRho = candidates.rho,
          .thresholds = thresholds(args, plan, workspace),
          .gPositiveLeader = piece<std::int32_t>(workspace, plan.positive_leader),
          .gPositiveCount = piece<std::int32_t>(workspace, plan.positive_count),
          .gPositiveList = piece<std::int32_t>(workspace, plan.positive_list),
          .gScores = piece<float>(workspace, plan.buffer),
          .columns = plan.sample_columns,
          .column_stride = plan.sample_stride,
          .groups = sample_groups(plan),
          .gCounts = counts,
          .gFarCounts = counts + plan.strip_rows,
          .gBuffer = piece<std::uint64_t>(workspace, plan.buffer),
          .capacity = plan.buffer_capacity,
          .most_segments = std::min(most_fallback_segments(plan.K), plan.buffer_capacity / fallback_places(plan.K)),
          .gFarBuffer = piece<std::uint64_t>(workspace, plan.far_buffer),
          .far_capacity = plan.far_capacity,
          .gQueue = piece<std::int32_t>(workspace, plan.queue),
          .rescreen = plan.rescreen,
          .many_survivors = many_survivors(plan, args.candidates.rows),
          .gWaiting = piece<std::int32_t>(workspace, plan.waiting),
          .gLeaders = piece<std::int32_t>(workspace, plan.waiting) + plan.strip_rows,
          .gOrder = piece<std::int32_t>(workspace, plan.waiting) + 2 * plan.strip_rows,
          .gTiles = piece<RescreenTile>(workspace, plan.rescreen_tiles),
          .gControl = piece<Control>(workspace, plan.control),
          .gRecords = piece<AnchorRecord>(workspace, plan.records),
          .gPartials = plan.shared_reduction ? piece<PartialRecord>(workspace, plan.partial_records) : nullptr,
          .last_strip = strip.begin + strip.rows == args.anchors.rows,
          .eta = screening_error(plan.padded_dims),
          .stretch = up(1.0 + 2.0 * gamma),
          .shrink = down(1.0 - 2.0 * gamma),
          .underflow_distance = up(std::sqrt(2.0 * D) * 0x1p-74),
          .underflow_key = up(2.0 * D * 0x1p-149),
          .row_slack = row_slack(plan.padded_dims),
          .rounding_floor = up(std::sqrt(static_cast<double>(plan.padded_dims)) * 0x1p-24)};
}

}  // namespace sn::cuda
