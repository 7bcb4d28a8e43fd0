// The screening path: products of a 16-bit copy bound every distance; direct sums decide where the bounds cannot.
//
// The bound of the screening, in the notation of kernels.h, with u = 2^-24. All inequalities are worst cases. With
// exact a = x - mean and r = a - A, |a.b - A.B| <= |A||r_b| + |r_a||B| + |r_a||r_b|, and for any theta > 0
//   2 |A||r_b| <= theta |A|^2 + |r_b|^2 / theta,      2 |r_a||r_b| <= |r_a|^2 + |r_b|^2,
// so the error of 2 a.b splits into one term a row: theta |A|^2 + (1/theta + 1) |r|^2. theta is the root mean square of
// |r| / |t| over all rows. Any value is right, and an outlier loosens only its own bound. Each row adds:
//   4 u |t|^2    the product of exact integers, converted and scaled: three roundings of A.B, which is at most
//                |A||B| <= (|A|^2 + |B|^2) / 2
//   c |t|^2      the norm: t rounded once (2 u), D / 16 + 8 additions of squares
//   2 f |t|^2    the direct sum itself (relative error f, kernels/direct.h) on d2 <= 2 |a|^2 + 2 |b|^2
//   32 u |t|^2   scores, upper bounds and thresholds: a few roundings of numbers below 2 |a|^2 + 2 |b|^2
//   D 2^-120     products and squares that underflow
// |r| is the root of the stored residual plus u |t| for the rounding of t. A margin of 1 % covers the products of these
// small numbers and the float arithmetic on the bound itself.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <limits>
#include <memory>
#include <mutex>
#include <optional>
#include <vector>

#include "../sn_math.h"
#include "forward.h"
#include "memory.h"
#include "parallel.h"
#include "plan.h"

