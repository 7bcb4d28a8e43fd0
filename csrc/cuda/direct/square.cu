// A small batch in one launch where the candidates are the anchors: up to 256 rows, of which every pair is summed once.
// small.cu computes each pair twice, as each group of its blocks finishes anchors of its own without the others.
//
// 1. The square of the rows with themselves is cut into tiles of 32 x 32. Clusters share the items of those on and
//    above the diagonal (sizes_small.h), blocks of a cluster share the slices of D, as in small.cu.
// 2. What the blocks of a cluster have of a pair meets through distributed shared memory. Each finished distance goes
//    to the workspace, where both rows have a place for it: (x - z)^2 is (z - x)^2 bit for bit.
// 3. The cluster that takes the last ticket finishes all anchors, a warp an anchor. No cluster waits for another.
// 4. Its first block sums over the anchors.
//
// The sums, the keys and the arithmetic of an anchor are those of the direct path, bit for bit.
#include "cuda/direct/one_launch.cuh"
#include "cuda/launch.cuh"
#include "cuda/loss.cuh"
#include "cuda/memory.cuh"
#include "cuda/plan/sizes.h"
#include "cuda/plan/sizes_small.h"
#include "cuda/ptx.cuh"
#include "cuda/slots.h"
#include "cuda/stages.h"

namespace sn::cuda {
namespace {

// ---- traits ---------------------------------------------------------------------------------------------------------

constexpr int kThreads = kSquareWarps * kWarpSize;
[[maybe_unused]] constexpr int kSide = static_cast<int>(kSquareSide);  // rows of a side of a tile, a lane each
[[maybe_unused]] constexpr int kRows = static_cast<int>(kSquareRows);  // that a lane has in an item
[[maybe_unused]] constexpr int kPairs = static_cast<int>(kSquarePairs);
static_assert(kSquareSide == kWarpSize && kSquareSides <= 32, "a lane a row; a bit for each side of the square");
static_assert(kSquareCluster <= kWarpSize && kSquareCluster <= kMaxCluster);

// Whether the items of so many rows are those of every two sides, in either order, once.
constexpr bool items_cover(std::int64_t N) {
  const SquareTable table = square_table(N);
  std::uint32_t seen[kSquareSides][kSquareSides] = {};  // a bit a part
  for (std::int64_t item = 0; item < square_items(N); ++item) {
    const auto [row, column, part] = table.items[item];
    std::uint32_t& parts = seen[row < column ? row : column][row < column ? column : row];
    if ((parts >> part & 1u) != 0) return false;
    parts |= 1u << part;
  }
  const std::int64_t sides = square_sides(N);
  for (std::int64_t row = 0; row < sides; ++row) {
    for (std::int64_t column = row; column < sides; ++column) {
      if (seen[row][column] != (row == column ? 3u : 15u)) return false;
    }
  }
  return true;
}
static_assert(kSquareSide / kSquareRows == 4 && items_cover(kSmallRows) && items_cover(kSmallRows - kSquareSide) &&
              items_cover(kSquareSide) && items_cover(2 * kSquareSide) && items_cover(5 * kSquareSide));

struct Slot {
  std::uint32_t ticket;  // clusters that have shown their distances
  std::uint32_t reserved[31];
};
static_assert(sizeof(Slot) == 128, "whole lines of the cache");

[[maybe_unused]] __device__ Slot gSlots[kSlots];  // unused where there are no clusters

// What a cluster's ticket says to its blocks.
[[maybe_unused]] constexpr std::uint32_t kLast = 1;
[[maybe_unused]] constexpr std::uint32_t kNonfinite = 2;

using A = float;  // sums of half inputs, too

struct SquareArgs {
  OneLaunchArgs launch;
  int items;      // of a cluster, at most
  int all;        // of all clusters
  int rows;       // of a buffer, at most
  int pitch;      // of gDistances
  A* gDistances;  // [N][pitch]
  SquareTable table;
};

// ---- kernel ---------------------------------------------------------------------------------------------------------

// The pairs of a cluster. A buffer has the rows of the sides that its tiles have, in their order.
template <class Element>
struct SquarePairs {
  using T = Element;
  static constexpr int kPitch = kSlicePitch<T>;

  const SquareArgs& square;
  TileRows<T> x;
  int first_item;
  int count;            // of items
  std::uint32_t sides;  // a bit for each that is needed

