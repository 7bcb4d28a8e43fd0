// The support graph as the kernels of the backward see it, and the weight of an edge.
#pragma once

#include <cstdint>

#include "cuda/memory.cuh"
#include "cuda/plan/plan_types.h"
#include "cuda/ptx.cuh"
#include "sn_types.h"

namespace sn::cuda {

struct Graph {
  std::int64_t dims;
  std::int64_t targets;  // M
  std::uint32_t edges;   // of an anchor
  std::uint32_t all_edges;
  Reduction reduction;
  const std::int32_t* indices;
  const void* coefficients;
  const void* grad_loss;
  const double* stats;
};

// Edges of a target that are summed from zero, in the one order of sums (gather.cuh).
inline constexpr int kEdgeChunk = 64;

// What the upstream gradient of every anchor is made of, unless each has its own.
template <typename Acc>
struct UpstreamParts {
  Acc gradient = 0;
  double valid = 1.0;

  __device__ __forceinline__ void read(const Graph& graph) {
    if (graph.reduction == Reduction::kNone) return;
    gradient = load(static_cast<const Acc*>(graph.grad_loss));
    if (graph.reduction == Reduction::kMean) valid = load(graph.stats + kValidAnchors);
  }
  __device__ __forceinline__ double value(const Graph& graph) const {
    const double upstream = static_cast<double>(gradient);
    if (graph.reduction != Reduction::kMean) return upstream;
    return valid > 0.0 ? upstream / valid : 0.0;
  }
};

// Upstream gradient of every anchor, unless each has its own. Not by UpstreamParts, which costs the search in fp64 the
// registers that it does not have.
template <typename Acc>
__device__ __forceinline__ double shared_upstream(const Graph& graph) {
  if (graph.reduction == Reduction::kNone) return 0.0;
  const double upstream = static_cast<double>(load(static_cast<const Acc*>(graph.grad_loss)));
  if (graph.reduction == Reduction::kSum) return upstream;
  const double valid = load(graph.stats + kValidAnchors);
  return valid > 0.0 ? upstream / valid : 0.0;
}

// Weight of an edge of this coefficient. A coefficient of 0 stays 0 whatever the upstream gradient is.
template <typename Acc>
__device__ __forceinline__ Acc weight_of(double upstream, Acc coefficient) {
  if (coefficient == Acc(0)) return Acc(0);
  return narrow<Acc>(multiply(upstream, static_cast<double>(coefficient)));
}
// The same of an edge whose anchor is `anchor`, which may have an upstream gradient of its own.
template <typename Acc>
__device__ __forceinline__ Acc weight_of(const Graph& graph, double upstream, std::uint32_t anchor, Acc coefficient) {
  if (graph.reduction == Reduction::kNone) {
    upstream = static_cast<double>(load(static_cast<const Acc*>(graph.grad_loss) + anchor));
  }
  return weight_of(upstream, coefficient);
}

// Weight of edge `edge` of the graph, whose anchor is `anchor`.
template <typename Acc>
__device__ __forceinline__ Acc edge_weight(const Graph& graph, double upstream, std::uint32_t anchor,
                                           std::uint32_t edge) {
  return weight_of(graph, upstream, anchor, load(static_cast<const Acc*>(graph.coefficients) + edge));
}

inline Graph graph_of(const BackwardArgs& args) {
  return {.dims = args.dims,
          .targets = args.symmetric ? args.anchors.rows : args.candidates.rows,
          .edges = static_cast<std::uint32_t>(args.edges),
          .all_edges = static_cast<std::uint32_t>(args.anchors.rows * args.edges),
          .reduction = args.reduction,
          .indices = args.indices,
          .coefficients = args.coefficients,
          .grad_loss = args.grad_loss,
          .stats = args.stats};
}

}  // namespace sn::cuda
