// The scores of rows that are screened again: a block takes a tile of rows with one leader, finds their thresholds from
// a sample of the candidates and tests all candidates, or its share of them, against those. rescreen.cuh derives what
// they prove.
//
// Both operands arrive in the input's type and leave as half-precision copies of what they are seen from the leader:
// each thread subtracts, scales and rounds an eighth of its rows and adds up their squares. While the tensor cores
// multiply a stage, the next one is on its way to registers. Few tiles are cut into segments of the candidates, so that
// all multiprocessors have work; each segment finds the thresholds of its rows for itself, which costs a sixteenth of
// all scores each time and no launch.
#include "cuda/launch.cuh"
#include "cuda/memory.cuh"
#include "cuda/plan/sizes.h"
#include "cuda/ptx.cuh"
#include "cuda/rescreen/rescreen.cuh"
#include "cuda/screen/args.cuh"
#include "cuda/screen/bound.cuh"
#include "cuda/screen/kth_smallest.cuh"
#include "cuda/screen/score_tile.cuh"
#include "cuda/stages.h"

namespace sn::cuda {
namespace {

// ---- traits ---------------------------------------------------------------------------------------------------------

struct RescoreTile {
  static constexpr int kRows = static_cast<int>(kRescreenRows);
  static constexpr int kColumns = 128;
  static constexpr int kAll = kRows + kColumns;
  static constexpr int kWarpRows = 32;
  static constexpr int kWarpColumns = 32;
  static constexpr int kWarpsAcross = kColumns / kWarpColumns;
  static constexpr int kWarps = kRows / kWarpRows * kWarpsAcross;
  static constexpr int kThreads = kWarps * kWarpSize;
  static constexpr int kFragmentsDown = kWarpRows / 16;
  static constexpr int kFragmentsAcross = kWarpColumns / 8;
  static constexpr int kCopyRows = kThreads / kRowChunks;  // rows that the block converts at once
  static constexpr int kOwnRows = kAll / kCopyRows;        // a thread converts a chunk of so many
  static constexpr int kStageElements = kAll * kStageWidth;
  static constexpr int kSlots = 2;  // one is multiplied, one is made
  static_assert(kAll % kCopyRows == 0 && kRows % kCopyRows == 0);
  static_assert(kCopyRows % 8 == 0, "rows that a thread converts have the same swizzle");
};
using Tile = RescoreTile;

// One block on each multiprocessor of an H200, and as many waiting; any number is right.
constexpr std::int64_t kRescoreBlocks = 264;
// A sample of one candidate in 16, or so many for each of K + 1: few samples crowd in the groups.
constexpr std::int64_t kRescoreRatio = 16;
constexpr std::int64_t kSampleTimes = 24;

// Groups of upper bounds of a row: a lane's columns of a tile make one, and every kTilesApart-th tile of the sample
// shares them.
constexpr int kTileGroups = Tile::kWarpsAcross * 4;
constexpr int kTilesApart = 10;
constexpr int kGroups = kTileGroups * kTilesApart;
constexpr int kGroupPitch = kGroups + 4;  // rows of a fragment lie in different banks
constexpr int kLaneGroups = kGroups / kWarpSize;
static_assert(kGroups % kWarpSize == 0 && kGroups > kFastNeighbours);

constexpr int kRescoreBytes = shared_bytes<std::uint16_t>(Tile::kSlots * Tile::kStageElements) +
                              shared_bytes<float>(Tile::kRows * kGroupPitch) + 2 * shared_bytes<float>(Tile::kAll) +
                              shared_bytes<float>(Tile::kColumns) + 4 * shared_bytes<float>(Tile::kRows) +
                              shared_bytes<std::int32_t>(Tile::kRows) + shared_bytes<std::uint32_t>(2);
static_assert(kRescoreBytes <= 99 * 1024, "of the devices with the least shared memory");

// ---- kernel ---------------------------------------------------------------------------------------------------------

struct RescoreMemory {
  Shared<Half> sCopies;          // [kSlots][kAll][kStageWidth], rows before columns
  Shared<float> sLeast;          // [kRows][kGroupPitch] least upper bound of each group
  Shared<float> sNorm;           // [kAll]
  Shared<float> sRho;            // [kAll]
  Shared<float> sBias;           // [kColumns] P of the support test; +inf: not kept
  Shared<float> sT;              // [kRows] thresholds; T = -inf: keeps nothing
  Shared<float> sU;              // [kRows]
  Shared<std::uint32_t> sError;  // [kRows] bits of the largest errors of the row's entries
  Shared<std::uint32_t> sSpread;
  Shared<std::int32_t> sRows;    // [kRows] of the strip, -1: none
  Shared<std::uint32_t> sWords;  // the largest |x - r|; an index that K + 1 null rows do not exceed

