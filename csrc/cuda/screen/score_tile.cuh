// What the score kernels share: the shape of a block's tile of scores, the arguments, and the steps of the main loop.
// scores.cu explains how a tile is computed.
#pragma once

#include <algorithm>
#include <cstdint>

#include "cuda/memory.cuh"
#include "cuda/plan/plan_types.h"
#include "cuda/plan/sizes.h"
#include "cuda/ptx.cuh"
#include "cuda/screen/prepare.h"
#include "cuda/stages.h"
#include "cuda/tensor_core.cuh"
#include "sn_types.h"

namespace sn::cuda {

// ---- traits ---------------------------------------------------------------------------------------------------------

inline constexpr int kStageWidth = static_cast<int>(kStageColumns);  // elements of a row in a stage
inline constexpr int kChunkElements = 8;                             // 16 bytes
inline constexpr int kRowChunks = kStageWidth / kChunkElements;
inline constexpr int kMmaDepth = 16;
static_assert(kRowChunks == 8, "chunk ^ (row % 8) permutes the chunks of a row");
static_assert(kStageWidth % kMmaDepth == 0);

// What the epilogue holds of each row and column of the tile: floats.
enum Fact : int { kNorm = 0, kBias = 1, kRho = 2, kLimit = 3, kReach = 4, kFacts = 5 };

// A block's tile of scores, its warps' shares, and what the epilogue makes of kBytes of shared memory when the products
// are done: facts, labels, then for each warp a flag, counters and its products.
template <int kRows_, int kColumns_, int kWarpRows_, int kWarpColumns_, int kBytes>
struct TileShape {
  static constexpr int kRows = kRows_;
  static constexpr int kColumns = kColumns_;
  static constexpr int kWarpRows = kWarpRows_;
  static constexpr int kWarpColumns = kWarpColumns_;
  static constexpr int kSharedBytes = kBytes;
  static constexpr int kWarpsDown = kRows / kWarpRows;
  static constexpr int kWarpsAcross = kColumns / kWarpColumns;
  static constexpr int kWarps = kWarpsDown * kWarpsAcross;
  static constexpr int kThreads = kWarps * kWarpSize;
  static constexpr int kFragmentsDown = kWarpRows / 16;  // fragments of mma_m16n8k16
  static constexpr int kFragmentsAcross = kWarpColumns / 8;
  static constexpr int kCopyRows = kThreads / kRowChunks;  // rows of half precision that the block copies at once

  static constexpr int kCounters = kWarpRows + kWarpColumns;
  static constexpr int kWarpPairs = kWarpRows * kWarpColumns;
  static constexpr int kHitWords = kWarpPairs / kWarpSize / 32;  // a lane has a bit for each of its pairs
  static constexpr int kFactBytes = sn::cuda::shared_bytes<float>(kFacts * (kRows + kColumns));
  static constexpr int kLabelBytes = sn::cuda::shared_bytes<std::uint32_t>(kRows + kColumns);
  static constexpr int kFlagBytes = sn::cuda::shared_bytes<std::uint32_t>(kWarps);
  static constexpr int kCounterBytes = sn::cuda::shared_bytes<std::uint32_t>(kWarps * kCounters);
  static constexpr int kProductBytes = sn::cuda::shared_bytes<float>(kWarps * kWarpPairs);

