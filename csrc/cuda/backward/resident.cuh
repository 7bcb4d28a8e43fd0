// What a block of the backward of small batches (resident.cu) keeps in shared memory, and what a thread of it sums.
#pragma once

#include <cstdint>

#include "cuda/backward/graph.cuh"
#include "cuda/memory.cuh"
#include "cuda/plan/sizes.h"
#include "cuda/ptx.cuh"

namespace sn::cuda {

inline constexpr std::uint16_t kNoRow = 0xffff;  // of an edge that leads nowhere

// A row has a line of shared memory to itself, which spans all banks and has the slice's packs again and again. Lane l
// reads pack l % 8 of whatever row it needs: no two lanes of a quarter of a warp meet in a bank.
inline constexpr int kLinePacks = static_cast<int>(kResidentLine) / kPackBytes;
static_assert(kResidentLine == 32 * 4 && kResidentTargets <= kResidentThreads && kResidentEdges <= 0x7fff);

struct ResidentArgs {
  Graph graph;
  FeatureView anchors;
  FeatureView candidates;  // of their own: no rows where the candidates are the anchors
  void* grad_anchors;
  void* grad_candidates;
  std::uint32_t reciprocal;  // 2^31 / edges, rounded up
  int padded_edges;
  int words;        // of a target's bits, one more than they fill if that is odd
  int pack_shift;   // log2 of the packs of a slice
  int group_shift;  // log2 of the lanes that share a list of short rows
  bool symmetric;
  bool incoming;  // some target has incoming edges
  bool packs;     // rows are read and written in packs
};

template <typename Acc>
struct ResidentMemory {
  Shared<Acc> sRows;                // [rows][a line]
  Shared<Acc> sWeights;             // [2][padded edges]: of lists, then of own edges
  Shared<std::uint16_t> sSources;   // the other ends of these, as rows above
  Shared<std::uint32_t> sIncoming;  // [targets][words]: anchors that selected the target
  Shared<std::uint16_t> sPlaces;    // [targets][words]: where the first edge of each word of anchors is listed
  Shared<std::uint32_t> sLists;     // [targets]: where a list begins, and from bit 16 on its edges
  Shared<std::uint32_t> sCounting;  // bits of listed and own edges that count, and a word without any
  Shared<double> sUpstream;
  Shared<std::uint32_t> sListed;  // edges listed so far; whether an anchor has selected a target twice

  __device__ __forceinline__ ResidentMemory(SharedArena& arena, const ResidentArgs& args, int rows, int targets)
      : sRows(arena.take<Acc>(rows * (static_cast<int>(kResidentLine / sizeof(Acc))))),
        sWeights(arena.take<Acc>(2 * args.padded_edges)),
        sSources(arena.take<std::uint16_t>(2 * args.padded_edges)),
        sIncoming(arena.take<std::uint32_t>(targets * args.words)),
        sPlaces(arena.take<std::uint16_t>(targets * args.words)),
        sLists(arena.take<std::uint32_t>(targets)),
        sCounting(arena.take<std::uint32_t>(2 * args.padded_edges / kWarpSize + 1)),
        sUpstream(arena.take<double>(1)),
        sListed(arena.take<std::uint32_t>(2)) {}
};

// What a thread sums: packs of a row, or the share of one group of lanes of them.
template <typename Acc, int kPacks>
struct ResidentSum {
  static constexpr int kPack = Pack<Acc>::kElements;

  Pack<Acc> own[kPacks];
  int group;       // of lanes
  int number = 0;  // edges of this list that count, so far
  bool summed = false;
  Acc values[kPacks][kPack] = {};
  Acc total[kPacks][kPack] = {};

  // A full chunk of incoming edges first meets a zero (gather.cuh), which makes one of -0.
  __device__ __forceinline__ void add_to_total(bool chunk) {
#pragma unroll
    for (int p = 0; p < kPacks; ++p) {
#pragma unroll
      for (int v = 0; v < kPack; ++v) {
        if (chunk) values[p][v] = add(values[p][v], Acc(0));
        total[p][v] = summed ? add(total[p][v], values[p][v]) : values[p][v];
        values[p][v] = 0;
      }
    }
    summed = true;
    number = 0;
  }
};

}  // namespace sn::cuda
