// The score kernel: a block multiplies a tile of anchors with a tile of candidates on the tensor cores, and writes the
// scores out or keeps the few that pass a threshold. bound.cuh has the bound and the tests; this file evaluates them.
//
// 1. Main loop. D is walked in stages of 64 columns: 16-byte asynchronous copies into a ring of kStages buffers, with
//    one barrier a stage. A row of a stage is 128 bytes, all banks. Its eight 16-byte chunks are stored at chunk ^ (row
//    % 8), so the eight rows that an ldmatrix phase reads lie in different banks, and so do the writes.
//
// 2. Registers. A warp of the large tile owns 64 x 32 scores, 64 accumulators a lane. With 24 registers of operands and
//    the addresses it stays within 128, so two blocks share a multiprocessor (2 x 96 KB where it has 228): while one is
//    in its epilogue or waits for its first stages, the other multiplies. A multiply-add takes 0.125 bytes of shared
//    memory there, copies included: at 128 bytes a clock 1024 of them, of which an H200 reached 930. A warp of the wide
//    tile owns 64 x 64: 0.086 bytes, and a quarter less from the L2. Its block has a multiprocessor to itself. So its
//    warps read operands a depth ahead, across the barrier of a stage; but nobody multiplies during its epilogue, which
//    is most of the time where D is small: the plan takes the tile that waves x cost make the cheapest (plan/cost.cpp).
//    Devices with 99 KB of shared memory do not have it: their tensor cores take at most 512 multiply-adds a clock,
//    which the large tile feeds.
//
// 3. Facts. A thread loads what the epilogue needs of one or two rows or columns of the tile before the main loop,
//    keeps it in registers, and puts it in shared memory when the ring is free. This costs neither latency nor shared
//    memory, and three stages of the large tile fit the 99 KB of the smaller devices.
//
// 4. Append. A pair takes two multiply-adds (one where there is no rho), a comparison, and a multiply-add that notes
//    the hit as a power of two; no branch separates the pairs. When all are tested, products go to shared memory, for
//    lanes to pick those of their hits. Hits are counted by anchor, one lane an anchor adds the number to the anchor's
//    global count, and each hit takes one of the places. So there is one global atomic an anchor and warp tile, issued
//    together, however many hits there are.
//
// 5. Sample. A lane keeps the least q of its kLaneGroup columns of a row, and the rho that belongs to it: a multiply-
//    add, a comparison and two selections a pair, then one bound a group. Batches come sorted by identity, so a tile's
//    columns are spread over the whole sample: column c of tile t is its candidate c * tile_columns + t. Neighbours in
//    the batch fall into different groups, as many as there are tiles.
//
// 6. Order of tiles. The grid walks bands of kBand tile rows, and the columns of a band one after the other: blocks
//    that run at one time share few rows and columns.
//
// 7. Partial tiles. One anchor beyond a whole row of tiles begins another one, of which almost all rows are missing. A
//    warp without a pair to score multiplies nothing and has no epilogue: half of such a tile's warps, where a tile has
//    two down. All copy their shares of the stages and meet at every barrier. A block below the diagonal in a wide tile
//    (8) is no warp's work, either.
//
// 8. The symmetric case. Anchors are candidates: of the square that a strip's own rows make with themselves there are
//    tiles on and above the diagonal alone, each tested for its rows and for its columns. Columns before and behind the
//    square are ordinary ones. They are walked in a circle from the square's first column on, so the square comes first
//    in a band, as a staircase. One strip of all anchors is nothing but the square.
#include "cuda/launch.cuh"
#include "cuda/memory.cuh"
#include "cuda/ptx.cuh"
#include "cuda/screen/bound.cuh"
#include "cuda/screen/epilogue.cuh"
#include "cuda/screen/score_tile.cuh"
#include "cuda/stages.h"