  __device__ __forceinline__ explicit RescoreMemory(SharedArena& arena)
      : sCopies(arena.take<Half>(Tile::kSlots * Tile::kStageElements)),
        sLeast(arena.take<float>(Tile::kRows * kGroupPitch)),
        sNorm(arena.take<float>(Tile::kAll)),
        sRho(arena.take<float>(Tile::kAll)),
        sBias(arena.take<float>(Tile::kColumns)),
        sT(arena.take<float>(Tile::kRows)),
        sU(arena.take<float>(Tile::kRows)),
        sError(arena.take<std::uint32_t>(Tile::kRows)),
        sSpread(arena.take<std::uint32_t>(Tile::kRows)),
        sRows(arena.take<std::int32_t>(Tile::kRows)),
        sWords(arena.take<std::uint32_t>(2)) {}
};

// A chunk of a row as it lies in memory.
template <class T>
struct RawChunk {
  static constexpr int kPacks = kChunkElements / Pack<T>::kElements;
  Pack<T> packs[kPacks];
  __device__ __forceinline__ float value(int i) const {
    return widen(packs[i / Pack<T>::kElements].elements[i % Pack<T>::kElements]);
  }
  // Whether some element has another value: 0 and -0 are the same.
  __device__ __forceinline__ bool differs_from(const RawChunk& other) const {
    bool differs = false;
#pragma unroll
    for (int i = 0; i < kChunkElements; ++i) differs = differs || value(i) != other.value(i);
    return differs;
  }
};
template <class T>
__device__ __forceinline__ RawChunk<T> load_chunk(const T* gRow, std::int64_t first, std::int64_t dims, bool aligned) {
  constexpr int kPack = Pack<T>::kElements;
  RawChunk<T> chunk;
#pragma unroll
  for (int p = 0; p < RawChunk<T>::kPacks; ++p) {
    const std::int64_t begin = first + p * kPack;
    if (aligned && begin + kPack <= dims) {
      chunk.packs[p] = load_pack(gRow + begin);
    } else {
#pragma unroll
      for (int e = 0; e < kPack; ++e) {
        chunk.packs[p].elements[e] = begin + e < dims ? load(gRow + begin + e) : narrow<T>(0.0f);
      }
    }
  }
  return chunk;
}

// 2^exponent of a normal float.
__device__ __forceinline__ float power_of_two(int exponent) {
  return float_from_bits(static_cast<std::uint32_t>(127 + exponent) << 23);
}

template <class T>
struct Rescore {
  const RefineArgs& args;
  const RescoreMemory& memory;
  const T* gLeader;
  std::int64_t dims;
  int first_exponent;  // e
  int exponent;        // f

  // The block's row `place`: one of the tile's rows, or one of its columns, which are candidates number * step < end.
  __device__ __forceinline__ const T* source(int place, std::int64_t number, std::int64_t end,
                                             std::int64_t step) const {
    if (place < Tile::kRows) {
      const std::int32_t row = memory.sRows.get(place);
      const std::int64_t anchor = args.row_begin + (row < 0 ? 0 : row);
      return static_cast<const T*>(args.forward.anchors.data) + anchor * args.forward.anchors.row_stride;
    }
    number += place - Tile::kRows;
    const std::int64_t candidate = number < end ? number * step : 0;  // beyond the end: computed, never kept
    return static_cast<const T*>(args.forward.candidates.data) + candidate * args.forward.candidates.row_stride;
  }

