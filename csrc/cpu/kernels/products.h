// Screening: the products of one tile of the copy. Included by kernels.cpp alone, inside its namespace.
#pragma once

#if defined(__AVX512BF16__)

inline constexpr int kMicroRows = 8;
inline constexpr int kMicroColumns = 48;
inline constexpr std::int64_t kMicroDepth = kDepth;

// C[8][16 V] (+)= A[8][2n] . B[16 V][2n]^T on pairs. b: V panels of sixteen columns, `panel_words` apart.
template <int V>
SN_FORCE_INLINE void micro_kernel(const std::uint32_t* a, const std::uint32_t* b, std::int64_t panel_words,
                                  std::int64_t n, bool first, float* c) {
  __m512 acc[kMicroRows][V];
#pragma GCC unroll 8
  for (int r = 0; r < kMicroRows; ++r) {
#pragma GCC unroll 3
    for (int v = 0; v < V; ++v) {
      acc[r][v] = first ? _mm512_setzero_ps() : _mm512_load_ps(c + r * kTilePitch + v * kLanes);
    }
  }
  for (std::int64_t k = 0; k < n; ++k) {
    __m512bh w[V];
#pragma GCC unroll 3
    for (int v = 0; v < V; ++v) {
      w[v] = reinterpret_cast<__m512bh>(_mm512_load_si512(b + v * panel_words + k * kPanel));
    }
#pragma GCC unroll 8
    for (int r = 0; r < kMicroRows; ++r) {
      const __m512bh x = reinterpret_cast<__m512bh>(_mm512_set1_epi32(static_cast<int>(a[k * kPanel + r])));
#pragma GCC unroll 3
      for (int v = 0; v < V; ++v) acc[r][v] = _mm512_dpbf16_ps(acc[r][v], x, w[v]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kMicroRows; ++r) {
#pragma GCC unroll 3
    for (int v = 0; v < V; ++v) _mm512_store_ps(c + r * kTilePitch + v * kLanes, acc[r][v]);
  }
}

#else  // fp32 multiply-adds on widened operands: A [k][16] by panel, B [k][kMicroColumns]

#if defined(__AVX512F__)
inline constexpr int kMicroRows = 8;
inline constexpr int kMicroColumns = 48;
#elif defined(__AVX2__)
inline constexpr int kMicroRows = 6;
inline constexpr int kMicroColumns = 16;
#else
inline constexpr int kMicroRows = 4;
inline constexpr int kMicroColumns = 16;
#endif
inline constexpr std::int64_t kMicroDepth = kDepth / 2;

// C[kMicroRows][16 V] (+)= A[kMicroRows][n] . B[n][16 V]. a[r]: column of anchor r in its widened panel, stride 16.
template <int V>
SN_FORCE_INLINE void micro_kernel(const float* const (&a)[kMicroRows], const float* b, std::int64_t n, bool first,
                                  float* c) {
#if defined(__AVX512F__) || defined(__AVX2__)
  F16 acc[kMicroRows][V];
#pragma GCC unroll 8
  for (int r = 0; r < kMicroRows; ++r) {
#pragma GCC unroll 3
    for (int v = 0; v < V; ++v) acc[r][v] = first ? f_zero() : f_load(c + r * kTilePitch + v * kLanes);
  }
  for (std::int64_t k = 0; k < n; ++k) {
    F16 w[V];
#pragma GCC unroll 3
    for (int v = 0; v < V; ++v) w[v] = f_load(b + k * kMicroColumns + v * kLanes);
#pragma GCC unroll 8
    for (int r = 0; r < kMicroRows; ++r) {
      const F16 x = f_set1(a[r][k * kPanel]);
#pragma GCC unroll 3
      for (int v = 0; v < V; ++v) acc[r][v] = f_fma(x, w[v], acc[r][v]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kMicroRows; ++r) {
#pragma GCC unroll 3
    for (int v = 0; v < V; ++v) f_store(c + r * kTilePitch + v * kLanes, acc[r][v]);
  }
#else
  // Products of bfloat16 values are exact in float, so multiply and add round as a fused multiply-add would.
  static_assert(V == 1);
  float acc[kMicroRows][kLanes];
  for (int r = 0; r < kMicroRows; ++r) {
    for (int l = 0; l < kLanes; ++l) acc[r][l] = first ? 0.0f : c[r * kTilePitch + l];
  }
  for (std::int64_t k = 0; k < n; ++k) {
    for (int r = 0; r < kMicroRows; ++r) {
      const float x = a[r][k * kPanel];
      for (int l = 0; l < kLanes; ++l) acc[r][l] += x * b[k * kMicroColumns + l];
    }
  }
  for (int r = 0; r < kMicroRows; ++r) {
    for (int l = 0; l < kLanes; ++l) c[r * kTilePitch + l] = acc[r][l];
  }
#endif
}

// Widens `pairs` words a row of one panel to floats [2 pairs][stride].
SN_FORCE_INLINE void widen(const std::uint32_t* packed, std::int64_t pairs, float* out, std::int64_t stride) {
  for (std::int64_t k = 0; k < pairs; ++k) {
    std::uint32_t even[kPanel];
    std::uint32_t odd[kPanel];
    for (int l = 0; l < kPanel; ++l) even[l] = packed[k * kPanel + l] << 16;
    for (int l = 0; l < kPanel; ++l) odd[l] = packed[k * kPanel + l] & 0xffff0000u;
    std::memcpy(out + (2 * k) * stride, even, sizeof even);
    std::memcpy(out + (2 * k + 1) * stride, odd, sizeof odd);
  }
}

#endif

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
    static_assert(kPanel * sizeof(std::uint32_t) == 64, "a pair of columns of a panel is one cache line");
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

// products[r * kTilePitch + c] = A_(row + r) . A_(column + c). On the diagonal, vectors of which no pair is wanted stay
// unwritten. next: the tile that this worker is likely to multiply next.
inline void tile_products(const Screen& screen, const Tile& tile, const Tile& next, float* products,
                          [[maybe_unused]] float* wide) {
  const std::int64_t depth_pairs = kMicroDepth / 2;
  const std::int64_t panel_words = screen.panel_stride;
  const std::uint32_t* anchors = screen.anchors.packed + tile.row / kPanel * panel_words;
  const std::uint32_t* candidates = screen.candidates.packed + tile.column / kPanel * panel_words;
  const auto pairs_at = [&](std::int64_t pair) {
    return screen.pairs - pair < depth_pairs ? screen.pairs - pair : depth_pairs;
  };
  // The last micro-tile may have rows behind the tile: the copy and the products have room for whole kTileGrain.
  const std::int64_t row_steps = (tile.rows + kMicroRows - 1) / kMicroRows;
  // Lines per micro-kernel, so that one depth is fetched while the one before it is used.
  const std::int64_t micro_tiles = row_steps * ((tile.columns + kMicroColumns - 1) / kMicroColumns);
  const std::int64_t depth_lines = (tile.rows + tile.columns) / kPanel * depth_pairs;
  const int lines = static_cast<int>((depth_lines + micro_tiles - 1) / micro_tiles);
  for (std::int64_t pair = 0; pair < screen.pairs; pair += depth_pairs) {
    const std::int64_t n = pairs_at(pair);
    const bool first = pair == 0;
    const std::int64_t after = pair + depth_pairs;
    DepthPrefetch prefetch = after < screen.pairs ? DepthPrefetch(screen, tile, after, pairs_at(after))
                                                  : DepthPrefetch(screen, next, 0, pairs_at(0));
#if !defined(__AVX512BF16__)
    float* wide_candidates = wide;
    float* wide_anchors = wide + kWideCandidateFloats;
    for (std::int64_t panel = 0; panel * kPanel < row_steps * kMicroRows; ++panel) {
      widen(anchors + panel * panel_words + pair * kPanel, n, wide_anchors + panel * kPanel * kMicroDepth, kPanel);
    }
#endif
    for (std::int64_t column = 0; column < tile.columns; column += kMicroColumns) {
      const std::uint32_t* b = candidates + column / kPanel * panel_words + pair * kPanel;
      const std::int64_t vectors =
          (tile.columns - column < kMicroColumns ? tile.columns - column : kMicroColumns) / kPanel;
#if !defined(__AVX512BF16__)
      for (std::int64_t panel = 0; panel < vectors; ++panel) {
        widen(b + panel * panel_words, n, wide_candidates + panel * kPanel, kMicroColumns);
      }
#endif
      for (std::int64_t step = 0; step < row_steps; ++step) {
        const std::int64_t row = step * kMicroRows;
        // On the diagonal a row wants columns behind it.
        const std::int64_t skipped = tile.diagonal && row + 1 > column ? (row + 1 - column) / kPanel : 0;
        if (skipped >= vectors) break;
        prefetch.lines(lines);
        float* c = products + row * kTilePitch + column + skipped * kPanel;
#if defined(__AVX512BF16__)
        const std::uint32_t* a = anchors + row / kPanel * panel_words + pair * kPanel + row % kPanel;
        with_vectors(vectors - skipped, [&]<int V>() SN_LAMBDA_INLINE {
          micro_kernel<V>(a, b + skipped * panel_words, panel_words, n, first, c);
        });
#else
        const float* a[kMicroRows];
        for (int r = 0; r < kMicroRows; ++r) {
          a[r] = wide_anchors + (row + r) / kPanel * (kPanel * kMicroDepth) + (row + r) % kPanel;
        }
        with_vectors(vectors - skipped, [&]<int V>() SN_LAMBDA_INLINE {
          micro_kernel<V>(a, wide_candidates + skipped * kPanel, 2 * n, first, c);
        });
#endif
      }
    }
  }
}
