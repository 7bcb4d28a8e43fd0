// Screening: products of a bfloat16 copy find the few candidates whose direct distance must be known.
//
// What is kept for a row x: t = x - mean, A = bfloat16(t), norm = |t|^2, residual = |t - A|^2. For a pair (p,
// q)
//   s_pq = norm_p + norm_q - 2 A_p.A_q   and   |key_pq - s_pq| <= E_p + E_q,
// where key is the direct sum; forward.cpp derives E. With w_pq = (norm_q - E_q) / 2 - A_p.A_q:
//   lower bound of key_pq = 2 w_pq + norm_p - E_p,     upper bound = 2 (w_pq + E_q) + norm_p + E_p.
// If u is the K-th smallest w + E_q seen so far, K candidates have keys <= 2 u + norm_p + E_p, so a candidate
// with w > u + E_p cannot be among the K nearest. That is the threshold. Float rounding of w, u and
// thresholds is part of E. Included by kernels.cpp alone, inside its namespace.
#pragma once

inline constexpr float kFloatMost = 3.402823466e38f;

// ---- the mean -------------------------------------------------------------------------------------------------------

// A mean of sampled rows that an outlier cannot drag away: rows farther from the first mean than twice the
// median are left out of the second. Sums are of differences to a sampled row, so that equal rows give
// exactly that row.
inline constexpr int kSampleRows = 32;
// Half-precision rows are exact in the screening copy as they are: they are centred only if that shrinks them
// a lot.
inline constexpr float kWorthCentring = 0.25f;

template <class T>
void sampled_mean(const FeatureView* sides, int side_count, std::int64_t dims, float* mean, float* scratch) {
  const T* rows[kSampleRows];
  float far[kSampleRows];
  float size[kSampleRows];
  int count = 0;
  for (int s = 0; s < side_count; ++s) {
    const std::int64_t take = kSampleRows / side_count;
    const std::int64_t n = sides[s].rows < take ? sides[s].rows : take;
    for (std::int64_t i = 0; i < n; ++i) {
      rows[count++] = static_cast<const T*>(sides[s].data) + (i * sides[s].rows / n) * sides[s].row_stride;
    }
  }
  const std::int64_t padded = (dims + 2 * kLanes - 1) / (2 * kLanes) * (2 * kLanes);
  const auto load = [dims](const T* row, std::int64_t c) SN_LAMBDA_INLINE {
    return c + kLanes <= dims ? f_load(row + c) : f_load_partial(row + c, c < dims ? static_cast<int>(dims - c) : 0);
  };
  const auto average = [&](float* out) {
    const F16 share = f_set1(1.0f / static_cast<float>(count));
    for (std::int64_t c = 0; c < padded; c += kLanes) {
      const F16 anchor = load(rows[0], c);
      F16 sum = f_zero();
      for (int i = 1; i < count; ++i) sum = f_add(sum, f_sub(load(rows[i], c), anchor));
      f_store(out + c, f_fma(sum, share, anchor));
    }
  };
  average(scratch);
  float sorted[kSampleRows];
  for (int i = 0; i < count; ++i) {
    F16 spread = f_zero();
    F16 square = f_zero();
    for (std::int64_t c = 0; c < padded; c += kLanes) {
      const F16 x = load(rows[i], c);
      const F16 t = f_sub(x, f_load(scratch + c));
      spread = f_fma(t, t, spread);
      square = f_fma(x, x, square);
    }
    float lanes[kLanes];
    f_store(lanes, spread);
    far[i] = tree_sum(lanes);
    f_store(lanes, square);
    size[i] = tree_sum(lanes);
  }
  const auto median = [&](const float* values) {
    for (int i = 0; i < count; ++i) {
      int j = i;
      for (; j > 0 && !(sorted[j - 1] <= values[i]); --j) sorted[j] = sorted[j - 1];
      sorted[j] = values[i];
    }
    return sorted[count / 2];
  };
  const float usual = median(far);
  const bool centre = sizeof(T) == sizeof(float) || usual < kWorthCentring * median(size);
  int kept = 0;
  for (int i = 0; i < count; ++i) {
    if (far[i] <= 4.0f * usual) rows[kept++] = rows[i];
  }
  count = kept;
  if (centre && count > 0) {
    average(mean);
  } else {
    for (std::int64_t c = 0; c < padded; ++c) mean[c] = 0.0f;
  }
  for (std::int64_t c = 0; c < padded; ++c) {
    if (c >= dims || !(__builtin_fabsf(mean[c]) <= kFloatMost)) mean[c] = 0.0f;  // any mean is right
  }
}

