// What the kernels of a whole forward in one launch share (small.cu, square.cu): sums over slices of D, by a block,
// whose pairs its kernel knows; tickets; the selection of an anchor whose row is complete.
//
// Tickets are counters that the launch finds at zero and leaves at zero: a slot of them belongs to one stream, or to
// one launch of a captured graph (slots.h), so no other launch has it at the same time.
//
// API
//   OneLaunchArgs                              of every such kernel
//   class SliceSums<Pairs, kWarps>             a block of so many warps; Pairs says what it sums
//     sum_slices(buffers, chunks, planes, meanwhile)
//   RemoteSlices                               the slices of a pair, in the planes of a cluster's blocks
//   take_last_ticket(gTicket, tickets, nonfinite, last)
//   select_anchor(args, anchor, positives, row, keys)
//
// Pairs has
//   T                                          of the features; TileRows<T> gives their rows
//   int rows(), items(), plane()               of a buffer; of a chunk, a warp each; sums of a plane
//   bool has(row), const T* at(row), first()   of a buffer's rows; `first` is an address that can be read
//   bool sum_item(sBuffer, item, here, sSums)  sums over `here` elements of a chunk, into its places of a plane. Says
//                                              whether this lane saw an element that is not finite
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>

#include "cuda/direct/select.cuh"
#include "cuda/direct/tile.cuh"
#include "cuda/loss.cuh"
#include "cuda/memory.cuh"
#include "cuda/plan/sizes.h"
#include "cuda/plan/sizes_small.h"
#include "cuda/ptx.cuh"
#include "sn_types.h"

namespace sn::cuda {

inline constexpr int kAhead = static_cast<int>(kSmallAhead);               // rounds of chunks under way or in use
inline constexpr int kPerLane = static_cast<int>(kSmallRows) / kWarpSize;  // candidates
static_assert(kPerLane * kWarpSize == kSmallRows && kShortNeighbours <= kWarpSize);

// The low half of a ticket counts those that have finished, the high half those that saw a value that is not finite.
inline constexpr std::uint32_t kPoisoned = 1u << 16;
inline constexpr int kMostTickets = static_cast<int>(kPoisoned) - 1;

struct OneLaunchArgs {
  ForwardArgs forward;
  std::int64_t K;
  int slot;
  int blocks_shift;  // clusters: log2 of `blocks`
  int blocks;        // that share D
  int slices;
  int chunks;   // of a slice
  int round;    // chunks of a slice that are summed at once
  int tree;     // combine_slices
  int planes;   // of a block
  int buffers;  // chunks that have room
  int keys;     // room of a warp
  bool aligned;
  AnchorRecord* gRecords;  // [N]
};

inline OneLaunchArgs one_launch_args(const ForwardArgs& args, const ForwardPlan& plan, char* workspace, int slot) {
  int shift = 0;
  while ((1 << shift) < plan.cluster) ++shift;
  const int chunks = static_cast<int>(plan.slice_elements / kChunk);
  return {.forward = args,
          .K = plan.K,
          .slot = slot,
          .blocks_shift = shift,
          .blocks = plan.cluster,
          .slices = static_cast<int>(plan.d_slices),
          .chunks = chunks,
          .round = plan.round_chunks,
          .tree = static_cast<int>(slice_tree(plan)),
          .planes = small_planes(plan),
          .buffers = small_buffers(small_planes(plan), chunks, plan.round_chunks),
          .keys = static_cast<int>(small_keys(plan.K, args.candidates.rows)),
          .aligned = rows_aligned(args.anchors, args.dtype) && rows_aligned(args.candidates, args.dtype),
          .gRecords = piece<AnchorRecord>(workspace, plan.records)};
}

// ---- sums -----------------------------------------------------------------------------------------------------------

template <class T>
inline constexpr int kSlicePitch = kChunk + Pack<T>::kElements;  // of a row in a buffer

// Whether `here` elements of kX rows and of kZ, which lie z_apart apart, are finite.
template <int kX, int kZ, class T>
__device__ bool elements_finite(const Shared<T>& sX, const Shared<T>& sZ, int z_apart, int here) {
  bool finite = true;
  for (int at = 0; at < here; ++at) {
    for (int i = 0; i < kX; ++i) finite = finite && is_finite(sX.get(i * kSlicePitch<T> + at));
    for (int j = 0; j < kZ; ++j) finite = finite && is_finite(sZ.get(j * z_apart + at));
  }
  return finite;
}

// Block `rank` of those that share D has slices rank, rank + B, ..., of B blocks.
template <class Pairs, int kWarps>
class SliceSums {
 public:
  using T = typename Pairs::T;
  using A = Acc<T>;
  static constexpr int kThreads = kWarps * kWarpSize;
  static constexpr int kPack = Pack<T>::kElements;
  static constexpr int kPitch = kSlicePitch<T>;
  static_assert((kPitch / kPack) % 2 == 1, "odd pitches have no bank conflicts");

