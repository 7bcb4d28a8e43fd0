// Thresholds of the far test, for anchors with more positives than are listed, from exact sums of a sample of the
// listed ones. certificate.cuh derives them.
#include "cuda/direct_sum.cuh"
#include "cuda/launch.cuh"
#include "cuda/memory.cuh"
#include "cuda/ptx.cuh"
#include "cuda/screen/args.cuh"
#include "cuda/screen/bound.cuh"
#include "cuda/screen/certificate.cuh"
#include "cuda/stages.h"

namespace sn::cuda {
namespace {

// ---- traits ---------------------------------------------------------------------------------------------------------

constexpr int kFarWarps = 4;
constexpr int kFarThreads = kFarWarps * kWarpSize;
constexpr std::int64_t kFarBlocks = 396;        // three on each multiprocessor of an H200, any number is right
constexpr std::int64_t kFarSample = kWarpSize;  // of the listed positives, one a lane
static_assert(kListedPositives % kFarSample == 0);

// ---- kernel ---------------------------------------------------------------------------------------------------------

// A warp an anchor, in turn: exact keys of a sample of the listed positives.
template <class T>
__global__ void __launch_bounds__(kFarThreads, 2) far_thresholds_kernel(const __grid_constant__ RefineArgs args) {
  if (atomic_load(&args.gControl->large_identities) == 0) return;
  SharedArena arena;
  const ForwardArgs& forward = args.forward;
  const int elements = WarpSums<T>::elements(forward.dims);
  WarpSums<T> sums(arena.take<T>(kFarWarps * elements).offset(warp_id() * elements),
                   static_cast<const T*>(forward.candidates.data), forward.candidates.row_stride, forward.dims,
                   args.aligned);
  for (std::int64_t row = block_id() * kFarWarps + warp_id(); row < args.rows; row += block_count() * kFarWarps) {
    const std::int64_t anchor = args.row_begin + row;
    const AnchorFacts facts = anchor_facts(args, anchor);
    const ListedPositives positives = positives_of(args, anchor, facts.self, load(forward.anchor_labels + anchor));
    if (positives.all_listed()) continue;
    if (facts.blind) continue;
    sums.set_anchor(static_cast<const T*>(forward.anchors.data) + anchor * forward.anchors.row_stride);
    const std::int64_t place = lane_id() * (kListedPositives / kFarSample);
    std::int32_t positive = load(positives.gList + place);
    // The own row is no positive. Where it is listed, the list is full.
    if (positive == facts.self) positive = load(positives.gList + kListedPositives);
    const float key = float_from_bits(reduce_max(bits_of(sums.sums(positive, kWarpSize))));
    FarThreshold threshold{-kInfinity, 0.0f};
    if (key < kInfinity) {
      const float distance = multiply_down(sqrt_down(key), facts.scale);
      threshold = far_threshold(far_reach_of(args, facts, distance), facts.n, facts.rho, args.eta);
    }
    if (lane_id() == 0) {
      args.thresholds.G[anchor] = threshold.G;
      args.thresholds.g2[anchor] = threshold.g2;
    }
  }
}

// ---- launch ---------------------------------------------------------------------------------------------------------

template <class T>
cudaError_t launch_far(const RefineArgs& args, cudaStream_t stream) {
  const std::int64_t blocks = divide_up(args.rows, kFarWarps);
  const LaunchShape shape{blocks < kFarBlocks ? blocks : kFarBlocks, kFarThreads,
                          shared_bytes<T>(kFarWarps * WarpSums<T>::elements(args.forward.dims))};
  return launch(far_thresholds_kernel<T>, shape, stream, args);
}

}  // namespace

// ---- dispatch -------------------------------------------------------------------------------------------------------

cudaError_t enqueue_far_thresholds(const ForwardArgs& args, const ForwardPlan& plan, char* workspace,
                                   const Strip& strip, cudaStream_t stream) {
  return for_narrow_type(args.dtype,
                         [&]<class T>() { return launch_far<T>(refine_args(args, plan, workspace, strip), stream); });
}

}  // namespace sn::cuda