namespace sn::cpu {
namespace {

// Nearest and farthest positive of each anchor, from direct distances between the members of each identity. These are
// few pairs unless identities are huge.
void find_positives(const ForwardArgs& args, const ThreadPool& pool, const Kernels& kernels,
                    const Identities& identities, Loss<float>& loss) {
  struct Item {
    std::int32_t identity;
    std::int32_t block;
  };
  std::vector<Item> items;
  double pairs = 0.0;
  for (std::size_t g = 0; g < identities.list.size(); ++g) {
    const Identity& identity = identities.list[g];
    const std::int64_t members = identity.anchor_end - identity.anchor_begin;
    pairs += static_cast<double>(members) * static_cast<double>(identity.candidate_end - identity.candidate_begin);
    for (std::int64_t block = 0; block * kDirectBlock < members; ++block) {
      items.push_back({static_cast<std::int32_t>(g), static_cast<std::int32_t>(block)});
    }
  }
  // In the symmetric case two blocks of pairs may offer to the same anchor: a lock for each block of positions.
  const auto locks = std::make_unique<std::mutex[]>(static_cast<std::size_t>(args.anchors.rows / kDirectBlock + 1));
  const std::vector<std::int32_t>& candidates = identities.candidate_order();
  const int workers = workers_for(pool, 0.1 * pairs * static_cast<double>(args.dims));
  for_each(pool, workers, static_cast<std::int64_t>(items.size()), [&](std::int64_t item) {
    const Identity& identity = identities.list[items[item].identity];
    const std::int64_t p0 = identity.anchor_begin + items[item].block * kDirectBlock;
    const std::int64_t np = std::min(kDirectBlock, identity.anchor_end - p0);
    const void* x[kDirectBlock];
    const void* z[kDirectBlock];
    float d2[kDirectBlock * kDirectBlock];
    for (std::int64_t i = 0; i < np; ++i) x[i] = row_of(args.anchors, args.dtype, identities.anchor_order[p0 + i]);
    // Offers to anchor p the nearest and the farthest of candidate(n) at distance value(n), n in [begin, end).
    const auto offer = [&](std::int64_t p, std::int64_t begin, std::int64_t end, const auto& value,
                           const auto& candidate) {
      const std::int64_t anchor = identities.anchor_order[p];
      const std::int64_t self = self_of(args, anchor);
      Positive<float> near{-1, 0.0f};
      Positive<float> far{-1, 0.0f};
      for (std::int64_t n = begin; n < end; ++n) {
        const std::int32_t j = candidate(n);
        if (j == self) continue;
        const float distance = value(n);
        if (near.index < 0 || nearer(distance, j, near.d2, near.index)) near = {j, distance};
        if (far.index < 0 || farther(distance, j, far.d2, far.index)) far = {j, distance};
      }
      if (near.index < 0) return;
      const std::lock_guard<std::mutex> guard(locks[p / kDirectBlock]);
      loss.offer_positive(anchor, near.index, near.d2);
      loss.offer_positive(anchor, far.index, far.d2);
    };
    for (std::int64_t q0 = args.symmetric ? p0 : identity.candidate_begin; q0 < identity.candidate_end;
         q0 += kDirectBlock) {
      const std::int64_t nq = std::min(kDirectBlock, identity.candidate_end - q0);
      for (std::int64_t j = 0; j < nq; ++j) z[j] = row_of(args.candidates, args.dtype, candidates[q0 + j]);
      const bool diagonal = args.symmetric && q0 == p0;
      kernels.direct_block(args.dtype, x, np, z, nq, args.dims, diagonal, d2, kDirectBlock);
      for (std::int64_t i = 0; i < np; ++i) {
        offer(
            p0 + i, diagonal ? i + 1 : 0, nq, [&](std::int64_t j) { return d2[i * kDirectBlock + j]; },
            [&](std::int64_t j) { return candidates[q0 + j]; });
      }
      for (std::int64_t j = 0; args.symmetric && j < nq; ++j) {
        offer(
            q0 + j, 0, diagonal ? j : np, [&](std::int64_t i) { return d2[i * kDirectBlock + j]; },
            [&](std::int64_t i) { return identities.anchor_order[p0 + i]; });
      }
    }
  });
}

// The arrays of the screening, slices of one piece of scratch.
struct Layout {
  Screen screen;
  float* mean;
  float* mean_scratch;
  float* bias;
  std::int32_t* anchor_positions;  // row -> position
  std::int32_t* candidate_positions;
  std::int32_t* self_positions;
  float* workers;
  std::int64_t tile_floats;
};

Layout lay_out(const ForwardArgs& args, const ScreenPlan& plan, Slices& slices) {
  Layout layout{};
  Screen& screen = layout.screen;
  const std::int64_t N = args.anchors.rows;
  const std::int64_t M = args.candidates.rows;
  const std::int64_t padded_dims = (args.dims + 31) / 32 * 32;
  screen.pairs = (args.dims + 1) / 2;
  screen.panel_stride = screen.pairs * kPanel;
  screen.capacity = plan.capacity;
  const auto side = [&](std::int64_t rows) {
    ScreenSide s{};
    s.rows = rows;
    s.padded = round_up(rows, kTileGrain);
    s.packed = slices.take<std::uint32_t>(s.padded / kPanel * screen.panel_stride);
    s.scale = slices.take<float>(s.padded);
    s.norm = slices.take<float>(s.padded);
    s.residual = slices.take<float>(s.padded);
    s.slack = slices.take<float>(s.padded);
    return s;
  };
  screen.anchors = side(N);
  layout.anchor_positions = slices.take<std::int32_t>(N);
  if (args.symmetric) {
    screen.candidates = screen.anchors;
    layout.candidate_positions = layout.anchor_positions;
  } else {
    screen.candidates = side(M);
    layout.candidate_positions = slices.take<std::int32_t>(M);
    layout.self_positions = slices.take<std::int32_t>(N);
  }
  layout.mean = slices.take<float>(padded_dims);
  layout.mean_scratch = slices.take<float>(padded_dims);
  layout.bias = slices.take<float>(screen.candidates.padded);
  screen.lists = slices.take<Entry>(N * plan.capacity);
  screen.list_counts = slices.take<std::int32_t>(N);
  screen.list_limits = slices.take<std::int32_t>(N);
  screen.exact_counts = slices.take<std::int32_t>(N);
  screen.thresholds = slices.take<float>(screen.anchors.padded);
  layout.tile_floats = plan.tile * kTilePitch;
  layout.workers = slices.take<float>(layout.tile_floats * plan.workers);
  return layout;
}

// Of rows with equal values only the first K + 1 by index can be in a support set: they are as near and come first, and
// at most one of them is the anchor itself. Calls exclude(position) for the others.
template <class Exclude>
void find_surplus_duplicates(const ForwardArgs& args, const Layout& layout, std::int64_t K, const Exclude& exclude) {
  const ScreenSide& side = layout.screen.candidates;
  const std::int64_t M = side.rows;
  std::size_t buckets = 16;
  while (buckets < 2 * static_cast<std::size_t>(M)) buckets *= 2;
  struct Bucket {
    std::int32_t row = -1;
    std::int32_t count = 0;
  };
  std::vector<Bucket> table(buckets);
  const std::size_t row_bytes =
      static_cast<std::size_t>(args.dims) * (args.dtype == DType::kFloat32 ? sizeof(float) : sizeof(std::uint16_t));
  for (std::int64_t row = 0; row < M; ++row) {
    // Equal rows have equal bits of norm and residual; other rows hardly ever do.
    const std::int64_t position = layout.candidate_positions[row];
    std::uint32_t halves[2];
    std::memcpy(&halves[0], &side.norm[position], sizeof(float));
    std::memcpy(&halves[1], &side.residual[position], sizeof(float));
    const std::uint64_t mixed = ((static_cast<std::uint64_t>(halves[0]) << 32) | halves[1]) * 0x9e3779b97f4a7c15u;
    for (std::size_t at = (mixed >> 20) & (buckets - 1);; at = (at + 1) & (buckets - 1)) {
      Bucket& bucket = table[at];
      if (bucket.row < 0) {
        bucket = {static_cast<std::int32_t>(row), 1};
        break;
      }
      const std::int64_t other = layout.candidate_positions[bucket.row];
      if (side.norm[other] != side.norm[position] || side.residual[other] != side.residual[position]) continue;
      if (std::memcmp(row_of(args.candidates, args.dtype, row), row_of(args.candidates, args.dtype, bucket.row),
                      row_bytes) != 0) {
        continue;
      }
      if (++bucket.count > K + 1) exclude(position);
      break;
    }
  }
}

// Computes the bound E of each row and the bias of each candidate. Returns false if the rows' scale is outside the
// bound's range.
bool bound_errors(const ForwardArgs& args, const Layout& layout) {
  const ScreenSide* sides[2] = {&layout.screen.anchors, &layout.screen.candidates};
  const int side_count = args.symmetric ? 1 : 2;
  double norms = 0.0;
  double residuals = 0.0;
  float largest = 0.0f;
  for (int s = 0; s < side_count; ++s) {
    for (std::int64_t p = 0; p < sides[s]->rows; ++p) {
      norms += sides[s]->norm[p];
      residuals += sides[s]->residual[p];
      largest = std::max(largest, sides[s]->norm[p]);
    }
  }
  // The bound assumes values far from overflow and underflow. Rows that are all equal (0) are fine.
  if (!(largest <= 0x1p60f) || (largest > 0.0f && largest < 0x1p-60f)) return false;
  constexpr double u = 0x1p-24;
  const double D = static_cast<double>(args.dims);
  const double theta = std::max(0x1p-20, norms > 0.0 ? std::sqrt(residuals / norms) : 0.0);
  const double direct = (D / 64.0 + 13.0) * u;
  const double relative = theta + 4.0 * u + (D / 16.0 + 10.0) * u + 2.0 * direct + 32.0 * u;
  for (int s = 0; s < side_count; ++s) {
    for (std::int64_t p = 0; p < sides[s]->padded; ++p) {
      const double norm = sides[s]->norm[p];
      const double rest = std::sqrt(static_cast<double>(sides[s]->residual[p])) * 1.01 + 1.01 * u * std::sqrt(norm);
      sides[s]->slack[p] =
          static_cast<float>(1.01 * (relative * norm + rest * rest * (1.0 / theta + 1.0)) + D * 0x1p-120);
    }
  }
  const ScreenSide& candidates = layout.screen.candidates;
  for (std::int64_t q = 0; q < candidates.padded; ++q) {
    layout.bias[q] = q < candidates.rows ? 0.5f * (candidates.norm[q] - candidates.slack[q])
                                         : std::numeric_limits<float>::infinity();
  }
  return true;
}

// Multiplies every tile and runs its epilogue. Lists change under the lock of their block of positions. The selection
// does not depend on the order of the tiles.
void sweep(const ThreadPool& pool, const Kernels& kernels, const ScreenPlan& plan, const Layout& layout) {
  const Screen& screen = layout.screen;
  const std::int64_t row_blocks = divide_up(screen.anchors.rows, plan.tile);
  const std::int64_t column_blocks = divide_up(screen.candidates.rows, plan.tile);
  const std::int64_t tiles = screen.symmetric ? row_blocks * (row_blocks + 1) / 2 : row_blocks * column_blocks;
  const auto locks = std::make_unique<std::mutex[]>(static_cast<std::size_t>(row_blocks));

  // Symmetric: the upper triangle, one diagonal after the other, so that every row has a good threshold early.
  std::vector<std::int64_t> diagonal_start;
  if (screen.symmetric) {
    for (std::int64_t d = 0, start = 0; d < row_blocks; start += row_blocks - d, ++d) diagonal_start.push_back(start);
  }
  const auto tile_of = [&](std::int64_t item) {
    std::int64_t i = item % row_blocks;  // a block of candidates meets all anchors while it is in cache
    std::int64_t j = item / row_blocks;
    if (screen.symmetric) {
      const std::int64_t d =
          std::upper_bound(diagonal_start.begin(), diagonal_start.end(), item) - diagonal_start.begin() - 1;
      i = item - diagonal_start[d];
      j = i + d;
    }
    Tile tile{};
    tile.row = i * plan.tile;
    tile.rows = std::min(plan.tile, round_up(screen.anchors.rows, kPanel) - tile.row);
    tile.column = j * plan.tile;
    tile.columns = std::min(plan.tile, round_up(screen.candidates.rows, kPanel) - tile.column);
    tile.diagonal = screen.symmetric && i == j;
    return tile;
  };
  for_each(pool, plan.workers, tiles, [&](std::int64_t item, std::int64_t worker) {
    const Tile tile = tile_of(item);
    const Tile next = tile_of(std::min(item + plan.workers, tiles - 1));
    float* products = layout.workers + worker * layout.tile_floats;
    kernels.tile_products(screen, tile, next, products);
    const std::int64_t i = tile.row / plan.tile;
    const std::int64_t j = tile.column / plan.tile;
    std::unique_lock<std::mutex> rows(locks[i]);
    std::unique_lock<std::mutex> columns;
    if (screen.symmetric && i != j) columns = std::unique_lock<std::mutex>(locks[j]);
    kernels.tile_epilogue(screen, tile, products);
  });
}

// Two rows that list each other have one distance, with the same bits from both sides. One of them keeps the pair, the
// one with fewer; the other's entry moves behind those that its list keeps and takes the distance over.
class SharedPairs {
 public:
  SharedPairs(const ThreadPool& pool, const Screen& screen)
      : pool_(pool),
        screen_(screen),
        listed_(screen.list_counts, screen.list_counts + screen.anchors.rows),
        slots_(listed_.size() * kMost) {
    const std::int64_t rows = screen.anchors.rows;
    each_row([&](std::int64_t p) {
      for (std::int64_t e = 0; e < listed_[p]; ++e) entries(p)[e].score = kNone;
      for (std::int64_t e = 0; e < kMost; ++e) slots(p)[e] = e < listed_[p] ? entries(p)[e].candidate : -1;
    });
    // A score is the slot of the reverse entry for a while. Only the row with the lower position writes to both.
    each_row([&](std::int64_t p) {
      for (std::int64_t e = 0; e < listed_[p] && listed_[p] <= kMost; ++e) {
        const std::int64_t q = entries(p)[e].candidate;
        if (q < p || listed_[q] > kMost) continue;
        const std::int32_t slot = slot_of(q, static_cast<std::int32_t>(p));
        if (slot < 0) continue;
        entries(p)[e].score = static_cast<float>(slot);
        entries(q)[slot].score = static_cast<float>(e);
      }
    });
    std::vector<std::int32_t> kept(listed_);
    for (std::int64_t p = 0; p < rows; ++p) {
      for (std::int64_t e = 0; e < listed_[p]; ++e) {
        Entry& entry = entries(p)[e];
        const std::int64_t q = entry.candidate;
        if (q < p || entry.score < 0.0f) continue;
        const bool ours = kept[p] <= kept[q];
        --kept[ours ? q : p];
        (ours ? entry : entries(q)[static_cast<std::int64_t>(entry.score)]).score = kNone;
      }
    }
    each_row([&](std::int64_t p) {
      screen_.list_counts[p] = kept[p];
      if (listed_[p] > kMost) return;
      Entry before[kMost];
      std::copy_n(entries(p), listed_[p], before);
      std::int32_t to[2] = {0, kept[p]};
      for (std::int64_t e = 0; e < listed_[p]; ++e) {
        std::int32_t& at = to[before[e].score < 0.0f ? 0 : 1];
        slots(p)[e] = at;
        entries(p)[at++] = before[e];
      }
    });
  }

