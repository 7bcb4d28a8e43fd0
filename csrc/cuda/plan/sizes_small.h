// Sizes of the paths of one launch (direct/small.cu, direct/square.cu), for their kernels and the plan.
#pragma once

#include <algorithm>
#include <cstdint>

#include "cuda/plan/plan_types.h"
#include "cuda/plan/sizes.h"

namespace sn::cuda {

// ---- the paths of one launch ----------------------------------------------------------------------------------------

inline constexpr std::int64_t kSmallRows = 256;    // anchors, and candidates, at most
inline constexpr int kClusterGroups = 16;          // of anchors, each with blocks that share D, a cluster
inline constexpr int kSmallGroups = 32;            // without clusters
inline constexpr int kSmallWarps = 8;              // of a block
inline constexpr std::int64_t kSmallQuad = 4;      // anchors, and
inline constexpr std::int64_t kSmallColumns = 64;  // candidates that a warp takes at once
inline constexpr std::int64_t kSmallAhead = 2;     // rounds of chunks that have buffers
inline constexpr int kLargestPlanes = 8;           // slices that one block may keep
inline constexpr int kClusterBlocks = 8;           // the largest cluster that needs no opt-in
inline constexpr int kClusterMajor = 9;
// Shared memory of a block of which a multiprocessor of 228 KB holds two.
inline constexpr int kHalfSharedBytes = 113 * 1024;
inline constexpr std::int64_t kReductionBytes = 7424;  // ReductionMemory of loss.cuh

constexpr int small_planes(const ForwardPlan& plan) {
  return static_cast<int>(divide_up(plan.d_slices, plan.cluster));
}
constexpr int small_buffers(int planes, int chunks, int round) {
  return static_cast<int>(std::min<std::int64_t>(kSmallAhead, planes * chunks / round)) * round;
}
// Sums of a plane: of a group's anchors, with all candidates.
constexpr std::int64_t small_columns(std::int64_t M) {
  return round_up(M, kSmallColumns);
}
// Items of a chunk, a warp each, and rows of a buffer.
constexpr std::int64_t small_items(const ForwardPlan& plan, std::int64_t M) {
  return divide_up(plan.group_anchors, kSmallQuad) * small_columns(M) / kSmallColumns;
}
constexpr std::int64_t small_buffer_rows(const ForwardPlan& plan, std::int64_t M) {
  return round_up(plan.group_anchors, kSmallQuad) + small_columns(M);
}
// Anchors that a block finishes, at most.
constexpr std::int64_t small_finished(const ForwardPlan& plan) {
  return plan.path == ForwardPath::kCluster ? divide_up(plan.group_anchors, plan.cluster) : plan.group_anchors;
}
// Keys that a warp has room for: those it extracts, or a whole row, which it sorts.
constexpr std::int64_t small_keys(std::int64_t K, std::int64_t M) {
  return K <= kShortNeighbours ? 32 : std::max<std::int64_t>(32, direct_sort_keys(M));
}
constexpr std::int64_t small_shared_bytes(const ForwardPlan& plan, const Problem& problem) {
  const std::int64_t chunks = plan.slice_elements / kChunk;
  const std::int64_t plane = plan.group_anchors * small_columns(problem.M) * 4;
  const std::int64_t buffers = small_buffers(small_planes(plan), static_cast<int>(chunks), plan.round_chunks);
  const std::int64_t row = kChunk * element_bytes(problem.dtype) + 16;
  const std::int64_t sums = buffers * small_buffer_rows(plan, problem.M) * row + (chunks > 1 ? chunks * plane : 0);
  const std::int64_t later = small_finished(plan) * small_columns(problem.M) * 4 +
                             kSmallWarps * small_keys(plan.K, problem.M) * 8 + kReductionBytes;
  return small_planes(plan) * plane + 16 + std::max(sums, later);
}
// kTickets: of ForwardPlan::partials.
constexpr std::int64_t small_partial_bytes(const ForwardPlan& plan, const Problem& problem) {
  return divide_up(problem.N, plan.group_anchors) * plan.d_slices * plan.group_anchors * small_columns(problem.M) * 4;
}

// ---- small batches, each pair once ----------------------------------------------------------------------------------

// kSquare: the square of all rows with themselves, in tiles of kSquareSide rows a side. Of a tile above the diagonal an
// item is kSquareRows anchors against the tile's candidates. Of one on the diagonal it is each row against as many that
// follow it in a ring of the tile's rows: half of the ring makes every pair. A warp takes an item. Clusters share the
// items, the blocks of a cluster share D.
inline constexpr int kSquareCluster = 16;  // blocks, more than a cluster may have without opt-in
inline constexpr int kSquareWarps = 16;    // of a block: a cluster finishes 256 anchors at once
inline constexpr std::int64_t kSquareSide = 32;
inline constexpr std::int64_t kSquareRows = 8;
inline constexpr std::int64_t kSquarePairs = kSquareRows * kSquareSide;  // of an item
inline constexpr std::int64_t kFewSquareItems = 8;                       // a cluster of its own is not worth fewer
inline constexpr std::int64_t kSquareSides = kSmallRows / kSquareSide;
constexpr std::int64_t square_sides(std::int64_t N) {
  return divide_up(N, kSquareSide);
}
constexpr std::int64_t square_items(std::int64_t N) {
  const std::int64_t sides = square_sides(N);
  return sides * sides * (kSquareSide / kSquareRows) / 2;
}
inline constexpr std::int64_t kSquareItems = square_items(kSmallRows);
static_assert(kSquareSide / kSquareRows % 2 == 0, "a tile on the diagonal has half as many items as another");
constexpr std::int64_t square_clusters(const ForwardPlan& plan, std::int64_t N) {
  return divide_up(square_items(N), plan.cluster_items);
}

// Sides of the tile that an item is of, and which of the tile's it is.
struct SquareItem {
  std::uint8_t row;
  std::uint8_t column;
  std::uint8_t part;
};
struct SquareTable {
  SquareItem items[kSquareItems];
};
// All items. Sides form a ring, too: each has its tile on the diagonal, and those with the sides that follow it up to
// half of the ring; of the tile with the opposite side, where there is one, half. So each side has as many items, of as
// few sides, and tiles on the diagonal, whose lanes read more, are spread evenly.
constexpr SquareTable square_table(std::int64_t N) {
  const int sides = static_cast<int>(square_sides(N));
  constexpr int kParts = static_cast<int>(kSquareSide / kSquareRows);
  SquareTable table{};
  int count = 0;
  const auto add_items = [&](int row, int column, int first, int last) {
    for (int part = first; part < last; ++part) {
      table.items[count++] = {static_cast<std::uint8_t>(row), static_cast<std::uint8_t>(column),
                              static_cast<std::uint8_t>(part)};
    }
  };
  for (int side = 0; side < sides; ++side) {
    add_items(side, side, 0, kParts / 2);
    for (int step = 1; 2 * step < sides; ++step) add_items(side, (side + step) % sides, 0, kParts);
    const int opposite = sides % 2 == 0 ? (side + sides / 2) % sides : side;
    if (opposite > side) add_items(side, opposite, 0, kParts / 2);
    if (opposite < side) add_items(opposite, side, kParts / 2, kParts);
  }
  return table;
}
// Rows of a buffer: those of all sides that `share` items of a cluster have, at most.
constexpr std::int64_t square_buffer_rows(std::int64_t N, std::int64_t share) {
  const SquareTable table = square_table(N);
  std::int64_t most = 0;
  for (std::int64_t first = 0; first < square_items(N); first += share) {
    bool needed[kSquareSides] = {};
    std::int64_t rows = 0;
    for (std::int64_t item = first; item < std::min(first + share, square_items(N)); ++item) {
      for (const int side : {table.items[item].row, table.items[item].column}) {
        if (!needed[side]) rows += kSquareSide;
        needed[side] = true;
      }
    }
    most = std::max(most, rows);
  }
  return most;
}
constexpr std::int64_t square_shared_bytes(const ForwardPlan& plan, const Problem& problem) {
  const std::int64_t chunks = plan.slice_elements / kChunk;
  const std::int64_t plane = plan.cluster_items * kSquarePairs * 4;
  const std::int64_t buffers = small_buffers(small_planes(plan), static_cast<int>(chunks), plan.round_chunks);
  const std::int64_t row = kChunk * element_bytes(problem.dtype) + 16;
  const std::int64_t sums = buffers * plan.cluster_rows * row + (chunks > 1 ? chunks * plane : 0);
  const std::int64_t later = kSquareWarps * (kSmallRows * 4 + small_keys(plan.K, problem.M) * 8) + kReductionBytes;
  return small_planes(plan) * plane + 16 + std::max(sums, later);
}
// Of ForwardPlan::partials: every distance.
constexpr std::int64_t square_distance_bytes(std::int64_t N) {
  return N * round_up(N, kSquareSide) * 4;
}

}  // namespace sn::cuda
