// Gradients of features: a sparse gather by target row, without atomics on floating-point numbers.
//
//   out_t = sum over the edges e of target t of  w_e (x_t - other_e),     w_e = acc(upstream * coefficient_e)
//
// The difference comes first: the factored form (sum w) x_t - sum w other cancels for near neighbours. A target has
// incoming edges (from anchors that selected it, by ascending edge id) and own edges (in slot order). A side of the
// problem has one kind; in the symmetric case it has both. There, an incoming edge whose reverse is an own edge is the
// same vector: its weight is added to the own edge's weight, and the row is fetched once. Edges without an index or
// with weight 0 do not count.
//
// ONE order of summation, whatever the plan, the schedule and the other rows are:
//   1. The incoming edges of a target, those that do not count included, are cut into chunks of kEdgeChunk.
//   2. A full chunk is summed from zero by fused multiply-adds in order; chunk sums are added in order to the total.
//   3. The rest is summed in the same way, and the own edges continue that sum (of more than kMergedSlots own edges,
//      each kEdgeChunk are a chunk as well). This sum is added to the total last, and the result is rounded once.
//   4. Where a row of the slice needs only L < 32 lanes, 32 / L groups of lanes share the list: group g takes the edges
//      g, g + 32 / L, ..., and the groups meet in a butterfly before the rounding. L depends on D and the type alone.
//
// A block of 8 warps serves 8 targets, a warp each, in a slice of D. Blocks of one slice are neighbours in the grid, so
// the slice of all rows stays in the second-level cache while they run, as far as it fits (plan_backward.cpp). For
// every window of 2048 edges:
//
// 1. Each warp reads an eighth of the window and lists, in shared memory, the edges that belong to one of the
//    8 targets.
//
// 2. Each warp walks the 8 lists and appends the edges of its own target to that target's tail.
//
// 3. Once a tail holds a chunk (a hub, or many neighbours), the edges are listed target by target. All warps sum chunks
//    of all targets in turn, and the warp of a target adds its chunk sums in order. No block waits for a single warp.
//
// At the end each warp sums its tail and its own edges. It fetches several rows at a time: 80 to 128 bytes a lane.
//
// Larger problems first sort the edges into buckets (buckets.cuh), and a block reads its bucket instead of every edge.
// A bucket keeps the order of a target's edges, so the results are the same, bit for bit.
#include <cstdint>

#include "cuda/backward/buckets.cuh"
#include "cuda/backward/edges.cuh"
#include "cuda/backward/graph.cuh"
#include "cuda/backward/rows.cuh"
#include "cuda/launch.cuh"
#include "cuda/memory.cuh"
#include "cuda/plan/sizes.h"
#include "cuda/ptx.cuh"
#include "cuda/stages.h"

namespace sn::cuda {
namespace {

// ---- traits ---------------------------------------------------------------------------------------------------------

// 80 registers a thread: 24 warps with 4 KB under way each are more than twice what hides the latency of the
// second-level cache at a multiprocessor's share of its bandwidth.
// Unaligned rows need an address an element.
constexpr int kMinBlocks = 3;
constexpr int kMinBlocksUnaligned = 2;

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

struct GatherArgs {
  Graph graph;
  Buckets buckets;
  BackwardSide sides[2];
  std::int64_t first_blocks;  // that serve sides[0]
  std::int64_t slice_elements;
  int row_shift;  // log2 of the lanes of a row
  bool merge;
};

// ---- kernel ---------------------------------------------------------------------------------------------------------

template <typename T, int kPacks>
constexpr int gather_shared_bytes() {
  using Acc = sn::cuda::Acc<T>;
  constexpr int kSums = kGroupWarps * kWarpSize * kPacks * Pack<T>::kElements;
  static_assert(shared_bytes<Acc>(kSums) >= shared_bytes<std::uint16_t>(kWindow), "matches lie where chunk sums will");
  return shared_bytes<std::uint16_t>(kSorted) + 2 * shared_bytes<int>(kGroupWarps) +
         shared_bytes<std::uint32_t>(kGroupWarps * kEdgeChunk) +
         shared_bytes<std::int32_t>(kGroupWarps * kMergedSlots) + shared_bytes<std::int32_t>(kGroupWarps * kList) +
         shared_bytes<Acc>(kGroupWarps * kList) + shared_bytes<Acc>(kGroupWarps * kMergedSlots) +
         2 * shared_bytes<Acc>(kSums) + shared_bytes<double>(1);
}
// Three blocks of float fit the 100 KB of the smallest multiprocessors, of which a block costs 1 KB more than it
// asks for.
static_assert(kMinBlocks * (gather_shared_bytes<float, 2>() + 1024) <= 100 * 1024);
static_assert(gather_shared_bytes<double, 2>() <= kPlainSharedBytes);

template <typename T, int kPacks, bool kVector>
struct GatherMemory {
  using Acc = sn::cuda::Acc<T>;
  using Sums = LaneSums<Acc, RowStrip<T, kPacks, kVector>::kValues>;

