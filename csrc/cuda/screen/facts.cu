// What the screening knows of each row: flags, n, rho and the half-precision copy (prepare.h). A warp takes a row, or
// two or four that are so short that its lanes would be left without work. residual_bound in bound.cuh derives rho from
// what the copy loses.
#include <type_traits>

#include "cuda/launch.cuh"
#include "cuda/memory.cuh"
#include "cuda/plan/sizes.h"
#include "cuda/ptx.cuh"
#include "cuda/screen/bound.cuh"
#include "cuda/screen/prepare.h"
#include "cuda/stages.h"

namespace sn::cuda {
namespace {

// ---- traits ---------------------------------------------------------------------------------------------------------

constexpr int kWarpsPerBlock = 8;
constexpr int kThreads = kWarpsPerBlock * kWarpSize;
constexpr int kMinBlocks = 4;  // 64 registers a thread

constexpr int kGroup = 8;  // elements a lane takes at once: 16 bytes of the copy
static_assert(kGroup == kCopyElements, "rows that serve in place are read in whole groups");

// Range of bfloat16 rows whose products neither overflow nor lose anything to underflow: elements up to 2^50 give
// n <= 2^100 D; from n = 2^-60 on, what products below 2^-126 may lose, D 2^-126, is far below the margin in eta.
constexpr float kLargestValue = 0x1p50f;
constexpr float kSmallestNorm = 0x1p-60f;

template <class T>
struct FactsSide {
  const T* rows;
  std::int64_t count;
  std::int64_t stride;
  void* cast;  // [count][padded_dims], null: the input serves in place
  float* n;
  float* rho;
};
template <class T>
struct FactsArgs {
  FactsSide<T> anchors;
  FactsSide<T> candidates;
  std::int64_t dims;
  std::int64_t padded_dims;
  int row_shift;                 // log2 of the lanes of a row
  float row_slack;               // above
  const float* mean;             // null for half-precision inputs
  const std::uint32_t* largest;  // [2][sample_blocks]
  Control* control;
};

// ---- kernel ---------------------------------------------------------------------------------------------------------

// T: float, Half or BFloat16. kAligned: rows start at multiples of 16 bytes, so that whole groups are packs.
template <class T, bool kAligned>
__device__ __forceinline__ void load_group(T (&rGroup)[kGroup], const T* gRow, std::int64_t first, std::int64_t dims) {
  constexpr int kPack = Pack<T>::kElements;
  if (kAligned && first + kGroup <= dims) {
#pragma unroll
    for (int part = 0; part < kGroup; part += kPack) {
      const Pack<T> rPack = load_pack(gRow + first + part);
#pragma unroll
      for (int i = 0; i < kPack; ++i) rGroup[part + i] = rPack.elements[i];
    }
  } else {
#pragma unroll
    for (int i = 0; i < kGroup; ++i) rGroup[i] = first + i < dims ? load(gRow + first + i) : narrow<T>(0.0f);
  }
}

template <class T, bool kAligned>
__global__ void __launch_bounds__(kThreads, kMinBlocks) facts_kernel(const FactsArgs<T> args) {
  constexpr bool kWide = std::is_same_v<T, float>;
  using Cast = std::conditional_t<kWide, Half, T>;

  // Everyone finds the same exponent from the blocks of the first kernel.
  float scale = 1.0f;
  std::int32_t exponent = 0;
  bool screenable = true;
  std::uint32_t largest = 0;
  if constexpr (kWide) {
    const std::int64_t blocks = args.padded_dims / kSampleColumns;
    for (int side = 0; side < 2 && largest < kLeastScale; ++side) {
      for (std::int64_t i = lane_id(); i < blocks; i += kWarpSize) {
        const std::uint32_t theirs = load(args.largest + side * blocks + i);
        largest = theirs > largest ? theirs : largest;
      }
      largest = reduce_max(largest);
    }
    exponent = kTargetExponent - (static_cast<std::int32_t>(largest >> 23) - 127);
    screenable = largest > 0 && exponent <= kLargestExponent && exponent >= -kLargestExponent;
    if (!screenable) exponent = 0;
    scale = float_from_bits(static_cast<std::uint32_t>(127 + exponent) << 23);
  }
  if (block_id() == 0 && thread_id() == 0) {
    args.control->largest = largest;
    args.control->exponent = exponent;
    args.control->unscreenable = screenable ? 0 : 1;
    args.control->last_null = kNoLastNull;
  }

  const std::int64_t rows = args.anchors.count + args.candidates.count;
  const std::int64_t first_row = (block_id() * kWarpsPerBlock + warp_id()) * (kWarpSize >> args.row_shift);
  if (first_row >= rows) return;  // a whole warp leaves together
  // Lanes behind the last row read and write nothing.
  const int lanes = 1 << args.row_shift;
  const int sub = lane_id() & (lanes - 1);
  const std::int64_t number = first_row + (lane_id() >> args.row_shift);
  const bool exists = number < rows;
  const bool anchor = number < args.anchors.count || !exists;
  const FactsSide<T>& side = anchor ? args.anchors : args.candidates;
  const std::int64_t row = !exists ? 0 : anchor ? number : number - args.anchors.count;
  const T* gRow = side.rows + row * side.stride;
  Cast* gCast = side.cast == nullptr ? nullptr : static_cast<Cast*>(side.cast) + row * args.padded_dims;
  const std::int64_t end = !exists ? 0 : gCast == nullptr ? args.dims : args.padded_dims;
  const int step = lanes * kGroup;

  float rSquares = 0.0f;
  float rRests = 0.0f;   // squares of what the copy leaves
  bool differs = false;  // from the mean, in some column
  bool finite = true;
  bool fits = true;
  float rLargest = 0.0f;
  for (std::int64_t first = sub * kGroup; first < end; first += step) {
    T rGroup[kGroup];
    load_group<T, kAligned>(rGroup, gRow, first, args.dims);
    Pack<Cast> rCast;
    static_assert(Pack<Cast>::kElements == kGroup);
    if constexpr (kWide) {
      const Pack<float> rMeans[2] = {load_pack(args.mean + first), load_pack(args.mean + first + 4)};
#pragma unroll
      for (int i = 0; i < kGroup; ++i) {
        finite = finite && is_finite(rGroup[i]);
        const float centred = subtract(rGroup[i], rMeans[i / 4].elements[i % 4]);
        differs = differs || centred != 0.0f;
        rCast.elements[i] = copy_element(centred, scale, rSquares, rRests);
        fits = fits && is_finite(rCast.elements[i]);
      }
    } else {
#pragma unroll
      for (int i = 0; i < kGroup; ++i) {
        finite = finite && is_finite(rGroup[i]);
        rCast.elements[i] = rGroup[i];
        const float value = widen(rGroup[i]);
        rLargest = maximum(rLargest, value < 0.0f ? -value : value);
        rSquares = fused_multiply_add(value, value, rSquares);
      }
    }
    if (gCast != nullptr) store_pack(gCast + first, rCast);
  }
  for (int mask = lanes / 2; mask > 0; mask /= 2) {
    rSquares = add(rSquares, shuffle_xor(rSquares, mask));
    rRests = add(rRests, shuffle_xor(rRests, mask));
    rLargest = maximum(rLargest, shuffle_xor(rLargest, mask));
  }
  const std::uint32_t others = ~(~0u >> (kWarpSize - lanes) << (lane_id() - sub));  // lanes of other rows
  differs = (ballot(differs) & ~others) != 0;
  finite = (ballot(finite) | others) == ~0u;
  fits = (ballot(fits) | others) == ~0u && finite && screenable;
  if constexpr (std::is_same_v<T, BFloat16>) {
    // A row of zeros is exact.
    fits = fits && rLargest <= kLargestValue && (rSquares >= kSmallestNorm || rLargest == 0.0f);
  }
  if (!fits && gCast != nullptr) {
    Pack<Cast> rZeros;
#pragma unroll
    for (int i = 0; i < kGroup; ++i) rZeros.elements[i] = narrow<Cast>(0.0f);
    for (std::int64_t first = sub * kGroup; first < end; first += step) store_pack(gCast + first, rZeros);
  }
  if (sub == 0 && exists) {
    float rho = 0.0f;
    if constexpr (kWide) rho = differs ? residual_bound(rSquares, rRests, args.row_slack) : 0.0f;
    const bool null = kWide && finite && !differs;  // whatever the scale
    side.n[row] = fits ? rSquares : 0.0f;
    side.rho[row] = fits || null ? rho : kInfinity;
    if (!finite) atomic_or(&args.control->nonfinite, 1u);
  }
}

// ---- launch ---------------------------------------------------------------------------------------------------------

template <class T>
FactsSide<T> facts_side(const FeatureView& view, const ScreenSide& side, void* cast) {
  return {static_cast<const T*>(view.data), side.count, view.row_stride, cast, side.n, side.rho};
}

template <class T>
cudaError_t launch_facts(const ForwardArgs& args, const ForwardPlan& plan, char* workspace, cudaStream_t stream) {
  const bool two_sides = !args.symmetric && plan.path != ForwardPath::kBank;
  constexpr bool kWide = std::is_same_v<T, float>;
  auto* mean = piece<float>(workspace, plan.mean);

  FactsArgs<T> facts{};
  facts.anchors = facts_side<T>(args.anchors, anchor_side(args, plan, workspace),
                                plan.cast_anchors ? workspace + plan.anchor_cast.offset : nullptr);
  if (two_sides) {
    facts.candidates = facts_side<T>(args.candidates, candidate_side(args, plan, workspace),
                                     plan.cast_candidates ? workspace + plan.candidate_cast.offset : nullptr);
  }
  facts.dims = args.dims;
  facts.padded_dims = plan.padded_dims;
  facts.row_shift = facts_row_shift(plan.padded_dims);
  facts.row_slack = row_slack(plan.padded_dims);
  facts.mean = kWide ? mean : nullptr;
  facts.largest = kWide ? reinterpret_cast<const std::uint32_t*>(mean + plan.padded_dims) : nullptr;
  facts.control = piece<Control>(workspace, plan.control);

  const std::int64_t rows = facts.anchors.count + facts.candidates.count;
  const std::int64_t warps = divide_up(rows, std::int64_t{kWarpSize} >> facts.row_shift);
  const LaunchShape shape{divide_up(warps, kWarpsPerBlock), kThreads, 0};
  const bool aligned =
      rows_aligned(args.anchors, args.dtype) && (!two_sides || rows_aligned(args.candidates, args.dtype));
  return launch(aligned ? facts_kernel<T, true> : facts_kernel<T, false>, shape, stream, facts);
}

}  // namespace

// ---- dispatch -------------------------------------------------------------------------------------------------------

cudaError_t enqueue_facts(const ForwardArgs& args, const ForwardPlan& plan, char* workspace, cudaStream_t stream) {
  return for_narrow_type(args.dtype, [&]<class T>() { return launch_facts<T>(args, plan, workspace, stream); });
}

}  // namespace sn::cuda
