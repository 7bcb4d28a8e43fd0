// The exact scan for anchors that the refinement could not certify, and the sum over all anchors.
#pragma once

#include <cstdint>

#include "../sn_types.h"
#include "plan.h"
#include "platform.h"
#include "refine.h"

namespace sn::cuda {

// Two kernels of fixed grids: segments of the queued rows, then their lists merged. After the last wave the last block
// writes the loss and the statistics; after others it empties the queue.
cudaError_t enqueue_ladder(const ForwardArgs& args, const ForwardPlan& plan, char* workspace, const Wave& wave,
                           cudaStream_t stream);

}  // namespace sn::cuda
