// The screening path: products of an integer copy bound every distance; direct sums decide where the bounds cannot.
//
// The bound of the screening, in the notation of kernels.h, with u = 2^-24. All inequalities are worst cases. With
// exact a = x - mean and r = a - A, |a.b - A.B| <= |a||r_b| + |r_a||b| + |r_a||r_b|, and for any theta > 0
//   2 |a||r_b| <= theta |a|^2 + |r_b|^2 / theta,      2 |r_a||r_b| <= |r_a|^2 + |r_b|^2,
// so the error of 2 a.b splits into one term a row: theta |a|^2 + (1/theta + 1) |r|^2. theta is the root mean square of
// |r| / |t| over all rows. Any value is right, and an outlier loosens only its own bound. Nothing here depends on how
// many bits the integers have: |r| is measured. Each row adds:
//   4 u |A|^2    the product of exact integers, converted and scaled: three roundings of A.B, which is at most
//                |A||B| <= (|A|^2 + |B|^2) / 2; |A| <= |t| + |r|
//   c |t|^2      the norm: t rounded once (2 u), D / 16 + 8 additions of squares
//   2 f |t|^2    the direct sum itself (relative error f, kernels/direct.h) on d2 <= 2 |a|^2 + 2 |b|^2
//   32 u |A|^2   scores, upper bounds and thresholds: a few roundings of numbers below 2 |a|^2 + 2 |b|^2, or of
//                A and B
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
#include <vector>

#include "../sn_math.h"
#include "forward.h"
#include "memory.h"
#include "parallel.h"
#include "plan.h"

