// Backward: a sparse gather by target row, without atomics on numbers.
//
//   out_t = sum over the edges e of target t of  w_e (x_t - other_e),     w_e = acc(upstream * coefficient_e)
//
// Difference first: the factored form (sum w) x_t - sum w other cancels for near neighbours. The edges of a target are
// its incoming ones (an anchor that selected it; ascending edge id) and its own (in slot order); a side of the problem
// has one kind, the symmetric case both. There, an incoming edge whose reverse is an own edge is the same vector: its
// weight is added to the own edge's, and the row is fetched once. Edges without an index or with weight 0 do not count.
//
// ONE order of summation, whatever the plan, the schedule and the other rows:
//   the incoming edges of a target, those that do not count included, are cut into chunks of kEdgeChunk;
//   a full chunk is summed from zero by fused multiply-adds in order, and chunk sums are added in order to the total;
//   the rest is summed in the same way, then the own edges go on with that sum (more than kMergedSlots own edges: each
//   kEdgeChunk of them are a chunk as well); it is added to the total last, and rounded once.
//   Where a row of the slice needs only L < 32 lanes, 32 / L groups of lanes share the list, group g taking edges
//   g, g + 32 / L, ..., and meet in a butterfly before the rounding. L depends on D and the type alone.
//
// gather_kernel: a block of 8 warps serves 8 targets, a warp each, in a slice of D. Blocks of one slice are neighbours in
// the grid, so that the slice of all rows stays in the second-level cache while they run. Window by window of 2048 edges,
//   1. each warp reads an eighth of the window, and lists in shared memory those that hit one of the 8 targets;
//   2. each warp walks the 8 lists and appends its own target's edges to the tail of that target;
//   3. if a tail has reached a chunk (a hub, or many neighbours): the edges are listed target by target, all warps take
//      chunks of all targets in turn, and the targets' warps add the chunk sums in order. Nothing waits for one warp.
// At the end each warp serves its tail and its own edges. Rows are fetched several at a time: 80 to 128 bytes a lane.
//
// Larger problems first put the edges in buckets of targets (count, scan, place: a stable counting sort, so that edges
// stay in ascending order), and a block reads its bucket instead of everything. Positions in a bucket order a target's
// edges as positions in the graph do: results are the same, bit for bit.
#include <cstdint>

#include "cuda/launch.cuh"
#include "cuda/memory.cuh"
#include "cuda/ptx.cuh"
#include "cuda/stages.h"

namespace sn::cuda {
namespace {

// ---- traits ---------------------------------------------------------------------------------------------------------

template <typename T>
struct BackwardTraits {
  using Acc = float;
};
template <>
struct BackwardTraits<double> {
  using Acc = double;
};

constexpr int kWarps = static_cast<int>(kBackwardGroup);  // of a gather block: one a target
constexpr int kThreads = kWarps * kWarpSize;
// 80 registers a thread: 24 warps with 4 KB under way each are more than twice what hides the latency of the
// second-level cache at a multiprocessor's share of its bandwidth.
// Unaligned rows need an address an element.
constexpr int kMinBlocks = 3;
constexpr int kMinBlocksUnaligned = 2;

constexpr int kScanLoads = 8;  // of a lane, at once
constexpr int kWarpWindow = kScanLoads * kWarpSize;
constexpr int kWindow = kWarps * kWarpWindow;
constexpr int kGroupBits = 3;  // of a listed edge: which of the targets; the rest: where in the window
static_assert((1 << kGroupBits) == kBackwardGroup);
static_assert(kWindow << kGroupBits <= 0x10000, "a listed edge has 16 bits");

constexpr int kEdgeChunk = 64;
constexpr int kMergedSlots = kWarpSize;           // own edges that a warp holds one a lane
constexpr int kList = kEdgeChunk + kMergedSlots;  // edges that a warp gathers in one go
constexpr int kSorted = kWindow + kWarps * kEdgeChunk;
static_assert(kEdgeChunk % kWarpSize == 0);
static_assert(kSorted <= 0x10000, "a sorted edge has 16 bits");

// Registers of a lane for rows under way: what 80 registers leave. Half-precision rows need twice the addresses.
template <typename T>
constexpr int kRowRegisters = sizeof(T) == 2 ? 20 : (sizeof(T) == 4 ? 32 : 24);

constexpr int kPartThreads = 256;         // of a block that counts or places, at most
constexpr int kCounterBytes = 32 * 1024;  // of such a block: fewer warps where there are many buckets
constexpr std::int64_t kMostPartBuckets = kCounterBytes / 4;
constexpr int kPartLoads = 4;  // of a lane, at once
constexpr int kScanPack = Pack<std::uint32_t>::kElements;

// ---- arguments ------------------------------------------------------------------------------------------------------

struct BackwardSide {
  const void* own;  // rows of the targets
  std::int64_t own_stride;
  const void* other;
  std::int64_t other_stride;
  std::int64_t rows;
  std::int64_t other_rows;
  std::int64_t groups;
  void* out;
  bool takes_own;
  bool takes_incoming;
};

struct Graph {
  std::int64_t dims;
  std::int64_t targets;  // M
  std::uint32_t edges;   // of an anchor
  std::uint32_t all_edges;
  Reduction reduction;
  const std::int32_t* indices;
  const void* coefficients;
  const void* grad_loss;
  const double* stats;
};

struct Buckets {
  int shift;
  std::int64_t count;
  std::int64_t parts;
  std::int64_t part_edges;
  std::uint32_t* histogram;
  std::uint32_t* totals;
  std::uint32_t* begins;
  std::int32_t* placed_targets;  // null: edges are not placed
  std::int32_t* placed_sources;
  void* placed_weights;
};

struct GatherArgs {
  Graph graph;
  Buckets buckets;
  BackwardSide sides[2];
  std::int64_t first_blocks;  // that serve sides[0]
  std::int64_t slice_elements;
  int row_shift;  // log2 of the lanes of a row
  bool merge;
};

// ---- kernel: weights ------------------------------------------------------------------------------------------------

template <typename Acc>
__device__ __forceinline__ Acc quiet_nan() {
  if constexpr (sizeof(Acc) == 8) {
    return double_from_bits(0x7ff8000000000000u);
  } else {
    return float_from_bits(0x7fc00000u);
  }
}

// Upstream gradient of every anchor, unless each has its own.
template <typename Acc>
__device__ __forceinline__ double shared_upstream(const Graph& graph) {
  if (graph.reduction == Reduction::kNone) return 0.0;
  const double upstream = static_cast<double>(load(static_cast<const Acc*>(graph.grad_loss)));
  if (graph.reduction == Reduction::kSum) return upstream;
  const double valid = load(graph.stats + kValidAnchors);
  return valid > 0.0 ? upstream / valid : 0.0;
}

// Weight of edge `edge` of the graph, whose anchor is `anchor`. A coefficient of 0 stays 0 whatever comes from upstream.
template <typename Acc>
__device__ __forceinline__ Acc edge_weight(const Graph& graph, double upstream, std::uint32_t anchor,
                                           std::uint32_t edge) {
  const Acc coefficient = load(static_cast<const Acc*>(graph.coefficients) + edge);
  if (graph.reduction == Reduction::kNone) {
    upstream = static_cast<double>(load(static_cast<const Acc*>(graph.grad_loss) + anchor));
  }
  if (coefficient == Acc(0)) return Acc(0);
  return narrow<Acc>(multiply(upstream, static_cast<double>(coefficient)));
}

// ---- kernel: rows ---------------------------------------------------------------------------------------------------

// The elements of the slice that a lane works on. kVector: packs of 16 bytes, neighbouring lanes side by side, each
// whole or beyond D. Otherwise the same number of single elements, neighbouring lanes side by side. What lies beyond D
// is loaded from the beginning of the strip, or of the row, so that loads need no conditions, and never stored.
template <typename T, int kPacks, bool kVector>
struct Strip {
  using Acc = typename BackwardTraits<T>::Acc;
  static constexpr int kPack = Pack<T>::kElements;
  static constexpr int kValues = kPacks * kPack;
  static constexpr int kRegisters = kVector ? 4 * kPacks : kValues * (sizeof(T) > 4 ? 2 : 1);
  static constexpr int kRows = kRowRegisters<T> / kRegisters;  // under way at once
  static_assert(kRows >= 2);

