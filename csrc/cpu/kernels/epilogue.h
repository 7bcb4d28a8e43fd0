// Screening: the epilogue of a tile finds hits among its products and appends them to the lists. Included by
// kernels.cpp alone, inside its namespace.
#pragma once

// Of sixteen products of one anchor: pairs that matter to the anchor, and pairs that matter to the candidate. One bit
// per pair.
struct Hits {
  std::uint32_t anchor;
  std::uint32_t candidates;
};
template <bool kSymmetric>
SN_FORCE_INLINE Hits find_hits(const float* products, const float* bias, float threshold, float own_bias,
                               const float* thresholds) {
#if defined(__AVX512F__)
  const __m512 g = _mm512_load_ps(products);
  const std::uint32_t anchor =
      _mm512_cmp_ps_mask(_mm512_sub_ps(_mm512_loadu_ps(bias), g), _mm512_set1_ps(threshold), _CMP_LE_OQ);
  if constexpr (!kSymmetric) return {anchor, 0};
  const std::uint32_t candidates =
      _mm512_cmp_ps_mask(_mm512_sub_ps(_mm512_set1_ps(own_bias), g), _mm512_loadu_ps(thresholds), _CMP_LE_OQ);
  return {anchor, candidates};
#elif defined(__AVX2__)
  Hits hits{0, 0};
  for (int half = 0; half < 2; ++half) {
    const __m256 g = _mm256_load_ps(products + 8 * half);
    const __m256 row =
        _mm256_cmp_ps(_mm256_sub_ps(_mm256_loadu_ps(bias + 8 * half), g), _mm256_set1_ps(threshold), _CMP_LE_OQ);
    hits.anchor |= static_cast<std::uint32_t>(_mm256_movemask_ps(row)) << (8 * half);
    if constexpr (kSymmetric) {
      const __m256 column =
          _mm256_cmp_ps(_mm256_sub_ps(_mm256_set1_ps(own_bias), g), _mm256_loadu_ps(thresholds + 8 * half), _CMP_LE_OQ);
      hits.candidates |= static_cast<std::uint32_t>(_mm256_movemask_ps(column)) << (8 * half);
    }
  }
  return hits;
#else
  Hits hits{0, 0};
  std::uint32_t any = 0;
  for (int l = 0; l < kLanes; ++l) {
    any |= bias[l] - products[l] <= threshold ? 1u : 0u;
    if constexpr (kSymmetric) any |= own_bias - products[l] <= thresholds[l] ? 1u : 0u;
  }
  if (any == 0) return hits;
  for (int l = 0; l < kLanes; ++l) {
    hits.anchor |= (bias[l] - products[l] <= threshold ? 1u : 0u) << l;
    if constexpr (kSymmetric) hits.candidates |= (own_bias - products[l] <= thresholds[l] ? 1u : 0u) << l;
  }
  return hits;
#endif
}

// Pairs of one block that the bounds cannot tell apart, for anchors that had to resolve a list before. From this many
// on, the direct distances of the whole block, for both sides, cost less than those of list after list.
inline constexpr int kDenseFrom = kDirectBlock * kDirectBlock / 8;

template <bool kSymmetric>
void resolve_block(const Screen& screen, std::int64_t row, std::int64_t rows, std::int64_t column,
                   std::int64_t columns) {
  const auto row_pointer = [&](const ScreenSide& side, std::int64_t position) SN_LAMBDA_INLINE {
    const std::int64_t bytes = screen.dtype == DType::kFloat32 ? 4 : 2;
    return static_cast<const void*>(static_cast<const char*>(side.features.data) +
                                    side.order[position] * side.features.row_stride * bytes);
  };
  const bool diagonal = kSymmetric && row == column;
  if (column + columns > screen.candidates.rows) columns = screen.candidates.rows - column;
  if (columns <= 0) return;
  const void* x[kDirectBlock];
  const void* z[kDirectBlock];
  float d2[kDirectBlock * kDirectBlock];
  for (std::int64_t r = 0; r < rows; ++r) x[r] = row_pointer(screen.anchors, row + r);
  for (std::int64_t c = 0; c < columns; ++c) z[c] = row_pointer(screen.candidates, column + c);
  direct_block_any(screen.dtype, x, rows, z, columns, screen.dims, diagonal, d2, kDirectBlock);
  const auto insert = [&](std::int64_t p, std::int64_t candidate, float value) SN_LAMBDA_INLINE {
    if (screen.exact_counts[p] < screen.K) {
      if (screen.list_counts[p] == screen.capacity) resolve_exactly(screen, p);
    } else if (value > screen.lists[p * screen.capacity + screen.K - 1].score) {
      return;
    }
    insert_exact(screen, p, candidate, value);
  };
  for (std::int64_t r = 0; r < rows; ++r) {
    const std::int64_t p = row + r;
    const bool row_is_candidate = kSymmetric && screen.bias[p] <= kFloatMost;
    for (std::int64_t c = diagonal ? r + 1 : 0; c < columns; ++c) {
      const std::int64_t q = column + c;
      const float value = d2[r * kDirectBlock + c];
      const bool is_self = !kSymmetric && screen.self_position != nullptr && screen.self_position[p] == q;
      if (screen.bias[q] <= kFloatMost && !is_self) insert(p, q, value);
      if (row_is_candidate) insert(q, p, value);
    }
  }
}