  // Ends the sharing: every list is whole again.
  void hand_over() {
    each_row([&](std::int64_t p) {
      for (std::int64_t e = screen_.list_counts[p]; e < listed_[p]; ++e) {
        Entry& entry = entries(p)[e];
        entry.score = entries(entry.candidate)[slots(entry.candidate)[static_cast<std::int64_t>(entry.score)]].score;
      }
    });
    std::copy(listed_.begin(), listed_.end(), screen_.list_counts);
  }

 private:
  static constexpr float kNone = -1.0f;
  // Longer lists, those of clusters, keep all they have: to search them would cost as much as the distances.
  static constexpr std::int64_t kMost = 32;

  template <class Body>
  void each_row(const Body& body) const {
    for_blocks(pool_, pool_.threads, screen_.anchors.rows, kAnchorBlock, [&](std::int64_t begin, std::int64_t end) {
      for (std::int64_t p = begin; p < end; ++p) body(p);
    });
  }
  Entry* entries(std::int64_t p) const { return screen_.lists + p * screen_.capacity; }
  std::int32_t* slots(std::int64_t p) { return slots_.data() + p * kMost; }
  // Where row p lists a candidate, or -1. Without a branch.
  std::int32_t slot_of(std::int64_t p, std::int32_t candidate) {
    const std::int32_t* listed = slots(p);
    std::int32_t slot = 0;
    for (std::int32_t e = 0; e < kMost; ++e) slot |= listed[e] == candidate ? e + 1 : 0;
    return slot - 1;
  }

