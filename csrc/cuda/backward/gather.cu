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
// Larger problems first put the edges in buckets of targets (buckets.cuh), and a block reads its bucket instead of
// everything. Positions in a bucket order a target's edges as positions in the graph do: results are the same, bit for bit.
#include <cstdint>

#include "cuda/backward/buckets.cuh"
#include "cuda/backward/edges.cuh"
#include "cuda/backward/graph.cuh"
#include "cuda/backward/rows.cuh"
#include "cuda/launch.cuh"
#include "cuda/memory.cuh"
#include "cuda/ptx.cuh"
#include "cuda/sizes.h"
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
  return launch(kernel, LaunchShape{blocks, kThreads, gather_shared_bytes<T, kPacks>()}, stream, gather);
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
