// The operators around a backend's core, once for all registration files: they verify inputs, allocate outputs and call
// the core with plain arguments.
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
#include <type_traits>
#include <utility>

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

// A list of outputs, as TORCH_BOX puts it on the stack.
class OutputList {
 public:
  OutputList() {
    StableListHandle handle = nullptr;
    TORCH_ERROR_CODE_CHECK(torch_new_list_reserve_size(2, &handle));
    handle_.reset(handle);
  }
  // Takes over the output.
  void append(Output& output) { TORCH_ERROR_CODE_CHECK(torch_list_push_back(handle_.get(), output.release())); }
  StableIValue release() { return reinterpret_cast<std::uintptr_t>(handle_.release()); }

 private:
  struct Delete {
    void operator()(StableListHandle handle) const { static_cast<void>(torch_delete_list(handle)); }
  };
  std::unique_ptr<std::remove_pointer_t<StableListHandle>, Delete> handle_;
};

// ---- inputs ---------------------------------------------------------------------------------------------------------

// A backend implements `Call`, an object per call of an operator, made of the operator's name and the features, whose
// device it checks:
//   Place place() const                          the device of the other tensors
//   void forward(const ForwardArgs&) const       computes
//   void backward(const BackwardArgs&) const     computes
// On a CPU the entries of index tensors are verified too. On a GPU that would take a synchronisation; its kernels treat
// an index out of range as none.

// Features and candidates as the kernels take them, which live as long as this does.
struct Rows {
  DType dtype;
  ScalarType type;
  ScalarType acc;
  std::int64_t anchors;  // N
  std::int64_t rows;     // M
  std::int64_t dims;     // D
  bool symmetric;
  Tensor anchor_rows;
  Tensor candidate_rows;
};

inline Rows verify_rows(const char* op, const Place& place, const Tensor& feats,
                        const std::optional<Tensor>& candidates) {
  expect_dim(op, "feats", feats, 2);
  const DType dtype = checks::feature_dtype(op, "feats", feats);
  const std::int64_t anchors = feats.size(0);
  const std::int64_t dims = feats.size(1);
  expect_rows(op, "feats", anchors);
  std::int64_t rows = anchors;
  if (candidates.has_value()) {
    place.expect(op, "candidates", *candidates);
    expect_dtype(op, "candidates", *candidates, feats.scalar_type());
    expect_dim(op, "candidates", *candidates, 2);
    rows = candidates->size(0);
    expect_rows(op, "candidates", rows);
    expect_shape(op, "candidates", *candidates, {rows, dims});
  }
  Tensor anchor_rows = unit_stride(feats);
  Tensor candidate_rows = candidates.has_value() ? unit_stride(*candidates) : anchor_rows;
  return {.dtype = dtype,
          .type = feats.scalar_type(),
          .acc = checks::accumulation_type(dtype),
          .anchors = anchors,
          .rows = rows,
          .dims = dims,
          .symmetric = !candidates.has_value(),
          .anchor_rows = std::move(anchor_rows),
          .candidate_rows = std::move(candidate_rows)};
}

inline std::int64_t edges_of(std::int64_t k, std::int64_t rows) {
  return std::min(k, rows) + kExtraEdges;
}

// ---- forward --------------------------------------------------------------------------------------------------------

// The verified arguments of a forward; `args` has no outputs yet.
struct ForwardInputs {
  Rows rows;
  Tensor anchor_labels;
  Tensor candidate_labels;
  std::optional<Tensor> self_index;
  std::int64_t edges;
  ForwardArgs args;
};

