// The score kernel: a block multiplies a tile of anchors with a tile of candidates on the tensor cores and writes the
// scores out or keeps the few that pass a threshold. bound.cuh has the bound and the tests; this file evaluates them.
//
// 1. Main loop. D is walked in stages of 64 columns: 16-byte asynchronous copies into a ring of kStages buffers, one
//    barrier a stage. A row of a stage is 128 bytes, all banks: its eight 16-byte chunks are stored at chunk ^ (row %
//    8), so that the eight rows an ldmatrix phase reads lie in different banks, and so do the writes.
// 2. Registers. A warp of the large tile owns 64 x 32 scores, 64 accumulators a lane; with 24 registers of operands
//    and the addresses it stays within 128, two blocks a multiprocessor (2 x 96 KB where a multiprocessor has 228):
//    while one is in its epilogue or waits for its first stages, the other multiplies. A 128 x 256 tile would save a
//    quarter of the operand traffic, but its one block a multiprocessor leaves the tensor cores idle in every
//    epilogue, which is what limits small D.
// 3. Facts. A thread loads what the epilogue needs of one row or column of the tile before the main loop, keeps it in
//    registers and puts it in shared memory when the ring is free: neither latency nor shared memory is spent on it,
//    and three stages fit the 99 KB of the smaller devices.
// 4. Append. Two multiply-adds and a comparison a pair (one multiply-add where there is no rho), one branch for the
//    four pairs of a lane's fragment. Hits go to a list of the warp in shared memory. When the tile is through, each
//    hit gets its rank among those of its anchor, one lane an anchor adds the anchor's number of hits to its global
//    count, and the entries follow. Atomics on global memory are thus one a row and warp tile, issued together,
//    whatever the number of hits.
// 5. Order of tiles. Bands of kBand tile rows, columns of a band one after the other: the blocks that run at one time
//    share few strips of either matrix. In the symmetric case bands of the upper triangle.
#include <algorithm>

#include "cuda/launch.cuh"
#include "cuda/memory.cuh"
#include "cuda/ptx.cuh"
#include "cuda/screen/bound.cuh"
#include "cuda/screen/prepare.h"
#include "cuda/stages.h"
#include "cuda/tensor_core.cuh"

namespace sn::cuda {
namespace {

// ---- traits ---------------------------------------------------------------------------------------------------------

constexpr int kStageWidth = static_cast<int>(kStageColumns);  // elements of a row in a stage
constexpr int kChunkElements = 8;                             // 16 bytes
constexpr int kRowChunks = kStageWidth / kChunkElements;
constexpr int kMmaDepth = 16;
constexpr int kBand = 16;
static_assert(kRowChunks == 8, "chunk ^ (row % 8) permutes the chunks of a row");
static_assert(kStageWidth % kMmaDepth == 0);

constexpr std::uint32_t kNoHit = ~0u;

// What the epilogue holds of each row and column of the tile: floats.
enum Fact : int { kNorm = 0, kBias = 1, kRho = 2, kLimit = 3, kReach = 4, kFacts = 5 };

// A block's tile of scores, its warps' shares, and what the epilogue makes of kBytes of shared memory when the products
// are done: facts, labels, then for each warp a flag, counters and hits.
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

  static constexpr int kCounters = kWarpRows > kWarpColumns ? kWarpRows : kWarpColumns;
  static constexpr int kWarpPairs = kWarpRows * kWarpColumns;
  static constexpr int kFactBytes = sn::cuda::shared_bytes<float>(kFacts * (kRows + kColumns));
  static constexpr int kLabelBytes = sn::cuda::shared_bytes<std::uint32_t>(kRows + kColumns);
  static constexpr int kFlagBytes = sn::cuda::shared_bytes<std::uint32_t>(kWarps);
  static constexpr int kCounterBytes = sn::cuda::shared_bytes<std::uint32_t>(kWarps * (kCounters + 1));
  static constexpr int kHits =
      std::min(kWarpPairs, (kBytes - kFactBytes - kLabelBytes - kFlagBytes - kCounterBytes) / (8 * kWarps));

