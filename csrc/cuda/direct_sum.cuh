// The squared distance of two rows, in the one order in which this backend adds it up.
//
// d2(x, z), in the accumulation type Acc (fp32; fp64 for fp64; half inputs are widened first):
//   a chunk is 64 consecutive elements; its sum is s = fma(t, t, s) over t = x - z (rounded) in increasing order, from
//   +0, zero padded;
//   a section is 32 chunks (2048 elements); its sum is the aligned pairwise tree over the 32 chunk sums: chunks that
//   differ in bit 0 of their number meet first, then bit 1, 2, 3, 4; absent chunks are +0;
//   sections are added one after the other, from the first.
// A NaN, which only inputs that are not finite can give, counts as +inf.
//
// Every path relies on what follows from this order:
//
// * D may be cut at sections, and inside a section at aligned groups of 2^p chunks: whoever has the parts can finish
//   the sum.
//
// * x + 0 = x for the sums here, which are never -0: a tree over 2^p chunks of which some are absent is the same
//   whatever p covers the present ones, and zero padding changes nothing (fma(0, 0, s) = s).
//
// * Every operation is monotone and every term is >= 0: a partial result, completed by zeros, never exceeds the final
//   one. A candidate may be abandoned as soon as its partial sum is above a bound.
//
// * d2(x, z) and d2(z, x) have the same bits.
//
// API
//   kChunk, kSectionChunks, kSection                 the order's constants (plan_types.h)
//   no_nan(d2)                                 the last step
//   chunk_sum_step(s, x, z)                    s = fma(x - z, x - z, s)
//   class WarpSums<T>                          one warp, one anchor, batches of up to 32 candidates:
//     constexpr int elements(dims)             shared memory of a warp, elements of T, a multiple of 16 bytes
//     WarpSums(sMine, gCandidates, row_stride, dims, aligned)
//                                              aligned: rows of BOTH matrices start at multiples of 16 bytes. sMine:
//                                              the warp's own elements(dims)
//     set_anchor(gAnchor)                      pointer to the anchor's row; the same for all lanes
//     Acc sums(candidate, count)               lane i < count: its candidate's row number, or -1 for none; count is the
//                                              same in all lanes, at most 32. Lane i gets d2 of its candidate, or +inf
//     Acc sums_within(candidate, count, bound) the same, but whatever exceeds the bound may be abandoned: d2 where
//                                              d2 <= bound, +inf elsewhere. The bound is the same in all lanes.
//   All lanes of the warp call all members together.
#pragma once

#include <cstdint>

#include "cuda/memory.cuh"
#include "cuda/plan/plan_types.h"
#include "cuda/ptx.cuh"

namespace sn::cuda {

static_assert(kSectionChunks == kWarpSize, "a butterfly over a warp is the tree of a section");

template <class A>
__device__ __forceinline__ A no_nan(A d2) {
  return is_nan(d2) ? infinity<A>() : d2;
}
template <class A>
__device__ __forceinline__ A chunk_sum_step(A sum, A x, A z) {
  const A t = subtract(x, z);
  return fused_multiply_add(t, t, sum);
}

// ---- one warp, one anchor, many candidates --------------------------------------------------------------------------

// A lane owns one chunk of one candidate at a time. With P = chunks of the section rounded up to a power of two, lane l
// has chunk l mod P of the candidate l / P of a group of 32 / P, and a butterfly over P lanes is the tree. Rows arrive
// in steps of 64 bytes a chunk, so a warp reads whole sectors whatever P is. They pass through a ring of stages in
// shared memory, which asynchronous copies fill two steps ahead. A stage's rows and the anchor's chunks lie at odd
// multiples of 16 bytes: eight lanes that read 16 bytes each hit all banks once.
template <class T>
class WarpSums {
 public:
  using A = Acc<T>;
  static constexpr int kPack = Pack<T>::kElements;
  static constexpr int kStepPacks = 4;
  static constexpr int kStep = kStepPacks * kPack;  // elements of a chunk in one stage
  static constexpr int kSteps = kChunk / kStep;
  static constexpr int kStages = 3;
  static constexpr int kStepPitch = kStep + kPack;
  static constexpr int kChunkPitch = kChunk + kPack;
  static constexpr int kStageElements = kWarpSize * kStepPitch;
  static_assert(kChunk % kStep == 0);
  static_assert((kStepPitch / kPack) % 2 == 1 && (kChunkPitch / kPack) % 2 == 1, "odd pitches have no bank conflicts");

  __host__ __device__ static constexpr int elements(std::int64_t dims) {
    return (kChunkPitch << slot_bits((dims + kChunk - 1) / kChunk)) + kStages * kStageElements;
  }

  __device__ __forceinline__ WarpSums(Shared<T> sMine, const T* gCandidates, std::int64_t row_stride, std::int64_t dims,
                                      bool aligned)
      : sStages_(sMine),
        sAnchor_(sMine.offset(kStages * kStageElements)),
        gCandidates_(gCandidates),
        row_stride_(row_stride),
        dims_(dims),
        aligned_(aligned) {}

