// The path of a forward and its sizes, from shapes alone.
#pragma once

#include <cstdint>

#include "cpu.h"
#include "kernels.h"

namespace sn::cpu {

struct ScreenPlan {
  bool whole;  // all products are kept, `pitch` values a row, until every row has met its candidates
  std::int64_t pitch;
  std::int64_t tile;           // rows and columns of a tile
  std::int64_t capacity;       // entries of an anchor's list
  std::int64_t first_pruning;  // entries at which a list is first pruned
  int workers;                 // of the sweep, each with a tile of scratch unless all products are kept
  std::int64_t product_floats;
  Forms forms;
  std::int64_t form_words;  // of a worker
};

// And the largest D: sums of the integers of its copy fit in 32 bits.
inline constexpr std::int64_t kScreenMostDims = std::int64_t{1} << 24;

Path choose_path(std::int64_t N, std::int64_t M, std::int64_t D, std::int64_t K, DType dtype, bool symmetric,
                 const Kernels& kernels);
// Whether the copy has 8-bit integers, or forms. That depends on the data: `sample` tells of distances of sampled rows.
struct CopySample {
  double mean;
  double deviation;
  double near;    // share of the pairs that are nearer than half of the mean
  double window;  // width of what the bounds of the copy cannot tell apart
};
// may_multiply_bytes says from shapes whether that can pay for taking the sample.
bool may_multiply_bytes(std::int64_t N, std::int64_t M, std::int64_t D, bool symmetric, double product_cycles);
bool multiplies_bytes(std::int64_t M, std::int64_t D, std::int64_t K, bool symmetric, double product_cycles,
                      const Forms& forms, const CopySample& sample);
// Whether forms stay although their integers are coarser than those of a copy without forms: by such a factor whatever
// the data; by the distances of a sample, whose window is that of the forms, and `finest` that of the other copy.
bool keeps_forms(double coarseness);
bool keeps_forms(std::int64_t M, std::int64_t D, std::int64_t K, bool symmetric, double product_cycles,
                 const Forms& forms, const CopySample& sample, double finest);
ScreenPlan plan_screen(std::int64_t N, std::int64_t M, std::int64_t D, std::int64_t K, bool symmetric, int threads,
                       const Kernels& kernels);
// Words of a row of the copy.
std::int64_t copy_words(std::int64_t D, bool bytes, const Forms& forms);
// The direct path holds the distances of a strip of anchors to all candidates at a time, `pitch` values a row. With
// `panels` it copies the features once, in panels of interleaved rows, `columns` values a row.
struct DirectPlan {
  std::int64_t strip;
  std::int64_t pitch;
  bool panels;
  std::int64_t columns;
  std::int64_t bytes;  // of distances and copy
};
DirectPlan plan_direct(std::int64_t N, std::int64_t M, std::int64_t D, DType dtype, bool symmetric,
                       std::int64_t panels_from);
// Buckets of the table of equal rows, a power of two: at most half of them are taken.
std::int64_t duplicate_buckets(std::int64_t candidates);
bool refines_by_columns(std::int64_t N, std::int64_t M, std::int64_t D);

}  // namespace sn::cpu
