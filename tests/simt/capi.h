// The CUDA backend on the harness as plain calls on host pointers, for C++ tests and, through ctypes, for Python.
#pragma once

#include <cstdint>

#include "cuda/plan/plan.h"
#include "sn_types.h"

extern "C" {

// Settings of a call. Fields of simt::Options and cuda::DeviceFacts mean the same here.
struct sn_simt_settings {
  std::uint64_t seed;
  std::uint64_t mma_seed;
  double mma_error_scale;
  std::int32_t mma_error;  // simt::MmaError
  std::int32_t path;       // cuda::ForwardPath; kAuto replaces one that cannot serve the problem
  std::int32_t partition;  // cuda::Partition of the backward
  std::int32_t major;
  std::int32_t minor;
  std::int32_t multiprocessors;
  std::int32_t shared_bytes;
  std::int32_t max_cluster;  // most blocks of a cluster, from major 9 on

  // Changes to the plan (0: none) take small problems to what is planned for large ones. Sizes of the workspace follow.
  // A path ignores what it does not use.
  std::int32_t strip_rows;      // of every path but the cluster's
  std::int32_t slice_elements;  // direct: 64, 128 or 256
  std::int32_t score_tile;      // dense, screen: 64, 128 or 256 columns
  std::int32_t sample_stride;   // screen, bank
  std::int32_t sample_group;    // screen, bank: 1, 8 or 32
  std::int32_t far_capacity;    // screen, bank

  std::int32_t mma_model;  // simt::MmaModel; other than 0: no injected error

  // More changes to the plan.
  std::int32_t positive_anchors;   // dense, screen, bank: a power of two, at most 1024
  std::int32_t positive_segments;  // dense, screen, bank
  std::int32_t shared_reduction;   // of every path but the cluster's; 1: whatever the number of anchors
  std::int32_t lane_bytes;         // of the backward, where it has a kernel for them; of resident rows, of a slice
  std::int32_t target_lanes;       // of the backward, with these bytes: 0 and 32 a warp, 16 half of one (of resident
                                   // rows: threads sum up to 2 packs, not 4)
  std::int32_t buffer_capacity;    // screen, bank: at least what the fallback needs
  std::int32_t no_rescreen;        // screen, bank: not 0: rows are screened once
  std::int32_t few_rows;           // screen: a warp refines a row of strips with more rows than this
  std::int32_t bucket_shift;       // of the backward, where it has buckets: log2 of the targets of one
  std::int32_t select_threads;     // direct: 128 or 256
  std::int32_t selection;          // direct: cuda::Selection, if that may serve; 0: as planned
};

// The outcome of a call.
struct sn_simt_report {
  std::int64_t workspace_bytes;
  std::int64_t planned_launches;
  std::int64_t launches;
  std::int64_t switches;
  std::int32_t path;          // the path taken
  std::int32_t partitioned;   // of the backward
  std::int32_t lane_bytes;    // of the backward
  std::int32_t target_lanes;  // of the backward
  std::int32_t resident;      // of the backward: packs of a slice, where rows and edges are resident, else 0
  sn::cuda::Control control;  // as the forward left it; zeros on a path without it
  char fault[8192];           // empty: none
};

// The outputs are filled with poison first. The workspace has its exact size, holds poison, and each of its pieces lies
// between guards that must survive. Return 0, or a cudaError_t with the reason in report->fault. One call at a time.
int sn_simt_forward(const sn::ForwardArgs* args, const sn_simt_settings* settings, sn_simt_report* report);
int sn_simt_backward(const sn::BackwardArgs* args, const sn_simt_settings* settings, sn_simt_report* report);

// Whether a path can serve a problem: 0 or 1.
int sn_simt_serves(std::int32_t path, const sn::cuda::Problem* problem, const sn_simt_settings* settings);

}  // extern "C"
