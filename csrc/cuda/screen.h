// Tensor-core scores of anchors against candidates: written out (dense) or tested against thresholds as they fall out
// of the accumulators (append). The score of a pair is s_ij = n_j - 2 h_i . h_j; bound.cuh says what it proves.
//
// What the consumer may rely on
//   * Every pair of the requested range is scored once for its anchor, self pairs included: whoever reads the entries
//     drops an anchor's own row (by SelfMap). Candidates of a subset are c * column_stride for c in [0, columns).
//   * kAppend: gCount[i - row_begin] counts ALL hits of anchor i, gBuffer[i - row_begin][0 .. min(count, capacity)) has
//     entries (bits of s) << 32 | j, in any order. Entries beyond the capacity are dropped, the count goes on.
//   * The far test appends positives only (labels compared as 64-bit integers), to gFarCount and gFarBuffer likewise.
//   * A pair with rho_i or rho_j = +inf has a score of no meaning (finite, never NaN). A candidate with rho_j = +inf is
//     appended for every anchor (and, where G_i is not +inf and it is a positive, to the far buffer).
//   * Null rows (bound.cuh) beyond Control.last_null are not appended by the support test.
//   * Control.unscreenable: nothing is written, but kBank notes what is not finite when it appends from all candidates.
#pragma once

#include <cstdint>

#include "../sn_types.h"
#include "plan.h"
#include "platform.h"
#include "prepare.h"

namespace sn::cuda {

enum class ScoreMode : std::int32_t {
  kDense = 0,   // gScores[i - row_begin][c] for all anchors of the wave and all requested columns c, at plan.buffer
  kAppend = 1,  // support test, and far test where `far`; into plan.buffer, plan.far_buffer, plan.counts [2][wave_rows]
};

struct ScoreRequest {
  ScoreMode mode = ScoreMode::kDense;
  std::int64_t row_begin = 0;      // first anchor of the wave
  std::int64_t rows = 0;           // anchors of the wave, at most plan.wave_rows
  std::int64_t columns = 0;        // candidates taken
  std::int64_t column_stride = 1;  // column c is candidate c * column_stride < M
  // kAppend, self case, all rows and all candidates: half of the tiles serve both triangles. Needs plan.triangular.
  bool symmetric = false;
  bool far = false;  // kAppend: G and g2 are set and far_buffer is there; false: they are not touched
};

// One kernel. Dense scores: row pitch is request.columns.
cudaError_t enqueue_scores(const ForwardArgs& args, const ForwardPlan& plan, char* workspace,
                           const ScoreRequest& request, cudaStream_t stream);

}  // namespace sn::cuda
