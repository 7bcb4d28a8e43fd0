// What the screening knows of each row, and the half-precision copy that it multiplies.
//
// After enqueue_sample and enqueue_facts
//   Control      zeroed, then: nonfinite, unscreenable, largest, exponent, last_null (no limit) set
//   counts       zeroed, all 2 * strip_rows of them (later strips and passes: whoever sets the thresholds zeroes again)
//   positive_count  zeroed
//   anchors, candidates (ScreenSide below): rows, n, rho. kBank: only the anchors; the score kernel finds n and rho of
//                the candidates that it reads, and notes what is not finite in them.
//
// Units. Everything is in units of the cast: a row x stands for v = (x - m) 2^e with one vector m and one exponent
// e for the whole call (half-precision inputs: m = 0, e = 0), and h is v rounded to half precision (half inputs:
// the row).
//
//   n    |h|^2, off by at most a relative (Dpad / 32 + 16) 2^-24
//   rho  >= |v - h|; 0 for half inputs and where v = 0; +inf for a row of which the copy says nothing, because it is
//        out of the range of the copy or of the products. Such a row has n = 0 (and h = 0 unless it serves in place).
//        It is appended to the candidates of every anchor, whatever its score; as an anchor nothing can be certified
//        for it, so the fallback serves it. A row with a NaN or Inf is such a row and sets Control.nonfinite.
//
// Control.unscreenable: e would be outside of +-60, or all rows of the sample and all anchors that were looked at are
// equal. Then no cast is worth anything: n is 0 for all rows, and rho +inf for all but null rows (bound.cuh); the score
// kernels write NOTHING (no scores, no entries, no facts of bank rows) but Control.nonfinite, and every row of which
// duplicates do not decide goes to the fallback.
#pragma once

#include <cstdint>

#include "cuda/plan/plan_types.h"
#include "cuda/plan/sizes.h"
#include "sn_types.h"

namespace sn::cuda {

// The exponent e is such that the sample's largest |v| is in [2^kTargetExponent, 2^(kTargetExponent + 1)). In the
// middle of fp16's range: an outlier 1000 times as large still fits (below 2^16), and values 2^18 times smaller still
// have all their bits (down to 2^-14).
inline constexpr int kTargetExponent = 4;
inline constexpr int kLargestExponent = 60;
// Bits of the least |v| that gives a scale.
inline constexpr std::uint32_t kLeastScale = static_cast<std::uint32_t>(127 + kTargetExponent - kLargestExponent) << 23;

// One matrix as the screening sees it.
struct ScreenSide {
  // fp16 (bf16 for bf16 inputs) [count][stride]; rows start at multiples of 16 bytes. Null: the candidates of kBank.
  const void* rows;
  std::int64_t count;
  std::int64_t stride;  // in elements
  std::int64_t dims;    // elements of a row that may be read, a multiple of 8; what lies beyond counts as 0
  float* n;             // [count]
  float* rho;           // [count]
};

// What anchors keep candidates by; set between passes (bound.cuh tells how), read by the score kernels. [N] each, by
// the anchor's number (not its number in the strip).
struct Thresholds {
  float* T;   // T of the support test; -inf: keeps nothing (but candidates with rho = +inf), +inf: keeps everything
  float* u;   // 2 t >= 0
  float* G;   // G of the far test; +inf: never, -inf: every positive
  float* g2;  // 2 g >= 0
};

inline ScreenSide anchor_side(const ForwardArgs& args, const ForwardPlan& plan, char* workspace) {
  const std::int64_t N = args.anchors.rows;
  float* facts = piece<float>(workspace, plan.anchor_facts);
  if (plan.cast_anchors) {
    return {workspace + plan.anchor_cast.offset, N, plan.padded_dims, plan.padded_dims, facts, facts + N};
  }
  return {args.anchors.data, N, args.anchors.row_stride, args.dims, facts, facts + N};
}

// With `symmetric` the anchors' side serves as both.
inline ScreenSide candidate_side(const ForwardArgs& args, const ForwardPlan& plan, char* workspace) {
  if (args.symmetric) return anchor_side(args, plan, workspace);
  const std::int64_t M = args.candidates.rows;
  float* facts = piece<float>(workspace, plan.candidate_facts);
  if (plan.path == ForwardPath::kBank) return {nullptr, M, 0, 0, facts, facts + M};
  if (plan.cast_candidates) {
    return {workspace + plan.candidate_cast.offset, M, plan.padded_dims, plan.padded_dims, facts, facts + M};
  }
  return {args.candidates.data, M, args.candidates.row_stride, args.dims, facts, facts + M};
}

inline Thresholds thresholds(const ForwardArgs& args, const ForwardPlan& plan, char* workspace) {
  const std::int64_t N = args.anchors.rows;
  float* facts = piece<float>(workspace, plan.anchor_facts);
  return {facts + 2 * N, facts + 3 * N, facts + 4 * N, facts + 5 * N};
}

}  // namespace sn::cuda
