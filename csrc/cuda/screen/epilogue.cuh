// From a warp's products to scores: written out, or kept where they pass a threshold.
#pragma once

#include <cstdint>
#include <type_traits>

#include "cuda/memory.cuh"
#include "cuda/ptx.cuh"
#include "cuda/screen/bound.cuh"
#include "cuda/screen/score_tile.cuh"

namespace sn::cuda {

inline constexpr std::uint32_t kNoHit = ~0u;

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

// A meaningful score is finite; rows without a meaningful copy may give any value.
__device__ __forceinline__ float finite_score(float score) {
  return is_finite(score) ? score : 0.0f;
}

// The block's shared memory once the products are done: it lies where the operands were, behind a barrier.
template <class Tile>
struct EpilogueMemory {
  Shared<float> sFacts;             // at fact_place
  Shared<std::uint32_t> sLabels;    // of rows, then columns, folded to 32 bits; set where the far test runs
  Shared<std::uint32_t> sFarVotes;  // [kWarps]
  Shared<std::uint32_t> sCounters;  // [kWarps][kCounters + 1]
  Shared<std::uint64_t> sHits;      // [kWarps][kHits]

  __device__ __forceinline__ EpilogueMemory() {
    SharedArena arena;
    sFacts = arena.take<float>(kFacts * (Tile::kRows + Tile::kColumns));
    sLabels = arena.take<std::uint32_t>(Tile::kRows + Tile::kColumns);
    sFarVotes = arena.take<std::uint32_t>(Tile::kWarps);
    sCounters = arena.take<std::uint32_t>(Tile::kWarps * (Tile::kCounters + 1));
    sHits = arena.take<std::uint64_t>(Tile::kWarps * Tile::kHits);
  }

  // Of the tile's row `number`, or of its column `number` - kRows.
  __device__ __forceinline__ void set(Fact fact, int number, float value) const {
    sFacts.set(fact_place<Tile>(fact, number), value);
  }

  // Whether an anchor that this thread brings wants the far test. Read behind a barrier.
  __device__ __forceinline__ void vote_for_far(bool wants) const {
    const bool any = any_lane(wants);
    if (lane_id() == 0) sFarVotes.set(warp_id(), any ? 1 : 0);
  }
  __device__ __forceinline__ bool wants_far() const {
    std::uint32_t votes = 0;
#pragma unroll
    for (int warp = 0; warp < Tile::kWarps; ++warp) votes |= sFarVotes.get(warp);
    return votes != 0;
  }
};

template <class T16, class Tile>
struct Epilogue {
  const ScoreArgs<T16>& args;
  Shared<float> sFacts;
  Shared<std::uint32_t> sLabels;
  Shared<std::uint32_t> sCounters;  // of this warp: hits of each anchor of its tile, then the length of sHits
  Shared<std::uint64_t> sHits;      // of this warp
  int warp_row;                     // the first row and column of the warp's tile in the block's
  int warp_column;
  std::int64_t row;  // their numbers
  std::int64_t column;

  // tile_row, tile_column: numbers of the first row and column of the block's tile.
  __device__ __forceinline__ Epilogue(const ScoreArgs<T16>& score_args, const EpilogueMemory<Tile>& memory,
                                      const WarpPlace<Tile>& warp, std::int64_t tile_row, std::int64_t tile_column)
      : args(score_args),
        sFacts(memory.sFacts),
        sLabels(memory.sLabels),
        sCounters(memory.sCounters.offset(warp_id() * (Tile::kCounters + 1))),
        sHits(memory.sHits.offset(warp_id() * Tile::kHits)),
        warp_row(warp.row),
        warp_column(warp.column),
        row(tile_row + warp_row),
        column(tile_column + warp_column) {}

  // Row (column) of element e of a fragment, in the warp's tile.
  __device__ __forceinline__ static int row_of(int m, int e) { return m * 16 + lane_id() / 4 + e / 2 * 8; }
  __device__ __forceinline__ static int column_of(int n, int e) { return n * 8 + lane_id() % 4 * 2 + e % 2; }

  __device__ __forceinline__ void clear() {
    for (int i = lane_id(); i <= Tile::kCounters; i += kWarpSize) sCounters.set(i, 0);
    sync_warp();
  }

  // Notes a fragment's hits: product << 32 | row << 8 | column. Lanes diverge here; few have a hit.
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
  __device__ __forceinline__ void flush_hits(int limit) {
    sync_warp();
    const auto hits = static_cast<int>(sCounters.get(Tile::kCounters));
    sync_warp();  // no lane notes more before all have read it
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

  // After the fragments of row m. Half of the tile always fits the list; what is left of the first half may leave no
  // room for the second.
  template <bool kRows, bool kFar>
  __device__ __forceinline__ void flush_after(int m) {
    if (m == Tile::kFragmentsDown / 2 - 1) flush_hits<kRows, kFar>(Tile::kHits - Tile::kWarpPairs / 2);
    if (m == Tile::kFragmentsDown - 1) flush_hits<kRows, kFar>(0);
  }

  // The support test. The facts of columns are read again for each row of fragments: registers are short here.
  template <bool kRows>
  __device__ __forceinline__ void support(const Products<Tile>& rProducts) {
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
      flush_after<kRows, false>(m);
    }
  }

  // The far test is for pairs of one label: those whose folded labels agree are checked again in flush_hits().
  template <bool kRows>
  __device__ __forceinline__ void far(const Products<Tile>& rProducts) {
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
      flush_after<kRows, true>(m);
    }
  }

  __device__ __forceinline__ void dense(const Products<Tile>& rProducts) {
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
    return count < most ? static_cast<int>(count) : most;  // negative: none is left
  }
};

}  // namespace sn::cuda
