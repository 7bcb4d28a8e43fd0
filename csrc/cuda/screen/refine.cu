// From scores to certified neighbours. bound.cuh says what a score proves about the true distance D_ij of a pair, in units
// of the cast (2^e times the input's); here is what true distances say about keys, and the reverse.
//
// Keys. The key of a pair is the fp32 direct sum of direct_sum.cuh. With D the true distance in the input's units and
// u = 2^-24: a difference is rounded once and squared, 2 u; then at most 64 roundings in the chunk, 5 in the tree, one for
// each span but the first. Near zero a product may round by 2^-150 more, once for each of D_dims elements; differences and
// sums are exact there. So, unless the sum overflows,
//   D^2 (1 - gamma) - w <= key <= D^2 (1 + gamma) + w,   gamma = (64 + 5 + spans + 4) u,   w = D_dims 2^-150,
// where the spare 3 u hold the second-order terms (they are below (200 u)^2). A sum overflows only if D^2 (1 + gamma)
// reaches 2^128: bounds below kSaneKey exclude it.
//
// Support. Take any K candidates (all of them, if fewer exist) and let U be the largest of their upper bounds: K keys are
// at most kappa = U^2 (1 + gamma) + w, and so is every key of the true support set, ties with its last one included. A
// member therefore has D^2 (1 - gamma) <= kappa + w, and
//   D <= U sqrt((1 + gamma) / (1 - gamma)) + sqrt(2 w / (1 - gamma)) <= U stretch + underflow =: reach,
//   stretch = 1 + 2 gamma, underflow = sqrt(2 D_dims) 2^-74 2^e.
// Candidates whose lower bound is above reach are out, all others get exact keys: the selection among those is the
// selection among all. U is best from the K smallest upper bounds; rounding it up, or taking it from a sample, from
// whatever a buffer holds, or from a pass whose buffer overflowed, only loosens it.
//
// The buffer holds every candidate that a proven reach does not exclude (bound.cuh), unless it overflowed; then the row is
// not certified. Dense scores hold everything.
//
// Farthest positive. Let F be the largest lower bound of some positives: a key is at least F^2 (1 - gamma) - w, so the
// farthest one has D^2 (1 + gamma) + w >= F^2 (1 - gamma) - w, and
//   D >= F sqrt((1 - gamma) / (1 + gamma)) - sqrt(2 w / (1 + gamma)) >= F shrink - underflow,   shrink = 1 - 2 gamma.
// From an exact key instead of F: D >= sqrt(key / (1 + gamma)) - sqrt(w) >= sqrt(key) shrink - underflow. If the farthest
// key found is finite, a positive whose sum overflows would have been looked at too: its D^2 (1 + gamma) is above every
// finite key. If it is +inf the lowest index wins, of which bounds say nothing: the ladder decides.
//
// Duplicates. If the K lowest indices (self left out) are all at d2 == 0, they are the support set: nothing comes before
// them. A collapsed batch, which overflows every buffer, is done at this.
#include "cuda/keys.cuh"
#include "cuda/launch.cuh"
#include "cuda/loss.cuh"
#include "cuda/memory.cuh"
#include "cuda/ptx.cuh"
#include "cuda/screen/args.cuh"
#include "cuda/screen/nearest.cuh"
#include "cuda/stages.h"

namespace sn::cuda {
namespace {

// ---- traits ---------------------------------------------------------------------------------------------------------

constexpr float kSaneKey = 0x1p126f;  // two orders below the overflow of a float: gamma does not reach over it
// Warps of a block that refines one anchor. Where rows alone fill the machine, a row is cheapest if its warp waits for no
// other (kScreen: thousands of anchors); elsewhere a row's sums are shared out.
constexpr int kManyRowsWarps = 1;
constexpr int kFewRowsWarps = 4;
constexpr int kBlockWarps = 12;  // warps of all its blocks that a multiprocessor shall hold: 168 registers a thread
constexpr int kThresholdThreads = 128;
constexpr int kStagedSamples = 2048;

constexpr int kFarWarps = 4;
constexpr int kFarThreads = kFarWarps * kWarpSize;
constexpr std::int64_t kFarBlocks = 396;        // three on each multiprocessor of an H200, any number is right
constexpr std::int64_t kFarSample = kWarpSize;  // of the listed positives, one a lane
static_assert(kListedPositives % kFarSample == 0);

constexpr int kThresholdBytes = shared_bytes<std::uint32_t>(kStagedSamples) + shared_bytes<std::uint32_t>(kRadixBins);

struct Entry {
  float score;
  std::int32_t index;
};

// Where a row's entries are: scores of candidates c * stride, or a buffer.
struct Entries {
  const float* gScores;
  const std::uint64_t* gEntries;
  std::int64_t stride;
  std::int64_t count;

