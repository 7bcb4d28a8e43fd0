// The search of the fallback by tiles: 64 queued rows against 64 candidates at a time, exact sums in the one order.
//
// Which candidates a tile sees. Where a row needs its support set, all of the segment; where rows only need near or
// far, those of their labels. The numbers of both are gathered into stacks (Waiting) of which full tiles are taken.
//
// * A candidate that equals the mean in every column (a null row, bound.cuh) is at distance 0 of every row that does,
//   too. Where all rows of the tile are null, those candidates are ranked without a sum: so a collapsed batch costs
//   its labels.
//
// * Partial sums never exceed the whole. Where all rows have a bound and D has several slices, the first slice alone is
//   summed, and a candidate stays if any row may still need it. What stays is gathered into full tiles again. If most
//   stay, this ends.
//
// * Once the K-th key of all rows is before (0, next index), no later candidate can come in.
//
// What is kept of each row: the K least keys of the segment, sorted, in the row's place of the buffer, which the same
// lanes of the same warp read and write; in shared memory a limit that keys must be below, near and far. The limit is
// the K-th key, or starts where the refinement (or another segment) left the row's bound, never below the K-th key of
// all candidates. So which candidates are dropped depends on the schedule, and the result does not.
#pragma once

#include <cstdint>

#include "cuda/direct/tile.cuh"
#include "cuda/fallback/order.cuh"
#include "cuda/fallback/slice_tree.cuh"
#include "cuda/keys.cuh"
#include "cuda/loss.cuh"
#include "cuda/memory.cuh"
#include "cuda/plan/sizes.h"
#include "cuda/ptx.cuh"
#include "cuda/screen/args.cuh"
#include "cuda/screen/bound.cuh"

namespace sn::cuda {

// ---- traits ---------------------------------------------------------------------------------------------------------

inline constexpr int kShortStage = 64;  // bytes of a row in a stage: every thread copies one pack of each side

// Keys up to this squared distance are below it, whatever their index.
__device__ __forceinline__ std::uint64_t key_limit(float bound) {
  return static_cast<std::uint64_t>(bits_of(bound)) << 32 | 0xffffffffu;
}
inline constexpr std::uint64_t kInfiniteKey = std::uint64_t{0x7f800000u} << 32;

// One key a lane, rising and then falling, or the other way round: sorted.
__device__ __forceinline__ std::uint64_t merge_lanes(std::uint64_t key) {
#pragma unroll
  for (int mask = kWarpSize / 2; mask > 0; mask /= 2) {
    const std::uint64_t other = shuffle_xor(key, mask);
    if (((lane_id() & mask) == 0) == (other < key)) key = other;
  }
  return key;
}

// Stacks of candidates that wait for a tile: of any, of null rows, of those that the first slice has left.
enum class Waiting : int { kAny, kNull, kKept };
// How many each has, in one register.
class WaitingCounts {
 public:
  static constexpr int kBits = 9;
  __device__ __forceinline__ int of(Waiting stack) const {
    return bits_ >> static_cast<int>(stack) * kBits & ((1 << kBits) - 1);
  }
  __device__ __forceinline__ void add(Waiting stack, int count) { bits_ += count << static_cast<int>(stack) * kBits; }
  __device__ __forceinline__ void clear() { bits_ = 0; }

