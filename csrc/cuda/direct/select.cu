// From partial sums to every output of a strip's anchors. A block takes an anchor: it adds up the slices in the one
// order, selects the neighbours (select.cuh) and finishes the anchor (loss.cuh). The block that finishes last reads the
// flags of the tiles and, in the last strip, sums over all anchors, unless they are so many that reduce.cu does.
#include <algorithm>

#include "cuda/direct/select.cuh"
#include "cuda/keys.cuh"
#include "cuda/launch.cuh"
#include "cuda/loss.cuh"
#include "cuda/memory.cuh"
#include "cuda/plan/sizes.h"
#include "cuda/ptx.cuh"
#include "cuda/stages.h"

namespace sn::cuda {
namespace {

// ---- traits ---------------------------------------------------------------------------------------------------------

struct SelectArgs {
  ForwardArgs forward;
  std::int64_t K;
  std::int64_t first_row;  // of the strip
  std::int64_t rows;       // of the strip
  std::int64_t plane;
  int slices;
  int tree;     // combine_slices
  int threads;  // of a block that does not extract
  Selection selection;
  bool reduces;                 // the last strip, of few anchors
  const std::uint32_t* gFlags;  // [flags]
  std::int64_t flags;
  Control* gControl;
  AnchorRecord* gRecords;  // [N]
  void* gPartials;         // acc [slices][plane / M rows][M]
  void* gSortKeys;         // Key [rows][sort_keys], or null: they fit shared memory
  std::int64_t sort_keys;  // keys of one anchor, a power of two
};

// ---- kernel ---------------------------------------------------------------------------------------------------------

// kPerLane: candidates that a lane of the selecting warp holds; 0: rows of any length, and any K.
template <class A, int kPerLane>
__global__ void __launch_bounds__(kSelectThreads<kPerLane>, kSelectBlocks<A, kPerLane>)
    select_kernel(const SelectArgs args) {
  SharedArena arena;
  SelectState<A, kPerLane> state(arena, args.forward.candidates.rows, args.gSortKeys == nullptr ? args.sort_keys : 0);
  const ReductionMemory reduction(arena);
  const Shared<std::uint32_t> sLast = arena.take<std::uint32_t>(2);

  const std::int64_t row = block_id();
  if (row < args.rows) {
    const std::int64_t anchor = args.first_row + row;
    const std::int64_t M = args.forward.candidates.rows;
    const PlaneSums<A> sums{static_cast<A*>(args.gPartials) + row * M, args.plane, args.slices, args.tree};
    Key<A>* gKeys = args.gSortKeys == nullptr ? nullptr : static_cast<Key<A>*>(args.gSortKeys) + row * args.sort_keys;
    const AnchorRecord record = state.select_and_finish(args.forward, anchor, args.K, sums, args.selection, gKeys);
    if (thread_id() == 0) args.gRecords[anchor] = record;
  }

  // Who finishes last sees what all others have written.
  sync_block();
  if (thread_id() == 0) {
    fence_device();
    const std::uint32_t before = atomic_add(&args.gControl->ticket, 1u);
    sLast.set(0, before + 1 == static_cast<std::uint32_t>(block_count()) ? 1u : 0u);
    sLast.set(1, 0u);
  }
  sync_block();
  if (sLast.get(0) == 0) return;
  fence_device();
  std::uint32_t rFlag = args.gControl->nonfinite;
  for (std::int64_t i = thread_id(); i < args.flags; i += thread_count()) rFlag |= load(args.gFlags + i);
  if (rFlag != 0) sLast.atomic_or(1, 1u);
  sync_block();
  const bool poison = sLast.get(1) != 0;
  if (args.reduces) {
    final_reduction<A>(args.forward, GlobalRecords{args.gRecords}, poison, reduction);
  } else if (thread_id() == 0) {
    args.gControl->ticket = 0;
    if (poison) args.gControl->nonfinite = 1;
  }
}

// ---- launch ---------------------------------------------------------------------------------------------------------

template <class A, int kPerLane>
cudaError_t launch_select(const SelectArgs& args, cudaStream_t stream) {
  const std::int64_t keys = args.gSortKeys == nullptr ? args.sort_keys : 0;
  const LaunchShape shape{std::max<std::int64_t>(args.rows, 1), kPerLane > 0 ? kSelectThreads<kPerLane> : args.threads,
                          SelectState<A, kPerLane>::bytes(args.forward.candidates.rows, keys) +
                              ReductionMemory::kBytes + shared_bytes<std::uint32_t>(2)};
  return launch(select_kernel<A, kPerLane>, shape, stream, args);
}

template <class A>
cudaError_t dispatch_select(const SelectArgs& args, cudaStream_t stream) {
  const std::int64_t M = args.forward.candidates.rows;
  static_assert(kShortRow == 8 * kWarpSize && kShortNeighbours <= kWarpSize);
  if (!selects(args.selection, M, args.K)) return cudaErrorInvalidValue;
  if (args.selection != Selection::kExtracted) return launch_select<A, 0>(args, stream);
  if (M <= 4 * kWarpSize) return launch_select<A, 4>(args, stream);
  return launch_select<A, 8>(args, stream);
}

}  // namespace

// ---- dispatch -------------------------------------------------------------------------------------------------------

cudaError_t enqueue_select(const ForwardArgs& args, const ForwardPlan& plan, char* workspace, const Strip& strip,
                           cudaStream_t stream) {
  const std::int64_t M = args.candidates.rows;
  const SelectArgs select_args{
      .forward = args,
      .K = plan.K,
      .first_row = strip.begin,
      .rows = strip.rows,
      .plane = plan.strip_rows * M,
      .slices = static_cast<int>(plan.d_slices),
      .tree = static_cast<int>(slice_tree(plan)),
      .threads = plan.select_threads,
      .selection = plan.selection,
      .reduces = strip.begin + strip.rows == args.anchors.rows && !plan.shared_reduction,
      .gFlags = piece<std::uint32_t>(workspace, plan.flags),
      .flags = direct_tiles(strip.rows, M, plan.triangular) * plan.d_slices,
      .gControl = piece<Control>(workspace, plan.control),
      .gRecords = piece<AnchorRecord>(workspace, plan.records),
      .gPartials = workspace + plan.partials.offset,
      .gSortKeys = plan.sort_keys.bytes > 0 ? workspace + plan.sort_keys.offset : nullptr,
      .sort_keys = direct_sort_keys(plan.K),
  };
  return args.dtype == DType::kFloat64 ? dispatch_select<double>(select_args, stream)
                                       : dispatch_select<float>(select_args, stream);
}

}  // namespace sn::cuda
