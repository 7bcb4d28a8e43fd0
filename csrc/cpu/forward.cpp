// Forward: from features and labels to a loss and a support graph.
//
// Two paths with one result. "direct" (forward_direct.cpp) computes every distance in the one summation order
// (kernels/direct.h). "screen" (forward_screen.cpp) bounds every distance by a product of an integer copy, and computes
// in the same order only the distances that the bounds leave open.
#include "forward.h"

#include "cpu.h"
#include "parallel.h"
#include "plan.h"

namespace sn::cpu {
namespace {

template <class Acc>
void forward_as(const ForwardArgs& args, const ThreadPool& pool) {
  const Kernels& kernels = active_kernels();
  const Identities identities(args);
  Loss<Acc> loss(args);
  if constexpr (sizeof(Acc) == sizeof(float)) {
    const Path path =
        choose_path(args.anchors.rows, args.candidates.rows, args.dims, loss.K(), args.dtype, args.symmetric, kernels);
    if (path == Path::kScreen && forward_screen(args, pool, kernels, identities, loss)) return;
  }
  forward_direct<Acc>(args, pool, kernels, identities, loss);
}

}  // namespace

void forward(const ForwardArgs& args, const ThreadPool& pool) {
  const DefaultFloatingPoint mode;  // bounds and the reduction are made on the caller's thread
  if (args.dtype == DType::kFloat64) {
    forward_as<double>(args, pool);
  } else {
    forward_as<float>(args, pool);
  }
}

}  // namespace sn::cpu
