#include "screened.h"

#include <algorithm>
#include <cstdint>

#include "ladder.h"
#include "positives.h"
#include "prepare.h"
#include "refine.h"
#include "screen.h"
#include "sizes_screened.h"

namespace sn::cuda {
namespace {

// Stops at the first error, like a chain of returns.
class Steps {
 public:
  void take(cudaError_t error) {
    if (error_ == cudaSuccess) error_ = error;
  }
  bool going() const { return error_ == cudaSuccess; }
  cudaError_t error() const { return error_; }

 private:
  cudaError_t error_ = cudaSuccess;
};

std::int64_t columns_of(std::int64_t M, std::int64_t stride) {
  return (M + stride - 1) / stride;
}

}  // namespace

cudaError_t run_screened(const ForwardArgs& args, const ForwardPlan& plan, char* workspace, cudaStream_t stream) {
  const std::int64_t N = args.anchors.rows;
  const std::int64_t M = args.candidates.rows;
  if (N <= 0 || M <= 0 || args.dims <= 0 || !refinable(plan)) return cudaErrorInvalidValue;
  const bool large = may_have_large_identities(M);

  Steps steps;
  steps.take(enqueue_prepare(args, plan, workspace, stream));
  if (steps.going()) steps.take(enqueue_positives(args, plan, workspace, stream));
  for (std::int64_t begin = 0; begin < N && steps.going(); begin += plan.wave_rows) {
    const Wave wave{begin, std::min(plan.wave_rows, N - begin)};
    const auto scores = [&](ScoreMode mode, std::int64_t columns, std::int64_t stride) {
      ScoreRequest request;
      request.mode = mode;
      request.row_begin = wave.begin;
      request.rows = wave.rows;
      request.columns = columns;
      request.column_stride = stride;
      // Tiles that serve both triangles need the thresholds of all rows at once.
      request.symmetric = mode == ScoreMode::kAppend && columns == M && plan.triangular && wave.rows == N;
      request.far = mode == ScoreMode::kAppend && columns == M && large;
      if (steps.going()) steps.take(enqueue_scores(args, plan, workspace, request, stream));
    };
    const auto then = [&](auto enqueue) {
      if (steps.going()) steps.take(enqueue(args, plan, workspace, wave, stream));
    };
    scores(ScoreMode::kDense, plan.sample_columns, plan.sample_stride);
    if (plan.path != ForwardPath::kDense) {
      then(enqueue_sample_thresholds);
      if (large) then(enqueue_far_thresholds);
      if (plan.second_stride > 0) {
        scores(ScoreMode::kAppend, columns_of(M, plan.second_stride), plan.second_stride);
        then(enqueue_entry_thresholds);
      }
      scores(ScoreMode::kAppend, M, 1);
    }
    then(enqueue_refine);
    then(enqueue_ladder);
  }
  return steps.error();
}

}  // namespace sn::cuda
