// The one place where a problem meets its kernels. Of the paths that can serve it, it takes the one that the cost model
// (cost.cpp) predicts to be the cheapest; there are no thresholds between paths.
#include "cuda/plan/plan.h"

#include <algorithm>
#include <cmath>

#include "cuda/plan/cost.h"
#include "cuda/plan/sizes.h"
#include "cuda/plan/sizes_small.h"

namespace sn::cuda {
namespace {

// Candidate buffers of one strip of the screening: 65536 anchors with 384 + 256 entries of 8 bytes are 320 MiB.
constexpr std::int64_t kBufferBytes = std::int64_t{320} << 20;
constexpr std::int64_t kSmallestBuffer = 512;
constexpr std::int64_t kLeanEntries = 32;  // times kLeanRatio: room for up to 10 neighbours
// Buffers of up to kFewRows anchors.
constexpr std::int64_t kFewEntries = 2048;
// Groups per neighbour that the threshold is taken from: 4 leave 15 % more entries than single scores would, 15 leave
// 4 %. Where lanes' groups are fewer, single scores are kept; where those of quads are, lanes' are.
constexpr std::int64_t kLaneGroupShare = 4;
constexpr std::int64_t kQuadGroupShare = 15;
constexpr std::int64_t kFarCapacity = 256;
constexpr std::int64_t kSampleMultiple = 64;

class Workspace {
 public:
  Piece take(std::int64_t bytes) {
    const Piece piece{offset_, bytes};
    offset_ += round_up(bytes, kWorkspaceAlignment);
    return piece;
  }
  std::int64_t bytes() const { return offset_; }

 private:
  std::int64_t offset_ = 0;
};

// The plan that is predicted to be the cheapest of those shown.
class Cheapest {
 public:
  Cheapest(const Problem& problem, const DeviceFacts& device) : problem_(problem), device_(device) {}
  void consider(const ForwardPlan& plan) {
    const double us = predict_forward(plan, problem_, device_).total();
    if (found_ && us >= us_) return;
    best_ = plan;
    us_ = us;
    found_ = true;
  }
  bool found() const { return found_; }
  const ForwardPlan& best() const { return best_; }