 private:
  std::int32_t bits_ = 0;
};

// How tiles of one kind are shared out: pieces of work are numbered [tile][part].
struct TileShare {
  int first_tile;
  int parts;     // of a tile's candidates
  int segments;  // parts are of one or more, in whose first place the results go; the others are left empty
  int length;    // candidates of a segment
  int begin;     // of this block's pieces
  int end;
};

// ---- the search -----------------------------------------------------------------------------------------------------

template <class T>
class TileSearch {
 public:
  using TileT = Tile<T, kShortStage, false>;
  using A = Acc<T>;
  static constexpr int kThreads = TileT::kThreads;
  static constexpr int kWarps = kThreads / kWarpSize;
  static constexpr int kSide = TileT::kRows;
  static constexpr int kPairs = TileT::kPairs;
  static constexpr int kWarpRows = kSide / kWarps;
  static constexpr int kHalves = kSide / kWarpSize;
  static constexpr int kPitch = kSide + 8;  // of the tile's sums: four rows of eight columns have different banks
  static constexpr int kMostWaiting = kSide + kThreads;  // a tile less one, and a candidate of each thread
  static constexpr int kMostKept = 2 * kSide;
  static_assert(kMostWaiting < 1 << WaitingCounts::kBits);
  static constexpr int kHeads = 64;
  static constexpr int kTracked = kNeedNear | kNeedFar;
  static constexpr int kVotes = 2 * kWarps;
  static_assert(kHalves == 2 && kSide == 64, "masks of two words");
  static_assert(TileT::kStage / TileT::kFew == 16 / static_cast<int>(sizeof(T)), "trips, for .ci/cuda_instructions.py");
  static_assert(kSide * kPitch * sizeof(A) <= TileT::kElements * sizeof(T), "sums lie where stages were");
  static_assert(kFastNeighbours % kWarpSize == 0);

  // What all threads share and rarely need: sums leave no registers for it.
  enum Word : int {
    kNeeds,    // of all rows
    kNotNull,  // some row is no null row, or nobody knows of the candidates
    kKept,     // columns that stay, two words
    kKeptHigh,
    kStayed,  // of the candidates of which the first slice alone was summed: how many more than half
    kColumns,
    kSlices,  // of D that are summed
    kNarrow,  // the first slice alone is summed
    kKind,
    kQueued,
    kWork,
    kWorkEnd,
    kFirstTile,
    kParts,
    kAllSegments,
    kLength,
    kNext,
    kEnd,
    kSegment,
    kSegments,
    kWords
  };

  static constexpr int bytes(std::int64_t dims) {
    return shared_bytes<T>(TileT::kElements) + shared_bytes<A>(SliceTree<TileT>::elements(dims)) +
           QueueOrder<kThreads>::kBytes + 3 * shared_bytes<std::uint64_t>(kSide) + shared_bytes<std::int64_t>(kSide) +
           6 * shared_bytes<std::int32_t>(kSide) + shared_bytes<std::int32_t>(2 * kMostWaiting + kMostKept) +
           shared_bytes<std::uint32_t>(kHalves * kHeads) + shared_bytes<std::uint32_t>(kVotes) +
           shared_bytes<std::uint32_t>(kWords);
  }

  __device__ __forceinline__ TileSearch(SharedArena& arena, const RefineArgs& args, std::int64_t queued)
      : args_(args),
        sStages_(arena.take<T>(TileT::kElements)),
        order_(arena),
        sLimits_(arena.take<std::uint64_t>(kSide)),
        sNear_(arena.take<std::uint64_t>(kSide)),
        sFar_(arena.take<std::uint64_t>(kSide)),
        sLabels_(arena.take<std::int64_t>(kSide)),
        sEntries_(arena.take<std::int32_t>(kSide)),
        sAnchors_(arena.take<std::int32_t>(kSide)),
        sSelf_(arena.take<std::int32_t>(kSide)),
        sSlots_(arena.take<std::int32_t>(kSide)),
        sColumns_(arena.take<std::int32_t>(kSide)),
        sColumnSlots_(arena.take<std::int32_t>(kSide)),
        sWaiting_(arena.take<std::int32_t>(2 * kMostWaiting + kMostKept)),
        sHeads_(arena.take<std::uint32_t>(kHalves * kHeads)),
        sVotes_(arena.take<std::uint32_t>(kVotes)),
        sWords_(arena.take<std::uint32_t>(kWords)),
        sPlanes_(arena.take<A>(SliceTree<TileT>::elements(args.forward.dims))) {
    if (thread_id() == 0) {
      set_word(kQueued, queued);
      set_word(kKind, 0);
    }
    order_.count(args, queued);
  }

