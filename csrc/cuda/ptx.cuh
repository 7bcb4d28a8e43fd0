// Every intrinsic and PTX instruction the kernels use, one wrapper each, and the one way a kernel is launched. Kernels
// call nothing else from the toolkit, so that the same sources also compile for the host harness (tests/simt), which
// checks indices, tails, barriers and races on a machine without a GPU. With SN_SIMT the names below come from there.
//
// What a wrapper promises is what both sides keep:
//   - what exchanges values within a warp is called by all 32 lanes together;
//   - a shuffle, vote or reduction orders no memory: data in shared memory passes between lanes of a warp behind
//     sync_warp(), between warps behind sync_block(), between blocks of a cluster behind sync_cluster();
//   - shared memory is reached through Shared<T> alone, carved from a SharedArena;
//   - global memory that another block of the same launch writes is read with atomic_load.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <map>
#include <mutex>
#include <type_traits>
#include <utility>

#include "platform.h"

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

template <typename T>
struct alignas(kPackBytes) Pack {
  static constexpr int kElements = kPackBytes / static_cast<int>(sizeof(T));
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

// The smaller (larger); of a NaN and a number the number. +0 is larger than -0.
__device__ __forceinline__ float minimum(float a, float b) {
  return fminf(a, b);
}
__device__ __forceinline__ float maximum(float a, float b) {
  return fmaxf(a, b);
}

// ---- global memory --------------------------------------------------------------------------------------------------

// Loads through the read-only path: nothing in this launch writes what they read.
template <typename T>
__device__ __forceinline__ T load(const T* source) {
  return __ldg(source);
}
// 16 bytes; `source` (`destination`) is 16-byte aligned.
template <typename T>
__device__ __forceinline__ Pack<T> load_pack(const T* source) {
  union {
    uint4 raw;
    Pack<T> pack;
  } bits;
  bits.raw = __ldg(reinterpret_cast<const uint4*>(source));
  return bits.pack;
}
template <typename T>
__device__ __forceinline__ void store_pack(T* destination, const Pack<T>& pack) {
  union {
    uint4 raw;
    Pack<T> pack;
  } bits;
  bits.pack = pack;
  *reinterpret_cast<uint4*>(destination) = bits.raw;
}

// Loads and stores of 4 or 8 bytes that another block of this launch may store or load: relaxed, at device scope.
template <typename T>
__device__ __forceinline__ T atomic_load(const T* source) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8);
  T value;
  if constexpr (sizeof(T) == 4) {
    std::uint32_t bits;
    asm volatile("ld.relaxed.gpu.global.u32 %0, [%1];" : "=r"(bits) : "l"(__cvta_generic_to_global(source)) : "memory");
    memcpy(&value, &bits, sizeof(T));
  } else {
    std::uint64_t bits;
    asm volatile("ld.relaxed.gpu.global.u64 %0, [%1];" : "=l"(bits) : "l"(__cvta_generic_to_global(source)) : "memory");
    memcpy(&value, &bits, sizeof(T));
  }
  return value;
}
template <typename T>
__device__ __forceinline__ void atomic_store(T* destination, T value) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8);
  if constexpr (sizeof(T) == 4) {
    std::uint32_t bits;
    memcpy(&bits, &value, sizeof(T));
    asm volatile("st.relaxed.gpu.global.u32 [%0], %1;" ::"l"(__cvta_generic_to_global(destination)), "r"(bits)
                 : "memory");
  } else {
    std::uint64_t bits;
    memcpy(&bits, &value, sizeof(T));
    asm volatile("st.relaxed.gpu.global.u64 [%0], %1;" ::"l"(__cvta_generic_to_global(destination)), "l"(bits)
                 : "memory");
  }
}

namespace detail {
// The toolkit's atomics know unsigned long long, not std::uint64_t.
template <typename T>
using AtomicWord = std::conditional_t<std::is_same_v<T, std::uint64_t>, unsigned long long, T>;
template <typename T>
__device__ __forceinline__ AtomicWord<T>* atomic_word(T* target) {
  static_assert(std::is_same_v<T, std::uint32_t> || std::is_same_v<T, std::int32_t> ||
                    std::is_same_v<T, std::uint64_t> || std::is_same_v<T, unsigned long long>,
                "atomics are of integers: sums of floating-point numbers would depend on their order");
  return reinterpret_cast<AtomicWord<T>*>(target);
}
}  // namespace detail

