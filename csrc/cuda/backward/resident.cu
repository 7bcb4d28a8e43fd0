// The gather of gradients (gather.cuh has what is computed, and in which order) of small batches, in one kernel: each
// block keeps a few columns of all rows in shared memory, and all edges. So the rows that a target sums come from
// there, and each is fetched from global memory once. Every block makes the lists of all targets again:
//
// 1. A bit for each pair of a target and an anchor that selected it, by atomics: which bits are set shows no order.
//
// 2. A thread counts the bits of a target and finds room for its list: anywhere, as only the lists' own order matters.
//
// 3. Each edge computes its weight, and its place in the list of its target from the bits of anchors before its own.
//
// 4. Each own edge takes the weight of its reverse, if it has one: a bit says so, and bits before it where it is.
//
// 5. Edges that count get a bit each, in the order of the lists and of own edges.
//
// 6. Each thread sums a pack of columns of a target, walking these bits.
//
// An anchor that selected a candidate twice has one bit for both. No forward of this library makes such edges, but the
// backward takes any graph: places are then counted edge by edge, which is slow.
#include <algorithm>
#include <cstdint>

#include "cuda/backend.h"
#include "cuda/backward/gather.cuh"
#include "cuda/backward/graph.cuh"
#include "cuda/backward/resident.cuh"
#include "cuda/launch.cuh"
#include "cuda/memory.cuh"
#include "cuda/plan/sizes.h"
#include "cuda/ptx.cuh"
#include "cuda/stages.h"
#include "cuda/warp.cuh"

namespace sn::cuda {
namespace {

// ---- traits ---------------------------------------------------------------------------------------------------------

constexpr int kThreads = kResidentThreads;
constexpr int kWarps = kThreads / kWarpSize;
constexpr int kBlocks = 1;     // of a multiprocessor, at least: all slices are under way at once
constexpr int kEdgeLoads = 4;  // of a thread, at once
constexpr int kRowLoads = 2;   // packs of rows, likewise

// Rows that a thread adds at once: of each it holds as many packs.
template <int kPacks>
constexpr int kGathered = kPacks > 2 ? 2 : 4;

// ---- kernel ---------------------------------------------------------------------------------------------------------

// kPacks: of a row, that a thread sums. Several only where one group of lanes has the whole list.
template <typename T, int kPacks>
struct Resident {
  using Acc = sn::cuda::Acc<T>;
  static constexpr int kPack = Pack<Acc>::kElements;  // columns of a thread
  static constexpr int kLoadBytes = kPack * static_cast<int>(sizeof(T));
  static constexpr int kLine = kLinePacks * kPack;
  static constexpr int kAtOnce = kGathered<kPacks>;
  static constexpr int kPacksShift = kPacks > 2 ? 2 : kPacks - 1;
  static_assert(1 << kPacksShift == kPacks);
  using RowPack = Pack<T, kLoadBytes>;
  using Sum = ResidentSum<Acc, kPacks>;

  // Edges of this thread that are under way.
  struct Edges {
    std::int32_t targets[kEdgeLoads];
    Acc coefficients[kEdgeLoads];
  };
  struct Rows {
    RowPack packs[kRowLoads];
  };

  const ResidentArgs& args;
  const Graph& graph;
  const int all;      // edges
  const int anchors;  // rows
  const int rows;     // of anchors and candidates
  const int targets;  // that have lists
  const int own_row;  // of what own edges lead to: the first row
  SharedArena arena;
  const ResidentMemory<Acc> memory;
  bool twice = false;

  __device__ __forceinline__ explicit Resident(const ResidentArgs& resident_args)
      : args(resident_args),
        graph(args.graph),
        all(static_cast<int>(graph.all_edges)),
        anchors(static_cast<int>(args.anchors.rows)),
        rows(anchors + static_cast<int>(args.candidates.rows)),
        targets(args.incoming ? static_cast<int>(graph.targets) : 0),
        own_row(args.symmetric ? 0 : anchors),
        memory(arena, args, rows, targets) {}

