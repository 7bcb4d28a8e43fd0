// Rows of features that a warp gathers: a slice of a row over its lanes, lists of edges, sums of chunks.
#pragma once

#include <cstdint>

#include "cuda/backward/graph.cuh"
#include "cuda/memory.cuh"
#include "cuda/ptx.cuh"

namespace sn::cuda {

// Registers of a lane for rows under way: what 80 registers leave. Half-precision rows need twice the addresses.
template <typename T>
inline constexpr int kRowRegisters = sizeof(T) == 2 ? 20 : (sizeof(T) == 4 ? 32 : 24);

// The elements of a row's slice that a lane works on. kVector: packs of 16 bytes, neighbouring lanes side by side,
// each whole or beyond D. Otherwise the same number of single elements, neighbouring lanes side by side. Elements
// beyond D are loaded from the beginning of the lane's part, or of the row: loads need no conditions, and these values
// are never stored.
template <typename T, int kPacks, bool kVector>
struct RowStrip {
  using Acc = sn::cuda::Acc<T>;
  static constexpr int kPack = Pack<T>::kElements;
  static constexpr int kValues = kPacks * kPack;
  static constexpr int kRegisters = kVector ? 4 * kPacks : kValues * (sizeof(T) > 4 ? 2 : 1);
  static constexpr int kRows = kRowRegisters<T> / kRegisters;  // under way at once
  static_assert(kRows >= 2);

  std::int64_t begin;  // first element
  int step;            // between packs, or elements
  int left;            // elements from `begin` to D; not more than 0: nothing to do

  __device__ __forceinline__ RowStrip(std::int64_t dims, std::int64_t slice_begin, int row_shift) {
    const int sub = lane_id() & ((1 << row_shift) - 1);
    begin = slice_begin + (kVector ? sub * kPack : sub);
    step = (kVector ? kPack : 1) << row_shift;
    constexpr int kMost = kValues * kWarpSize;
    left = static_cast<int>(dims - begin < kMost ? dims - begin : kMost);
    if (left <= 0) begin = 0;
  }

  // `row`: where the strip begins in it.
  __device__ __forceinline__ void load_row(Pack<T> (&rRow)[kPacks], const T* row) const {
#pragma unroll
    for (int p = 0; p < kPacks; ++p) {
      if constexpr (kVector) {
        rRow[p] = load_pack(row + (p * step < left ? p * step : 0));
      } else {
#pragma unroll
        for (int e = 0; e < kPack; ++e) {
          const int at = (p * kPack + e) * step;
          rRow[p].elements[e] = load(row + (at < left ? at : 0));
        }
      }
    }
  }

  __device__ __forceinline__ void store_row(T* row, const Acc (&rSum)[kValues]) const {
#pragma unroll
    for (int p = 0; p < kPacks; ++p) {
      if constexpr (kVector) {
        Pack<T> pack;
#pragma unroll
        for (int e = 0; e < kPack; ++e) pack.elements[e] = narrow<T>(rSum[p * kPack + e]);
        if (p * step < left) store_pack(row + p * step, pack);
      } else {
#pragma unroll
        for (int e = 0; e < kPack; ++e) {
          const int at = (p * kPack + e) * step;
          if (at < left) row[at] = narrow<T>(rSum[p * kPack + e]);
        }
      }
    }
  }
};

// Edges that a warp is about to gather.
template <typename Acc>
struct EdgeList {
  Shared<std::int32_t> sources;
  Shared<Acc> weights;

