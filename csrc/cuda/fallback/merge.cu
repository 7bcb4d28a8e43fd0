// The last kernel of a strip on the screened paths. It joins the lists that the fallback (fallback.cu) has made for
// each queued row. A block serves the queued rows of one partial of the sum over anchors (loss.cuh), so in the last
// strip it can add that partial up at once, whatever was queued: all other records of it were written by earlier
// launches. The block that finishes last empties the queue and, in the last strip, joins the partials to the loss and
// the statistics. Of few anchors it sums all records itself.
#include "cuda/keys.cuh"
#include "cuda/launch.cuh"
#include "cuda/loss.cuh"
#include "cuda/memory.cuh"
#include "cuda/ptx.cuh"
#include "cuda/screen/args.cuh"
#include "cuda/stages.h"

namespace sn::cuda {
namespace {

// ---- traits ---------------------------------------------------------------------------------------------------------

constexpr int kMergeThreads = 256;
static_assert(kMergeThreads == PartialMemory::kThreads);
constexpr int kMergeWarps = kMergeThreads / kWarpSize;
static_assert(kMergeWarps <= kFallbackSegments, "there is room for the lists of so many rows");
// Entries of the queue that a block looks through at once for its own.
constexpr int kQueueLoads = 4;
constexpr int kQueueWindow = kQueueLoads * kMergeThreads;
static_assert(shared_bytes<std::int32_t>(kQueueWindow) <= PartialMemory::kBytes, "they lie where records will");
// Sorting networks work on powers of two.
__host__ __device__ constexpr int padded_keys(std::int64_t count) {
  int keys = 1;
  while (keys < count) keys *= 2;
  return keys;
}
constexpr int merge_bytes(std::int64_t K) {
  return shared_bytes<std::uint64_t>(padded_keys(most_fallback_segments(K) * K)) + ReductionMemory::kBytes +
         PartialMemory::kBytes + shared_bytes<std::uint32_t>(1);
}
static_assert(merge_bytes(kFastNeighbours) <= kPlainSharedBytes && merge_bytes(1) <= kPlainSharedBytes);

// ---- kernel ---------------------------------------------------------------------------------------------------------

// Nearest (or farthest, by far_key) of so many segments.
__device__ __forceinline__ std::uint64_t best_of(const std::uint64_t* gKeys, std::int64_t segments, std::int64_t K) {
  std::uint64_t best = kNoKey;
  for (std::int64_t segment = lane_id(); segment < segments; segment += kWarpSize) {
    const std::uint64_t key = load(gKeys + segment * segment_places(K));
    if (key < best) best = key;
  }
  return least_key(best);
}

__device__ __forceinline__ std::int64_t lists_of(std::int32_t entry, Need need, std::int64_t segments) {
  return (entry & need) != 0 ? segments : 1;
}

// The keys of all lists of a queued row, by a team.
template <class Team>
__device__ __forceinline__ void load_keys(const Team& team, const RefineArgs& args, std::int32_t entry, int lists,
                                          const Shared<std::uint64_t>& sKeys) {
  const std::uint64_t* gLists = args.gBuffer + (entry >> kNeedBits) * args.capacity;
  const auto K = static_cast<int>(args.K);
  for (int e = team.rank(); e < lists * K; e += team.size()) {
    sKeys.set(e, load(gLists + e / K * segment_places(args.K) + e % K));
  }
  team.sync();
}

// One warp: the outputs of a queued row, the first K of whose keys are in order.
__device__ __forceinline__ void finish_row(const RefineArgs& args, std::int32_t entry, std::int64_t segments,
                                           const Shared<std::uint64_t>& sKeys) {
  const std::int64_t anchor = args.row_begin + (entry >> kNeedBits);
  const std::uint64_t* gLists = args.gBuffer + (entry >> kNeedBits) * args.capacity;
  // As many as there are: all but the anchor's own row, at most K. They are counted, not computed: should the
  // tensor cores of a device ever break the claimed bound, a result may be wrong, but no index may be.
  int found = 0;
  for (std::int64_t e = 0; e < args.K; e += kWarpSize) {
    const bool real = e + lane_id() < args.K && sKeys.get(static_cast<int>(e) + lane_id()) != kNoKey;
    found += popcount(ballot(real));
  }
  const std::uint64_t near = best_of(gLists + near_place(args.K), lists_of(entry, kNeedNear, segments), args.K);
  const std::uint64_t far = best_of(gLists + far_place(args.K), lists_of(entry, kNeedFar, segments), args.K);
  const AnchorRecord record =
      finish_anchor<float>(args.forward, anchor, args.K, found, sKeys, near_of<float>(near), far_of<float>(far));
  if (lane_id() == 0) args.gRecords[anchor] = record;
}

__global__ void __launch_bounds__(kMergeThreads, 2) merge_kernel(const __grid_constant__ RefineArgs args) {
  SharedArena arena;
  const Shared<std::uint64_t> sKeys = arena.take<std::uint64_t>(padded_keys(args.most_segments * args.K));
  const ReductionMemory memory(arena);
  const PartialMemory stage(arena);
  const Shared<std::uint32_t> sWord = arena.take<std::uint32_t>(1);  // how many of the queue; then: the last block
  const Shared<std::int32_t> sMine = stage.sWords.view<std::int32_t>();
  const bool poison = atomic_load(&args.gControl->nonfinite) != 0;
  const std::int64_t queued = poison ? 0 : atomic_load(&args.gControl->queued);
  const std::int64_t segments = fallback_segments(args, queued);

  for (std::int64_t begin = 0; begin < queued; begin += kQueueWindow) {
    sync_block();  // the rows of the previous window are done
    if (thread_id() == 0) sWord.set(0, 0u);
    sync_block();
#pragma unroll
    for (int l = 0; l < kQueueLoads; ++l) {
      const std::int64_t q = begin + l * kMergeThreads + thread_id();
      if (q >= queued) continue;
      const std::int32_t entry = args.gQueue[q];
      if ((args.row_begin + (entry >> kNeedBits)) % kPartials != block_id()) continue;
      sMine.set(static_cast<int>(sWord.atomic_add(0, 1u)), entry);
    }
    sync_block();
    const int mine = static_cast<int>(sWord.get(0));
    // Rows with their support set: a warp each.
    const Shared<std::uint64_t> sOwn = sKeys.offset(warp_id() * static_cast<int>(args.K));
    for (int m = warp_id(); m < mine; m += kMergeWarps) {
      const std::int32_t entry = sMine.get(m);
      if ((entry & kNeedSupport) != 0) continue;
      sync_warp();  // the previous row's keys have been read
      load_keys(WarpTeam(), args, entry, 1, sOwn);
      finish_row(args, entry, segments, sOwn);
    }
    // The others, by the whole block.
    for (int m = 0; m < mine; ++m) {
      const std::int32_t entry = sMine.get(m);
      if ((entry & kNeedSupport) == 0) continue;
      sync_block();  // the previous row's keys have been read
      load_keys(BlockTeam(), args, entry, static_cast<int>(segments), sKeys);
      sort_keys(BlockTeam(), sKeys, segments * args.K);
      if (warp_id() == 0) finish_row(args, entry, segments, sKeys);
    }
  }

  if (args.last_strip && poison) {
    poison_outputs<float>(args.forward, block_id(), block_count());
  } else if (args.last_strip && args.gPartials != nullptr) {
    sync_block();  // this block's records are written
    sum_partial(args.gRecords, args.forward.anchors.rows, static_cast<int>(block_id()), stage, memory, args.gPartials);
  }

  // The last block to arrive here knows that all records, or partials, are written.
  fence_device();
  sync_block();
  if (thread_id() == 0) {
    sWord.set(0, atomic_add(&args.gControl->ticket, 1u) == static_cast<std::uint32_t>(block_count() - 1) ? 1u : 0u);
  }
  sync_block();
  if (sWord.get(0) == 0) return;
  fence_device();
  if (thread_id() == 0) {
    atomic_add(&args.gControl->fallen_back, static_cast<std::uint32_t>(queued));
    atomic_store(&args.gControl->ticket, 0u);
    atomic_store(&args.gControl->queued, 0u);
  }
  if (!args.last_strip || poison) return;
  if (args.gPartials != nullptr) {
    join_partials<float>(args.forward, args.gPartials, memory);
  } else {
    final_reduction<float>(args.forward, GlobalRecords{args.gRecords}, poison, memory);
  }
}

}  // namespace

// ---- launch ---------------------------------------------------------------------------------------------------------

cudaError_t enqueue_merge(const ForwardArgs& args, const ForwardPlan& plan, char* workspace, const Strip& strip,
                          cudaStream_t stream) {
  const LaunchShape shape{reduction_blocks(args.anchors.rows), kMergeThreads, merge_bytes(plan.K)};
  return launch(merge_kernel, shape, stream, refine_args(args, plan, workspace, strip));
}

}  // namespace sn::cuda
