// The direct path: the K nearest of a row of distances. Included by kernels.cpp alone, inside its namespace.
#pragma once

inline constexpr int kSmallestSteps = 10;  // of the bisection for a bound of the K-th smallest

// Bits of the lanes of d2 below `worst`. Bits of d2 >= 0 order as d2 does, as signed integers too.
SN_FORCE_INLINE std::uint32_t lanes_below(const float* d2, std::int32_t worst) {
#if defined(__AVX512F__)
  return _mm512_cmp_epi32_mask(_mm512_loadu_si512(d2), _mm512_set1_epi32(worst), _MM_CMPINT_LT);
#elif defined(__AVX2__)
  const __m256i limit = _mm256_set1_epi32(worst);
  const auto half = [&](const float* p) SN_LAMBDA_INLINE {
    const __m256i below = _mm256_cmpgt_epi32(limit, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
    return static_cast<std::uint32_t>(_mm256_movemask_ps(_mm256_castsi256_ps(below)));
  };
  return half(d2) | half(d2 + kLanes / 2) << (kLanes / 2);
#else
  std::uint32_t below = 0;
  for (int l = 0; l < kLanes; ++l) {
    below |= (static_cast<std::int32_t>(float_to_bits(d2[l])) < worst ? 1u : 0u) << l;
  }
  return below;
#endif
}

inline std::int64_t smallest(const float* d2, std::int64_t count, std::int64_t self, std::int64_t wanted,
                             std::uint64_t* keys) {
  std::int64_t kept = 0;
  if (wanted == 0) return 0;
  // Indices ascend, so a later candidate must be strictly nearer to enter.
  std::int32_t worst = static_cast<std::int32_t>(float_to_bits(__builtin_inff())) + 1;
  // Few insertions are left below a bound of `wanted` candidates beside the anchor itself.
  const std::int64_t bounded = wanted + 1;
  if ((bounded + kLanes - 1) / kLanes <= count / kLanes) {
    const float bound = lanes_bound(count / kLanes, bounded, __builtin_inff(), kSmallestSteps,
                                    [d2](std::int64_t v) SN_LAMBDA_INLINE { return f_load(d2 + v * kLanes); });
    worst = static_cast<std::int32_t>(float_to_bits(bound)) + 1;
  }
  const auto consider = [&](std::int64_t j) SN_LAMBDA_INLINE {
    const std::uint32_t bits = float_to_bits(d2[j]);
    if (static_cast<std::int32_t>(bits) >= worst || j == self) return;
    const std::uint64_t key = (static_cast<std::uint64_t>(bits) << 32) | static_cast<std::uint32_t>(j);
    std::int64_t at = kept < wanted ? kept++ : kept - 1;
    for (; at > 0 && keys[at - 1] > key; --at) keys[at] = keys[at - 1];
    keys[at] = key;
    if (kept == wanted) worst = static_cast<std::int32_t>(keys[kept - 1] >> 32);
  };
  std::int64_t j = 0;
  for (; j + kLanes <= count; j += kLanes) {
    for (std::uint32_t below = lanes_below(d2 + j, worst); below != 0; below &= below - 1) {
      consider(j + __builtin_ctz(below));
    }
  }
  for (; j < count; ++j) consider(j);
  return kept;
}