// ---- the copy -------------------------------------------------------------------------------------------------------

// 16 rows x 16 words to 16 words x 16 rows.
SN_FORCE_INLINE void transpose_words(const std::uint32_t (&rows)[kPanel][kLanes], std::uint32_t* out) {
#if defined(__AVX512F__)
  __m512i a[16];
  __m512i b[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) a[i] = _mm512_load_si512(rows[i]);
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) {
    b[2 * i] = _mm512_unpacklo_epi32(a[2 * i], a[2 * i + 1]);
    b[2 * i + 1] = _mm512_unpackhi_epi32(a[2 * i], a[2 * i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    a[4 * i + 0] = _mm512_unpacklo_epi64(b[4 * i + 0], b[4 * i + 2]);
    a[4 * i + 1] = _mm512_unpackhi_epi64(b[4 * i + 0], b[4 * i + 2]);
    a[4 * i + 2] = _mm512_unpacklo_epi64(b[4 * i + 1], b[4 * i + 3]);
    a[4 * i + 3] = _mm512_unpackhi_epi64(b[4 * i + 1], b[4 * i + 3]);
  }
  // a[4i + j], 128-bit group g: word 4g + j of rows 4i .. 4i + 3. Now gather the four i of each (g, j).
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {
    const __m512i lo01 = _mm512_shuffle_i32x4(a[j], a[4 + j], 0x44);  // groups 0, 1 of i = 0, 1
    const __m512i hi01 = _mm512_shuffle_i32x4(a[j], a[4 + j], 0xee);  // groups 2, 3
    const __m512i lo23 = _mm512_shuffle_i32x4(a[8 + j], a[12 + j], 0x44);
    const __m512i hi23 = _mm512_shuffle_i32x4(a[8 + j], a[12 + j], 0xee);
    _mm512_store_si512(out + (0 + j) * 16, _mm512_shuffle_i32x4(lo01, lo23, 0x88));
    _mm512_store_si512(out + (4 + j) * 16, _mm512_shuffle_i32x4(lo01, lo23, 0xdd));
    _mm512_store_si512(out + (8 + j) * 16, _mm512_shuffle_i32x4(hi01, hi23, 0x88));
    _mm512_store_si512(out + (12 + j) * 16, _mm512_shuffle_i32x4(hi01, hi23, 0xdd));
  }
#else
  for (int word = 0; word < kLanes; ++word) {
    for (int row = 0; row < kPanel; ++row) out[word * kPanel + row] = rows[row][word];
  }
#endif
}

// Rounds sixteen columns to bfloat16, to nearest even, subnormals to zero (a bfloat16 dot product flushes
// them). words: the upper halves, two columns a word. residual: what rounding left out, exact in float.
SN_FORCE_INLINE F16 round_columns(F16 t, std::uint32_t* words) {
#if defined(__AVX512F__)
  const __m512i bits = _mm512_castps_si512(t.v);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_and_si512(_mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd),
                                           _mm512_set1_epi32(static_cast<int>(0xffff0000u)));
  const __m512i kept = _mm512_maskz_mov_epi32(_mm512_test_epi32_mask(bits, _mm512_set1_epi32(0x7f800000)), rounded);
  const __m512i even_half = _mm512_and_si512(_mm512_srli_epi64(kept, 16), _mm512_set1_epi64(0xffff));
  const __m512i odd_half = _mm512_srli_epi64(kept, 32);  // its low half is zero already
  _mm256_store_si256(reinterpret_cast<__m256i*>(words), _mm512_cvtepi64_epi32(_mm512_or_si512(even_half, odd_half)));
  return {_mm512_sub_ps(t.v, _mm512_castsi512_ps(kept))};
#else
  alignas(64) std::uint32_t bits[kLanes];
  alignas(64) std::uint64_t both[kLanes / 2];
  static_assert(sizeof bits == sizeof both);
  f_store(reinterpret_cast<float*>(bits), t);
  for (int l = 0; l < kLanes; ++l) {
    const std::uint32_t rounded = (bits[l] + 0x7fffu + ((bits[l] >> 16) & 1u)) & 0xffff0000u;
    bits[l] = (bits[l] & 0x7f800000u) == 0 ? 0u : rounded;
  }
  const F16 residual = f_sub(t, f_load(reinterpret_cast<const float*>(bits)));
  std::memcpy(both, bits, sizeof bits);
  for (int l = 0; l < kLanes / 2; ++l) {
    words[l] = static_cast<std::uint32_t>((both[l] >> 16) & 0xffffu) |
               static_cast<std::uint32_t>((both[l] >> 32) & 0xffff0000u);
  }
  return residual;
#endif
}

