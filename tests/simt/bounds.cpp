// The formulas of csrc/cuda/screen/bound.cuh and certificate.cuh as plain calls: tests/backends/test_cuda_bounds.py.
#include "cuda/screen/bound.cuh"

#include "cuda/rescreen/rescreen.cuh"
#include "cuda/screen/args.cuh"
#include "cuda/screen/certificate.cuh"
#include "simt.h"

#define SN_SIMT_EXPORT __attribute__((visibility("default")))

// Inputs: n_i, rho_i, n_j, rho_j, score, eta, reach. Outputs: bounds of the distance from below and above; T, u; G, g2;
// the biases P_j, Q_j.
extern "C" SN_SIMT_EXPORT void sn_simt_bounds(std::int64_t count, const float (*inputs)[7], float (*outputs)[8]) {
  using namespace sn::cuda;
  for (std::int64_t i = 0; i < count; ++i) {
    const auto [n_i, rho_i, n_j, rho_j, score, eta, reach] = inputs[i];
    const SupportThreshold support = support_threshold(reach, n_i, rho_i, eta);
    const FarThreshold far = far_threshold(reach, n_i, rho_i, eta);
    const float results[] = {distance_lower(n_i, rho_i, n_j, rho_j, score, eta),
                             distance_upper(n_i, rho_i, n_j, rho_j, score, eta),
                             support.T,
                             support.u,
                             far.G,
                             far.g2,
                             support_bias(n_j, rho_j, eta),
                             far_bias(n_j, rho_j, eta)};
    for (int r = 0; r < 8; ++r) outputs[i][r] = results[r];
  }
}

// Inputs: n_i (1 + eta), rho_i, the least q of a group and rho_j of the same member. Output: group_upper.
extern "C" SN_SIMT_EXPORT void sn_simt_groups(std::int64_t count, const float (*inputs)[4], float* outputs) {
  for (std::int64_t i = 0; i < count; ++i) {
    outputs[i] = sn::cuda::group_upper(inputs[i][0], inputs[i][1], inputs[i][2], inputs[i][3]);
  }
}

// Of a row that is screened again. Inputs: a square, its error and the residuals of an entry; a row's n, its slack and
// the floor of its residual. Outputs: bounds of the distance from below and above; rho.
extern "C" SN_SIMT_EXPORT void sn_simt_frames(std::int64_t count, const float (*inputs)[6], float (*outputs)[3]) {
  using namespace sn::cuda;
  for (std::int64_t i = 0; i < count; ++i) {
    const auto [square, error, rho, norm, slack, floor] = inputs[i];
    outputs[i][0] = framed_lower(square, error, rho);
    outputs[i][1] = framed_upper(square, error, rho);
    outputs[i][2] = rounding_bound(norm, slack, floor);
  }
}

// Inputs: squares and rests of a row, its slack. Output: rho.
extern "C" SN_SIMT_EXPORT void sn_simt_residuals(std::int64_t count, const float (*inputs)[3], float* outputs) {
  for (std::int64_t i = 0; i < count; ++i) {
    outputs[i] = sn::cuda::residual_bound(inputs[i][0], inputs[i][1], inputs[i][2]);
  }
}

// Constants of rows of `dims` elements: eta, row_slack, stretch, shrink, underflow_distance, underflow_key. Then for
// each distance U in units of the cast 2^exponent: the largest key, the reach, the reach of the farthest.
extern "C" SN_SIMT_EXPORT void sn_simt_certificates(std::int64_t dims, std::int32_t exponent, std::int64_t count,
                                                    const float* distances, float* constants, float (*outputs)[3]) {
  using namespace sn::cuda;
  sn::ForwardArgs forward{};
  forward.dims = dims;
  ForwardPlan plan;
  plan.padded_dims = sn::round_up(dims, kStageColumns);
  char workspace[kWorkspaceAlignment];
  const RefineArgs args = refine_args(forward, plan, workspace, {0, 0});
  const float all[] = {args.eta,    row_slack(plan.padded_dims), args.stretch,
                       args.shrink, args.underflow_distance,     args.underflow_key};
  for (int c = 0; c < 6; ++c) constants[c] = all[c];
  AnchorFacts facts{};
  facts.scale = float_from_bits(static_cast<std::uint32_t>(127 + exponent) << 23);
  facts.unscale = float_from_bits(static_cast<std::uint32_t>(127 - exponent) << 23);
  for (std::int64_t i = 0; i < count; ++i) {
    outputs[i][0] = largest_key(args, facts, distances[i]);
    outputs[i][1] = reach_of(args, facts, distances[i]);
    outputs[i][2] = far_reach_of(args, facts, distances[i]);
  }
}
