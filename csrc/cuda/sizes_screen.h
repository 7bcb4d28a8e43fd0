// Sizes of the screening that the plan needs: no toolkit, no kernels.
#pragma once

#include <cstdint>

namespace sn::cuda {

// A half-precision input serves in place when its rows start at multiples of 16 bytes and D is a multiple of this: one
// asynchronous copy moves 8 elements.
inline constexpr std::int64_t kCopyElements = 8;

// Columns of D that one stage of the score kernels holds; padded_dims is a multiple.
inline constexpr std::int64_t kStageColumns = 64;

// One block of the sampling kernel takes so many columns of D.
inline constexpr std::int64_t kSampleColumns = 32;
static_assert(kStageColumns % kSampleColumns == 0, "sampled blocks cover the padded columns");

constexpr std::int64_t sample_blocks(std::int64_t padded_dims) {
  return padded_dims / kSampleColumns;
}
// Bytes of ForwardPlan::mean for fp32 inputs: float mean [padded_dims], then for each block of the sampling kernel the
// bits of the largest |x - mean| that it saw, uint32 [sample_blocks], and again, among the anchors alone.
constexpr std::int64_t mean_bytes(std::int64_t padded_dims) {
  return 4 * (padded_dims + 2 * sample_blocks(padded_dims));
}

// eta of bound.cuh: the relative error of a screened squared distance. Exact as a float for every D below 2^17.
inline float screening_error(std::int64_t padded_dims) {
  const double dims = static_cast<double>(padded_dims);
  return static_cast<float>((1.25 * dims + dims / 32.0 + 32.0) * 0x1p-23);
}

// The factor on the residual in rho (bound.cuh).
inline float row_slack(std::int64_t padded_dims) {
  return 1.0f + 0x1p-20f + static_cast<float>(padded_dims / 32 + 16) * 0x1p-23f;
}

// Kernels that enqueue_prepare launches.
inline constexpr std::int64_t kPrepareLaunches = 2;

// The bank's kernel holds all anchors of a call against one tile of candidates.
inline constexpr std::int64_t kBankAnchorRows = 256;
// Shared memory of a block that it asks for: a plan takes ForwardPath::kBank only where DeviceFacts::shared_bytes
// allows.
inline constexpr std::int64_t kBankSharedBytes = 224 * 1024;

}  // namespace sn::cuda