  std::int64_t begin;  // first element
  int step;            // between packs, or elements
  int left;            // elements from `begin` to D; not more than 0: nothing to do

  __device__ __forceinline__ Strip(std::int64_t dims, std::int64_t slice_begin, int row_shift) {
    const int sub = lane_id() & ((1 << row_shift) - 1);
    begin = slice_begin + (kVector ? sub * kPack : sub);
    step = (kVector ? kPack : 1) << row_shift;
    constexpr int kMost = kValues * kWarpSize;
    left = static_cast<int>(dims - begin < kMost ? dims - begin : kMost);
    if (left <= 0) begin = 0;
  }

  // `row`: where the strip begins in it.
  __device__ __forceinline__ void load_row(Pack<T> (&rRow)[kPacks], const T* row) const {
#pragma unroll
    for (int p = 0; p < kPacks; ++p) {
      if constexpr (kVector) {
        rRow[p] = load_pack(row + (p * step < left ? p * step : 0));
      } else {
#pragma unroll
        for (int e = 0; e < kPack; ++e) {
          const int at = (p * kPack + e) * step;
          rRow[p].elements[e] = load(row + (at < left ? at : 0));
        }
      }
    }
  }

  __device__ __forceinline__ void store_row(T* row, const Acc (&rSum)[kValues]) const {
#pragma unroll
    for (int p = 0; p < kPacks; ++p) {
      if constexpr (kVector) {
        Pack<T> pack;
#pragma unroll
        for (int e = 0; e < kPack; ++e) pack.elements[e] = narrow<T>(rSum[p * kPack + e]);
        if (p * step < left) store_pack(row + p * step, pack);
      } else {
#pragma unroll
        for (int e = 0; e < kPack; ++e) {
          const int at = (p * kPack + e) * step;
          if (at < left) row[at] = narrow<T>(rSum[p * kPack + e]);
        }
      }
    }
  }
};

// Edges that a warp is about to gather.
template <typename Acc>
struct EdgeList {
  Shared<std::int32_t> sources;
  Shared<Acc> weights;

