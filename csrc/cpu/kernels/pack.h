// Screening: the mean of sampled rows, and the packed copy of 16-bit or 8-bit integers with norms and residuals.
// Included by kernels.cpp alone, inside its namespace.
#pragma once

inline constexpr float kFloatMost = 3.402823466e38f;

// ---- the mean -------------------------------------------------------------------------------------------------------

// A mean of sampled rows that an outlier cannot drag away: the second mean leaves out rows that are farther from the
// first than twice the median. Sums are of differences to a sampled row, so that equal rows give exactly that row.
inline constexpr int kSampleRows = 32;
inline constexpr int kLeastSampleRows = 8;
inline constexpr int kSampleShare = 8;  // small batches sample one row of so many
// Half-precision rows are exact in the screening copy as they are. They are centred only if that shrinks them a lot.
inline constexpr float kWorthCentring = 0.25f;

template <class T>
void sampled_mean(const FeatureView* sides, int side_count, std::int64_t dims, float* mean, float* scratch) {
  const T* rows[kSampleRows];
  float far[kSampleRows];
  float size[kSampleRows];
  int count = 0;
  for (int s = 0; s < side_count; ++s) {
    const std::int64_t share = sides[s].rows / kSampleShare;
    const std::int64_t wanted = share < kLeastSampleRows ? kLeastSampleRows : share;
    const std::int64_t most = kSampleRows / side_count;
    const std::int64_t take = wanted < most ? wanted : most;
    const std::int64_t n = sides[s].rows < take ? sides[s].rows : take;
    for (std::int64_t i = 0; i < n; ++i) {
      rows[count++] = static_cast<const T*>(sides[s].data) + (i * sides[s].rows / n) * sides[s].row_stride;
    }
  }
  const std::int64_t padded = (dims + 4 * kLanes - 1) / (4 * kLanes) * (4 * kLanes);
  const auto load = [dims](const T* row, std::int64_t c) SN_LAMBDA_INLINE {
    return c + kLanes <= dims ? f_load(row + c) : f_load_partial(row + c, c < dims ? static_cast<int>(dims - c) : 0);
  };
  // Row after row: hardware follows one row, not one column of many.
  const auto average = [&](float* out) {
    for (std::int64_t c = 0; c < padded; c += kLanes) f_store(out + c, f_zero());
    for (int i = 1; i < count; ++i) {
      for (std::int64_t c = 0; c < padded; c += kLanes) {
        f_store(out + c, f_add(f_load(out + c), f_sub(load(rows[i], c), load(rows[0], c))));
      }
    }
    const F16 share = f_set1(1.0f / static_cast<float>(count));
    for (std::int64_t c = 0; c < padded; c += kLanes) f_store(out + c, f_fma(f_load(out + c), share, load(rows[0], c)));
  };
  average(scratch);
  float sorted[kSampleRows];
  for (int i = 0; i < count; ++i) {
    F16 spread[2] = {f_zero(), f_zero()};
    F16 square[2] = {f_zero(), f_zero()};
    for (std::int64_t c = 0; c < padded; c += 2 * kLanes) {
#pragma GCC unroll 2
      for (int half = 0; half < 2; ++half) {
        const F16 x = load(rows[i], c + half * kLanes);
        const F16 t = f_sub(x, f_load(scratch + c + half * kLanes));
        spread[half] = f_fma(t, t, spread[half]);
        square[half] = f_fma(x, x, square[half]);
      }
    }
    float lanes[kLanes];
    f_store(lanes, f_add(spread[0], spread[1]));
    far[i] = tree_sum(lanes);
    f_store(lanes, f_add(square[0], square[1]));
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

static_assert((kIntegerNorm * 1.05f + 2048.0f) * (kIntegerNorm * 1.05f + 2048.0f) < 0x1p31f,
              "rounding adds at most half a root of D = 2^24");
static_assert(kIntegerNorm * 1.05f < 32767.0f);
// The largest of a row's 8-bit integers: their sums are short, and the finest step leaves the least residual.
inline constexpr float kByteMost = 127.0f;
// Rows whose squares come near underflow are zeros and residual.
inline constexpr float kLeastNorm = 0x1p-100f;

// Rounds sixteen columns to integers, to nearest: t / scale, with `inverse` about 1 / scale. words: two or four columns
// each. Returns what rounding left out, t - scale integer, rounded once.
template <bool kBytes>
SN_FORCE_INLINE F16 round_columns(F16 t, F16 inverse, F16 minus_scale, std::uint32_t* words) {
  // Added to this, a value has its integer in the last bits.
  const F16 shift = f_set1(0x1.8p23f);
  const F16 shifted = f_fma(t, inverse, shift);
#if defined(__AVX512F__)
  if constexpr (kBytes) {
    _mm_store_si128(reinterpret_cast<__m128i*>(words), _mm512_cvtepi32_epi8(_mm512_castps_si512(shifted.v)));
  } else {
    _mm256_store_si256(reinterpret_cast<__m256i*>(words), _mm512_cvtepi32_epi16(_mm512_castps_si512(shifted.v)));
  }
#elif defined(__AVX2__)
  const __m256i low = _mm256_set1_epi32(0xffff);
  const __m256i packed = _mm256_packus_epi32(_mm256_and_si256(_mm256_castps_si256(shifted.lo), low),
                                             _mm256_and_si256(_mm256_castps_si256(shifted.hi), low));
  _mm256_store_si256(reinterpret_cast<__m256i*>(words), _mm256_permute4x64_epi64(packed, 0xd8));
#else
  std::uint32_t bits[kLanes];
  f_store(reinterpret_cast<float*>(bits), shifted);
  for (int l = 0; l < kLanes / 2; ++l) words[l] = (bits[2 * l] & 0xffffu) | (bits[2 * l + 1] << 16);
#endif
  return f_fma(f_sub(shifted, shift), minus_scale, t);
}

// Sixteen columns of a row without the mean.
template <class T>
SN_FORCE_INLINE F16 centred(const Screen& screen, const T* row, std::int64_t c) {
  const std::int64_t left = screen.dims - c;
  const F16 x = left >= kLanes ? f_load(row + c) : f_load_partial(row + c, left > 0 ? static_cast<int>(left) : 0);
  return f_sub(x, f_load(screen.mean + c));
}

// Packs panels [first, last). Returns false if a row is not finite or too large for the screening.
template <class T, bool kBytes>
bool pack_as(const Screen& screen, const ScreenSide& side, std::int64_t first, std::int64_t last) {
  constexpr int kChains = 4;  // rows whose sums are interleaved
  for (std::int64_t panel = first; panel < last; ++panel) {
    const T* rows[kPanel];
    F16 inverse[kPanel];
    F16 minus_scale[kPanel];
    F16 residual[kPanel];
    const std::int64_t position = panel * kPanel;
    const std::int64_t count = side.rows - position < kPanel ? side.rows - position : kPanel;
    if (count <= 0) {  // integers stay as they are: their scale is 0
      for (int r = 0; r < kPanel; ++r) {
        side.norm[position + r] = side.residual[position + r] = side.scale[position + r] = 0.0f;
        side.start[position + r] = 0;
      }
      continue;
    }
    for (std::int64_t r = 0; r < kPanel; ++r) {  // past the last row that one again, times 0
      const std::int64_t from = position + (r < count ? r : count - 1);
      rows[r] = static_cast<const T*>(side.features.data) + side.order[from] * side.features.row_stride;
    }
    for (int r = 0; r < kPanel; r += kChains) {
      F16 norm[kChains] = {f_zero(), f_zero(), f_zero(), f_zero()};
      F16 minus_most[kChains] = {f_zero(), f_zero(), f_zero(), f_zero()};
      for (std::int64_t c = 0; c < screen.dims; c += kLanes) {
#pragma GCC unroll 4
        for (int i = 0; i < kChains; ++i) {
          const F16 t = centred(screen, rows[r + i], c);
          norm[i] = f_fma(t, t, norm[i]);
          minus_most[i] = f_min(minus_most[i], f_min(t, f_sub(f_zero(), t)));
        }
      }
      for (int i = 0; i < kChains; ++i) {
        float lanes[kLanes];
        f_store(lanes, norm[i]);
        const float sum = r + i < count ? tree_sum(lanes) : 0.0f;
        if (!(sum <= kFloatMost)) return false;
        float scale = 0.0f;
        if (sum >= kLeastNorm) {
          f_store(lanes, minus_most[i]);
          for (int l = 0; l < kLanes; ++l) scale = -lanes[l] > scale ? -lanes[l] : scale;
          scale /= kBytes ? kByteMost : integer_most(screen.forms.levels);
          const float by_norm = __builtin_sqrtf(sum) * (1.0f / kIntegerNorm);
          if (!kBytes && by_norm > scale) scale = by_norm;
        }
        side.norm[position + r + i] = sum;
        side.scale[position + r + i] = scale;
        inverse[r + i] = f_set1(scale > 0.0f ? 1.0f / scale : 0.0f);
        minus_scale[r + i] = f_set1(-scale);
        residual[r + i] = f_zero();
      }
    }
    std::uint32_t* out = side.packed + panel * screen.panel_stride;
    alignas(64) std::uint32_t words[kPanel][kLanes];
    alignas(64) std::uint32_t turned[kLanes * kPanel];
    const std::uint32_t* row_words[kPanel];
    for (int r = 0; r < kPanel; ++r) row_words[r] = words[r];
    constexpr int kWordColumns = kBytes ? 4 : 2;
    for (std::int64_t word = 0; word < screen.words; word += kLanes) {
      for (int r = 0; r < kPanel; ++r) {
        for (int part = 0; part < kWordColumns; ++part) {
          const F16 t = centred(screen, rows[r], kWordColumns * word + part * kLanes);
          const F16 rest =
              round_columns<kBytes>(t, inverse[r], minus_scale[r], words[r] + part * (kLanes / kWordColumns));
          residual[r] = f_fma(rest, rest, residual[r]);
        }
      }
      const std::int64_t count_words = screen.words - word < kLanes ? screen.words - word : kLanes;
      if (count_words == kLanes) {
        transpose_words(row_words, out + word * kPanel);
      } else {
        transpose_words(row_words, turned);
        std::memcpy(out + word * kPanel, turned,
                    static_cast<std::size_t>(count_words * kPanel) * sizeof(std::uint32_t));
      }
    }
    I16 shift = i_zero();
#if defined(SN_CPU_BYTES)
    // What products with this row as the anchor gain by the 128 that candidates are shifted by.
    if constexpr (kBytes) {
      for (std::int64_t word = 0; word < screen.words; ++word) {
        shift = i_dot_bytes(shift, i_set1(0x80808080u), i_load(out + word * kPanel));
      }
    }
#endif
    alignas(64) std::int32_t shifts[kPanel];
    i_store(shifts, shift);
    for (int r = 0; r < kPanel; ++r) side.start[position + r] = -shifts[r];
    for (int r = 0; r < kPanel; ++r) {
      float lanes[kLanes];
      f_store(lanes, residual[r]);
      side.residual[position + r] = r < count ? tree_sum(lanes) : 0.0f;
    }
  }
  return true;
}

template <class T>
bool pack(const Screen& screen, const ScreenSide& side, std::int64_t first, std::int64_t last) {
#if defined(SN_CPU_BYTES)
  if (screen.bytes) return pack_as<T, true>(screen, side, first, last);
#endif
  return pack_as<T, false>(screen, side, first, last);
}
