// The k-th smallest of many values: by a warp from its registers, by a block through shared memory.
#pragma once

#include <cstdint>

#include "cuda/memory.cuh"
#include "cuda/ptx.cuh"
#include "cuda/warp.cuh"

namespace sn::cuda {

inline constexpr std::uint32_t kNoBits = 0xffffffffu;  // no value
inline constexpr std::uint32_t kInfinityBits = 0x7f800000u;

// How many of the warp's values are not above `limit`. All lanes call it, all get it.
template <int kValues>
__device__ __forceinline__ std::uint32_t count_within(const std::uint32_t (&rValues)[kValues], std::uint32_t limit) {
  std::uint32_t within = 0;
#pragma unroll
  for (int v = 0; v < kValues; ++v) within += rValues[v] <= limit ? 1u : 0u;
  return reduce_add(within);
}

// The k-th smallest of the warp's values, k >= 1: bits of floats >= 0 in rValues of each lane. kInfinityBits if fewer
// than k are finite (kNoBits, no value, and NaN are not). All lanes call it, all get it.
//
// Bisection between values that are there, on bits, which order as the floats do. It ends when it has parted the k-th
// from the next one: bounds of a row differ little, but in their first bits, so that takes 5 to 10 counts where 31 find
// any float; ties take them all.
template <int kValues>
__device__ __forceinline__ std::uint32_t warp_kth_smallest(const std::uint32_t (&rValues)[kValues], std::uint32_t k) {
  std::uint32_t rLeast = kNoBits;
  std::uint32_t rMost = 0;
#pragma unroll
  for (int v = 0; v < kValues; ++v) {
    rLeast = rValues[v] < rLeast ? rValues[v] : rLeast;
    if (rValues[v] < kInfinityBits && rValues[v] > rMost) rMost = rValues[v];
  }
  std::uint32_t low = reduce_min(rLeast);  // the k-th is not below
  // Not above `high`, if it exists: each lane's least value is one of 32.
  std::uint32_t high = k <= static_cast<std::uint32_t>(kWarpSize) ? reduce_max(rLeast) : kNoBits;
  if (high >= kInfinityBits) {
    high = reduce_max(rMost);
    if (low >= kInfinityBits || count_within(rValues, high) < k) return kInfinityBits;
  }
  while (low < high) {
    const std::uint32_t middle = low + (high - low) / 2;
    const std::uint32_t within = count_within(rValues, middle);
    if (within == k) {
      std::uint32_t rLast = 0;
#pragma unroll
      for (int v = 0; v < kValues; ++v) {
        if (rValues[v] <= middle && rValues[v] > rLast) rLast = rValues[v];
      }
      return reduce_max(rLast);
    }
    if (within > k) {
      high = middle;
    } else {
      low = middle + 1;
    }
  }
  return low;
}

// An upper bound of the k-th smallest of the values bits_of(fetch(0 .. count - 1)), bits of floats >= 0 or kNoBits;
// +inf if there are fewer than k >= 1. fetch() loads what bits_of() computes with, so that a batch waits once. The
// whole block calls it and gets the same value. It is the k-th itself up to kStaged values, and beyond that unless more
// than kStaged of them tie with an upper bound of it.
//
// Every warp looks at all staged values, so one barrier serves. Where there are too many, values share places, of which
// the least counts: the k-th smallest place is not below the k-th smallest value. What is above it is left out of a
// second round.
//
// sStage: kStaged words; sWord: one. Others may use both right after; before, behind a barrier.
template <int kStaged, class Fetch, class BitsOf>
__device__ __forceinline__ float kth_smallest(const Shared<std::uint32_t>& sStage, const Shared<std::uint32_t>& sWord,
                                              std::int64_t count, std::uint32_t k, const Fetch& fetch,
                                              const BitsOf& bits_of) {
  static_assert(kStaged % kWarpSize == 0 && (kStaged & (kStaged - 1)) == 0);
  constexpr int kLaneValues = kStaged / kWarpSize;
  std::uint32_t limit = kNoBits;
  auto staged = static_cast<int>(count < kStaged ? count : kStaged);
  if (thread_id() == 0) sWord.set(0, 0u);
  constexpr int kBatch = 4;
  for (std::int64_t first = thread_id(); first < count; first += kBatch * thread_count()) {
    decltype(fetch(first)) rFetched[kBatch];
#pragma unroll
    for (int b = 0; b < kBatch; ++b) {
      const std::int64_t e = first + b * thread_count();
      rFetched[b] = fetch(e < count ? e : first);
    }
#pragma unroll
    for (int b = 0; b < kBatch; ++b) {
      const std::int64_t e = first + b * thread_count();
      // kStaged is a multiple of the number of threads: a thread's places are its own.
      const int place = static_cast<int>(e) & (kStaged - 1);
      const std::uint32_t bits = bits_of(rFetched[b]);
      if (e < count && (e < kStaged || bits < sStage.get(place))) sStage.set(place, bits);
    }
  }
  for (;;) {
    sync_block();
    std::uint32_t rValues[kLaneValues];
#pragma unroll
    for (int v = 0; v < kLaneValues; ++v) {
      const int place = v * kWarpSize + lane_id();
      rValues[v] = place < staged ? sStage.get(place) : kNoBits;
    }
    const std::uint32_t kth = warp_kth_smallest(rValues, k);
    sync_block();
    // The second round may have had more than it could stage, but all of them are within the limit.
    if (count <= kStaged || limit != kNoBits) return float_from_bits(kth < limit ? kth : limit);
    limit = kth;
    if (limit >= kInfinityBits) return float_from_bits(kInfinityBits);
    for (std::int64_t first = 0; first < count; first += thread_count()) {
      const std::int64_t e = first + thread_id();
      const std::uint32_t bits = e < count ? bits_of(fetch(e)) : kNoBits;
      const std::uint32_t kept = ballot(bits <= limit);
      if (kept == 0) continue;
      std::uint32_t begin = 0;
      if (lane_id() == 0) begin = sWord.atomic_add(0, static_cast<std::uint32_t>(popcount(kept)));
      const std::uint32_t place = shuffle(begin, 0) + static_cast<std::uint32_t>(popcount(kept & lanes_below()));
      if (bits <= limit && place < static_cast<std::uint32_t>(kStaged)) sStage.set(static_cast<int>(place), bits);
    }
    sync_block();
    const std::uint32_t all = sWord.get(0);
    staged = all < static_cast<std::uint32_t>(kStaged) ? static_cast<int>(all) : kStaged;
  }
}

}  // namespace sn::cuda
