// The host side of csrc/cuda/ptx.cuh, which documents these names and includes this file when SN_SIMT is defined.
#pragma once

#include <bit>
#include <cmath>
#include <limits>
#include <source_location>
#include <tuple>
#include <utility>

#include "simt.h"

namespace sn::cuda {

// Half precision as bits: only the functions below compute with it.
struct Half {
  std::uint16_t bits;
};
struct BFloat16 {
  std::uint16_t bits;
};

#define SN_SIMT_WHERE std::source_location where = std::source_location::current()
#define SN_SIMT_INLINE inline __attribute__((always_inline))

// ---- where a thread is ----------------------------------------------------------------------------------------------

SN_SIMT_INLINE int thread_id() {
  return simt::current->thread;
}
SN_SIMT_INLINE int thread_count() {
  return simt::grid.threads;
}
SN_SIMT_INLINE int lane_id() {
  return simt::current->lane;
}
SN_SIMT_INLINE int warp_id() {
  return simt::current->thread / kWarpSize;
}
SN_SIMT_INLINE std::int64_t block_id() {
  return simt::current->block->id;
}
SN_SIMT_INLINE std::int64_t block_count() {
  return simt::grid.blocks;
}
inline constexpr bool kHasClusters = true;
SN_SIMT_INLINE int cluster_rank() {
  return simt::current->block->rank;
}
SN_SIMT_INLINE int cluster_size() {
  return simt::grid.cluster;
}

// ---- barriers -------------------------------------------------------------------------------------------------------

inline void sync_warp(SN_SIMT_WHERE) {
  simt::sync_warp(simt::site_of(where));
}
inline void sync_block(SN_SIMT_WHERE) {
  simt::sync_block(simt::site_of(where));
}
inline void sync_cluster(SN_SIMT_WHERE) {
  simt::sync_cluster(simt::site_of(where));
}
inline void arrive_cluster_relaxed(SN_SIMT_WHERE) {
  simt::arrive_cluster_relaxed(simt::site_of(where));
}
inline void wait_cluster(SN_SIMT_WHERE) {
  simt::wait_cluster(simt::site_of(where));
}
inline void wait_for_primary(SN_SIMT_WHERE) {
  simt::wait_for_primary(simt::site_of(where));
}
inline void let_dependents_start() {}
inline void fence_device() {
  simt::maybe_switch();
}

// ---- exchange within a warp -----------------------------------------------------------------------------------------

namespace detail {
template <typename T>
SN_SIMT_INLINE std::uint64_t to_word(T value) {
  static_assert(std::is_arithmetic_v<T> && (sizeof(T) == 4 || sizeof(T) == 8), "what the device can shuffle");
  std::uint64_t word = 0;
  std::memcpy(&word, &value, sizeof(T));
  return word;
}
template <typename T>
SN_SIMT_INLINE T from_word(std::uint64_t word) {
  T value;
  std::memcpy(&value, &word, sizeof(T));
  return value;
}
template <typename T>
inline T exchange(T value, int from, std::source_location where) {
  const simt::Meeting& meeting = simt::meet(simt::Op::kShuffle, to_word(value), simt::site_of(where));
  return from_word<T>(meeting.values[from]);
}
}  // namespace detail

template <typename T>
inline T shuffle_xor(T value, int mask, SN_SIMT_WHERE) {
  const int from = lane_id() ^ mask;
  return detail::exchange(value, from >= 0 && from < kWarpSize ? from : lane_id(), where);
}
template <typename T>
inline T shuffle(T value, int lane, SN_SIMT_WHERE) {
  return detail::exchange(value, lane & (kWarpSize - 1), where);
}
template <typename T>
inline T shuffle_up(T value, int count, SN_SIMT_WHERE) {
  const int from = lane_id() - count;
  return detail::exchange(value, from >= 0 ? from : lane_id(), where);
}
template <typename T>
inline T shuffle_down(T value, int count, SN_SIMT_WHERE) {
  const int from = lane_id() + count;
  return detail::exchange(value, from < kWarpSize ? from : lane_id(), where);
}

inline std::uint32_t ballot(bool vote, SN_SIMT_WHERE) {
  const simt::Meeting& meeting = simt::meet(simt::Op::kVote, vote ? 1 : 0, simt::site_of(where));
  std::uint32_t votes = 0;
  for (int lane = 0; lane < kWarpSize; ++lane) votes |= static_cast<std::uint32_t>(meeting.values[lane]) << lane;
  return votes;
}
inline bool any_lane(bool vote, SN_SIMT_WHERE) {
  return ballot(vote, where) != 0;
}
inline bool all_lanes(bool vote, SN_SIMT_WHERE) {
  return ballot(vote, where) == kFullWarp;
}
inline std::uint32_t match_any(std::uint64_t value, SN_SIMT_WHERE) {
  const simt::Meeting& meeting = simt::meet(simt::Op::kMatch, value, simt::site_of(where));
  std::uint32_t same = 0;
  for (int lane = 0; lane < kWarpSize; ++lane) same |= (meeting.values[lane] == value ? 1u : 0u) << lane;
  return same;
}
inline std::uint32_t match_any(std::uint32_t value, SN_SIMT_WHERE) {
  return match_any(static_cast<std::uint64_t>(value), where);
}

namespace detail {
template <typename F>
inline std::uint32_t reduce(std::uint32_t value, F combine, std::source_location where) {
  const simt::Meeting& meeting = simt::meet(simt::Op::kReduce, value, simt::site_of(where));
  auto all = static_cast<std::uint32_t>(meeting.values[0]);
  for (int lane = 1; lane < kWarpSize; ++lane) all = combine(all, static_cast<std::uint32_t>(meeting.values[lane]));
  return all;
}
}  // namespace detail

inline std::uint32_t reduce_min(std::uint32_t value, SN_SIMT_WHERE) {
  return detail::reduce(value, [](std::uint32_t a, std::uint32_t b) { return a < b ? a : b; }, where);
}
inline std::uint32_t reduce_max(std::uint32_t value, SN_SIMT_WHERE) {
  return detail::reduce(value, [](std::uint32_t a, std::uint32_t b) { return a > b ? a : b; }, where);
}
inline std::uint32_t reduce_add(std::uint32_t value, SN_SIMT_WHERE) {
  return detail::reduce(value, [](std::uint32_t a, std::uint32_t b) { return a + b; }, where);
}
inline std::uint32_t reduce_or(std::uint32_t value, SN_SIMT_WHERE) {
  return detail::reduce(value, [](std::uint32_t a, std::uint32_t b) { return a | b; }, where);
}

// ---- bits -----------------------------------------------------------------------------------------------------------

inline int popcount(std::uint32_t bits) {
  return std::popcount(bits);
}
inline int find_first(std::uint32_t bits) {
  return bits == 0 ? -1 : std::countr_zero(bits);
}
inline int leading_zeros(std::uint32_t bits) {
  return std::countl_zero(bits);
}
inline int leading_zeros(std::uint64_t bits) {
  return std::countl_zero(bits);
}

inline std::uint32_t bits_of(float value) {
  return std::bit_cast<std::uint32_t>(value);
}
inline std::uint16_t bits_of(Half value) {
  return value.bits;
}
inline std::uint16_t bits_of(BFloat16 value) {
  return value.bits;
}
inline std::uint64_t bits_of(double value) {
  return std::bit_cast<std::uint64_t>(value);
}
inline float float_from_bits(std::uint32_t bits) {
  return std::bit_cast<float>(bits);
}
inline double double_from_bits(std::uint64_t bits) {
  return std::bit_cast<double>(bits);
}
inline Half half_from_bits(std::uint16_t bits) {
  return Half{bits};
}
inline BFloat16 bfloat16_from_bits(std::uint16_t bits) {
  return BFloat16{bits};
}

// ---- conversion, round to nearest even ------------------------------------------------------------------------------

namespace detail {

inline float half_to_float(std::uint16_t bits) {
  const std::uint32_t sign = static_cast<std::uint32_t>(bits & 0x8000u) << 16;
  const std::uint32_t magnitude = bits & 0x7fffu;
  if (magnitude >= 0x7c00u) return float_from_bits(sign | 0x7f800000u | (magnitude & 0x3ffu) << 13);
  if (magnitude >= 0x0400u) return float_from_bits(sign | ((magnitude << 13) + (112u << 23)));
  const float subnormal = static_cast<float>(magnitude) * 0x1p-24f;
  return sign != 0 ? -subnormal : subnormal;
}

inline std::uint16_t float_to_half(float value) {
  constexpr std::uint32_t kNan = 0x7fffu;  // the device's
  const std::uint32_t bits = bits_of(value);
  const std::uint32_t sign = bits >> 16 & 0x8000u;
  const std::uint32_t magnitude = bits & 0x7fffffffu;
  std::uint32_t half;
  if (magnitude > 0x7f800000u) return kNan;
  if (magnitude >= 0x47800000u) {  // 2^16 and above
    half = 0x7c00u;
  } else if (magnitude >= 0x38800000u) {  // normal; a value that rounds beyond the largest carries into infinity
    half = (magnitude + 0xfffu + (magnitude >> 13 & 1u) - (112u << 23)) >> 13;
  } else {  // a multiple of 2^-24, the last place of numbers near 1/2
    half = bits_of(float_from_bits(magnitude) + 0.5f) - 0x3f000000u;
  }
  return static_cast<std::uint16_t>(sign | half);
}

inline std::uint16_t float_to_bfloat16(float value) {
  const std::uint32_t bits = bits_of(value);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return 0x7fffu;
  return static_cast<std::uint16_t>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
}

// Rounds to float with an inexact result made odd: a second rounding, to fewer bits, then gives what one would.
inline float round_to_odd(double value) {
  float rounded = static_cast<float>(value);
  if (static_cast<double>(rounded) == value || value != value) return rounded;
  std::uint32_t bits = bits_of(rounded);
  if (std::fabs(static_cast<double>(rounded)) > std::fabs(value)) --bits;
  return float_from_bits(bits | 1u);
}

}  // namespace detail

inline float widen(float value) {
  return value;
}
inline double widen(double value) {
  return value;
}
inline float widen(Half value) {
  return detail::half_to_float(value.bits);
}
inline float widen(BFloat16 value) {
  return float_from_bits(static_cast<std::uint32_t>(value.bits) << 16);
}

template <typename T>
inline T narrow(float value) {
  if constexpr (std::is_same_v<T, Half>) {
    return Half{detail::float_to_half(value)};
  } else if constexpr (std::is_same_v<T, BFloat16>) {
    return BFloat16{detail::float_to_bfloat16(value)};
  } else {
    static_assert(std::is_same_v<T, float> || std::is_same_v<T, double>);
    return value;
  }
}
template <typename T>
inline T narrow(double value) {
  if constexpr (std::is_same_v<T, Half>) {
    return Half{detail::float_to_half(detail::round_to_odd(value))};
  } else if constexpr (std::is_same_v<T, BFloat16>) {
    return BFloat16{detail::float_to_bfloat16(detail::round_to_odd(value))};
  } else {
    static_assert(std::is_same_v<T, float> || std::is_same_v<T, double>);
    return static_cast<T>(value);
  }
}
template <typename T16>
inline std::uint32_t narrow_pair(float low, float high) {
  return bits_of(narrow<T16>(low)) | static_cast<std::uint32_t>(bits_of(narrow<T16>(high))) << 16;
}

// ---- arithmetic -----------------------------------------------------------------------------------------------------

inline float fused_multiply_add(float a, float b, float c) {
  return std::fma(a, b, c);
}
inline double fused_multiply_add(double a, double b, double c) {
  return std::fma(a, b, c);
}
inline float add(float a, float b) {
  return a + b;
}
inline double add(double a, double b) {
  return a + b;
}
inline float subtract(float a, float b) {
  return a - b;
}
inline double subtract(double a, double b) {
  return a - b;
}
inline float multiply(float a, float b) {
  return a * b;
}
inline double multiply(double a, double b) {
  return a * b;
}
inline float square_root(float value) {
  return std::sqrt(value);
}
inline double square_root(double value) {
  return std::sqrt(value);
}

namespace detail {
inline constexpr float kInfinity = std::numeric_limits<float>::infinity();

// Rounds high + low to float as if exact; `high` is the double nearest to the sum. The float nearest to `high` is on
// the right side already, or its neighbour is.
inline float round_up(double high, double low) {
  const float nearest = static_cast<float>(high);
  const bool below = static_cast<double>(nearest) < high || (static_cast<double>(nearest) == high && low > 0.0);
  return below ? std::nextafter(nearest, kInfinity) : nearest;
}
inline float round_down(double high, double low) {
  return -round_up(-high, -low);
}
// The rounding error of high = a + b.
inline double sum_error(double a, double b, double high) {
  if (!std::isfinite(high)) return 0.0;
  const double part = high - a;
  return (a - (high - part)) + (b - part);
}
inline float fma_directed(double product, double c, bool up) {
  const double high = product + c;
  const double low = sum_error(product, c, high);
  if (high == 0.0 && low == 0.0 && product != 0.0) return up ? 0.0f : -0.0f;
  if (high == 0.0 && low == 0.0 && std::signbit(product) != std::signbit(c)) return up ? 0.0f : -0.0f;
  return up ? round_up(high, low) : round_down(high, low);
}
}  // namespace detail

// Products of two floats are exact in double, and so is the error of adding one more term.
inline float add_up(float a, float b) {
  return detail::fma_directed(a, b, true);
}
inline float add_down(float a, float b) {
  return detail::fma_directed(a, b, false);
}
inline float multiply_up(float a, float b) {
  return detail::round_up(static_cast<double>(a) * b, 0.0);
}
inline float multiply_down(float a, float b) {
  return detail::round_down(static_cast<double>(a) * b, 0.0);
}
inline float fma_up(float a, float b, float c) {
  return detail::fma_directed(static_cast<double>(a) * b, c, true);
}
inline float fma_down(float a, float b, float c) {
  return detail::fma_directed(static_cast<double>(a) * b, c, false);
}
inline float sqrt_up(float value) {
  const float root = std::sqrt(value);
  return static_cast<double>(root) * root < value ? std::nextafter(root, detail::kInfinity) : root;
}
inline float sqrt_down(float value) {
  const float root = std::sqrt(value);
  return static_cast<double>(root) * root > value ? std::nextafter(root, 0.0f) : root;
}

inline float one_unless_greater(float a, float b) {
  return a > b ? 0.0f : 1.0f;
}
inline float minimum(float a, float b) {
  if (a != a) return b;
  if (b != b) return a;
  if (a == b) return std::signbit(a) ? a : b;
  return a < b ? a : b;
}
inline float maximum(float a, float b) {
  if (a != a) return b;
  if (b != b) return a;
  if (a == b) return std::signbit(a) ? b : a;
  return a > b ? a : b;
}

// ---- global memory --------------------------------------------------------------------------------------------------

namespace detail {
inline void expect_aligned(const void* address, std::size_t bytes, const char* what, std::source_location where) {
  simt::note_global(simt::site_of(where));
  if (reinterpret_cast<std::uintptr_t>(address) % bytes != 0) {
    simt::report(std::string(what) + " of global memory is not aligned to " + std::to_string(bytes) + " bytes",
                 simt::site_of(where));
  }
}
}  // namespace detail

template <typename T>
inline T load(const T* source, SN_SIMT_WHERE) {
  detail::expect_aligned(source, sizeof(T), "a load", where);
  return *source;
}
template <typename T, int kBytes = kPackBytes>
inline Pack<T, kBytes> load_pack(const T* source, SN_SIMT_WHERE) {
  detail::expect_aligned(source, kBytes, kBytes == kPackBytes ? "a load of 16 bytes" : "a load of 8 bytes", where);
  Pack<T, kBytes> pack;
  for (int e = 0; e < Pack<T, kBytes>::kElements; ++e) pack.elements[e] = source[e];
  return pack;
}
template <typename T, int kBytes>
inline void store_pack(T* destination, const Pack<T, kBytes>& pack, SN_SIMT_WHERE) {
  detail::expect_aligned(destination, kBytes, kBytes == kPackBytes ? "a store of 16 bytes" : "a store of 8 bytes",
                         where);
  for (int e = 0; e < Pack<T, kBytes>::kElements; ++e) destination[e] = pack.elements[e];
}
template <typename T>
inline T atomic_load(const T* source, SN_SIMT_WHERE) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8);
  detail::expect_aligned(source, sizeof(T), "an atomic load", where);
  simt::maybe_switch();
  return *source;
}
template <typename T>
inline void atomic_store(T* destination, T value, SN_SIMT_WHERE) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8);
  detail::expect_aligned(destination, sizeof(T), "an atomic store", where);
  simt::maybe_switch();
  *destination = value;
}

