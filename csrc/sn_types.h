// Plain types shared by host code, device code and tests: options, shapes, the support graph.
// Nothing here knows a framework; shapes are N anchors, M candidates, D dimensions, K = min(k, M) neighbours.
#pragma once

#include <cstdint>

namespace sn {

enum class DType : std::int32_t { kFloat32 = 0, kFloat64 = 1, kFloat16 = 2, kBFloat16 = 3 };
constexpr std::int64_t element_bytes(DType dtype) {
  return dtype == DType::kFloat64 ? 8 : (dtype == DType::kFloat32 ? 4 : 2);
}
constexpr std::int64_t accumulator_bytes(DType dtype) {
  return dtype == DType::kFloat64 ? 8 : 4;
}

// Of values that are not negative.
constexpr std::int64_t divide_up(std::int64_t value, std::int64_t divisor) {
  return (value + divisor - 1) / divisor;
}
constexpr std::int64_t round_up(std::int64_t value, std::int64_t multiple) {
  return divide_up(value, multiple) * multiple;
}

enum class Squeeze : std::int32_t { kSpan = 0, kSupport = 1, kNearest = 2, kNone = 3 };
enum class Reduction : std::int32_t { kMean = 0, kSum = 1, kNone = 2 };

// Distances are clamped from below so that sqrt has a finite derivative; no gradient flows where the clamp holds.
inline constexpr double kSquaredDistanceFloor = 1e-12;

// Entries of the statistics vector (float64), in order. kPoison is 0, or NaN when an input value was not finite.
enum StatsEntry : std::int32_t {
  kValidAnchors = 0,
  kPositiveDistance = 1,
  kNegativeDistance = 2,
  kNearestIsPositive = 3,
  kSupportPositives = 4,
  kPoison = 5,
  kStatsSize = 6
};

// Edge slots of an anchor behind its K support slots.
inline constexpr std::int64_t kExtraEdges = 2;  // near_i at K, far_i at K + 1

// Where the training operator keeps a support graph, in one buffer without gaps: coefficients, acc [N, edges], at its
// start, then indices int32 [N, edges], then the nearest and the farthest positives, int32 [N] each. In bytes.
struct GraphLayout {
  std::int64_t indices;
  std::int64_t nearest_positive;
  std::int64_t farthest_positive;
  std::int64_t bytes;
};
constexpr GraphLayout graph_layout(std::int64_t N, std::int64_t edges, DType dtype) {
  constexpr std::int64_t kWord = sizeof(std::int32_t);
  const std::int64_t indices = N * edges * accumulator_bytes(dtype);
  const std::int64_t nearest = indices + N * edges * kWord;
  const std::int64_t farthest = nearest + N * kWord;
  return {indices, nearest, farthest, farthest + N * kWord};
}

struct LossOptions {
  std::int64_t k;
  double alpha;
  double weight;
  Squeeze squeeze;
  Reduction reduction;
};

// A matrix of features, unit stride along D.
struct FeatureView {
  const void* data;
  std::int64_t rows;
  std::int64_t row_stride;  // in elements
};

// Which candidate an anchor is itself: none (offset < 0, index null), candidate offset + i, or index[i] (-1: none).
struct SelfMap {
  const std::int64_t* index;  // [N] or null
  std::int64_t offset;
};

struct ForwardArgs {
  DType dtype;
  std::int64_t dims;  // D
  FeatureView anchors;
  FeatureView candidates;
  const std::int64_t* anchor_labels;     // [N]
  const std::int64_t* candidate_labels;  // [M]
  SelfMap self;
  bool symmetric;  // the candidates are the anchors: same memory, same labels, self of i is i
  LossOptions options;

  // Outputs. "acc" is float, or double for kFloat64.
  void* loss;                       // acc, one value or [N] for Reduction::kNone
  std::int32_t* indices;            // [N, K + 2]
  void* coefficients;               // acc [N, K + 2]
  std::int32_t* nearest_positive;   // [N]
  std::int32_t* farthest_positive;  // [N]
  void* squared;                    // acc [N, K + 2], or null: unclamped d2 of each edge, +inf where there is none
  double* stats;                    // [kStatsSize]
};

struct BackwardArgs {
  DType dtype;
  std::int64_t dims;   // D
  std::int64_t edges;  // K + 2
  FeatureView anchors;
  FeatureView candidates;
  bool symmetric;
  Reduction reduction;
  const void* grad_loss;        // acc, one value or [N] for Reduction::kNone
  const std::int32_t* indices;  // [N, K + 2]
  const void* coefficients;     // acc [N, K + 2]
  const double* stats;          // [kStatsSize]

  // Outputs in the features' dtype, contiguous; null when not wanted. With `symmetric` both halves land in
  // grad_anchors.
  void* grad_anchors;     // [N, D]
  void* grad_candidates;  // [M, D]
};

// The framework's thread pool, handed in by the binding: run(ctx, body_begin, body_end) over [begin, end).
struct ThreadPool {
  int threads;
  void (*parallel_for)(std::int64_t begin, std::int64_t end, std::int64_t grain,
                       void (*body)(std::int64_t, std::int64_t, void*), void* context);
};

}  // namespace sn