  __device__ __forceinline__ int rows() const { return popcount(sides) * kSide; }
  __device__ __forceinline__ int items() const { return count; }
  __device__ __forceinline__ int plane() const { return count * kPairs; }
  __device__ __forceinline__ bool has(int row) const { return x.has(number(row)); }
  __device__ __forceinline__ const T* at(int row) const { return x.at(number(row)); }
  __device__ __forceinline__ const T* first() const { return x.gFirst; }

  // The anchor in a row of a buffer, and the row of a buffer in which a side begins.
  __device__ __forceinline__ int number(int row) const {
    std::uint32_t left = sides;
    for (int before = row / kSide; before > 0; --before) left &= left - 1;
    return find_first(left) * kSide + row % kSide;
  }
  __device__ __forceinline__ int row_of(int side) const { return popcount(sides & ((1u << side) - 1u)) * kSide; }

  __device__ __forceinline__ const SquareItem& item_of(int item) const { return square.table.items[first_item + item]; }

  // A lane has a candidate, and eight anchors of its tile: the same as all lanes, or those that follow it in the ring.
  // sSums [items][candidates][anchors]. (tile.cuh says why sums tell what is not finite: every row meets another, if
  // only one of zeros.)
  __device__ __forceinline__ bool sum_item(const Shared<T>& sBuffer, int item, int here, const Shared<A>& sSums) const {
    const SquareItem& place = item_of(item);
    const Shared<T> sX = sBuffer.offset(row_of(place.row) * kPitch);
    const Shared<T> sZ = sBuffer.offset((row_of(place.column) + lane_id()) * kPitch);
    A rSums[kRows][1] = {};
    if (place.row != place.column) {
      add_rows<2>(sX.offset(place.part * kRows * kPitch), kPitch, sZ, 0, here, rSums);
    } else {
      add_ring(sX, place.part, sZ, here, rSums);
    }
    bool finite = true;
    constexpr int kPack = Pack<A>::kElements;
    static_assert(kRows % kPack == 0);
#pragma unroll
    for (int first = 0; first < kRows; first += kPack) {
      Pack<A> rPack;
#pragma unroll
      for (int i = 0; i < kPack; ++i) {
        rPack.elements[i] = rSums[first + i][0];
        finite = finite && is_finite(rSums[first + i][0]);
      }
      sSums.set_pack(item * kPairs + lane_id() * kRows + first, rPack);
    }
    return !finite && !elements_finite<kSide, 1>(sX, sZ, 0, here);
  }

