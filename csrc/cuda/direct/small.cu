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
// Tickets are counters that the launch finds at zero and leaves at zero: a slot of them belongs to one stream, or to
// one launch of a captured graph (slots.h), so no other launch has it at the same time.
//
// The sums, the keys and the arithmetic of an anchor are those of the direct path, bit for bit.
#include "cuda/direct/select.cuh"
#include "cuda/direct/tile.cuh"
#include "cuda/launch.cuh"
#include "cuda/loss.cuh"
#include "cuda/memory.cuh"
#include "cuda/plan/sizes.h"
#include "cuda/ptx.cuh"
#include "cuda/slots.h"
#include "cuda/stages.h"

namespace sn::cuda {
namespace {

// ---- traits ---------------------------------------------------------------------------------------------------------

constexpr int kThreads = kSmallWarps * kWarpSize;
constexpr int kQuad = static_cast<int>(kSmallQuad);                 // anchors of a warp's item
constexpr int kColumns = static_cast<int>(kSmallColumns);           // candidates of it
constexpr int kOwn = kColumns / kWarpSize;                          // of a lane
constexpr int kAhead = static_cast<int>(kSmallAhead);               // rounds of chunks that are under way or in use
constexpr int kPerLane = static_cast<int>(kSmallRows) / kWarpSize;  // candidates

// Tickets of one launch. In the low half blocks count, in the high half those that saw a value that is not finite.
struct Slot {
  std::uint32_t ticket;                // that have finished
  std::uint32_t groups[kSmallGroups];  // of a group, that have shown their planes
  std::uint32_t reserved[31];
};
constexpr std::uint32_t kPoisoned = 1u << 16;
constexpr int kMostTickets = static_cast<int>(kPoisoned) - 1;
static_assert(sizeof(Slot) == 256, "whole lines of the cache");

__device__ Slot gSlots[kSlots];

using A = float;  // sums of half inputs, too

struct SmallArgs {
  ForwardArgs forward;
  std::int64_t K;
  int slot;
  int anchors;       // of a group, at most
  int blocks_shift;  // kCluster: log2 of the blocks of a group
  int blocks;        // of a group
  int slices;
  int chunks;   // of a slice
  int round;    // chunks of a slice that are summed at once
  int tree;     // combine_slices
  int planes;   // of a block
  int buffers;  // chunks that have room
  int keys;     // room of a warp
  bool aligned;
  A* gPlanes;              // kTickets: [groups][slices][anchors][padded candidates]
  AnchorRecord* gRecords;  // [N]
};

// ---- kernel ---------------------------------------------------------------------------------------------------------

// The slices of one pair: slice s is plane s / B of block s mod B of the cluster. (A template, as nothing refers to it
// where there are no clusters.)
template <class Sum>
struct RemoteSlices {
  Shared<Sum> sPlanes;
  int at;     // of the pair in a plane
  int plane;  // sums of one
  int shift;  // log2 B
  int slice = 0;
  __device__ __forceinline__ Sum next(bool present) {
    const int rank = slice & ((1 << shift) - 1);
    const int place = (slice++ >> shift) * plane + at;
    return present ? sPlanes.get_remote(place, rank) : Sum(0);
  }
};
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

// What a block works on.
template <class T>
struct SmallBlock {
  static constexpr int kPack = Pack<T>::kElements;
  static constexpr int kPitch = kChunk + kPack;
  static_assert((kPitch / kPack) % 2 == 1, "odd pitches have no bank conflicts");

  const SmallArgs& args;
  TileRows<T> x;  // anchors of the group
  TileRows<T> z;  // all candidates
  int quads;      // rows of the anchors in a buffer, by four
  int columns;    // rows of the candidates, a multiple of kColumns
  int rank;       // of the block in its group

  __device__ __forceinline__ int buffer_rows() const { return quads * kQuad + columns; }
  __device__ __forceinline__ int items() const { return quads * (columns / kColumns); }  // of a chunk
  __device__ __forceinline__ int plane() const { return args.anchors * columns; }

