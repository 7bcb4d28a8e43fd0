// A block selects the neighbours of one anchor from its row of partial sums and finishes the anchor. The paths of one
// launch share its parts.
//
// Short rows (at most 32 kPerLane candidates, K <= 16): the block adds the slices up into shared memory. Then one warp
// holds the row in registers, bounds the K-th key, and lists and ranks what is within. Longer rows, or larger K: all
// threads look for near and far as they add up, and for the least key of their own candidates, from which a bound and
// sorted lists follow (lists.cuh). Where those do not serve, or take longer, a radix selection (keys.cuh) finds what
// the lists sort. Either way the first warp finishes the anchor.
#pragma once

#include <cstdint>

#include "cuda/direct/lists.cuh"
#include "cuda/direct_sum.cuh"
#include "cuda/keys.cuh"
#include "cuda/loss.cuh"
#include "cuda/memory.cuh"
#include "cuda/plan/sizes.h"
#include "cuda/ptx.cuh"

namespace sn::cuda {

template <int kPerLane>
inline constexpr int kSelectThreads = kPerLane == 0 ? kListThreads : 128;  // at most
// Registers for the loads of a whole section to be under way at once.
template <class A, int kPerLane>
inline constexpr int kSelectBlocks = 512 / kSelectThreads<kPerLane>;

// ---- the sums of a row ----------------------------------------------------------------------------------------------

// The aligned pairwise tree over the next kParts values of `source`; those from `count` on are +0.
template <class A, int kParts, class Source>
__device__ __forceinline__ A tree_of(Source& source, int first, int count) {
  if constexpr (kParts == 1) {
    return source.next(first < count);
  } else {
    const A low = tree_of<A, kParts / 2>(source, first, count);
    return add(low, tree_of<A, kParts / 2>(source, first + kParts / 2, count));
  }
}

// The slices' values to the final sum; `source` gives them one after the other, and +0 for one that is not present.
template <class A, int kWidth, class Source>
__device__ __forceinline__ A combine_slices(Source source, int slices) {
  if constexpr (kWidth < kSection / kLargestSlice) return no_nan(tree_of<A, kWidth>(source, 0, slices));
  A rTotal = 0;
  for (int first = 0; first < slices; first += kWidth) {
    const A section = tree_of<A, kWidth>(source, first, slices);
    rTotal = first == 0 ? section : add(rTotal, section);
  }
  return no_nan(rTotal);
}
// width: slices of one section, or, of a single section that is not full, of the narrowest tree that covers it
// (slice_tree in sizes.h): what a wider one would add is +0.
template <class A, class Source>
__device__ __forceinline__ A combine_slices(const Source& source, int slices, int width) {
  static_assert(kSection / kChunk == 32 && kSection / kLargestSlice == 8, "the cases below");
  switch (width) {
    case 1:
      return combine_slices<A, 1>(source, slices);
    case 2:
      return combine_slices<A, 2>(source, slices);
    case 4:
      return combine_slices<A, 4>(source, slices);
    case 8:
      return combine_slices<A, 8>(source, slices);
    case 16:
      return combine_slices<A, 16>(source, slices);
    default:
      return combine_slices<A, 32>(source, slices);
  }
}

// A row of gPartials.
template <class A>
struct PlaneSums {
  A* gRow;             // [M] of the first slice
  std::int64_t plane;  // from slice to slice
  int slices;
  int tree;  // combine_slices

