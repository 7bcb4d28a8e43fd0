// The interface between the orchestration (forward*.cpp, backward.cpp), which is compiled once, and the hot loops
// (kernels/), which are compiled once per instruction set: a table of functions on plain types. They do not allocate,
// lock or throw.
#pragma once

#include <cstdint>

#include "../sn_types.h"

namespace sn::cpu {

// ---- shapes of the hot loops ----------------------------------------------------------------------------------------

inline constexpr std::int64_t kDirectBlock = 32;     // rows of a block of direct distances
inline constexpr std::int64_t kPanel = 16;           // rows interleaved in a copy
inline constexpr std::int64_t kBlockPanels = 2;      // panels of a side of a block of direct distances
inline constexpr std::int64_t kSegmentColumns = 64;  // the copy of the direct path has whole segments
inline constexpr std::int64_t kTileGrain = 48;       // a multiple of the micro-kernels' columns, 48 and 16
inline constexpr std::int64_t kTileSmall = 96;       // rows and columns of a screening tile for small batches
inline constexpr std::int64_t kTileLarge = 192;      // and for large ones
inline constexpr std::int64_t kTileHuge = 384;       // and for large ones whose products are made of forms
inline constexpr std::int64_t kFormWords = 1024;     // of the copy that are halved at a time
// The largest K that screening serves. Beyond it the direct path is as fast as such a K allows.
inline constexpr std::int64_t kScreenMostK = 256;
inline constexpr std::int64_t kListMost = 352;      // most entries of a list; the length of stack buffers
inline constexpr std::int64_t kRefineColumns = 64;  // columns gathered at a time: one segment of the direct sum
static_assert(kTileGrain % kPanel == 0);
static_assert(kTileSmall % kTileGrain == 0 && kTileLarge % kTileGrain == 0 && kTileHuge % kTileGrain == 0);
inline constexpr std::int64_t kWholeMost = 2048;  // most candidates that a row is screened against as a whole

// ---- screening ------------------------------------------------------------------------------------------------------

// Screening: products of an integer copy bound every distance; few distances are then left to compute.
//
// A row x is kept as t = x - mean, A = scale I with 16-bit or 8-bit integers I, norm = |t|^2 and residual = |t - A|^2.
// I_p.I_q is exact: it fits in 32 bits. For a pair (p, q)
//   s_pq = norm_p + norm_q - 2 A_p.A_q   and   |d2_pq - s_pq| <= E_p + E_q,
// where d2 is the direct sum. forward_screen.cpp derives E. With w_pq = (norm_q - E_q) / 2 - A_p.A_q
//   lower bound of d2_pq = 2 w_pq + norm_p - E_p,     upper bound = 2 (w_pq + E_q) + norm_p + E_p.
// If u is the K-th smallest w + E_q so far, K candidates have d2 <= 2 u + norm_p + E_p. A candidate with w > u + E_p,
// the threshold, is not among the K nearest. E covers the float rounding of w, u and the threshold.

// One side of the screening (anchors or candidates). Rows are in position order: sorted by label, padded to kTileGrain.
struct ScreenSide {
  FeatureView features;
  const std::int32_t* order;  // [rows] position -> row
  std::int64_t rows;
  std::int64_t padded;
  std::uint32_t* packed;  // [padded / 16][panel_stride]: [words][16] of two or four integers
  float* scale;           // [padded] of the integers; 0: all of them are
  float* norm;            // [padded] |t|^2
  float* residual;        // [padded] |t - A|^2
  float* slack;           // [padded] E
  std::int32_t* start;    // [padded] where sums of a row's products with candidates begin
};

// An entry of an anchor's list: a candidate that may still be among its K nearest. It is dropped when w exceeds the
// anchor's threshold.
struct Entry {
  std::int32_t candidate;  // position
  float score;             // w, or the squared distance where it is known
};

// How often the products of a block are halved (kernels/forms.h), and the least that is left: rows, columns and words.
struct Forms {
  int levels;
  std::int64_t least_rows;
  std::int64_t least_words;
};
inline constexpr int kFormLevels = 2;
inline constexpr std::int64_t kFormGrain = std::int64_t{1} << kFormLevels;  // of a row's words
static_assert(kFormWords % kFormGrain == 0);
constexpr int levels_of(const Forms& forms, std::int64_t rows, std::int64_t columns, std::int64_t words) {
  int levels = 0;
  while (levels < forms.levels && rows >> (levels + 1) >= forms.least_rows &&
         columns >> (levels + 1) >= forms.least_rows && words >> (levels + 1) >= forms.least_words) {
    ++levels;
  }
  return levels;
}
// The integers of a row have a norm of about this: none of them is above 32767, whatever the rounding of the norm, and
// a sum of products of two rows fits in 32 bits. Where forms are sums of integers these are smaller (integer_most).
inline constexpr float kIntegerNorm = 30500.0f;
// Integers of which a sum of 4^levels fits in 16 bits.
constexpr float integer_most(int levels) {
  return static_cast<float>(32767 >> (2 * levels));
}
// Scratch of the forms of a block, in words of 32 bits.
constexpr std::int64_t form_words(int levels, std::int64_t rows, std::int64_t columns, std::int64_t words) {
  if (words > kFormWords) words = kFormWords;
  std::int64_t count = 0;
  for (; levels > 0; --levels) {
    rows /= 2;
    columns /= 2;
    words /= 2;
    count += (rows + columns) * words + 2 * rows * (columns + kPanel);
  }
  return count;
}

// What the sweep reads and writes.
struct Screen {
  DType dtype;
  std::int64_t dims;
  bool bytes;          // the integers have 8 bits, else 16
  std::int64_t words;  // of a row of the copy: four or two columns each
  Forms forms;
  std::int64_t panel_stride;  // words of a panel of the copy
  std::int64_t K;
  bool symmetric;
  const float* mean;  // [D], zero-padded to a multiple of 64
  ScreenSide anchors;
  ScreenSide candidates;    // the same arrays as `anchors` when symmetric
  const float* bias;        // [padded candidates] (norm - E) / 2; +inf: never a candidate
  const float* upper_bias;  // [padded candidates] (norm + E) / 2, or +inf
  const std::int32_t*
      self_position;           // [anchors] candidate position of the anchor itself, -1: none; null when symmetric
  std::int64_t capacity;       // entries of a list
  Entry* lists;                // [anchors][capacity]
  std::int32_t* list_counts;   // [anchors]
  std::int32_t* list_limits;   // [anchors] entries at which a list is pruned next, at most `capacity`
  std::int32_t* exact_counts;  // [anchors] entries in front, nearest first, whose distance is known; at most K
  float* thresholds;           // [padded anchors]; -inf on padding
};

// Pairs whose direct distances are wanted, in groups of kPairGroup with one anchor. Positions.
inline constexpr std::int64_t kPairGroup = 4;
static_assert(kPanel % kPairGroup == 0);
struct PairList {
  const std::int32_t* anchors;     // [4 vectors]
  const std::int32_t* candidates;  // [16 vectors]
  float* distances;                // [16 vectors]
  std::int64_t vectors;            // of kPanel pairs, four groups each
};

struct Tile {
  std::int64_t row, rows;        // anchor positions, multiples of kPanel
  std::int64_t column, columns;  // candidate positions, the same
  bool diagonal;                 // symmetric and row == column: only pairs column > row
  std::int64_t pitch;            // of its products
};

// ---- backward -------------------------------------------------------------------------------------------------------

// Edges by target row, difference first: out_r = sum_e weight_e (own_r - other_{neighbour_e}).
template <class Acc>
struct Edge {
  Acc weight;
  std::int32_t neighbour;
};
inline constexpr std::int64_t kEdgesSummed = 64;  // of a row in one fp32 sum; rows of more are hubs
struct EdgeLists {
  std::int64_t first_row;     // of the strip of rows whose edges are listed
  const std::int64_t* begin;  // [rows of the strip + 1]
  const void* edges;          // Edge<acc>
};

// A block of gathered fp32 columns: [rows][width] of each side, zeros past the last column. width: row_columns of the
// table or twice that.
struct ColumnBlock {
  const float* own;
  const float* other;
  std::int64_t column;  // the first
  std::int64_t width;
  const void* ahead;    // the next block in the own features' first row, to prefetch that of each row; or null
  std::int64_t stride;  // of these features
  bool out_is_far;      // the gradient does not stay in the second-level cache: what is written next is prefetched
};

// ---- the table ------------------------------------------------------------------------------------------------------

struct Kernels {
  const char* name;
  double direct_cycles;      // of a pair that is summed directly from panels, a column
  double product_cycles;     // of a screened pair, a column
  bool bytes;                // products of 8-bit integers take half of that
  std::int64_t form_rows;    // a block is halved while its halves have so many rows
  std::int64_t panels_from;  // rows from which the direct path is faster on a copy in panels
  std::int64_t row_columns;  // columns of a row of the backward that stay in registers

