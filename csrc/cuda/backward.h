// Backward of the CUDA backend: a support graph and the upstream gradient to feature gradients.
#pragma once

#include "../sn_types.h"
#include "plan.h"
#include "platform.h"

namespace sn::cuda {

// Enqueues on `stream`, which belongs to the current device, the kernels of `plan`, made for the shapes of `args`.
// `workspace` has plan.workspace_bytes. An index outside the candidates counts as -1. More than kMostEdges edges are
// cudaErrorInvalidValue.
cudaError_t run_backward(const BackwardArgs& args, const BackwardPlan& plan, char* workspace, cudaStream_t stream);

}  // namespace sn::cuda
