// A small batch in one launch: up to 256 anchors and 256 candidates. Groups of blocks share the anchors; the blocks of
// a group share the slices of D: block r sums slices r, r + B, ... of its group's anchors against all candidates, B the
// blocks of a group. What a block has of a slice, a plane of sums, it shows the others, of which then each finishes
// some anchors, a warp an anchor.
//
// There are two ways to show it. kCluster: a group is a thread-block cluster, planes stay in shared memory, and block r
// finishes anchors r, r + B, ... of the group. kTickets: planes go to the workspace, and the block of a group that
// takes the last ticket finishes all its anchors. Either way the block that takes the last ticket of all sums over the
// anchors at the end.
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

constexpr int kThreads = kSmallWarps * kWarpSize;
constexpr int kQuad = static_cast<int>(kSmallQuad);        // anchors of a warp's item
constexpr int kColumns = static_cast<int>(kSmallColumns);  // candidates of it
constexpr int kOwn = kColumns / kWarpSize;                 // of a lane

// Tickets of one launch.
struct Slot {
  std::uint32_t ticket;                // that have finished
  std::uint32_t groups[kSmallGroups];  // of a group, that have shown their planes
  std::uint32_t reserved[31];
};
static_assert(sizeof(Slot) == 256, "whole lines of the cache");

__device__ Slot gSlots[kSlots];

using A = float;  // sums of half inputs, too

struct SmallArgs {
  OneLaunchArgs launch;
  int anchors;  // of a group, at most
  A* gPlanes;   // kTickets: [groups][slices][anchors][padded candidates]
};

// ---- kernel ---------------------------------------------------------------------------------------------------------

// Slice s is plane s of the group's in the workspace, which other blocks have written.
struct ShownSlices {
  const A* gNext;
  int plane;
  __device__ __forceinline__ A next(bool present) {
    const A value = present ? atomic_load(gNext) : A(0);
    gNext += plane;
    return value;
  }
};

// The pairs of a group: its anchors against all candidates.
template <class Element>
struct GroupPairs {
  using T = Element;
  static constexpr int kPitch = kSlicePitch<T>;

  TileRows<T> x;  // anchors of the group
  TileRows<T> z;  // all candidates
  int anchors;    // with room
  int quads;      // rows of the anchors in a buffer, by four
  int columns;    // rows of the candidates, a multiple of kColumns

  __device__ __forceinline__ int rows() const { return quads * kQuad + columns; }
  __device__ __forceinline__ int items() const { return quads * (columns / kColumns); }
  __device__ __forceinline__ int plane() const { return anchors * columns; }
  __device__ __forceinline__ bool has(int row) const {
    return row < quads * kQuad ? x.has(row) : z.has(row - quads * kQuad);
  }
  __device__ __forceinline__ const T* at(int row) const {
    return row < quads * kQuad ? x.at(row) : z.at(row - quads * kQuad);
  }
  __device__ __forceinline__ const T* first() const { return z.gFirst; }

  // Four anchors against 64 candidates; sSums [anchors][columns]. (tile.cuh says why sums tell what is not finite.)
  __device__ __forceinline__ bool sum_item(const Shared<T>& sBuffer, int item, int here, const Shared<A>& sSums) const {
    const int quad = item % quads;
    const int first = item / quads * kColumns + lane_id();
    const Shared<T> sX = sBuffer.offset(quad * kQuad * kPitch);
    const Shared<T> sZ = sBuffer.offset((quads * kQuad + first) * kPitch);
    A rSums[kQuad][kOwn] = {};
    add_rows<2>(sX, kPitch, sZ, kWarpSize * kPitch, here, rSums);
    bool finite = true;
#pragma unroll
    for (int i = 0; i < kQuad; ++i) {
#pragma unroll
      for (int j = 0; j < kOwn; ++j) {
        finite = finite && is_finite(rSums[i][j]);
        if (quad * kQuad + i < anchors) {
          sSums.set((quad * kQuad + i) * columns + first + j * kWarpSize, rSums[i][j]);
        }
      }
    }
    return !finite && !elements_finite<kQuad, kOwn>(sX, sZ, kWarpSize * kPitch, here);
  }
};

