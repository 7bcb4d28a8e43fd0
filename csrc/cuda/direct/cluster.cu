// A small batch in one launch of one thread-block cluster. The blocks share the slices of D: block s mod C sums slice s
// and keeps the 64 x 64 partial sums, a plane, in its shared memory. Behind a cluster barrier the warps of all blocks
// share the anchors: a warp reads an anchor's partial sums from all blocks, adds them up in the one order, selects and
// finishes. Behind a second barrier the first block sums over the anchors. A third barrier keeps the shared memory of
// the others alive until the first block has read it.
//
// The sums, the keys and the arithmetic of an anchor are those of the direct path, bit for bit.
#include "cuda/direct/select.cuh"
#include "cuda/direct/tile.cuh"
#include "cuda/launch.cuh"
#include "cuda/loss.cuh"
#include "cuda/memory.cuh"
#include "cuda/plan/sizes.h"
#include "cuda/ptx.cuh"
#include "cuda/stages.h"

namespace sn::cuda {
namespace {

// ---- traits ---------------------------------------------------------------------------------------------------------

constexpr int kRows = static_cast<int>(kClusterRows);
constexpr int kPitch = static_cast<int>(kClusterPitch);
constexpr int kPlane = kRows * kPitch;
constexpr int kThreads = Tile<float>::kThreads;
constexpr int kWarps = kThreads / kWarpSize;
static_assert(kWarps == kClusterWarps, "what the plan counts on");
static_assert(kClusterRows == kDirectTile, "one tile holds every pair");
static_assert(kPitch % 32 == 8, "a warp stores 4 rows of 8 sums in different banks");

using A = float;  // sums of half inputs, too

struct ClusterArgs {
  ForwardArgs forward;
  std::int64_t K;
  std::int64_t slice_elements;
  int slices;
  int tree;    // combine_slices
  int planes;  // of one block
  bool aligned;
};

// Records of the anchors that a block has finished: anchor i is record i / C of block i mod C.
struct ClusterRecords {
  static constexpr int kSums = 3;
  static constexpr int kCounts = 4;
  Shared<double> sSums;          // [kRows][kSums]
  Shared<std::int32_t> sCounts;  // [kRows][kCounts]

