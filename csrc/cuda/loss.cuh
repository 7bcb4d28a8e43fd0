// From one anchor's selection to its outputs, and from the records of all anchors to the loss.
//
// API (A = float or double, Key<A>: keys.cuh)
//   finish_anchor<A>(args, anchor, K, found, keys, near, far)      one warp
//     keys: Shared<Key<A>> or Key<A>*, the anchor's support set: `found` <= K keys of make_key, in order, written
//     before a barrier that covers the warp; they are marked here. near, far: the same in all lanes, index -1 for none.
//     Writes every output of the anchor and returns its record, in all lanes.
//   final_reduction<A>(args, records, poison, memory)              one block, after all records
//     records: an accessor like GlobalRecords. The bits are the same for any number of threads.
#pragma once

#include <cstdint>

#include "cuda/keys.cuh"
#include "cuda/memory.cuh"
#include "cuda/plan/plan_types.h"
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
struct WarpGroup {
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

template <class A, class Keys>
__device__ AnchorRecord finish_anchor(const ForwardArgs& args, std::int64_t anchor, std::int64_t K, std::int64_t found,
                                      Keys keys, Positive<A> near, Positive<A> far) {
  std::int32_t* gIndices = args.indices + anchor * (K + kExtraEdges);
  A* gCoefficients = static_cast<A*>(args.coefficients) + anchor * (K + kExtraEdges);
  A* gSquared = args.squared == nullptr ? nullptr : static_cast<A*>(args.squared) + anchor * (K + kExtraEdges);
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
    gIndices[e] = index;
    if (gSquared != nullptr) gSquared[e] = d2;
  }
  sync_warp();

