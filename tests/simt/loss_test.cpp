// The CUDA kernels on the harness, over every path that can serve a problem, schedules and errors of the products: the
// selection is that of a plain evaluation in double, results repeat bit for bit whatever the path, the schedule and the
// error, and the loss and its gradients are what the definition gives for that selection. Exits non-zero on the first
// failure. `--scale s` multiplies the injected error of the products, to see what a bound that is too small does.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <limits>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "capi.h"
#include "cuda/ptx.cuh"

namespace {

using sn::DType;
using sn::Reduction;
using sn::Squeeze;
using sn::cuda::ForwardPath;

int checks = 0;
std::string where;

void check(bool holds, const char* what) {
  if (holds) {
    ++checks;
    return;
  }
  std::printf("FAILED: %s: %s\n%d passed, 1 failed\n", where.c_str(), what, checks);
  std::exit(1);
}

const char* const kPathNames[] = {"auto", "cluster", "direct", "dense", "screen", "bank"};
constexpr int kPaths = 6;

// ---- problems -------------------------------------------------------------------------------------------------------

// Memory of an exact size, so that AddressSanitizer sees every overrun.
class Bytes {
 public:
  explicit Bytes(std::int64_t bytes) : size_(bytes) {
    if (posix_memalign(&data_, 256, static_cast<std::size_t>(std::max<std::int64_t>(bytes, 1))) != 0) std::abort();
  }
  Bytes(const Bytes&) = delete;
  Bytes& operator=(const Bytes&) = delete;
  Bytes(Bytes&& other) noexcept : data_(other.data_), size_(other.size_) { other.data_ = nullptr; }
  Bytes& operator=(Bytes&& other) noexcept {
    std::swap(data_, other.data_);
    std::swap(size_, other.size_);
    return *this;
  }
  ~Bytes() { std::free(data_); }

  template <typename T>
  T* as() const {
    return static_cast<T*>(data_);
  }
  std::int64_t size() const { return size_; }
  bool same(const Bytes& other) const {
    return size_ == other.size_ && std::memcmp(data_, other.data_, static_cast<std::size_t>(size_)) == 0;
  }

 private:
  void* data_ = nullptr;
  std::int64_t size_;
};

double read(const void* data, DType dtype, std::int64_t at) {
  switch (dtype) {
    case DType::kFloat32:
      return static_cast<const float*>(data)[at];
    case DType::kFloat64:
      return static_cast<const double*>(data)[at];
    case DType::kFloat16:
      return sn::cuda::widen(static_cast<const sn::cuda::Half*>(data)[at]);
    case DType::kBFloat16:
      return sn::cuda::widen(static_cast<const sn::cuda::BFloat16*>(data)[at]);
  }
  return 0.0;
}
void write(void* data, DType dtype, std::int64_t at, double value) {
  switch (dtype) {
    case DType::kFloat32:
      static_cast<float*>(data)[at] = static_cast<float>(value);
      break;
    case DType::kFloat64:
      static_cast<double*>(data)[at] = value;
      break;
    case DType::kFloat16:
      static_cast<sn::cuda::Half*>(data)[at] = sn::cuda::narrow<sn::cuda::Half>(value);
      break;
    case DType::kBFloat16:
      static_cast<sn::cuda::BFloat16*>(data)[at] = sn::cuda::narrow<sn::cuda::BFloat16>(value);
      break;
  }
}

// Rows that start `lead` elements into their memory, `stride` apart.
struct Matrix {
  DType dtype = DType::kFloat32;
  std::int64_t rows = 0;
  std::int64_t dims = 0;
  std::int64_t stride = 0;
  std::int64_t lead = 0;
  Bytes bytes{0};