  static_assert(kRows % kWarpRows == 0 && kColumns % kWarpColumns == 0);
  static_assert(kWarpRows % 32 == 0, "the list of hits is settled after half of the rows of fragments");
  static_assert(kWarpColumns % 16 == 0, "ldmatrix brings the operands of two fragments across");
  static_assert(kRows % kCopyRows == 0 && kColumns % kCopyRows == 0);
  static_assert(kCopyRows % 8 == 0, "rows that a thread copies have the same swizzle");
  static_assert(kHits >= kWarpPairs / 2, "half of a warp's tile fits its list");
  static_assert(kWarpRows <= 256 && kWarpColumns <= 256, "a hit's place has 8 bits each way");
};

// Both operands are copied as they are, kStages stages in a ring.
constexpr int ring_bytes(int rows, int columns, int stages) {
  return shared_bytes<std::uint16_t>(stages * (rows + columns) * kStageWidth);
}
// Two blocks of the large tile, 192 KB, need a multiprocessor with 228 KB of shared memory; elsewhere one runs alone
// and may have all the registers. Not a template argument: host and device must agree on those.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ != 900 && __CUDA_ARCH__ != 1000
#define SN_TILES_A_MULTIPROCESSOR 1
#else
#define SN_TILES_A_MULTIPROCESSOR 2
#endif
template <int kRows, int kColumns, int kWarpRows, int kWarpColumns, int kStages_>
struct Tile : TileShape<kRows, kColumns, kWarpRows, kWarpColumns, ring_bytes(kRows, kColumns, kStages_)> {
  using Shape = TileShape<kRows, kColumns, kWarpRows, kWarpColumns, ring_bytes(kRows, kColumns, kStages_)>;
  static constexpr int kStages = kStages_;
  static constexpr int kMinBlocks = SN_TILES_A_MULTIPROCESSOR;
  static constexpr int kStageElements = (kRows + kColumns) * kStageWidth;
  static_assert(Shape::kThreads == kRows + kColumns && kRows == kColumns,
                "a thread carries the facts of one row or column");
  static_assert(kStages >= 3, "one stage is read, one is awaited, one is under way");
  static_assert(Shape::kSharedBytes <= 99 * 1024, "of the devices with the least shared memory");
};
#undef SN_TILES_A_MULTIPROCESSOR
using LargeTile = Tile<128, 128, 64, 32, 3>;
using SmallTile = Tile<64, 64, 32, 32, 4>;

// The bank's tile: all anchors of the call against some candidates, which arrive in fp32.
constexpr int kBankStages = 3;
constexpr int kBankCopies = 2;  // of the candidates in half precision: one is multiplied, one is made
constexpr int bank_bytes(int rows, int columns) {
  return shared_bytes<std::uint16_t>(kBankStages * rows * kStageWidth) +
         shared_bytes<float>(kBankStages * columns * kStageWidth) +
         shared_bytes<std::uint16_t>(kBankCopies * columns * kStageWidth);
}
template <int kColumns, int kWarpRows, int kWarpColumns>
struct BankTile : TileShape<static_cast<int>(kBankAnchorRows), kColumns, kWarpRows, kWarpColumns,
                            bank_bytes(static_cast<int>(kBankAnchorRows), kColumns)> {
  using Shape = TileShape<static_cast<int>(kBankAnchorRows), kColumns, kWarpRows, kWarpColumns,
                          bank_bytes(static_cast<int>(kBankAnchorRows), kColumns)>;
  static constexpr int kWideChunks = kStageWidth / Pack<float>::kElements;  // 16-byte chunks of a row in fp32
  static constexpr int kWideRows = Shape::kThreads / kWideChunks;  // rows in fp32 that the block copies at once
  static constexpr int kOwnRows = kColumns / Shape::kCopyRows;     // a thread converts one chunk of so many
  static_assert(Shape::kThreads == kBankAnchorRows, "a thread brings the facts of one anchor");
  static_assert(kColumns % kWideRows == 0);
  static_assert(kOwnRows <= 8, "flags of a thread's rows are bits of two bytes");
  static_assert(Shape::kSharedBytes <= kBankSharedBytes);
};
using BankAppendTile = BankTile<128, 64, 64>;
// A sample is a fraction of the bank: smaller tiles, so that all multiprocessors get one.
using BankDenseTile = BankTile<32, 32, 32>;

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
  std::uint32_t* counts;  // by number of the anchor in the wave
  std::uint32_t* far_counts;
  std::uint64_t* buffer;
  std::uint64_t* far_buffer;
  float* scores;  // [anchors.count][candidates.count]
  const Control* control;
};

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

// The tiles on and above the diagonal: a band is a triangle, its columns growing, then full columns.
__device__ __forceinline__ TilePlace tile_of_triangle(std::uint32_t id, std::uint32_t rows) {
  std::uint32_t first = 0;
  std::uint32_t height = 0;
  std::uint32_t triangle = 0;
  for (;;) {
    height = rows - first < kBand ? rows - first : kBand;
    triangle = height * (height + 1) / 2;
    const std::uint32_t tiles = triangle + height * (rows - first - height);
    if (id < tiles) break;
    id -= tiles;
    first += kBand;
  }
  if (id >= triangle) return {first + (id - triangle) % height, first + height + (id - triangle) / height};
  std::uint32_t column = 0;
  while (id > column) id -= ++column;
  return {first + id, first + column};
}

// ---- kernel: main loop ----------------------------------------------------------------------------------------------

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

template <class T16, class Tile>
__device__ __forceinline__ void multiply_stage(float (&rScores)[Tile::kFragmentsDown][Tile::kFragmentsAcross][4],
                                               const Shared<T16>& sRows, const Shared<T16>& sColumns, int warp_row,
                                               int warp_column) {
  // Element of the 16-byte chunk that this lane addresses at depth 0; depth d toggles bits of the chunk's place.
  const int row_place =
      (warp_row + lane_id() % 16) * kStageWidth + ((lane_id() / 16) ^ (lane_id() % 8)) * kChunkElements;
  const int column_place = (warp_column + lane_id() / 16 * 8 + lane_id() % 8) * kStageWidth +
                           ((lane_id() / 8 % 2) ^ (lane_id() % 8)) * kChunkElements;
#pragma unroll
  for (int depth = 0; depth < kStageWidth; depth += kMmaDepth) {
    std::uint32_t rRows[Tile::kFragmentsDown][4];
    std::uint32_t rColumns[Tile::kFragmentsAcross / 2][4];
#pragma unroll
    for (int m = 0; m < Tile::kFragmentsDown; ++m) {
      load_matrix_x4(rRows[m], sRows, (row_place ^ depth) + m * 16 * kStageWidth);
    }
#pragma unroll
    for (int n = 0; n < Tile::kFragmentsAcross / 2; ++n) {
      load_matrix_x4(rColumns[n], sColumns, (column_place ^ depth) + n * 16 * kStageWidth);
    }
#pragma unroll
    for (int m = 0; m < Tile::kFragmentsDown; ++m) {
#pragma unroll
      for (int n = 0; n < Tile::kFragmentsAcross; ++n) {
        const std::uint32_t rOperand[2] = {rColumns[n / 2][n % 2 * 2], rColumns[n / 2][n % 2 * 2 + 1]};
        mma_m16n8k16<T16>(rScores[m][n], rRows[m], rOperand);
      }
    }
  }
}