  // 0: tiles with a row that needs its support set, 1: others, 2: all is done. run() goes on to the next.
  __device__ __forceinline__ int kind() const { return word(kKind); }
  __device__ __forceinline__ int queued() const { return word(kQueued); }

  // Rows that need their support set have the first ranks.
  __device__ __forceinline__ int support_rows() const { return order_.support_rows(); }

  // The whole block, all of its pieces of a kind.
  __device__ __forceinline__ void run(const TileShare& share) {
    sync_block();  // the words have been read
    if (thread_id() == 0) {
      set_word(kFirstTile, share.first_tile);
      set_word(kParts, share.parts);
      set_word(kAllSegments, share.segments);
      set_word(kLength, share.length);
      set_word(kWork, share.begin);
      set_word(kWorkEnd, share.end);
    }
    sync_block();
#pragma unroll 1
    while (word(kWork) < word(kWorkEnd)) {
      begin();
      search();
      finish();
    }
    if (thread_id() == 0) set_word(kKind, word(kKind) + 1);
    sync_block();
  }

 private:
  // ---- rows ---------------------------------------------------------------------------------------------------------

  __device__ __forceinline__ int word(Word name) const { return static_cast<int>(sWords_.get(name)); }
  __device__ __forceinline__ void set_word(Word name, int value) const {
    sWords_.set(name, static_cast<std::uint32_t>(value));
  }

  // The row's list of the work's first segment.
  __device__ __forceinline__ std::uint64_t* list_of(int row) const {
    return args_.gBuffer + static_cast<std::int64_t>(sEntries_.get(row) >> kNeedBits) * args_.capacity +
           word(kSegment) * segment_places(args_.K);
  }

  __device__ __forceinline__ void begin() {
    const ForwardArgs& forward = args_.forward;
    const int work = word(kWork);
    const int first_rank = (word(kFirstTile) + work / word(kParts)) * kSide;
    const int last_rank = first_rank + kSide < word(kQueued) ? first_rank + kSide : word(kQueued);
    order_.take(args_, word(kQueued), first_rank, last_rank, sEntries_);
    const int row = thread_id();
    const bool valid = row < last_rank - first_rank;
    if (row < kHalves * kHeads) sHeads_.set(row, 0u);
    if (row == 0) {
      const int part = work % word(kParts);
      const int segment = part * word(kAllSegments) / word(kParts);
      const int next = (part + 1) * word(kAllSegments) / word(kParts);
      const std::int64_t M = forward.candidates.rows;
      const auto place = [&](int of) {
        const std::int64_t candidate = static_cast<std::int64_t>(of) * word(kLength);
        return static_cast<int>(candidate < M ? candidate : M);
      };
      set_word(kNeeds, 0);
      set_word(kNotNull, args_.bank ? atomic_load(&args_.gControl->unscreenable) : 0);
      set_word(kStayed, forward.dims > kLargestSlice ? 0 : 1);
      set_word(kNext, place(segment));
      set_word(kEnd, place(next));
      set_word(kSegment, segment);
      set_word(kSegments, next - segment);
    }
    bool is_null_row = true;
    if (row < kSide) {
      if (!valid) sEntries_.set(row, 0);
      const std::int32_t entry = valid ? sEntries_.get(row) : 0;
      const std::int64_t anchor = args_.row_begin + (entry >> kNeedBits);
      sAnchors_.set(row, valid ? static_cast<std::int32_t>(anchor) : -1);
      sSelf_.set(row, static_cast<std::int32_t>(self_of(forward, anchor)));
      sLabels_.set(row, load(forward.anchor_labels + anchor));
      sLimits_.set(row, valid && (entry & kNeedSupport) != 0 ? key_limit(bound_of(anchor)) : 0u);
      sNear_.set(row, kNoKey);
      sFar_.set(row, kNoKey);
      is_null_row = !valid || is_null(load(args_.gAnchorN + anchor), load(args_.gAnchorRho + anchor));
    }
    sync_block();
    if (row < kSide) sWords_.atomic_or(kNeeds, static_cast<std::uint32_t>(sEntries_.get(row) & kNeedAll));
    if (!is_null_row) sWords_.atomic_or(kNotNull, 1u);
    // Rows that track positives have a slot, the first of them with that label.
    int slot = -1;
    if (row < kSide && (sEntries_.get(row) & kTracked) != 0) {
      const std::int64_t label = sLabels_.get(row);
      slot = 0;
      while (sLabels_.get(slot) != label || (sEntries_.get(slot) & kTracked) == 0) ++slot;
      if (slot == row) sHeads_.atomic_or(head_of(label) * kHalves + slot / kWarpSize, 1u << slot % kWarpSize);
    }
    if (row < kSide) sSlots_.set(row, slot);
    sync_block();
    // Empty lists, by the lanes that will fill them.
#pragma unroll 1
    for (int i = 0; i < kWarpRows; ++i) {
      const int mine = warp_id() * kWarpRows + i;
      if ((sEntries_.get(mine) & kNeedSupport) == 0) continue;
      std::uint64_t* gList = list_of(mine);
#pragma unroll 1
      for (int e = lane_id(); e < args_.K; e += kWarpSize) gList[e] = kNoKey;
    }
    waiting_.clear();
  }

