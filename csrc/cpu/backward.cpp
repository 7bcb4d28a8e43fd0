// Backward: from a support graph and the upstream gradient to feature gradients. Neither alpha nor squeeze nor labels
// matter here.
//
//   dX_i += g_i w_ij (x_i - z_j),   dZ_j -= g_i w_ij (x_i - z_j)   over the edges (i, j) of the graph.
//
// Edges are listed by target row: an anchor's own edges in slot order, a candidate's incoming edges by ascending
// anchor. In the symmetric case a row's list holds both, and an edge and its reverse are one entry with the two weights
// added, since (x_i - x_j) is the same vector. Every sum has a fixed order. No two workers write the same element.
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

// Weighted edges of the graph, g_i w_ij in the accumulation type. Absent edges have weight 0.
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
  // Slot of the edge anchor -> candidate, -1 without one of nonzero weight.
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

// The edges of one side by target row: an anchor's own with `own`, a candidate's incoming ones with `incoming`. With
// both, in the symmetric case, an edge and its reverse are merged.
template <class Acc>
class Adjacency {
 public:
  Adjacency(const BackwardArgs& args, const ThreadPool& pool, bool own, bool incoming)
      : args_(args), edges_(args), own_(own), incoming_(incoming) {
    const std::int64_t N = args.anchors.rows;
    // Slots take 16 bits to save memory. Graphs with more edges an anchor are not merged.
    merge_ = own && incoming && args.edges <= std::numeric_limits<std::int16_t>::max();
    if (merge_) {
      reverse_.resize(static_cast<std::size_t>(N * args.edges));
      for_blocks(pool, workers_for(pool, 150.0 * static_cast<double>(N * args.edges)), N, 256,
                 [&](std::int64_t begin, std::int64_t end) {
                   for (std::int64_t i = begin; i < end; ++i) find_reverses(i);
                 });
    }
    counts_.assign(static_cast<std::size_t>(own ? N : args.candidates.rows), 0);
    visit(0, rows(), [&](std::int64_t row, std::int32_t, Acc) { ++counts_[row]; });
  }

  std::int64_t rows() const { return static_cast<std::int64_t>(counts_.size()); }

  // Calls use(lists, begin) for strips of rows whose lists have at most `most` entries, or that are one row.
  template <class Use>
  void for_each_strip(std::int64_t most, const Use& use) const {
    std::vector<std::int64_t> begin;
    std::vector<std::int64_t> next;
    std::vector<std::int32_t> neighbours;
    std::vector<Acc> weights;
    for (std::int64_t first = 0, last = 0; first < rows(); first = last) {
      begin.assign(1, 0);
      for (last = first; last < rows() && (last == first || begin.back() + counts_[last] <= most); ++last) {
        begin.push_back(begin.back() + counts_[last]);
      }
      next.assign(begin.begin(), begin.end() - 1);
      neighbours.resize(static_cast<std::size_t>(begin.back()));
      weights.resize(neighbours.size());
      visit(first, last, [&](std::int64_t row, std::int32_t neighbour, Acc weight) {
        const std::int64_t at = next[row - first]++;
        neighbours[at] = neighbour;
        weights[at] = weight;
      });
      use(EdgeLists{first, begin.data(), neighbours.data(), weights.data()}, begin);
    }
  }

 private:
  void find_reverses(std::int64_t i) {
    for (std::int64_t e = 0; e < args_.edges; ++e) {
      const bool counts = edges_.weight(i, e) != Acc(0);
      reverse_[i * args_.edges + e] =
          static_cast<std::int16_t>(counts ? edges_.slot_of(edges_.neighbour(i, e), static_cast<std::int32_t>(i)) : -1);
    }
  }

  // Calls to(row, neighbour, weight) for the edges of rows [first, last), those of each row in list order.
  template <class Visit>
  void visit(std::int64_t first, std::int64_t last, const Visit& to) const {
    const auto reverse_of = [&](std::int64_t i, std::int64_t e) {
      return merge_ ? reverse_[i * args_.edges + e] : std::int16_t{-1};
    };
    for (std::int64_t i = first; own_ && i < last; ++i) {
      for (std::int64_t e = 0; e < args_.edges; ++e) {
        Acc weight = edges_.weight(i, e);
        if (weight == Acc(0)) continue;
        const std::int32_t j = edges_.neighbour(i, e);
        const std::int16_t reverse = reverse_of(i, e);
        if (reverse >= 0) weight += edges_.weight(j, reverse);
        to(i, j, weight);
      }
    }
    for (std::int64_t i = 0; incoming_ && i < args_.anchors.rows; ++i) {
      for (std::int64_t e = 0; e < args_.edges; ++e) {
        const std::int32_t j = edges_.neighbour(i, e);
        if (j < first || j >= last || reverse_of(i, e) >= 0) continue;
        const Acc weight = edges_.weight(i, e);
        if (weight != Acc(0)) to(j, static_cast<std::int32_t>(i), weight);
      }
    }
  }

  const BackwardArgs& args_;
  Edges<Acc> edges_;
  bool own_;
  bool incoming_;
  bool merge_ = false;
  std::vector<std::int16_t> reverse_;  // [N, K + 2] slot of the reverse edge, -1: none
  std::vector<std::int32_t> counts_;
};

// Cuts a strip of rows into parts with about the same number of edges: a batch may have a hub that everybody selects.
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

// Writes to each page of an output that is to be overwritten.
void touch(const ThreadPool& pool, int workers, void* out, std::int64_t bytes) {
  constexpr std::int64_t kPage = 4096;
  constexpr std::int64_t kPart = std::int64_t{2} << 20;
  for_blocks(pool, workers, bytes, kPart, [&](std::int64_t begin, std::int64_t end) {
    volatile char* memory = static_cast<char*>(out);
    for (std::int64_t at = begin; at < end; at += kPage) memory[at] = 0;
  });
}

