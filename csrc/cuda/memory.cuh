// Wrappers of the instructions that read and write memory: global, shared, and from global to shared. ptx.cuh says what
// a wrapper promises.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "cuda/ptx.cuh"

#if !defined(SN_SIMT)  // else simt_device.h has these names

namespace sn::cuda {

// ---- global memory --------------------------------------------------------------------------------------------------

// Loads through the read-only path: nothing in this launch writes what they read.
template <typename T>
__device__ __forceinline__ T load(const T* source) {
  return __ldg(source);
}
// 16 bytes, or 8; `source` (`destination`) is aligned to as many.
template <typename T, int kBytes = kPackBytes>
__device__ __forceinline__ Pack<T, kBytes> load_pack(const T* source) {
  using Raw = std::conditional_t<kBytes == kPackBytes, uint4, uint2>;
  union {
    Raw raw;
    Pack<T, kBytes> pack;
  } bits;
  bits.raw = __ldg(reinterpret_cast<const Raw*>(source));
  return bits.pack;
}
template <typename T, int kBytes>
__device__ __forceinline__ void store_pack(T* destination, const Pack<T, kBytes>& pack) {
  using Raw = std::conditional_t<kBytes == kPackBytes, uint4, uint2>;
  union {
    Raw raw;
    Pack<T, kBytes> pack;
  } bits;
  bits.pack = pack;
  *reinterpret_cast<Raw*>(destination) = bits.raw;
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
// Releases what this thread, and behind a barrier its block, wrote before; of what other such additions released, reads
// behind it, and behind a barrier those of its block, see what was written.
__device__ __forceinline__ std::uint32_t atomic_add_acq_rel(std::uint32_t* target, std::uint32_t value) {
  std::uint32_t before;
  asm volatile("atom.acq_rel.gpu.global.add.u32 %0, [%1], %2;"
               : "=r"(before)
               : "l"(__cvta_generic_to_global(target)), "r"(value)
               : "memory");
  return before;
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

}  // namespace sn::cuda

#endif  // SN_SIMT