  // No member of the row's support set has a larger squared distance.
  __device__ __forceinline__ float bound_of(std::int64_t anchor) const {
    return float_from_bits(atomic_load(reinterpret_cast<const std::uint32_t*>(args_.thresholds.T + anchor)));
  }

  __device__ __forceinline__ static int head_of(std::int64_t label) {
    return static_cast<int>(label_hash(label) % kHeads);
  }
  // The slot of the rows that track this label, -1 for none.
  __device__ __forceinline__ int slot_of(std::int64_t label) const {
    const int head = head_of(label) * kHalves;
#pragma unroll
    for (int half = 0; half < kHalves; ++half) {
      for (std::uint32_t mask = sHeads_.get(head + half); mask != 0; mask &= mask - 1) {
        const int slot = half * kWarpSize + find_first(mask);
        if (sLabels_.get(slot) == label) return slot;
      }
    }
    return -1;
  }

  // Whether some (every) limit of a row that needs its support set is such. All warps ask together.
  template <class Test>
  __device__ __forceinline__ bool any_limit(const Test& test) const {
    bool any = false;
#pragma unroll
    for (int half = 0; half < kHalves; ++half) {
      const int row = half * kWarpSize + lane_id();
      any = any || ((sEntries_.get(row) & kNeedSupport) != 0 && test(sLimits_.get(row)));
    }
    return any_lane(any);
  }

  // ---- candidates ---------------------------------------------------------------------------------------------------

  __device__ __forceinline__ void search() {
    while (true) {
      sync_block();  // stacks, limits and words are written
      const std::int32_t next = word(kNext);
      const std::int32_t end = word(kEnd);
      const int any = waiting_.of(Waiting::kAny);
      const int null = waiting_.of(Waiting::kNull);
      const int kept = waiting_.of(Waiting::kKept);
      if (any < kSide && null < kSide && kept < kSide && next < end) {
        const auto place = static_cast<std::uint64_t>(next);
        const bool open = any_limit([&](std::uint64_t limit) { return limit >= place; });
        const bool some = open || (word(kNeeds) & kTracked) != 0;
        if (some) collect(next + thread_id(), end, open);
        sync_block();  // all have read where it begins
        if (thread_id() == 0) set_word(kNext, some && end - next > kThreads ? next + kThreads : end);
        continue;
      }
      // Full tiles first; what is left at the end in the order in which one stack fills another.
      const int least = next >= end ? 1 : kSide;
      Waiting stack = Waiting::kKept;
      if (null >= least) {
        stack = Waiting::kNull;
      } else if (kept < kSide && any >= least) {
        stack = Waiting::kAny;
      } else if (kept < least) {
        break;
      }
      take(stack);
      // Without a row that needs its support set no candidate could be dropped.
      const bool narrow = stack == Waiting::kAny && word(kStayed) <= 0 && (word(kNeeds) & kNeedSupport) != 0 &&
                          !any_limit([](std::uint64_t limit) { return limit >= kInfiniteKey; });
      if (thread_id() == 0) {
        const int all = static_cast<int>(tile_slices(args_.forward.dims));
        set_word(kNarrow, narrow ? 1 : 0);
        set_word(kSlices, stack == Waiting::kNull ? 0 : narrow ? 1 : all);
      }
      sync_block();
      look();
      if (word(kNarrow) != 0) keep();
    }
  }