namespace sn::cuda {
namespace {

// ---- traits ---------------------------------------------------------------------------------------------------------

constexpr int kBand = 16;

// Both operands are copied as they are, kStages stages in a ring.
constexpr int ring_bytes(int rows, int columns, int stages) {
  return shared_bytes<std::uint16_t>(stages * (rows + columns) * kStageWidth);
}
// Two blocks of the large tile, 192 KB, need a multiprocessor with 228 KB of shared memory; elsewhere, and of the wide
// tile, one runs alone and may have all the registers. Not a template argument: host and device must agree on those.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ != 900 && __CUDA_ARCH__ != 1000
#define SN_TILES_A_MULTIPROCESSOR 1
#else
#define SN_TILES_A_MULTIPROCESSOR 2
#endif
template <int kRows, int kColumns, int kWarpRows, int kWarpColumns, int kStages_>
struct Tile : TileShape<kRows, kColumns, kWarpRows, kWarpColumns, ring_bytes(kRows, kColumns, kStages_)> {
  using Shape = TileShape<kRows, kColumns, kWarpRows, kWarpColumns, ring_bytes(kRows, kColumns, kStages_)>;
  static constexpr int kStages = kStages_;
  static constexpr bool kAlone = Shape::kWarpPairs > 64 * 32;  // its products leave no registers for a second block
  static constexpr int kMinBlocks = kAlone ? 1 : SN_TILES_A_MULTIPROCESSOR;
  static constexpr bool kAhead = kAlone;  // operands are read a depth ahead: no other block multiplies meanwhile
  static constexpr int kStageElements = (kRows + kColumns) * kStageWidth;
  // A thread carries the facts of so many rows and columns of the tile.
  static constexpr int kCarried = (kRows + kColumns + Shape::kThreads - 1) / Shape::kThreads;
  // The symmetric case cuts the matrix into square blocks of kRows; so many of them lie side by side in a tile.
  static constexpr int kBlocksAcross = kColumns / kRows;
  static constexpr bool kServesSamples = kSamplePad % kColumns == 0;
  static_assert(kColumns % kRows == 0 && kRows % kWarpColumns == 0, "a warp's columns lie in one square block");
  static_assert(kBand % kBlocksAcross == 0, "a band begins at a whole tile of the diagonal");
  static_assert(kStages >= 3, "one stage is read, one is awaited, one is under way");
};
#undef SN_TILES_A_MULTIPROCESSOR
using WideTile = Tile<128, 256, 64, 64, 3>;
using LargeTile = Tile<128, 128, 64, 32, 3>;
using SmallTile = Tile<64, 64, 32, 32, 4>;
static_assert(WideTile::kSharedBytes == kWideTileBytes);
static_assert(kStripMultiple % WideTile::kColumns == 0 && kStripMultiple % LargeTile::kColumns == 0 &&
              kStripMultiple % SmallTile::kColumns == 0);
static_assert(LargeTile::kSharedBytes <= kLeastSharedBytes && SmallTile::kSharedBytes <= kLeastSharedBytes);

// ---- kernel: tiles --------------------------------------------------------------------------------------------------

struct TilePlace {
  std::uint32_t row;
  std::uint32_t column;
};

__device__ __forceinline__ TilePlace tile_of_rectangle(std::uint32_t id, std::uint32_t rows, std::uint32_t columns) {
  const std::uint32_t band = id / (kBand * columns);
  const std::uint32_t first = band * kBand;
  const std::uint32_t height = rows - first < kBand ? rows - first : kBand;
  id -= first * columns;
  return {first + id % height, id / height};
}

// The tiles with pairs on or above the diagonal of square blocks, whose rows and columns begin together. A band is a
// staircase, a tile across for every kAcross rows, then full columns.
template <int kAcross>
__device__ __forceinline__ TilePlace tile_of_triangle(std::uint32_t id, std::uint32_t rows, std::uint32_t columns) {
  std::uint32_t first = 0;
  std::uint32_t height = 0;
  std::uint32_t steps = 0;
  std::uint32_t staircase = 0;
  for (;;) {
    height = rows - first < kBand ? rows - first : kBand;
    steps = (height + kAcross - 1) / kAcross;
    staircase = kAcross * (steps * (steps - 1) / 2) + height;
    const std::uint32_t tiles = staircase + height * (columns - first / kAcross - steps);
    if (id < tiles) break;
    id -= tiles;
    first += kBand;
  }
  const std::uint32_t left = first / kAcross;
  if (id >= staircase) return {first + (id - staircase) % height, left + steps + (id - staircase) / height};
  std::uint32_t step = 0;
  while (id >= kAcross * (step + 1) && step + 1 < steps) id -= kAcross * ++step;
  return {first + id, left + step};
}

// Symmetric: the strip's first column of tiles is number 0, and behind the last one comes the matrix's first.
template <class Tile, class T16>
__device__ __forceinline__ std::uint32_t from_strip(std::uint32_t column, const ScoreArgs<T16>& args) {
  const std::uint32_t place = column + static_cast<std::uint32_t>(args.anchors.first / Tile::kColumns);
  return place < args.tile_columns ? place : place - args.tile_columns;
}

// ---- kernel ---------------------------------------------------------------------------------------------------------

// What a thread carries through the main loop of a row or column of the tile.
struct Carried {
  int matrix_row = -1;  // -1: beyond the matrix
  float norm = 0.0f;
  float rho = 0.0f;
  float limit = -kInfinity;
  float reach = 0.0f;
};
// visit(q, i) for the rows (i) and columns (kRows + i) whose facts this thread carries, in rCarried[q].
template <class Tile, class Visit>
__device__ __forceinline__ void for_each_carried(const Visit& visit) {
#pragma unroll
  for (int q = 0; q < Tile::kCarried; ++q) {
    const int i = thread_id() + q * Tile::kThreads;
    if ((q + 1) * Tile::kThreads <= Tile::kRows + Tile::kColumns || i < Tile::kRows + Tile::kColumns) visit(q, i);
  }
}

template <class T16, class Tile, ScoreMode kMode, bool kSymmetric>
__global__ void __launch_bounds__(Tile::kThreads, Tile::kMinBlocks)
    score_kernel(const __grid_constant__ ScoreArgs<T16> args) {
  static_assert(!kSymmetric || kMode == ScoreMode::kAppend);
  if (load(&args.control->unscreenable) != 0) return;  // the whole grid

  const auto id = static_cast<std::uint32_t>(block_id());
  const TilePlace place = kSymmetric ? tile_of_triangle<Tile::kBlocksAcross>(id, args.tile_rows, args.tile_columns)
                                     : tile_of_rectangle(id, args.tile_rows, args.tile_columns);
  const std::int64_t row = static_cast<std::int64_t>(place.row) * Tile::kRows;
  const std::int64_t column =
      static_cast<std::int64_t>(kSymmetric ? from_strip<Tile>(place.column, args) : place.column) * Tile::kColumns;
  // Number of the tile's first candidate, and from one to the next.
  const std::int64_t first_candidate = kMode == ScoreMode::kSample ? static_cast<std::int64_t>(place.column) : column;
  const std::int64_t spread = kMode == ScoreMode::kSample ? static_cast<std::int64_t>(args.tile_columns) : 1;
  // Columns right of the diagonal's square block serve as anchors, too, where they are of the strip: others have no
  // threshold yet, or no buffer any more.
  const auto serves_columns = [&](int block) {
    const std::uint32_t across = place.column * Tile::kBlocksAcross + static_cast<std::uint32_t>(block);
    return kSymmetric && place.row < across && across < args.tile_rows;
  };
  const auto serves_rows = [&](int block) {  // a block left of it is served by its mirror
    return !kSymmetric || place.row <= place.column * Tile::kBlocksAcross + static_cast<std::uint32_t>(block);
  };

  // Whether the warp has a pair to score. Else its rows or its columns begin beyond the last one, or its square block
  // lies below the diagonal and serves no anchor: a block that serves its columns serves its rows. Of a sample all
  // groups are written, also those without a candidate.
  const WarpPlace<Tile> warp;
  const int warp_block = warp.column / Tile::kRows;
  const auto has_pairs = [&] {
    if (row + warp.row >= args.anchors.count) return false;
    return kMode == ScoreMode::kSample || (column + warp.column < args.candidates.count && serves_rows(warp_block));
  };
  const bool works = any_lane(has_pairs());  // all lanes agree, and the compiler sees it: a predicate, no register

  // What this thread's rows or columns bring to the epilogue. A place beyond the matrix keeps nothing and is kept by no
  // anchor, unless a NaN is involved; therefore hits are checked again.
  Carried rCarried[Tile::kCarried];
  for_each_carried<Tile>([&](int q, int i) {
    const bool is_row = i < Tile::kRows;
    const MatrixArgs<T16>& matrix = is_row ? args.anchors : args.candidates;
    const std::int64_t number = (is_row ? row : first_candidate) + (is_row ? i : spread * (i - Tile::kRows));
    Carried& facts = rCarried[q];
    facts.matrix_row = number < matrix.count ? static_cast<int>(matrix.first + number * matrix.step) : -1;
    if (facts.matrix_row < 0) return;
    facts.norm = load(matrix.n + facts.matrix_row);
    facts.rho = load(matrix.rho + facts.matrix_row);
    if (kMode == ScoreMode::kAppend && (is_row || serves_columns((i - Tile::kRows) / Tile::kRows))) {
      facts.limit = load(args.thresholds.T + facts.matrix_row);
      facts.reach = load(args.thresholds.u + facts.matrix_row);
    }
  });

  // 1. Products.
  SharedArena arena;
  const Shared<T16> sRing = arena.take<T16>(Tile::kStages * Tile::kStageElements);
  Products<Tile> rProducts;  // set where the warp works
  {
    const int copy_row = thread_id() / kRowChunks;
    int element = thread_id() % kRowChunks * kChunkElements;  // of the next stage to be copied
    const T16* gRows =
        args.anchors.rows + args.anchors.first * args.anchors.stride + (row + copy_row) * args.anchors.pitch + element;
    const T16* gColumns = args.candidates.rows + args.candidates.first * args.candidates.stride +
                          (first_candidate + spread * copy_row) * args.candidates.pitch + element;
    // Which of the thread's rows and, kColumnBits up, columns exist.
    constexpr int kColumnBits = Tile::kRows / Tile::kCopyRows;
    static_assert(kColumnBits + Tile::kColumns / Tile::kCopyRows <= 32);
    std::uint32_t valid = 0;
#pragma unroll
    for (int q = 0; q < Tile::kRows / Tile::kCopyRows; ++q) {
      valid |= row + copy_row + q * Tile::kCopyRows < args.anchors.count ? 1u << q : 0u;
    }
#pragma unroll
    for (int q = 0; q < Tile::kColumns / Tile::kCopyRows; ++q) {
      valid |= first_candidate + spread * copy_row + spread * q * Tile::kCopyRows < args.candidates.count
                   ? 1u << (kColumnBits + q)
                   : 0u;
    }
    // Of the next stage; beyond the last one there is nothing to copy, but groups are counted.
    const auto copy_stage = [&](int slot) {
      const Shared<T16> sStage = sRing.offset(slot * Tile::kStageElements);
      if (element < args.stages * kStageWidth) {
        copy_operand<T16, Tile::kRows, Tile::kCopyRows>(sStage, gRows, Tile::kCopyRows * args.anchors.pitch,
                                                        element < args.anchors.dims ? valid : 0);
        copy_operand<T16, Tile::kColumns, Tile::kCopyRows>(sStage.offset(Tile::kRows * kStageWidth), gColumns,
                                                           Tile::kCopyRows * spread * args.candidates.pitch,
                                                           element < args.candidates.dims ? valid >> kColumnBits : 0);
        element += kStageWidth;
        gRows += kStageWidth;
        gColumns += kStageWidth;
      }
      async_commit();
    };
#pragma unroll
    for (int stage = 0; stage < Tile::kStages - 1; ++stage) copy_stage(stage);
    int slot = 0;
    const auto next = [](int after) { return after + 1 == Tile::kStages ? 0 : after + 1; };
    const auto arrive = [&] {
      async_wait<Tile::kStages - 2>();
      sync_block();  // the oldest stage has arrived, and the slot that is overwritten next has been read by all
    };
    // A warp without pairs makes its copies and meets the others, as often as those below. It has a loop of its own: in
    // theirs a condition would add up to 8 % of instructions, and products of the wide tile would not overlap copies.
    // (bar.sync counts warps, wherever they are; only the lanes of a warp must come together.)
    if (!works) {
#pragma unroll 1
      for (int stage = 0; stage < args.stages; ++stage) {
        arrive();
        copy_stage(slot == 0 ? Tile::kStages - 1 : slot - 1);
        slot = next(slot);
      }
      if constexpr (Tile::kAhead) arrive();
    } else if constexpr (Tile::kAhead) {
      clear<Tile>(rProducts);
      Operands<Tile> rOperands[2];
      const auto load_depth = [&](int from, int depth) {
        const Shared<T16> sStage = sRing.offset(from * Tile::kStageElements);
        load_operands<T16, Tile>(rOperands[depth % 2], sStage, sStage.offset(Tile::kRows * kStageWidth), warp, depth);
      };
      arrive();
      load_depth(slot, 0);
#pragma unroll 1
      for (int stage = 0; stage < args.stages; ++stage) {
        copy_stage(slot == 0 ? Tile::kStages - 1 : slot - 1);
#pragma unroll
        for (int depth = 0; depth < kDepths - 1; ++depth) {
          load_depth(slot, depth + 1);
          multiply<T16, Tile>(rProducts, rOperands[depth % 2]);
        }
        // All operands of the stage are in registers. Behind the last stage its first ones are read again, for nothing.
        if (stage + 1 < args.stages) slot = next(slot);
        arrive();
        load_depth(slot, 0);
        multiply<T16, Tile>(rProducts, rOperands[(kDepths - 1) % 2]);
      }
    } else {
      clear<Tile>(rProducts);
#pragma unroll 1
      for (int stage = 0; stage < args.stages; ++stage) {
        arrive();
        copy_stage(slot == 0 ? Tile::kStages - 1 : slot - 1);
        const Shared<T16> sStage = sRing.offset(slot * Tile::kStageElements);
        multiply_stage<T16, Tile>(rProducts, sStage, sStage.offset(Tile::kRows * kStageWidth), warp);
        slot = next(slot);
      }
    }
    async_wait<0>();
  }

  // 2. The ring is free: facts.
  sync_block();
  const EpilogueMemory<Tile> memory;
  bool wants_far = false;
  for_each_carried<Tile>([&](int q, int i) {
    const Carried& facts = rCarried[q];
    memory.set(kNorm, i, facts.norm);
    if constexpr (kMode == ScoreMode::kAppend) {
      const bool exists = facts.matrix_row >= 0;
      const bool skipped = is_null(facts.norm, facts.rho) &&
                           static_cast<std::uint32_t>(facts.matrix_row) > load(&args.control->last_null);
      memory.set(kBias, i, exists && !skipped ? support_bias(facts.norm, facts.rho, args.eta) : kInfinity);
      memory.set(kRho, i, multiply_up(facts.rho, kRhoMargin));
      memory.set(kLimit, i, facts.limit);
      memory.set(kReach, i, facts.reach);
      const bool serves = i < Tile::kRows || serves_columns((i - Tile::kRows) / Tile::kRows);
      if (args.far && exists && serves && load(args.thresholds.G + facts.matrix_row) < kInfinity) wants_far = true;
    }
    if constexpr (kMode == ScoreMode::kSample) {
      memory.set(kBias, i, facts.matrix_row >= 0 ? far_bias(facts.norm, facts.rho, args.eta) : kInfinity);
      memory.set(kRho, i, facts.rho);
    }
  });
  if constexpr (kMode == ScoreMode::kAppend) memory.vote_for_far(wants_far);
  sync_block();

  // 3. Scores.
  Epilogue<T16, Tile> epilogue(args, memory, warp, row, column);
  if constexpr (kMode == ScoreMode::kDense) {
    if (works) epilogue.dense(rProducts);  // no barrier follows
  } else if constexpr (kMode == ScoreMode::kSample) {
    if (works) epilogue.sample(rProducts);
  } else {
    const bool columns_too = serves_columns(warp_block);
    if (works) epilogue.template append_support<kSymmetric>(rProducts, columns_too);
    if (!args.far) return;
    if (!memory.wants_far()) return;  // the whole block
    for_each_carried<Tile>([&](int q, int i) {
      const int matrix_row = rCarried[q].matrix_row;
      const MatrixArgs<T16>& matrix = i < Tile::kRows ? args.anchors : args.candidates;
      memory.sLabels.set(i, matrix_row >= 0 ? fold_label(load(matrix.labels + matrix_row)) : 0);
    });
    sync_block();
    if (works) epilogue.template append_far<kSymmetric>(rProducts, columns_too);
  }
}

// ---- launch ---------------------------------------------------------------------------------------------------------

// Of so many rows and columns of tiles; symmetric: without those below the diagonal.
template <class Tile>
std::int64_t blocks_of(std::int64_t rows, std::int64_t columns, bool symmetric) {
  const std::int64_t steps = rows / Tile::kBlocksAcross;
  const std::int64_t below = Tile::kBlocksAcross * (steps * (steps - 1) / 2) + rows % Tile::kBlocksAcross * steps;
  return rows * columns - (symmetric ? below : 0);
}

template <class T16, class Tile>
cudaError_t launch_scores(ScoreArgs<T16> args, const ScoreRequest& request, cudaStream_t stream) {
  const std::int64_t rows = divide_up(args.anchors.count, Tile::kRows);
  const std::int64_t columns =
      divide_up(request.mode == ScoreMode::kSample ? padded_sample(args.candidates.count) : args.candidates.count,
                Tile::kColumns);
  args.tile_rows = static_cast<std::uint32_t>(rows);
  args.tile_columns = static_cast<std::uint32_t>(columns);
  const LaunchShape shape{blocks_of<Tile>(rows, columns, request.symmetric), Tile::kThreads, Tile::kSharedBytes};
  if (columns > kMaxBlocks / kBand) return cudaErrorInvalidConfiguration;
  if (request.symmetric && !begins_and_ends_with_tiles(request, args.candidates.count, Tile::kColumns)) {
    return cudaErrorInvalidValue;
  }
  if (request.mode == ScoreMode::kDense) {
    return launch(score_kernel<T16, Tile, ScoreMode::kDense, false>, shape, stream, args);
  }
  if constexpr (Tile::kServesSamples) {
    if (request.mode == ScoreMode::kSample) {
      return launch(score_kernel<T16, Tile, ScoreMode::kSample, false>, shape, stream, args);
    }
  }
  return request.symmetric ? launch(score_kernel<T16, Tile, ScoreMode::kAppend, true>, shape, stream, args)
                           : launch(score_kernel<T16, Tile, ScoreMode::kAppend, false>, shape, stream, args);
}

template <class T16>
cudaError_t launch_of_size(const ForwardArgs& args, const ForwardPlan& plan, char* workspace,
                           const ScoreRequest& request, cudaStream_t stream) {
  const ScoreArgs<T16> score = score_args<T16>(args, plan, workspace, request);
  const bool sample = request.mode != ScoreMode::kAppend && plan.path != ForwardPath::kDense;
  switch (sample ? plan.sample_tile : plan.score_tile) {
    case WideTile::kColumns:
      return launch_scores<T16, WideTile>(score, request, stream);
    case LargeTile::kColumns:
      return launch_scores<T16, LargeTile>(score, request, stream);
    case SmallTile::kColumns:
      return launch_scores<T16, SmallTile>(score, request, stream);
    default:
      return cudaErrorInvalidValue;
  }
}

}  // namespace

// ---- dispatch -------------------------------------------------------------------------------------------------------

cudaError_t enqueue_scores(const ForwardArgs& args, const ForwardPlan& plan, char* workspace,
                           const ScoreRequest& request, cudaStream_t stream) {
  if (!servable(args, plan, request)) return cudaErrorInvalidValue;
  return args.dtype == DType::kBFloat16 ? launch_of_size<BFloat16>(args, plan, workspace, request, stream)
                                        : launch_of_size<Half>(args, plan, workspace, request, stream);
}

}  // namespace sn::cuda
