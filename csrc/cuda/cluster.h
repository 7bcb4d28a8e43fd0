// At most 64 anchors and 64 candidates: the whole forward in one launch of one thread-block cluster.
#pragma once

#include "../sn_types.h"
#include "plan.h"
#include "platform.h"

namespace sn::cuda {

// Enqueues on `stream`, on a device of compute capability 9.0 or above; the plan's path is kCluster.
cudaError_t run_cluster(const ForwardArgs& args, const ForwardPlan& plan, char* workspace, cudaStream_t stream);

// The compute capability, as 10 * major + minor, that the current device's copy of this library's code was compiled
// for. It is below the device's own where the driver made that copy from PTX of an older architecture, such as one
// without clusters.
cudaError_t compiled_capability(int* capability);

}  // namespace sn::cuda
