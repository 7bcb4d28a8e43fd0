// Finding positives takes N x M comparisons of 64-bit labels, or one look-up a candidate. A block has a group of
// anchors and a segment of candidates. It puts the labels of its anchors into a hash table in shared memory and streams
// the candidates past it. Anchors of a group with the same label share a list, kept by the first of them, the leader.
// Candidates are appended by an atomic, one for all lanes of a warp that met the same identity.
//
// Nobody copies or sorts a list: whoever reads one leaves out the anchor's own row (positives_of in args.cuh). Where a
// candidate stands in its list depends on the schedule, and so does which members of an identity too large for its list
// are noted. Neither shows: listed positives are offered to exact sums as a set, and the members of large identities
// only make a bound (certificate.cuh).
//
// The groups read groups x M x 8 bytes of labels, all but the first time from the second-level cache, and look up
// groups x M labels. plan/sizes.h cuts the work (positives_shape): blocks enough for every multiprocessor, groups so
// large that look-ups do not count, segments so short that a thread has few candidates.
#include "cuda/launch.cuh"
#include "cuda/loss.cuh"
#include "cuda/memory.cuh"
#include "cuda/plan/sizes.h"
#include "cuda/ptx.cuh"
#include "cuda/screen/prepare.h"
#include "cuda/stages.h"

namespace sn::cuda {
namespace {

// ---- traits ---------------------------------------------------------------------------------------------------------

constexpr int kThreads = 256;
constexpr int kMinBlocks = 6;  // 40 registers
static_assert(kMinBlocks >= kPositivesResident, "what the plan counts on");
constexpr int kBatch = 4;  // candidates of a thread under way at once
static_assert(kPositivesBatch == kBatch * kThreads);

constexpr int kAnchorsEach = static_cast<int>(kMostPositiveAnchors) / kThreads;  // of a thread, at most
static_assert(kMostPositiveAnchors % kThreads == 0);

// Slots of the hash table, a power of two: at most a quarter of them is taken, so chains are short.
constexpr int kSlotsEach = 4;
constexpr int kFree = 0x7fffffff;
// A slot holds (round in which it was claimed, anchor): the smaller one keeps it.
constexpr int kRoundShift = 16;
constexpr int kAnchorMask = (1 << kRoundShift) - 1;
static_assert(kMostPositiveAnchors <= (1 << (31 - kRoundShift - 1)), "rounds are fewer than anchors");
constexpr int kVotes = 3;

struct PositivesArgs {
  ForwardArgs forward;
  int group_anchors;
  int slot_bits;  // log2 of the table's slots
  std::uint32_t segments;
  std::int32_t* gLeader;  // [N]
  std::int32_t* gCount;   // [N], of leaders
  std::int32_t* gList;    // [N][kPositiveEntries], of leaders
  Control* gControl;
};

constexpr int positives_bytes(int anchors) {
  return shared_bytes<std::int64_t>(anchors) + shared_bytes<std::int32_t>(kSlotsEach * anchors) +
         shared_bytes<std::uint32_t>(kVotes);
}
static_assert(positives_bytes(static_cast<int>(kMostPositiveAnchors)) <= kPlainSharedBytes);

// Anchors of the group by label, with open addressing: a label lies in the first slot behind its own that no other
// label took before.
struct LabelTable {
  Shared<std::int64_t> sLabels;  // [anchors]
  Shared<std::int32_t> sSlots;   // [1 << slot_bits]
  int slot_bits;

  __device__ __forceinline__ int slot_of(std::int64_t label) const {
    std::uint64_t mixed = static_cast<std::uint64_t>(label) * 0x9e3779b97f4a7c15u;
    mixed ^= mixed >> 32;
    return static_cast<int>((mixed * 0x9e3779b97f4a7c15u) >> (64 - slot_bits));
  }
  __device__ __forceinline__ int next(int slot) const { return (slot + 1) & ((1 << slot_bits) - 1); }

