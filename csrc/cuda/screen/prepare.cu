// Two kernels.
//
// 1. sample_kernel zeroes what later kernels count in, and for fp32 inputs finds the vector m that is taken off every
//    row and how large the rest gets. A block has kSampleColumns columns of kSampleRows sampled rows. m_c is the mean
//    of the middle half of the column's finite values: rows that are not finite or of outlying size drop out column by
//    column, without a pass over norms. (Any m is right, distances do not change; a good m keeps collapsed features
//    from drowning in their common part.) It is evaluated as median + mean of the differences from it, so that equal
//    rows give their very value and v = 0.
// 2. facts_kernel, a warp a row: flags, n, rho and the copy.
//
// The exponent e follows from the sample: fp16 spans 2^-14 (normal) to 2^16, the sample's largest |v| is put at 2^4. A
// row that is larger by 2^11 does not fit; it gets rho = +inf (prepare.h). A pass over all rows for the true maximum
// would cost one more reading of the input, and one row of extreme size would take the bits from all others.
//
// Candidates that are all equal, such as a bank of zeros before the first step, or next to nothing, give no scale, and
// the sample, which holds rows of either side by their number, may have no anchor in it. Then the anchors give the
// scale, kSampleRows of them: they are what distances are made of. Any e is right, as any m is.
//
// How rho follows from what the copy leaves stands at residual_bound in bound.cuh.
#include "cuda/launch.cuh"
#include "cuda/memory.cuh"
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

constexpr int kSampleRows = 32;
constexpr int kRowsPerWarp = kSampleRows / kWarpsPerBlock;
static_assert(kSampleColumns == kWarpSize, "a lane of the sampling kernel is a column");
static_assert(kSampleRows % kWarpsPerBlock == 0, "warps of the sampling kernel share its rows");

constexpr int kGroup = 8;  // elements a lane takes at once: 16 bytes of the copy
constexpr int kGroupStep = kWarpSize * kGroup;
static_assert(kGroup == kCopyElements, "rows that serve in place are read in whole groups");

// Range of bfloat16 rows whose products neither overflow nor lose anything to underflow: elements up to 2^50 give
// n <= 2^100 D; from n = 2^-60 on, what products below 2^-126 may lose, D 2^-126, is far below the margin in eta.
constexpr float kLargestValue = 0x1p50f;
constexpr float kSmallestNorm = 0x1p-60f;

struct SampleArgs {
  const float* anchors;  // null: half-precision input, nothing to sample
  const float* candidates;
  std::int64_t anchor_stride;
  std::int64_t candidate_stride;
  std::int64_t anchor_rows;
  std::int64_t rows;  // of both
  std::int64_t dims;
  float* mean;             // [padded_dims]
  std::uint32_t* largest;  // [2][sample_blocks]: of the sample, of anchors where that is too little
  std::uint32_t* counts;
  std::int64_t count_words;
  std::uint32_t* control;
};
constexpr int kControlWords = sizeof(Control) / sizeof(std::uint32_t);

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
  float row_slack;               // above
  const float* mean;             // null for half-precision inputs
  const std::uint32_t* largest;  // [2][sample_blocks]
  Control* control;
};

// ---- kernel 1: zero, mean, scale ------------------------------------------------------------------------------------

// Finite values in order, all others last.
__device__ __forceinline__ std::uint32_t order_of(float value) {
  const std::uint32_t bits = bits_of(value);
  if (!is_finite(value)) return ~0u;
  return (bits & 0x80000000u) != 0 ? ~bits : bits | 0x80000000u;
}

// One row of each of kSampleRows equal parts, at a place that no period of the data follows.
__device__ __forceinline__ std::int64_t sampled_row(int sample, std::int64_t rows) {
  if (rows <= kSampleRows) return sample < rows ? sample : -1;
  const std::int64_t first = sample * rows / kSampleRows;
  const std::int64_t length = (sample + 1) * rows / kSampleRows - first;
  std::uint32_t hash = static_cast<std::uint32_t>(sample + 1) * 0x9e3779b9u;
  hash = (hash ^ (hash >> 15)) * 0x85ebca6bu;
  hash ^= hash >> 13;
  return first + static_cast<std::int64_t>(hash) % length;
}