inline ForwardInputs verify_forward(const char* op, const Place& place, const Tensor& feats, const Tensor& labels,
                                    const std::optional<Tensor>& candidates,
                                    const std::optional<Tensor>& candidate_labels,
                                    const std::optional<Tensor>& self_index, std::int64_t self_offset, std::int64_t k,
                                    double alpha, double weight, std::int64_t squeeze, std::int64_t reduction) {
  Rows rows = verify_rows(op, place, feats, candidates);
  place.expect(op, "labels", labels);
  expect_dtype(op, "labels", labels, ScalarType::Long);
  expect_shape(op, "labels", labels, {rows.anchors});
  if (rows.symmetric != !candidate_labels.has_value()) {
    fail(op, "candidate_labels", "expected exactly when candidates are given, got ",
         rows.symmetric ? "labels without candidates" : "candidates without labels");
  }
  if (rows.symmetric) {
    if (self_index.has_value()) fail(op, "self_index", "expected none without candidates, got a tensor");
    expect_between(op, "self_offset", self_offset, 0, 0);
  } else {
    place.expect(op, "candidate_labels", *candidate_labels);
    expect_dtype(op, "candidate_labels", *candidate_labels, ScalarType::Long);
    expect_shape(op, "candidate_labels", *candidate_labels, {rows.rows});
  }
  if (k < 1) fail(op, "k", "expected at least 1, got ", k);
  if (!(std::isfinite(alpha) && alpha > 0)) fail(op, "alpha", "expected a finite value > 0, got ", alpha);
  if (!(std::isfinite(weight) && weight >= 0)) fail(op, "weight", "expected a finite value >= 0, got ", weight);
  expect_between(op, "squeeze", squeeze, 0, static_cast<std::int64_t>(Squeeze::kNone));
  expect_between(op, "reduction", reduction, 0, static_cast<std::int64_t>(Reduction::kNone));

  Tensor anchor_labels = unit_stride(labels);
  Tensor label_rows = rows.symmetric ? anchor_labels : unit_stride(*candidate_labels);
  std::optional<Tensor> self_rows;
  if (self_index.has_value()) {
    place.expect(op, "self_index", *self_index);
    expect_dtype(op, "self_index", *self_index, ScalarType::Long);
    expect_shape(op, "self_index", *self_index, {rows.anchors});
    self_rows = unit_stride(*self_index);
    if (!place.cuda) {
      expect_indices(op, "self_index", static_cast<const std::int64_t*>(self_rows->const_data_ptr()), rows.anchors,
                     rows.rows);
    }
  } else if (self_offset != -1 && !rows.symmetric) {
    if (self_offset < 0 || self_offset > rows.rows - rows.anchors) {
      fail(op, "self_offset", "expected -1, or o with 0 <= o and o + N <= M for N = ", rows.anchors,
           ", M = ", rows.rows, ", got ", self_offset);
    }
  }
  ForwardArgs args{};
  args.dtype = rows.dtype;
  args.dims = rows.dims;
  args.anchors = checks::feature_view(rows.anchor_rows);
  args.candidates = checks::feature_view(rows.candidate_rows);
  args.anchor_labels = static_cast<const std::int64_t*>(anchor_labels.const_data_ptr());
  args.candidate_labels = static_cast<const std::int64_t*>(label_rows.const_data_ptr());
  args.self = {self_rows ? static_cast<const std::int64_t*>(self_rows->const_data_ptr()) : nullptr, self_offset};
  args.symmetric = rows.symmetric;
  args.options = {.k = k,
                  .alpha = alpha,
                  .weight = weight,
                  .squeeze = static_cast<Squeeze>(squeeze),
                  .reduction = static_cast<Reduction>(reduction)};
  const std::int64_t edges = edges_of(k, rows.rows);
  return {std::move(rows), std::move(anchor_labels), std::move(label_rows), std::move(self_rows), edges, args};
}

inline Output loss_output(const Place& place, const ForwardInputs& inputs) {
  return inputs.args.options.reduction == Reduction::kNone ? Output(place, {inputs.rows.anchors}, inputs.rows.acc)
                                                           : Output(place, {}, inputs.rows.acc);
}

using ForwardOutputs =
    std::tuple<StableIValue, StableIValue, StableIValue, StableIValue, StableIValue, StableIValue, StableIValue>;

// Everything about the selection, each in a tensor of its own.
template <class Call>
ForwardOutputs forward(const Tensor& feats, const Tensor& labels, const std::optional<Tensor>& candidates,
                       const std::optional<Tensor>& candidate_labels, const std::optional<Tensor>& self_index,
                       std::int64_t self_offset, std::int64_t k, double alpha, double weight, std::int64_t squeeze,
                       std::int64_t reduction, bool want_squared) {
  constexpr const char* op = "forward";
  const Call call(op, feats);
  const Place place = call.place();
  ForwardInputs inputs = verify_forward(op, place, feats, labels, candidates, candidate_labels, self_index, self_offset,
                                        k, alpha, weight, squeeze, reduction);
  const std::int64_t anchors = inputs.rows.anchors;
  const ScalarType acc = inputs.rows.acc;
  Output loss = loss_output(place, inputs);
  Output indices(place, {anchors, inputs.edges}, ScalarType::Int);
  Output coefficients(place, {anchors, inputs.edges}, acc);
  Output nearest_positive(place, {anchors}, ScalarType::Int);
  Output farthest_positive(place, {anchors}, ScalarType::Int);
  Output squared = want_squared ? Output(place, {anchors, inputs.edges}, acc) : Output(place, {0}, acc);
  Output stats(place, {kStatsSize}, ScalarType::Double);
  ForwardArgs& args = inputs.args;
  args.loss = loss.data();
  args.indices = indices.data<std::int32_t>();
  args.coefficients = coefficients.data();
  args.nearest_positive = nearest_positive.data<std::int32_t>();
  args.farthest_positive = farthest_positive.data<std::int32_t>();
  args.squared = want_squared ? squared.data() : nullptr;
  args.stats = stats.data<double>();
  call.forward(args);
  return {loss.release(),
          indices.release(),
          coefficients.release(),
          nearest_positive.release(),
          farthest_positive.release(),
          squared.release(),
          stats.release()};
}

