// Rows that the screening could not certify: clusters tighter than its bound and larger than a buffer, many duplicates,
// scales outside of its range. Their neighbours come from direct sums alone.
//
// Every row is cut into kLadderSegments stretches of candidates; a pair of row and stretch is one piece of work, and a
// grid of fixed size takes them in turn, so that one queued row keeps as many multiprocessors busy as stretches, and
// thousands keep all. The host never learns how many there are.
//
// Within a stretch candidates come in order of index, and three things spare most of their sums:
//   * whatever exceeds a bound is abandoned on the way. The bound of a row starts where the refinement left it and lives in
//     the row's T: the K-th key of any stretch is at least the row's, so all stretches lower it together, by an integer
//     minimum. When that happens depends on the schedule, what comes out does not: only what is strictly above a bound on
//     the K-th key is ever dropped.
//   * once the K-th key is before (0, next index), nothing behind can come in: duplicates end the stretch.
//   * near and far are wanted of the positives only, which are summed in full, first.
// A second kernel joins the lists of the stretches. What the refinement had settled stands in the place of stretch 0.
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
constexpr std::int64_t kLadderBlocks = 396;
constexpr std::int64_t kMergeBlocks = 264;
constexpr int kLadderWarps = 4;
constexpr int kLadderThreads = kLadderWarps * kWarpSize;
constexpr int kMergeThreads = 256;
constexpr int kMergeKeys = static_cast<int>(kLadderSegments * kFastNeighbours);
static_assert((kMergeKeys & (kMergeKeys - 1)) == 0);
static_assert(kLadderSegments <= kWarpSize, "a lane a stretch, for near and far");

__host__ __device__ constexpr std::int64_t merge_keys(std::int64_t K) {
  std::int64_t keys = 1;
  while (keys < kLadderSegments * K) keys *= 2;
  return keys;
}
constexpr int merge_bytes(std::int64_t K) {
  return shared_bytes<std::uint64_t>(static_cast<int>(merge_keys(K))) + ReductionMemory::kBytes +
         shared_bytes<std::uint32_t>(1);
}
static_assert(merge_bytes(kFastNeighbours) <= kPlainSharedBytes);

// ---- kernels --------------------------------------------------------------------------------------------------------

template <class T>
__global__ void __launch_bounds__(kLadderThreads, 3) ladder_kernel(const __grid_constant__ RefineArgs args) {
  const std::int64_t queued = atomic_load(&args.gControl->queued);
  const std::int64_t works = queued * kLadderSegments;
  if (block_id() >= works) return;
  SharedArena arena;
  const ForwardArgs& forward = args.forward;
  Scan<T, kLadderWarps> scan(arena, forward.candidates, forward.dims, args.aligned, args.K);
  const std::int64_t M = forward.candidates.rows;
  const std::int64_t stretch = (M + kLadderSegments - 1) / kLadderSegments;

  for (std::int64_t work = block_id(); work < works; work += block_count()) {
    const std::int32_t entry = args.gQueue[work / kLadderSegments];
    const std::int64_t segment = work % kLadderSegments;
    const std::int64_t row = entry >> kNeedBits;
    const std::int64_t anchor = args.row_begin + row;
    const bool need_support = (entry & kNeedSupport) != 0;
    const bool need_near = (entry & kNeedNear) != 0;
    const bool need_far = (entry & kNeedFar) != 0;
    const std::int64_t begin = segment * stretch < M ? segment * stretch : M;
    const std::int64_t end = begin + stretch < M ? begin + stretch : M;
    const std::int64_t self = self_of(forward, anchor);
    const std::int64_t label = load(forward.anchor_labels + anchor);
    auto* gBound = reinterpret_cast<std::uint32_t*>(args.thresholds.T + anchor);

    scan.begin(static_cast<const T*>(forward.anchors.data) + anchor * forward.anchors.row_stride, kInfinity);
    // First the positives, tracked; then all others, which only compete for the K places.
    const int passes = need_support ? 2 : 1;
    for (int pass = 0; pass < passes; ++pass) {
      const bool positives = pass == 0;
      for (std::int64_t first = begin; first < end; first += kLadderThreads) {
        const std::int64_t candidate = first + thread_id();
        const bool present =
            candidate < end && candidate != self &&
            (load(forward.candidate_labels + (candidate < end ? candidate : begin)) == label) == positives;
        scan.offer(present, static_cast<std::int32_t>(candidate), positives);
        if (!scan.full() && first + kLadderThreads < end) continue;
        const float before_flush = float_from_bits(shuffle(atomic_load(gBound), 0));
        scan.tighten(before_flush);
        scan.flush(need_support);
        if (need_support && thread_id() == 0 && scan.bound < before_flush) atomic_min(gBound, bits_of(scan.bound));
        // Nothing from here on can come before the last of the K.
        if (!positives && scan.worst_key() < static_cast<std::uint64_t>(first + kLadderThreads)) break;
      }
    }
    std::uint64_t* gLists = args.gBuffer + row * args.capacity;
    if (need_support) {
      for (int e = thread_id(); e < args.K; e += kLadderThreads) gLists[segment * args.K + e] = scan.sKeys.get(e);
    }
    if (thread_id() == 0) {
      if (need_near) gLists[kLadderSegments * args.K + segment] = scan.near;
      if (need_far) gLists[kLadderSegments * (args.K + 1) + segment] = scan.far;
    }
  }
}