// ---- kernel: epilogue -----------------------------------------------------------------------------------------------

// Fact f of the tile's row r is at place(f, r), of its column c at place(f, kRows + c). Bias and rho, and limit and
// reach, lie side by side, so that two neighbouring columns are one 16-byte read.
template <class Tile>
__device__ __forceinline__ int fact_place(int fact, int number) {
  constexpr int kAll = Tile::kRows + Tile::kColumns;
  if (fact == kNorm) return number;
  if (fact <= kRho) return kAll + 2 * number + (fact - kBias);
  return 3 * kAll + 2 * number + (fact - kLimit);
}

__device__ __forceinline__ std::uint32_t fold_label(std::int64_t label) {
  const auto bits = static_cast<std::uint64_t>(label);
  return static_cast<std::uint32_t>(bits) ^ static_cast<std::uint32_t>(bits >> 32) * 0x9e3779b9u;
}

// A score that means something is finite; rows without a meaningful copy may give anything.
__device__ __forceinline__ float finite_score(float score) {
  return is_finite(score) ? score : 0.0f;
}

template <class T16, class Tile>
struct Epilogue {
  const ScoreArgs<T16>& args;
  Shared<float> sFacts;
  Shared<std::uint32_t> sLabels;    // folded to 32 bits; set where the far test runs
  Shared<std::uint32_t> sCounters;  // of this warp: hits of each anchor of its tile, then the length of sHits
  Shared<std::uint64_t> sHits;
  std::int64_t row;  // numbers of the first row and column of the warp's tile
  std::int64_t column;
  int warp_row;  // the same in the block's tile
  int warp_column;

  // Row (column) of element e of a fragment, in the warp's tile.
  __device__ __forceinline__ static int row_of(int m, int e) { return m * 16 + lane_id() / 4 + e / 2 * 8; }
  __device__ __forceinline__ static int column_of(int n, int e) { return n * 8 + lane_id() % 4 * 2 + e % 2; }

  __device__ __forceinline__ void clear() {
    for (int i = lane_id(); i <= Tile::kCounters; i += kWarpSize) sCounters.set(i, 0);
    sync_warp();
  }

