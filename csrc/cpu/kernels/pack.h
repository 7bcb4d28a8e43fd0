// Screening: the mean of sampled rows, and the packed bfloat16 copy with norms and residuals. Included by kernels.cpp
// alone, inside its namespace.
#pragma once

inline constexpr float kFloatMost = 3.402823466e38f;

// ---- the mean -------------------------------------------------------------------------------------------------------

// A mean of sampled rows that an outlier cannot drag away: the second mean leaves out rows that are farther from the
// first than twice the median. Sums are of differences to a sampled row, so that equal rows give exactly that row.
inline constexpr int kSampleRows = 32;
// Half-precision rows are exact in the screening copy as they are. They are centred only if that shrinks them a lot.
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
    if (c >= dims || !(__builtin_fabsf(mean[c]) <= kFloatMost)) mean[c] = 0.0f;  // any mean gives a right bound
  }
}

// ---- the copy -------------------------------------------------------------------------------------------------------

// Rounds sixteen columns to bfloat16, to nearest even, subnormals to zero, as a bfloat16 dot product flushes them.
// words: the upper halves, two columns a word. Returns what rounding left out, exact in float.
SN_FORCE_INLINE F16 round_columns(F16 t, std::uint32_t* words) {
#if defined(__AVX512BF16__)
  const __m256i halves = reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(t.v));
  _mm256_store_si256(reinterpret_cast<__m256i*>(words), halves);
  return {_mm512_sub_ps(t.v, _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16)))};
#elif defined(__AVX512F__)
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

// Packs panels [first, last). Returns false if a row is not finite or too large for the screening.
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
    const std::uint32_t* row_words[kPanel];
    for (int r = 0; r < kPanel; ++r) row_words[r] = words[r];
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
        transpose_words(row_words, out + pair * kPanel);
      } else {
        transpose_words(row_words, turned);
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
