// The CUDA backend as the binding sees it: a plan, and two calls that enqueue it. Nothing here knows a framework.
#pragma once

#include "cuda/plan/plan.h"
#include "cuda/platform.h"
#include "sn_types.h"

namespace sn::cuda {

// What the plan of a call is made from.
Problem problem_of(const ForwardArgs& args);
BackwardProblem problem_of(const BackwardArgs& args);

// Enqueue on `stream`, which belongs to the current device. `workspace` has plan.workspace_bytes and is aligned to
// kWorkspaceAlignment; its content does not matter, and it is free again once the stream has passed. All pointers of
// the arguments are device pointers. More than kMostEdges edges are cudaErrorInvalidValue.
// `slot`: where takes_slot(plan), one of the device's that no launch that may run at the same time has (slots.h).
cudaError_t forward(const ForwardArgs& args, const ForwardPlan& plan, char* workspace, int slot, cudaStream_t stream);
cudaError_t backward(const BackwardArgs& args, const BackwardPlan& plan, char* workspace, cudaStream_t stream);

}  // namespace sn::cuda
