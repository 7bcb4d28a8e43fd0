// Tests of the CUDA kernels on the harness, over every path that serves a problem, over schedules and errors of mma.
// The selection is that of a plain evaluation in double; results repeat bit for bit whatever the path, the schedule and
// the error; the loss and its gradients follow from the definition for that selection.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <string>
#include <utility>
#include <vector>

#include "capi.h"
#include "simt.h"

namespace sn::loss_test {

using cuda::ForwardPath;

// Counts a check that holds; else prints `where` and `what`, and exits.
void check(bool holds, const char* what);
extern std::string where;

// ---- problems.cpp ---------------------------------------------------------------------------------------------------

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

double read(const void* data, DType dtype, std::int64_t at);
void write(void* data, DType dtype, std::int64_t at, double value);

// A matrix whose first row starts `lead` elements into its memory, with rows `stride` apart.
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
        bytes(element_bytes(type) * (row_count > 0 ? first + (row_count - 1) * stride + dim_count : 0)) {
    for (std::int64_t at = 0; at < bytes.size() / element_bytes(type); ++at) write(bytes.as<void>(), dtype, at, NAN);
  }
  double get(std::int64_t row, std::int64_t column) const {
    return read(bytes.as<void>(), dtype, lead + row * stride + column);
  }
  void set(std::int64_t row, std::int64_t column, double value) {
    write(bytes.as<void>(), dtype, lead + row * stride + column, value);
  }
  FeatureView view() const { return {bytes.as<char>() + lead * element_bytes(dtype), rows, stride}; }
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
  bool exact = false;  // every squared distance is exact in the accumulation type, in any order
  LossOptions options{10, 20.0, 0.1, Squeeze::kSpan, Reduction::kMean};

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

struct Shape {
  std::int64_t N, M, D, k, identities;
};

// A problem with values of a kind. The candidates are the anchors if shape.M == shape.N.
Problem make(const std::string& kind, DType dtype, const Shape& shape, unsigned seed);

// ---- runs.cpp -------------------------------------------------------------------------------------------------------

struct Result {
  Bytes loss{0}, indices{0}, coefficients{0}, near{0}, far{0}, squared{0}, stats{0};
  sn_simt_report report{};

  std::int32_t index(std::int64_t at) const { return indices.as<std::int32_t>()[at]; }
};

struct Gradients {
  Bytes anchors{0}, candidates{0};
};

extern double mma_error_scale;

sn_simt_settings settings_for(std::uint64_t seed, simt::MmaError error, ForwardPath path);
// Changes the plan to that of a larger problem: several strips, all tiles of scores and groups of the sample,
// full buffers.
void vary(sn_simt_settings& settings, std::uint64_t word);
Result forward(const Problem& p, const sn_simt_settings& settings);
Gradients backward(const Problem& p, const Result& r, const sn_simt_settings& settings);

// ---- definition.cpp: densely, in double -----------------------------------------------------------------------------

DType accumulation(const Problem& p);
std::vector<double> distances_of(const Problem& p);
void check_selection(const Problem& p, const Result& r, const std::vector<double>& all);
// Checks the loss of the selection that was made, and the gradients.
void check_loss(const Problem& p, const Result& r, const Gradients& g, const std::vector<double>& all);

}  // namespace sn::loss_test