  struct Slices {
    const A* gNext;
    std::int64_t plane;
    __device__ __forceinline__ A next(bool present) {
      const A value = present ? *gNext : A(0);
      gNext += plane;
      return value;
    }
  };
  __device__ __forceinline__ A get(std::int64_t j) const {
    return combine_slices<A>(Slices{gRow + j, plane}, slices, tree);
  }
  // Keeps the sum for at(); only the block that owns the row reads or writes it.
  __device__ __forceinline__ void keep(std::int64_t j, A d2) const { gRow[j] = d2; }
  __device__ __forceinline__ A at(std::int64_t j) const { return gRow[j]; }
};

// ---- short rows -----------------------------------------------------------------------------------------------------

// Least value of the lanes.
__device__ __forceinline__ std::uint32_t least_bits(std::uint32_t bits) {
  return reduce_min(bits);
}
__device__ __forceinline__ std::uint64_t least_bits(std::uint64_t bits) {
  const std::uint32_t high = static_cast<std::uint32_t>(bits >> 32);
  const std::uint32_t least_high = reduce_min(high);
  const std::uint32_t least_low = reduce_min(high == least_high ? static_cast<std::uint32_t>(bits) : ~0u);
  return static_cast<std::uint64_t>(least_high) << 32 | least_low;
}
__device__ __forceinline__ float value_of(std::uint32_t bits) {
  return float_from_bits(bits);
}
__device__ __forceinline__ double value_of(std::uint64_t bits) {
  return double_from_bits(bits);
}

// Least of a lane's values, in as few dependent steps as there are levels.
template <class Value, int kCount>
__device__ __forceinline__ Value least_of(const Value (&rValues)[kCount]) {
  static_assert((kCount & (kCount - 1)) == 0);
  Value rLeast[kCount];
#pragma unroll
  for (int i = 0; i < kCount; ++i) rLeast[i] = rValues[i];
#pragma unroll
  for (int half = kCount / 2; half > 0; half /= 2) {
#pragma unroll
    for (int i = 0; i < half; ++i) rLeast[i] = rLeast[i + half] < rLeast[i] ? rLeast[i + half] : rLeast[i];
  }
  return rLeast[0];
}

__device__ __forceinline__ std::uint32_t greatest_bits(std::uint32_t bits) {
  return reduce_max(bits);
}
__device__ __forceinline__ std::uint64_t greatest_bits(std::uint64_t bits) {
  return ~least_bits(~bits);
}

// Bit i of a lane: its candidate i * 32 + lane is a positive of the anchor.
template <int kPerLane>
__device__ __forceinline__ std::uint32_t positives_of(const ForwardArgs& args, std::int64_t anchor, std::int64_t self) {
  const std::int64_t label = load(args.anchor_labels + anchor);
  std::uint32_t rPositive = 0;
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) {
    const int j = i * kWarpSize + lane_id();
    if (j < args.candidates.rows && j != self && load(args.candidate_labels + j) == label) rPositive |= 1u << i;
  }
  return rPositive;
}

// A row of at most 32 kPerLane candidates in the registers of one warp, which selects its first K <= kShortNeighbours
// keys, marked, and near and far.
template <class A, int kPerLane>
class ShortRow {
 public:
  using Bits = decltype(bits_of(A()));
  static constexpr Bits kNone = ~Bits{0};  // above +inf