  // Notes a fragment's hits: product << 32 | row << 8 | column. Lanes come here apart; few do.
  __device__ __forceinline__ void note(const bool (&rHits)[4], const float (&rFragment)[4], int m, int n) {
    const std::uint32_t mine =
        (rHits[0] ? 1u : 0u) + (rHits[1] ? 1u : 0u) + (rHits[2] ? 1u : 0u) + (rHits[3] ? 1u : 0u);
    if (mine == 0) return;
    auto place = static_cast<int>(sCounters.atomic_add(Tile::kCounters, mine));
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      if (!rHits[e]) continue;
      const auto low = static_cast<std::uint32_t>(row_of(m, e) << 8 | column_of(n, e));
      sHits.set(place++, static_cast<std::uint64_t>(bits_of(rFragment[e])) << 32 | low);
    }
  }

  // Exact labels and the far test itself, for a hit whose folded labels agree.
  template <bool kRows>
  __device__ __forceinline__ bool passes_far(float product, int r, int c) const {
    const std::int64_t anchor_row = args.anchors.first + (row + r) * args.anchors.step;
    const std::int64_t candidate_row = args.candidates.first + (column + c) * args.candidates.step;
    if (load(args.anchors.labels + anchor_row) != load(args.candidates.labels + candidate_row)) return false;
    const std::int64_t anchor = kRows ? anchor_row : candidate_row;
    const int other = kRows ? Tile::kRows + warp_column + c : warp_row + r;
    const float rho = sFacts.get(fact_place<Tile>(kRho, other));
    const float bias = far_bias(sFacts.get(fact_place<Tile>(kNorm, other)), rho, args.eta);
    const float most =
        fused_multiply_add(load(args.thresholds.g2 + anchor), rho, fused_multiply_add(-2.0f, product, bias));
    const float limit = load(args.thresholds.G + anchor);
    return limit < kInfinity && !(most < limit);
  }

  // Moves the warp's hits to the buffers of their anchors, if there are more than `limit`. Anchors are the tile's rows
  // (kRows false: its columns), candidates the others.
  template <bool kRows, bool kFar>
  __device__ __forceinline__ void settle(int limit) {
    sync_warp();
    const auto hits = static_cast<int>(sCounters.get(Tile::kCounters));
    sync_warp();  // nobody notes more before all have read it
    if (hits <= limit) return;
    const std::int64_t first_anchor = kRows ? row : column;
    const std::int64_t capacity = kFar ? args.far_capacity : args.capacity;
    std::uint32_t* gCounts = kFar ? args.far_counts : args.counts;
    std::uint64_t* gBuffer = kFar ? args.far_buffer : args.buffer;

    // A hit's rank among those of its anchor: score << 32 | rank << 16 | anchor << 8 | candidate.
#pragma unroll 1
    for (int i = lane_id(); i < hits; i += kWarpSize) {
      const std::uint64_t hit = sHits.get(i);
      const float product = float_from_bits(static_cast<std::uint32_t>(hit >> 32));
      const int r = static_cast<int>(hit >> 8 & 0xffu);
      const int c = static_cast<int>(hit & 0xffu);
      std::uint32_t low = kNoHit;
      float score = 0.0f;
      if (row + r < args.anchors.count && column + c < args.candidates.count &&
          (!kFar || passes_far<kRows>(product, r, c))) {
        const float norm = sFacts.get(fact_place<Tile>(kNorm, kRows ? Tile::kRows + warp_column + c : warp_row + r));
        score = finite_score(fused_multiply_add(-2.0f, product, norm));
        const int anchor = kRows ? r : c;
        low = sCounters.atomic_add(anchor, 1) << 16 | static_cast<std::uint32_t>(anchor << 8 | (kRows ? c : r));
      }
      sHits.set(i, static_cast<std::uint64_t>(bits_of(score)) << 32 | low);
    }
    sync_warp();
    // One atomic an anchor reserves its entries; all lanes issue theirs together.
#pragma unroll 1
    for (int i = lane_id(); i < Tile::kCounters; i += kWarpSize) {
      const std::uint32_t mine = sCounters.get(i);
      if (mine > 0) sCounters.set(i, atomic_add(gCounts + first_anchor + i, mine));
    }
    sync_warp();
    const MatrixArgs<T16>& others = kRows ? args.candidates : args.anchors;
    const std::int64_t first_candidate = kRows ? column : row;
#pragma unroll 1
    for (int i = lane_id(); i < hits; i += kWarpSize) {
      const std::uint64_t hit = sHits.get(i);
      const auto low = static_cast<std::uint32_t>(hit);
      if (low == kNoHit) continue;
      const int anchor = static_cast<int>(low >> 8 & 0xffu);
      const std::int64_t place = static_cast<std::int64_t>(sCounters.get(anchor)) + (low >> 16);
      const std::int64_t candidate =
          others.first + (first_candidate + static_cast<std::int64_t>(low & 0xffu)) * others.step;
      if (place < capacity) {
        gBuffer[(first_anchor + anchor) * capacity + place] =
            (hit & 0xffffffff00000000u) | static_cast<std::uint32_t>(candidate);
      }
    }
    sync_warp();
    clear();
  }

  // After the fragments of row m: half of the tile always fits the list; what the first half left may not leave room
  // for the second.
  template <bool kRows, bool kFar>
  __device__ __forceinline__ void settle_after(int m) {
    if (m == Tile::kFragmentsDown / 2 - 1) settle<kRows, kFar>(Tile::kHits - Tile::kWarpPairs / 2);
    if (m == Tile::kFragmentsDown - 1) settle<kRows, kFar>(0);
  }

  // The support test. The facts of columns are read again for each row of fragments: registers are what is short here.
  template <bool kRows>
  __device__ __forceinline__ void support(const float (&rProducts)[Tile::kFragmentsDown][Tile::kFragmentsAcross][4]) {
    constexpr bool kHasRho = std::is_same_v<T16, Half>;
    constexpr int kRowFact = kRows ? kLimit : kBias;  // and the one beside it
    constexpr int kColumnFact = kRows ? kBias : kLimit;
#pragma unroll
    for (int m = 0; m < Tile::kFragmentsDown; ++m) {
      float rRowFact[2];
      float rRowBeside[2];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int place = fact_place<Tile>(kRowFact, warp_row + row_of(m, half * 2));
        rRowFact[half] = sFacts.get(place);
        if constexpr (kHasRho) rRowBeside[half] = sFacts.get(place + 1);
      }
#pragma unroll
      for (int n = 0; n < Tile::kFragmentsAcross; ++n) {
        const Pack<float> rPair =
            sFacts.get_pack(fact_place<Tile>(kColumnFact, Tile::kRows + warp_column + column_of(n, 0)));
        bool rHits[4];
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const float bias = kRows ? rPair.elements[e % 2 * 2] : rRowFact[e / 2];
          const float limit = kRows ? rRowFact[e / 2] : rPair.elements[e % 2 * 2];
          float least = fused_multiply_add(-2.0f, rProducts[m][n][e], bias);
          if constexpr (kHasRho) {
            least = fused_multiply_add(-rRowBeside[e / 2], rPair.elements[e % 2 * 2 + 1], least);
          }
          rHits[e] = !(least > limit);
        }
        note(rHits, rProducts[m][n], m, n);
      }
      settle_after<kRows, false>(m);
    }
  }

  // The far test is for pairs of one label: those whose folded labels agree are looked at again in settle().
  template <bool kRows>
  __device__ __forceinline__ void far(const float (&rProducts)[Tile::kFragmentsDown][Tile::kFragmentsAcross][4]) {
#pragma unroll
    for (int m = 0; m < Tile::kFragmentsDown; ++m) {
      const std::uint32_t rRowLabels[2] = {sLabels.get(warp_row + row_of(m, 0)), sLabels.get(warp_row + row_of(m, 2))};
#pragma unroll
      for (int n = 0; n < Tile::kFragmentsAcross; ++n) {
        const int c = Tile::kRows + warp_column + column_of(n, 0);
        const std::uint32_t rColumnLabels[2] = {sLabels.get(c), sLabels.get(c + 1)};
        bool rHits[4];
#pragma unroll
        for (int e = 0; e < 4; ++e) rHits[e] = rRowLabels[e / 2] == rColumnLabels[e % 2];
        note(rHits, rProducts[m][n], m, n);
      }
      settle_after<kRows, true>(m);
    }
  }

  __device__ __forceinline__ void dense(const float (&rProducts)[Tile::kFragmentsDown][Tile::kFragmentsAcross][4]) {
    const int rows_left = left(args.anchors.count - row, Tile::kWarpRows);
    const int columns_left = left(args.candidates.count - column, Tile::kWarpColumns);
    float* gFirst = args.scores + row * args.candidates.count + column;
#pragma unroll
    for (int m = 0; m < Tile::kFragmentsDown; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int r = row_of(m, half * 2);
        if (r >= rows_left) continue;
        float* gRow = gFirst + r * args.candidates.count;
#pragma unroll
        for (int n = 0; n < Tile::kFragmentsAcross; ++n) {
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            const int c = column_of(n, e);
            if (c >= columns_left) continue;
            const float norm = sFacts.get(fact_place<Tile>(kNorm, Tile::kRows + warp_column + c));
            gRow[c] = finite_score(fused_multiply_add(-2.0f, rProducts[m][n][half * 2 + e], norm));
          }
        }
      }
    }
  }

  __device__ __forceinline__ static int left(std::int64_t count, int most) {
    return count < most ? static_cast<int>(count) : most;  // negative: nothing is
  }
};