  __device__ __forceinline__ int anchor_of(int edge) const {
    return static_cast<int>(std::uint64_t{static_cast<std::uint32_t>(2 * edge)} * args.reciprocal >> 32);
  }
  static __device__ __forceinline__ std::uint32_t bit_of(int anchor) {
    return 1u << (static_cast<std::uint32_t>(anchor) % kWarpSize);
  }
  static __device__ __forceinline__ int word_number(int bit) {
    return static_cast<int>(static_cast<std::uint32_t>(bit) / kWarpSize);
  }
  __device__ __forceinline__ int word_of(int target, int anchor) const {
    return target * args.words + word_number(anchor);
  }
  // Where a pack of this lane lies in a line, and the first column of it. Lanes that differ in a bit by which the packs
  // of a lane differ read them in another order, and so never from the same banks.
  static __device__ __forceinline__ int lane_place() { return lane_id() % kLinePacks; }
  __device__ __forceinline__ int pack_place(int pack) const {
    return lane_place() ^ (pack << args.pack_shift >> kPacksShift);
  }
  __device__ __forceinline__ int place(int pack) const { return pack_place(pack) * kPack; }
  __device__ __forceinline__ std::int64_t column(int pack) const {
    return ((block_id() << args.pack_shift) + (pack_place(pack) & ((1 << args.pack_shift) - 1))) * kPack;
  }

  __device__ __forceinline__ Edges read_edges(int first) const {
    Edges edges;
#pragma unroll
    for (int l = 0; l < kEdgeLoads; ++l) {
      const int edge = first + l * kThreads + thread_id();
      edges.targets[l] = edge < all ? load(graph.indices + edge) : -1;
      edges.coefficients[l] = edge < all ? load(static_cast<const Acc*>(graph.coefficients) + edge) : Acc(0);
    }
    return edges;
  }
  // Own edges get their row and, until there is a weight, their coefficient; targets the bits of their anchors. Where
  // each anchor has an upstream gradient of its own there is a weight already, which list_edges takes once.
  __device__ __forceinline__ void note_edges(const Edges& edges, int first) const {
#pragma unroll
    for (int l = 0; l < kEdgeLoads; ++l) {
      const int edge = first + l * kThreads + thread_id();
      if (edge >= all) break;
      const std::int32_t target = edges.targets[l];
      const bool exists = static_cast<std::uint32_t>(target) < static_cast<std::uint32_t>(graph.targets);
      memory.sSources.set(args.padded_edges + edge, exists ? static_cast<std::uint16_t>(own_row + target) : kNoRow);
      const int anchor = anchor_of(edge);
      Acc value = edges.coefficients[l];
      if (graph.reduction == Reduction::kNone) {
        value = exists ? weight_of(graph, 0.0, static_cast<std::uint32_t>(anchor), value) : Acc(0);
      }
      memory.sWeights.set(args.padded_edges + edge, value);
      if (!exists || !args.incoming) continue;
      const std::uint32_t before = memory.sIncoming.atomic_or(word_of(target, anchor), bit_of(anchor));
      if ((before & bit_of(anchor)) != 0) memory.sListed.atomic_or(1, 1u);
    }
  }

  // Every lane reads the pack that its place in a line has, so that some are read several times.
  __device__ __forceinline__ Rows read_rows(int first) const {
    Rows read;
#pragma unroll
    for (int l = 0; l < kRowLoads; ++l) {
      read.packs[l] = {};
      const int row = (first + l * kThreads + thread_id()) / kLinePacks;
      if (row >= rows) continue;
      const T* gRow = row < anchors
                          ? static_cast<const T*>(args.anchors.data) + row * args.anchors.row_stride
                          : static_cast<const T*>(args.candidates.data) + (row - anchors) * args.candidates.row_stride;
      if (args.packs) {
        if (column(0) < graph.dims) read.packs[l] = load_pack<T, kLoadBytes>(gRow + column(0));
      } else {
#pragma unroll
        for (int e = 0; e < kPack; ++e) {
          if (column(0) + e < graph.dims) read.packs[l].elements[e] = load(gRow + column(0) + e);
        }
      }
    }
    return read;
  }
  __device__ __forceinline__ void keep_rows(const Rows& read, int first) const {
#pragma unroll
    for (int l = 0; l < kRowLoads; ++l) {
      const int at = first + l * kThreads + thread_id();
      if (at / kLinePacks >= rows) continue;
      Pack<Acc> pack;
#pragma unroll
      for (int e = 0; e < kPack; ++e) pack.elements[e] = widen(read.packs[l].elements[e]);
      memory.sRows.set_pack(at * kPack, pack);
    }
  }

  __device__ __forceinline__ void clear() const {
#pragma unroll 1
    for (int at = thread_id(); at < targets * args.words; at += kThreads) memory.sIncoming.set(at, 0);
    if (thread_id() < 2) memory.sListed.set(thread_id(), 0);
    if (thread_id() == 0) memory.sCounting.set(2 * args.padded_edges / kWarpSize, 0);
    if (all + thread_id() < args.padded_edges) memory.sSources.set(args.padded_edges + all + thread_id(), kNoRow);
  }

