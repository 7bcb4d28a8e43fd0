// The pybind11 module `_C`: facts about this build and its plans. Beside autograd.cpp this is the only file that knows
// Python, and it does not know torch: older releases of torch do not offer their copy of pybind11 to code that uses the
// stable ABI, as sn_ops.cpp does.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <limits>
#include <map>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "cpu/cpu.h"
#include "cuda/plan/cost.h"
#include "cuda/plan/plan.h"
#include "sn_types.h"

namespace {

using sn::cuda::ForwardPath;
using namespace pybind11::literals;

template <class Path>
struct PathName {
  Path path;
  const char* name;
};
constexpr std::array<PathName<sn::cpu::Path>, 7> kCpuPaths{{
    {sn::cpu::Path::kAuto, "auto"},
    {sn::cpu::Path::kDirect, "direct"},
    {sn::cpu::Path::kScreen, "screen"},
    {sn::cpu::Path::kTiles, "tiles"},
    {sn::cpu::Path::kBytes, "bytes"},
    {sn::cpu::Path::kByteRows, "byte-rows"},
    {sn::cpu::Path::kForms, "forms"},
}};

constexpr std::array<PathName<ForwardPath>, 8> kCudaPaths{{
    {ForwardPath::kAuto, "auto"},
    {ForwardPath::kCluster, "cluster"},
    {ForwardPath::kDirect, "direct"},
    {ForwardPath::kDense, "dense"},
    {ForwardPath::kScreen, "screen"},
    {ForwardPath::kBank, "bank"},
    {ForwardPath::kTickets, "tickets"},
    {ForwardPath::kSquare, "square"},
}};

constexpr std::array<PathName<sn::cuda::Batch>, 5> kBatches{{
    {sn::cuda::Batch::kRandom, "random"},
    {sn::cuda::Batch::kClusters, "clusters"},
    {sn::cuda::Batch::kIdentical, "identical"},
    {sn::cuda::Batch::kLargeClusters, "large clusters"},
    {sn::cuda::Batch::kLargeIdentical, "large identical"},
}};

template <class Names, class Path>
const char* name_of(const Names& names, Path path) {
  for (const auto& entry : names) {
    if (entry.path == path) return entry.name;
  }
  throw std::logic_error("sn_ops: a path without a name");
}

template <class Names>
auto named(const char* argument, const Names& names, const std::string& name) {
  std::string allowed;
  for (const auto& entry : names) {
    if (name == entry.name) return entry.path;
    allowed += (allowed.empty() ? "" : ", ") + std::string(entry.name);
  }
  throw std::invalid_argument(std::string(argument) + ": expected one of " + allowed + ", got " + name);
}

void set_cpu_path(const std::string& name) {
  sn::cpu::set_path(named("set_cpu_path: path", kCpuPaths, name));
}

// Indices of rows are int32, so no problem is larger.
void expect_problem(const char* function, std::int64_t N, std::int64_t M, std::int64_t D, std::int64_t k, int dtype,
                    bool symmetric) {
  constexpr std::int64_t kMost = std::numeric_limits<std::int32_t>::max();
  if (std::min({N, M, D}) < 0 || k < 1 || std::max({N, M, D, k}) > kMost) {
    throw std::invalid_argument(std::string(function) + ": expected N, M, D of 0 to " + std::to_string(kMost) +
                                " and k of 1 to as many, got " + std::to_string(N) + ", " + std::to_string(M) + ", " +
                                std::to_string(D) + " and " + std::to_string(k));
  }
  // No device holds these, and offsets in a workspace are 64 bits.
  constexpr double kMostElements = 0x1p56;
  if ((static_cast<double>(N) + static_cast<double>(M)) * static_cast<double>(D) > kMostElements) {
    throw std::invalid_argument(std::string(function) + ": expected (N + M) x D of at most 2^56, got (" +
                                std::to_string(N) + " + " + std::to_string(M) + ") x " + std::to_string(D));
  }
  if (symmetric && N != M) {
    throw std::invalid_argument(std::string(function) + ": symmetric: expected N = M, got " + std::to_string(N) +
                                " and " + std::to_string(M));
  }
  if (dtype < 0 || dtype > static_cast<int>(sn::DType::kBFloat16)) {
    throw std::invalid_argument(std::string(function) +
                                ": dtype: expected 0 (float32), 1 (float64), 2 (float16) or 3 (bfloat16), got " +
                                std::to_string(dtype));
  }
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

pybind11::dict cpu_plan(std::int64_t N, std::int64_t M, std::int64_t D, std::int64_t k, int dtype, bool symmetric,
                        int threads) {
  expect_problem("cpu_plan", N, M, D, k, dtype, symmetric);
  if (threads < 1) throw std::invalid_argument("cpu_plan: expected threads >= 1");
  const sn::cpu::Plan plan = sn::cpu::plan_forward(N, M, D, k, static_cast<sn::DType>(dtype), symmetric, threads);
  return pybind11::dict("path"_a = name_of(kCpuPaths, plan.path), "list_capacity"_a = plan.list_capacity,
                        "workspace_bytes"_a = plan.workspace_bytes);
}

sn::cuda::DeviceFacts device_facts(const char* function, std::pair<int, int> capability, int multiprocessors,
                                   int shared_bytes, int largest_cluster = 0, int cluster_bytes = 0,
                                   int wide_clusters = 0) {
  constexpr int kOldest = 8;
  if (capability.first < kOldest || multiprocessors < 1 || shared_bytes < 1) {
    throw std::invalid_argument(std::string(function) + ": expected a capability of " + std::to_string(kOldest) +
                                ".0 or newer, multiprocessors and shared_bytes >= 1, got " +
                                std::to_string(capability.first) + "." + std::to_string(capability.second) + ", " +
                                std::to_string(multiprocessors) + " and " + std::to_string(shared_bytes));
  }
  return {.major = capability.first,
          .minor = capability.second,
          .multiprocessors = multiprocessors,
          .shared_bytes = shared_bytes,
          .largest_cluster = largest_cluster,
          .cluster_bytes = cluster_bytes,
          .wide_clusters = wide_clusters};
}

// [(name, launches, microseconds)]
pybind11::list kernels_of(const sn::cuda::Cost& cost) {
  pybind11::list kernels;
  for (int number = 0; number < cost.count(); ++number) {
    const sn::cuda::KernelCost& kernel = cost.kernel(number);
    kernels.append(pybind11::make_tuple(kernel.name, kernel.launches, kernel.us));
  }
  return kernels;
}

pybind11::dict cuda_plan(std::int64_t N, std::int64_t M, std::int64_t D, std::int64_t k, int dtype, bool symmetric,
                         bool aligned, const std::string& path, std::pair<int, int> capability, int multiprocessors,
                         int shared_bytes, int largest_cluster, int cluster_bytes, int wide_clusters,
                         const std::string& batch) {
  expect_problem("cuda_plan", N, M, D, k, dtype, symmetric);
  const sn::cuda::DeviceFacts device = device_facts("cuda_plan", capability, multiprocessors, shared_bytes,
                                                    largest_cluster, cluster_bytes, wide_clusters);
  const sn::cuda::Problem problem{.N = N,
                                  .M = M,
                                  .D = D,
                                  .k = k,
                                  .dtype = static_cast<sn::DType>(dtype),
                                  .symmetric = symmetric,
                                  .aligned = aligned};
  const ForwardPath wanted = named("cuda_plan: path", kCudaPaths, path);
  if (!sn::cuda::serves(wanted, problem, device)) {
    throw std::invalid_argument("cuda_plan: path: " + path + " cannot serve this problem on this device");
  }
  const sn::cuda::ForwardPlan plan = sn::cuda::plan_forward(problem, device, wanted);
  const sn::cuda::Cost cost =
      sn::cuda::predict_forward(plan, problem, device, named("cuda_plan: batch", kBatches, batch));
  return pybind11::dict(
      "path"_a = name_of(kCudaPaths, plan.path), "launches"_a = plan.launches,
      "workspace_bytes"_a = plan.workspace_bytes, "strip_rows"_a = plan.strip_rows, "strips"_a = plan.strips,
      "d_slices"_a = plan.d_slices, "slice_elements"_a = plan.slice_elements, "triangular"_a = plan.triangular,
      "cluster"_a = plan.cluster, "sample_columns"_a = plan.sample_columns, "sample_group"_a = plan.sample_group,
      "buffer_capacity"_a = plan.buffer_capacity, "positive_anchors"_a = plan.positive_anchors,
      "positive_segments"_a = plan.positive_segments, "predicted_us"_a = cost.total(), "kernels"_a = kernels_of(cost));
}

pybind11::dict cuda_backward_plan(std::int64_t N, std::int64_t M, std::int64_t D, std::int64_t k, int dtype,
                                  bool symmetric, std::pair<int, int> capability, int multiprocessors,
                                  int shared_bytes) {
  expect_problem("cuda_backward_plan", N, M, D, k, dtype, symmetric);
  const sn::cuda::DeviceFacts device = device_facts("cuda_backward_plan", capability, multiprocessors, shared_bytes);
  const sn::cuda::BackwardProblem problem{.N = N,
                                          .M = M,
                                          .D = D,
                                          .edges = std::min(k, M) + sn::kExtraEdges,
                                          .dtype = static_cast<sn::DType>(dtype),
                                          .symmetric = symmetric,
                                          .need_anchors = true,
                                          .need_candidates = !symmetric};
  if (N > sn::cuda::kMostEdges / problem.edges) {
    throw std::invalid_argument("cuda_backward_plan: expected at most " + std::to_string(sn::cuda::kMostEdges) +
                                " edges, got " + std::to_string(N) + " x " + std::to_string(problem.edges));
  }
  const sn::cuda::BackwardPlan plan = sn::cuda::plan_backward(problem, device);
  const sn::cuda::Cost cost = sn::cuda::predict_backward(plan, problem, device);
  return pybind11::dict(
      "launches"_a = plan.launches, "workspace_bytes"_a = plan.workspace_bytes, "partitioned"_a = plan.partitioned,
      "row_packs"_a = plan.row_packs, "thread_packs"_a = plan.thread_packs, "buckets"_a = plan.buckets,
      "slice_elements"_a = plan.slice_elements, "slices"_a = plan.slices, "lane_bytes"_a = plan.lane_bytes,
      "target_lanes"_a = plan.target_lanes, "row_lanes"_a = plan.row_lanes, "predicted_us"_a = cost.total(),
      "kernels"_a = kernels_of(cost));
}

}  // namespace

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
             "Force a path of the CPU forward: auto, direct, screen, tiles, bytes, byte-rows or forms.");
  module.def("cpu_plan", &cpu_plan, py::arg("N"), py::arg("M"), py::arg("D"), py::arg("k"), py::arg("dtype"),
             py::arg("symmetric"), py::arg("threads"),
             "How the CPU forward would run: path, list_capacity, workspace_bytes. dtype: 0 float32, 1 float64, "
             "2 float16, 3 bfloat16.");

  // Defaults are an H200's facts, so that plans can be read on a machine without a GPU.
  const auto capability = py::arg("capability") = std::pair<int, int>(9, 0);
  const auto multiprocessors = py::arg("multiprocessors") = sn::cuda::DeviceFacts{}.multiprocessors;
  const auto shared_bytes = py::arg("shared_bytes") = sn::cuda::DeviceFacts{}.shared_bytes;
  module.def(
      "cuda_plan", &cuda_plan, py::arg("N"), py::arg("M"), py::arg("D"), py::arg("k"), py::arg("dtype"),
      py::arg("symmetric"), py::arg("aligned") = true, py::arg("path") = "auto", capability, multiprocessors,
      shared_bytes, py::arg("largest_cluster") = sn::cuda::DeviceFacts{}.largest_cluster,
      py::arg("cluster_bytes") = sn::cuda::DeviceFacts{}.cluster_bytes,
      py::arg("wide_clusters") = sn::cuda::DeviceFacts{}.wide_clusters, py::arg("batch") = "random",
      "How the CUDA forward would run on a device with these facts (default: an H200's): path, launches, "
      "workspace_bytes, strips, slices and the sample. dtype: 0 float32, 1 float64, 2 float16, 3 bfloat16. symmetric: "
      "anchors are the candidates. aligned: rows begin at multiples of 16 bytes. largest_cluster, cluster_bytes: "
      "blocks of the largest cluster that the device holds, and shared memory of each. wide_clusters: how many of 16 "
      "blocks it holds at once. predicted_us is what the cost model expects of a call "
      "in a CUDA graph, kernels its parts: (name, launches, microseconds). batch is what the features look like: "
      "random, clusters (too tight for the scores: every row is screened again), large clusters (of 256 rows, each an "
      "identity), identical (one point), or large identical (in identities of 1024). ValueError for sizes and devices "
      "that there are not, and where a forced path cannot serve.");
  module.def(
      "cuda_backward_plan", &cuda_backward_plan, py::arg("N"), py::arg("M"), py::arg("D"), py::arg("k"),
      py::arg("dtype"), py::arg("symmetric"), capability, multiprocessors, shared_bytes,
      "How the CUDA backward would run: launches, workspace_bytes, partitioned, slices and lanes, row_packs of "
      "resident "
      "rows, thread_packs of these that a thread sums; predicted_us and "
      "kernels as those of cuda_plan, and arguments as far as it has the same. ValueError also for more edges than a "
      "call may have.");
}
