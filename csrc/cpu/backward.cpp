// Backward: a support graph and the upstream gradient to feature gradients. Knows nothing of alpha, squeeze
// or labels.
//
//   dX_i += g_i w_ij (x_i - z_j),   dZ_j -= g_i w_ij (x_i - z_j)   over the edges (i, j) of the graph.
//
// Edges are listed by target row: an anchor's own in slot order; a candidate's incoming ones by ascending
// anchor. In the symmetric case a row's list is both, and an edge whose reverse exists too appears once, with
// the two weights added: (x_i - x_j) is the same vector. Every sum has a fixed order; no two workers write
// one row's element.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "cpu.h"
#include "kernels.h"
#include "memory.h"
#include "parallel.h"
#include "plan.h"

namespace sn::cpu {
namespace {

void fill_nan(DType dtype, void* out, std::int64_t count) {
  switch (dtype) {
    case DType::kFloat64:
      std::fill_n(static_cast<double*>(out), count, std::numeric_limits<double>::quiet_NaN());
      break;
    case DType::kFloat32:
      std::fill_n(static_cast<float*>(out), count, std::numeric_limits<float>::quiet_NaN());
      break;
    case DType::kFloat16:
      std::fill_n(static_cast<std::uint16_t*>(out), count, std::uint16_t{0x7e00});
      break;
    case DType::kBFloat16:
      std::fill_n(static_cast<std::uint16_t*>(out), count, std::uint16_t{0x7fc0});
      break;
  }
}

// Weighted edges of the graph, g_i w_ij in the accumulation type; absent and zero edges have weight 0.
template <class Acc>
class Edges {
 public:
  explicit Edges(const BackwardArgs& args) : args_(args) {
    const Acc* grad = static_cast<const Acc*>(args.grad_loss);
    const double valid = args.stats[kValidAnchors];
    if (args.reduction == Reduction::kMean) {
      shared_ = valid > 0.0 ? static_cast<double>(grad[0]) / valid : 0.0;
    } else if (args.reduction == Reduction::kSum) {
      shared_ = static_cast<double>(grad[0]);
    }
  }
  std::int32_t neighbour(std::int64_t anchor, std::int64_t slot) const {
    return args_.indices[anchor * args_.edges + slot];
  }
  Acc weight(std::int64_t anchor, std::int64_t slot) const {
    const std::int64_t at = anchor * args_.edges + slot;
    const Acc coefficient = static_cast<const Acc*>(args_.coefficients)[at];
    if (args_.indices[at] < 0 || coefficient == Acc(0)) return Acc(0);
    const double upstream = args_.reduction == Reduction::kNone
                                ? static_cast<double>(static_cast<const Acc*>(args_.grad_loss)[anchor])
                                : shared_;
    return static_cast<Acc>(upstream * static_cast<double>(coefficient));
  }
  // Slot of the edge anchor -> candidate, -1 if there is none that counts.
  std::int32_t slot_of(std::int64_t anchor, std::int32_t candidate) const {
    const std::int32_t* indices = args_.indices + anchor * args_.edges;
    for (std::int64_t e = 0; e < args_.edges; ++e) {
      if (indices[e] == candidate) return weight(anchor, e) != Acc(0) ? static_cast<std::int32_t>(e) : -1;
    }
    return -1;
  }

