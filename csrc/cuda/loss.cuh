// From one anchor's selection to its outputs, and from the records of all anchors to the loss.
//
// API (A = float or double, Key<A>: keys.cuh)
//   finish_anchor<A>(args, anchor, K, found, keys, near, far)      one warp
//     keys: Shared<Key<A>> or Key<A>*, the anchor's support set: `found` <= K keys of make_key, in order, written
//     before a barrier that covers the warp; they are marked here. near, far: the same in all lanes, index -1 for none.
//     Writes every output of the anchor and returns its record, in all lanes.
//   finish_few<A>(args, anchor, K, found, keys, near, far)         the same bits, K <= kShortNeighbours
//     The keys are marked already. A lane has one edge at most, so what it knows of that stays in registers.
//   final_reduction<A>(args, records, poison, memory)              one block, after all records
//     records: an accessor like GlobalRecords. The bits are the same for any number of threads.
//   sum_partial(records, N, partial, stage, memory, partials), then join_partials<A>(args, partials, memory)
//     The same shared out: a block a partial, after all records of it, then the block that finishes last. Blocks of 256
//     threads. poison_outputs<A>(args, share, shares) instead, where an input value was not finite.
#pragma once

#include <cstddef>
#include <cstdint>

#include "cuda/keys.cuh"
#include "cuda/memory.cuh"
#include "cuda/plan/plan_types.h"
#include "cuda/plan/sizes.h"
#include "cuda/ptx.cuh"
#include "sn_math.h"
#include "sn_types.h"

