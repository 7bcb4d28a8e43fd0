// The second rung: rows that the first screening could not decide are screened again, seen from near by.
//
// The scores of the first screening are wrong by a share of |x - m|^2, which hides a tight cluster: its members are far
// nearer to each other than to the mean m of the batch. Seen from one of its members they are not. So undecided rows
// are grouped by a leader, a candidate that none of them can tell from its nearest ones, and each group is scored
// against all candidates with r, the leader's row, in the place of m, and a power of two of its own for 2^e. Nothing
// that bound.cuh derives asks where m and e come from, and scores, tests and bounds are made by its formulas; so they
// hold as they stand, with v = (x - r) 2^f. (Half-precision inputs are widened, and their copies rounded, as those of
// fp32 are.) For members of the cluster n and rho are now of the size of their distances, however tight it is; for
// others they are large, and so are their distances.
//
//   f    takes the largest |x - r| of the group's anchors to [2^kFrameTarget, 2 * that): full precision below it for
//        2^10, and candidates 2^19 times as far fit in fp16.
//
//   rho  is not measured, which would double the work of making copies. w = fma(x, 2^f, -r 2^f) is one rounding of v,
//        2^-24 |w|, and off by at most 2^-149 more where a product or the result is subnormal (2^-126 for a row); h is
//        w to 11 bits: |w - h| <= 2^-11 |h| for each element, or 2^-25 where h is subnormal. So
//          |v - h| <= |h| (2^-11 + 2^-23) + sqrt(Dp) 2^-25 (1 + 2^-23) + 2^-126
//               <= (2^-11 (1 + 2^-9) sqrt(n) + sqrt(Dp) 2^-24) row_slack       (rounding_bound)
//        where row_slack covers the error of n and the roundings here. If x = r in every element, w = 0 is exact and
//        rho = 0. n is a sum of sums: at most 8 + Dp / 64 + 3 additions, fewer than bound.cuh allows.
//
//   Far candidates. One that does not fit has an element above 65000 in these units. Where |v_i| and reach are at most
//   kFrameReach = 2^14 each, its distance is above reach: it is left out. An anchor with a larger reach or norm, or one
//   that does not fit, gives up (E below = +inf). The norm is larger only where f meets the limit of its range.
//
//   Null rows are here those that equal the leader in every element, such as the duplicates of a point. What bound.cuh
//   says of them holds: behind the first K + 1 none is in a support set. The sample gives an index that so many of them
//   do not exceed.
//
//   Thresholds come from a sample of the candidates, as the first ones do (certificate.cuh): the (K + 1)-th smallest of
//   upper bounds of different candidates, one of which may be the anchor itself; here the least of some bounds each.
//   The key that the refinement has proven is used where it is smaller.
//
// Entries. The refinement sees entries of groups with different r and f. So an entry carries A^2 itself, in units of
// the first cast: s = (n_i + n_j - 2 dot) 2^(2 e - 2 f), exact but for results below the normal numbers. A row has the
// largest error of all its entries:
//   E  >= eta (n_i + n_j) 2^(2 e - 2 f) + 2^-140,   R >= (rho_i + rho_j) 2^(e - f),
//   sqrt(s - E) - R <= D <= sqrt(s + E) + R         (framed_lower, framed_upper)
// A kept candidate is within reach, so |v_j| <= |v_i| + reach + rho_j: the largest error is of the size of each.
//
// Launches, where no row waits each returns at once: groups.cu, regroup the waiting rows; rescore.cu, thresholds and
// scores; refine.cu again.
#pragma once

#include <cstdint>

#include "cuda/memory.cuh"
#include "cuda/plan/plan_types.h"
#include "cuda/plan/sizes.h"
#include "cuda/ptx.cuh"
#include "cuda/screen/args.cuh"

namespace sn::cuda {

// Thresholds.u of a row that waits: its leader, with the sign bit, which no threshold has; or none.
inline constexpr std::uint32_t kLeaderMark = 0x80000000u;
inline constexpr std::uint32_t kNoLeader = 0xffffffffu;

__device__ __forceinline__ float rounding_bound(float norm, float row_slack, float floor) {
  return multiply_up(row_slack, fma_up(0x1p-11f + 0x1p-20f, sqrt_up(norm), floor));
}

inline constexpr int kFrameTarget = -4;
inline constexpr int kFrameRange = 40;  // f differs from e by at most this much
inline constexpr float kFrameReach = 0x1p14f;

// Consecutive rows of RefineArgs::gOrder that share a leader.
struct RescreenTile {
  std::int32_t leader;
  std::int32_t begin;
  std::int32_t count;
};
static_assert(sizeof(RescreenTile) == kRescreenTileBytes);

}  // namespace sn::cuda
