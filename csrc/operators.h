// The two operators around a backend's core, once for all registration files: they verify inputs, allocate outputs and
// call the core with plain arguments.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/shim_utils.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <memory>
#include <optional>
#include <tuple>

#include "checks.h"
#include "sn_types.h"

namespace sn::operators {

using checks::dense;
using checks::expect_between;
using checks::expect_dim;
using checks::expect_dtype;
using checks::expect_indices;
using checks::expect_rows;
using checks::expect_shape;
using checks::fail;
using checks::unit_stride;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// The device of a call's tensors.
struct Place {
  bool cuda;
  std::int32_t device_type;
  std::int32_t index;

  static Place cpu() { return {false, aoti_torch_device_type_cpu(), 0}; }
  static Place cuda_device(std::int32_t index) { return {true, aoti_torch_device_type_cuda(), index}; }

  void expect(const char* op, const char* argument, const Tensor& tensor) const {
    if (!cuda) return checks::expect_cpu(op, argument, tensor);
    checks::expect_cuda(op, argument, tensor);
    if (tensor.get_device_index() != index) {
      fail(op, argument, "expected a tensor on CUDA device ", index, ", as feats is, got one on device ",
           tensor.get_device_index());
    }
  }
};

// ---- outputs --------------------------------------------------------------------------------------------------------

// An output tensor. torch::stable::empty goes through the dispatcher and copies its Tensor into a second handle to
// return it. This calls the allocator directly and passes on its one handle: small batches feel seven outputs.
class Output {
 public:
  Output(const Place& place, std::initializer_list<std::int64_t> sizes, ScalarType type) {
    std::array<std::int64_t, 2> strides{};
    std::int64_t step = 1;
    for (std::size_t dim = sizes.size(); dim-- > 0;) {
      strides[dim] = step;
      step *= std::max<std::int64_t>(sizes.begin()[dim], 1);
    }
    const auto dtype = torch::stable::detail::to<std::int32_t>(torch::stable::detail::from(type));
    AtenTensorHandle handle = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<std::int64_t>(sizes.size()), sizes.begin(),
                                                    strides.data(), dtype, place.device_type, place.index, &handle));
    handle_.reset(handle);
  }

  template <typename T = void>
  T* data() const {
    void* data = nullptr;
    TORCH_ERROR_CODE_CHECK(torch_get_mutable_data_ptr(handle_.get(), &data));
    return static_cast<T*>(data);
  }

  // The handle as TORCH_BOX puts it on the framework's stack, which then owns it.
  StableIValue release() { return reinterpret_cast<std::uintptr_t>(handle_.release()); }

 private:
  struct Delete {
    void operator()(AtenTensorHandle handle) const { aoti_torch_delete_tensor_object(handle); }
  };
  std::unique_ptr<AtenTensorOpaque, Delete> handle_;
};

// ---- forward --------------------------------------------------------------------------------------------------------

using ForwardOutputs =
    std::tuple<StableIValue, StableIValue, StableIValue, StableIValue, StableIValue, StableIValue, StableIValue>;

