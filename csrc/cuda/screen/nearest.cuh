// One block, one anchor: the K nearest of the candidates that are offered, by exact keys, and the nearest and farthest
// of those offered as positives. The refinement offers what the screening could not rule out; the fallback offers whole
// segments of candidates.
//
// The result depends on the set of offered candidates alone. Keys are exact and distinct, so neither the order of
// offers nor what is abandoned on the way can show. A candidate is abandoned once its partial sum is strictly above
// `bound`, and bound is never below the key of the K-th nearest: it starts at a proven bound (or +inf) and falls to the
// K-th of the keys seen so far. A key that ties with the K-th in d2 is never abandoned: ties are decided by index.
#pragma once

#include <cstdint>

#include "cuda/direct_sum.cuh"
#include "cuda/keys.cuh"
#include "cuda/memory.cuh"
#include "cuda/plan/plan_types.h"
#include "cuda/ptx.cuh"
#include "sn_math.h"

namespace sn::cuda {

// ---- traits ---------------------------------------------------------------------------------------------------------

// Keys that a block of so many warps sorts at once: the K best so far and the pending ones. A few warps an anchor
// finish it soonest; one warp an anchor keeps most anchors under way and waits for no other warp. Of many warps some
// may only look for candidates, since each that sums has shared memory of its own.
template <int kWarps>
struct NearestShape {
  static constexpr int kThreads = kWarps * kWarpSize;
  static constexpr int kKeys = kWarps == 1 ? 256 : 128 * kWarps;
  static constexpr int kPending = kKeys - static_cast<int>(kFastNeighbours);
  static constexpr int kVoteWords = 2 * kWarps;
  static constexpr int kStagedBounds = 2 * kKeys;  // floats that fit the place of the keys
  static_assert(kStagedBounds % kThreads == 0);
  static_assert((kKeys & (kKeys - 1)) == 0, "sorting networks pad to powers of two");
  static_assert(kPending >= 2 * kThreads, "an offer of a whole block fits behind another one");
};

__device__ __forceinline__ std::uint64_t smaller(std::uint64_t a, std::uint64_t b) {
  return a < b ? a : b;
}

// ---- the K nearest --------------------------------------------------------------------------------------------------

template <class T, int kWarps, int kSummers = kWarps>
class NearestK {
 public:
  static_assert(kSummers <= kWarps);
  using Sums = WarpSums<T>;
  using Shape = NearestShape<kWarps>;
  static constexpr int bytes(std::int64_t dims) {
    return shared_bytes<T>(kSummers * Sums::elements(dims)) + shared_bytes<std::uint64_t>(Shape::kKeys) +
           shared_bytes<std::int32_t>(Shape::kPending) + shared_bytes<std::uint32_t>(1) +
           shared_bytes<std::uint32_t>(Shape::kVoteWords);
  }

  __device__ __forceinline__ NearestK(SharedArena& arena, const FeatureView& candidates, std::int64_t dims,
                                      bool aligned, std::int64_t K)
      : sums_(arena.take<T>(kSummers * Sums::elements(dims)).offset(warp_id() % kSummers * Sums::elements(dims)),
              static_cast<const T*>(candidates.data), candidates.row_stride, dims, aligned),
        sKeys(arena.take<std::uint64_t>(Shape::kKeys)),
        sPending_(arena.take<std::int32_t>(Shape::kPending)),
        sWord(arena.take<std::uint32_t>(1)),
        sVotes_(arena.take<std::uint32_t>(Shape::kVoteWords)),
        K_(static_cast<int>(K)) {
    int slots = 1;
    while (slots < kSectionChunks && slots * kChunk < dims) slots *= 2;
    at_once_ = kWarpSize / slots;
  }

  // A new anchor: nothing is kept, nothing pending. `start`: no member of its true support set has a larger key.
  __device__ __forceinline__ void begin(const T* gAnchor, float start) {
    sync_block();  // the previous anchor's keys have been read
    sums_.set_anchor(gAnchor);
    for (int slot = thread_id(); slot < K_; slot += Shape::kThreads) sKeys.set(slot, kNoKey);
    bound = start;
    near = kNoKey;
    far = kNoKey;
    pending_ = 0;
    tracked_ = 0;
    sync_block();
  }