  __device__ __forceinline__ static int in_ring(int lane, int part, int i) {
    return (lane + 1 + part * kRows + i) % kSide;
  }
  // As add_rows, of anchors in the ring.
  __device__ __forceinline__ static void add_ring(const Shared<T>& sX, int part, const Shared<T>& sZ, int here,
                                                  A (&rSums)[kRows][1]) {
    constexpr int kFew = kFewElements<T>;
    int rBegins[kRows];
#pragma unroll
    for (int i = 0; i < kRows; ++i) rBegins[i] = in_ring(lane_id(), part, i) * kPitch;
#pragma unroll 2
    for (int at = 0; at < here; at += kFew) {
      A rZ[kFew];
      read_few(sZ, at, rZ);
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        A rX[kFew];
        read_few(sX, rBegins[i] + at, rX);
#pragma unroll
        for (int e = 0; e < kFew; ++e) rSums[i][0] = chunk_sum_step(rSums[i][0], rX[e], rZ[e]);
      }
    }
  }
};

template <class T>
__device__ __forceinline__ SquarePairs<T> pairs_of(const SquareArgs& square, int cluster) {
  const FeatureView& rows = square.launch.forward.anchors;
  const int first = cluster * square.items;
  const int count = square.all - first < square.items ? square.all - first : square.items;
  std::uint32_t sides = 0;
  for (int item = first; item < first + count; ++item) {
    sides |= 1u << square.table.items[item].row | 1u << square.table.items[item].column;
  }
  return {.square = square,
          .x = {static_cast<const T*>(rows.data), rows.row_stride, rows.rows},
          .first_item = first,
          .count = count,
          .sides = sides};
}

// This block's share of the cluster's distances.
template <class T>
__device__ __forceinline__ void show_distances(const SquarePairs<T>& pairs, int rank, const Shared<A>& sPlanes) {
  const SquareArgs& square = pairs.square;
  const OneLaunchArgs& args = square.launch;
  const int N = static_cast<int>(args.forward.anchors.rows);
  for (int at = rank * kThreads + thread_id(); at < pairs.plane(); at += args.blocks * kThreads) {
    const SquareItem& place = pairs.item_of(at / kPairs);
    const int lane = at / kRows % kSide;
    const bool ring = place.row == place.column;
    const int row = ring ? pairs.in_ring(lane, place.part, at % kRows) : place.part * kRows + at % kRows;
    // Opposite in a ring are two rows, each of which has the other.
    if (ring && row == lane - kSide / 2) continue;
    const int i = place.row * kSide + row;
    const int j = place.column * kSide + lane;
    if (i >= N || j >= N) continue;
    const RemoteSlices<A> slices{sPlanes, at, pairs.plane(), args.blocks_shift};
    const A d2 = combine_slices<A>(slices, args.slices, args.tree);
    atomic_store(square.gDistances + i * square.pitch + j, d2);
    atomic_store(square.gDistances + j * square.pitch + i, d2);
  }
}

// take_last_ticket for a cluster, with what its blocks saw in sFlags(0). Returns kLast in all of its blocks if its
// ticket is the last, and then kNonfinite if any cluster saw such. The first block is read until all others have this.
// (A template, as RemoteSlices is.)
template <class Flags>
__device__ __forceinline__ std::uint32_t take_cluster_ticket(std::uint32_t* gTicket, const OneLaunchArgs& args,
                                                             int rank, const Flags& sFlags) {
  bool nonfinite = false;
  if (rank == 0 && warp_id() == 0) {
    nonfinite = any_lane(lane_id() < args.blocks && sFlags.get_remote(0, lane_id()) != 0);
  }
  sync_cluster();
  if (rank == 0 && thread_id() == 0) {
    const std::uint32_t mine = ticket_of(nonfinite);
    const std::uint32_t taken = atomic_add_acq_rel(gTicket, mine) + mine;
    const bool last = last_of(taken, static_cast<int>(block_count()) / args.blocks);
    if (last) atomic_store(gTicket, 0u);
    sFlags.set(1, (last ? kLast : 0u) | (poisoned(taken) ? kNonfinite : 0u));
  }
  sync_cluster();
  return sFlags.get_remote(1, 0);
}

template <class T>
__device__ __forceinline__ void square_block(const SquareArgs& square) {
  const OneLaunchArgs& args = square.launch;
  const ForwardArgs& forward = args.forward;
  const int N = static_cast<int>(forward.anchors.rows);
  const int rank = static_cast<int>(block_id()) % args.blocks;
  const SquarePairs<T> pairs = pairs_of<T>(square, static_cast<int>(block_id()) / args.blocks);
  const SliceSums<SquarePairs<T>, kSquareWarps> sums(args, pairs, rank);

  SharedArena arena;
  const Shared<A> sPlanes = arena.take<A>(args.planes * square.items * kPairs);
  const Shared<std::uint32_t> sFlags = arena.take<std::uint32_t>(2);  // what is not finite; what the ticket said
  SharedArena later = arena;  // what lies where buffers are, once these are done with
  const Shared<T> sBuffers = arena.take<T>(args.buffers * square.rows * SquarePairs<T>::kPitch);
  const Shared<A> sChunks = arena.take<A>(args.chunks > 1 ? args.chunks * square.items * kPairs : 0);
  const Shared<A> sRow = later.take<A>(kSquareWarps * kSmallRows).offset(warp_id() * kSmallRows);
  const Shared<Key<A>> sKeys = later.take<Key<A>>(kSquareWarps * args.keys).offset(warp_id() * args.keys);
  const ReductionMemory reduction(later);

  if (thread_id() < 2) sFlags.set(thread_id(), 0u);
  // The anchors that this warp finishes if its cluster is the last.
  const int own = rank + args.blocks * warp_id();
  const int step = args.blocks * kSquareWarps;
  std::uint32_t rPositive = 0;  // of the first

  // 1. Planes of this block's slices.
  const bool nonfinite = sums.sum_slices(sBuffers, sChunks, sPlanes, [&] {
    let_dependents_start();
    if (own < N) rPositive = positives_of<kPerLane>(forward, own, self_of(forward, own));
  });
  if (any_lane(nonfinite) && lane_id() == 0) sFlags.atomic_or(0, 1u);
  sync_cluster();

  // 2. Distances, and then a ticket of the cluster.
  show_distances(pairs, rank, sPlanes);
  const std::uint32_t said = take_cluster_ticket(&gSlots[args.slot].ticket, args, rank, sFlags);
  if ((said & kLast) == 0) {
    arrive_cluster_relaxed();
    wait_cluster();  // others may still read what the first block's ticket said
    return;
  }

  // 3. A warp an anchor.
  for (int anchor = own; anchor < N; anchor += step) {
    A rRow[kPerLane];
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      const int j = i * kWarpSize + lane_id();
      rRow[i] = j < N && j != anchor ? atomic_load(square.gDistances + anchor * square.pitch + j) : A(0);
    }
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) sRow.set(i * kWarpSize + lane_id(), rRow[i]);
    if (anchor != own) rPositive = positives_of<kPerLane>(forward, anchor, self_of(forward, anchor));
    sync_warp();
    const AnchorRecord record = select_anchor(args, anchor, rPositive, sRow, sKeys);
    if (lane_id() == 0) args.gRecords[anchor] = record;
    sync_warp();  // the next anchor's row and keys overwrite this one's
  }

  // 4. All anchors.
  sync_cluster();
  if (rank != 0) return;
  static_assert(kSmallRows <= 0xffff, "32 bits hold all counts");
  final_reduction<A, std::uint32_t>(forward, GlobalRecords{args.gRecords}, (said & kNonfinite) != 0, reduction);
}