namespace detail {
template <typename T, typename F>
inline T atomic_global(T* target, F change, std::source_location where) {
  static_assert(std::is_same_v<T, std::uint32_t> || std::is_same_v<T, std::int32_t> ||
                    std::is_same_v<T, std::uint64_t> || std::is_same_v<T, unsigned long long>,
                "atomics are of integers: sums of floating-point numbers would depend on their order");
  expect_aligned(target, sizeof(T), "an atomic", where);
  simt::maybe_switch();
  const T old = *target;
  *target = change(old);
  return old;
}
// Signed sums wrap on the device.
template <typename T>
inline T wrapping_sum(T a, T b) {
  using Unsigned = std::make_unsigned_t<T>;
  return static_cast<T>(static_cast<Unsigned>(a) + static_cast<Unsigned>(b));
}
}  // namespace detail

template <typename T>
inline T atomic_add(T* target, std::type_identity_t<T> value, SN_SIMT_WHERE) {
  return detail::atomic_global(target, [=](T old) { return detail::wrapping_sum(old, value); }, where);
}
inline std::uint32_t atomic_add_acq_rel(std::uint32_t* target, std::uint32_t value, SN_SIMT_WHERE) {
  return atomic_add(target, value, where);
}
template <typename T>
inline T atomic_or(T* target, std::type_identity_t<T> value, SN_SIMT_WHERE) {
  return detail::atomic_global(target, [=](T old) { return static_cast<T>(old | value); }, where);
}
template <typename T>
inline T atomic_max(T* target, std::type_identity_t<T> value, SN_SIMT_WHERE) {
  return detail::atomic_global(target, [=](T old) { return old > value ? old : value; }, where);
}
template <typename T>
inline T atomic_min(T* target, std::type_identity_t<T> value, SN_SIMT_WHERE) {
  return detail::atomic_global(target, [=](T old) { return old < value ? old : value; }, where);
}

