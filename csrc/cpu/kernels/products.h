// Screening: the products of one tile of the copy. Included by kernels.cpp alone, inside its namespace.
#pragma once

// Sixteen 32-bit sums. i_dot adds to each the products of two 16-bit integers: `pair` holds those of an anchor, `words`
// those of sixteen candidates, a word each. The sums do not overflow: pack.h sees to it, of 8-bit integers plan.cpp. Of
// the same instructions as intrinsics GCC 12 keeps the sums on the stack.
#if defined(__AVX512F__)

inline constexpr int kMicroRows = 8;
inline constexpr int kMicroColumns = 48;
using I16 = __m512i;
SN_FORCE_INLINE I16 i_zero() {
  return _mm512_setzero_si512();
}
SN_FORCE_INLINE I16 i_set1(std::uint32_t word) {
  return _mm512_set1_epi32(static_cast<int>(word));
}
SN_FORCE_INLINE I16 i_load(const void* p) {
  return _mm512_load_si512(p);
}
SN_FORCE_INLINE void i_store(void* p, I16 a) {
  _mm512_store_si512(p, a);
}
SN_FORCE_INLINE I16 i_dot(I16 acc, I16 pair, I16 words) {
#if defined(__AVX512VNNI__)
  asm("vpdpwssd %2, %1, %0" : "+v"(acc) : "v"(pair), "v"(words));
#else
  I16 products;
  asm("vpmaddwd %3, %2, %1\n\tvpaddd %1, %0, %0" : "+v"(acc), "=&v"(products) : "v"(pair), "v"(words));
#endif
  return acc;
}
#if defined(__AVX512VNNI__)
#define SN_CPU_BYTES 1
// The same of four 8-bit integers, at twice the rate: `shifted` has 128 added to each, and is unsigned.
SN_FORCE_INLINE I16 i_dot_bytes(I16 acc, I16 shifted, I16 words) {
  asm("vpdpbusd %2, %1, %0" : "+v"(acc) : "v"(shifted), "v"(words));
  return acc;
}
SN_FORCE_INLINE I16 i_shifted(const void* words) {
  return _mm512_xor_si512(_mm512_load_si512(words), _mm512_set1_epi32(static_cast<int>(0x80808080u)));
}
#endif
SN_FORCE_INLINE F16 i_scaled(I16 a, F16 scale) {
  return {_mm512_mul_ps(_mm512_cvtepi32_ps(a), scale.v)};
}

#elif defined(__AVX2__)

inline constexpr int kMicroRows = 6;
inline constexpr int kMicroColumns = 16;
struct I16 {
  __m256i lo, hi;
};
SN_FORCE_INLINE I16 i_zero() {
  return {_mm256_setzero_si256(), _mm256_setzero_si256()};
}
SN_FORCE_INLINE I16 i_set1(std::uint32_t word) {
  return {_mm256_set1_epi32(static_cast<int>(word)), _mm256_set1_epi32(static_cast<int>(word))};
}
SN_FORCE_INLINE I16 i_load(const void* p) {
  const __m256i* halves = static_cast<const __m256i*>(p);
  return {_mm256_load_si256(halves), _mm256_load_si256(halves + 1)};
}
SN_FORCE_INLINE void i_store(void* p, I16 a) {
  __m256i* halves = static_cast<__m256i*>(p);
  _mm256_store_si256(halves, a.lo);
  _mm256_store_si256(halves + 1, a.hi);
}
SN_FORCE_INLINE __m256i i_dot(__m256i acc, __m256i pair, __m256i words) {
  __m256i products;
  asm("vpmaddwd %3, %2, %1\n\tvpaddd %1, %0, %0" : "+x"(acc), "=&x"(products) : "x"(pair), "x"(words));
  return acc;
}
SN_FORCE_INLINE I16 i_dot(I16 acc, I16 pair, I16 words) {
  return {i_dot(acc.lo, pair.lo, words.lo), i_dot(acc.hi, pair.hi, words.hi)};
}
SN_FORCE_INLINE F16 i_scaled(I16 a, F16 scale) {
  return {_mm256_mul_ps(_mm256_cvtepi32_ps(a.lo), scale.lo), _mm256_mul_ps(_mm256_cvtepi32_ps(a.hi), scale.hi)};
}

#else