template <class T>
__global__ void __launch_bounds__(kThreads, 1) square_kernel(const __grid_constant__ SquareArgs args) {
  if constexpr (kHasClusters) {
    square_block<T>(args);
  } else {
    sync_cluster();  // a trap: nothing launches it where there are no clusters, so it need not be compiled there
  }
}

// ---- launch ---------------------------------------------------------------------------------------------------------

template <class T>
cudaError_t launch_square(const ForwardArgs& args, const ForwardPlan& plan, char* workspace, int slot,
                          cudaStream_t stream) {
  const std::int64_t N = args.anchors.rows;
  const SquareArgs square{
      .launch = one_launch_args(args, plan, workspace, slot),
      .items = plan.cluster_items,
      .all = static_cast<int>(square_items(N)),
      .rows = plan.cluster_rows,
      .pitch = static_cast<int>(round_up(N, kSquareSide)),
      .gDistances = piece<A>(workspace, plan.partials),
      .table = square_table(N),
  };
  const Problem problem{.N = N, .M = N, .D = args.dims, .k = args.options.k, .dtype = args.dtype};
  const LaunchShape shape{square_clusters(plan, N) * plan.cluster, kThreads,
                          static_cast<int>(square_shared_bytes(plan, problem)), plan.cluster};
  return launch(square_kernel<T>, shape, stream, square);
}

}  // namespace

// ---- dispatch -------------------------------------------------------------------------------------------------------

cudaError_t enqueue_square(const ForwardArgs& args, const ForwardPlan& plan, char* workspace, int slot,
                           cudaStream_t stream) {
  const std::int64_t N = args.anchors.rows;
  if (!args.symmetric || N <= 0 || N > kSmallRows || slot < 0 || slot >= kSlots || plan.cluster != kSquareCluster ||
      plan.slice_elements > kLargestSlice || small_planes(plan) > kLargestPlanes ||
      square_clusters(plan, N) > kMostTickets) {
    return cudaErrorInvalidValue;
  }
  return for_narrow_type(args.dtype, [&]<class T>() { return launch_square<T>(args, plan, workspace, slot, stream); });
}

#if defined(SN_SIMT)
bool square_slots_are_zero() {
  return zero_for_the_next(gSlots, sizeof(gSlots));
}
#else  // the host harness has no device
int wide_clusters(int shared_bytes) {
  const LaunchShape shape{kSquareCluster, kThreads, shared_bytes, kSquareCluster};
  return std::min({active_clusters(square_kernel<float>, shape), active_clusters(square_kernel<Half>, shape),
                   active_clusters(square_kernel<BFloat16>, shape)});
}
#endif

}  // namespace sn::cuda
