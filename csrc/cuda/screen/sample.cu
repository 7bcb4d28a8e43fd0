// The first kernel of the screened paths zeroes the counters of later kernels. For fp32 inputs it also finds the vector
// m that is subtracted from every row, and how large the rest gets. A block has kSampleColumns columns of kSampleRows
// sampled rows. m_c is the mean of the middle half of the column's finite values: rows that are not finite or of
// outlying size drop out column by column, without a pass over norms. Any m is right, since distances do not change; a
// good m keeps collapsed features from drowning in their common part. It is computed as median + mean of the
// differences from it, so equal rows give their very value and v = 0.
//
// The exponent e follows from the sample: fp16 spans 2^-14 (normal) to 2^16, and the sample's largest |v| is put at
// 2^4. A row that is larger by 2^11 does not fit and gets rho = +inf (prepare.h). A pass over all rows for the true
// maximum would cost one more read of the input, and one row of extreme size would take the bits from all others.
//
// Candidates that are all equal or nearly so, such as a bank of zeros before the first step, give no scale, and the
// sample, which takes rows of both sides by their number, may hold no anchor. Then kSampleRows anchors give the scale:
// distances are made of them. Any e is right, as any m is.
#include <algorithm>

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

constexpr int kSampleRows = 32;
constexpr int kRowsPerWarp = kSampleRows / kWarpsPerBlock;
static_assert(kSampleColumns == kWarpSize, "a lane of the sampling kernel is a column");
static_assert(kSampleRows % kWarpsPerBlock == 0, "warps of the sampling kernel share its rows");

struct SampleArgs {
  const float* anchors;  // null: half-precision input, nothing to sample (blocks is 0)
  const float* candidates;
  std::int64_t anchor_stride;
  std::int64_t candidate_stride;
  std::int64_t anchor_rows;
  std::int64_t rows;  // of both
  std::int64_t dims;
  float* mean;             // [padded_dims]
  std::uint32_t* largest;  // [2][sample_blocks]: of the sample, of anchors where that is too little
  std::int64_t blocks;     // that sample
  std::uint32_t* counts;
  std::int64_t count_words;
  std::uint32_t* positive_count;
  std::int64_t positive_words;
  std::uint32_t* control;
};
constexpr int kControlWords = sizeof(Control) / sizeof(std::uint32_t);

// ---- kernel ---------------------------------------------------------------------------------------------------------

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
  for (std::int64_t word = thread; word < args.positive_words; word += block_count() * kThreads) {
    args.positive_count[word] = 0;
  }
  if (thread < kControlWords) args.control[thread] = 0;
  if (block_id() >= args.blocks) return;

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
    args.largest[args.blocks + block_id()] = of_anchors;
  }
}

}  // namespace

// ---- launch ---------------------------------------------------------------------------------------------------------

cudaError_t enqueue_sample(const ForwardArgs& args, const ForwardPlan& plan, char* workspace, cudaStream_t stream) {
  if (args.anchors.rows < 1 || args.candidates.rows < 1 || args.dims < 1) return cudaErrorInvalidValue;
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
    sample.blocks = sample_blocks(plan.padded_dims);
  }
  sample.counts = piece<std::uint32_t>(workspace, plan.counts);
  sample.count_words = 2 * plan.strip_rows;
  sample.positive_count = piece<std::uint32_t>(workspace, plan.positive_count);
  sample.positive_words = args.anchors.rows;
  sample.control = piece<std::uint32_t>(workspace, plan.control);
  const std::int64_t zeroing = divide_up(std::max(sample.count_words, sample.positive_words), kThreads);
  const LaunchShape shape{
      std::max(sample.blocks, zeroing), kThreads,
      wide ? shared_bytes<float>(kSampleRows * kWarpSize) + shared_bytes<std::uint32_t>(kSampleRows * kWarpSize) : 0};
  return launch(sample_kernel, shape, stream, sample);
}

}  // namespace sn::cuda
