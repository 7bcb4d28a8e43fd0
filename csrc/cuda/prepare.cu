// One warp reads one row once. The squared norm of a row x has ONE summation order, whatever the launch, the
// alignment or the other rows:
//   the row is cut into packs of P = 16 / sizeof(T) elements, pack p belongs to lane p mod 32;
//   a lane adds the squares of its packs in increasing order with fused multiply-adds, from zero;
//   the 32 partial sums meet in a butterfly: lanes that differ in bit 4, then 3, 2, 1, 0.
// Norms feed screening bounds, never the order of neighbours.
//
// NaN and Inf are found on the bits: |x| as an integer is at least the exponent mask exactly for those, and
// an integer maximum keeps what fmaxf and `<` would drop.
#include "prepare.h"

#include "ptx.cuh"

namespace sn::cuda {
namespace {

// ---- traits ---------------------------------------------------------------------------------------------------------

template <typename T>
struct RowTraits;

template <>
struct RowTraits<float> {
  using Acc = float;
  using Bits = std::uint32_t;
  static constexpr Bits kExponent = 0x7f800000u;
};
template <>
struct RowTraits<double> {
  using Acc = double;
  using Bits = std::uint64_t;
  static constexpr Bits kExponent = 0x7ff0000000000000u;
};
template <>
struct RowTraits<__half> {
  using Acc = float;
  using Bits = std::uint16_t;
  static constexpr Bits kExponent = 0x7c00u;
};
template <>
struct RowTraits<__nv_bfloat16> {
  using Acc = float;
  using Bits = std::uint16_t;
  static constexpr Bits kExponent = 0x7f80u;
};

constexpr int kWarpsPerBlock = 8;
constexpr int kThreads = kWarpsPerBlock * kWarpSize;
// Four blocks a multiprocessor, 64 registers a thread: left to itself ptxas aims at 32 for sm_90a and spills
// double.
constexpr int kMinBlocks = 4;
static_assert(kThreads <= 1024, "a block has at most 1024 threads");
static_assert((kWarpSize & (kWarpSize - 1)) == 0, "the butterfly halves the warp until one lane is left");

// ---- kernel ---------------------------------------------------------------------------------------------------------

// gFeatures [rows, dims] with row stride `row_stride`, unit stride along dims. kAligned: every row starts at
// a multiple of 16 bytes, so that whole packs are one load.
template <typename T, bool kAligned>
__global__ void __launch_bounds__(kThreads, kMinBlocks)
    prepare_kernel(const T* __restrict__ gFeatures, std::int64_t rows, std::int64_t dims, std::int64_t row_stride,
                   typename RowTraits<T>::Acc* __restrict__ gSquaredNorms, std::int32_t* __restrict__ gNonfinite) {
  using Traits = RowTraits<T>;
  using Acc = typename Traits::Acc;
  using Bits = typename Traits::Bits;
  constexpr int kPack = Pack<T>::kElements;
  constexpr Bits kMagnitude = static_cast<Bits>(~Bits{0}) >> 1;  // all but the sign

  const std::int64_t row = block_id() * kWarpsPerBlock + warp_id();
  if (row >= rows) return;  // a whole warp leaves together
  const T* gRow = gFeatures + row * row_stride;

  Acc rSum = 0;
  Bits rLargest = 0;
  const auto take = [&](T value) {
    const Bits magnitude = static_cast<Bits>(bits_of(value) & kMagnitude);
    rLargest = magnitude > rLargest ? magnitude : rLargest;
    const Acc wide = widen(value);
    rSum = fused_multiply_add(wide, wide, rSum);
  };

  for (std::int64_t first = static_cast<std::int64_t>(lane_id()) * kPack; first < dims;
       first += static_cast<std::int64_t>(kWarpSize) * kPack) {
    if (kAligned && first + kPack <= dims) {
      const Pack<T> rPack = load_pack(gRow + first);
#pragma unroll
      for (int element = 0; element < kPack; ++element) take(rPack.elements[element]);
    } else {
      const std::int64_t last = first + kPack < dims ? first + kPack : dims;
      for (std::int64_t column = first; column < last; ++column) take(load(gRow + column));
    }
  }

  std::int32_t rNonfinite = rLargest >= Traits::kExponent ? 1 : 0;
#pragma unroll
  for (int mask = kWarpSize / 2; mask > 0; mask /= 2) {
    rSum = add(rSum, shuffle_xor(rSum, mask));
    rNonfinite |= shuffle_xor(rNonfinite, mask);
  }
  if (lane_id() == 0) {
    gSquaredNorms[row] = rSum;
    gNonfinite[row] = rNonfinite;
  }
}

// ---- launch ---------------------------------------------------------------------------------------------------------

template <typename T>
cudaError_t launch_prepare(const PrepareArgs& args, cudaStream_t stream) {
  using Acc = typename RowTraits<T>::Acc;
  const auto* features = static_cast<const T*>(args.features.data);
  auto* squared_norms = static_cast<Acc*>(args.squared_norms);
  const std::int64_t rows = args.features.rows;
  const std::int64_t row_stride = args.features.row_stride;
  const std::int64_t row_bytes = row_stride * static_cast<std::int64_t>(sizeof(T));
  const bool aligned = reinterpret_cast<std::uintptr_t>(features) % kPackBytes == 0 && row_bytes % kPackBytes == 0;
  const LaunchShape shape{(rows + kWarpsPerBlock - 1) / kWarpsPerBlock, kThreads, 0};
  const auto kernel = aligned ? prepare_kernel<T, true> : prepare_kernel<T, false>;
  return launch(kernel, shape, stream, features, rows, args.dims, row_stride, squared_norms, args.nonfinite);
}

}  // namespace

// ---- dispatch -------------------------------------------------------------------------------------------------------

cudaError_t prepare(const PrepareArgs& args, cudaStream_t stream) {
  if (args.features.rows == 0) return cudaSuccess;
  switch (args.dtype) {
    case DType::kFloat32:
      return launch_prepare<float>(args, stream);
    case DType::kFloat64:
      return launch_prepare<double>(args, stream);
    case DType::kFloat16:
      return launch_prepare<__half>(args, stream);
    case DType::kBFloat16:
      return launch_prepare<__nv_bfloat16>(args, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace sn::cuda