  // Edges before this one that lead to the same row.
  __device__ __forceinline__ int count_before(int edge, int row) const {
    int count = 0;
#pragma unroll 1
    for (int e = 0; e < edge; ++e) count += memory.sSources.get(args.padded_edges + e) == row ? 1 : 0;
    return count;
  }

  // By the warps that have targets: a thread finds room for the list of its target.
  __device__ __forceinline__ void make_room() const {
    const int target = thread_id();
    if (target - lane_id() >= targets) return;
    std::uint32_t count = 0;
    if (target < targets) {
      if (twice) {
        count = static_cast<std::uint32_t>(count_before(all, own_row + target));
      } else {
#pragma unroll 4
        for (int word = 0; word < args.words; ++word) {
          count += static_cast<std::uint32_t>(popcount(memory.sIncoming.get(target * args.words + word)));
        }
      }
    }
    const std::uint32_t up_to = prefix_sum(count);
    std::uint32_t begin = 0;
    if (lane_id() == kWarpSize - 1) begin = memory.sListed.atomic_add(0, up_to);
    begin = shuffle(begin, kWarpSize - 1) + up_to - count;
    if (target >= targets) return;
    memory.sLists.set(target, begin | count << 16);
#pragma unroll 4
    for (int word = 0; word < args.words; ++word) {
      const int at = target * args.words + word;
      memory.sPlaces.set(at, static_cast<std::uint16_t>(begin));
      begin += static_cast<std::uint32_t>(popcount(memory.sIncoming.get(at)));
    }
  }

  // Where the first edge from this anchor stands in a target's list, if there is one.
  __device__ __forceinline__ int place_of(int target, int anchor) const {
    const int word = word_of(target, anchor);
    return memory.sPlaces.get(word) + popcount(memory.sIncoming.get(word) & (bit_of(anchor) - 1u));
  }
  __device__ __forceinline__ bool selected_by(int target, int anchor) const {
    return (memory.sIncoming.get(word_of(target, anchor)) & bit_of(anchor)) != 0;
  }

  // kEach: edges of a thread at once.
  template <bool kTwice, int kEach = kTwice ? 1 : kEdgeLoads>
  __device__ __forceinline__ void list_edges() const {
    const double upstream = memory.sUpstream.get(0);
#pragma unroll 1
    for (int first = thread_id(); first < all; first += kEach * kThreads) {
#pragma unroll
      for (int l = 0; l < kEach; ++l) {
        const int edge = first + l * kThreads;
        if (edge >= all) break;
        const int row = memory.sSources.get(args.padded_edges + edge);
        if (row == kNoRow) continue;
        const int anchor = anchor_of(edge);
        const Acc weight = weight_of(upstream, memory.sWeights.get(args.padded_edges + edge));
        memory.sWeights.set(args.padded_edges + edge, weight);
        if (!args.incoming) continue;
        const int target = row - own_row;
        const int at = kTwice ? static_cast<int>(memory.sLists.get(target) & 0xffffu) + count_before(edge, row)
                              : place_of(target, anchor);
        memory.sSources.set(at, static_cast<std::uint16_t>(anchor));
        memory.sWeights.set(at, weight);
      }
    }
  }

  // Of the list of incoming edges of `target` those that come from `source`, which has one: what their weights add up
  // to, in the one order of sums, which cuts a list in chunks. They count no longer.
  template <bool kTwice>
  __device__ __forceinline__ Acc take_reverses(int target, int source) const {
    if constexpr (!kTwice) {
      const int at = place_of(target, source);
      const Acc weight = memory.sWeights.get(at);
      memory.sWeights.set(at, 0);
      return weight;
    }
    const int begin = static_cast<int>(memory.sLists.get(target) & 0xffffu);
    const int edges = static_cast<int>(memory.sLists.get(target) >> 16);
    const int rest = edges / kEdgeChunk * kEdgeChunk;
    Acc total = 0;
    Acc chunk = 0;
#pragma unroll 1
    for (int at = 0; at < edges; ++at) {
      if (at % kEdgeChunk == 0 || at >= rest) {
        total = add(total, chunk);
        chunk = 0;
      }
      if (memory.sSources.get(begin + at) != source) continue;
      chunk = add(chunk, memory.sWeights.get(begin + at));
      memory.sWeights.set(begin + at, 0);
    }
    return add(total, chunk);
  }
  // Whether an earlier own edge of the anchor leads to the same row.
  __device__ __forceinline__ bool repeats(int edge, int anchor, int row) const {
#pragma unroll 1
    for (int e = anchor * static_cast<int>(graph.edges); e < edge; ++e) {
      if (memory.sSources.get(args.padded_edges + e) == row) return true;
    }
    return false;
  }

