// A block computes partial sums, over one slice of D, of a tile of 64 anchors against 64 candidates. The direct path
// and the fallback share it; the fallback has short stages, which leave it room, and gathers its rows.
//
// 256 threads have 4 x 4 pairs each. A warp covers 4 x 8 threads: a read of 16 bytes along D touches 8 candidates (all
// banks once, since rows lie at odd multiples of 16 bytes) or 4 anchors (each read by 8 lanes at once), so 8 reads
// serve the products of 64 pairs. Rows of a thread are 16 apart, so neighbouring lanes have neighbouring rows.
//
// A slice has at most 4 chunks, and their sums are finished one after the other. The tree over them therefore needs one
// open subtree a level, as a binary counter does: chunk c closes the subtrees of the trailing ones of c. Two levels of
// 16 sums stay in registers; a third level would leave no room for two blocks on a multiprocessor.
//
// NaN and Inf are looked for where they show: the sum of a chunk is finite unless an element is not, or a difference
// overflowed. Only then does a thread check its elements one by one. Every element of both tiles meets some element of
// the other, if only a zero of the padding, so nothing is missed whatever N and M are.
#pragma once

#include <cstdint>
#include <type_traits>

#include "cuda/direct_sum.cuh"
#include "cuda/memory.cuh"
#include "cuda/plan/plan_types.h"
#include "cuda/plan/sizes.h"
#include "cuda/ptx.cuh"

namespace sn::cuda {

template <class T>
__device__ __forceinline__ float widen_bits(std::uint16_t bits) {
  if constexpr (std::is_same_v<T, Half>) {
    return widen(half_from_bits(bits));
  } else {
    return widen(bfloat16_from_bits(bits));
  }
}

// Elements of a row in shared memory that are read at once: more would not fit the registers.
template <class T>
inline constexpr int kFewElements = Pack<T>::kElements < 4 ? Pack<T>::kElements : 4;

// So many consecutive ones from a multiple of as many on, widened.
template <class T>
__device__ __forceinline__ void read_few(const Shared<T>& sRow, int at, Acc<T> (&rFew)[kFewElements<T>]) {
  if constexpr (sizeof(T) == 2) {
    const std::uint64_t bits = sRow.template view<std::uint64_t>().get(at / kFewElements<T>);
#pragma unroll
    for (int e = 0; e < kFewElements<T>; ++e) rFew[e] = widen_bits<T>(static_cast<std::uint16_t>(bits >> 16 * e));
  } else {
    const Pack<T> rPack = sRow.get_pack(at);
#pragma unroll
    for (int e = 0; e < kFewElements<T>; ++e) rFew[e] = rPack.elements[e];
  }
}

// Elements [0, here) of a chunk join the sums of kX rows with kZ: rows lie so many elements apart. kTrips: of the loop,
// whose loads are under way together.
template <int kTrips, class T, int kX, int kZ>
__device__ __forceinline__ void add_rows(const Shared<T>& sX, int x_apart, const Shared<T>& sZ, int z_apart, int here,
                                         Acc<T> (&rSums)[kX][kZ]) {
  constexpr int kFew = kFewElements<T>;
#pragma unroll kTrips
  for (int at = 0; at < here; at += kFew) {
    Acc<T> rX[kX][kFew];
#pragma unroll
    for (int i = 0; i < kX; ++i) read_few(sX, i * x_apart + at, rX[i]);
#pragma unroll
    for (int j = 0; j < kZ; ++j) {
      Acc<T> rZ[kFew];
      read_few(sZ, j * z_apart + at, rZ);
#pragma unroll
      for (int e = 0; e < kFew; ++e) {
#pragma unroll
        for (int i = 0; i < kX; ++i) rSums[i][j] = chunk_sum_step(rSums[i][j], rX[i][e], rZ[e]);
      }
    }
  }
}

// Rows of a matrix, from the first one of a tile.
template <class T>
struct TileRows {
  const T* gFirst;
  std::int64_t row_stride;
  std::int64_t rows;  // that exist; the tile's others are zero

  __device__ __forceinline__ bool has(int row) const { return row < rows; }
  __device__ __forceinline__ const T* at(int row) const { return gFirst + row * row_stride; }
};
// Rows by their numbers, -1: none.
template <class T>
struct GatheredRows {
  const T* gFirst;
  std::int64_t row_stride;
  Shared<std::int32_t> sNumbers;