  __device__ __forceinline__ void set(int slot, const AnchorRecord& record) const {
    sSums.set(slot * kSums, record.loss);
    sSums.set(slot * kSums + 1, record.positive_sum);
    sSums.set(slot * kSums + 2, record.negative_sum);
    sCounts.set(slot * kCounts, record.positives);
    sCounts.set(slot * kCounts + 1, record.negatives);
    sCounts.set(slot * kCounts + 2, record.support_positives);
    sCounts.set(slot * kCounts + 3, record.flags);
  }
  __device__ __forceinline__ AnchorRecord get(std::int64_t i) const {
    const int rank = static_cast<int>(i) % cluster_size();
    const int slot = static_cast<int>(i) / cluster_size();
    return {.loss = sSums.get_remote(slot * kSums, rank),
            .positive_sum = sSums.get_remote(slot * kSums + 1, rank),
            .negative_sum = sSums.get_remote(slot * kSums + 2, rank),
            .positives = sCounts.get_remote(slot * kCounts, rank),
            .negatives = sCounts.get_remote(slot * kCounts + 1, rank),
            .support_positives = sCounts.get_remote(slot * kCounts + 2, rank),
            .flags = sCounts.get_remote(slot * kCounts + 3, rank)};
  }
};

// The slices of one pair, block by block, then plane by plane.
struct RemoteSlices {
  Shared<A> sPlanes;
  int at;  // of the pair in the next slice's plane
  int rank = 0;
  __device__ __forceinline__ A next(bool present) {
    const A value = present ? sPlanes.get_remote(at, rank) : A(0);
    if (++rank == cluster_size()) {
      rank = 0;
      at += kPlane;
    }
    return value;
  }
};

// Shared memory: what the selection needs lies where the tiles were.
template <class T>
constexpr int kCommonBytes =
    shared_bytes<A>(kWarps * kRows) + shared_bytes<Key<A>>(kWarps * kRows) +
    shared_bytes<double>(kRows * ClusterRecords::kSums) + shared_bytes<std::int32_t>(kRows * ClusterRecords::kCounts);
template <class T>
constexpr int kTileBytes = shared_bytes<T>(Tile<T>::kElements);
template <class T>
constexpr int kOtherBytes = kTileBytes<T> + ReductionMemory::kBytes + shared_bytes<std::uint32_t>(1);
static_assert(kCommonBytes<float> <= kTileBytes<float> && kCommonBytes<Half> <= kTileBytes<Half>);
static_assert(kOtherBytes<float> <= kClusterOther && kOtherBytes<Half> <= kClusterOther, "what the plan counts on");

// ---- kernel ---------------------------------------------------------------------------------------------------------

// The keys of a row of M <= kRows sums, in order, into sKeys [kRows]. One warp: two sorted halves, of which one is
// turned round and met by the other, leave the 32 least and the rest, each in one rise and fall.
__device__ __forceinline__ void sort_row(const Shared<A>& sRow, int M, std::int64_t self, const Shared<Key<A>>& sKeys) {
  static_assert(kRows == 2 * kWarpSize);
  const auto key_of = [&](int j) { return j < M && j != self ? make_key(sRow.get(j), j) : last_key<Key<A>>(); };
  const Key<A> rLow = sort_lanes(key_of(lane_id()));
  const Key<A> rHigh = exchange(sort_lanes(key_of(kWarpSize + lane_id())), kWarpSize - 1);
  const bool ordered = before(rLow, rHigh);
  sKeys.set(lane_id(), merge_lanes_by<kWarpSize>(ordered ? rLow : rHigh));
  sKeys.set(kWarpSize + lane_id(), merge_lanes_by<kWarpSize>(ordered ? rHigh : rLow));
  sync_warp();
}

template <class T>
__global__ void __launch_bounds__(kThreads, 1) cluster_kernel(const ClusterArgs args) {
  using TileT = Tile<T>;
  static_assert(TileT::kThreads == kThreads);
  SharedArena arena;
  const Shared<A> sPlanes = arena.take<A>(args.planes * kPlane);
  const Shared<T> sTiles = arena.take<T>(TileT::kElements);
  const ReductionMemory reduction(arena);
  const Shared<std::uint32_t> sFlag = arena.take<std::uint32_t>(1);
  const Shared<A> sRows = sTiles.template view<A>();
  const Shared<Key<A>> sKeys = sRows.offset(kWarps * kRows).template view<Key<A>>();
  const Shared<double> sSums = sKeys.offset(kWarps * kRows).template view<double>();
  const ClusterRecords records{sSums, sSums.offset(kRows * ClusterRecords::kSums).template view<std::int32_t>()};

  const std::int64_t N = args.forward.anchors.rows;
  const std::int64_t M = args.forward.candidates.rows;
  const int rank = cluster_rank();
  if (thread_id() == 0) sFlag.set(0, 0u);
  sync_block();

  // 1. Planes of this block's slices.
  const TileRows<T> x{static_cast<const T*>(args.forward.anchors.data), args.forward.anchors.row_stride, N};
  const TileRows<T> z{static_cast<const T*>(args.forward.candidates.data), args.forward.candidates.row_stride, M};
  const TileT tile(sTiles);
  bool nonfinite = false;
  for (int slice = rank, plane = 0; slice < args.slices; slice += cluster_size(), ++plane) {
    const std::int64_t begin = slice * args.slice_elements;
    const std::int64_t end =
        begin + args.slice_elements < args.forward.dims ? begin + args.slice_elements : args.forward.dims;
    A rSums[TileT::kPairs][TileT::kPairs];
    nonfinite = tile.sums(x, z, begin, end, args.aligned, rSums) || nonfinite;
#pragma unroll
    for (int i = 0; i < TileT::kPairs; ++i) {
#pragma unroll
      for (int j = 0; j < TileT::kPairs; ++j) {
        sPlanes.set(plane * kPlane + TileT::row_of(i) * kPitch + TileT::column_of(j), rSums[i][j]);
      }
    }
  }
  if (any_lane(nonfinite) && lane_id() == 0) sFlag.atomic_or(0, 1u);
  sync_cluster();

  // 2. A warp an anchor.
  const Shared<A> sRow = sRows.offset(warp_id() * kRows);
  const Shared<Key<A>> sMine = sKeys.offset(warp_id() * kRows);
  for (int slot = warp_id(); slot * cluster_size() + rank < N; slot += kWarps) {
    const int anchor = slot * cluster_size() + rank;
    const std::int64_t self = self_of(args.forward, anchor);
    for (int j = lane_id(); j < M; j += kWarpSize) {
      const RemoteSlices slices{sPlanes, anchor * kPitch + j};
      sRow.set(j, combine_slices<A>(slices, args.slices, args.tree));
    }
    sync_warp();
    const SpecialKeys<A> rSpecial = find_special<A>(args.forward, anchor, self, sRow);
    sort_row(sRow, static_cast<int>(M), self, sMine);
    const std::int64_t others = M - (self >= 0 ? 1 : 0);
    const AnchorRecord record = finish_anchor<A>(args.forward, anchor, args.K, args.K < others ? args.K : others, sMine,
                                                 near_of<A>(rSpecial.near), far_of<A>(rSpecial.far));
    if (lane_id() == 0) records.set(slot, record);
    sync_warp();  // the next anchor's row overwrites this one's
  }
  sync_cluster();

  // 3. All anchors.
  if (rank == 0) {
    std::uint32_t rFlag = 0;
    for (int other = 0; other < cluster_size(); ++other) rFlag |= sFlag.get_remote(0, other);
    final_reduction<A>(args.forward, records, rFlag != 0, reduction);
  }
  sync_cluster();
}

// ---- launch ---------------------------------------------------------------------------------------------------------

template <class T>
LaunchShape shape_of(int cluster, std::int64_t planes) {
  return {cluster, kThreads, kOtherBytes<T> + shared_bytes<A>(static_cast<int>(planes) * kPlane), cluster};
}

template <class T>
cudaError_t launch_cluster(const ForwardArgs& args, const ForwardPlan& plan, cudaStream_t stream) {
  const std::int64_t planes = cluster_planes(plan);
  if (args.anchors.rows > kClusterRows || args.candidates.rows > kClusterRows || planes > kLargestPlanes ||
      plan.slice_elements > kLargestSlice) {
    return cudaErrorInvalidValue;
  }
  const ClusterArgs cluster_args{
      .forward = args,
      .K = plan.K,
      .slice_elements = plan.slice_elements,
      .slices = static_cast<int>(plan.d_slices),
      .tree = static_cast<int>(slice_tree(plan)),
      .planes = static_cast<int>(planes),
      .aligned = rows_aligned(args.anchors, args.dtype) && rows_aligned(args.candidates, args.dtype),
  };
  return launch(cluster_kernel<T>, shape_of<T>(plan.cluster, planes), stream, cluster_args);
}

}  // namespace

// ---- dispatch -------------------------------------------------------------------------------------------------------

cudaError_t enqueue_cluster(const ForwardArgs& args, const ForwardPlan& plan, cudaStream_t stream) {
  return for_narrow_type(args.dtype, [&]<class T>() { return launch_cluster<T>(args, plan, stream); });
}

#if !defined(SN_SIMT)  // the host harness has no device
cudaError_t compiled_capability(int* capability) {
  cudaFuncAttributes attributes{};
  const cudaError_t error = cudaFuncGetAttributes(&attributes, reinterpret_cast<const void*>(&cluster_kernel<float>));
  *capability = attributes.ptxVersion;
  return error;
}

ClusterLimits cluster_limits(int shared_bytes) {
  const auto holds = [&](int blocks, std::int64_t planes) {
    return cluster_shared_bytes(planes) <= shared_bytes &&
           active_clusters(cluster_kernel<float>, shape_of<float>(blocks, planes)) > 0 &&
           active_clusters(cluster_kernel<Half>, shape_of<Half>(blocks, planes)) > 0 &&
           active_clusters(cluster_kernel<BFloat16>, shape_of<BFloat16>(blocks, planes)) > 0;
  };
  for (int blocks = kClusterBlocks; blocks > 1; blocks /= 2) {
    // A plan has clusters of fewer blocks only where one plane a block is enough.
    for (std::int64_t planes = blocks == kClusterBlocks ? kLargestPlanes : 1; planes > 0; --planes) {
      if (holds(blocks, planes)) return {blocks, static_cast<int>(planes)};
    }
  }
  return {0, 0};
}
#endif

}  // namespace sn::cuda
