// Backward: a sparse gather by target row, out_r = sum_e weight_e (own_r - other_e). The difference comes first: the
// factored form (sum_e weight_e) own_r - sum_e weight_e other_e cancels for near neighbours. Sums are fp32 (fp64 for
// fp64), in the order of the edge list, rounded once. Every element sees the same operations, with gathered columns or
// without. Included by kernels.cpp alone, inside its namespace.
#pragma once

// Vectors of columns that stay in registers while the edges of a row go by.
#if defined(__AVX2__) && !defined(__AVX512F__)
inline constexpr int kRowVectors = 2;
#else
inline constexpr int kRowVectors = 4;
#endif
static_assert(kBackwardColumns % (kRowVectors * kLanes) == 0,
              "a block of gathered columns is a whole number of vectors");

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

// V vectors of columns of one row. In, Out: types of the rows and of the gradient. kWhole: no vector is partial.
template <class In, class Out, int V, bool kWhole>
SN_FORCE_INLINE void backward_vectors(const In* own, const In* other, std::int64_t other_stride,
                                      const std::int32_t* neighbours, const float* weights, std::int64_t count,
                                      int columns, Out* out) {
  const auto load = [columns](const In* row, int v) SN_LAMBDA_INLINE {
    const int left = columns - v * kLanes;
    return kWhole || left >= kLanes ? f_load(row + v * kLanes) : f_load_partial(row + v * kLanes, left > 0 ? left : 0);
  };
  F16 acc[V];
  F16 mine[V];
#pragma GCC unroll 8
  for (int v = 0; v < V; ++v) {
    acc[v] = f_zero();
    mine[v] = load(own, v);
  }
  for (std::int64_t e = 0; e < count; ++e) {
    const In* row = other + neighbours[e] * other_stride;
    const F16 weight = f_set1(weights[e]);
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) acc[v] = f_fma(weight, f_sub(mine[v], load(row, v)), acc[v]);
  }
#pragma GCC unroll 8
  for (int v = 0; v < V; ++v) {
    const int left = kWhole ? kLanes : columns - v * kLanes;
    if (left > 0) store_rounded(out + v * kLanes, acc[v], left < kLanes ? left : kLanes);
  }
}

template <class In, class Out>
SN_FORCE_INLINE void backward_row(const In* own, const In* other, std::int64_t other_stride, const EdgeLists& edges,
                                  std::int64_t row, std::int64_t columns, Out* out) {
  const std::int64_t first = edges.begin[row - edges.first_row];
  const std::int64_t count = edges.begin[row - edges.first_row + 1] - first;
  const std::int32_t* neighbours = edges.neighbours + first;
  const float* weights = static_cast<const float*>(edges.weights) + first;
  std::int64_t c = 0;
  for (; c + kRowVectors * kLanes <= columns; c += kRowVectors * kLanes) {
    backward_vectors<In, Out, kRowVectors, true>(own + c, other + c, other_stride, neighbours, weights, count, 0,
                                                 out + c);
  }
  for (; c < columns; c += kLanes) {
    const int left = static_cast<int>(columns - c < kLanes ? columns - c : kLanes);
    if (left == kLanes) {
      backward_vectors<In, Out, 1, true>(own + c, other + c, other_stride, neighbours, weights, count, 0, out + c);
    } else {
      backward_vectors<In, Out, 1, false>(own + c, other + c, other_stride, neighbours, weights, count, left, out + c);
    }
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
  const double* weights = static_cast<const double*>(edges.weights);
  for (std::int64_t r = begin; r < end; ++r) {
    const double* mine = static_cast<const double*>(own.data) + r * own.row_stride;
    double* to = static_cast<double*>(out) + r * dims;
    for (std::int64_t c = 0; c < dims; ++c) to[c] = 0.0;
    const std::int64_t* span = edges.begin + (r - edges.first_row);
    for (std::int64_t e = span[0]; e < span[1]; ++e) {
      const double* row = static_cast<const double*>(other.data) + edges.neighbours[e] * other.row_stride;
      for (std::int64_t c = 0; c < dims; ++c) to[c] = __builtin_fma(weights[e], mine[c] - row[c], to[c]);
    }
  }
}

template <class T>
void backward_columns(const float* own_columns, const float* other_columns, const EdgeLists& edges, std::int64_t dims,
                      std::int64_t column, std::int64_t begin, std::int64_t end, void* out) {
  const std::int64_t columns = dims - column < kBackwardColumns ? dims - column : kBackwardColumns;
  for (std::int64_t r = begin; r < end; ++r) {
    backward_row<float, T>(own_columns + r * kBackwardColumns, other_columns, kBackwardColumns, edges, r, columns,
                           static_cast<T*>(out) + r * dims + column);
  }
}
