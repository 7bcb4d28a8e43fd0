// Screening: products of blocks of the copy. Included by kernels.cpp alone, inside its namespace.
#pragma once

// Sixteen 32-bit sums. i_dot adds to each the products of two 16-bit integers: `pair` holds those of an anchor, `words`
// those of sixteen candidates, a word each. Whole sums of rows fit in 32 bits: pack.h sees to it, of 8-bit integers
// plan.cpp. Those of forms (forms.h) wrap around on the way. Of the same instructions as intrinsics GCC 12 keeps the
// sums on the stack.
#if defined(__AVX512F__)

inline constexpr int kMicroRows = 8;
inline constexpr int kMicroColumns = 48;
#if defined(__AVX512VNNI__)
inline constexpr std::int64_t kDepthWords = 512;  // of the copy that a micro-kernel multiplies at a time
inline constexpr bool kPrefetches = false;
#else
inline constexpr std::int64_t kDepthWords = 128;
inline constexpr bool kPrefetches = true;
#endif
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
SN_FORCE_INLINE I16 i_add(I16 a, I16 b) {
  return _mm512_add_epi32(a, b);
}
SN_FORCE_INLINE I16 i_add_pairs(I16 a, I16 b) {
  return _mm512_add_epi16(a, b);
}
SN_FORCE_INLINE I16 i_sub_pairs(I16 a, I16 b) {
  return _mm512_sub_epi16(a, b);
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
inline constexpr std::int64_t kDepthWords = 128;
inline constexpr bool kPrefetches = true;
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
SN_FORCE_INLINE I16 i_add(I16 a, I16 b) {
  return {_mm256_add_epi32(a.lo, b.lo), _mm256_add_epi32(a.hi, b.hi)};
}
SN_FORCE_INLINE I16 i_add_pairs(I16 a, I16 b) {
  return {_mm256_add_epi16(a.lo, b.lo), _mm256_add_epi16(a.hi, b.hi)};
}
SN_FORCE_INLINE I16 i_sub_pairs(I16 a, I16 b) {
  return {_mm256_sub_epi16(a.lo, b.lo), _mm256_sub_epi16(a.hi, b.hi)};
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
inline constexpr std::int64_t kDepthWords = 128;
inline constexpr bool kPrefetches = true;
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
// Sums wrap around, as those of vectors do.
SN_FORCE_INLINE std::int32_t wrapping_sum(std::int32_t a, std::int32_t b) {
  return static_cast<std::int32_t>(static_cast<std::uint32_t>(a) + static_cast<std::uint32_t>(b));
}
SN_FORCE_INLINE I16 i_add(I16 a, I16 b) {
  for (int l = 0; l < kLanes; ++l) a.v[l] = wrapping_sum(a.v[l], b.v[l]);
  return a;
}
SN_FORCE_INLINE I16 i_pairs(I16 a, I16 b, std::uint32_t sign) {
  for (int l = 0; l < kLanes; ++l) {
    const auto x = static_cast<std::uint32_t>(a.v[l]);
    const auto y = static_cast<std::uint32_t>(b.v[l]);
    a.v[l] = static_cast<std::int32_t>(((x + sign * y) & 0xffffu) | (((x >> 16) + sign * (y >> 16)) << 16));
  }
  return a;
}
SN_FORCE_INLINE I16 i_add_pairs(I16 a, I16 b) {
  return i_pairs(a, b, 1u);
}
SN_FORCE_INLINE I16 i_sub_pairs(I16 a, I16 b) {
  return i_pairs(a, b, ~0u);
}
SN_FORCE_INLINE I16 i_dot(I16 acc, I16 pair, I16 words) {
  for (int l = 0; l < kLanes; ++l) {
    const std::int32_t low =
        static_cast<std::int16_t>(pair.v[l] & 0xffff) * static_cast<std::int16_t>(words.v[l] & 0xffff);
    acc.v[l] = wrapping_sum(acc.v[l], wrapping_sum(low, (pair.v[l] >> 16) * (words.v[l] >> 16)));
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

// A block of products: the copy's words of its anchors and candidates, whose panels are `stride` words apart.
struct Block {
  const std::uint32_t* anchors;
  std::int64_t anchor_stride;
  const std::uint32_t* candidates;
  std::int64_t candidate_stride;
  std::int64_t rows, columns;  // multiples of kPanel
  std::int64_t words;
};

// Sums of a block, integers; `pitch` apart.
struct Sums {
  std::int32_t* at;
  std::int64_t pitch;
  Sums from(std::int64_t row, std::int64_t column) const { return {at + row * pitch + column, pitch}; }
};

// What the sums of a row's 8-bit products start at, and the scales that whole sums are multiplied by, or null.
struct Ends {
  const std::int32_t* starts;
  const float* row_scales;
  const float* column_scales;
};

// C[R][16 V] = sums + A[R][2n] . B[16 V][2n]^T, of 8-bit integers [4n]. b: V panels of sixteen columns, `stride` words
// apart. C is sums of integers; with scales it becomes floats.
template <bool kBytes, int R, int V>
SN_FORCE_INLINE void micro_kernel(const std::uint32_t* const (&a)[R], const std::uint32_t* b, std::int64_t stride,
                                  std::int64_t n, Sums sums, Ends ends, Sums c) {
  I16 acc[R][V];
  if (sums.at != nullptr) {
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 3
      for (int v = 0; v < V; ++v) acc[r][v] = i_load(sums.at + r * sums.pitch + v * kLanes);
    }
  } else {
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const I16 start = i_set1(kBytes ? static_cast<std::uint32_t>(ends.starts[r]) : 0u);
#pragma GCC unroll 3
      for (int v = 0; v < V; ++v) acc[r][v] = start;
    }
  }
  for (std::int64_t k = 0; k < n; ++k) {
    I16 w[V];
#pragma GCC unroll 3
    for (int v = 0; v < V; ++v) w[v] = candidate_words<kBytes>(b + v * stride + k * kPanel);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const I16 x = i_set1(a[r][k * kPanel]);
#pragma GCC unroll 3
      for (int v = 0; v < V; ++v) acc[r][v] = word_products<kBytes>(acc[r][v], x, w[v]);
    }
  }
  if (ends.row_scales == nullptr) {
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 3
      for (int v = 0; v < V; ++v) i_store(c.at + r * c.pitch + v * kLanes, acc[r][v]);
    }
    return;
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 3
    for (int v = 0; v < V; ++v) {
      const F16 scale = f_mul(f_set1(ends.row_scales[r]), f_load(ends.column_scales + v * kLanes));
      f_store(reinterpret_cast<float*>(c.at + r * c.pitch + v * kLanes), i_scaled(acc[r][v], scale));
    }
  }
}

