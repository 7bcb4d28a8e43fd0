// Every intrinsic and PTX instruction that the kernels use has one wrapper: those of a thread and its warp stand here,
// memory.cuh has memory, tensor_core.cuh the tensor cores. Kernels call nothing else of the toolkit, so the same
// sources also compile for the host harness (tests/simt), which checks indices, tails, barriers and races on a machine
// without a GPU. With SN_SIMT defined, the names below come from the harness.
//
// What a wrapper promises holds on both sides:
//
// - What exchanges values within a warp is called by all 32 lanes together.
//
// - A shuffle, vote or reduction orders no memory. Data in shared memory passes between lanes of a warp behind
//   sync_warp(), between warps behind sync_block(), between blocks of a cluster behind sync_cluster().
//
// - Of a kernel that is launched to start before the one ahead of it in the stream has ended (LaunchShape::dependent)
//   every thread calls wait_for_primary(), before it reads or writes any global memory.
//
// - Shared memory is reached through Shared<T> alone, taken from a SharedArena.
//
// - Global memory that another block of the same launch writes is read with atomic_load.
#pragma once

#include <cstddef>
#include <cstdint>
#include <type_traits>

#include "cuda/platform.h"

#if !defined(SN_SIMT)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#endif

namespace sn::cuda {

inline constexpr int kWarpSize = 32;
inline constexpr unsigned kFullWarp = 0xffffffffu;
inline constexpr int kPackBytes = 16;                   // the widest access a lane can make
inline constexpr std::int64_t kMaxBlocks = 0x7fffffff;  // of a grid along x
inline constexpr int kMaxThreads = 1024;                // of a block
inline constexpr int kPlainSharedBytes = 48 * 1024;     // of a block that has not asked for more
inline constexpr int kPortableCluster = 8;              // blocks of a cluster, on any device that has clusters
inline constexpr int kMaxCluster = 16;

template <typename T, int kBytes = kPackBytes>
struct alignas(kBytes) Pack {
  static_assert(kBytes == kPackBytes || kBytes == kPackBytes / 2);
  static constexpr int kElements = kBytes / static_cast<int>(sizeof(T));
  T elements[kElements];
};

// The bytes that SharedArena::take<T>(count) consumes, for the sizes of launches.
template <typename T>
__host__ __device__ constexpr int shared_bytes(int count) {
  return (count * static_cast<int>(sizeof(T)) + kPackBytes - 1) / kPackBytes * kPackBytes;
}

}  // namespace sn::cuda

#if defined(SN_SIMT)
#include "simt_device.h"
#else

