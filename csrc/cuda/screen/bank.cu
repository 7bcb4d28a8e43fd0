// The score kernel of ForwardPath::kBank. A block reads some candidates in fp32 once, converts them as they arrive,
// finds their norms and residuals, and scores them against all anchors of the call.
#include "cuda/launch.cuh"
#include "cuda/memory.cuh"
#include "cuda/plan/sizes.h"
#include "cuda/ptx.cuh"
#include "cuda/screen/bound.cuh"
#include "cuda/screen/epilogue.cuh"
#include "cuda/screen/prepare.h"
#include "cuda/screen/score_tile.cuh"
#include "cuda/stages.h"

namespace sn::cuda {
namespace {

// ---- traits ---------------------------------------------------------------------------------------------------------

// The bank's tile: all anchors of the call against some candidates, which arrive in fp32.
//
// A stage of 64 columns of the full tile is 2.1 M multiply-adds, 1625 clocks at the 1290 a clock that `mma.sync` is
// said to reach; 1920 clocks of shared memory (KB: 128 of operands, 32 + 32 of copies, 32 + 16 of converting); 1725
// clocks of an H200's memory for 32 KB; and 1670 clocks of instructions, half of them for converting. Each of the four
// is as good as full, so a stage costs their longest only where they overlap: half of the warps, one of two on each
// scheduler, convert while the others multiply. 16 warps of 64 x 32 would overlap as well, but read half as much again
// from shared memory, which is the longest of the four.
constexpr int kBankStages = 3;
constexpr int kBankCopies = 2;  // of the candidates in half precision: one is multiplied, one is made
constexpr int bank_bytes(int rows, int columns) {
  return shared_bytes<std::uint16_t>(kBankStages * rows * kStageWidth) +
         shared_bytes<float>(kBankStages * columns * kStageWidth) +
         shared_bytes<std::uint16_t>(kBankCopies * columns * kStageWidth);
}
template <int kRows, int kColumns, int kWarpRows, int kWarpColumns>
struct BankTile : TileShape<kRows, kColumns, kWarpRows, kWarpColumns, bank_bytes(kRows, kColumns)> {
  using Shape = TileShape<kRows, kColumns, kWarpRows, kWarpColumns, bank_bytes(kRows, kColumns)>;
  static constexpr int kWideChunks = kStageWidth / Pack<float>::kElements;  // 16-byte chunks of a row in fp32
  static constexpr int kWideRows = Shape::kThreads / kWideChunks;  // rows in fp32 that the block copies at once
  static constexpr int kOwnRows = kColumns / Shape::kCopyRows;     // a thread converts one chunk of so many
  static_assert(Shape::kThreads >= kRows, "a thread brings the facts of one anchor");
  static_assert(Shape::kWarps == 8, "warps 0 to 3 and 4 to 7 meet on the four schedulers");
  static_assert(kColumns % kWideRows == 0);
  static_assert(kOwnRows <= 8, "flags of a thread's rows are bits of two bytes");
  static_assert(Shape::kSharedBytes <= kBankSharedBytes);
};
using BankAppendTile = BankTile<static_cast<int>(kBankAnchorRows), 128, 64, 64>;
// Of few anchors a quarter of the products, and reading the bank is all that is left. Of half of the full tile's, half
// the products: 815 clocks of `mma.sync` a stage and 1540 of shared memory. Reading the bank is the longest there, too.
using BankFewTile = BankTile<64, 128, 32, 32>;
using BankHalfTile = BankTile<128, 128, 64, 32>;
// A sample is a fraction of the bank: smaller tiles give every multiprocessor one.
using BankSampleTile = BankTile<static_cast<int>(kBankAnchorRows), 32, 32, 32>;

struct BankArgs {
  ScoreArgs<Half> score;  // candidates.rows, .stride, .n, .rho: not used
  const float* candidates;
  std::int64_t candidate_stride;
  std::int64_t dims;
  bool aligned;  // rows of the candidates start at multiples of 16 bytes
  const float* mean;
  float row_slack;
  float* n;  // of the candidates, written
  float* rho;
  Control* control;
};

// ---- kernel ---------------------------------------------------------------------------------------------------------

// Of the block's candidate `row`. Those of a sample are spread: scores.cu tells why.
template <class Tile, ScoreMode kMode>
__device__ __forceinline__ std::int64_t number_of(int row) {
  return kMode == ScoreMode::kSample ? block_id() + row * block_count() : block_id() * Tile::kColumns + row;
}

// A thread's chunks of one stage of the candidates. Chunk 2c goes to place c, chunk 2c + 1 to place 8 + c: a converting
// thread reads two neighbouring chunks, and eight such threads then read 128 bytes in a row.
template <class Tile, ScoreMode kMode>
__device__ __forceinline__ void copy_wide(const Shared<float>& sWide, const BankArgs& args, std::int64_t first) {
  constexpr int kPack = Pack<float>::kElements;
  const int chunk = thread_id() % Tile::kWideChunks;
  const int place = (chunk % 2 * (Tile::kWideChunks / 2) + chunk / 2) * kPack;
  const std::int64_t begin = first + chunk * kPack;
#pragma unroll
  for (int q = 0; q < Tile::kColumns / Tile::kWideRows; ++q) {
    const int row = thread_id() / Tile::kWideChunks + q * Tile::kWideRows;
    const std::int64_t number = number_of<Tile, kMode>(row);
    const bool exists = number < args.score.candidates.count && begin < args.dims;
    const float* gChunk = args.candidates + number * args.score.candidates.step * args.candidate_stride + begin;
    if (!exists || (args.aligned && begin + kPack <= args.dims)) {
      async_copy16(sWide, row * kStageWidth + place, gChunk, exists);
    } else {  // the end of D, or rows that 16-byte copies cannot read
      Pack<float> rPack;
#pragma unroll
      for (int i = 0; i < kPack; ++i) rPack.elements[i] = begin + i < args.dims ? load(gChunk + i) : 0.0f;
      sWide.set_pack(row * kStageWidth + place, rPack);
    }
  }
}

// What a thread gathers of its rows, of every eighth chunk of each.
template <class Tile>
struct RowSums {
  float rSquares[Tile::kOwnRows];
  float rRests[Tile::kOwnRows];
  std::uint32_t flags;  // bit q: not finite, bit 8 + q: does not fit the copy, bit 16 + q: is not the mean
};

template <class Tile>
__device__ __forceinline__ void convert_stage(const Shared<float>& sWide, const Shared<Half>& sCopy,
                                              RowSums<Tile>& sums, const float* gMean, float scale) {
  const int chunk = thread_id() % kRowChunks;
  const Pack<float> rMeans[2] = {load_pack(gMean + chunk * kChunkElements),
                                 load_pack(gMean + chunk * kChunkElements + 4)};
#pragma unroll
  for (int q = 0; q < Tile::kOwnRows; ++q) {
    const int row = thread_id() / kRowChunks + q * Tile::kCopyRows;
    const Pack<float> rValues[2] = {sWide.get_pack(row * kStageWidth + chunk * 4),
                                    sWide.get_pack(row * kStageWidth + kStageWidth / 2 + chunk * 4)};
    Pack<Half> rCopy;
    float squares = 0.0f;  // of the stage alone: a sum of sums rounds less
    float rests = 0.0f;
    std::uint32_t differs = 0;  // bits: as a flag it would cost registers
#pragma unroll
    for (int i = 0; i < kChunkElements; ++i) {
      const float centred = subtract(rValues[i / 4].elements[i % 4], rMeans[i / 4].elements[i % 4]);
      differs |= bits_of(centred) & 0x7fffffffu;
      rCopy.elements[i] = copy_element(centred, scale, squares, rests);
    }
    // A value that is not finite has no finite copy, and squares of finite copies do not overflow.
    if (!is_finite(squares)) {
      sums.flags |= 0x100u << q;
#pragma unroll
      for (int i = 0; i < kChunkElements; ++i) {
        if (!is_finite(rValues[i / 4].elements[i % 4])) sums.flags |= 1u << q;
      }
    }
    if (differs != 0) sums.flags |= 0x10000u << q;
    sums.rSquares[q] = add(sums.rSquares[q], squares);
    sums.rRests[q] = add(sums.rRests[q], rests);
    sCopy.set_pack(row * kStageWidth + (chunk ^ (row % 8)) * kChunkElements, rCopy);
  }
}

// Without a scale there is nothing to score, but values that are not finite still have to be found among the
// block's candidates.
template <class Tile>
__device__ __forceinline__ void look_for_nonfinite(const BankArgs& args) {
  bool finite = true;
  for (int row = warp_id(); row < Tile::kColumns; row += Tile::kWarps) {
    const std::int64_t candidate = block_id() * Tile::kColumns + row;
    if (candidate >= args.score.candidates.count) break;
    const float* gRow = args.candidates + candidate * args.candidate_stride;
#pragma unroll 4
    for (std::int64_t i = lane_id(); i < args.dims; i += kWarpSize) finite = is_finite(load(gRow + i)) && finite;
  }
  if (!all_lanes(finite) && lane_id() == 0) atomic_or(&args.control->nonfinite, 1u);
}

// The candidates are read once, in fp32, by the one block that scores them against all anchors. In a round of the loop
// the tensor cores multiply stage s, while stage s + 1 of the candidates is converted into the other copy and two more
// stages are under way from memory. Every warp does both, half of them in the other order: both are always at work. A
// multiprocessor holds one block of 224 KB, up to 64 KB of it in flight.
template <class Tile, ScoreMode kMode>
__global__ void __launch_bounds__(Tile::kThreads, 1) bank_kernel(const __grid_constant__ BankArgs args) {
  const ScoreArgs<Half>& score = args.score;
  if (load(&score.control->unscreenable) != 0) {  // the whole grid
    if (kMode == ScoreMode::kAppend && score.candidates.step == 1) look_for_nonfinite<Tile>(args);
    return;
  }
  const float scale = float_from_bits(static_cast<std::uint32_t>(127 + load(&score.control->exponent)) << 23);
  const std::int64_t column = block_id() * Tile::kColumns;

  // 1. Products, and the candidates' facts.
  SharedArena arena;
  const Shared<Half> sAnchors = arena.take<Half>(kBankStages * Tile::kRows * kStageWidth);
  const Shared<float> sWide = arena.take<float>(kBankStages * Tile::kColumns * kStageWidth);
  const Shared<Half> sCopies = arena.take<Half>(kBankCopies * Tile::kColumns * kStageWidth);
  Products<Tile> rProducts;
  clear<Tile>(rProducts);
  const WarpPlace<Tile> warp;
  RowSums<Tile> sums{};
  {
    const int copy_row = thread_id() / kRowChunks;
    const int element = thread_id() % kRowChunks * kChunkElements;
    const std::int64_t pitch = score.anchors.stride;
    const Half* gAnchors = score.anchors.rows + (score.anchors.first + copy_row) * pitch + element;
    std::uint32_t valid = 0;
#pragma unroll
    for (int q = 0; q < Tile::kRows / Tile::kCopyRows; ++q) {
      valid |= copy_row + q * Tile::kCopyRows < score.anchors.count ? 1u << q : 0u;
    }
    // Group g: stage g of the candidates and stage g - 1 of the anchors.
    const auto copy_group = [&](int group) {
      if (group < score.stages) {
        copy_wide<Tile, kMode>(sWide.offset(group % kBankStages * Tile::kColumns * kStageWidth), args,
                               static_cast<std::int64_t>(group) * kStageWidth);
      }
      if (group > 0 && group <= score.stages) {
        copy_operand<Half, Tile::kRows, Tile::kCopyRows>(
            sAnchors.offset((group - 1) % kBankStages * Tile::kRows * kStageWidth),
            gAnchors + static_cast<std::int64_t>(group - 1) * kStageWidth, Tile::kCopyRows * pitch, valid);
      }
      async_commit();  // also when empty: groups are counted
    };
    const auto convert = [&](int stage) {
      convert_stage<Tile>(sWide.offset(stage % kBankStages * Tile::kColumns * kStageWidth),
                          sCopies.offset(stage % kBankCopies * Tile::kColumns * kStageWidth), sums,
                          args.mean + static_cast<std::int64_t>(stage) * kStageWidth, scale);
    };
    copy_group(0);
    copy_group(1);
    copy_group(2);
    async_wait<2>();
    sync_block();
    convert(0);
    for (int stage = 0; stage < score.stages; ++stage) {
      async_wait<1>();
      sync_block();  // group stage + 1 has arrived, copy `stage` is made; what the last round read is free
      copy_group(stage + 3);
      const auto multiply = [&] {
        multiply_stage<Half, Tile>(rProducts, sAnchors.offset(stage % kBankStages * Tile::kRows * kStageWidth),
                                   sCopies.offset(stage % kBankCopies * Tile::kColumns * kStageWidth), warp);
      };
      const bool converts = stage + 1 < score.stages;
      if (warp_id() < Tile::kWarps / 2) {
        multiply();
        if (converts) convert(stage + 1);
      } else {
        if (converts) convert(stage + 1);
        multiply();
      }
    }
    async_wait<0>();
  }

  // 2. The rings are free: facts.
  sync_block();
  const EpilogueMemory<Tile> memory;
#pragma unroll
  for (int mask = 1; mask < kRowChunks; mask *= 2) {
#pragma unroll
    for (int q = 0; q < Tile::kOwnRows; ++q) {
      sums.rSquares[q] = add(sums.rSquares[q], shuffle_xor(sums.rSquares[q], mask));
      sums.rRests[q] = add(sums.rRests[q], shuffle_xor(sums.rRests[q], mask));
    }
    sums.flags |= shuffle_xor(sums.flags, mask);
  }
  if (thread_id() % kRowChunks == 0) {
#pragma unroll
    for (int q = 0; q < Tile::kOwnRows; ++q) {
      const int row = thread_id() / kRowChunks + q * Tile::kCopyRows;
      const std::int64_t number = number_of<Tile, kMode>(row);
      const bool exists = number < score.candidates.count;
      const bool fits = (sums.flags >> q & 0x101u) == 0;
      const bool differs = (sums.flags >> q & 0x10000u) != 0;
      const float norm = fits ? sums.rSquares[q] : 0.0f;
      const float bound = differs ? residual_bound(sums.rSquares[q], sums.rRests[q], args.row_slack) : 0.0f;
      const float rho = fits ? bound : kInfinity;
      const std::int64_t candidate = number * score.candidates.step;
      memory.set(kNorm, Tile::kRows + row, norm);
      if constexpr (kMode == ScoreMode::kSample) {
        memory.set(kBias, Tile::kRows + row, exists ? far_bias(norm, rho, score.eta) : kInfinity);
        memory.set(kRho, Tile::kRows + row, rho);
      } else {
        const bool skipped = is_null(norm, rho) && candidate > load(&score.control->last_null);
        memory.set(kBias, Tile::kRows + row, exists && !skipped ? support_bias(norm, rho, score.eta) : kInfinity);
        memory.set(kRho, Tile::kRows + row, multiply_up(rho, kRhoMargin));
      }
      if (exists) {
        args.n[candidate] = norm;
        args.rho[candidate] = rho;
        if ((sums.flags >> q & 1u) != 0) atomic_or(&args.control->nonfinite, 1u);
      }
    }
  }
  const std::int64_t anchor = score.anchors.first + thread_id();
  const bool is_anchor = thread_id() < score.anchors.count;
  if constexpr (kMode == ScoreMode::kAppend) {
    if (thread_id() < Tile::kRows) {
      memory.set(kLimit, thread_id(), is_anchor ? load(score.thresholds.T + anchor) : -kInfinity);
      memory.set(kReach, thread_id(), is_anchor ? load(score.thresholds.u + anchor) : 0.0f);
    }
    const bool wants_far = score.far && is_anchor && load(score.thresholds.G + anchor) < kInfinity;
    memory.vote_for_far(wants_far);
  }
  if constexpr (kMode == ScoreMode::kSample) {
    static_assert(Tile::kThreads == Tile::kRows);
    const float norm = is_anchor ? load(score.anchors.n + anchor) : 0.0f;
    const float rho = is_anchor ? load(score.anchors.rho + anchor) : 0.0f;
    memory.set(kBias, thread_id(), far_bias(norm, rho, score.eta));
    memory.set(kRho, thread_id(), rho);
  }
  sync_block();

  // 3. Scores.
  Epilogue<Half, Tile> epilogue(score, memory, warp, 0, column);
  if constexpr (kMode == ScoreMode::kDense) {
    epilogue.dense(rProducts);
  } else if constexpr (kMode == ScoreMode::kSample) {
    epilogue.sample(rProducts);
  } else {
    epilogue.template append_support<false>(rProducts, false);
    if (!score.far) return;
    if (!memory.wants_far()) return;  // the whole block
    for (int i = thread_id(); i < Tile::kRows + Tile::kColumns; i += Tile::kThreads) {
      const MatrixArgs<Half>& matrix = i < Tile::kRows ? score.anchors : score.candidates;
      const std::int64_t number = i < Tile::kRows ? i : column + i - Tile::kRows;
      memory.sLabels.set(
          i, number < matrix.count ? fold_label(load(matrix.labels + matrix.first + number * matrix.step)) : 0);
    }
    sync_block();
    epilogue.template append_far<false>(rProducts, false);
  }
}

// ---- launch ---------------------------------------------------------------------------------------------------------

template <class Tile, ScoreMode kMode>
cudaError_t launch_bank(const BankArgs& bank, std::int64_t columns, cudaStream_t stream) {
  const LaunchShape shape{divide_up(columns, Tile::kColumns), Tile::kThreads, Tile::kSharedBytes};
  return launch(bank_kernel<Tile, kMode>, shape, stream, bank);
}

}  // namespace

// ---- dispatch -------------------------------------------------------------------------------------------------------

cudaError_t enqueue_bank_scores(const ForwardArgs& args, const ForwardPlan& plan, char* workspace,
                                const ScoreRequest& request, cudaStream_t stream) {
  if (!servable(args, plan, request) || request.rows > kBankAnchorRows || args.dtype != DType::kFloat32 ||
      args.symmetric) {
    return cudaErrorInvalidValue;
  }
  const ScreenSide candidates = candidate_side(args, plan, workspace);
  const BankArgs bank{
      .score = score_args<Half>(args, plan, workspace, request),
      .candidates = static_cast<const float*>(args.candidates.data),
      .candidate_stride = args.candidates.row_stride,
      .dims = args.dims,
      .aligned = rows_aligned(args.candidates, args.dtype),
      .mean = piece<float>(workspace, plan.mean),
      .row_slack = row_slack(plan.padded_dims),
      .n = candidates.n,
      .rho = candidates.rho,
      .control = piece<Control>(workspace, plan.control),
  };
  if (request.mode == ScoreMode::kDense) {
    return launch_bank<BankSampleTile, ScoreMode::kDense>(bank, request.columns, stream);
  }
  if (request.mode == ScoreMode::kSample) {
    return launch_bank<BankSampleTile, ScoreMode::kSample>(bank, padded_sample(request.columns), stream);
  }
  if (request.rows <= BankFewTile::kRows) {
    return launch_bank<BankFewTile, ScoreMode::kAppend>(bank, request.columns, stream);
  }
  return request.rows <= BankHalfTile::kRows
             ? launch_bank<BankHalfTile, ScoreMode::kAppend>(bank, request.columns, stream)
             : launch_bank<BankAppendTile, ScoreMode::kAppend>(bank, request.columns, stream);
}

}  // namespace sn::cuda