  // sRow [M], written before a barrier that covers the warp.
  __device__ __forceinline__ ShortRow(const Shared<A>& sRow, int M, std::int64_t self, std::uint32_t rPositive)
      : rPositive_(rPositive) {
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      const int j = i * kWarpSize + lane_id();
      rBits_[i] = j < M && j != self ? bits_of(sRow.get(j)) : kNone;
    }
  }

  // Key r into place r of sKeys, which has kWarpSize; fewer than K where there are no more. near, far: in all lanes,
  // index -1 for none.
  //
  // The K-th least of the lanes' least values is a bound: K candidates are not above it, and few more (12 for 10, of
  // 256). Those are listed, and each finds its place by counting the keys before its own. (Where fewer than K lanes
  // have candidates, these have one each, and all are listed.)
  __device__ __forceinline__ void select(int K, const Shared<Key<A>>& sKeys, Positive<A>* near,
                                         Positive<A>* far) const {
    const Shared<Bits> sLeast = sKeys.template view<Bits>();
    const Bits least = least_of(rBits_);
    sLeast.set(lane_id(), least);
    find_special(near, far);
    sync_warp();
    int rLess[4] = {};  // lanes with a lesser one, in independent counts
#pragma unroll
    for (int lane = 0; lane < kWarpSize; ++lane) rLess[lane % 4] += sLeast.get(lane) < least ? 1 : 0;
    const bool counts = (rLess[0] + rLess[1]) + (rLess[2] + rLess[3]) < K && least != kNone;
    const Bits bound = greatest_bits(counts ? least : Bits{0});

    int rPlace[kPerLane];
    int listed = 0;
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      const std::uint32_t votes = ballot(rBits_[i] <= bound);
      rPlace[i] = rBits_[i] <= bound ? listed + popcount(votes & ((1u << lane_id()) - 1u)) : kWarpSize;
      listed += popcount(votes);
    }
    Key<A> rEntry = last_key<Key<A>>();
    int rank = lane_id();
    if (listed > kWarpSize) {  // ties, or many candidates in few lanes
      rEntry = extract(K);
    } else {
      sync_warp();  // least values have been read
      if (lane_id() >= listed) sKeys.set(lane_id(), rEntry);
#pragma unroll
      for (int i = 0; i < kPerLane; ++i) {
        if (rPlace[i] < kWarpSize) sKeys.set(rPlace[i], entry(i));
      }
      sync_warp();
      rEntry = sKeys.get(lane_id());
      rank = rank_of(rEntry, listed, sKeys);
    }
    sync_warp();  // the list has been read
    if (rank < K) sKeys.set(rank, marked(rEntry));
    sync_warp();
  }

  // In all lanes, index -1 for none.
  __device__ __forceinline__ void find_special(Positive<A>* near, Positive<A>* far) const {
    Bits rNear[kPerLane];
    Bits rFar[kPerLane];  // complements
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      rNear[i] = positive(i) ? rBits_[i] : kNone;
      rFar[i] = positive(i) ? ~rBits_[i] : kNone;
    }
    const Bits near_bits = least_bits(least_of(rNear));
    const Bits far_bits = greatest_bits(~least_of(rFar));
    std::uint32_t rNearIndices[kPerLane];
    std::uint32_t rFarIndices[kPerLane];
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      rNearIndices[i] = positive(i) && rBits_[i] == near_bits ? number(i) : ~0u;
      rFarIndices[i] = positive(i) && rBits_[i] == far_bits ? number(i) : ~0u;
    }
    *near = {static_cast<std::int32_t>(reduce_min(least_of(rNearIndices))), value_of(near_bits)};
    *far = {static_cast<std::int32_t>(reduce_min(least_of(rFarIndices))), value_of(far_bits)};
  }

 private:
  __device__ __forceinline__ bool positive(int i) const { return (rPositive_ >> i & 1u) != 0; }
  __device__ __forceinline__ static std::uint32_t number(int i) {
    return static_cast<std::uint32_t>(i * kWarpSize + lane_id());
  }

  // A candidate on its way to its place: instead of the index twice the index, and 1 more if it is a positive, which
  // orders alike.
  __device__ __forceinline__ std::uint32_t code(int i) const { return 2 * number(i) + (positive(i) ? 1u : 0u); }
  __device__ __forceinline__ Key<A> entry(int i) const {
    return make_key(value_of(rBits_[i]), static_cast<std::int32_t>(code(i)));
  }
  __device__ __forceinline__ static Key<A> marked(const Key<A>& entry) {
    const std::int32_t found = index_of(entry);
    const Key<A> key = make_key(d2_of(entry), found >> 1);
    return (found & 1) != 0 ? mark_positive(key) : key;
  }

  // Entries of the list before this one; those behind `listed` are behind all.
  __device__ __forceinline__ static int rank_of(const Key<A>& own, int listed, const Shared<Key<A>>& sKeys) {
    constexpr int kTogether = 8;
    int rBefore[2] = {};
#pragma unroll 1
    for (int first = 0; first < listed; first += kTogether) {
#pragma unroll
      for (int i = 0; i < kTogether; ++i) rBefore[i % 2] += before(sKeys.get(first + i), own) ? 1 : 0;
    }
    return lane_id() < listed ? rBefore[0] + rBefore[1] : kWarpSize;
  }

  // Lane i gets the i-th entry of K. No lane branches: what the next step waits for is a reduction, a few levels of
  // minima, and another reduction.
  __device__ __forceinline__ Key<A> extract(int K) const {
    Bits rBits[kPerLane];
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) rBits[i] = rBits_[i];
    Key<A> rEntry = last_key<Key<A>>();
