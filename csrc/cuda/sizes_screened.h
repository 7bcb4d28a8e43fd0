// Sizes of the refinement and of the ladder that the plan needs: no toolkit, no kernels.
#pragma once

#include <cstdint>

#include "plan.h"
#include "sizes_screen.h"

namespace sn::cuda {

// What the ladder leaves of a row, in the row's place of the buffer: a sorted list of K keys of each segment, then the
// nearest and the farthest positive of each segment. ForwardPlan::buffer_capacity is at least this, on every path.
constexpr std::int64_t ladder_entries(std::int64_t K) {
  return kLadderSegments * (K + 2);
}

// A queued row is one int32: its number in the wave above these bits, and what it still needs.
inline constexpr int kNeedBits = 3;
enum Need : std::int32_t { kNeedSupport = 1, kNeedNear = 2, kNeedFar = 4, kNeedAll = 7 };
static_assert(kNeedAll < (1 << kNeedBits));
inline constexpr std::int64_t kLargestWave = std::int64_t{1} << (31 - kNeedBits);

// The refinement needs this of a plan.
constexpr bool refinable(const ForwardPlan& plan) {
  return plan.K >= 1 && plan.K <= kFastNeighbours && plan.wave_rows <= kLargestWave &&
         plan.buffer_capacity >= ladder_entries(plan.K);
}

// Identities larger than the list exist only among more candidates than it holds.
constexpr bool may_have_large_identities(std::int64_t M) {
  return M > kListedPositives;
}

// Kernels of run_screened: preparation and positives once, then for each wave
//   kDense           scores, refinement, ladder, merge
//   kScreen, kBank   sample, thresholds, [thresholds of large identities], [second sample, thresholds], scores, refinement,
//                    ladder, merge.
constexpr std::int64_t screened_launches(const ForwardPlan& plan, const Problem& problem) {
  std::int64_t wave = 4;
  if (plan.path != ForwardPath::kDense) {
    wave += 2 + (may_have_large_identities(problem.M) ? 1 : 0) + (plan.second_stride > 0 ? 2 : 0);
  }
  return kPrepareLaunches + 1 + plan.waves * wave;
}

}  // namespace sn::cuda