  // A candidate of each thread, where it is wanted, onto the stacks.
  __device__ __forceinline__ void collect(std::int32_t candidate, std::int32_t end, bool open) {
    bool wanted = candidate < end;
    if (wanted && !open) wanted = slot_of(load(args_.forward.candidate_labels + candidate)) >= 0;
    const bool null = wanted && word(kNotNull) == 0 &&
                      is_null(load(args_.gCandidateN + candidate), load(args_.gCandidateRho + candidate));
    const std::uint32_t votes = ballot(wanted && !null);
    const std::uint32_t null_votes = ballot(null);
    if (lane_id() == 0) {
      sVotes_.set(warp_id(), static_cast<std::uint32_t>(popcount(votes)));
      sVotes_.set(kWarps + warp_id(), static_cast<std::uint32_t>(popcount(null_votes)));
    }
    sync_block();
    int place = popcount((null ? null_votes : votes) & lanes_below());
    int total = 0;
    int null_total = 0;
#pragma unroll
    for (int warp = 0; warp < kWarps; ++warp) {
      const int count = static_cast<int>(sVotes_.get(warp));
      const int null_count = static_cast<int>(sVotes_.get(kWarps + warp));
      if (warp < warp_id()) place += null ? null_count : count;
      total += count;
      null_total += null_count;
    }
    if (wanted) put(null ? Waiting::kNull : Waiting::kAny, place, candidate);
    waiting_.add(Waiting::kNull, null_total);
    waiting_.add(Waiting::kAny, total);
  }

  __device__ __forceinline__ Shared<std::int32_t> stack_of(Waiting stack) const {
    return sWaiting_.offset(static_cast<int>(stack) * kMostWaiting);
  }
  __device__ __forceinline__ void put(Waiting stack, int place, std::int32_t candidate) const {
    stack_of(stack).set(waiting_.of(stack) + place, candidate);
  }

  // Up to a tile of candidates becomes its columns; limits follow the other segments. Ends with a barrier.
  __device__ __forceinline__ void take(Waiting stack) {
    const int waiting = waiting_.of(stack);
    const int count = waiting < kSide ? waiting : kSide;
    const int column = thread_id();
    if (column < kSide) {
      const std::int32_t candidate = column < count ? stack_of(stack).get(waiting - count + column) : -1;
      sColumns_.set(column, candidate);
      if ((word(kNeeds) & kTracked) != 0) {
        sColumnSlots_.set(column, candidate < 0 ? -1 : slot_of(load(args_.forward.candidate_labels + candidate)));
      }
      if ((sEntries_.get(column) & kNeedSupport) != 0) {
        const std::uint64_t limit = key_limit(bound_of(sAnchors_.get(column)));
        if (limit < sLimits_.get(column)) sLimits_.set(column, limit);
      }
    }
    if (thread_id() == 0) {
      set_word(kKept, 0);
      set_word(kKeptHigh, 0);
      set_word(kColumns, count);
    }
    waiting_.add(stack, -count);
    sync_block();
  }