  // The exponent that the rows' largest |x - r| gives.
  __device__ __forceinline__ void find_exponent() {
    float largest = 0.0f;
    for (int place = warp_id(); place < Tile::kRows; place += Tile::kWarps) {
      if (memory.sRows.get(place) < 0) continue;
      const T* gRow = source(place, 0, 0, 0);
#pragma unroll 4
      for (std::int64_t i = lane_id(); i < dims; i += kWarpSize) {
        const float centred = subtract(widen(load(gRow + i)), widen(load(gLeader + i)));
        largest = maximum(largest, centred < 0.0f ? -centred : centred);
      }
    }
    const std::uint32_t bits = reduce_max(bits_of(largest));
    if (lane_id() == 0) memory.sWords.atomic_max(0, bits);
    sync_block();
    const std::uint32_t all = memory.sWords.get(0);
    // All rows are the leader's: the first cast's range, with room for differences.
    exponent = all == 0 ? first_exponent - 1 : kFrameTarget - (static_cast<int>(all >> 23) - 127);
    if (exponent > first_exponent + kFrameRange) exponent = first_exponent + kFrameRange;
    if (exponent < first_exponent - kFrameRange) exponent = first_exponent - kFrameRange;
  }

  // Products and facts of the rows against the candidates number * step < end, from `number` on. Begins and ends with
  // all threads behind a barrier. `last_null`: null rows behind it are not kept.
  __device__ __forceinline__ void find_products(Products<Tile>& rProducts, std::int64_t number, std::int64_t end,
                                                std::int64_t step, std::uint32_t last_null) const {
    const float scale = power_of_two(exponent);
    const int chunk = thread_id() % kRowChunks;
    const int first_place = thread_id() / kRowChunks;
    const T* gRows[Tile::kOwnRows];
#pragma unroll
    for (int q = 0; q < Tile::kOwnRows; ++q) gRows[q] = source(first_place + q * Tile::kCopyRows, number, end, step);
    float rSquares[Tile::kOwnRows] = {};
    std::uint32_t rDiffers[Tile::kOwnRows] = {};  // from the leader
    RawChunk<T> rRaw[Tile::kOwnRows];
    const auto load_stage = [&](std::int64_t first) {
#pragma unroll
      for (int q = 0; q < Tile::kOwnRows; ++q) rRaw[q] = load_chunk(gRows[q], first, dims, args.aligned);
    };
    const auto convert_stage = [&](std::int64_t first, int slot) {
      const RawChunk<T> rLeader = load_chunk(gLeader, first, dims, args.aligned);
      float rOrigin[kChunkElements];
#pragma unroll
      for (int i = 0; i < kChunkElements; ++i) rOrigin[i] = multiply(-scale, rLeader.value(i));
#pragma unroll
      for (int q = 0; q < Tile::kOwnRows; ++q) {
        Pack<Half> rCopy;
        float squares = 0.0f;  // of the stage alone: a sum of sums rounds less
#pragma unroll
        for (int i = 0; i < kChunkElements; i += 2) {
          const std::uint32_t pair = narrow_pair<Half>(fused_multiply_add(rRaw[q].value(i), scale, rOrigin[i]),
                                                       fused_multiply_add(rRaw[q].value(i + 1), scale, rOrigin[i + 1]));
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            const Half copy = half_from_bits(static_cast<std::uint16_t>(pair >> 16 * e));
            const float copied = widen(copy);
            squares = fused_multiply_add(copied, copied, squares);
            rCopy.elements[i + e] = copy;
          }
        }
        if (rRaw[q].differs_from(rLeader)) rDiffers[q] = 1;
        rSquares[q] = add(rSquares[q], squares);
        const int place = first_place + q * Tile::kCopyRows;
        memory.sCopies.set_pack(
            slot * Tile::kStageElements + place * kStageWidth + (chunk ^ (place % 8)) * kChunkElements, rCopy);
      }
    };

