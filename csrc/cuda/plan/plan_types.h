// What a plan is made of: facts of the device, the problem, and the kernels, tiles, launches and workspace that serve
// it. Kernels know these types; how a plan is chosen they do not know.
#pragma once

#include <cstdint>

#include "sn_types.h"

namespace sn::cuda {

// What the plan needs to know of a device.
struct DeviceFacts {
  int major = 9;
  int minor = 0;
  int multiprocessors = 132;
  int shared_bytes = 232448;  // a block may use at most, opted in
  // Clusters of kCluster's kernel that the device really holds (cluster_limits in stages.h): fewer than its
  // architecture allows where parts of it are switched off or given to others. 0: none.
  int largest_cluster = 8;     // blocks
  int cluster_bytes = 232448;  // of shared memory that each block of the largest may have
  int wide_clusters = 8;       // of kSquare's kernel, each of kSquareCluster blocks, that are held at once. 0: none
};

// The one summation order (direct_sum.cuh derives it) cuts D into chunks, and chunks into sections.
inline constexpr int kChunk = 64;          // elements added one after the other
inline constexpr int kSectionChunks = 32;  // chunks added as a tree
inline constexpr int kSection = kChunk * kSectionChunks;

// How the neighbours are found. Every path that can serve a problem selects the same neighbours in the same order.
enum class ForwardPath : std::int32_t {
  kAuto = 0,     // only asked for, never planned
  kCluster = 1,  // direct sums of a small batch in one launch, of thread-block clusters
  kDirect = 2,   // tiles of direct sums, then selection: any type, any K
  kDense = 3,    // tensor-core scores of every pair in a scratch of at most 2^22 entries (or a strip of rows), refined
  kScreen = 4,   // thresholds from a sample, tensor-core screening into candidate buffers, refined
  kBank = 5,     // kScreen for few anchors and many fp32 candidates, which are converted as they are read, once
  kTickets = 6,  // kCluster without clusters: blocks show each other their sums in the workspace
  kSquare =
      7  // kCluster where the candidates are the anchors: clusters sum each pair once, and show each other distances
};

struct Problem {
  std::int64_t N = 0;
  std::int64_t M = 0;
  std::int64_t D = 0;
  std::int64_t k = 1;
  DType dtype = DType::kFloat32;
  bool symmetric = true;  // the candidates are the anchors
  bool aligned = true;    // rows of both matrices start at multiples of 16 bytes
};

// A piece of the workspace: offset in bytes, a multiple of kWorkspaceAlignment. Pieces of size 0 are absent.
struct Piece {
  std::int64_t offset = 0;
  std::int64_t bytes = 0;
};
inline constexpr std::int64_t kWorkspaceAlignment = 256;
template <typename T>
T* piece(char* workspace, const Piece& place) {
  return reinterpret_cast<T*>(workspace + place.offset);
}

// Per anchor, between selection and the sum over anchors.
struct AnchorRecord {
  double loss;
  double positive_sum;
  double negative_sum;
  std::int32_t positives;
  std::int32_t negatives;
  std::int32_t support_positives;
  std::int32_t flags;  // bit 0: valid, bit 1: its nearest neighbour is a positive
};

// The sum over anchors is fixed by N alone: partial p adds the records p, p + kPartials, ... in order, then the
// partials meet in a tree of halves. Counts are integers, which any order adds up to the same.
inline constexpr int kPartials = 256;
struct PartialRecord {
  static constexpr int kSums = 3;
  static constexpr int kCounts = 5;
  double sums[kSums];             // loss, d over positives, d over negatives
  std::uint64_t counts[kCounts];  // positives, negatives, positives in support sets, valid, nearest is positive
};

// Counters and facts of one call that kernels pass to each other. The first kernel of a path zeroes them.
struct Control {
  std::uint32_t nonfinite;         // 1: a value of the input is NaN or Inf
  std::uint32_t ticket;            // blocks that have finished: the last one knows itself by it
  std::uint32_t queued;            // rows waiting for the fallback
  std::uint32_t unscreenable;      // 1: the input's scale defeats the screening, every row goes to the fallback
  std::uint32_t largest;           // bits of the largest finite |x - mean| of the rows that give the scale
  std::int32_t exponent;           // the cast is fp16(v * 2^exponent)
  std::uint32_t refined;           // statistics for tests and tuning: exact sums made by the refinement
  std::uint32_t fallen_back;       // rows that the fallback served
  std::uint32_t large_identities;  // 1: some anchor may have more positives than are listed
  std::uint32_t last_null;         // null rows (bound.cuh) with a larger index are in no support set
  std::uint32_t waiting;           // rows that are refined again
  std::uint32_t rescreen_tiles;    // tiles of rows that are screened again
  std::uint32_t rescreened;        // statistics: rows of them
  std::uint32_t certified;         // and those whose support set this decided
  std::uint32_t slices_summed;     // statistics: slices of the fallback's tiles (direct_sum.cuh)
  std::uint32_t reserved;
};
static_assert(sizeof(Control) == 64);

// At most this many positives of an anchor are listed and summed exactly. For larger identities a sample bounds the
// farthest, and the screening finds it.
inline constexpr std::int64_t kListedPositives = 128;
inline constexpr std::int64_t kPositiveEntries = kListedPositives + 1;  // of a list: one may be the anchor's own row
inline constexpr std::int64_t kFastNeighbours = 128;                    // larger K takes the direct path
inline constexpr std::int64_t kFallbackSegments = 16;  // buffers hold at least this many lists of K keys

// How the direct path selects from a row (sizes.h, direct/select.cuh).
enum class Selection : std::int32_t {
  kExtracted = 0,  // the least key, K times
  kBounded = 1,    // lists sort what a bound leaves
  kWhole = 2,      // lists sort the row
  kSearched = 3    // a radix search finds K keys, which are sorted
};

struct ForwardPlan {
  ForwardPath path = ForwardPath::kDirect;
  std::int64_t K = 0;
  std::int64_t strip_rows = 0;  // anchors served at once
  std::int64_t strips = 0;
  std::int64_t launches = 0;  // kernels enqueued
  std::int64_t workspace_bytes = 0;

