// Keys of neighbours, their order, sorting and selection. Everything here gives the same bits whatever the schedule:
// keys of one anchor are distinct, so a set of them has one order.
//
// API (kernels in fp32 use A = float, in fp64 A = double)
//   Key<A>                             float: uint64 of pack_key (sn_math.h); double: WideKey
//   make_key(d2, index)                nearer neighbours first, ties to the lower index
//   far_key(d2, index)                 farther first, ties to the lower index
//   before(a, b), last_key<Key>()      strict order; a key behind every real one
//   near_of<A>(key), far_of<A>(key)   Positive<A> of the least make_key (far_key) of the positives, index -1 for none
//   index_of(key), d2_of(key)          the parts of make_key; d2_of_far(key) of far_key
//   positive_of(key), mark_positive(key)   one bit of the index that finishing uses
//   key_at(keys, i), set_key(keys, i, key) keys: Shared<Key> or Key* (global memory)
//   sort_lanes(key)                    one key a lane: lane i gets the i-th
//   merge_lanes_by<kWarpSize>(key)     the same, of keys that rise and then fall, or fall and then rise
//   least_key(key)                     the first of the lanes' keys, in all lanes
//   sort_keys(WarpTeam() or BlockTeam(), keys, count)
//                                      sorts keys[0, count). There is room for the next power of two of keys, those
//                                      behind `count` are overwritten. Ends with a barrier of the team.
//   block_select(...)                  the K first of a row of any length, by the whole block
#pragma once

#include <cstdint>

#include "cuda/memory.cuh"
#include "cuda/ptx.cuh"
#include "cuda/warp.cuh"
#include "sn_math.h"

