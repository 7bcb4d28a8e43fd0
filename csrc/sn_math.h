// The mathematics of the loss, once, for every native backend: the order of neighbours, the log-space terms
// and the edge coefficients. Scalar code on plain types; host and device.
//
// Source: Li, Ding, Li, Zhang, Fu, "Support Neighbor Loss for Person Re-Identification", ACM MM 2018 (arXiv
// 1808.06030).
#pragma once

#include <cmath>
#include <cstdint>

#include "sn_types.h"

// always_inline, not merely inline: the kernels are compiled once per instruction set, and a shared
// out-of-line copy would let the linker hand code compiled for a newer CPU to an older one.
#if defined(__CUDACC__)
#define SN_INLINE __host__ __device__ __forceinline__
#else
#define SN_INLINE inline __attribute__((always_inline))
#endif

namespace sn {

// A neighbour's key: (unclamped d2, index), ties to the lower index. d2 is never negative and never NaN here,
// so its bits order as it does and key comparison is one integer comparison. kNoKey is above every real key,
// +inf included.
inline constexpr std::uint64_t kNoKey = ~std::uint64_t{0};

SN_INLINE std::uint64_t pack_key(float squared_distance, std::int32_t index) {
  union {
    float value;
    std::uint32_t bits;
  } pun{squared_distance};
  return (static_cast<std::uint64_t>(pun.bits) << 32) | static_cast<std::uint32_t>(index);
}
SN_INLINE std::int32_t key_index(std::uint64_t key) {
  return static_cast<std::int32_t>(key & 0xffffffffu);
}
SN_INLINE float key_squared_distance(std::uint64_t key) {
  union {
    std::uint32_t bits;
    float value;
  } pun{static_cast<std::uint32_t>(key >> 32)};
  return pun.value;
}

// near_i: smaller d2 first, then the lower index. far_i: larger d2 first, then the lower index.
template <class Acc>
SN_INLINE bool nearer(Acc d2, std::int32_t index, Acc other_d2, std::int32_t other_index) {
  return d2 < other_d2 || (d2 == other_d2 && index < other_index);
}
template <class Acc>
SN_INLINE bool farther(Acc d2, std::int32_t index, Acc other_d2, std::int32_t other_index) {
  return d2 > other_d2 || (d2 == other_d2 && index < other_index);
}

// A positive found outside the support set's bookkeeping: near_i or far_i.
template <class Acc>
struct Positive {
  std::int32_t index;  // -1: the anchor has none
  Acc d2;
};

// What one anchor adds to the loss and to the statistics.
struct AnchorTerms {
  double loss = 0.0;
  double positive_sum = 0.0;  // sum of d over P_i
  double negative_sum = 0.0;  // sum of d over N_i
  std::int64_t positives = 0;
  std::int64_t negatives = 0;
  std::int64_t valid = 0;
  std::int64_t nearest_is_positive = 0;
  std::int64_t support_positives = 0;
};

template <class Acc>
SN_INLINE double clamped_distance(Acc d2) {
  const double wide = static_cast<double>(d2);
  return sqrt(wide > kSquaredDistanceFloor ? wide : kSquaredDistanceFloor);
}

// One anchor, from its selection to its loss and edge coefficients. The scalar stage runs in double: it is
// cheap, and exp(-alpha d) amplifies every rounding of d by alpha.
//
// With v = lse_N - lse_P (lse over -alpha d) and s = sigmoid(v):
//   separation = softplus(v),   d separation / d d_j = alpha s softmax_P(j) on P,   -alpha s softmax_N(j) on
//   N.
// Neither form subtracts nearly equal numbers, and neither overflows for any alpha d.
//
// indices    [K + 2]  slots 0..K-1 hold S_i in order (-1: unused) on entry; slots K and K + 1 are set here
// (sn_types.h) d2         [K]      squared distances of S_i positive   [K]      1 where the slot's candidate
// has the anchor's label coefficients [K + 2] out: (dL_i / dd_ij) / d_ij of each edge
template <class Acc>
SN_INLINE AnchorTerms anchor_terms(const LossOptions& options, std::int64_t K, std::int32_t* indices, const Acc* d2,
                                   const std::uint8_t* positive, Positive<Acc> near, Positive<Acc> far,
                                   Acc* coefficients) {
  AnchorTerms terms;
  indices[K] = -1;
  indices[K + 1] = -1;
  for (std::int64_t e = 0; e < K + kExtraEdges; ++e) coefficients[e] = Acc(0);
  if (near.index < 0) return terms;
  terms.valid = 1;

  // Where the special edges live. The first positive of S_i is near_i: both are first in the same order.
  std::int64_t near_slot = K;
  std::int64_t far_slot = K + 1;
  bool finite = true;
  for (std::int64_t e = K - 1; e >= 0; --e) {
    if (indices[e] < 0) continue;
    finite = finite && std::isfinite(d2[e]);
    if (positive[e]) {
      near_slot = e;
      ++terms.support_positives;
    }
    if (indices[e] == far.index) far_slot = e;
  }
  const bool spans = options.squeeze == Squeeze::kSpan;
  if (near_slot == K) indices[K] = near.index;
  if (far_slot == K + 1) {
    if (far.index == near.index) {
      far_slot = near_slot;
    } else if (spans) {
      indices[K + 1] = far.index;
    }
  }
  finite = finite && std::isfinite(near.d2) && (!spans || std::isfinite(far.d2));
  terms.nearest_is_positive = near_slot == 0 && K > 0 ? 1 : 0;

  // Smallest distance of each side, for the log-sum-exps.
  const double near_d = clamped_distance(near.d2);
  double nearest_negative = 0.0;
  std::int64_t last_positive = near_slot;  // farthest member of P_i, the lower index on a tie
  for (std::int64_t e = 0; e < K; ++e) {
    if (indices[e] < 0) continue;
    const double d = clamped_distance(d2[e]);
    if (positive[e]) {
      terms.positive_sum += d;
      ++terms.positives;
      if (last_positive == K || d2[e] > d2[last_positive]) last_positive = e;
    } else {
      if (terms.negatives == 0) nearest_negative = d;
      terms.negative_sum += d;
      ++terms.negatives;
    }
  }
  if (near_slot == K) {
    terms.positive_sum = near_d;
    terms.positives = 1;
  }
  if (!finite) {
    // A selected distance overflowed: say so loudly, in the loss and in every gradient this anchor feeds.
    terms.loss = HUGE_VAL;
    for (std::int64_t e = 0; e < K + kExtraEdges; ++e) {
      if (indices[e] >= 0) coefficients[e] = Acc(NAN);
    }
    return terms;
  }

  double separation = 0.0;
  double share = 0.0;  // s above
  double positive_mass = near_slot == K ? 1.0 : 0.0;
  double negative_mass = 0.0;
  if (terms.negatives > 0) {
    for (std::int64_t e = 0; e < K; ++e) {
      if (indices[e] < 0) continue;
      const double d = clamped_distance(d2[e]);
      const double mass = exp(-options.alpha * (d - (positive[e] ? near_d : nearest_negative)));
      (positive[e] ? positive_mass : negative_mass) += mass;
      coefficients[e] = static_cast<Acc>(mass);  // kept for the slopes below
    }
    if (near_slot == K) coefficients[K] = Acc(1);
    const double v = log(negative_mass / positive_mass) + options.alpha * (near_d - nearest_negative);
    const double tail = exp(-fabs(v));
    separation = (v > 0.0 ? v : 0.0) + log1p(tail);
    share = (v > 0.0 ? 1.0 : tail) / (1.0 + tail);
  }

  double squeeze = 0.0;
  double near_squeeze = 0.0;  // d squeeze / d d(near), and of the edge opposite to it
  std::int64_t opposite = -1;
  double opposite_d = 0.0;
  switch (options.squeeze) {
    case Squeeze::kSpan:
      opposite = far_slot;
      opposite_d = clamped_distance(far.d2);
      break;
    case Squeeze::kSupport:
      if (terms.positives > 1) {
        opposite = last_positive;
        opposite_d = clamped_distance(d2[last_positive]);
      } else {
        near_squeeze = 1.0;
      }
      break;
    case Squeeze::kNearest:
      near_squeeze = 1.0;
      break;
    case Squeeze::kNone:
      break;
  }
  if (opposite >= 0 && opposite != near_slot) {
    near_squeeze = -1.0;
    squeeze = opposite_d - near_d;
  } else if (near_squeeze > 0.0) {
    squeeze = near_d;
  }
  terms.loss = separation + options.weight * squeeze;

  for (std::int64_t e = 0; e < K + kExtraEdges; ++e) {
    if (indices[e] < 0) continue;
    const Acc edge_d2 = e < K ? d2[e] : (e == K ? near.d2 : far.d2);
    const double mass = static_cast<double>(coefficients[e]);
    coefficients[e] = Acc(0);
    if (static_cast<double>(edge_d2) < kSquaredDistanceFloor) continue;  // the clamp holds: no gradient
    const double d = clamped_distance(edge_d2);
    double slope = 0.0;
    if (share > 0.0) {
      if (e == near_slot || (e < K && positive[e])) {
        slope = options.alpha * share * mass / positive_mass;
      } else if (e < K) {
        slope = -options.alpha * share * mass / negative_mass;
      }
    }
    if (e == near_slot) slope += options.weight * near_squeeze;
    if (e == opposite && opposite != near_slot) slope += options.weight;
    coefficients[e] = static_cast<Acc>(slope / d);
  }
  return terms;
}

}  // namespace sn