namespace sn::cpu {
namespace {

// The arrays of the screening, slices of one piece of scratch.
struct Layout {
  Screen screen;
  float* mean;
  float* mean_scratch;
  float* bias;
  std::int32_t* anchor_positions;  // row -> position
  std::int32_t* candidate_positions;
  std::int32_t* self_positions;
  float* upper_bias;
  float* products;  // all of them, or a tile of each worker
  std::uint32_t* forms;
};

void set_width(Screen& screen, bool bytes) {
  screen.bytes = bytes;
  screen.words = copy_words(screen.dims, bytes, screen.forms);
  screen.panel_stride = screen.words * kPanel;
}

Layout lay_out(const ForwardArgs& args, const ScreenPlan& plan, Slices& slices) {
  Layout layout{};
  Screen& screen = layout.screen;
  const std::int64_t N = args.anchors.rows;
  const std::int64_t M = args.candidates.rows;
  const std::int64_t padded_dims = (args.dims + 63) / 64 * 64;
  screen.capacity = plan.capacity;
  const auto side = [&](std::int64_t rows) {
    ScreenSide s{};
    s.rows = rows;
    s.padded = round_up(rows, kTileGrain);
    // That of 16-bit integers always: the refinement uses it once more.
    s.packed = slices.take<std::uint32_t>(s.padded * copy_words(args.dims, false, plan.forms));
    s.scale = slices.take<float>(s.padded);
    s.norm = slices.take<float>(s.padded);
    s.residual = slices.take<float>(s.padded);
    s.slack = slices.take<float>(s.padded);
    s.start = slices.take<std::int32_t>(s.padded);
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
  layout.upper_bias = slices.take<float>(screen.candidates.padded);
  layout.products = slices.take<float>(plan.product_floats);
  layout.forms = slices.take<std::uint32_t>(plan.workers * plan.form_words);
  return layout;
}

// Of rows with equal values only the first K + 1 by index can be in a support set: they are as near and come first, and
// at most one of them is the anchor itself. Calls exclude(position) for the others.
template <class Exclude>
void find_surplus_duplicates(const ForwardArgs& args, const Layout& layout, std::int64_t K, const Exclude& exclude) {
  const ScreenSide& side = layout.screen.candidates;
  const std::int64_t M = side.rows;
  const std::size_t buckets = static_cast<std::size_t>(duplicate_buckets(M));
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

// Candidates that stand for all of them. Their copies lie in the place of the copy's first rows.
class SampledRows {
 public:
  SampledRows(const ForwardArgs& args, const Kernels& kernels, Screen& screen)
      : args_(args),
        kernels_(kernels),
        screen_(screen),
        side_(screen.candidates),
        count_(std::min(args.candidates.rows, kDirectBlock)) {
    for (std::int64_t i = 0; i < count_; ++i) {
      order_[i] = static_cast<std::int32_t>(i * args.candidates.rows / count_);
      rows_[i] = row_of(args.candidates, args.dtype, order_[i]);
    }
    side_.order = order_;
    side_.rows = count_;
  }
  // As the screen has it now. Returns false if one of them is not finite.
  bool pack() const { return kernels_.pack(screen_, side_, 0, divide_up(count_, kPanel)); }
  // Of the copy that was packed last: two rows, an error of either sign, each E about 2 |t| |r|.
  double window() const {
    double norms = 0.0;
    double residuals = 0.0;
    for (std::int64_t i = 0; i < count_; ++i) {
      norms += side_.norm[i];
      residuals += side_.residual[i];
    }
    return 8.0 * std::sqrt(norms * residuals) / static_cast<double>(count_);
  }
  // How much coarser 16-bit integers are than those of a copy without forms, in the mean.
  double coarseness() const {
    double squares = 0.0;
    for (std::int64_t i = 0; i < count_; ++i) {
      const double finest = std::sqrt(static_cast<double>(side_.norm[i])) / kIntegerNorm;
      const double ratio = side_.scale[i] > 0.0f ? side_.scale[i] / finest : 1.0;
      squares += ratio * ratio;
    }
    return std::sqrt(squares / static_cast<double>(count_));
  }
  CopySample distances() const {
    float d2[kDirectBlock * kDirectBlock];
    kernels_.direct_block(args_.dtype, rows_, count_, rows_, count_, args_.dims, true, d2, kDirectBlock);
    CopySample sample{};
    double squares = 0.0;
    const double pairs = 0.5 * static_cast<double>(count_ * (count_ - 1));
    const auto for_pairs = [&](const auto& use) {
      for (std::int64_t i = 0; i < count_; ++i) {
        for (std::int64_t j = i + 1; j < count_; ++j) use(static_cast<double>(d2[i * kDirectBlock + j]));
      }
    };
    for_pairs([&](double value) {
      sample.mean += value / pairs;
      squares += value * value / pairs;
    });
    sample.deviation = std::sqrt(std::max(0.0, squares - sample.mean * sample.mean));
    for_pairs([&](double value) { sample.near += value < 0.5 * sample.mean ? 1.0 / pairs : 0.0; });
    return sample;
  }

 private:
  const ForwardArgs& args_;
  const Kernels& kernels_;
  Screen& screen_;
  ScreenSide side_;
  std::int64_t count_;
  std::int32_t order_[kDirectBlock];
  const void* rows_[kDirectBlock];
};

// Chooses between 8-bit and 16-bit integers, and how many levels of forms these have. That depends on shapes and data
// alone, and cannot change a result.
void choose_copy(const ForwardArgs& args, const Kernels& kernels, std::int64_t K, Screen& screen) {
  const std::int64_t M = args.candidates.rows;
  const auto as_forms = [&screen](int levels) {
    screen.forms.levels = levels;
    set_width(screen, false);
  };
  const int planned = screen.forms.levels;
  as_forms(planned);
  const bool bytes =
      kernels.bytes && may_multiply_bytes(args.anchors.rows, M, args.dims, args.symmetric, kernels.product_cycles);
  if (!bytes && planned == 0) return;
  const SampledRows sampled(args, kernels, screen);
  CopySample sample{};
  if (bytes) {
    set_width(screen, true);
    if (!sampled.pack()) return as_forms(planned);
    sample = sampled.distances();
    sample.window = sampled.window();
    if (multiplies_bytes(M, args.dims, K, args.symmetric, kernels.product_cycles, screen.forms, sample)) return;
    as_forms(planned);
  }
  if (planned == 0 || !sampled.pack() || keeps_forms(sampled.coarseness())) return;
  if (!bytes) sample = sampled.distances();
  as_forms(0);
  if (!sampled.pack()) return;
  const double finest = sampled.window();
  for (int levels = planned; levels > 0; --levels) {
    as_forms(levels);
    if (!sampled.pack() || keeps_forms(sampled.coarseness())) return;
    sample.window = sampled.window();
    if (keeps_forms(M, args.dims, K, args.symmetric, kernels.product_cycles, screen.forms, sample, finest)) return;
  }
  as_forms(0);
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
  const double relative = theta + (D / 16.0 + 10.0) * u + 2.0 * direct;
  for (int s = 0; s < side_count; ++s) {
    for (std::int64_t p = 0; p < sides[s]->padded; ++p) {
      const double norm = sides[s]->norm[p];
      const double rest = std::sqrt(static_cast<double>(sides[s]->residual[p])) * 1.01 + 1.01 * u * std::sqrt(norm);
      const double copy = (std::sqrt(norm) + rest) * (std::sqrt(norm) + rest);  // |A|^2, at most
      sides[s]->slack[p] = static_cast<float>(
          1.01 * (relative * norm + 36.0 * u * copy + rest * rest * (1.0 / theta + 1.0)) + D * 0x1p-120);
    }
  }
  const ScreenSide& candidates = layout.screen.candidates;
  for (std::int64_t q = 0; q < candidates.padded; ++q) {
    layout.bias[q] = q < candidates.rows ? 0.5f * (candidates.norm[q] - candidates.slack[q])
                                         : std::numeric_limits<float>::infinity();
  }
  return true;
}

// The tiles of the sweep. Symmetric: those of the upper triangle, one diagonal after the other, so that every row has a
// good threshold early.
class Tiles {
 public:
  Tiles(const ScreenPlan& plan, const Screen& screen)
      : plan_(plan),
        screen_(screen),
        row_blocks_(divide_up(screen.anchors.rows, plan.tile)),
        column_blocks_(divide_up(screen.candidates.rows, plan.tile)),
        locks_(std::make_unique<std::mutex[]>(static_cast<std::size_t>(row_blocks_))) {
    for (std::int64_t d = 0, start = 0; screen.symmetric && d < row_blocks_; start += row_blocks_ - d, ++d) {
      diagonal_start_.push_back(start);
    }
  }
  std::int64_t count() const {
    return screen_.symmetric ? row_blocks_ * (row_blocks_ + 1) / 2 : row_blocks_ * column_blocks_;
  }
  Tile operator[](std::int64_t item) const {
    std::int64_t i = item % row_blocks_;  // a block of candidates meets all anchors while it is in cache
    std::int64_t j = item / row_blocks_;
    if (screen_.symmetric) {
      const std::int64_t d =
          std::upper_bound(diagonal_start_.begin(), diagonal_start_.end(), item) - diagonal_start_.begin() - 1;
      i = item - diagonal_start_[d];
      j = i + d;
    }
    Tile tile{};
    tile.row = i * plan_.tile;
    tile.rows = std::min(plan_.tile, round_up(screen_.anchors.rows, kPanel) - tile.row);
    tile.column = j * plan_.tile;
    tile.columns = std::min(plan_.tile, round_up(screen_.candidates.rows, kPanel) - tile.column);
    tile.diagonal = screen_.symmetric && i == j;
    tile.pitch = plan_.pitch;
    return tile;
  }
  // Lists change under the lock of their block of positions. The selection does not depend on the order of the tiles.
  void append_hits(const Kernels& kernels, const Tile& tile, float* products) {
    const std::int64_t i = tile.row / plan_.tile;
    const std::int64_t j = tile.column / plan_.tile;
    std::unique_lock<std::mutex> rows(locks_[i]);
    std::unique_lock<std::mutex> columns;
    if (screen_.symmetric && i != j) columns = std::unique_lock<std::mutex>(locks_[j]);
    if (tile.diagonal && screen_whole_rows(kernels, tile, products)) return;
    kernels.tile_epilogue(screen_, tile, products);
  }

 private:
  // The first tile of its rows, usually: every pair would be a hit, as thresholds are infinite.
  bool screen_whole_rows(const Kernels& kernels, const Tile& tile, float* products) const {
    std::int32_t* counts = screen_.list_counts + tile.row;
    const std::int64_t rows = std::min(tile.rows, screen_.anchors.rows - tile.row);
    if (plan_.whole || std::any_of(counts, counts + rows, [](std::int32_t count) { return count > 0; })) return false;
    Tile alone = tile;
    alone.row = alone.column = 0;
    kernels.mirror_tile(alone, products);
    if (kernels.screen_rows(screen_, tile, products)) return true;
    std::fill_n(counts, rows, 0);
    return false;
  }

  const ScreenPlan& plan_;
  const Screen& screen_;
  std::int64_t row_blocks_;
  std::int64_t column_blocks_;
  std::unique_ptr<std::mutex[]> locks_;
  std::vector<std::int64_t> diagonal_start_;
};

// Multiplies every tile and appends its hits to the lists. Returns whether lists are pruned to their last thresholds.
bool sweep(const ThreadPool& pool, const Kernels& kernels, const ScreenPlan& plan, const Layout& layout) {
  const Screen& screen = layout.screen;
  Tiles tiles(plan, screen);
  const auto multiply = [&](std::int64_t item, std::int64_t worker, float* products) {
    const Tile tile = tiles[item];
    kernels.tile_products(screen, tile, tiles[std::min(item + plan.workers, tiles.count() - 1)], products,
                          layout.forms + worker * plan.form_words);
    return tile;
  };
  if (!plan.whole) {
    for_each(pool, plan.workers, tiles.count(), [&](std::int64_t item, std::int64_t worker) {
      float* products = layout.products + worker * plan.tile * plan.pitch;
      tiles.append_hits(kernels, multiply(item, worker, products), products);
    });
    return false;
  }
  const auto products_of = [&](const Tile& tile) { return layout.products + tile.row * plan.pitch + tile.column; };
  for_each(pool, plan.workers, tiles.count(), [&](std::int64_t item, std::int64_t worker) {
    const Tile tile = multiply(item, worker, products_of(tiles[item]));
    if (screen.symmetric) kernels.mirror_tile(tile, layout.products);
  });
  std::atomic<bool> fits{true};
  const int selectors = workers_for(pool, 4.0 * static_cast<double>(screen.anchors.rows * screen.candidates.rows));
  for_blocks(pool, selectors, screen.anchors.rows, kPanel, [&](std::int64_t begin, std::int64_t end) {
    const Tile rows{begin, end - begin, 0, round_up(screen.candidates.rows, kPanel), false, plan.pitch};
    if (!kernels.screen_rows(screen, rows, layout.products + begin * plan.pitch)) fits.store(false);
  });
  if (fits.load()) return true;
  // Clusters that the bound cannot tell apart: the tiles' epilogue resolves them, from thresholds that hold already.
  std::fill_n(screen.list_counts, screen.anchors.rows, 0);
  for_each(pool, plan.workers, tiles.count(), [&](std::int64_t item) {
    const Tile tile = tiles[item];
    tiles.append_hits(kernels, tile, products_of(tile));
  });
  return false;
}

}  // namespace

bool forward_screen(const ForwardArgs& args, const ThreadPool& pool, const Kernels& kernels,
                    const Identities& identities, Loss<float>& loss) {
  const std::int64_t N = args.anchors.rows;
  const std::int64_t M = args.candidates.rows;
  const std::int64_t K = loss.K();
  const ScreenPlan plan = plan_screen(N, M, args.dims, K, args.symmetric, pool.threads, kernels);
  Slices measure;
  lay_out(args, plan, measure);
  const Scratch scratch(measure.bytes());
  Slices slices(scratch.data());
  Layout layout = lay_out(args, plan, slices);
  Screen& screen = layout.screen;
  screen.dtype = args.dtype;
  screen.dims = args.dims;
  screen.forms = plan.forms;
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
  choose_copy(args, kernels, K, screen);
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
  screen.upper_bias = layout.upper_bias;
  for (std::int64_t q = 0; q < screen.candidates.padded; ++q) {
    layout.upper_bias[q] = layout.bias[q] + screen.candidates.slack[q];
  }
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

  if (!sweep(pool, kernels, plan, layout)) {
    for_blocks(pool, pool.threads, N, kAnchorBlock, [&](std::int64_t begin, std::int64_t end) {
      for (std::int64_t p = begin; p < end; ++p) kernels.prune(screen, p);
    });
  }
  refine(args, pool, kernels, identities, screen, loss);

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