#pragma unroll 1
    for (int rank = 0; rank < K; ++rank) {
      const Bits least = least_bits(least_of(rBits));
      std::uint32_t rCodes[kPerLane];  // of candidates that are as near
#pragma unroll
      for (int i = 0; i < kPerLane; ++i) rCodes[i] = rBits[i] == least ? code(i) : ~0u;
      const std::uint32_t first = reduce_min(least_of(rCodes));
      if (lane_id() == rank) rEntry = make_key(value_of(least), static_cast<std::int32_t>(first));
#pragma unroll
      for (int i = 0; i < kPerLane; ++i) {
        if (rCodes[i] == first) rBits[i] = kNone;
      }
    }
    return rEntry;
  }

  Bits rBits_[kPerLane];  // of candidates that exist and are not the anchor
  std::uint32_t rPositive_;
};

// near_i and far_i, as they are found.
template <class A>
struct SpecialKeys {
  Key<A> near = last_key<Key<A>>();
  Key<A> far = last_key<Key<A>>();

  __device__ __forceinline__ void offer(A d2, std::int64_t j) {
    const Key<A> candidate_near = make_key(d2, static_cast<std::int32_t>(j));
    const Key<A> candidate_far = far_key(d2, static_cast<std::int32_t>(j));
    if (before(candidate_near, near)) near = candidate_near;
    if (before(candidate_far, far)) far = candidate_far;
  }
  __device__ __forceinline__ void meet() {
    near = least_key(near);
    far = least_key(far);
  }
};

template <class A, int kPerLane>
class SelectState {
 public:
  static int bytes(std::int64_t M, std::int64_t) {
    return shared_bytes<A>(static_cast<int>(M)) + shared_bytes<Key<A>>(kWarpSize);
  }
  __device__ __forceinline__ SelectState(SharedArena& arena, std::int64_t M, std::int64_t)
      : sRow_(arena.take<A>(static_cast<int>(M))), sKeys_(arena.take<Key<A>>(kWarpSize)) {}

  // By all threads of the block; the record is the first warp's.
  template <class Sums>
  __device__ AnchorRecord select_and_finish(const ForwardArgs& args, std::int64_t anchor, std::int64_t K,
                                            const Sums& sums, Selection, Key<A>*) const {
    const int M = static_cast<int>(args.candidates.rows);
    const std::int64_t self = self_of(args, anchor);
    std::uint32_t rPositive = 0;
    if (warp_id() == 0) rPositive = positives_of<kPerLane>(args, anchor, self);  // under way while the slices are
    for (int j = thread_id(); j < M; j += thread_count()) sRow_.set(j, sums.get(j));
    sync_block();
    if (warp_id() != 0) return {};
    Positive<A> near{};
    Positive<A> far{};
    ShortRow<A, kPerLane>(sRow_, M, self, rPositive).select(static_cast<int>(K), sKeys_, &near, &far);
    const std::int64_t others = M - (self >= 0 ? 1 : 0);
    return finish_few<A>(args, anchor, K, K < others ? K : others, sKeys_, near, far);
  }

 private:
  Shared<A> sRow_;        // [M]
  Shared<Key<A>> sKeys_;  // [kWarpSize]
};

// ---- long rows ------------------------------------------------------------------------------------------------------

template <class A>
class SelectState<A, 0> {
 public:
  static constexpr int kWarps = kSelectThreads<0> / kWarpSize;

  static int bytes(std::int64_t, std::int64_t shared_keys) {
    return shared_bytes<std::uint32_t>(SelectMemory::kWords) + shared_bytes<Key<A>>(2 * kWarps) + KeyLists<A>::kBytes +
           shared_bytes<Key<A>>(static_cast<int>(shared_keys));
  }
  __device__ __forceinline__ SelectState(SharedArena& arena, std::int64_t, std::int64_t shared_keys)
      : memory_{arena.take<std::uint32_t>(SelectMemory::kWords)},
        lists_(arena),
        sSpecial_(arena.take<Key<A>>(2 * kWarps)),
        sKeys_(arena.take<Key<A>>(static_cast<int>(shared_keys))) {}

