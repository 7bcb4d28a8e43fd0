// From a warp's products to scores: written out, gathered into bounds of groups, or kept where they pass a threshold.
#pragma once

#include <cstdint>
#include <type_traits>

#include "cuda/memory.cuh"
#include "cuda/ptx.cuh"
#include "cuda/screen/bound.cuh"
#include "cuda/screen/score_tile.cuh"

namespace sn::cuda {

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
  Shared<std::uint32_t> sCounters;  // [kWarps][kCounters]
  Shared<float> sProducts;          // [kWarps][fragments][kWarpSize][4]

  __device__ __forceinline__ EpilogueMemory() {
    SharedArena arena;
    sFacts = arena.take<float>(kFacts * (Tile::kRows + Tile::kColumns));
    sLabels = arena.take<std::uint32_t>(Tile::kRows + Tile::kColumns);
    sFarVotes = arena.take<std::uint32_t>(Tile::kWarps);
    sCounters = arena.take<std::uint32_t>(Tile::kWarps * Tile::kCounters);
    sProducts = arena.take<float>(Tile::kWarps * Tile::kWarpPairs);
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

// A lane's hits: bit b of word w is element e of fragment (m, n), 32 w + b = (n kFragmentsDown + m) 4 + e.
template <class Tile>
using Hits = std::uint32_t[Tile::kHitWords];

template <class T16, class Tile>
struct Epilogue {
  static constexpr int kDown = Tile::kFragmentsDown;
  static constexpr int kAcross = Tile::kFragmentsAcross;

  const ScoreArgs<T16>& args;
  Shared<float> sFacts;
  Shared<std::uint32_t> sLabels;
  Shared<std::uint32_t> sCounters;  // of this warp: hits of its rows, then of its columns, then where they go
  Shared<float> sProducts;          // of this lane: element e of fragment f at 4 kWarpSize f + e
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
        sCounters(memory.sCounters.offset(warp_id() * Tile::kCounters)),
        sProducts(memory.sProducts.offset(warp_id() * Tile::kWarpPairs + lane_id() * 4)),
        warp_row(warp.row),
        warp_column(warp.column),
        row(tile_row + warp_row),
        column(tile_column + warp_column) {}

  // Row (column) of element e of a fragment, in the warp's tile.
  __device__ __forceinline__ static int row_of(int m, int e) { return m * 16 + lane_id() / 4 + e / 2 * 8; }
  __device__ __forceinline__ static int column_of(int n, int e) { return n * 8 + lane_id() % 4 * 2 + e % 2; }

  // ---- tests --------------------------------------------------------------------------------------------------------

  // The support test of every pair. A hit is an instruction of the other pipe and an exact sum of powers of two: bits
  // of the mantissa, 16 pairs a number. There is no branch, so the pairs of a lane overlap.
  template <bool kRows>
  __device__ __forceinline__ void support(const Products<Tile>& rProducts, Hits<Tile>& rHits) const {
    constexpr bool kHasRho = std::is_same_v<T16, Half>;
    constexpr int kRowFact = kRows ? kLimit : kBias;  // and the one beside it
    constexpr int kColumnFact = kRows ? kBias : kLimit;
    float rRowFact[kDown][2];
    float rRowBeside[kDown][2];
#pragma unroll
    for (int m = 0; m < kDown; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int place = fact_place<Tile>(kRowFact, warp_row + row_of(m, half * 2));
        rRowFact[m][half] = sFacts.get(place);
        if constexpr (kHasRho) rRowBeside[m][half] = sFacts.get(place + 1);
      }
    }
    float bits = 0x1p23f;
#pragma unroll
    for (int n = 0; n < kAcross; ++n) {
      const Pack<float> rPair =
          sFacts.get_pack(fact_place<Tile>(kColumnFact, Tile::kRows + warp_column + column_of(n, 0)));
#pragma unroll
      for (int m = 0; m < kDown; ++m) {
        const int first = (n * kDown + m) * 4;
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const float bias = kRows ? rPair.elements[e % 2 * 2] : rRowFact[m][e / 2];
          const float limit = kRows ? rRowFact[m][e / 2] : rPair.elements[e % 2 * 2];
          float least = fused_multiply_add(-2.0f, rProducts[m][n][e], bias);
          if constexpr (kHasRho) {
            least = fused_multiply_add(-rRowBeside[m][e / 2], rPair.elements[e % 2 * 2 + 1], least);
          }
          bits = fused_multiply_add(one_unless_greater(least, limit), static_cast<float>(1 << (first + e) % 16), bits);
        }
        if (first % 16 == 12) {
          const std::uint32_t found = bits_of(bits) & 0xffffu;
          rHits[first / 32] = first % 32 < 16 ? found : rHits[first / 32] | found << 16;
          bits = 0x1p23f;
        }
      }
    }
  }

