// What the lanes of a warp do together, beyond one instruction.
#pragma once

#include <cstdint>

#include "cuda/ptx.cuh"

namespace sn::cuda {

// The sum of the values of this lane and of all lanes below it.
__device__ __forceinline__ std::uint32_t prefix_sum(std::uint32_t value) {
#pragma unroll
  for (int distance = 1; distance < kWarpSize; distance *= 2) {
    const std::uint32_t below = shuffle_up(value, distance);
    if (lane_id() >= distance) value += below;
  }
  return value;
}

}  // namespace sn::cuda