// ---- shared memory --------------------------------------------------------------------------------------------------

template <typename T>
class Shared {
 public:
  Shared() = default;
  Shared(std::int64_t position, std::int64_t begin, std::int64_t end) : position_(position), begin_(begin), end_(end) {}

  T get(int i, SN_SIMT_WHERE) const { return fetch<T>(i, where); }
  void set(int i, std::type_identity_t<T> value, SN_SIMT_WHERE) const { put(i, value, where); }
  Pack<T> get_pack(int i, SN_SIMT_WHERE) const { return fetch<Pack<T>>(i, where); }
  void set_pack(int i, const Pack<T>& pack, SN_SIMT_WHERE) const { put(i, pack, where); }

  Shared offset(int i) const { return Shared(position_ + static_cast<std::int64_t>(i) * sizeof(T), begin_, end_); }
  template <typename U>
  Shared<U> view() const {
    return Shared<U>(position_, begin_, end_);
  }

  // Shared memory has atomics of 32 bits. Those of 64 bits, but for an exchange, are a loop: 20 us where a block's
  // threads meet.
  static constexpr bool kHasAtomics = sizeof(T) == 4;
  T atomic_add(int i, std::type_identity_t<T> value, SN_SIMT_WHERE) const {
    static_assert(kHasAtomics);
    return atomic(i, [=](T old) { return detail::wrapping_sum(old, value); }, where);
  }
  T atomic_or(int i, std::type_identity_t<T> value, SN_SIMT_WHERE) const {
    static_assert(kHasAtomics);
    return atomic(i, [=](T old) { return static_cast<T>(old | value); }, where);
  }
  T atomic_max(int i, std::type_identity_t<T> value, SN_SIMT_WHERE) const {
    static_assert(kHasAtomics);
    return atomic(i, [=](T old) { return old > value ? old : value; }, where);
  }
  T atomic_min(int i, std::type_identity_t<T> value, SN_SIMT_WHERE) const {
    static_assert(kHasAtomics);
    return atomic(i, [=](T old) { return old < value ? old : value; }, where);
  }