  __device__ __forceinline__ SliceSums(const OneLaunchArgs& args, const Pairs& pairs, int rank)
      : args_(args), pairs_(pairs), rank_(rank) {}

  // The planes of this block's slices, whose sums over chunks meet in sChunks [chunks][plane()]. Returns whether this
  // thread saw an element that is not finite. Calls `meanwhile` once first rows are under way. Ends behind a barrier.
  template <class Meanwhile>
  __device__ __forceinline__ bool sum_slices(const Shared<T>& sBuffers, const Shared<A>& sChunks,
                                             const Shared<A>& sPlanes, const Meanwhile& meanwhile) const {
    const int own_slices = rank_ < args_.slices ? (args_.slices - rank_ + args_.blocks - 1) / args_.blocks : 0;
    const int slice_rounds = args_.chunks / args_.round;
    const int rounds = own_slices * slice_rounds;
    const int buffer = pairs_.rows() * kPitch;
    const auto copy_round = [&](int round) {
      if (round < rounds) {
        for (int c = 0; c < args_.round; ++c) {
          const std::int64_t begin = begin_of(round / slice_rounds, round % slice_rounds * args_.round + c);
          if (begin >= args_.forward.dims) break;
          copy_chunk(sBuffers.offset((round % kAhead * args_.round + c) * buffer), begin);
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
      const int first = round % slice_rounds * args_.round;
      // One chunk is the slice.
      const Shared<A> sTarget = args_.chunks == 1 ? sPlanes.offset(own_slice * pairs_.plane()) : sChunks;
      for (int item = warp_id(); item < args_.round * pairs_.items(); item += kWarps) {
        const int c = item / pairs_.items();
        const int here = elements_from(begin_of(own_slice, first + c));
        if (here == 0) break;
        nonfinite = pairs_.sum_item(sBuffers.offset((round % kAhead * args_.round + c) * buffer), item % pairs_.items(),
                                    here, sTarget.offset((first + c) * pairs_.plane())) ||
                    nonfinite;
      }
      sync_block();
      copy_round(round + kAhead);
      if (args_.chunks > 1 && first + args_.round == args_.chunks) join_chunks(own_slice, sChunks, sPlanes);
    }
    async_wait<0>();
    sync_block();
    return nonfinite;
  }

 private:
  // Starts the copies of one chunk from element `begin` of D on. Rows that do not exist, and what lies behind D, are 0.
  __device__ __forceinline__ void copy_chunk(const Shared<T>& sBuffer, std::int64_t begin) const {
    constexpr int kRowPacks = kChunk / kPack;
    constexpr int kRowsAtOnce = kThreads / kRowPacks;
    static_assert(kThreads % kRowPacks == 0);
    const int column = thread_id() % kRowPacks * kPack;
    const std::int64_t remain = args_.forward.dims - begin - column;
    for (int row = thread_id() / kRowPacks; row < pairs_.rows(); row += kRowsAtOnce) {
      const bool present = remain > 0 && pairs_.has(row);
      const T* gSource = present ? pairs_.at(row) + begin + column : pairs_.first();
      if (!present || (args_.aligned && remain >= kPack)) {
        async_copy16(sBuffer, row * kPitch + column, gSource, present);
        continue;
      }
      Pack<T> rPack;
#pragma unroll
      for (int e = 0; e < kPack; ++e) rPack.elements[e] = e < remain ? load(gSource + e) : narrow<T>(A(0));
      sBuffer.set_pack(row * kPitch + column, rPack);
    }
  }

  // Element of D at which a chunk of a slice of this block begins.
  __device__ __forceinline__ std::int64_t begin_of(int own_slice, int chunk) const {
    return (static_cast<std::int64_t>(rank_ + own_slice * args_.blocks) * args_.chunks + chunk) * kChunk;
  }
  __device__ __forceinline__ int elements_from(std::int64_t begin) const {
    const std::int64_t remain = args_.forward.dims - begin;
    return remain < kChunk ? (remain > 0 ? static_cast<int>(remain) : 0) : kChunk;
  }

  // The tree over the chunks of a slice; those behind D are +0.
  __device__ __forceinline__ void join_chunks(int own_slice, const Shared<A>& sChunks, const Shared<A>& sPlanes) const {
    int present = 0;
    while (present < args_.chunks && begin_of(own_slice, present) < args_.forward.dims) ++present;
    const auto chunk = [&](int c, int at) { return c < present ? sChunks.get(c * pairs_.plane() + at) : A(0); };
    for (int at = thread_id(); at < pairs_.plane(); at += kThreads) {
      A sum = add(chunk(0, at), chunk(1, at));
      if (args_.chunks == 4) sum = add(sum, add(chunk(2, at), chunk(3, at)));
      sPlanes.set(own_slice * pairs_.plane() + at, sum);
    }
  }

  const OneLaunchArgs& args_;
  const Pairs& pairs_;
  int rank_;
};
static_assert(kLargestSlice == 4 * kChunk, "the trees of join_chunks");

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

// ---- tickets --------------------------------------------------------------------------------------------------------

// A ticket of a block, or a cluster, that saw something that is not finite, or nothing such.
__device__ __forceinline__ std::uint32_t ticket_of(bool nonfinite) {
  return nonfinite ? kPoisoned + 1u : 1u;
}
// Whether the last of `tickets` has been taken, and what they say, once so much has been.
__device__ __forceinline__ bool last_of(std::uint32_t taken, int tickets) {
  return taken % kPoisoned == static_cast<std::uint32_t>(tickets);
}
__device__ __forceinline__ bool poisoned(std::uint32_t taken) {
  return taken >= kPoisoned;
}

// By all threads of a block: what it has written is seen by whoever takes a later ticket. Returns whether this one is
// the last of `tickets`, which leaves the counter at zero. Then sNonfinite is set if any of those blocks' was.
__device__ __forceinline__ bool take_last_ticket(std::uint32_t* gTicket, int tickets,
                                                 const Shared<std::uint32_t>& sNonfinite,
                                                 const Shared<std::uint32_t>& sLast) {
  sync_block();
  if (thread_id() == 0) {
    const std::uint32_t mine = ticket_of(sNonfinite.get(0) != 0);
    const std::uint32_t taken = atomic_add_acq_rel(gTicket, mine) + mine;
    const bool last = last_of(taken, tickets);
    if (last) atomic_store(gTicket, 0u);
    if (last && poisoned(taken)) sNonfinite.set(0, 1u);
    sLast.set(0, last ? 1u : 0u);
  }
  sync_block();
  return sLast.get(0) != 0;
}

#if defined(SN_SIMT)
// Whether a kernel's slots are at zero; then they are.
inline bool zero_for_the_next(void* slots, std::size_t bytes) {
  const auto* all = static_cast<const unsigned char*>(slots);
  const bool zero = std::all_of(all, all + bytes, [](unsigned char byte) { return byte == 0; });
  std::memset(slots, 0, bytes);
  return zero;
}
#endif

// ---- an anchor ------------------------------------------------------------------------------------------------------

// From the row of an anchor to its outputs, by one warp.
__device__ inline AnchorRecord select_anchor(const OneLaunchArgs& args, std::int64_t anchor, std::uint32_t rPositive,
                                             const Shared<float>& sRow, const Shared<Key<float>>& sKeys) {
  const int M = static_cast<int>(args.forward.candidates.rows);
  const std::int64_t self = self_of(args.forward, anchor);
  const std::int64_t others = M - (self >= 0 ? 1 : 0);
  const std::int64_t found = args.K < others ? args.K : others;
  const ShortRow<float, kPerLane> row(sRow, M, self, rPositive);
  Positive<float> near{};
  Positive<float> far{};
  if (args.K <= kShortNeighbours) {
    row.select(static_cast<int>(args.K), sKeys, &near, &far);
    return finish_few<float>(args.forward, anchor, args.K, found, sKeys, near, far);
  }
  row.find_special(&near, &far);
  for (int j = lane_id(); j < M; j += kWarpSize) {
    sKeys.set(j, j == self ? last_key<Key<float>>() : make_key(sRow.get(j), j));
  }
  sort_keys(WarpTeam(), sKeys, M);
  return finish_anchor<float>(args.forward, anchor, args.K, found, sKeys, near, far);
}

}  // namespace sn::cuda