inline constexpr int kMicroRows = 4;
inline constexpr int kMicroColumns = 16;
struct I16 {
  std::int32_t v[kLanes];
};
SN_FORCE_INLINE I16 i_set1(std::uint32_t word) {
  I16 r;
  for (int l = 0; l < kLanes; ++l) r.v[l] = static_cast<std::int32_t>(word);
  return r;
}
SN_FORCE_INLINE I16 i_zero() {
  return i_set1(0);
}
SN_FORCE_INLINE I16 i_load(const void* p) {
  I16 r;
  std::memcpy(&r, p, sizeof r);
  return r;
}
SN_FORCE_INLINE void i_store(void* p, I16 a) {
  std::memcpy(p, &a, sizeof a);
}
SN_FORCE_INLINE I16 i_dot(I16 acc, I16 pair, I16 words) {
  for (int l = 0; l < kLanes; ++l) {
    acc.v[l] += static_cast<std::int16_t>(pair.v[l] & 0xffff) * static_cast<std::int16_t>(words.v[l] & 0xffff) +
                (pair.v[l] >> 16) * (words.v[l] >> 16);
  }
  return acc;
}
SN_FORCE_INLINE F16 i_scaled(I16 a, F16 scale) {
  float wide[kLanes];
  float factor[kLanes];
  f_store(factor, scale);
  for (int l = 0; l < kLanes; ++l) wide[l] = static_cast<float>(a.v[l]) * factor[l];
  return f_load(wide);
}

#endif

// Words of sixteen candidates, and their products with the word of an anchor.
template <bool kBytes>
SN_FORCE_INLINE I16 candidate_words(const std::uint32_t* words) {
#if defined(SN_CPU_BYTES)
  if constexpr (kBytes) return i_shifted(words);
#endif
  return i_load(words);
}
template <bool kBytes>
SN_FORCE_INLINE I16 word_products(I16 acc, I16 anchor, I16 words) {
#if defined(SN_CPU_BYTES)
  if constexpr (kBytes) return i_dot_bytes(acc, words, anchor);
#endif
  return i_dot(acc, anchor, words);
}

// C[kMicroRows][16 V] (+)= A[kMicroRows][2n] . B[16 V][2n]^T, of 8-bit integers [4n]. b: V panels of sixteen columns,
// `panel_words` apart. C is sums of integers; with `last` they become floats, scaled by the scales of row and column.
template <bool kBytes, int V>
SN_FORCE_INLINE void micro_kernel(const std::uint32_t* const (&a)[kMicroRows], const std::uint32_t* b,
                                  std::int64_t panel_words, std::int64_t n, bool first, bool last,
                                  const std::int32_t* row_starts, const float* row_scales, const float* column_scales,
                                  std::int64_t pitch, float* c) {
  I16 acc[kMicroRows][V];
#pragma GCC unroll 8
  for (int r = 0; r < kMicroRows; ++r) {
#pragma GCC unroll 3
    for (int v = 0; v < V; ++v)
      acc[r][v] = first ? i_set1(static_cast<std::uint32_t>(row_starts[r])) : i_load(c + r * pitch + v * kLanes);
  }
  for (std::int64_t k = 0; k < n; ++k) {
    I16 w[V];
#pragma GCC unroll 3
    for (int v = 0; v < V; ++v) w[v] = candidate_words<kBytes>(b + v * panel_words + k * kPanel);
#pragma GCC unroll 8
    for (int r = 0; r < kMicroRows; ++r) {
      const I16 x = i_set1(a[r][k * kPanel]);
#pragma GCC unroll 3
      for (int v = 0; v < V; ++v) acc[r][v] = word_products<kBytes>(acc[r][v], x, w[v]);
    }
  }
  if (!last) {
#pragma GCC unroll 8
    for (int r = 0; r < kMicroRows; ++r) {
#pragma GCC unroll 3
      for (int v = 0; v < V; ++v) i_store(c + r * pitch + v * kLanes, acc[r][v]);
    }
    return;
  }
#pragma GCC unroll 8
  for (int r = 0; r < kMicroRows; ++r) {
#pragma GCC unroll 3
    for (int v = 0; v < V; ++v) {
      const F16 scale = f_mul(f_set1(row_scales[r]), f_load(column_scales + v * kLanes));
      f_store(c + r * pitch + v * kLanes, i_scaled(acc[r][v], scale));
    }
  }
}

static_assert(kTileGrain % kMicroRows == 0 && kTileGrain % kMicroColumns == 0);
static_assert(kMicroColumns % kPanel == 0 && kMicroColumns <= 3 * kPanel);

// Calls kernel.template operator()<V>() for `vectors` of 1 to kMicroColumns / 16.
template <class Kernel>
SN_FORCE_INLINE void with_vectors(std::int64_t vectors, const Kernel& kernel) {
  constexpr int kMost = kMicroColumns / kLanes;
  if (vectors == kMost) return kernel.template operator()<kMost>();
  if constexpr (kMost > 1) {
    if (vectors == 2) return kernel.template operator()<2>();
    kernel.template operator()<1>();
  }
}

// Prefetches the panels of one depth of a tile into the second-level cache, a few lines at a time. The copy is larger
// than that cache, and hardware does not follow it from panel to panel.
class DepthPrefetch {
 public:
  DepthPrefetch(const Screen& screen, const Tile& tile, std::int64_t pair, std::int64_t pairs)
      : anchors_(screen.anchors.packed + tile.row / kPanel * screen.panel_stride + pair * kPanel),
        candidates_(screen.candidates.packed + tile.column / kPanel * screen.panel_stride + pair * kPanel),
        stride_(screen.panel_stride),
        anchor_panels_(tile.rows / kPanel),
        panels_(tile.diagonal ? anchor_panels_ : anchor_panels_ + tile.columns / kPanel),
        pairs_(pairs) {}

