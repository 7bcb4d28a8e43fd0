// Sixteen lanes, the unit of every hot loop: one zmm, two ymm, four NEON registers, or a plain array. Included by
// kernels.cpp alone, inside the namespace of its instruction set, so that no two instruction sets share code.
#pragma once

#if defined(__AVX2__)
#include <immintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

#include <cstdint>
#include <cstring>

#define SN_FORCE_INLINE inline __attribute__((always_inline))

inline constexpr int kLanes = 16;

// Storage types of half-precision inputs. Arithmetic is in float.
struct Half {
  std::uint16_t bits;
};
struct BFloat16 {
  std::uint16_t bits;
};

SN_FORCE_INLINE float bits_to_float(std::uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}
SN_FORCE_INLINE std::uint32_t float_to_bits(float value) {
  std::uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

SN_FORCE_INLINE float to_float(float value) {
  return value;
}
SN_FORCE_INLINE float to_float(BFloat16 value) {
  return bits_to_float(static_cast<std::uint32_t>(value.bits) << 16);
}
SN_FORCE_INLINE float to_float(Half value) {
  const std::uint32_t sign = static_cast<std::uint32_t>(value.bits & 0x8000u) << 16;
  const std::uint32_t magnitude = value.bits & 0x7fffu;
  if (magnitude >= 0x7c00u) return bits_to_float(sign | 0x7f800000u | ((magnitude & 0x3ffu) << 13));
  // A multiplication re-biases the exponent, which normalises subnormals on the way: 2^112 = 2^(127 - 15).
  return bits_to_float(sign | float_to_bits(bits_to_float(magnitude << 13) * 0x1p112f));
}

// One rounding, to nearest even; NaN stays NaN.
SN_FORCE_INLINE float from_float(float value, float*) {
  return value;
}
SN_FORCE_INLINE BFloat16 from_float(float value, BFloat16*) {
  const std::uint32_t bits = float_to_bits(value);
  if (value != value) return {static_cast<std::uint16_t>((bits >> 16) | 0x40u)};
  return {static_cast<std::uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16)};
}
SN_FORCE_INLINE Half from_float(float value, Half*) {
  const std::uint32_t bits = float_to_bits(value);
  const std::uint16_t sign = static_cast<std::uint16_t>((bits >> 16) & 0x8000u);
  const std::uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return {static_cast<std::uint16_t>(sign | 0x7e00u)};
  if (magnitude >= 0x477ff000u) return {static_cast<std::uint16_t>(sign | 0x7c00u)};  // rounds to 65536 or more
  if (magnitude < 0x38800000u) {  // below 2^-14: a float addition rounds to the subnormal grid 2^-24
    const float shifted = bits_to_float(magnitude) + 0.5f;  // ulp of [0.5, 1) is 2^-24
    return {static_cast<std::uint16_t>(sign | (float_to_bits(shifted) - 0x3f000000u))};
  }
  const std::uint32_t rounded = magnitude + 0xfffu + ((magnitude >> 13) & 1u);
  return {static_cast<std::uint16_t>(sign | ((rounded - 0x38000000u) >> 13))};
}

// ---- sixteen lanes as an array: doubles, and floats where there are no vector registers ----------------------------

template <class T>
struct LaneArray {
  T v[kLanes];
};
SN_FORCE_INLINE float fused(float a, float b, float c) {
  return __builtin_fmaf(a, b, c);
}
SN_FORCE_INLINE double fused(double a, double b, double c) {
  return __builtin_fma(a, b, c);
}
template <class T>
SN_FORCE_INLINE LaneArray<T> f_sub(LaneArray<T> a, LaneArray<T> b) {
  for (int l = 0; l < kLanes; ++l) a.v[l] -= b.v[l];
  return a;
}
template <class T>
SN_FORCE_INLINE LaneArray<T> f_fma(LaneArray<T> a, LaneArray<T> b, LaneArray<T> c) {
  for (int l = 0; l < kLanes; ++l) c.v[l] = fused(a.v[l], b.v[l], c.v[l]);
  return c;
}