  T get_remote(int i, int rank, SN_SIMT_WHERE) const {
    static_assert(sizeof(T) == 4 || sizeof(T) == 8);
    return remote<T>(i, rank, where);
  }
  Pack<T> get_remote_pack(int i, int rank, SN_SIMT_WHERE) const { return remote<Pack<T>>(i, rank, where); }

  // For the wrappers: the position of element i in the block's shared memory, once it is in range and aligned.
  SN_SIMT_INLINE std::uint32_t address(int i, int bytes, int alignment, std::source_location where) const {
    const std::int64_t at = position_ + static_cast<std::int64_t>(i) * static_cast<std::int64_t>(sizeof(T));
    if (at < begin_ || at + bytes > end_ || at % alignment != 0) [[unlikely]]
      refuse(i, at, bytes, where);
    return static_cast<std::uint32_t>(at);
  }

 private:
  template <typename U>
  SN_SIMT_INLINE U fetch(int i, std::source_location where) const {
    const std::uint32_t at = address(i, sizeof(U), sizeof(U), where);
    U value;
    std::memcpy(&value, simt::note_read(at, sizeof(U), simt::site_of(where)), sizeof(U));
    return value;
  }
  template <typename U>
  SN_SIMT_INLINE void put(int i, const U& value, std::source_location where) const {
    const std::uint32_t at = address(i, sizeof(U), sizeof(U), where);
    std::memcpy(simt::note_write(at, sizeof(U), simt::site_of(where)), &value, sizeof(U));
  }