// Nearest (or farthest, by far_key) of the stretches; what the refinement knew is in place 0.
__device__ __forceinline__ std::uint64_t best_of(const std::uint64_t* gKeys, bool many) {
  const int count = many ? static_cast<int>(kLadderSegments) : 1;
  return least_key(lane_id() < count ? load(gKeys + lane_id()) : kNoKey);
}

__global__ void __launch_bounds__(kMergeThreads, 2) merge_kernel(const __grid_constant__ RefineArgs args) {
  SharedArena arena;
  const Shared<std::uint64_t> sKeys = arena.take<std::uint64_t>(static_cast<int>(merge_keys(args.K)));
  const ReductionMemory memory(arena);
  const Shared<std::uint32_t> sLast = arena.take<std::uint32_t>(1);
  const bool poison = atomic_load(&args.gControl->nonfinite) != 0;
  const std::int64_t queued = poison ? 0 : atomic_load(&args.gControl->queued);

  for (std::int64_t q = block_id(); q < queued; q += block_count()) {
    const std::int32_t entry = args.gQueue[q];
    const std::int64_t row = entry >> kNeedBits;
    const std::int64_t anchor = args.row_begin + row;
    const std::uint64_t* gLists = args.gBuffer + row * args.capacity;
    const bool many = (entry & kNeedSupport) != 0;
    const std::int64_t count = many ? kLadderSegments * args.K : args.K;
    sync_block();  // the previous row's keys have been read
    for (std::int64_t e = thread_id(); e < count; e += kMergeThreads) sKeys.set(static_cast<int>(e), load(gLists + e));
    sync_block();
    if (many) sort_keys(BlockTeam(), sKeys, count);
    if (warp_id() == 0) {
      // As many as there are: all but the anchor's own row, at most K. Counted, not computed: should a device's tensor cores
      // ever break the claimed bound, a result may be wrong, but no index may be.
      int found = 0;
      for (std::int64_t e = 0; e < args.K; e += kWarpSize) {
        const bool real = e + lane_id() < args.K && sKeys.get(static_cast<int>(e) + lane_id()) != kNoKey;
        found += popcount(ballot(real));
      }
      const std::uint64_t near = best_of(gLists + kLadderSegments * args.K, (entry & kNeedNear) != 0);
      const std::uint64_t far = best_of(gLists + kLadderSegments * (args.K + 1), (entry & kNeedFar) != 0);
      const AnchorRecord record =
          finish_anchor<float>(args.forward, anchor, args.K, found, sKeys, positive_from(near), positive_from_far(far));
      if (lane_id() == 0) args.gRecords[anchor] = record;
    }
  }

  // The last block to come here knows that all records are written.
  fence_device();
  sync_block();
  if (thread_id() == 0) {
    sLast.set(0, atomic_add(&args.gControl->ticket, 1u) == static_cast<std::uint32_t>(block_count() - 1) ? 1u : 0u);
  }
  sync_block();
  if (sLast.get(0) == 0) return;
  fence_device();
  if (thread_id() == 0) {
    atomic_add(&args.gControl->laddered, static_cast<std::uint32_t>(queued));
    atomic_store(&args.gControl->ticket, 0u);
    atomic_store(&args.gControl->queued, 0u);
  }
  if (args.last_wave) final_reduction<float>(args.forward, GlobalRecords{args.gRecords}, poison, memory);
}

// ---- launch ---------------------------------------------------------------------------------------------------------

template <class T>
cudaError_t launch_ladder(const RefineArgs& args, cudaStream_t stream) {
  const std::int64_t works = args.rows * kLadderSegments;
  const LaunchShape shape{works < kLadderBlocks ? works : kLadderBlocks, kLadderThreads,
                          Scan<T, kLadderWarps>::scan_bytes(args.forward.dims)};
  const cudaError_t error = launch(ladder_kernel<T>, shape, stream, args);
  if (error != cudaSuccess) return error;
  const LaunchShape merge_shape{args.rows < kMergeBlocks ? args.rows : kMergeBlocks, kMergeThreads,
                                merge_bytes(args.K)};
  return launch(merge_kernel, merge_shape, stream, args);
}

}  // namespace

// ---- dispatch -------------------------------------------------------------------------------------------------------

cudaError_t enqueue_ladder(const ForwardArgs& args, const ForwardPlan& plan, char* workspace, const Wave& wave,
                           cudaStream_t stream) {
  const RefineArgs kernel_args = refine_args(args, plan, workspace, wave.begin, wave.rows);
  switch (args.dtype) {
    case DType::kFloat32:
      return launch_ladder<float>(kernel_args, stream);
    case DType::kFloat16:
      return launch_ladder<Half>(kernel_args, stream);
    case DType::kBFloat16:
      return launch_ladder<BFloat16>(kernel_args, stream);
    case DType::kFloat64:
      break;
  }
  return cudaErrorInvalidValue;
}

}  // namespace sn::cuda
