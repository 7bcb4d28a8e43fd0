// Screening of small batches: all products are kept, so that an anchor meets all of its candidates at once and has one
// threshold. Included by kernels.cpp alone, inside its namespace.
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

// A value that at least `wanted` of bias - products do not exceed, and few more. The candidates are dealt to lanes, one
// or more sets of sixteen; of the least values of the lanes it is about the `wanted`-th smallest.
SN_FORCE_INLINE float first_bound(const float* bias, const float* products, std::int64_t vectors, std::int64_t wanted) {
  constexpr int kSteps = 8;  // of the bisection: the values that are left are bounded once more
  alignas(64) float least[kScreenMostK];
  const std::int64_t sets = (wanted + kLanes - 1) / kLanes;
  for (std::int64_t set = 0; set < sets; ++set) {
    F16 lanes = f_set1(kFloatMost);
    for (std::int64_t v = set * vectors / sets; v < (set + 1) * vectors / sets; ++v) {
      lanes = f_min(lanes, f_sub(f_load(bias + v * kLanes), f_load(products + v * kLanes)));
    }
    f_store(least + set * kLanes, lanes);
  }
  return rank_bound(least, sets * kLanes, wanted, kSteps);
}

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

inline bool screen_rows(const Screen& screen, std::int64_t first, std::int64_t last, std::int64_t pitch,
                        float* products) {
  const std::int64_t M = screen.candidates.rows;
  const std::int64_t vectors = (M + kLanes - 1) / kLanes;
  const std::int64_t most = screen.capacity - kLeastRoom;
  for (std::int64_t p = first; p < last; ++p) {
    float* row = products + p * pitch;
    // An anchor is infinitely far from itself.
    const std::int64_t self = screen.symmetric ? p : (screen.self_position != nullptr ? screen.self_position[p] : -1);
    if (self >= 0) row[self] = -__builtin_inff();
    alignas(64) float values[kWholeMost + kLanes];
    const float bound = first_bound(screen.upper_bias, row, vectors, screen.K);
    std::int64_t count = 0;
    for (std::int64_t v = 0; v < vectors; ++v) {
      const std::int64_t c = v * kLanes;
      const std::uint32_t hits = find_hits<false>(row + c, screen.upper_bias + c, bound, 0.0f, nullptr).anchor;
      count += take_hits(screen.upper_bias + c, row + c, hits, 0, values + count, nullptr);
    }
    if (count >= screen.K) {
      screen.thresholds[p] = rank_bound(values, count, screen.K) + screen.anchors.slack[p];
    }
    const float threshold = screen.thresholds[p];
    float scores[kListMost + kLanes];
    std::int32_t columns[kListMost + kLanes];
    std::int64_t listed = 0;
    for (std::int64_t v = 0; v < vectors && listed <= most; ++v) {
      const std::int64_t c = v * kLanes;
      const std::uint32_t hits = find_hits<false>(row + c, screen.bias + c, threshold, 0.0f, nullptr).anchor;
      listed +=
          take_hits(screen.bias + c, row + c, hits, static_cast<std::int32_t>(c), scores + listed, columns + listed);
    }
    if (listed > most) return false;
    Entry* entries = screen.lists + p * screen.capacity;
    for (std::int64_t e = 0; e < listed; ++e) entries[e] = {columns[e], scores[e]};
    screen.list_counts[p] = static_cast<std::int32_t>(listed);
  }
  return true;
}
