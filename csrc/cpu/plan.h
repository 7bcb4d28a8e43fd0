// The path of a forward and its sizes, from shapes alone.
#pragma once

#include <cstdint>

#include "cpu.h"
#include "kernels.h"

namespace sn::cpu {

struct ScreenPlan {
  std::int64_t tile;           // rows and columns of a tile
  std::int64_t capacity;       // entries of an anchor's list
  std::int64_t first_pruning;  // entries at which a list is first pruned
  int workers;                 // of the sweep, each with a tile of scratch
};

// The largest K that screening serves. Beyond it the direct path is as fast as such a K allows.
inline constexpr std::int64_t kScreenMostK = 256;

Path choose_path(std::int64_t N, std::int64_t M, std::int64_t D, std::int64_t K, DType dtype, bool symmetric,
                 bool widens);
ScreenPlan plan_screen(std::int64_t N, std::int64_t M, std::int64_t D, std::int64_t K, bool symmetric, bool widens,
                       int threads);
// Anchors of a strip: the direct path holds their distances to all candidates at a time.
std::int64_t direct_strip(std::int64_t N, std::int64_t M, std::int64_t value_bytes);
bool refines_by_columns(std::int64_t N, std::int64_t M, std::int64_t D);

}  // namespace sn::cpu