// Of uint32, int32 and uint64; relaxed, at device scope. All return the old value.
template <typename T>
__device__ __forceinline__ T atomic_add(T* target, std::type_identity_t<T> value) {
  return atomicAdd(detail::atomic_word(target), static_cast<detail::AtomicWord<T> >(value));
}
template <typename T>
__device__ __forceinline__ T atomic_or(T* target, std::type_identity_t<T> value) {
  return atomicOr(detail::atomic_word(target), static_cast<detail::AtomicWord<T> >(value));
}
template <typename T>
__device__ __forceinline__ T atomic_max(T* target, std::type_identity_t<T> value) {
  return atomicMax(detail::atomic_word(target), static_cast<detail::AtomicWord<T> >(value));
}
template <typename T>
__device__ __forceinline__ T atomic_min(T* target, std::type_identity_t<T> value) {
  return atomicMin(detail::atomic_word(target), static_cast<detail::AtomicWord<T> >(value));
}

// ---- shared memory --------------------------------------------------------------------------------------------------

// An array in the block's shared memory.
template <typename T>
class Shared {
 public:
  Shared() = default;
  __device__ __forceinline__ explicit Shared(T* data) : data_(data) {}

  __device__ __forceinline__ T get(int i) const { return data_[i]; }
  __device__ __forceinline__ void set(int i, std::type_identity_t<T> value) const { data_[i] = value; }

  // 16 bytes; the address of element i is a multiple of 16.
  __device__ __forceinline__ Pack<T> get_pack(int i) const {
    union {
      uint4 raw;
      Pack<T> pack;
    } bits;
    bits.raw = *reinterpret_cast<const uint4*>(data_ + i);
    return bits.pack;
  }
  __device__ __forceinline__ void set_pack(int i, const Pack<T>& pack) const {
    union {
      uint4 raw;
      Pack<T> pack;
    } bits;
    bits.pack = pack;
    *reinterpret_cast<uint4*>(data_ + i) = bits.raw;
  }

  __device__ __forceinline__ Shared offset(int i) const { return Shared(data_ + i); }
  // The same bytes as elements of another type.
  template <typename U>
  __device__ __forceinline__ Shared<U> view() const {
    return Shared<U>(reinterpret_cast<U*>(data_));
  }

  // Shared memory has atomics of 32 bits; of 64, all but an exchange are a loop, 20 us where a block's threads meet.
  static constexpr bool kHasAtomics = sizeof(T) == 4;
  __device__ __forceinline__ T atomic_add(int i, std::type_identity_t<T> value) const {
    static_assert(kHasAtomics);
    return sn::cuda::atomic_add(data_ + i, value);
  }
  __device__ __forceinline__ T atomic_or(int i, std::type_identity_t<T> value) const {
    static_assert(kHasAtomics);
    return sn::cuda::atomic_or(data_ + i, value);
  }
  __device__ __forceinline__ T atomic_max(int i, std::type_identity_t<T> value) const {
    static_assert(kHasAtomics);
    return sn::cuda::atomic_max(data_ + i, value);
  }
  __device__ __forceinline__ T atomic_min(int i, std::type_identity_t<T> value) const {
    static_assert(kHasAtomics);
    return sn::cuda::atomic_min(data_ + i, value);
  }

