// Operator schemas, the CPU kernels behind them, and the pybind11 module `_C`: the only file that knows
// bindings. Written against LibTorch's stable ABI, so that one binary serves every supported version of
// torch.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <exception>
#include <initializer_list>
#include <map>
#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "checks.h"
#include "cpu/cpu.h"
#include "cpu/memory.h"
#include "sn_types.h"

namespace {

using sn::checks::dense;
using sn::checks::expect_between;
using sn::checks::expect_cpu;
using sn::checks::expect_dim;
using sn::checks::expect_dtype;
using sn::checks::expect_indices;
using sn::checks::expect_rows;
using sn::checks::expect_shape;
using sn::checks::fail;
using sn::checks::unit_stride;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr const char* kForwardSchema =
    "forward(Tensor feats, Tensor labels, Tensor? candidates, Tensor? candidate_labels, Tensor? self_index, "
    "SymInt self_offset, SymInt k, float alpha, float weight, int squeeze, int reduction, bool "
    "want_distances) -> "
    "(Tensor loss, Tensor indices, Tensor coefficients, Tensor nearest_positive, Tensor farthest_positive, "
    "Tensor distances, Tensor stats)";
constexpr const char* kBackwardSchema =
    "backward(Tensor grad_loss, Tensor feats, Tensor? candidates, Tensor indices, Tensor coefficients, "
    "Tensor stats, int reduction, bool need_feats, bool need_candidates) -> "
    "(Tensor grad_feats, Tensor grad_candidates)";
// Internal steps of the CUDA backend, callable for tests; `_C_cuda` brings the kernels.
constexpr const char* kCudaPrepareSchema = "cuda_prepare(Tensor feats) -> (Tensor squared_norms, Tensor nonfinite)";

// ---- the framework's threads ----------------------------------------------------------------------------------------

// An exception must not unwind through the C entry below, nor through another thread's frames.
struct GuardedBody {
  void (*body)(std::int64_t, std::int64_t, void*);
  void* context;
  std::atomic_flag failed = ATOMIC_FLAG_INIT;
  std::exception_ptr error;
};

void run_guarded(std::int64_t begin, std::int64_t end, void* opaque) {
  auto* guarded = static_cast<GuardedBody*>(opaque);
  try {
    guarded->body(begin, end, guarded->context);
  } catch (...) {
    if (!guarded->failed.test_and_set()) guarded->error = std::current_exception();
  }
}

void parallel_for(std::int64_t begin, std::int64_t end, std::int64_t grain,
                  void (*body)(std::int64_t, std::int64_t, void*), void* context) {
  GuardedBody guarded{body, context, ATOMIC_FLAG_INIT, nullptr};
  STABLE_TORCH_ERROR_CODE_CHECK(torch_parallel_for(begin, end, grain, run_guarded, &guarded));
  if (guarded.error) std::rethrow_exception(guarded.error);
}

sn::ThreadPool thread_pool() {
  return {static_cast<int>(torch::stable::get_num_threads()), parallel_for};
}

// ---- outputs --------------------------------------------------------------------------------------------------------

// torch::stable::empty goes through the dispatcher and a Tensor of its own is copied into a second handle on
// the way out. This reaches the allocator directly and hands over the one handle there is: small batches feel
// seven outputs.
class Output {
 public:
  Output(std::initializer_list<std::int64_t> sizes, ScalarType type) {
    std::array<std::int64_t, 2> strides{};
    std::int64_t step = 1;
    for (std::size_t dim = sizes.size(); dim-- > 0;) {
      strides[dim] = step;
      step *= std::max<std::int64_t>(sizes.begin()[dim], 1);
    }
    const auto dtype = torch::stable::detail::to<std::int32_t>(torch::stable::detail::from(type));
    AtenTensorHandle handle = nullptr;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<std::int64_t>(sizes.size()), sizes.begin(),
                                                           strides.data(), dtype, aoti_torch_device_type_cpu(),
                                                           kCpuIndex, &handle));
    handle_.reset(handle);
  }

  // For a large output that is written once: asks for huge pages, so that its first touch costs less.
  void prefer_huge_pages(std::int64_t bytes) const {
    if (bytes >= kHugeFrom) sn::cpu::prefer_huge_pages(data(), static_cast<std::size_t>(bytes));
  }

  template <typename T = void>
  T* data() const {
    void* data = nullptr;
    STABLE_TORCH_ERROR_CODE_CHECK(torch_get_mutable_data_ptr(handle_.get(), &data));
    return static_cast<T*>(data);
  }

  // The handle as TORCH_BOX puts it on the framework's stack, which owns it from then on.
  StableIValue release() { return reinterpret_cast<std::uintptr_t>(handle_.release()); }

 private:
  static constexpr std::int32_t kCpuIndex = 0;
  static constexpr std::int64_t kHugeFrom = std::int64_t{4} << 20;
  struct Delete {
    void operator()(AtenTensorHandle handle) const { aoti_torch_delete_tensor_object(handle); }
  };
  std::unique_ptr<AtenTensorOpaque, Delete> handle_;
};

