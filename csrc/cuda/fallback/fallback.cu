// The fallback: rows that the screenings could not certify, such as clusters tighter than the first bound in groups too
// small for a second one, points at one distance, the farthest of large identities in tight clusters, or scales outside
// of the range. Their neighbours come from direct sums alone. The host never learns how many rows there are: a grid of
// fixed size takes the work, in one launch, which returns at once where nothing is queued.
//
// Every row is cut into segments of candidates, which merge.cu joins: one queued row keeps as many multiprocessors busy
// as it has segments. What the refinement has already resolved stands in the place of the first segment.
//
// Up to kFewQueued rows are served one by one, a block a row and segment. Candidates come in order of index, and three
// things save most of their sums:
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
// More rows are served in tiles (tile_search.cuh), which read and add up each row for 64 others. Tiles of rows that
// need their support set have a block a segment. Others see few candidates, so a block may join several segments.
#include <algorithm>

#include "cuda/fallback/tile_search.cuh"
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

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarpSize;
// Warps that sum for one row; the others look for candidates with them. More would need more shared memory than some
// devices have.
constexpr int kSummers = 4;
template <class T>
using RowSearch = NearestK<T, kWarps, kSummers>;

template <class T>
int fallback_bytes(std::int64_t dims) {
  return std::max(RowSearch<T>::bytes(dims), TileSearch<T>::bytes(dims));
}
static_assert(TileSearch<float>::kThreads == kThreads && TileSearch<Half>::kThreads == kThreads);
static_assert(TileSearch<float>::bytes(2 * kSection) <= kLeastSharedBytes);
static_assert(TileSearch<Half>::bytes(2 * kSection) <= kLeastSharedBytes);
static_assert(RowSearch<float>::bytes(kSection) <= kLeastSharedBytes);

__device__ __forceinline__ int parts_of(int all, int each) {
  return (all + each - 1) / each;
}

// ---- kernel ---------------------------------------------------------------------------------------------------------

// Few rows: a row and a segment, by the whole block.
template <class T>
__device__ __forceinline__ void search_rows(const RefineArgs& args, std::int64_t queued) {
  const std::int64_t works = queued * kFallbackSegments;
  if (block_id() >= works) return;
  SharedArena arena;
  const ForwardArgs& forward = args.forward;
  RowSearch<T> nearest(arena, forward.candidates, forward.dims, args.aligned, args.K);
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
      for (std::int64_t first = begin; first < end; first += kThreads) {
        const std::int64_t candidate = first + thread_id();
        const bool present =
            candidate < end && candidate != self &&
            (load(forward.candidate_labels + (candidate < end ? candidate : begin)) == label) == positives;
        nearest.offer(present, static_cast<std::int32_t>(candidate), positives);
        if (!nearest.full() && first + kThreads < end) continue;
        const float before_flush = float_from_bits(shuffle(atomic_load(gBound), 0));
        nearest.tighten(before_flush);
        nearest.flush(need_support);
        if (need_support && thread_id() == 0 && nearest.bound < before_flush)
          atomic_min(gBound, bits_of(nearest.bound));
        // Nothing from here on can come before the last of the K.
        if (!positives && nearest.worst_key() < static_cast<std::uint64_t>(first + kThreads)) break;
      }
    }
    std::uint64_t* gList = args.gBuffer + row * args.capacity + segment * segment_places(args.K);
    if (need_support) {
      for (int e = thread_id(); e < args.K; e += kThreads) gList[e] = nearest.sKeys.get(e);
    }
    if (thread_id() == 0) {
      if (need_near) gList[near_place(args.K)] = nearest.near;
      if (need_far) gList[far_place(args.K)] = nearest.far;
    }
  }
}

// Many rows: a tile of them and a segment. Each block takes consecutive ones.
template <class T>
__device__ __forceinline__ void search_tiles(const RefineArgs& args, int all_queued) {
  constexpr int kSide = TileSearch<T>::kSide;
  SharedArena arena;
  TileSearch<T> tiles(arena, args, all_queued);
#pragma unroll 1
  while (tiles.kind() < 2) {
    const int queued = tiles.queued();
    const bool support = tiles.kind() == 0;
    const int support_tiles = parts_of(tiles.support_rows(), kSide);
    const int count = support ? support_tiles : parts_of(queued, kSide) - support_tiles;
    const auto segments = static_cast<int>(fallback_segments(args, queued));
    const int wanted = count > 0 && count < kLabelBlocks ? static_cast<int>(kLabelBlocks) / count : 1;
    const int parts = support || wanted > segments ? segments : wanted;
    const int candidates = parts_of(static_cast<int>(args.forward.candidates.rows), segments);
    const std::int64_t works = std::int64_t{count} * parts;
    tiles.run({.first_tile = support ? 0 : support_tiles,
               .parts = parts,
               .segments = segments,
               .length = parts_of(candidates, kSide) * kSide,
               .begin = static_cast<int>(works * block_id() / block_count()),
               .end = static_cast<int>(works * (block_id() + 1) / block_count())});
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads, 2) fallback_kernel(const __grid_constant__ RefineArgs args) {
  const std::int64_t queued = atomic_load(&args.gControl->queued);
  if (queued == 0) return;
  if (queued <= kFewQueued) {
    search_rows<T>(args, queued);
  } else {
    search_tiles<T>(args, static_cast<int>(queued));
  }
}

}  // namespace

// ---- launch ---------------------------------------------------------------------------------------------------------

cudaError_t enqueue_fallback(const ForwardArgs& args, const ForwardPlan& plan, char* workspace, const Strip& strip,
                             cudaStream_t stream) {
  const std::int64_t works = strip.rows * kMostSegments;
  const std::int64_t blocks = works < kFallbackBlocks ? works : kFallbackBlocks;
  const RefineArgs kernel_args = refine_args(args, plan, workspace, strip);
  return for_narrow_type(args.dtype, [&]<class T>() {
    const LaunchShape shape{blocks, kThreads, fallback_bytes<T>(args.dims)};
    return launch(fallback_kernel<T>, shape, stream, kernel_args);
  });
}

}  // namespace sn::cuda