  __device__ __forceinline__ void append(int& count, bool valid, std::int32_t source, Acc weight) const {
    const std::uint32_t taken = ballot(valid);
    if (valid) {
      const int at = count + popcount(taken & lanes_below());
      sources.set(at, source);
      weights.set(at, weight);
    }
    count += popcount(taken);
  }
};

// kRows edges from `first` on, of each group of lanes. kFull: all of them exist.
template <bool kFull, typename T, int kPacks, bool kVector>
__device__ __forceinline__ void gather_rows(const Strip<T, kPacks, kVector>& strip,
                                            const EdgeList<typename BackwardTraits<T>::Acc>& list, int count, int first,
                                            int groups, const T* other, std::int64_t stride,
                                            const typename BackwardTraits<T>::Acc (&rOwn)[kPacks * Pack<T>::kElements],
                                            typename BackwardTraits<T>::Acc (&rSum)[kPacks * Pack<T>::kElements]) {
  using Lane = Strip<T, kPacks, kVector>;
  Pack<T> rRows[Lane::kRows][kPacks];
#pragma unroll
  for (int r = 0; r < Lane::kRows; ++r) {
    const int edge = first + r * groups;
    if (kFull || edge < count) {
      strip.load_row(rRows[r], other + list.sources.get(edge) * stride);
    } else {
#pragma unroll
      for (int p = 0; p < kPacks; ++p) rRows[r][p] = Pack<T>{};
    }
  }
#pragma unroll
  for (int r = 0; r < Lane::kRows; ++r) {
    const int edge = first + r * groups;
    if (kFull || edge < count) {
      const auto weight = list.weights.get(edge);
#pragma unroll
      for (int v = 0; v < Lane::kValues; ++v) {
        const auto value = widen(rRows[r][v / Lane::kPack].elements[v % Lane::kPack]);
        rSum[v] = fused_multiply_add(weight, subtract(rOwn[v], value), rSum[v]);
      }
    }
  }
}

// Adds the edges of the list to rSum. The list is complete when this is called, and free when it returns.
template <typename T, int kPacks, bool kVector>
__device__ __forceinline__ void gather_list(const Strip<T, kPacks, kVector>& strip, int row_shift,
                                            const EdgeList<typename BackwardTraits<T>::Acc>& list, int count,
                                            const T* own, const T* other, std::int64_t stride,
                                            typename BackwardTraits<T>::Acc (&rSum)[kPacks * Pack<T>::kElements]) {
  using Lane = Strip<T, kPacks, kVector>;
  using Acc = typename Lane::Acc;
  sync_warp();
  if (count > 0) {
    Acc rOwn[Lane::kValues];
    {
      Pack<T> rRow[kPacks];
      strip.load_row(rRow, own);
#pragma unroll
      for (int v = 0; v < Lane::kValues; ++v) rOwn[v] = widen(rRow[v / Lane::kPack].elements[v % Lane::kPack]);
    }
    const int groups = kWarpSize >> row_shift;
    const int group = lane_id() >> row_shift;
    int first = 0;
    for (; first + Lane::kRows * groups <= count; first += Lane::kRows * groups) {
      gather_rows<true>(strip, list, count, first + group, groups, other, stride, rOwn, rSum);
    }
    if (first < count) gather_rows<false>(strip, list, count, first + group, groups, other, stride, rOwn, rSum);
  }
  sync_warp();
}

// Sums of a warp's lanes in shared memory, each lane's own in packs.
template <typename Acc, int kValues>
struct LaneSums {
  static constexpr int kPack = Pack<Acc>::kElements;
  static constexpr int kWarpElements = kValues * kWarpSize;
  static_assert(kValues % kPack == 0);

  static __device__ __forceinline__ void store(const Shared<Acc>& sums, int warp, const Acc (&rSum)[kValues]) {
#pragma unroll
    for (int p = 0; p < kValues / kPack; ++p) {
      Pack<Acc> pack;
#pragma unroll
      for (int e = 0; e < kPack; ++e) pack.elements[e] = rSum[p * kPack + e];
      sums.set_pack(warp * kWarpElements + (p * kWarpSize + lane_id()) * kPack, pack);
    }
  }
  // rSum = what is there + rSum.
  static __device__ __forceinline__ void add_to(const Shared<Acc>& sums, int warp, Acc (&rSum)[kValues]) {
#pragma unroll
    for (int p = 0; p < kValues / kPack; ++p) {
      const Pack<Acc> pack = sums.get_pack(warp * kWarpElements + (p * kWarpSize + lane_id()) * kPack);
#pragma unroll
      for (int e = 0; e < kPack; ++e) rSum[p * kPack + e] = add(pack.elements[e], rSum[p * kPack + e]);
    }
  }
};

// ---- kernel: edges --------------------------------------------------------------------------------------------------

template <typename Acc>
struct IncomingEdges {
  const Graph& graph;
  const Buckets& buckets;
  Shared<std::int32_t> sOwnIndices;
  Shared<double> sUpstream;
  std::uint32_t scan_begin;
  bool placed;
  bool merge;

  // Puts the edge at `position` of the scan, one a lane, on the list if it counts and has no reverse among the own edges
  // of `target`; else adds its weight to `merged` of the lane that holds the reverse.
  __device__ __forceinline__ void append(const EdgeList<Acc>& list, int& count, int target, bool valid,
                                         std::uint32_t position, Acc& merged) const {
    std::int32_t source = 0;
    Acc weight = 0;
    if (valid) {
      if (placed) {
        const std::int64_t at = std::int64_t{scan_begin} + position;
        source = load(buckets.placed_sources + at);
        weight = load(static_cast<const Acc*>(buckets.placed_weights) + at);
      } else {
        const std::uint32_t anchor = position / graph.edges;
        source = static_cast<std::int32_t>(anchor);
        weight = edge_weight<Acc>(graph, sUpstream.get(0), anchor, position);
      }
    }
    int reverse = -1;
    if (merge) {
      for (int slot = static_cast<int>(graph.edges) - 1; slot >= 0; --slot) {
        if (sOwnIndices.get(target * kMergedSlots + slot) == source) reverse = slot;
      }
    }
    const bool counts = weight != Acc(0);
    for (std::uint32_t merging = ballot(counts && reverse >= 0); merging != 0; merging &= merging - 1) {
      const int from = find_first(merging);
      const int into = shuffle(reverse, from);
      const Acc more = shuffle(weight, from);
      if (lane_id() == into) merged = add(merged, more);
    }
    list.append(count, counts && reverse < 0, source, weight);
  }
};

// Targets of the edges of a window that this lane looks at. The warps share the window, so that their lists are equally
// long; the last window may be short.
struct WindowTargets {
  int share = 0;  // edges of a warp
  std::uint32_t targets[kScanLoads];

  __device__ __forceinline__ void read(const std::int32_t* gTargets, std::uint32_t window, std::uint32_t scan_count) {
    const std::uint32_t here = scan_count - window < kWindow ? scan_count - window : kWindow;
    share = static_cast<int>((here + kThreads - 1) / kThreads) * kWarpSize;
#pragma unroll
    for (int l = 0; l < kScanLoads; ++l) {
      const std::uint32_t at = static_cast<std::uint32_t>(warp_id() * share + l * kWarpSize + lane_id());
      const bool exists = l * kWarpSize < share && at < here;
      targets[l] = exists ? static_cast<std::uint32_t>(load(gTargets + window + at)) : 0xffffffffu;
    }
  }
};

// The edges of a window that hit the group, in a list for each warp that read them.
struct WindowMatches {
  Shared<std::uint16_t> sMatches;
  Shared<int> sCounts;