  Matrix() = default;
  Matrix(DType type, std::int64_t row_count, std::int64_t dim_count, std::int64_t padding, std::int64_t first)
      : dtype(type),
        rows(row_count),
        dims(dim_count),
        stride(dim_count + padding),
        lead(first),
        bytes(sn::element_bytes(type) * (row_count > 0 ? first + (row_count - 1) * stride + dim_count : 0)) {
    for (std::int64_t at = 0; at < bytes.size() / sn::element_bytes(type); ++at)
      write(bytes.as<void>(), dtype, at, NAN);
  }
  double get(std::int64_t row, std::int64_t column) const {
    return read(bytes.as<void>(), dtype, lead + row * stride + column);
  }
  void set(std::int64_t row, std::int64_t column, double value) {
    write(bytes.as<void>(), dtype, lead + row * stride + column, value);
  }
  sn::FeatureView view() const { return {bytes.as<char>() + lead * sn::element_bytes(dtype), rows, stride}; }
};

struct Problem {
  std::string name;
  Matrix anchors;
  Matrix candidates;  // empty when symmetric
  std::vector<std::int64_t> anchor_labels;
  std::vector<std::int64_t> candidate_labels;
  std::vector<std::int64_t> self_index;  // [N] when used
  std::int64_t self_offset = -1;
  bool symmetric = true;
  bool exact = false;  // every squared distance is exact in the accumulation type, in any order of summation
  sn::LossOptions options{10, 20.0, 0.1, Squeeze::kSpan, Reduction::kMean};

  std::int64_t N() const { return anchors.rows; }
  std::int64_t M() const { return pool().rows; }
  std::int64_t D() const { return anchors.dims; }
  std::int64_t K() const { return std::min(options.k, M()); }
  const Matrix& pool() const { return symmetric ? anchors : candidates; }
  const std::vector<std::int64_t>& pool_labels() const { return symmetric ? anchor_labels : candidate_labels; }
  std::int64_t self_of(std::int64_t i) const {
    if (symmetric) return i;
    if (!self_index.empty()) return self_index[static_cast<std::size_t>(i)];
    return self_offset < 0 ? -1 : self_offset + i;
  }
};

using Fill = std::function<double(std::int64_t row, std::int64_t column)>;

struct Shape {
  std::int64_t N, M, D, k, identities;
};

// `kind` decides values, `shape.M == shape.N` or not whether the candidates are the anchors.
Problem make(const std::string& kind, DType dtype, const Shape& shape, unsigned seed) {
  std::mt19937_64 random(seed);
  std::normal_distribution<double> normal;
  Problem p;
  p.name = kind + " dtype " + std::to_string(static_cast<int>(dtype)) + " N " + std::to_string(shape.N) + " M " +
           std::to_string(shape.M) + " D " + std::to_string(shape.D) + " k " + std::to_string(shape.k) + " ids " +
           std::to_string(shape.identities) + " seed " + std::to_string(seed);
  p.symmetric = shape.M == shape.N;
  p.options.k = shape.k;
  p.options.squeeze = static_cast<Squeeze>(seed % 4);
  p.options.reduction = static_cast<Reduction>(seed / 4 % 3);
  p.options.alpha = seed % 5 == 0 ? 2.0 : 20.0;
  p.options.weight = seed % 7 == 0 ? 0.0 : 0.1;
  p.exact = kind == "grid" || kind == "halves" || kind == "identical" || kind == "duplicates" || kind == "binary";
  // Every few problems: rows apart, rows off alignment.
  const std::int64_t padding = seed % 3 == 1 ? 8 : (seed % 3 == 2 ? 3 : 0);
  const std::int64_t lead = seed % 6 == 5 ? 1 : 0;

  constexpr int kCentres = 5;
  std::vector<double> centres(static_cast<std::size_t>(kCentres * shape.D));
  for (double& value : centres) value = normal(random);
  const auto fill = [&](Matrix& matrix, std::vector<std::int64_t>& labels) {
    matrix = Matrix(dtype, matrix.rows, shape.D, padding, lead);
    for (std::int64_t i = 0; i < matrix.rows; ++i) {
      labels.push_back(static_cast<std::int64_t>(random() % static_cast<std::uint64_t>(shape.identities)) * 1000003 -
                       7);
      const std::int64_t centre = static_cast<std::int64_t>(random() % kCentres);
      const std::int64_t twin = kind == "duplicates" && i > 3 ? static_cast<std::int64_t>(random() % 4) : i;
      for (std::int64_t c = 0; c < shape.D; ++c) {
        double value = normal(random);
        const double centre_value = centres[static_cast<std::size_t>(centre * shape.D + c)];
        if (kind == "grid" || kind == "duplicates") value = static_cast<double>(random() % 5) - 2.0;
        if (kind == "binary") value = static_cast<double>(random() % 2);
        if (kind == "halves") value = 0.5 * (static_cast<double>(random() % 17) - 8.0);
        if (kind == "identical") value = 0.25 * static_cast<double>(c % 3);
        if (kind == "clusters") value = centre_value + 1e-3 * value;
        if (kind == "collapsed") value = centres[static_cast<std::size_t>(c)] * 30.0 + 1e-2 * value;
        if (kind == "tiny") value *= 1e-21;
        if (kind == "huge") value *= 1e15;
        if (kind == "spread") value *= std::pow(10.0, static_cast<double>(i % 13) - 6.0);
        if (kind == "outlier" && i == 1) value *= 1e4;
        if (kind == "zeros" && i % 3 == 0) value = 0.0;
        matrix.set(i, c, value);
      }
      if (twin != i) {
        for (std::int64_t c = 0; c < shape.D; ++c) matrix.set(i, c, matrix.get(twin, c));
      }
    }
  };
  p.anchors.rows = shape.N;
  fill(p.anchors, p.anchor_labels);
  if (p.symmetric) return p;

  p.candidates.rows = shape.M;
  fill(p.candidates, p.candidate_labels);
  const auto place = [&](std::int64_t i, std::int64_t j) {
    for (std::int64_t c = 0; c < shape.D; ++c) p.candidates.set(j, c, p.anchors.get(i, c));
    p.candidate_labels[static_cast<std::size_t>(j)] = p.anchor_labels[static_cast<std::size_t>(i)];
  };
  if (seed % 2 == 0 && shape.M >= shape.N) {
    p.self_offset = shape.M - shape.N;
    for (std::int64_t i = 0; i < shape.N; ++i) place(i, p.self_offset + i);
  } else if (seed % 4 == 1 && shape.M > 0) {
    for (std::int64_t i = 0; i < shape.N; ++i) {
      const std::int64_t j = (3 * i + shape.M / 2) % shape.M;
      p.self_index.push_back(i % 3 == 2 || shape.M < 3 * shape.N ? -1 : j);
      if (p.self_index.back() >= 0) place(i, j);
    }
  }
  return p;
}

// ---- running --------------------------------------------------------------------------------------------------------

struct Result {
  Bytes loss{0}, indices{0}, coefficients{0}, near{0}, far{0}, squared{0}, stats{0};
  sn_simt_report report{};