  // Starts the copies of one chunk from element `begin` of D on. Rows that do not exist, and what lies behind D, are 0.
  __device__ __forceinline__ void copy_chunk(const Shared<T>& sBuffer, std::int64_t begin) const {
    constexpr int kRowPacks = kChunk / kPack;
    constexpr int kRowsAtOnce = kThreads / kRowPacks;
    static_assert(kThreads % kRowPacks == 0);
    const int column = thread_id() % kRowPacks * kPack;
    const std::int64_t remain = args.forward.dims - begin - column;
    for (int row = thread_id() / kRowPacks; row < buffer_rows(); row += kRowsAtOnce) {
      const bool anchor = row < quads * kQuad;
      const int number = anchor ? row : row - quads * kQuad;
      const bool present = remain > 0 && (anchor ? x.has(number) : z.has(number));
      const T* gRow = anchor ? x.at(number) : z.at(number);
      const T* gSource = present ? gRow + begin + column : z.gFirst;
      if (!present || (args.aligned && remain >= kPack)) {
        async_copy16(sBuffer, row * kPitch + column, gSource, present);
        continue;
      }
      Pack<T> rPack;
#pragma unroll
      for (int e = 0; e < kPack; ++e) rPack.elements[e] = e < remain ? load(gSource + e) : narrow<T>(A(0));
      sBuffer.set_pack(row * kPitch + column, rPack);
    }
  }

  // The sums over one chunk of `here` elements of four anchors against 64 candidates, by a warp, into sSums
  // [anchors][columns]. Returns whether this lane saw an element that is not finite (tile.cuh says why sums tell).
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
        if (quad * kQuad + i < args.anchors) {
          sSums.set((quad * kQuad + i) * columns + first + j * kWarpSize, rSums[i][j]);
        }
      }
    }
    return !finite && !elements_finite(sX, sZ, here);
  }
  // Whether all elements of these rows are.
  __device__ static bool elements_finite(const Shared<T>& sX, const Shared<T>& sZ, int here) {
    bool finite = true;
    for (int at = 0; at < here; ++at) {
      for (int i = 0; i < kQuad; ++i) finite = finite && is_finite(sX.get(i * kPitch + at));
      for (int j = 0; j < kOwn; ++j) finite = finite && is_finite(sZ.get(j * kWarpSize * kPitch + at));
    }
    return finite;
  }

  // Element of D at which a chunk of a slice of this block begins.
  __device__ __forceinline__ std::int64_t begin_of(int own_slice, int chunk) const {
    return (static_cast<std::int64_t>(rank + own_slice * args.blocks) * args.chunks + chunk) * kChunk;
  }
  __device__ __forceinline__ int elements_from(std::int64_t begin) const {
    const std::int64_t remain = args.forward.dims - begin;
    return remain < kChunk ? (remain > 0 ? static_cast<int>(remain) : 0) : kChunk;
  }

  // The planes of this block's slices, whose sums over chunks meet in sChunks [chunks][plane()]. Returns whether this
  // thread saw an element that is not finite. Calls `meanwhile` once first rows are under way. Ends behind a barrier.
  template <class Meanwhile>
  __device__ __forceinline__ bool sum_slices(const Shared<T>& sBuffers, const Shared<A>& sChunks,
                                             const Shared<A>& sPlanes, const Meanwhile& meanwhile) const {
    const int own_slices = rank < args.slices ? (args.slices - rank + args.blocks - 1) / args.blocks : 0;
    const int slice_rounds = args.chunks / args.round;
    const int rounds = own_slices * slice_rounds;
    const int buffer = buffer_rows() * kPitch;
    const auto copy_round = [&](int round) {
      if (round < rounds) {
        for (int c = 0; c < args.round; ++c) {
          const std::int64_t begin = begin_of(round / slice_rounds, round % slice_rounds * args.round + c);
          if (begin >= args.forward.dims) break;
          copy_chunk(sBuffers.offset((round % kAhead * args.round + c) * buffer), begin);
        }
      }
      async_commit();
    };
    bool nonfinite = false;
    for (int round = 0; round < kAhead; ++round) copy_round(round);
    meanwhile();
#pragma unroll 1
    for (int round = 0; round < rounds; ++round) {
      async_wait<kAhead - 1>();
      sync_block();
      const int own_slice = round / slice_rounds;
      const int first = round % slice_rounds * args.round;
      // One chunk is the slice.
      const Shared<A> sTarget = args.chunks == 1 ? sPlanes.offset(own_slice * plane()) : sChunks;
      for (int item = warp_id(); item < args.round * items(); item += kSmallWarps) {
        const int c = item / items();
        const int here = elements_from(begin_of(own_slice, first + c));
        if (here == 0) break;
        nonfinite = sum_item(sBuffers.offset((round % kAhead * args.round + c) * buffer), item % items(), here,
                             sTarget.offset((first + c) * plane())) ||
                    nonfinite;
      }
      sync_block();
      copy_round(round + kAhead);
      if (args.chunks > 1 && first + args.round == args.chunks) join_chunks(own_slice, sChunks, sPlanes);
    }
    async_wait<0>();
    sync_block();
    return nonfinite;
  }

  // The tree over the chunks of a slice; those behind D are +0.
  __device__ __forceinline__ void join_chunks(int own_slice, const Shared<A>& sChunks, const Shared<A>& sPlanes) const {
    int present = 0;
    while (present < args.chunks && begin_of(own_slice, present) < args.forward.dims) ++present;
    const auto chunk = [&](int c, int at) { return c < present ? sChunks.get(c * plane() + at) : A(0); };
    for (int at = thread_id(); at < plane(); at += kThreads) {
      A sum = add(chunk(0, at), chunk(1, at));
      if (args.chunks == 4) sum = add(sum, add(chunk(2, at), chunk(3, at)));
      sPlanes.set(own_slice * plane() + at, sum);
    }
  }
};
static_assert(kLargestSlice == 4 * kChunk, "the trees of join_chunks");

