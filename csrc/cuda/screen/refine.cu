// Exact keys of what the screening could not rule out, a block an anchor: the support set, near and far, and every
// output of the anchors that can be certified (certificate.cuh). The others are queued.
//
// Where rows may be screened again (rescreen/rescreen.cuh) this happens twice. The first time, a row of which too many
// entries survive is left undecided, too: it is likely to be one of a tight cluster, whose other rows have as many.
// Entries and counts of undecided rows stay. The second time blocks take the waiting rows in turn, those of groups with
// new entries, the others with the old ones and as many sums as it takes; what is undecided then goes to the fallback
// (fallback/fallback.cu). Of dense scores there is one refinement, which leaves rows of many survivors to the fallback.
#include <type_traits>

#include "cuda/keys.cuh"
#include "cuda/launch.cuh"
#include "cuda/loss.cuh"
#include "cuda/memory.cuh"
#include "cuda/ptx.cuh"
#include "cuda/rescreen/rescreen.cuh"
#include "cuda/screen/args.cuh"
#include "cuda/screen/certificate.cuh"
#include "cuda/screen/nearest.cuh"
#include "cuda/stages.h"

namespace sn::cuda {
namespace {

// ---- traits ---------------------------------------------------------------------------------------------------------

// Warps of a block that refines one anchor. Where rows alone fill the machine, a row is cheapest if its warp waits for
// no other (kScreen: thousands of anchors). Elsewhere warps share a row's sums.
constexpr int kManyRowsWarps = 1;
constexpr int kFewRowsWarps = 4;
constexpr int kBlockWarps = 12;  // warps of all its blocks that a multiprocessor shall hold: 168 registers a thread
constexpr int kAgainWarps = 8;   // at least, of the second refinement: bounds of two kinds take registers
template <int kWarps, bool kAgain>
constexpr int kMinBlocks = (kAgain ? kAgainWarps : kBlockWarps) / kWarps;
// Of the second refinement: so many multiprocessors full, as an H200 has; any number is right.
constexpr std::int64_t kAgainMultiprocessors = 132;

// ---- kernel ---------------------------------------------------------------------------------------------------------

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

// What the bounds of the positives among the entries say about the farthest (nearest) of them: it is at least (at most)
// so far. The whole block calls it.
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

// What a row offers to NearestK, one phase after the other. One loop serves all phases: exact sums and sorting are
// inlined once, and the kernel keeps its registers.
enum class Phase : std::int32_t {
  kScreened,  // listed positives, then every entry that the bounds do not exclude
  kZeros,     // the K lowest indices, at d2 == 0 only
  kListed,    // listed positives, for near and far alone
  kNearest,   // positives that may be the nearest
  kFarthest,  // positives that may be the farthest
  kDone
};

// The first refinement, or what it left.
template <bool kAgain>
using FactsOf = std::conditional_t<kAgain, FramedFacts, AnchorFacts>;
template <bool kAgain>
__device__ __forceinline__ FactsOf<kAgain> facts_of(const RefineArgs& args, std::int64_t anchor) {
  if constexpr (kAgain) {
    const float mark = args.thresholds.u[anchor];
    const bool framed = (bits_of(mark) & kLeaderMark) == 0;
    return {anchor_facts(args, anchor), framed, mark, args.thresholds.g2[anchor]};
  } else {
    return anchor_facts(args, anchor);
  }
}

// The whole block, one row of the strip.
template <class T, int kWarps, bool kAgain>
__device__ __forceinline__ void refine_row(const RefineArgs& args, NearestK<T, kWarps>& nearest, std::int64_t row) {
  constexpr int kThreads = kWarps * kWarpSize;
  const ForwardArgs& forward = args.forward;
  const std::int64_t anchor = args.row_begin + row;
  const FactsOf<kAgain> facts = facts_of<kAgain>(args, anchor);
  const std::int64_t label = load(forward.anchor_labels + anchor);
  const ListedPositives positives = positives_of(args, anchor, facts.self, label);
  const bool all_listed = positives.all_listed();
  const int listed =
      all_listed ? (positives.entries + kThreads - 1) / kThreads * kThreads : 0;  // offers of the list, in threads
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
    entries.gEntries = args.gBuffer + row * args.capacity;
    entries.count = count < args.capacity ? count : args.capacity;
    complete = complete && count == entries.count;
    far_entries.gEntries = args.gFarBuffer + row * args.far_capacity;
    far_entries.count = far_count <= args.far_capacity ? far_count : 0;
  }