  const ThreadPool& pool_;
  const Screen& screen_;
  std::vector<std::int32_t> listed_;  // entries of each list, of which list_counts are kept
  std::vector<std::int32_t> slots_;   // candidates by slot, then where the entry of a slot has moved
};

// Sums of short rows cost less than to find out who shares them: at 1024 x 512, 3 % of the forward.
constexpr std::int64_t kShareFromDims = 1024;

// Replaces the scores of the entries that are left by direct distances.
void refine(const ForwardArgs& args, const ThreadPool& pool, const Kernels& kernels, const Layout& layout) {
  const Screen& screen = layout.screen;
  const std::int64_t N = args.anchors.rows;
  const int workers = pool.threads;
  constexpr std::int64_t kRows = 64;
  if (!refines_by_columns(N, args.candidates.rows, args.dims)) {
    for_blocks(pool, workers, N, kRows, [&](std::int64_t begin, std::int64_t end) {
      for (std::int64_t p = begin; p < end; ++p) {
        kernels.prune(screen, p);
        kernels.refine_rows(screen, p);
      }
    });
    return;
  }
  for_blocks(pool, workers, N, kRows, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t p = begin; p < end; ++p) kernels.prune(screen, p);
  });
  std::optional<SharedPairs> shared;
  if (args.symmetric && args.dims >= kShareFromDims) shared.emplace(pool, screen);
  for_blocks(pool, workers, N, kRows, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t p = begin; p < end; ++p) {
      for (std::int64_t e = 0; e < screen.list_counts[p]; ++e) screen.lists[p * screen.capacity + e].score = 0.0f;
    }
  });
  // Rows are far apart in memory and each is used many times: gathers a segment of columns where it stays in cache,
  // uses it for all lists, goes on. The screening copy is no longer needed and its memory holds two such buffers.
  const std::int64_t M = args.symmetric ? 0 : args.candidates.rows;
  float* buffers[2] = {reinterpret_cast<float*>(screen.anchors.packed), nullptr};
  float* candidate_buffers[2] = {reinterpret_cast<float*>(screen.candidates.packed), nullptr};
  buffers[1] = buffers[0] + N * kRefineColumns;
  candidate_buffers[1] = candidate_buffers[0] + args.candidates.rows * kRefineColumns;
  const std::int64_t segments = divide_up(args.dims, kRefineColumns);
  const std::int64_t anchor_items = divide_up(N, kRows);
  const std::int64_t candidate_items = divide_up(M, kRows);
  const auto gather = [&](std::int64_t segment, std::int64_t item, std::int64_t buffer) {
    const bool of_anchors = item < anchor_items;
    const ScreenSide& side = of_anchors ? screen.anchors : screen.candidates;
    const std::int64_t begin = (of_anchors ? item : item - anchor_items) * kRows;
    const std::int64_t column = segment * kRefineColumns;
    kernels.gather_columns(args.dtype, side.features, side.order, begin, std::min(side.rows, begin + kRows), column,
                           std::min(kRefineColumns, args.dims - column), kRefineColumns,
                           of_anchors ? buffers[buffer] : candidate_buffers[buffer]);
  };
  const auto use = [&](std::int64_t, std::int64_t item, std::int64_t buffer) {
    for (std::int64_t p = item * kRows; p < std::min(N, (item + 1) * kRows); ++p) {
      kernels.refine_columns(screen, buffers[buffer], candidate_buffers[buffer], p);
    }
  };
  gather_and_use(pool, workers, segments, anchor_items + candidate_items, anchor_items, true, gather, use);
  if (shared) shared->hand_over();
}

}  // namespace