  // Whether every value of rows [begin, end) is finite.
  bool (*all_finite)(DType dtype, const FeatureView& features, std::int64_t dims, std::int64_t begin, std::int64_t end);

  // Direct squared distances in the one summation order (kernels/direct.h). x, z: row pointers, at most kDirectBlock
  // each. `upper`: x and z are the same rows, and only tiles that reach above the diagonal are computed.
  void (*direct_block)(DType dtype, const void* const* x, std::int64_t nx, const void* const* z, std::int64_t nz,
                       std::int64_t dims, bool upper, void* out, std::int64_t pitch);

  // The same for a whole batch, from a copy in panels of interleaved rows. turn_panel writes a panel [columns][kPanel],
  // columns a multiple of kSegmentColumns, and tells whether its values are finite; panel_block computes distances.
  bool (*turn_panel)(DType dtype, const FeatureView& features, std::int64_t panel, std::int64_t dims, float* out);
  void (*panel_block)(const float* x, std::int64_t nx, const float* z, std::int64_t nz, std::int64_t stride, bool upper,
                      float* out, std::int64_t pitch);

  // The `wanted` smallest (bits of d2, index) of a row of distances as ascending keys, without entry `self`. Returns
  // their number. wanted <= kListMost.
  std::int64_t (*smallest)(const float* d2, std::int64_t count, std::int64_t self, std::int64_t wanted,
                           std::uint64_t* keys);