template <class T, bool kCluster>
__device__ __forceinline__ void small_block(const SmallArgs& small) {
  const OneLaunchArgs& args = small.launch;
  const ForwardArgs& forward = args.forward;
  const int blocks = args.blocks;
  const std::int64_t N = forward.anchors.rows;
  const int M = static_cast<int>(forward.candidates.rows);
  const int group = static_cast<int>(block_id()) / blocks;
  const std::int64_t first_anchor = static_cast<std::int64_t>(group) * small.anchors;
  const int anchors = static_cast<int>(N - first_anchor < small.anchors ? N - first_anchor : small.anchors);
  const int rank = static_cast<int>(block_id()) % blocks;
  const GroupPairs<T> pairs{
      .x = {static_cast<const T*>(forward.anchors.data) + first_anchor * forward.anchors.row_stride,
            forward.anchors.row_stride, anchors},
      .z = {static_cast<const T*>(forward.candidates.data), forward.candidates.row_stride, M},
      .anchors = small.anchors,
      .quads = (small.anchors + kQuad - 1) / kQuad,
      .columns = (M + kColumns - 1) / kColumns * kColumns};
  const SliceSums<GroupPairs<T>, kSmallWarps> sums(args, pairs, rank);
  Slot* gSlot = gSlots + args.slot;

  SharedArena arena;
  const Shared<A> sPlanes = arena.take<A>(args.planes * pairs.plane());
  const Shared<std::uint32_t> sFlags = arena.take<std::uint32_t>(3);  // not finite, last of the group, last of all
  SharedArena later = arena;  // what lies where buffers are, once these are done with
  const Shared<T> sBuffers = arena.take<T>(args.buffers * pairs.rows() * GroupPairs<T>::kPitch);
  const Shared<A> sChunks = arena.take<A>(args.chunks > 1 ? args.chunks * pairs.plane() : 0);
  const int finished = kCluster ? (small.anchors + blocks - 1) / blocks : small.anchors;  // by a block, at most
  const Shared<A> sRows = later.take<A>(finished * pairs.columns);
  const Shared<Key<A>> sKeys = later.take<Key<A>>(kSmallWarps * args.keys);
  const ReductionMemory reduction(later);

  if (thread_id() < 3) sFlags.set(thread_id(), 0u);
  // The anchors that this block finishes: `mine` of them, from `own` on, `step` apart.
  const int own = kCluster ? rank : 0;
  const int step = kCluster ? blocks : 1;
  const int mine = own < anchors ? (anchors - own + step - 1) / step : 0;
  std::uint32_t rPositive = 0;  // of the warp's first anchor

  // 1. Planes of this block's slices.
  const bool nonfinite = sums.sum_slices(sBuffers, sChunks, sPlanes, [&] {
    let_dependents_start();
    if (!kCluster || warp_id() >= mine) return;
    const std::int64_t anchor = first_anchor + own + warp_id() * step;
    rPositive = positives_of<kPerLane>(forward, anchor, self_of(forward, anchor));
  });
  if (any_lane(nonfinite) && lane_id() == 0) sFlags.atomic_or(0, 1u);

  // 2. Rows of the anchors that it finishes.
  if constexpr (kCluster) {
    sync_cluster();
  } else {
    A* gPlanes = small.gPlanes + static_cast<std::int64_t>(group) * args.slices * pairs.plane();
    const int own_slices = (args.slices - rank + blocks - 1) / blocks;
    for (int slice = 0; slice < own_slices; ++slice) {
      A* gPlane = gPlanes + (rank + slice * blocks) * pairs.plane();
      for (int at = thread_id(); at < pairs.plane(); at += kThreads) {
        atomic_store(gPlane + at, sPlanes.get(slice * pairs.plane() + at));
      }
    }
    if (!take_last_ticket(gSlot->groups + group, blocks, sFlags, sFlags.offset(1))) return;
  }
  for (int at = thread_id(); at < mine * pairs.columns; at += kThreads) {
    const int anchor = own + at / pairs.columns * step;
    const int j = at % pairs.columns;
    if (j >= M) continue;
    const int place = anchor * pairs.columns + j;
    if constexpr (kCluster) {
      const RemoteSlices<A> slices{sPlanes, place, pairs.plane(), args.blocks_shift};
      sRows.set(at, combine_slices<A>(slices, args.slices, args.tree));
    } else {
      const A* gFirst = small.gPlanes + static_cast<std::int64_t>(group) * args.slices * pairs.plane() + place;
      sRows.set(at, combine_slices<A>(ShownSlices{gFirst, pairs.plane()}, args.slices, args.tree));
    }
  }
  sync_block();
  if constexpr (kCluster) arrive_cluster_relaxed();  // other blocks' planes have been read

  // 3. A warp an anchor.
  for (int slot = warp_id(); slot < mine; slot += kSmallWarps) {
    const std::int64_t anchor = first_anchor + own + slot * step;
    if (!kCluster || slot >= kSmallWarps) {
      rPositive = positives_of<kPerLane>(forward, anchor, self_of(forward, anchor));
    }
    const AnchorRecord record =
        select_anchor(args, anchor, rPositive, sRows.offset(slot * pairs.columns), sKeys.offset(warp_id() * args.keys));
    if (lane_id() == 0) args.gRecords[anchor] = record;
    sync_warp();  // the next anchor's keys overwrite this one's
  }

  // 4. All anchors, by the block that finishes last.
  const int tickets = static_cast<int>(block_count()) / (kCluster ? 1 : blocks);
  if (take_last_ticket(&gSlot->ticket, tickets, sFlags, sFlags.offset(2))) {
    static_assert(kSmallRows <= 0xffff, "32 bits hold all counts");
    final_reduction<A, std::uint32_t>(forward, GlobalRecords{args.gRecords}, sFlags.get(0) != 0, reduction);
  }
  if constexpr (kCluster) wait_cluster();  // others may still read this block's planes until all have arrived
}