  template <typename F>
  T atomic(int i, F change, std::source_location where) const {
    static_assert(std::is_same_v<T, std::uint32_t> || std::is_same_v<T, std::int32_t> ||
                      std::is_same_v<T, std::uint64_t> || std::is_same_v<T, unsigned long long>,
                  "atomics are of integers: sums of floating-point numbers would depend on their order");
    const std::uint32_t at = address(i, sizeof(T), sizeof(T), where);
    simt::maybe_switch();
    unsigned char* there = simt::note_atomic(at, sizeof(T), simt::site_of(where));
    T old;
    std::memcpy(&old, there, sizeof(T));
    const T value = change(old);
    std::memcpy(there, &value, sizeof(T));
    return old;
  }

  template <typename U>
  U remote(int i, int rank, std::source_location where) const {
    const std::uint32_t at = address(i, sizeof(U), sizeof(U), where);
    U value;
    std::memcpy(&value, simt::note_remote_read(rank, at, sizeof(U), simt::site_of(where)), sizeof(U));
    return value;
  }

  [[noreturn]] __attribute__((noinline, cold)) void refuse(int i, std::int64_t at, int bytes,
                                                           std::source_location where) const {
    std::string what = at < begin_ || at + bytes > end_ ? "out of range: " : "misaligned: ";
    what += std::to_string(bytes) + " bytes at element " + std::to_string(i) + " (byte " + std::to_string(at) +
            " of shared memory) of an array at bytes " + std::to_string(begin_) + " to " + std::to_string(end_);
    simt::report(what, simt::site_of(where));
  }

