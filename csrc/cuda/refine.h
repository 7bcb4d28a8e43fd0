// Behind the screening: thresholds from a sample, exact keys of what the screening could not rule out, the certificate.
#pragma once

#include <cstdint>

#include "../sn_types.h"
#include "plan.h"
#include "platform.h"

namespace sn::cuda {

// A wave of anchors [begin, begin + rows).
struct Wave {
  std::int64_t begin;
  std::int64_t rows;
};

// Sets T and u of the wave's anchors from the dense scores of the sample, and G to "never"; zeroes the counts.
cudaError_t enqueue_sample_thresholds(const ForwardArgs& args, const ForwardPlan& plan, char* workspace,
                                      const Wave& wave, cudaStream_t stream);
// Tightens T and u by the entries that a screening of a subset has left in the buffers; zeroes the counts.
cudaError_t enqueue_entry_thresholds(const ForwardArgs& args, const ForwardPlan& plan, char* workspace,
                                     const Wave& wave, cudaStream_t stream);
// Sets G and g2 of anchors that have more positives than are listed. Only needed where may_have_large_identities(M).
cudaError_t enqueue_far_thresholds(const ForwardArgs& args, const ForwardPlan& plan, char* workspace, const Wave& wave,
                                   cudaStream_t stream);
// From the dense scores (kDense) or the buffers to every output of the wave's anchors; those that cannot be certified are
// queued for the ladder. Zeroes the counts.
cudaError_t enqueue_refine(const ForwardArgs& args, const ForwardPlan& plan, char* workspace, const Wave& wave,
                           cudaStream_t stream);

}  // namespace sn::cuda
