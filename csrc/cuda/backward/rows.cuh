// Rows of features that lanes gather: a slice of a row over them, lists of edges, sums of chunks.
#pragma once

#include <cstdint>

#include "cuda/backward/graph.cuh"
#include "cuda/memory.cuh"
#include "cuda/ptx.cuh"

namespace sn::cuda {

// A target has all lanes of a warp, or half of them (gather.cuh).
inline constexpr int kHalfWarpShift = 4;
inline constexpr int kHalfWarp = 1 << kHalfWarpShift;
static_assert(kWarpSize == 2 * kHalfWarp);

// The lane's number among those of its target, and all of these.
template <int kLanes>
__device__ __forceinline__ int target_lane() {
  static_assert(kLanes == kWarpSize || kLanes == kHalfWarp);
  return kLanes == kWarpSize ? lane_id() : thread_id() & (kHalfWarp - 1);
}
template <int kLanes>
__device__ __forceinline__ std::uint32_t target_lanes() {
  return kLanes == kWarpSize ? kFullWarp : 0xffffu << (thread_id() & kHalfWarp);
}

// Registers of a lane for rows under way: what 80 registers leave. Half-precision rows are twice as many values.
template <typename T>
inline constexpr int kRowRegisters = sizeof(T) == 2 ? 18 : (sizeof(T) == 4 ? 32 : 24);

// The elements of a row's slice that a lane works on: kLaneBytes of them. kVector: packs of 16 bytes, then one of 8
// where 8 bytes are left (or there are no more), neighbouring lanes side by side, each whole or beyond D. Otherwise as
// many single elements, neighbouring lanes side by side. Elements beyond D are loaded from the beginning of the lane's
// part, or of the row: loads need no conditions, and these values are never stored.
template <typename T, int kLaneBytes, bool kVector>
struct RowStrip {
  using Acc = sn::cuda::Acc<T>;
  static constexpr int kRowPackBytes = kLaneBytes < kPackBytes ? kLaneBytes : kPackBytes;
  using RowPack = Pack<T, kRowPackBytes>;
  static constexpr int kPack = RowPack::kElements;
  static constexpr int kValues = kLaneBytes / static_cast<int>(sizeof(T));
  static constexpr int kWholePacks = kValues / kPack;
  static constexpr int kHalfPack = kValues % kPack;  // elements of the last one
  static constexpr bool kHalf = kHalfPack > 0;
  static constexpr int kPacks = kWholePacks + (kHalf ? 1 : 0);
  static_assert(!kHalf || 2 * kHalfPack == kPack);
  static constexpr int kRegisters = kVector ? kLaneBytes / 4 : kValues * (sizeof(T) > 4 ? 2 : 1);
  static constexpr int kFit = kRowRegisters<T> / kRegisters;
  static constexpr int kRows = kFit < 2 ? 2 : kFit < 8 ? kFit : 8;

  std::int64_t begin;  // first element
  int step;            // between packs, or elements
  int half_at;         // the pack of 8 bytes, from `begin` on
  int left;            // elements from `begin` to D; not more than 0: nothing to do

  __device__ __forceinline__ RowStrip(std::int64_t dims, std::int64_t slice_begin, int row_shift) {
    const int sub = lane_id() & ((1 << row_shift) - 1);
    begin = slice_begin + (kVector ? sub * kPack : sub);
    step = (kVector ? kPack : 1) << row_shift;
    half_at = kWholePacks * step - sub * kHalfPack;  // behind all whole ones, half as far apart
    constexpr int kMost = kValues * kWarpSize;
    left = static_cast<int>(dims - begin < kMost ? dims - begin : kMost);
    if (left <= 0) begin = 0;
  }

  // `row`: where the strip begins in it.
  __device__ __forceinline__ void load_row(RowPack (&rRow)[kPacks], const T* row) const {
    if constexpr (kVector) {
#pragma unroll
      for (int p = 0; p < kWholePacks; ++p) {
        rRow[p] = load_pack<T, kRowPackBytes>(row + (p * step < left ? p * step : 0));
      }
      if constexpr (kHalf) {
        const auto half = load_pack<T, kPackBytes / 2>(row + (half_at < left ? half_at : 0));
#pragma unroll
        for (int e = 0; e < kHalfPack; ++e) rRow[kWholePacks].elements[e] = half.elements[e];
      }
    } else {
#pragma unroll
      for (int v = 0; v < kValues; ++v) {
        rRow[v / kPack].elements[v % kPack] = load(row + (v * step < left ? v * step : 0));
      }
    }
  }

