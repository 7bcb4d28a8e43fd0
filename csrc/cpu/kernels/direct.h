// Direct squared distances sum_c (x_c - z_c)^2 in the one summation order of the CPU backend.
//
// The order, the same for every path, instruction set, number of threads and rest of the batch:
//   D is cut into segments of 64. In a segment lane l (of 16) adds elements l, 16 + l, 32 + l, 48 + l, in this order,
//   to an accumulator that starts at 0, each by a fused multiply-add of the rounded difference with itself. The lanes
//   are added as a tree: l with l + 8, then + 4, + 2, + 1. Segment sums are added one after the other to a total that
//   starts at 0. Elements past D count as 0 - 0, which changes no bit. fp64 does the same in doubles.
//
// Rounding: each term passes one subtraction (squared: two roundings), at most four multiply-adds, four levels of the
// tree and ceil(D / 64) additions. All terms are positive, so |sum - d2| <= (D / 64 + 13) 2^-24 d2, apart from
// underflow. Included by kernels.cpp alone, inside its namespace.
#pragma once

inline constexpr int kSegment = kSegmentColumns;
inline constexpr int kSteps = kSegment / kLanes;
inline constexpr int kPairs = 16;  // pairs reduced together: one vector of sums
static_assert(kSegment % kLanes == 0, "a segment is whole vectors");
static_assert(kPairs == kLanes, "sixteen accumulators are transposed into one vector of sums");

template <class T>
struct Wide {
  using Acc = float;
  using Vec = F16;
  static SN_FORCE_INLINE Vec zero() { return f_zero(); }
  static SN_FORCE_INLINE Vec load(const T* p) { return f_load(p); }
  static SN_FORCE_INLINE Vec load(const T* p, int count) { return f_load_partial(p, count); }
  static SN_FORCE_INLINE void store(float* p, Vec v) { f_store(p, v); }
  static SN_FORCE_INLINE Vec square_difference(Vec x, Vec z, Vec acc) {
    const Vec t = f_sub(x, z);
    return f_fma(t, t, acc);
  }
};
template <>
struct Wide<double> {
  using Acc = double;
  using Vec = D16;
  static SN_FORCE_INLINE Vec zero() { return d_zero(); }
  static SN_FORCE_INLINE Vec load(const double* p) { return d_load(p); }
  static SN_FORCE_INLINE Vec load(const double* p, int count) { return d_load_partial(p, count); }
  static SN_FORCE_INLINE void store(double* p, Vec v) { std::memcpy(p, &v, sizeof v); }
  static SN_FORCE_INLINE Vec square_difference(Vec x, Vec z, Vec acc) {
    const Vec t = f_sub(x, z);
    return f_fma(t, t, acc);
  }
};

// The sum of the lanes of one accumulator, as a tree.
template <class Acc>
SN_FORCE_INLINE Acc tree_sum(const Acc* lanes) {
  Acc a[8];
  for (int l = 0; l < 8; ++l) a[l] = lanes[l] + lanes[l + 8];
  for (int l = 0; l < 4; ++l) a[l] += a[l + 4];
  for (int l = 0; l < 2; ++l) a[l] += a[l + 2];
  return a[0] + a[1];
}

#if defined(__AVX2__)

// One level of the tree within groups of four lanes: adds the lanes that two masks pick.
#if defined(__AVX512F__)
using FloatVector = __m512;
template <int kFirst, int kSecond>
SN_FORCE_INLINE __m512 add_shuffled(__m512 a, __m512 b) {
  return _mm512_add_ps(_mm512_shuffle_ps(a, b, kFirst), _mm512_shuffle_ps(a, b, kSecond));
}
#else
using FloatVector = __m256;
template <int kFirst, int kSecond>
SN_FORCE_INLINE __m256 add_shuffled(__m256 a, __m256 b) {
  return _mm256_add_ps(_mm256_shuffle_ps(a, b, kFirst), _mm256_shuffle_ps(a, b, kSecond));
}
#endif

// The last two levels of the tree.
SN_FORCE_INLINE FloatVector reduce4(const FloatVector (&fours)[4]) {
  FloatVector twos[2];
#pragma GCC unroll 2
  for (int i = 0; i < 2; ++i) twos[i] = add_shuffled<0x44, 0xee>(fours[i], fours[i + 2]);
  return add_shuffled<0x88, 0xdd>(twos[0], twos[1]);
}

#endif