    clear<Tile>(rProducts);
    const WarpPlace<Tile> warp;
    std::int64_t first = chunk * kChunkElements;
    load_stage(first);
    convert_stage(first, 0);
    sync_block();
    int slot = 0;
#pragma unroll 1
    for (std::int64_t stage = 0; stage < dims; stage += kStageWidth) {
      const bool more = stage + kStageWidth < dims;
      first += kStageWidth;
      if (more) load_stage(first);
      const Shared<Half> sStage = memory.sCopies.offset(slot * Tile::kStageElements);
      multiply_stage<Half, Tile>(rProducts, sStage, sStage.offset(Tile::kRows * kStageWidth), warp);
      if (more) convert_stage(first, slot ^ 1);
      sync_block();
      slot ^= 1;
    }

#pragma unroll
    for (int mask = 1; mask < kRowChunks; mask *= 2) {
#pragma unroll
      for (int q = 0; q < Tile::kOwnRows; ++q) {
        rSquares[q] = add(rSquares[q], shuffle_xor(rSquares[q], mask));
        rDiffers[q] |= shuffle_xor(rDiffers[q], mask);
      }
    }
    if (chunk == 0) {
#pragma unroll
      for (int q = 0; q < Tile::kOwnRows; ++q) {
        const int place = first_place + q * Tile::kCopyRows;
        const bool fits = is_finite(rSquares[q]);  // an infinite copy makes an infinite sum
        const float norm = fits ? rSquares[q] : 0.0f;
        const float bound = rDiffers[q] != 0 ? rounding_bound(norm, args.row_slack, args.rounding_floor) : 0.0f;
        const float rho = fits ? bound : kInfinity;
        memory.sNorm.set(place, norm);
        if (place < Tile::kRows) {
          memory.sRho.set(place, rho);
          continue;
        }
        const int column = place - Tile::kRows;
        const bool exists = number + column < end;
        const bool skipped = is_null(norm, rho) && (number + column) * step > static_cast<std::int64_t>(last_null);
        memory.sRho.set(place, exists ? rho : kInfinity);
        memory.sBias.set(column, exists && fits && !skipped ? support_bias(norm, rho, args.eta) : kInfinity);
      }
    }
    sync_block();
  }

  __device__ __forceinline__ static int row_of(int m, int half) {
    return warp_id() / Tile::kWarpsAcross * Tile::kWarpRows + m * 16 + lane_id() / 4 + half * 8;
  }
  __device__ __forceinline__ static int column_of(int n, int e) {
    return warp_id() % Tile::kWarpsAcross * Tile::kWarpColumns + n * 8 + lane_id() % 4 * 2 + e;
  }

