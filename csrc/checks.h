// Checks of a native call before it touches memory, shared by the backends' registration files. Python validates first
// and raises the documented errors; these checks keep a direct torch.ops call safe. Every message names the operator,
// the argument, what was expected and what came.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <initializer_list>
#include <limits>
#include <sstream>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "sn_types.h"

namespace sn::checks {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Throws std::invalid_argument, which the framework's binding translates to ValueError in Python.
template <typename... Parts>
[[noreturn]] inline void fail(const char* op, const char* argument, const Parts&... parts) {
  std::ostringstream message;
  message << "sn_ops::" << op << ": " << argument << ": ";
  ((message << parts), ...);
  throw std::invalid_argument(message.str());
}

inline std::string shape_of(const Tensor& tensor) {
  std::ostringstream text;
  text << "[";
  for (std::int64_t dim = 0; dim < tensor.dim(); ++dim) text << (dim > 0 ? ", " : "") << tensor.size(dim);
  text << "]";
  return text.str();
}

inline const char* name_of(ScalarType type) {
  return torch::headeronly::toString(type);
}

inline DType feature_dtype(const char* op, const char* argument, const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return DType::kFloat32;
    case ScalarType::Double:
      return DType::kFloat64;
    case ScalarType::Half:
      return DType::kFloat16;
    case ScalarType::BFloat16:
      return DType::kBFloat16;
    default:
      fail(op, argument, "expected dtype Float, Double, Half or BFloat16, got ", name_of(tensor.scalar_type()));
  }
}

// The type of sums and of the loss: double for double features, float for all others.
inline ScalarType accumulation_type(DType dtype) {
  return dtype == DType::kFloat64 ? ScalarType::Double : ScalarType::Float;
}

inline void expect_dtype(const char* op, const char* argument, const Tensor& tensor, ScalarType expected) {
  const ScalarType got = tensor.scalar_type();
  if (got != expected) fail(op, argument, "expected dtype ", name_of(expected), ", got ", name_of(got));
}

inline void expect_dim(const char* op, const char* argument, const Tensor& tensor, std::int64_t expected) {
  const std::int64_t got = tensor.dim();
  if (got != expected) fail(op, argument, "expected ", expected, " dimension(s), got shape ", shape_of(tensor));
}

inline void expect_shape(const char* op, const char* argument, const Tensor& tensor,
                         std::initializer_list<std::int64_t> expected) {
  bool same = tensor.dim() == static_cast<std::int64_t>(expected.size());
  std::int64_t dim = 0;
  for (auto size = expected.begin(); same && size != expected.end(); ++size) same = tensor.size(dim++) == *size;
  if (same) return;
  std::ostringstream text;
  const char* separator = "";
  for (const std::int64_t size : expected) {
    text << separator << size;
    separator = ", ";
  }
  fail(op, argument, "expected shape [", text.str(), "], got ", shape_of(tensor));
}

inline void expect_cuda(const char* op, const char* argument, const Tensor& tensor) {
  if (!tensor.is_cuda()) fail(op, argument, "expected a CUDA tensor, got one on another device");
}

inline void expect_cpu(const char* op, const char* argument, const Tensor& tensor) {
  if (!tensor.is_cpu()) fail(op, argument, "expected a CPU tensor, got one on another device");
}

// The support graph stores rows as int32.
inline void expect_rows(const char* op, const char* argument, std::int64_t rows) {
  constexpr std::int64_t kMaxRows = std::numeric_limits<std::int32_t>::max();
  if (rows > kMaxRows) fail(op, argument, "expected at most ", kMaxRows, " rows, got ", rows);
}

inline void expect_between(const char* op, const char* argument, std::int64_t got, std::int64_t low,
                           std::int64_t high) {
  if (got < low || got > high) fail(op, argument, "expected ", low, " to ", high, ", got ", got);
}

// Every entry of an index array must be -1 (none) or a row below `rows`. The first loop has no branch and vectorises.
template <typename Index>
inline void expect_indices(const char* op, const char* argument, const Index* values, std::int64_t count,
                           std::int64_t rows) {
  using Unsigned = std::make_unsigned_t<Index>;
  Unsigned outside = 0;
  for (std::int64_t entry = 0; entry < count; ++entry) {
    outside |= static_cast<Unsigned>(static_cast<Unsigned>(values[entry]) + 1u > static_cast<Unsigned>(rows));
  }
  if (outside == 0) return;
  for (std::int64_t entry = 0; entry < count; ++entry) {
    const std::int64_t value = values[entry];
    if (value < -1 || value >= rows) {
      fail(op, argument, "expected entries of -1 or 0 to ", rows - 1, ", got ", value, " at position ", entry);
    }
  }
}

// Kernels need unit stride along the last dimension; rows may be anywhere. Copies a tensor that is not so.
inline Tensor unit_stride(const Tensor& tensor) {
  const std::int64_t last = tensor.dim() - 1;
  if (last < 0 || tensor.size(last) <= 1 || tensor.stride(last) == 1) return tensor;
  return torch::stable::contiguous(tensor);
}

inline Tensor dense(const Tensor& tensor) {
  return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
}

inline FeatureView feature_view(const Tensor& unit_stride_matrix) {
  return {unit_stride_matrix.const_data_ptr(), unit_stride_matrix.size(0), unit_stride_matrix.stride(0)};
}

}  // namespace sn::checks
