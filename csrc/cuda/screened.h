// The paths that screen with tensor cores and decide by exact sums: kDense, kScreen, kBank.
#pragma once

#include "../sn_types.h"
#include "plan.h"
#include "platform.h"

namespace sn::cuda {

cudaError_t run_screened(const ForwardArgs& args, const ForwardPlan& plan, char* workspace, cudaStream_t stream);

}  // namespace sn::cuda