static_assert(kMicroColumns % kPanel == 0 && kMicroColumns <= 3 * kPanel);
static_assert(kPanel % kMicroRows == 0 || kMicroRows == 6, "of even rows 4 or 2 may be left");

// Calls kernel.template operator()<R, V>() for `rows`, kMicroRows or what is left of a panel of them, and `vectors` of
// 1 to kMicroColumns / 16.
template <int R, class Kernel>
SN_FORCE_INLINE void with_vectors(std::int64_t vectors, const Kernel& kernel) {
  constexpr int kMost = kMicroColumns / kLanes;
  if (vectors == kMost) return kernel.template operator()<R, kMost>();
  if constexpr (kMost > 1) {
    if (vectors == 2) return kernel.template operator()<R, 2>();
    kernel.template operator()<R, 1>();
  }
}
template <class Kernel>
SN_FORCE_INLINE void with_shape(std::int64_t rows, std::int64_t vectors, const Kernel& kernel) {
  if (rows >= kMicroRows) return with_vectors<kMicroRows>(vectors, kernel);
  if constexpr (kPanel % kMicroRows != 0) {
    if (rows == 4) return with_vectors<4>(vectors, kernel);
    with_vectors<2>(vectors, kernel);
  }
}

// Prefetches the panels of one depth of a tile into the second-level cache, a few lines at a time. The copy is larger
// than that cache, and hardware does not follow it from panel to panel. With VNNI depths are long, and it does.
class DepthPrefetch {
 public:
  DepthPrefetch() = default;
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
  const std::uint32_t* anchors_ = nullptr;
  const std::uint32_t* candidates_ = nullptr;
  std::int64_t stride_ = 0;
  std::int64_t anchor_panels_ = 0;
  std::int64_t panels_ = 0;
  std::int64_t pairs_ = 0;
  std::int64_t panel_ = 0;
  std::int64_t at_ = 0;
};

