// The universal exact path: every squared distance in the one summation order, then selection. Any type, N, M, D and K.
#pragma once

#include "../sn_types.h"
#include "plan.h"
#include "platform.h"

namespace sn::cuda {

// Enqueues the whole forward on `stream`; the plan's path is kDirect and its sizes come from sizes_direct.h.
cudaError_t run_direct(const ForwardArgs& args, const ForwardPlan& plan, char* workspace, cudaStream_t stream);

}  // namespace sn::cuda