  static_assert(kRows % kWarpRows == 0 && kColumns % kWarpColumns == 0);
  static_assert(kWarpColumns % 16 == 0, "ldmatrix brings the operands of two fragments across");
  static_assert(kRows % kCopyRows == 0 && kColumns % kCopyRows == 0);
  static_assert(kCopyRows % 8 == 0, "rows that a thread copies have the same swizzle");
  static_assert(kWarpPairs % (32 * kWarpSize) == 0, "the bits of a lane's hits are whole words");
  static_assert(kFactBytes + kLabelBytes + kFlagBytes + kCounterBytes + kProductBytes <= kBytes);
};

template <class T16>
struct MatrixArgs {
  const T16* rows;
  std::int64_t count;  // tile rows (columns) are numbered 0 .. count - 1
  std::int64_t first;  // number n is row first + n * step of the matrix
  std::int64_t step;
  std::int64_t stride;  // elements from row to row of the matrix
  std::int64_t pitch;   // step * stride: from number to number
  int dims;
  const float* n;  // by row of the matrix
  const float* rho;
  const std::int64_t* labels;
};

template <class T16>
struct ScoreArgs {
  MatrixArgs<T16> anchors;
  MatrixArgs<T16> candidates;
  Thresholds thresholds;
  std::int32_t stages;  // of D
  std::uint32_t tile_rows;
  std::uint32_t tile_columns;
  float eta;
  bool far;
  std::int64_t capacity;
  std::int64_t far_capacity;
  std::uint32_t* counts;  // by number of the anchor in the strip
  std::uint32_t* far_counts;
  std::uint64_t* buffer;
  std::uint64_t* far_buffer;
  float* scores;  // [anchors.count][candidates.count], of a sample's groups [anchors.count][groups]
  const Control* control;
  std::int64_t groups;
  bool quads;  // groups are of kQuadGroup columns, not of kLaneGroup
};

// ---- main loop ------------------------------------------------------------------------------------------------------

// One operand's share of a stage: the thread's chunk of every kCopyRows-th row, from gChunk on.
template <class T16, int kRows, int kCopyRows>
__device__ __forceinline__ void copy_operand(const Shared<T16>& sOperand, const T16* gChunk, std::int64_t step,
                                             std::uint32_t valid) {
#pragma unroll
  for (int q = 0; q < kRows / kCopyRows; ++q) {
    const int row = thread_id() / kRowChunks;
    const int place = (row + q * kCopyRows) * kStageWidth + ((thread_id() % kRowChunks) ^ (row % 8)) * kChunkElements;
    async_copy16(sOperand, place, gChunk, ((valid >> q) & 1u) != 0);
    gChunk += step;
  }
}

// Of a warp's tile, in the fragments of mma_m16n8k16.
template <class Tile>
using Products = float[Tile::kFragmentsDown][Tile::kFragmentsAcross][4];

template <class Tile>
__device__ __forceinline__ void clear(Products<Tile>& rProducts) {
#pragma unroll
  for (int m = 0; m < Tile::kFragmentsDown; ++m) {
#pragma unroll
    for (int n = 0; n < Tile::kFragmentsAcross; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) rProducts[m][n][e] = 0.0f;
    }
  }
}

// Where the warp's tile begins in the block's.
template <class Tile>
struct WarpPlace {
  int row = warp_id() / Tile::kWarpsAcross * Tile::kWarpRows;
  int column = warp_id() % Tile::kWarpsAcross * Tile::kWarpColumns;
};

// What a warp multiplies at one depth of a stage, in the fragments of mma_m16n8k16.
template <class Tile>
struct Operands {
  std::uint32_t rRows[Tile::kFragmentsDown][4];
  std::uint32_t rColumns[Tile::kFragmentsAcross / 2][4];
};
inline constexpr int kDepths = kStageWidth / kMmaDepth;  // of a stage

template <class T16, class Tile>
__device__ __forceinline__ void load_operands(Operands<Tile>& operands, const Shared<T16>& sRows,
                                              const Shared<T16>& sColumns, const WarpPlace<Tile>& warp, int depth) {
  // Element of the 16-byte chunk that this lane addresses at depth 0; depth d toggles bits of the chunk's place.
  const int row_place =
      (warp.row + lane_id() % 16) * kStageWidth + ((lane_id() / 16) ^ (lane_id() % 8)) * kChunkElements;
  const int column_place = (warp.column + lane_id() / 16 * 8 + lane_id() % 8) * kStageWidth +
                           ((lane_id() / 8 % 2) ^ (lane_id() % 8)) * kChunkElements;
#pragma unroll
  for (int m = 0; m < Tile::kFragmentsDown; ++m) {
    load_matrix_x4(operands.rRows[m], sRows, (row_place ^ depth * kMmaDepth) + m * 16 * kStageWidth);
  }
#pragma unroll
  for (int n = 0; n < Tile::kFragmentsAcross / 2; ++n) {
    load_matrix_x4(operands.rColumns[n], sColumns, (column_place ^ depth * kMmaDepth) + n * 16 * kStageWidth);
  }
}

