// Every intrinsic and PTX instruction the kernels use, one wrapper each, and the one way a kernel is
// launched. Kernels call nothing else from the toolkit, so that they can also be compiled for a host harness
// that checks indices, tails and barriers on a machine without a GPU.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

namespace sn::cuda {

inline constexpr int kWarpSize = 32;
inline constexpr unsigned kFullWarp = 0xffffffffu;

// ---- where a thread is ----------------------------------------------------------------------------------------------

__device__ __forceinline__ int lane_id() {
  return static_cast<int>(threadIdx.x) % kWarpSize;
}
__device__ __forceinline__ int warp_id() {
  return static_cast<int>(threadIdx.x) / kWarpSize;
}
__device__ __forceinline__ std::int64_t block_id() {
  return static_cast<std::int64_t>(blockIdx.x);
}

// ---- exchange within a warp; every lane takes part ------------------------------------------------------------------

template <typename T>
__device__ __forceinline__ T shuffle_xor(T value, int mask) {
  return __shfl_xor_sync(kFullWarp, value, mask);
}

// ---- bits -----------------------------------------------------------------------------------------------------------

__device__ __forceinline__ std::uint32_t bits_of(float value) {
  return __float_as_uint(value);
}
__device__ __forceinline__ std::uint16_t bits_of(__half value) {
  return __half_as_ushort(value);
}
__device__ __forceinline__ std::uint16_t bits_of(__nv_bfloat16 value) {
  return __bfloat16_as_ushort(value);
}
__device__ __forceinline__ std::uint64_t bits_of(double value) {
  return static_cast<std::uint64_t>(__double_as_longlong(value));
}

// ---- arithmetic, IEEE round to nearest, never flushed to zero -------------------------------------------------------

__device__ __forceinline__ float widen(float value) {
  return value;
}
__device__ __forceinline__ double widen(double value) {
  return value;
}
__device__ __forceinline__ float widen(__half value) {
  return __half2float(value);
}
__device__ __forceinline__ float widen(__nv_bfloat16 value) {
  return __bfloat162float(value);
}

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

// ---- global memory --------------------------------------------------------------------------------------------------

inline constexpr int kPackBytes = 16;  // the widest load a lane can make

template <typename T>
struct alignas(kPackBytes) Pack {
  static constexpr int kElements = kPackBytes / static_cast<int>(sizeof(T));
  T elements[kElements];
};

// One 16-byte load through the read-only path; `source` is 16-byte aligned.
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
__device__ __forceinline__ T load(const T* source) {
  return __ldg(source);
}

// ---- launching ------------------------------------------------------------------------------------------------------

struct LaunchShape {
  std::int64_t blocks;
  int threads;
  int shared_bytes;
};

inline constexpr std::int64_t kMaxBlocks = 0x7fffffff;  // of a grid along x

// Launches on `stream` and reports what went wrong with this launch, configuration errors included.
template <typename... Params, typename... Args>
cudaError_t launch(void (*kernel)(Params...), const LaunchShape& shape, cudaStream_t stream, Args... args) {
  if (shape.blocks <= 0 || shape.blocks > kMaxBlocks) return cudaErrorInvalidConfiguration;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(shape.blocks));
  config.blockDim = dim3(static_cast<unsigned>(shape.threads));
  config.dynamicSmemBytes = static_cast<std::size_t>(shape.shared_bytes);
  config.stream = stream;
  return cudaLaunchKernelEx(&config, kernel, static_cast<Params>(args)...);
}

}  // namespace sn::cuda