  __device__ __forceinline__ void store_row(T* row, const Acc (&rSum)[kValues]) const {
    if constexpr (kVector) {
#pragma unroll
      for (int p = 0; p < kWholePacks; ++p) {
        if (p * step < left) store_values<kRowPackBytes>(row + p * step, rSum, p * kPack);
      }
      if constexpr (kHalf) {
        if (half_at < left) store_values<kPackBytes / 2>(row + half_at, rSum, kWholePacks * kPack);
      }
    } else {
#pragma unroll
      for (int v = 0; v < kValues; ++v) {
        if (v * step < left) row[v * step] = narrow<T>(rSum[v]);
      }
    }
  }

 private:
  template <int kBytes>
  static __device__ __forceinline__ void store_values(T* at, const Acc (&rSum)[kValues], int first) {
    Pack<T, kBytes> pack;
#pragma unroll
    for (int e = 0; e < Pack<T, kBytes>::kElements; ++e) pack.elements[e] = narrow<T>(rSum[first + e]);
    store_pack(at, pack);
  }
};

inline constexpr int kOwnSlots = static_cast<int>(kMergedSlots);  // own edges that a warp holds one a lane
inline constexpr int kList = kEdgeChunk + kOwnSlots;              // edges that a warp gathers in one go
static_assert(kOwnSlots == kWarpSize && kEdgeChunk % kWarpSize == 0);

// Edges that the kLanes lanes of a target are about to gather, those of each group of lanes side by side: edge e is
// number e / groups of group e % groups. So a lane finds all of its edges from one address.
//
// Place: what finds an edge's row. An std::int64_t says where it begins, in bytes: a lane multiplies once for the edge
// that it lists, where else every lane does for every edge. An std::int32_t is the row's number, for kernels
// without the shared memory.
template <typename Acc, typename Place, int kLanes>
struct EdgeList {
  Shared<Place> places;
  Shared<Acc> weights;
  std::int64_t stride;  // of rows: in bytes, or in elements where places are numbers of rows
  int row_shift;        // log2 of the lanes of a group

  __device__ __forceinline__ int groups() const { return kLanes >> row_shift; }
  // What each group has of so many edges, if it is as many. Half a warp is one group.
  __device__ __forceinline__ int share(int edges) const {
    return kLanes < kWarpSize ? edges : (edges << row_shift) / kWarpSize;
  }
  // Where a group's edges begin.
  __device__ __forceinline__ int part(int group) const { return kLanes < kWarpSize ? 0 : group * share(kList); }