// Packs panels [first, last). False if a row is not finite or too large to be screened.
template <class T>
bool pack(const Screen& screen, const ScreenSide& side, std::int64_t first, std::int64_t last) {
  bool usable = true;
  for (std::int64_t panel = first; panel < last; ++panel) {
    const T* rows[kPanel];
    F16 norm[kPanel];
    F16 residual[kPanel];
    for (int r = 0; r < kPanel; ++r) {
      const std::int64_t position = panel * kPanel + r;
      rows[r] = position < side.rows
                    ? static_cast<const T*>(side.features.data) + side.order[position] * side.features.row_stride
                    : nullptr;
      norm[r] = f_zero();
      residual[r] = f_zero();
    }
    std::uint32_t* out = side.packed + panel * screen.panel_stride;
    alignas(64) std::uint32_t words[kPanel][kLanes] = {};
    alignas(64) std::uint32_t turned[kLanes * kPanel];
    for (std::int64_t pair = 0; pair < screen.pairs; pair += kLanes) {
      for (int r = 0; r < kPanel; ++r) {
        if (rows[r] == nullptr) continue;
        for (int half = 0; half < 2; ++half) {
          const std::int64_t c = 2 * pair + half * kLanes;
          const std::int64_t left = screen.dims - c;
          const F16 x =
              left >= kLanes ? f_load(rows[r] + c) : f_load_partial(rows[r] + c, left > 0 ? static_cast<int>(left) : 0);
          const F16 t = f_sub(x, f_load(screen.mean + c));
          const F16 rest = round_columns(t, words[r] + half * (kLanes / 2));
          norm[r] = f_fma(t, t, norm[r]);
          residual[r] = f_fma(rest, rest, residual[r]);
        }
      }
      const std::int64_t count = screen.pairs - pair < kLanes ? screen.pairs - pair : kLanes;
      if (count == kLanes) {
        transpose_words(words, out + pair * kPanel);
      } else {
        transpose_words(words, turned);
        std::memcpy(out + pair * kPanel, turned, static_cast<std::size_t>(count * kPanel) * sizeof(std::uint32_t));
      }
    }
    for (int r = 0; r < kPanel; ++r) {
      float lanes[kLanes];
      f_store(lanes, norm[r]);
      side.norm[panel * kPanel + r] = tree_sum(lanes);
      usable = usable && side.norm[panel * kPanel + r] <= kFloatMost;
      f_store(lanes, residual[r]);
      side.residual[panel * kPanel + r] = tree_sum(lanes);
    }
  }
  return usable;
}

// ---- products -------------------------------------------------------------------------------------------------------

#if defined(__AVX512BF16__)

inline constexpr int kMicroRows = 8;
inline constexpr int kMicroColumns = 48;
inline constexpr std::int64_t kMicroDepth = kDepth;

