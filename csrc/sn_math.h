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

// Finite or not, without <cmath>, which device code may not call through std.
template <class Acc>
SN_INLINE bool is_finite_number(Acc value) {
  return value - value == Acc(0);
}

// A group of lanes that works on one anchor. On the CPU it is one lane; a GPU's warp has the same members. `rank` and
// `size` share out the edges: e = rank, rank + size, ...; what the members return is the same in all lanes.
//
// kOneEdge: no lane has more than one edge, K + 2 of them in all. Then lanes can work on what one lane would do in
// turn: `of` is the value that the lane of edge e has computed. Else it is computed anew, by `compute`.
struct OneLane {
  static constexpr bool kOneEdge = false;
  SN_INLINE std::int64_t rank() const { return 0; }
  SN_INLINE std::int64_t size() const { return 1; }
  SN_INLINE double sum(double value) const { return value; }
  SN_INLINE std::int64_t sum(std::int64_t value) const { return value; }
  SN_INLINE std::int64_t least(std::int64_t value) const { return value; }     // values are in [0, K + 2)
  SN_INLINE std::int64_t greatest(std::int64_t value) const { return value; }  // values are in [0, K + 2)
  SN_INLINE bool any(bool vote) const { return vote; }
  template <class Compute>
  SN_INLINE double of(double, std::int64_t, const Compute& compute) const {
    return compute();
  }
};

// The support set of an anchor as plain arrays. A GPU's lies in shared memory and has the same members.
template <class Acc>
struct SupportArrays {
  const std::int32_t* indices;    // [K] in order, -1: unused
  const Acc* squared_distances;   // [K]
  const std::uint8_t* positives;  // [K] 1 where the slot's candidate has the anchor's label

  SN_INLINE std::int32_t index(std::int64_t e) const { return indices[e]; }
  SN_INLINE Acc d2(std::int64_t e) const { return squared_distances[e]; }
  SN_INLINE bool positive(std::int64_t e) const { return positives[e] != 0; }
};

