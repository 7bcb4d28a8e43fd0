// Backward: a sparse gather by target row, out_r = sum_e weight_e (own_r - other_e). The difference comes first: the
// factored form (sum_e weight_e) own_r - sum_e weight_e other_e cancels for near neighbours. Sums are fp32 (fp64 for
// fp64), in the order of the edge list, rounded once. Longer lists than kEdgesSummed, those of hubs, are summed in
// parts of so many edges, and the parts in fp64: in a batch that has collapsed all terms of a hub are equal, so that
// errors of one sum grow with its length, to 8e-5 of the gradient at 10,000 edges. Every element sees the same
// operations, with gathered columns or without. Included by kernels.cpp alone, inside its namespace.
#pragma once

// The first of `count` slots that holds `wanted`, -1: none.
SN_FORCE_INLINE std::int32_t first_slot(const std::int32_t* slots, std::int64_t count, std::int32_t wanted) {
  std::int64_t e = 0;
#if defined(__AVX512F__)
  for (; e < count; e += 16) {
    const std::uint32_t valid = count - e < 16 ? (1u << (count - e)) - 1u : 0xffffu;
    const __m512i some = _mm512_maskz_loadu_epi32(static_cast<__mmask16>(valid), slots + e);
    const std::uint32_t hits =
        _mm512_mask_cmpeq_epi32_mask(static_cast<__mmask16>(valid), some, _mm512_set1_epi32(wanted));
    if (hits != 0) return static_cast<std::int32_t>(e) + __builtin_ctz(hits);
  }
#elif defined(__AVX2__)
  for (; e + 8 <= count; e += 8) {
    const __m256i some = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(slots + e));
    const int hits = _mm256_movemask_ps(_mm256_castsi256_ps(_mm256_cmpeq_epi32(some, _mm256_set1_epi32(wanted))));
    if (hits != 0) return static_cast<std::int32_t>(e) + __builtin_ctz(static_cast<unsigned>(hits));
  }
  for (; e + 4 <= count; e += 4) {
    const __m128i some = _mm_loadu_si128(reinterpret_cast<const __m128i*>(slots + e));
    const int hits = _mm_movemask_ps(_mm_castsi128_ps(_mm_cmpeq_epi32(some, _mm_set1_epi32(wanted))));
    if (hits != 0) return static_cast<std::int32_t>(e) + __builtin_ctz(static_cast<unsigned>(hits));
  }
#endif
  for (; e < count; ++e) {
    if (slots[e] == wanted) return static_cast<std::int32_t>(e);
  }
  return -1;
}

inline void reverse_slots(const std::int32_t* indices, std::int64_t edges, std::int64_t begin, std::int64_t end,
                          std::int16_t* slots) {
  for (std::int64_t i = begin; i < end; ++i) {
    for (std::int64_t at = i * edges; at < (i + 1) * edges; ++at) {
      const std::int64_t j = indices[at];
      slots[at] = j < 0
                      ? std::int16_t{-1}
                      : static_cast<std::int16_t>(first_slot(indices + j * edges, edges, static_cast<std::int32_t>(i)));
    }
  }
}

// Vectors of columns that stay in registers while the edges of a row go by: as many as registers hold twice, and twice
// that where a block is so wide.
#if defined(__AVX2__) && !defined(__AVX512F__)
inline constexpr int kRowVectors = 3;
#else
inline constexpr int kRowVectors = 4;
#endif
#if defined(__AVX512F__)
inline constexpr int kWideVectors = 2 * kRowVectors;
#else
inline constexpr int kWideVectors = kRowVectors;
#endif

template <class T>
SN_FORCE_INLINE void store_rounded(T* out, F16 value, int count) {
  float wide[kLanes];
  f_store(wide, value);
  for (int l = 0; l < count; ++l) out[l] = from_float(wide[l], static_cast<T*>(nullptr));
}
SN_FORCE_INLINE void store_rounded(float* out, F16 value, int count) {
  if (count == kLanes) {
    f_store(out, value);
  } else {
    float wide[kLanes];
    f_store(wide, value);
    std::memcpy(out, wide, static_cast<std::size_t>(count) * sizeof(float));
  }
}

// V vectors of columns of one row. In: type of the rows. kWhole: no vector is partial.
template <class In, int V, bool kWhole>
SN_FORCE_INLINE void sum_edges(const In* own, const In* other, std::int64_t other_stride, const Edge<float>* edges,
                               std::int64_t count, int columns, F16 (&acc)[V]) {
  const auto load = [columns](const In* row, int v) SN_LAMBDA_INLINE {
    const int left = columns - v * kLanes;
    return kWhole || left >= kLanes ? f_load(row + v * kLanes) : f_load_partial(row + v * kLanes, left > 0 ? left : 0);
  };
  F16 mine[V];
#pragma GCC unroll 8
  for (int v = 0; v < V; ++v) {
    acc[v] = f_zero();
    mine[v] = load(own, v);
  }
  for (std::int64_t e = 0; e < count; ++e) {
    const In* row = other + edges[e].neighbour * other_stride;
    const F16 weight = f_set1(edges[e].weight);
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) acc[v] = f_fma(weight, f_sub(mine[v], load(row, v)), acc[v]);
  }
}