  template <bool kTwice, int kEach = kTwice ? 1 : kEdgeLoads>
  __device__ __forceinline__ void merge_own_edges() const {
    const bool merges = args.symmetric && graph.edges <= kMergedSlots;
#pragma unroll 1
    for (int round = warp_id() * kWarpSize; round < args.padded_edges; round += kEach * kThreads) {
#pragma unroll
      for (int l = 0; l < kEach; ++l) {
        const int first = round + l * kThreads;
        if (first >= args.padded_edges) break;
        const int edge = first + lane_id();
        const int row = memory.sSources.get(args.padded_edges + edge);
        Acc weight = 0;
        if (row != kNoRow) {
          const int anchor = anchor_of(edge);
          weight = memory.sWeights.get(args.padded_edges + edge);
          if (merges && selected_by(anchor, row) && !(kTwice && repeats(edge, anchor, row))) {
            weight = add(weight, take_reverses<kTwice>(anchor, row));
            memory.sWeights.set(args.padded_edges + edge, weight);
          }
        }
        const std::uint32_t counting = ballot(weight != Acc(0));
        if (lane_id() == 0) memory.sCounting.set(word_number(args.padded_edges + first), counting);
      }
    }
  }
  __device__ __forceinline__ void count_listed() const {
    const int listed = static_cast<int>(memory.sListed.get(0));
#pragma unroll 1
    for (int round = warp_id() * kWarpSize; round < args.padded_edges; round += kEdgeLoads * kThreads) {
#pragma unroll
      for (int l = 0; l < kEdgeLoads; ++l) {
        const int first = round + l * kThreads;
        if (first >= args.padded_edges) break;
        const int at = first + lane_id();
        const std::uint32_t counting = ballot(at < listed && memory.sWeights.get(at) != Acc(0));
        if (lane_id() == 0) memory.sCounting.set(word_number(first), counting);
      }
    }
  }

  // Bits of the edges from this one on.
  __device__ __forceinline__ std::uint32_t counting_from(int at) const {
    const std::uint64_t low = memory.sCounting.get(at / kWarpSize);
    const std::uint64_t high = memory.sCounting.get(at / kWarpSize + 1);
    return static_cast<std::uint32_t>((high << kWarpSize | low) >> (at % kWarpSize));
  }

  // Of edges that count, the first of which has this number, those of one group of the lanes that share a list.
  __device__ __forceinline__ std::uint32_t share_of(std::uint32_t edges, int number, int group) const {
    const int others = (1 << args.group_shift) - 1;
    std::uint32_t share = 0;
#pragma unroll 1
    for (; edges != 0; edges &= edges - 1u, ++number) {
      if ((number & others) == group) share |= edges & (0u - edges);
    }
    return share;
  }

  // Adds those of the edges [begin, end) that count. The loads of some are under way together: where fewer are left,
  // the first is read again.
  __device__ __forceinline__ void sum_edges(Sum& sum, int begin, int end) const {
#pragma unroll 1
    for (int from = begin; from < end; from += kWarpSize) {
      std::uint32_t edges = counting_from(from);
      if (end - from < kWarpSize) edges &= (1u << (end - from)) - 1u;
      if (args.group_shift > 0) {
        const int number = sum.number;
        sum.number += popcount(edges);
        edges = share_of(edges, number, sum.group);
      }
#pragma unroll 1
      while (edges != 0) {
        int places[kAtOnce];
        bool exists[kAtOnce];
        int lines[kAtOnce];
        Acc weights[kAtOnce];
        Pack<Acc> packs[kAtOnce][kPacks];
#pragma unroll
        for (int r = 0; r < kAtOnce; ++r) {
          exists[r] = r == 0 || edges != 0;
          places[r] = exists[r] ? from + find_first(edges) : places[0];
          edges &= edges - 1u;
        }
#pragma unroll
        for (int r = 0; r < kAtOnce; ++r) lines[r] = memory.sSources.get(places[r]) * kLine;
#pragma unroll
        for (int r = 0; r < kAtOnce; ++r) weights[r] = memory.sWeights.get(places[r]);
#pragma unroll
        for (int r = 0; r < kAtOnce; ++r) {
#pragma unroll
          for (int p = 0; p < kPacks; ++p) packs[r][p] = memory.sRows.get_pack(lines[r] + place(p));
        }
#pragma unroll
        for (int r = 0; r < kAtOnce; ++r) {
          if (!exists[r]) continue;
#pragma unroll
          for (int p = 0; p < kPacks; ++p) {
#pragma unroll
            for (int v = 0; v < kPack; ++v) {
              const Acc difference = subtract(sum.own[p].elements[v], packs[r][p].elements[v]);
              sum.values[p][v] = fused_multiply_add(weights[r], difference, sum.values[p][v]);
            }
          }
        }
      }
    }
  }

