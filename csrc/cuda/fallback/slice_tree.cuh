// The sums of a tile over all of D, from its slices. Slices of 256 elements are subtrees of a section: a thread's open
// subtrees of them, one a level as in tile.cuh, and the total of the sections are kept in shared memory, where only
// that thread reads them. A read and a write a pair for each slice.
#pragma once

#include <cstdint>

#include "cuda/memory.cuh"
#include "cuda/plan/sizes.h"
#include "cuda/ptx.cuh"

namespace sn::cuda {

__host__ __device__ constexpr std::int64_t tile_slices(std::int64_t dims) {
  return (dims + kLargestSlice - 1) / kLargestSlice;
}
inline constexpr int kSectionSlices = static_cast<int>(kSection / kLargestSlice);

template <class TileT>
class SliceTree {
 public:
  using A = typename TileT::A;
  static constexpr int kPairs = TileT::kPairs;
  static constexpr int kThreads = TileT::kThreads;
  static constexpr int kPlane = kPairs * kPairs * kThreads;
  static constexpr int kLevels = 3;
  static_assert(1 << kLevels == kSectionSlices);
  using Sums = A[kPairs][kPairs];

  // Shared memory: levels of the tree over slices that D needs, and the total of several sections.
  __host__ __device__ static constexpr int elements(std::int64_t dims) {
    int planes = 0;
    while (planes < kLevels && (std::int64_t{1} << planes) < tile_slices(dims)) ++planes;
    return (planes + (dims > kSection ? 1 : 0)) * kPlane;
  }

  __device__ __forceinline__ explicit SliceTree(const Shared<A>& sPlanes) : sPlanes_(sPlanes) {}

  // The slice's sums join the tree of their section, and a whole section's the total; after the last slice rSums is it.
  __device__ __forceinline__ void close(int slice, bool last, Sums& rSums) const {
    const bool section_ends = last || slice % kSectionSlices == kSectionSlices - 1;
#pragma unroll 1
    for (int level = 0; level < kLevels; ++level) {
      if ((slice >> level & 1) != 0) {
        add_plane(level, rSums);
      } else if (!section_ends) {
        return set_plane(level, rSums);
      }
    }
    if (slice >= kSectionSlices) add_plane(kLevels, rSums);
    if (!last) set_plane(kLevels, rSums);
  }

 private:
  __device__ __forceinline__ static int place(int plane, int i, int j) {
    return plane * kPlane + (i * kPairs + j) * kThreads + thread_id();
  }
  __device__ __forceinline__ void add_plane(int plane, Sums& rSums) const {
#pragma unroll
    for (int i = 0; i < kPairs; ++i) {
#pragma unroll
      for (int j = 0; j < kPairs; ++j) rSums[i][j] = add(sPlanes_.get(place(plane, i, j)), rSums[i][j]);
    }
  }
  __device__ __forceinline__ void set_plane(int plane, const Sums& rSums) const {
#pragma unroll
    for (int i = 0; i < kPairs; ++i) {
#pragma unroll
      for (int j = 0; j < kPairs; ++j) sPlanes_.set(place(plane, i, j), rSums[i][j]);
    }
  }

  Shared<A> sPlanes_;  // [levels][pairs of a thread][kThreads]
};

}  // namespace sn::cuda