template <class T, bool kCluster>
__global__ void __launch_bounds__(kThreads, 1) small_kernel(const __grid_constant__ SmallArgs args) {
  if constexpr (!kCluster || kHasClusters) {
    small_block<T, kCluster>(args);
  } else {
    sync_cluster();  // a trap: nothing launches it where there are no clusters, so it need not be compiled there
  }
}

// ---- launch ---------------------------------------------------------------------------------------------------------

template <class T, bool kCluster>
cudaError_t launch_small(const ForwardArgs& args, const ForwardPlan& plan, char* workspace, int slot,
                         cudaStream_t stream) {
  const std::int64_t N = args.anchors.rows;
  const SmallArgs small{
      .launch = one_launch_args(args, plan, workspace, slot),
      .anchors = plan.group_anchors,
      .gPlanes = piece<A>(workspace, plan.partials),
  };
  const Problem problem{.N = N, .M = args.candidates.rows, .D = args.dims, .k = args.options.k, .dtype = args.dtype};
  const LaunchShape shape{divide_up(N, plan.group_anchors) * plan.cluster, kThreads,
                          static_cast<int>(small_shared_bytes(plan, problem)), kCluster ? plan.cluster : 1};
  return launch(small_kernel<T, kCluster>, shape, stream, small);
}

}  // namespace

// ---- dispatch -------------------------------------------------------------------------------------------------------

cudaError_t enqueue_small(const ForwardArgs& args, const ForwardPlan& plan, char* workspace, int slot,
                          cudaStream_t stream) {
  const std::int64_t groups = divide_up(args.anchors.rows, plan.group_anchors);
  if (args.anchors.rows > kSmallRows || args.candidates.rows > kSmallRows || groups > kSmallGroups || slot < 0 ||
      slot >= kSlots || plan.slice_elements > kLargestSlice || small_planes(plan) > kLargestPlanes ||
      groups * plan.cluster > kMostTickets) {
    return cudaErrorInvalidValue;
  }
  return for_narrow_type(args.dtype, [&]<class T>() {
    return plan.path == ForwardPath::kCluster ? launch_small<T, true>(args, plan, workspace, slot, stream)
                                              : launch_small<T, false>(args, plan, workspace, slot, stream);
  });
}

#if defined(SN_SIMT)
bool slots_are_zero() {
  return zero_for_the_next(gSlots, sizeof(gSlots));
}
#else  // the host harness has no device
cudaError_t compiled_capability(int* capability) {
  cudaFuncAttributes attributes{};
  const auto* kernel = reinterpret_cast<const void*>(&small_kernel<float, true>);
  const cudaError_t error = cudaFuncGetAttributes(&attributes, kernel);
  *capability = attributes.ptxVersion;
  return error;
}

ClusterLimits cluster_limits(int shared_bytes) {
  const auto holds = [&](int blocks, int bytes) {
    const LaunchShape shape{blocks, kThreads, bytes, blocks};
    return bytes <= shared_bytes && active_clusters(small_kernel<float, true>, shape) > 0 &&
           active_clusters(small_kernel<Half, true>, shape) > 0 &&
           active_clusters(small_kernel<BFloat16, true>, shape) > 0;
  };
  for (int blocks = kClusterBlocks; blocks > 1; blocks /= 2) {
    for (const int bytes : {shared_bytes, kHalfSharedBytes}) {
      if (holds(blocks, bytes)) return {blocks, bytes};
    }
  }
  return {0, 0};
}
#endif

}  // namespace sn::cuda
