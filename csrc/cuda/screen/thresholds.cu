// Thresholds of the support test, from the dense scores of a sample or from the entries that the screening of a subset
// has left in the buffers. certificate.cuh derives them.
#include "cuda/launch.cuh"
#include "cuda/memory.cuh"
#include "cuda/ptx.cuh"
#include "cuda/screen/args.cuh"
#include "cuda/screen/bound.cuh"
#include "cuda/screen/certificate.cuh"
#include "cuda/stages.h"

namespace sn::cuda {
namespace {

// ---- traits ---------------------------------------------------------------------------------------------------------

constexpr int kThresholdThreads = 128;
constexpr int kStagedSamples = 2048;

constexpr int kThresholdBytes = shared_bytes<std::uint32_t>(kStagedSamples) + shared_bytes<std::uint32_t>(kRadixBins);

// ---- kernel ---------------------------------------------------------------------------------------------------------

// Sets or lowers Control.last_null (bound.cuh) from the candidates 0, stride, 2 stride, .. that a pass has scored, so
// their facts are there. One block.
template <bool kSample>
__device__ __forceinline__ void find_last_null(const RefineArgs& args, Shared<std::uint32_t> sBins) {
  const std::uint32_t known = atomic_load(&args.gControl->last_null);  // written below
  if (load(&args.gControl->unscreenable) != 0) return;
  const std::int64_t stride = kSample ? args.column_stride : args.second_stride;
  std::int64_t count = args.columns;
  if constexpr (!kSample) {
    // Only what would lower the limit is looked at: few columns. Where the sample had too few, there is no need.
    if (known == kNoLastNull) return;
    count = known / stride + 1;
    const std::int64_t scored = (args.forward.candidates.rows + stride - 1) / stride;
    if (scored < count) count = scored;
  }
  // An index is as good as the bits of a float: it comes back rounded up, and one too large for that as infinity.
  const float last = kth_smallest(sBins, count, args.K + 1, [&](std::int64_t e) {
    const std::int64_t candidate = e * stride;
    return is_null(load(args.gCandidateN + candidate), load(args.gCandidateRho + candidate))
               ? static_cast<std::uint32_t>(candidate)
               : kNoBits;
  });
  if (thread_id() == 0 && last < kInfinity && bits_of(last) < known) args.gControl->last_null = bits_of(last);
}

// A block an anchor, and one for the null rows. kSample: entries are the sample's dense scores, T is set; else they are
// a buffer, and T is lowered.
template <bool kSample>
__global__ void __launch_bounds__(kThresholdThreads, 8) thresholds_kernel(const __grid_constant__ RefineArgs args) {
  SharedArena arena;
  const Shared<std::uint32_t> sStage = arena.take<std::uint32_t>(kStagedSamples);
  const Shared<std::uint32_t> sBins = arena.take<std::uint32_t>(kRadixBins);
  const std::int64_t row = block_id();
  if (row == args.rows) {
    find_last_null<kSample>(args, sBins);
    return;
  }
  const std::int64_t anchor = args.row_begin + row;
  const AnchorFacts facts = anchor_facts(args, anchor);
  Entries entries{.gScores = nullptr, .gEntries = nullptr, .stride = args.column_stride, .count = args.columns};
  if constexpr (kSample) {
    entries.gScores = args.gScores + row * args.columns;
  } else {
    const std::int64_t count = args.gCounts[row];
    entries.gEntries = args.gBuffer + row * args.capacity;
    entries.count = count < args.capacity ? count : args.capacity;
  }
  // The scores of a blind anchor are never used, and its place of the sample may never have been written.
  SupportThreshold threshold{-kInfinity, 0.0f};
  if (!facts.blind && facts.wanted > 0) {
    const float U = wanted_upper(args, facts, entries, sStage, kStagedSamples, sBins);
    const bool sane = largest_key(args, facts, U) < kSaneKey;
    threshold = support_threshold(sane ? reach_of(args, facts, U) : kInfinity, facts.n, facts.rho, args.eta);
  }
  sync_block();  // all threads have read the count
  if (thread_id() != 0) return;
  if (kSample || threshold.T < args.thresholds.T[anchor]) {
    args.thresholds.T[anchor] = threshold.T;
    args.thresholds.u[anchor] = threshold.u;
  }
  if (kSample) {
    args.thresholds.G[anchor] = kInfinity;
    args.thresholds.g2[anchor] = 0.0f;
  }
  args.gCounts[row] = 0;
  args.gFarCounts[row] = 0;
}

}  // namespace

// ---- dispatch -------------------------------------------------------------------------------------------------------

cudaError_t enqueue_sample_thresholds(const ForwardArgs& args, const ForwardPlan& plan, char* workspace,
                                      const Strip& strip, cudaStream_t stream) {
  const LaunchShape shape{strip.rows + 1, kThresholdThreads, kThresholdBytes};
  return launch(thresholds_kernel<true>, shape, stream, refine_args(args, plan, workspace, strip));
}

cudaError_t enqueue_entry_thresholds(const ForwardArgs& args, const ForwardPlan& plan, char* workspace,
                                     const Strip& strip, cudaStream_t stream) {
  const LaunchShape shape{strip.rows + 1, kThresholdThreads, kThresholdBytes};
  return launch(thresholds_kernel<false>, shape, stream, refine_args(args, plan, workspace, strip));
}

}  // namespace sn::cuda