  Shared<std::uint16_t> sSorted;  // edges target by target: in the window, or in the tail
  Shared<int> sMatchCounts;
  Shared<int> sLengths;          // edges of a target that wait
  Shared<std::uint32_t> sTails;  // their positions, less than a chunk
  Shared<std::int32_t> sOwnIndices;
  Shared<std::int32_t> sSources;
  Shared<Acc> sWeights;
  Shared<Acc> sMerged;  // of a chunk: weights that belong to own edges
  Shared<Acc> sTotals;
  Shared<Acc> sPartials;  // chunk sums
  Shared<double> sUpstream;
  // Edges of the window that hit the group, warp by warp; done with before there are chunk sums.
  Shared<std::uint16_t> sMatches;

  __device__ __forceinline__ GatherMemory() {
    SharedArena arena;
    sSorted = arena.take<std::uint16_t>(kSorted);
    sMatchCounts = arena.take<int>(kGroupWarps);
    sLengths = arena.take<int>(kGroupWarps);
    sTails = arena.take<std::uint32_t>(kGroupWarps * kEdgeChunk);
    sOwnIndices = arena.take<std::int32_t>(kGroupWarps * kMergedSlots);
    sSources = arena.take<std::int32_t>(kGroupWarps * kList);
    sWeights = arena.take<Acc>(kGroupWarps * kList);
    sMerged = arena.take<Acc>(kGroupWarps * kMergedSlots);
    sTotals = arena.take<Acc>(kGroupWarps * Sums::kWarpElements);
    sPartials = arena.take<Acc>(kGroupWarps * Sums::kWarpElements);
    sUpstream = arena.take<double>(1);
    sMatches = sPartials.template view<std::uint16_t>();
  }
};

// Targets of the group that begins with `first`.
__device__ __forceinline__ int targets_of(const BackwardSide& side, std::uint32_t first) {
  const std::int64_t rest = side.rows - first;
  return static_cast<int>(rest < kBackwardGroup ? rest : kBackwardGroup);
}

// The edges that a block looks through for those of its targets: all of the graph's, or its bucket.
struct EdgeRange {
  const std::int32_t* gTargets;
  std::uint32_t begin = 0;
  std::uint32_t count = 0;