  __device__ __forceinline__ void append(int& count, bool valid, std::int32_t source, Acc weight) const {
    const std::uint32_t taken = ballot(valid);
    if (valid) {
      const int at = count + popcount(taken & lanes_below());
      sources.set(at, source);
      weights.set(at, weight);
    }
    count += popcount(taken);
  }
};

// kRows edges from `first` on, of each group of lanes. kFull: all of them exist.
template <bool kFull, typename T, int kPacks, bool kVector>
__device__ __forceinline__ void gather_rows(const RowStrip<T, kPacks, kVector>& strip, const EdgeList<Acc<T>>& list,
                                            int count, int first, int groups, const T* other, std::int64_t stride,
                                            const Acc<T> (&rOwn)[kPacks * Pack<T>::kElements],
                                            Acc<T> (&rSum)[kPacks * Pack<T>::kElements]) {
  using Row = RowStrip<T, kPacks, kVector>;
  Pack<T> rRows[Row::kRows][kPacks];
#pragma unroll
  for (int r = 0; r < Row::kRows; ++r) {
    const int edge = first + r * groups;
    if (kFull || edge < count) {
      strip.load_row(rRows[r], other + list.sources.get(edge) * stride);
    } else {
#pragma unroll
      for (int p = 0; p < kPacks; ++p) rRows[r][p] = Pack<T>{};
    }
  }
#pragma unroll
  for (int r = 0; r < Row::kRows; ++r) {
    const int edge = first + r * groups;
    if (kFull || edge < count) {
      const auto weight = list.weights.get(edge);
#pragma unroll
      for (int v = 0; v < Row::kValues; ++v) {
        const auto value = widen(rRows[r][v / Row::kPack].elements[v % Row::kPack]);
        rSum[v] = fused_multiply_add(weight, subtract(rOwn[v], value), rSum[v]);
      }
    }
  }
}

// Adds the edges of the list to rSum. The list is complete when this is called, and free when it returns.
template <typename T, int kPacks, bool kVector>
__device__ __forceinline__ void gather_list(const RowStrip<T, kPacks, kVector>& strip, int row_shift,
                                            const EdgeList<Acc<T>>& list, int count, const T* own, const T* other,
                                            std::int64_t stride, Acc<T> (&rSum)[kPacks * Pack<T>::kElements]) {
  using Row = RowStrip<T, kPacks, kVector>;
  using Acc = typename Row::Acc;
  sync_warp();
  if (count > 0) {
    Acc rOwn[Row::kValues];
    {
      Pack<T> rRow[kPacks];
      strip.load_row(rRow, own);
#pragma unroll
      for (int v = 0; v < Row::kValues; ++v) rOwn[v] = widen(rRow[v / Row::kPack].elements[v % Row::kPack]);
    }
    const int groups = kWarpSize >> row_shift;
    const int group = lane_id() >> row_shift;
    int first = 0;
    for (; first + Row::kRows * groups <= count; first += Row::kRows * groups) {
      gather_rows<true>(strip, list, count, first + group, groups, other, stride, rOwn, rSum);
    }
    if (first < count) gather_rows<false>(strip, list, count, first + group, groups, other, stride, rOwn, rSum);
  }
  sync_warp();
}

// Sums of a warp's lanes in shared memory, each lane's own in packs.
template <typename Acc, int kValues>
struct LaneSums {
  static constexpr int kPack = Pack<Acc>::kElements;
  static constexpr int kWarpElements = kValues * kWarpSize;
  static_assert(kValues % kPack == 0);

  static __device__ __forceinline__ void store(const Shared<Acc>& sums, int warp, const Acc (&rSum)[kValues]) {
#pragma unroll
    for (int p = 0; p < kValues / kPack; ++p) {
      Pack<Acc> pack;
#pragma unroll
      for (int e = 0; e < kPack; ++e) pack.elements[e] = rSum[p * kPack + e];
      sums.set_pack(warp * kWarpElements + (p * kWarpSize + lane_id()) * kPack, pack);
    }
  }
  // rSum = the stored sums + rSum.
  static __device__ __forceinline__ void add_to(const Shared<Acc>& sums, int warp, Acc (&rSum)[kValues]) {
#pragma unroll
    for (int p = 0; p < kValues / kPack; ++p) {
      const Pack<Acc> pack = sums.get_pack(warp * kWarpElements + (p * kWarpSize + lane_id()) * kPack);
#pragma unroll
      for (int e = 0; e < kPack; ++e) rSum[p * kPack + e] = add(pack.elements[e], rSum[p * kPack + e]);
    }
  }
};

}  // namespace sn::cuda