// Out: type of the gradient.
template <class In, class Out, int V, bool kWhole>
SN_FORCE_INLINE void backward_vectors(const In* own, const In* other, std::int64_t other_stride,
                                      const Edge<float>* edges, std::int64_t count, int columns, Out* out) {
  F16 acc[V];
  sum_edges<In, V, kWhole>(own, other, other_stride, edges, count, columns, acc);
#pragma GCC unroll 8
  for (int v = 0; v < V; ++v) {
    const int left = kWhole ? kLanes : columns - v * kLanes;
    if (left > 0) store_rounded(out + v * kLanes, acc[v], left < kLanes ? left : kLanes);
  }
}

struct RowEdges {
  const Edge<float>* edges;
  std::int64_t count;
};
SN_FORCE_INLINE RowEdges edges_of(const EdgeLists& lists, std::int64_t row) {
  const std::int64_t first = lists.begin[row - lists.first_row];
  const std::int64_t count = lists.begin[row - lists.first_row + 1] - first;
  return {static_cast<const Edge<float>*>(lists.edges) + first, count};
}

template <class In, class Out>
SN_FORCE_INLINE void backward_row(const In* own, const In* other, std::int64_t other_stride, const EdgeLists& lists,
                                  std::int64_t row, std::int64_t columns, Out* out) {
  const auto [edges, count] = edges_of(lists, row);
  std::int64_t c = 0;
  if constexpr (kWideVectors > kRowVectors) {
    for (; c + kWideVectors * kLanes <= columns; c += kWideVectors * kLanes) {
      backward_vectors<In, Out, kWideVectors, true>(own + c, other + c, other_stride, edges, count, 0, out + c);
    }
  }
  for (; c + kRowVectors * kLanes <= columns; c += kRowVectors * kLanes) {
    backward_vectors<In, Out, kRowVectors, true>(own + c, other + c, other_stride, edges, count, 0, out + c);
  }
  for (; c + kLanes <= columns; c += kLanes) {
    backward_vectors<In, Out, 1, true>(own + c, other + c, other_stride, edges, count, 0, out + c);
  }
  if (c < columns) {
    const int left = static_cast<int>(columns - c);
    backward_vectors<In, Out, 1, false>(own + c, other + c, other_stride, edges, count, left, out + c);
  }
}

template <class T>
void backward_rows(const FeatureView& own, const FeatureView& other, const EdgeLists& edges, std::int64_t dims,
                   std::int64_t begin, std::int64_t end, void* out) {
  for (std::int64_t r = begin; r < end; ++r) {
    backward_row<T, T>(static_cast<const T*>(own.data) + r * own.row_stride, static_cast<const T*>(other.data),
                       other.row_stride, edges, r, dims, static_cast<T*>(out) + r * dims);
  }
}

template <>
void backward_rows<double>(const FeatureView& own, const FeatureView& other, const EdgeLists& edges, std::int64_t dims,
                           std::int64_t begin, std::int64_t end, void* out) {
  const Edge<double>* list = static_cast<const Edge<double>*>(edges.edges);
  for (std::int64_t r = begin; r < end; ++r) {
    const double* mine = static_cast<const double*>(own.data) + r * own.row_stride;
    double* to = static_cast<double*>(out) + r * dims;
    for (std::int64_t c = 0; c < dims; ++c) to[c] = 0.0;
    const std::int64_t* span = edges.begin + (r - edges.first_row);
    for (std::int64_t e = span[0]; e < span[1]; ++e) {
      const double* row = static_cast<const double*>(other.data) + list[e].neighbour * other.row_stride;
      for (std::int64_t c = 0; c < dims; ++c) to[c] = __builtin_fma(list[e].weight, mine[c] - row[c], to[c]);
    }
  }
}

// Whole blocks have a width that the compiler knows: one pass of kRowVectors vectors or two, or one of kWideVectors.
// Others, at the end of a row, go through backward_row.
template <class Use>
SN_FORCE_INLINE void with_width(std::int64_t width, Use use) {
  if (width == kRowVectors * kLanes) return use.template operator()<kRowVectors, 1>();
  if (width == 2 * kRowVectors * kLanes) return use.template operator()<kWideVectors, 2 * kRowVectors / kWideVectors>();
}

template <std::int64_t kBytes, bool kWrites>
SN_FORCE_INLINE void prefetch_span(const void* data) {
  constexpr std::int64_t kCacheLine = 64;
#pragma GCC unroll 8
  for (std::int64_t at = 0; at < kBytes; at += kCacheLine) {
    __builtin_prefetch(static_cast<const char*>(data) + at, kWrites ? 1 : 0);
  }
}

