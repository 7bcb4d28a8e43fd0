// Which kernels, tiles, launches and workspace serve a problem: a pure function of shapes, type and device facts, so
// that it can be read and tested on a machine without a GPU.
#pragma once

#include "cuda/plan/plan_types.h"

namespace sn::cuda {

ForwardPlan plan_forward(const Problem& problem, const DeviceFacts& device, ForwardPath wanted);
BackwardPlan plan_backward(const BackwardProblem& problem, const DeviceFacts& device);

// Whether the forward needs a slot of tickets (slots.h).
constexpr bool takes_slot(const ForwardPlan& plan) {
  return plan.path == ForwardPath::kCluster || plan.path == ForwardPath::kTickets || plan.path == ForwardPath::kSquare;
}

// Whether `path` can serve the problem on the device.
bool serves(ForwardPath path, const Problem& problem, const DeviceFacts& device);

}  // namespace sn::cuda