// ---- kernel ---------------------------------------------------------------------------------------------------------

template <class T16, class Tile, ScoreMode kMode, bool kSymmetric>
__global__ void __launch_bounds__(Tile::kThreads, Tile::kMinBlocks)
    score_kernel(const __grid_constant__ ScoreArgs<T16> args) {
  static_assert(!kSymmetric || kMode == ScoreMode::kAppend);
  if (load(&args.control->unscreenable) != 0) return;  // the whole grid

  const auto id = static_cast<std::uint32_t>(block_id());
  const TilePlace place =
      kSymmetric ? tile_of_triangle(id, args.tile_rows) : tile_of_rectangle(id, args.tile_rows, args.tile_columns);
  const std::int64_t row = static_cast<std::int64_t>(place.row) * Tile::kRows;
  const std::int64_t column = static_cast<std::int64_t>(place.column) * Tile::kColumns;
  const bool both = kSymmetric && place.row != place.column;  // this tile serves its columns as anchors, too

  // What this thread's row or column brings to the epilogue. Beyond the matrix: keeps nothing and is kept by nobody,
  // unless a NaN is about, so that hits are checked again.
  const bool is_row = thread_id() < Tile::kRows;
  const MatrixArgs<T16>& matrix = is_row ? args.anchors : args.candidates;
  const std::int64_t number = (is_row ? row : column) + thread_id() % Tile::kRows;
  const int matrix_row = number < matrix.count ? static_cast<int>(matrix.first + number * matrix.step) : -1;
  float norm = 0.0f;
  float rho = 0.0f;
  float limit = -kInfinity;
  float reach = 0.0f;
  if (matrix_row >= 0) {
    norm = load(matrix.n + matrix_row);
    rho = load(matrix.rho + matrix_row);
    if (kMode == ScoreMode::kAppend && (is_row || both)) {
      limit = load(args.thresholds.T + matrix_row);
      reach = load(args.thresholds.u + matrix_row);
    }
  }

  // 1. Products.
  SharedArena arena;
  const Shared<T16> sRing = arena.take<T16>(Tile::kStages * Tile::kStageElements);
  float rProducts[Tile::kFragmentsDown][Tile::kFragmentsAcross][4];
#pragma unroll
  for (int m = 0; m < Tile::kFragmentsDown; ++m) {
#pragma unroll
    for (int n = 0; n < Tile::kFragmentsAcross; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) rProducts[m][n][e] = 0.0f;
    }
  }
  const int warp_row = warp_id() / Tile::kWarpsAcross * Tile::kWarpRows;
  const int warp_column = warp_id() % Tile::kWarpsAcross * Tile::kWarpColumns;
  {
    const int copy_row = thread_id() / kRowChunks;
    int element = thread_id() % kRowChunks * kChunkElements;  // of the next stage to be copied
    const T16* gRows =
        args.anchors.rows + args.anchors.first * args.anchors.stride + (row + copy_row) * args.anchors.pitch + element;
    const T16* gColumns = args.candidates.rows + args.candidates.first * args.candidates.stride +
                          (column + copy_row) * args.candidates.pitch + element;
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
      valid |= column + copy_row + q * Tile::kCopyRows < args.candidates.count ? 1u << (kColumnBits + q) : 0u;
    }
    // Of the next stage; beyond the last one there is nothing to copy, but groups are counted.
    const auto copy_stage = [&](int slot) {
      const Shared<T16> sStage = sRing.offset(slot * Tile::kStageElements);
      if (element < args.stages * kStageWidth) {
        copy_operand<T16, Tile::kRows, Tile::kCopyRows>(sStage, gRows, Tile::kCopyRows * args.anchors.pitch,
                                                        element < args.anchors.dims ? valid : 0);
        copy_operand<T16, Tile::kColumns, Tile::kCopyRows>(sStage.offset(Tile::kRows * kStageWidth), gColumns,
                                                           Tile::kCopyRows * args.candidates.pitch,
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
#pragma unroll 1
    for (int stage = 0; stage < args.stages; ++stage) {
      async_wait<Tile::kStages - 2>();
      sync_block();  // the stage has arrived, and the slot that is overwritten next has been read by all
      copy_stage(slot == 0 ? Tile::kStages - 1 : slot - 1);
      const Shared<T16> sStage = sRing.offset(slot * Tile::kStageElements);
      multiply_stage<T16, Tile>(rProducts, sStage, sStage.offset(Tile::kRows * kStageWidth), warp_row, warp_column);
      slot = slot + 1 == Tile::kStages ? 0 : slot + 1;
    }
    async_wait<0>();
  }

  // 2. The ring is free: facts.
  sync_block();
  SharedArena second;
  const Shared<float> sFacts = second.take<float>(kFacts * (Tile::kRows + Tile::kColumns));
  const Shared<std::uint32_t> sLabels = second.take<std::uint32_t>(Tile::kRows + Tile::kColumns);
  const Shared<std::uint32_t> sFar = second.take<std::uint32_t>(Tile::kWarps);
  const Shared<std::uint32_t> sCounters = second.take<std::uint32_t>(Tile::kWarps * (Tile::kCounters + 1));
  const Shared<std::uint64_t> sHits = second.take<std::uint64_t>(Tile::kWarps * Tile::kHits);
  sFacts.set(fact_place<Tile>(kNorm, thread_id()), norm);
  if constexpr (kMode == ScoreMode::kAppend) {
    const bool skipped = is_null(norm, rho) && static_cast<std::uint32_t>(matrix_row) > load(&args.control->last_null);
    sFacts.set(fact_place<Tile>(kBias, thread_id()),
               matrix_row >= 0 && !skipped ? support_bias(norm, rho, args.eta) : kInfinity);
    sFacts.set(fact_place<Tile>(kRho, thread_id()), multiply_up(rho, kRhoMargin));
    sFacts.set(fact_place<Tile>(kLimit, thread_id()), limit);
    sFacts.set(fact_place<Tile>(kReach, thread_id()), reach);
    const bool wants_far =
        args.far && matrix_row >= 0 && (is_row || both) && load(args.thresholds.G + matrix_row) < kInfinity;
    const bool warp_far = any_lane(wants_far);
    if (lane_id() == 0) sFar.set(warp_id(), warp_far ? 1 : 0);
  }
  sync_block();

  // 3. Scores.
  Epilogue<T16, Tile> epilogue{args,
                               sFacts,
                               sLabels,
                               sCounters.offset(warp_id() * (Tile::kCounters + 1)),
                               sHits.offset(warp_id() * Tile::kHits),
                               row + warp_row,
                               column + warp_column,
                               warp_row,
                               warp_column};
  if constexpr (kMode == ScoreMode::kDense) {
    epilogue.dense(rProducts);
  } else {
    epilogue.clear();
    epilogue.template support<true>(rProducts);
    if constexpr (kSymmetric) {
      if (both) epilogue.template support<false>(rProducts);
    }
    if (!args.far) return;
    std::uint32_t far = 0;
#pragma unroll
    for (int warp = 0; warp < Tile::kWarps; ++warp) far |= sFar.get(warp);
    if (far == 0) return;  // the whole block
    sLabels.set(thread_id(), matrix_row >= 0 ? fold_label(load(matrix.labels + matrix_row)) : 0);
    sync_block();
    epilogue.template far<true>(rProducts);
    if constexpr (kSymmetric) {
      if (both) epilogue.template far<false>(rProducts);
    }
  }
}

// ---- kernel: bank ---------------------------------------------------------------------------------------------------

// A thread's chunks of one stage of the candidates. Chunk 2c goes to place c, chunk 2c + 1 to place 8 + c: who converts
// reads two neighbouring chunks, and eight such threads then read 128 bytes in a row.
template <class Tile>
__device__ __forceinline__ void copy_wide(const Shared<float>& sWide, const BankArgs& args, std::int64_t column,
                                          std::int64_t first) {
  constexpr int kPack = Pack<float>::kElements;
  const int chunk = thread_id() % Tile::kWideChunks;
  const int place = (chunk % 2 * (Tile::kWideChunks / 2) + chunk / 2) * kPack;
  const std::int64_t begin = first + chunk * kPack;
#pragma unroll
  for (int q = 0; q < Tile::kColumns / Tile::kWideRows; ++q) {
    const int row = thread_id() / Tile::kWideChunks + q * Tile::kWideRows;
    const std::int64_t number = column + row;
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
      const float value = rValues[i / 4].elements[i % 4];
      const float centred = subtract(value, rMeans[i / 4].elements[i % 4]);
      differs |= bits_of(centred) & 0x7fffffffu;
      rCopy.elements[i] = copy_element(centred, scale, squares, rests);
      if (!is_finite(value)) sums.flags |= 1u << q;
      if (!is_finite(rCopy.elements[i])) sums.flags |= 0x100u << q;
    }
    if (differs != 0) sums.flags |= 0x10000u << q;
    sums.rSquares[q] = add(sums.rSquares[q], squares);
    sums.rRests[q] = add(sums.rRests[q], rests);
    sCopy.set_pack(row * kStageWidth + (chunk ^ (row % 8)) * kChunkElements, rCopy);
  }
}