  __device__ __forceinline__ bool has(int row) const { return sNumbers.get(row) >= 0; }
  __device__ __forceinline__ const T* at(int row) const { return gFirst + sNumbers.get(row) * row_stride; }
};

inline constexpr int kLongStage = 256;  // bytes of a row in a stage

// kChecked: looks for NaN and Inf.
template <class T, int kStageBytes = kLongStage, bool kChecked = true>
class Tile {
 public:
  using A = Acc<T>;
  static constexpr int kRows = static_cast<int>(kDirectTile);
  static constexpr int kThreads = 256;
  static constexpr int kSide = 16;  // threads along each side of the tile
  static constexpr int kPairs = kRows / kSide;
  static constexpr int kLanesAcross = 8;
  static constexpr int kLanesDown = kWarpSize / kLanesAcross;
  static constexpr int kWarpsAcross = kSide / kLanesAcross;
  static constexpr int kPack = Pack<T>::kElements;
  static constexpr int kStageFits = kStageBytes / static_cast<int>(sizeof(T));
  static constexpr int kStage = kStageFits < kChunk ? kStageFits : kChunk;
  static constexpr int kChunkStages = kChunk / kStage;
  static constexpr int kFew = kFewElements<T>;
  static constexpr int kStages = 2;
  static constexpr int kPitch = kStage + kPack;
  static constexpr int kStageElements = 2 * kRows * kPitch;
  static constexpr int kElements = kStages * kStageElements;  // of T, in shared memory
  static constexpr int kLevels = 2;
  static_assert(kSide * kSide == kThreads && kPairs * kSide == kRows);
  static_assert(kThreads / kWarpSize == kWarpsAcross * (kSide / kLanesDown));
  static_assert(kChunk % kStage == 0);
  static_assert((kPitch / kPack) % 2 == 1, "odd pitches have no bank conflicts");
  static_assert(kStageBytes != kLongStage || kStage / kFew == 16, "trips that .ci/cuda_instructions.py multiplies by");
  static_assert((kChunk << kLevels) == kLargestSlice, "one open subtree a level");

  __device__ __forceinline__ explicit Tile(Shared<T> sMine) : sStages_(sMine) {}

  // Row (column) of this thread's pairs [i][j] in the tile.
  __device__ __forceinline__ static int row_of(int i) {
    return warp_id() / kWarpsAcross * kLanesDown + lane_id() / kLanesAcross + kSide * i;
  }
  __device__ __forceinline__ static int column_of(int j) {
    return warp_id() % kWarpsAcross * kLanesAcross + lane_id() % kLanesAcross + kSide * j;
  }

  // The sums over elements [begin, end) of D, end - begin <= kLargestSlice, into rSums. Returns whether this thread saw
  // an element that is not finite. Ends behind a barrier: the shared memory is free again.
  template <class Rows>
  __device__ __forceinline__ bool sums(const Rows& x, const Rows& z, std::int64_t begin, std::int64_t end, bool aligned,
                                       A (&rSums)[kPairs][kPairs]) const {
    const int length = static_cast<int>(end - begin);
    const int stages = (length + kStage - 1) / kStage;
    A rOpen[kLevels][kPairs][kPairs];
    fill(rSums);
#pragma unroll
    for (int level = 0; level < kLevels; ++level) fill(rOpen[level]);
    bool nonfinite = false;
    if (stages > 0) stage_rows(x, z, begin, length, aligned, 0);
    async_commit();
#pragma unroll 1
    for (int stage = 0; stage < stages; ++stage) {
      if (stage + 1 < stages) stage_rows(x, z, begin, length, aligned, stage + 1);
      async_commit();
      async_wait<1>();
      sync_block();
      const int here = length - stage * kStage < kStage ? length - stage * kStage : kStage;
      add_stage(stage, here, rSums);
      if constexpr (kChecked) {
        if (!all_finite(rSums)) nonfinite = nonfinite || !elements_finite(stage, here);
      }
      if ((stage + 1) % kChunkStages == 0 || stage + 1 == stages) {
        close_chunk(stage / kChunkStages, stage + 1 == stages, rSums, rOpen);
      }
      sync_block();  // the stage is filled anew in the next round
    }
    async_wait<0>();
    return nonfinite;
  }

 private:
  using Sums = A[kPairs][kPairs];

