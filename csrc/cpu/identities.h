// Rows grouped by label: which anchors and which candidates share an identity.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "../sn_types.h"

namespace sn::cpu {

// Rows ordered by label, rows of one label by index.
inline std::vector<std::int32_t> order_by_label(const std::int64_t* labels, std::int64_t count) {
  std::vector<std::int32_t> order(static_cast<std::size_t>(count));
  for (std::int64_t i = 0; i < count; ++i) order[i] = static_cast<std::int32_t>(i);
  if (std::is_sorted(labels, labels + count)) return order;
  struct Row {
    std::int64_t label;
    std::int32_t index;
    bool operator<(const Row& other) const { return label != other.label ? label < other.label : index < other.index; }
  };
  std::vector<Row> rows(static_cast<std::size_t>(count));
  for (std::int64_t i = 0; i < count; ++i) rows[i] = {labels[i], static_cast<std::int32_t>(i)};
  std::sort(rows.begin(), rows.end());
  for (std::int64_t i = 0; i < count; ++i) order[i] = rows[i].index;
  return order;
}

// Positions of the anchors [anchor_begin, anchor_end) and the candidates [candidate_begin, candidate_end) of one label.
// A position is an index into the order by label.
struct Identity {
  std::int64_t anchor_begin, anchor_end;
  std::int64_t candidate_begin, candidate_end;
};

struct Identities {
  std::vector<std::int32_t> anchor_order;
  std::vector<std::int32_t> candidate_order_storage;  // empty when symmetric
  std::vector<Identity> list;                         // identities with both anchors and candidates

  explicit Identities(const ForwardArgs& args) {
    const std::int64_t N = args.anchors.rows;
    const std::int64_t M = args.candidates.rows;
    anchor_order = order_by_label(args.anchor_labels, N);
    if (!args.symmetric) candidate_order_storage = order_by_label(args.candidate_labels, M);
    const std::vector<std::int32_t>& candidates = candidate_order();
    std::int64_t p = 0;
    std::int64_t q = 0;
    while (p < N && q < M) {
      const std::int64_t label = args.anchor_labels[anchor_order[p]];
      const std::int64_t other = args.candidate_labels[candidates[q]];
      if (other < label) {
        ++q;
        continue;
      }
      Identity identity{p, p, q, q};
      while (p < N && args.anchor_labels[anchor_order[p]] == label) ++p;
      if (other > label) continue;
      while (q < M && args.candidate_labels[candidates[q]] == label) ++q;
      identity.anchor_end = p;
      identity.candidate_end = q;
      list.push_back(identity);
    }
  }
  const std::vector<std::int32_t>& candidate_order() const {
    return candidate_order_storage.empty() ? anchor_order : candidate_order_storage;
  }
};

inline std::int64_t self_of(const ForwardArgs& args, std::int64_t anchor) {
  if (args.self.index != nullptr) return args.self.index[anchor];
  return args.self.offset < 0 ? -1 : args.self.offset + anchor;
}

inline const void* row_of(const FeatureView& features, DType dtype, std::int64_t row) {
  return static_cast<const char*>(features.data) + row * features.row_stride * element_bytes(dtype);
}

}  // namespace sn::cpu