  // Bytes of the block's shared memory. The array as taken bounds the arrays derived from it.
  std::int64_t position_ = 0;
  std::int64_t begin_ = 0;
  std::int64_t end_ = 0;
};

class SharedArena {
 public:
  template <typename T>
  Shared<T> take(int count, SN_SIMT_WHERE) {
    const std::int64_t begin = next_;
    next_ += shared_bytes<T>(count);
    if (count < 0 || next_ > simt::grid.shared_bytes) {
      simt::report("takes " + std::to_string(next_) + " bytes of shared memory, launched with " +
                       std::to_string(simt::grid.shared_bytes),
                   simt::site_of(where));
    }
    return Shared<T>(begin, begin, begin + static_cast<std::int64_t>(count) * static_cast<std::int64_t>(sizeof(T)));
  }

 private:
  std::int64_t next_ = 0;
};

// ---- asynchronous copies --------------------------------------------------------------------------------------------

template <typename T>
inline void async_copy16(const Shared<T>& destination, int i, const T* source, bool valid, SN_SIMT_WHERE) {
  const std::uint32_t at = destination.address(i, kPackBytes, kPackBytes, where);
  if (valid) {  // else the source may be misaligned: it is not read
    detail::expect_aligned(source, kPackBytes, "a copy of 16 bytes", where);
    for (int e = 0; e < Pack<T>::kElements; ++e) {  // shows an overrun here, not in the harness's own code
      [[maybe_unused]] const volatile unsigned char probe = *reinterpret_cast<const unsigned char*>(source + e);
    }
  }
  simt::async_copy(at, source, valid, simt::site_of(where));
}
inline void async_commit() {
  simt::async_commit();
}
template <int kPending>
inline void async_wait() {
  simt::async_wait(kPending);
}

