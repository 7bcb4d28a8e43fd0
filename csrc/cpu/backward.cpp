// Backward: from a support graph and the upstream gradient to feature gradients. Neither alpha nor squeeze nor labels
// matter here.
//
//   dX_i += g_i w_ij (x_i - z_j),   dZ_j -= g_i w_ij (x_i - z_j)   over the edges (i, j) of the graph.
//
// Edges are listed by target row: an anchor's own edges in slot order, a candidate's incoming edges by ascending
// anchor. In the symmetric case a row's list holds both, and an edge and its reverse are one entry with the two weights
// added, since (x_i - x_j) is the same vector. (Of several edges to one candidate the first alone has a reverse.) Every
// sum has a fixed order. No two workers write the same element.
#include <algorithm>
#include <cmath>
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

// Entries of edge lists held at a time: 512 bytes a row and some megabytes. K = 10 always fits into one strip.
template <class Acc>
std::int64_t most_entries(std::int64_t rows) {
  constexpr std::int64_t kFixed = std::int64_t{4} << 20;
  constexpr std::int64_t kPerRow = 512;
  return (kFixed + kPerRow * rows) / static_cast<std::int64_t>(sizeof(Edge<Acc>));
}

// The edges of one side by target row: an anchor's own with `own`, a candidate's incoming ones with `incoming`. With
// both, in the symmetric case, an edge and its reverse are merged. Loops over edges have no branches: whether an edge
// has a weight, or a reverse, is as good as random.
template <class Acc>
class Adjacency {
 public:
  Adjacency(const BackwardArgs& args, const Kernels& kernels, bool own, bool incoming)
      : args_(args),
        kernels_(kernels),
        own_(own),
        incoming_(incoming),
        // Slots take 16 bits to save memory. Graphs with more edges an anchor are not merged.
        merge_(own && incoming && args.edges <= std::numeric_limits<std::int16_t>::max()),
        rows_(own ? args.anchors.rows : args.candidates.rows),
        edges_(args.anchors.rows * args.edges),
        most_(most_entries<Acc>(rows_)) {}

  std::int64_t rows() const { return rows_; }

  void lay_out(Slices& slices) {
    weights_ = slices.take<Acc>(edges_);
    merged_ = merge_ ? slices.take<Acc>(edges_) : weights_;
    reverse_ = slices.take<std::int16_t>(merge_ ? edges_ : 0);
    listed_ = slices.take<std::uint8_t>(edges_);
    counts_ = slices.take<std::int32_t>(rows_ + 1);
    begin_ = slices.take<std::int64_t>(rows_ + 1);
    next_ = slices.take<std::int64_t>(rows_ + 1);
    lists_ = slices.take<Edge<Acc>>(one_strip() ? most_edges() + 1 : 0);
  }

  // Calls use(lists, rows) for strips of rows whose lists have at most `most_` entries, or that are one row.
  template <class Use>
  void for_each_strip(const ThreadPool& pool, const Use& use) {
    set_weights();
    std::fill_n(counts_, rows_ + 1, 0);
    if (merge_) {
      merge(pool);
    } else {
      for (std::int64_t at = 0; at < edges_; ++at) listed_[at] = weights_[at] != Acc(0) ? kOwn + kIncoming : 0;
    }
    count();
    std::vector<Edge<Acc>> lists;
    for (std::int64_t first = 0, last = 0; first < rows_; first = last) {
      std::int64_t total = 0;
      for (last = first; last < rows_ && (last == first || total + counts_[last] <= most_); ++last) {
        begin_[last - first] = total;
        total += counts_[last];
      }
      begin_[last - first] = total;
      if (!one_strip()) lists.resize(static_cast<std::size_t>(total + 1));
      Edge<Acc>* to = one_strip() ? lists_ : lists.data();
      fill(first, last, to);
      use(EdgeLists{first, begin_, to}, last - first);
    }
  }

 private:
  static constexpr std::uint8_t kOwn = 1;       // by its anchor
  static constexpr std::uint8_t kIncoming = 2;  // by its candidate

  std::int64_t most_edges() const { return edges_ * ((own_ ? 1 : 0) + (incoming_ ? 1 : 0)); }
  bool one_strip() const { return most_edges() <= most_; }