// Without a scale there is nothing to score; what is not finite in the block's candidates still has to be found.
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
// the tensor cores multiply stage s while stage s + 1 of the candidates is converted into the other copy and two more
// are under way from memory; 1 block of 224 KB a multiprocessor, up to 64 KB of it in flight.
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
  float rProducts[Tile::kFragmentsDown][Tile::kFragmentsAcross][4];
#pragma unroll
  for (int m = 0; m < Tile::kFragmentsDown; ++m) {
#pragma unroll
    for (int n = 0; n < Tile::kFragmentsAcross; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) rProducts[m][n][e] = 0.0f;
    }
  }
  RowSums<Tile> sums{};
  const int warp_row = warp_id() / Tile::kWarpsAcross * Tile::kWarpRows;
  const int warp_column = warp_id() % Tile::kWarpsAcross * Tile::kWarpColumns;
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
        copy_wide<Tile>(sWide.offset(group % kBankStages * Tile::kColumns * kStageWidth), args, column,
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
      multiply_stage<Half, Tile>(rProducts, sAnchors.offset(stage % kBankStages * Tile::kRows * kStageWidth),
                                 sCopies.offset(stage % kBankCopies * Tile::kColumns * kStageWidth), warp_row,
                                 warp_column);
      if (stage + 1 < score.stages) convert(stage + 1);
    }
    async_wait<0>();
  }

  // 2. The rings are free: facts.
  sync_block();
  SharedArena second;
  const Shared<float> sFacts = second.take<float>(kFacts * (Tile::kRows + Tile::kColumns));
  const Shared<std::uint32_t> sLabels = second.take<std::uint32_t>(Tile::kRows + Tile::kColumns);
  const Shared<std::uint32_t> sFar = second.take<std::uint32_t>(Tile::kWarps);
  const Shared<std::uint32_t> sCounters = second.take<std::uint32_t>(Tile::kWarps * (Tile::kCounters + 1));
  const Shared<std::uint64_t> sHits = second.take<std::uint64_t>(Tile::kWarps * Tile::kHits);
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
      const bool exists = column + row < score.candidates.count;
      const bool fits = (sums.flags >> q & 0x101u) == 0;
      const bool differs = (sums.flags >> q & 0x10000u) != 0;
      const float norm = fits ? sums.rSquares[q] : 0.0f;
      const float bound = differs ? residual_bound(sums.rSquares[q], sums.rRests[q], args.row_slack) : 0.0f;
      const float rho = fits ? bound : kInfinity;
      const std::int64_t candidate = (column + row) * score.candidates.step;
      const bool skipped = is_null(norm, rho) && candidate > load(&score.control->last_null);
      sFacts.set(fact_place<Tile>(kNorm, Tile::kRows + row), norm);
      sFacts.set(fact_place<Tile>(kBias, Tile::kRows + row),
                 exists && !skipped ? support_bias(norm, rho, score.eta) : kInfinity);
      sFacts.set(fact_place<Tile>(kRho, Tile::kRows + row), multiply_up(rho, kRhoMargin));
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
    sFacts.set(fact_place<Tile>(kLimit, thread_id()), is_anchor ? load(score.thresholds.T + anchor) : -kInfinity);
    sFacts.set(fact_place<Tile>(kReach, thread_id()), is_anchor ? load(score.thresholds.u + anchor) : 0.0f);
    const bool wants_far = score.far && is_anchor && load(score.thresholds.G + anchor) < kInfinity;
    const bool warp_far = any_lane(wants_far);
    if (lane_id() == 0) sFar.set(warp_id(), warp_far ? 1 : 0);
  }
  sync_block();

  // 3. Scores.
  Epilogue<Half, Tile> epilogue{score,
                                sFacts,
                                sLabels,
                                sCounters.offset(warp_id() * (Tile::kCounters + 1)),
                                sHits.offset(warp_id() * Tile::kHits),
                                warp_row,
                                column + warp_column,
                                warp_row,
                                warp_column};
  if constexpr (kMode == ScoreMode::kDense) {
    epilogue.dense(rProducts);
  } else {
    epilogue.clear();
    epilogue.template support<true>(rProducts);
    if (!score.far) return;
    std::uint32_t far = 0;
#pragma unroll
    for (int warp = 0; warp < Tile::kWarps; ++warp) far |= sFar.get(warp);
    if (far == 0) return;  // the whole block
    for (int i = thread_id(); i < Tile::kRows + Tile::kColumns; i += Tile::kThreads) {
      const MatrixArgs<Half>& matrix = i < Tile::kRows ? score.anchors : score.candidates;
      const std::int64_t number = i < Tile::kRows ? i : column + i - Tile::kRows;
      sLabels.set(i, number < matrix.count ? fold_label(load(matrix.labels + matrix.first + number * matrix.step)) : 0);
    }
    sync_block();
    epilogue.template far<true>(rProducts);
  }
}

