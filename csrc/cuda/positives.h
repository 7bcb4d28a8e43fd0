// The positives of each anchor: how many candidates have its label, its own row left out, and which.
#pragma once

#include <cstdint>

#include "../sn_types.h"
#include "plan.h"
#include "platform.h"

namespace sn::cuda {

// positive_count [N]; positive_list [N][kListedPositives]: in increasing order all positives where they fit, else
// kListedPositives of them (which ones may depend on the schedule). Sets Control.large_identities where they do not fit,
// which the first kernel of the call must have zeroed. One kernel. N and M are at least 1.
cudaError_t enqueue_positives(const ForwardArgs& args, const ForwardPlan& plan, char* workspace, cudaStream_t stream);

}  // namespace sn::cuda
