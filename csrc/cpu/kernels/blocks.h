// Blocks of direct distances: the summation order of direct.h with candidates across the lanes of a vector.
//
// The features are copied into panels of sixteen interleaved rows. Lane l of the order is then a vector of its own, so
// that the tree adds whole vectors and shuffles nothing: on Zen 4 sixteen pairs of a segment take 80 cycles, 102 with
// lanes along the columns. Included by kernels.cpp alone, inside its namespace.
#pragma once

inline constexpr int kBlockRows = 4;  // anchors that meet a panel at a time
static_assert(kPanel == kLanes, "a vector of a panel has one value of each candidate");
static_assert(kPanel % (2 * kBlockRows) == 0, "half of a panel is whole groups");

// Transposes 16 x 16 words.
SN_FORCE_INLINE void transpose_words(const std::uint32_t* const (&rows)[kPanel], std::uint32_t* out) {
#if defined(__AVX512F__)
  __m512i a[16];
  __m512i b[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) a[i] = _mm512_loadu_si512(rows[i]);
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
  // a[4i + j], 128-bit group g: word 4g + j of rows 4i .. 4i + 3. Now gathers the four i of each (g, j).
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
#elif defined(__AVX2__)
  // Four 8 x 8 squares.
  for (int square = 0; square < 4; ++square) {
    const int row = square / 2 * 8;
    const int word = square % 2 * 8;
    __m256 a[8];
    __m256 b[8];
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) a[i] = _mm256_loadu_ps(reinterpret_cast<const float*>(rows[row + i] + word));
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      b[2 * i] = _mm256_unpacklo_ps(a[2 * i], a[2 * i + 1]);
      b[2 * i + 1] = _mm256_unpackhi_ps(a[2 * i], a[2 * i + 1]);
    }
#pragma GCC unroll 2
    for (int i = 0; i < 2; ++i) {
      a[4 * i + 0] = _mm256_shuffle_ps(b[4 * i], b[4 * i + 2], 0x44);
      a[4 * i + 1] = _mm256_shuffle_ps(b[4 * i], b[4 * i + 2], 0xee);
      a[4 * i + 2] = _mm256_shuffle_ps(b[4 * i + 1], b[4 * i + 3], 0x44);
      a[4 * i + 3] = _mm256_shuffle_ps(b[4 * i + 1], b[4 * i + 3], 0xee);
    }
    float* to = reinterpret_cast<float*>(out) + word * kPanel + row;
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      _mm256_store_ps(to + j * kPanel, _mm256_permute2f128_ps(a[j], a[4 + j], 0x20));
      _mm256_store_ps(to + (4 + j) * kPanel, _mm256_permute2f128_ps(a[j], a[4 + j], 0x31));
    }
  }
#else
  for (int word = 0; word < kLanes; ++word) {
    for (int row = 0; row < kPanel; ++row) out[word * kPanel + row] = rows[row][word];
  }
#endif
}

// Nodes of the tree that are computed one after the other, from the leaves. With AVX-512 registers hold four leaves at
// a time, and half of the additions are multiply-adds by one: differences take the adders already.
inline constexpr int kNodes = kGroups ? kLanes / 4 : kLanes / 2;

// Lane l of the order, sixteen candidates at a time: the sum of its elements, for kBlockRows anchors. `z`: the panel.
template <class V>
SN_FORCE_INLINE void add_lane(const float* x, const float* z, int l, V (&acc)[kBlockRows]) {
#pragma GCC unroll 4
  for (int t = 0; t < kSteps; ++t) {
    const V candidates = V::load(z + (t * kLanes + l) * kPanel);
    const auto difference = [&](int a) SN_LAMBDA_INLINE {
      // In this order the scalar is an operand in memory with AVX-512. The square is the same.
      return V::sub(candidates, V::set1(x + (t * kLanes + l) * kPanel + a));
    };
    const auto add_square = [&](int a, V d) SN_LAMBDA_INLINE { acc[a] = V::fma(d, d, t == 0 ? V::zero() : acc[a]); };
    if constexpr (kGroups) {
      V d[kBlockRows] = {difference(0), difference(1), difference(2), difference(3)};
      V::group(d);
#pragma GCC unroll 4
      for (int a = 0; a < kBlockRows; ++a) add_square(a, d[a]);
    } else {
#pragma GCC unroll 4
      for (int a = 0; a < kBlockRows; ++a) add_square(a, difference(a));
    }
  }
}