  // All edges of a row: chunks of incoming edges, the rest of them, and own edges, which continue the rest or are
  // chunks as well.
  __device__ __forceinline__ void sum_row(Sum& sum, int row) const {
    const std::uint32_t list = args.incoming && row >= own_row ? memory.sLists.get(row - own_row) : 0;
    const int list_begin = static_cast<int>(list & 0xffffu);
    const int list_end = list_begin + static_cast<int>(list >> 16);
    const int chunks = (list_end - list_begin) / kEdgeChunk;
    const int slots = row < anchors ? static_cast<int>(graph.edges) : 0;
    const int own_begin = args.padded_edges + row * slots;
    const bool held = slots <= static_cast<int>(kMergedSlots);
    const int parts = chunks + 1 + (held ? 1 : (slots + kEdgeChunk - 1) / kEdgeChunk);
#pragma unroll 1
    for (int part = 0; part < parts; ++part) {
      const bool listed = part <= chunks;
      const int begin = listed ? list_begin + part * kEdgeChunk : own_begin + (part - chunks - 1) * kEdgeChunk;
      const int end = listed ? list_end : own_begin + slots;
      if (part > 0 && (listed || !held)) sum.add_to_total(listed);
      sum_edges(sum, begin, end - begin < kEdgeChunk ? end : begin + kEdgeChunk);
    }
  }

  // Joins the groups of lanes, and rounds.
  __device__ __forceinline__ void store(Sum& sum, int row, bool exists, double poison) const {
#pragma unroll
    for (int p = 0; p < kPacks; ++p) {
#pragma unroll
      for (int v = 0; v < kPack; ++v) {
        if (sum.summed) sum.values[p][v] = add(sum.total[p][v], sum.values[p][v]);
      }
#pragma unroll 1
      for (int group = 0; group < args.group_shift; ++group) {
#pragma unroll
        for (int v = 0; v < kPack; ++v) {
          sum.values[p][v] = add(sum.values[p][v], shuffle_xor(sum.values[p][v], 1 << (args.pack_shift + group)));
        }
      }
    }
    if (!exists || sum.group != 0) return;
    T* gRow = row < anchors ? static_cast<T*>(args.grad_anchors) + row * graph.dims
                            : static_cast<T*>(args.grad_candidates) + (row - anchors) * graph.dims;
#pragma unroll
    for (int p = 0; p < kPacks; ++p) {
      const std::int64_t first = column(p);
      RowPack pack;
#pragma unroll
      for (int v = 0; v < kPack; ++v) {
        pack.elements[v] = narrow<T>(is_nan(poison) ? quiet_nan<Acc>() : sum.values[p][v]);
      }
      if (args.packs) {
        if (first < graph.dims) store_pack(gRow + first, pack);
        continue;
      }
#pragma unroll
      for (int v = 0; v < kPack; ++v) {
        if (first + v < graph.dims) gRow[first + v] = pack.elements[v];
      }
    }
  }