 private:
  const Problem& problem_;
  const DeviceFacts& device_;
  ForwardPlan best_;
  double us_ = 0.0;
  bool found_ = false;
};

// The cheapest of a path of one launch, with its workspace. Returns whether anything fits.
bool settle(ForwardPlan& plan, const Cheapest& cheapest, const Problem& problem, std::int64_t partial_bytes) {
  if (!cheapest.found()) return false;
  plan = cheapest.best();
  Workspace workspace;
  plan.records = workspace.take(problem.N * static_cast<std::int64_t>(sizeof(AnchorRecord)));
  plan.partials = workspace.take(partial_bytes);
  plan.workspace_bytes = workspace.bytes();
  return true;
}

// Blocks of a group of the paths of one launch, and rounds of its chunks: as many warps as there are have an item of a
// round, if buffers allow it. Returns whether the shared memory holds them.
bool plan_group(ForwardPlan& plan, const Problem& problem, const DeviceFacts& device) {
  std::int64_t shared = device.shared_bytes;
  if (plan.path == ForwardPath::kCluster) {
    const auto shares = [&] {  // slices, or anchors to finish
      return plan.cluster < plan.d_slices || plan.cluster * kSmallWarps < plan.group_anchors;
    };
    plan.cluster = 1;
    while (shares() && 2 * plan.cluster <= std::min(kClusterBlocks, device.largest_cluster)) plan.cluster *= 2;
    if (plan.cluster > 1) shared = std::min<std::int64_t>(shared, device.cluster_bytes);
  } else {
    // As many as fit the device at once.
    const std::int64_t groups = divide_up(problem.N, plan.group_anchors);
    const std::int64_t at_once = std::max<std::int64_t>(1, device.multiprocessors / groups);
    const std::int64_t planes = std::min<std::int64_t>(divide_up(plan.d_slices, at_once), kLargestPlanes);
    plan.cluster = static_cast<int>(divide_up(plan.d_slices, planes));
    if (small_partial_bytes(plan, problem) > kPartialBytes) return false;
  }
  if (small_planes(plan) > kLargestPlanes) return false;
  const std::int64_t chunks = plan.slice_elements / kChunk;
  plan.round_chunks = 1;
  while (plan.round_chunks < chunks && plan.round_chunks * small_items(plan, problem.M) < kSmallWarps) {
    plan.round_chunks *= 2;
  }
  while (plan.round_chunks > 1 && small_shared_bytes(plan, problem) > shared) plan.round_chunks /= 2;
  return small_shared_bytes(plan, problem) <= shared;
}

// The slices and groups that are predicted to be the cheapest of what fits. Returns whether anything does. Anchors come
// by four. Of a cluster all blocks finish some; without clusters one block finishes all of its group. So there, where
// fp32 is slow (sm_80) or multiprocessors are few (sm_86), tiles are expected to be cheaper from some 100 rows of 2048
// dimensions on: they leave out a triangle of the products, which the anchors of a group cannot.
bool plan_small(ForwardPlan& plan, const Problem& problem, const DeviceFacts& device) {
  const bool clusters = plan.path == ForwardPath::kCluster;
  plan.strip_rows = problem.N;
  plan.strips = 1;
  plan.launches = 1;
  const std::int64_t groups = clusters ? kClusterGroups : kSmallGroups;
  const std::int64_t fewest = round_up(divide_up(problem.N, groups), kSmallQuad);
  const std::int64_t most = clusters ? fewest : kSmallWarps;
  Cheapest cheapest(problem, device);
  for (std::int64_t anchors = fewest; anchors <= most; anchors += kSmallQuad) {
    plan.group_anchors = static_cast<int>(std::min(anchors, problem.N));
    for (std::int64_t elements = kChunk; elements <= kLargestSlice; elements *= 2) {
      plan.slice_elements = elements;
      plan.d_slices = direct_slices(problem.D, elements);
      if (plan_group(plan, problem, device)) cheapest.consider(plan);
      if (plan.d_slices == 1) break;
    }
  }
  return settle(plan, cheapest, problem, clusters ? 0 : small_partial_bytes(cheapest.best(), problem));
}

// The slices that are predicted to be the cheapest of what fits. As many clusters share the items as the device holds
// at once. Returns whether anything fits.
bool plan_square(ForwardPlan& plan, const Problem& problem, const DeviceFacts& device) {
  plan.strip_rows = problem.N;
  plan.strips = 1;
  plan.launches = 1;
  plan.cluster = kSquareCluster;
  const std::int64_t share = divide_up(square_items(problem.N), device.wide_clusters);
  plan.cluster_items = static_cast<int>(std::max(share, kFewSquareItems));
  plan.cluster_rows = static_cast<int>(square_buffer_rows(problem.N, plan.cluster_items));
  Cheapest cheapest(problem, device);
  for (std::int64_t elements = kChunk; elements <= kLargestSlice; elements *= 2) {
    plan.slice_elements = elements;
    plan.d_slices = direct_slices(problem.D, elements);
    plan.round_chunks = static_cast<int>(elements / kChunk);
    if (small_planes(plan) <= kLargestPlanes && square_shared_bytes(plan, problem) <= device.shared_bytes) {
      cheapest.consider(plan);
    }
    if (plan.d_slices == 1) break;
  }
  return settle(plan, cheapest, problem, square_distance_bytes(problem.N));
}

// Smaller slices spread few tiles over all multiprocessors, larger ones leave the selection less to add up. Strips of
// whole tiles waste none, those of whole waves of tiles no multiprocessor. One length leaves no few rows for the last
// strip. Other strips have more rows for the selection.
void plan_direct(ForwardPlan& plan, const Problem& problem, const DeviceFacts& device) {
  constexpr std::int64_t kLongestStrip = kScratchEntries;  // of one candidate
  plan.shared_reduction = shares_reduction(problem.N);
  DirectShape best{};
  double best_us = 0.0;
  int best_threads = 0;
  Selection best_selection = Selection::kSearched;
  const auto consider = [&](const DirectShape& shape) {
    plan.slice_elements = shape.slice_elements;
    plan.d_slices = shape.d_slices;
    plan.strip_rows = shape.strip_rows;
    plan.strips = shape.strips;
    plan.triangular = shape.triangular;
    for (const Selection selection :
         {Selection::kExtracted, Selection::kBounded, Selection::kWhole, Selection::kSearched}) {
      if (!selects(selection, problem.M, plan.K)) continue;
      for (const int threads : {kListThreads, kFewListThreads}) {
        plan.selection = selection;
        plan.select_threads = threads;
        const double us = predict_forward(plan, problem, device).total();
        if (best_us != 0.0 && us >= best_us) continue;
        best_us = us;
        best = shape;
        best_selection = selection;
        best_threads = threads;
        if (selection == Selection::kExtracted) break;
      }
    }
  };
  for (std::int64_t elements = kChunk; elements <= kLargestSlice; elements *= 2) {
    const DirectShape longest = direct_shape(problem, elements, kLongestStrip, true);
    consider(longest);
    if (longest.strips > 1) {
      consider(direct_shape(problem, elements, kLongestStrip, false));
      const std::int64_t multiprocessors = std::max(1, device.multiprocessors);
      const std::int64_t blocks = direct_tiles(1, problem.M, false) * longest.d_slices;  // of a row of tiles
      const std::int64_t waves = direct_tiles(longest.strip_rows, 1, false) * blocks / multiprocessors;
      const std::int64_t rows = waves * multiprocessors / blocks * kDirectTile;
      if (rows > 0) consider(direct_shape(problem, elements, rows, true));
      const std::int64_t equal = round_up(divide_up(problem.N, longest.strips), kDirectTile);
      consider(direct_shape(problem, elements, equal, true));
    }
    if (elements >= problem.D) break;
  }
  plan.slice_elements = best.slice_elements;
  plan.d_slices = best.d_slices;
  plan.strip_rows = best.strip_rows;
  plan.strips = best.strips;
  plan.triangular = best.triangular;
  plan.select_threads = best_threads;
  plan.selection = best_selection;

  Workspace workspace;
  plan.control = workspace.take(sizeof(Control));
  plan.records = workspace.take(problem.N * static_cast<std::int64_t>(sizeof(AnchorRecord)));
  plan.flags = workspace.take(direct_flag_bytes(plan, problem));
  plan.partials = workspace.take(direct_partial_bytes(plan, problem));
  plan.sort_keys = workspace.take(direct_sort_key_bytes(plan, problem));
  plan.partial_records = workspace.take(partial_record_bytes(plan));
  plan.launches = direct_launches(plan);
  plan.workspace_bytes = workspace.bytes();
}

// The probability that a row has more than `entries` of M candidates within the least bounds of K groups of a sample:
// of those candidates, fewer than K groups then hold one. The sampled ones, and the groups that they fall to, are taken
// as independent.
double overflow_probability(std::int64_t entries, std::int64_t M, std::int64_t sample, std::int64_t group,
                            std::int64_t K) {
  if (entries >= M) return 0.0;
  const double groups = static_cast<double>(sample) / static_cast<double>(group);
  double missed = 1.0 - static_cast<double>(entries) / static_cast<double>(M);
  for (std::int64_t size = 1; size < group; size *= 2) missed *= missed;
  // The probability that so many groups hold one. Where the first underflows, K of them hold one for certain.
  double term = std::exp(groups * std::log(missed));
  if (term == 0.0) return 0.0;
  double sum = 0.0;
  const double odds = (1.0 - missed) / missed;
  for (std::int64_t held = 0; held < K && static_cast<double>(held) < groups; ++held) {
    sum += term;
    term *= (groups - static_cast<double>(held)) / static_cast<double>(held + 1) * odds;
  }
  return sum;
}

// Entries that hold all but about one row in 10^6: 512 for 8192 candidates, one in 16 of them in single scores. About
// as many as K times the ratio are too few; from there on ever larger numbers are tried.
std::int64_t likely_entries(std::int64_t M, std::int64_t sample, std::int64_t group, std::int64_t K) {
  constexpr double kOverflow = 2e-6;
  const auto enough = [&](std::int64_t entries) {
    return overflow_probability(entries * kSampleMultiple, M, sample, group, K) <= kOverflow;
  };
  std::int64_t low = std::max<std::int64_t>(1, M / sample * K / kSampleMultiple);
  std::int64_t high = 2 * low;
  while (!enough(high)) {
    low = high + 1;
    high *= 2;
  }
  while (low < high) {
    const std::int64_t middle = (low + high) / 2;
    if (enough(middle)) {
      high = middle;
    } else {
      low = middle + 1;
    }
  }
  return low * kSampleMultiple;
}

// A sample of one in `ratio`, and the buffer that it needs.
void plan_sample(ForwardPlan& plan, const Problem& problem, std::int64_t ratio, bool lean) {
  const std::int64_t M = problem.M;
  const std::int64_t least = least_sample(plan.K);
  plan.sample_stride = std::max<std::int64_t>(1, std::min(ratio, M / least));
  plan.sample_columns = divide_up(M, plan.sample_stride);
  const auto has_groups = [&](std::int64_t group, std::int64_t share) {
    return plan.sample_columns / group >= share * (plan.K + 1);
  };
  plan.sample_group = has_groups(kQuadGroup, kQuadGroupShare)   ? kQuadGroup
                      : has_groups(kLaneGroup, kLaneGroupShare) ? kLaneGroup
                                                                : 1;
  // As many candidates as the sample stands for, so that buffers grow with M.
  const std::int64_t candidates = plan.sample_columns * plan.sample_stride;
  const std::int64_t enough =
      lean ? kLeanEntries * ratio : likely_entries(candidates, plan.sample_columns, plan.sample_group, plan.K);
  const std::int64_t smallest = lean                    ? kLeanEntries * kLeanRatio
                                : problem.N <= kFewRows ? kFewEntries
                                                        : kSmallestBuffer;
  plan.buffer_capacity = std::max({smallest, fallback_entries(plan.K), round_up(enough, kSampleMultiple)});
}

// A thin sample makes less of a few rows' scores and more of their refinement.
void choose_thin_sample(ForwardPlan& plan, const Problem& problem, const DeviceFacts& device) {
  if (problem.N > kFewRows || problem.M / kFewSample <= kSampleRatio) return;
  plan.thin_sample = true;
  const double us = predict_forward(plan, problem, device).total();
  plan.thin_sample = false;
  plan.thin_sample = us < predict_forward(plan, problem, device).total();
}

// How much of a plan is wanted: what its prediction needs, or all.
enum class Extent { kPredicted, kWhole };

// Buffers of so many rows and candidates fit one strip whatever the sample: then a prediction need not know them.
constexpr std::int64_t kSurelyOneStrip = 8192;
constexpr std::int64_t kSurelyOneStripColumns = std::int64_t{1} << 18;

// What the screened paths share: the cast copies, facts of rows, lists of positives, buffers.
void plan_screened(ForwardPlan& plan, const Problem& problem, const DeviceFacts& device, Extent extent) {
  const std::int64_t N = problem.N;
  const std::int64_t M = problem.M;
  const bool dense = plan.path == ForwardPath::kDense;
  const bool in_place = problem.dtype != DType::kFloat32 && problem.aligned && problem.D % kCopyElements == 0;
  plan.padded_dims = round_up(problem.D, kStageColumns);
  plan.cast_anchors = !in_place;
  plan.cast_candidates = !problem.symmetric && !in_place && plan.path != ForwardPath::kBank;

  if (dense) {
    plan.sample_columns = M;
    plan.sample_stride = 1;
    plan.buffer_capacity = fallback_entries(plan.K);
    plan.far_capacity = 0;
    plan.strip_rows = std::min({N, std::max<std::int64_t>(1, kScratchEntries / M),
                                std::max<std::int64_t>(1, kBufferBytes / (8 * plan.buffer_capacity))});
  } else if (extent == Extent::kPredicted && N <= kSurelyOneStrip && M <= kSurelyOneStripColumns) {
    plan.strip_rows = N;
    plan.strips = 1;
    choose_thin_sample(plan, problem, device);
  } else {
    plan.strip_rows = N;
    plan.strips = 1;
    choose_thin_sample(plan, problem, device);
    // The place of the buffer also holds what the sample leaves: of more than kFewRows anchors both grow as sqrt(M)
    // beyond some 500,000 candidates.
    const bool lean = takes_lean_sample(N, plan.K);
    std::int64_t ratio = lean ? kLeanRatio : kSampleRatio;
    if (plan.thin_sample) ratio = std::max(ratio, M / kFewSample);
    plan_sample(plan, problem, ratio, lean);
    while (N <= kFewRows && plan.buffer_capacity > kMostFewEntries && ratio > kSampleRatio) {
      ratio = std::max(kSampleRatio, ratio * 7 / 8);
      plan_sample(plan, problem, ratio, lean);
    }
    while (N > kFewRows && sample_groups(plan) * 4 > plan.buffer_capacity * 8 && plan.sample_columns > 1024) {
      ratio = divide_up(ratio * 9, 8);
      plan_sample(plan, problem, ratio, lean);
    }
    plan.far_capacity = kFarCapacity;
    plan.strip_rows =
        std::min(N, std::max<std::int64_t>(1, kBufferBytes / (8 * (plan.buffer_capacity + kFarCapacity))));
    if (plan.strip_rows > kStripMultiple && plan.strip_rows < N) plan.strip_rows -= plan.strip_rows % kStripMultiple;
  }
  plan.strips = divide_up(N, plan.strip_rows);
  plan.triangular = screened_triangular(problem, plan, kStripMultiple);
  plan.rescreen = plan.path != ForwardPath::kDense && N >= kSmallestGroup;
  if (extent == Extent::kPredicted) return;
  // Of equal strips and a last one that may be shorter.
  for (const std::int64_t rows : {N - (plan.strips - 1) * plan.strip_rows, plan.strip_rows}) {
    if (!refines_by_warps(plan, problem, rows, device)) plan.few_rows = rows;
  }
  const PositivesShape positives = positives_shape(N, M, device.multiprocessors);
  plan.positive_anchors = positives.anchors;
  plan.positive_segments = positives.segments;
  plan.shared_reduction = shares_reduction(N);
  ScorePass pass{.rows = plan.strip_rows, .columns = M, .dims = plan.padded_dims};
  pass.symmetric = plan.triangular;
  pass.dense = dense;
  plan.score_tile = cheapest_score_tile(pass, true, device);
  pass = {.rows = plan.strip_rows, .columns = plan.sample_columns, .dims = plan.padded_dims, .dense = true};
  plan.sample_tile = cheapest_score_tile(pass, false, device);

  Workspace workspace;
  plan.control = workspace.take(sizeof(Control));
  plan.records = workspace.take(N * static_cast<std::int64_t>(sizeof(AnchorRecord)));
  plan.mean = workspace.take(problem.dtype == DType::kFloat32 ? mean_bytes(plan.padded_dims) : 0);
  plan.anchor_cast = workspace.take(plan.cast_anchors ? N * plan.padded_dims * 2 : 0);
  plan.candidate_cast = workspace.take(plan.cast_candidates ? M * plan.padded_dims * 2 : 0);
  plan.anchor_facts = workspace.take(N * 6 * 4);
  plan.candidate_facts = workspace.take(problem.symmetric ? 0 : M * 2 * 4);
  plan.positive_leader = workspace.take(N * 4);
  plan.positive_count = workspace.take(N * 4);
  plan.positive_list = workspace.take(N * kPositiveEntries * 4);
  plan.counts = workspace.take(plan.strip_rows * 2 * 4);
  plan.buffer = workspace.take(screened_buffer_bytes(plan));
  plan.far_buffer = workspace.take(plan.strip_rows * plan.far_capacity * 8);
  plan.queue = workspace.take(plan.strip_rows * 4);
  plan.partial_records = workspace.take(partial_record_bytes(plan));
  plan.waiting = workspace.take(plan.rescreen ? plan.strip_rows * 3 * 4 : 0);
  plan.rescreen_tiles = workspace.take(plan.rescreen ? rescreen_tile_count(plan.strip_rows) * kRescreenTileBytes : 0);
  plan.launches = screened_launches(plan, problem);
  plan.workspace_bytes = workspace.bytes();
}

ForwardPlan plan_path(ForwardPath path, const Problem& problem, const DeviceFacts& device, Extent extent) {
  ForwardPlan plan;
  plan.path = path;
  plan.K = std::min(problem.k, problem.M);
  switch (path) {
    case ForwardPath::kCluster:
    case ForwardPath::kTickets:
      plan_small(plan, problem, device);
      break;
    case ForwardPath::kSquare:
      plan_square(plan, problem, device);
      break;
    case ForwardPath::kAuto:
    case ForwardPath::kDirect:
      plan_direct(plan, problem, device);
      break;
    case ForwardPath::kDense:
    case ForwardPath::kScreen:
    case ForwardPath::kBank:
      plan_screened(plan, problem, device, extent);
      break;
  }
  return plan;
}

// The plan of a path of one launch; false where it cannot serve.
bool plan_one_launch(ForwardPath path, ForwardPlan& plan, const Problem& problem, const DeviceFacts& device) {
  if (std::min({problem.N, problem.M, problem.D}) <= 0 || std::max(problem.N, problem.M) > kSmallRows ||
      problem.dtype == DType::kFloat64 || (path != ForwardPath::kTickets && device.major < kClusterMajor)) {
    return false;
  }
  if (path == ForwardPath::kSquare && (!problem.symmetric || device.wide_clusters <= 0)) return false;
  plan.path = path;
  plan.K = std::min(problem.k, problem.M);
  return path == ForwardPath::kSquare ? plan_square(plan, problem, device) : plan_small(plan, problem, device);
}

}  // namespace

bool serves(ForwardPath path, const Problem& problem, const DeviceFacts& device) {
  const bool some = problem.N > 0 && problem.M > 0 && problem.D > 0;
  const bool screenable = some && problem.dtype != DType::kFloat64 && std::min(problem.k, problem.M) <= kFastNeighbours;
  switch (path) {
    case ForwardPath::kAuto:
    case ForwardPath::kDirect:
      return true;
    case ForwardPath::kCluster:
    case ForwardPath::kTickets:
    case ForwardPath::kSquare: {
      ForwardPlan plan;
      return plan_one_launch(path, plan, problem, device);
    }
    case ForwardPath::kDense:
    case ForwardPath::kScreen:
      return screenable;
    case ForwardPath::kBank:
      return screenable && !problem.symmetric && problem.N <= kBankAnchorRows && problem.dtype == DType::kFloat32 &&
             device.shared_bytes >= kBankSharedBytes;
  }
  return false;
}

ForwardPlan plan_forward(const Problem& problem, const DeviceFacts& device, ForwardPath wanted) {
  if (wanted != ForwardPath::kAuto) return plan_path(wanted, problem, device, Extent::kWhole);
  ForwardPlan best = plan_path(ForwardPath::kDirect, problem, device, Extent::kWhole);
  double best_us = predict_forward(best, problem, device).total();
  const auto consider = [&](const ForwardPlan& plan) {
    const double us = predict_forward(plan, problem, device).total();
    if (us >= best_us) return;
    best_us = us;
    best = plan;
  };
  for (const ForwardPath path : {ForwardPath::kCluster, ForwardPath::kTickets, ForwardPath::kSquare}) {
    ForwardPlan plan;
    if (plan_one_launch(path, plan, problem, device)) consider(plan);
  }
  for (const ForwardPath path : {ForwardPath::kDense, ForwardPath::kScreen, ForwardPath::kBank}) {
    if (serves(path, problem, device)) consider(plan_path(path, problem, device, Extent::kPredicted));
  }
  const bool predicted = best.path != ForwardPath::kDirect && !takes_slot(best);
  return predicted ? plan_path(best.path, problem, device, Extent::kWhole) : best;
}

}  // namespace sn::cuda
