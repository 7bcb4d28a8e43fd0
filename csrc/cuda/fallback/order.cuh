// The order in which the fallback takes queued rows in tiles: first the rows that need their support set, then those
// that only need near or far; rows of one label together, by buckets of a hash of it. So the candidates that a tile of
// the latter must see are those of few labels, and the bounds of the former are likely to drop the same ones.
//
// Nobody sorts the queue. Every block counts the rows of each bucket, which gives it the ranks where each begins; the
// rows of a tile are those with its 64 ranks. A row's rank is its bucket's begin and the number of earlier rows of the
// queue in that bucket; it is found for buckets alone that a tile's ends cut. All blocks look at one queue, so they
// agree. The order of the queue depends on the schedule, and with it who shares a tile: no result does.
#pragma once

#include <cstdint>

#include "cuda/memory.cuh"
#include "cuda/plan/sizes.h"
#include "cuda/ptx.cuh"
#include "cuda/screen/args.cuh"
#include "cuda/warp.cuh"

namespace sn::cuda {

__device__ __forceinline__ std::uint32_t label_hash(std::int64_t label) {
  const auto bits = static_cast<std::uint64_t>(label);
  return (static_cast<std::uint32_t>(bits) ^ static_cast<std::uint32_t>(bits >> 32)) * 0x9e3779b9u;
}

template <int kThreads>
class QueueOrder {
 public:
  static constexpr int kBucketBits = 9;
  static constexpr int kClassBuckets = 1 << kBucketBits;
  static constexpr int kBuckets = 2 * kClassBuckets;
  static constexpr int kLaneBuckets = kBuckets / kWarpSize;
  static constexpr int kWarps = kThreads / kWarpSize;
  static constexpr int kLoads = 8;  // of a thread, under way at once
  static constexpr int kCutBuckets = 2;
  static constexpr int kVotes = 2 * kCutBuckets * kWarps;
  static constexpr int kBytes =
      shared_bytes<std::uint32_t>(kBuckets + 1) + shared_bytes<std::uint32_t>(kVotes) + shared_bytes<std::uint32_t>(1);

  __device__ __forceinline__ explicit QueueOrder(SharedArena& arena)
      : sBegins_(arena.take<std::uint32_t>(kBuckets + 1)),
        sVotes_(arena.take<std::uint32_t>(kVotes)),
        sFound_(arena.take<std::uint32_t>(1)) {}

  // The whole block. Ends with a barrier.
  __device__ __forceinline__ void count(const RefineArgs& args, int queued) {
    for (int bucket = thread_id(); bucket < kBuckets; bucket += kThreads) sBegins_.set(bucket, 0u);
    sync_block();
    for (int first = 0; first < queued; first += kLoads * kThreads) {
      Loaded rows(args, queued, first);
#pragma unroll
      for (int l = 0; l < kLoads; ++l) {
        if (rows.bucket[l] >= 0) sBegins_.atomic_add(rows.bucket[l], 1u);
      }
    }
    sync_block();
    if (warp_id() == 0) {
      std::uint32_t mine = 0;
      for (int b = 0; b < kLaneBuckets; ++b) mine += sBegins_.get(lane_id() * kLaneBuckets + b);
      std::uint32_t begin = prefix_sum(mine) - mine;
      for (int b = 0; b < kLaneBuckets; ++b) {
        const int bucket = lane_id() * kLaneBuckets + b;
        const std::uint32_t size = sBegins_.get(bucket);
        sBegins_.set(bucket, begin);
        begin += size;
      }
      if (lane_id() == kWarpSize - 1) sBegins_.set(kBuckets, begin);
    }
    sync_block();
  }
  // Rows that need their support set: they have the first ranks.
  __device__ __forceinline__ int support_rows() const { return static_cast<int>(sBegins_.get(kClassBuckets)); }

  // The entries with ranks [first, last), in some order. The whole block. Ends with a barrier.
  __device__ __forceinline__ void take(const RefineArgs& args, int queued, int first, int last,
                                       const Shared<std::int32_t>& sEntries) {
    const auto begin = static_cast<std::uint32_t>(first);
    const auto end = static_cast<std::uint32_t>(last);
    if (thread_id() == 0) sFound_.set(0, 0u);
    sync_block();
    std::uint32_t earlier[kCutBuckets] = {0u, 0u};  // rows so far of the buckets that the first and the last rank cut
    for (int q = 0; q < queued; q += kLoads * kThreads) {
      const Loaded rows(args, queued, q);
#pragma unroll
      for (int l = 0; l < kLoads; ++l) {
        if (q + l * kThreads >= queued) break;
        const std::uint32_t low = rows.bucket[l] < 0 ? end : sBegins_.get(rows.bucket[l]);
        const std::uint32_t high = rows.bucket[l] < 0 ? end : sBegins_.get(rows.bucket[l] + 1);
        const bool meets = low < end && high > begin;
        const bool cut[kCutBuckets] = {meets && low < begin, meets && low >= begin && high > end};
        std::uint32_t rank = low;
        bool inside = meets;
        const int set = (l & 1) * kCutBuckets * kWarps;
#pragma unroll
        for (int c = 0; c < kCutBuckets; ++c) {
          const std::uint32_t votes = ballot(cut[c]);
          if (cut[c]) rank += earlier[c] + static_cast<std::uint32_t>(popcount(votes & lanes_below()));
          if (lane_id() == 0) sVotes_.set(set + c * kWarps + warp_id(), static_cast<std::uint32_t>(popcount(votes)));
        }
        // Two sets of words: whoever still reads one has not passed the next round's barrier.
        sync_block();
#pragma unroll
        for (int c = 0; c < kCutBuckets; ++c) {
#pragma unroll
          for (int warp = 0; warp < kWarps; ++warp) {
            const std::uint32_t votes = sVotes_.get(set + c * kWarps + warp);
            if (cut[c] && warp < warp_id()) rank += votes;
            earlier[c] += votes;
          }
          if (cut[c]) inside = rank >= begin && rank < end;
        }
        if (inside) sEntries.set(static_cast<int>(sFound_.atomic_add(0, 1u)), rows.entry[l]);
      }
    }
    sync_block();
  }

 private:
  struct Loaded {
    std::int32_t entry[kLoads];
    int bucket[kLoads];  // -1: none
    __device__ __forceinline__ Loaded(const RefineArgs& args, int queued, int first) {
#pragma unroll
      for (int l = 0; l < kLoads; ++l) {
        const int q = first + l * kThreads + thread_id();
        entry[l] = q < queued ? args.gQueue[q] : -1;
      }
#pragma unroll
      for (int l = 0; l < kLoads; ++l) {
        bucket[l] = -1;
        if (entry[l] < 0) continue;
        const std::int64_t label = load(args.forward.anchor_labels + args.row_begin + (entry[l] >> kNeedBits));
        bucket[l] = static_cast<int>(label_hash(label) >> (32 - kBucketBits)) +
                    ((entry[l] & kNeedSupport) != 0 ? 0 : kClassBuckets);
      }
    }
  };

  Shared<std::uint32_t> sBegins_;  // [kBuckets + 1]
  Shared<std::uint32_t> sVotes_;   // [2][kCutBuckets][kWarps]
  Shared<std::uint32_t> sFound_;
};

}  // namespace sn::cuda