  std::int32_t index(std::int64_t at) const { return indices.as<std::int32_t>()[at]; }
};

struct Gradients {
  Bytes anchors{0}, candidates{0};
};

double mma_error_scale = 1.0;

sn_simt_settings settings_for(std::uint64_t seed, sn::simt::MmaError error, ForwardPath path) {
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
          .max_cluster = 8,
          .strip_rows = 0,
          .slice_elements = 0,
          .score_tile = 0,
          .sample_stride = 0,
          .second_stride = 0,
          .far_capacity = 0,
          .mma_model = 0};
}

// The plan of a larger problem: several strips, both tiles of scores, a second sample, buffers that overflow.
void vary(sn_simt_settings& settings, std::uint64_t word) {
  settings.strip_rows = word % 2 == 0 ? 0 : static_cast<std::int32_t>(17 + word / 2 % 40);
  settings.slice_elements = 64 << word % 3;
  settings.score_tile = word / 3 % 2 == 0 ? 64 : 128;
  settings.sample_stride = word / 5 % 2 == 0 ? 0 : 2;
  settings.second_stride = word / 7 % 2 == 0 ? 0 : 3;
  settings.far_capacity = word / 11 % 2 == 0 ? 0 : 5;
}

Result forward(const Problem& p, const sn_simt_settings& settings) {
  const DType dtype = p.anchors.dtype;
  const std::int64_t acc = sn::accumulator_bytes(dtype);
  const std::int64_t edges = p.N() * (p.K() + sn::kExtraEdges);
  Result r;
  r.loss = Bytes(acc * (p.options.reduction == Reduction::kNone ? p.N() : 1));
  r.indices = Bytes(4 * edges);
  r.coefficients = Bytes(acc * edges);
  r.near = Bytes(4 * p.N());
  r.far = Bytes(4 * p.N());
  r.squared = Bytes(acc * edges);
  r.stats = Bytes(8 * sn::kStatsSize);
  sn::ForwardArgs args{};
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
  g.anchors = Bytes(p.N() * p.D() * sn::element_bytes(dtype));
  g.candidates = Bytes(p.symmetric ? 0 : p.M() * p.D() * sn::element_bytes(dtype));
  const Bytes upstream(r.loss.size());
  for (std::int64_t i = 0; i < r.loss.size() / sn::accumulator_bytes(dtype); ++i) {
    write(upstream.as<void>(), dtype == DType::kFloat64 ? dtype : DType::kFloat32, i,
          1.0 + 0.25 * static_cast<double>(i % 3));
  }
  sn::BackwardArgs args{};
  args.dtype = dtype;
  args.dims = p.D();
  args.edges = p.K() + sn::kExtraEdges;
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

// ---- the definition, densely, in double -----------------------------------------------------------------------------

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

// Two sums of the accumulation type that are this close may come out in either order.
double slack(const Problem& p) {
  if (p.exact) return 0.0;
  const double unit = accumulation(p) == DType::kFloat64 ? 0x1p-53 : 0x1p-24;
  return 2.0 * unit * (64.0 + 16.0 + static_cast<double>(p.D()) / 2048.0);
}
// Squares of differences below this are lost to underflow.
double least(const Problem& p) {
  return accumulation(p) == DType::kFloat64 ? 0.0 : static_cast<double>(p.D()) * 0x1p-148;
}

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

// The loss of the selection that was made, and the derivative by every distance.
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
        // P_i is in order; the farthest of it, the lower index on a tie.
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
  check(stats[sn::kValidAnchors] == valid, "valid anchors");
  check(about(stats[sn::kPositiveDistance], positive_sum / std::max(positives, 1.0)), "mean distance of positives");
  check(about(stats[sn::kNegativeDistance], negative_sum / std::max(negatives, 1.0)), "mean distance of negatives");
  check(about(stats[sn::kNearestIsPositive], hits / std::max(valid, 1.0)), "nearest is positive");
  check(about(stats[sn::kSupportPositives], members / std::max(valid, 1.0)), "positives of the support");
  check(stats[sn::kPoison] == 0.0, "no poison");

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

// ---- checks ---------------------------------------------------------------------------------------------------------

void check_same(const Result& r, const Result& first) {
  check(r.indices.same(first.indices), "neighbours differ between two runs");
  check(r.near.same(first.near) && r.far.same(first.far), "positives differ between two runs");
  check(r.squared.same(first.squared), "squared distances differ between two runs");
  check(r.coefficients.same(first.coefficients), "coefficients differ between two runs");
  check(r.loss.same(first.loss), "the loss differs between two runs");
  check(r.stats.same(first.stats), "statistics differ between two runs");
}

// Which paths were taken, and what the screening left undecided, over all problems.
std::int64_t taken[kPaths] = {};
std::int64_t laddered = 0;
double seconds[kPaths] = {};

double now() {
  timespec time{};
  clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &time);
  return static_cast<double>(time.tv_sec) + 1e-9 * static_cast<double>(time.tv_nsec);
}