// The sum of lanes l, l + kStep, l + 2 kStep, ... as the tree adds them.
template <int kStep, class V>
SN_FORCE_INLINE void add_lanes(const float* x, const float* z, int l, V (&sums)[kBlockRows]) {
  if constexpr (kStep == kLanes) {
    add_lane<V>(x, z, l, sums);
  } else {
    constexpr float kUnit = 1.0f;
    const V one = V::set1(&kUnit);
    V others[kBlockRows];
    add_lanes<2 * kStep>(x, z, l, sums);
    add_lanes<2 * kStep>(x, z, l + kStep, others);
#pragma GCC unroll 4
    for (int a = 0; a < kBlockRows; ++a) {
      sums[a] = kGroups && kStep > kNodes ? V::fma(sums[a], one, others[a]) : V::add(sums[a], others[a]);
    }
  }
}

// totals[a] += the segment sums of anchor a and the candidates of a panel.
template <class V>
SN_FORCE_INLINE void add_panel(const float* x, const float* z, float* totals) {
  V sums[kNodes][kBlockRows];
#pragma GCC unroll 1
  for (int l = 0; l < kNodes; ++l) add_lanes<kNodes>(x, z, l, sums[l]);
#pragma GCC unroll 4
  for (int a = 0; a < kBlockRows; ++a) {
    V fours[4];
#pragma GCC unroll 4
    for (int l = 0; l < 4; ++l) fours[l] = kNodes == 4 ? sums[l][a] : V::add(sums[l][a], sums[l + kNodes / 2][a]);
    const V sum = V::add(V::add(fours[0], fours[2]), V::add(fours[1], fours[3]));
    V::store(totals + a * kPanel, V::add(V::load(totals + a * kPanel), sum));
  }
}

// A panel's candidates, all or the second half of them.
struct AllOfPanel {
  static constexpr int kFirst = 0;
  F16 v;
  static SN_FORCE_INLINE AllOfPanel zero() { return {f_zero()}; }
  static SN_FORCE_INLINE AllOfPanel set1(const float* x) { return {f_set1(*x)}; }
  static SN_FORCE_INLINE AllOfPanel load(const float* p) { return {f_load(p)}; }
  static SN_FORCE_INLINE void store(float* p, AllOfPanel a) { f_store(p, a.v); }
  static SN_FORCE_INLINE AllOfPanel add(AllOfPanel a, AllOfPanel b) { return {f_add(a.v, b.v)}; }
  static SN_FORCE_INLINE AllOfPanel sub(AllOfPanel a, AllOfPanel b) { return {f_sub(a.v, b.v)}; }
  static SN_FORCE_INLINE AllOfPanel fma(AllOfPanel a, AllOfPanel b, AllOfPanel c) { return {f_fma(a.v, b.v, c.v)}; }
  static SN_FORCE_INLINE void group(AllOfPanel (&d)[kBlockRows]) { f_group(d[0].v, d[1].v, d[2].v, d[3].v); }
};
#if defined(__AVX2__)
struct HalfOfPanel {
  static constexpr int kFirst = kPanel / 2;
  __m256 v;
  static SN_FORCE_INLINE HalfOfPanel zero() { return {_mm256_setzero_ps()}; }
  static SN_FORCE_INLINE HalfOfPanel set1(const float* x) { return {_mm256_set1_ps(*x)}; }
  static SN_FORCE_INLINE HalfOfPanel load(const float* p) { return {_mm256_loadu_ps(p)}; }
  static SN_FORCE_INLINE void store(float* p, HalfOfPanel a) { _mm256_storeu_ps(p, a.v); }
  static SN_FORCE_INLINE HalfOfPanel add(HalfOfPanel a, HalfOfPanel b) { return {_mm256_add_ps(a.v, b.v)}; }
  static SN_FORCE_INLINE HalfOfPanel sub(HalfOfPanel a, HalfOfPanel b) { return {_mm256_sub_ps(a.v, b.v)}; }
  static SN_FORCE_INLINE HalfOfPanel fma(HalfOfPanel a, HalfOfPanel b, HalfOfPanel c) {
    return {_mm256_fmadd_ps(a.v, b.v, c.v)};
  }
  static SN_FORCE_INLINE void group(HalfOfPanel (&)[kBlockRows]) {}
};
#else
using HalfOfPanel = AllOfPanel;
#endif
template <class V>
void add_part_of_panel(const float* x, const float* panel, float* totals) {
  add_panel<V>(x, panel + V::kFirst, totals + V::kFirst);
}