using D16 = LaneArray<double>;
SN_FORCE_INLINE D16 d_zero() {
  D16 r;
  for (int l = 0; l < kLanes; ++l) r.v[l] = 0.0;
  return r;
}
SN_FORCE_INLINE D16 d_load(const double* p) {
  D16 r;
  for (int l = 0; l < kLanes; ++l) r.v[l] = p[l];
  return r;
}
SN_FORCE_INLINE D16 d_load_partial(const double* p, int count) {
  D16 r = d_zero();
  for (int l = 0; l < count; ++l) r.v[l] = p[l];
  return r;
}

// ---- sixteen floats -------------------------------------------------------------------------------------------------

#if defined(__AVX512F__)

struct F16 {
  __m512 v;
};
SN_FORCE_INLINE F16 f_zero() {
  return {_mm512_setzero_ps()};
}
SN_FORCE_INLINE F16 f_set1(float x) {
  return {_mm512_set1_ps(x)};
}
SN_FORCE_INLINE F16 f_load(const float* p) {
  return {_mm512_loadu_ps(p)};
}
SN_FORCE_INLINE void f_store(float* p, F16 a) {
  _mm512_storeu_ps(p, a.v);
}
SN_FORCE_INLINE F16 f_add(F16 a, F16 b) {
  return {_mm512_add_ps(a.v, b.v)};
}
SN_FORCE_INLINE F16 f_sub(F16 a, F16 b) {
  return {_mm512_sub_ps(a.v, b.v)};
}
SN_FORCE_INLINE F16 f_mul(F16 a, F16 b) {
  return {_mm512_mul_ps(a.v, b.v)};
}
SN_FORCE_INLINE F16 f_min(F16 a, F16 b) {
  return {_mm512_min_ps(a.v, b.v)};
}
SN_FORCE_INLINE F16 f_fma(F16 a, F16 b, F16 c) {
  return {_mm512_fmadd_ps(a.v, b.v, c.v)};
}
SN_FORCE_INLINE F16 f_load(const BFloat16* p) {
  const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16))};
}
SN_FORCE_INLINE F16 f_load(const Half* p) {
  return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
}

#elif defined(__AVX2__)

struct F16 {
  __m256 lo, hi;
};
SN_FORCE_INLINE F16 f_zero() {
  return {_mm256_setzero_ps(), _mm256_setzero_ps()};
}
SN_FORCE_INLINE F16 f_set1(float x) {
  return {_mm256_set1_ps(x), _mm256_set1_ps(x)};
}
SN_FORCE_INLINE F16 f_load(const float* p) {
  return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)};
}
SN_FORCE_INLINE void f_store(float* p, F16 a) {
  _mm256_storeu_ps(p, a.lo);
  _mm256_storeu_ps(p + 8, a.hi);
}
SN_FORCE_INLINE F16 f_add(F16 a, F16 b) {
  return {_mm256_add_ps(a.lo, b.lo), _mm256_add_ps(a.hi, b.hi)};
}
SN_FORCE_INLINE F16 f_sub(F16 a, F16 b) {
  return {_mm256_sub_ps(a.lo, b.lo), _mm256_sub_ps(a.hi, b.hi)};
}
SN_FORCE_INLINE F16 f_mul(F16 a, F16 b) {
  return {_mm256_mul_ps(a.lo, b.lo), _mm256_mul_ps(a.hi, b.hi)};
}
SN_FORCE_INLINE F16 f_min(F16 a, F16 b) {
  return {_mm256_min_ps(a.lo, b.lo), _mm256_min_ps(a.hi, b.hi)};
}
SN_FORCE_INLINE F16 f_fma(F16 a, F16 b, F16 c) {
  return {_mm256_fmadd_ps(a.lo, b.lo, c.lo), _mm256_fmadd_ps(a.hi, b.hi, c.hi)};
}
SN_FORCE_INLINE F16 f_load(const BFloat16* p) {
  const __m128i lo = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  const __m128i hi = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p) + 1);
  return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(lo), 16)),
          _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(hi), 16))};
}
SN_FORCE_INLINE F16 f_load(const Half* p) {
  return {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))),
          _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p) + 1))};
}

#elif defined(__ARM_NEON) && defined(__aarch64__)

