#include "cuda/backend.h"

#include <algorithm>
#include <cstdint>

#include "cuda/plan/sizes.h"
#include "cuda/stages.h"

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

// Tiles of direct sums, then selection, a strip of anchors at a time. Empty sides have a strip, too. Then the sum over
// anchors, where they are many.
cudaError_t run_direct(const ForwardArgs& args, const ForwardPlan& plan, char* workspace, cudaStream_t stream) {
  for (std::int64_t number = 0; number < plan.strips; ++number) {
    const std::int64_t begin = number * plan.strip_rows;
    const Strip strip{begin, std::max<std::int64_t>(0, std::min(plan.strip_rows, args.anchors.rows - begin))};
    cudaError_t error = enqueue_tiles(args, plan, workspace, strip, stream);
    if (error == cudaSuccess) error = enqueue_select(args, plan, workspace, strip, stream);
    if (error != cudaSuccess) return error;
  }
  return plan.shared_reduction ? enqueue_reduce(args, plan, workspace, stream) : cudaSuccess;
}

// The paths that screen with tensor cores and decide by exact sums: kDense, kScreen, kBank.
cudaError_t run_screened(const ForwardArgs& args, const ForwardPlan& plan, char* workspace, cudaStream_t stream) {
  const std::int64_t N = args.anchors.rows;
  const std::int64_t M = args.candidates.rows;
  if (N <= 0 || M <= 0 || args.dims <= 0 || !refinable(plan)) return cudaErrorInvalidValue;
  const bool large = may_have_large_identities(M);

  Steps steps;
  steps.take(enqueue_sample(args, plan, workspace, stream));
  if (steps.going()) steps.take(enqueue_facts(args, plan, workspace, stream));
  if (steps.going()) steps.take(enqueue_positives(args, plan, workspace, stream));
  for (std::int64_t begin = 0; begin < N && steps.going(); begin += plan.strip_rows) {
    const Strip strip{begin, std::min(plan.strip_rows, N - begin)};
    const auto scores = [&](ScoreMode mode, std::int64_t columns, std::int64_t stride) {
      ScoreRequest request;
      request.mode = mode;
      request.row_begin = strip.begin;
      request.rows = strip.rows;
      request.columns = columns;
      request.column_stride = stride;
      request.symmetric = mode == ScoreMode::kAppend && plan.triangular;
      request.far = mode == ScoreMode::kAppend && columns == M && large;
      if (!steps.going()) return;
      steps.take(plan.path == ForwardPath::kBank ? enqueue_bank_scores(args, plan, workspace, request, stream)
                                                 : enqueue_scores(args, plan, workspace, request, stream));
    };
    const auto then = [&](auto enqueue) {
      if (steps.going()) steps.take(enqueue(args, plan, workspace, strip, stream));
    };
    scores(plan.sample_group > 1 ? ScoreMode::kSample : ScoreMode::kDense, plan.sample_columns, plan.sample_stride);
    if (plan.path != ForwardPath::kDense) {
      then(enqueue_thresholds);
      if (large) then(enqueue_far_thresholds);
      scores(ScoreMode::kAppend, M, 1);
    }
    then(enqueue_refine);
    if (plan.rescreen) {
      then(enqueue_groups);
      then(enqueue_rescores);
      then(enqueue_second_refine);
    }
    then(enqueue_fallback);
    then(enqueue_merge);
  }
  return steps.error();
}

}  // namespace

Problem problem_of(const ForwardArgs& args) {
  return {.N = args.anchors.rows,
          .M = args.candidates.rows,
          .D = args.dims,
          .k = args.options.k,
          .dtype = args.dtype,
          .symmetric = args.symmetric,
          .aligned = rows_aligned(args.anchors, args.dtype) && rows_aligned(args.candidates, args.dtype)};
}

cudaError_t forward(const ForwardArgs& args, const ForwardPlan& plan, char* workspace, int slot, cudaStream_t stream) {
  switch (plan.path) {
    case ForwardPath::kCluster:
    case ForwardPath::kTickets:
      return enqueue_small(args, plan, workspace, slot, stream);
    case ForwardPath::kSquare:
      return enqueue_square(args, plan, workspace, slot, stream);
    case ForwardPath::kDirect:
      return run_direct(args, plan, workspace, stream);
    case ForwardPath::kDense:
    case ForwardPath::kScreen:
    case ForwardPath::kBank:
      return run_screened(args, plan, workspace, stream);
    case ForwardPath::kAuto:
      break;
  }
  return cudaErrorInvalidValue;
}

}  // namespace sn::cuda