// Copies a whole block of columns. gather_columns is for rows that are far away, and prefetches them.
template <class T>
void copy_columns(const FeatureView& features, std::int64_t column, std::int64_t width, float* out) {
  with_width(width, [&]<int V, int kPasses>() SN_LAMBDA_INLINE {
    const T* row = static_cast<const T*>(features.data) + column;
    for (std::int64_t r = 0; r < features.rows; ++r, row += features.row_stride, out += V * kPasses * kLanes) {
#pragma GCC unroll 8
      for (int v = 0; v < V * kPasses; ++v) f_store(out + v * kLanes, f_load(row + v * kLanes));
    }
  });
}

template <class T>
void backward_columns(const ColumnBlock& block, const EdgeLists& lists, std::int64_t dims, std::int64_t begin,
                      std::int64_t end, void* out) {
  constexpr std::int64_t kRowsAhead = 4;
  T* to = static_cast<T*>(out) + block.column;
  if (dims - block.column < block.width) {
    for (std::int64_t r = begin; r < end; ++r) {
      backward_row<float, T>(block.own + r * block.width, block.other, block.width, lists, r, dims - block.column,
                             to + r * dims);
    }
    return;
  }
  with_width(block.width, [&]<int V, int kPasses>() SN_LAMBDA_INLINE {
    constexpr std::int64_t kStep = V * kLanes;
    constexpr std::int64_t kWidth = kPasses * kStep;
    constexpr std::int64_t kBytes = kWidth * static_cast<std::int64_t>(sizeof(T));
    const Edge<float>* edges = static_cast<const Edge<float>*>(lists.edges);
    for (std::int64_t r = begin; r < end; ++r) {
      if (block.ahead != nullptr) prefetch_span<kBytes, false>(static_cast<const T*>(block.ahead) + r * block.stride);
      if (block.out_is_far) prefetch_span<kBytes, true>(to + (r + kRowsAhead < end ? r + kRowsAhead : r) * dims);
      const std::int64_t* span = lists.begin + (r - lists.first_row);
      for (int pass = 0; pass < kPasses; ++pass) {
        const std::int64_t c = pass * kStep;
        backward_vectors<float, T, V, true>(block.own + r * kWidth + c, block.other + c, kWidth, edges + span[0],
                                            span[1] - span[0], 0, to + r * dims + c);
      }
    }
  });
}

// ---- rows of many edges ---------------------------------------------------------------------------------------------

// As backward_vectors, of more than kEdgesSummed edges.
template <class In, class Out, int V, bool kWhole>
SN_FORCE_INLINE void hub_vectors(const In* own, const In* other, std::int64_t other_stride, const Edge<float>* edges,
                                 std::int64_t count, int columns, Out* out) {
  double totals[V * kLanes] = {};
  float part[V * kLanes];
  for (std::int64_t first = 0; first < count; first += kEdgesSummed) {
    const std::int64_t some = count - first < kEdgesSummed ? count - first : kEdgesSummed;
    F16 acc[V];
    sum_edges<In, V, kWhole>(own, other, other_stride, edges + first, some, columns, acc);
    for (int v = 0; v < V; ++v) f_store(part + v * kLanes, acc[v]);
    for (int c = 0; c < V * kLanes; ++c) totals[c] += static_cast<double>(part[c]);
  }
  for (int c = 0; c < V * kLanes; ++c) part[c] = static_cast<float>(totals[c]);
  for (int v = 0; v < V; ++v) {
    store_rounded(out + v * kLanes, f_load(part + v * kLanes), kWhole ? kLanes : columns);
  }
}

template <class In, class Out>
void hub_row(const In* own, const In* other, std::int64_t other_stride, const EdgeLists& lists, std::int64_t row,
             std::int64_t columns, Out* out) {
  const auto [edges, count] = edges_of(lists, row);
  std::int64_t c = 0;
  for (; c + kRowVectors * kLanes <= columns; c += kRowVectors * kLanes) {
    hub_vectors<In, Out, kRowVectors, true>(own + c, other + c, other_stride, edges, count, 0, out + c);
  }
  for (; c + kLanes <= columns; c += kLanes) {
    hub_vectors<In, Out, 1, true>(own + c, other + c, other_stride, edges, count, 0, out + c);
  }
  if (c < columns) {
    const int left = static_cast<int>(columns - c);
    hub_vectors<In, Out, 1, false>(own + c, other + c, other_stride, edges, count, left, out + c);
  }
}

template <class T>
void backward_hubs(const FeatureView& own, const FeatureView& other, const EdgeLists& lists, std::int64_t dims,
                   std::int64_t begin, std::int64_t end, void* out) {
  for (std::int64_t r = begin; r < end; ++r) {
    hub_row<T, T>(static_cast<const T*>(own.data) + r * own.row_stride, static_cast<const T*>(other.data),
                  other.row_stride, lists, r, dims, static_cast<T*>(out) + r * dims);
  }
}

template <class T>
void backward_hub_columns(const ColumnBlock& block, const EdgeLists& lists, std::int64_t dims, std::int64_t begin,
                          std::int64_t end, void* out) {
  const std::int64_t left = dims - block.column;
  for (std::int64_t r = begin; r < end; ++r) {
    hub_row<float, T>(block.own + r * block.width, block.other, block.width, lists, r,
                      left < block.width ? left : block.width, static_cast<T*>(out) + r * dims + block.column);
  }
}