namespace sn::cuda {

// The candidate that anchor i is itself, -1 for none; entries of an index that are no candidate mean none.
__device__ __forceinline__ std::int64_t self_of(const ForwardArgs& args, std::int64_t anchor) {
  std::int64_t self = -1;
  if (args.self.index != nullptr) {
    self = load(args.self.index + anchor);
  } else if (args.self.offset >= 0) {
    self = args.self.offset + anchor;
  }
  return self >= 0 && self < args.candidates.rows ? self : -1;
}

// ---- one anchor -----------------------------------------------------------------------------------------------------

// Group of sn_math.h. Sums meet in a butterfly: all lanes get the same bits.
template <bool kOne>
struct WarpGroup {
  static constexpr bool kOneEdge = kOne;
  __device__ __forceinline__ std::int64_t rank() const { return lane_id(); }
  __device__ __forceinline__ std::int64_t size() const { return kWarpSize; }
  __device__ __forceinline__ double sum(double value) const {
#pragma unroll
    for (int mask = kWarpSize / 2; mask > 0; mask /= 2) value = add(value, shuffle_xor(value, mask));
    return value;
  }
  __device__ __forceinline__ std::int64_t sum(std::int64_t value) const {
    return reduce_add(static_cast<std::uint32_t>(value));
  }
  __device__ __forceinline__ std::int64_t least(std::int64_t value) const {
    return reduce_min(static_cast<std::uint32_t>(value));
  }
  __device__ __forceinline__ std::int64_t greatest(std::int64_t value) const {
    return reduce_max(static_cast<std::uint32_t>(value));
  }
  __device__ __forceinline__ bool any(bool vote) const { return any_lane(vote); }
  template <class Compute>
  __device__ __forceinline__ double of(double own, std::int64_t e, const Compute& compute) const {
    if constexpr (kOne) return shuffle(own, static_cast<int>(e));
    return compute();
  }
};

// Support of sn_math.h over a list of keys that carry their marks.
template <class A, class Keys>
struct KeyedSupport {
  Keys keys;
  std::int64_t found;
  __device__ __forceinline__ std::int32_t index(std::int64_t e) const {
    return e < found ? index_of(key_at(keys, e)) : -1;
  }
  __device__ __forceinline__ A d2(std::int64_t e) const { return d2_of(key_at(keys, e)); }
  __device__ __forceinline__ bool positive(std::int64_t e) const { return positive_of(key_at(keys, e)); }
};
// The same where lane e has edge e.
template <class A>
struct LaneSupport {
  Shared<Key<A>> sKeys;
  std::int64_t found;
  Key<A> own;
  __device__ __forceinline__ Key<A> key(std::int64_t e) const {
    return e == lane_id() ? own : sKeys.get(static_cast<int>(e));
  }
  __device__ __forceinline__ std::int32_t index(std::int64_t e) const { return e < found ? index_of(key(e)) : -1; }
  __device__ __forceinline__ A d2(std::int64_t e) const { return d2_of(key(e)); }
  __device__ __forceinline__ bool positive(std::int64_t e) const { return positive_of(key(e)); }
};

// Where the edges of an anchor go.
template <class A>
struct EdgesOut {
  std::int32_t* gIndices;
  A* gCoefficients;
  A* gSquared;  // or null
  __device__ __forceinline__ EdgesOut(const ForwardArgs& args, std::int64_t anchor, std::int64_t K)
      : gIndices(args.indices + anchor * (K + kExtraEdges)),
        gCoefficients(static_cast<A*>(args.coefficients) + anchor * (K + kExtraEdges)),
        gSquared(args.squared == nullptr ? nullptr : static_cast<A*>(args.squared) + anchor * (K + kExtraEdges)) {}
};

// Behind the indices and squared distances of the support set.
template <class A, class Group, class Support>
__device__ __forceinline__ AnchorRecord finish_edges(const ForwardArgs& args, std::int64_t anchor, std::int64_t K,
                                                     const Group& group, const Support& support, const EdgesOut<A>& out,
                                                     Positive<A> near, Positive<A> far) {
  const AnchorTerms terms =
      anchor_terms<A>(group, args.options, K, support, near, far, out.gIndices + K, out.gCoefficients);
  if (out.gSquared != nullptr) {  // the lanes that own the last two edges have written their indices
    if (K % kWarpSize == lane_id()) out.gSquared[K] = out.gIndices[K] >= 0 ? near.d2 : infinity<A>();
    if ((K + 1) % kWarpSize == lane_id()) out.gSquared[K + 1] = out.gIndices[K + 1] >= 0 ? far.d2 : infinity<A>();
  }
  if (lane_id() == 0) {
    args.nearest_positive[anchor] = near.index;
    args.farthest_positive[anchor] = far.index;
    if (args.options.reduction == Reduction::kNone) static_cast<A*>(args.loss)[anchor] = static_cast<A>(terms.loss);
  }
  return {.loss = terms.loss,
          .positive_sum = terms.positive_sum,
          .negative_sum = terms.negative_sum,
          .positives = static_cast<std::int32_t>(terms.positives),
          .negatives = static_cast<std::int32_t>(terms.negatives),
          .support_positives = static_cast<std::int32_t>(terms.support_positives),
          .flags = static_cast<std::int32_t>(terms.valid | terms.nearest_is_positive << 1)};
}

template <class A, class Keys>
__device__ AnchorRecord finish_anchor(const ForwardArgs& args, std::int64_t anchor, std::int64_t K, std::int64_t found,
                                      Keys keys, Positive<A> near, Positive<A> far) {
  const EdgesOut<A> out(args, anchor, K);
  const std::int64_t label = load(args.anchor_labels + anchor);
  for (std::int64_t e = lane_id(); e < K; e += kWarpSize) {
    std::int32_t index = -1;
    A d2 = infinity<A>();
    if (e < found) {
      const auto key = key_at(keys, e);
      index = index_of(key);
      d2 = d2_of(key);
      if (load(args.candidate_labels + index) == label) set_key(keys, e, mark_positive(key));
    }
    out.gIndices[e] = index;
    if (out.gSquared != nullptr) out.gSquared[e] = d2;
  }
  sync_warp();
  return finish_edges(args, anchor, K, WarpGroup<false>(), KeyedSupport<A, Keys>{keys, found}, out, near, far);
}

template <class A>
__device__ AnchorRecord finish_few(const ForwardArgs& args, std::int64_t anchor, std::int64_t K, std::int64_t found,
                                   const Shared<Key<A>>& sKeys, Positive<A> near, Positive<A> far) {
  static_assert(kShortNeighbours + kExtraEdges <= kWarpSize);
  const EdgesOut<A> out(args, anchor, K);
  const LaneSupport<A> support{sKeys, found, lane_id() < found ? sKeys.get(lane_id()) : last_key<Key<A>>()};
  if (lane_id() < K) {
    const std::int32_t index = support.index(lane_id());
    out.gIndices[lane_id()] = index;
    if (out.gSquared != nullptr) out.gSquared[lane_id()] = index >= 0 ? d2_of(support.own) : infinity<A>();
  }
  return finish_edges(args, anchor, K, WarpGroup<true>(), support, out, near, far);
}

// ---- all anchors ----------------------------------------------------------------------------------------------------

// The order of the sums is plan_types.h's: partial p adds the records p, p + kPartials, ... in order, then the partials
// meet in a tree. One block does it alone (final_reduction), or each partial has a block (sum_partial) and the one that
// finishes last joins them (join_partials): the bits are the same. Counts are added by warp, then the warps'. (Not by
// atomics: shared memory has none of 64 bits, and the loop that stands in for one took 20 us of a call on an H200.)
struct ReductionMemory {
  static constexpr int kSums = PartialRecord::kSums;
  static constexpr int kCounts = PartialRecord::kCounts;
  static constexpr int kWarps = kMaxThreads / kWarpSize;
  static constexpr int kBytes = shared_bytes<double>(kSums * kPartials) + shared_bytes<std::uint64_t>(kCounts * kWarps);
  static_assert(kCounts <= kWarpSize, "a thread of the first warp adds up each count");
  Shared<double> sSums;           // [kSums][kPartials]
  Shared<std::uint64_t> sCounts;  // [kCounts][kWarps]
  __device__ __forceinline__ explicit ReductionMemory(SharedArena& arena)
      : sSums(arena.take<double>(kSums * kPartials)), sCounts(arena.take<std::uint64_t>(kCounts * kWarps)) {}
};

// Records that other blocks of this launch may have written.
struct GlobalRecords {
  const AnchorRecord* gRecords;
  __device__ __forceinline__ AnchorRecord get(std::int64_t i) const {
    const AnchorRecord* record = gRecords + i;
    return {.loss = atomic_load(&record->loss),
            .positive_sum = atomic_load(&record->positive_sum),
            .negative_sum = atomic_load(&record->negative_sum),
            .positives = atomic_load(&record->positives),
            .negatives = atomic_load(&record->negatives),
            .support_positives = atomic_load(&record->support_positives),
            .flags = atomic_load(&record->flags)};
  }
};

// An input value was not finite: no selection is meaningful, and nothing finite may come out. Of `shares` blocks that
// call it, each does its share.
template <class A>
__device__ void poison_outputs(const ForwardArgs& args, std::int64_t share = 0, std::int64_t shares = 1) {
  const std::int64_t N = args.anchors.rows;
  const std::int64_t M = args.candidates.rows;
  const std::int64_t K = args.options.k < M ? args.options.k : M;
  const A nan = quiet_nan<A>();
  const std::int64_t first = share * thread_count() + thread_id();
  const std::int64_t step = shares * thread_count();
  for (std::int64_t i = first; i < N * (K + kExtraEdges); i += step) {
    args.indices[i] = -1;
    static_cast<A*>(args.coefficients)[i] = A(0);
    if (args.squared != nullptr) static_cast<A*>(args.squared)[i] = nan;
  }
  for (std::int64_t i = first; i < N; i += step) {
    args.nearest_positive[i] = -1;
    args.farthest_positive[i] = -1;
  }
  const std::int64_t losses = args.options.reduction == Reduction::kNone ? N : 1;
  for (std::int64_t i = first; i < losses; i += step) static_cast<A*>(args.loss)[i] = nan;
  for (std::int64_t i = first; i < kStatsSize; i += step) args.stats[i] = quiet_nan<double>();
}

// A count of all lanes. Of 32 bits where no more can come together: one instruction.
__device__ __forceinline__ std::uint32_t count_lanes(std::uint32_t count) {
  return reduce_add(count);
}
__device__ __forceinline__ std::uint64_t count_lanes(std::uint64_t count) {
#pragma unroll
  for (int mask = kWarpSize / 2; mask > 0; mask /= 2) count += shuffle_xor(count, mask);
  return count;
}

// Adds up the counts of all threads, into the first place of each.
template <class Count>
__device__ __forceinline__ void meet_counts(const Count (&rCounts)[ReductionMemory::kCounts],
                                            const ReductionMemory& memory) {
#pragma unroll
  for (int i = 0; i < ReductionMemory::kCounts; ++i) {
    const Count count = count_lanes(rCounts[i]);
    if (lane_id() == 0) memory.sCounts.set(i * ReductionMemory::kWarps + warp_id(), count);
  }
  sync_block();
  if (thread_id() < ReductionMemory::kCounts) {
    const Shared<std::uint64_t> sMine = memory.sCounts.offset(thread_id() * ReductionMemory::kWarps);
    std::uint64_t count = 0;
#pragma unroll 4
    for (int warp = 0; warp < thread_count() / kWarpSize; ++warp) count += sMine.get(warp);
    sMine.set(0, count);
  }
}

// The loss and the statistics, from the partials in `memory` and each thread's counts. A warp takes a sum: the tree
// over its partials needs no barrier. Then a thread takes a statistic.
template <class A, class Count>
__device__ __forceinline__ void join_sums(const ForwardArgs& args, const Count (&rCounts)[ReductionMemory::kCounts],
                                          const ReductionMemory& memory) {
  constexpr int kEach = kPartials / kWarpSize;
  meet_counts(rCounts, memory);  // behind its barrier partials are there, too
#pragma unroll 1
  for (int sum = warp_id(); sum < ReductionMemory::kSums; sum += thread_count() / kWarpSize) {
    double rParts[kEach];
#pragma unroll
    for (int i = 0; i < kEach; ++i) rParts[i] = memory.sSums.get(sum * kPartials + i * kWarpSize + lane_id());
#pragma unroll
    for (int half = kEach / 2; half > 0; half /= 2) {
#pragma unroll
      for (int i = 0; i < half; ++i) rParts[i] = add(rParts[i], rParts[i + half]);
    }
#pragma unroll
    for (int half = kWarpSize / 2; half > 0; half /= 2) rParts[0] = add(rParts[0], shuffle_xor(rParts[0], half));
    if (lane_id() == 0) memory.sSums.set(sum * kPartials, rParts[0]);
  }
  sync_block();

  const int entry = thread_id();
  static_assert(kValidAnchors == 0 && kPositiveDistance == 1 && kNegativeDistance == 2 && kNearestIsPositive == 3 &&
                kSupportPositives == 4 && kPoison == 5 && ReductionMemory::kSums == 3);
  if (entry > kSupportPositives) return;
  const auto count = [&](int which) {
    return static_cast<double>(memory.sCounts.get(which * ReductionMemory::kWarps));
  };
  const double valid = count(3);
  const double sum = entry < ReductionMemory::kSums ? memory.sSums.get(entry * kPartials)
                     : entry == kNearestIsPositive  ? count(4)
                                                    : count(2);
  const double of = entry == kPositiveDistance ? count(0) : entry == kNegativeDistance ? count(1) : valid;
  const double ratio = of > 0.0 ? sum / of : 0.0;
  if (entry != kValidAnchors) {
    args.stats[entry] = ratio;
    return;
  }
  if (args.options.reduction == Reduction::kMean) *static_cast<A*>(args.loss) = static_cast<A>(ratio);
  if (args.options.reduction == Reduction::kSum) *static_cast<A*>(args.loss) = static_cast<A>(sum);
  args.stats[kValidAnchors] = valid;
  args.stats[kPoison] = 0.0;
}

// Count: holds what all records have together.
template <class A, class Count = std::uint64_t, class Records>
__device__ void final_reduction(const ForwardArgs& args, const Records& records, bool poison,
                                const ReductionMemory& memory) {
  if (poison) return poison_outputs<A>(args);
  const std::int64_t N = args.anchors.rows;
  Count rCounts[ReductionMemory::kCounts] = {};
  for (int partial = thread_id(); partial < kPartials; partial += thread_count()) {
    double rSums[ReductionMemory::kSums] = {};
#pragma unroll 4
    for (std::int64_t i = partial; i < N; i += kPartials) {
      const AnchorRecord record = records.get(i);
      rSums[0] = add(rSums[0], record.loss);
      rSums[1] = add(rSums[1], record.positive_sum);
      rSums[2] = add(rSums[2], record.negative_sum);
      rCounts[0] += static_cast<Count>(record.positives);
      rCounts[1] += static_cast<Count>(record.negatives);
      rCounts[2] += static_cast<Count>(record.support_positives);
      rCounts[3] += static_cast<Count>(record.flags & 1);
      rCounts[4] += static_cast<Count>(record.flags >> 1 & 1);
    }
    for (int sum = 0; sum < ReductionMemory::kSums; ++sum) memory.sSums.set(sum * kPartials + partial, rSums[sum]);
  }
  join_sums<A>(args, rCounts, memory);
}

// ---- all anchors, a block a partial ---------------------------------------------------------------------------------

// A block brings the records of its partial to shared memory, so many at a time, all under way at once: 8 bytes a
// thread and load, since neighbouring records of a partial lie kPartials apart. Then one thread a sum adds them in
// order while the other warps count.
struct PartialMemory {
  static constexpr int kThreads = 256;
  static constexpr int kRecords = 256;
  static constexpr int kWords = sizeof(AnchorRecord) / sizeof(std::uint64_t);
  static constexpr int kEach = kRecords * kWords / kThreads;
  static constexpr int kBytes = shared_bytes<std::uint64_t>(kRecords * kWords);
  static_assert(kRecords * kWords % kThreads == 0 && sizeof(AnchorRecord) % sizeof(std::uint64_t) == 0);
  static_assert(offsetof(AnchorRecord, loss) == 0 && offsetof(AnchorRecord, positive_sum) == 8 &&
                offsetof(AnchorRecord, negative_sum) == 16 && offsetof(AnchorRecord, positives) == 24 &&
                offsetof(AnchorRecord, negatives) == 28 && offsetof(AnchorRecord, support_positives) == 32 &&
                offsetof(AnchorRecord, flags) == 36);
  Shared<std::uint64_t> sWords;  // [kRecords][kWords]
  __device__ __forceinline__ explicit PartialMemory(SharedArena& arena)
      : sWords(arena.take<std::uint64_t>(kRecords * kWords)) {}
};

// The whole block calls it; its own records are written before a barrier, all others in earlier launches.
__device__ __forceinline__ void sum_partial(const AnchorRecord* gRecords, std::int64_t N, int partial,
                                            const PartialMemory& stage, const ReductionMemory& memory,
                                            PartialRecord* gPartials) {
  constexpr int kWords = PartialMemory::kWords;
  const auto* gWords = reinterpret_cast<const std::uint64_t*>(gRecords + partial);
  const std::int64_t records = partial < N ? (N - partial + kPartials - 1) / kPartials : 0;
  double rSum = 0.0;
  std::uint64_t rCounts[ReductionMemory::kCounts] = {};
  for (std::int64_t begin = 0; begin < records; begin += PartialMemory::kRecords) {
    const int count =
        static_cast<int>(records - begin < PartialMemory::kRecords ? records - begin : PartialMemory::kRecords);
    std::uint64_t rWords[PartialMemory::kEach];
#pragma unroll
    for (int e = 0; e < PartialMemory::kEach; ++e) {
      const int word = e * PartialMemory::kThreads + thread_id();
      rWords[e] = 0;
      if (word >= count * kWords) continue;
      rWords[e] = atomic_load(gWords + (begin + word / kWords) * (kPartials * kWords) + word % kWords);
    }
    sync_block();  // the last records have been added
#pragma unroll
    for (int e = 0; e < PartialMemory::kEach; ++e) {
      stage.sWords.set(e * PartialMemory::kThreads + thread_id(), rWords[e]);
    }
    sync_block();
    if (thread_id() < ReductionMemory::kSums) {
#pragma unroll 8
      for (int r = 0; r < count; ++r) rSum = add(rSum, double_from_bits(stage.sWords.get(r * kWords + thread_id())));
    }
    for (int r = thread_id() - kWarpSize; r < count; r += PartialMemory::kThreads - kWarpSize) {
      if (r < 0) break;                                                  // the first warp adds
      const std::uint64_t positives = stage.sWords.get(r * kWords + 3);  // and negatives
      const std::uint64_t support = stage.sWords.get(r * kWords + 4);    // and flags
      rCounts[0] += positives & 0xffffffffu;
      rCounts[1] += positives >> 32;
      rCounts[2] += support & 0xffffffffu;
      rCounts[3] += support >> 32 & 1;
      rCounts[4] += support >> 33 & 1;
    }
  }
  meet_counts(rCounts, memory);
  if (thread_id() < ReductionMemory::kSums) gPartials[partial].sums[thread_id()] = rSum;
  if (thread_id() < ReductionMemory::kCounts) {
    gPartials[partial].counts[thread_id()] = memory.sCounts.get(thread_id() * ReductionMemory::kWarps);
  }
}

// By the block that knows that all partials of N records are written.
template <class A>
__device__ __forceinline__ void join_partials(const ForwardArgs& args, const PartialRecord* gPartials,
                                              const ReductionMemory& memory) {
  static_assert(PartialMemory::kThreads == kPartials, "a thread a partial");
  std::uint64_t rCounts[ReductionMemory::kCounts] = {};
  double rSums[ReductionMemory::kSums] = {};
  if (thread_id() < args.anchors.rows) {
    const PartialRecord* gMine = gPartials + thread_id();
#pragma unroll
    for (int sum = 0; sum < ReductionMemory::kSums; ++sum) rSums[sum] = atomic_load(gMine->sums + sum);
#pragma unroll
    for (int i = 0; i < ReductionMemory::kCounts; ++i) rCounts[i] = atomic_load(gMine->counts + i);
  }
  sync_block();  // the counts of this block's own partial have been read
  for (int sum = 0; sum < ReductionMemory::kSums; ++sum) memory.sSums.set(sum * kPartials + thread_id(), rSums[sum]);
  join_sums<A>(args, rCounts, memory);
}

}  // namespace sn::cuda
