// Thresholds of the support test from the scores of a sample: of groups of candidates, the least upper bound of each,
// or dense scores where the sample is small. certificate.cuh derives them.
//
// A warp an anchor: values in registers, the K-th by counts of the warp, no shared memory and no barrier. A sample of S
// candidates costs an anchor the reading of 4 S / sample_group bytes and 5 to 10 counts of kValues comparisons.
#include "cuda/launch.cuh"
#include "cuda/memory.cuh"
#include "cuda/plan/sizes.h"
#include "cuda/ptx.cuh"
#include "cuda/screen/args.cuh"
#include "cuda/screen/bound.cuh"
#include "cuda/screen/certificate.cuh"
#include "cuda/screen/kth_smallest.cuh"
#include "cuda/stages.h"

namespace sn::cuda {
namespace {

// ---- traits ---------------------------------------------------------------------------------------------------------

constexpr int kThresholdWarps = 4;  // anchors of a block
constexpr int kThresholdThreads = kThresholdWarps * kWarpSize;

constexpr int kNullLoads = 8;  // candidates of a lane that are looked at together

// ---- kernel ---------------------------------------------------------------------------------------------------------

// Sets Control.last_null (bound.cuh) from the candidates 0, stride, 2 stride, .. that the sample has scored, so their
// facts are there: the K + 1-st null row among them. One warp.
__device__ __forceinline__ void find_last_null(const RefineArgs& args) {
  if (load(&args.gControl->unscreenable) != 0) return;
  std::int64_t found = 0;
  for (std::int64_t first = 0; first < args.columns; first += kNullLoads * kWarpSize) {
    float rN[kNullLoads];
#pragma unroll
    for (int i = 0; i < kNullLoads; ++i) {
      const std::int64_t column = first + i * kWarpSize + lane_id();
      rN[i] = column < args.columns ? load(args.gCandidateN + column * args.column_stride) : 1.0f;
    }
#pragma unroll
    for (int i = 0; i < kNullLoads; ++i) {
      const std::int64_t candidate = (first + i * kWarpSize + lane_id()) * args.column_stride;
      const bool null = rN[i] == 0.0f && is_null(rN[i], load(args.gCandidateRho + candidate));
      const std::uint32_t nulls = ballot(null);
      const bool last = null && found + popcount(nulls & lanes_below()) == args.K;
      if (last) args.gControl->last_null = static_cast<std::uint32_t>(candidate);
      found += popcount(nulls);
    }
    if (found > args.K) return;
  }
}

// The first block looks at null rows, the others serve kThresholdWarps anchors each. Values beyond kValues a lane share
// places, of which the least counts: groups are joined.
template <bool kGroups, int kValues>
__global__ void __launch_bounds__(kThresholdThreads) thresholds_kernel(const __grid_constant__ RefineArgs args) {
  if (block_id() == 0) {
    if (warp_id() == 0) find_last_null(args);
    return;
  }
  const std::int64_t row = (block_id() - 1) * kThresholdWarps + warp_id();
  if (row >= args.rows) return;
  const std::int64_t anchor = args.row_begin + row;
  const AnchorFacts facts = anchor_facts(args, anchor);
  // The scores of a blind anchor are never used, and its place of the sample may never have been written.
  SupportThreshold threshold{-kInfinity, 0.0f};
  if (!facts.blind && facts.wanted > 0) {
    const auto count = static_cast<int>(kGroups ? args.groups : args.columns);
    const float* gRow = args.gScores + row * count;
    std::uint32_t rValues[kValues];
#pragma unroll
    for (int v = 0; v < kValues; ++v) rValues[v] = kNoBits;
#pragma unroll 1
    for (int first = lane_id(); first < count; first += kValues * kWarpSize) {
#pragma unroll
      for (int v = 0; v < kValues; ++v) {
        const int e = first + v * kWarpSize;
        std::uint32_t bits = kNoBits;
        if (e < count) {
          if constexpr (kGroups) {
            bits = bits_of(gRow[e]);
          } else {
            bits = upper_bits(args, facts, {gRow[e], e * static_cast<std::int32_t>(args.column_stride)});
          }
        }
        rValues[v] = bits < rValues[v] ? bits : rValues[v];
      }
    }
    // One group may hold the anchor itself; of dense scores it has been left out.
    const bool with_self = kGroups && facts.self >= 0 &&
                           static_cast<std::uint32_t>(facts.self) % static_cast<std::uint32_t>(args.column_stride) == 0;
    const std::uint32_t wanted = static_cast<std::uint32_t>(facts.wanted) + (with_self ? 1u : 0u);
    const float U = float_from_bits(warp_kth_smallest(rValues, wanted));
    const bool sane = largest_key(args, facts, U) < kSaneKey;
    threshold = support_threshold(sane ? reach_of(args, facts, U) : kInfinity, facts.n, facts.rho, args.eta);
  }
  if (lane_id() != 0) return;
  args.thresholds.T[anchor] = threshold.T;
  args.thresholds.u[anchor] = threshold.u;
  args.thresholds.G[anchor] = kInfinity;
  args.thresholds.g2[anchor] = 0.0f;
  args.gCounts[row] = 0;
  args.gFarCounts[row] = 0;
}

// ---- launch ---------------------------------------------------------------------------------------------------------

template <bool kGroups>
cudaError_t launch_thresholds(const RefineArgs& args, cudaStream_t stream) {
  const std::int64_t values = divide_up(kGroups ? args.groups : args.columns, std::int64_t{kWarpSize});
  const LaunchShape shape{1 + divide_up(args.rows, std::int64_t{kThresholdWarps}), kThresholdThreads, 0};
  if (values <= 4) return launch(thresholds_kernel<kGroups, 4>, shape, stream, args);
  if (values <= 8) return launch(thresholds_kernel<kGroups, 8>, shape, stream, args);
  if (values <= 16) return launch(thresholds_kernel<kGroups, 16>, shape, stream, args);
  return launch(thresholds_kernel<kGroups, 32>, shape, stream, args);
}

}  // namespace

// ---- dispatch -------------------------------------------------------------------------------------------------------

cudaError_t enqueue_thresholds(const ForwardArgs& args, const ForwardPlan& plan, char* workspace, const Strip& strip,
                               cudaStream_t stream) {
  const RefineArgs kernel_args = refine_args(args, plan, workspace, strip);
  return plan.sample_group > 1 ? launch_thresholds<true>(kernel_args, stream)
                               : launch_thresholds<false>(kernel_args, stream);
}

}  // namespace sn::cuda
