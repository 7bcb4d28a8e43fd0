// The k-th smallest of many values, by a radix search of the whole block.
#pragma once

#include <cstdint>

#include "cuda/memory.cuh"
#include "cuda/ptx.cuh"
#include "cuda/screen/bound.cuh"
#include "cuda/warp.cuh"

namespace sn::cuda {

inline constexpr int kRadixBits = 8;
inline constexpr int kRadixBins = 1 << kRadixBits;
inline constexpr int kRadixPasses = 3;
inline constexpr int kRadixLow = 31 - kRadixPasses * kRadixBits;  // bits of a non-negative float that stay unresolved
inline constexpr std::uint32_t kNoBits = 0xffffffffu;             // no value
inline constexpr std::uint32_t kInfinityBits = 0x7f800000u;

// An upper bound, within a relative 2^-16, of the k-th smallest of the values bits_at(0 .. count - 1), bits of floats
// >= 0 or kNoBits; +inf if there are fewer than k >= 1. The whole block calls it and gets the same value. Others may
// use sBins right before and after.
template <class BitsAt>
__device__ __forceinline__ float kth_smallest(Shared<std::uint32_t> sBins, std::int64_t count, std::int64_t k,
                                              const BitsAt& bits_at) {
  static_assert(kRadixBins % kWarpSize == 0);
  constexpr int kLaneBins = kRadixBins / kWarpSize;
  std::uint32_t prefix = 0;
  auto left = static_cast<std::uint32_t>(k);
  for (int pass = 0; pass < kRadixPasses; ++pass) {
    const int shift = 31 - (pass + 1) * kRadixBits;
    sync_block();
    for (int bin = thread_id(); bin < kRadixBins; bin += thread_count()) sBins.set(bin, 0u);
    sync_block();
    for (std::int64_t first = 0; first < count; first += thread_count()) {
      const std::int64_t e = first + thread_id();
      const std::uint32_t bits = e < count ? bits_at(e) : kNoBits;
      const bool taken = bits != kNoBits && (pass == 0 || bits >> (shift + kRadixBits) == prefix);
      const std::uint32_t bin = taken ? (bits >> shift) & (kRadixBins - 1) : kNoBits;
      if (pass == 0) {
        // Upper bounds share their exponents: one addition for all lanes that have the same.
        const std::uint32_t same = match_any(bin);
        if (taken && (same & lanes_below()) == 0) {
          sBins.atomic_add(static_cast<int>(bin), static_cast<std::uint32_t>(popcount(same)));
        }
      } else if (taken) {
        sBins.atomic_add(static_cast<int>(bin), 1u);
      }
    }
    sync_block();
    // Every warp finds the bin.
    std::uint32_t rBins[kLaneBins];
    std::uint32_t rMine = 0;
#pragma unroll
    for (int b = 0; b < kLaneBins; ++b) {
      rBins[b] = sBins.get(lane_id() * kLaneBins + b);
      rMine += rBins[b];
    }
    const std::uint32_t rUpTo = prefix_sum(rMine);
    const std::uint32_t reached = ballot(rUpTo >= left);
    if (reached == 0) {
      sync_block();
      return kInfinity;
    }
    const int lane = find_first(reached);
    std::uint32_t rBelow = rUpTo - rMine;
    std::uint32_t bin = static_cast<std::uint32_t>(lane_id() * kLaneBins);
    bool found = false;
#pragma unroll
    for (int b = 0; b < kLaneBins; ++b) {
      found = found || rBelow + rBins[b] >= left;
      if (!found) {
        rBelow += rBins[b];
        ++bin;
      }
    }
    left -= shuffle(rBelow, lane);
    prefix = (prefix << kRadixBits) | shuffle(bin, lane);
  }
  sync_block();
  const std::uint32_t bits = (prefix << kRadixLow) | ((1u << kRadixLow) - 1u);
  return bits < kInfinityBits ? float_from_bits(bits) : kInfinity;
}

}  // namespace sn::cuda