// One strip of one side: out_r = sum_e weight_e (own_r - other_e).
void gather(const BackwardArgs& args, const ThreadPool& pool, const Kernels& kernels, const FeatureView& own,
            const FeatureView& other, const EdgeLists& edges, const std::vector<std::int64_t>& begin, void* out) {
  const std::int64_t rows = static_cast<std::int64_t>(begin.size()) - 1;
  const double operations = 0.1 * static_cast<double>(begin[rows] + 2 * rows) * static_cast<double>(args.dims);
  const int workers = workers_for(pool, operations);
  constexpr std::int64_t kParts = 4;  // per worker
  std::vector<std::int64_t> cuts = balanced_rows(begin, workers == 1 ? 1 : kParts * workers);
  for (std::int64_t& cut : cuts) cut += edges.first_row;
  const std::int64_t parts = static_cast<std::int64_t>(cuts.size()) - 1;
  // As in the forward's refinement: gathers a block of columns where it stays in cache, uses it for all rows, goes on.
  const bool by_columns =
      args.dtype != DType::kFloat64 && refines_by_columns(own.rows, other.rows, args.dims) && begin[rows] >= own.rows;
  if (!by_columns) {
    for_each(pool, workers, parts, [&](std::int64_t item) {
      kernels.backward_rows(args.dtype, own, other, edges, args.dims, cuts[item], cuts[item + 1], out);
    });
    return;
  }
  constexpr std::int64_t kRows = 64;
  const std::int64_t other_rows = args.symmetric ? 0 : other.rows;
  Scratch scratch(static_cast<std::size_t>(2 * (own.rows + other_rows) * kBackwardColumns) * sizeof(float));
  float* own_columns[2];
  float* other_columns[2];
  for (int b = 0; b < 2; ++b) {
    own_columns[b] = static_cast<float*>(scratch.data()) + b * (own.rows + other_rows) * kBackwardColumns;
    other_columns[b] = own_columns[b] + (args.symmetric ? 0 : own.rows * kBackwardColumns);
  }
  const std::int64_t blocks = (args.dims + kBackwardColumns - 1) / kBackwardColumns;
  const std::int64_t own_items = (own.rows + kRows - 1) / kRows;
  const std::int64_t other_items = (other_rows + kRows - 1) / kRows;
  // Every worker writes to every row. One worker touches each fresh page first, or all would fault on the same pages.
  if (edges.first_row == 0) touch(pool, workers, out, own.rows * args.dims * element_bytes(args.dtype));
  const auto line_up = [&](std::int64_t block, std::int64_t item, std::int64_t buffer) {
    const bool of_own = item < own_items;
    const FeatureView& side = of_own ? own : other;
    const std::int64_t first = (of_own ? item : item - own_items) * kRows;
    const std::int64_t column = block * kBackwardColumns;
    kernels.gather_columns(args.dtype, side, nullptr, first, std::min(side.rows, first + kRows), column,
                           std::min(kBackwardColumns, args.dims - column), kBackwardColumns,
                           of_own ? own_columns[buffer] : other_columns[buffer]);
  };
  const auto use = [&](std::int64_t block, std::int64_t item, std::int64_t buffer) {
    kernels.backward_columns(args.dtype, own_columns[buffer], other_columns[buffer], edges, args.dims,
                             block * kBackwardColumns, cuts[item], cuts[item + 1], out);
  };
  gather_and_use(pool, workers, blocks, own_items + other_items, parts, false, line_up, use);
}

// Entries of edge lists held at a time: 512 bytes a row and some megabytes. K = 10 always fits into one strip.
template <class Acc>
std::int64_t most_entries(std::int64_t rows) {
  constexpr std::int64_t kFixed = std::int64_t{4} << 20;
  constexpr std::int64_t kPerRow = 512;
  return (kFixed + kPerRow * rows) / static_cast<std::int64_t>(sizeof(std::int32_t) + sizeof(Acc));
}

template <class Acc>
void backward_as(const BackwardArgs& args, const ThreadPool& pool) {
  const Kernels& kernels = active_kernels();
  const auto side = [&](const FeatureView& own, const FeatureView& other, bool of_anchors, bool of_candidates,
                        void* out) {
    if (out == nullptr) return;
    const Adjacency<Acc> adjacency(args, pool, of_anchors, of_candidates);
    adjacency.for_each_strip(most_entries<Acc>(own.rows),
                             [&](const EdgeLists& edges, const std::vector<std::int64_t>& begin) {
                               gather(args, pool, kernels, own, other, edges, begin, out);
                             });
  };
  if (args.symmetric) {
    side(args.anchors, args.anchors, true, true, args.grad_anchors);
  } else {
    side(args.anchors, args.candidates, true, false, args.grad_anchors);
    side(args.candidates, args.anchors, false, true, args.grad_candidates);
  }
}

}  // namespace

void backward(const BackwardArgs& args, const ThreadPool& pool) {
  const DefaultFloatingPoint mode;
  if (std::isnan(args.stats[kPoison])) {
    if (args.grad_anchors != nullptr) fill_nan(args.dtype, args.grad_anchors, args.anchors.rows * args.dims);
    if (args.grad_candidates != nullptr) fill_nan(args.dtype, args.grad_candidates, args.candidates.rows * args.dims);
    return;
  }
  if (args.dtype == DType::kFloat64) {
    backward_as<double>(args, pool);
  } else {
    backward_as<float>(args, pool);
  }
}

}  // namespace sn::cpu