  __device__ __forceinline__ EdgeRange(const GatherArgs& args, const BackwardSide& side, std::uint32_t first)
      : gTargets(args.graph.indices) {
    if (!side.takes_incoming) return;
    count = args.graph.all_edges;
    if (args.buckets.placed_targets == nullptr) return;
    const std::uint32_t* gBegins = args.buckets.begins + (first >> args.buckets.shift);
    begin = load(gBegins);
    count = load(gBegins + 1) - begin;
    gTargets = args.buckets.placed_targets + begin;
  }
};

// Puts into shared memory what lanes and warps ask each other for: a warp the own edges of its target, one a lane, and
// the first warp the upstream gradient.
template <typename T, int kPacks, bool kVector>
__device__ __forceinline__ void bring_own_edges(const Graph& graph, const BackwardSide& side,
                                                const GatherMemory<T, kPacks, kVector>& memory, std::uint32_t first) {
  const std::uint32_t target = first + static_cast<std::uint32_t>(warp_id());
  const bool holds = side.takes_own && warp_id() < targets_of(side, first) && graph.edges <= kMergedSlots &&
                     static_cast<std::uint32_t>(lane_id()) < graph.edges;
  std::int32_t rIndex = holds ? load(graph.indices + target * graph.edges + lane_id()) : -1;
  if (rIndex >= side.other_rows) rIndex = -1;
  memory.sOwnIndices.set(warp_id() * kMergedSlots + lane_id(), rIndex);
  if (warp_id() == 0) {
    const double upstream = shared_upstream<Acc<T>>(graph);
    if (lane_id() == 0) memory.sUpstream.set(0, upstream);
  }
}

// What has been found of a warp's target so far.
template <typename Acc>
struct TargetState {
  Acc rMerged = 0;      // of own edge `lane`: weights of incoming edges that have it as their reverse
  int waiting = 0;      // edges in the tail
  bool summed = false;  // chunks have been added to the total
};

// A warp of the block, and its target.
template <typename T, int kPacks, bool kVector>
struct GatherWarp {
  using Row = RowStrip<T, kPacks, kVector>;
  using Acc = typename Row::Acc;
  using Sums = LaneSums<Acc, Row::kValues>;

  const GatherArgs& args;
  const BackwardSide& side;
  const GatherMemory<T, kPacks, kVector>& memory;
  const std::uint32_t first;   // target of the group
  const int targets;           // of the group
  const std::uint32_t target;  // this warp's
  const bool takes_own;
  const bool held;  // own edges one a lane
  const Row strip;
  const T* const gOwn;
  const T* const gOther;
  const EdgeList<Acc> list;
  const IncomingEdges<Acc> incoming;
  const WindowMatches matches;

  __device__ __forceinline__ GatherWarp(const GatherArgs& gather_args, const BackwardSide& gather_side,
                                        const GatherMemory<T, kPacks, kVector>& gather_memory,
                                        std::uint32_t first_target, std::uint32_t slice, std::uint32_t range_begin)
      : args(gather_args),
        side(gather_side),
        memory(gather_memory),
        first(first_target),
        targets(targets_of(side, first)),
        target(first + static_cast<std::uint32_t>(warp_id())),
        takes_own(side.takes_own && warp_id() < targets),
        held(args.graph.edges <= kMergedSlots),
        strip(args.graph.dims, slice * args.slice_elements, args.row_shift),
        gOwn(static_cast<const T*>(side.own) + strip.begin),
        gOther(static_cast<const T*>(side.other) + strip.begin),
        list{memory.sSources.offset(warp_id() * kList), memory.sWeights.offset(warp_id() * kList)},
        incoming{args.graph,       args.buckets, memory.sOwnIndices,
                 memory.sUpstream, range_begin,  args.buckets.placed_targets != nullptr,
                 args.merge},
        matches{memory.sMatches, memory.sMatchCounts} {}

  // Appends the edges of the window that hit this warp's target to its tail. Returns how many then wait, of which the
  // tail holds less than a chunk.
  __device__ __forceinline__ int find_matches(std::uint32_t window, int waiting) const {
    const Shared<std::uint32_t> sTails = memory.sTails;
    const int found = matches.walk([&](int rank, int place) {
      if (waiting + rank < kEdgeChunk) {
        sTails.set(warp_id() * kEdgeChunk + waiting + rank, window + static_cast<std::uint32_t>(place));
      }
    });
    const int length = waiting + found;
    if (lane_id() == 0) memory.sLengths.set(warp_id(), length);
    return length;
  }