__global__ void __launch_bounds__(kThreads) sample_kernel(const SampleArgs args) {
  const std::int64_t thread = block_id() * kThreads + thread_id();
  for (std::int64_t word = thread; word < args.count_words; word += block_count() * kThreads) args.counts[word] = 0;
  if (thread < kControlWords) args.control[thread] = 0;
  if (args.anchors == nullptr) return;

  SharedArena arena;
  const Shared<float> sValues = arena.take<float>(kSampleRows * kWarpSize);
  const Shared<std::uint32_t> sRanks = arena.take<std::uint32_t>(kSampleRows * kWarpSize);
  const std::int64_t column = block_id() * kSampleColumns + lane_id();
  const bool inside = column < args.dims;

#pragma unroll
  for (int i = 0; i < kRowsPerWarp; ++i) {
    const int sample = warp_id() * kRowsPerWarp + i;
    const std::int64_t row = sampled_row(sample, args.rows);
    float value = kInfinity;  // absent
    if (row >= 0 && inside) {
      const float* gRow = row < args.anchor_rows ? args.anchors + row * args.anchor_stride
                                                 : args.candidates + (row - args.anchor_rows) * args.candidate_stride;
      value = load(gRow + column);
    }
    sValues.set(sample * kWarpSize + lane_id(), value);
  }
  sync_block();

  for (int i = 0; i < kRowsPerWarp; ++i) {
    const int sample = warp_id() * kRowsPerWarp + i;
    const std::uint32_t mine = order_of(sValues.get(sample * kWarpSize + lane_id()));
    std::uint32_t rank = 0;
    for (int other = 0; other < kSampleRows; ++other) {
      const std::uint32_t theirs = order_of(sValues.get(other * kWarpSize + lane_id()));
      rank += theirs < mine || (theirs == mine && other < sample) ? 1u : 0u;
    }
    sRanks.set(sample * kWarpSize + lane_id(), rank);
  }
  sync_block();
  if (warp_id() != 0) return;

  std::uint32_t finite = 0;
  for (int sample = 0; sample < kSampleRows; ++sample) {
    finite += is_finite(sValues.get(sample * kWarpSize + lane_id())) ? 1u : 0u;
  }
  float middle = 0.0f;
  for (int sample = 0; sample < kSampleRows; ++sample) {
    if (sRanks.get(sample * kWarpSize + lane_id()) == finite / 2 && finite > 0) {
      middle = sValues.get(sample * kWarpSize + lane_id());
    }
  }
  const std::uint32_t cut = finite / 4;
  float sum = 0.0f;
  for (int sample = 0; sample < kSampleRows; ++sample) {
    const std::uint32_t rank = sRanks.get(sample * kWarpSize + lane_id());
    if (rank >= cut && rank + cut < finite)
      sum = add(sum, subtract(sValues.get(sample * kWarpSize + lane_id()), middle));
  }
  const std::uint32_t kept = finite - 2 * cut;
  float mean = kept > 0 ? add(middle, sum / static_cast<float>(kept)) : 0.0f;
  if (!is_finite(mean)) mean = 0.0f;  // values near the largest float

  std::uint32_t largest = 0;
  for (int sample = 0; sample < kSampleRows; ++sample) {
    const float rest = subtract(sValues.get(sample * kWarpSize + lane_id()), mean);
    const std::uint32_t magnitude = bits_of(rest) & 0x7fffffffu;
    if (is_finite(rest) && magnitude > largest) largest = magnitude;
  }
  largest = reduce_max(largest);
  std::uint32_t of_anchors = 0;
  if (largest < kLeastScale && args.anchor_rows < args.rows) {
    for (int sample = 0; sample < kSampleRows; ++sample) {
      const std::int64_t row = sampled_row(sample, args.anchor_rows);
      if (row < 0 || !inside) continue;
      const float rest = subtract(load(args.anchors + row * args.anchor_stride + column), mean);
      const std::uint32_t magnitude = bits_of(rest) & 0x7fffffffu;
      if (is_finite(rest) && magnitude > of_anchors) of_anchors = magnitude;
    }
    of_anchors = reduce_max(of_anchors);
  }
  args.mean[column] = mean;
  if (lane_id() == 0) {
    args.largest[block_id()] = largest;
    args.largest[block_count() + block_id()] = of_anchors;
  }
}