  // direct, cluster, tickets, square
  std::int64_t d_slices = 1;  // D is cut into so many aligned slices of slice_elements (the last may be shorter)
  std::int64_t slice_elements = 0;
  bool triangular = false;  // of a strip's rows with themselves half of the tiles serve both triangles

  // cluster, tickets, square
  int group_anchors = 1;  // of one group of blocks, at most
  int cluster = 1;        // blocks of a group; of clusters: a power of two
  int round_chunks = 1;   // chunks of a slice that a block sums at once
  int cluster_items = 1;  // square: of a cluster, at most (sizes_small.h)
  int cluster_rows = 0;   // square: of a buffer

  // dense, screen, bank
  std::int64_t padded_dims = 0;  // D of the cast copy, a multiple of 64
  bool cast_anchors = false;     // false: the half-precision input serves in place
  bool cast_candidates = false;
  std::int64_t sample_columns = 0;   // candidates whose scores give the thresholds (kDense: M)
  std::int64_t sample_stride = 1;    // column c is candidate c * sample_stride
  std::int64_t sample_group = 1;     // columns of which one bound is kept, kLaneGroup or kQuadGroup; 1: every score
  std::int64_t buffer_capacity = 0;  // entries a row
  std::int64_t far_capacity = 0;
  int score_tile = 0;                  // columns of a block's tile of scores: 64 (x 64), 128 (x 128), 256 (x 128)
  int sample_tile = 0;                 // of the sample's: 64 or 128
  std::int64_t positive_anchors = 0;   // of a block that looks for positives, a power of two
  std::int64_t positive_segments = 0;  // of candidates, a block each

  int select_threads = 0;                       // direct: of a block that selects, unless it extracts
  Selection selection = Selection::kExtracted;  // direct
  bool shared_reduction = false;  // every partial of the sum over anchors is a block's; else one block sums alone