// ---- launch ---------------------------------------------------------------------------------------------------------

std::int64_t tiles_of(std::int64_t count, std::int64_t tile) {
  return (count + tile - 1) / tile;
}
std::int64_t blocks_of(std::int64_t rows, std::int64_t columns, bool symmetric) {
  return symmetric ? rows * (rows + 1) / 2 : rows * columns;
}

template <class T16, class Tile>
cudaError_t launch_scores(ScoreArgs<T16> args, const ScoreRequest& request, cudaStream_t stream) {
  const std::int64_t rows = tiles_of(args.anchors.count, Tile::kRows);
  const std::int64_t columns = tiles_of(args.candidates.count, Tile::kColumns);
  args.tile_rows = static_cast<std::uint32_t>(rows);
  args.tile_columns = static_cast<std::uint32_t>(columns);
  const LaunchShape shape{blocks_of(rows, columns, request.symmetric), Tile::kThreads, Tile::kSharedBytes};
  if (columns > kMaxBlocks / kBand) return cudaErrorInvalidConfiguration;
  if (request.mode == ScoreMode::kDense) {
    return launch(score_kernel<T16, Tile, ScoreMode::kDense, false>, shape, stream, args);
  }
  return request.symmetric ? launch(score_kernel<T16, Tile, ScoreMode::kAppend, true>, shape, stream, args)
                           : launch(score_kernel<T16, Tile, ScoreMode::kAppend, false>, shape, stream, args);
}

