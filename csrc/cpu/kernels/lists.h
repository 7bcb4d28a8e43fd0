// Screening: each anchor's list of the candidates that may still be among its K nearest. Included by kernels.cpp alone,
// inside its namespace.
#pragma once

// An upper bound of the `wanted`-th smallest of `count` values, finite or +inf, by bisection of their range. `values`
// has room up to a whole vector; values past `count` are overwritten. Tight to 2^-steps of the range: with 16 a tighter
// bound drops no more candidates.
SN_FORCE_INLINE float rank_bound(float* values, std::int64_t count, std::int64_t wanted, int steps = 16) {
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
  for (int step = 0; step < steps; ++step) {
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

// A value that at least `wanted` of the values that load(v), v < vectors, gives sixteen at a time do not exceed, and
// few more. They are dealt to lanes, one or more sets of sixteen, at most as many as vectors; of the least values of
// the lanes it is about the `wanted`-th smallest. None counts as more than `most`.
template <class Load>
SN_FORCE_INLINE float lanes_bound(std::int64_t vectors, std::int64_t wanted, float most, int steps, Load load) {
  alignas(64) float least[kListMost + kLanes];
  const std::int64_t sets = (wanted + kLanes - 1) / kLanes;
  for (std::int64_t set = 0; set < sets; ++set) {
    F16 lanes = f_set1(most);
    for (std::int64_t v = set * vectors / sets; v < (set + 1) * vectors / sets; ++v) lanes = f_min(lanes, load(v));
    f_store(least + set * kLanes, lanes);
  }
  return rank_bound(least, sets * kLanes, wanted, steps);
}

// Hits between prunings. A stale threshold admits more candidates, each a cache miss; a pruning costs about fifteen.
inline constexpr std::int32_t kPruneAfter = 32;

// The upper bound of a known distance, on the scale of w + E_q.
SN_FORCE_INLINE float exact_upper_bound(const Screen& screen, std::int64_t p, float d2) {
  return 0.5f * (d2 - (screen.anchors.norm[p] + screen.anchors.slack[p]));
}

__attribute__((noinline)) void prune(const Screen& screen, std::int64_t p) {
  Entry* entries = screen.lists + p * screen.capacity;
  const std::int64_t count = screen.list_counts[p];
  if (count == 0 || count < screen.K) return;
  const std::int64_t exact = screen.exact_counts[p];
  alignas(64) float upper[kListMost];
  for (std::int64_t e = 0; e < exact; ++e) upper[e] = exact_upper_bound(screen, p, entries[e].score);
  for (std::int64_t e = exact; e < count; ++e) {
    upper[e] = entries[e].score + screen.candidates.slack[entries[e].candidate];
  }
  const float bound = rank_bound(upper, count, screen.K) + screen.anchors.slack[p];
  if (bound < screen.thresholds[p]) screen.thresholds[p] = bound;
  const float threshold = screen.thresholds[p];
  std::int64_t kept = exact;
#if defined(__AVX512F__)
  // Eight entries at a time, an entry a 64-bit lane with the score in the upper half.
  static_assert(sizeof(Entry) == sizeof(std::uint64_t));
  for (std::int64_t e = exact; e < count; e += 8) {
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
  for (std::int64_t e = exact; e < count; ++e) {
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

// Inserts a candidate of known distance into the exact front of the list, in order, if it is among the K nearest there.
// The caller sees to it that the list has room.
SN_FORCE_INLINE void insert_exact(const Screen& screen, std::int64_t p, std::int64_t candidate, float d2) {
  Entry* entries = screen.lists + p * screen.capacity;
  const std::int32_t* order = screen.candidates.order;
  const std::uint64_t key = pack_key(d2, order[candidate]);
  const auto key_at = [&](std::int64_t e)
                          SN_LAMBDA_INLINE { return pack_key(entries[e].score, order[entries[e].candidate]); };
  std::int64_t at = screen.exact_counts[p];
  if (at == screen.K) {
    if (key > key_at(--at)) return;
  } else {
    entries[screen.list_counts[p]++] = entries[at];  // the first of the others moves to the end
    ++screen.exact_counts[p];
  }
  for (; at > 0 && key_at(at - 1) > key; --at) entries[at] = entries[at - 1];
  entries[at] = {static_cast<std::int32_t>(candidate), d2};
  if (screen.exact_counts[p] == screen.K) {
    const float bound = exact_upper_bound(screen, p, entries[screen.K - 1].score) + screen.anchors.slack[p];
    if (bound < screen.thresholds[p]) screen.thresholds[p] = bound;
  }
}

// Computes the direct distances of a full list that bounds cannot shorten: a cluster too tight for the screening.
template <class T>
void resolve_exactly_as(const Screen& screen, std::int64_t p) {
  Entry* entries = screen.lists + p * screen.capacity;
  const std::int64_t exact = screen.exact_counts[p];
  const std::int64_t count = screen.list_counts[p] - exact;
  Entry open[kListMost];
  float d2[kListMost];
  for (std::int64_t e = 0; e < count; ++e) open[e] = entries[exact + e];
  direct_list_of<T>(screen, p, open, count, d2);
  screen.list_counts[p] = static_cast<std::int32_t>(exact);
  for (std::int64_t e = 0; e < count; ++e) insert_exact(screen, p, open[e].candidate, d2[e]);
  screen.list_limits[p] = static_cast<std::int32_t>(screen.capacity);
}

inline void resolve_exactly(const Screen& screen, std::int64_t p) {
  switch (screen.dtype) {
    case DType::kFloat32:
      return resolve_exactly_as<float>(screen, p);
    case DType::kFloat16:
      return resolve_exactly_as<Half>(screen, p);
    case DType::kBFloat16:
      return resolve_exactly_as<BFloat16>(screen, p);
    case DType::kFloat64:
      break;  // never screened
  }
}

// A list with less room than this after pruning is resolved at once: pruning again and again would cost more.
inline constexpr std::int64_t kLeastRoom = 2 * kPanel;

__attribute__((noinline)) void make_room(const Screen& screen, std::int64_t p) {
  prune(screen, p);
  if (screen.list_counts[p] > screen.capacity - kLeastRoom) resolve_exactly(screen, p);
}

SN_FORCE_INLINE void append(const Screen& screen, std::int64_t p, std::int64_t candidate, float score) {
  if (score > screen.thresholds[p]) return;  // the threshold has moved since the hit was found
  if (__builtin_expect(screen.list_counts[p] >= screen.list_limits[p], 0)) {
    make_room(screen, p);
    if (score > screen.thresholds[p]) return;
  }
  screen.lists[p * screen.capacity + screen.list_counts[p]++] = {static_cast<std::int32_t>(candidate), score};
}
