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

// What the current device holds of this kernel's clusters, in every type that it serves, for DeviceFacts: a GPU that is
// cut down, or a slice of one, may have no group of multiprocessors left that is large enough. Asked of the driver, on
// the host; nothing is enqueued, so it may be asked while a stream is captured. A question that fails counts as a no and
// leaves no error behind. The device and its copy of the code are of capability 9.0 or above.
struct ClusterLimits {
  int blocks;  // of the largest cluster, 0: none
  int planes;  // that each block of it may keep
};
ClusterLimits cluster_limits(int shared_bytes);

}  // namespace sn::cuda
