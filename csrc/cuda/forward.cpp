#include "forward.h"

#include "backward.h"
#include "cluster.h"
#include "direct.h"
#include "screened.h"
#include "sizes_direct.h"

namespace sn::cuda {

Problem problem_of(const ForwardArgs& args) {
  return {.N = args.anchors.rows,
          .M = args.candidates.rows,
          .D = args.dims,
          .k = args.options.k,
          .dtype = args.dtype,
          .symmetric = args.symmetric,
          .aligned = rows_aligned(args.anchors, args.dtype) && rows_aligned(args.candidates, args.dtype)};
}

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

cudaError_t forward(const ForwardArgs& args, const ForwardPlan& plan, char* workspace, cudaStream_t stream) {
  switch (plan.path) {
    case ForwardPath::kCluster:
      return run_cluster(args, plan, workspace, stream);
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

cudaError_t backward(const BackwardArgs& args, const BackwardPlan& plan, char* workspace, cudaStream_t stream) {
  return run_backward(args, plan, workspace, stream);
}

}  // namespace sn::cuda