// From the row of an anchor to its outputs, by one warp.
__device__ AnchorRecord select_anchor(const SmallArgs& args, std::int64_t anchor, std::uint32_t rPositive,
                                      const Shared<A>& sRow, const Shared<Key<A>>& sKeys) {
  const int M = static_cast<int>(args.forward.candidates.rows);
  const std::int64_t self = self_of(args.forward, anchor);
  const std::int64_t others = M - (self >= 0 ? 1 : 0);
  const std::int64_t found = args.K < others ? args.K : others;
  const ShortRow<A, kPerLane> row(sRow, M, self, rPositive);
  Positive<A> near{};
  Positive<A> far{};
  if (args.K <= kShortNeighbours) {
    row.select(static_cast<int>(args.K), sKeys, &near, &far);
    return finish_few<A>(args.forward, anchor, args.K, found, sKeys, near, far);
  }
  row.find_special(&near, &far);
  for (int j = lane_id(); j < M; j += kWarpSize) {
    sKeys.set(j, j == self ? last_key<Key<A>>() : make_key(sRow.get(j), j));
  }
  sort_keys(WarpTeam(), sKeys, M);
  return finish_anchor<A>(args.forward, anchor, args.K, found, sKeys, near, far);
}

// By all threads of a block: what it has written is seen by whoever takes a later ticket. Returns whether this one is
// the last of `tickets`, which leaves the counter at zero. Then sNonfinite is set if any of those blocks' was.
__device__ __forceinline__ bool take_last_ticket(std::uint32_t* gTicket, int tickets,
                                                 const Shared<std::uint32_t>& sNonfinite,
                                                 const Shared<std::uint32_t>& sLast) {
  sync_block();
  if (thread_id() == 0) {
    const std::uint32_t mine = sNonfinite.get(0) != 0 ? kPoisoned + 1u : 1u;
    const std::uint32_t taken = atomic_add_acq_rel(gTicket, mine) + mine;
    const bool last = taken % kPoisoned == static_cast<std::uint32_t>(tickets);
    if (last) atomic_store(gTicket, 0u);
    if (last && taken >= kPoisoned) sNonfinite.set(0, 1u);
    sLast.set(0, last ? 1u : 0u);
  }
  sync_block();
  return sLast.get(0) != 0;
}