  // Upper bounds of a tile of the sample join their groups.
  __device__ __forceinline__ void gather_bounds(const Products<Tile>& rProducts, std::int64_t sample_tile) const {
    const int group =
        static_cast<int>(sample_tile % kTilesApart) * kTileGroups + warp_id() % Tile::kWarpsAcross * 4 + lane_id() % 4;
#pragma unroll
    for (int m = 0; m < Tile::kFragmentsDown; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = row_of(m, half);
        const float norm = memory.sNorm.get(row);
        const float rho = memory.sRho.get(row);
        const int place = row * kGroupPitch + group;
        float least = memory.sLeast.get(place);
#pragma unroll
        for (int n = 0; n < Tile::kFragmentsAcross; ++n) {
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            const int column = Tile::kRows + column_of(n, e);
            const float other = memory.sNorm.get(column);
            const float score = fused_multiply_add(-2.0f, rProducts[m][n][half * 2 + e], other);
            const float most = distance_upper(norm, rho, other, memory.sRho.get(column), score, args.eta);
            if (most < least) least = most;
          }
        }
        memory.sLeast.set(place, least);
      }
    }
  }

  // Null rows among the columns of a tile of the sample, by the first warp: `nulls` counts them.
  __device__ __forceinline__ void count_nulls(std::int64_t number, std::int64_t step, int& nulls) const {
    if (warp_id() != 0) return;
#pragma unroll
    for (int c = 0; c < Tile::kColumns; c += kWarpSize) {
      const int column = c + lane_id();
      const bool null = is_null(memory.sNorm.get(Tile::kRows + column), memory.sRho.get(Tile::kRows + column));
      const std::uint32_t votes = ballot(null);
      if (null && nulls + popcount(votes & lanes_below()) == args.K) {
        memory.sWords.set(1, static_cast<std::uint32_t>((number + column) * step));
      }
      nulls += popcount(votes);
    }
  }

  // Thresholds of the rows from their groups, a warp a row in turn.
  __device__ __forceinline__ void set_thresholds() const {
    const float scale = power_of_two(exponent);
    const float underflow = multiply_up(args.underflow_distance, scale);
    for (int row = warp_id(); row < Tile::kRows; row += Tile::kWarps) {
      const std::int32_t strip_row = memory.sRows.get(row);
      std::uint32_t rValues[kLaneGroups];
#pragma unroll
      for (int i = 0; i < kLaneGroups; ++i) {
        rValues[i] = bits_of(memory.sLeast.get(row * kGroupPitch + i * kWarpSize + lane_id()));
      }
      float reach = fma_up(float_from_bits(warp_kth_smallest(rValues, static_cast<std::uint32_t>(args.K) + 1)),
                           args.stretch, underflow);
      if (lane_id() != 0) continue;
      const float key = strip_row < 0 ? 0.0f : load(args.thresholds.T + args.row_begin + strip_row);
      const float known = multiply_up(fma_up(sqrt_up(key), args.stretch, args.underflow_distance), scale);
      if (known < reach) reach = known;
      const SupportThreshold threshold =
          support_threshold(reach, memory.sNorm.get(row), memory.sRho.get(row), args.eta);
      const bool serves = reach <= kFrameReach && memory.sNorm.get(row) <= kFrameReach * kFrameReach / 2 &&
                          memory.sRho.get(row) < kInfinity && threshold.T < kInfinity;
      memory.sT.set(row, serves && strip_row >= 0 ? threshold.T : -kInfinity);
      memory.sU.set(row, threshold.u);
      memory.sError.set(row, serves ? 0u : kInfinityBits);
      memory.sSpread.set(row, 0u);
    }
  }

  // The support test of a tile; hits go to the buffers of their rows.
  __device__ __forceinline__ void append(const Products<Tile>& rProducts, std::int64_t number) const {
    const float unit = power_of_two(first_exponent - exponent);
    const float square_unit = multiply(unit, unit);
#pragma unroll
    for (int m = 0; m < Tile::kFragmentsDown; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = row_of(m, half);
        const float limit = memory.sT.get(row);
        const float reach = memory.sU.get(row);
        std::uint32_t hits = 0;
#pragma unroll
        for (int n = 0; n < Tile::kFragmentsAcross; ++n) {
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            const int column = column_of(n, e);
            const float rho = multiply_up(memory.sRho.get(Tile::kRows + column), kRhoMargin);
            const float least = fused_multiply_add(
                -reach, rho, fused_multiply_add(-2.0f, rProducts[m][n][half * 2 + e], memory.sBias.get(column)));
            if (least <= limit) hits |= 1u << (2 * n + e);
          }
        }
        if (!any_lane(hits != 0)) continue;
        // The four lanes of a row reserve their entries together.
        const auto mine = static_cast<std::uint32_t>(popcount(hits));
        const std::uint32_t beside = shuffle_xor(mine, 1);
        const std::uint32_t across = shuffle_xor(mine + beside, 2);
        const std::uint32_t all = mine + beside + across;
        const std::int64_t strip_row = memory.sRows.get(row);
        std::uint32_t place = 0;
        if (lane_id() % 4 == 0 && all > 0) place = atomic_add(args.gCounts + strip_row, all);
        place = shuffle(place, lane_id() / 4 * 4);
        place += ((lane_id() & 1) != 0 ? beside : 0) + ((lane_id() & 2) != 0 ? across : 0);
        float error = 0.0f;
        float spread = 0.0f;
#pragma unroll
        for (int n = 0; n < Tile::kFragmentsAcross; ++n) {
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            if ((hits >> (2 * n + e) & 1u) == 0) continue;
            const int column = column_of(n, e);
            const float norm = memory.sNorm.get(row);
            const float other = memory.sNorm.get(Tile::kRows + column);
            const float square = add(norm, fused_multiply_add(-2.0f, rProducts[m][n][half * 2 + e], other));
            error = maximum(error, multiply_up(args.eta, add_up(norm, other)));
            spread = maximum(spread, add_up(memory.sRho.get(row), memory.sRho.get(Tile::kRows + column)));
            if (place < args.capacity) {
              args.gBuffer[strip_row * args.capacity + place] =
                  static_cast<std::uint64_t>(bits_of(multiply(square, square_unit))) << 32 |
                  static_cast<std::uint32_t>(number + column);
            }
            ++place;
          }
        }
        if (mine > 0) {
          memory.sError.atomic_max(row, bits_of(add_up(multiply_up(error, square_unit), 0x1p-140f)));
          memory.sSpread.atomic_max(row, bits_of(multiply_up(spread, unit)));
        }
      }
    }
  }
};