  Piece control;      // Control
  Piece flags;        // direct: uint32 per block of the tile kernel
  Piece records;      // AnchorRecord [N]
  Piece partials;     // direct: acc [d_slices][strip_rows][M]; tickets: planes, as small.cu has them; square: distances
  Piece sort_keys;    // direct: rows of keys too many for shared memory
  Piece mean;         // float [padded_dims]
  Piece anchor_cast;  // half [N][padded_dims]
  Piece candidate_cast;   // half [M][padded_dims]
  Piece anchor_facts;     // float [6][N]: n, rho, T, u, G, g2
  Piece candidate_facts;  // float [2][M]: n, rho
  Piece positive_leader;  // int32 [N]: the anchor that keeps the list of this one's identity
  Piece positive_count;   // int32 [N], of leaders: candidates with the label
  Piece positive_list;    // int32 [N][kPositiveEntries], of leaders
  Piece counts;           // uint32 [2][strip_rows]: entries in the buffer, in the far buffer
  // uint64 [strip_rows][buffer_capacity]; what the sample leaves, float [strip_rows][sample_columns or
  // sample_groups()], lies in the same place.
  Piece buffer;
  Piece far_buffer;       // uint64 [strip_rows][far_capacity]
  Piece queue;            // int32 [strip_rows]
  Piece partial_records;  // PartialRecord [kPartials], with shared_reduction

  // screen, bank: undecided rows are screened again (rescreen/rescreen.cuh)
  bool rescreen = false;
  Piece waiting;         // int32 [3][strip_rows]: entries of the queue, their leaders, rows by leader
  Piece rescreen_tiles;  // RescreenTile [rescreen_tile_count(strip_rows)]

  bool thin_sample = false;   // screen, bank: of few anchors, as thin as their buffers allow
  std::int64_t few_rows = 0;  // screen: a warp refines a row where a strip has more rows than this, else several do
};

// How the backward finds a target's edges. The gradients do not depend on it, bit for bit.
enum class Partition : std::int32_t {
  kAuto = 0,     // as is cheapest
  kNever = 1,    // each block searches the graph
  kAlways = 2,   // edges are first put in buckets of targets
  kResident = 3  // each block has all rows and edges in shared memory, where they fit, else as is cheapest
};

struct BackwardProblem {
  std::int64_t N = 0;
  std::int64_t M = 0;
  std::int64_t D = 0;
  std::int64_t edges = 0;  // K + 2
  DType dtype = DType::kFloat32;
  bool symmetric = true;
  bool need_anchors = true;
  bool need_candidates = false;
  Partition partition = Partition::kAuto;
};

// Warps of a block of the backward's gather, which serve a target each, or two.
inline constexpr std::int64_t kBackwardGroup = 8;
// Own edges that the backward lists beside a chunk of incoming ones. An anchor with more has none merged.
inline constexpr std::int64_t kMergedSlots = 32;
// Edges of a call, all anchors together: positions of edges are 32 bits.
inline constexpr std::int64_t kMostEdges = 0xffffffff;

struct BackwardPlan {
  std::int64_t launches = 0;
  std::int64_t workspace_bytes = 0;
  std::int64_t slice_elements = 0;  // elements of D that a block works on
  std::int64_t slices = 0;
  int lane_bytes = 16;       // of one row's slice, of a lane: 16, 24 or 32, as gather_serves says
  int target_lanes = 32;     // lanes that sum a target: a warp, or half of one
  int row_lanes = 32;        // of these, that share a row of the slice; groups of them take every so many edges
  bool resident = false;     // each block has a slice of all rows and the whole graph in shared memory
  int row_packs = 0;         // resident: of 16 bytes of sums, of a slice
  int thread_packs = 1;      // resident: of these, that a thread sums: 1, 2 or 4
  bool dependent = false;    // resident: blocks may start before the kernel ahead in the stream has ended
  bool searches = false;     // blocks look for incoming edges in the whole graph
  bool partitioned = false;  // edges are first put in buckets of targets, in their order, and listed by target
  int bucket_shift = 0;      // target >> bucket_shift is its bucket
  std::int64_t buckets = 0;
  std::int64_t parts = 0;       // warps that share the edges out
  std::int64_t part_edges = 0;  // consecutive edges of one part

  Piece histogram;              // uint32 [buckets][parts]: edges, then edges of earlier parts
  Piece totals;                 // uint32 [buckets]
  Piece begins;                 // uint32 [buckets + 1]
  Piece placed_targets;         // int32 [N * edges], bucket by bucket
  Piece placed_sources;         // int32 [N * edges]
  Piece placed_weights;         // acc [N * edges]
  Piece list_begins;            // uint32 [targets + 1]
  Piece list_rests;             // uint32 [targets]
  Piece list_sources;           // int32 [N * edges + targets * listed_own], target by target
  Piece list_weights;           // acc, of these
  std::int64_t listed_own = 0;  // own edges of a target that its list has room for: all, where edges are merged, or 0
};

}  // namespace sn::cuda