  const KeyedSupport<A, Keys> support{keys, found};
  const AnchorTerms terms =
      anchor_terms<A>(WarpGroup(), args.options, K, support, near, far, gIndices + K, gCoefficients);
  if (gSquared != nullptr) {  // the lanes that own the last two edges have written their indices
    if (K % kWarpSize == lane_id()) gSquared[K] = gIndices[K] >= 0 ? near.d2 : infinity<A>();
    if ((K + 1) % kWarpSize == lane_id()) gSquared[K + 1] = gIndices[K + 1] >= 0 ? far.d2 : infinity<A>();
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

// ---- all anchors ----------------------------------------------------------------------------------------------------

// Sums are fixed by N alone: partial p adds the records p, p + kPartials, ... in order, then the partials meet in a
// tree of halves. Counts are integers, which any order adds up to the same: by warp, then the warps'. (Not by atomics:
// shared memory has none of 64 bits, and the loop that stands in for one took 20 us of a call on an H200.)
inline constexpr int kPartials = 256;

struct ReductionMemory {
  Shared<double> sSums;           // [kSums][kPartials]
  Shared<std::uint64_t> sCounts;  // [kCounts][kWarps]
  static constexpr int kSums = 3;
  static constexpr int kCounts = 5;
  static constexpr int kWarps = kMaxThreads / kWarpSize;
  static constexpr int kBytes = shared_bytes<double>(kSums * kPartials) + shared_bytes<std::uint64_t>(kCounts * kWarps);
  static_assert(kCounts <= kWarpSize, "a thread of the first warp adds up each count");
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

// An input value was not finite: no selection is meaningful, and nothing finite may come out.
template <class A>
__device__ void poison_outputs(const ForwardArgs& args) {
  const std::int64_t N = args.anchors.rows;
  const std::int64_t M = args.candidates.rows;
  const std::int64_t K = args.options.k < M ? args.options.k : M;
  const A nan = quiet_nan<A>();
  for (std::int64_t i = thread_id(); i < N * (K + kExtraEdges); i += thread_count()) {
    args.indices[i] = -1;
    static_cast<A*>(args.coefficients)[i] = A(0);
    if (args.squared != nullptr) static_cast<A*>(args.squared)[i] = nan;
  }
  for (std::int64_t i = thread_id(); i < N; i += thread_count()) {
    args.nearest_positive[i] = -1;
    args.farthest_positive[i] = -1;
  }
  const std::int64_t losses = args.options.reduction == Reduction::kNone ? N : 1;
  for (std::int64_t i = thread_id(); i < losses; i += thread_count()) static_cast<A*>(args.loss)[i] = nan;
  for (int i = thread_id(); i < kStatsSize; i += thread_count()) args.stats[i] = quiet_nan<double>();
}

template <class A, class Records>
__device__ void final_reduction(const ForwardArgs& args, const Records& records, bool poison,
                                const ReductionMemory& memory) {
  if (poison) return poison_outputs<A>(args);
  const std::int64_t N = args.anchors.rows;
  std::uint64_t rCounts[ReductionMemory::kCounts] = {};
  for (int partial = thread_id(); partial < kPartials; partial += thread_count()) {
    double rSums[ReductionMemory::kSums] = {};
#pragma unroll 4
    for (std::int64_t i = partial; i < N; i += kPartials) {
      const AnchorRecord record = records.get(i);
      rSums[0] = add(rSums[0], record.loss);
      rSums[1] = add(rSums[1], record.positive_sum);
      rSums[2] = add(rSums[2], record.negative_sum);
      rCounts[0] += static_cast<std::uint64_t>(record.positives);
      rCounts[1] += static_cast<std::uint64_t>(record.negatives);
      rCounts[2] += static_cast<std::uint64_t>(record.support_positives);
      rCounts[3] += static_cast<std::uint64_t>(record.flags & 1);
      rCounts[4] += static_cast<std::uint64_t>(record.flags >> 1 & 1);
    }
    for (int sum = 0; sum < ReductionMemory::kSums; ++sum) memory.sSums.set(sum * kPartials + partial, rSums[sum]);
  }
#pragma unroll
  for (int i = 0; i < ReductionMemory::kCounts; ++i) {
#pragma unroll
    for (int mask = kWarpSize / 2; mask > 0; mask /= 2) rCounts[i] += shuffle_xor(rCounts[i], mask);
    if (lane_id() == 0) memory.sCounts.set(i * ReductionMemory::kWarps + warp_id(), rCounts[i]);
  }
  sync_block();
  if (thread_id() < ReductionMemory::kCounts) {
    const Shared<std::uint64_t> sMine = memory.sCounts.offset(thread_id() * ReductionMemory::kWarps);
    std::uint64_t count = 0;
    for (int warp = 0; warp < thread_count() / kWarpSize; ++warp) count += sMine.get(warp);
    sMine.set(0, count);  // read behind the barriers of the tree
  }
  for (int half = kPartials / 2; half > 0; half /= 2) {
    for (int item = thread_id(); item < ReductionMemory::kSums * half; item += thread_count()) {
      const int at = item / half * kPartials + item % half;
      memory.sSums.set(at, add(memory.sSums.get(at), memory.sSums.get(at + half)));
    }
    sync_block();
  }
  if (thread_id() != 0) return;
  const auto ratio = [](double sum, double of) { return of > 0.0 ? sum / of : 0.0; };
  const auto count = [&](int which) {
    return static_cast<double>(memory.sCounts.get(which * ReductionMemory::kWarps));
  };
  const double loss = memory.sSums.get(0);
  const double valid = count(3);
  if (args.options.reduction == Reduction::kMean) *static_cast<A*>(args.loss) = static_cast<A>(ratio(loss, valid));
  if (args.options.reduction == Reduction::kSum) *static_cast<A*>(args.loss) = static_cast<A>(loss);
  args.stats[kValidAnchors] = valid;
  args.stats[kPositiveDistance] = ratio(memory.sSums.get(kPartials), count(0));
  args.stats[kNegativeDistance] = ratio(memory.sSums.get(2 * kPartials), count(1));
  args.stats[kNearestIsPositive] = ratio(count(4), valid);
  args.stats[kSupportPositives] = ratio(count(2), valid);
  args.stats[kPoison] = 0.0;
}

}  // namespace sn::cuda