  float reach = 0.0f;
  float known_bound = facts.blind ? kInfinity : args.underflow_key;  // no member of the support set has a larger key
  if (!facts.blind && facts.wanted > 0) {
    const Shared<std::uint32_t> sStage = nearest.sKeys.template view<std::uint32_t>();
    const float U = wanted_upper<NearestShape<kWarps>::kStagedBounds>(args, facts, entries, sStage, nearest.sWord);
    const float kappa = largest_key(args, facts, U);
    reach = reach_of(args, facts, U);
    known_bound = kappa < kSaneKey ? kappa : kInfinity;
    if constexpr (kAgain) complete = complete && !(facts.framed && facts.error == kInfinity);
  }
  complete = complete && known_bound < kInfinity;

  std::int32_t needs = kNeedAll;
  std::uint64_t near_found = kNoKey;
  std::uint64_t far_found = kNoKey;
  Phase phase = complete ? Phase::kScreened : Phase::kZeros;
  bool too_many = false;
  std::int64_t survivors = all_listed ? -std::int64_t{positives.count} : 0;  // of the screening, beside those listed
  while (phase != Phase::kDone) {
    std::int64_t first = 0;
    std::int64_t count = listed;
    if (phase == Phase::kScreened) {
      first = -listed;
      count = entries.count;
      nearest.begin(gAnchor, known_bound);
    } else if (phase == Phase::kZeros) {
      count = facts.wanted;
      nearest.begin(gAnchor, 0.0f);
    } else if (phase != Phase::kListed) {
      count = far_entries.count;
      const bool farthest = phase == Phase::kFarthest;
      reach = positive_reach(args, facts, far_entries, label, farthest, nearest.sWord);
      nearest.near = kNoKey;
      nearest.far = kNoKey;
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
        present = place < positives.entries;
        if (present) candidate = load(positives.gList + place);
        present = present && candidate != facts.self;
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
          if (present && listed > 0) present = !is_positive(candidate);
        } else {
          present = present && is_positive(candidate);
          if (present) {
            present = phase == Phase::kFarthest ? !(upper_bound(args, facts, entry) < reach)
                                                : !(lower_bound(args, facts, entry) > reach);
          }
        }
      }
      const bool tracked = phase == Phase::kScreened ? first < 0 : phase != Phase::kZeros;
      nearest.offer(present, candidate, tracked);
      if (!nearest.full() && first + kThreads < count) continue;
      if constexpr (!kAgain) {
        if ((args.rescreen || args.dense) && phase == Phase::kScreened) {
          survivors += nearest.pending();
          if (survivors > args.many_survivors) {
            too_many = true;
            break;
          }
        }
      }
      nearest.flush(insert);
    }
    if (too_many) {
      too_many = false;
      phase = Phase::kZeros;
      continue;
    }

    if (insert) {
      // Places stay empty after a screening only where scores broke their bound.
      if (last_place >= 0 && nearest.sKeys.get(last_place) == kNoKey) {
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
        const std::uint64_t key = nearest.sKeys.get(e);
        if (is_positive(index_of(key))) rNear = smaller(rNear, key);
      }
      near_found = least_key(rNear);
      const bool dense = args.dense && !facts.blind;
      needs = (near_found == kNoKey && !dense ? kNeedNear : 0) | kNeedFar;
      phase = facts.blind ? Phase::kDone : (near_found == kNoKey && dense ? Phase::kNearest : Phase::kFarthest);
    } else if (phase == Phase::kNearest) {
      near_found = nearest.near;
      phase = Phase::kFarthest;
    } else {
      if (phase == Phase::kFarthest) {
        far_found = nearest.far;
        if (far_found != kNoKey && d2_of_far(far_found) < kInfinity) needs &= ~kNeedFar;
      }
      phase = Phase::kDone;
    }
  }
  if (!all_listed) {
    nearest.near = near_found;
    nearest.far = far_found;
  }
  if (thread_id() == 0) atomic_add(&args.gControl->refined, nearest.evaluated);

  const bool waits = !kAgain && args.rescreen && (needs & kNeedSupport) != 0;
  if (thread_id() == 0 && !args.dense && !waits) {
    args.gCounts[row] = 0;
    args.gFarCounts[row] = 0;
  }
  if constexpr (kAgain) {
    if (facts.framed && (needs & kNeedSupport) == 0 && thread_id() == 0) {
      atomic_add(&args.gControl->certified, 1u);
    }
  }

  if (needs == 0) {
    sync_block();  // all threads have read the keys that finishing marks
    if (warp_id() != 0) return;
    const AnchorRecord record = finish_anchor<float>(forward, anchor, args.K, facts.wanted, nearest.sKeys,
                                                     near_of<float>(nearest.near), far_of<float>(nearest.far));
    if (lane_id() == 0) args.gRecords[anchor] = record;
    return;
  }
  // Dense scores of other rows lie where the lists would go: such a row starts over.
  if (args.dense) needs = kNeedAll;
  std::uint64_t* gLists = args.gBuffer + row * args.capacity;
  if ((needs & kNeedSupport) == 0) {
    for (int e = thread_id(); e < args.K; e += kThreads) gLists[e] = nearest.sKeys.get(e);
    if (thread_id() == 0) {
      if ((needs & kNeedNear) == 0) gLists[near_place(args.K)] = nearest.near;
      if ((needs & kNeedFar) == 0) gLists[far_place(args.K)] = nearest.far;
    }
  }
  if (waits) {
    // The least index among what may be nearest: rows of a cluster agree on it, if they have seen the same members. A
    // row without bounds may be anywhere.
    std::uint32_t rLeast = kNoLeader;
    for (std::int64_t e = thread_id(); e < entries.count && known_bound < kInfinity; e += kThreads) {
      const Entry entry = entries.at(e);
      const std::uint32_t leader = kLeaderMark | static_cast<std::uint32_t>(entry.index);
      if (leader < rLeast && lower_bound(args, facts, entry) <= reach &&
          load(args.gCandidateRho + entry.index) < kInfinity) {
        rLeast = leader;
      }
    }
    sync_warp();
    const std::uint32_t leader = ~block_max(nearest.sWord, ~rLeast);
    if (thread_id() == 0) args.thresholds.u[anchor] = float_from_bits(leader);
  }
  if (thread_id() == 0) {
    // T is no longer needed: the fallback keeps its bound there.
    if (kAgain && args.thresholds.T[anchor] < known_bound) known_bound = args.thresholds.T[anchor];
    args.thresholds.T[anchor] = known_bound;
    const std::uint32_t place = atomic_add(&args.gControl->queued, 1u);
    args.gQueue[place] = static_cast<std::int32_t>(row) << kNeedBits | needs;
  }
}