// ---- forward --------------------------------------------------------------------------------------------------------

using ForwardOutputs =
    std::tuple<StableIValue, StableIValue, StableIValue, StableIValue, StableIValue, StableIValue, StableIValue>;

ForwardOutputs forward_cpu(const Tensor& feats, const Tensor& labels, const std::optional<Tensor>& candidates,
                           const std::optional<Tensor>& candidate_labels, const std::optional<Tensor>& self_index,
                           std::int64_t self_offset, std::int64_t k, double alpha, double weight, std::int64_t squeeze,
                           std::int64_t reduction, bool want_distances) {
  constexpr const char* op = "forward";
  expect_cpu(op, "feats", feats);
  expect_dim(op, "feats", feats, 2);
  const sn::DType dtype = sn::checks::feature_dtype(op, "feats", feats);
  const std::int64_t anchors = feats.size(0);
  const std::int64_t dims = feats.size(1);
  expect_rows(op, "feats", anchors);
  expect_cpu(op, "labels", labels);
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
    expect_cpu(op, "candidates", *candidates);
    expect_dtype(op, "candidates", *candidates, feats.scalar_type());
    expect_dim(op, "candidates", *candidates, 2);
    rows = candidates->size(0);
    expect_rows(op, "candidates", rows);
    expect_shape(op, "candidates", *candidates, {rows, dims});
    expect_cpu(op, "candidate_labels", *candidate_labels);
    expect_dtype(op, "candidate_labels", *candidate_labels, ScalarType::Long);
    expect_shape(op, "candidate_labels", *candidate_labels, {rows});
  }
  if (k < 1) fail(op, "k", "expected at least 1, got ", k);
  if (!(std::isfinite(alpha) && alpha > 0)) fail(op, "alpha", "expected a finite value > 0, got ", alpha);
  if (!(std::isfinite(weight) && weight >= 0)) fail(op, "weight", "expected a finite value >= 0, got ", weight);
  expect_between(op, "squeeze", squeeze, 0, static_cast<std::int64_t>(sn::Squeeze::kNone));
  expect_between(op, "reduction", reduction, 0, static_cast<std::int64_t>(sn::Reduction::kNone));

  const Tensor anchor_rows = unit_stride(feats);
  const Tensor anchor_labels = unit_stride(labels);
  const Tensor candidate_rows = symmetric ? anchor_rows : unit_stride(*candidates);
  const Tensor label_rows = symmetric ? anchor_labels : unit_stride(*candidate_labels);
  std::optional<Tensor> self_rows;
  if (self_index.has_value()) {
    expect_cpu(op, "self_index", *self_index);
    expect_dtype(op, "self_index", *self_index, ScalarType::Long);
    expect_shape(op, "self_index", *self_index, {anchors});
    self_rows = unit_stride(*self_index);
    expect_indices(op, "self_index", static_cast<const std::int64_t*>(self_rows->const_data_ptr()), anchors, rows);
  } else if (self_offset != -1 && !symmetric) {
    if (self_offset < 0 || self_offset > rows - anchors) {
      fail(op, "self_offset", "expected -1, or o with 0 <= o and o + N <= M for N = ", anchors, ", M = ", rows,
           ", got ", self_offset);
    }
  }

  const ScalarType acc = sn::checks::accumulation_type(dtype);
  const std::int64_t neighbours = std::min(k, rows);
  const std::int64_t edges = neighbours + sn::kExtraEdges;
  const bool per_anchor = reduction == static_cast<std::int64_t>(sn::Reduction::kNone);
  Output loss = per_anchor ? Output({anchors}, acc) : Output({}, acc);
  Output indices({anchors, edges}, ScalarType::Int);
  Output coefficients({anchors, edges}, acc);
  Output nearest_positive({anchors}, ScalarType::Int);
  Output farthest_positive({anchors}, ScalarType::Int);
  Output distances = want_distances ? Output({anchors, neighbours}, acc) : Output({0}, acc);
  Output stats({sn::kStatsSize}, ScalarType::Double);

  const sn::ForwardArgs args{
      .dtype = dtype,
      .dims = dims,
      .anchors = sn::checks::feature_view(anchor_rows),
      .candidates = sn::checks::feature_view(candidate_rows),
      .anchor_labels = static_cast<const std::int64_t*>(anchor_labels.const_data_ptr()),
      .candidate_labels = static_cast<const std::int64_t*>(label_rows.const_data_ptr()),
      .self = {self_rows ? static_cast<const std::int64_t*>(self_rows->const_data_ptr()) : nullptr, self_offset},
      .symmetric = symmetric,
      .options = {.k = k,
                  .alpha = alpha,
                  .weight = weight,
                  .squeeze = static_cast<sn::Squeeze>(squeeze),
                  .reduction = static_cast<sn::Reduction>(reduction)},
      .loss = loss.data(),
      .indices = indices.data<std::int32_t>(),
      .coefficients = coefficients.data(),
      .nearest_positive = nearest_positive.data<std::int32_t>(),
      .farthest_positive = farthest_positive.data<std::int32_t>(),
      .distances = want_distances ? distances.data() : nullptr,
      .stats = stats.data<double>(),
  };
  sn::cpu::forward(args, thread_pool());
  return {loss.release(),
          indices.release(),
          coefficients.release(),
          nearest_positive.release(),
          farthest_positive.release(),
          distances.release(),
          stats.release()};
}