// One panel of the copy: sixteen rows, whole segments, [columns][kPanel]. Zeros past the last column and row. Returns
// whether every value is finite.
template <class T>
bool turn_panel(const FeatureView& features, std::int64_t panel, std::int64_t dims, float* out) {
  const T* rows[kPanel];
  const std::int64_t left = features.rows - panel * kPanel;
  for (std::int64_t r = 0; r < kPanel; ++r) {
    rows[r] = static_cast<const T*>(features.data) + (panel * kPanel + (r < left ? r : 0)) * features.row_stride;
  }
  // 0 times a value that is not finite is NaN, and a sum with a NaN stays one.
  constexpr int kChains = 4;
  F16 poison[kChains] = {f_zero(), f_zero(), f_zero(), f_zero()};
  const std::int64_t padded = (dims + kSegment - 1) / kSegment * kSegment;
  const auto turn = [&](const std::uint32_t* const(&words)[kPanel], float* to) SN_LAMBDA_INLINE {
    transpose_words(words, reinterpret_cast<std::uint32_t*>(to));
#pragma GCC unroll 16
    for (int l = 0; l < kLanes; ++l) {
      poison[l % kChains] = f_fma(f_load(to + l * kPanel), f_zero(), poison[l % kChains]);
    }
  };
  std::int64_t c = 0;
  // A loop of its own for whole squares of a panel in fp32: with a choice for each row it takes twice as long.
  if constexpr (sizeof(T) == sizeof(float)) {
    for (; left >= kPanel && c + kLanes <= dims; c += kLanes) {
      const std::uint32_t* words[kPanel];
      for (std::int64_t r = 0; r < kPanel; ++r) words[r] = reinterpret_cast<const std::uint32_t*>(rows[r] + c);
      turn(words, out + c * kPanel);
    }
  }
  for (; c < padded; c += kLanes) {
    alignas(64) float copy[kPanel][kLanes];
    const std::uint32_t* words[kPanel];
    for (std::int64_t r = 0; r < kPanel; ++r) {
      const std::int64_t count = r < left ? dims - c : 0;
      f_store(copy[r], count >= kLanes ? f_load(rows[r] + c)
                                       : f_load_partial(rows[r] + c, count > 0 ? static_cast<int>(count) : 0));
      words[r] = reinterpret_cast<const std::uint32_t*>(copy[r]);
    }
    turn(words, out + c * kPanel);
  }
  float lanes[kLanes];
  f_store(lanes, f_add(f_add(poison[0], poison[1]), f_add(poison[2], poison[3])));
  bool finite = true;
  for (float lane : lanes) finite = finite && lane == 0.0f;
  return finite;
}

// A block of distances between `nx` panels of anchors and `nz` panels of candidates, both at most kBlockPanels:
// out[a * pitch + c]. Panels are `stride` values apart. With `upper` both are the same panels and only pairs above the
// diagonal are sure to be computed. Writes whole panels of candidates, so a row of `out` has room for them.
inline void panel_block(const float* x, std::int64_t nx, const float* z, std::int64_t nz, std::int64_t stride,
                        bool upper, float* out, std::int64_t pitch) {
  constexpr int kGroups = kPanel / kBlockRows;
  alignas(64) float totals[kBlockPanels][kBlockPanels][kPanel * kPanel];
  std::memset(totals, 0, sizeof totals);
  for (std::int64_t at = 0; at < stride; at += kSegment * kPanel) {
    for (std::int64_t p = 0; p < nx; ++p) {
      for (int g = 0; g < kGroups; ++g) {
        const float* anchors = x + p * stride + at + g * kBlockRows;
        for (std::int64_t q = upper ? p : 0; q < nz; ++q) {
          float* to = totals[p][q] + g * kBlockRows * kPanel;
          // Above the diagonal the last rows of a panel meet only the last candidates of it.
          if (upper && p == q && g >= kGroups / 2) {
            add_part_of_panel<HalfOfPanel>(anchors, z + q * stride + at, to);
          } else {
            add_part_of_panel<AllOfPanel>(anchors, z + q * stride + at, to);
          }
        }
      }
    }
  }
  for (std::int64_t p = 0; p < nx; ++p) {
    for (std::int64_t q = upper ? p : 0; q < nz; ++q) {
      for (std::int64_t r = 0; r < kPanel; ++r) {
        f_store(out + (p * kPanel + r) * pitch + q * kPanel, f_load(totals[p][q] + r * kPanel));
      }
    }
  }
}