#if defined(__AVX512F__)

// Sixteen accumulators to one vector of tree sums. Each level adds halves of two vectors at once, so that the sums come
// out transposed. Pair n must be accumulated in kReduceSlot[n] to come out in lane n.
inline constexpr int kReduceSlot[kPairs] = {0, 2, 1, 3, 8, 10, 9, 11, 4, 6, 5, 7, 12, 14, 13, 15};

SN_FORCE_INLINE __m512 reduce16(const __m512 (&acc)[kPairs]) {
  __m512 eights[8];
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) {
    eights[i] =
        _mm512_add_ps(_mm512_shuffle_f32x4(acc[i], acc[i + 8], 0x44), _mm512_shuffle_f32x4(acc[i], acc[i + 8], 0xee));
  }
  __m512 fours[4];
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    fours[i] = _mm512_add_ps(_mm512_shuffle_f32x4(eights[i], eights[i + 4], 0x88),
                             _mm512_shuffle_f32x4(eights[i], eights[i + 4], 0xdd));
  }
  return reduce4(fours);
}

#elif defined(__AVX2__)

inline constexpr int kReduceSlot[8] = {0, 2, 1, 3, 4, 6, 5, 7};

// Eight accumulators to one vector; their first level of the tree (l with l + 8) is already added.
SN_FORCE_INLINE __m256 reduce8(const __m256* acc) {
  __m256 fours[4];
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const __m256 a = acc[kReduceSlot[i]];
    const __m256 b = acc[kReduceSlot[i + 4]];
    fours[i] = _mm256_add_ps(_mm256_permute2f128_ps(a, b, 0x20), _mm256_permute2f128_ps(a, b, 0x31));
  }
  return reduce4(fours);
}

#endif

// One segment of sixteen pairs: anchors x[0..RA) against candidates z[0..RC), RA * RC = 16. sums[a * RC + c] gets the
// segment sum of pair (a, c). kFull: the segment is whole and `length` is not read. RA * RC = 8 computes half as much,
// for the end of a list; `sums` still has room for sixteen. kOwn: each anchor has candidates of its own, z[a * RC + c].
template <class T, int RA, int RC, bool kFull, bool kOwn = false>
SN_FORCE_INLINE void segment_pairs(const T* const* x, const T* const* z, std::int64_t offset, int length,
                                   typename Wide<T>::Acc* sums) {
  constexpr int kCount = RA * RC;
  static_assert(kCount == kPairs || kCount == kPairs / 2, "one vector of sums, or half of one");
  using W = Wide<T>;
  using Vec = typename W::Vec;
  using Acc = typename W::Acc;
  const int steps = kFull ? kSteps : (length + kLanes - 1) / kLanes;

#if defined(__AVX512F__)
  if constexpr (sizeof(Acc) == sizeof(float)) {
    __m512 acc[kPairs];
#pragma GCC unroll 16
    for (int p = 0; p < kPairs; ++p) acc[p] = _mm512_setzero_ps();
#pragma GCC unroll 4
    for (int t = 0; t < steps; ++t) {
      const std::int64_t at = offset + t * kLanes;
      const int left = length - t * kLanes;
      const bool whole = kFull || left >= kLanes;
      const auto load = [&](const T* row)
                            SN_LAMBDA_INLINE { return whole ? W::load(row + at) : W::load(row + at, left); };
      Vec xs[RA];
#pragma GCC unroll 4
      for (int a = 0; a < RA; ++a) xs[a] = load(x[a]);
#pragma GCC unroll 16
      for (int c = 0; c < RC; ++c) {
        Vec zc = load(z[c]);
#pragma GCC unroll 4
        for (int a = 0; a < RA; ++a) {
          if (kOwn && a > 0) zc = load(z[a * RC + c]);
          const int slot = kReduceSlot[a * RC + c];
          acc[slot] = W::square_difference(xs[a], zc, Vec{acc[slot]}).v;
        }
      }
    }
    _mm512_storeu_ps(sums, reduce16(acc));
    return;
  }
#elif defined(__AVX2__)
  if constexpr (sizeof(Acc) == sizeof(float)) {
    __m256 halves[kCount];
    constexpr int kBatch = 4;  // eight registers of accumulators, of sixteen
#pragma GCC unroll 4
    for (int b = 0; b < kCount / kBatch; ++b) {
      Vec acc[kBatch] = {W::zero(), W::zero(), W::zero(), W::zero()};
      const int a = b * kBatch / RC;
      const int c0 = kOwn ? b * kBatch : b * kBatch % RC;
#pragma GCC unroll 4
      for (int t = 0; t < steps; ++t) {
        const std::int64_t at = offset + t * kLanes;
        const int left = length - t * kLanes;
        const bool whole = kFull || left >= kLanes;
        const Vec xa = whole ? W::load(x[a] + at) : W::load(x[a] + at, left);
#pragma GCC unroll 4
        for (int i = 0; i < kBatch; ++i) {
          const Vec zc = whole ? W::load(z[c0 + i] + at) : W::load(z[c0 + i] + at, left);
          acc[i] = W::square_difference(xa, zc, acc[i]);
        }
      }
#pragma GCC unroll 4
      for (int i = 0; i < kBatch; ++i) halves[b * kBatch + i] = _mm256_add_ps(acc[i].lo, acc[i].hi);
    }
    _mm256_storeu_ps(sums, reduce8(halves));
    if constexpr (kCount == kPairs) _mm256_storeu_ps(sums + 8, reduce8(halves + 8));
    return;
  }
#endif
  for (int a = 0; a < RA; ++a) {
    for (int c = 0; c < RC; ++c) {
      Vec acc = W::zero();
      for (int t = 0; t < steps; ++t) {
        const std::int64_t at = offset + t * kLanes;
        const int left = length - t * kLanes;
        const bool whole = kFull || left >= kLanes;
        const T* zc = z[kOwn ? a * RC + c : c];
        acc = W::square_difference(whole ? W::load(x[a] + at) : W::load(x[a] + at, left),
                                   whole ? W::load(zc + at) : W::load(zc + at, left), acc);
      }
      Acc lanes[kLanes];
      std::memcpy(lanes, &acc, sizeof lanes);
      sums[a * RC + c] = tree_sum(lanes);
    }
  }
}

