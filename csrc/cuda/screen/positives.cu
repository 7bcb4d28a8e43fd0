// Finding positives takes N x M comparisons of 64-bit labels, or one look-up a candidate. A block puts the labels of
// its anchors into a hash table in shared memory and streams all candidates past it, one a thread at a time. Anchors
// with the same label share a list, kept by the first of them, the leader. Candidates are appended by an atomic; at the
// end each anchor takes its copy in increasing order, without its own row. That order is by value, so it does not
// depend on the schedule. Only which members of an identity too large for the list are noted does, and those only make
// a bound (certificate.cuh), never a result.
#include "cuda/launch.cuh"
#include "cuda/loss.cuh"
#include "cuda/memory.cuh"
#include "cuda/ptx.cuh"
#include "cuda/screen/prepare.h"
#include "cuda/stages.h"

namespace sn::cuda {
namespace {

// ---- traits ---------------------------------------------------------------------------------------------------------

constexpr int kWarps = 16;
constexpr int kThreads = kWarps * kWarpSize;
// Anchors of a block. Few: a small N still makes several blocks. Many: the labels of the candidates are read from
// memory less often.
constexpr int kFewAnchors = 64;
constexpr int kManyAnchors = 256;
constexpr std::int64_t kManyFrom = 16384;
constexpr int kBucketBits = 10;
constexpr int kBuckets = 1 << kBucketBits;
constexpr int kShared =
    static_cast<int>(kListedPositives) + 1;  // entries of a shared list: one may be an anchor itself
constexpr int kLaneEntries = (kShared + kWarpSize - 1) / kWarpSize;
static_assert(kBuckets >= 4 * kManyAnchors, "chains are short");
static_assert(kManyAnchors <= kThreads && kFewAnchors % kWarpSize == 0 && kManyAnchors % kWarpSize == 0);

struct PositivesArgs {
  ForwardArgs forward;
  int block_anchors;
  std::int32_t* gCount;  // [N]
  std::int32_t* gList;   // [N][kListedPositives]
  Control* gControl;
};

constexpr int positives_bytes(int anchors) {
  return shared_bytes<std::int64_t>(anchors) + 4 * shared_bytes<std::int32_t>(anchors) +
         shared_bytes<std::int32_t>(kBuckets);
}
static_assert(positives_bytes(kManyAnchors) <= kPlainSharedBytes);

__device__ __forceinline__ int bucket_of(std::int64_t label) {
  std::uint64_t mixed = static_cast<std::uint64_t>(label) * 0x9e3779b97f4a7c15u;
  mixed ^= mixed >> 32;
  return static_cast<int>((mixed * 0x9e3779b97f4a7c15u) >> (64 - kBucketBits));
}

// Anchors of the block by label. A bucket is a chain of leaders.
struct LabelTable {
  Shared<std::int64_t> sLabels;  // [anchors]
  Shared<std::int32_t> sNext;    // [anchors] next leader of the bucket, -1: none
  Shared<std::int32_t> sLeader;  // [anchors] first anchor of the block with the same label
  Shared<std::int32_t> sHeads;   // [kBuckets]