namespace sn::cuda {

using Half = __half;
using BFloat16 = __nv_bfloat16;

// ---- where a thread is ----------------------------------------------------------------------------------------------

__device__ __forceinline__ int thread_id() {
  return static_cast<int>(threadIdx.x);
}
__device__ __forceinline__ int thread_count() {
  return static_cast<int>(blockDim.x);
}
__device__ __forceinline__ int lane_id() {
  return thread_id() % kWarpSize;
}
__device__ __forceinline__ int warp_id() {
  return thread_id() / kWarpSize;
}
__device__ __forceinline__ std::int64_t block_id() {
  return static_cast<std::int64_t>(blockIdx.x);
}
__device__ __forceinline__ std::int64_t block_count() {
  return static_cast<std::int64_t>(gridDim.x);
}

// The instructions of a cluster exist from compute capability 9.0 on; a kernel that has them compiles everywhere and is
// only launched where they do.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
#define SN_HAS_CLUSTERS 1
#else
#define SN_HAS_CLUSTERS 0
#endif
inline constexpr bool kHasClusters = SN_HAS_CLUSTERS != 0;

__device__ __forceinline__ int cluster_rank() {
#if SN_HAS_CLUSTERS
  std::uint32_t rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return static_cast<int>(rank);
#else
  __trap();
  return 0;
#endif
}
__device__ __forceinline__ int cluster_size() {
#if SN_HAS_CLUSTERS
  std::uint32_t size;
  asm("mov.u32 %0, %%cluster_nctarank;" : "=r"(size));
  return static_cast<int>(size);
#else
  __trap();
  return 1;
#endif
}

// ---- barriers -------------------------------------------------------------------------------------------------------

__device__ __forceinline__ void sync_warp() {
  __syncwarp();
}
__device__ __forceinline__ void sync_block() {
  __syncthreads();
}
// All threads of all blocks of the cluster.
__device__ __forceinline__ void sync_cluster() {
#if SN_HAS_CLUSTERS
  asm volatile(
      "barrier.cluster.arrive.release.aligned;\n"
      "barrier.cluster.wait.acquire.aligned;" ::
          : "memory");
#else
  __trap();
#endif
}
// The two halves of a barrier of the cluster that orders no memory: it only tells that every thread has come so far. A
// block that others read arrives and, before it leaves, waits; its shared memory lives until they have arrived, too.
__device__ __forceinline__ void arrive_cluster_relaxed() {
#if SN_HAS_CLUSTERS
  asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
#else
  __trap();
#endif
}
__device__ __forceinline__ void wait_cluster() {
#if SN_HAS_CLUSTERS
  asm volatile("barrier.cluster.wait.aligned;" ::: "memory");
#else
  __trap();
#endif
}
// In a dependent launch: until the kernel ahead has ended and what it wrote is seen. Otherwise nothing.
__device__ __forceinline__ void wait_for_primary() {
#if SN_HAS_CLUSTERS  // the same architectures
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
// This block does not mind if a dependent kernel behind this one starts. What it still writes is seen behind that
// kernel's wait_for_primary() all the same.
__device__ __forceinline__ void let_dependents_start() {
#if SN_HAS_CLUSTERS
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
// What this thread wrote before is seen, by any thread of the device, before what it writes after.
__device__ __forceinline__ void fence_device() {
  __threadfence();
}

// ---- exchange within a warp; every lane takes part ------------------------------------------------------------------

template <typename T>
__device__ __forceinline__ T shuffle_xor(T value, int mask) {
  return __shfl_xor_sync(kFullWarp, value, mask);
}
template <typename T>
__device__ __forceinline__ T shuffle(T value, int lane) {
  return __shfl_sync(kFullWarp, value, lane);
}
// From the lane `count` below (above); lanes without one keep their own value.
template <typename T>
__device__ __forceinline__ T shuffle_up(T value, int count) {
  return __shfl_up_sync(kFullWarp, value, static_cast<unsigned>(count));
}
template <typename T>
__device__ __forceinline__ T shuffle_down(T value, int count) {
  return __shfl_down_sync(kFullWarp, value, static_cast<unsigned>(count));
}

__device__ __forceinline__ std::uint32_t ballot(bool vote) {
  return __ballot_sync(kFullWarp, vote ? 1 : 0);
}
__device__ __forceinline__ bool any_lane(bool vote) {
  return __any_sync(kFullWarp, vote ? 1 : 0) != 0;
}
__device__ __forceinline__ bool all_lanes(bool vote) {
  return __all_sync(kFullWarp, vote ? 1 : 0) != 0;
}
// The lanes that hold the same value.
__device__ __forceinline__ std::uint32_t match_any(std::uint32_t value) {
  return __match_any_sync(kFullWarp, value);
}
__device__ __forceinline__ std::uint32_t match_any(std::uint64_t value) {
  return __match_any_sync(kFullWarp, static_cast<unsigned long long>(value));
}
__device__ __forceinline__ std::uint32_t reduce_min(std::uint32_t value) {
  return __reduce_min_sync(kFullWarp, value);
}
__device__ __forceinline__ std::uint32_t reduce_max(std::uint32_t value) {
  return __reduce_max_sync(kFullWarp, value);
}
__device__ __forceinline__ std::uint32_t reduce_add(std::uint32_t value) {
  return __reduce_add_sync(kFullWarp, value);
}
__device__ __forceinline__ std::uint32_t reduce_or(std::uint32_t value) {
  return __reduce_or_sync(kFullWarp, value);
}

// ---- bits -----------------------------------------------------------------------------------------------------------

__device__ __forceinline__ int popcount(std::uint32_t bits) {
  return __popc(bits);
}
// Index of the lowest set bit, -1 if there is none.
__device__ __forceinline__ int find_first(std::uint32_t bits) {
  return __ffs(static_cast<int>(bits)) - 1;
}
__device__ __forceinline__ int leading_zeros(std::uint32_t bits) {
  return __clz(static_cast<int>(bits));
}
__device__ __forceinline__ int leading_zeros(std::uint64_t bits) {
  return __clzll(static_cast<long long>(bits));
}

__device__ __forceinline__ std::uint32_t bits_of(float value) {
  return __float_as_uint(value);
}
__device__ __forceinline__ std::uint16_t bits_of(Half value) {
  return __half_as_ushort(value);
}
__device__ __forceinline__ std::uint16_t bits_of(BFloat16 value) {
  return __bfloat16_as_ushort(value);
}
__device__ __forceinline__ std::uint64_t bits_of(double value) {
  return static_cast<std::uint64_t>(__double_as_longlong(value));
}
__device__ __forceinline__ float float_from_bits(std::uint32_t bits) {
  return __uint_as_float(bits);
}
__device__ __forceinline__ double double_from_bits(std::uint64_t bits) {
  return __longlong_as_double(static_cast<long long>(bits));
}
__device__ __forceinline__ Half half_from_bits(std::uint16_t bits) {
  return __ushort_as_half(bits);
}
__device__ __forceinline__ BFloat16 bfloat16_from_bits(std::uint16_t bits) {
  return __ushort_as_bfloat16(bits);
}

// ---- conversion, round to nearest even ------------------------------------------------------------------------------

__device__ __forceinline__ float widen(float value) {
  return value;
}
__device__ __forceinline__ double widen(double value) {
  return value;
}
__device__ __forceinline__ float widen(Half value) {
  return __half2float(value);
}
__device__ __forceinline__ float widen(BFloat16 value) {
  return __bfloat162float(value);
}

template <typename T>
__device__ __forceinline__ T narrow(float value) {
  if constexpr (std::is_same_v<T, Half>) {
    return __float2half_rn(value);
  } else if constexpr (std::is_same_v<T, BFloat16>) {
    return __float2bfloat16_rn(value);
  } else {
    static_assert(std::is_same_v<T, float> || std::is_same_v<T, double>);
    return value;
  }
}
template <typename T>
__device__ __forceinline__ T narrow(double value) {
  if constexpr (std::is_same_v<T, Half>) {
    return __double2half(value);
  } else if constexpr (std::is_same_v<T, BFloat16>) {
    return __double2bfloat16(value);
  } else if constexpr (std::is_same_v<T, float>) {
    return __double2float_rn(value);
  } else {
    static_assert(std::is_same_v<T, double>);
    return value;
  }
}
// Two at once, the first in the low half: what an operand register of mma holds.
template <typename T16>
__device__ __forceinline__ std::uint32_t narrow_pair(float low, float high) {
  std::uint32_t pair;
  if constexpr (std::is_same_v<T16, Half>) {
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  } else {
    static_assert(std::is_same_v<T16, BFloat16>);
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  }
  return pair;
}

// ---- arithmetic, IEEE, never contracted, never flushed to zero ------------------------------------------------------

__device__ __forceinline__ float fused_multiply_add(float a, float b, float c) {
  return __fmaf_rn(a, b, c);
}
__device__ __forceinline__ double fused_multiply_add(double a, double b, double c) {
  return __fma_rn(a, b, c);
}
__device__ __forceinline__ float add(float a, float b) {
  return __fadd_rn(a, b);
}
__device__ __forceinline__ double add(double a, double b) {
  return __dadd_rn(a, b);
}
__device__ __forceinline__ float subtract(float a, float b) {
  return __fsub_rn(a, b);
}
__device__ __forceinline__ double subtract(double a, double b) {
  return __dsub_rn(a, b);
}
__device__ __forceinline__ float multiply(float a, float b) {
  return __fmul_rn(a, b);
}
__device__ __forceinline__ double multiply(double a, double b) {
  return __dmul_rn(a, b);
}
__device__ __forceinline__ float square_root(float value) {
  return __fsqrt_rn(value);
}
__device__ __forceinline__ double square_root(double value) {
  return __dsqrt_rn(value);
}

// Rounded towards +inf (up) or -inf (down).
__device__ __forceinline__ float add_up(float a, float b) {
  return __fadd_ru(a, b);
}
__device__ __forceinline__ float add_down(float a, float b) {
  return __fadd_rd(a, b);
}
__device__ __forceinline__ float multiply_up(float a, float b) {
  return __fmul_ru(a, b);
}
__device__ __forceinline__ float multiply_down(float a, float b) {
  return __fmul_rd(a, b);
}
__device__ __forceinline__ float fma_up(float a, float b, float c) {
  return __fmaf_ru(a, b, c);
}
__device__ __forceinline__ float fma_down(float a, float b, float c) {
  return __fmaf_rd(a, b, c);
}
__device__ __forceinline__ float sqrt_up(float value) {
  return __fsqrt_ru(value);
}
__device__ __forceinline__ float sqrt_down(float value) {
  return __fsqrt_rd(value);
}

// 1 where a is not greater than b, NaN included, else 0: one instruction, and no predicate to turn into a number.
__device__ __forceinline__ float one_unless_greater(float a, float b) {
  float one;
  asm("set.leu.f32.f32 %0, %1, %2;" : "=f"(one) : "f"(a), "f"(b));
  return one;
}

// The smaller (larger); of a NaN and a number the number. +0 is larger than -0.
__device__ __forceinline__ float minimum(float a, float b) {
  return fminf(a, b);
}
__device__ __forceinline__ float maximum(float a, float b) {
  return fmaxf(a, b);
}

}  // namespace sn::cuda

#endif  // SN_SIMT

// ---- the same on both sides -----------------------------------------------------------------------------------------

namespace sn::cuda {

// The lanes below this one.
__device__ __forceinline__ std::uint32_t lanes_below() {
  return (1u << lane_id()) - 1u;
}

// On the bits: comparisons and fmaxf drop NaN, and no optimisation may.
__device__ __forceinline__ bool is_finite(float value) {
  return (bits_of(value) & 0x7f800000u) != 0x7f800000u;
}
__device__ __forceinline__ bool is_finite(double value) {
  return (bits_of(value) & 0x7ff0000000000000u) != 0x7ff0000000000000u;
}
__device__ __forceinline__ bool is_finite(Half value) {
  return (bits_of(value) & 0x7c00u) != 0x7c00u;
}
__device__ __forceinline__ bool is_finite(BFloat16 value) {
  return (bits_of(value) & 0x7f80u) != 0x7f80u;
}
__device__ __forceinline__ bool is_nan(float value) {
  return (bits_of(value) & 0x7fffffffu) > 0x7f800000u;
}
__device__ __forceinline__ bool is_nan(double value) {
  return (bits_of(value) & 0x7fffffffffffffffu) > 0x7ff0000000000000u;
}

// Sums of elements of type T are of this type.
template <class T>
using Acc = std::conditional_t<std::is_same_v<T, double>, double, float>;

template <class A>
__device__ __forceinline__ A infinity() {
  if constexpr (std::is_same_v<A, double>) {
    return double_from_bits(0x7ff0000000000000u);
  } else {
    static_assert(std::is_same_v<A, float>);
    return float_from_bits(0x7f800000u);
  }
}
template <class A>
__device__ __forceinline__ A quiet_nan() {
  if constexpr (std::is_same_v<A, double>) {
    return double_from_bits(0x7ff8000000000000u);
  } else {
    static_assert(std::is_same_v<A, float>);
    return float_from_bits(0x7fc00000u);
  }
}

}  // namespace sn::cuda