  __device__ __forceinline__ static void fill(Sums& rSums) {
#pragma unroll
    for (int i = 0; i < kPairs; ++i) {
#pragma unroll
      for (int j = 0; j < kPairs; ++j) rSums[i][j] = A(0);
    }
  }
  __device__ __forceinline__ static void add_to(Sums& rSums, const Sums& rOther) {
#pragma unroll
    for (int i = 0; i < kPairs; ++i) {
#pragma unroll
      for (int j = 0; j < kPairs; ++j) rSums[i][j] = add(rOther[i][j], rSums[i][j]);
    }
  }
  __device__ __forceinline__ static void move_to(Sums& rTarget, Sums& rSums) {
#pragma unroll
    for (int i = 0; i < kPairs; ++i) {
#pragma unroll
      for (int j = 0; j < kPairs; ++j) rTarget[i][j] = rSums[i][j];
    }
    fill(rSums);
  }
  __device__ __forceinline__ static bool all_finite(const Sums& rSums) {
    bool finite = true;
#pragma unroll
    for (int i = 0; i < kPairs; ++i) {
#pragma unroll
      for (int j = 0; j < kPairs; ++j) finite = finite && is_finite(rSums[i][j]);
    }
    return finite;
  }

  // Rows of the anchors (side 0) or candidates (side 1) in shared memory.
  __device__ __forceinline__ Shared<T> staged(int stage, int side) const {
    return sStages_.offset((stage % kStages * 2 + side) * kRows * kPitch);
  }

  // Starts the copies of one stage of both tiles. Does not end the group of copies.
  template <class Rows>
  __device__ __forceinline__ void stage_rows(const Rows& x, const Rows& z, std::int64_t begin, int length, bool aligned,
                                             int stage) const {
    copy_rows(x, begin, length, aligned, stage, staged(stage, 0));
    copy_rows(z, begin, length, aligned, stage, staged(stage, 1));
  }
  template <class Rows>
  __device__ __forceinline__ static void copy_rows(const Rows& from, std::int64_t begin, int length, bool aligned,
                                                   int stage, const Shared<T>& sTarget) {
    constexpr int kRowPacks = kStage / kPack;
    constexpr int kRowsAtOnce = kThreads / kRowPacks;
    static_assert(kThreads % kRowPacks == 0 && kRows % kRowsAtOnce == 0);
    const int column = thread_id() % kRowPacks * kPack;
    const int remain = length - (stage * kStage + column);
#pragma unroll
    for (int pass = 0; pass < kRows / kRowsAtOnce; ++pass) {
      const int row = pass * kRowsAtOnce + thread_id() / kRowPacks;
      const bool present = remain > 0 && from.has(row);
      const T* gSource = present ? from.at(row) + begin + stage * kStage + column : from.gFirst;
      if (!present || (aligned && remain >= kPack)) {
        async_copy16(sTarget, row * kPitch + column, gSource, present);
        continue;
      }
      Pack<T> rPack;
#pragma unroll
      for (int e = 0; e < kPack; ++e) rPack.elements[e] = e < remain ? load(gSource + e) : narrow<T>(A(0));
      sTarget.set_pack(row * kPitch + column, rPack);
    }
  }

  __device__ __forceinline__ void add_stage(int stage, int here, Sums& rSums) const {
    const Shared<T> sX = staged(stage, 0).offset(row_of(0) * kPitch);
    const Shared<T> sZ = staged(stage, 1).offset(column_of(0) * kPitch);
    add_rows<1>(sX, kSide * kPitch, sZ, kSide * kPitch, here, rSums);
  }

  // Whether all elements of this thread's rows are finite.
  __device__ bool elements_finite(int stage, int here) const {
    bool finite = true;
    for (int i = 0; i < kPairs; ++i) {
      const Shared<T> sX = staged(stage, 0).offset((row_of(0) + i * kSide) * kPitch);
      const Shared<T> sZ = staged(stage, 1).offset((column_of(0) + i * kSide) * kPitch);
      for (int at = 0; at < here; ++at) finite = finite && is_finite(sX.get(at)) && is_finite(sZ.get(at));
    }
    return finite;
  }

  // The chunk's sums join the tree; after the last chunk rSums is the slice's.
  __device__ __forceinline__ static void close_chunk(int chunk, bool last, Sums& rSums, Sums (&rOpen)[kLevels]) {
    static_assert(kLevels == 2, "one case a level, so that every index is a constant");
    if ((chunk & 1) != 0) {
      add_to(rSums, rOpen[0]);
    } else if (!last) {
      return move_to(rOpen[0], rSums);
    }
    if ((chunk & 2) != 0) {
      add_to(rSums, rOpen[1]);
    } else if (!last) {
      return move_to(rOpen[1], rSums);
    }
  }

  Shared<T> sStages_;
};

}  // namespace sn::cuda