// The parts of the training operator's buffer, as GraphLayout has them.
struct GraphParts {
  void* coefficients;
  std::int32_t* indices;
  std::int32_t* nearest_positive;
  std::int32_t* farthest_positive;
};
inline GraphParts graph_parts(void* buffer, const GraphLayout& layout) {
  auto* base = static_cast<char*>(buffer);
  const auto at = [base](std::int64_t offset) { return reinterpret_cast<std::int32_t*>(base + offset); };
  return {buffer, at(layout.indices), at(layout.nearest_positive), at(layout.farthest_positive)};
}
inline std::int64_t graph_words(const GraphLayout& layout) {
  return layout.bytes / static_cast<std::int64_t>(sizeof(std::int32_t));
}

using LossOutputs = std::tuple<StableIValue, StableIValue, StableIValue>;

// What training needs: the loss, the graph in one buffer for the backward, the statistics.
template <class Call>
LossOutputs loss(const Tensor& feats, const Tensor& labels, const std::optional<Tensor>& candidates,
                 const std::optional<Tensor>& candidate_labels, const std::optional<Tensor>& self_index,
                 std::int64_t self_offset, std::int64_t k, double alpha, double weight, std::int64_t squeeze,
                 std::int64_t reduction) {
  constexpr const char* op = "loss";
  const Call call(op, feats);
  const Place place = call.place();
  ForwardInputs inputs = verify_forward(op, place, feats, labels, candidates, candidate_labels, self_index, self_offset,
                                        k, alpha, weight, squeeze, reduction);
  const GraphLayout layout = graph_layout(inputs.rows.anchors, inputs.edges, inputs.rows.dtype);
  Output loss = loss_output(place, inputs);
  Output graph(place, {graph_words(layout)}, ScalarType::Int);
  Output stats(place, {kStatsSize}, ScalarType::Double);
  const GraphParts parts = graph_parts(graph.data(), layout);
  ForwardArgs& args = inputs.args;
  args.loss = loss.data();
  args.indices = parts.indices;
  args.coefficients = parts.coefficients;
  args.nearest_positive = parts.nearest_positive;
  args.farthest_positive = parts.farthest_positive;
  args.squared = nullptr;
  args.stats = stats.data<double>();
  call.forward(args);
  return {loss.release(), graph.release(), stats.release()};
}

// ---- backward -------------------------------------------------------------------------------------------------------

// Runs a backward whose graph has been verified.
template <class Call>
void run_backward(const Call& call, const Rows& rows, std::int64_t edges, std::int64_t reduction,
                  const Tensor& grad_loss, const std::int32_t* indices, const void* coefficients, const Tensor& stats,
                  void* grad_anchors, void* grad_candidates) {
  if (grad_anchors == nullptr && grad_candidates == nullptr) return;
  const Tensor upstream = dense(grad_loss);
  const Tensor stats_row = dense(stats);
  call.backward(BackwardArgs{
      .dtype = rows.dtype,
      .dims = rows.dims,
      .edges = edges,
      .anchors = checks::feature_view(rows.anchor_rows),
      .candidates = checks::feature_view(rows.candidate_rows),
      .symmetric = rows.symmetric,
      .reduction = static_cast<Reduction>(reduction),
      .grad_loss = upstream.const_data_ptr(),
      .indices = indices,
      .coefficients = coefficients,
      .stats = static_cast<const double*>(stats_row.const_data_ptr()),
      .grad_anchors = grad_anchors,
      .grad_candidates = grad_candidates,
  });
}

inline void verify_upstream(const char* op, const Place& place, const Rows& rows, std::int64_t reduction,
                            const Tensor& grad_loss, const Tensor& stats) {
  expect_between(op, "reduction", reduction, 0, static_cast<std::int64_t>(Reduction::kNone));
  place.expect(op, "grad_loss", grad_loss);
  expect_dtype(op, "grad_loss", grad_loss, rows.acc);
  if (reduction == static_cast<std::int64_t>(Reduction::kNone)) {
    expect_shape(op, "grad_loss", grad_loss, {rows.anchors});
  } else {
    expect_shape(op, "grad_loss", grad_loss, {});
  }
  place.expect(op, "stats", stats);
  expect_dtype(op, "stats", stats, ScalarType::Double);
  expect_shape(op, "stats", stats, {kStatsSize});
}

