// Direct distances of what the bounds leave open, and the gathering of columns, which the backward uses too. Included
// by kernels.cpp alone, inside its namespace.
#pragma once

// From this many entries beside the K nearest on, the K with the least scores come first: with a distance in place of a
// bound of one, the threshold leaves half of the others or fewer.
inline constexpr std::int64_t kWorthTwoSteps = kPanel / 2;

template <class T>
void refine_rows(const Screen& screen, std::int64_t p) {
  alignas(64) float d2[kListMost];
  std::int64_t count = screen.list_counts[p];
  Entry* entries = screen.lists + p * screen.capacity;
  if (screen.exact_counts[p] == 0 && count >= screen.K + kWorthTwoSteps) {
    for (std::int64_t e = 0; e < count; ++e) d2[e] = entries[e].score;
    const float least = rank_bound(d2, count, screen.K, 8);
    std::int64_t near = 0;
    for (std::int64_t e = 0; e < count; ++e) {
      const Entry entry = entries[e];
      entries[e] = entries[near];
      entries[near] = entry;
      near += entry.score <= least ? 1 : 0;
    }
    direct_list_of<T>(screen, p, entries, near, d2);
    float farthest = d2[0];
    for (std::int64_t e = 0; e < near; ++e) {
      entries[e].score = d2[e];
      farthest = d2[e] > farthest ? d2[e] : farthest;
    }
    const float threshold = exact_upper_bound(screen, p, farthest) + screen.anchors.slack[p];
    std::int64_t open = near;
    for (std::int64_t e = near; e < count; ++e) {
      const Entry entry = entries[e];
      entries[open] = entry;
      open += entry.score <= threshold ? 1 : 0;
    }
    direct_list_of<T>(screen, p, entries + near, open - near, d2);
    count = near;
    for (std::int64_t e = near; e < open; ++e) {
      entries[count] = {entries[e].candidate, d2[e - near]};
      count += d2[e - near] <= farthest ? 1 : 0;
    }
    screen.list_counts[p] = static_cast<std::int32_t>(count);
    return;
  }
  direct_list_of<T>(screen, p, entries, count, d2);
  for (std::int64_t e = 0; e < count; ++e) entries[e].score = d2[e];
}

inline void refine_columns(const Screen& screen, const float* anchor_columns, const float* candidate_columns,
                           std::int64_t p) {
  refine_segment(anchor_columns + p * kSegment, candidate_columns, screen.lists + p * screen.capacity,
                 screen.list_counts[p]);
}

// Adds one segment to the distances of vectors of pairs [begin, end).
inline void refine_pairs(const PairList& list, std::int64_t begin, std::int64_t end, const float* anchor_columns,
                         const float* candidate_columns) {
  constexpr int kAnchors = kPairs / static_cast<int>(kPairGroup);
  for (std::int64_t vector = begin; vector < end; ++vector) {
    const float* xs[kAnchors];
    const float* zs[kPairs];
    for (int a = 0; a < kAnchors; ++a) {
      xs[a] = anchor_columns + static_cast<std::int64_t>(list.anchors[vector * kAnchors + a]) * kSegment;
    }
    for (int c = 0; c < kPairs; ++c) {
      zs[c] = candidate_columns + static_cast<std::int64_t>(list.candidates[vector * kPairs + c]) * kSegment;
    }
    alignas(64) float sums[kPairs];
    segment_pairs<float, kAnchors, kPairGroup, true, true>(xs, zs, 0, kSegment, sums);
    float* distances = list.distances + vector * kPairs;
    f_store(distances, f_add(f_load(distances), f_load(sums)));
  }
}

// Gathers rows [begin, end) of `order`, or of the features without one, columns [column, column + columns), as fp32
// with zeros up to `pitch`.
inline constexpr std::int64_t kAhead = 8;
template <class T>
void gather_columns(const FeatureView& features, const std::int32_t* order, std::int64_t begin, std::int64_t end,
                    std::int64_t column, std::int64_t columns, std::int64_t pitch, float* out) {
  for (std::int64_t r = begin; r < end; ++r) {
    const T* row = static_cast<const T*>(features.data) + (order ? order[r] : r) * features.row_stride + column;
    if (r + kAhead < end) {  // rows lie too far apart for a hardware prefetcher
      const T* later = static_cast<const T*>(features.data) +
                       (order ? order[r + kAhead] : r + kAhead) * features.row_stride + column;
      for (std::int64_t c = 0; c < columns; c += 64 / static_cast<std::int64_t>(sizeof(T)))
        __builtin_prefetch(later + c);
    }
    float* to = out + r * pitch;
    std::int64_t c = 0;
    for (; c + kLanes <= columns; c += kLanes) f_store(to + c, f_load(row + c));
    if (c < columns) {
      f_store(to + c, f_load_partial(row + c, static_cast<int>(columns - c)));
      c += kLanes;
    }
    for (; c < pitch; c += kLanes) f_store(to + c, f_zero());
  }
}