template <class T>
__global__ void __launch_bounds__(Tile::kThreads, 1) rescore_kernel(const __grid_constant__ RefineArgs args) {
  const std::int64_t tiles = load(&args.gControl->rescreen_tiles);
  if (tiles == 0) return;
  SharedArena arena;
  const RescoreMemory memory(arena);
  const std::int64_t M = args.forward.candidates.rows;
  const std::int64_t across = (M + Tile::kColumns - 1) / Tile::kColumns;
  std::int64_t segments = (block_count() + tiles - 1) / tiles;
  if (segments > across) segments = across;
  std::int64_t step = M / (kSampleTimes * (args.K + 1));
  step = step < 1 ? 1 : (step < kRescoreRatio ? step : kRescoreRatio);
  const std::int64_t samples = (M + step - 1) / step;
  const std::int64_t sample_tiles = (samples + Tile::kColumns - 1) / Tile::kColumns;

  for (std::int64_t work = block_id(); work < tiles * segments; work += block_count()) {
    const RescreenTile tile = args.gTiles[work / segments];
    const std::int64_t segment = work % segments;
    const std::int64_t first_tile = segment * across / segments;
    const std::int64_t last_tile = (segment + 1) * across / segments;
    sync_block();  // the previous tile's facts have been read
    for (int place = thread_id(); place < Tile::kRows; place += Tile::kThreads) {
      memory.sRows.set(place, place < tile.count ? args.gOrder[tile.begin + place] : -1);
    }
    for (int place = thread_id(); place < Tile::kRows * kGroupPitch; place += Tile::kThreads) {
      memory.sLeast.set(place, kInfinity);
    }
    if (thread_id() < 2) memory.sWords.set(thread_id(), thread_id() == 0 ? 0u : kNoLastNull);
    sync_block();
    Rescore<T> rescore{
        args,
        memory,
        static_cast<const T*>(args.forward.candidates.data) + tile.leader * args.forward.candidates.row_stride,
        args.forward.dims,
        load(&args.gControl->exponent),
        0};
    rescore.find_exponent();

    int nulls = 0;
#pragma unroll 1
    for (std::int64_t turn = -sample_tiles; turn < last_tile - first_tile; ++turn) {
      const bool sample = turn < 0;
      const std::int64_t number = (sample ? turn + sample_tiles : first_tile + turn) * Tile::kColumns;
      Products<Tile> rProducts;
      rescore.find_products(rProducts, number, sample ? samples : M, sample ? step : 1,
                            sample ? kNoLastNull : memory.sWords.get(1));
      if (sample) {
        rescore.gather_bounds(rProducts, turn + sample_tiles);
        rescore.count_nulls(number, step, nulls);
        if (turn == -1) {
          sync_block();
          rescore.set_thresholds();
        }
      } else {
        rescore.append(rProducts, number);
      }
      sync_block();  // facts are written anew
    }
    for (int place = thread_id(); place < tile.count; place += Tile::kThreads) {
      const std::int64_t anchor = args.row_begin + memory.sRows.get(place);
      atomic_max(reinterpret_cast<std::uint32_t*>(args.thresholds.u + anchor), memory.sError.get(place));
      atomic_max(reinterpret_cast<std::uint32_t*>(args.thresholds.g2 + anchor), memory.sSpread.get(place));
    }
  }
}

}  // namespace

// ---- launch ---------------------------------------------------------------------------------------------------------

cudaError_t enqueue_rescores(const ForwardArgs& args, const ForwardPlan& plan, char* workspace, const Strip& strip,
                             cudaStream_t stream) {
  const LaunchShape shape{kRescoreBlocks, Tile::kThreads, kRescoreBytes};
  const RefineArgs kernel_args = refine_args(args, plan, workspace, strip);
  return for_narrow_type(args.dtype, [&]<class T>() { return launch(rescore_kernel<T>, shape, stream, kernel_args); });
}

}  // namespace sn::cuda