// A backend implements `Call`, an object per call of an operator, made of the operator's name and the features, whose
// device it checks:
//   Place place() const                          the device of the other tensors
//   void forward(const ForwardArgs&) const       computes
//   void backward(const BackwardArgs&) const     computes
// On a CPU the entries of index tensors are verified too. On a GPU that would take a synchronisation; its kernels treat
// an index out of range as none.
template <class Call>
ForwardOutputs forward(const Tensor& feats, const Tensor& labels, const std::optional<Tensor>& candidates,
                       const std::optional<Tensor>& candidate_labels, const std::optional<Tensor>& self_index,
                       std::int64_t self_offset, std::int64_t k, double alpha, double weight, std::int64_t squeeze,
                       std::int64_t reduction, bool want_squared) {
  constexpr const char* op = "forward";
  const Call call(op, feats);
  const Place place = call.place();
  expect_dim(op, "feats", feats, 2);
  const DType dtype = checks::feature_dtype(op, "feats", feats);
  const std::int64_t anchors = feats.size(0);
  const std::int64_t dims = feats.size(1);
  expect_rows(op, "feats", anchors);
  place.expect(op, "labels", labels);
  expect_dtype(op, "labels", labels, ScalarType::Long);
  expect_shape(op, "labels", labels, {anchors});

  const bool symmetric = !candidates.has_value();
  if (symmetric != !candidate_labels.has_value()) {
    fail(op, "candidate_labels", "expected exactly when candidates are given, got ",
         symmetric ? "labels without candidates" : "candidates without labels");
  }
  std::int64_t rows = anchors;
  if (symmetric) {
    if (self_index.has_value()) fail(op, "self_index", "expected none without candidates, got a tensor");
    expect_between(op, "self_offset", self_offset, 0, 0);
  } else {
    place.expect(op, "candidates", *candidates);
    expect_dtype(op, "candidates", *candidates, feats.scalar_type());
    expect_dim(op, "candidates", *candidates, 2);
    rows = candidates->size(0);
    expect_rows(op, "candidates", rows);
    expect_shape(op, "candidates", *candidates, {rows, dims});
    place.expect(op, "candidate_labels", *candidate_labels);
    expect_dtype(op, "candidate_labels", *candidate_labels, ScalarType::Long);
    expect_shape(op, "candidate_labels", *candidate_labels, {rows});
  }
  if (k < 1) fail(op, "k", "expected at least 1, got ", k);
  if (!(std::isfinite(alpha) && alpha > 0)) fail(op, "alpha", "expected a finite value > 0, got ", alpha);
  if (!(std::isfinite(weight) && weight >= 0)) fail(op, "weight", "expected a finite value >= 0, got ", weight);
  expect_between(op, "squeeze", squeeze, 0, static_cast<std::int64_t>(Squeeze::kNone));
  expect_between(op, "reduction", reduction, 0, static_cast<std::int64_t>(Reduction::kNone));

  const Tensor anchor_rows = unit_stride(feats);
  const Tensor anchor_labels = unit_stride(labels);
  const Tensor candidate_rows = symmetric ? anchor_rows : unit_stride(*candidates);
  const Tensor label_rows = symmetric ? anchor_labels : unit_stride(*candidate_labels);
  std::optional<Tensor> self_rows;
  if (self_index.has_value()) {
    place.expect(op, "self_index", *self_index);
    expect_dtype(op, "self_index", *self_index, ScalarType::Long);
    expect_shape(op, "self_index", *self_index, {anchors});
    self_rows = unit_stride(*self_index);
    if (!place.cuda) {
      expect_indices(op, "self_index", static_cast<const std::int64_t*>(self_rows->const_data_ptr()), anchors, rows);
    }
  } else if (self_offset != -1 && !symmetric) {
    if (self_offset < 0 || self_offset > rows - anchors) {
      fail(op, "self_offset", "expected -1, or o with 0 <= o and o + N <= M for N = ", anchors, ", M = ", rows,
           ", got ", self_offset);
    }
  }

  const ScalarType acc = checks::accumulation_type(dtype);
  const std::int64_t neighbours = std::min(k, rows);
  const std::int64_t edges = neighbours + kExtraEdges;
  const bool per_anchor = reduction == static_cast<std::int64_t>(Reduction::kNone);
  Output loss = per_anchor ? Output(place, {anchors}, acc) : Output(place, {}, acc);
  Output indices(place, {anchors, edges}, ScalarType::Int);
  Output coefficients(place, {anchors, edges}, acc);
  Output nearest_positive(place, {anchors}, ScalarType::Int);
  Output farthest_positive(place, {anchors}, ScalarType::Int);
  Output squared = want_squared ? Output(place, {anchors, edges}, acc) : Output(place, {0}, acc);
  Output stats(place, {kStatsSize}, ScalarType::Double);

  const ForwardArgs args{
      .dtype = dtype,
      .dims = dims,
      .anchors = checks::feature_view(anchor_rows),
      .candidates = checks::feature_view(candidate_rows),
      .anchor_labels = static_cast<const std::int64_t*>(anchor_labels.const_data_ptr()),
      .candidate_labels = static_cast<const std::int64_t*>(label_rows.const_data_ptr()),
      .self = {self_rows ? static_cast<const std::int64_t*>(self_rows->const_data_ptr()) : nullptr, self_offset},
      .symmetric = symmetric,
      .options = {.k = k,
                  .alpha = alpha,
                  .weight = weight,
                  .squeeze = static_cast<Squeeze>(squeeze),
                  .reduction = static_cast<Reduction>(reduction)},
      .loss = loss.data(),
      .indices = indices.data<std::int32_t>(),
      .coefficients = coefficients.data(),
      .nearest_positive = nearest_positive.data<std::int32_t>(),
      .farthest_positive = farthest_positive.data<std::int32_t>(),
      .squared = want_squared ? squared.data() : nullptr,
      .stats = stats.data<double>(),
  };
  call.forward(args);
  return {loss.release(),
          indices.release(),
          coefficients.release(),
          nearest_positive.release(),
          farthest_positive.release(),
          squared.release(),
          stats.release()};
}