  // g_i w_ij in the accumulation type; 0 where there is no edge.
  void set_weights() {
    const Acc* grad = static_cast<const Acc*>(args_.grad_loss);
    const Acc* coefficients = static_cast<const Acc*>(args_.coefficients);
    const double valid = args_.stats[kValidAnchors];
    double upstream = 0.0;
    if (args_.reduction == Reduction::kMean && valid > 0.0) upstream = static_cast<double>(grad[0]) / valid;
    if (args_.reduction == Reduction::kSum) upstream = static_cast<double>(grad[0]);
    const std::int32_t* indices = args_.indices;
    Acc* weights = weights_;
    for (std::int64_t i = 0, at = 0; i < args_.anchors.rows; ++i) {
      if (args_.reduction == Reduction::kNone) upstream = static_cast<double>(grad[i]);
      for (const std::int64_t end = at + args_.edges; at < end; ++at) {
        const Acc weight = static_cast<Acc>(upstream * static_cast<double>(coefficients[at]));
        weights[at] = indices[at] < 0 || coefficients[at] == Acc(0) ? Acc(0) : weight;
      }
    }
  }

  // Adds to the weight of each edge that of its reverse. An edge without a weight has no reverse, and is none. Where an
  // anchor lists a candidate several times, the first edge alone is the reverse of the candidate's first: two slots are
  // a pair if each finds the other.
  void merge(const ThreadPool& pool) {
    const std::int64_t N = args_.anchors.rows;
    const std::int64_t edges = args_.edges;
    const int workers = workers_for(pool, 20.0 * static_cast<double>(edges_));
    constexpr std::int64_t kRows = 256;
    for_blocks(pool, workers, N, kRows, [&](std::int64_t begin, std::int64_t end) {
      kernels_.reverse_slots(args_.indices, edges, begin, end, reverse_);
    });
    const Acc* weights = weights_;
    const std::int16_t* reverses = reverse_;
    const std::int32_t* indices = args_.indices;
    for_blocks(pool, workers, N, kRows, [=, merged = merged_, listed = listed_](std::int64_t begin, std::int64_t end) {
      for (std::int64_t row = begin * edges; row < end * edges; row += edges) {
        for (std::int64_t e = 0; e < edges; ++e) {
          const std::int64_t at = row + e;
          const std::int64_t slot = reverses[at];
          const std::int64_t reverse = slot >= 0 ? indices[at] * edges + slot : 0;
          const Acc weight = weights[at];
          const Acc other = weights[reverse];
          const bool pair = (slot >= 0) & (reverses[reverse] == e) & (other != Acc(0));
          const bool exists = weight != Acc(0);
          merged[at] = pair & exists ? weight + other : weight;
          listed[at] = static_cast<std::uint8_t>(exists ? (pair ? kOwn : kOwn + kIncoming) : 0);
        }
      }
    });
  }

  // Edges of each row: of one row fewer than 2^31, as rows are, since a forward lists a candidate once an anchor.
  void count() {
    const std::int64_t edges = args_.edges;
    const std::uint8_t* listed = listed_;
    const std::int32_t* indices = args_.indices;
    std::int32_t* counts = counts_;
    for (std::int64_t i = 0; own_ && i < rows_; ++i) {
      std::int32_t count = 0;
      for (std::int64_t e = 0; e < edges; ++e) count += listed[i * edges + e] & kOwn;
      counts[i] = count;
    }
    const std::int64_t none = rows_;
    for (std::int64_t at = 0; incoming_ && at < edges_; ++at) {
      const std::int32_t arrives = listed[at] / kIncoming;
      counts[arrives != 0 ? indices[at] : none] += arrives;
    }
  }

  // Lists the edges of rows [first, last), those of each row in order. What is no edge of theirs goes behind the end.
  void fill(std::int64_t first, std::int64_t last, Edge<Acc>* lists) {
    const std::int64_t edges = args_.edges;
    const std::int64_t none = last - first;
    const std::uint8_t* listed = listed_;
    const std::int32_t* indices = args_.indices;
    std::int64_t* next = next_;
    std::copy_n(begin_, none + 1, next);
    for (std::int64_t i = first; own_ && i < last; ++i) {
      std::int64_t to = next[i - first];
      for (std::int64_t at = i * edges; at < (i + 1) * edges; ++at) {
        lists[to] = {merged_[at], indices[at]};
        to += listed[at] & kOwn;
      }
      next[i - first] = to;
    }
    for (std::int64_t i = 0, at = 0; incoming_ && i < args_.anchors.rows; ++i) {
      for (const std::int64_t end = at + edges; at < end; ++at) {
        const std::int64_t target = indices[at] - first;
        const bool wanted = (listed[at] >= kIncoming) & (0 <= target) & (target < none);
        std::int64_t& to = next[wanted ? target : none];
        lists[to] = {weights_[at], static_cast<std::int32_t>(i)};
        to += wanted ? 1 : 0;
      }
    }
  }