// One anchor, from its selection to its loss and edge coefficients. The scalar stage runs in double: it is
// cheap, and exp(-alpha d) amplifies every rounding of d by alpha.
//
// With v = lse_N - lse_P (lse over -alpha d) and s = sigmoid(v):
//   separation = softplus(v),   d separation / d d_j = alpha s softmax_P(j) on P,   -alpha s softmax_N(j) on N.
// Each side's masses exp(-alpha (d - its nearest)) add up to P and to N, between 1 and K. With x = alpha (nearest of P
// - nearest of N), exp(v) = N exp(x) / P = a / b, where the side that is farther is scaled down by q = exp(-|x|):
// a = N q or b = P q. So
//   s = a / (a + b),   softplus(v) = log((a + b) / b) = max(x, 0) + log((a + b) / P),
// one logarithm behind the sums. a + b is between 1 and 2 K, so nothing overflows for any alpha d, and what cancels is
// less than log K. Of a small a alone, log1p keeps every digit.
//
// Every lane of the group calls it with the same arguments and gets the same result. An edge belongs to one lane, which
// alone touches its entries of the outputs; entries of `support` are read by all.
//
// support             S_i in order: index (-1: unused, only behind the used ones), d2, positive
// extra_indices [2]   out: near_i and far_i where they are edges of their own, else -1 (sn_types.h)
// coefficients [K + 2] out: (dL_i / dd_ij) / d_ij of each edge
template <class Acc, class Group, class Support>
SN_INLINE AnchorTerms anchor_terms(const Group& group, const LossOptions& options, std::int64_t K,
                                   const Support& support, Positive<Acc> near, Positive<Acc> far,
                                   std::int32_t* extra_indices, Acc* coefficients) {
  AnchorTerms terms;
  const std::int64_t first = group.rank();
  const std::int64_t step = group.size();
  const std::int64_t edges = K + kExtraEdges;
  const bool owns_near = K % step == first;
  const bool owns_far = (K + 1) % step == first;
  if (near.index < 0) {
    for (std::int64_t e = first; e < edges; e += step) coefficients[e] = Acc(0);
    if (owns_near) extra_indices[0] = -1;
    if (owns_far) extra_indices[1] = -1;
    return terms;
  }
  terms.valid = 1;

  // What each side adds up to, and where the special edges live. The first positive of S_i is near_i: both are first in
  // the same order.
  const bool spans = options.squeeze == Squeeze::kSpan;
  const auto next = [&](std::int64_t e) { return Group::kOneEdge ? edges : e + step; };
  const bool own = first < K && support.index(first) >= 0;  // this lane's first edge: most lanes of a GPU have no other
  // The lanes behind the neighbours have the roots of near and far.
  const double own_d = clamped_distance(own ? support.d2(first) : owns_near ? near.d2 : far.d2);
  const double near_d = group.of(own_d, K, [&] { return clamped_distance(near.d2); });
  std::int64_t near_slot = K;
  std::int64_t far_slot = K + 1;
  std::int64_t first_negative = K;
  std::int64_t last_positive = 0;
  bool finite = is_finite_number(near.d2) && (!spans || is_finite_number(far.d2));
  for (std::int64_t e = first; e < K; e = next(e)) {
    const std::int32_t index = support.index(e);
    if (index < 0) continue;
    const Acc d2 = support.d2(e);
    const double d = e == first ? own_d : clamped_distance(d2);
    finite = finite && is_finite_number(d2);
    if (index == far.index) far_slot = e;
    if (support.positive(e)) {
      if (near_slot == K) near_slot = e;
      last_positive = e;
      terms.positive_sum += d;
      ++terms.positives;
    } else {
      if (first_negative == K) first_negative = e;
      terms.negative_sum += d;
      ++terms.negatives;
    }
  }
  finite = !group.any(!finite);
  near_slot = group.least(near_slot);
  far_slot = group.least(far_slot);
  first_negative = group.least(first_negative);
  last_positive = group.greatest(last_positive);
  terms.positives = group.sum(terms.positives);
  terms.negatives = group.sum(terms.negatives);
  terms.support_positives = terms.positives;
  terms.nearest_is_positive = near_slot == 0 && K > 0 ? 1 : 0;

  const bool near_edge = near_slot == K;  // an edge of its own
  if (far_slot == K + 1 && far.index == near.index) far_slot = near_slot;
  const bool far_edge = far_slot == K + 1 && spans;
  if (owns_near) extra_indices[0] = near_edge ? near.index : -1;
  if (owns_far) extra_indices[1] = far_edge ? far.index : -1;

  // Masses: none where a selected distance overflowed, or where there is one side alone.
  const bool contested = finite && terms.negatives > 0;
  double positive_mass = 0.0;
  double negative_mass = 0.0;
  double x = 0.0;
  double q = 1.0;
  Acc own_mass = Acc(0);
  if (contested) {
    const double nearest_negative =
        group.of(own_d, first_negative, [&] { return clamped_distance(support.d2(first_negative)); });
    x = options.alpha * (near_d - nearest_negative);
    const double q_exponent = x > 0.0 ? -x : x;
    double own_q = 0.0;
    for (std::int64_t e = first; Group::kOneEdge ? e <= K : e < K; e = next(e)) {  // one lane's turn is at q
      const bool used = e < K && support.index(e) >= 0;
      if (!used && !Group::kOneEdge) continue;
      const bool positive = used && support.positive(e);
      const double d = e == first ? own_d : clamped_distance(support.d2(e));
      const double mass = exp(used ? -options.alpha * (d - (positive ? near_d : nearest_negative)) : q_exponent);
      if (!used) {
        own_q = mass;
        continue;
      }
      (positive ? positive_mass : negative_mass) += mass;
      // Kept for the slopes below.
      if (e == first) {
        own_mass = static_cast<Acc>(mass);
      } else {
        coefficients[e] = static_cast<Acc>(mass);
      }
    }
    q = group.of(own_q, K, [&] { return exp(q_exponent); });
  }
  // All four at once: on a GPU each is a chain of exchanges.
  terms.positive_sum = group.sum(terms.positive_sum);
  terms.negative_sum = group.sum(terms.negative_sum);
  positive_mass = group.sum(positive_mass);
  negative_mass = group.sum(negative_mass);
  if (near_edge) {
    terms.positive_sum = near_d;
    terms.positives = 1;
    positive_mass = 1.0;
  }

  if (!finite) {
    // A selected distance overflowed: say so loudly, in the loss and in every gradient this anchor feeds.
    terms.loss = HUGE_VAL;
    for (std::int64_t e = first; e < edges; e = next(e)) {
      const bool used = e < K ? support.index(e) >= 0 : (e == K ? near_edge : far_edge);
      coefficients[e] = used ? Acc(NAN) : Acc(0);
    }
    return terms;
  }

  const double a = x > 0.0 ? negative_mass : negative_mass * q;  // 0 where there is no negative
  const double b = x > 0.0 ? positive_mass * q : positive_mass;

  double near_squeeze = 0.0;  // d squeeze / d d(near), and of the edge opposite to it
  std::int64_t opposite = -1;
  Acc opposite_d2 = far.d2;
  switch (options.squeeze) {
    case Squeeze::kSpan:
      opposite = far_slot;
      break;
    case Squeeze::kSupport:
      if (terms.positives > 1) {
        // Farthest member of P_i, the lower index on a tie: the first positive as far as the last.
        opposite_d2 = support.d2(last_positive);
        std::int64_t candidate = last_positive;
        for (std::int64_t e = last_positive; e >= 0 && support.d2(e) == opposite_d2; --e) {
          if (support.positive(e)) candidate = e;
        }
        opposite = candidate;
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
  double squeeze = 0.0;
  if (opposite >= 0 && opposite != near_slot) {
    near_squeeze = -1.0;
    squeeze = group.of(own_d, spans ? K + 1 : last_positive, [&] { return clamped_distance(opposite_d2); }) - near_d;
  } else if (near_squeeze > 0.0) {
    squeeze = near_d;
  }

  for (std::int64_t e = first; e < edges; e = next(e)) {
    const bool used = e < K ? support.index(e) >= 0 : (e == K ? near_edge : far_edge);
    const Acc edge_d2 = !used ? Acc(0) : (e < K ? support.d2(e) : (e == K ? near.d2 : far.d2));
    if (static_cast<double>(edge_d2) < kSquaredDistanceFloor) {  // unused, or the clamp holds: no gradient
      coefficients[e] = Acc(0);
      continue;
    }
    // The slope is numerator / scale, so that there is one division: a GPU waits long for each.
    const double d = e == first ? own_d : clamped_distance(edge_d2);
    double numerator = 0.0;
    double scale = 1.0;
    if (a > 0.0 && e <= K) {
      const bool positive = e == K || support.positive(e);
      // near_i outside the support set is all of its side.
      const double mass = e == K ? 1.0 : static_cast<double>(e == first ? own_mass : coefficients[e]);
      numerator = (positive ? options.alpha : -options.alpha) * a * mass;
      scale = (a + b) * (positive ? positive_mass : negative_mass);
    }
    if (e == near_slot) numerator += options.weight * near_squeeze * scale;
    if (e == opposite && opposite != near_slot) numerator += options.weight * scale;
    coefficients[e] = static_cast<Acc>(numerator / (scale * d));
  }

  // Last: on a GPU what depends on nothing else is under way before it.
  const double separation =
      contested ? (x > 0.0 ? x : 0.0) + log1p((x > 0.0 ? (negative_mass - positive_mass) + b : a) / positive_mass)
                : 0.0;
  terms.loss = separation + options.weight * squeeze;
  return terms;
}

}  // namespace sn
