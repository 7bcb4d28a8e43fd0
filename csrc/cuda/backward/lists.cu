// Lists edges by target (lists.cuh): the last of four kernels that sort them.
//
// A block takes one bucket, or kListTargets targets of a bucket that has more, and sorts its edges by target. It is a
// stable counting sort as that of the buckets: each warp counts the edges of its part of the bucket, counts become
// places, each warp puts its edges there in order. However many edges a hub brings, each is read twice, many at a time.
//
// Then edges are merged where the graph is symmetric and a target's own edges fit a warp. A list is sorted by source,
// so an own edge to j finds its reverses, which stand side by side, by searching for j. Of several own edges to one
// target the first takes them. At last the edges behind a list's chunks that do not count are left out, and own edges
// that count are appended, so that no slice of the gather has to look for them.
#include <cstdint>

#include "cuda/backward/buckets.cuh"
#include "cuda/backward/graph.cuh"
#include "cuda/backward/lists.cuh"
#include "cuda/launch.cuh"
#include "cuda/memory.cuh"
#include "cuda/ptx.cuh"
#include "cuda/stages.h"
#include "cuda/warp.cuh"

namespace sn::cuda {
namespace {

// ---- traits ---------------------------------------------------------------------------------------------------------

constexpr int kListWarps = 16;
constexpr int kListThreads = kListWarps * kWarpSize;
constexpr int kListBlocks = 2;     // on a multiprocessor
constexpr int kListLoads = 4;      // of a lane, at once
constexpr int kListTargets = 512;  // of a block, at most: a counter each for each warp
constexpr int kTargetShift = 3;    // log2 of the lanes of a target, if it has not more own edges
static_assert(kListTargets <= kListThreads, "a thread makes the places of one target");
static_assert(kMergedSlots <= kWarpSize, "a lane holds an own edge");

struct ListArgs {
  Graph graph;
  Buckets buckets;
  Lists lists;
  std::int64_t blocks_per_bucket;
  int targets;       // of a block
  int target_shift;  // log2 of the lanes that close up a target's list, and hold its own edges, one each
};

constexpr int list_shared_bytes(int targets) {
  return shared_bytes<std::uint32_t>(kListWarps * targets) + shared_bytes<std::uint32_t>(targets + 1) +
         2 * shared_bytes<std::uint32_t>(kListWarps) + shared_bytes<double>(1);
}
static_assert(list_shared_bytes(kListTargets) <= kPlainSharedBytes);

// ---- kernel ---------------------------------------------------------------------------------------------------------

// Of a list of incoming edges those that come from `source`: what their weights add up to, in the one order of sums,
// which cuts a list in chunks (gather.cuh). They count no longer. The list was written by this block.
template <typename Acc>
__device__ __forceinline__ Acc take_reverses(const std::int32_t* gSources, Acc* gWeights, std::uint32_t edges,
                                             std::int32_t source) {
  std::uint32_t at = 0;
  for (std::uint32_t behind = edges; at < behind;) {
    const std::uint32_t middle = at + (behind - at) / 2;
    if (gSources[middle] < source) {
      at = middle + 1;
    } else {
      behind = middle;
    }
  }
  const std::uint32_t rest = edges - edges % kEdgeChunk;
  Acc total = 0;
  Acc chunk = 0;
  for (; at < edges && gSources[at] == source; ++at) {
    if (at % kEdgeChunk == 0) {
      total = add(total, chunk);
      chunk = 0;
    }
    const Acc weight = gWeights[at];
    gWeights[at] = 0;
    if (at < rest) {
      chunk = add(chunk, weight);
    } else {
      total = add(add(total, chunk), weight);
      chunk = 0;
    }
  }
  return add(total, chunk);
}

template <typename Acc>
__global__ void __launch_bounds__(kListThreads, kListBlocks) list_kernel(__grid_constant__ const ListArgs args) {
  const Graph& graph = args.graph;
  const Buckets& buckets = args.buckets;
  const Lists& lists = args.lists;
  const std::int64_t bucket = block_id() / args.blocks_per_bucket;
  const std::int64_t first = block_id() * args.targets;
  if (first >= graph.targets) return;
  const int targets =
      static_cast<int>(graph.targets - first < args.targets ? graph.targets - first : std::int64_t{args.targets});
  SharedArena arena;
  const auto sNext = arena.take<std::uint32_t>(kListWarps * args.targets);  // counts, then where the next edge goes
  const auto sBegins = arena.take<std::uint32_t>(args.targets + 1);
  const auto sBefore = arena.take<std::uint32_t>(kListWarps);
  const auto sSums = arena.take<std::uint32_t>(kListWarps);
  const auto sUpstream = arena.take<double>(1);
  const auto sOwn = sNext.offset(warp_id() * args.targets);

  const std::int64_t bucket_begin = load(buckets.begins + bucket);
  const std::int64_t bucket_end = load(buckets.begins + bucket + 1);
  const std::int64_t share = (bucket_end - bucket_begin + kListThreads - 1) / kListThreads * kWarpSize;
  const std::int64_t begin = bucket_begin + warp_id() * share;
  const std::int64_t end = begin + share < bucket_end ? begin + share : bucket_end;
  // Place of the target among the block's; a target outside has one beyond them.
  const auto place_of = [&](std::int64_t edge) {
    return edge < end ? load(buckets.placed_targets + edge) - first : std::int64_t{kListTargets};
  };

  // 1. How many edges each warp has of each target, and of earlier targets of the bucket.
  for (int target = lane_id(); target < targets; target += kWarpSize) sOwn.set(target, 0);
  if (lists.own_slots > 0 && warp_id() == 0) {
    const double upstream = shared_upstream<Acc>(graph);
    if (lane_id() == 0) sUpstream.set(0, upstream);
  }
  sync_warp();
  std::uint32_t rBefore = 0;
  for (std::int64_t base = begin + lane_id(); base - lane_id() < end; base += kListLoads * kWarpSize) {
    std::int64_t rPlaces[kListLoads];
#pragma unroll
    for (int l = 0; l < kListLoads; ++l) rPlaces[l] = place_of(base + l * kWarpSize);
#pragma unroll
    for (int l = 0; l < kListLoads; ++l) {
      if (rPlaces[l] >= 0 && rPlaces[l] < targets) sOwn.atomic_add(static_cast<int>(rPlaces[l]), 1u);
      rBefore += rPlaces[l] < 0 ? 1u : 0u;
    }
  }
  rBefore = reduce_add(rBefore);
  if (lane_id() == 0) sBefore.set(warp_id(), rBefore);
  sync_block();

  // 2. Places. A thread has a target.
  const int target = thread_id();
  std::uint32_t rEdges = 0;
  if (target < targets) {
    for (int warp = 0; warp < kListWarps; ++warp) rEdges += sNext.get(warp * args.targets + target);
  }
  const std::uint32_t rUpTo = prefix_sum(rEdges);
  if (lane_id() == kWarpSize - 1) sSums.set(warp_id(), rUpTo);
  sync_block();
  if (target < targets) {
    std::uint32_t rNext = static_cast<std::uint32_t>(bucket_begin) + rUpTo - rEdges;
    for (int warp = 0; warp < kListWarps; ++warp) {
      rNext += sBefore.get(warp) + (warp < warp_id() ? sSums.get(warp) : 0u);
    }
    lists.begins[first + target] = rNext;
    sBegins.set(target, rNext);
    for (int warp = 0; warp < kListWarps; ++warp) {
      const int at = warp * args.targets + target;
      const std::uint32_t edges = sNext.get(at);
      sNext.set(at, rNext);
      rNext += edges;
    }
    if (target == targets - 1) {
      sBegins.set(targets, rNext);
      if (first + targets == graph.targets) lists.begins[graph.targets] = rNext;
    }
  }
  sync_block();

  // 3. Every edge to its place.
  Acc* gWeights = static_cast<Acc*>(lists.weights);
  for (std::int64_t base = begin + lane_id(); base - lane_id() < end; base += kListLoads * kWarpSize) {
    std::int64_t rPlaces[kListLoads];
    std::int32_t rSources[kListLoads];
    Acc rWeights[kListLoads];
#pragma unroll
    for (int l = 0; l < kListLoads; ++l) {
      const std::int64_t edge = base + l * kWarpSize;
      const bool exists = edge < end;
      rPlaces[l] = place_of(edge);
      rSources[l] = exists ? load(buckets.placed_sources + edge) : 0;
      rWeights[l] = exists ? load(static_cast<const Acc*>(buckets.placed_weights) + edge) : Acc(0);
    }
#pragma unroll
    for (int l = 0; l < kListLoads; ++l) {
      const bool inside = rPlaces[l] >= 0 && rPlaces[l] < targets;
      const int place = inside ? static_cast<int>(rPlaces[l]) : kListTargets;
      const std::uint32_t peers = match_any(static_cast<std::uint32_t>(place));
      const std::uint32_t before = static_cast<std::uint32_t>(popcount(peers & lanes_below()));
      const std::uint32_t next = inside ? sOwn.get(place) : 0;
      sync_warp();
      if (inside) {
        if (before == 0) sOwn.set(place, next + static_cast<std::uint32_t>(popcount(peers)));
        const std::int64_t at = lists.offset(next + before, first + place);
        lists.sources[at] = rSources[l];
        gWeights[at] = rWeights[l];
      }
      sync_warp();
    }
  }
  sync_block();

  // 4. Own edges take the weights of their reverses, and what counts behind the chunks closes up. A group of lanes has
  // a target; a lane an own edge.
  const int lanes = 1 << args.target_shift;
  const int mine = lane_id() & (lanes - 1);
  const int each = kWarpSize >> args.target_shift;
  const auto group_of = [&](std::uint32_t votes) {  // votes of the target's lanes
    return votes >> (lane_id() - mine) & (kFullWarp >> (kWarpSize - lanes));
  };
  const std::uint32_t below = (1u << mine) - 1u;
  for (int base = warp_id() * each; base < targets; base += kListWarps * each) {
    const int local = base + (lane_id() >> args.target_shift);
    const bool exists = local < targets;
    const std::uint32_t list_begin = exists ? sBegins.get(local) : 0;
    const std::uint32_t list_edges = exists ? sBegins.get(local + 1) - list_begin : 0;
    std::int32_t* gSources = lists.sources + lists.offset(list_begin, first + local);
    Acc* gListed = gWeights + lists.offset(list_begin, first + local);

    std::int32_t rIndex = -1;
    Acc rWeight = 0;
    if (lists.own_slots > 0) {
      const bool holds = exists && static_cast<std::uint32_t>(mine) < graph.edges;
      const std::uint32_t anchor = static_cast<std::uint32_t>(first) + static_cast<std::uint32_t>(local);
      const std::uint32_t edge = anchor * graph.edges + static_cast<std::uint32_t>(mine);
      if (holds) rIndex = load(graph.indices + edge);
      const std::uint32_t peers =
          match_any(std::uint64_t{static_cast<std::uint32_t>(local)} << 32 | static_cast<std::uint32_t>(rIndex));
      if (holds) {
        rWeight = edge_weight<Acc>(graph, sUpstream.get(0), anchor, edge);
        if (rIndex >= 0 && (peers & lanes_below()) == 0) {
          rWeight = add(rWeight, take_reverses<Acc>(gSources, gListed, list_edges, rIndex));
        }
      }
      sync_warp();
    }

    const std::uint32_t chunks_end = list_edges - list_edges % kEdgeChunk;
    std::uint32_t rest = 0;
    for (std::uint32_t from = chunks_end; any_lane(from < list_edges); from += static_cast<std::uint32_t>(lanes)) {
      const std::uint32_t at = from + static_cast<std::uint32_t>(mine);
      const Acc weight = at < list_edges ? gListed[at] : Acc(0);
      const std::int32_t source = at < list_edges ? gSources[at] : 0;
      const std::uint32_t counting = group_of(ballot(weight != Acc(0)));
      sync_warp();  // edges have been read that others take the place of
      if (weight != Acc(0)) {
        const std::uint32_t to = chunks_end + rest + static_cast<std::uint32_t>(popcount(counting & below));
        gSources[to] = source;
        gListed[to] = weight;
      }
      rest += static_cast<std::uint32_t>(popcount(counting));
    }
    const bool counts = rIndex >= 0 && rIndex < graph.targets && rWeight != Acc(0);
    const std::uint32_t counting = group_of(ballot(counts));
    if (counts) {
      const std::uint32_t to = chunks_end + rest + static_cast<std::uint32_t>(popcount(counting & below));
      gSources[to] = rIndex;
      gListed[to] = rWeight;
    }
    if (exists && mine == 0) lists.rests[first + local] = rest + static_cast<std::uint32_t>(popcount(counting));
  }
}

}  // namespace

// ---- launch ---------------------------------------------------------------------------------------------------------

cudaError_t enqueue_lists(const BackwardArgs& args, const BackwardPlan& plan, char* workspace, cudaStream_t stream) {
  ListArgs list{};
  list.graph = graph_of(args);
  list.buckets = buckets_of(plan, workspace);
  list.lists = lists_of(plan, workspace);
  const std::int64_t bucket_targets = std::int64_t{1} << plan.bucket_shift;
  list.targets = static_cast<int>(bucket_targets < kListTargets ? bucket_targets : kListTargets);
  list.blocks_per_bucket = bucket_targets / list.targets;
  list.target_shift = kTargetShift;
  while ((std::int64_t{1} << list.target_shift) < list.lists.own_slots) ++list.target_shift;
  const LaunchShape shape{plan.buckets * list.blocks_per_bucket, kListThreads, list_shared_bytes(list.targets)};
  const auto kernel = args.dtype == DType::kFloat64 ? list_kernel<double> : list_kernel<float>;
  return launch(kernel, shape, stream, list);
}

}  // namespace sn::cuda