// C[8][48] (+)= A[8][2n] . B[48][2n]^T on pairs: b0, b1, b2 are three panels of sixteen columns.
SN_FORCE_INLINE void micro_kernel(const std::uint32_t* a, const std::uint32_t* b0, const std::uint32_t* b1,
                                  const std::uint32_t* b2, std::int64_t n, bool first, float* c) {
  __m512 acc[kMicroRows][3];
#pragma GCC unroll 8
  for (int r = 0; r < kMicroRows; ++r) {
#pragma GCC unroll 3
    for (int v = 0; v < 3; ++v) {
      acc[r][v] = first ? _mm512_setzero_ps() : _mm512_load_ps(c + r * kTilePitch + v * kLanes);
    }
  }
  for (std::int64_t k = 0; k < n; ++k) {
    const __m512bh w0 = reinterpret_cast<__m512bh>(_mm512_load_si512(b0 + k * kPanel));
    const __m512bh w1 = reinterpret_cast<__m512bh>(_mm512_load_si512(b1 + k * kPanel));
    const __m512bh w2 = reinterpret_cast<__m512bh>(_mm512_load_si512(b2 + k * kPanel));
#pragma GCC unroll 8
    for (int r = 0; r < kMicroRows; ++r) {
      const __m512bh x = reinterpret_cast<__m512bh>(_mm512_set1_epi32(static_cast<int>(a[k * kPanel + r])));
      acc[r][0] = _mm512_dpbf16_ps(acc[r][0], x, w0);
      acc[r][1] = _mm512_dpbf16_ps(acc[r][1], x, w1);
      acc[r][2] = _mm512_dpbf16_ps(acc[r][2], x, w2);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kMicroRows; ++r) {
#pragma GCC unroll 3
    for (int v = 0; v < 3; ++v) _mm512_store_ps(c + r * kTilePitch + v * kLanes, acc[r][v]);
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

// a[r]: column of anchor r in its widened panel, stride 16.
SN_FORCE_INLINE void micro_kernel(const float* const (&a)[kMicroRows], const float* b, std::int64_t n, bool first,
                                  float* c) {
  constexpr int kVectors = kMicroColumns / kLanes;
#if defined(__AVX512F__) || defined(__AVX2__)
  F16 acc[kMicroRows][kVectors];
#pragma GCC unroll 8
  for (int r = 0; r < kMicroRows; ++r) {
#pragma GCC unroll 3
    for (int v = 0; v < kVectors; ++v) acc[r][v] = first ? f_zero() : f_load(c + r * kTilePitch + v * kLanes);
  }
  for (std::int64_t k = 0; k < n; ++k) {
    F16 w[kVectors];
#pragma GCC unroll 3
    for (int v = 0; v < kVectors; ++v) w[v] = f_load(b + k * kMicroColumns + v * kLanes);
#pragma GCC unroll 8
    for (int r = 0; r < kMicroRows; ++r) {
      const F16 x = f_set1(a[r][k * kPanel]);
#pragma GCC unroll 3
      for (int v = 0; v < kVectors; ++v) acc[r][v] = f_fma(x, w[v], acc[r][v]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kMicroRows; ++r) {
#pragma GCC unroll 3
    for (int v = 0; v < kVectors; ++v) f_store(c + r * kTilePitch + v * kLanes, acc[r][v]);
  }
#else
  // Products of bfloat16 values are exact in float, so multiply and add round as a fused multiply-add would.
  static_assert(kVectors == 1);
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

// `pairs` words a row of one panel to floats [2 pairs][stride].
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
static_assert(kMicroColumns % kPanel == 0);

// Fetches the panels of one depth of a tile into the second-level cache, a few lines at a time: the copy is larger than
// that cache, and hardware does not follow it from panel to panel.
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

// products[r * kTilePitch + c] = A_(row + r) . A_(column + c). Micro-tiles without a wanted pair stay unwritten.
// next: the tile that this worker is likely to get then.
inline void tile_products(const Screen& screen, const Tile& tile, const Tile& next, float* products,
                          [[maybe_unused]] float* wide) {
  const std::int64_t depth_pairs = kMicroDepth / 2;
  const std::int64_t panel_words = screen.panel_stride;
  const std::uint32_t* anchors = screen.anchors.packed + tile.row / kPanel * panel_words;
  const std::uint32_t* candidates = screen.candidates.packed + tile.column / kPanel * panel_words;
  const auto pairs_at = [&](std::int64_t pair) {
    return screen.pairs - pair < depth_pairs ? screen.pairs - pair : depth_pairs;
  };
  // So many lines a micro-kernel that a depth is fetched while the one before it is used.
  const std::int64_t micro_tiles = (tile.rows / kMicroRows) * (tile.columns / kMicroColumns);
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
    for (std::int64_t panel = 0; panel < tile.rows / kPanel; ++panel) {
      widen(anchors + panel * panel_words + pair * kPanel, n, wide_anchors + panel * kPanel * kMicroDepth, kPanel);
    }
#endif
    for (std::int64_t column = 0; column < tile.columns; column += kMicroColumns) {
      const std::uint32_t* b = candidates + column / kPanel * panel_words + pair * kPanel;
#if !defined(__AVX512BF16__)
      for (std::int64_t panel = 0; panel < kMicroColumns / kPanel; ++panel) {
        widen(b + panel * panel_words, n, wide_candidates + panel * kPanel, kMicroColumns);
      }
#endif
      for (std::int64_t row = 0; row < tile.rows; row += kMicroRows) {
        if (tile.diagonal && column + kMicroColumns - 1 <= row) break;
        prefetch.lines(lines);
        float* c = products + row * kTilePitch + column;
#if defined(__AVX512BF16__)
        const std::uint32_t* a = anchors + row / kPanel * panel_words + pair * kPanel + row % kPanel;
        micro_kernel(a, b, b + panel_words, b + 2 * panel_words, n, first, c);
#else
        const float* a[kMicroRows];
        for (int r = 0; r < kMicroRows; ++r) {
          a[r] = wide_anchors + (row + r) / kPanel * (kPanel * kMicroDepth) + (row + r) % kPanel;
        }
        micro_kernel(a, wide_candidates, 2 * n, first, c);
#endif
      }
    }
  }
}

// ---- lists ----------------------------------------------------------------------------------------------------------

// An upper bound of the `wanted`-th smallest of `count` finite values, by bisection of their range. `values`
// has room up to a whole vector; what is there is overwritten.
SN_FORCE_INLINE float rank_bound(float* values, std::int64_t count, std::int64_t wanted) {
  constexpr int kSteps = 16;  // tight to 2^-16 of the range: beyond that nothing is dropped any more
  float lo = values[0];
  float hi = values[0];
#if defined(__AVX512F__)
  __m512 least = _mm512_set1_ps(lo);
  __m512 most = least;
  for (std::int64_t e = count; e % kLanes != 0; ++e) values[e] = lo;
  for (std::int64_t e = 0; e < count; e += kLanes) {
    least = _mm512_min_ps(least, _mm512_load_ps(values + e));
    most = _mm512_max_ps(most, _mm512_load_ps(values + e));
  }
  lo = _mm512_reduce_min_ps(least);
  hi = _mm512_reduce_max_ps(most);
  for (std::int64_t e = count; e % kLanes != 0; ++e) values[e] = kFloatMost;
#else
  for (std::int64_t e = 1; e < count; ++e) {
    lo = values[e] < lo ? values[e] : lo;
    hi = values[e] > hi ? values[e] : hi;
  }
#endif
  for (int step = 0; step < kSteps; ++step) {
    const float middle = 0.5f * lo + 0.5f * hi;
#if defined(__AVX512F__)
    std::int64_t below = 0;
    for (std::int64_t e = 0; e < count; e += kLanes) {
      below += __builtin_popcount(_mm512_cmp_ps_mask(_mm512_load_ps(values + e), _mm512_set1_ps(middle), _CMP_LE_OQ));
    }
#else
    std::int32_t below = 0;
    for (std::int64_t e = 0; e < count; ++e) below += values[e] <= middle ? 1 : 0;
#endif
    if (below >= wanted) {
      hi = middle;
      if (below == wanted) break;
    } else {
      lo = middle;
    }
  }
  return hi;
}

// Hits between prunings: a stale threshold lets more candidates in, each a cache miss; a pruning costs some
// fifteen.
inline constexpr std::int32_t kPruneAfter = 32;

// In the scale of w + E_q: the upper bound of a distance that is known.
SN_FORCE_INLINE float settled_upper(const Screen& screen, std::int64_t p, float d2) {
  return 0.5f * (d2 - (screen.anchors.norm[p] + screen.anchors.slack[p]));
}

__attribute__((noinline)) void prune(const Screen& screen, std::int64_t p) {
  Entry* entries = screen.lists + p * screen.capacity;
  const std::int64_t count = screen.list_counts[p];
  if (count == 0 || count < screen.K) return;
  const std::int64_t settled = screen.settled_counts[p];
  alignas(64) float upper[kListMost];
  for (std::int64_t e = 0; e < settled; ++e) upper[e] = settled_upper(screen, p, entries[e].score);
  for (std::int64_t e = settled; e < count; ++e) {
    upper[e] = entries[e].score + screen.candidates.slack[entries[e].candidate];
  }
  const float bound = rank_bound(upper, count, screen.K) + screen.anchors.slack[p];
  if (bound < screen.thresholds[p]) screen.thresholds[p] = bound;
  const float threshold = screen.thresholds[p];
  std::int64_t kept = settled;
#if defined(__AVX512F__)
  // Eight entries at a time, each one 64-bit lane with its score in the upper half.
  static_assert(sizeof(Entry) == sizeof(std::uint64_t));
  for (std::int64_t e = settled; e < count; e += 8) {
    const std::uint32_t in_list = count - e < 8 ? (1u << (count - e)) - 1u : 0xffu;
    const __m512i eight = _mm512_maskz_loadu_epi64(static_cast<__mmask8>(in_list), entries + e);
    const std::uint32_t low = _mm512_cmp_ps_mask(_mm512_castsi512_ps(eight), _mm512_set1_ps(threshold), _CMP_LE_OQ);
    const std::uint32_t keep = _pext_u32(low, 0xaaaau) & in_list;
    if (keep == 0) continue;
    const int some = __builtin_popcount(keep);
    _mm512_mask_storeu_epi64(entries + kept, static_cast<__mmask8>((1u << some) - 1u),
                             _mm512_maskz_compress_epi64(static_cast<__mmask8>(keep), eight));
    kept += some;
  }
#else
  for (std::int64_t e = settled; e < count; ++e) {
    const Entry entry = entries[e];
    entries[kept] = entry;
    kept += entry.score <= threshold ? 1 : 0;
  }
#endif
  screen.list_counts[p] = static_cast<std::int32_t>(kept);
  screen.list_limits[p] =
      static_cast<std::int32_t>(kept + kPruneAfter < screen.capacity ? kept + kPruneAfter : screen.capacity);
}

template <class T>
SN_FORCE_INLINE void direct_list_of(const Screen& screen, std::int64_t p, const Entry* entries, std::int64_t count,
                                    float* d2) {
  const FeatureView& anchors = screen.anchors.features;
  direct_list<T>(static_cast<const T*>(anchors.data) + screen.anchors.order[p] * anchors.row_stride,
                 screen.candidates.features, screen.candidates.order, entries, count, screen.dims, d2);
}

// A candidate whose distance is known joins the settled front of the list, in order, if it is among the K
// nearest settled so far. There is room: settle() leaves it, and dense blocks see to it.
SN_FORCE_INLINE void insert_settled(const Screen& screen, std::int64_t p, std::int64_t candidate, float d2) {
  Entry* entries = screen.lists + p * screen.capacity;
  const std::int32_t* order = screen.candidates.order;
  const std::uint64_t key = pack_key(d2, order[candidate]);
  const auto key_at = [&](std::int64_t e)
                          SN_LAMBDA_INLINE { return pack_key(entries[e].score, order[entries[e].candidate]); };
  std::int64_t at = screen.settled_counts[p];
  if (at == screen.K) {
    if (key > key_at(--at)) return;
  } else {
    entries[screen.list_counts[p]++] = entries[at];  // the first of the others moves to the end
    ++screen.settled_counts[p];
  }
  for (; at > 0 && key_at(at - 1) > key; --at) entries[at] = entries[at - 1];
  entries[at] = {static_cast<std::int32_t>(candidate), d2};
  if (screen.settled_counts[p] == screen.K) {
    const float bound = settled_upper(screen, p, entries[screen.K - 1].score) + screen.anchors.slack[p];
    if (bound < screen.thresholds[p]) screen.thresholds[p] = bound;
  }
}

// A full list that bounds cannot shorten (a cluster tighter than the screening resolves): look at the
// distances now.
template <class T>
void settle(const Screen& screen, std::int64_t p) {
  Entry* entries = screen.lists + p * screen.capacity;
  const std::int64_t settled = screen.settled_counts[p];
  const std::int64_t count = screen.list_counts[p] - settled;
  Entry open[kListMost];
  float d2[kListMost];
  for (std::int64_t e = 0; e < count; ++e) open[e] = entries[settled + e];
  direct_list_of<T>(screen, p, open, count, d2);
  screen.list_counts[p] = static_cast<std::int32_t>(settled);
  for (std::int64_t e = 0; e < count; ++e) insert_settled(screen, p, open[e].candidate, d2[e]);
  screen.list_limits[p] = static_cast<std::int32_t>(screen.capacity);
}

inline void settle_any(const Screen& screen, std::int64_t p) {
  switch (screen.dtype) {
    case DType::kFloat32:
      return settle<float>(screen, p);
    case DType::kFloat16:
      return settle<Half>(screen, p);
    case DType::kBFloat16:
      return settle<BFloat16>(screen, p);
    case DType::kFloat64:
      break;  // never screened
  }
}

// A list with less room than this after pruning is settled at once: pruning again and again would cost more.
inline constexpr std::int64_t kLeastRoom = 2 * kListSlack;

__attribute__((noinline)) void make_room(const Screen& screen, std::int64_t p) {
  prune(screen, p);
  if (screen.list_counts[p] > screen.capacity - kLeastRoom) settle_any(screen, p);
}

SN_FORCE_INLINE void append(const Screen& screen, std::int64_t p, std::int64_t candidate, float score) {
  if (score > screen.thresholds[p]) return;  // the threshold moved since the hit was found
  if (__builtin_expect(screen.list_counts[p] >= screen.list_limits[p], 0)) {
    make_room(screen, p);
    if (score > screen.thresholds[p]) return;
  }
  screen.lists[p * screen.capacity + screen.list_counts[p]++] = {static_cast<std::int32_t>(candidate), score};
}

// Sixteen products of one anchor: which of the pairs may matter to the anchor, which to the candidates?
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

// A block of a tile whose pairs the bounds cannot tell apart, for anchors that had to settle before: its
// direct distances are cheaper together, and for both sides, than list by list. From this many such pairs on.
inline constexpr int kDenseFrom = kDirectBlock * kDirectBlock / 8;

template <bool kSymmetric>
void settle_block(const Screen& screen, std::int64_t row, std::int64_t rows, std::int64_t column,
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
    if (screen.settled_counts[p] < screen.K) {
      if (screen.list_counts[p] == screen.capacity) settle_any(screen, p);
    } else if (value > screen.lists[p * screen.capacity + screen.K - 1].score) {
      return;
    }
    insert_settled(screen, p, candidate, value);
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
  static_assert(kTileSmall % kDirectBlock == 0 && kTileLarge % kDirectBlock == 0 && kTileGrain % kLanes == 0);
  const std::int64_t tile_rows =
      tile.row + tile.rows < screen.anchors.rows ? tile.rows : screen.anchors.rows - tile.row;
  for (std::int64_t r0 = 0; r0 < tile_rows; r0 += kDirectBlock) {
    const std::int64_t rows = tile_rows - r0 < kDirectBlock ? tile_rows - r0 : kDirectBlock;
    for (std::int64_t c0 = tile.diagonal ? r0 : 0; c0 < tile.columns; c0 += kDirectBlock) {
      const std::int64_t columns = tile.columns - c0 < kDirectBlock ? tile.columns - c0 : kDirectBlock;
      const std::int64_t column = tile.column + c0;
      // Vectors with a hit, found without a branch: most have none, and which have is anybody's guess.
      struct Found {
        std::int32_t row;
        std::int32_t first;  // column of the first lane
        Hits hits;
      };
      Found found[kDirectBlock * kVectors + 1];
      int count = 0;
      int unsettled_pairs = 0;
      for (std::int64_t r = 0; r < rows; ++r) {
        const std::int64_t p = tile.row + r0 + r;
        const int before = count;
        for (std::int64_t c = 0; c < columns; c += kLanes) {
          Hits hits = find_hits<kSymmetric>(tile_products + (r0 + r) * kTilePitch + c0 + c, screen.bias + column + c,
                                            screen.thresholds[p], kSymmetric ? screen.bias[p] : 0.0f,
                                            kSymmetric ? screen.thresholds + column + c : nullptr);
          if (tile.diagonal && r0 == c0) {  // only columns behind the row: lanes above r
            const std::int64_t first = r + 1 - c;
            const std::uint32_t behind = first >= kLanes ? 0u : 0xffffu & ~((1u << (first > 0 ? first : 0)) - 1u);
            hits.anchor &= behind;
            hits.candidates &= behind;
          }
          found[count] = {static_cast<std::int32_t>(r), static_cast<std::int32_t>(c), hits};
          count += (hits.anchor | hits.candidates) != 0 ? 1 : 0;
        }
        if (screen.settled_counts[p] == 0) continue;
        for (int f = before; f < count; ++f) unsettled_pairs += __builtin_popcount(found[f].hits.anchor);
      }
      if (unsettled_pairs >= kDenseFrom) {
        settle_block<kSymmetric>(screen, tile.row + r0, rows, column, columns);
        continue;
      }
      for (int f = 0; f < count; ++f) {
        const std::int64_t p = tile.row + r0 + found[f].row;
        const std::int64_t first = column + found[f].first;
        const float* products = tile_products + (r0 + found[f].row) * kTilePitch + c0 + found[f].first;
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

// ---- refinement -----------------------------------------------------------------------------------------------------

template <class T>
void refine_rows(const Screen& screen, std::int64_t p) {
  float d2[kListMost];
  const std::int64_t count = screen.list_counts[p];
  Entry* entries = screen.lists + p * screen.capacity;
  direct_list_of<T>(screen, p, entries, count, d2);
  for (std::int64_t e = 0; e < count; ++e) entries[e].score = d2[e];
}

inline void refine_columns(const Screen& screen, const float* anchor_columns, const float* candidate_columns,
                           std::int64_t p) {
  refine_segment(anchor_columns + p * kSegment, candidate_columns, screen.lists + p * screen.capacity,
                 screen.list_counts[p]);
}

// Rows [begin, end) of `order` (or of the features themselves), columns [column, column + columns), as fp32
// with zeros up to `pitch`.
inline constexpr std::int64_t kAhead = 8;
template <class T>
void gather_columns(const FeatureView& features, const std::int32_t* order, std::int64_t begin, std::int64_t end,
                    std::int64_t column, std::int64_t columns, std::int64_t pitch, float* out) {
  for (std::int64_t r = begin; r < end; ++r) {
    const T* row = static_cast<const T*>(features.data) + (order ? order[r] : r) * features.row_stride + column;
    if (r + kAhead < end) {  // rows lie far apart, where no hardware prefetcher follows
      const T* later = static_cast<const T*>(features.data) +
                       (order ? order[r + kAhead] : r + kAhead) * features.row_stride + column;
      for (std::int64_t c = 0; c < columns; c += 64 / static_cast<std::int64_t>(sizeof(T)))
        __builtin_prefetch(later + c);
    }
    float* to = out + r * pitch;
    std::int64_t c = 0;
    for (; c + kLanes <= columns; c += kLanes) f_store(to + c, f_load(row + c));
    if (c < columns) {
      f_store(to + c, f_load_partial(row + c, static_cast<int>(columns - c)));
      c += kLanes;
    }
    for (; c < pitch; c += kLanes) f_store(to + c, f_zero());
  }
}