  SN_FORCE_INLINE void lines(int count) {
    static_assert(kPanel * sizeof(std::uint32_t) == 64, "a word of each row of a panel is one cache line");
    for (; count > 0 && panel_ < panels_; --count) {
      const std::uint32_t* panel =
          panel_ < anchor_panels_ ? anchors_ + panel_ * stride_ : candidates_ + (panel_ - anchor_panels_) * stride_;
      __builtin_prefetch(panel + at_ * kPanel, 0, 2);
      if (++at_ == pairs_) {
        at_ = 0;
        ++panel_;
      }
    }
  }

 private:
  const std::uint32_t* anchors_;
  const std::uint32_t* candidates_;
  std::int64_t stride_;
  std::int64_t anchor_panels_;
  std::int64_t panels_;
  std::int64_t pairs_;
  std::int64_t panel_ = 0;
  std::int64_t at_ = 0;
};

// products[r * tile.pitch + c] = A_(row + r) . A_(column + c). On the diagonal, vectors of which no pair is wanted stay
// unwritten. next: the tile that this worker is likely to multiply next.
template <bool kBytes>
void tile_products_as(const Screen& screen, const Tile& tile, const Tile& next, float* products) {
  constexpr std::int64_t kDepthWords = kDepth / 2;
  const std::int64_t panel_words = screen.panel_stride;
  const std::uint32_t* anchors = screen.anchors.packed + tile.row / kPanel * panel_words;
  const std::uint32_t* candidates = screen.candidates.packed + tile.column / kPanel * panel_words;
  const std::int32_t* row_starts = screen.anchors.start + tile.row;
  const float* row_scales = screen.anchors.scale + tile.row;
  const float* column_scales = screen.candidates.scale + tile.column;
  const auto words_at = [&](std::int64_t pair) {
    return screen.words - pair < kDepthWords ? screen.words - pair : kDepthWords;
  };
  // The last micro-tile may have rows behind the tile: the copy and the products have room for whole kTileGrain.
  const std::int64_t row_steps = (tile.rows + kMicroRows - 1) / kMicroRows;
  // Lines per micro-kernel, so that one depth is fetched while the one before it is used.
  const std::int64_t micro_tiles = row_steps * ((tile.columns + kMicroColumns - 1) / kMicroColumns);
  const std::int64_t depth_lines = (tile.rows + tile.columns) / kPanel * kDepthWords;
  const int lines = static_cast<int>((depth_lines + micro_tiles - 1) / micro_tiles);
  for (std::int64_t pair = 0; pair < screen.words; pair += kDepthWords) {
    const std::int64_t n = words_at(pair);
    const bool first = pair == 0;
    const std::int64_t after = pair + kDepthWords;
    const bool last = after >= screen.words;
    DepthPrefetch prefetch =
        last ? DepthPrefetch(screen, next, 0, words_at(0)) : DepthPrefetch(screen, tile, after, words_at(after));
    for (std::int64_t column = 0; column < tile.columns; column += kMicroColumns) {
      const std::uint32_t* b = candidates + column / kPanel * panel_words + pair * kPanel;
      const std::int64_t vectors =
          (tile.columns - column < kMicroColumns ? tile.columns - column : kMicroColumns) / kPanel;
      for (std::int64_t step = 0; step < row_steps; ++step) {
        const std::int64_t row = step * kMicroRows;
        // On the diagonal a row wants columns behind it.
        const std::int64_t skipped = tile.diagonal && row + 1 > column ? (row + 1 - column) / kPanel : 0;
        if (skipped >= vectors) break;
        prefetch.lines(lines);
        const std::int64_t at = column + skipped * kPanel;
        const std::uint32_t* a[kMicroRows];
        for (int r = 0; r < kMicroRows; ++r) {
          a[r] = anchors + (row + r) / kPanel * panel_words + pair * kPanel + (row + r) % kPanel;
        }
        with_vectors(vectors - skipped, [&]<int V>() SN_LAMBDA_INLINE {
          micro_kernel<kBytes, V>(a, b + skipped * panel_words, panel_words, n, first, last, row_starts + row,
                                  row_scales + row, column_scales + at, tile.pitch, products + row * tile.pitch + at);
        });
      }
    }
  }
}

inline void tile_products(const Screen& screen, const Tile& tile, const Tile& next, float* products) {
#if defined(SN_CPU_BYTES)
  if (screen.bytes) return tile_products_as<true>(screen, tile, next, products);
#endif
  tile_products_as<false>(screen, tile, next, products);
}