template <class T16, class Tile>
__device__ __forceinline__ void multiply(Products<Tile>& rProducts, const Operands<Tile>& operands) {
#pragma unroll
  for (int m = 0; m < Tile::kFragmentsDown; ++m) {
#pragma unroll
    for (int n = 0; n < Tile::kFragmentsAcross; ++n) {
      const std::uint32_t rOperand[2] = {operands.rColumns[n / 2][n % 2 * 2], operands.rColumns[n / 2][n % 2 * 2 + 1]};
      mma_m16n8k16<T16>(rProducts[m][n], operands.rRows[m], rOperand);
    }
  }
}

template <class T16, class Tile>
__device__ __forceinline__ void multiply_stage(Products<Tile>& rProducts, const Shared<T16>& sRows,
                                               const Shared<T16>& sColumns, const WarpPlace<Tile>& warp) {
#pragma unroll
  for (int depth = 0; depth < kDepths; ++depth) {
    Operands<Tile> operands;
    load_operands<T16, Tile>(operands, sRows, sColumns, warp, depth);
    multiply<T16, Tile>(rProducts, operands);
  }
}

// ---- host -----------------------------------------------------------------------------------------------------------

inline constexpr std::int64_t kLargestDims = std::int64_t{1} << 30;  // columns are numbered by int

// Whether the score kernels can serve a request. The tile has a say in symmetric ones (begins_and_ends_with_tiles).
inline bool servable(const ForwardArgs& args, const ForwardPlan& plan, const ScoreRequest& request) {
  const bool whole = request.columns == args.candidates.rows && request.column_stride == 1;
  return plan.padded_dims <= kLargestDims && request.rows >= 1 && request.columns >= 1 &&
         request.row_begin + request.rows <= args.anchors.rows &&
         (request.columns - 1) * request.column_stride < args.candidates.rows &&
         (!request.symmetric || (args.symmetric && whole && request.mode == ScoreMode::kAppend));
}

// A symmetric strip shares no tile with another one.
inline bool begins_and_ends_with_tiles(const ScoreRequest& request, std::int64_t all_rows, int tile_columns) {
  const std::int64_t end = request.row_begin + request.rows;
  return request.row_begin % tile_columns == 0 && (end == all_rows || end % tile_columns == 0);
}

template <class T16>
ScoreArgs<T16> score_args(const ForwardArgs& args, const ForwardPlan& plan, char* workspace,
                          const ScoreRequest& request) {
  const ScreenSide anchors = anchor_side(args, plan, workspace);
  const ScreenSide candidates = candidate_side(args, plan, workspace);
  auto* counts = piece<std::uint32_t>(workspace, plan.counts);
  return {
      .anchors = {static_cast<const T16*>(anchors.rows), request.rows, request.row_begin, 1, anchors.stride,
                  anchors.stride, static_cast<int>(anchors.dims), anchors.n, anchors.rho, args.anchor_labels},
      .candidates = {static_cast<const T16*>(candidates.rows), request.columns, 0, request.column_stride,
                     candidates.stride, request.column_stride * candidates.stride, static_cast<int>(candidates.dims),
                     candidates.n, candidates.rho, args.candidate_labels},
      .thresholds = thresholds(args, plan, workspace),
      .stages = static_cast<std::int32_t>(plan.padded_dims / kStageColumns),
      .tile_rows = 0,
      .tile_columns = 0,
      .eta = screening_error(plan.padded_dims),
      .far = request.far,
      .capacity = plan.buffer_capacity,
      .far_capacity = plan.far_capacity,
      .counts = counts,
      .far_counts = counts + plan.strip_rows,
      .buffer = piece<std::uint64_t>(workspace, plan.buffer),
      .far_buffer = piece<std::uint64_t>(workspace, plan.far_buffer),
      .scores = piece<float>(workspace, plan.buffer),
      .control = piece<Control>(workspace, plan.control),
      .groups = sample_groups(plan),
      .quads = plan.sample_group == kQuadGroup,
  };
}

}  // namespace sn::cuda
