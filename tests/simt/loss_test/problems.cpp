// Problems: values of every kind, in memory of an exact size.
#include <algorithm>
#include <cmath>
#include <random>

#include "cuda/ptx.cuh"
#include "loss_test.h"

namespace sn::loss_test {

double read(const void* data, DType dtype, std::int64_t at) {
  switch (dtype) {
    case DType::kFloat32:
      return static_cast<const float*>(data)[at];
    case DType::kFloat64:
      return static_cast<const double*>(data)[at];
    case DType::kFloat16:
      return cuda::widen(static_cast<const cuda::Half*>(data)[at]);
    case DType::kBFloat16:
      return cuda::widen(static_cast<const cuda::BFloat16*>(data)[at]);
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
      static_cast<cuda::Half*>(data)[at] = cuda::narrow<cuda::Half>(value);
      break;
    case DType::kBFloat16:
      static_cast<cuda::BFloat16*>(data)[at] = cuda::narrow<cuda::BFloat16>(value);
      break;
  }
}

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
  // Some problems have padded rows, some a first row off alignment.
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

}  // namespace sn::loss_test