bool path_serves(const Problem& p, ForwardPath path, const sn_simt_settings& settings) {
  const sn::cuda::Problem shape{.N = p.N(),
                                .M = p.M(),
                                .D = p.D(),
                                .k = p.options.k,
                                .dtype = p.anchors.dtype,
                                .symmetric = p.symmetric,
                                .aligned = true};
  return sn_simt_serves(static_cast<std::int32_t>(path), &shape, &settings) != 0;
}

// Calls `each` for every path that serves, several schedules and errors each.
void for_runs(const Problem& p, const std::function<void(const Result&, const sn_simt_settings&)>& each) {
  std::uint64_t seed = std::hash<std::string>()(p.name) % 1000;
  for (const ForwardPath path :
       {ForwardPath::kDirect, ForwardPath::kCluster, ForwardPath::kDense, ForwardPath::kScreen, ForwardPath::kBank}) {
    if (!path_serves(p, path, settings_for(seed, sn::simt::MmaError::kNone, path))) continue;
    const bool screened = path >= ForwardPath::kDense;
    const int runs = screened && p.anchors.dtype == DType::kFloat32 ? 3 : 2;
    for (int run = 0; run < runs; ++run) {
      ++seed;
      const auto error =
          static_cast<sn::simt::MmaError>(screened ? 1 + (seed + static_cast<std::uint64_t>(run)) % 4 : 0);
      sn_simt_settings settings = settings_for(seed, error, path);
      if (run > 0) vary(settings, seed * 2654435761u >> 7);
      where = p.name + ", path " + kPathNames[static_cast<int>(path)] + ", seed " + std::to_string(seed) + ", error " +
              std::to_string(settings.mma_error) + ", strips of " + std::to_string(settings.strip_rows) + ", slice " +
              std::to_string(settings.slice_elements) + ", tile " + std::to_string(settings.score_tile) + ", strides " +
              std::to_string(settings.sample_stride) + " and " + std::to_string(settings.second_stride) + ", far " +
              std::to_string(settings.far_capacity);
      const double start = now();
      const Result r = forward(p, settings);
      seconds[static_cast<int>(path)] += now() - start;
      check(r.report.path == static_cast<std::int32_t>(path), "the path that was asked for");
      ++taken[static_cast<int>(path)];
      if (screened) laddered += r.report.control.laddered;
      each(r, settings);
    }
  }
}