  __device__ __forceinline__ void set_anchor(const T* gAnchor) {
    gAnchor_ = gAnchor;
    staged_section_ = -1;
  }

  __device__ __forceinline__ A sums(std::int32_t candidate, int count) {
    return run<false>(candidate, count, infinity<A>());
  }
  __device__ __forceinline__ A sums_within(std::int32_t candidate, int count, A bound) {
    return run<true>(candidate, count, bound);
  }

 private:
  // log2 of the lanes that share a section of which so many chunks are left.
  __host__ __device__ static constexpr int slot_bits(std::int64_t chunks) {
    int bits = 0;
    while ((1 << bits) < chunks && (1 << bits) < kSectionChunks) ++bits;
    return bits;
  }

  static constexpr int kCopies = kStepPacks;                   // packs a lane copies in one step
  static constexpr int kRowsPerCopy = kWarpSize / kStepPacks;  // chunks that one round of copies serves

  // How a section is shared out: 2^slot_bits lanes a candidate, `at_once` candidates a group, `steps` stages a group.
  struct Shape {
    std::int64_t section;
    int slot_bits;
    int at_once;
    int steps;
  };

  // Where the copies of the next steps come from.
  struct Cursor {
    int first;                     // first candidate of the group; count: nothing is left
    int step;                      // of its chunks, next to be copied
    const T* source[kCopies];      // this lane's pack of step 0
    std::int32_t remain[kCopies];  // elements from there to the row's end, at most a chunk; <= 0: nothing there
  };

  // kPack elements from a place of which `remain` are the row's, into element `at` of sTarget: the rest is zero.
  __device__ __forceinline__ void copy_pack(Shared<T> sTarget, int at, const T* gSource, std::int32_t remain) const {
    if (remain <= 0 || (aligned_ && remain >= kPack)) {
      async_copy16(sTarget, at, remain > 0 ? gSource : gAnchor_, remain > 0);
      return;
    }
    Pack<T> rPack;
#pragma unroll
    for (int e = 0; e < kPack; ++e) rPack.elements[e] = e < remain ? load(gSource + e) : narrow<T>(A(0));
    sTarget.set_pack(at, rPack);
  }

  __device__ __forceinline__ static std::int32_t clip(std::int64_t remain) {
    return remain < kChunk ? (remain > 0 ? static_cast<std::int32_t>(remain) : 0) : kChunk;
  }

  __device__ void stage_anchor(const Shape& shape) {
    sync_warp();  // the previous section may still be read
    constexpr int kChunkPacks = kChunk / kPack;
    for (int pack = lane_id(); pack < kChunkPacks << shape.slot_bits; pack += kWarpSize) {
      const int chunk = pack / kChunkPacks;
      const int within = pack % kChunkPacks * kPack;
      const std::int64_t at = shape.section * kSection + chunk * kChunk + within;
      copy_pack(sAnchor_, chunk * kChunkPitch + within, gAnchor_ + at, clip(dims_ - at));
    }
    async_commit();
    async_wait<0>();
    sync_warp();
    staged_section_ = shape.section;
  }

  // The first group from `first` on that has a candidate left; count or more if none has.
  __device__ __forceinline__ static int next_group(int first, int count, const Shape& shape, std::int32_t candidate) {
    const std::uint32_t alive = ballot(candidate >= 0);
    const std::uint32_t group = kFullWarp >> (kWarpSize - shape.at_once);
    while (first < count && ((alive >> first) & group) == 0) first += shape.at_once;
    return first;
  }

  __device__ __forceinline__ void seek(Cursor& cursor, int first, int count, const Shape& shape,
                                       std::int32_t candidate) const {
    cursor.first = next_group(first, count, shape, candidate);
    cursor.step = 0;
#pragma unroll
    for (int c = 0; c < kCopies; ++c) {
      const int task = c * kRowsPerCopy + lane_id() / kStepPacks;
      const int chunk = task & ((1 << shape.slot_bits) - 1);
      const int owner = cursor.first + (task >> shape.slot_bits);
      const std::int32_t row = shuffle(candidate, owner < kWarpSize ? owner : 0);
      const std::int64_t at = shape.section * kSection + chunk * kChunk + lane_id() % kStepPacks * kPack;
      const bool present = owner < count && row >= 0 && at < dims_;
      cursor.source[c] = present ? gCandidates_ + row * row_stride_ + at : gCandidates_;
      cursor.remain[c] = present ? clip(dims_ - at) : 0;
    }
  }