  __device__ __forceinline__ void set(int edge, std::int32_t source, Acc weight) const {
    const int at = part(edge & (groups() - 1)) + share(edge);
    places.set(at, static_cast<Place>(sizeof(Place) == 8 ? source * stride : source));
    weights.set(at, weight);
  }
  // By all lanes of the warp.
  __device__ __forceinline__ void append(int& count, bool valid, std::int32_t source, Acc weight) const {
    const std::uint32_t taken = ballot(valid) & target_lanes<kLanes>();
    if (valid) set(count + popcount(taken & lanes_below()), source, weight);
    count += popcount(taken);
  }
  // The row of the edge at `at`, of which `slice` is what the first row has.
  template <typename T>
  __device__ __forceinline__ const T* row(int at, const T* slice) const {
    if constexpr (sizeof(Place) == 4) return slice + places.get(at) * stride;
    return reinterpret_cast<const T*>(reinterpret_cast<const char*>(slice) + places.get(at));
  }
};

// kRows edges of the list from `first` on, of which `left` exist; kFull: all.
template <bool kFull, typename T, int kLaneBytes, bool kVector, typename Place, int kLanes>
__device__ __forceinline__ void gather_rows(const RowStrip<T, kLaneBytes, kVector>& strip,
                                            const EdgeList<Acc<T>, Place, kLanes>& list, int first, int left,
                                            const T* other, const Acc<T> (&rOwn)[kLaneBytes / sizeof(T)],
                                            Acc<T> (&rSum)[kLaneBytes / sizeof(T)]) {
  using Row = RowStrip<T, kLaneBytes, kVector>;
  typename Row::RowPack rRows[Row::kRows][Row::kPacks];
#pragma unroll
  for (int r = 0; r < Row::kRows; ++r) {
    if (kFull || r < left) {
      strip.load_row(rRows[r], list.row(first + r, other));
    } else {
#pragma unroll
      for (int p = 0; p < Row::kPacks; ++p) rRows[r][p] = {};
    }
  }
#pragma unroll
  for (int r = 0; r < Row::kRows; ++r) {
    if (kFull || r < left) {
      const auto weight = list.weights.get(first + r);
#pragma unroll
      for (int v = 0; v < Row::kValues; ++v) {
        const auto value = widen(rRows[r][v / Row::kPack].elements[v % Row::kPack]);
        rSum[v] = fused_multiply_add(weight, subtract(rOwn[v], value), rSum[v]);
      }
    }
  }
}

// Adds the edges of the list to rSum. The list is complete when this is called, and free when it returns. By all lanes
// of the warp.
template <typename T, int kLaneBytes, bool kVector, typename Place, int kLanes>
__device__ __forceinline__ void gather_list(const RowStrip<T, kLaneBytes, kVector>& strip,
                                            const EdgeList<Acc<T>, Place, kLanes>& list, int count, const T* own,
                                            const T* other, Acc<T> (&rSum)[kLaneBytes / sizeof(T)]) {
  using Row = RowStrip<T, kLaneBytes, kVector>;
  using Acc = typename Row::Acc;
  sync_warp();
  if (count > 0) {
    Acc rOwn[Row::kValues];
    {
      typename Row::RowPack rRow[Row::kPacks];
      strip.load_row(rRow, own);
#pragma unroll
      for (int v = 0; v < Row::kValues; ++v) rOwn[v] = widen(rRow[v / Row::kPack].elements[v % Row::kPack]);
    }
    const int group = target_lane<kLanes>() >> list.row_shift;
    const int all = list.share(count + list.groups() - 1);           // of the first group:
    const int mine = list.share(count + list.groups() - 1 - group);  // others have as many, or one less
    const int full = list.share(count) / Row::kRows * Row::kRows;
    const int part = list.part(group);
    for (int at = 0; at < full; at += Row::kRows) {
      gather_rows<true>(strip, list, part + at, Row::kRows, other, rOwn, rSum);
    }
    if (full < all) gather_rows<false>(strip, list, part + full, mine - full, other, rOwn, rSum);
  }
  sync_warp();
}

// Sums of a target's lanes in shared memory, each lane's own: in packs where they fill some, else one by one.
template <typename Acc, int kValues, int kLanes>
struct LaneSums {
  static constexpr int kPack = Pack<Acc>::kElements;
  static constexpr int kElements = kValues * kLanes;
  static constexpr bool kPacked = kValues % kPack == 0;

  // `by`: whose they are, among the targets of the block.
  static __device__ __forceinline__ void store(const Shared<Acc>& sums, int by, const Acc (&rSum)[kValues]) {
    const int first = by * kElements;
    if constexpr (kPacked) {
#pragma unroll
      for (int p = 0; p < kValues / kPack; ++p) {
        Pack<Acc> pack;
#pragma unroll
        for (int e = 0; e < kPack; ++e) pack.elements[e] = rSum[p * kPack + e];
        sums.set_pack(first + (p * kLanes + target_lane<kLanes>()) * kPack, pack);
      }
    } else {
#pragma unroll
      for (int v = 0; v < kValues; ++v) sums.set(first + v * kLanes + target_lane<kLanes>(), rSum[v]);
    }
  }
  // rSum = the stored sums + rSum.
  static __device__ __forceinline__ void add_to(const Shared<Acc>& sums, int by, Acc (&rSum)[kValues]) {
    const int first = by * kElements;
    if constexpr (kPacked) {
#pragma unroll
      for (int p = 0; p < kValues / kPack; ++p) {
        const Pack<Acc> pack = sums.get_pack(first + (p * kLanes + target_lane<kLanes>()) * kPack);
#pragma unroll
        for (int e = 0; e < kPack; ++e) rSum[p * kPack + e] = add(pack.elements[e], rSum[p * kPack + e]);
      }
    } else {
#pragma unroll
      for (int v = 0; v < kValues; ++v) {
        rSum[v] = add(sums.get(first + v * kLanes + target_lane<kLanes>()), rSum[v]);
      }
    }
  }
};

}  // namespace sn::cuda
