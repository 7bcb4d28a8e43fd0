// From scores to certified neighbours. bound.cuh says what a score proves about the true distance D_ij of a pair, in
// units of the cast (2^e times the input's). This file says what true distances prove about keys, and the reverse.
//
// Keys. The key of a pair is the fp32 direct sum of direct_sum.cuh. With D the true distance in the input's units and u
// = 2^-24: a difference is rounded once and squared, 2 u; then at most 64 roundings in the chunk, 5 in the tree, one
// for each section but the first. Near zero a product may round by 2^-150 more, once for each of D_dims elements;
// differences and sums are exact there. So, unless the sum overflows,
//   D^2 (1 - gamma) - w <= key <= D^2 (1 + gamma) + w,   gamma = (64 + 5 + sections + 4) u,   w = D_dims 2^-150,
// where the spare 3 u hold the second-order terms (they are below (200 u)^2). A sum overflows only if D^2 (1 + gamma)
// reaches 2^128: bounds below kSaneKey exclude it.
//
// Support. Take any K candidates (all of them, if fewer exist) and let U be the largest of their upper bounds: K keys
// are at most kappa = U^2 (1 + gamma) + w, and so is every key of the true support set, ties with its last one
// included. A member therefore has D^2 (1 - gamma) <= kappa + w, and
//   D <= U sqrt((1 + gamma) / (1 - gamma)) + sqrt(2 w / (1 - gamma)) <= U stretch + underflow =: reach,
//   stretch = 1 + 2 gamma, underflow = sqrt(2 D_dims) 2^-74 2^e.
// Candidates whose lower bound is above reach are out, all others get exact keys: the selection among those is the
// selection among all. U is best from the K smallest upper bounds. Rounding it up, or taking it from a sample or from
// whatever a buffer holds, only loosens it.
//
// Groups. Let the sampled candidates be shared out over groups, and let g be an upper bound of the distance of some
// member of its group (bound.cuh; +inf where there is none). The K smallest g of different groups bound K different
// candidates, so U is the K-th smallest g, or any larger number. The anchor's own row is one member of one group: where
// it is in the sample, K + 1 groups have K others among them. Groups may be joined by taking the least of their g. Of G
// groups the K-th least of all g is, on average, the sample's G ln(G / (G - K))-th candidate: with many groups hardly
// more than the K-th.
//
// The buffer holds every candidate that a proven reach does not exclude (bound.cuh), unless it overflowed; then the row
// is not certified. Dense scores hold everything.
//
// Farthest positive. Let F be the largest lower bound of some positives: a key is at least F^2 (1 - gamma) - w, so the
// farthest one has D^2 (1 + gamma) + w >= F^2 (1 - gamma) - w, and
//   D >= F sqrt((1 - gamma) / (1 + gamma)) - sqrt(2 w / (1 + gamma)) >= F shrink - underflow,   shrink = 1 - 2 gamma.
// From an exact key instead of F: D >= sqrt(key / (1 + gamma)) - sqrt(w) >= sqrt(key) shrink - underflow. If the
// farthest key found is finite, a positive whose sum overflows would have been looked at too: its D^2 (1 + gamma)
// is above every finite key. If the farthest key is +inf the lowest index wins, of which bounds say nothing: the
// fallback decides.
//
// Duplicates. If the K lowest indices (without the anchor's own row) are all at d2 == 0, they are the support set:
// nothing comes before them. This finishes a collapsed batch, which overflows every buffer.
#pragma once

#include <cstdint>

#include "cuda/loss.cuh"
#include "cuda/memory.cuh"
#include "cuda/ptx.cuh"
#include "cuda/screen/args.cuh"
#include "cuda/screen/bound.cuh"
#include "cuda/screen/kth_smallest.cuh"

namespace sn::cuda {

inline constexpr float kSaneKey = 0x1p126f;  // two orders below the overflow of a float: gamma does not reach over it

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
// n, rho: the candidate's.
__device__ __forceinline__ float upper_bound(const RefineArgs& args, const AnchorFacts& facts, const Entry& entry,
                                             float n, float rho) {
  return distance_upper(facts.n, facts.rho, n, rho, entry.score, args.eta);
}

// A row that was screened again: its entries carry squares, and share the errors (rescreen/rescreen.cuh).
struct FramedFacts : AnchorFacts {
  bool framed;
  float error;
  float spread;
};
__device__ __forceinline__ float lower_bound(const RefineArgs& args, const FramedFacts& facts, const Entry& entry) {
  if (facts.framed) return framed_lower(entry.score, facts.error, facts.spread);
  return lower_bound(args, static_cast<const AnchorFacts&>(facts), entry);
}
__device__ __forceinline__ float upper_bound(const RefineArgs& args, const FramedFacts& facts, const Entry& entry,
                                             float n, float rho) {
  if (facts.framed) return framed_upper(entry.score, facts.error, facts.spread);
  return upper_bound(args, static_cast<const AnchorFacts&>(facts), entry, n, rho);
}
template <class Facts>
__device__ __forceinline__ float upper_bound(const RefineArgs& args, const Facts& facts, const Entry& entry) {
  return upper_bound(args, facts, entry, load(args.gCandidateN + entry.index), load(args.gCandidateRho + entry.index));
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

// The upper bound of an entry, for the search of the wanted-th; kNoBits for the anchor itself.
template <class Facts>
__device__ __forceinline__ std::uint32_t upper_bits(const RefineArgs& args, const Facts& facts, const Entry& entry) {
  return entry.index == facts.self ? kNoBits : bits_of(upper_bound(args, facts, entry));
}

// A bound of the wanted-th smallest upper bound of the entries (kth_smallest); +inf if there are not so many.
template <int kStaged, class Facts>
__device__ __forceinline__ float wanted_upper(const RefineArgs& args, const Facts& facts, const Entries& entries,
                                              const Shared<std::uint32_t>& sStage, const Shared<std::uint32_t>& sWord) {
  struct Fetched {
    Entry entry;
    float n;
    float rho;
  };
  return kth_smallest<kStaged>(
      sStage, sWord, entries.count, static_cast<std::uint32_t>(facts.wanted),
      [&](std::int64_t e) -> Fetched {
        const Entry entry = entries.at(e);
        return {entry, load(args.gCandidateN + entry.index), load(args.gCandidateRho + entry.index)};
      },
      [&](const Fetched& fetched) {
        if (fetched.entry.index == facts.self) return kNoBits;
        return bits_of(upper_bound(args, facts, fetched.entry, fetched.n, fetched.rho));
      });
}

}  // namespace sn::cuda
