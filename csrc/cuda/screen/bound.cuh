// What a score proves about the true distance of two rows, and the thresholds that follow. This is the only copy of
// these formulas; the score kernels and the refinement use them.
//
// For rows i and j: v is the centred and scaled row (exact), h its half-precision copy, n and rho as in prepare.h, dot
// the tensor core's h_i . h_j, s = n_j - 2 dot as a float, D_ij = |v_i - v_j| the true distance in units of the cast,
// and A_ij = |h_i - h_j|. With u = 2^-24 the unit roundoff of fp32 and Dp = padded_dims:
//
//   n    = |h|^2 (1 + d), |d| <= (Dp/32 + 16) u: every product of 11-bit numbers is exact, a lane adds at most
//        Dp/32 + 8 squares, all >= 0, and five more additions join the lanes.
//   dot  PTX leaves order and rounding inside an mma open. Claimed (benchmarks/gpu asks a device with its probe, and an
//        H200 kept within a quarter of it; the host harness injects errors up to it): each step takes a group of
//        g >= 8 products and the accumulator, aligns them to the largest of their exponents, E, cuts each off below
//        2^(E - 23), and cuts their exact sum off to 24 bits. The exponent of a product is the sum of its operands'
//        exponents, and that of a subnormal, or of 0, is the least there is, e0 = -14 (bf16: -126), however small the
//        number. So what a step loses,
//          (g + 1) 2^(E - 23) + 2^-23 |sum|,
//        is no multiple of 2^-23 |h_i||h_j|: products of a row of subnormals have far larger exponents than values.
//        With S = (|h_i|^2 + |h_j|^2) / 2 it is at most (g + 2) 2^-23 S, or of no account. E is that
//          of the accumulator, c: 2^E <= |c|, and |c|, like |sum|, is a part of h_i . h_j, at most S, and what was lost
//            before, a second-order term;
//          of two normal numbers: 2^E <= |a||b| <= (a^2 + b^2) / 2 <= S;
//          of one with an exponent e > e0 and one at e0: 2^E = 2^(e + e0) <= 2^(2 e - 1) <= S;
//          of two at e0. fp16: E = -28; products, and what sums of them were cut to, are multiples of 2^-48, which is a
//            multiple of 2^(E - 23) = 2^-51: aligning loses nothing. bf16: 2^(E - 23) = 2^-275.
//        bf16 products below 2^-126 may be lost altogether: D 2^-126, where n >= 2^-60 (facts.cu).
//        There are Dp/g steps, and (g + 2) / g <= 1.25:
//          2 |dot - h_i . h_j| <= 1.25 Dp 2^-23 (|h_i|^2 + |h_j|^2).
//        Larger groups cut off later, as on newer architectures, lose less: a quarter with g = 16 and 2^(E - 25).
//   s    one more rounding: <= u (2 |dot| + n_j) <= u (n_i + 2 n_j).
// So everything is bounded by a multiple of n_i + n_j, and of nothing smaller:
//   |(n_i + s) - A^2| <= (n_i + n_j) (1.25 Dp 2^-23 + (Dp/64 + 10) 2^-23)
// and with
//   eta = 1.25 Dp 2^-23 + (Dp/32 + 32) 2^-23          (screening_error in plan/sizes.h)
// a margin of (Dp/64 + 22) 2^-23 is left for the roundings of whoever evaluates a bound with s in a few operations (up
// to 8 of size n_i + n_j) and for second-order terms. So
//   (n_i + s) - eta (n_i + n_j) <= A^2 <= (n_i + s) + eta (n_i + n_j),   |D - A| <= rho_i + rho_j.
//
// Upper bounds of a sample (of a group of candidates, the least). From the bound of n_i + n_j - 2 dot above, which has
// no rounding of s yet,
//   A^2 <= n_i (1 + eta) + (n_j (1 + eta) - 2 dot),   D <= A + rho_i + rho_j.
// n_i (1 + eta) and Q_j = n_j (1 + eta) are rounded up. The bracket is evaluated as q = fma(-2, dot, Q_j): its one
// rounding, at most u (2 |dot| + Q_j), takes the place of that of s. The rest is rounded up. A group is represented by
// its member with the least q, whose rho goes along: another one may have a smaller bound, but this is a bound of one.
//
// Support. Let t* be a true distance, in these units, that no member of anchor i's true support exceeds, and t = t* +
// rho_i. A member j has A <= t + rho_j, so
//   n_j (1 - eta) - rho_j^2 - 2 t rho_j - 2 dot <= t^2 - n_i (1 - eta) =: T.
// The left side is evaluated as fma(-u', rho_j, fma(-2, dot, P_j)), u' = 2 t, P_j = n_j (1 - eta) - rho_j^2. Its two
// roundings are at most u (2 n_i + 4 n_j) + 2 u rho_j^2 + u u' rho_j. The first is in eta's margin. For the others the
// score kernels take rho_j (1 + 2^-20) for rho_j, which adds 2^-19 rho_j^2 + 2^-20 u' rho_j. P_j is rounded down, T and
// u' up.
//
// Far. Let f be a true distance that the farthest positive of i reaches or exceeds, and g = f - rho_i. That positive
// has A >= g - rho_j. If g <= 0 nothing follows and every positive is kept (G = -inf). Otherwise, also where rho_j > g
// since A^2 >= 0,
//   n_j (1 + eta) + 2 g rho_j - 2 dot >= g^2 - n_i (1 + eta) =: G.
// Q_j and rho_j (1 + 2^-20) are rounded up, G and g2 = 2 g down. Lowering g weakens the test: (n_i +
// n_j)(1 + eta) - 2 dot >= A^2 >= (g - rho_j)^2 holds for every smaller g >= rho_j too, and below that the left side is
// at least 2 g rho_j >= g^2.
//
// A row with rho = +inf has P = -inf and Q = +inf. Tests are written as "not greater" and "not less", so NaN is kept.
//
// Null rows. Where x = m in every column v is 0, and exactly then rho is 0 next to n = 0 (for half inputs: the rows of
// zeros; x = -0 where m = 0 makes no difference). All null rows are one point, however many there are: every anchor is
// at the same distance from each, with the same key, so the index orders them. Behind the first K + 1 of them, of which
// one may be the anchor itself, none is in any support set. No threshold could tell the rows of a bank of zeros apart;
// K + 1 of them are as good as the bank. Control.last_null, found in the sample, is an index that K + 1 null rows do
// not exceed.
#pragma once