  // A candidate for each thread that is `present`; the whole block calls it. Positives that are to be tracked come
  // before all others of the same flush. Deterministic: candidates are pending in the order of threads.
  __device__ __forceinline__ void offer(bool present, std::int32_t candidate, bool tracked) {
    const std::uint32_t votes = ballot(present);
    const int slot = parity_ * kWarps;
    parity_ ^= 1;
    // There are two sets of words: a thread that still reads these has not passed the next offer's barrier, so no
    // thread is two offers ahead.
    if (lane_id() == 0) sVotes_.set(slot + warp_id(), static_cast<std::uint32_t>(popcount(votes)));
    sync_block();
    int place = pending_ + popcount(votes & lanes_below());
    int total = 0;
#pragma unroll
    for (int warp = 0; warp < kWarps; ++warp) {
      const int count = static_cast<int>(sVotes_.get(slot + warp));
      if (warp < warp_id()) place += count;
      total += count;
    }
    if (present) sPending_.set(place, candidate);
    pending_ += total;
    if (tracked) tracked_ = pending_;
  }
  __device__ __forceinline__ bool full() const { return pending_ > Shape::kPending - Shape::kThreads; }
  __device__ __forceinline__ int pending() const { return pending_; }

  // Exact keys of the pending candidates. `insert`: they compete for the K places; otherwise only near and far follow
  // the tracked ones.
  __device__ __forceinline__ void flush(bool insert) {
    if (pending_ == 0) return;
    sync_block();  // all pending candidates are written
    measure<false>(0, tracked_);
    measure<true>(tracked_, pending_);
    sync_block();
    evaluated += static_cast<std::uint32_t>(pending_);

    // Every warp looks at all new keys.
    const std::uint64_t worst = sKeys.get(K_ - 1);
    bool better = false;
    std::uint64_t rNear = kNoKey;
    std::uint64_t rFar = kNoKey;
    for (int e = lane_id(); e < pending_; e += kWarpSize) {
      const std::uint64_t key = sKeys.get(K_ + e);
      better = better || key < worst;
      if (e < tracked_) {
        rNear = smaller(rNear, key);
        rFar = smaller(rFar, far_key(d2_of(key), index_of(key)));
      }
    }
    if (tracked_ > 0) {
#pragma unroll
      for (int mask = kWarpSize / 2; mask > 0; mask /= 2) {
        rNear = smaller(rNear, shuffle_xor(rNear, mask));
        rFar = smaller(rFar, shuffle_xor(rFar, mask));
      }
      near = smaller(near, rNear);
      far = smaller(far, rFar);
    }
    if (insert && any_lane(better)) {
      sync_block();
      sort_keys(BlockTeam(), sKeys, K_ + pending_);
      const std::uint64_t last = sKeys.get(K_ - 1);
      if (last != kNoKey && key_squared_distance(last) < bound) bound = key_squared_distance(last);
    }
    pending_ = 0;
    tracked_ = 0;
    sync_block();
  }

  // A bound that was proven elsewhere.
  __device__ __forceinline__ void tighten(float proven) {
    if (proven < bound) bound = proven;
  }
  // The K-th key so far; kNoKey while fewer are known.
  __device__ __forceinline__ std::uint64_t worst_key() const { return sKeys.get(K_ - 1); }

 private:
  Sums sums_;

 public:
  Shared<std::uint64_t> sKeys;  // the first K are the result, in order, after a flush
  float bound = 0;              // d2 above which a candidate that is not tracked is abandoned
  std::uint64_t near = kNoKey;  // of the tracked ones
  std::uint64_t far = kNoKey;   // a far_key
  std::uint32_t evaluated = 0;  // candidates since the kernel began

 private:
  // Warps that sum share [begin, end) of the pending ones; the key of the e-th goes behind the K kept.
  template <bool kBounded>
  __device__ __forceinline__ void measure(int begin, int end) {
    if (warp_id() >= kSummers) return;
    const int groups = (end - begin + at_once_ - 1) / at_once_;
    const int share = (groups + kSummers - 1) / kSummers * at_once_;
    const int last = begin + (warp_id() + 1) * share < end ? begin + (warp_id() + 1) * share : end;
    for (int first = begin + warp_id() * share; first < last; first += kWarpSize) {
      const int count = last - first < kWarpSize ? last - first : kWarpSize;
      const bool mine = lane_id() < count;
      const std::int32_t candidate = mine ? sPending_.get(first + lane_id()) : -1;
      float d2;
      if constexpr (kBounded) {
        d2 = sums_.sums_within(candidate, count, bound);
      } else {
        d2 = sums_.sums(candidate, count);
      }
      const bool kept = !kBounded || d2 <= bound;
      if (mine) sKeys.set(K_ + first + lane_id(), kept ? pack_key(d2, candidate) : kNoKey);
    }
  }

  Shared<std::int32_t> sPending_;

 public:
  Shared<std::uint32_t> sWord;  // of whoever needs one

 private:
  Shared<std::uint32_t> sVotes_;
  int K_;
  int at_once_;  // candidates that a warp sums together
  int parity_ = 0;
  int pending_ = 0;
  int tracked_ = 0;
};

}  // namespace sn::cuda