// totals[p] += segment sums over columns [begin, end). `begin` is on a segment boundary.
template <class T, int RA, int RC>
SN_FORCE_INLINE void add_segments(const T* const* x, const T* const* z, std::int64_t begin, std::int64_t end,
                                  typename Wide<T>::Acc* totals) {
  alignas(64) typename Wide<T>::Acc sums[kPairs];
  std::int64_t at = begin;
  for (; at + kSegment <= end; at += kSegment) {
    segment_pairs<T, RA, RC, true>(x, z, at, kSegment, sums);
    for (int p = 0; p < kPairs; ++p) totals[p] += sums[p];
  }
  if (at < end) {
    segment_pairs<T, RA, RC, false>(x, z, at, static_cast<int>(end - at), sums);
    for (int p = 0; p < kPairs; ++p) totals[p] += sums[p];
  }
}

// Copies columns [begin, begin + pitch) of `count` rows side by side, in the accumulation type, with zeros past the
// last column and row.
template <class T>
SN_FORCE_INLINE void line_up(const void* const* rows, std::int64_t count, std::int64_t padded_count, std::int64_t begin,
                             std::int64_t dims, std::int64_t pitch, typename Wide<T>::Acc* out) {
  using W = Wide<T>;
  for (std::int64_t r = 0; r < padded_count; ++r) {
    const T* row = static_cast<const T*>(rows[r < count ? r : 0]) + begin;
    for (std::int64_t c = 0; c < pitch; c += kLanes) {
      const std::int64_t left = r < count ? dims - begin - c : 0;
      const typename W::Vec v =
          left >= kLanes ? W::load(row + c) : W::load(row + c, left > 0 ? static_cast<int>(left) : 0);
      W::store(out + r * pitch + c, v);
    }
  }
}