  // Lists the edges that wait, target by target: the tails are what they were up to `waiting`, what find_matches has
  // appended is listed again. Returns all targets' full chunks.
  __device__ __forceinline__ int sort_edges(int waiting, int& sorted_begin) const {
    int chunks = 0;
    sorted_begin = 0;
    for (int of = 0; of < kGroupWarps; ++of) {
      const int edges = memory.sLengths.get(of);
      chunks += edges / kEdgeChunk;
      sorted_begin += of < warp_id() ? edges : 0;
    }
    for (int at = lane_id(); at < waiting; at += kWarpSize) {
      memory.sSorted.set(sorted_begin + at, static_cast<std::uint16_t>(kWindow + at));
    }
    const int begin = sorted_begin + waiting;
    matches.walk([&](int rank, int place) { memory.sSorted.set(begin + rank, static_cast<std::uint16_t>(place)); });
    return chunks;
  }

  // Sums the chunk of this number, which is some target's, into this warp's partial sums.
  __device__ __forceinline__ void sum_chunk(int chunk, const SortedEdges& sorted) const {
    int of = 0;
    int begin = 0;
    for (; of < kGroupWarps; ++of) {
      const int edges = memory.sLengths.get(of);
      if (chunk < edges / kEdgeChunk) break;
      chunk -= edges / kEdgeChunk;
      begin += edges;
    }
    if (of == kGroupWarps) return;
    int count = 0;
    Acc merged = 0;
    for (int at = lane_id(); at < kEdgeChunk; at += kWarpSize) {
      incoming.append(list, count, of, true, sorted.position(of, begin + chunk * kEdgeChunk + at), merged);
    }
    memory.sMerged.set(warp_id() * kMergedSlots + lane_id(), merged);
    Acc rSum[Row::kValues] = {};
    gather_list(strip, args.row_shift, list, count,
                gOwn + std::int64_t{first + static_cast<std::uint32_t>(of)} * side.own_stride, gOther,
                side.other_stride, rSum);
    Sums::store(memory.sPartials, warp_id(), rSum);
  }

  // Adds the chunks of this warp's target that the warps have summed in this round, in order.
  __device__ __forceinline__ void add_chunks(int round, int length, TargetState<Acc>& state) const {
    int chunk = 0;
    for (int before = 0; before < warp_id(); ++before) chunk += memory.sLengths.get(before) / kEdgeChunk;
    const int end = chunk + length / kEdgeChunk;
    for (int by = 0; by < kGroupWarps; ++by) {
      if (round + by < chunk || round + by >= end) continue;
      Acc rSum[Row::kValues] = {};
      Sums::add_to(memory.sPartials, by, rSum);
      if (state.summed) Sums::add_to(memory.sTotals, warp_id(), rSum);
      Sums::store(memory.sTotals, warp_id(), rSum);
      state.rMerged = add(state.rMerged, memory.sMerged.get(by * kMergedSlots + lane_id()));
      state.summed = true;
    }
  }

  // All full chunks of all targets, a warp each in turn. What is left of this warp's edges is its tail.
  __device__ __forceinline__ void serve_chunks(std::uint32_t window, int length, TargetState<Acc>& state) const {
    int sorted_begin;
    const int chunks = sort_edges(state.waiting, sorted_begin);
    const SortedEdges sorted{memory.sSorted, memory.sTails, window};
    sync_block();
    for (int round = 0; round < chunks; round += kGroupWarps) {
      sum_chunk(round + warp_id(), sorted);
      sync_block();
      add_chunks(round, length, state);
      sync_block();
    }
    state.waiting = length % kEdgeChunk;
    if (length < kEdgeChunk) return;  // the tail is right: what find_matches appended belongs there
    for (int at = lane_id(); at < state.waiting; at += kWarpSize) {
      memory.sTails.set(warp_id() * kEdgeChunk + at,
                        sorted.position(warp_id(), sorted_begin + length - state.waiting + at));
    }
  }