  __device__ __forceinline__ Entry at(std::int64_t e) const {
    if (gScores != nullptr) return {gScores[e], static_cast<std::int32_t>(e * stride)};
    const std::uint64_t entry = gEntries[e];
    return {float_from_bits(static_cast<std::uint32_t>(entry >> 32)), static_cast<std::int32_t>(entry)};
  }
};

// What bounds of an anchor's pairs need.
struct AnchorFacts {
  std::int64_t self;
  std::int64_t wanted;  // members of its support set
  float n;
  float rho;
  float scale;    // 2^e
  float unscale;  // 2^-e
  bool blind;     // no score of it means anything
};

__device__ __forceinline__ AnchorFacts anchor_facts(const RefineArgs& args, std::int64_t anchor) {
  AnchorFacts facts;
  facts.self = self_of(args.forward, anchor);
  const std::int64_t available = args.forward.candidates.rows - (facts.self >= 0 ? 1 : 0);
  facts.wanted = available < args.K ? available : args.K;
  facts.n = load(args.gAnchorN + anchor);
  facts.rho = load(args.gAnchorRho + anchor);
  facts.blind = atomic_load(&args.gControl->unscreenable) != 0 || !(facts.rho < kInfinity);
  const int exponent = facts.blind ? 0 : atomic_load(&args.gControl->exponent);
  constexpr int kBias = 127;
  constexpr int kMantissa = 23;
  facts.scale = float_from_bits(static_cast<std::uint32_t>(kBias + exponent) << kMantissa);
  facts.unscale = float_from_bits(static_cast<std::uint32_t>(kBias - exponent) << kMantissa);
  return facts;
}

__device__ __forceinline__ float lower_bound(const RefineArgs& args, const AnchorFacts& facts, const Entry& entry) {
  return distance_lower(facts.n, facts.rho, load(args.gCandidateN + entry.index),
                        load(args.gCandidateRho + entry.index), entry.score, args.eta);
}
__device__ __forceinline__ float upper_bound(const RefineArgs& args, const AnchorFacts& facts, const Entry& entry) {
  return distance_upper(facts.n, facts.rho, load(args.gCandidateN + entry.index),
                        load(args.gCandidateRho + entry.index), entry.score, args.eta);
}

// kappa, in the input's units.
__device__ __forceinline__ float largest_key(const RefineArgs& args, const AnchorFacts& facts, float U) {
  const float distance = multiply_up(U, facts.unscale);
  return fma_up(multiply_up(distance, args.stretch), distance, args.underflow_key);
}
__device__ __forceinline__ float reach_of(const RefineArgs& args, const AnchorFacts& facts, float U) {
  return fma_up(U, args.stretch, multiply_up(args.underflow_distance, facts.scale));
}
// From a distance that the farthest reaches, in units of the cast.
__device__ __forceinline__ float far_reach_of(const RefineArgs& args, const AnchorFacts& facts, float F) {
  const float reach = add_down(multiply_down(F, args.shrink), -multiply_up(args.underflow_distance, facts.scale));
  return reach > 0.0f ? reach : 0.0f;
}

// The wanted-th smallest upper bound of the entries, rounded up; +inf if there are not so many.
template <class Stage>
__device__ __forceinline__ float wanted_upper(const RefineArgs& args, const AnchorFacts& facts, const Entries& entries,
                                              const Stage& sStage, int staged, Shared<std::uint32_t> sBins) {
  const auto compute = [&](std::int64_t e) {
    const Entry entry = entries.at(e);
    return entry.index == facts.self ? kNoBits : bits_of(upper_bound(args, facts, entry));
  };
  if (entries.count > staged) return kth_smallest(sBins, entries.count, facts.wanted, compute);
  // A thread reads back what it wrote itself.
  for (int e = thread_id(); e < entries.count; e += thread_count()) sStage.set(e, compute(e));
  return kth_smallest(sBins, entries.count, facts.wanted,
                      [&](std::int64_t e) { return sStage.get(static_cast<int>(e)); });
}

// ---- kernels: thresholds --------------------------------------------------------------------------------------------

// Sets or lowers Control.last_null (bound.cuh) from the candidates 0, stride, 2 stride, .. that a pass has scored, whose
// facts are therefore there. One block.
template <bool kSample>
__device__ __forceinline__ void find_last_null(const RefineArgs& args, Shared<std::uint32_t> sBins) {
  const std::uint32_t known = atomic_load(&args.gControl->last_null);  // written below
  if (load(&args.gControl->unscreenable) != 0) return;
  const std::int64_t stride = kSample ? args.column_stride : args.second_stride;
  std::int64_t count = args.columns;
  if constexpr (!kSample) {
    // Only what would lower the limit is looked at: few columns. Where the sample had too few, there is no need.
    if (known == kNoLastNull) return;
    count = known / stride + 1;
    const std::int64_t scored = (args.forward.candidates.rows + stride - 1) / stride;
    if (scored < count) count = scored;
  }
  // An index is as good as the bits of a float: it comes back rounded up, and one too large for that as infinity.
  const float last = kth_smallest(sBins, count, args.K + 1, [&](std::int64_t e) {
    const std::int64_t candidate = e * stride;
    return is_null(load(args.gCandidateN + candidate), load(args.gCandidateRho + candidate))
               ? static_cast<std::uint32_t>(candidate)
               : kNoBits;
  });
  if (thread_id() == 0 && last < kInfinity && bits_of(last) < known) args.gControl->last_null = bits_of(last);
}

// A block an anchor, and one for the null rows. kSample: entries are the sample's dense scores, T is set; else they are
// a buffer, and T is lowered.
template <bool kSample>
__global__ void __launch_bounds__(kThresholdThreads, 8) thresholds_kernel(const __grid_constant__ RefineArgs args) {
  SharedArena arena;
  const Shared<std::uint32_t> sStage = arena.take<std::uint32_t>(kStagedSamples);
  const Shared<std::uint32_t> sBins = arena.take<std::uint32_t>(kRadixBins);
  const std::int64_t row = block_id();
  if (row == args.rows) {
    find_last_null<kSample>(args, sBins);
    return;
  }
  const std::int64_t anchor = args.row_begin + row;
  const AnchorFacts facts = anchor_facts(args, anchor);
  Entries entries{.gScores = nullptr, .gEntries = nullptr, .stride = args.column_stride, .count = args.columns};
  if constexpr (kSample) {
    entries.gScores = args.gScores + row * args.columns;
  } else {
    const std::int64_t count = args.gCounts[row];
    entries.gEntries = args.gBuffer + row * args.capacity;
    entries.count = count < args.capacity ? count : args.capacity;
  }
  // Nobody asks for the scores of a blind anchor, and its place of the sample may never have been written.
  SupportThreshold threshold{-kInfinity, 0.0f};
  if (!facts.blind && facts.wanted > 0) {
    const float U = wanted_upper(args, facts, entries, sStage, kStagedSamples, sBins);
    const bool sane = largest_key(args, facts, U) < kSaneKey;
    threshold = support_threshold(sane ? reach_of(args, facts, U) : kInfinity, facts.n, facts.rho, args.eta);
  }
  sync_block();  // everybody has read the count
  if (thread_id() != 0) return;
  if (kSample || threshold.T < args.thresholds.T[anchor]) {
    args.thresholds.T[anchor] = threshold.T;
    args.thresholds.u[anchor] = threshold.u;
  }
  if (kSample) {
    args.thresholds.G[anchor] = kInfinity;
    args.thresholds.g2[anchor] = 0.0f;
  }
  args.gCounts[row] = 0;
  args.gFarCounts[row] = 0;
}

// A warp an anchor, in turn: exact keys of a sample of the listed positives.
template <class T>
__global__ void __launch_bounds__(kFarThreads, 2) far_thresholds_kernel(const __grid_constant__ RefineArgs args) {
  if (atomic_load(&args.gControl->large_identities) == 0) return;
  SharedArena arena;
  const ForwardArgs& forward = args.forward;
  const int elements = WarpSums<T>::elements(forward.dims);
  WarpSums<T> sums(arena.take<T>(kFarWarps * elements).offset(warp_id() * elements),
                   static_cast<const T*>(forward.candidates.data), forward.candidates.row_stride, forward.dims,
                   args.aligned);
  for (std::int64_t row = block_id() * kFarWarps + warp_id(); row < args.rows; row += block_count() * kFarWarps) {
    const std::int64_t anchor = args.row_begin + row;
    if (load(args.gPositiveCount + anchor) <= kListedPositives) continue;
    const AnchorFacts facts = anchor_facts(args, anchor);
    if (facts.blind) continue;
    sums.set_anchor(static_cast<const T*>(forward.anchors.data) + anchor * forward.anchors.row_stride);
    const std::int64_t place = lane_id() * (kListedPositives / kFarSample);
    const std::int32_t positive = load(args.gPositiveList + anchor * kListedPositives + place);
    const float key = float_from_bits(reduce_max(bits_of(sums.sums(positive, kWarpSize))));
    FarThreshold threshold{-kInfinity, 0.0f};
    if (key < kInfinity) {
      const float distance = multiply_down(sqrt_down(key), facts.scale);
      threshold = far_threshold(far_reach_of(args, facts, distance), facts.n, facts.rho, args.eta);
    }
    if (lane_id() == 0) {
      args.thresholds.G[anchor] = threshold.G;
      args.thresholds.g2[anchor] = threshold.g2;
    }
  }
}

// ---- kernel: refinement ---------------------------------------------------------------------------------------------

// Largest of the block's values, in all threads. sWord: one word of shared memory.
__device__ __forceinline__ std::uint32_t block_max(Shared<std::uint32_t> sWord, std::uint32_t value) {
  sync_block();
  if (thread_id() == 0) sWord.set(0, 0u);
  sync_block();
  const std::uint32_t largest = reduce_max(value);
  if (lane_id() == 0) sWord.atomic_max(0, largest);
  sync_block();
  return sWord.get(0);
}

// What the bounds of the positives among the entries say about the farthest (nearest) of them: it is at least (at most) so
// far. By the whole block.
__device__ __forceinline__ float positive_reach(const RefineArgs& args, const AnchorFacts& facts,
                                                const Entries& entries, std::int64_t label, bool farthest,
                                                Shared<std::uint32_t> sWord) {
  std::uint32_t rBest = 0;  // of a maximum; a minimum is found through the complement
  for (std::int64_t e = thread_id(); e < entries.count; e += thread_count()) {
    const Entry entry = entries.at(e);
    if (entry.index == facts.self || load(args.forward.candidate_labels + entry.index) != label) continue;
    const std::uint32_t value =
        farthest ? bits_of(lower_bound(args, facts, entry)) : ~bits_of(upper_bound(args, facts, entry));
    rBest = value > rBest ? value : rBest;
  }
  sync_warp();
  const std::uint32_t best = block_max(sWord, rBest);
  return farthest ? far_reach_of(args, facts, float_from_bits(best)) : reach_of(args, facts, float_from_bits(~best));
}

// What a row offers to its scan, one phase after the other. One loop serves them all: exact sums and sorting are inlined
// once, and the kernel keeps its registers.
enum class Phase : std::int32_t {
  kScreened,  // listed positives, then every entry that the bounds do not exclude
  kZeros,     // the K lowest indices, at d2 == 0 only
  kListed,    // listed positives, for near and far alone
  kNearest,   // positives that may be the nearest
  kFarthest,  // positives that may be the farthest
  kDone
};

// A block an anchor.
template <class T, int kWarps>
__global__ void __launch_bounds__(kWarps* kWarpSize, kBlockWarps / kWarps)
    refine_kernel(const __grid_constant__ RefineArgs args) {
  if (atomic_load(&args.gControl->nonfinite) != 0) return;  // the last kernel poisons every output
  constexpr int kThreads = kWarps * kWarpSize;
  SharedArena arena;
  const ForwardArgs& forward = args.forward;
  Scan<T, kWarps> scan(arena, forward.candidates, forward.dims, args.aligned, args.K);
  const std::int64_t row = block_id();
  const std::int64_t anchor = args.row_begin + row;
  const AnchorFacts facts = anchor_facts(args, anchor);
  const std::int64_t label = load(forward.anchor_labels + anchor);
  const std::int32_t positives = load(args.gPositiveCount + anchor);
  const bool all_listed = positives <= kListedPositives;
  const int listed =
      all_listed ? (positives + kThreads - 1) / kThreads * kThreads : 0;  // offers of the list, in threads
  const T* gAnchor = static_cast<const T*>(forward.anchors.data) + anchor * forward.anchors.row_stride;
  const int last_place = static_cast<int>(facts.wanted) - 1;
  const auto is_positive = [&](std::int32_t candidate) { return load(forward.candidate_labels + candidate) == label; };

  // The entries; a buffer that overflowed is incomplete.
  Entries entries{.gScores = nullptr, .gEntries = nullptr, .stride = 1, .count = args.columns};
  Entries far_entries = entries;
  bool complete = !facts.blind;
  if (args.dense) {
    entries.gScores = args.gScores + row * args.columns;
    far_entries.gScores = entries.gScores;
  } else {
    const std::int64_t count = args.gCounts[row];
    const std::int64_t far_count = args.gFarCounts[row];
    sync_block();
    if (thread_id() == 0) {
      args.gCounts[row] = 0;
      args.gFarCounts[row] = 0;
    }
    entries.gEntries = args.gBuffer + row * args.capacity;
    entries.count = count < args.capacity ? count : args.capacity;
    complete = complete && count == entries.count;
    far_entries.gEntries = args.gFarBuffer + row * args.far_capacity;
    far_entries.count = far_count <= args.far_capacity ? far_count : 0;
  }

  float reach = 0.0f;
  float known_bound = facts.blind ? kInfinity : args.underflow_key;  // no member of the support set has a larger key
  if (!facts.blind && facts.wanted > 0) {
    const Shared<std::uint32_t> sStage = scan.sKeys.template view<std::uint32_t>();
    const float U = wanted_upper(args, facts, entries, sStage, ScanShape<kWarps>::kStagedBounds, scan.sBins);
    const float kappa = largest_key(args, facts, U);
    reach = reach_of(args, facts, U);
    known_bound = kappa < kSaneKey ? kappa : kInfinity;
  }
  complete = complete && known_bound < kInfinity;

  std::int32_t needs = kNeedAll;
  std::uint64_t near_found = kNoKey;
  std::uint64_t far_found = kNoKey;
  Phase phase = complete ? Phase::kScreened : Phase::kZeros;
  while (phase != Phase::kDone) {
    std::int64_t first = 0;
    std::int64_t count = listed;
    if (phase == Phase::kScreened) {
      first = -listed;
      count = entries.count;
      scan.begin(gAnchor, known_bound);
    } else if (phase == Phase::kZeros) {
      count = facts.wanted;
      scan.begin(gAnchor, 0.0f);
    } else if (phase != Phase::kListed) {
      count = far_entries.count;
      const bool farthest = phase == Phase::kFarthest;
      reach = positive_reach(args, facts, far_entries, label, farthest, scan.sBins);
      scan.near = kNoKey;
      scan.far = kNoKey;
    }
    const bool insert = phase == Phase::kScreened || phase == Phase::kZeros;
    // Chosen once: a choice at every entry would put both lists into local memory.
    const Entries listing = phase == Phase::kScreened ? entries : far_entries;

    for (; first < count; first += kThreads) {
      bool present = false;
      std::int32_t candidate = -1;
      const std::int64_t e = first + thread_id();
      if (phase == Phase::kListed || first < 0) {
        const std::int64_t place = phase == Phase::kListed ? e : e + listed;
        present = place < positives;
        if (present) candidate = load(args.gPositiveList + anchor * kListedPositives + place);
      } else if (phase == Phase::kZeros) {
        present = e < count;
        candidate = static_cast<std::int32_t>(e) + (facts.self >= 0 && facts.self <= e ? 1 : 0);
      } else if (e < count) {
        const Entry entry = listing.at(e);
        candidate = entry.index;
        present = candidate != facts.self;
        if (phase == Phase::kScreened) {
          // Listed positives have been offered already.
          present = present && lower_bound(args, facts, entry) <= reach;
          if (present && all_listed && positives > 0) present = !is_positive(candidate);
        } else {
          present = present && is_positive(candidate);
          if (present) {
            present = phase == Phase::kFarthest ? !(upper_bound(args, facts, entry) < reach)
                                                : !(lower_bound(args, facts, entry) > reach);
          }
        }
      }
      const bool tracked = phase == Phase::kScreened ? first < 0 : phase != Phase::kZeros;
      scan.offer(present, candidate, tracked);
      if (scan.full() || first + kThreads >= count) scan.flush(insert);
    }

    if (insert) {
      // Only scores that break their promise leave places empty after a screening.
      if (last_place >= 0 && scan.sKeys.get(last_place) == kNoKey) {
        phase = phase == Phase::kScreened ? Phase::kZeros : Phase::kDone;
        continue;
      }
      if (all_listed) {
        needs = 0;
        phase = phase == Phase::kZeros ? Phase::kListed : Phase::kDone;
        continue;
      }
      // More positives than are listed: the first in the support set is the nearest of all.
      std::uint64_t rNear = kNoKey;
      for (int e = lane_id(); e <= last_place; e += kWarpSize) {
        const std::uint64_t key = scan.sKeys.get(e);
        if (is_positive(index_of(key))) rNear = smaller(rNear, key);
      }
      near_found = least_key(rNear);
      const bool dense = args.dense && !facts.blind;
      needs = (near_found == kNoKey && !dense ? kNeedNear : 0) | kNeedFar;
      phase = facts.blind ? Phase::kDone : (near_found == kNoKey && dense ? Phase::kNearest : Phase::kFarthest);
    } else if (phase == Phase::kNearest) {
      near_found = scan.near;
      phase = Phase::kFarthest;
    } else {
      if (phase == Phase::kFarthest) {
        far_found = scan.far;
        if (far_found != kNoKey && d2_of_far(far_found) < kInfinity) needs &= ~kNeedFar;
      }
      phase = Phase::kDone;
    }
  }
  if (!all_listed) {
    scan.near = near_found;
    scan.far = far_found;
  }
  if (thread_id() == 0) atomic_add(&args.gControl->refined, scan.evaluated);

  if (needs == 0) {
    sync_block();  // everybody has read the keys that finishing marks
    if (warp_id() != 0) return;
    const AnchorRecord record = finish_anchor<float>(forward, anchor, args.K, facts.wanted, scan.sKeys,
                                                     positive_from(scan.near), positive_from_far(scan.far));
    if (lane_id() == 0) args.gRecords[anchor] = record;
    return;
  }
  // Dense scores of other rows lie where the lists would go: such a row starts over.
  if (args.dense) needs = kNeedAll;
  std::uint64_t* gLists = args.gBuffer + row * args.capacity;
  if ((needs & kNeedSupport) == 0) {
    for (int e = thread_id(); e < args.K; e += kThreads) gLists[e] = scan.sKeys.get(e);
    if (thread_id() == 0) {
      if ((needs & kNeedNear) == 0) gLists[kLadderSegments * args.K] = scan.near;
      if ((needs & kNeedFar) == 0) gLists[kLadderSegments * (args.K + 1)] = scan.far;
    }
  }
  if (thread_id() == 0) {
    // T has served: the ladder keeps its bound there.
    args.thresholds.T[anchor] = known_bound;
    const std::uint32_t place = atomic_add(&args.gControl->queued, 1u);
    args.gQueue[place] = static_cast<std::int32_t>(row) << kNeedBits | needs;
  }
}

// ---- launch ---------------------------------------------------------------------------------------------------------

template <class T>
cudaError_t launch_far(const RefineArgs& args, cudaStream_t stream) {
  const std::int64_t blocks = (args.rows + kFarWarps - 1) / kFarWarps;
  const LaunchShape shape{blocks < kFarBlocks ? blocks : kFarBlocks, kFarThreads,
                          shared_bytes<T>(kFarWarps * WarpSums<T>::elements(args.forward.dims))};
  return launch(far_thresholds_kernel<T>, shape, stream, args);
}

template <class T, int kWarps>
cudaError_t launch_refine_warps(const RefineArgs& args, cudaStream_t stream) {
  const LaunchShape shape{args.rows, kWarps * kWarpSize, Scan<T, kWarps>::scan_bytes(args.forward.dims)};
  return launch(refine_kernel<T, kWarps>, shape, stream, args);
}
template <class T>
cudaError_t launch_refine(const RefineArgs& args, cudaStream_t stream) {
  return args.many_rows ? launch_refine_warps<T, kManyRowsWarps>(args, stream)
                        : launch_refine_warps<T, kFewRowsWarps>(args, stream);
}

}  // namespace

// ---- dispatch -------------------------------------------------------------------------------------------------------

cudaError_t enqueue_sample_thresholds(const ForwardArgs& args, const ForwardPlan& plan, char* workspace,
                                      const Wave& wave, cudaStream_t stream) {
  const LaunchShape shape{wave.rows + 1, kThresholdThreads, kThresholdBytes};
  return launch(thresholds_kernel<true>, shape, stream, refine_args(args, plan, workspace, wave.begin, wave.rows));
}

cudaError_t enqueue_entry_thresholds(const ForwardArgs& args, const ForwardPlan& plan, char* workspace,
                                     const Wave& wave, cudaStream_t stream) {
  const LaunchShape shape{wave.rows + 1, kThresholdThreads, kThresholdBytes};
  return launch(thresholds_kernel<false>, shape, stream, refine_args(args, plan, workspace, wave.begin, wave.rows));
}

cudaError_t enqueue_far_thresholds(const ForwardArgs& args, const ForwardPlan& plan, char* workspace, const Wave& wave,
                                   cudaStream_t stream) {
  const RefineArgs kernel_args = refine_args(args, plan, workspace, wave.begin, wave.rows);
  switch (args.dtype) {
    case DType::kFloat32:
      return launch_far<float>(kernel_args, stream);
    case DType::kFloat16:
      return launch_far<Half>(kernel_args, stream);
    case DType::kBFloat16:
      return launch_far<BFloat16>(kernel_args, stream);
    case DType::kFloat64:
      break;
  }
  return cudaErrorInvalidValue;
}

cudaError_t enqueue_refine(const ForwardArgs& args, const ForwardPlan& plan, char* workspace, const Wave& wave,
                           cudaStream_t stream) {
  const RefineArgs kernel_args = refine_args(args, plan, workspace, wave.begin, wave.rows);
  switch (args.dtype) {
    case DType::kFloat32:
      return launch_refine<float>(kernel_args, stream);
    case DType::kFloat16:
      return launch_refine<Half>(kernel_args, stream);
    case DType::kBFloat16:
      return launch_refine<BFloat16>(kernel_args, stream);
    case DType::kFloat64:
      break;
  }
  return cudaErrorInvalidValue;
}

}  // namespace sn::cuda