  __device__ __forceinline__ void sum_rows(double poison) const {
    const int first_row = args.grad_anchors == nullptr ? anchors : 0;
    const int last_row = args.grad_candidates == nullptr ? anchors : rows;
    const int lane_shift = args.pack_shift - kPacksShift;  // log2 of the lanes that share a row
    const int shift = lane_shift + args.group_shift;
    const int items = (last_row - first_row) << shift;
#pragma unroll 1
    for (int first = warp_id() * kWarpSize; first < items; first += kThreads) {
      const int row = first_row + ((first + lane_id()) >> shift);
      const bool exists = row < last_row;
      Sum sum;
      sum.group = (lane_id() >> lane_shift) & ((1 << args.group_shift) - 1);
      if (exists) {
#pragma unroll
        for (int p = 0; p < kPacks; ++p) sum.own[p] = memory.sRows.get_pack(row * kLine + place(p));
        sum_row(sum, row);
      }
      store(sum, row, exists, poison);
    }
  }
};

template <typename T, int kPacks>
__global__ void __launch_bounds__(kThreads, kBlocks) resident_kernel(__grid_constant__ const ResidentArgs args) {
  using Acc = sn::cuda::Acc<T>;
  constexpr int kEdgeRound = kEdgeLoads * kThreads;
  constexpr int kRowRound = kRowLoads * kThreads;
  Resident<T, kPacks> block(args);
  const Graph& graph = args.graph;

  // 1. All first loads are under way before the first one is waited for.
  block.clear();
  wait_for_primary();
  auto edges = block.read_edges(0);
  UpstreamParts<Acc> upstream;
  if (warp_id() == kWarps - 1) upstream.read(graph);
  const double poison = load(graph.stats + kPoison);
  auto read = block.read_rows(0);
  sync_block();
#pragma unroll 1
  for (int first = 0;;) {
    block.note_edges(edges, first);
    first += kEdgeRound;
    if (first >= block.all) break;
    edges = block.read_edges(first);
  }
#pragma unroll 1
  for (int first = 0;;) {
    block.keep_rows(read, first);
    first += kRowRound;
    if (first >= block.rows * kLinePacks) break;
    read = block.read_rows(first);
  }
  sync_block();

  // 2. Room.
  block.twice = block.memory.sListed.get(1) != 0;
  block.make_room();
  if (warp_id() == kWarps - 1 && lane_id() == 0) {
    block.memory.sUpstream.set(0, graph.reduction == Reduction::kNone ? 1.0 : upstream.value(graph));
  }
  sync_block();

  // 3. Lists.
  if (block.twice) {
    block.template list_edges<true>();
  } else {
    block.template list_edges<false>();
  }
  sync_block();

  // 4. Own edges.
  if (block.twice) {
    block.template merge_own_edges<true>();
  } else {
    block.template merge_own_edges<false>();
  }
  sync_block();

  // 5. What counts.
  block.count_listed();
  sync_block();

  // 6. Sums.
  block.sum_rows(poison);
}

// ---- launch ---------------------------------------------------------------------------------------------------------

ResidentArgs resident_args_of(const BackwardArgs& args, const BackwardPlan& plan, const ResidentShape& shape) {
  ResidentArgs resident{};
  resident.graph = graph_of(args);
  resident.anchors = args.anchors;
  if (!args.symmetric) resident.candidates = args.candidates;
  resident.grad_anchors = args.grad_anchors;
  resident.grad_candidates = args.symmetric ? nullptr : args.grad_candidates;
  const std::int64_t edges = std::max<std::int64_t>(args.edges, 1);
  resident.reciprocal = static_cast<std::uint32_t>(divide_up(std::int64_t{1} << 31, edges));
  resident.padded_edges = static_cast<int>(shape.padded_edges);
  resident.words = static_cast<int>(shape.words);
  while ((1 << resident.pack_shift) < plan.row_packs) ++resident.pack_shift;
  while ((plan.row_lanes << resident.group_shift) < kWarpSize) ++resident.group_shift;
  resident.symmetric = args.symmetric;
  resident.incoming = shape.targets > 0;
  resident.packs = gathers_packs(args);
  return resident;
}

}  // namespace

// ---- dispatch -------------------------------------------------------------------------------------------------------

cudaError_t enqueue_resident(const BackwardArgs& args, const BackwardPlan& plan, cudaStream_t stream) {
  const ResidentShape resident = resident_shape(problem_of(args));
  if (!resident_serves(resident, plan.row_packs, plan.row_lanes)) return cudaErrorInvalidValue;
  if (!resident_threads_serve(plan)) return cudaErrorInvalidValue;
  const LaunchShape shape{
      .blocks = plan.slices,
      .threads = kThreads,
      .shared_bytes = static_cast<int>(resident_shared_bytes(resident, accumulator_bytes(args.dtype))),
      .dependent = plan.dependent};
  const ResidentArgs resident_args = resident_args_of(args, plan, resident);
  return for_type(args.dtype, [&]<class T>() {
    const auto kernel = plan.thread_packs == 4   ? resident_kernel<T, 4>
                        : plan.thread_packs == 2 ? resident_kernel<T, 2>
                                                 : resident_kernel<T, 1>;
    return launch(kernel, shape, stream, resident_args);
  });
}

}  // namespace sn::cuda