template <class T, bool kCluster>
__device__ __forceinline__ void small_block(const SmallArgs& args) {
  const std::int64_t N = args.forward.anchors.rows;
  const int M = static_cast<int>(args.forward.candidates.rows);
  const int group = static_cast<int>(block_id()) / args.blocks;
  const std::int64_t first_anchor = static_cast<std::int64_t>(group) * args.anchors;
  const int anchors = static_cast<int>(N - first_anchor < args.anchors ? N - first_anchor : args.anchors);
  const SmallBlock<T> block{
      .args = args,
      .x = {static_cast<const T*>(args.forward.anchors.data) + first_anchor * args.forward.anchors.row_stride,
            args.forward.anchors.row_stride, anchors},
      .z = {static_cast<const T*>(args.forward.candidates.data), args.forward.candidates.row_stride, M},
      .quads = (args.anchors + kQuad - 1) / kQuad,
      .columns = (M + kColumns - 1) / kColumns * kColumns,
      .rank = static_cast<int>(block_id()) % args.blocks};
  Slot* gSlot = gSlots + args.slot;

  SharedArena arena;
  const Shared<A> sPlanes = arena.take<A>(args.planes * block.plane());
  const Shared<std::uint32_t> sFlags = arena.take<std::uint32_t>(3);  // not finite, last of the group, last of all
  SharedArena later = arena;  // what lies where buffers are, once these are done with
  const Shared<T> sBuffers = arena.take<T>(args.buffers * block.buffer_rows() * SmallBlock<T>::kPitch);
  const Shared<A> sChunks = arena.take<A>(args.chunks > 1 ? args.chunks * block.plane() : 0);
  const int finished = kCluster ? (args.anchors + args.blocks - 1) / args.blocks : args.anchors;  // by a block, at most
  const Shared<A> sRows = later.take<A>(finished * block.columns);
  const Shared<Key<A>> sKeys = later.take<Key<A>>(kSmallWarps * args.keys);
  const ReductionMemory reduction(later);

  if (thread_id() < 3) sFlags.set(thread_id(), 0u);
  // The anchors that this block finishes: `mine` of them, from `own` on, `step` apart.
  const int own = kCluster ? block.rank : 0;
  const int step = kCluster ? args.blocks : 1;
  const int mine = own < anchors ? (anchors - own + step - 1) / step : 0;
  std::uint32_t rPositive = 0;  // of the warp's first anchor

  // 1. Planes of this block's slices.
  const bool nonfinite = block.sum_slices(sBuffers, sChunks, sPlanes, [&] {
    let_dependents_start();
    if (!kCluster || warp_id() >= mine) return;
    const std::int64_t anchor = first_anchor + own + warp_id() * step;
    rPositive = positives_of<kPerLane>(args.forward, anchor, self_of(args.forward, anchor));
  });
  if (any_lane(nonfinite) && lane_id() == 0) sFlags.atomic_or(0, 1u);

  // 2. Rows of the anchors that it finishes.
  if constexpr (kCluster) {
    sync_cluster();
  } else {
    A* gPlanes = args.gPlanes + static_cast<std::int64_t>(group) * args.slices * block.plane();
    const int own_slices = (args.slices - block.rank + args.blocks - 1) / args.blocks;
    for (int slice = 0; slice < own_slices; ++slice) {
      A* gPlane = gPlanes + (block.rank + slice * args.blocks) * block.plane();
      for (int at = thread_id(); at < block.plane(); at += kThreads) {
        atomic_store(gPlane + at, sPlanes.get(slice * block.plane() + at));
      }
    }
    if (!take_last_ticket(gSlot->groups + group, args.blocks, sFlags, sFlags.offset(1))) return;
  }
  for (int at = thread_id(); at < mine * block.columns; at += kThreads) {
    const int anchor = own + at / block.columns * step;
    const int j = at % block.columns;
    if (j >= M) continue;
    const int place = anchor * block.columns + j;
    if constexpr (kCluster) {
      const RemoteSlices<A> slices{sPlanes, place, block.plane(), args.blocks_shift};
      sRows.set(at, combine_slices<A>(slices, args.slices, args.tree));
    } else {
      const A* gFirst = args.gPlanes + static_cast<std::int64_t>(group) * args.slices * block.plane() + place;
      sRows.set(at, combine_slices<A>(ShownSlices{gFirst, block.plane()}, args.slices, args.tree));
    }
  }
  sync_block();
  if constexpr (kCluster) arrive_cluster_relaxed();  // other blocks' planes have been read

  // 3. A warp an anchor.
  for (int slot = warp_id(); slot < mine; slot += kSmallWarps) {
    const std::int64_t anchor = first_anchor + own + slot * step;
    if (!kCluster || slot >= kSmallWarps) {
      rPositive = positives_of<kPerLane>(args.forward, anchor, self_of(args.forward, anchor));
    }
    const AnchorRecord record =
        select_anchor(args, anchor, rPositive, sRows.offset(slot * block.columns), sKeys.offset(warp_id() * args.keys));
    if (lane_id() == 0) args.gRecords[anchor] = record;
    sync_warp();  // the next anchor's keys overwrite this one's
  }

  // 4. All anchors, by the block that finishes last.
  const int tickets = static_cast<int>(block_count()) / (kCluster ? 1 : args.blocks);
  if (take_last_ticket(&gSlot->ticket, tickets, sFlags, sFlags.offset(2))) {
    static_assert(kSmallRows <= 0xffff, "32 bits hold all counts");
    final_reduction<A, std::uint32_t>(args.forward, GlobalRecords{args.gRecords}, sFlags.get(0) != 0, reduction);
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
  int shift = 0;
  while ((1 << shift) < plan.cluster) ++shift;
  const SmallArgs small{
      .forward = args,
      .K = plan.K,
      .slot = slot,
      .anchors = plan.group_anchors,
      .blocks_shift = shift,
      .blocks = plan.cluster,
      .slices = static_cast<int>(plan.d_slices),
      .chunks = static_cast<int>(plan.slice_elements / kChunk),
      .round = plan.round_chunks,
      .tree = static_cast<int>(slice_tree(plan)),
      .planes = small_planes(plan),
      .buffers = small_buffers(small_planes(plan), static_cast<int>(plan.slice_elements / kChunk), plan.round_chunks),
      .keys = static_cast<int>(small_keys(plan.K, args.candidates.rows)),
      .aligned = rows_aligned(args.anchors, args.dtype) && rows_aligned(args.candidates, args.dtype),
      .gPlanes = piece<A>(workspace, plan.partials),
      .gRecords = piece<AnchorRecord>(workspace, plan.records),
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
  static_assert(kPerLane * kWarpSize == kSmallRows && kShortNeighbours <= kWarpSize);
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
  const auto* bytes = reinterpret_cast<const unsigned char*>(gSlots);
  bool zero = true;
  for (std::size_t at = 0; at < sizeof(gSlots); ++at) zero = zero && bytes[at] == 0;
  std::memset(static_cast<void*>(gSlots), 0, sizeof(gSlots));  // for the next call
  return zero;
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