  // Starts the copies of one step, if any is left, and moves on. Always ends a group of copies.
  __device__ __forceinline__ void issue(Cursor& cursor, int stage, int count, const Shape& shape,
                                        std::int32_t candidate) const {
    if (cursor.first < count) {
      const Shared<T> sStage = sStages_.offset(stage * kStageElements);
#pragma unroll
      for (int c = 0; c < kCopies; ++c) {
        const int task = c * kRowsPerCopy + lane_id() / kStepPacks;
        const int at = task * kStepPitch + lane_id() % kStepPacks * kPack;
        copy_pack(sStage, at, cursor.source[c] + cursor.step * kStep, cursor.remain[c] - cursor.step * kStep);
      }
      if (++cursor.step == shape.steps) seek(cursor, cursor.first + shape.at_once, count, shape, candidate);
    }
    async_commit();
  }

  template <bool kBounded>
  __device__ A run(std::int32_t candidate, int count, A bound) {
    const std::int64_t chunks = (dims_ + kChunk - 1) / kChunk;
    if (lane_id() >= count) candidate = -1;
    A rTotal = 0;  // of this lane's candidate, sections so far
    for (std::int64_t section = 0; section * kSectionChunks < chunks; ++section) {
      const std::int64_t left = chunks - section * kSectionChunks;
      Shape shape{section, slot_bits(left), kWarpSize, kSteps};
      shape.at_once = kWarpSize >> shape.slot_bits;
      if (left == 1) shape.steps = static_cast<int>((dims_ - section * kSection + kStep - 1) / kStep);
      if (staged_section_ != section) stage_anchor(shape);
      sync_warp();  // the last stage of the section or call before may still be read

      Cursor cursor;
      seek(cursor, 0, count, shape, candidate);
      int first = cursor.first;  // the group whose steps arrive next
#pragma unroll
      for (int stage = 0; stage < kStages - 1; ++stage) issue(cursor, stage, count, shape, candidate);

      const Shared<T> sX = sAnchor_.offset((lane_id() & ((1 << shape.slot_bits) - 1)) * kChunkPitch);
      int stage = 0;
      int step = 0;
      int last_step = shape.steps;  // fewer will arrive once a group is abandoned
      bool abandoned = false;
      A rSum = 0;  // of this lane's chunk
      while (first < count) {
        async_wait<kStages - 2>();
        sync_warp();  // all copies are here, and all lanes are done with the stage that is filled next
        issue(cursor, stage == 0 ? kStages - 1 : stage - 1, count, shape, candidate);
        if (!kBounded || !abandoned) {
          const Shared<T> sZ = sStages_.offset(stage * kStageElements + lane_id() * kStepPitch);
#pragma unroll
          for (int pack = 0; pack < kStepPacks; ++pack) {
            const Pack<T> rX = sX.get_pack(step * kStep + pack * kPack);
            const Pack<T> rZ = sZ.get_pack(pack * kPack);
#pragma unroll
            for (int e = 0; e < kPack; ++e) rSum = chunk_sum_step(rSum, widen(rX.elements[e]), widen(rZ.elements[e]));
          }
        }
        stage = stage + 1 == kStages ? 0 : stage + 1;
        ++step;

        // The tree over the chunks: complete after the last step, a lower bound before.
        if ((kBounded && !abandoned) || (!kBounded && step == shape.steps)) {
          A rTree = rSum;
          for (int bit = 0; bit < shape.slot_bits; ++bit) rTree = add(rTree, shuffle_xor(rTree, 1 << bit));
          const int member = lane_id() - first;  // this lane's candidate within the group
          const bool mine = member >= 0 && member < shape.at_once;
          const A rSection = shuffle(rTree, mine ? member << shape.slot_bits : 0);
          const A rSoFar = section == 0 ? rSection : add(rTotal, rSection);
          if (mine && step == shape.steps) rTotal = rSoFar;
          if (kBounded) {
            // An abandoned candidate stays out of later sections. The cursor is past the groups ahead: they are
            // not touched.
            if (mine && !(rSoFar <= bound)) candidate = -1;
            abandoned = !any_lane(mine && candidate >= 0);
            if (abandoned && cursor.first == first) {
              // Steps on their way are waited for, unread; later ones are not requested.
              last_step = cursor.step;
              seek(cursor, first + shape.at_once, count, shape, candidate);
            }
          }
        }
        if (step == last_step) {
          first = next_group(first + shape.at_once, count, shape, candidate);
          step = 0;
          last_step = shape.steps;
          abandoned = false;
          rSum = 0;
        }
      }
      async_wait<0>();
    }
    const A rResult = no_nan(rTotal);
    return candidate < 0 || (kBounded && !(rResult <= bound)) ? infinity<A>() : rResult;
  }

  Shared<T> sStages_;  // [kStages][kWarpSize][kStepPitch]
  Shared<T> sAnchor_;  // [slots][kChunkPitch]
  const T* gCandidates_;
  const T* gAnchor_ = nullptr;
  std::int64_t row_stride_;
  std::int64_t dims_;
  std::int64_t staged_section_ = -1;
  bool aligned_;
};

}  // namespace sn::cuda
