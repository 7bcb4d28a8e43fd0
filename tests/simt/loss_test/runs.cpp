// Runs of the forward and the backward through the C interface.
#include "loss_test.h"

#include <array>

namespace sn::loss_test {

double mma_error_scale = 1.0;

sn_simt_settings settings_for(std::uint64_t seed, simt::MmaError error, ForwardPath path) {
  return {.seed = seed,
          .mma_seed = seed + 100,
          .mma_error_scale = mma_error_scale,
          .mma_error = static_cast<std::int32_t>(error),
          .path = static_cast<std::int32_t>(path),
          .partition = 0,
          .major = 9,
          .minor = 0,
          .multiprocessors = seed % 2 == 0 ? 4 : 132,
          .shared_bytes = 232448,
          .max_cluster = 16,
          .strip_rows = 0,
          .slice_elements = 0,
          .score_tile = 0,
          .sample_stride = 0,
          .sample_group = 0,
          .far_capacity = 0,
          .mma_model = 0,
          .positive_anchors = 0,
          .positive_segments = 0,
          .shared_reduction = 0,
          .lane_bytes = 0,
          .target_lanes = 0,
          .buffer_capacity = 0,
          .no_rescreen = 0,
          .few_rows = 0,
          .bucket_shift = 0,
          .select_threads = 0,
          .selection = 0};
}

void vary(sn_simt_settings& settings, std::uint64_t word) {
  const bool whole_tiles = word / 37 % 3 == 0;
  settings.strip_rows = word % 2 == 0 ? 0 : whole_tiles ? 64 : static_cast<std::int32_t>(17 + word / 2 % 40);
  settings.slice_elements = 64 << word % 3;
  settings.score_tile = 64 << word / 31 % 3;
  settings.sample_stride = word / 5 % 2 == 0 ? 0 : 2;
  settings.sample_group = std::array{0, 1, 8, 32}[word / 7 % 4];
  settings.far_capacity = word / 11 % 2 == 0 ? 0 : 5;
  settings.positive_anchors = word / 13 % 2 == 0 ? 0 : 16;
  settings.positive_segments = word / 17 % 2 == 0 ? 0 : 5;
  settings.shared_reduction = static_cast<std::int32_t>(word / 19 % 2);
  settings.buffer_capacity = word / 23 % 2;
  settings.few_rows = word / 29 % 2;
  settings.lane_bytes = std::array{0, 16, 24, 32}[word / 37 % 4];
  settings.target_lanes = word / 53 % 2 == 0 ? 32 : 16;
  settings.bucket_shift = std::array{0, 3, 10}[word / 41 % 3];
  settings.select_threads = word / 43 % 2 == 0 ? 256 : 128;
  settings.selection = static_cast<std::int32_t>(word / 47 % 4);
}

Result forward(const Problem& p, const sn_simt_settings& settings) {
  const DType dtype = p.anchors.dtype;
  const std::int64_t acc = accumulator_bytes(dtype);
  const std::int64_t edges = p.N() * (p.K() + kExtraEdges);
  Result r;
  r.loss = Bytes(acc * (p.options.reduction == Reduction::kNone ? p.N() : 1));
  r.indices = Bytes(4 * edges);
  r.coefficients = Bytes(acc * edges);
  r.near = Bytes(4 * p.N());
  r.far = Bytes(4 * p.N());
  r.squared = Bytes(acc * edges);
  r.stats = Bytes(8 * kStatsSize);
  ForwardArgs args{};
  args.dtype = dtype;
  args.dims = p.D();
  args.anchors = p.anchors.view();
  args.candidates = p.pool().view();
  args.anchor_labels = p.anchor_labels.data();
  args.candidate_labels = p.pool_labels().data();
  args.self = {p.self_index.empty() ? nullptr : p.self_index.data(), p.symmetric ? 0 : p.self_offset};
  args.symmetric = p.symmetric;
  args.options = p.options;
  args.loss = r.loss.as<void>();
  args.indices = r.indices.as<std::int32_t>();
  args.coefficients = r.coefficients.as<void>();
  args.nearest_positive = r.near.as<std::int32_t>();
  args.farthest_positive = r.far.as<std::int32_t>();
  args.squared = r.squared.as<void>();
  args.stats = r.stats.as<double>();
  const int error = sn_simt_forward(&args, &settings, &r.report);
  check(error == 0, r.report.fault);
  return r;
}

Gradients backward(const Problem& p, const Result& r, const sn_simt_settings& settings) {
  const DType dtype = p.anchors.dtype;
  Gradients g;
  g.anchors = Bytes(p.N() * p.D() * element_bytes(dtype));
  g.candidates = Bytes(p.symmetric ? 0 : p.M() * p.D() * element_bytes(dtype));
  const Bytes upstream(r.loss.size());
  for (std::int64_t i = 0; i < r.loss.size() / accumulator_bytes(dtype); ++i) {
    write(upstream.as<void>(), dtype == DType::kFloat64 ? dtype : DType::kFloat32, i,
          1.0 + 0.25 * static_cast<double>(i % 3));
  }
  BackwardArgs args{};
  args.dtype = dtype;
  args.dims = p.D();
  args.edges = p.K() + kExtraEdges;
  args.anchors = p.anchors.view();
  args.candidates = p.pool().view();
  args.symmetric = p.symmetric;
  args.reduction = p.options.reduction;
  args.grad_loss = upstream.as<void>();
  args.indices = r.indices.as<std::int32_t>();
  args.coefficients = r.coefficients.as<void>();
  args.stats = r.stats.as<double>();
  args.grad_anchors = g.anchors.as<void>();
  args.grad_candidates = p.symmetric ? nullptr : g.candidates.as<void>();
  sn_simt_report report;
  const int error = sn_simt_backward(&args, &settings, &report);
  check(error == 0, report.fault);
  return g;
}

}  // namespace sn::loss_test