 private:
  const BackwardArgs& args_;
  double shared_ = 0.0;
};

template <class Acc>
struct Lists {
  std::vector<std::int64_t> begin;
  std::vector<std::int32_t> neighbours;
  std::vector<Acc> weights;
  EdgeLists view() const { return {begin.data(), neighbours.data(), weights.data()}; }
};

// Which edges go into whose list: `own` to the anchors', `incoming` to the candidates'; both for the
// symmetric case.
template <class Acc>
Lists<Acc> list_edges(const BackwardArgs& args, const ThreadPool& pool, bool own, bool incoming) {
  const Edges<Acc> edges(args);
  const std::int64_t N = args.anchors.rows;
  const std::int64_t rows = own ? N : args.candidates.rows;
  const bool merge = own && incoming;

  // Of each edge: its weight, and the slot of its reverse.
  std::vector<Acc> weights(static_cast<std::size_t>(N * args.edges));
  std::vector<std::int32_t> reverse(merge ? weights.size() : 0);
  for_blocks(pool, workers_for(pool, 40.0 * static_cast<double>(N * args.edges)), N, 256,
             [&](std::int64_t begin, std::int64_t end) {
               for (std::int64_t i = begin; i < end; ++i) {
                 for (std::int64_t e = 0; e < args.edges; ++e) {
                   const std::int64_t at = i * args.edges + e;
                   weights[at] = edges.weight(i, e);
                   if (!merge) continue;
                   reverse[at] = weights[at] == Acc(0)
                                     ? -1
                                     : edges.slot_of(edges.neighbour(i, e), static_cast<std::int32_t>(i));
                 }
               }
             });

  Lists<Acc> lists;
  lists.begin.assign(static_cast<std::size_t>(rows) + 1, 0);
  // visit(row, neighbour, weight) in list order for every row.
  const auto for_each_edge = [&](const auto& visit) {
    for (std::int64_t i = 0; own && i < N; ++i) {
      for (std::int64_t e = 0; e < args.edges; ++e) {
        const std::int64_t at = i * args.edges + e;
        if (weights[at] == Acc(0)) continue;
        const std::int32_t j = args.indices[at];
        visit(i, j,
              merge && reverse[at] >= 0 ? weights[at] + weights[j * args.edges + reverse[at]] : weights[at]);
      }
    }
    for (std::int64_t i = 0; incoming && i < N; ++i) {
      for (std::int64_t e = 0; e < args.edges; ++e) {
        const std::int64_t at = i * args.edges + e;
        if (weights[at] == Acc(0) || (merge && reverse[at] >= 0)) continue;
        visit(args.indices[at], static_cast<std::int32_t>(i), weights[at]);
      }
    }
  };
  for_each_edge([&](std::int64_t row, std::int32_t, Acc) { ++lists.begin[row + 1]; });
  for (std::int64_t r = 0; r < rows; ++r) lists.begin[r + 1] += lists.begin[r];
  lists.neighbours.resize(static_cast<std::size_t>(lists.begin[rows]));
  lists.weights.resize(static_cast<std::size_t>(lists.begin[rows]));
  std::vector<std::int64_t> next(lists.begin.begin(), lists.begin.end() - 1);
  for_each_edge([&](std::int64_t row, std::int32_t neighbour, Acc weight) {
    const std::int64_t at = next[row]++;
    lists.neighbours[at] = neighbour;
    lists.weights[at] = weight;
  });
  return lists;
}

// Rows [first of item, first of next item) hold about equally many edges: a batch may have a hub that
// everybody selects.
std::vector<std::int64_t> balanced_rows(const std::vector<std::int64_t>& begin, std::int64_t parts) {
  const std::int64_t rows = static_cast<std::int64_t>(begin.size()) - 1;
  const std::int64_t work = begin[rows] + rows;
  std::vector<std::int64_t> cuts = {0};
  for (std::int64_t part = 1; part < parts; ++part) {
    std::int64_t low = cuts.back();
    std::int64_t high = rows;
    while (low < high) {
      const std::int64_t middle = (low + high) / 2;
      (begin[middle] + middle)* parts < work* part ? low = middle + 1 : high = middle;
    }
    cuts.push_back(low);
  }
  cuts.push_back(rows);
  return cuts;
}

// One side: out_r = sum_e weight_e (own_r - other_e).
template <class Acc>
void gather(const BackwardArgs& args, const ThreadPool& pool, const Kernels& kernels, const FeatureView& own,
            const FeatureView& other, const Lists<Acc>& lists, void* out) {
  const std::int64_t rows = own.rows;
  const EdgeLists edges = lists.view();
  const double operations =
      0.1 * static_cast<double>(lists.begin[rows] + 2 * rows) * static_cast<double>(args.dims);
  const int workers = workers_for(pool, operations);
  const bool same = own.data == other.data && own.rows == other.rows && own.row_stride == other.row_stride;
  const bool by_columns = args.dtype != DType::kFloat64 && refines_by_columns(rows, other.rows, args.dims) &&
                          lists.begin[rows] >= rows;
  constexpr std::int64_t kParts = 4;  // a worker
  const std::vector<std::int64_t> cuts = balanced_rows(lists.begin, workers == 1 ? 1 : kParts * workers);
  const std::int64_t parts = static_cast<std::int64_t>(cuts.size()) - 1;
  if (!by_columns) {
    for_each(pool, workers, parts, [&](std::int64_t item) {
      kernels.backward_rows(args.dtype, own, other, edges, args.dims, cuts[item], cuts[item + 1], out);
    });
    return;
  }
  // As in the forward's refinement: gather a block of columns where it stays in cache, use it for all rows,
  // go on.
  constexpr std::int64_t kRows = 64;
  const std::int64_t other_rows = same ? 0 : other.rows;
  Scratch scratch(static_cast<std::size_t>(2 * (rows + other_rows) * kBackwardColumns) * sizeof(float));
  float* own_columns[2];
  float* other_columns[2];
  for (int b = 0; b < 2; ++b) {
    own_columns[b] = static_cast<float*>(scratch.data()) + b * (rows + other_rows) * kBackwardColumns;
    other_columns[b] = own_columns[b] + (same ? 0 : rows * kBackwardColumns);
  }
  const std::int64_t blocks = (args.dims + kBackwardColumns - 1) / kBackwardColumns;
  const std::int64_t own_items = (rows + kRows - 1) / kRows;
  const std::int64_t other_items = (other_rows + kRows - 1) / kRows;
  for (std::int64_t block = 0; block <= blocks; ++block) {
    const std::int64_t gathers = block < blocks ? own_items + other_items : 0;
    const std::int64_t uses = block > 0 ? parts : 0;
    for_each(pool, workers, uses + gathers, [&](std::int64_t item) {
      if (item < uses) {
        const int b = static_cast<int>((block - 1) % 2);
        kernels.backward_columns(args.dtype, own_columns[b], other_columns[b], edges, args.dims,
                                 (block - 1) * kBackwardColumns, cuts[item], cuts[item + 1], out);
        return;
      }
      item -= uses;
      const int b = static_cast<int>(block % 2);
      const bool of_own = item < own_items;
      const FeatureView& side = of_own ? own : other;
      const std::int64_t begin = (of_own ? item : item - own_items) * kRows;
      kernels.gather_columns(args.dtype, side, nullptr, begin, std::min(side.rows, begin + kRows),
                             block * kBackwardColumns,
                             std::min(kBackwardColumns, args.dims - block * kBackwardColumns),
                             kBackwardColumns, of_own ? own_columns[b] : other_columns[b]);
    });
  }
}

template <class Acc>
void backward_as(const BackwardArgs& args, const ThreadPool& pool) {
  const Kernels& kernels = active_kernels();
  if (args.symmetric) {
    if (args.grad_anchors != nullptr) {
      gather<Acc>(args, pool, kernels, args.anchors, args.anchors, list_edges<Acc>(args, pool, true, true),
                  args.grad_anchors);
    }
    return;
  }
  if (args.grad_anchors != nullptr) {
    gather<Acc>(args, pool, kernels, args.anchors, args.candidates, list_edges<Acc>(args, pool, true, false),
                args.grad_anchors);
  }
  if (args.grad_candidates != nullptr) {
    gather<Acc>(args, pool, kernels, args.candidates, args.anchors, list_edges<Acc>(args, pool, false, true),
                args.grad_candidates);
  }
}

}  // namespace

void backward(const BackwardArgs& args, const ThreadPool& pool) {
  if (std::isnan(args.stats[kPoison])) {
    if (args.grad_anchors != nullptr) fill_nan(args.dtype, args.grad_anchors, args.anchors.rows * args.dims);
    if (args.grad_candidates != nullptr)
      fill_nan(args.dtype, args.grad_candidates, args.candidates.rows * args.dims);
    return;
  }
  if (args.dtype == DType::kFloat64) {
    backward_as<double>(args, pool);
  } else {
    backward_as<float>(args, pool);
  }
}

}  // namespace sn::cpu
