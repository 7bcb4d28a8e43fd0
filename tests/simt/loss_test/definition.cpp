// The definition, densely, in double: the reference for selections, losses and gradients.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>

#include "loss_test.h"

namespace sn::loss_test {

DType accumulation(const Problem& p) {
  return p.anchors.dtype == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32;
}

std::vector<double> distances_of(const Problem& p) {
  const Matrix& z = p.pool();
  std::vector<double> d2(static_cast<std::size_t>(p.N() * p.M()));
  for (std::int64_t i = 0; i < p.N(); ++i) {
    for (std::int64_t j = 0; j < p.M(); ++j) {
      double sum = 0.0;
      for (std::int64_t c = 0; c < p.D(); ++c) {
        const double t = p.anchors.get(i, c) - z.get(j, c);
        sum += t * t;
      }
      d2[static_cast<std::size_t>(i * p.M() + j)] = sum;
    }
  }
  return d2;
}

namespace {

// Relative difference of two sums that may come out in either order in the accumulation type.
double slack(const Problem& p) {
  if (p.exact) return 0.0;
  const double unit = accumulation(p) == DType::kFloat64 ? 0x1p-53 : 0x1p-24;
  return 2.0 * unit * (64.0 + 16.0 + static_cast<double>(p.D()) / 2048.0);
}
// Absolute difference: squares of differences below it are lost to underflow.
double least(const Problem& p) {
  return accumulation(p) == DType::kFloat64 ? 0.0 : static_cast<double>(p.D()) * 0x1p-148;
}

}  // namespace

void check_selection(const Problem& p, const Result& r, const std::vector<double>& all) {
  const std::int64_t K = p.K();
  const double loose = slack(p);
  const double low = p.exact ? 0.0 : least(p);
  const auto not_after = [&](double a, double b) { return a <= b * (1.0 + loose) + low; };
  for (std::int64_t i = 0; i < p.N(); ++i) {
    const double* d2 = all.data() + i * p.M();
    std::vector<std::int32_t> order;
    std::int32_t near = -1;
    std::int32_t far = -1;
    for (std::int32_t j = 0; j < p.M(); ++j) {
      if (j == p.self_of(i)) continue;
      order.push_back(j);
      if (p.pool_labels()[static_cast<std::size_t>(j)] != p.anchor_labels[static_cast<std::size_t>(i)]) continue;
      if (near < 0 || d2[j] < d2[near]) near = j;
      if (far < 0 || d2[j] > d2[far]) far = j;
    }
    std::stable_sort(order.begin(), order.end(), [&](std::int32_t a, std::int32_t b) { return d2[a] < d2[b]; });
    std::vector<bool> taken(static_cast<std::size_t>(p.M()), false);
    for (std::int64_t e = 0; e < K; ++e) {
      const std::int32_t got = r.index(i * (K + 2) + e);
      if (e >= static_cast<std::int64_t>(order.size())) {
        check(got == -1, "a slot with no candidate left is not used");
        continue;
      }
      const std::int32_t want = order[static_cast<std::size_t>(e)];
      check(got >= 0 && got < p.M() && got != p.self_of(i), "a neighbour is a candidate, not the anchor itself");
      if (got != want && (p.exact || std::getenv("SN_VERBOSE") != nullptr)) {
        std::printf("anchor %d slot %d: expected %d (%.17g) got %d (%.17g)\n", static_cast<int>(i), static_cast<int>(e),
                    want, d2[want], got, d2[got]);
      }
      check(!taken[static_cast<std::size_t>(got)], "neighbours are distinct");
      taken[static_cast<std::size_t>(got)] = true;
      check(p.exact ? got == want : not_after(d2[got], d2[want]) && not_after(d2[want], d2[got]),
            "neighbours, in order");
    }
    const std::int32_t got_near = r.near.as<std::int32_t>()[i];
    const std::int32_t got_far = r.far.as<std::int32_t>()[i];
    check((got_near < 0) == (near < 0) && (got_far < 0) == (far < 0), "positives are found");
    if (near < 0) continue;
    if (p.exact) check(got_near == near && got_far == far, "nearest and farthest positive");
    for (const std::int32_t j : {got_near, got_far}) {
      check(j < p.M() && j != p.self_of(i) &&
                p.pool_labels()[static_cast<std::size_t>(j)] == p.anchor_labels[static_cast<std::size_t>(i)],
            "positives have the anchor's label");
    }
    check(not_after(d2[got_near], d2[near]) && not_after(d2[far], d2[got_far]), "nearest and farthest positive, about");
  }
}

void check_loss(const Problem& p, const Result& r, const Gradients& g, const std::vector<double>& all) {
  const std::int64_t N = p.N(), M = p.M(), D = p.D(), K = p.K();
  const double alpha = p.options.alpha;
  const double weight = p.options.weight;
  std::vector<double> losses(static_cast<std::size_t>(N), 0.0);
  std::vector<double> slopes(static_cast<std::size_t>(N * M), 0.0);  // (dL_i / dd_ij) / d_ij
  double valid = 0.0, largest = 0.0;
  double positive_sum = 0.0, positives = 0.0, negative_sum = 0.0, negatives = 0.0, hits = 0.0, members = 0.0;
  for (std::int64_t i = 0; i < N; ++i) {
    const std::int32_t near = r.near.as<std::int32_t>()[i];
    const std::int32_t far = r.far.as<std::int32_t>()[i];
    if (near < 0) continue;
    valid += 1.0;
    const auto d2 = [&](std::int32_t j) { return all[static_cast<std::size_t>(i * M + j)]; };
    const auto d = [&](std::int32_t j) { return std::sqrt(std::max(d2(j), 1e-12)); };
    std::vector<std::int32_t> own, others;
    for (std::int64_t e = 0; e < K; ++e) {
      const std::int32_t j = r.index(i * (K + 2) + e);
      if (j < 0) continue;
      const bool same = p.pool_labels()[static_cast<std::size_t>(j)] == p.anchor_labels[static_cast<std::size_t>(i)];
      (same ? own : others).push_back(j);
      if (e == 0 && same) hits += 1.0;
    }
    members += static_cast<double>(own.size());
    if (own.empty()) own.push_back(near);
    for (const std::int32_t j : own) positive_sum += d(j), positives += 1.0, largest = std::max(largest, d(j));
    for (const std::int32_t j : others) negative_sum += d(j), negatives += 1.0, largest = std::max(largest, d(j));
    largest = std::max(largest, d(far));
    const auto mass = [&](const std::vector<std::int32_t>& side, double from) {
      double sum = 0.0;
      for (const std::int32_t j : side) sum += std::exp(-alpha * (d(j) - from));
      return sum;
    };
    const auto slope = [&](std::int32_t j) -> double& { return slopes[static_cast<std::size_t>(i * M + j)]; };
    if (!others.empty()) {
      const double from = std::min(d(own[0]), d(others[0]));
      const double p_mass = mass(own, d(own[0]));
      const double log_p = std::log(p_mass) - alpha * (d(own[0]) - from);
      const double n_mass = mass(others, d(others[0]));
      const double log_n = std::log(n_mass) - alpha * (d(others[0]) - from);
      const double v = log_n - log_p;
      losses[static_cast<std::size_t>(i)] = v > 0 ? v + std::log1p(std::exp(-v)) : std::log1p(std::exp(v));
      const double share = v > 0 ? 1.0 / (1.0 + std::exp(-v)) : std::exp(v) / (1.0 + std::exp(v));
      for (const std::int32_t j : own) slope(j) += alpha * share * std::exp(-alpha * (d(j) - d(own[0]))) / p_mass;
      for (const std::int32_t j : others) slope(j) -= alpha * share * std::exp(-alpha * (d(j) - d(others[0]))) / n_mass;
    }
    double squeeze = 0.0;
    switch (p.options.squeeze) {
      case Squeeze::kSpan:
        squeeze = d(far) - d(near);
        slope(far) += weight;
        slope(near) -= weight;
        break;
      case Squeeze::kSupport: {
        // P_i is in order. The farthest of it, the lower index on a tie.
        std::int32_t last = own[0];
        for (const std::int32_t j : own) {
          if (r.squared.size() > 0 && d2(j) > d2(last)) last = j;
        }
        if (own.size() > 1) {
          squeeze = d(last) - d(own[0]);
          slope(last) += weight;
          slope(own[0]) -= weight;
        } else {
          squeeze = d(own[0]);
          slope(own[0]) += weight;
        }
        break;
      }
      case Squeeze::kNearest:
        squeeze = d(near);
        slope(near) += weight;
        break;
      case Squeeze::kNone:
        break;
    }
    losses[static_cast<std::size_t>(i)] += weight * squeeze;
    for (std::int32_t j = 0; j < M; ++j) {
      slope(j) = d2(j) < 1e-12 ? 0.0 : slope(j) / d(j);
    }
  }

  const double room = 1e-6 * (1.0 + (alpha + weight) * largest);
  const DType acc = accumulation(p);
  double total = 0.0;
  for (const double loss : losses) total += loss;
  if (p.options.reduction == Reduction::kNone) {
    for (std::int64_t i = 0; i < N; ++i) {
      const double got = read(r.loss.as<void>(), acc, i);
      const double want = losses[static_cast<std::size_t>(i)];
      check(std::fabs(got - want) <= room + 1e-7 * std::fabs(want), "loss of an anchor");
    }
  } else {
    const double want = p.options.reduction == Reduction::kMean ? total / std::max(valid, 1.0) : total;
    const double scale = p.options.reduction == Reduction::kMean ? 1.0 : std::max(valid, 1.0);
    check(std::fabs(read(r.loss.as<void>(), acc, 0) - want) <= scale * room + 1e-7 * std::fabs(want), "loss");
  }
  const double* stats = r.stats.as<double>();
  const auto about = [](double got, double want) { return std::fabs(got - want) <= 1e-5 * (1e-30 + std::fabs(want)); };
  check(stats[kValidAnchors] == valid, "valid anchors");
  check(about(stats[kPositiveDistance], positive_sum / std::max(positives, 1.0)), "mean distance of positives");
  check(about(stats[kNegativeDistance], negative_sum / std::max(negatives, 1.0)), "mean distance of negatives");
  check(about(stats[kNearestIsPositive], hits / std::max(valid, 1.0)), "nearest is positive");
  check(about(stats[kSupportPositives], members / std::max(valid, 1.0)), "positives of the support");
  check(stats[kPoison] == 0.0, "no poison");

  // Squared distances of the edges, and slots that are not used.
  for (std::int64_t i = 0; i < N; ++i) {
    for (std::int64_t e = 0; e < K + 2; ++e) {
      const std::int64_t at = i * (K + 2) + e;
      const std::int32_t j = r.index(at);
      const double squared = read(r.squared.as<void>(), acc, at);
      if (j < 0) {
        check(j == -1 && squared == HUGE_VAL && read(r.coefficients.as<void>(), acc, at) == 0.0, "an unused slot");
        continue;
      }
      const double want = all[static_cast<std::size_t>(i * M + j)];
      check(std::fabs(squared - want) <= slack(p) * want + least(p), "squared distance of an edge");
    }
  }

  // Gradients, in L2.
  std::vector<double> of_anchors(static_cast<std::size_t>(N * D), 0.0);
  std::vector<double> of_candidates(static_cast<std::size_t>(p.symmetric ? 0 : M * D), 0.0);
  double upstream = 0.0;
  for (std::int64_t i = 0; i < N; ++i) {
    const double factor =
        p.options.reduction == Reduction::kMean
            ? 1.0 / std::max(valid, 1.0)
            : (p.options.reduction == Reduction::kNone ? 1.0 + 0.25 * static_cast<double>(i % 3) : 1.0);
    upstream += factor * factor;
    for (std::int64_t j = 0; j < M; ++j) {
      const double w = factor * slopes[static_cast<std::size_t>(i * M + j)];
      if (w == 0.0) continue;
      for (std::int64_t c = 0; c < D; ++c) {
        const double part = w * (p.anchors.get(i, c) - p.pool().get(j, c));
        of_anchors[static_cast<std::size_t>(i * D + c)] += part;
        (p.symmetric ? of_anchors : of_candidates)[static_cast<std::size_t>(j * D + c)] -= part;
      }
    }
  }
  const auto close = [&](const std::vector<double>& want, const Bytes& got, const char* what) {
    double error = 0.0, size = 0.0;
    for (std::size_t at = 0; at < want.size(); ++at) {
      const double difference = read(got.as<void>(), p.anchors.dtype, static_cast<std::int64_t>(at)) - want[at];
      error += difference * difference;
      size += want[at] * want[at];
      if (!(difference == difference)) error = NAN;
    }
    const double rounding =
        p.anchors.dtype == DType::kFloat16 ? 0x1p-11 : (p.anchors.dtype == DType::kBFloat16 ? 0x1p-8 : 0.0);
    const double tiny =
        p.anchors.dtype == DType::kFloat16 ? 0x1p-25 * std::sqrt(static_cast<double>(want.size())) : 1e-36;
    const double allowed = (2e-6 * (1.0 + alpha * largest) + rounding) * std::sqrt(size) +
                           2e-6 * (alpha + weight) * std::sqrt(upstream) + tiny;
    if (!(std::sqrt(error) <= allowed))
      std::printf("error %g allowed %g size %g\n", std::sqrt(error), allowed, std::sqrt(size));
    check(std::sqrt(error) <= allowed, what);
  };
  close(of_anchors, g.anchors, "gradient of the anchors");
  close(of_candidates, g.candidates, "gradient of the candidates");
}

}  // namespace sn::loss_test