cudaError_t launch_bank(const ForwardArgs& args, const ForwardPlan& plan, char* workspace, const ScoreArgs<Half>& score,
                        const ScoreRequest& request, cudaStream_t stream) {
  if (request.rows > kBankAnchorRows) return cudaErrorInvalidValue;
  const ScreenSide candidates = candidate_side(args, plan, workspace);
  const BankArgs bank{
      .score = score,
      .candidates = static_cast<const float*>(args.candidates.data),
      .candidate_stride = args.candidates.row_stride,
      .dims = args.dims,
      .aligned = reinterpret_cast<std::uintptr_t>(args.candidates.data) % kPackBytes == 0 &&
                 (args.candidates.rows <= 1 || args.candidates.row_stride % Pack<float>::kElements == 0),
      .mean = piece<float>(workspace, plan.mean),
      .row_slack = row_slack(plan.padded_dims),
      .n = candidates.n,
      .rho = candidates.rho,
      .control = piece<Control>(workspace, plan.control),
  };
  if (request.mode == ScoreMode::kDense) {
    const LaunchShape shape{tiles_of(request.columns, BankDenseTile::kColumns), BankDenseTile::kThreads,
                            BankDenseTile::kSharedBytes};
    return launch(bank_kernel<BankDenseTile, ScoreMode::kDense>, shape, stream, bank);
  }
  const LaunchShape shape{tiles_of(request.columns, BankAppendTile::kColumns), BankAppendTile::kThreads,
                          BankAppendTile::kSharedBytes};
  return launch(bank_kernel<BankAppendTile, ScoreMode::kAppend>, shape, stream, bank);
}

constexpr std::int64_t kLargestDims = std::int64_t{1} << 30;  // columns are numbered by int

// Fewer large tiles than this leave multiprocessors of a large device without work.
constexpr std::int64_t kFewTiles = 256;

template <class T16>
cudaError_t enqueue(const ForwardArgs& args, const ForwardPlan& plan, char* workspace, const ScoreRequest& request,
                    cudaStream_t stream) {
  const ScreenSide anchors = anchor_side(args, plan, workspace);
  const ScreenSide candidates = candidate_side(args, plan, workspace);
  auto* counts = piece<std::uint32_t>(workspace, plan.counts);
  const ScoreArgs<T16> score{
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
      .far_counts = counts + plan.wave_rows,
      .buffer = piece<std::uint64_t>(workspace, plan.buffer),
      .far_buffer = piece<std::uint64_t>(workspace, plan.far_buffer),
      .scores = piece<float>(workspace, plan.buffer),
      .control = piece<Control>(workspace, plan.control),
  };
  if constexpr (std::is_same_v<T16, Half>) {
    if (plan.path == ForwardPath::kBank) return launch_bank(args, plan, workspace, score, request, stream);
  }
  const std::int64_t rows = tiles_of(request.rows, LargeTile::kRows);
  const std::int64_t columns = tiles_of(request.columns, LargeTile::kColumns);
  const bool large = plan.score_tile == 0 ? blocks_of(rows, columns, request.symmetric) >= kFewTiles
                                          : plan.score_tile == LargeTile::kRows;
  return large ? launch_scores<T16, LargeTile>(score, request, stream)
               : launch_scores<T16, SmallTile>(score, request, stream);
}

}  // namespace

// ---- dispatch -------------------------------------------------------------------------------------------------------

cudaError_t enqueue_scores(const ForwardArgs& args, const ForwardPlan& plan, char* workspace,
                           const ScoreRequest& request, cudaStream_t stream) {
  const bool whole = request.row_begin == 0 && request.rows == args.anchors.rows &&
                     request.columns == args.candidates.rows && request.column_stride == 1;
  if (plan.padded_dims > kLargestDims || request.rows < 1 || request.columns < 1 ||
      request.row_begin + request.rows > args.anchors.rows ||
      (request.columns - 1) * request.column_stride >= args.candidates.rows ||
      (plan.path == ForwardPath::kBank && (args.dtype != DType::kFloat32 || args.symmetric)) ||
      (request.symmetric && !(args.symmetric && whole && request.mode == ScoreMode::kAppend))) {
    return cudaErrorInvalidValue;
  }
  return args.dtype == DType::kBFloat16 ? enqueue<BFloat16>(args, plan, workspace, request, stream)
                                        : enqueue<Half>(args, plan, workspace, request, stream);
}

}  // namespace sn::cuda