void check_problem(const Problem& p) {
  const std::vector<double> all = distances_of(p);
  Result first;
  bool have_first = false;
  for_runs(p, [&](const Result& r, const sn_simt_settings& settings) {
    if (have_first) {
      check_same(r, first);
      return;
    }
    have_first = true;
    check_selection(p, r, all);
    Gradients gradients;
    for (int partition = 0; partition < 3; ++partition) {
      sn_simt_settings back = settings;
      back.partition = partition;
      back.seed += static_cast<std::uint64_t>(partition);
      where = p.name + ", backward, partition " + std::to_string(partition);
      const double start = now();
      Gradients g = backward(p, r, back);
      seconds[0] += now() - start;
      if (partition == 0) {
        gradients = std::move(g);
      } else {
        check(g.anchors.same(gradients.anchors) && g.candidates.same(gradients.candidates),
              "gradients depend on the partition");
      }
    }
    check_loss(p, r, gradients, all);
    first.loss = Bytes(r.loss.size());
    const auto copy = [](Bytes& to, const Bytes& from) {
      to = Bytes(from.size());
      std::memcpy(to.as<void>(), from.as<void>(), static_cast<std::size_t>(from.size()));
    };
    copy(first.loss, r.loss);
    copy(first.indices, r.indices);
    copy(first.coefficients, r.coefficients);
    copy(first.near, r.near);
    copy(first.far, r.far);
    copy(first.squared, r.squared);
    copy(first.stats, r.stats);
  });
}

