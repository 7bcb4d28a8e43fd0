// What a plan is predicted to cost, kernel by kernel: a pure function of the plan, the shape and device facts, like the
// plan itself. The choice between paths is the cheapest prediction (plan.cpp), so a measured time that contradicts one
// of these contradicts the choice, too. cost.cpp has every constant, each with the record that it was read from.
#pragma once

#include <array>
#include <cstdint>

#include "cuda/plan/plan_types.h"

namespace sn::cuda {

struct KernelCost {
  const char* name;
  std::int64_t launches;
  double us;  // of all its launches
};

// Microseconds of GPU time in a CUDA graph, kernels in the order of their first launch. Nothing is allocated.
class Cost {
 public:
  static constexpr int kMostKernels = 24;

  void add(const char* name, double us, std::int64_t launches = 1) {
    if (count_ < kMostKernels) kernels_[static_cast<std::size_t>(count_++)] = {name, launches, us};
    total_ += us;
  }
  double total() const { return total_; }
  int count() const { return count_; }
  const KernelCost& kernel(int number) const { return kernels_[static_cast<std::size_t>(number)]; }

 private:
  std::array<KernelCost, kMostKernels> kernels_;  // those beyond the count are not set: a plan costs nanoseconds
  int count_ = 0;
  double total_ = 0.0;
};

// What the features look like, as far as it costs time. Shapes do not say it: the plan is made for kRandom.
enum class Batch : std::int32_t {
  // Every row is certified.
  kRandom = 0,
  // A few clusters tighter than the scores' errors and larger than a buffer: every row is screened again. Of dense
  // scores it falls back.
  kClusters = 1,
  // One point, in identities that are listed whole: nothing is scored, the first refinement finishes all.
  kIdentical = 2,
  // Clusters of kClusterIdentity rows, each an identity: of every row the fallback finds the farthest positive.
  kLargeClusters = 3,
  // One point, in identities of kIdenticalIdentity rows: the fallback finds near and far by labels alone.
  kLargeIdentical = 4
};
inline constexpr std::int64_t kClusterIdentity = 256;
inline constexpr std::int64_t kIdenticalIdentity = 1024;

Cost predict_forward(const ForwardPlan& plan, const Problem& problem, const DeviceFacts& device,
                     Batch batch = Batch::kRandom);
Cost predict_backward(const BackwardPlan& plan, const BackwardProblem& problem, const DeviceFacts& device);

// One pass of the score kernel over rows x columns pairs of `dims` (padded) dimensions by tiles of tile_rows x
// tile_columns. symmetric: of the square of the rows with themselves, tiles on and above the diagonal alone. dense:
// scores are written, not tested.
struct ScorePass {
  int tile_rows = 128;
  int tile_columns = 128;
  std::int64_t rows = 0;
  std::int64_t columns = 0;
  std::int64_t dims = 0;
  bool symmetric = false;
  bool dense = false;
};
double score_pass_us(const ScorePass& pass, const DeviceFacts& device);

// The columns of the tile that makes this pass cheapest, by waves and cost: 64 (x 64), 128 (x 128), or 256 (x 128)
// where a block may have its shared memory and `wide` allows it.
int cheapest_score_tile(ScorePass pass, bool wide, const DeviceFacts& device);

// Whether a strip of so many rows of ForwardPath::kScreen is refined in less time by a warp a row than by four.
bool refines_by_warps(const ForwardPlan& plan, const Problem& problem, std::int64_t rows, const DeviceFacts& device);

}  // namespace sn::cuda