struct NoPrefetch {
  void depth(std::int64_t, std::int64_t) {}
  SN_FORCE_INLINE void lines() {}
};
class TilePrefetch {
 public:
  TilePrefetch(const Screen& screen, const Tile& tile, const Tile& next) : screen_(screen), tile_(tile), next_(next) {
    // Lines per micro-kernel, so that one depth is fetched while the one before it is used.
    const std::int64_t micro_tiles =
        ((tile.rows + kMicroRows - 1) / kMicroRows) * ((tile.columns + kMicroColumns - 1) / kMicroColumns);
    const std::int64_t depth_lines = (tile.rows + tile.columns) / kPanel * kDepthWords;
    lines_ = static_cast<int>((depth_lines + micro_tiles - 1) / micro_tiles);
  }
  // While `words` of the tile from `word` on are multiplied.
  void depth(std::int64_t word, std::int64_t words) {
    const auto words_at = [this](std::int64_t at) {
      return screen_.words - at < kDepthWords ? screen_.words - at : kDepthWords;
    };
    const std::int64_t after = word + words;
    ahead_ = after >= screen_.words ? DepthPrefetch(screen_, next_, 0, words_at(0))
                                    : DepthPrefetch(screen_, tile_, after, words_at(after));
  }
  SN_FORCE_INLINE void lines() { ahead_.lines(lines_); }

 private:
  const Screen& screen_;
  const Tile& tile_;
  const Tile& next_;
  int lines_;
  DepthPrefetch ahead_;
};

// c = sums + the products of a block, without sums where they are null. On the diagonal, where the candidates are the
// anchors, vectors of which no pair is wanted stay as they are.
template <bool kBytes, class Prefetch>
void multiply_block(const Block& block, bool diagonal, Sums sums, Ends ends, Sums c, Prefetch prefetch) {
  for (std::int64_t word = 0; word < block.words; word += kDepthWords) {
    const std::int64_t n = block.words - word < kDepthWords ? block.words - word : kDepthWords;
    const bool last = word + n >= block.words;
    prefetch.depth(word, n);
    for (std::int64_t column = 0; column < block.columns; column += kMicroColumns) {
      const std::uint32_t* b = block.candidates + column / kPanel * block.candidate_stride + word * kPanel;
      const std::int64_t vectors =
          (block.columns - column < kMicroColumns ? block.columns - column : kMicroColumns) / kPanel;
      for (std::int64_t row = 0; row < block.rows; row += kMicroRows) {
        // On the diagonal a row wants columns behind it.
        const std::int64_t skipped = diagonal && row + 1 > column ? (row + 1 - column) / kPanel : 0;
        if (skipped >= vectors) break;
        prefetch.lines();
        const std::int64_t at = column + skipped * kPanel;
        with_shape(block.rows - row, vectors - skipped, [&]<int R, int V>() SN_LAMBDA_INLINE {
          const std::uint32_t* a[R];
          for (int r = 0; r < R; ++r) {
            a[r] = block.anchors + (row + r) / kPanel * block.anchor_stride + word * kPanel + (row + r) % kPanel;
          }
          const bool begun = word > 0 || sums.at != nullptr;
          const Ends own{kBytes ? ends.starts + row : nullptr,
                         last && ends.row_scales != nullptr ? ends.row_scales + row : nullptr,
                         last && ends.row_scales != nullptr ? ends.column_scales + at : nullptr};
          micro_kernel<kBytes, R, V>(a, b + skipped * block.candidate_stride, block.candidate_stride, n,
                                     begun ? sums.from(row, at) : Sums{nullptr, 0}, own, c.from(row, at));
        });
      }
    }
    sums = c;
  }
}
