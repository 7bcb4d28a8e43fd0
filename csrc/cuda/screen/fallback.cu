// The fallback: rows that the screening could not certify, such as clusters tighter than its bound and larger than a
// buffer, many duplicates, or scales outside of its range. Their neighbours come from direct sums alone.
//
// Every row is cut into kFallbackSegments segments of candidates. A pair of row and segment is one piece of work, and a
// grid of fixed size takes them in turn: one queued row keeps as many multiprocessors busy as it has segments,
// thousands of rows keep all busy. The host never learns how many rows there are.
//
// Within a segment candidates come in order of index, and three things save most of their sums:
//
// * Whatever exceeds a bound is abandoned on the way. The bound of a row starts where the refinement left it and lives
//   in the row's T. The K-th key of any segment is at least the row's, so all segments lower it together, by an
//   integer minimum. When that happens depends on the schedule; the result does not, since only what is strictly above
//   a bound on the K-th key is ever dropped.
//
// * Once the K-th key is before (0, next index), nothing later can come in: duplicates end the segment.
//
// * near and far are wanted of the positives only, which are summed in full, first.
//
// merge.cu joins the lists of the segments. What the refinement has already resolved stands in the place of segment 0.
#include "cuda/keys.cuh"
#include "cuda/launch.cuh"
#include "cuda/loss.cuh"
#include "cuda/memory.cuh"
#include "cuda/ptx.cuh"
#include "cuda/screen/args.cuh"
#include "cuda/screen/nearest.cuh"
#include "cuda/stages.h"

namespace sn::cuda {
namespace {

// ---- traits ---------------------------------------------------------------------------------------------------------

// Three blocks on each multiprocessor of an H200; any number is right.
constexpr std::int64_t kFallbackBlocks = 396;
constexpr int kFallbackWarps = 4;
constexpr int kFallbackThreads = kFallbackWarps * kWarpSize;

// ---- kernel ---------------------------------------------------------------------------------------------------------

template <class T>
__global__ void __launch_bounds__(kFallbackThreads, 3) ladder_kernel(const __grid_constant__ RefineArgs args) {
  const std::int64_t queued = atomic_load(&args.gControl->queued);
  const std::int64_t works = queued * kFallbackSegments;
  if (block_id() >= works) return;
  SharedArena arena;
  const ForwardArgs& forward = args.forward;
  NearestK<T, kFallbackWarps> nearest(arena, forward.candidates, forward.dims, args.aligned, args.K);
  const std::int64_t M = forward.candidates.rows;
  const std::int64_t length = (M + kFallbackSegments - 1) / kFallbackSegments;

  for (std::int64_t work = block_id(); work < works; work += block_count()) {
    const std::int32_t entry = args.gQueue[work / kFallbackSegments];
    const std::int64_t segment = work % kFallbackSegments;
    const std::int64_t row = entry >> kNeedBits;
    const std::int64_t anchor = args.row_begin + row;
    const bool need_support = (entry & kNeedSupport) != 0;
    const bool need_near = (entry & kNeedNear) != 0;
    const bool need_far = (entry & kNeedFar) != 0;
    const std::int64_t begin = segment * length < M ? segment * length : M;
    const std::int64_t end = begin + length < M ? begin + length : M;
    const std::int64_t self = self_of(forward, anchor);
    const std::int64_t label = load(forward.anchor_labels + anchor);
    auto* gBound = reinterpret_cast<std::uint32_t*>(args.thresholds.T + anchor);

    nearest.begin(static_cast<const T*>(forward.anchors.data) + anchor * forward.anchors.row_stride, kInfinity);
    // First the positives, tracked; then all others, which only compete for the K places.
    const int passes = need_support ? 2 : 1;
    for (int pass = 0; pass < passes; ++pass) {
      const bool positives = pass == 0;
      for (std::int64_t first = begin; first < end; first += kFallbackThreads) {
        const std::int64_t candidate = first + thread_id();
        const bool present =
            candidate < end && candidate != self &&
            (load(forward.candidate_labels + (candidate < end ? candidate : begin)) == label) == positives;
        nearest.offer(present, static_cast<std::int32_t>(candidate), positives);
        if (!nearest.full() && first + kFallbackThreads < end) continue;
        const float before_flush = float_from_bits(shuffle(atomic_load(gBound), 0));
        nearest.tighten(before_flush);
        nearest.flush(need_support);
        if (need_support && thread_id() == 0 && nearest.bound < before_flush)
          atomic_min(gBound, bits_of(nearest.bound));
        // Nothing from here on can come before the last of the K.
        if (!positives && nearest.worst_key() < static_cast<std::uint64_t>(first + kFallbackThreads)) break;
      }
    }
    std::uint64_t* gLists = args.gBuffer + row * args.capacity;
    if (need_support) {
      for (int e = thread_id(); e < args.K; e += kFallbackThreads) gLists[segment * args.K + e] = nearest.sKeys.get(e);
    }
    if (thread_id() == 0) {
      if (need_near) gLists[kFallbackSegments * args.K + segment] = nearest.near;
      if (need_far) gLists[kFallbackSegments * (args.K + 1) + segment] = nearest.far;
    }
  }
}

}  // namespace

// ---- launch ---------------------------------------------------------------------------------------------------------

cudaError_t enqueue_fallback(const ForwardArgs& args, const ForwardPlan& plan, char* workspace, const Strip& strip,
                             cudaStream_t stream) {
  const std::int64_t works = strip.rows * kFallbackSegments;
  const std::int64_t blocks = works < kFallbackBlocks ? works : kFallbackBlocks;
  const RefineArgs kernel_args = refine_args(args, plan, workspace, strip);
  return for_narrow_type(args.dtype, [&]<class T>() {
    const LaunchShape shape{blocks, kFallbackThreads, NearestK<T, kFallbackWarps>::bytes(args.dims)};
    return launch(ladder_kernel<T>, shape, stream, kernel_args);
  });
}

}  // namespace sn::cuda
