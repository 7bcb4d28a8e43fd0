// The cost model of the paths of one launch; cost.cpp says what the model is and which record its constants are from.
#include <algorithm>
#include <cmath>

#include "cuda/plan/cost_direct.h"
#include "cuda/plan/machine.h"
#include "cuda/plan/sizes_small.h"

namespace sn::cuda {
namespace {

// One launch. Sums: a warp takes 256 pairs of a chunk, at the tiles' rate while there are two warps for a scheduler;
// one alone cannot issue faster than kSmallItem. Rows come from the L2 all the while, to every group anew. Then planes
// are shown: in a cluster, a barrier and loads from distributed shared memory; else stores, a ticket, and loads.
// Anchors, a warp each, at once: what an extracted row cost less the launch, the loads and the last ticket, then that
// ticket and the sum over anchors. Of few neighbours 3830 of 7490 cycles, as
// cost.cpp says of the selection: 0.51 of what 10 of them took. All
// counted, not measured; the parts that this kernel shares with tiles and selection were read from those. Of a ticket,
// a selection has two fences, and loads a flag before the records; here the atomic releases and acquires, and says what
// the flag does: 340 cycles less, a round trip and a barrier, of each ticket, and of the last one the flag's round trip
// and the exchange of 64-bit counts, 700 cycles, too.
constexpr double kSmallStart = kTilesStart;
constexpr double kSmallItem = 0.7;
constexpr double kSmallPairs = 256.0 / 4096.0;  // of a tile's
constexpr double kSchedulers = 4.0;             // of a multiprocessor
constexpr double kClusterShow = 0.5;
constexpr double kClusterShowSlice = 0.015;   // loads of one pair
constexpr double kFlagRead = 340.0 / 1755.0;  // that a ticket saves which says what the flag did
constexpr double kTicketShow = 2.2 - kFlagRead;
constexpr double kTicketShowRow = 0.1;  // of an anchor, 256 candidates at a time
constexpr double kSmallAnchor = 3.0;
constexpr double kSmallFew = 0.51 * (kSmallAnchor + 10.0 * 110.0 / 1755.0) - 10.0 * kShortRowRank;
constexpr double kSmallTicket = 2.4 - 1040.0 / 1755.0;
constexpr double kSmallSort = 0.006;  // K > 16: of a key, a warp's network

double small_anchor_us(const ForwardPlan& plan, const Problem& problem) {
  if (plan.K <= kShortNeighbours) return kSmallFew + real(plan.K) * kShortRowRank;
  return kSmallAnchor + kSmallSort * real(problem.M) * std::log2(real(problem.M)) + kSelectKey * real(plan.K);
}

// Sums of each pair once; all counted, not measured. An item of 8 rows and one candidate a lane takes 9 reads for 64
// multiply-adds and differences, which were 6. Each distance is written and, behind a ticket between two barriers of
// 0.3, read again. One cluster finishes all: a warp issues some 1300 of the 3830 cycles that it takes alone. Then a
// barrier stands in the place of the last ticket, without its round trip.
constexpr double kSquareItem = 73.0 / 70.0 * kSmallPairs;
constexpr double kSquareIssued = 1300.0 / 3830.0;
constexpr double kClusterBarrier = 0.3;

}  // namespace

double small_us(const ForwardPlan& plan, const Problem& problem, const Machine& machine) {
  const double planes = real(small_planes(plan));
  const double chunks = planes * real(plan.slice_elements / kChunk);
  const double here = std::min(1.0, real(problem.D) / real(kChunk));
  const double items = real(small_items(plan, problem.M)) * real(plan.round_chunks);
  const double chunk_us = real(kChunk) * kTileElement * kSmallPairs / machine.rate.ffma;
  const double half = element_bytes(problem.dtype) == 2 ? kHalfTiles : 1.0;
  const double sums = chunks / real(plan.round_chunks) * here * half * std::max(kSmallItem, items * chunk_us);
  const double bytes = chunks * real(small_buffer_rows(plan, problem.M)) * std::min(real(kChunk), real(problem.D)) *
                       real(element_bytes(problem.dtype));
  const double blocks = real(divide_up(problem.N, plan.group_anchors)) * real(plan.cluster);
  const double finished = real(small_finished(plan));
  const double turns = std::ceil(finished / real(kSmallWarps));
  const double rows = finished * real(small_columns(problem.M)) / real(kSmallRows);
  const double show = plan.path == ForwardPath::kCluster ? kClusterShow + kClusterShowSlice * real(plan.d_slices)
                                                         : kTicketShow + kTicketShowRow * rows;
  return kGap + kSmallStart + waves(blocks, machine.device) * joined(sums, bytes / kCacheBytes) + show +
         turns * small_anchor_us(plan, problem) + kSmallTicket + final_us(problem.N);
}

double square_us(const ForwardPlan& plan, const Problem& problem, const Machine& machine) {
  const double own_slices = real(small_planes(plan));
  const double chunks = real(plan.slice_elements / kChunk);
  const double half = element_bytes(problem.dtype) == 2 ? kHalfTiles : 1.0;
  const double items = real(plan.cluster_items) * chunks;  // of a slice
  const double four_us = kSchedulers * real(kChunk) * kTileElement * kSquareItem / machine.rate.ffma;
  const double turns = std::ceil(items / kSquareWarps);
  const double slice_us = std::max(turns * kSmallItem, std::ceil(items / kSchedulers) * four_us);
  const double here = std::min(1.0, real(problem.D) / real(kChunk));
  const double row = here * real(kChunk) * real(element_bytes(problem.dtype));
  const double bytes = own_slices * chunks * real(plan.cluster_rows) * row;
  const double show = kClusterShow + kClusterShowSlice * real(plan.d_slices) + kTicketShow + 2.0 * kClusterBarrier;
  const double warps = std::ceil(real(divide_up(problem.N, kSquareCluster)) / kSchedulers);  // of a scheduler
  const double select = small_anchor_us(plan, problem) * joined(1.0, warps * kSquareIssued);
  return kGap + kSmallStart + joined(own_slices * half * here * slice_us, bytes / kCacheBytes) + show + select +
         kSmallTicket - kFlagRead + final_us(problem.N);
}

}  // namespace sn::cuda