// One value that is not finite poisons everything that comes out.
void check_poison(Problem p, bool in_candidates, double value) {
  Matrix& matrix = in_candidates && !p.symmetric ? p.candidates : p.anchors;
  matrix.set(matrix.rows / 2, matrix.dims - 1, value);
  p.name += std::string(", poisoned ") + (in_candidates ? "candidate " : "anchor ") + std::to_string(value);
  const auto all_nan = [&](const Bytes& bytes, DType dtype) {
    bool nan = true;
    for (std::int64_t at = 0; at < bytes.size() / sn::element_bytes(dtype); ++at) {
      nan = nan && std::isnan(read(bytes.as<void>(), dtype, at));
    }
    return nan;
  };
  for_runs(p, [&](const Result& r, const sn_simt_settings& settings) {
    check(all_nan(r.loss, accumulation(p)), "a value that is not finite poisons the loss");
    check(std::isnan(r.stats.as<double>()[sn::kPoison]), "and is told in the statistics");
    for (std::int64_t at = 0; at < r.indices.size() / 4; ++at) {
      check(r.index(at) >= -1 && r.index(at) < p.M(), "indices stay within range");
    }
    const Gradients g = backward(p, r, settings);
    check(all_nan(g.anchors, p.anchors.dtype) && all_nan(g.candidates, p.anchors.dtype), "and poisons the gradients");
  });
}

// Products that err ten times as far as the bound allows lose neighbours, and these tests see it: the kernels rely on
// the bound to within that factor, and on nothing beyond it.
void check_bound_matters() {
  const Problem p = make("halves", DType::kFloat32, {33, 33, 20, 5, 4}, 3);
  where = "a bound that is too small";
  const Result exact = forward(p, settings_for(5, sn::simt::MmaError::kNone, ForwardPath::kDirect));
  for (const ForwardPath path : {ForwardPath::kDense, ForwardPath::kScreen}) {
    int lost = 0;
    for (std::uint64_t seed = 1; seed <= 4; ++seed) {
      sn_simt_settings settings = settings_for(seed, sn::simt::MmaError::kExtreme, path);
      check(forward(p, settings).indices.same(exact.indices), "within the bound nothing is lost");
      settings.mma_error_scale = 10.0;
      if (!forward(p, settings).indices.same(exact.indices)) ++lost;
    }
    check(lost > 0, "beyond the bound neighbours are lost");
  }
}

}  // namespace