template <bool kSymmetric>
void tile_epilogue_as(const Screen& screen, const Tile& tile, const float* tile_products) {
  constexpr std::int64_t kVectors = kDirectBlock / kLanes;
  static_assert(kPanel % kLanes == 0, "tiles have whole panels");
  const std::int64_t tile_rows =
      tile.row + tile.rows < screen.anchors.rows ? tile.rows : screen.anchors.rows - tile.row;
  for (std::int64_t r0 = 0; r0 < tile_rows; r0 += kDirectBlock) {
    const std::int64_t rows = tile_rows - r0 < kDirectBlock ? tile_rows - r0 : kDirectBlock;
    for (std::int64_t c0 = tile.diagonal ? r0 : 0; c0 < tile.columns; c0 += kDirectBlock) {
      const std::int64_t columns = tile.columns - c0 < kDirectBlock ? tile.columns - c0 : kDirectBlock;
      const std::int64_t column = tile.column + c0;
      // Collects vectors with a hit without a branch: most vectors have none, and a branch would be mispredicted.
      struct Found {
        std::int32_t row;
        std::int32_t first;  // column of the first lane
        Hits hits;
      };
      Found found[kDirectBlock * kVectors + 1];
      int count = 0;
      int doubtful_pairs = 0;
      for (std::int64_t r = 0; r < rows; ++r) {
        const std::int64_t p = tile.row + r0 + r;
        const int before = count;
        for (std::int64_t c = 0; c < columns; c += kLanes) {
          Hits hits = find_hits<kSymmetric>(tile_products + (r0 + r) * tile.pitch + c0 + c, screen.bias + column + c,
                                            screen.thresholds[p], kSymmetric ? screen.bias[p] : 0.0f,
                                            kSymmetric ? screen.thresholds + column + c : nullptr);
          if (tile.diagonal && r0 == c0) {  // only columns past the row: lanes above r
            const std::int64_t first = r + 1 - c;
            const std::uint32_t behind = first >= kLanes ? 0u : 0xffffu & ~((1u << (first > 0 ? first : 0)) - 1u);
            hits.anchor &= behind;
            hits.candidates &= behind;
          }
          found[count] = {static_cast<std::int32_t>(r), static_cast<std::int32_t>(c), hits};
          count += (hits.anchor | hits.candidates) != 0 ? 1 : 0;
        }
        if (screen.exact_counts[p] == 0) continue;
        for (int f = before; f < count; ++f) doubtful_pairs += __builtin_popcount(found[f].hits.anchor);
      }
      if (doubtful_pairs >= kDenseFrom) {
        resolve_block<kSymmetric>(screen, tile.row + r0, rows, column, columns);
        continue;
      }
      for (int f = 0; f < count; ++f) {
        const std::int64_t p = tile.row + r0 + found[f].row;
        const std::int64_t first = column + found[f].first;
        const float* products = tile_products + (r0 + found[f].row) * tile.pitch + c0 + found[f].first;
        for (std::uint32_t mask = found[f].hits.anchor; mask != 0; mask &= mask - 1) {
          const int lane = __builtin_ctz(mask);
          if (!kSymmetric && screen.self_position != nullptr && screen.self_position[p] == first + lane) continue;
          append(screen, p, first + lane, screen.bias[first + lane] - products[lane]);
        }
        for (std::uint32_t mask = found[f].hits.candidates; mask != 0; mask &= mask - 1) {
          const int lane = __builtin_ctz(mask);
          append(screen, first + lane, p, screen.bias[p] - products[lane]);
        }
      }
    }
  }
}

inline void tile_epilogue(const Screen& screen, const Tile& tile, const float* products) {
  screen.symmetric ? tile_epilogue_as<true>(screen, tile, products) : tile_epilogue_as<false>(screen, tile, products);
}