  template <class Sums>
  __device__ AnchorRecord select_and_finish(const ForwardArgs& args, std::int64_t anchor, std::int64_t K,
                                            const Sums& sums, Selection selection, Key<A>* gKeys) const {
    const std::int64_t M = args.candidates.rows;
    const std::int64_t self = self_of(args, anchor);
    const std::int64_t label = load(args.anchor_labels + anchor);
    SpecialKeys<A> rSpecial;
    LeastKeys<Key<A>> rLeast;
    for (std::int64_t j = thread_id(); j < M; j += thread_count()) {
      const std::int64_t other = load(args.candidate_labels + j);  // under way while the slices are
      const A d2 = sums.get(j);
      sums.keep(j, d2);
      rLeast.add(j == self ? last_key<Key<A>>() : make_key(d2, static_cast<std::int32_t>(j)));
      if (j != self && other == label) rSpecial.offer(d2, j);
    }
    rSpecial.meet();
    if (lane_id() == 0) {
      sSpecial_.set(2 * warp_id(), rSpecial.near);
      sSpecial_.set(2 * warp_id() + 1, rSpecial.far);
    }
    sync_block();

    const std::int64_t others = M - (self >= 0 ? 1 : 0);
    const std::int64_t found = K < others ? K : others;
    const Row<Sums> row{sums, M, self};
    static_assert(kSharedSortBytes / sizeof(Key<A>) >= KeyLists<A>::kKeys, "others than gKeys fit the lists");
    if (gKeys != nullptr) {
      search(row, found, gKeys);
      return finish(args, anchor, K, found, gKeys);
    }
    int listed = KeyLists<A>::kKeys + 1;
    if (selection != Selection::kSearched) {
      listed = lists_.list(row, static_cast<int>(found), rLeast, selection == Selection::kBounded);
    }
    if (listed > KeyLists<A>::kKeys && found <= KeyLists<A>::kKeys) {
      if (found > 0) block_select<A>(row, found, lists_.sLists, memory_);
      sync_block();
      listed = static_cast<int>(found);
    }
    if (listed <= KeyLists<A>::kKeys) {
      sort_lists(lists_.sLists, listed, static_cast<int>(found), sKeys_);
    } else {
      search(row, found, sKeys_);
    }
    return finish(args, anchor, K, found, sKeys_);
  }

 private:
  template <class Sums>
  struct Row {
    const Sums& sums;
    std::int64_t M;
    std::int64_t self;
    __device__ __forceinline__ std::int64_t length() const { return M; }
    __device__ __forceinline__ Key<A> key(std::int64_t j) const {
      return j == self ? last_key<Key<A>>() : make_key(sums.at(j), static_cast<std::int32_t>(j));
    }
  };

  // More keys than lists hold.
  template <class AnyRow, class Keys>
  __device__ __forceinline__ void search(const AnyRow& row, std::int64_t found, Keys keys) const {
    block_select<A>(row, found, keys, memory_);
    sort_keys(BlockTeam(), keys, found);
  }

  template <class Keys>
  __device__ AnchorRecord finish(const ForwardArgs& args, std::int64_t anchor, std::int64_t K, std::int64_t found,
                                 Keys keys) const {
    if (warp_id() != 0) return {};
    const bool reads = lane_id() < thread_count() / kWarpSize;
    const Key<A> near = least_key(reads ? sSpecial_.get(2 * lane_id()) : last_key<Key<A>>());
    const Key<A> far = least_key(reads ? sSpecial_.get(2 * lane_id() + 1) : last_key<Key<A>>());
    return finish_anchor<A>(args, anchor, K, found, keys, near_of<A>(near), far_of<A>(far));
  }

  SelectMemory memory_;
  KeyLists<A> lists_;
  Shared<Key<A>> sSpecial_;  // [kWarps] near, far
  Shared<Key<A>> sKeys_;     // [shared_keys]
};

}  // namespace sn::cuda
