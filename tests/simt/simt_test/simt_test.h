// Tests of the harness itself, a file per subject: every planted fault is caught under every schedule, and every
// wrapper does what it should. And of kernels whose results no call shows.
#pragma once

#include <cstdint>
#include <string>

#include "cuda/ptx.cuh"

namespace sn::cuda {

// Counts a check that holds; else prints `what` and exits.
void check(bool holds, const std::string& what);

inline constexpr int kSeeds = 12;
inline constexpr int kThreads = 64;

// Options with this seed for the schedule and for the errors of mma.
simt::Options with_seed(std::uint64_t seed);

void test_faults();                       // faults.cpp: planted faults
void test_overruns(const char* program);  // and writes beyond global memory: runs `program --overrun kind`
int overrun(const std::string& kind);     // what such a child does; returns if AddressSanitizer does not stop it
void test_wrappers();                     // wrappers.cpp: collectives, atomics, clusters, schedules
void test_products();                     // products.cpp: copies, matrices, mma and its models
void test_numbers();                      // numbers.cpp: conversions and directed rounding
void test_slots();                        // slots.cpp: tickets of launches that may run at the same time
void test_kth_smallest();                 // kth_smallest.cpp: by a warp, by a block
void test_thresholds();                   // thresholds.cpp: what a sample proves

}  // namespace sn::cuda