  // The edges that wait, then own edges held one a lane.
  __device__ __forceinline__ void sum_rest(Acc (&rSum)[Row::kValues], TargetState<Acc>& state) const {
    const Graph& graph = args.graph;
    int count = 0;
    for (int base = 0; base < state.waiting; base += kWarpSize) {
      const int at = base + lane_id();
      const bool valid = at < state.waiting;
      incoming.append(list, count, warp_id(), valid, valid ? memory.sTails.get(warp_id() * kEdgeChunk + at) : 0,
                      state.rMerged);
    }
    if (takes_own && held) {
      const std::int32_t index = memory.sOwnIndices.get(warp_id() * kMergedSlots + lane_id());
      Acc weight = 0;
      if (index >= 0) {
        const std::uint32_t edge = target * graph.edges + static_cast<std::uint32_t>(lane_id());
        weight = add(edge_weight<Acc>(graph, memory.sUpstream.get(0), target, edge), state.rMerged);
      }
      list.append(count, weight != Acc(0), index, weight);
    }
    gather_list(strip, args.row_shift, list, count, gOwn + std::int64_t{target} * side.own_stride, gOther,
                side.other_stride, rSum);
  }

  // Own edges too many for a warp's lanes: chunks as well.
  __device__ __forceinline__ void sum_own_chunks(Acc (&rSum)[Row::kValues], TargetState<Acc>& state) const {
    const Graph& graph = args.graph;
    for (std::uint32_t slots = 0; slots < graph.edges; slots += kEdgeChunk) {
      if (state.summed) Sums::add_to(memory.sTotals, warp_id(), rSum);
      Sums::store(memory.sTotals, warp_id(), rSum);
      state.summed = true;
      int count = 0;
      for (std::uint32_t at = static_cast<unsigned>(lane_id()); at < kEdgeChunk; at += kWarpSize) {
        std::int32_t index = -1;
        Acc weight = 0;
        if (slots + at < graph.edges) {
          const std::uint32_t edge = target * graph.edges + slots + at;
          index = load(graph.indices + edge);
          weight = edge_weight<Acc>(graph, memory.sUpstream.get(0), target, edge);
        }
        list.append(count, index >= 0 && index < side.other_rows && weight != Acc(0), index, weight);
      }
#pragma unroll
      for (int v = 0; v < Row::kValues; ++v) rSum[v] = 0;
      gather_list(strip, args.row_shift, list, count, gOwn + std::int64_t{target} * side.own_stride, gOther,
                  side.other_stride, rSum);
    }
  }

