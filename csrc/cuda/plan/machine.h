// What all parts of the cost model (cost.cpp, cost_small.cpp, cost_backward.cpp) know of a device. Constants are
// microseconds, and what one multiprocessor of an H200 does in one, read from the record that cost.cpp names.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "cuda/plan/plan_types.h"

namespace sn::cuda {

// What a multiprocessor does in a microsecond, as a share of an H200's. Only the H200 was measured. For others:
// counted, not measured, from the makers' tables of multiply-adds a clock (tensor cores: 1024 on 8.0, 512 on 8.6, 8.9
// and 12.0; `mma.sync` gets no more on 9.0 and 10.0 than here) and of memory bandwidth over multiprocessors.
struct Rates {
  double tensor;
  double ffma;
  double dfma;  // fp64, of fp32's time
  double memory;
};
inline Rates rates(const DeviceFacts& device) {
  switch (device.major) {
    case 8:
      if (device.minor == 0) return {0.8, 0.5, 2.0, 0.55};
      return {0.4, 1.0, 32.0, 0.3};
    case 9:
      return {1.0, 1.0, 2.0, 1.0};
    case 10:
      return {1.0, 1.0, 2.0, 1.6};
    default:
      return {0.4, 1.0, 32.0, 0.3};
  }
}

// Between two kernels of a graph, part of each kernel's time here. The record's null kernel has 0.50.
inline constexpr double kGap = 0.55;
// Bytes: 65536 x 2048 of fp32, read and rounded to halves, 805 MB in 198.
inline constexpr double kMemoryBytes = 4.1e6 / 132;
// Bytes of rows that other anchors have read shortly before, from the L2: what is left of the refinement's 8192 x 2048
// after 8192 x 512. The share of a matrix that the L2 does not hold comes at the second rate (65536 x 2048).
inline constexpr double kCacheBytes = 6.9e6 / 132;
inline constexpr double kFarBytes = 4.8e6 / 132;

// One block alone, and all blocks: between the longer of both and their sum.
inline double joined(double alone, double together) {
  return std::sqrt(alone * alone + together * together);
}

struct Machine {
  const DeviceFacts& device;
  Rates rate;
  double processors;
  explicit Machine(const DeviceFacts& facts)
      : device(facts), rate(rates(facts)), processors(std::max(1, facts.multiprocessors)) {}
  double memory_us(double bytes) const { return bytes / (kMemoryBytes * rate.memory * processors); }
  // Work given as microseconds of one multiprocessor.
  double spread(double us) const { return us / processors; }
};

inline double real(std::int64_t value) {
  return static_cast<double>(value);
}

}  // namespace sn::cuda
