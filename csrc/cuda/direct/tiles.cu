// Partial sums of squared distances for a strip of anchors. A block takes a tile of 64 x 64 pairs and a slice of D
// (tile.cuh) and writes gPartials [slice][row of the strip][M]. In the self case with all anchors in one strip, only
// tiles on and above the diagonal are computed: d2(i, j) and d2(j, i) have the same bits. Each block reports whether it
// saw a NaN or Inf.
#include <algorithm>

#include "cuda/direct/tile.cuh"
#include "cuda/launch.cuh"
#include "cuda/memory.cuh"
#include "cuda/plan/sizes.h"
#include "cuda/ptx.cuh"
#include "cuda/stages.h"

namespace sn::cuda {
namespace {

// ---- traits ---------------------------------------------------------------------------------------------------------

// Blocks of the tile kernel on a multiprocessor. Open subtrees of doubles take twice the registers.
template <class T>
inline constexpr int kTileBlocks = sizeof(T) == sizeof(double) ? 1 : 2;

template <class T>
struct TileArgs {
  TileRows<T> anchors;     // of the strip
  TileRows<T> candidates;  // all
  std::int64_t dims;
  std::int64_t slice_elements;
  std::int64_t tiles;  // of a slice
  std::int64_t tiles_across;
  std::int64_t tiles_down;
  std::int64_t first_tile;  // triangular: the strip's own rows are the candidates from this column of tiles on
  bool triangular;
  bool aligned;
  bool first_strip;
  std::int64_t plane;  // partial sums of a slice: [plane / M rows][M]
  Acc<T>* gPartials;
  std::uint32_t* gFlags;  // [blocks]
  Control* gControl;
};

// ---- kernel ---------------------------------------------------------------------------------------------------------

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
      if (args.first_strip) args.gControl->nonfinite = 0;
    }
  }

  const std::int64_t slice = block_id() / args.tiles;
  std::int64_t down = 0;
  std::int64_t across = block_id() % args.tiles;
  if (args.triangular) {
    while (across >= args.tiles_across - down) across -= args.tiles_across - down++;
    if (across >= args.first_tile) across += down;  // of its own rows those from the diagonal on
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
  // A tile beside the diagonal serves its columns as anchors, too, where those are of the strip.
  const std::int64_t own = across - args.first_tile;
  const bool both = args.triangular && own > down && own < args.tiles_down;
  const std::int64_t first_anchor = args.first_tile * TileT::kRows;
#pragma unroll
  for (int i = 0; i < TileT::kPairs; ++i) {
    const int row = TileT::row_of(i);
#pragma unroll
    for (int j = 0; j < TileT::kPairs; ++j) {
      const int column = TileT::column_of(j);
      if (row < x.rows && column < z.rows) {
        gPlane[(row0 + row) * M + column0 + column] = rSums[i][j];
        if (both) gPlane[(column0 + column - first_anchor) * M + first_anchor + row0 + row] = rSums[i][j];
      }
    }
  }

  sync_block();
  if (any_lane(nonfinite) && lane_id() == 0) sFlag.atomic_or(0, 1u);
  sync_block();
  if (thread_id() == 0) args.gFlags[block_id()] = sFlag.get(0);
}

// ---- launch ---------------------------------------------------------------------------------------------------------

template <class T>
TileRows<T> rows_of(const FeatureView& view, std::int64_t first, std::int64_t rows) {
  return {static_cast<const T*>(view.data) + (rows > 0 ? first * view.row_stride : 0), view.row_stride, rows};
}

template <class T>
cudaError_t launch_tiles(const ForwardArgs& args, const ForwardPlan& plan, char* workspace, const Strip& strip,
                         cudaStream_t stream) {
  const std::int64_t M = args.candidates.rows;
  const std::int64_t tiles = direct_tiles(strip.rows, M, plan.triangular);
  const TileArgs<T> tile_args{
      .anchors = rows_of<T>(args.anchors, strip.begin, strip.rows),
      .candidates = rows_of<T>(args.candidates, 0, M),
      .dims = args.dims,
      .slice_elements = plan.slice_elements,
      .tiles = tiles,
      .tiles_across = direct_tiles(1, M, false),
      .tiles_down = direct_tiles(strip.rows, 1, false),
      .first_tile = plan.triangular ? strip.begin / kDirectTile : 0,
      .triangular = plan.triangular,
      .aligned = rows_aligned(args.anchors, args.dtype) && rows_aligned(args.candidates, args.dtype),
      .first_strip = strip.begin == 0,
      .plane = plan.strip_rows * M,
      .gPartials = piece<Acc<T>>(workspace, plan.partials),
      .gFlags = piece<std::uint32_t>(workspace, plan.flags),
      .gControl = piece<Control>(workspace, plan.control),
  };
  const LaunchShape shape{tiles * plan.d_slices, Tile<T>::kThreads,
                          shared_bytes<T>(Tile<T>::kElements) + shared_bytes<std::uint32_t>(1)};
  return launch(tile_kernel<T>, shape, stream, tile_args);
}

}  // namespace

// ---- dispatch -------------------------------------------------------------------------------------------------------

cudaError_t enqueue_tiles(const ForwardArgs& args, const ForwardPlan& plan, char* workspace, const Strip& strip,
                          cudaStream_t stream) {
  if (plan.slice_elements > kLargestSlice || kSection % plan.slice_elements != 0) return cudaErrorInvalidValue;
  return for_type(args.dtype, [&]<class T>() { return launch_tiles<T>(args, plan, workspace, strip, stream); });
}

}  // namespace sn::cuda