struct F16 {
  float32x4_t v[4];
};
SN_FORCE_INLINE F16 f_set1(float x) {
  return {{vdupq_n_f32(x), vdupq_n_f32(x), vdupq_n_f32(x), vdupq_n_f32(x)}};
}
SN_FORCE_INLINE F16 f_zero() {
  return f_set1(0.0f);
}
SN_FORCE_INLINE F16 f_load(const float* p) {
  return {{vld1q_f32(p), vld1q_f32(p + 4), vld1q_f32(p + 8), vld1q_f32(p + 12)}};
}
SN_FORCE_INLINE void f_store(float* p, F16 a) {
  for (int i = 0; i < 4; ++i) vst1q_f32(p + 4 * i, a.v[i]);
}
SN_FORCE_INLINE F16 f_add(F16 a, F16 b) {
  for (int i = 0; i < 4; ++i) a.v[i] = vaddq_f32(a.v[i], b.v[i]);
  return a;
}
SN_FORCE_INLINE F16 f_sub(F16 a, F16 b) {
  for (int i = 0; i < 4; ++i) a.v[i] = vsubq_f32(a.v[i], b.v[i]);
  return a;
}
SN_FORCE_INLINE F16 f_mul(F16 a, F16 b) {
  for (int i = 0; i < 4; ++i) a.v[i] = vmulq_f32(a.v[i], b.v[i]);
  return a;
}
SN_FORCE_INLINE F16 f_min(F16 a, F16 b) {
  for (int i = 0; i < 4; ++i) a.v[i] = vminq_f32(a.v[i], b.v[i]);
  return a;
}
SN_FORCE_INLINE F16 f_fma(F16 a, F16 b, F16 c) {
  for (int i = 0; i < 4; ++i) c.v[i] = vfmaq_f32(c.v[i], a.v[i], b.v[i]);
  return c;
}

#else

using F16 = LaneArray<float>;
SN_FORCE_INLINE F16 f_set1(float x) {
  F16 r;
  for (int l = 0; l < kLanes; ++l) r.v[l] = x;
  return r;
}
SN_FORCE_INLINE F16 f_zero() {
  return f_set1(0.0f);
}
SN_FORCE_INLINE F16 f_load(const float* p) {
  F16 r;
  for (int l = 0; l < kLanes; ++l) r.v[l] = p[l];
  return r;
}
SN_FORCE_INLINE void f_store(float* p, F16 a) {
  for (int l = 0; l < kLanes; ++l) p[l] = a.v[l];
}
SN_FORCE_INLINE F16 f_add(F16 a, F16 b) {
  for (int l = 0; l < kLanes; ++l) a.v[l] += b.v[l];
  return a;
}
SN_FORCE_INLINE F16 f_mul(F16 a, F16 b) {
  for (int l = 0; l < kLanes; ++l) a.v[l] *= b.v[l];
  return a;
}
SN_FORCE_INLINE F16 f_min(F16 a, F16 b) {
  for (int l = 0; l < kLanes; ++l) a.v[l] = b.v[l] < a.v[l] ? b.v[l] : a.v[l];
  return a;
}

#endif

#if !defined(__AVX2__)
template <class T>
SN_FORCE_INLINE F16 f_load(const T* p) {
  float wide[kLanes];
  for (int l = 0; l < kLanes; ++l) wide[l] = to_float(p[l]);
  return f_load(wide);
}
#endif

// The first `count` of sixteen elements, zeros behind them; reads nothing past the end.
template <class T>
SN_FORCE_INLINE F16 f_load_partial(const T* p, int count) {
  float wide[kLanes] = {};
  for (int l = 0; l < count; ++l) wide[l] = to_float(p[l]);
  return f_load(wide);
}

// Zen 4 sustains a 512-bit difference and a multiply-add a cycle only where four of one kind follow four of the other;
// by turns they take 1.2 cycles. Compilers mix them unless something needs four values at once.
#if defined(__AVX512F__)
inline constexpr bool kGroups = true;
SN_FORCE_INLINE void f_group(F16& a, F16& b, F16& c, F16& d) {
  asm("" : "+v"(a.v), "+v"(b.v), "+v"(c.v), "+v"(d.v));
}
#else
inline constexpr bool kGroups = false;
SN_FORCE_INLINE void f_group(F16&, F16&, F16&, F16&) {}
#endif
