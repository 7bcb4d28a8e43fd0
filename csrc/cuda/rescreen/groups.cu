// Groups the rows that the refinement left undecided by their leaders (rescreen.cuh), in one block: at most a strip of
// rows, a few numbers each. A bucket of a hash table belongs to the least leader that meets it; rows of other leaders
// in it, like those of a leader of few rows, are not screened again. Which rows those are, and their order, may depend
// on the schedule: no result does.
//
// In the self case a leader may be an undecided row itself. Its own leader then stands for it, so that the rows of one
// cluster agree on one or two leaders although each has seen another part of it in its buffer.
//
// All rows with an undecided support set go to the list of the second refinement. What is left in the queue are those
// that only need near or far.
#include "cuda/launch.cuh"
#include "cuda/memory.cuh"
#include "cuda/ptx.cuh"
#include "cuda/rescreen/rescreen.cuh"
#include "cuda/screen/args.cuh"
#include "cuda/stages.h"
#include "cuda/warp.cuh"

namespace sn::cuda {
namespace {

// ---- traits ---------------------------------------------------------------------------------------------------------

constexpr int kThreads = 1024;
constexpr int kBuckets = static_cast<int>(kRescreenBuckets);
constexpr int kLaneBuckets = kBuckets / kWarpSize;
constexpr int kJumps = 2;
constexpr int kRows = static_cast<int>(kRescreenRows);
static_assert((kBuckets & (kBuckets - 1)) == 0 && kBuckets % kWarpSize == 0);

constexpr int kGroupBytes = 2 * shared_bytes<std::uint32_t>(kBuckets) + shared_bytes<std::uint32_t>(4);
static_assert(kGroupBytes <= kPlainSharedBytes);

enum Counter : int { kKept = 0, kWaiting = 1, kTiles = 2, kGrouped = 3 };

__device__ __forceinline__ int bucket_of(std::uint32_t leader) {
  return static_cast<int>((leader * 0x9e3779b9u) >> 21) & (kBuckets - 1);
}

// ---- kernel ---------------------------------------------------------------------------------------------------------

__global__ void __launch_bounds__(kThreads, 1) groups_kernel(const __grid_constant__ RefineArgs args) {
  const auto queued = static_cast<std::int64_t>(atomic_load(&args.gControl->queued));
  if (queued == 0 || atomic_load(&args.gControl->nonfinite) != 0) {
    if (thread_id() == 0) {
      atomic_store(&args.gControl->waiting, 0u);
      atomic_store(&args.gControl->rescreen_tiles, 0u);
    }
    return;
  }
  SharedArena arena;
  const Shared<std::uint32_t> sOwners = arena.take<std::uint32_t>(kBuckets);  // least leader of each bucket
  const Shared<std::uint32_t> sPlaces = arena.take<std::uint32_t>(kBuckets);  // rows, then where the next one goes
  const Shared<std::uint32_t> sCounters = arena.take<std::uint32_t>(4);
  const auto mark_of = [&](std::int64_t row) { return bits_of(args.thresholds.u[args.row_begin + row]); };

  for (int bucket = thread_id(); bucket < kBuckets; bucket += kThreads) {
    sOwners.set(bucket, kNoLeader);
    sPlaces.set(bucket, 0u);
  }
  if (thread_id() < 4) sCounters.set(thread_id(), 0u);
  sync_block();

  // 1. Rows without a support set wait, the others stay queued. A round has read what it overwrites.
  for (std::int64_t first = 0; first < queued; first += kThreads) {
    const std::int64_t q = first + thread_id();
    const std::int32_t entry = q < queued ? args.gQueue[q] : 0;
    sync_block();
    if (q >= queued) continue;
    if ((entry & kNeedSupport) != 0) {
      args.gWaiting[sCounters.atomic_add(kWaiting, 1u)] = entry;
    } else {
      args.gQueue[sCounters.atomic_add(kKept, 1u)] = entry;
    }
  }
  sync_block();
  const std::int64_t waiting = sCounters.get(kWaiting);

  // 2. Leaders, and who owns their buckets.
  for (std::int64_t w = thread_id(); w < waiting; w += kThreads) {
    std::uint32_t leader = mark_of(args.gWaiting[w] >> kNeedBits);
    if (args.forward.symmetric && leader != kNoLeader) {
      for (int jump = 0; jump < kJumps; ++jump) {
        const std::int64_t row = static_cast<std::int64_t>(leader & ~kLeaderMark) - args.row_begin;
        if (row < 0 || row >= args.rows) break;
        const std::uint32_t next = mark_of(row);
        if ((next & kLeaderMark) == 0 || next == kNoLeader) break;  // it does not wait
        leader = next;
      }
    }
    args.gLeaders[w] = static_cast<std::int32_t>(leader);
    if (leader != kNoLeader) sOwners.atomic_min(bucket_of(leader), leader);
  }
  sync_block();

  // 3. Sizes.
  for (std::int64_t w = thread_id(); w < waiting; w += kThreads) {
    const auto leader = static_cast<std::uint32_t>(args.gLeaders[w]);
    if (leader != kNoLeader && sOwners.get(bucket_of(leader)) == leader) sPlaces.atomic_add(bucket_of(leader), 1u);
  }
  sync_block();

  // 4. Places and tiles. A lane has consecutive buckets.
  if (warp_id() == 0) {
    const auto size_of = [&](int b) {
      const std::uint32_t size = sPlaces.get(lane_id() * kLaneBuckets + b);
      return size >= kSmallestGroup ? size : 0u;
    };
    std::uint32_t rows = 0;
    std::uint32_t tiles = 0;
    for (int b = 0; b < kLaneBuckets; ++b) {
      rows += size_of(b);
      tiles += (size_of(b) + kRows - 1) / kRows;
    }
    const std::uint32_t rows_up_to = prefix_sum(rows);
    const std::uint32_t tiles_up_to = prefix_sum(tiles);
    std::uint32_t row = rows_up_to - rows;
    std::uint32_t tile = tiles_up_to - tiles;
    for (int b = 0; b < kLaneBuckets; ++b) {
      const int bucket = lane_id() * kLaneBuckets + b;
      const std::uint32_t size = size_of(b);
      const auto leader = static_cast<std::int32_t>(sOwners.get(bucket) & ~kLeaderMark);
      for (std::uint32_t done = 0; done < size; done += kRows) {
        const std::uint32_t count = size - done < kRows ? size - done : kRows;
        args.gTiles[tile++] = {leader, static_cast<std::int32_t>(row + done), static_cast<std::int32_t>(count)};
      }
      if (size == 0) sOwners.set(bucket, kNoLeader);
      sPlaces.set(bucket, row);
      row += size;
    }
    if (lane_id() == kWarpSize - 1) {
      sCounters.set(kTiles, tiles_up_to);
      sCounters.set(kGrouped, rows_up_to);
    }
  }
  sync_block();

  // 5. Rows in their places. u and g2 take the largest errors of a row's entries; its buffer is filled anew.
  for (std::int64_t w = thread_id(); w < waiting; w += kThreads) {
    const std::int64_t row = args.gWaiting[w] >> kNeedBits;
    const std::int64_t anchor = args.row_begin + row;
    const auto leader = static_cast<std::uint32_t>(args.gLeaders[w]);
    if (leader == kNoLeader || sOwners.get(bucket_of(leader)) != leader) {
      args.thresholds.u[anchor] = float_from_bits(kNoLeader);
      continue;
    }
    args.gOrder[sPlaces.atomic_add(bucket_of(leader), 1u)] = static_cast<std::int32_t>(row);
    args.thresholds.u[anchor] = 0.0f;
    args.thresholds.g2[anchor] = 0.0f;
    args.gCounts[row] = 0;
  }
  if (thread_id() == 0) {
    atomic_store(&args.gControl->queued, sCounters.get(kKept));
    atomic_store(&args.gControl->waiting, sCounters.get(kWaiting));
    atomic_store(&args.gControl->rescreen_tiles, sCounters.get(kTiles));
    atomic_add(&args.gControl->rescreened, sCounters.get(kGrouped));
  }
}

}  // namespace

// ---- launch ---------------------------------------------------------------------------------------------------------

cudaError_t enqueue_groups(const ForwardArgs& args, const ForwardPlan& plan, char* workspace, const Strip& strip,
                           cudaStream_t stream) {
  const LaunchShape shape{1, kThreads, kGroupBytes};
  return launch(groups_kernel, shape, stream, refine_args(args, plan, workspace, strip));
}

}  // namespace sn::cuda