// ---- backward -------------------------------------------------------------------------------------------------------

std::tuple<StableIValue, StableIValue> backward_cpu(const Tensor& grad_loss, const Tensor& feats,
                                                    const std::optional<Tensor>& candidates, const Tensor& indices,
                                                    const Tensor& coefficients, const Tensor& stats,
                                                    std::int64_t reduction, bool need_feats, bool need_candidates) {
  constexpr const char* op = "backward";
  expect_cpu(op, "feats", feats);
  expect_dim(op, "feats", feats, 2);
  const sn::DType dtype = sn::checks::feature_dtype(op, "feats", feats);
  const ScalarType type = feats.scalar_type();
  const ScalarType acc = sn::checks::accumulation_type(dtype);
  const std::int64_t anchors = feats.size(0);
  const std::int64_t dims = feats.size(1);
  expect_rows(op, "feats", anchors);
  const bool symmetric = !candidates.has_value();
  std::int64_t rows = anchors;
  if (!symmetric) {
    expect_cpu(op, "candidates", *candidates);
    expect_dtype(op, "candidates", *candidates, type);
    expect_dim(op, "candidates", *candidates, 2);
    rows = candidates->size(0);
    expect_rows(op, "candidates", rows);
    expect_shape(op, "candidates", *candidates, {rows, dims});
  }
  expect_between(op, "reduction", reduction, 0, static_cast<std::int64_t>(sn::Reduction::kNone));
  expect_cpu(op, "grad_loss", grad_loss);
  expect_dtype(op, "grad_loss", grad_loss, acc);
  if (reduction == static_cast<std::int64_t>(sn::Reduction::kNone)) {
    expect_shape(op, "grad_loss", grad_loss, {anchors});
  } else {
    expect_shape(op, "grad_loss", grad_loss, {});
  }
  expect_cpu(op, "indices", indices);
  expect_dtype(op, "indices", indices, ScalarType::Int);
  expect_dim(op, "indices", indices, 2);
  const std::int64_t edges = indices.size(1);
  expect_shape(op, "indices", indices, {anchors, edges});
  expect_cpu(op, "coefficients", coefficients);
  expect_dtype(op, "coefficients", coefficients, acc);
  expect_shape(op, "coefficients", coefficients, {anchors, edges});
  expect_cpu(op, "stats", stats);
  expect_dtype(op, "stats", stats, ScalarType::Double);
  expect_shape(op, "stats", stats, {sn::kStatsSize});

  const Tensor index_rows = dense(indices);
  const auto* index_data = static_cast<const std::int32_t*>(index_rows.const_data_ptr());
  expect_indices(op, "indices", index_data, anchors * edges, rows);
  const Tensor anchor_rows = unit_stride(feats);
  const Tensor candidate_rows = symmetric ? anchor_rows : unit_stride(*candidates);
  const Tensor upstream = dense(grad_loss);
  const Tensor coefficient_rows = dense(coefficients);
  const Tensor stats_row = dense(stats);

  const bool wants_candidates = need_candidates && !symmetric;
  Output grad_feats = need_feats ? Output({anchors, dims}, type) : Output({0}, type);
  Output grad_candidates = wants_candidates ? Output({rows, dims}, type) : Output({0}, type);
  const std::int64_t element = static_cast<std::int64_t>(feats.element_size());
  if (need_feats) grad_feats.prefer_huge_pages(anchors * dims * element);
  if (wants_candidates) grad_candidates.prefer_huge_pages(rows * dims * element);
  if (need_feats || wants_candidates) {
    const sn::BackwardArgs args{
        .dtype = dtype,
        .dims = dims,
        .edges = edges,
        .anchors = sn::checks::feature_view(anchor_rows),
        .candidates = sn::checks::feature_view(candidate_rows),
        .symmetric = symmetric,
        .reduction = static_cast<sn::Reduction>(reduction),
        .grad_loss = upstream.const_data_ptr(),
        .indices = index_data,
        .coefficients = coefficient_rows.const_data_ptr(),
        .stats = static_cast<const double*>(stats_row.const_data_ptr()),
        .grad_anchors = need_feats ? grad_feats.data() : nullptr,
        .grad_candidates = wants_candidates ? grad_candidates.data() : nullptr,
    };
    sn::cpu::backward(args, thread_pool());
  }
  return {grad_feats.release(), grad_candidates.release()};
}