  // Element i of the same array in block `rank` of the cluster.
  __device__ __forceinline__ T get_remote(int i, int rank) const {
    static_assert(sizeof(T) == 4 || sizeof(T) == 8);
    T value{};
#if SN_HAS_CLUSTERS
    const std::uint32_t there = remote_address(i, rank);
    if constexpr (sizeof(T) == 4) {
      std::uint32_t bits;
      asm volatile("ld.shared::cluster.u32 %0, [%1];" : "=r"(bits) : "r"(there) : "memory");
      memcpy(&value, &bits, sizeof(T));
    } else {
      std::uint64_t bits;
      asm volatile("ld.shared::cluster.u64 %0, [%1];" : "=l"(bits) : "r"(there) : "memory");
      memcpy(&value, &bits, sizeof(T));
    }
#else
    __trap();
#endif
    return value;
  }
  __device__ __forceinline__ Pack<T> get_remote_pack(int i, int rank) const {
    Pack<T> pack{};
#if SN_HAS_CLUSTERS
    uint4 raw;
    asm volatile("ld.shared::cluster.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(raw.x), "=r"(raw.y), "=r"(raw.z), "=r"(raw.w)
                 : "r"(remote_address(i, rank))
                 : "memory");
    memcpy(&pack, &raw, sizeof(pack));
#else
    __trap();
#endif
    return pack;
  }

  // For the wrappers in this file.
  __device__ __forceinline__ std::uint32_t address(int i) const {
    return static_cast<std::uint32_t>(__cvta_generic_to_shared(data_ + i));
  }

 private:
#if SN_HAS_CLUSTERS
  __device__ __forceinline__ std::uint32_t remote_address(int i, int rank) const {
    std::uint32_t there;
    asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(address(i)), "r"(rank));
    return there;
  }
#endif

  T* data_;
};

// The block's shared memory, carved from front to back; every thread carves the same pieces in the same order.
class SharedArena {
 public:
  __device__ __forceinline__ SharedArena() {
    extern __shared__ __align__(128) unsigned char sn_shared_memory[];
    next_ = sn_shared_memory;
  }
  template <typename T>
  __device__ __forceinline__ Shared<T> take(int count) {
    T* data = reinterpret_cast<T*>(next_);
    next_ += shared_bytes<T>(count);
    return Shared<T>(data);
  }

 private:
  unsigned char* next_;
};

// ---- asynchronous copies, global to shared --------------------------------------------------------------------------

// Copies 16 bytes to element i of `destination`, or zeros when not `valid` (`source` is then not read, and may be any
// address). Both ends are 16-byte aligned. The bytes may be read by this thread behind async_wait, by others behind a
// barrier after that.
template <typename T>
__device__ __forceinline__ void async_copy16(const Shared<T>& destination, int i, const T* source, bool valid) {
  // PTX wants an aligned address of a copy of no bytes too.
  const std::uintptr_t address =
      reinterpret_cast<std::uintptr_t>(source) & ~static_cast<std::uintptr_t>(valid ? 0 : kPackBytes - 1);
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(destination.address(i)), "l"(address),
               "r"(valid ? kPackBytes : 0)
               : "memory");
}
// Closes a group: the copies this thread has issued since the last one.
__device__ __forceinline__ void async_commit() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}
// Waits until at most the kPending latest groups of this thread are under way.
template <int kPending>
__device__ __forceinline__ void async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// ---- tensor cores; every lane takes part ----------------------------------------------------------------------------

// Four 8 x 8 matrices of 16-bit elements. Lane 8 m + r passes the element where row r of matrix m starts, 16 bytes at a
// multiple of 16. r[m] of lane l: elements 2 (l % 4) and + 1 of row l / 4 of matrix m.
template <typename T16>
__device__ __forceinline__ void load_matrix_x4(std::uint32_t (&r)[4], const Shared<T16>& s, int i) {
  static_assert(sizeof(T16) == 2);
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(s.address(i))
               : "memory");
}
// The same of the transposed matrices: r[m] of lane l: rows 2 (l % 4) and + 1 of column l / 4.
template <typename T16>
__device__ __forceinline__ void load_matrix_x4_transposed(std::uint32_t (&r)[4], const Shared<T16>& s, int i) {
  static_assert(sizeof(T16) == 2);
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(s.address(i))
               : "memory");
}