// ---- kernel 2: facts and copy ---------------------------------------------------------------------------------------

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

  std::int64_t row = block_id() * kWarpsPerBlock + warp_id();
  if (row >= args.anchors.count + args.candidates.count) return;  // a whole warp leaves together
  const bool anchor = row < args.anchors.count;
  const FactsSide<T>& side = anchor ? args.anchors : args.candidates;
  if (!anchor) row -= args.anchors.count;
  const T* gRow = side.rows + row * side.stride;
  Cast* gCast = side.cast == nullptr ? nullptr : static_cast<Cast*>(side.cast) + row * args.padded_dims;
  const std::int64_t end = gCast == nullptr ? args.dims : args.padded_dims;

  float rSquares = 0.0f;
  float rRests = 0.0f;   // squares of what the copy leaves
  bool differs = false;  // from the mean, in some column
  bool finite = true;
  bool fits = true;
  float rLargest = 0.0f;
  for (std::int64_t first = lane_id() * kGroup; first < end; first += kGroupStep) {
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
#pragma unroll
  for (int mask = kWarpSize / 2; mask > 0; mask /= 2) {
    rSquares = add(rSquares, shuffle_xor(rSquares, mask));
    rRests = add(rRests, shuffle_xor(rRests, mask));
    rLargest = maximum(rLargest, shuffle_xor(rLargest, mask));
  }
  differs = any_lane(differs);
  finite = all_lanes(finite);
  fits = all_lanes(fits) && finite && screenable;
  if constexpr (std::is_same_v<T, BFloat16>) {
    // A row of zeros is exact.
    fits = fits && rLargest <= kLargestValue && (rSquares >= kSmallestNorm || rLargest == 0.0f);
  }
  if (!fits && gCast != nullptr) {
    Pack<Cast> rZeros;
#pragma unroll
    for (int i = 0; i < kGroup; ++i) rZeros.elements[i] = narrow<Cast>(0.0f);
    for (std::int64_t first = lane_id() * kGroup; first < end; first += kGroupStep) store_pack(gCast + first, rZeros);
  }
  if (lane_id() == 0) {
    float rho = 0.0f;
    if constexpr (kWide) rho = differs ? residual_bound(rSquares, rRests, args.row_slack) : 0.0f;
    side.n[row] = fits ? rSquares : 0.0f;
    side.rho[row] = fits ? rho : kInfinity;
    if (!finite) atomic_or(&args.control->nonfinite, 1u);
  }
}

// ---- launch ---------------------------------------------------------------------------------------------------------

bool is_aligned(const FeatureView& view, std::int64_t element) {
  return reinterpret_cast<std::uintptr_t>(view.data) % kPackBytes == 0 &&
         (view.rows <= 1 || view.row_stride * element % kPackBytes == 0);
}