  const BackwardArgs& args_;
  const Kernels& kernels_;
  bool own_;
  bool incoming_;
  bool merge_;
  std::int64_t rows_;
  std::int64_t edges_;               // N (K + 2)
  std::int64_t most_;                // entries of a strip
  Acc* weights_ = nullptr;           // [N, K + 2]
  Acc* merged_ = nullptr;            // [N, K + 2] with the weight of the reverse
  std::int16_t* reverse_ = nullptr;  // [N, K + 2] slot of the reverse edge, -1: none
  std::uint8_t* listed_ = nullptr;   // [N, K + 2] kOwn, kIncoming or both: who lists the edge; 0: it is none
  std::int32_t* counts_ = nullptr;   // [rows + 1] edges of a row; the last is 0
  std::int64_t* begin_ = nullptr;    // [rows + 1] of the lists of a strip
  std::int64_t* next_ = nullptr;     // [rows + 1]
  Edge<Acc>* lists_ = nullptr;       // of all rows, where one strip has them
};

// Cuts a strip of rows into parts with about the same number of edges: a batch may have a hub that everybody selects.
std::vector<std::int64_t> balanced_rows(const std::int64_t* begin, std::int64_t rows, std::int64_t parts) {
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

// Gathered columns of both sides, where they are worth it: as in the forward's refinement, a block of columns is
// gathered where it stays in cache, used for all rows, and so on.
struct Columns {
  static constexpr int kBuffers = 2;
  static constexpr std::int64_t kFirstLevel = std::int64_t{1} << 15;

  std::int64_t width = 0;  // 0: rows are used as they are
  float* own[kBuffers] = {};
  float* other[kBuffers] = {};

  Columns(const BackwardArgs& args, const Kernels& kernels, const FeatureView& own_side,
          const FeatureView& other_side) {
    const bool gathers = args.dtype != DType::kFloat64 && refines_by_columns(own_side.rows, other_side.rows, args.dims);
    if (!gathers) return;
    width = kernels.row_columns;
    const std::int64_t rows = std::max(own_side.rows, other_side.rows);
    if (2 * width * rows * static_cast<std::int64_t>(sizeof(float)) <= kFirstLevel) width *= 2;
  }
  void lay_out(Slices& slices, bool symmetric, std::int64_t own_rows, std::int64_t other_rows) {
    for (int b = 0; b < kBuffers; ++b) {
      own[b] = slices.take<float>(own_rows * width);
      other[b] = symmetric ? own[b] : slices.take<float>(other_rows * width);
    }
  }
};

bool is_hub(const EdgeLists& edges, std::int64_t row) {
  const std::int64_t* begin = edges.begin + (row - edges.first_row);
  return begin[1] - begin[0] > kEdgesSummed;
}

// Calls use(hubs, begin, end) for runs of rows that are hubs, or are not, of all from `begin` to `end`.
template <class Use>
void for_runs(const EdgeLists& edges, bool some_hubs, std::int64_t begin, std::int64_t end, const Use& use) {
  if (!some_hubs) return use(false, begin, end);
  for (std::int64_t next = begin; begin < end; begin = next) {
    const bool hubs = is_hub(edges, begin);
    while (next < end && is_hub(edges, next) == hubs) ++next;
    use(hubs, begin, next);
  }
}

// One strip of one side: out_r = sum_e weight_e (own_r - other_e).
void gather(const BackwardArgs& args, const ThreadPool& pool, const Kernels& kernels, const FeatureView& own,
            const FeatureView& other, const EdgeLists& edges, std::int64_t rows, const Columns& columns, void* out) {
  const double operations = 0.1 * static_cast<double>(edges.begin[rows] + 2 * rows) * static_cast<double>(args.dims);
  const int workers = workers_for(pool, operations);
  constexpr std::int64_t kParts = 4;  // per worker
  std::vector<std::int64_t> cuts = balanced_rows(edges.begin, rows, workers == 1 ? 1 : kParts * workers);
  for (std::int64_t& cut : cuts) cut += edges.first_row;
  const std::int64_t parts = static_cast<std::int64_t>(cuts.size()) - 1;
  bool some_hubs = false;
  for (std::int64_t r = cuts.front(); args.dtype != DType::kFloat64 && r < cuts.back(); ++r) {
    some_hubs = some_hubs || is_hub(edges, r);
  }
  if (columns.width == 0 || edges.begin[rows] < own.rows) {
    for_each(pool, workers, parts, [&](std::int64_t item) {
      for_runs(edges, some_hubs, cuts[item], cuts[item + 1], [&](bool hubs, std::int64_t begin, std::int64_t end) {
        const auto backward = hubs ? kernels.backward_hubs : kernels.backward_rows;
        backward(args.dtype, own, other, edges, args.dims, begin, end, out);
      });
    });
    return;
  }
  // Features of some megabytes come from the cache. The next block's are prefetched row by row while one is used, and
  // copied whole. Others are prefetched while they are copied.
  constexpr std::int64_t kNearFeatures = std::int64_t{4} << 20;
  constexpr std::int64_t kSecondLevel = std::int64_t{1} << 20;
  const std::int64_t bytes = element_bytes(args.dtype);
  const std::int64_t out_bytes = own.rows * args.dims * bytes;
  const std::int64_t other_rows = args.symmetric ? 0 : other.rows;
  const bool near = workers == 1 && (own.rows + other_rows) * args.dims * bytes <= kNearFeatures;
  const std::int64_t part_rows = near ? std::max(own.rows, other_rows) : 64;
  const std::int64_t own_items = divide_up(own.rows, part_rows);
  const std::int64_t other_items = divide_up(other_rows, part_rows);
  // Every worker writes to every row. One worker touches each fresh page first, or all would fault on the same pages.
  if (edges.first_row == 0 && workers > 1) touch(pool, workers, out, out_bytes);
  const auto line_up = [&](std::int64_t block, std::int64_t item, std::int64_t buffer) {
    const bool of_own = item < own_items;
    const FeatureView& side = of_own ? own : other;
    const std::int64_t first = (of_own ? item : item - own_items) * part_rows;
    const std::int64_t column = block * columns.width;
    float* to = of_own ? columns.own[buffer] : columns.other[buffer];
    if (near && column + columns.width <= args.dims) {
      kernels.copy_columns(args.dtype, side, column, columns.width, to);
      return;
    }
    kernels.gather_columns(args.dtype, side, nullptr, first, std::min(side.rows, first + part_rows), column,
                           std::min(columns.width, args.dims - column), columns.width, to);
  };
  const auto use = [&](std::int64_t block, std::int64_t item, std::int64_t buffer) {
    const std::int64_t next = (block + 1) * columns.width;
    const void* ahead =
        near && next + columns.width <= args.dims ? static_cast<const char*>(own.data) + next * bytes : nullptr;
    const ColumnBlock columns_of{
        columns.own[buffer], columns.other[buffer],    block * columns.width, columns.width, ahead,
        own.row_stride,      out_bytes >= kSecondLevel};
    for_runs(edges, some_hubs, cuts[item], cuts[item + 1], [&](bool hubs, std::int64_t begin, std::int64_t end) {
      const auto backward = hubs ? kernels.backward_hub_columns : kernels.backward_columns;
      backward(args.dtype, columns_of, edges, args.dims, begin, end, out);
    });
  };
  gather_and_use(pool, workers, divide_up(args.dims, columns.width), own_items + other_items, parts, false, line_up,
                 use);
}

template <class Acc>
void backward_as(const BackwardArgs& args, const ThreadPool& pool) {
  const Kernels& kernels = active_kernels();
  const auto side = [&](const FeatureView& own, const FeatureView& other, bool of_anchors, bool of_candidates,
                        void* out) {
    if (out == nullptr) return;
    Adjacency<Acc> adjacency(args, kernels, of_anchors, of_candidates);
    Columns columns(args, kernels, own, other);
    const auto lay_out = [&](Slices& slices) {
      adjacency.lay_out(slices);
      columns.lay_out(slices, args.symmetric, own.rows, other.rows);
    };
    Slices sizes;
    lay_out(sizes);
    const Scratch scratch(sizes.bytes());
    Slices slices(scratch.data());
    lay_out(slices);
    adjacency.for_each_strip(pool, [&](const EdgeLists& edges, std::int64_t rows) {
      gather(args, pool, kernels, own, other, edges, rows, columns, out);
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