  // The columns that some row may need after the first slice wait again. Ends without a barrier.
  __device__ __forceinline__ void keep() {
    sync_block();  // all warps have voted
    const std::uint32_t masks[kHalves] = {sWords_.get(kKept), sWords_.get(kKeptHigh)};
    const int low = popcount(masks[0]);
    const int stay = low + popcount(masks[1]);
    const int column = thread_id();
    if (column < kSide) {
      const std::uint32_t mask = column < kWarpSize ? masks[0] : masks[1];
      if ((mask >> column % kWarpSize & 1u) != 0) {
        put(Waiting::kKept, (column < kWarpSize ? 0 : low) + popcount(mask & lanes_below()), sColumns_.get(column));
      }
    }
    waiting_.add(Waiting::kKept, stay);
    if (thread_id() == 0) set_word(kStayed, word(kStayed) + 2 * stay - word(kColumns));
  }

  // ---- sums ---------------------------------------------------------------------------------------------------------

  // The sums over the first slices of D (none: 0), then each warp looks at its rows.
  __device__ __forceinline__ void look() {
    const ForwardArgs& forward = args_.forward;
    {
      const TileT tile(sStages_);
      const SliceTree<TileT> tree(sPlanes_);
      const GatheredRows<T> x{static_cast<const T*>(forward.anchors.data), forward.anchors.row_stride, sAnchors_};
      const GatheredRows<T> z{static_cast<const T*>(forward.candidates.data), forward.candidates.row_stride, sColumns_};
      A rSums[kPairs][kPairs];
#pragma unroll
      for (int i = 0; i < kPairs; ++i) {
#pragma unroll
        for (int j = 0; j < kPairs; ++j) rSums[i][j] = A(0);
      }
#pragma unroll 1
      for (int slice = 0; slice < word(kSlices); ++slice) {
        const std::int64_t first = slice * kLargestSlice;
        const std::int64_t end = first + kLargestSlice < forward.dims ? first + kLargestSlice : forward.dims;
        tile.sums(x, z, first, end, args_.aligned, rSums);
        tree.close(slice, slice + 1 == word(kSlices), rSums);
      }
      const Shared<A> sSums = sStages_.template view<A>();
#pragma unroll
      for (int i = 0; i < kPairs; ++i) {
#pragma unroll
        for (int j = 0; j < kPairs; ++j) {
          sSums.set(TileT::row_of(i) * kPitch + TileT::column_of(j), no_nan(rSums[i][j]));
        }
      }
      if (thread_id() == 0) atomic_add(&args_.gControl->slices_summed, sWords_.get(kSlices));
    }
    sync_block();
#pragma unroll 1
    for (int i = 0; i < kWarpRows; ++i) look_at_row(warp_id() * kWarpRows + i, word(kNarrow) != 0);
  }

  // ---- selection ----------------------------------------------------------------------------------------------------

  // One warp, one row of the tile: which of the columns it needs.
  __device__ __forceinline__ void look_at_row(int row, bool narrow) {
    const std::int32_t entry = sEntries_.get(row);
    if ((entry & kNeedAll) == 0) return;
    const std::int32_t self = sSelf_.get(row);
    const std::int32_t slot = sSlots_.get(row);
    const Shared<A> sSums = sStages_.template view<A>();
#pragma unroll 1
    for (int half = 0; half < kHalves; ++half) {
      const int column = half * kWarpSize + lane_id();
      const std::int32_t candidate = sColumns_.get(column);
      const bool present = candidate >= 0 && candidate != self;
      const std::uint64_t key = present ? pack_key(sSums.get(row * kPitch + column), candidate) : kNoKey;
      const bool better = (entry & kNeedSupport) != 0 && key < sLimits_.get(row);
      const bool positive = present && slot >= 0 && sColumnSlots_.get(column) == slot;
      if (narrow) {
        const std::uint32_t votes = ballot(better || positive);
        if (lane_id() == 0 && votes != 0) sWords_.atomic_or(kKept + half, votes);
        continue;
      }
      if (any_lane(positive)) {
        const std::uint64_t near = least_key(positive ? key : kNoKey);
        const std::uint64_t far = least_key(positive ? far_key(d2_of(key), candidate) : kNoKey);
        if (lane_id() == 0) {
          if (near < sNear_.get(row)) sNear_.set(row, near);
          if (far < sFar_.get(row)) sFar_.set(row, far);
        }
      }
      if (any_lane(better)) insert(row, better ? key : kNoKey);
    }
  }