namespace sn::cuda {

// ---- keys -----------------------------------------------------------------------------------------------------------

struct alignas(16) WideKey {
  std::uint64_t bits;   // of d2
  std::uint64_t index;  // below 2^31, or all ones in last_key
};

template <class A>
struct KeyOf;
template <>
struct KeyOf<float> {
  using Type = std::uint64_t;
};
template <>
struct KeyOf<double> {
  using Type = WideKey;
};
template <class A>
using Key = typename KeyOf<A>::Type;

// An index needs 31 bits; the one above is free for finishing.
inline constexpr std::uint32_t kPositiveMark = 0x80000000u;

__device__ __forceinline__ std::uint64_t make_key(float d2, std::int32_t index) {
  return pack_key(d2, index);
}
__device__ __forceinline__ WideKey make_key(double d2, std::int32_t index) {
  return {bits_of(d2), static_cast<std::uint64_t>(index)};
}
// d2 is never negative and never NaN: its bits order as it does, their complement the other way round.
__device__ __forceinline__ std::uint64_t far_key(float d2, std::int32_t index) {
  return pack_key(d2, index) ^ 0xffffffff00000000u;
}
__device__ __forceinline__ WideKey far_key(double d2, std::int32_t index) {
  return {~bits_of(d2), static_cast<std::uint64_t>(index)};
}
__device__ __forceinline__ float d2_of(std::uint64_t key) {
  return key_squared_distance(key);
}
__device__ __forceinline__ double d2_of(const WideKey& key) {
  return double_from_bits(key.bits);
}
__device__ __forceinline__ float d2_of_far(std::uint64_t key) {
  return key_squared_distance(~key);
}
__device__ __forceinline__ double d2_of_far(const WideKey& key) {
  return double_from_bits(~key.bits);
}
__device__ __forceinline__ std::int32_t index_of(std::uint64_t key) {
  return static_cast<std::int32_t>(static_cast<std::uint32_t>(key) & ~kPositiveMark);
}
__device__ __forceinline__ std::int32_t index_of(const WideKey& key) {
  return static_cast<std::int32_t>(static_cast<std::uint32_t>(key.index) & ~kPositiveMark);
}
__device__ __forceinline__ bool positive_of(std::uint64_t key) {
  return (key & kPositiveMark) != 0;
}
__device__ __forceinline__ bool positive_of(const WideKey& key) {
  return (key.index & kPositiveMark) != 0;
}
__device__ __forceinline__ std::uint64_t mark_positive(std::uint64_t key) {
  return key | kPositiveMark;
}
__device__ __forceinline__ WideKey mark_positive(const WideKey& key) {
  return {key.bits, key.index | kPositiveMark};
}
__device__ __forceinline__ bool before(std::uint64_t a, std::uint64_t b) {
  return a < b;
}
__device__ __forceinline__ bool before(const WideKey& a, const WideKey& b) {
  return a.bits < b.bits || (a.bits == b.bits && a.index < b.index);
}
template <class AnyKey>
__device__ __forceinline__ AnyKey last_key();
template <>
__device__ __forceinline__ std::uint64_t last_key<std::uint64_t>() {
  return kNoKey;
}
template <>
__device__ __forceinline__ WideKey last_key<WideKey>() {
  return {~std::uint64_t{0}, ~std::uint64_t{0}};
}
__device__ __forceinline__ bool is_last(std::uint64_t key) {
  return key == kNoKey;
}
__device__ __forceinline__ bool is_last(const WideKey& key) {
  return key.index == ~std::uint64_t{0};
}

__device__ __forceinline__ std::uint64_t exchange(std::uint64_t key, int mask) {
  return shuffle_xor(key, mask);
}
__device__ __forceinline__ WideKey exchange(const WideKey& key, int mask) {
  return {shuffle_xor(key.bits, mask), shuffle_xor(key.index, mask)};
}

// near_i (far_i) from the least of its keys; an anchor without a positive has none.
template <class A>
__device__ __forceinline__ Positive<A> near_of(const Key<A>& key) {
  return is_last(key) ? Positive<A>{-1, A(0)} : Positive<A>{index_of(key), d2_of(key)};
}
template <class A>
__device__ __forceinline__ Positive<A> far_of(const Key<A>& key) {
  return is_last(key) ? Positive<A>{-1, A(0)} : Positive<A>{index_of(key), d2_of_far(key)};
}

template <class AnyKey>
__device__ __forceinline__ AnyKey key_at(const Shared<AnyKey>& keys, std::int64_t i) {
  return keys.get(static_cast<int>(i));
}
template <class AnyKey>
__device__ __forceinline__ AnyKey key_at(const AnyKey* keys, std::int64_t i) {
  return keys[i];
}
template <class AnyKey>
__device__ __forceinline__ void set_key(const Shared<AnyKey>& keys, std::int64_t i, const AnyKey& key) {
  keys.set(static_cast<int>(i), key);
}
template <class AnyKey>
__device__ __forceinline__ void set_key(AnyKey* keys, std::int64_t i, const AnyKey& key) {
  keys[i] = key;
}
template <class Keys>
using KeyIn = decltype(key_at(Keys(), 0));

// ---- sorting --------------------------------------------------------------------------------------------------------

template <class AnyKey>
__device__ __forceinline__ AnyKey least_key(AnyKey key) {
#pragma unroll
  for (int mask = kWarpSize / 2; mask > 0; mask /= 2) {
    const AnyKey other = exchange(key, mask);
    if (before(other, key)) key = other;
  }
  return key;
}

// Bitonic: sequences of `length` that rise and fall merge into sorted ones, in directions that alternate.
template <int length, class AnyKey>
__device__ __forceinline__ AnyKey merge_lanes_by(AnyKey key) {
#pragma unroll
  for (int mask = length / 2; mask > 0; mask /= 2) {
    const AnyKey other = exchange(key, mask);
    const bool rising = (lane_id() & length) == 0;
    const bool low = (lane_id() & mask) == 0;
    if (rising == low ? before(other, key) : before(key, other)) key = other;
  }
  return key;
}
template <class AnyKey>
__device__ __forceinline__ AnyKey sort_lanes(AnyKey key) {
  key = merge_lanes_by<2>(key);
  key = merge_lanes_by<4>(key);
  key = merge_lanes_by<8>(key);
  key = merge_lanes_by<16>(key);
  return merge_lanes_by<kWarpSize>(key);
}

struct WarpTeam {
  __device__ __forceinline__ int rank() const { return lane_id(); }
  __device__ __forceinline__ int size() const { return kWarpSize; }
  __device__ __forceinline__ void sync() const { sync_warp(); }
};
struct BlockTeam {
  __device__ __forceinline__ int rank() const { return thread_id(); }
  __device__ __forceinline__ int size() const { return thread_count(); }
  __device__ __forceinline__ void sync() const { sync_block(); }
};

template <class Team, class Keys>
__device__ void sort_keys(const Team& team, Keys keys, std::int64_t count) {
  using AnyKey = KeyIn<Keys>;
  std::int64_t padded = 1;
  while (padded < count) padded *= 2;
  for (std::int64_t i = count + team.rank(); i < padded; i += team.size()) set_key(keys, i, last_key<AnyKey>());
  team.sync();
  for (std::int64_t length = 2; length <= padded; length *= 2) {
    for (std::int64_t stride = length / 2; stride > 0; stride /= 2) {
      for (std::int64_t pair = team.rank(); pair < padded / 2; pair += team.size()) {
        const std::int64_t low = (pair & ~(stride - 1)) * 2 + (pair & (stride - 1));
        const std::int64_t high = low + stride;
        const AnyKey a = key_at(keys, low);
        const AnyKey b = key_at(keys, high);
        if ((low & length) == 0 ? before(b, a) : before(a, b)) {
          set_key(keys, low, b);
          set_key(keys, high, a);
        }
      }
      team.sync();
    }
  }
}

// ---- selection from a long row --------------------------------------------------------------------------------------

// Digits of a key, the most significant first: those of d2's bits, then those of the index.
inline constexpr int kDigitBits = 8;
inline constexpr int kDigits = 1 << kDigitBits;
template <class A>
inline constexpr int kKeyDigits = (static_cast<int>(sizeof(A)) + 4) * 8 / kDigitBits;

__device__ __forceinline__ std::uint32_t key_digit(std::uint64_t key, int digit) {
  return static_cast<std::uint32_t>(key >> (64 - kDigitBits * (digit + 1))) % kDigits;
}
__device__ __forceinline__ std::uint32_t key_digit(const WideKey& key, int digit) {
  const bool of_bits = digit < 64 / kDigitBits;
  const std::uint64_t word = of_bits ? key.bits : key.index << 32;
  return static_cast<std::uint32_t>(word >> (64 - kDigitBits * (digit % 8 + 1))) % kDigits;
}
__device__ __forceinline__ std::uint64_t with_digit(std::uint64_t key, int digit, std::uint32_t value) {
  return key | static_cast<std::uint64_t>(value) << (64 - kDigitBits * (digit + 1));
}
__device__ __forceinline__ WideKey with_digit(WideKey key, int digit, std::uint32_t value) {
  if (digit < 64 / kDigitBits) {
    key.bits |= static_cast<std::uint64_t>(value) << (64 - kDigitBits * (digit + 1));
  } else {
    key.index |= static_cast<std::uint64_t>(value) << (96 - kDigitBits * (digit + 1));
  }
  return key;
}
// The key with all digits but the first few cleared.
__device__ __forceinline__ std::uint64_t leading_digits(std::uint64_t key, int digits) {
  return digits == 0 ? 0 : key & ~std::uint64_t{0} << (64 - kDigitBits * digits);
}
__device__ __forceinline__ WideKey leading_digits(const WideKey& key, int digits) {
  constexpr int kOfBits = 64 / kDigitBits;
  if (digits <= kOfBits) return {leading_digits(key.bits, digits), 0};
  return {key.bits, key.index & ~std::uint64_t{0} << (96 - kDigitBits * digits)};
}
__device__ __forceinline__ bool same_key(std::uint64_t a, std::uint64_t b) {
  return a == b;
}
__device__ __forceinline__ bool same_key(const WideKey& a, const WideKey& b) {
  return a.bits == b.bits && a.index == b.index;
}

// Shared memory of block_select.
struct SelectMemory {
  static constexpr int kWords = kDigits + 4;
  Shared<std::uint32_t> sCounts;  // [kWords]: of each digit's value; then what the first warp tells the others
};

// The `wanted` first keys of those that `source` has, in any order, into keys[0, wanted). source.length() slots are
// looked at; source.key(j) is slot j's key, last_key where there is none. At least `wanted` keys exist; wanted > 0.
//
// The key of rank `wanted` is found digit by digit: count the values of the next digit among the keys that agree with
// it so far, and step to the value in which the rank falls. It ends as soon as everything that agrees is wanted; digits
// of the index are looked at only where ties in d2 are cut.
template <class A, class Source, class Keys>
__device__ void block_select(const Source& source, std::int64_t wanted, Keys keys, const SelectMemory& memory) {
  using AnyKey = Key<A>;
  const Shared<std::uint32_t>& sCounts = memory.sCounts;
  const std::int64_t length = source.length();
  AnyKey prefix = leading_digits(last_key<AnyKey>(), 0);
  std::uint32_t rank = static_cast<std::uint32_t>(wanted);  // among the keys that agree with the prefix, from 1
  int digits = 0;
  for (bool complete = false; !complete && digits < kKeyDigits<A>; ++digits) {
    for (int i = thread_id(); i < kDigits; i += thread_count()) sCounts.set(i, 0u);
    sync_block();
    for (std::int64_t first = 0; first < length; first += thread_count()) {
      const std::int64_t j = first + thread_id();
      const AnyKey key = j < length ? source.key(j) : last_key<AnyKey>();
      const bool counts = !is_last(key) && same_key(leading_digits(key, digits), prefix);
      // Values crowd in few exponents: lanes with the same digit add once.
      const std::uint32_t value = counts ? key_digit(key, digits) : static_cast<std::uint32_t>(kDigits);
      const std::uint32_t peers = match_any(value);
      if (counts && (peers & lanes_below()) == 0) {
        sCounts.atomic_add(static_cast<int>(value), static_cast<std::uint32_t>(popcount(peers)));
      }
    }
    sync_block();
    if (warp_id() == 0) {
      constexpr int kOfLane = kDigits / kWarpSize;
      std::uint32_t sum = 0;
      for (int i = 0; i < kOfLane; ++i) sum += sCounts.get(lane_id() * kOfLane + i);
      const std::uint32_t upto = prefix_sum(sum);
      std::uint32_t below = upto - sum;
      if (below < rank && rank <= upto) {
        int value = lane_id() * kOfLane;
        while (below + sCounts.get(value) < rank) below += sCounts.get(value++);
        sCounts.set(kDigits, static_cast<std::uint32_t>(value));
        sCounts.set(kDigits + 1, below);
        sCounts.set(kDigits + 2, below + sCounts.get(value));
      }
    }
    sync_block();
    prefix = with_digit(prefix, digits, sCounts.get(kDigits));
    complete = sCounts.get(kDigits + 2) == rank;
    rank -= sCounts.get(kDigits + 1);
    sync_block();
  }
  // Everything up to the prefix, `wanted` keys: distinct keys of full length agree with it once.
  if (thread_id() == 0) sCounts.set(kDigits + 3, 0u);
  sync_block();
  for (std::int64_t j = thread_id(); j < length; j += thread_count()) {
    const AnyKey key = source.key(j);
    if (!is_last(key) && !before(prefix, leading_digits(key, digits))) {
      set_key(keys, sCounts.atomic_add(kDigits + 3, 1u), key);
    }
  }
  sync_block();
}

}  // namespace sn::cuda