template <class T>
cudaError_t launch_facts(const ForwardArgs& args, const ForwardPlan& plan, char* workspace, cudaStream_t stream) {
  const ScreenSide anchors = anchor_side(args, plan, workspace);
  const ScreenSide candidates = candidate_side(args, plan, workspace);
  const bool two_sides = !args.symmetric && plan.path != ForwardPath::kBank;
  constexpr bool kWide = std::is_same_v<T, float>;
  auto* mean = piece<float>(workspace, plan.mean);

  FactsArgs<T> facts{};
  facts.anchors = {static_cast<const T*>(args.anchors.data),
                   anchors.count,
                   args.anchors.row_stride,
                   plan.cast_anchors ? workspace + plan.anchor_cast.offset : nullptr,
                   anchors.n,
                   anchors.rho};
  if (two_sides) {
    facts.candidates = {static_cast<const T*>(args.candidates.data),
                        candidates.count,
                        args.candidates.row_stride,
                        plan.cast_candidates ? workspace + plan.candidate_cast.offset : nullptr,
                        candidates.n,
                        candidates.rho};
  }
  facts.dims = args.dims;
  facts.padded_dims = plan.padded_dims;
  facts.row_slack = row_slack(plan.padded_dims);
  facts.mean = kWide ? mean : nullptr;
  facts.largest = kWide ? reinterpret_cast<const std::uint32_t*>(mean + plan.padded_dims) : nullptr;
  facts.control = piece<Control>(workspace, plan.control);

  const std::int64_t rows = facts.anchors.count + facts.candidates.count;
  const LaunchShape shape{(rows + kWarpsPerBlock - 1) / kWarpsPerBlock, kThreads, 0};
  const bool aligned = is_aligned(args.anchors, sizeof(T)) && (!two_sides || is_aligned(args.candidates, sizeof(T)));
  return launch(aligned ? facts_kernel<T, true> : facts_kernel<T, false>, shape, stream, facts);
}

cudaError_t launch_sample(const ForwardArgs& args, const ForwardPlan& plan, char* workspace, cudaStream_t stream) {
  const bool wide = args.dtype == DType::kFloat32;
  auto* mean = piece<float>(workspace, plan.mean);
  SampleArgs sample{};
  if (wide) {
    sample.anchors = static_cast<const float*>(args.anchors.data);
    sample.candidates = static_cast<const float*>(args.candidates.data);
    sample.anchor_stride = args.anchors.row_stride;
    sample.candidate_stride = args.candidates.row_stride;
    sample.anchor_rows = args.anchors.rows;
    sample.rows = args.symmetric ? args.anchors.rows : args.anchors.rows + args.candidates.rows;
    sample.dims = args.dims;
    sample.mean = mean;
    sample.largest = reinterpret_cast<std::uint32_t*>(mean + plan.padded_dims);
  }
  sample.counts = piece<std::uint32_t>(workspace, plan.counts);
  sample.count_words = 2 * plan.wave_rows;
  sample.control = piece<std::uint32_t>(workspace, plan.control);
  const std::int64_t zeroing = (sample.count_words + kThreads - 1) / kThreads;
  const LaunchShape shape{
      wide ? sample_blocks(plan.padded_dims) : zeroing, kThreads,
      wide ? shared_bytes<float>(kSampleRows * kWarpSize) + shared_bytes<std::uint32_t>(kSampleRows * kWarpSize) : 0};
  return launch(sample_kernel, shape, stream, sample);
}

}  // namespace

// ---- dispatch -------------------------------------------------------------------------------------------------------

cudaError_t enqueue_prepare(const ForwardArgs& args, const ForwardPlan& plan, char* workspace, cudaStream_t stream) {
  if (args.anchors.rows < 1 || args.candidates.rows < 1 || args.dims < 1) return cudaErrorInvalidValue;
  const cudaError_t error = launch_sample(args, plan, workspace, stream);
  if (error != cudaSuccess) return error;
  switch (args.dtype) {
    case DType::kFloat32:
      return launch_facts<float>(args, plan, workspace, stream);
    case DType::kFloat16:
      return launch_facts<Half>(args, plan, workspace, stream);
    case DType::kBFloat16:
      return launch_facts<BFloat16>(args, plan, workspace, stream);
    case DType::kFloat64:
      break;
  }
  return cudaErrorInvalidValue;
}

}  // namespace sn::cuda
