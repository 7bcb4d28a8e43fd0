// Screening of whole rows: an anchor meets all of its candidates at once, or those of a tile on the diagonal, and has
// one threshold. Included by kernels.cpp alone, inside its namespace.
#pragma once

// Copies the products of a tile to where their columns are rows, which are below the diagonal.
inline void mirror_tile(const Tile& tile, float* products) {
  alignas(64) std::uint32_t turned[kPanel * kLanes];
  for (std::int64_t row = tile.row; row < tile.row + tile.rows; row += kPanel) {
    const std::int64_t first = tile.diagonal ? row + kPanel : tile.column;
    for (std::int64_t column = first; column < tile.column + tile.columns; column += kLanes) {
      const std::uint32_t* above[kPanel];
      for (int r = 0; r < kPanel; ++r) {
        above[r] = reinterpret_cast<const std::uint32_t*>(products + (row + r) * tile.pitch + column);
      }
      transpose_words(above, turned);
      for (int l = 0; l < kLanes; ++l) {
        f_store(products + (column + l) * tile.pitch + row,
                f_load(reinterpret_cast<const float*>(turned) + l * kPanel));
      }
    }
  }
}

// Of the bisection for a first bound: the values that it leaves are bounded once more.
inline constexpr int kBoundSteps = 8;

// Writes lane by lane what `mask` selects of bias - products to `values`, and the columns to `columns` where wanted.
// Returns how many. Writes whole vectors.
SN_FORCE_INLINE int take_hits(const float* bias, const float* products, std::uint32_t mask, std::int32_t column,
                              float* values, std::int32_t* columns) {
#if defined(__AVX512F__)
  const auto lanes = static_cast<__mmask16>(mask);
  const __m512 all = _mm512_sub_ps(_mm512_loadu_ps(bias), _mm512_load_ps(products));
  _mm512_storeu_ps(values, _mm512_maskz_compress_ps(lanes, all));
  if (columns != nullptr) {
    const __m512i ids = _mm512_add_epi32(_mm512_set1_epi32(column),
                                         _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15));
    _mm512_storeu_si512(columns, _mm512_maskz_compress_epi32(lanes, ids));
  }
  return __builtin_popcount(mask);
#else
  int count = 0;
  for (; mask != 0; mask &= mask - 1) {
    const int lane = __builtin_ctz(mask);
    values[count] = bias[lane] - products[lane];
    if (columns != nullptr) columns[count] = column + lane;
    ++count;
  }
  return count;
#endif
}

// The lists of the rows of a tile, which are empty, from its candidates. products[r * tile.pitch + c]; changes those of
// anchors with themselves. Returns false, with lists that are not to be used, if one would be too long.
inline bool screen_rows(const Screen& screen, const Tile& tile, float* products) {
  const std::int64_t vectors = tile.columns / kLanes;
  const float* bias = screen.bias + tile.column;
  const float* upper_bias = screen.upper_bias + tile.column;
  const std::int64_t wanted = screen.K;
  const std::int64_t most = screen.capacity - kLeastRoom;
  const std::int64_t end = tile.row + tile.rows < screen.anchors.rows ? tile.row + tile.rows : screen.anchors.rows;
  for (std::int64_t p = tile.row; p < end; ++p) {
    float* row = products + (p - tile.row) * tile.pitch;
    // An anchor is infinitely far from itself.
    const std::int64_t self =
        (screen.symmetric ? p : (screen.self_position != nullptr ? screen.self_position[p] : -1)) - tile.column;
    if (self >= 0 && self < tile.columns) row[self] = -__builtin_inff();
    if ((wanted + kLanes - 1) / kLanes <= vectors) {
      // Of the values that their first bound leaves, a tighter one.
      alignas(64) float values[kWholeMost + kLanes];
      const float bound =
          lanes_bound(vectors, wanted, kFloatMost, kBoundSteps, [upper_bias, row](std::int64_t v) SN_LAMBDA_INLINE {
            return f_sub(f_load(upper_bias + v * kLanes), f_load(row + v * kLanes));
          });
      std::int64_t count = 0;
      for (std::int64_t c = 0; c < tile.columns; c += kLanes) {
        const std::uint32_t hits = find_hits<false>(row + c, upper_bias + c, bound, 0.0f, nullptr).anchor;
        count += take_hits(upper_bias + c, row + c, hits, 0, values + count, nullptr);
      }
      if (count >= wanted) {
        screen.thresholds[p] = rank_bound(values, count, wanted) + screen.anchors.slack[p];
      }
    }
    const float threshold = screen.thresholds[p];
    float scores[kListMost + kLanes];
    std::int32_t columns[kListMost + kLanes];
    std::int64_t listed = 0;
    for (std::int64_t c = 0; c < tile.columns && listed <= most; c += kLanes) {
      const std::uint32_t hits = find_hits<false>(row + c, bias + c, threshold, 0.0f, nullptr).anchor;
      listed += take_hits(bias + c, row + c, hits, static_cast<std::int32_t>(tile.column + c), scores + listed,
                          columns + listed);
    }
    if (listed > most) return false;
    Entry* entries = screen.lists + p * screen.capacity;
    for (std::int64_t e = 0; e < listed; ++e) entries[e] = {columns[e], scores[e]};
    screen.list_counts[p] = static_cast<std::int32_t>(listed);
    screen.list_limits[p] =
        static_cast<std::int32_t>(listed + kPruneAfter < screen.capacity ? listed + kPruneAfter : screen.capacity);
  }
  return true;
}