// ---- backward -------------------------------------------------------------------------------------------------------

using BackwardOutputs = std::tuple<StableIValue, StableIValue>;

template <class Call>
BackwardOutputs backward(const Tensor& grad_loss, const Tensor& feats, const std::optional<Tensor>& candidates,
                         const Tensor& indices, const Tensor& coefficients, const Tensor& stats, std::int64_t reduction,
                         bool need_feats, bool need_candidates) {
  constexpr const char* op = "backward";
  const Call call(op, feats);
  const Place place = call.place();
  expect_dim(op, "feats", feats, 2);
  const DType dtype = checks::feature_dtype(op, "feats", feats);
  const ScalarType type = feats.scalar_type();
  const ScalarType acc = checks::accumulation_type(dtype);
  const std::int64_t anchors = feats.size(0);
  const std::int64_t dims = feats.size(1);
  expect_rows(op, "feats", anchors);
  const bool symmetric = !candidates.has_value();
  std::int64_t rows = anchors;
  if (!symmetric) {
    place.expect(op, "candidates", *candidates);
    expect_dtype(op, "candidates", *candidates, type);
    expect_dim(op, "candidates", *candidates, 2);
    rows = candidates->size(0);
    expect_rows(op, "candidates", rows);
    expect_shape(op, "candidates", *candidates, {rows, dims});
  }
  expect_between(op, "reduction", reduction, 0, static_cast<std::int64_t>(Reduction::kNone));
  place.expect(op, "grad_loss", grad_loss);
  expect_dtype(op, "grad_loss", grad_loss, acc);
  if (reduction == static_cast<std::int64_t>(Reduction::kNone)) {
    expect_shape(op, "grad_loss", grad_loss, {anchors});
  } else {
    expect_shape(op, "grad_loss", grad_loss, {});
  }
  place.expect(op, "indices", indices);
  expect_dtype(op, "indices", indices, ScalarType::Int);
  expect_dim(op, "indices", indices, 2);
  const std::int64_t edges = indices.size(1);
  expect_shape(op, "indices", indices, {anchors, edges});
  place.expect(op, "coefficients", coefficients);
  expect_dtype(op, "coefficients", coefficients, acc);
  expect_shape(op, "coefficients", coefficients, {anchors, edges});
  place.expect(op, "stats", stats);
  expect_dtype(op, "stats", stats, ScalarType::Double);
  expect_shape(op, "stats", stats, {kStatsSize});

  const Tensor index_rows = dense(indices);
  const auto* index_data = static_cast<const std::int32_t*>(index_rows.const_data_ptr());
  if (!place.cuda) expect_indices(op, "indices", index_data, anchors * edges, rows);
  const Tensor anchor_rows = unit_stride(feats);
  const Tensor candidate_rows = symmetric ? anchor_rows : unit_stride(*candidates);
  const Tensor upstream = dense(grad_loss);
  const Tensor coefficient_rows = dense(coefficients);
  const Tensor stats_row = dense(stats);

  const bool wants_candidates = need_candidates && !symmetric;
  Output grad_feats = need_feats ? Output(place, {anchors, dims}, type) : Output(place, {0}, type);
  Output grad_candidates = wants_candidates ? Output(place, {rows, dims}, type) : Output(place, {0}, type);
  if (need_feats || wants_candidates) {
    const BackwardArgs args{
        .dtype = dtype,
        .dims = dims,
        .edges = edges,
        .anchors = checks::feature_view(anchor_rows),
        .candidates = checks::feature_view(candidate_rows),
        .symmetric = symmetric,
        .reduction = static_cast<Reduction>(reduction),
        .grad_loss = upstream.const_data_ptr(),
        .indices = index_data,
        .coefficients = coefficient_rows.const_data_ptr(),
        .stats = static_cast<const double*>(stats_row.const_data_ptr()),
        .grad_anchors = need_feats ? grad_feats.data() : nullptr,
        .grad_candidates = wants_candidates ? grad_candidates.data() : nullptr,
    };
    call.backward(args);
  }
  return {grad_feats.release(), grad_candidates.release()};
}

}  // namespace sn::operators