#include <cstdint>

#include "cuda/ptx.cuh"

namespace sn::cuda {

inline constexpr float kInfinity = __builtin_inff();
inline constexpr float kRhoMargin = 1.0f + 0x1p-20f;
inline constexpr std::uint32_t kNoLastNull = ~0u;

__device__ __forceinline__ bool is_null(float n, float rho) {
  return n == 0.0f && rho == 0.0f;
}

// Lower and upper bound of the true distance of a pair. Infinite rho: 0 and +inf.
__device__ __forceinline__ float distance_lower(float n_i, float rho_i, float n_j, float rho_j, float score,
                                                float eta) {
  const float square = add_down(add_down(n_i, score), -multiply_up(eta, add_up(n_i, n_j)));
  const float distance = add_down(sqrt_down(square > 0.0f ? square : 0.0f), -add_up(rho_i, rho_j));
  return distance > 0.0f ? distance : 0.0f;
}
__device__ __forceinline__ float distance_upper(float n_i, float rho_i, float n_j, float rho_j, float score,
                                                float eta) {
  const float square = fma_up(eta, add_up(n_i, n_j), add_up(n_i, score));
  return add_up(sqrt_up(square > 0.0f ? square : 0.0f), add_up(rho_i, rho_j));
}

// From the parts that the score kernels have: `most` is n_i (1 + eta) of the anchor, q the least of a group, and rho_j
// that of the same candidate. No candidate: q = +inf.
__device__ __forceinline__ float group_upper(float most, float rho_i, float q, float rho_j) {
  const float square = add_up(most, q);
  return add_up(sqrt_up(square > 0.0f ? square : 0.0f), add_up(rho_i, rho_j));
}

// The same of an entry that carries its square and the errors of its row (rescreen/rescreen.cuh).
__device__ __forceinline__ float framed_lower(float square, float error, float rho) {
  const float least = add_down(square, -error);
  const float distance = add_down(sqrt_down(least > 0.0f ? least : 0.0f), -rho);
  return distance > 0.0f ? distance : 0.0f;
}
__device__ __forceinline__ float framed_upper(float square, float error, float rho) {
  const float most = add_up(square, error);
  return add_up(sqrt_up(most > 0.0f ? most : 0.0f), rho);
}

struct SupportThreshold {
  float T, u;
};
// `reach`: t* above, >= 0. Anything infinite: keep everything.
__device__ __forceinline__ SupportThreshold support_threshold(float reach, float n_i, float rho_i, float eta) {
  const float t = add_up(reach, rho_i);
  const float least = multiply_down(n_i, add_down(1.0f, -eta));
  const float T = add_up(multiply_up(t, t), -least);
  const float u = multiply_up(2.0f, t);
  if (!(u < kInfinity) || !(T < kInfinity)) return {kInfinity, 0.0f};
  return {T, u};
}

struct FarThreshold {
  float G, g2;
};
// `reach`: f above.
__device__ __forceinline__ FarThreshold far_threshold(float reach, float n_i, float rho_i, float eta) {
  const float g = add_down(reach, -rho_i);
  if (!(g > 0.0f)) return {-kInfinity, 0.0f};
  const float most = multiply_up(n_i, add_up(1.0f, eta));
  const float g2 = multiply_down(2.0f, g);
  const float G = add_down(multiply_down(g, g), -most);
  if (!(g2 < kInfinity) || !(G < kInfinity)) return {-kInfinity, 0.0f};
  return {G, g2};
}

// The copy of fp32 rows. rho bounds |v - h|, v the exact (x - m) 2^e. With v' = fl(x - m) and w = fl(v' 2^e):
//   |v' - (x - m)| <= 2^-24 |v'| for each element (a difference never underflows);
//   w = v' 2^e but for subnormal results, which are off by at most 2^-150: 2^-144 in norm up to D = 2^12, and at most
//   2^-126 however long a row is;
//   r = w - h is exact in fp32: h rounds w to fewer bits, so the rest is representable (an overflowing h is found);
//   |v'| 2^e <= |h| + |r| + 2^-126;
//   R = sum r^2 and n have a relative error of (Dpad/32 + 16) 2^-24; where r^2 underflows, at most 2^-150 an element is
//   lost, 2^-67 of |r|.
// Hence |v - h| <= |r| (1 + 2^-24) + 2^-24 |h| + 2^-126, and
//   rho = sqrt(R) row_slack + 2^-23 sqrt(n) + 2^-60,   row_slack = 1 + 2^-20 + (Dpad/32 + 16) 2^-23
// rounded up is above it.
//
// Where x = m in all columns, nothing is rounded: rho = 0.
//
// One element v' of a row: its copy, and what it adds to n and R.
__device__ __forceinline__ Half copy_element(float centred, float scale, float& squares, float& rests) {
  const float scaled = multiply(centred, scale);
  const Half copy = narrow<Half>(scaled);
  const float copied = widen(copy);
  const float rest = subtract(scaled, copied);
  squares = fused_multiply_add(copied, copied, squares);
  rests = fused_multiply_add(rest, rest, rests);
  return copy;
}
__device__ __forceinline__ float residual_bound(float squares, float rests, float row_slack) {
  return add_up(fma_up(0x1p-23f, sqrt_up(squares), multiply_up(row_slack, sqrt_up(rests))), 0x1p-60f);
}

// What the epilogue holds of a candidate.
__device__ __forceinline__ float support_bias(float n_j, float rho_j, float eta) {  // P_j
  const float rho = multiply_up(rho_j, kRhoMargin);
  return add_down(multiply_down(n_j, add_down(1.0f, -eta)), -multiply_up(rho, rho));
}
__device__ __forceinline__ float far_bias(float n_j, float rho_j, float eta) {  // Q_j, of an anchor n_i (1 + eta)
  return rho_j < kInfinity ? multiply_up(n_j, add_up(1.0f, eta)) : kInfinity;
}

}  // namespace sn::cuda