  // Lists this warp's.
  __device__ __forceinline__ void list(const WindowTargets& window, std::uint32_t first, int targets) const {
    int count = 0;
#pragma unroll
    for (int l = 0; l < kScanLoads; ++l) {
      if (l * kWarpSize >= window.share) break;
      const std::uint32_t target = window.targets[l] - first;
      const bool hit = target < static_cast<std::uint32_t>(targets);
      const std::uint32_t hits = ballot(hit);
      if (hit) {
        const int place = warp_id() * window.share + l * kWarpSize + lane_id();
        sMatches.set(warp_id() * kWarpWindow + count + popcount(hits & lanes_below()),
                     static_cast<std::uint16_t>((place << kGroupBits) | static_cast<int>(target)));
      }
      count += popcount(hits);
    }
    if (lane_id() == 0) sCounts.set(warp_id(), count);
  }

  // keep(rank, place in the window) of those that hit this warp's target, in order. Returns how many.
  template <typename Keep>
  __device__ __forceinline__ int walk(const Keep& keep) const {
    int found = 0;
    const auto take = [&](int from, int at, bool exists) {
      const int match = exists ? sMatches.get(from * kWarpWindow + at) : 0;
      const bool mine = exists && (match & (kWarps - 1)) == warp_id();
      const std::uint32_t all = ballot(mine);
      if (mine) keep(found + popcount(all & lanes_below()), match >> kGroupBits);
      found += popcount(all);
    };
    const int longest = static_cast<int>(
        reduce_max(lane_id() < kWarps ? static_cast<std::uint32_t>(sCounts.get(lane_id() % kWarps)) : 0u));
    if (longest <= kWarpSize) {
      // The usual case, with all reads under way at once.
#pragma unroll
      for (int from = 0; from < kWarps; ++from) take(from, lane_id(), lane_id() < sCounts.get(from));
    } else {
      for (int from = 0; from < kWarps; ++from) {
        const int count = sCounts.get(from);
        for (int base = 0; base < count; base += kWarpSize) take(from, base + lane_id(), base + lane_id() < count);
      }
    }
    return found;
  }
};

// The edges of a window and of the tails, target by target.
struct SortedEdges {
  Shared<std::uint16_t> sSorted;
  Shared<std::uint32_t> sTails;
  std::uint32_t window;