  // Screening: the mean of sampled rows; the packed copy with norms and residuals; a tile's products and its epilogue.
  void (*sampled_mean)(DType dtype, const FeatureView* sides, int side_count, std::int64_t dims, float* mean,
                       float* scratch);
  bool (*pack)(const Screen& screen, const ScreenSide& side, std::int64_t first_panel, std::int64_t last_panel);
  // products: [tile.rows][tile.pitch]. forms: scratch of form_words().
  void (*tile_products)(const Screen& screen, const Tile& tile, const Tile& next, float* products,
                        std::uint32_t* forms);
  void (*tile_epilogue)(const Screen& screen, const Tile& tile, const float* products);
  // The same where each row of a tile is screened as a whole: the reverse products, below the diagonal of products
  // [rows][tile.pitch], and the lists. Returns false, with lists that are not to be used, if one would be too long.
  void (*mirror_tile)(const Tile& tile, float* products);
  bool (*screen_rows)(const Screen& screen, const Tile& tile, float* products);
  // Drops from the list of anchor `p` what the bound excludes.
  void (*prune)(const Screen& screen, std::int64_t p);
  // Direct distances of a pruned list: from the rows themselves, which may shorten it, or one segment of gathered
  // columns at a time.
  void (*refine_rows)(const Screen& screen, std::int64_t p);
  void (*gather_columns)(DType dtype, const FeatureView& features, const std::int32_t* order, std::int64_t begin,
                         std::int64_t end, std::int64_t column, std::int64_t columns, std::int64_t pitch, float* out);
  void (*refine_columns)(const Screen& screen, const float* anchor_columns, const float* candidate_columns,
                         std::int64_t p);
  void (*refine_pairs)(const PairList& list, std::int64_t begin, std::int64_t end, const float* anchor_columns,
                       const float* candidate_columns);

  // Backward: for each edge of anchors [begin, end), whose candidates are anchors too, the slot in which the candidate
  // lists the anchor, the first of several; -1: none.
  void (*reverse_slots)(const std::int32_t* indices, std::int64_t edges, std::int64_t begin, std::int64_t end,
                        std::int16_t* slots);
  // Backward of rows [begin, end): from the rows themselves, or one block of gathered fp32 columns.
  void (*backward_rows)(DType dtype, const FeatureView& own, const FeatureView& other, const EdgeLists& edges,
                        std::int64_t dims, std::int64_t begin, std::int64_t end, void* out);
  void (*copy_columns)(DType dtype, const FeatureView& features, std::int64_t column, std::int64_t width, float* out);
  void (*backward_columns)(DType dtype, const ColumnBlock& block, const EdgeLists& edges, std::int64_t dims,
                           std::int64_t begin, std::int64_t end, void* out);
  // The same of hubs, in fp32 and half precision.
  void (*backward_hubs)(DType dtype, const FeatureView& own, const FeatureView& other, const EdgeLists& edges,
                        std::int64_t dims, std::int64_t begin, std::int64_t end, void* out);
  void (*backward_hub_columns)(DType dtype, const ColumnBlock& block, const EdgeLists& edges, std::int64_t dims,
                               std::int64_t begin, std::int64_t end, void* out);
};

const Kernels& active_kernels();

#define SN_DECLARE_KERNELS(level) \
  namespace level {               \
  extern const Kernels kTable;    \
  }
SN_DECLARE_KERNELS(generic)
SN_DECLARE_KERNELS(avx2)
SN_DECLARE_KERNELS(avx512)
SN_DECLARE_KERNELS(avx512_vnni)
#undef SN_DECLARE_KERNELS

}  // namespace sn::cpu