using BackwardOutputs = std::tuple<StableIValue, StableIValue>;

// From a graph in tensors of its own, which any backend may have made.
template <class Call>
BackwardOutputs backward(const Tensor& grad_loss, const Tensor& feats, const std::optional<Tensor>& candidates,
                         const Tensor& indices, const Tensor& coefficients, const Tensor& stats, std::int64_t reduction,
                         bool need_feats, bool need_candidates) {
  constexpr const char* op = "backward";
  const Call call(op, feats);
  const Place place = call.place();
  const Rows rows = verify_rows(op, place, feats, candidates);
  verify_upstream(op, place, rows, reduction, grad_loss, stats);
  place.expect(op, "indices", indices);
  expect_dtype(op, "indices", indices, ScalarType::Int);
  expect_dim(op, "indices", indices, 2);
  const std::int64_t edges = indices.size(1);
  expect_shape(op, "indices", indices, {rows.anchors, edges});
  place.expect(op, "coefficients", coefficients);
  expect_dtype(op, "coefficients", coefficients, rows.acc);
  expect_shape(op, "coefficients", coefficients, {rows.anchors, edges});
  const Tensor index_rows = dense(indices);
  const Tensor coefficient_rows = dense(coefficients);
  const auto* index_data = static_cast<const std::int32_t*>(index_rows.const_data_ptr());
  if (!place.cuda) expect_indices(op, "indices", index_data, rows.anchors * edges, rows.rows);

  const bool wants_candidates = need_candidates && !rows.symmetric;
  Output grad_feats = need_feats ? Output(place, {rows.anchors, rows.dims}, rows.type) : Output(place, {0}, rows.type);
  Output grad_candidates =
      wants_candidates ? Output(place, {rows.rows, rows.dims}, rows.type) : Output(place, {0}, rows.type);
  run_backward(call, rows, edges, reduction, grad_loss, index_data, coefficient_rows.const_data_ptr(), stats,
               need_feats ? grad_feats.data() : nullptr, wants_candidates ? grad_candidates.data() : nullptr);
  return {grad_feats.release(), grad_candidates.release()};
}

// From the buffer of `loss`: the gradients that are wanted, those of the features first, and nothing else.
template <class Call>
std::tuple<StableIValue> loss_backward(const Tensor& grad_loss, const Tensor& feats,
                                       const std::optional<Tensor>& candidates, const Tensor& graph,
                                       const Tensor& stats, std::int64_t k, std::int64_t reduction, bool need_feats,
                                       bool need_candidates) {
  constexpr const char* op = "loss_backward";
  const Call call(op, feats);
  const Place place = call.place();
  const Rows rows = verify_rows(op, place, feats, candidates);
  verify_upstream(op, place, rows, reduction, grad_loss, stats);
  if (k < 1) fail(op, "k", "expected at least 1, got ", k);
  const std::int64_t edges = edges_of(k, rows.rows);
  const GraphLayout layout = graph_layout(rows.anchors, edges, rows.dtype);
  place.expect(op, "graph", graph);
  expect_dtype(op, "graph", graph, ScalarType::Int);
  expect_shape(op, "graph", graph, {graph_words(layout)});
  const Tensor buffer = dense(graph);
  const auto* base = static_cast<const char*>(buffer.const_data_ptr());
  const auto* indices = reinterpret_cast<const std::int32_t*>(base + layout.indices);
  if (!place.cuda) expect_indices(op, "graph", indices, rows.anchors * edges, rows.rows);

  const bool wants_candidates = need_candidates && !rows.symmetric;
  std::array<std::optional<Output>, 2> grads;
  if (need_feats) grads[0].emplace(place, std::initializer_list<std::int64_t>{rows.anchors, rows.dims}, rows.type);
  if (wants_candidates) grads[1].emplace(place, std::initializer_list<std::int64_t>{rows.rows, rows.dims}, rows.type);
  run_backward(call, rows, edges, reduction, grad_loss, indices, base, stats, grads[0] ? grads[0]->data() : nullptr,
               grads[1] ? grads[1]->data() : nullptr);
  OutputList list;
  for (std::optional<Output>& grad : grads) {
    if (grad) list.append(*grad);
  }
  return {list.release()};
}

}  // namespace sn::operators
