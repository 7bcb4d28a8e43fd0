// What the costs of direct sums share (cost.cpp, cost_small.cpp): waves of blocks, tiles, the selection of a row by one
// warp, and the sum over anchors. cost.cpp says which record the constants are from.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "cuda/plan/machine.h"
#include "cuda/plan/sizes.h"

namespace sn::cuda {

// Waves of equal blocks, a multiprocessor at a time: n + 1 blocks on n multiprocessors take nearly twice as long as n
// (256 x 2048: 160 tiles in 17.4; 128 x 2048: 96 of half the size in 6.8). The step is a ramp: a model that jumped
// could not be monotone, neighbours would differ.
inline constexpr double kRamp = 0.25;
inline double waves(double blocks, const DeviceFacts& device) {
  const double x = blocks / std::max(1, device.multiprocessors);
  if (x <= 1.0) return 1.0;
  const double whole = std::floor(x);
  return whole + std::min(1.0, (x - whole) / kRamp);
}

// Tiles of 64 x 64 pairs: microseconds for one element of D, 64 % of the multiply-adds. 64 x 2048: 5.8; 8 waves of 256
// elements (1024 x 512 x 2048): 120 of 139.
inline constexpr double kTilesStart = 2.5;
inline constexpr double kTileElement = 0.057;
// Half inputs: 512 x 2048 in 65.8 against 62.1, 1024 x 2048 in 298 against 270.
inline constexpr double kHalfTiles = 1.1;

// Of an anchor that a warp finishes, ranks and keys of its neighbours. 1024 x 512, K = 100: 132 against 79, by radix
// passes then.
inline constexpr double kShortRowRank = 6.0 / 1755.0;
inline constexpr double kSelectKey = 0.05;

// The last block adds up few anchors (alone it took 12.3 for 8192, 58 to 72 for 65536). Of many (sizes.h), blocks add
// the partials and the last joins them: counted, not measured, 10 cycles for every kPartials-th record. On the direct
// path they are a kernel of their own.
//
// What a row takes alone, and the starts of other last kernels, were read while the partials met in eight rounds of
// shared memory with a barrier each, counts were added up warp by warp, and one thread had five divisions. Now warps
// join the partials in registers and each quotient has a thread: 1400 cycles less, counted, not measured.
inline constexpr double kFinalRow = 0.0009;
inline constexpr double kFinalSaved = 1400.0 / 1755.0;
inline constexpr double kPartialRow = 2.5e-5;

inline double final_us(std::int64_t N) {
  const double alone = real(std::min(N, kAloneRecords));
  return kFinalRow * alone + kPartialRow * (real(N) - alone) - kFinalSaved;
}

// Of the paths of one launch (cost_small.cpp), which are a kernel each.
double small_us(const ForwardPlan& plan, const Problem& problem, const Machine& machine);
double square_us(const ForwardPlan& plan, const Problem& problem, const Machine& machine);

}  // namespace sn::cuda