int main(int argc, char** argv) {
  std::string only;
  for (int a = 1; a + 1 < argc; a += 2) {
    if (std::string(argv[a]) == "--scale") mma_error_scale = std::atof(argv[a + 1]);
    if (std::string(argv[a]) == "--only") only = argv[a + 1];
  }
  unsigned seed = 0;
  const auto run = [&](const std::string& kind, DType dtype, const Shape& shape) {
    ++seed;
    const Problem p = make(kind, dtype, shape, seed);
    if (!only.empty() && p.name.find(only) == std::string::npos) return;
    const double start = now();
    check_problem(p);
    if (std::getenv("SN_VERBOSE") != nullptr) std::printf("%6.2f s  %s\n", now() - start, p.name.c_str());
  };
  const auto poisoned = [&](const std::string& kind, DType dtype, const Shape& shape, bool in_candidates,
                            double value) {
    ++seed;
    Problem p = make(kind, dtype, shape, seed);
    if (!only.empty() && p.name.find(only) == std::string::npos) return;
    check_poison(std::move(p), in_candidates, value);
  };
  constexpr DType kTypes[] = {DType::kFloat32, DType::kFloat16, DType::kBFloat16, DType::kFloat64};

  // Sizes at and just beyond warps, tiles of 64, chunks of 64; every type.
  for (const DType dtype : kTypes) {
    run("grid", dtype, {1, 1, 1, 1, 1});
    run("grid", dtype, {2, 2, 3, 1, 1});
    run("halves", dtype, {33, 33, 20, 5, 4});
    run("grid", dtype, {65, 65, 65, 10, 9});
    run("binary", dtype, {64, 64, 128, 33, 16});
    run("grid", dtype, {7, 131, 63, 10, 5});
    run("halves", dtype, {67, 33, 17, 40, 6});
    run("random", dtype, {66, 66, 130, 10, 20});
    run("random", dtype, {1, 200, 65, 10, 20});
    run("clusters", dtype, {40, 40, 257, 7, 10});
    run("duplicates", dtype, {50, 50, 31, 6, 5});
  }
  // Ties, extreme scales, labels.
  run("identical", DType::kFloat32, {37, 37, 19, 5, 4});
  run("identical", DType::kFloat16, {20, 70, 64, 5, 4});
  run("duplicates", DType::kFloat32, {30, 140, 33, 10, 3});
  run("binary", DType::kFloat32, {130, 130, 9, 10, 1});  // one identity: more positives than are listed
  run("random", DType::kFloat32, {140, 140, 40, 4, 1});
  run("random", DType::kFloat32, {50, 50, 20, 5, 1000000});  // hardly a positive
  run("grid", DType::kFloat32, {21, 20, 20, 30, 2});         // k above M
  run("grid", DType::kFloat32, {20, 20, 20, 20, 2});         // k reaches the anchor itself
  run("collapsed", DType::kFloat32, {70, 70, 96, 10, 20});
  run("tiny", DType::kFloat32, {40, 40, 33, 10, 8});
  run("huge", DType::kFloat32, {40, 40, 33, 10, 8});
  run("spread", DType::kFloat32, {60, 60, 33, 10, 8});
  run("outlier", DType::kFloat32, {60, 60, 64, 10, 8});
  run("zeros", DType::kFloat32, {45, 90, 64, 10, 8});
  run("clusters", DType::kFloat32, {64, 190, 72, 10, 20});
  run("random", DType::kFloat32, {2, 300, 300, 100, 20});
  run("random", DType::kFloat32, {9, 9, 2113, 3, 2});  // beyond a span of the summation
  run("random", DType::kBFloat16, {9, 30, 2113, 3, 2});
  // Rows of candidates between the short and the long ones; rows wide enough for two packs a lane of the backward.
  for (const DType dtype : {DType::kFloat32, DType::kFloat64}) {
    run("grid", dtype, {5, 500, 20, 10, 5});
    for (int again = 0; again < 3; ++again) run("random", dtype, {40, 40, 300, 5, 8});
  }
  // Candidates that many edges lead to, several such side by side: chunk sums of one round of the backward meet the next.
  run("grid", DType::kFloat32, {260, 20, 40, 10, 5});
  run("random", DType::kFloat64, {300, 12, 9, 7, 3});
  // Few anchors against identities of more candidates than their lists of positives hold.
  for (const DType dtype : {DType::kFloat32, DType::kBFloat16}) run("random", dtype, {9, 700, 40, 5, 2});
  // More rows that no bound decides than the merge has blocks.
  run("tiny", DType::kFloat32, {280, 280, 3, 5, 8});
  // Nothing at all.
  run("grid", DType::kFloat32, {0, 0, 5, 3, 2});
  run("grid", DType::kFloat32, {0, 9, 5, 3, 2});
  run("grid", DType::kFloat32, {4, 0, 5, 3, 2});

  const double infinity = std::numeric_limits<double>::infinity();
  poisoned("random", DType::kFloat32, {40, 40, 33, 5, 6}, false, NAN);
  poisoned("random", DType::kFloat32, {40, 80, 33, 5, 6}, true, infinity);
  poisoned("random", DType::kFloat16, {40, 80, 64, 5, 6}, false, -infinity);
  poisoned("random", DType::kBFloat16, {70, 70, 64, 5, 6}, false, NAN);
  poisoned("random", DType::kFloat64, {10, 30, 7, 5, 6}, true, NAN);
  poisoned("random", DType::kFloat32, {30, 30, 8, 5, 1000000}, false, infinity);
  if (only.empty()) check_bound_matters();

  for (int path = 1; path < kPaths; ++path) {
    std::printf("path %-8s %4d runs %7.1f s\n", kPathNames[path], static_cast<int>(taken[path]), seconds[path]);
    if (only.empty()) check(taken[path] > 0, "every path was taken");
  }
  std::printf("backward %7.1f s; rows that the screening left to exact scans: %d\n", seconds[0],
              static_cast<int>(laddered));
  std::printf("%d passed, 0 failed\n", checks);
  return 0;
}
