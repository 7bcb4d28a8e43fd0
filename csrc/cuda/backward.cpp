#include <cstdint>

#include "cuda/backend.h"
#include "cuda/stages.h"

namespace sn::cuda {

BackwardProblem problem_of(const BackwardArgs& args) {
  return {.N = args.anchors.rows,
          .M = args.candidates.rows,
          .D = args.dims,
          .edges = args.edges,
          .dtype = args.dtype,
          .symmetric = args.symmetric,
          .need_anchors = args.grad_anchors != nullptr,
          .need_candidates = args.grad_candidates != nullptr};
}

cudaError_t backward(const BackwardArgs& args, const BackwardPlan& plan, char* workspace, cudaStream_t stream) {
  if (plan.launches == 0) return cudaSuccess;
  if (args.edges > 0 && args.anchors.rows > kMostEdges / args.edges) return cudaErrorInvalidValue;
  if (plan.resident) return enqueue_resident(args, plan, stream);
  if (plan.partitioned) {
    cudaError_t error = enqueue_bucket_counts(args, plan, workspace, stream);
    if (error == cudaSuccess) error = enqueue_bucket_prefix_sums(plan, workspace, stream);
    if (error == cudaSuccess) error = enqueue_bucket_placement(args, plan, workspace, stream);
    if (error == cudaSuccess) error = enqueue_lists(args, plan, workspace, stream);
    if (error != cudaSuccess) return error;
  }
  return plan.searches ? enqueue_search(args, plan, stream) : enqueue_gather(args, plan, workspace, stream);
}

}  // namespace sn::cuda