// A block of distances, nx x nz, both at most kDirectBlock: out[a * pitch + c]. x, z: row pointers. With `upper` x and
// z are the same rows and only tiles above the diagonal or on it are computed. Slices of the rows are lined up first:
// rows whose pitch is a power of two would compete for a few sets of the cache.
template <class T>
void direct_block(const void* const* x, std::int64_t nx, const void* const* z, std::int64_t nz, std::int64_t dims,
                  bool upper, void* out, std::int64_t pitch) {
  using Acc = typename Wide<T>::Acc;
  constexpr int kTile = 4;
  constexpr int kTiles = kDirectBlock / kTile;
  constexpr std::int64_t kChunk = 2 * kSegment;
  static_assert(kTile * kTile == kPairs && kDirectBlock % kTile == 0);
  alignas(64) Acc totals[kTiles * kTiles][kPairs];
  alignas(64) Acc slices[2][kDirectBlock * kChunk];
  const std::int64_t tx = (nx + kTile - 1) / kTile;
  const std::int64_t tz = (nz + kTile - 1) / kTile;
  for (std::int64_t t = 0; t < tx * kTiles; ++t) {
    for (int p = 0; p < kPairs; ++p) totals[t][p] = Acc(0);
  }
  for (std::int64_t begin = 0; begin < dims; begin += kChunk) {
    const std::int64_t chunk = dims - begin <= kSegment ? kSegment : kChunk;
    line_up<T>(x, nx, tx * kTile, begin, dims, chunk, slices[0]);
    if (!upper) line_up<T>(z, nz, tz * kTile, begin, dims, chunk, slices[1]);
    const Acc* anchors = slices[0];
    const Acc* candidates = upper ? slices[0] : slices[1];
    for (std::int64_t a = 0; a < tx; ++a) {
      for (std::int64_t c = upper ? a : 0; c < tz; ++c) {
        const Acc* xs[kTile];
        const Acc* zs[kTile];
        for (int i = 0; i < kTile; ++i) xs[i] = anchors + (a * kTile + i) * chunk;
        for (int i = 0; i < kTile; ++i) zs[i] = candidates + (c * kTile + i) * chunk;
        for (std::int64_t at = 0; at < chunk; at += kSegment) {
          alignas(64) Acc sums[kPairs];
          segment_pairs<Acc, kTile, kTile, true>(xs, zs, at, kSegment, sums);
          for (int p = 0; p < kPairs; ++p) totals[a * kTiles + c][p] += sums[p];
        }
      }
    }
  }
  Acc* result = static_cast<Acc*>(out);
  for (std::int64_t i = 0; i < nx; ++i) {
    for (std::int64_t j = 0; j < nz; ++j) {
      const std::int64_t a = i / kTile;
      const std::int64_t c = j / kTile;
      if (upper && c < a) continue;
      result[i * pitch + j] = totals[a * kTiles + c][(i % kTile) * kTile + j % kTile];
    }
  }
}

// Entry e of a list; past its end the last one.
SN_FORCE_INLINE std::int32_t entry_at(const Entry* entries, std::int64_t count, std::int64_t e) {
  return entries[e < count ? e : count - 1].candidate;
}

// One anchor against listed candidates: d2[e] belongs to row order[entries[e].candidate] of the features.
template <class T>
void direct_list(const T* x, const FeatureView& features, const std::int32_t* order, const Entry* entries,
                 std::int64_t count, std::int64_t dims, float* d2) {
  const T* rows = static_cast<const T*>(features.data);
  const T* zs[kPairs];
  alignas(64) float totals[kPairs];
  for (std::int64_t e = 0; e < count; e += kPairs) {
    for (int i = 0; i < kPairs; ++i) zs[i] = rows + order[entry_at(entries, count, e + i)] * features.row_stride;
    for (int p = 0; p < kPairs; ++p) totals[p] = 0.0f;
    if (count - e <= kPairs / 2) {
      add_segments<T, 1, kPairs / 2>(&x, zs, 0, dims, totals);
    } else {
      add_segments<T, 1, kPairs>(&x, zs, 0, dims, totals);
    }
    for (int i = 0; i < kPairs && e + i < count; ++i) d2[e + i] = totals[i];
  }
}

// The same over one segment of gathered fp32 columns (kSegment a row, zero-padded); adds to the scores of the entries.
inline void refine_segment(const float* x, const float* columns, Entry* entries, std::int64_t count) {
  const float* zs[kPairs];
  alignas(64) float sums[kPairs];
  for (std::int64_t e = 0; e < count; e += kPairs) {
    for (int i = 0; i < kPairs; ++i) {
      zs[i] = columns + static_cast<std::int64_t>(entry_at(entries, count, e + i)) * kSegment;
    }
    if (count - e <= kPairs / 2) {
      segment_pairs<float, 1, kPairs / 2, true>(&x, zs, 0, kSegment, sums);
    } else {
      segment_pairs<float, 1, kPairs, true>(&x, zs, 0, kSegment, sums);
    }
    for (int i = 0; i < kPairs && e + i < count; ++i) entries[e + i].score += sums[i];
  }
}