  // The leader of the label, -1 for none.
  __device__ __forceinline__ int find(std::int64_t label) const {
    for (int slot = slot_of(label);; slot = next(slot)) {
      const int entry = sSlots.get(slot);
      if (entry == kFree) return -1;
      const int leader = entry & kAnchorMask;
      if (sLabels.get(leader) == label) return leader;
    }
  }
};

// ---- kernel ---------------------------------------------------------------------------------------------------------

// Fills the table; the whole block calls it. In round r every anchor without a leader asks for the r-th slot behind the
// one of its label. The first of those that ask keeps a free slot and leads the anchors of its label, which ask for the
// same slots and so meet in the same round; all others go on. rLeaders: of anchors thread_id() + e kThreads.
__device__ __forceinline__ void fill_table(const LabelTable& table, const PositivesArgs& args, std::int64_t first,
                                           int anchors, Shared<std::uint32_t> sVotes,
                                           std::int32_t (&rLeaders)[kAnchorsEach]) {
  for (int slot = thread_id(); slot < (1 << table.slot_bits); slot += kThreads) table.sSlots.set(slot, kFree);
  int rSlots[kAnchorsEach];
#pragma unroll
  for (int e = 0; e < kAnchorsEach; ++e) {
    const int mine = thread_id() + e * kThreads;
    rLeaders[e] = kFree;
    if (mine < anchors) {
      const std::int64_t label = load(args.forward.anchor_labels + first + mine);
      table.sLabels.set(mine, label);
      rSlots[e] = table.slot_of(label);
      rLeaders[e] = -1;
    }
  }
  if (thread_id() < kVotes) sVotes.set(thread_id(), 0u);
  sync_block();
  for (int round = 0;; ++round) {
#pragma unroll
    for (int e = 0; e < kAnchorsEach; ++e) {
      if (rLeaders[e] < 0) table.sSlots.atomic_min(rSlots[e], round << kRoundShift | (thread_id() + e * kThreads));
    }
    sync_block();
    bool more = false;
#pragma unroll
    for (int e = 0; e < kAnchorsEach; ++e) {
      if (rLeaders[e] >= 0) continue;
      const int holder = table.sSlots.get(rSlots[e]) & kAnchorMask;
      if (table.sLabels.get(holder) == table.sLabels.get(thread_id() + e * kThreads)) {
        rLeaders[e] = holder;
      } else {
        rSlots[e] = table.next(rSlots[e]);
        more = true;
      }
    }
    // Of three words in turn, the one that is set to zero here was read two rounds ago.
    if (any_lane(more) && lane_id() == 0) sVotes.atomic_or(round % kVotes, 1u);
    if (thread_id() == 0) sVotes.set((round + 1) % kVotes, 0u);
    sync_block();
    if (sVotes.get(round % kVotes) == 0) return;
  }
}

__global__ void __launch_bounds__(kThreads, kMinBlocks) positives_kernel(const __grid_constant__ PositivesArgs args) {
  const ForwardArgs& forward = args.forward;
  SharedArena arena;
  LabelTable table;
  table.sLabels = arena.take<std::int64_t>(args.group_anchors);
  table.sSlots = arena.take<std::int32_t>(1 << args.slot_bits);
  table.slot_bits = args.slot_bits;
  const Shared<std::uint32_t> sVotes = arena.take<std::uint32_t>(kVotes);

  const std::uint32_t group = static_cast<std::uint32_t>(block_id()) / args.segments;
  const std::uint32_t segment = static_cast<std::uint32_t>(block_id()) - group * args.segments;
  const std::int64_t first = std::int64_t{group} * args.group_anchors;
  const std::int64_t left = forward.anchors.rows - first;
  const int anchors = left < args.group_anchors ? static_cast<int>(left) : args.group_anchors;
  const std::int64_t M = forward.candidates.rows;
  const std::int64_t begin = segment * M / args.segments;
  const std::int64_t end = (segment + 1) * M / args.segments;

  // Labels of the next candidates are under way while something else is done.
  std::int64_t rLabels[kBatch];
  const auto bring = [&](std::int64_t base) {
#pragma unroll
    for (int b = 0; b < kBatch; ++b) {
      const std::int64_t candidate = base + b * kThreads + thread_id();
      rLabels[b] = candidate < end ? load(forward.candidate_labels + candidate) : 0;
    }
  };
  bring(begin);

  std::int32_t rLeaders[kAnchorsEach];
  fill_table(table, args, first, anchors, sVotes, rLeaders);
  if (segment == 0) {
#pragma unroll
    for (int e = 0; e < kAnchorsEach; ++e) {
      const int mine = thread_id() + e * kThreads;
      if (mine < anchors) args.gLeader[first + mine] = static_cast<std::int32_t>(first) + rLeaders[e];
    }
  }

  for (std::int64_t base = begin; base < end; base += kBatch * kThreads) {
    std::int32_t rFound[kBatch];
#pragma unroll
    for (int b = 0; b < kBatch; ++b) {
      rFound[b] = base + b * kThreads + thread_id() < end ? table.find(rLabels[b]) : -1;
    }
    bring(base + kBatch * kThreads);
    // All atomics of the batch are under way before the first place is waited for.
    std::uint32_t rSame[kBatch];
    std::int32_t rPlaces[kBatch];
#pragma unroll
    for (int b = 0; b < kBatch; ++b) {
      rSame[b] = 0;
      rPlaces[b] = 0;
      if (!any_lane(rFound[b] >= 0)) continue;
      rSame[b] = match_any(static_cast<std::uint32_t>(rFound[b]));
      if (rFound[b] >= 0 && (rSame[b] & lanes_below()) == 0) {
        rPlaces[b] = atomic_add(args.gCount + first + rFound[b], popcount(rSame[b]));
      }
    }
#pragma unroll
    for (int b = 0; b < kBatch; ++b) {
      if (!any_lane(rFound[b] >= 0)) continue;
      const std::int32_t before = shuffle(rPlaces[b], find_first(rSame[b]));
      const std::int32_t place = before + popcount(rSame[b] & lanes_below());
      if (rFound[b] < 0) continue;
      if (place < kPositiveEntries) {
        args.gList[(first + rFound[b]) * kPositiveEntries + place] =
            static_cast<std::int32_t>(base + b * kThreads + thread_id());
      }
      if (place == kListedPositives) atomic_store(&args.gControl->large_identities, std::uint32_t{1});
    }
  }
}

}  // namespace

// ---- launch ---------------------------------------------------------------------------------------------------------

cudaError_t enqueue_positives(const ForwardArgs& args, const ForwardPlan& plan, char* workspace, cudaStream_t stream) {
  const std::int64_t anchors = plan.positive_anchors;
  const std::int64_t segments = plan.positive_segments;
  if (anchors < 1 || anchors > kMostPositiveAnchors || (anchors & (anchors - 1)) != 0 || segments < 1) {
    return cudaErrorInvalidValue;
  }
  int slot_bits = 0;
  while ((1 << slot_bits) < kSlotsEach * anchors) ++slot_bits;
  const PositivesArgs kernel_args{.forward = args,
                                  .group_anchors = static_cast<int>(anchors),
                                  .slot_bits = slot_bits,
                                  .segments = static_cast<std::uint32_t>(segments),
                                  .gLeader = piece<std::int32_t>(workspace, plan.positive_leader),
                                  .gCount = piece<std::int32_t>(workspace, plan.positive_count),
                                  .gList = piece<std::int32_t>(workspace, plan.positive_list),
                                  .gControl = piece<Control>(workspace, plan.control)};
  const LaunchShape shape{divide_up(args.anchors.rows, anchors) * segments, kThreads,
                          positives_bytes(static_cast<int>(anchors))};
  return launch(positives_kernel, shape, stream, kernel_args);
}

}  // namespace sn::cuda