  // The far test is for pairs of one label: those whose folded labels agree are tested in keep().
  __device__ __forceinline__ void alike(Hits<Tile>& rHits) const {
#pragma unroll
    for (int n = 0; n < kAcross; ++n) {
      const int c = Tile::kRows + warp_column + column_of(n, 0);
      const std::uint32_t rColumnLabels[2] = {sLabels.get(c), sLabels.get(c + 1)};
#pragma unroll
      for (int m = 0; m < kDown; ++m) {
        const int first = (n * kDown + m) * 4;
        if (first % 32 == 0) rHits[first / 32] = 0;
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const bool same = sLabels.get(warp_row + row_of(m, e)) == rColumnLabels[e % 2];
          rHits[first / 32] |= same ? 1u << (first + e) % 32 : 0u;
        }
      }
    }
  }

  // ---- append -------------------------------------------------------------------------------------------------------

  // visit(fragment, e, row, column of the warp's tile) for each hit of this lane. Where it returns false the hit is
  // forgotten. Lanes diverge here, and have few hits.
  template <class Visit>
  __device__ __forceinline__ static void for_each_hit(Hits<Tile>& rHits, const Visit& visit) {
    constexpr int kTogether = Tile::kHitWords % 2 == 0 ? 2 : 1;  // words of one loop
#pragma unroll
    for (int w = 0; w < Tile::kHitWords; w += kTogether) {
      std::uint32_t left = rHits[w];
      std::uint32_t beyond = kTogether == 2 ? rHits[w + kTogether - 1] : 0;
#pragma unroll 1
      while ((left | beyond) != 0) {
        const bool second = left == 0;
        const std::uint32_t word = second ? beyond : left;
        const std::uint32_t rest = word & (word - 1);
        const int bit = find_first(word) + (second ? 32 : 0) + w * 32;
        left = second ? 0 : rest;
        beyond = second ? rest : beyond;
        const int fragment = bit / 4;
        const int e = bit % 4;
        if (!visit(fragment, e, row_of(fragment % kDown, e), column_of(fragment / kDown, e))) {
          (second ? rHits[w + kTogether - 1] : rHits[w]) &= ~(word ^ rest);
        }
      }
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

  // Anchors are the tile's rows (kRows false: its columns), candidates the others.
  template <bool kRows, bool kFar>
  __device__ __forceinline__ void count(Hits<Tile>& rHits) const {
    const int rows_left = left(args.anchors.count - row, Tile::kWarpRows);
    const int columns_left = left(args.candidates.count - column, Tile::kWarpColumns);
    for_each_hit(rHits, [&](int fragment, int e, int r, int c) {
      if (r >= rows_left || c >= columns_left) return false;
      if constexpr (kFar) {
        if (!passes_far<kRows>(sProducts.get(fragment * 4 * kWarpSize + e), r, c)) return false;
      }
      sCounters.atomic_add(kRows ? r : Tile::kWarpRows + c, 1);
      return true;
    });
  }

  template <bool kRows, bool kFar>
  __device__ __forceinline__ void write(Hits<Tile>& rHits) const {
    const MatrixArgs<T16>& others = kRows ? args.candidates : args.anchors;
    const std::int64_t first_anchor = kRows ? row : column - args.anchors.first;
    const std::int64_t first_candidate = kRows ? column : row;
    const std::int64_t capacity = kFar ? args.far_capacity : args.capacity;
    std::uint64_t* gBuffer = kFar ? args.far_buffer : args.buffer;
    for_each_hit(rHits, [&](int fragment, int e, int r, int c) {
      const std::int64_t place = sCounters.atomic_add(kRows ? r : Tile::kWarpRows + c, 1);
      if (place >= capacity) return true;
      const float norm = sFacts.get(fact_place<Tile>(kNorm, kRows ? Tile::kRows + warp_column + c : warp_row + r));
      const float product = sProducts.get(fragment * 4 * kWarpSize + e);
      const float score = finite_score(fused_multiply_add(-2.0f, product, norm));
      const std::int64_t candidate = others.first + (first_candidate + (kRows ? c : r)) * others.step;
      gBuffer[(first_anchor + (kRows ? r : c)) * capacity + place] =
          static_cast<std::uint64_t>(bits_of(score)) << 32 | static_cast<std::uint32_t>(candidate);
      return true;
    });
  }

  // Moves the warp's hits to the buffers of their anchors: they are counted, one atomic an anchor reserves places, and
  // each hit takes one of them. A lane reads back only products that it put in shared memory itself.
  template <bool kBoth, bool kFar>
  __device__ __forceinline__ void append(const Products<Tile>& rProducts, Hits<Tile>& rOfRows, Hits<Tile>& rOfColumns) {
    std::uint32_t any = 0;
#pragma unroll
    for (int w = 0; w < Tile::kHitWords; ++w) any |= rOfRows[w] | (kBoth ? rOfColumns[w] : 0);
    if (!any_lane(any != 0)) return;
#pragma unroll
    for (int f = 0; f < kDown * kAcross; ++f) {
      Pack<float> rFragment;
#pragma unroll
      for (int e = 0; e < 4; ++e) rFragment.elements[e] = rProducts[f % kDown][f / kDown][e];
      sProducts.set_pack(f * 4 * kWarpSize, rFragment);
    }
    constexpr int kAnchors = Tile::kWarpRows + (kBoth ? Tile::kWarpColumns : 0);
    for (int i = lane_id(); i < kAnchors; i += kWarpSize) sCounters.set(i, 0);
    sync_warp();
    count<true, kFar>(rOfRows);
    if constexpr (kBoth) count<false, kFar>(rOfColumns);
    sync_warp();
    std::uint32_t* gCounts = kFar ? args.far_counts : args.counts;
    for (int i = lane_id(); i < kAnchors; i += kWarpSize) {  // all lanes issue theirs together
      const std::uint32_t mine = sCounters.get(i);
      const std::int64_t anchor = i < Tile::kWarpRows ? row + i : column - args.anchors.first + (i - Tile::kWarpRows);
      if (mine > 0) sCounters.set(i, atomic_add(gCounts + anchor, mine));
    }
    sync_warp();
    write<true, kFar>(rOfRows);
    if constexpr (kBoth) write<false, kFar>(rOfColumns);
    sync_warp();
  }

  // columns: whether the warp serves its columns as anchors, too: in the symmetric case alone, kBoth, and of the strip.
  template <bool kBoth>
  __device__ __forceinline__ void append_support(const Products<Tile>& rProducts, bool columns) {
    Hits<Tile> rOfRows{};
    Hits<Tile> rOfColumns{};
    support<true>(rProducts, rOfRows);
    if constexpr (kBoth) {
      if (columns) support<false>(rProducts, rOfColumns);
    }
    append<kBoth, false>(rProducts, rOfRows, rOfColumns);
  }
  template <bool kBoth>
  __device__ __forceinline__ void append_far(const Products<Tile>& rProducts, bool columns) {
    Hits<Tile> rOfRows;
    alike(rOfRows);
    Hits<Tile> rOfColumns;
#pragma unroll
    for (int w = 0; w < Tile::kHitWords; ++w) rOfColumns[w] = kBoth && columns ? rOfRows[w] : 0;
    append<kBoth, true>(rProducts, rOfRows, rOfColumns);
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

  // The least upper bound of each group of the sample (bound.cuh): kBias is n (1 + eta) of rows and columns, kRho their
  // rho. A lane has kLaneGroup columns of a row in each kQuadGroup of the warp's tile.
  __device__ __forceinline__ void sample(const Products<Tile>& rProducts) {
    static_assert(Tile::kWarpColumns % kQuadGroup == 0 && kSamplePad % Tile::kColumns == 0);
    constexpr bool kHasRho = std::is_same_v<T16, Half>;
    constexpr int kAcross = static_cast<int>(kQuadGroup) / 8;  // fragments of a group
    const int rows_left = left(args.anchors.count - row, Tile::kWarpRows);
    const int quad_groups = args.quads ? 1 : 4;  // of a row in kQuadGroup columns
    const bool writes = !args.quads || lane_id() % 4 == 0;
    float* gFirst = args.scores + row * args.groups + column / kQuadGroup * quad_groups + lane_id() % 4;
#pragma unroll
    for (int m = 0; m < Tile::kFragmentsDown; ++m) {
#pragma unroll
      for (int first = 0; first < Tile::kFragmentsAcross; first += kAcross) {
        float rLeast[2] = {kInfinity, kInfinity};
        float rRho[2] = {0.0f, 0.0f};
#pragma unroll
        for (int n = first; n < first + kAcross; ++n) {
          const Pack<float> rPair =
              sFacts.get_pack(fact_place<Tile>(kBias, Tile::kRows + warp_column + column_of(n, 0)));
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            const float q = fused_multiply_add(-2.0f, rProducts[m][n][e], rPair.elements[e % 2 * 2]);
            const bool less = q < rLeast[e / 2];  // NaN is not: its candidate or its anchor has no copy
            rLeast[e / 2] = less ? q : rLeast[e / 2];
            if constexpr (kHasRho) rRho[e / 2] = less ? rPair.elements[e % 2 * 2 + 1] : rRho[e / 2];
          }
        }
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int r = row_of(m, half * 2);
          const int place = fact_place<Tile>(kBias, warp_row + r);
          float bound = group_upper(sFacts.get(place), sFacts.get(place + 1), rLeast[half], rRho[half]);
          if (args.quads) {
            bound = minimum(bound, shuffle_xor(bound, 1));
            bound = minimum(bound, shuffle_xor(bound, 2));
          }
          if (writes && r < rows_left) gFirst[r * args.groups + first / kAcross * quad_groups] = bound;
        }
      }
    }
  }

  __device__ __forceinline__ static int left(std::int64_t count, int most) {
    return count < most ? static_cast<int>(count) : most;  // negative: none is left
  }
};

}  // namespace sn::cuda
