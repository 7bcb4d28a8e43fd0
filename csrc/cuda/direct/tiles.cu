// Two kernels a wave of anchors.
//
// tile_kernel: a block per tile of 64 x 64 pairs and slice of D (tile.cuh) writes partial sums
//   gPartials [slice][row of the wave][M]. In the self case with everything in one wave only tiles on and above the
//   diagonal are computed: d2(i, j) and d2(j, i) have the same bits. Each block says whether it saw a NaN or Inf.
// select_kernel: a block per anchor adds up its slices in the one order, selects, and finishes the anchor
//   (loss.cuh). The block that finishes last looks at the flags and, in the last wave, sums over the anchors.
#include "cuda/direct/select.cuh"
#include "cuda/direct/tile.cuh"
#include "cuda/keys.cuh"
#include "cuda/launch.cuh"
#include "cuda/loss.cuh"
#include "cuda/memory.cuh"
#include "cuda/ptx.cuh"
#include "cuda/sizes.h"
#include "cuda/stages.h"

namespace sn::cuda {
namespace {

// ---- traits ---------------------------------------------------------------------------------------------------------

// Blocks of the tile kernel on a multiprocessor. Open subtrees of doubles take twice the registers.
template <class T>
inline constexpr int kTileBlocks = sizeof(T) == sizeof(double) ? 1 : 2;

template <class T>
struct TileArgs {
  TileRows<T> anchors;     // of the wave
  TileRows<T> candidates;  // all
  std::int64_t dims;
  std::int64_t slice_elements;
  std::int64_t tiles;  // of a slice
  std::int64_t tiles_across;
  bool triangular;
  bool aligned;
  bool first_wave;
  std::int64_t plane;  // partial sums of a slice: [plane / M rows][M]
  Acc<T>* gPartials;
  std::uint32_t* gFlags;  // [blocks]
  Control* gControl;
};

// ---- kernels --------------------------------------------------------------------------------------------------------

template <class T>
__global__ void __launch_bounds__(Tile<T>::kThreads, kTileBlocks<T>) tile_kernel(const TileArgs<T> args) {
  using TileT = Tile<T>;
  SharedArena arena;
  const TileT tile(arena.take<T>(TileT::kElements));
  const Shared<std::uint32_t> sFlag = arena.take<std::uint32_t>(1);
  if (thread_id() == 0) {
    sFlag.set(0, 0u);
    if (block_id() == 0) {
      args.gControl->ticket = 0;
      if (args.first_wave) args.gControl->nonfinite = 0;
    }
  }

  const std::int64_t slice = block_id() / args.tiles;
  std::int64_t down = 0;
  std::int64_t across = block_id() % args.tiles;
  if (args.triangular) {
    while (across >= args.tiles_across - down) across -= args.tiles_across - down++;
    across += down;
  } else {
    down = across / args.tiles_across;
    across %= args.tiles_across;
  }
  const std::int64_t row0 = down * TileT::kRows;
  const std::int64_t column0 = across * TileT::kRows;
  // Without any row the pointer is never used, nor moved.
  const auto from = [](const TileRows<T>& all, std::int64_t first) {
    return TileRows<T>{first < all.rows ? all.gFirst + first * all.row_stride : all.gFirst, all.row_stride,
                       all.rows - first};
  };
  const TileRows<T> x = from(args.anchors, row0);
  const TileRows<T> z = from(args.candidates, column0);

  const std::int64_t begin = slice * args.slice_elements;
  const std::int64_t end = begin + args.slice_elements < args.dims ? begin + args.slice_elements : args.dims;
  Acc<T> rSums[TileT::kPairs][TileT::kPairs];
  const bool nonfinite = tile.sums(x, z, begin, end, args.aligned, rSums);

  const std::int64_t M = args.candidates.rows;
  Acc<T>* gPlane = args.gPartials + slice * args.plane;
#pragma unroll
  for (int i = 0; i < TileT::kPairs; ++i) {
    const int row = TileT::row_of(i);
#pragma unroll
    for (int j = 0; j < TileT::kPairs; ++j) {
      const int column = TileT::column_of(j);
      if (row < x.rows && column < z.rows) {
        gPlane[(row0 + row) * M + column0 + column] = rSums[i][j];
        if (args.triangular && down != across) gPlane[(column0 + column) * M + row0 + row] = rSums[i][j];
      }
    }
  }

  sync_block();
  if (any_lane(nonfinite) && lane_id() == 0) sFlag.atomic_or(0, 1u);
  sync_block();
  if (thread_id() == 0) args.gFlags[block_id()] = sFlag.get(0);
}

struct SelectArgs {
  ForwardArgs forward;
  std::int64_t K;
  std::int64_t first_row;  // of the wave
  std::int64_t rows;       // of the wave
  std::int64_t plane;
  int slices;
  int span_slices;  // slices of one span
  bool last_wave;
  const std::uint32_t* gFlags;  // [flags]
  std::int64_t flags;
  Control* gControl;
  AnchorRecord* gRecords;  // [N]
  void* gPartials;         // acc [slices][plane / M rows][M]
  void* gSortKeys;         // Key [rows][sort_keys], or null: they fit shared memory
  std::int64_t sort_keys;  // keys of one anchor, a power of two
};

// kPerLane: candidates that a lane of the selecting warp holds; 0: rows of any length, and any K.
template <class A, int kPerLane>
__global__ void __launch_bounds__(kSelectThreads<kPerLane>, kSelectBlocks<kPerLane>)
    select_kernel(const SelectArgs args) {
  SharedArena arena;
  SelectState<A, kPerLane> state(arena, args.forward.candidates.rows, args.gSortKeys == nullptr ? args.sort_keys : 0);
  const ReductionMemory reduction(arena);
  const Shared<std::uint32_t> sLast = arena.take<std::uint32_t>(2);

  const std::int64_t row = block_id();
  if (row < args.rows) {
    const std::int64_t anchor = args.first_row + row;
    const std::int64_t M = args.forward.candidates.rows;
    const PlaneSums<A> sums{static_cast<A*>(args.gPartials) + row * M, args.plane, args.slices, args.span_slices};
    Key<A>* gKeys = args.gSortKeys == nullptr ? nullptr : static_cast<Key<A>*>(args.gSortKeys) + row * args.sort_keys;
    const AnchorRecord record = state.select_and_finish(args.forward, anchor, args.K, sums, gKeys);
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
  if (args.last_wave) {
    final_reduction<A>(args.forward, GlobalRecords{args.gRecords}, poison, reduction);
  } else if (poison && thread_id() == 0) {
    args.gControl->nonfinite = 1;
  }
}

// ---- launch ---------------------------------------------------------------------------------------------------------

template <class T>
TileRows<T> rows_of(const FeatureView& view, std::int64_t first, std::int64_t rows) {
  return {static_cast<const T*>(view.data) + (rows > 0 ? first * view.row_stride : 0), view.row_stride, rows};
}

template <class A, int kPerLane>
cudaError_t launch_select(const SelectArgs& args, cudaStream_t stream) {
  const std::int64_t keys = args.gSortKeys == nullptr ? args.sort_keys : 0;
  const LaunchShape shape{std::max<std::int64_t>(args.rows, 1), kSelectThreads<kPerLane>,
                          SelectState<A, kPerLane>::bytes(args.forward.candidates.rows, keys) +
                              ReductionMemory::kBytes + shared_bytes<std::uint32_t>(2)};
  return launch(select_kernel<A, kPerLane>, shape, stream, args);
}

template <class A>
cudaError_t dispatch_select(const SelectArgs& args, cudaStream_t stream) {
  const std::int64_t M = args.forward.candidates.rows;
  if (args.K > kWarpSize || M > 32 * kWarpSize) return launch_select<A, 0>(args, stream);
  if (M <= 4 * kWarpSize) return launch_select<A, 4>(args, stream);
  if (M <= 12 * kWarpSize) return launch_select<A, 12>(args, stream);
  return launch_select<A, 32>(args, stream);
}

template <class T>
cudaError_t run(const ForwardArgs& args, const ForwardPlan& plan, char* workspace, cudaStream_t stream) {
  using A = Acc<T>;
  using TileT = Tile<T>;
  const std::int64_t N = args.anchors.rows;
  const std::int64_t M = args.candidates.rows;
  auto* control = reinterpret_cast<Control*>(workspace + plan.control.offset);
  auto* flags = reinterpret_cast<std::uint32_t*>(workspace + plan.flags.offset);
  auto* records = reinterpret_cast<AnchorRecord*>(workspace + plan.records.offset);
  auto* partials = reinterpret_cast<A*>(workspace + plan.partials.offset);
  void* sort_keys = plan.sort_keys.bytes > 0 ? workspace + plan.sort_keys.offset : nullptr;
  const bool aligned = rows_aligned(args.anchors, args.dtype) && rows_aligned(args.candidates, args.dtype);
  if (plan.slice_elements > kLargestSlice || kSpan % plan.slice_elements != 0) return cudaErrorInvalidValue;

  for (std::int64_t wave = 0; wave < plan.waves; ++wave) {
    const std::int64_t first = wave * plan.wave_rows;
    const std::int64_t rows = std::max<std::int64_t>(0, std::min(plan.wave_rows, N - first));
    const std::int64_t tiles = direct_tiles(rows, M, plan.triangular);
    const TileArgs<T> tile_args{
        .anchors = rows_of<T>(args.anchors, first, rows),
        .candidates = rows_of<T>(args.candidates, 0, M),
        .dims = args.dims,
        .slice_elements = plan.slice_elements,
        .tiles = tiles,
        .tiles_across = direct_tiles(1, M, false),
        .triangular = plan.triangular,
        .aligned = aligned,
        .first_wave = wave == 0,
        .plane = plan.wave_rows * M,
        .gPartials = partials,
        .gFlags = flags,
        .gControl = control,
    };
    const LaunchShape shape{tiles * plan.d_slices, TileT::kThreads,
                            shared_bytes<T>(TileT::kElements) + shared_bytes<std::uint32_t>(1)};
    if (const cudaError_t error = launch(tile_kernel<T>, shape, stream, tile_args); error != cudaSuccess) return error;

    const SelectArgs select_args{
        .forward = args,
        .K = plan.K,
        .first_row = first,
        .rows = rows,
        .plane = plan.wave_rows * M,
        .slices = static_cast<int>(plan.d_slices),
        .span_slices = static_cast<int>(kSpan / plan.slice_elements),
        .last_wave = wave + 1 == plan.waves,
        .gFlags = flags,
        .flags = shape.blocks,
        .gControl = control,
        .gRecords = records,
        .gPartials = partials,
        .gSortKeys = sort_keys,
        .sort_keys = direct_sort_keys(plan.K),
    };
    if (const cudaError_t error = dispatch_select<A>(select_args, stream); error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

}  // namespace

// ---- dispatch -------------------------------------------------------------------------------------------------------

cudaError_t run_direct(const ForwardArgs& args, const ForwardPlan& plan, char* workspace, cudaStream_t stream) {
  switch (args.dtype) {
    case DType::kFloat32:
      return run<float>(args, plan, workspace, stream);
    case DType::kFloat64:
      return run<double>(args, plan, workspace, stream);
    case DType::kFloat16:
      return run<Half>(args, plan, workspace, stream);
    case DType::kBFloat16:
      return run<BFloat16>(args, plan, workspace, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace sn::cuda
