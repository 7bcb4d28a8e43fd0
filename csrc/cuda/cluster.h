// At most 64 anchors and 64 candidates: the whole forward in one launch of one thread-block cluster.
#pragma once

#include "../sn_types.h"
#include "plan.h"
#include "platform.h"

namespace sn::cuda {

// Enqueues on `stream`, on a device of compute capability 9.0 or above; the plan's path is kCluster.
cudaError_t run_cluster(const ForwardArgs& args, const ForwardPlan& plan, char* workspace, cudaStream_t stream);

}  // namespace sn::cuda
