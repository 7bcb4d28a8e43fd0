// Keys of a block in lists of a warp each, and the first keys of a row through them.
//
// A list is 32 keys that one warp sorts by shuffles. Then each key counts, by a binary search of every other list, how
// many come before it: that is its place. It takes two barriers, whatever the number of keys.
//
// Of a row with more candidates than lists should sort, few are wanted. Candidates fall into 256 groups, one or two a
// thread, and 8 lists hold the least key of each. The r-th of a list is a bound that r of its groups have a candidate
// within, so of 8 lists the largest r-th, with r = wanted / 8 rounded up, holds at least `wanted`. How many least keys
// the r-th of each list holds is counted, and the smallest that holds enough is the bound. Only threads with a least
// key within it look at their candidates once more, and what they find is sorted in lists: by simulation of random rows
// 12 for 10 wanted, and 160 to 190 for 128.
#pragma once

#include <cstdint>

#include "cuda/keys.cuh"
#include "cuda/memory.cuh"
#include "cuda/plan/sizes.h"
#include "cuda/ptx.cuh"

namespace sn::cuda {

// Keys of a list [kWarpSize], in order, that come before `key`.
template <class AnyKey>
__device__ __forceinline__ int count_before(const Shared<AnyKey>& sList, const AnyKey& key) {
  int count = 0;
#pragma unroll
  for (int step = kWarpSize / 2; step > 0; step /= 2) {
    if (before(sList.get(count + step - 1), key)) count += step;
  }
  return before(sList.get(count), key) ? count + 1 : count;
}

// Sorts each list of sLists [0, count); there is room for whole ones. By the whole block, and it ends with a barrier.
template <class AnyKey>
__device__ __forceinline__ void sort_each_list(const Shared<AnyKey>& sLists, int count) {
  for (int first = warp_id() * kWarpSize; first < count; first += thread_count()) {
    const int at = first + lane_id();
    sLists.set(at, sort_lanes(at < count ? sLists.get(at) : last_key<AnyKey>()));
  }
  sync_block();
}

// The first `wanted` of sLists [0, count) in order into keys. At least so many of them are not last_key; others may be.
// By the whole block: what it sorts was written before a barrier, and it ends with one.
template <class AnyKey, class Keys>
__device__ __forceinline__ void sort_lists(const Shared<AnyKey>& sLists, int count, int wanted, Keys keys) {
  sort_each_list(sLists, count);
  const int lists = (count + kWarpSize - 1) / kWarpSize;
  for (int list = warp_id(); list < lists; list += thread_count() / kWarpSize) {
    const AnyKey key = sLists.get(list * kWarpSize + lane_id());
    int place = lane_id();
#pragma unroll 4
    for (int turn = 1; turn < lists; ++turn) {
      const int other = list + turn < lists ? list + turn : list + turn - lists;
      place += count_before(sLists.offset(other * kWarpSize), key);
    }
    if (place < wanted) set_key(keys, place, key);
  }
  sync_block();
}

// The least keys of a thread's two groups of candidates: every other one that is added.
template <class AnyKey>
struct LeastKeys {
  AnyKey next = last_key<AnyKey>();  // of the group that the next candidate belongs to
  AnyKey last = last_key<AnyKey>();

  __device__ __forceinline__ void add(const AnyKey& key) {
    const AnyKey least = before(key, next) ? key : next;
    next = last;
    last = least;
  }
  __device__ __forceinline__ AnyKey least() const { return before(next, last) ? next : last; }
};

template <class A>
struct KeyLists {
  static constexpr int kKeys = static_cast<int>(kListedKeys);
  static constexpr int kGroups = kListThreads;
  static constexpr int kLists = kGroups / kWarpSize;
  static constexpr int kBytes =
      shared_bytes<Key<A>>(kKeys) + shared_bytes<Key<A>>(kLists) + shared_bytes<std::uint32_t>(1);
  static constexpr int kTogether = 8;  // loads of a thread under way
  static_assert(kKeys % kWarpSize == 0 && kKeys >= kGroups && kBoundedNeighbours <= kGroups);
  static_assert(kFewListThreads * 2 == kGroups, "a thread has one group, or two");

