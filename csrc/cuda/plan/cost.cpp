#include "cuda/plan/cost.h"

#include <algorithm>

#include "cuda/plan/sizes.h"

namespace sn::cuda {
namespace {

// ---- constants ------------------------------------------------------------------------------------------------------

// All from benchmarks/results/nvidia-h200/2026-11-26-d45aac1840-measure.json, steps "ceilings", "kernels" and "paths",
// unless it says "counted, not measured". Microseconds, bytes and multiply-adds a microsecond, on 132 multiprocessors.
constexpr double kDeviceMultiprocessors = 132.0;
constexpr double kLaunch = 1.5;        // a kernel that does next to nothing: fallback, far thresholds 1.3 to 1.5
constexpr double kMemory = 4.1e6;      // bytes: facts of 65536 x 2048, 805 MB in 198
constexpr double kCache = 7.4e6;       // bytes from the L2: rows that the refinement sums
constexpr double kTensor = 2.01e8;     // multiply-adds of 128 x 128 tiles: 8192 x 2048 against 8192 x 512
constexpr double kDirectRate = 1.5e7;  // pairs and elements of the tiles of direct sums

double devices(const DeviceFacts& device) {
  return std::max(1, device.multiprocessors) / kDeviceMultiprocessors;
}

// ---- kernels --------------------------------------------------------------------------------------------------------

double sample_us(const Problem& problem) {
  return problem.dtype == DType::kFloat32 ? 6.0 + 0.0008 * static_cast<double>(problem.D) : 1.2;
}

// Reads the rows and writes their copies.
double facts_us(const ForwardPlan& plan, const Problem& problem, double scale) {
  const double element = static_cast<double>(element_bytes(problem.dtype));
  const double D = static_cast<double>(problem.D);
  const bool other = !problem.symmetric && plan.path != ForwardPath::kBank;
  const double candidates = other ? static_cast<double>(problem.M) : 0.0;
  const double anchors = static_cast<double>(problem.N);
  const double copies = (plan.cast_anchors ? anchors : 0.0) + (plan.cast_candidates ? candidates : 0.0);
  const double bytes = (anchors + candidates) * D * element + copies * 2.0 * static_cast<double>(plan.padded_dims);
  return 3.0 + bytes / (kMemory * scale);
}

// Counted, not measured: the table (3 to 4 us behind a launch), the latency of an atomic for each batch of candidates,
// look-ups at 10 cycles a warp (sizes.h).
double positives_us(const ForwardPlan& plan, const Problem& problem, double scale) {
  const auto groups = static_cast<double>(divide_up(problem.N, plan.positive_anchors));
  const auto batches = static_cast<double>(divide_up(divide_up(problem.M, plan.positive_segments), kPositivesBatch));
  return 5.0 + batches + groups * static_cast<double>(problem.M) / (0x1p19 * scale);
}

double thresholds_us(double rows, double entries, double scale) {
  return 4.0 + rows * (0.002 + 7.0e-6 * entries) / scale;
}

double refine_us(const ForwardPlan& plan, const Problem& problem, double rows, double scale) {
  const double D = static_cast<double>(problem.D);
  const double K = static_cast<double>(plan.K);
  const double row_bytes = 2.5 * K * D * static_cast<double>(element_bytes(problem.dtype));
  const double alone = 12.0 + 0.028 * D * K / 10.0;
  const double scan = plan.path == ForwardPath::kDense ? 0.00003 * static_cast<double>(problem.M) : 0.0;
  return std::max(alone, rows * (0.016 + scan + row_bytes / kCache) / scale);
}

double merge_us(double rows, double scale) {
  return 5.0 + rows * 0.0009 / scale;
}

}  // namespace

double score_pass_us(const ScorePass& pass, const DeviceFacts& device) {
  const double scale = devices(device);
  const auto tiles_down = static_cast<double>(divide_up(pass.rows, pass.tile_rows));
  const auto tiles_across = static_cast<double>(divide_up(pass.columns, pass.tile_columns));
  const double tile_pairs = static_cast<double>(pass.tile_rows) * pass.tile_columns;
  const double tiles = pass.symmetric ? tiles_down * (tiles_across + 1.0) / 2.0 : tiles_down * tiles_across;
  const double share = pass.tile_rows < 128 ? 0.6 : 1.0;
  const double epilogue = pass.symmetric ? 1.5e-6 : 1.1e-6;  // a pair
  const double D = static_cast<double>(pass.dims);
  const double tile_us = tile_pairs * (D / (kTensor * share) + epilogue);
  // A block alone: its stages one after the other.
  const double stages = D / static_cast<double>(kStageColumns);
  const double alone = 3.0 + stages * (pass.tile_rows < 128 ? 0.29 : 0.5);
  return kLaunch + std::max(alone, tiles * tile_us / scale);
}

namespace {

double plan_score_us(const ForwardPlan& plan, std::int64_t rows, std::int64_t columns, bool symmetric, bool dense,
                     const DeviceFacts& device) {
  ScorePass pass{.rows = rows, .columns = columns, .dims = plan.padded_dims, .symmetric = symmetric, .dense = dense};
  if (divide_up(rows, 128) * divide_up(columns, 128) < 256) pass.tile_rows = pass.tile_columns = 64;
  const double us = score_pass_us(pass, device);
  if (plan.path != ForwardPath::kBank) return us;
  // Reads fp32 rows of the bank and converts them.
  const double bytes = static_cast<double>(columns) * static_cast<double>(plan.padded_dims) * 4.0;
  return 10.0 + std::max(us, bytes / (1.0e6 * devices(device)));
}

void predict_cluster(const ForwardPlan& plan, const Problem& problem, Cost* cost) {
  const double slices = static_cast<double>(cluster_planes(plan));
  const double anchors = static_cast<double>(problem.N) / static_cast<double>(8 * plan.cluster);
  cost->add("cluster", 10.0 + 3.0 * slices + 6.5 * anchors);
}

void predict_direct(const ForwardPlan& plan, const Problem& problem, const DeviceFacts& device, Cost* cost) {
  const double scale = devices(device);
  const auto strips = static_cast<double>(plan.strips);
  const auto tiles = static_cast<double>(direct_tiles(plan.strip_rows, problem.M, plan.triangular));
  const double tile = static_cast<double>(kDirectTile * kDirectTile);
  const double slow = problem.dtype == DType::kFloat64 ? 2.0 : 1.0;
  const double D = static_cast<double>(problem.D);
  const double alone = 3.0 + 0.045 * static_cast<double>(plan.slice_elements);
  const double tiles_us = std::max(alone, 3.0 + slow * tiles * tile * D / (kDirectRate * scale));
  cost->add("tiles", strips * tiles_us, plan.strips);
  const double M = static_cast<double>(problem.M);
  const double rows = static_cast<double>(plan.strip_rows);
  const double row_us = 0.008 + M * (problem.M > 1024 ? 0.00003 : 0.00001);
  cost->add("select", strips * (10.0 + rows * row_us / scale), plan.strips);
}

void predict_screened(const ForwardPlan& plan, const Problem& problem, const DeviceFacts& device, Cost* cost) {
  const double scale = devices(device);
  const auto strips = static_cast<double>(plan.strips);
  const auto rows = static_cast<double>(plan.strip_rows);
  const bool dense = plan.path == ForwardPath::kDense;
  const auto scores = [&](std::int64_t columns, bool symmetric, bool write) {
    return strips * plan_score_us(plan, plan.strip_rows, columns, symmetric, write, device);
  };
  cost->add("sample", sample_us(problem));
  cost->add("facts", facts_us(plan, problem, scale));
  cost->add("positives", positives_us(plan, problem, scale));
  if (dense) {
    cost->add("scores", scores(problem.M, false, true), plan.strips);
  } else {
    cost->add("sample scores", scores(plan.sample_columns, false, true), plan.strips);
    const auto sample = static_cast<double>(plan.sample_columns);
    cost->add("sample thresholds", strips * thresholds_us(rows, sample, scale), plan.strips);
    if (may_have_large_identities(problem.M)) cost->add("far thresholds", strips * kLaunch, plan.strips);
    if (plan.second_stride > 0) {
      cost->add("second scores", scores(divide_up(problem.M, plan.second_stride), false, false), plan.strips);
      cost->add("entry thresholds", strips * thresholds_us(rows, 160.0, scale), plan.strips);
    }
    cost->add("scores", scores(problem.M, plan.triangular, false), plan.strips);
  }
  cost->add("refine", strips * refine_us(plan, problem, rows, scale), plan.strips);
  cost->add("fallback", strips * kLaunch, plan.strips);
  cost->add("merge", strips * merge_us(rows, scale), plan.strips);
}

}  // namespace

Cost predict_forward(const ForwardPlan& plan, const Problem& problem, const DeviceFacts& device, Batch batch) {
  static_cast<void>(batch);
  Cost cost;
  switch (plan.path) {
    case ForwardPath::kCluster:
      predict_cluster(plan, problem, &cost);
      break;
    case ForwardPath::kAuto:
    case ForwardPath::kDirect:
      predict_direct(plan, problem, device, &cost);
      break;
    case ForwardPath::kDense:
    case ForwardPath::kScreen:
    case ForwardPath::kBank:
      predict_screened(plan, problem, device, &cost);
      break;
  }
  return cost;
}

Cost predict_backward(const BackwardPlan& plan, const BackwardProblem& problem, const DeviceFacts& device) {
  Cost cost;
  if (plan.launches == 0) return cost;
  const double scale = devices(device);
  const double edges = static_cast<double>(problem.N) * static_cast<double>(problem.edges);
  if (plan.partitioned) {
    cost.add("count", 2.0 + edges * 6.0e-6 / scale);
    cost.add("prefix sums", kLaunch + edges * 2.0e-6 / scale);
    cost.add("place", 6.0 + edges * 3.6e-5 / scale);
  }
  const double row = static_cast<double>(problem.D) * static_cast<double>(element_bytes(problem.dtype));
  const bool both = problem.need_candidates && !problem.symmetric;
  const double rows = static_cast<double>(problem.N) + (both ? static_cast<double>(problem.M) : 0.0);
  const double bytes = (1.5 * edges + 2.0 * rows) * row;
  cost.add("gather", 6.0 + bytes / (kCache * scale));
  return cost;
}

}  // namespace sn::cuda