  __device__ __forceinline__ int find(std::int64_t label) const {
    int leader = sHeads.get(bucket_of(label));
    while (leader >= 0 && sLabels.get(leader) != label) leader = sNext.get(leader);
    return leader;
  }
};

// ---- kernel ---------------------------------------------------------------------------------------------------------

__global__ void __launch_bounds__(kThreads, 2) positives_kernel(const __grid_constant__ PositivesArgs args) {
  const ForwardArgs& forward = args.forward;
  SharedArena arena;
  LabelTable table;
  table.sLabels = arena.take<std::int64_t>(args.block_anchors);
  table.sNext = arena.take<std::int32_t>(args.block_anchors);
  table.sLeader = arena.take<std::int32_t>(args.block_anchors);
  table.sHeads = arena.take<std::int32_t>(kBuckets);
  const Shared<std::int32_t> sCounts = arena.take<std::int32_t>(args.block_anchors);  // of leaders: candidates so far
  const Shared<std::int32_t> sExtra =
      arena.take<std::int32_t>(args.block_anchors);  // of leaders: the last shared entry

  const std::int64_t first = block_id() * args.block_anchors;
  const std::int64_t left = forward.anchors.rows - first;
  const int anchors = left < args.block_anchors ? static_cast<int>(left) : args.block_anchors;
  const std::int64_t M = forward.candidates.rows;

  // 1. The table, one warp after the other. Within a warp the lowest lane of a new label leads, and the new leaders of
  //    a bucket are chained in one step.
  for (int bucket = thread_id(); bucket < kBuckets; bucket += kThreads) table.sHeads.set(bucket, -1);
  const int mine = thread_id();
  const std::int64_t label = mine < anchors ? load(forward.anchor_labels + first + mine) : 0;
  if (mine < anchors) {
    table.sLabels.set(mine, label);
    sCounts.set(mine, 0);
  }
  for (int turn = 0; turn * kWarpSize < anchors; ++turn) {
    sync_block();
    if (warp_id() != turn) continue;
    const bool present = mine < anchors;
    const int known = present ? table.find(label) : -1;
    const std::uint32_t inside = ballot(present);
    const std::uint32_t same = match_any(static_cast<std::uint64_t>(label)) & inside;
    const bool leads = present && known < 0 && (same & lanes_below()) == 0;
    const int bucket = bucket_of(label);
    const std::uint32_t chain = match_any(static_cast<std::uint32_t>(leads ? bucket : kBuckets + lane_id()));
    const int head = leads ? table.sHeads.get(bucket) : -1;
    const std::uint32_t below = chain & lanes_below();
    sync_warp();  // the heads have been read
    if (present) table.sLeader.set(mine, known >= 0 ? known : turn * kWarpSize + find_first(same));
    if (leads) {
      table.sNext.set(mine, below == 0 ? head : turn * kWarpSize + kWarpSize - 1 - leading_zeros(below));
      if ((chain >> lane_id()) == 1u) table.sHeads.set(bucket, mine);  // the highest lane of the bucket
    }
    sync_warp();
  }
  sync_block();

  // 2. The candidates.
  for (std::int64_t begin = 0; begin < M; begin += kThreads) {
    const std::int64_t candidate = begin + thread_id();
    const int leader = candidate < M ? table.find(load(forward.candidate_labels + candidate)) : -1;
    if (!any_lane(leader >= 0)) continue;
    // One atomic for all lanes that met the same identity.
    const std::uint32_t group = match_any(static_cast<std::uint32_t>(leader));
    const int chief = find_first(group);
    std::int32_t place = 0;
    if (leader >= 0 && lane_id() == chief) place = sCounts.atomic_add(leader, popcount(group));
    place = shuffle(place, chief) + popcount(group & lanes_below());
    if (leader < 0 || place >= kShared) continue;
    if (place < kListedPositives) {
      args.gList[(first + leader) * kListedPositives + place] = static_cast<std::int32_t>(candidate);
    } else {
      sExtra.set(leader, static_cast<std::int32_t>(candidate));
    }
  }
  sync_block();

  // 3. Copies, a warp an anchor: first for anchors that do not lead, while the leaders' lists are whole.
  for (int turn = 0; turn < 2; ++turn) {
    for (int anchor = warp_id(); anchor < anchors; anchor += kWarps) {
      const int leader = table.sLeader.get(anchor);
      if ((leader == anchor) != (turn == 1)) continue;
      const std::int64_t self = self_of(forward, first + anchor);
      const bool self_counts = self >= 0 && load(forward.candidate_labels + self) == table.sLabels.get(anchor);
      const std::int32_t shared = sCounts.get(leader);
      const std::int32_t count = shared - (self_counts ? 1 : 0);
      std::int32_t rEntries[kLaneEntries];
#pragma unroll
      for (int slot = 0; slot < kLaneEntries; ++slot) {
        const int place = slot * kWarpSize + lane_id();
        rEntries[slot] = -1;
        if (place < shared && place < kListedPositives) {
          rEntries[slot] = args.gList[(first + leader) * kListedPositives + place];
        } else if (place < shared && place == kListedPositives) {
          rEntries[slot] = sExtra.get(leader);
        }
        if (rEntries[slot] == self) rEntries[slot] = -1;
      }
      // The rank of an entry is the number of smaller ones.
      std::int32_t rRanks[kLaneEntries] = {};
#pragma unroll
      for (int slot = 0; slot < kLaneEntries; ++slot) {
        if (slot * kWarpSize >= shared) break;
        for (int lane = 0; lane < kWarpSize; ++lane) {
          const std::int32_t other = shuffle(rEntries[slot], lane);
#pragma unroll
          for (int s = 0; s < kLaneEntries; ++s) rRanks[s] += other >= 0 && other < rEntries[s] ? 1 : 0;
        }
      }
      sync_warp();  // a leader's list has been read
#pragma unroll
      for (int slot = 0; slot < kLaneEntries; ++slot) {
        if (rEntries[slot] >= 0 && rRanks[slot] < kListedPositives) {
          args.gList[(first + anchor) * kListedPositives + rRanks[slot]] = rEntries[slot];
        }
      }
      if (lane_id() == 0) {
        args.gCount[first + anchor] = count;
        if (count > kListedPositives) atomic_store(&args.gControl->large_identities, std::uint32_t{1});
      }
    }
    sync_block();
  }
}

}  // namespace

// ---- launch ---------------------------------------------------------------------------------------------------------

cudaError_t enqueue_positives(const ForwardArgs& args, const ForwardPlan& plan, char* workspace, cudaStream_t stream) {
  const std::int64_t N = args.anchors.rows;
  const int block_anchors = N >= kManyFrom ? kManyAnchors : kFewAnchors;
  const PositivesArgs kernel_args{.forward = args,
                                  .block_anchors = block_anchors,
                                  .gCount = piece<std::int32_t>(workspace, plan.positive_count),
                                  .gList = piece<std::int32_t>(workspace, plan.positive_list),
                                  .gControl = piece<Control>(workspace, plan.control)};
  const LaunchShape shape{divide_up(N, block_anchors), kThreads, positives_bytes(block_anchors)};
  return launch(positives_kernel, shape, stream, kernel_args);
}

}  // namespace sn::cuda