  Shared<Key<A>> sLists;           // [kKeys]
  Shared<Key<A>> sBounds;          // [kLists]
  Shared<std::uint32_t> sCounted;  // [1]

  __device__ __forceinline__ explicit KeyLists(SharedArena& arena)
      : sLists(arena.take<Key<A>>(kKeys)),
        sBounds(arena.take<Key<A>>(kLists)),
        sCounted(arena.take<std::uint32_t>(1)) {}

  // Lists keys of a row, the first `wanted` among them. Their number: more than kKeys if too many are within the bound,
  // and then nothing of use is listed. bounded: Selection::kBounded, else kWhole (selects in sizes.h says when).
  // rLeast: of candidates thread_id(), thread_id() + thread_count(), ... of the row, which this thread alone will read
  // again. Ends with a barrier.
  template <class Row>
  __device__ __forceinline__ int list(const Row& row, int wanted, const LeastKeys<Key<A>>& rLeast, bool bounded) const {
    const std::int64_t length = row.length();
    int count = static_cast<int>(length);
    if (bounded) {
      count = list_within(row, bound_of(rLeast, wanted), rLeast.least());
    } else if (length <= kGroups) {  // one of each group
      list_least(rLeast);
      if (length > thread_count()) count = kGroups;
      sync_block();
    } else {
      for (int j = thread_id(); j < count; j += thread_count()) sLists.set(j, row.key(j));
      sync_block();
    }
    return count;
  }

 private:
  // The least keys of all groups. Of a row that has no candidate for each, the first places.
  __device__ __forceinline__ void list_least(const LeastKeys<Key<A>>& rLeast) const {
    if (thread_count() == kGroups) {
      sLists.set(thread_id(), rLeast.least());
    } else {
      sLists.set(thread_id(), rLeast.last);
      sLists.set(kGroups / 2 + thread_id(), rLeast.next);
    }
  }

  // A key that the least keys of at least `wanted` groups do not exceed.
  __device__ __forceinline__ Key<A> bound_of(const LeastKeys<Key<A>>& rLeast, int wanted) const {
    list_least(rLeast);
    if (thread_id() == 0) sCounted.set(0, 0u);
    sync_block();
    sort_each_list(sLists, kGroups);
    const int rank = (wanted + kLists - 1) / kLists - 1;
    for (int mine = warp_id(); mine < kLists; mine += thread_count() / kWarpSize) {
      const Key<A> bound = sLists.get(mine * kWarpSize + rank);
      int within = 0;
#pragma unroll
      for (int list = 0; list < kLists; ++list) {
        within += popcount(ballot(!before(bound, sLists.get(list * kWarpSize + lane_id()))));
      }
      if (lane_id() == 0) sBounds.set(mine, within >= wanted ? bound : last_key<Key<A>>());
    }
    sync_block();
    return least_key(lane_id() < kLists ? sBounds.get(lane_id()) : last_key<Key<A>>());
  }

  // Keys of the row within the bound, those that fit into sLists in any order.
  template <class Row>
  __device__ __forceinline__ int list_within(const Row& row, const Key<A>& bound, const Key<A>& rLeast) const {
    if (!before(bound, rLeast)) {
      for (std::int64_t first = thread_id(); first < row.length(); first += kTogether * thread_count()) {
        Key<A> rKeys[kTogether];
#pragma unroll
        for (int e = 0; e < kTogether; ++e) {
          const std::int64_t j = first + e * thread_count();
          rKeys[e] = j < row.length() ? row.key(j) : last_key<Key<A>>();
        }
#pragma unroll
        for (int e = 0; e < kTogether; ++e) {
          if (before(bound, rKeys[e])) continue;
          const std::uint32_t at = sCounted.atomic_add(0, 1u);
          if (at < kKeys) sLists.set(static_cast<int>(at), rKeys[e]);
        }
      }
    }
    sync_block();
    return static_cast<int>(sCounted.get(0));
  }
};

}  // namespace sn::cuda