// d += A B with A 16 x 16 and B 16 x 8 of T16 (Half or BFloat16), d 16 x 8 of float. With g = lane / 4, t = lane % 4,
// each register of A and B holding two elements, the first in the low half:
//   a[0]: A[g][2t], A[g][2t + 1]       a[1]: the same of row g + 8    a[2], a[3]: as a[0], a[1], columns + 8
//   b[0]: B[2t][g], B[2t + 1][g]       b[1]: rows + 8
//   d[0], d[1]: D[g][2t], D[g][2t + 1]    d[2], d[3]: the same of row g + 8
template <typename T16>
__device__ __forceinline__ void mma_m16n8k16(float (&d)[4], const std::uint32_t (&a)[4], const std::uint32_t (&b)[2]) {
  if constexpr (std::is_same_v<T16, Half>) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  } else {
    static_assert(std::is_same_v<T16, BFloat16>);
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  }
}

// ---- launching ------------------------------------------------------------------------------------------------------

struct LaunchShape {
  std::int64_t blocks;
  int threads;
  int shared_bytes;
  int cluster = 1;  // blocks of a cluster; divides `blocks`
};

// Lets blocks of a kernel have this much shared memory on the current device. The limit is raised, never lowered:
// another thread may be about to launch the same kernel with more.
inline cudaError_t allow_shared(const void* kernel, int bytes) {
  static std::mutex mutex;
  static std::map<std::pair<const void*, int>, int> limits;
  int device = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error != cudaSuccess) return error;
  const std::lock_guard<std::mutex> lock(mutex);
  int& limit = limits[{kernel, device}];
  if (bytes <= limit) return cudaSuccess;
  error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (error == cudaSuccess) limit = bytes;
  return error;
}

// What a launch of this shape needs said, in `config`, which refers to `attribute`, and of the kernel.
inline cudaError_t configure(const void* kernel, const LaunchShape& shape, cudaStream_t stream,
                             cudaLaunchAttribute& attribute, cudaLaunchConfig_t& config) {
  if (shape.blocks <= 0 || shape.blocks > kMaxBlocks) return cudaErrorInvalidConfiguration;
  if (shape.shared_bytes > kPlainSharedBytes) {
    const cudaError_t error = allow_shared(kernel, shape.shared_bytes);
    if (error != cudaSuccess) return error;
  }
  attribute = {};
  config = {};
  config.gridDim = dim3(static_cast<unsigned>(shape.blocks));
  config.blockDim = dim3(static_cast<unsigned>(shape.threads));
  config.dynamicSmemBytes = static_cast<std::size_t>(shape.shared_bytes);
  config.stream = stream;
  if (shape.cluster > 1) {
    if (shape.cluster > kPortableCluster) {
      const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
      if (error != cudaSuccess) return error;
    }
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim.x = static_cast<unsigned>(shape.cluster);
    attribute.val.clusterDim.y = 1;
    attribute.val.clusterDim.z = 1;
    config.attrs = &attribute;
    config.numAttrs = 1;
  }
  return cudaSuccess;
}

// Launches on `stream` and reports what went wrong with this launch, configuration errors included.
template <typename... Params, typename... Args>
cudaError_t launch(void (*kernel)(Params...), const LaunchShape& shape, cudaStream_t stream, Args... args) {
  cudaLaunchAttribute attribute;
  cudaLaunchConfig_t config;
  const cudaError_t error = configure(reinterpret_cast<const void*>(kernel), shape, stream, attribute, config);
  if (error != cudaSuccess) return error;
  return cudaLaunchKernelEx(&config, kernel, static_cast<Params>(args)...);
}

// Clusters of this shape that the current device holds at once. 0 also where that cannot be found out; the runtime
// keeps no error of it.
template <typename... Params>
int active_clusters(void (*kernel)(Params...), const LaunchShape& shape) {
  cudaLaunchAttribute attribute;
  cudaLaunchConfig_t config;
  int clusters = 0;
  cudaError_t error = configure(reinterpret_cast<const void*>(kernel), shape, nullptr, attribute, config);
  if (error == cudaSuccess) error = cudaOccupancyMaxActiveClusters(&clusters, kernel, &config);
  if (error == cudaSuccess) return clusters;
  static_cast<void>(cudaGetLastError());
  return 0;
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

}  // namespace sn::cuda