  __device__ __forceinline__ std::uint32_t position(int target, int at) const {
    const int place = sSorted.get(at);
    return place < kWindow ? window + static_cast<std::uint32_t>(place)
                           : sTails.get(target * kEdgeChunk + place - kWindow);
  }
};

// ---- kernel: gather -------------------------------------------------------------------------------------------------

template <typename T, int kPacks>
constexpr int gather_shared_bytes() {
  using Acc = typename BackwardTraits<T>::Acc;
  constexpr int kSums = kWarps * kWarpSize * kPacks * Pack<T>::kElements;
  static_assert(shared_bytes<Acc>(kSums) >= shared_bytes<std::uint16_t>(kWindow), "matches lie where chunk sums will");
  return shared_bytes<std::uint16_t>(kSorted) + 2 * shared_bytes<int>(kWarps) +
         shared_bytes<std::uint32_t>(kWarps * kEdgeChunk) + shared_bytes<std::int32_t>(kWarps * kMergedSlots) +
         shared_bytes<std::int32_t>(kWarps * kList) + shared_bytes<Acc>(kWarps * kList) +
         shared_bytes<Acc>(kWarps * kMergedSlots) + 2 * shared_bytes<Acc>(kSums) + shared_bytes<double>(1);
}
// Three blocks of float fit the 100 KB of the smallest multiprocessors, of which a block costs 1 KB more than it asks for.
static_assert(kMinBlocks * (gather_shared_bytes<float, 2>() + 1024) <= 100 * 1024);
static_assert(gather_shared_bytes<double, 2>() <= kPlainSharedBytes);

template <typename T, int kPacks, bool kVector>
__global__ void __launch_bounds__(kThreads, kVector ? kMinBlocks : kMinBlocksUnaligned)
    gather_kernel(__grid_constant__ const GatherArgs args) {
  using Lane = Strip<T, kPacks, kVector>;
  using Acc = typename Lane::Acc;
  using Sums = LaneSums<Acc, Lane::kValues>;

  SharedArena arena;
  const auto sSorted = arena.take<std::uint16_t>(kSorted);  // edges target by target: in the window, or in the tail
  const auto sMatchCounts = arena.take<int>(kWarps);
  const auto sLengths = arena.take<int>(kWarps);                       // edges of a target that wait
  const auto sTails = arena.take<std::uint32_t>(kWarps * kEdgeChunk);  // their positions, less than a chunk
  const auto sOwnIndices = arena.take<std::int32_t>(kWarps * kMergedSlots);
  const auto sSources = arena.take<std::int32_t>(kWarps * kList);
  const auto sWeights = arena.take<Acc>(kWarps * kList);
  const auto sMerged = arena.take<Acc>(kWarps * kMergedSlots);  // of a chunk: weights that belong to own edges
  const auto sTotals = arena.take<Acc>(kWarps * Sums::kWarpElements);
  const auto sPartials = arena.take<Acc>(kWarps * Sums::kWarpElements);  // chunk sums
  // Edges of the window that hit the group, warp by warp; done with before there are chunk sums.
  const auto sMatches = sPartials.template view<std::uint16_t>();
  const auto sUpstream = arena.take<double>(1);

  const Graph& graph = args.graph;
  const int warp = warp_id();
  const int lane = lane_id();

  const bool second = block_id() >= args.first_blocks;
  const BackwardSide& side = args.sides[second ? 1 : 0];
  const std::uint32_t block = static_cast<std::uint32_t>(block_id() - (second ? args.first_blocks : 0));
  const std::uint32_t slice = block / static_cast<std::uint32_t>(side.groups);
  const std::uint32_t first = (block - slice * static_cast<std::uint32_t>(side.groups)) * kWarps;
  const std::int64_t rest = side.rows - first;
  const int targets = static_cast<int>(rest < kBackwardGroup ? rest : kBackwardGroup);
  const bool takes_own = side.takes_own && warp < targets;
  const bool held = graph.edges <= kMergedSlots;  // own edges one a lane

  const Lane strip(graph.dims, slice * args.slice_elements, args.row_shift);
  const T* gOwn = static_cast<const T*>(side.own) + strip.begin;
  const T* gOther = static_cast<const T*>(side.other) + strip.begin;

  std::uint32_t scan_begin = 0;
  std::uint32_t scan_count = 0;
  const bool placed = args.buckets.placed_targets != nullptr;
  const std::int32_t* gTargets = graph.indices;
  if (side.takes_incoming) {
    scan_count = graph.all_edges;
    if (placed) {
      const std::uint32_t* gBegins = args.buckets.begins + (first >> args.buckets.shift);
      scan_begin = load(gBegins);
      scan_count = load(gBegins + 1) - scan_begin;
      gTargets = args.buckets.placed_targets + scan_begin;
    }
  }

  // All first loads are under way before the first one is waited for.
  WindowTargets rWindow;
  rWindow.read(gTargets, 0, scan_count);
  const std::uint32_t target = first + static_cast<std::uint32_t>(warp);  // this warp's
  const bool holds = takes_own && held && static_cast<std::uint32_t>(lane) < graph.edges;
  {
    std::int32_t rIndex = holds ? load(graph.indices + target * graph.edges + lane) : -1;
    if (rIndex >= side.other_rows) rIndex = -1;
    sOwnIndices.set(warp * kMergedSlots + lane, rIndex);
  }
  if (warp == 0) {
    const double upstream = shared_upstream<Acc>(graph);
    if (lane == 0) sUpstream.set(0, upstream);
  }

  const EdgeList<Acc> list{sSources.offset(warp * kList), sWeights.offset(warp * kList)};
  const IncomingEdges<Acc> incoming{graph, args.buckets, sOwnIndices, sUpstream, scan_begin, placed, args.merge};
  const WindowMatches matches{sMatches, sMatchCounts};
  Acc rMerged = 0;  // of own edge `lane`: weights of incoming edges that have it as their reverse

  int waiting = 0;      // edges in this warp's tail
  bool summed = false;  // chunks of this warp's target have been added to its total

  for (std::uint32_t window = 0; window < scan_count;) {
    // 1. What hits the group. The next window is under way while this one's matches are sorted out.
    matches.list(rWindow, first, targets);
    const std::uint32_t next = scan_count - window > kWindow ? window + kWindow : scan_count;
    sync_block();
    rWindow.read(gTargets, next, scan_count);

    // 2. What hits this warp's target.
    const int found = matches.walk([&](int rank, int place) {
      if (waiting + rank < kEdgeChunk) {
        sTails.set(warp * kEdgeChunk + waiting + rank, window + static_cast<std::uint32_t>(place));
      }
    });
    const int length = waiting + found;
    if (lane == 0) sLengths.set(warp, length);
    sync_block();
    if (!any_lane(lane < kWarps && sLengths.get(lane % kWarps) >= kEdgeChunk)) {
      waiting = length;
      window = next;
      continue;
    }

    // 3. Chunks. The tail is what it was up to `waiting`; what was appended above is listed again.
    int chunks = 0;
    int sorted_begin = 0;
    for (int of = 0; of < kWarps; ++of) {
      const int edges = sLengths.get(of);
      chunks += edges / kEdgeChunk;
      sorted_begin += of < warp ? edges : 0;
    }
    for (int at = lane; at < waiting; at += kWarpSize) {
      sSorted.set(sorted_begin + at, static_cast<std::uint16_t>(kWindow + at));
    }
    matches.walk(
        [&](int rank, int place) { sSorted.set(sorted_begin + waiting + rank, static_cast<std::uint16_t>(place)); });
    const SortedEdges sorted{sSorted, sTails, window};
    sync_block();
    for (int round = 0; round < chunks; round += kWarps) {
      // Chunk round + warp is some target's.
      {
        int chunk = round + warp;
        int of = 0;
        int begin = 0;
        for (; of < kWarps; ++of) {
          const int edges = sLengths.get(of);
          if (chunk < edges / kEdgeChunk) break;
          chunk -= edges / kEdgeChunk;
          begin += edges;
        }
        if (of < kWarps) {
          int count = 0;
          Acc merged = 0;
          for (int at = lane; at < kEdgeChunk; at += kWarpSize) {
            incoming.append(list, count, of, true, sorted.position(of, begin + chunk * kEdgeChunk + at), merged);
          }
          sMerged.set(warp * kMergedSlots + lane, merged);
          Acc rSum[Lane::kValues] = {};
          gather_list(strip, args.row_shift, list, count,
                      gOwn + std::int64_t{first + static_cast<std::uint32_t>(of)} * side.own_stride, gOther,
                      side.other_stride, rSum);
          Sums::store(sPartials, warp, rSum);
        }
      }
      sync_block();
      {
        int chunk = 0;
        for (int before = 0; before < warp; ++before) chunk += sLengths.get(before) / kEdgeChunk;
        const int end = chunk + length / kEdgeChunk;
        for (int by = 0; by < kWarps; ++by) {
          if (round + by < chunk || round + by >= end) continue;
          Acc rSum[Lane::kValues] = {};
          Sums::add_to(sPartials, by, rSum);
          if (summed) Sums::add_to(sTotals, warp, rSum);
          Sums::store(sTotals, warp, rSum);
          rMerged = add(rMerged, sMerged.get(by * kMergedSlots + lane));
          summed = true;
        }
      }
      sync_block();
    }
    waiting = length % kEdgeChunk;
    if (length >= kEdgeChunk) {  // else the tail is right: what was appended above belongs there
      for (int at = lane; at < waiting; at += kWarpSize) {
        sTails.set(warp * kEdgeChunk + at, sorted.position(warp, sorted_begin + length - waiting + at));
      }
    }
    window = next;
    rWindow.read(gTargets, window, scan_count);  // once more, rather than in registers all the while
  }
  sync_block();

  // The rest of the incoming edges, then the own ones.
  if (warp >= targets) return;
  const double poison = load(graph.stats + kPoison);
  Acc rSum[Lane::kValues] = {};
  int count = 0;
  for (int base = 0; base < waiting; base += kWarpSize) {
    const int at = base + lane;
    const bool valid = at < waiting;
    incoming.append(list, count, warp, valid, valid ? sTails.get(warp * kEdgeChunk + at) : 0, rMerged);
  }
  if (takes_own && held) {
    const std::int32_t index = sOwnIndices.get(warp * kMergedSlots + lane);
    Acc weight = 0;
    if (index >= 0) {
      const std::uint32_t edge = target * graph.edges + static_cast<std::uint32_t>(lane);
      weight = add(edge_weight<Acc>(graph, sUpstream.get(0), target, edge), rMerged);
    }
    list.append(count, weight != Acc(0), index, weight);
  }
  gather_list(strip, args.row_shift, list, count, gOwn + std::int64_t{target} * side.own_stride, gOther,
              side.other_stride, rSum);
  if (takes_own && !held) {
    for (std::uint32_t slots = 0; slots < graph.edges; slots += kEdgeChunk) {
      if (summed) Sums::add_to(sTotals, warp, rSum);
      Sums::store(sTotals, warp, rSum);
      summed = true;
      count = 0;
      for (std::uint32_t at = static_cast<unsigned>(lane); at < kEdgeChunk; at += kWarpSize) {
        std::int32_t index = -1;
        Acc weight = 0;
        if (slots + at < graph.edges) {
          const std::uint32_t edge = target * graph.edges + slots + at;
          index = load(graph.indices + edge);
          weight = edge_weight<Acc>(graph, sUpstream.get(0), target, edge);
        }
        list.append(count, index >= 0 && index < side.other_rows && weight != Acc(0), index, weight);
      }
#pragma unroll
      for (int v = 0; v < Lane::kValues; ++v) rSum[v] = 0;
      gather_list(strip, args.row_shift, list, count, gOwn + std::int64_t{target} * side.own_stride, gOther,
                  side.other_stride, rSum);
    }
  }
  if (summed) Sums::add_to(sTotals, warp, rSum);
  for (int mask = 1 << args.row_shift; mask < kWarpSize; mask *= 2) {
#pragma unroll
    for (int v = 0; v < Lane::kValues; ++v) rSum[v] = add(rSum[v], shuffle_xor(rSum[v], mask));
  }
  if (is_nan(poison)) {
#pragma unroll
    for (int v = 0; v < Lane::kValues; ++v) rSum[v] = quiet_nan<Acc>();
  }
  if (lane >> args.row_shift == 0) {
    strip.store_row(static_cast<T*>(side.out) + target * graph.dims + strip.begin, rSum);
  }
}

// ---- kernels: buckets -----------------------------------------------------------------------------------------------

// The bucket of an edge, or none.
constexpr std::uint32_t kNoBucket = 0xffffffffu;

__device__ __forceinline__ std::uint32_t bucket_of(const Graph& graph, const Buckets& buckets, std::int32_t target) {
  return target >= 0 && target < graph.targets ? static_cast<std::uint32_t>(target) >> buckets.shift : kNoBucket;
}

// The edges of this warp's part.
struct PartRange {
  std::int64_t begin;
  std::int64_t end;

