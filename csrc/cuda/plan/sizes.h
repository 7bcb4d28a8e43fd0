// Sizes that the plan and the kernels share. No toolkit, no kernels.
#pragma once

#include <algorithm>
#include <cstdint>

#include "cuda/plan/plan_types.h"

namespace sn::cuda {

// Devices, and code compiled for them, on which a kernel may start before the one ahead in the stream has ended
// (LaunchShape::dependent).
inline constexpr int kDependentMajor = 9;
constexpr bool launches_dependents(const DeviceFacts& device) {
  return device.major >= kDependentMajor;
}

// ---- the sum over anchors -------------------------------------------------------------------------------------------

// Up to so many records one block sums alone: 8 a partial, all under way at once. On an H200 it took 7 us more for 8192
// records than for 1024, and 53 to 66 more for 65536.
inline constexpr std::int64_t kAloneRecords = 2048;
constexpr bool shares_reduction(std::int64_t N) {
  return N > kAloneRecords;
}
constexpr std::int64_t partial_record_bytes(const ForwardPlan& plan) {
  return plan.shared_reduction ? kPartials * static_cast<std::int64_t>(sizeof(PartialRecord)) : 0;
}
// Blocks of a kernel that gives every partial that has a record a block.
constexpr std::int64_t reduction_blocks(std::int64_t N) {
  return N < kPartials ? N : kPartials;
}

// ---- the direct path ------------------------------------------------------------------------------------------------

inline constexpr std::int64_t kDirectTile = 64;  // a block of the tile kernel serves so many anchors and candidates

// D is cut into slices of 2^p chunks, at most this many elements: a thread of the tile kernel keeps the open subtrees
// of its pairs in registers, one a level. The selection adds the slices up, in the one order.
inline constexpr std::int64_t kLargestSlice = 4 * kChunk;
static_assert(kSection % kLargestSlice == 0, "slices are subtrees of a section");

// Keys of one anchor's support set are sorted in shared memory up to this many bytes, in the workspace beyond.
inline constexpr std::int64_t kSharedSortBytes = 32 * 1024;
constexpr std::int64_t direct_key_bytes(DType dtype) {
  return dtype == DType::kFloat64 ? 16 : 8;
}
// Sorting networks work on powers of two.
constexpr std::int64_t direct_sort_keys(std::int64_t K) {
  std::int64_t keys = 1;
  while (keys < K) keys *= 2;
  return keys;
}

// How the neighbours of an anchor are selected (direct/select.cuh). Up to so many of so few candidates one warp
// extracts, one after the other: the limits are where, by count, a block alone takes about as long either way. Of
// others the plan takes what is cheapest. Lists of a warp each (direct/lists.cuh) sort all candidates, or what a bound
// leaves of them, which is too much of many neighbours; or a radix search finds the neighbours, and lists sort those,
// or, beyond what lists hold, a network.
inline constexpr std::int64_t kShortRow = 256;
inline constexpr std::int64_t kShortNeighbours = 16;
inline constexpr std::int64_t kListedKeys = 1024;
// Random rows leave 300 to 370 of 192 within the bound, 380 to 560 of 224, and 610 to 910 of 248.
inline constexpr std::int64_t kBoundedNeighbours = 224;

// Threads of a block that does not extract. Two of the larger blocks share a multiprocessor, and each is sooner through
// its row; of the smaller, five do. For much of its time a block waits for the one warp that finishes the anchor, so
// the smaller ones pay where rows are not all under way at once. The plan takes what is cheaper.
inline constexpr int kListThreads = 256;
inline constexpr int kFewListThreads = 128;

constexpr bool selects(Selection selection, std::int64_t M, std::int64_t K) {
  const bool extracts = M <= kShortRow && K <= kShortNeighbours;
  switch (selection) {
    case Selection::kExtracted:
      return extracts;
    case Selection::kBounded:
      return !extracts && M > kFewListThreads && K <= kBoundedNeighbours;
    case Selection::kWhole:
      return !extracts && M <= kListedKeys;
    case Selection::kSearched:
      return !extracts;
  }
  return false;
}

// Slices that the selection adds up as one tree: a section's, or the least power of two that covers all of them.
constexpr std::int64_t slice_tree(const ForwardPlan& plan) {
  std::int64_t slices = 1;
  while (slices < plan.d_slices && slices < kSection / plan.slice_elements) slices *= 2;
  return slices;
}

// No scratch of N x M beyond this many entries: larger problems go in strips of anchors.
inline constexpr std::int64_t kScratchEntries = std::int64_t{1} << 22;
// Of partial sums at a time, all slices together: twice as many in fp64, four times as many in fp32.
inline constexpr std::int64_t kPartialBytes = 16 * kScratchEntries;

// How a problem is cut, within that scratch (or one anchor's, if that is more).
struct DirectShape {
  std::int64_t slice_elements;
  std::int64_t d_slices;
  std::int64_t strip_rows;
  std::int64_t strips;
  bool triangular;
};
constexpr std::int64_t direct_slices(std::int64_t D, std::int64_t slice_elements) {
  return D <= slice_elements ? 1 : divide_up(D, slice_elements);
}
// Tiles of one strip; at least one: a matrix without a counterpart is still checked for NaN and Inf. triangular: of the
// square that the strip's own rows make with themselves, those on and above the diagonal.
constexpr std::int64_t direct_tiles(std::int64_t strip_rows, std::int64_t M, bool triangular) {
  const std::int64_t down = std::max<std::int64_t>(1, divide_up(strip_rows, kDirectTile));
  const std::int64_t across = std::max<std::int64_t>(1, divide_up(M, kDirectTile));
  return down * across - (triangular ? down * (down - 1) / 2 : 0);
}
// Whether strips of an N x N problem begin where tiles do.
constexpr bool direct_triangular(const Problem& problem, std::int64_t strip_rows) {
  return problem.symmetric && (strip_rows >= problem.N || strip_rows % kDirectTile == 0);
}
// Strips of at most so many rows. whole_tiles: they have whole tiles of rows, and may share triangles. At 127 rows that
// would be half as many.
constexpr DirectShape direct_shape(const Problem& problem, std::int64_t slice_elements, std::int64_t most_rows,
                                   bool whole_tiles) {
  DirectShape shape{};
  const std::int64_t N = std::max<std::int64_t>(problem.N, 1);
  const std::int64_t M = std::max<std::int64_t>(problem.M, 1);
  shape.slice_elements = slice_elements;
  shape.d_slices = direct_slices(problem.D, shape.slice_elements);
  const std::int64_t partials = kPartialBytes / accumulator_bytes(problem.dtype) / shape.d_slices;
  shape.strip_rows = std::min({N, most_rows, std::max<std::int64_t>(1, std::min(partials, kScratchEntries) / M)});
  if (whole_tiles && shape.strip_rows > kDirectTile && shape.strip_rows < N) {
    shape.strip_rows -= shape.strip_rows % kDirectTile;
  }
  shape.strips = divide_up(N, shape.strip_rows);
  shape.triangular = direct_triangular(problem, shape.strip_rows);
  return shape;
}

// Whether every row starts at a multiple of 16 bytes, the widest copy.
inline bool rows_aligned(const FeatureView& view, DType dtype) {
  constexpr std::int64_t kCopyBytes = 16;
  return reinterpret_cast<std::uintptr_t>(view.data) % kCopyBytes == 0 &&
         (view.rows <= 1 || view.row_stride * element_bytes(dtype) % kCopyBytes == 0);
}

// Bytes of the pieces of the workspace, once the plan's shape is set.
constexpr std::int64_t direct_partial_bytes(const ForwardPlan& plan, const Problem& problem) {
  return plan.d_slices * plan.strip_rows * problem.M * accumulator_bytes(problem.dtype);
}
constexpr std::int64_t direct_flag_bytes(const ForwardPlan& plan, const Problem& problem) {
  return direct_tiles(plan.strip_rows, problem.M, plan.triangular) * plan.d_slices * 4;
}
constexpr std::int64_t direct_sort_key_bytes(const ForwardPlan& plan, const Problem& problem) {
  const std::int64_t bytes = direct_sort_keys(plan.K) * direct_key_bytes(problem.dtype);
  return bytes <= kSharedSortBytes ? 0 : plan.strip_rows * bytes;
}
constexpr std::int64_t direct_launches(const ForwardPlan& plan) {
  return 2 * plan.strips + (plan.shared_reduction ? 1 : 0);
}

// ---- the screening --------------------------------------------------------------------------------------------------

// A half-precision input serves in place when its rows start at multiples of 16 bytes and D is a multiple of this: one
// asynchronous copy moves 8 elements.
inline constexpr std::int64_t kCopyElements = 8;

// Columns of D that one stage of the score kernels holds; padded_dims is a multiple.
inline constexpr std::int64_t kStageColumns = 64;

// Shared memory of a block with a tile of 128 x 256 scores, and the most that every device lets a block have, which is
// enough for the tiles of 128 x 128 and 64 x 64.
inline constexpr std::int64_t kWideTileBytes = 144 * 1024;
inline constexpr std::int64_t kLeastSharedBytes = 99 * 1024;

// Several strips of a path that screens have a multiple of so many anchors: whole tiles of scores, whichever is taken.
inline constexpr std::int64_t kStripMultiple = 256;
// Whether, of the square that a strip's anchors make with themselves, tiles on and above the diagonal serve both
// triangles. Strips begin with tiles then. No more can be shared: thresholds of later strips are not known yet, and
// buffers of earlier ones are gone. Dense scores are written in full rows.
constexpr bool screened_triangular(const Problem& problem, const ForwardPlan& plan, std::int64_t tile_columns) {
  return problem.symmetric && plan.path != ForwardPath::kDense &&
         (plan.strip_rows >= problem.N || plan.strip_rows % tile_columns == 0);
}

// log2 of the lanes that read a row for its facts, kCopyElements each: a warp has work for all of its lanes in one row,
// or in two or four short ones.
constexpr int facts_row_shift(std::int64_t padded_dims) {
  int shift = 3;
  while (shift < 5 && kCopyElements << shift < padded_dims) ++shift;
  return shift;
}
static_assert(kCopyElements << 3 == kStageColumns, "the shortest rows have work for eight lanes");

// One block of the sampling kernel takes so many columns of D.
inline constexpr std::int64_t kSampleColumns = 32;
static_assert(kStageColumns % kSampleColumns == 0, "sampled blocks cover the padded columns");

constexpr std::int64_t sample_blocks(std::int64_t padded_dims) {
  return padded_dims / kSampleColumns;
}
// Bytes of ForwardPlan::mean for fp32 inputs: float mean [padded_dims], then for each block of the sampling kernel the
// bits of the largest |x - mean| that it saw, uint32 [sample_blocks], and again, among the anchors alone.
constexpr std::int64_t mean_bytes(std::int64_t padded_dims) {
  return 4 * (padded_dims + 2 * sample_blocks(padded_dims));
}

// eta of bound.cuh: the relative error of a screened squared distance. Exact as a float for every D below 2^17.
inline float screening_error(std::int64_t padded_dims) {
  const double dims = static_cast<double>(padded_dims);
  return static_cast<float>((1.25 * dims + dims / 32.0 + 32.0) * 0x1p-23);
}

// The factor on the residual in rho (bound.cuh).
inline float row_slack(std::int64_t padded_dims) {
  return 1.0f + 0x1p-20f + static_cast<float>(padded_dims / 32 + 16) * 0x1p-23f;
}

// Bounds that a sample leaves of each row. A group is the columns that one lane of a score kernel has of a row in 32
// columns of its tile, or all 32: those of the four lanes that share the row. Tiles of the sample cover a multiple of
// kSamplePad columns.
inline constexpr std::int64_t kLaneGroup = 8;
inline constexpr std::int64_t kQuadGroup = 32;
inline constexpr std::int64_t kSamplePad = 128;
static_assert(kSamplePad % kQuadGroup == 0);
constexpr std::int64_t padded_sample(std::int64_t columns) {
  return round_up(columns, kSamplePad);
}
constexpr std::int64_t sample_groups(const ForwardPlan& plan) {
  return plan.sample_group == 1 ? plan.sample_columns : padded_sample(plan.sample_columns) / plan.sample_group;
}
// Of ForwardPlan::buffer.
constexpr std::int64_t screened_buffer_bytes(const ForwardPlan& plan) {
  return plan.strip_rows * std::max(plan.buffer_capacity * 8, sample_groups(plan) * 4);
}

// Up to so many anchors do not fill the machine a warp each.
inline constexpr std::int64_t kFewRows = 1024;

// How thin the sample is (plan_sample; the cost model follows it). A sample of one candidate in r leaves about r K to
// look at, distributed as r times a Gamma(K) variable: 174 +- 55 for r = 16, K = 10 and groups of 8.
inline constexpr std::int64_t kSampleRatio = 16;
// Very many anchors get a quarter less memory for a larger sample. Errors of the scores leave a fifth more entries at D
// = 2048, so one row in 10^4 has more than 32 r entries. With a sample of one in 16 it would be one row in 200, by
// estimate; the fallback that served those rows took two thirds of the forward.
inline constexpr std::int64_t kLeanRatio = 12;
constexpr bool takes_lean_sample(std::int64_t N, std::int64_t K) {
  return N >= 32768 && K <= 10;
}
// Up to kFewRows anchors do not fill the machine with a sample, however small, and their buffers cost nothing: at least
// so many candidates while that is at most one in kSampleRatio, where the plan expects to gain by it.
inline constexpr std::int64_t kFewSample = 2048;
inline constexpr std::int64_t kMostFewEntries = 4096;  // of a buffer
constexpr std::int64_t least_sample(std::int64_t K) {
  return std::max<std::int64_t>(64, 2 * K);
}

// enqueue_sample and enqueue_facts, a kernel each.
inline constexpr std::int64_t kPrepareLaunches = 2;

// The bank's kernel holds all anchors of a call against one tile of candidates.
inline constexpr std::int64_t kBankAnchorRows = 256;
// Shared memory that a block asks for. A plan takes ForwardPath::kBank only where DeviceFacts::shared_bytes allows it.
inline constexpr std::int64_t kBankSharedBytes = 224 * 1024;

// How the search for positives (positives.cu) is cut: groups of anchors x segments of candidates, a block each.
//
// * A group is the smallest whose look-ups, one for each candidate in each group, stay below kPositiveLookups: an H200
//   makes about 2^19 a microsecond (a look-up of a warp takes some 10 cycles of shared memory). Small groups have short
//   tables, and more blocks than one block's worth of candidates could make.
//
// * Segments give every multiprocessor a block, down to kLeastSegment candidates each, and as many blocks as fit all
//   multiprocessors at once where each still has a batch of candidates for every thread.
//
// Time: a launch, a label and the table's few rounds (3 to 4 us, by count), then for each batch the latency of an
// atomic (1 us), and groups x M look-ups at the rate above.
struct PositivesShape {
  std::int64_t anchors;
  std::int64_t segments;
};
inline constexpr std::int64_t kFewPositiveAnchors = 64;
inline constexpr std::int64_t kMostPositiveAnchors = 1024;
inline constexpr std::int64_t kPositiveAnchorsStep = 4;
inline constexpr std::int64_t kPositiveLookups = std::int64_t{1} << 20;
inline constexpr std::int64_t kPositivesBatch = 1024;  // candidates that a block has under way at once
inline constexpr std::int64_t kPositivesResident = 4;  // blocks on a multiprocessor
inline constexpr std::int64_t kLeastSegment = 64;
constexpr PositivesShape positives_shape(std::int64_t N, std::int64_t M, std::int64_t multiprocessors) {
  std::int64_t anchors = kFewPositiveAnchors;
  while (anchors < kMostPositiveAnchors && divide_up(N, anchors) * M > kPositiveLookups) {
    anchors *= kPositiveAnchorsStep;
  }
  const std::int64_t groups = divide_up(N, anchors);
  const std::int64_t all = std::min(divide_up(multiprocessors, groups), divide_up(M, kLeastSegment));
  const std::int64_t at_once = std::min(kPositivesResident * multiprocessors / groups, divide_up(M, kPositivesBatch));
  return {anchors, std::max({all, at_once, std::int64_t{1}})};
}

// ---- the refinement and the fallback --------------------------------------------------------------------------------

// What the fallback leaves of a row, in the row's place of the buffer, for each segment of the candidates: a sorted
// list of K keys, then the nearest and the farthest positive. ForwardPlan::buffer_capacity has room for
// kFallbackSegments on every path; where it has more, few rows have more segments, up to as many as the merge sorts.
constexpr std::int64_t fallback_places(std::int64_t K) {
  return K + 2;
}
constexpr std::int64_t fallback_entries(std::int64_t K) {
  return kFallbackSegments * fallback_places(K);
}
inline constexpr std::int64_t kMostSegments = 64;
inline constexpr std::int64_t kMergeKeys = kFallbackSegments * kFastNeighbours;
constexpr std::int64_t most_fallback_segments(std::int64_t K) {
  return std::clamp(kMergeKeys / std::max<std::int64_t>(K, 1), kFallbackSegments, kMostSegments);
}

// Up to so many queued rows are served one by one, more in tiles of kDirectTile rows x kDirectTile candidates.
inline constexpr std::int64_t kFewQueued = 16;
// Two blocks on each multiprocessor of an H200; any number is right.
inline constexpr std::int64_t kFallbackBlocks = 264;
static_assert(kFewQueued * kFallbackSegments <= kFallbackBlocks, "all segments of few rows are served at once");
// Rows that only need near or far see candidates of few labels, and parts of those fill no tile: a block for each
// multiprocessor, if the tiles of rows are fewer.
inline constexpr std::int64_t kLabelBlocks = kFallbackBlocks / 2;

// A queued row is one int32: its number in the strip above these bits, and what it still needs.
inline constexpr int kNeedBits = 3;
enum Need : std::int32_t { kNeedSupport = 1, kNeedNear = 2, kNeedFar = 4, kNeedAll = 7 };
static_assert(kNeedAll < (1 << kNeedBits));
inline constexpr std::int64_t kLargestStrip = std::int64_t{1} << (31 - kNeedBits);

// The refinement needs this of a plan.
constexpr bool refinable(const ForwardPlan& plan) {
  return plan.K >= 1 && plan.K <= kFastNeighbours && plan.strip_rows <= kLargestStrip &&
         plan.buffer_capacity >= fallback_entries(plan.K);
}

// Rows that are screened again, in tiles of rows with one leader. Leaders of fewer rows are not worth a tile: those go
// to the fallback.
inline constexpr std::int64_t kRescreenRows = 64;
inline constexpr std::int64_t kSmallestGroup = 16;
inline constexpr std::int64_t kRescreenBuckets = 2048;  // at most so many groups
inline constexpr std::int64_t kRescreenTileBytes = 12;
constexpr std::int64_t rescreen_tile_count(std::int64_t rows) {
  return rows / kRescreenRows + std::min(kRescreenBuckets, rows / kSmallestGroup);
}
inline constexpr std::int64_t kRescreenLaunches = 3;
// A refinement leaves a row with more survivors than this to the rescreening. Rows of dense scores are not screened
// again: the fallback's tiles sum all M candidates of such a row, in the time in which a refinement sums some M / 9.
constexpr std::int64_t many_survivors(const ForwardPlan& plan, std::int64_t M) {
  const std::int64_t many = 3 * plan.K + 32;
  return plan.path == ForwardPath::kDense ? std::max(many, M / 16) : many;
}

// Identities larger than the list exist only among more candidates than it holds.
constexpr bool may_have_large_identities(std::int64_t M) {
  return M > kListedPositives;
}

// Kernels of run_screened: preparation and positives once, then for each strip
//
//   kDense           scores, refinement, fallback, merge
//   kScreen, kBank   sample, thresholds, [thresholds of large identities], scores, refinement, groups, their scores,
//                    second refinement, fallback, merge.
constexpr std::int64_t screened_launches(const ForwardPlan& plan, const Problem& problem) {
  std::int64_t per_strip = 4;
  if (plan.path != ForwardPath::kDense) {
    per_strip += 2 + (may_have_large_identities(problem.M) ? 1 : 0);
  }
  if (plan.rescreen) per_strip += kRescreenLaunches;
  return kPrepareLaunches + 1 + plan.strips * per_strip;
}

// ---- the backward ---------------------------------------------------------------------------------------------------

// Lanes that the packs of 16 bytes of a row ask for, a power of two up to a warp. The order of sums depends on them.
constexpr int lanes_of_row(std::int64_t dims, DType dtype) {
  int lanes = 1;
  while (lanes < 32 && lanes * 16 < dims * element_bytes(dtype)) lanes *= 2;
  return lanes;
}

// Whether there is a kernel for lanes of these bytes: of the gather from lists, or where blocks search, of the search.
constexpr bool gather_serves(DType dtype, int lane_bytes, int target_lanes, bool searches) {
  const bool wide = element_bytes(dtype) > 2;
  if (lane_bytes == 16) return target_lanes == 32 || (target_lanes == 16 && !searches);
  if (lane_bytes == 32) return wide && (target_lanes == 32 || (target_lanes == 16 && !searches));
  return lane_bytes == 24 && (searches ? wide && target_lanes == 32 : target_lanes == 16);
}

// The backward of small batches (backward/resident.cu): each block keeps a slice of all rows and the whole graph in
// shared memory. A row has a line that spans all banks, and its slice is 1, 2, 4 or 8 packs of 16 bytes of sums.
inline constexpr int kResidentThreads = 512;
inline constexpr std::int64_t kResidentLine = 128;
inline constexpr std::int64_t kResidentLinePacks = kResidentLine / 16;
inline constexpr std::int64_t kResidentTargets = kResidentThreads;  // with incoming edges: a thread begins their lists
inline constexpr std::int64_t kResidentRows = 0x7fff;
inline constexpr std::int64_t kResidentEdges = 0x7fff;  // places of edges are 16 bits, twice as many 17

struct ResidentShape {
  std::int64_t rows;          // of anchors, and of candidates of their own
  std::int64_t targets;       // that have incoming edges
  std::int64_t edges;         // of all anchors
  std::int64_t padded_edges;  // to whole words of bits
  std::int64_t words;         // of bits of anchors, for each target: an odd number, against bank conflicts
};
constexpr ResidentShape resident_shape(const BackwardProblem& problem) {
  ResidentShape shape{};
  shape.rows = problem.N + (problem.symmetric ? 0 : problem.M);
  shape.edges = problem.N * problem.edges;
  shape.padded_edges = round_up(shape.edges, 32);
  const bool incoming = problem.symmetric ? problem.need_anchors : problem.need_candidates;
  shape.targets = !incoming || shape.edges == 0 ? 0 : problem.symmetric ? problem.N : problem.M;
  shape.words = divide_up(problem.N, 32) | 1;
  return shape;
}
// Whether there is a kernel for slices of so many packs, of rows that so many lanes of a gather share.
constexpr bool resident_serves(const ResidentShape& shape, std::int64_t packs, std::int64_t row_lanes) {
  return shape.rows <= kResidentRows && shape.targets <= kResidentTargets && shape.edges <= kResidentEdges &&
         packs >= 1 && packs <= std::min(kResidentLinePacks, row_lanes) && (packs & (packs - 1)) == 0;
}
// Packs of a row that a thread may sum: 1, and 2 or 4 where there are as many, unless groups of lanes share a list.
constexpr bool resident_threads_serve(const BackwardPlan& plan) {
  if (plan.thread_packs == 1) return true;
  return (plan.thread_packs == 2 || plan.thread_packs == 4) && plan.thread_packs <= plan.row_packs &&
         plan.row_lanes == 32;
}
constexpr std::int64_t resident_shared_bytes(const ResidentShape& shape, std::int64_t accumulator) {
  const auto piece_bytes = [](std::int64_t bytes) { return round_up(bytes, 16); };
  return shape.rows * kResidentLine + piece_bytes(2 * shape.padded_edges * accumulator) +
         piece_bytes(2 * shape.padded_edges * 2) + piece_bytes(shape.targets * shape.words * 4) +
         piece_bytes(shape.targets * shape.words * 2) + piece_bytes(shape.targets * 4) +
         piece_bytes((2 * shape.padded_edges / 32 + 1) * 4) + 2 * piece_bytes(8);
}

// What the second-level cache keeps near of the rows that are read: one of its two partitions on an H200 is 30 MB.
inline constexpr std::int64_t kNearBytes = std::int64_t{24} << 20;

// Rows that more than one target may read at the same time. In the symmetric case these are all. Else candidates, of
// which there are no more than edges, and then anchors.
constexpr std::int64_t shared_rows(const BackwardProblem& problem) {
  if (problem.symmetric) return problem.N;
  const std::int64_t candidates = problem.need_anchors ? std::min(problem.M, problem.N * problem.edges) : 0;
  return std::max(candidates, problem.need_candidates ? problem.N : 0);
}

// The plan's slice of these.
constexpr std::int64_t slice_bytes(const BackwardPlan& plan, const BackwardProblem& problem) {
  return shared_rows(problem) * std::min<std::int64_t>(problem.D, plan.slice_elements) * element_bytes(problem.dtype);
}

}  // namespace sn::cuda