// ---- facts for Python -----------------------------------------------------------------------------------------------

struct PathName {
  sn::cpu::Path path;
  const char* name;
};
constexpr std::array<PathName, 3> kPathNames{{
    {sn::cpu::Path::kAuto, "auto"},
    {sn::cpu::Path::kDirect, "direct"},
    {sn::cpu::Path::kScreen, "screen"},
}};

const char* path_name(sn::cpu::Path path) {
  for (const PathName& entry : kPathNames) {
    if (entry.path == path) return entry.name;
  }
  throw std::logic_error("sn_ops: a path without a name");
}

void set_cpu_path(const std::string& name) {
  for (const PathName& entry : kPathNames) {
    if (name == entry.name) return sn::cpu::set_path(entry.path);
  }
  throw std::invalid_argument("set_cpu_path: expected auto, direct or screen, got " + name);
}

std::string joined(const std::vector<std::string>& words) {
  std::string text;
  for (const std::string& word : words) text += (text.empty() ? "" : " ") + word;
  return text;
}

std::map<std::string, std::string> build_info() {
  return {
      {"version", SN_OPS_VERSION},
      {"compiler", SN_OPS_COMPILER},
      {"torch", SN_OPS_TORCH_VERSION},
      {"cuda", SN_OPS_CUDA_STATE},
      {"cuda_architectures", SN_OPS_CUDA_ARCHITECTURES},
      {"cpu_capabilities", joined(sn::cpu::compiled_capabilities())},
  };
}

pybind11::dict cpu_plan(std::int64_t anchors, std::int64_t candidates, std::int64_t dims, std::int64_t k, int dtype,
                        bool symmetric, int threads) {
  if (anchors < 0 || candidates < 0 || dims < 0 || k < 1 || threads < 1) {
    throw std::invalid_argument("cpu_plan: expected N, M, D >= 0 and k, threads >= 1");
  }
  if (dtype < 0 || dtype > static_cast<int>(sn::DType::kBFloat16)) {
    throw std::invalid_argument(
        "cpu_plan: dtype: expected 0 (float32), 1 (float64), 2 (float16) or 3 (bfloat16), got " +
        std::to_string(dtype));
  }
  const sn::cpu::Plan plan =
      sn::cpu::plan_forward(anchors, candidates, dims, k, static_cast<sn::DType>(dtype), symmetric, threads);
  pybind11::dict facts;
  facts["path"] = path_name(plan.path);
  facts["list_capacity"] = plan.list_capacity;
  facts["workspace_bytes"] = plan.workspace_bytes;
  return facts;
}

}  // namespace

STABLE_TORCH_LIBRARY(sn_ops, library) {
  library.def(kForwardSchema);
  library.def(kBackwardSchema);
  library.def(kCudaPrepareSchema);
}

STABLE_TORCH_LIBRARY_IMPL(sn_ops, CPU, library) {
  library.impl("forward", TORCH_BOX(&forward_cpu));
  library.impl("backward", TORCH_BOX(&backward_cpu));
}

PYBIND11_MODULE(_C, module) {
  namespace py = pybind11;
  module.doc() = "Registers the operators of sn_ops and their CPU kernels; facts about this build.";
  module.def("build_info", &build_info, "What this library was built from, and with.");
  module.def("cpu_capabilities", &sn::cpu::usable_capabilities,
             "Instruction sets compiled in and supported by this machine, best last.");
  module.def("cpu_capability", &sn::cpu::capability, "The instruction set in use.");
  module.def("set_cpu_capability", &sn::cpu::set_capability, py::arg("name"),
             "Use this instruction set from now on; ValueError names those allowed.");
  module.def("set_cpu_path", &set_cpu_path, py::arg("path"),
             "Force a path of the CPU forward: auto, direct or screen.");
  module.def("cpu_plan", &cpu_plan, py::arg("N"), py::arg("M"), py::arg("D"), py::arg("k"), py::arg("dtype"),
             py::arg("symmetric"), py::arg("threads"),
             "How the CPU forward would run: path, list_capacity, workspace_bytes. dtype: 0 float32, 1 float64, "
             "2 float16, 3 bfloat16.");
}