// First a block an anchor, then blocks that take the waiting rows in turn.
template <class T, int kWarps, bool kAgain>
__global__ void __launch_bounds__(kWarps* kWarpSize, kMinBlocks<kWarps, kAgain>)
    refine_kernel(const __grid_constant__ RefineArgs args) {
  if (atomic_load(&args.gControl->nonfinite) != 0) return;  // the last kernel poisons every output
  const std::int64_t rows = kAgain ? load(&args.gControl->waiting) : args.rows;
  if (kAgain && block_id() >= rows) return;
  SharedArena arena;
  NearestK<T, kWarps> nearest(arena, args.forward.candidates, args.forward.dims, args.aligned, args.K);
  if constexpr (kAgain) {
    for (std::int64_t place = block_id(); place < rows; place += block_count()) {
      sync_block();  // the previous row's keys have been read
      refine_row<T, kWarps, true>(args, nearest, load(args.gWaiting + place) >> kNeedBits);
    }
  } else {
    refine_row<T, kWarps, false>(args, nearest, block_id());
  }
}

// ---- launch ---------------------------------------------------------------------------------------------------------

template <class T, int kWarps, bool kAgain>
cudaError_t launch_refine_warps(const RefineArgs& args, cudaStream_t stream) {
  const std::int64_t most = kAgainMultiprocessors * kMinBlocks<kWarps, true>;
  const std::int64_t blocks = kAgain && most < args.rows ? most : args.rows;
  const LaunchShape shape{blocks, kWarps * kWarpSize, NearestK<T, kWarps>::bytes(args.forward.dims)};
  return launch(refine_kernel<T, kWarps, kAgain>, shape, stream, args);
}
template <bool kAgain>
cudaError_t launch_refine(const ForwardArgs& args, const ForwardPlan& plan, char* workspace, const Strip& strip,
                          cudaStream_t stream) {
  const RefineArgs kernel_args = refine_args(args, plan, workspace, strip);
  return for_narrow_type(args.dtype, [&]<class T>() {
    return kernel_args.many_rows ? launch_refine_warps<T, kManyRowsWarps, kAgain>(kernel_args, stream)
                                 : launch_refine_warps<T, kFewRowsWarps, kAgain>(kernel_args, stream);
  });
}

}  // namespace

// ---- dispatch -------------------------------------------------------------------------------------------------------

cudaError_t enqueue_refine(const ForwardArgs& args, const ForwardPlan& plan, char* workspace, const Strip& strip,
                           cudaStream_t stream) {
  return launch_refine<false>(args, plan, workspace, strip, stream);
}
cudaError_t enqueue_second_refine(const ForwardArgs& args, const ForwardPlan& plan, char* workspace, const Strip& strip,
                                  cudaStream_t stream) {
  return launch_refine<true>(args, plan, workspace, strip, stream);
}

}  // namespace sn::cuda