  // One key a lane joins the row's K least ones, 32 of them at a time: the lesser half stays, the other goes on.
  __device__ __forceinline__ void insert(int row, std::uint64_t key) {
    std::uint64_t* gList = list_of(row);
    const int K = static_cast<int>(args_.K);
    std::uint64_t rest = sort_lanes(key);
#pragma unroll 1
    for (int first = 0; first < K; first += kWarpSize) {
      const int e = first + lane_id();
      const std::uint64_t known = e < K ? gList[e] : kNoKey;
      const std::uint64_t other = shuffle(rest, kWarpSize - 1 - lane_id());
      const std::uint64_t least = merge_lanes(known < other ? known : other);
      if (e < K) gList[e] = least;
      rest = merge_lanes(known < other ? other : known);
      if (first + kWarpSize >= K) {
        const std::uint64_t last = shuffle(least, (K - 1) % kWarpSize);
        sync_warp();  // all lanes have read the limit
        if (lane_id() == 0 && last < sLimits_.get(row)) {
          sLimits_.set(row, last);
          atomic_min(reinterpret_cast<std::uint32_t*>(args_.thresholds.T + sAnchors_.get(row)), bits_of(d2_of(last)));
        }
        sync_warp();
      } else if (!any_lane(rest != kNoKey)) {
        break;
      }
    }
  }

  // ---- results ------------------------------------------------------------------------------------------------------

  __device__ __forceinline__ void finish() {
    const int row = thread_id();
    if (row < kSide) {
      const std::int32_t entry = sEntries_.get(row);
#pragma unroll 1
      for (int s = 0; s < word(kSegments); ++s) {
        std::uint64_t* gList = list_of(row) + s * segment_places(args_.K);
        if ((entry & kNeedNear) != 0) gList[near_place(args_.K)] = s == 0 ? sNear_.get(row) : kNoKey;
        if ((entry & kNeedFar) != 0) gList[far_place(args_.K)] = s == 0 ? sFar_.get(row) : kNoKey;
      }
    }
    if (thread_id() == 0) set_word(kWork, word(kWork) + 1);
    sync_block();  // the tile has been read
  }

  const RefineArgs& args_;
  Shared<T> sStages_;
  QueueOrder<kThreads> order_;
  // Of the rows of the tile.
  Shared<std::uint64_t> sLimits_;
  Shared<std::uint64_t> sNear_;
  Shared<std::uint64_t> sFar_;  // far_keys
  Shared<std::int64_t> sLabels_;
  Shared<std::int32_t> sEntries_;  // of the queue, 0: no row
  Shared<std::int32_t> sAnchors_;  // -1: no row
  Shared<std::int32_t> sSelf_;
  Shared<std::int32_t> sSlots_;
  // Of the candidates of the tile.
  Shared<std::int32_t> sColumns_;
  Shared<std::int32_t> sColumnSlots_;
  Shared<std::int32_t> sWaiting_;  // [Waiting][kMostWaiting]
  WaitingCounts waiting_;
  Shared<std::uint32_t> sHeads_;  // [kHeads][kHalves] slots by the hash of their label
  Shared<std::uint32_t> sVotes_;  // [waiting, null][kWarps]
  Shared<std::uint32_t> sWords_;  // [kWords]
  Shared<A> sPlanes_;             // of SliceTree
};

}  // namespace sn::cuda