bool forward_screen(const ForwardArgs& args, const ThreadPool& pool, const Kernels& kernels,
                    const Identities& identities, Loss<float>& loss) {
  const std::int64_t N = args.anchors.rows;
  const std::int64_t M = args.candidates.rows;
  const std::int64_t K = loss.K();
  const ScreenPlan plan = plan_screen(N, M, args.dims, K, args.symmetric, pool.threads);
  Slices measure;
  lay_out(args, plan, measure);
  const Scratch scratch(measure.bytes());
  Slices slices(scratch.data());
  Layout layout = lay_out(args, plan, slices);
  Screen& screen = layout.screen;
  screen.dtype = args.dtype;
  screen.dims = args.dims;
  screen.K = K;
  screen.symmetric = args.symmetric;
  screen.mean = layout.mean;
  screen.bias = layout.bias;
  screen.anchors.features = args.anchors;
  screen.anchors.order = identities.anchor_order.data();
  screen.candidates.features = args.candidates;
  screen.candidates.order = identities.candidate_order().data();

  const FeatureView features[2] = {args.anchors, args.candidates};
  kernels.sampled_mean(args.dtype, features, args.symmetric ? 1 : 2, args.dims, layout.mean, layout.mean_scratch);
  for (int s = 0; s < (args.symmetric ? 1 : 2); ++s) {
    const ScreenSide& side = s == 0 ? screen.anchors : screen.candidates;
    std::atomic<bool> usable{true};
    for_blocks(pool, pool.threads, side.padded / kPanel, 4, [&](std::int64_t begin, std::int64_t end) {
      if (!kernels.pack(screen, side, begin, end)) usable.store(false);
    });
    if (!usable.load()) return false;
    std::int32_t* positions = s == 0 ? layout.anchor_positions : layout.candidate_positions;
    for (std::int64_t p = 0; p < side.rows; ++p) positions[side.order[p]] = static_cast<std::int32_t>(p);
  }
  if (!bound_errors(args, layout)) return false;
  find_surplus_duplicates(
      args, layout, K, [&](std::int64_t position) { layout.bias[position] = std::numeric_limits<float>::infinity(); });
  if (!args.symmetric && (args.self.index != nullptr || args.self.offset >= 0)) {
    screen.self_position = layout.self_positions;
    for (std::int64_t p = 0; p < N; ++p) {
      const std::int64_t self = self_of(args, screen.anchors.order[p]);
      layout.self_positions[p] = self >= 0 && self < M ? layout.candidate_positions[self] : -1;
    }
  }
  std::fill_n(screen.list_counts, N, 0);
  std::fill_n(screen.exact_counts, N, 0);
  std::fill_n(screen.list_limits, N, static_cast<std::int32_t>(plan.first_pruning));
  std::fill_n(screen.thresholds, N, std::numeric_limits<float>::max());
  std::fill_n(screen.thresholds + N, screen.anchors.padded - N, -std::numeric_limits<float>::infinity());

  sweep(pool, kernels, plan, layout);
  find_positives(args, pool, kernels, identities, loss);
  refine(args, pool, kernels, layout);

  const int workers = workers_for(pool, static_cast<double>(N) * 2500.0);
  for_blocks(pool, workers, N, kAnchorBlock, [&](std::int64_t begin, std::int64_t end) {
    std::uint64_t keys[kListMost];
    std::int32_t support[kListMost];
    float d2[kListMost];
    std::uint8_t positive[kListMost];
    for (std::int64_t i = begin; i < end; ++i) {
      const std::int64_t p = layout.anchor_positions[i];
      const std::int64_t count = screen.list_counts[p];
      for (std::int64_t e = 0; e < count; ++e) {
        const Entry& entry = screen.lists[p * screen.capacity + e];
        keys[e] = pack_key(entry.score, screen.candidates.order[entry.candidate]);
      }
      std::sort(keys, keys + count);
      const std::int64_t found = std::min(K, count);
      for (std::int64_t e = 0; e < found; ++e) {
        support[e] = key_index(keys[e]);
        d2[e] = key_squared_distance(keys[e]);
      }
      loss.finish(i, support, d2, found, positive);
    }
  });
  loss.reduce();
  return true;
}

}  // namespace sn::cpu