  // Joins the total and the groups of lanes that shared the rest, and rounds.
  __device__ __forceinline__ void store(Acc (&rSum)[Row::kValues], bool summed, double poison) const {
    if (summed) Sums::add_to(memory.sTotals, warp_id(), rSum);
    for (int mask = 1 << args.row_shift; mask < kWarpSize; mask *= 2) {
#pragma unroll
      for (int v = 0; v < Row::kValues; ++v) rSum[v] = add(rSum[v], shuffle_xor(rSum[v], mask));
    }
    if (is_nan(poison)) {
#pragma unroll
      for (int v = 0; v < Row::kValues; ++v) rSum[v] = quiet_nan<Acc>();
    }
    if (lane_id() >> args.row_shift == 0) {
      strip.store_row(static_cast<T*>(side.out) + target * args.graph.dims + strip.begin, rSum);
    }
  }
};

template <typename T, int kPacks, bool kVector>
__global__ void __launch_bounds__(kGroupThreads, kVector ? kMinBlocks : kMinBlocksUnaligned)
    gather_kernel(__grid_constant__ const GatherArgs args) {
  using Warp = GatherWarp<T, kPacks, kVector>;
  const GatherMemory<T, kPacks, kVector> memory;
  const bool second = block_id() >= args.first_blocks;
  const BackwardSide& side = args.sides[second ? 1 : 0];
  const std::uint32_t block = static_cast<std::uint32_t>(block_id() - (second ? args.first_blocks : 0));
  const std::uint32_t slice = block / static_cast<std::uint32_t>(side.groups);
  const std::uint32_t first = (block - slice * static_cast<std::uint32_t>(side.groups)) * kGroupWarps;
  const EdgeRange range(args, side, first);

  // All first loads are under way before the first one is waited for.
  WindowTargets rWindow;
  rWindow.read(range.gTargets, 0, range.count);
  bring_own_edges(args.graph, side, memory, first);
  const Warp warp(args, side, memory, first, slice, range.begin);
  TargetState<typename Warp::Acc> state;

  for (std::uint32_t window = 0; window < range.count;) {
    // 1. Which edges belong to the group. The next window is under way while this one's matches are sorted out.
    warp.matches.list(rWindow, first, warp.targets);
    const std::uint32_t next = range.count - window > kWindow ? window + kWindow : range.count;
    sync_block();
    rWindow.read(range.gTargets, next, range.count);
    // 2. What hits this warp's target.
    const int length = warp.find_matches(window, state.waiting);
    sync_block();
    if (!any_lane(lane_id() < kGroupWarps && memory.sLengths.get(lane_id() % kGroupWarps) >= kEdgeChunk)) {
      state.waiting = length;
      window = next;
      continue;
    }
    // 3. Chunks.
    warp.serve_chunks(window, length, state);
    window = next;
    rWindow.read(range.gTargets, window, range.count);  // once more, rather than in registers all the while
  }
  sync_block();

  if (warp_id() >= warp.targets) return;
  const double poison = load(args.graph.stats + kPoison);
  typename Warp::Acc rSum[Warp::Row::kValues] = {};
  warp.sum_rest(rSum, state);
  if (warp.takes_own && !warp.held) warp.sum_own_chunks(rSum, state);
  warp.store(rSum, state.summed, poison);
}

// ---- launch ---------------------------------------------------------------------------------------------------------

BackwardSide side_of(const FeatureView& own, const FeatureView& other, void* out, bool takes_own, bool takes_incoming) {
  return {.own = own.data,
          .own_stride = own.row_stride,
          .other = other.data,
          .other_stride = other.row_stride,
          .rows = own.rows,
          .other_rows = other.rows,
          .groups = out == nullptr ? 0 : divide_up(own.rows, kBackwardGroup),
          .out = out,
          .takes_own = takes_own,
          .takes_incoming = takes_incoming};
}

template <typename T, int kPacks>
cudaError_t launch_gather(const BackwardArgs& args, const GatherArgs& gather, std::int64_t slices,
                          cudaStream_t stream) {
  bool vector = args.dims * static_cast<std::int64_t>(sizeof(T)) % kPackBytes == 0 &&
                rows_aligned(args.anchors, args.dtype) && rows_aligned(args.candidates, args.dtype);
  for (const void* out : {args.grad_anchors, args.grad_candidates}) {
    vector = vector && reinterpret_cast<std::uintptr_t>(out) % kPackBytes == 0;
  }
  const std::int64_t blocks = (gather.sides[0].groups + gather.sides[1].groups) * slices;
  const auto kernel = vector ? gather_kernel<T, kPacks, true> : gather_kernel<T, kPacks, false>;
  return launch(kernel, LaunchShape{blocks, kGroupThreads, gather_shared_bytes<T, kPacks>()}, stream, gather);
}

template <typename T>
cudaError_t launch_backward(const BackwardArgs& args, const BackwardPlan& plan, char* workspace, cudaStream_t stream) {
  GatherArgs gather{};
  gather.graph = graph_of(args);
  gather.buckets = buckets_of(plan, workspace);
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
  if constexpr (sizeof(T) > 2) {
    if (plan.packs_per_lane == 2) return launch_gather<T, 2>(args, gather, plan.slices, stream);
  }
  return plan.packs_per_lane == 1 ? launch_gather<T, 1>(args, gather, plan.slices, stream) : cudaErrorInvalidValue;
}

}  // namespace

// ---- dispatch -------------------------------------------------------------------------------------------------------

cudaError_t enqueue_gather(const BackwardArgs& args, const BackwardPlan& plan, char* workspace, cudaStream_t stream) {
  return for_type(args.dtype, [&]<class T>() { return launch_backward<T>(args, plan, workspace, stream); });
}

}  // namespace sn::cuda