  __device__ __forceinline__ PartRange(const Graph& graph, const Buckets& buckets, std::int64_t part) {
    const std::int64_t all = graph.all_edges;
    begin = part * buckets.part_edges;
    end = begin + buckets.part_edges < all ? begin + buckets.part_edges : all;
  }
};

// gHistogram[bucket][part]: edges of the part in the bucket.
__global__ void __launch_bounds__(kPartThreads)
    count_kernel(__grid_constant__ const Graph graph, __grid_constant__ const Buckets buckets) {
  const int warps = thread_count() / kWarpSize;
  const int count = static_cast<int>(buckets.count);
  SharedArena arena;
  const auto sCounts = arena.take<std::uint32_t>(warps * count);
  const auto sOwn = sCounts.offset(warp_id() * count);
  const std::int64_t first_part = block_id() * warps;

  for (int bucket = lane_id(); bucket < count; bucket += kWarpSize) sOwn.set(bucket, 0);
  sync_warp();
  const PartRange range(graph, buckets, first_part + warp_id());
  for (std::int64_t base = range.begin; base < range.end; base += kPartLoads * kWarpSize) {
    std::int32_t rTargets[kPartLoads];
#pragma unroll
    for (int l = 0; l < kPartLoads; ++l) {
      const std::int64_t edge = base + l * kWarpSize + lane_id();
      rTargets[l] = edge < range.end ? load(graph.indices + edge) : -1;
    }
#pragma unroll
    for (int l = 0; l < kPartLoads; ++l) {
      const std::uint32_t bucket = bucket_of(graph, buckets, rTargets[l]);
      if (bucket != kNoBucket) sOwn.atomic_add(static_cast<int>(bucket), 1u);
    }
  }
  sync_block();
  for (int at = thread_id(); at < warps * count; at += thread_count()) {
    const int bucket = at / warps;
    const int part = at % warps;
    buckets.histogram[bucket * buckets.parts + first_part + part] = sCounts.get(part * count + bucket);
  }
}

// A warp a bucket: gHistogram[bucket][part] becomes the edges of earlier parts in the bucket, gTotals[bucket] all of them.
__global__ void __launch_bounds__(kThreads) scan_kernel(__grid_constant__ const Buckets buckets) {
  const std::int64_t bucket = block_id() * kWarps + warp_id();
  if (bucket >= buckets.count) return;
  std::uint32_t* gRow = buckets.histogram + bucket * buckets.parts;
  std::uint32_t rBefore = 0;
  for (std::int64_t base = 0; base < buckets.parts; base += kWarpSize * kScanPack) {
    const std::int64_t at = base + lane_id() * kScanPack;
    Pack<std::uint32_t> rPack{};
    if (at < buckets.parts) {
      // Not through the read-only path: this kernel writes here.
#pragma unroll
      for (int e = 0; e < kScanPack; ++e) rPack.elements[e] = gRow[at + e];
    }
    std::uint32_t rLane = 0;
#pragma unroll
    for (int e = 0; e < kScanPack; ++e) {
      const std::uint32_t edges = rPack.elements[e];
      rPack.elements[e] = rLane;
      rLane += edges;
    }
    std::uint32_t rUpTo = rLane;
#pragma unroll
    for (int distance = 1; distance < kWarpSize; distance *= 2) {
      const std::uint32_t below = shuffle_up(rUpTo, distance);
      if (lane_id() >= distance) rUpTo += below;
    }
#pragma unroll
    for (int e = 0; e < kScanPack; ++e) rPack.elements[e] += rBefore + rUpTo - rLane;
    if (at < buckets.parts) store_pack(gRow + at, rPack);
    rBefore += shuffle(rUpTo, kWarpSize - 1);
  }
  if (lane_id() == 0) buckets.totals[bucket] = rBefore;
}

// Puts target, source and weight of the edges into their buckets, in the order of the graph.
template <typename Acc>
__global__ void __launch_bounds__(kPartThreads)
    place_kernel(__grid_constant__ const Graph graph, __grid_constant__ const Buckets buckets) {
  const int warps = thread_count() / kWarpSize;
  const int count = static_cast<int>(buckets.count);
  SharedArena arena;
  const auto sNext = arena.take<std::uint32_t>(warps * count);  // where the part's next edge of a bucket goes
  const auto sSums = arena.take<std::uint32_t>(kWarpSize);
  const auto sUpstream = arena.take<double>(1);
  const auto sOwn = sNext.offset(warp_id() * count);
  const std::int64_t first_part = block_id() * warps;

  if (warp_id() == 0) {
    const double upstream = shared_upstream<Acc>(graph);
    if (lane_id() == 0) sUpstream.set(0, upstream);
  }
  // Every block adds up the buckets before a bucket for itself: a few thousand at most. A thread has neighbouring ones.
  const int each = (count + thread_count() - 1) / thread_count();
  const int begin = thread_id() * each < count ? thread_id() * each : count;
  const int end = begin + each < count ? begin + each : count;
  std::uint32_t rSum = 0;
  for (int bucket = begin; bucket < end; ++bucket) rSum += load(buckets.totals + bucket);
  std::uint32_t rUpTo = rSum;
#pragma unroll
  for (int distance = 1; distance < kWarpSize; distance *= 2) {
    const std::uint32_t below = shuffle_up(rUpTo, distance);
    if (lane_id() >= distance) rUpTo += below;
  }
  if (lane_id() == kWarpSize - 1) sSums.set(warp_id(), rUpTo);
  sync_block();
  std::uint32_t rBegin = rUpTo - rSum;
  for (int warp = 0; warp < warp_id(); ++warp) rBegin += sSums.get(warp);
  for (int bucket = begin; bucket < end; ++bucket) {
    const std::uint32_t* gBefore = buckets.histogram + bucket * buckets.parts + first_part;
    for (int part = 0; part < warps; ++part) sNext.set(part * count + bucket, rBegin + load(gBefore + part));
    if (block_id() == 0) buckets.begins[bucket] = rBegin;
    rBegin += load(buckets.totals + bucket);
    if (block_id() == 0 && bucket == count - 1) buckets.begins[count] = rBegin;
  }
  sync_block();

  const PartRange range(graph, buckets, first_part + warp_id());
  Acc* gWeights = static_cast<Acc*>(buckets.placed_weights);
  for (std::int64_t base = range.begin; base < range.end; base += kPartLoads * kWarpSize) {
    std::int32_t rTargets[kPartLoads];
    Acc rWeights[kPartLoads];
#pragma unroll
    for (int l = 0; l < kPartLoads; ++l) {
      const std::int64_t edge = base + l * kWarpSize + lane_id();
      rTargets[l] = edge < range.end ? load(graph.indices + edge) : -1;
      rWeights[l] = 0;
      if (edge < range.end) {
        const std::uint32_t position = static_cast<std::uint32_t>(edge);
        rWeights[l] = edge_weight<Acc>(graph, sUpstream.get(0), position / graph.edges, position);
      }
    }
#pragma unroll
    for (int l = 0; l < kPartLoads; ++l) {
      const std::uint32_t bucket = bucket_of(graph, buckets, rTargets[l]);
      const std::uint32_t peers = match_any(bucket);
      const std::uint32_t before = static_cast<std::uint32_t>(popcount(peers & lanes_below()));
      const std::uint32_t next = bucket != kNoBucket ? sOwn.get(static_cast<int>(bucket)) : 0;
      sync_warp();
      if (bucket != kNoBucket) {
        if (before == 0) sOwn.set(static_cast<int>(bucket), next + static_cast<std::uint32_t>(popcount(peers)));
        const std::int64_t at = std::int64_t{next} + before;
        const std::uint32_t position = static_cast<std::uint32_t>(base + l * kWarpSize + lane_id());
        buckets.placed_targets[at] = rTargets[l];
        buckets.placed_sources[at] = static_cast<std::int32_t>(position / graph.edges);
        gWeights[at] = rWeights[l];
      }
      sync_warp();
    }
  }
}

// ---- launch ---------------------------------------------------------------------------------------------------------

bool is_aligned(const void* data, std::int64_t rows, std::int64_t row_bytes) {
  return reinterpret_cast<std::uintptr_t>(data) % kPackBytes == 0 && (rows <= 1 || row_bytes % kPackBytes == 0);
}

BackwardSide side_of(const FeatureView& own, const FeatureView& other, void* out, bool takes_own, bool takes_incoming) {
  return {.own = own.data,
          .own_stride = own.row_stride,
          .other = other.data,
          .other_stride = other.row_stride,
          .rows = own.rows,
          .other_rows = other.rows,
          .groups = out == nullptr ? 0 : (own.rows + kBackwardGroup - 1) / kBackwardGroup,
          .out = out,
          .takes_own = takes_own,
          .takes_incoming = takes_incoming};
}

template <typename T, int kPacks>
cudaError_t launch_gather(const BackwardArgs& args, const GatherArgs& gather, std::int64_t slices,
                          cudaStream_t stream) {
  bool vector = args.dims * static_cast<std::int64_t>(sizeof(T)) % kPackBytes == 0;
  for (const FeatureView* view : {&args.anchors, &args.candidates}) {
    const std::int64_t row_bytes = view->row_stride * static_cast<std::int64_t>(sizeof(T));
    vector = vector && is_aligned(view->data, view->rows, row_bytes);
  }
  for (const void* out : {args.grad_anchors, args.grad_candidates}) vector = vector && is_aligned(out, 1, 0);
  const std::int64_t blocks = (gather.sides[0].groups + gather.sides[1].groups) * slices;
  const auto kernel = vector ? gather_kernel<T, kPacks, true> : gather_kernel<T, kPacks, false>;
  return launch(kernel, LaunchShape{blocks, kThreads, gather_shared_bytes<T, kPacks>()}, stream, gather);
}

template <typename Acc>
cudaError_t launch_buckets(const Graph& graph, const Buckets& buckets, cudaStream_t stream) {
  if (buckets.count > kMostPartBuckets) return cudaErrorInvalidValue;
  int warps = kPartThreads / kWarpSize;
  while (warps * buckets.count > kMostPartBuckets) warps /= 2;
  if (buckets.parts % warps != 0 || buckets.parts % kScanPack != 0) return cudaErrorInvalidValue;
  const int counters = shared_bytes<std::uint32_t>(warps * static_cast<int>(buckets.count));
  const LaunchShape parts{buckets.parts / warps, warps * kWarpSize, counters};
  if (const cudaError_t error = launch(count_kernel, parts, stream, graph, buckets); error != cudaSuccess) return error;
  const LaunchShape rows{(buckets.count + kWarps - 1) / kWarps, kThreads, 0};
  if (const cudaError_t error = launch(scan_kernel, rows, stream, buckets); error != cudaSuccess) return error;
  const LaunchShape place{parts.blocks, parts.threads,
                          counters + shared_bytes<std::uint32_t>(kWarpSize) + shared_bytes<double>(1)};
  return launch(place_kernel<Acc>, place, stream, graph, buckets);
}

template <typename T>
cudaError_t launch_backward(const BackwardArgs& args, const BackwardPlan& plan, char* workspace, cudaStream_t stream) {
  using Acc = typename BackwardTraits<T>::Acc;
  GatherArgs gather{};
  gather.graph = {.dims = args.dims,
                  .targets = args.symmetric ? args.anchors.rows : args.candidates.rows,
                  .edges = static_cast<std::uint32_t>(args.edges),
                  .all_edges = static_cast<std::uint32_t>(args.anchors.rows * args.edges),
                  .reduction = args.reduction,
                  .indices = args.indices,
                  .coefficients = args.coefficients,
                  .grad_loss = args.grad_loss,
                  .stats = args.stats};
  if (args.symmetric) {
    gather.sides[0] = side_of(args.anchors, args.anchors, args.grad_anchors, true, true);
  } else {
    gather.sides[0] = side_of(args.anchors, args.candidates, args.grad_anchors, true, false);
    gather.sides[1] = side_of(args.candidates, args.anchors, args.grad_candidates, false, true);
  }
  gather.first_blocks = gather.sides[0].groups * plan.slices;
  gather.slice_elements = plan.slice_elements;
  while ((1 << gather.row_shift) < plan.row_lanes) ++gather.row_shift;
  gather.merge = args.symmetric && args.edges <= kMergedSlots;
  if (plan.partitioned) {
    gather.buckets = {.shift = plan.bucket_shift,
                      .count = plan.buckets,
                      .parts = plan.parts,
                      .part_edges = plan.part_edges,
                      .histogram = reinterpret_cast<std::uint32_t*>(workspace + plan.histogram.offset),
                      .totals = reinterpret_cast<std::uint32_t*>(workspace + plan.totals.offset),
                      .begins = reinterpret_cast<std::uint32_t*>(workspace + plan.begins.offset),
                      .placed_targets = reinterpret_cast<std::int32_t*>(workspace + plan.placed_targets.offset),
                      .placed_sources = reinterpret_cast<std::int32_t*>(workspace + plan.placed_sources.offset),
                      .placed_weights = workspace + plan.placed_weights.offset};
    const cudaError_t error = launch_buckets<Acc>(gather.graph, gather.buckets, stream);
    if (error != cudaSuccess) return error;
  }
  if constexpr (sizeof(T) > 2) {
    if (plan.packs_per_lane == 2) return launch_gather<T, 2>(args, gather, plan.slices, stream);
  }
  return plan.packs_per_lane == 1 ? launch_gather<T, 1>(args, gather, plan.slices, stream) : cudaErrorInvalidValue;
}

}  // namespace

// ---- dispatch -------------------------------------------------------------------------------------------------------

cudaError_t run_backward(const BackwardArgs& args, const BackwardPlan& plan, char* workspace, cudaStream_t stream) {
  if (plan.launches == 0) return cudaSuccess;
  if (args.edges > 0 && args.anchors.rows > kMostEdges / args.edges) return cudaErrorInvalidValue;
  switch (args.dtype) {
    case DType::kFloat32:
      return launch_backward<float>(args, plan, workspace, stream);
    case DType::kFloat64:
      return launch_backward<double>(args, plan, workspace, stream);
    case DType::kFloat16:
      return launch_backward<Half>(args, plan, workspace, stream);
    case DType::kBFloat16:
      return launch_backward<BFloat16>(args, plan, workspace, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace sn::cuda