// ---- tensor cores ---------------------------------------------------------------------------------------------------

template <typename T16>
inline void load_matrix_x4(std::uint32_t (&r)[4], const Shared<T16>& s, int i, SN_SIMT_WHERE) {
  static_assert(sizeof(T16) == 2);
  simt::load_matrix(r, s.address(i, kPackBytes, kPackBytes, where), false, simt::site_of(where));
}
template <typename T16>
inline void load_matrix_x4_transposed(std::uint32_t (&r)[4], const Shared<T16>& s, int i, SN_SIMT_WHERE) {
  static_assert(sizeof(T16) == 2);
  simt::load_matrix(r, s.address(i, kPackBytes, kPackBytes, where), true, simt::site_of(where));
}
template <typename T16>
inline void mma_m16n8k16(float (&d)[4], const std::uint32_t (&a)[4], const std::uint32_t (&b)[2], SN_SIMT_WHERE) {
  static_assert(std::is_same_v<T16, Half> || std::is_same_v<T16, BFloat16>);
  simt::mma(d, a, b, std::is_same_v<T16, BFloat16>, simt::site_of(where));
}

// ---- launching ------------------------------------------------------------------------------------------------------

struct LaunchShape {
  std::int64_t blocks;
  int threads;
  int shared_bytes;
  int cluster = 1;
  bool dependent = false;
  std::source_location where = std::source_location::current();  // names the kernel in faults
};

template <typename... Params, typename... Args>
cudaError_t launch(void (*kernel)(Params...), const LaunchShape& shape, cudaStream_t, Args... args) {
  struct Call {
    void (*kernel)(Params...);
    std::tuple<Params...> args;
  } call{kernel, std::tuple<Params...>(static_cast<Params>(args)...)};
  const simt::Grid grid{shape.blocks,
                        shape.threads,
                        shape.shared_bytes,
                        shape.cluster,
                        shape.dependent,
                        shape.where,
                        reinterpret_cast<const void*>(kernel)};
  return simt::run(
      grid, [](void* context) { std::apply(static_cast<Call*>(context)->kernel, static_cast<Call*>(context)->args); },
      &call);
}

template <typename... Params>
int active_clusters(void (*)(Params...), const LaunchShape& shape) {
  return simt::active_clusters(shape.cluster, shape.threads, shape.shared_bytes);
}

#undef SN_SIMT_WHERE
#undef SN_SIMT_INLINE

}  // namespace sn::cuda
