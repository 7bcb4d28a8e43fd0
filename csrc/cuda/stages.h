// The kernels as the host sees them. Each function enqueues one kernel on a stream of the current device.
#pragma once

#include <cstdint>

#include "cuda/plan/plan_types.h"
#include "cuda/platform.h"
#include "sn_types.h"

namespace sn::cuda {

// A strip of anchors [begin, begin + rows).
struct Strip {
  std::int64_t begin;
  std::int64_t rows;
};

// ---- direct sums ----------------------------------------------------------------------------------------------------

// The universal exact path: every squared distance in the one summation order, then selection. Any type, N, M, D and K.
// The plan's path is kDirect; plan/sizes.h has its sizes.
cudaError_t enqueue_tiles(const ForwardArgs& args, const ForwardPlan& plan, char* workspace, const Strip& strip,
                          cudaStream_t stream);
cudaError_t enqueue_select(const ForwardArgs& args, const ForwardPlan& plan, char* workspace, const Strip& strip,
                           cudaStream_t stream);

// The sum over all anchors behind the last strip, with ForwardPlan::shared_reduction. Without it the selection sums.
cudaError_t enqueue_reduce(const ForwardArgs& args, const ForwardPlan& plan, char* workspace, cudaStream_t stream);

// At most 256 anchors and 256 candidates: the whole forward in one launch. The plan's path is kCluster, where the
// device is of compute capability 9.0 or above, or kTickets. `slot` is one of slots.h that no launch has which may run
// at the same time.
cudaError_t enqueue_small(const ForwardArgs& args, const ForwardPlan& plan, char* workspace, int slot,
                          cudaStream_t stream);
// The same where the candidates are the anchors, of which each pair is summed once. The plan's path is kSquare.
cudaError_t enqueue_square(const ForwardArgs& args, const ForwardPlan& plan, char* workspace, int slot,
                           cudaStream_t stream);
#if defined(SN_SIMT)
// Whether all tickets of a kernel are at zero, as every launch must leave them; then they are.
bool slots_are_zero();
bool square_slots_are_zero();
#endif

// The compute capability, as 10 * major + minor, for which the current device's copy of this library's code was
// compiled. It is below the device's own where the driver made that copy from PTX of an older architecture, such as one
// without clusters. Of 8.x it is the oldest that the library was built for: one PTX serves them all.
cudaError_t compiled_capability(int* capability);

// What the current device holds of this kernel's clusters, in every type that it serves, for DeviceFacts. A GPU that is
// cut down, or a slice of one, may have no group of multiprocessors left that is large enough. The driver is asked, on
// the host: nothing is enqueued, so it may be asked while a stream is captured. A question that fails counts as a no
// and leaves no error behind. The device and its copy of the code are of capability 9.0 or above.
struct ClusterLimits {
  int blocks;  // of the largest cluster, 0: none
  int bytes;   // of shared memory that each block of it may have
};
ClusterLimits cluster_limits(int shared_bytes);
// The same of kSquare's kernel: how many of its clusters the device holds at once.
int wide_clusters(int shared_bytes);

// ---- screening ------------------------------------------------------------------------------------------------------

// The two kernels that bring about what prepare.h says of the workspace. N, M and D are at least 1; the path is kDense,
// kScreen or kBank.
cudaError_t enqueue_sample(const ForwardArgs& args, const ForwardPlan& plan, char* workspace, cudaStream_t stream);
cudaError_t enqueue_facts(const ForwardArgs& args, const ForwardPlan& plan, char* workspace, cudaStream_t stream);

// The positives of each anchor: how many candidates have its label, its own row left out, and which.
//
// positive_leader [N]: the anchor that keeps the list of this one's identity. positive_count [N], of leaders: all
// candidates with the label, own rows of anchors among them. positive_list [N][kPositiveEntries], of leaders: those
// candidates where they fit, else kPositiveEntries of them, in any order (which ones and where may depend on the
// schedule). Sets Control.large_identities where a list has more than kListedPositives. The first kernel of the call
// must have zeroed that and the counts. N and M are at least 1.
cudaError_t enqueue_positives(const ForwardArgs& args, const ForwardPlan& plan, char* workspace, cudaStream_t stream);

// Tensor-core scores of anchors against candidates: written out (dense), gathered into bounds of groups (sample), or
// tested against thresholds as they leave the accumulators (append). The score of a pair is s_ij = n_j - 2 h_i . h_j;
// bound.cuh says what it proves. The consumer may rely on this:
//
// * Every pair of the requested range is scored once for its anchor, self pairs included: whoever reads the entries
//   drops an anchor's own row (by SelfMap). Candidates of a subset are c * column_stride for c in [0, columns).
//
// * kAppend: gCount[i - row_begin] counts ALL hits of anchor i, gBuffer[i - row_begin][0 .. min(count, capacity)) has
//   entries (bits of s) << 32 | j, in any order. Entries beyond the capacity are dropped; the count goes on.
//
// * The far test appends positives only (labels compared as 64-bit integers), to gFarCount and gFarBuffer likewise.
//
// * A pair with rho_i or rho_j = +inf has a score without meaning (finite, never NaN). A candidate with rho_j = +inf is
//   appended for every anchor (and, where G_i is not +inf and it is a positive, to the far buffer).
//
// * Null rows (bound.cuh) beyond Control.last_null are not appended by the support test.
//
// * kSample: the candidates of the sample are shared out over sample_groups(plan) groups of plan.sample_group each, in
//   some way, so that one group has no neighbours in the order of candidates. Of each group an upper bound of the
//   distance, in units of the cast, of one of its candidates (certificate.cuh), +inf where no score means anything.
//
// * Control.unscreenable: nothing is written, but kBank notes what is not finite when it appends from all candidates.
enum class ScoreMode : std::int32_t {
  kDense = 0,  // gScores[i - row_begin][c] for all anchors of the strip and all requested columns c, at plan.buffer
  kAppend =
      1,       // support test, and far test where `far`; into plan.buffer, plan.far_buffer, plan.counts [2][strip_rows]
  kSample = 2  // gScores[i - row_begin][group], at plan.buffer
};

struct ScoreRequest {
  ScoreMode mode = ScoreMode::kDense;
  std::int64_t row_begin = 0;      // first anchor of the strip
  std::int64_t rows = 0;           // anchors of the strip, at most plan.strip_rows
  std::int64_t columns = 0;        // candidates taken
  std::int64_t column_stride = 1;  // column c is candidate c * column_stride < M
  // kAppend, self case, all candidates: of the strip's rows with themselves, tiles on and above the diagonal serve both
  // triangles. Needs plan.triangular.
  bool symmetric = false;
  bool far = false;  // kAppend: G and g2 are set and far_buffer is there; false: they are not touched
};

// Of kDense and kScreen, and of kBank. Dense scores: the row pitch is request.columns.
cudaError_t enqueue_scores(const ForwardArgs& args, const ForwardPlan& plan, char* workspace,
                           const ScoreRequest& request, cudaStream_t stream);
cudaError_t enqueue_bank_scores(const ForwardArgs& args, const ForwardPlan& plan, char* workspace,
                                const ScoreRequest& request, cudaStream_t stream);

// Behind the screening: thresholds from a sample, exact keys of what the screening could not rule out, the certificate.

// Sets T and u of the strip's anchors from the scores of the sample (its groups', where plan.sample_group > 1), and G
// to "never"; zeroes the counts.
cudaError_t enqueue_thresholds(const ForwardArgs& args, const ForwardPlan& plan, char* workspace, const Strip& strip,
                               cudaStream_t stream);
// Sets G and g2 of anchors that have more positives than are listed. Only needed where may_have_large_identities(M).
cudaError_t enqueue_far_thresholds(const ForwardArgs& args, const ForwardPlan& plan, char* workspace,
                                   const Strip& strip, cudaStream_t stream);
// From the dense scores (kDense) or the buffers to every output of the strip's anchors. Those that cannot be certified
// are queued. Zeroes the counts, but those of rows that wait for a second refinement.
cudaError_t enqueue_refine(const ForwardArgs& args, const ForwardPlan& plan, char* workspace, const Strip& strip,
                           cudaStream_t stream);

// Where plan.rescreen: rows that the refinement left undecided are grouped, screened again from near by, and refined
// again (rescreen/rescreen.cuh). What is undecided then stays queued for the fallback.
cudaError_t enqueue_groups(const ForwardArgs& args, const ForwardPlan& plan, char* workspace, const Strip& strip,
                           cudaStream_t stream);
cudaError_t enqueue_rescores(const ForwardArgs& args, const ForwardPlan& plan, char* workspace, const Strip& strip,
                             cudaStream_t stream);
cudaError_t enqueue_second_refine(const ForwardArgs& args, const ForwardPlan& plan, char* workspace, const Strip& strip,
                                  cudaStream_t stream);

// The exact search for anchors that the refinement could not certify (fallback/), and the sum over all anchors. Both
// kernels have fixed grids: segments of the queued rows, one by one or in tiles, then their lists merged. After the
// last strip the last block of the second writes the loss and the statistics; after others it empties the queue.
cudaError_t enqueue_fallback(const ForwardArgs& args, const ForwardPlan& plan, char* workspace, const Strip& strip,
                             cudaStream_t stream);
cudaError_t enqueue_merge(const ForwardArgs& args, const ForwardPlan& plan, char* workspace, const Strip& strip,
                          cudaStream_t stream);

// ---- backward -------------------------------------------------------------------------------------------------------

// Sort edges into buckets of targets, and list them by target, where the plan wants that (buckets.cuh, lists.cuh).
cudaError_t enqueue_bucket_counts(const BackwardArgs& args, const BackwardPlan& plan, char* workspace,
                                  cudaStream_t stream);
cudaError_t enqueue_bucket_prefix_sums(const BackwardPlan& plan, char* workspace, cudaStream_t stream);
cudaError_t enqueue_bucket_placement(const BackwardArgs& args, const BackwardPlan& plan, char* workspace,
                                     cudaStream_t stream);
cudaError_t enqueue_lists(const BackwardArgs& args, const BackwardPlan& plan, char* workspace, cudaStream_t stream);
// A support graph and the upstream gradient to feature gradients. An index outside the candidates counts as -1. The
// first reads lists of incoming edges, the second, where the plan searches, looks for them in the graph.
cudaError_t enqueue_gather(const BackwardArgs& args, const BackwardPlan& plan, char* workspace, cudaStream_t stream);
cudaError_t enqueue_search(const BackwardArgs& args, const BackwardPlan& plan, cudaStream_t stream);
// The same of small batches, where the plan is resident: each block has all rows and edges in shared memory.
cudaError_t enqueue_resident(const BackwardArgs& args, const BackwardPlan& plan, cudaStream_t stream);

}  // namespace sn::cuda
