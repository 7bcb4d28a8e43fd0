// The probe: how a tensor core adds, and whether the bound that the screening relies on is true of it.
//
//   sn_gpu_probe                         on device 0
//   sn_simt_probe --model hopper         the same source on emulated threads (tests/simt), whose mma is a published
//                 [--scale S]            model or, with `none`, exact up to an injected error of S times the bound
//
// One JSON object on stdout. Exit status: 0 the bound holds for both types, 1 it does not, 2 something failed.
//
// Everything goes through our own wrapper, mma_m16n8k16 of ptx.cuh, in the layout that the score kernels use. First,
// sums made by hand tell how one mma adds: `group` columns at a time are aligned with the accumulator to the largest
// exponent, what lies below `bits` fraction bits of it is cut off, and the sum is cut off to a float. Then rows of many
// kinds, some made to lose as much as possible in every step, are multiplied as in the kernels, by a chain of mma with
// the accumulator in registers, and compared with exact sums. Claimed (bound.cuh), D the number of columns:
//   |2 dot error| <= 1.25 D 2^-23 (n_i + n_j),   n = |h|^2.
// Against |h_i||h_j| instead it is not true of subnormal rows: `worst_against_norms` leaves them out.
//
// `holds` asks two things: that no row measured exceeds the bound, and, where group and bits were found, that what
// follows from them for any row does not either: in a group all but the largest of group + 1 terms lose less than
// 2^-bits of it, counted as group + 1 of them, and the sum less than 2^-23 of it, so
//   general = ((group + 1) 2^(23 - bits) + 1) / group.
// What no model fits is "unknown" and has to pass by its rows alone.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "cuda/launch.cuh"
#include "cuda/memory.cuh"
#include "cuda/ptx.cuh"
#include "cuda/tensor_core.cuh"

namespace sn::cuda {
namespace {

// ---- traits ---------------------------------------------------------------------------------------------------------

constexpr double kBound = 1.25;  // of bound.cuh, in units of D 2^-23 (n_i + n_j) / 2
constexpr int kRows = 16;        // of an mma's result
constexpr int kColumns = 8;
constexpr int kDepth = 16;  // columns that one mma multiplies
constexpr int kOutcomes = kRows * kColumns;

template <class T16>
struct Format;
template <>
struct Format<Half> {
  static constexpr const char* kName = "float16";
  static constexpr int kDigits = 11;
  static constexpr int kLeast = -14;  // exponent of the smallest normal number
  static constexpr int kLargest = 15;
};
template <>
struct Format<BFloat16> {
  static constexpr const char* kName = "bfloat16";
  static constexpr int kDigits = 8;
  static constexpr int kLeast = -126;
  static constexpr int kLargest = 127;
};

[[noreturn]] void fail(const std::string& what) {
  std::fprintf(stderr, "probe: %s\n", what.c_str());
  std::exit(2);
}

// Nearest number of the format, ties to even.
template <class T16>
std::uint16_t encode(double value) {
  using F = Format<T16>;
  const double size = std::fabs(value);
  const auto sign = static_cast<std::uint32_t>(std::signbit(value) ? 0x8000 : 0);
  int exponent = size == 0.0 ? F::kLeast : std::max(std::ilogb(size), F::kLeast);
  auto significand = static_cast<std::uint32_t>(std::nearbyint(std::ldexp(size, F::kDigits - 1 - exponent)));
  constexpr std::uint32_t kOne = 1u << (F::kDigits - 1);
  if (significand == 2 * kOne) {
    significand = kOne;
    ++exponent;
  }
  if (exponent > F::kLargest) fail("a value beyond the range of " + std::string(F::kName));
  const std::uint32_t field = significand < kOne ? 0 : static_cast<std::uint32_t>(exponent - F::kLeast + 1);
  return static_cast<std::uint16_t>(sign | field << (F::kDigits - 1) | (significand & (kOne - 1)));
}
template <class T16>
double decode(std::uint16_t bits) {
  using F = Format<T16>;
  constexpr int kOne = 1 << (F::kDigits - 1);
  const int field = (bits & 0x7fff) >> (F::kDigits - 1);
  const int significand = (bits & (kOne - 1)) + (field == 0 ? 0 : kOne);
  const double size = std::ldexp(significand, std::max(field, 1) - 1 + F::kLeast - (F::kDigits - 1));
  return (bits & 0x8000) != 0 ? -size : size;
}

// ---- kernel ---------------------------------------------------------------------------------------------------------

// d = c + a b^T for one case a block, by one warp: a [16, 2 pairs], b [8, 2 pairs] of T16, two in a word; c, d [16, 8].
template <class T16>
__global__ void __launch_bounds__(kWarpSize)
    chain_kernel(const std::uint32_t* gA, const std::uint32_t* gB, const float* gC, float* gD, int pairs) {
  const int group = lane_id() / 4;
  const int turn = lane_id() % 4;
  const std::uint32_t* gUpper = gA + (block_id() * kRows + group) * pairs;
  const std::uint32_t* gLower = gUpper + static_cast<std::int64_t>(kRows / 2) * pairs;
  const std::uint32_t* gColumn = gB + (block_id() * kColumns + group) * pairs;
  const std::int64_t first = block_id() * kOutcomes + group * kColumns + 2 * turn;
  const std::int64_t second = first + kOutcomes / 2;
  float rD[4] = {load(gC + first), load(gC + first + 1), load(gC + second), load(gC + second + 1)};
  for (int pair = 0; pair < pairs; pair += kDepth / 2) {
    const int low = pair + turn;
    const int high = low + 4;
    const std::uint32_t rA[4] = {load(gUpper + low), load(gLower + low), load(gUpper + high), load(gLower + high)};
    const std::uint32_t rB[2] = {load(gColumn + low), load(gColumn + high)};
    mma_m16n8k16<T16>(rD, rA, rB);
  }
  gD[first] = rD[0];
  gD[first + 1] = rD[1];
  gD[second] = rD[2];
  gD[second + 1] = rD[3];
}

// ---- launch ---------------------------------------------------------------------------------------------------------

void check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  std::string reason = cudaGetErrorString(error);
#if defined(SN_SIMT)
  reason += ": " + simt::fault();
#endif
  fail(std::string(what) + ": " + reason);
}

// Memory of the device; emulated threads use the host's.
#if defined(SN_SIMT)
void* device_allocate(std::size_t bytes) {
  return std::malloc(bytes);
}
void device_free(void* data) {
  std::free(data);
}
void to_device(void* to, const void* from, std::size_t bytes) {
  std::memcpy(to, from, bytes);
}
void to_host(void* to, const void* from, std::size_t bytes) {
  std::memcpy(to, from, bytes);
}
#else
void* device_allocate(std::size_t bytes) {
  void* data = nullptr;
  check(cudaMalloc(&data, bytes), "cudaMalloc");
  return data;
}
void device_free(void* data) {
  check(cudaFree(data), "cudaFree");
}
void to_device(void* to, const void* from, std::size_t bytes) {
  check(cudaMemcpy(to, from, bytes, cudaMemcpyHostToDevice), "copy to the device");
}
void to_host(void* to, const void* from, std::size_t bytes) {
  check(cudaMemcpy(to, from, bytes, cudaMemcpyDeviceToHost), "copy to the host, after the kernel");
}
#endif

struct Batch {
  Batch(int cases_wanted, int depth_wanted)
      : cases(cases_wanted),
        depth(depth_wanted),
        a(static_cast<std::size_t>(cases) * kRows * static_cast<std::size_t>(depth)),
        b(static_cast<std::size_t>(cases) * kColumns * static_cast<std::size_t>(depth)),
        c(static_cast<std::size_t>(cases) * kOutcomes),
        d(c.size(), NAN) {}
  std::uint16_t* row(int which, int i) { return a.data() + (static_cast<std::size_t>(which) * kRows + i) * depth; }
  std::uint16_t* column(int which, int j) {
    return b.data() + (static_cast<std::size_t>(which) * kColumns + j) * depth;
  }
  static std::size_t outcome(int which, int i, int j) {
    return static_cast<std::size_t>(which) * kOutcomes + static_cast<std::size_t>(i * kColumns + j);
  }

  int cases;
  int depth;
  std::vector<std::uint16_t> a, b;
  std::vector<float> c, d;
};

template <class T16>
void multiply(Batch& batch) {
  const auto bytes = [](const auto& values) { return values.size() * sizeof(values[0]); };
  void* gA = device_allocate(bytes(batch.a));
  void* gB = device_allocate(bytes(batch.b));
  void* gC = device_allocate(bytes(batch.c));
  void* gD = device_allocate(bytes(batch.d));
  to_device(gA, batch.a.data(), bytes(batch.a));
  to_device(gB, batch.b.data(), bytes(batch.b));
  to_device(gC, batch.c.data(), bytes(batch.c));
  to_device(gD, batch.d.data(), bytes(batch.d));  // NaN, which a kernel that did not write would leave
  check(launch(chain_kernel<T16>, LaunchShape{batch.cases, kWarpSize, 0}, nullptr,
               static_cast<const std::uint32_t*>(gA), static_cast<const std::uint32_t*>(gB),
               static_cast<const float*>(gC), static_cast<float*>(gD), batch.depth / 2),
        "launch");
  to_host(batch.d.data(), gD, bytes(batch.d));
  for (void* data : {gA, gB, gC, gD}) device_free(data);
}

// ---- one mma, by hand -----------------------------------------------------------------------------------------------

// c + sum of 16 products.
struct Sum {
  double a[kDepth] = {};
  double b[kDepth] = {};
  double c = 0.0;

  explicit Sum(double accumulator = 0.0) : c(accumulator) {}
  // A product of the given value, from two factors of about the same exponent.
  Sum& product(int k, double value) {
    const int half = value == 0.0 ? 0 : std::ilogb(value) / 2;
    return factors(k, std::ldexp(value, -half), std::ldexp(1.0, half));
  }
  Sum& factors(int k, double left, double right) {
    a[k] = left;
    b[k] = right;
    return *this;
  }
};

// Each sum is a pair of row and column of its own, over all places of the tile in turn.
template <class T16>
std::vector<double> evaluate(const std::vector<Sum>& sums) {
  const int cases = static_cast<int>((sums.size() + kColumns - 1) / kColumns);
  Batch batch(cases, kDepth);
  const auto place = [](std::size_t at) {
    const int which = static_cast<int>(at / kColumns);
    const int j = static_cast<int>(at % kColumns);
    return std::pair(which, std::pair(j + (which % 2) * kRows / 2, j));
  };
  for (std::size_t at = 0; at < sums.size(); ++at) {
    const auto [which, where] = place(at);
    for (int k = 0; k < kDepth; ++k) {
      const std::uint16_t left = encode<T16>(sums[at].a[k]);
      const std::uint16_t right = encode<T16>(sums[at].b[k]);
      if (decode<T16>(left) != sums[at].a[k] || decode<T16>(right) != sums[at].b[k]) {
        fail("a factor that is no number of " + std::string(Format<T16>::kName));
      }
      batch.row(which, where.first)[k] = left;
      batch.column(which, where.second)[k] = right;
    }
    batch.c[Batch::outcome(which, where.first, where.second)] = static_cast<float>(sums[at].c);
  }
  multiply<T16>(batch);
  std::vector<double> results;
  for (std::size_t at = 0; at < sums.size(); ++at) {
    const auto [which, where] = place(at);
    results.push_back(static_cast<double>(batch.d[Batch::outcome(which, where.first, where.second)]));
  }
  return results;
}
template <class T16>
double evaluate(const Sum& sum) {
  return evaluate<T16>(std::vector<Sum>{sum})[0];
}

constexpr int kUnseen = 28;  // 2^-28, the smallest product of two normal halves: beyond what any known adder keeps
constexpr int kFewestBits = 16;

struct Arithmetic {
  int group = 0;  // 0: the columns do not fall into groups of one size, one after the other
  int groups[kDepth] = {};
  int bits = 0;                    // of products beside a large accumulator
  int bits_of_products = 0;        // beside large products
  int bits_of_accumulator = 0;     // of a small accumulator
  std::vector<double> staircase;   // what is left of 15 products 2^-t beside a 1, in units of 2^-t, t = 16, 17, ... 28
  std::string rounding = "other";  // of terms: truncates, floors, rounds
  std::string sum_rounding = "other";
  std::string products = "other";    // aligned by exponents that are unnormalised or normalised
  std::string subnormals = "other";  // of the inputs: kept, flushed
  std::string subnormal_exponents = "other";
  std::string zeros = "other";  // ignored in the alignment, or aligned to
  std::string subnormal_sums = "other";
};

// Which columns are added together. With the accumulator -1, product i 1 and product k 2^-28, the last is left over
// exactly if the other two have met before it comes: if k belongs to a later group.
template <class T16>
void find_groups(Arithmetic& found) {
  const double small = std::ldexp(1.0, -kUnseen);
  std::vector<Sum> sums;
  for (int i = 0; i < kDepth; ++i) {
    for (int k = 0; k < kDepth; ++k) sums.push_back(Sum(-1.0).product(k, small).product(i, 1.0));
  }
  const std::vector<double> left = evaluate<T16>(sums);
  const auto later = [&](int i, int k) { return i != k && left[static_cast<std::size_t>(i * kDepth + k)] == small; };
  int before[kDepth] = {};  // columns of earlier groups
  for (int k = 0; k < kDepth; ++k) {
    for (int i = 0; i < kDepth; ++i) before[k] += later(i, k) ? 1 : 0;
  }
  const int size = static_cast<int>(std::count(before, before + kDepth, before[0]));
  bool regular = kDepth % size == 0;
  for (int k = 0; k < kDepth; ++k) {
    regular = regular && std::count(before, before + kDepth, before[k]) == size && before[k] % size == 0;
    for (int i = 0; i < kDepth; ++i) regular = regular && (i == k || later(i, k) == (before[i] < before[k]));
    found.groups[k] = regular ? before[k] / size : before[k];
  }
  found.group = regular ? size : 0;
}

// How many fraction bits are kept: the largest t for which `make(2^-t)` gives 2^-t, as all smaller t do.
template <class T16, class F>
int kept_bits(F make) {
  std::vector<Sum> sums;
  for (int t = kFewestBits; t <= kUnseen; ++t) sums.push_back(make(std::ldexp(1.0, -t)));
  const std::vector<double> left = evaluate<T16>(sums);
  int bits = 0;
  for (int t = kFewestBits; t <= kUnseen && left[static_cast<std::size_t>(t - kFewestBits)] == std::ldexp(1.0, -t);
       ++t) {
    bits = t;
  }
  return bits;
}

std::string rounding_of(double up, double down, double small_up, double small_down) {
  const auto is = [&](double a, double b, double c, double d) {
    return up == a && down == b && small_up == c && small_down == d;
  };
  if (is(1, -1, 0, 0)) return "truncates";
  if (is(1, -2, 0, -1)) return "floors";
  if (is(2, -2, 1, -1)) return "rounds";
  return "other";
}

template <class T16>
Arithmetic examine() {
  using F = Format<T16>;
  Arithmetic found;
  find_groups<T16>(found);
  // Columns of the group that column 0 is in; where there are fewer than four, others stand in.
  std::vector<int> at;
  for (int k = 0; k < kDepth; ++k) {
    if (found.groups[k] == found.groups[0]) at.push_back(k);
  }
  for (int k = 0; k < kDepth && at.size() < 4; ++k) {
    if (found.groups[k] != found.groups[0]) at.push_back(k);
  }
  const int last = at.size() >= 4 ? at[3] : 3;

  found.bits = kept_bits<T16>([&](double small) { return Sum(-1.0).product(at[0], 1.0).product(last, small); });
  found.bits_of_products =
      kept_bits<T16>([&](double small) { return Sum().product(at[0], 1.0).product(at[1], -1.0).product(last, small); });
  found.bits_of_accumulator =
      kept_bits<T16>([&](double small) { return Sum(small).product(at[0], 1.0).product(at[1], -1.0); });
  for (int t = kFewestBits; t <= kUnseen; ++t) {
    Sum sum(-1.0);
    for (int k = 0; k < kDepth; ++k) sum.product(k, k == at[0] ? 1.0 : std::ldexp(1.0, -t));
    found.staircase.push_back(std::ldexp(evaluate<T16>(sum), t));
  }
  if (found.bits == 0) {  // an adder that keeps nothing shows no groups
    found.group = 0;
    return found;
  }

  const double unit = std::ldexp(1.0, -found.bits);
  const auto beside_one = [&](double value) {
    return evaluate<T16>(Sum(-1.0).product(at[0], 1.0).product(last, value * unit)) / unit;
  };
  found.rounding = rounding_of(beside_one(1.5), beside_one(-1.5), beside_one(0.75), beside_one(-0.75));

  // 4 + 0.75 and 4 + 1.5 units of a float of that size, the terms themselves exact: the carries of four ones.
  const double ulp = 0x1p-21;
  const auto beside_four = [&](double value) {
    const double one = value < 0.0 ? -1.0 : 1.0;
    Sum sum(one);
    for (int k = 0; k < 3; ++k) sum.product(at[static_cast<std::size_t>(k)], one);
    return (evaluate<T16>(sum.product(last, value * ulp)) - 4.0 * one) / ulp;
  };
  found.sum_rounding = rounding_of(beside_four(1.5), beside_four(-1.5), beside_four(0.75), beside_four(-0.75));

  // 1.5 * 1.5 = 2.25: a unit that normalises products first aligns to 2 and not to 1.
  const double beside_product =
      evaluate<T16>(Sum().factors(at[0], 1.5, 1.5).factors(at[1], 1.5, -1.5).product(last, unit));
  found.products = beside_product == unit ? "unnormalised" : (beside_product == 0.0 ? "normalised" : "other");

  // The smallest subnormal times a power of two, in all 2 in terms of unnormalised exponents.
  const double least = std::ldexp(1.0, F::kLeast - (F::kDigits - 1));
  const double large = std::ldexp(1.0, 1 - F::kLeast);
  const double alone = evaluate<T16>(Sum().factors(at[0], least, 1.0));
  found.subnormals = alone == least ? "kept" : (alone == 0.0 ? "flushed" : "other");
  const auto beside_subnormal = [&](double value) {
    return evaluate<T16>(Sum().factors(at[0], least, large).factors(at[1], least, -large).product(last, value));
  };
  if (beside_subnormal(2.0 * unit) == 2.0 * unit) {
    found.subnormal_exponents = beside_subnormal(unit) == unit ? "normalised" : "unnormalised";
  }
  const double beside_zero = evaluate<T16>(Sum().factors(at[0], 0.0, large).product(last, unit));
  found.zeros = beside_zero == unit ? "ignored" : (beside_zero == 0.0 ? "aligned" : "other");
  const double sum = evaluate<T16>(Sum(0x1p-140));
  found.subnormal_sums = sum == 0x1p-140 ? "kept" : (sum == 0.0 ? "flushed" : "other");
  return found;
}

struct Model {
  const char* name;
  int group;
  int bits;
};
constexpr Model kModels[] = {{"hopper", 16, 25}, {"ampere", 8, 24}, {"volta", 4, 23}};

const char* model_of(const Arithmetic& found) {
  const bool plain = found.bits_of_products == found.bits && found.bits_of_accumulator == found.bits &&
                     found.rounding == "truncates" && found.sum_rounding == "truncates";
  for (const Model& model : kModels) {
    if (plain && model.group == found.group && model.bits == found.bits) return model.name;
  }
  return "unknown";
}

// ---- rows -----------------------------------------------------------------------------------------------------------

using Random = std::mt19937_64;

double uniform(Random& random, double low, double high) {
  return low + (high - low) * static_cast<double>(random() >> 11) * 0x1p-53;
}
double sign(Random& random) {
  return (random() & 1) != 0 ? 1.0 : -1.0;
}
double normal(Random& random) {
  double sum = -6.0;
  for (int i = 0; i < 12; ++i) sum += uniform(random, 0.0, 1.0);
  return sum;
}

// A family gives element k of row (or column) `which` of a case. Rows of the adversarial family: product 0 is +-1; all
// others are just below 2^-t, so that an adder of t bits loses each whole; `extra` of every `period` are twice that, of
// which half is kept, and together they are what the cut to a float takes: 2^(t - 23) - 1 of 2^-t. Neither moves the
// accumulator, so that it can be repeated as long as a row is.
template <class T16>
void fill(const std::string& family, Random& random, int which, Batch& batch) {
  using F = Format<T16>;
  const int depth = batch.depth;
  const bool half = F::kLeast == -14;
  const double least = std::ldexp(1.0, F::kLeast);
  const double scale = std::ldexp(1.0, static_cast<int>(random() % 20) - 12);
  for (int side = 0; side < 2; ++side) {
    for (int i = 0; i < (side == 0 ? kRows : kColumns); ++i) {
      std::uint16_t* row = side == 0 ? batch.row(which, i) : batch.column(which, i);
      double last = 0.0;
      for (int k = 0; k < depth; ++k) {
        double value = normal(random);
        if (family == "uniform") value = uniform(random, -1.0, 1.0);
        if (family == "positive") value = uniform(random, 0.0, 1.0);
        if (family == "wide")
          value = sign(random) * std::exp2(half ? uniform(random, -14, 6) : uniform(random, -25, 25));
        if (family == "rising") value *= std::exp2(16.0 * k / depth - 10.0);
        if (family == "falling") value *= std::exp2(6.0 - 16.0 * k / depth);
        if (family == "sparse" && random() % 4 != 0) value = 0.0;
        if (family == "cancelling" && k >= depth / 2) {  // what the first half adds up to, the second takes away
          value = (side == 0 ? 1.0 : -1.0) * decode<T16>(row[k - depth / 2]);
        }
        if (family == "alternating" && k % 2 == 1) value = (side == 0 ? 1.0 : -1.0) * last;
        if (family == "subnormal") {
          value = side == 0 ? uniform(random, -least, least)
                            : (which % 4 == 0 ? uniform(random, -least, least) : scale * value);
          if (!half && side == 1) value = scale * normal(random);  // bfloat16 rows as small are not screened
        }
        if (family == "partly-subnormal") {
          value =
              sign(random) * std::exp2(half ? uniform(random, -24, -6) : uniform(random, k % 2 == 0 ? -133 : -30, -20));
        }
        if (family == "adversarial") {
          const int t = 22 + i / 2 % 8;
          const int period = 4 << which % 3;
          const int extra = t > 23 && i % 2 == 1 ? (1 << (t - 23)) - 1 : 0;
          if (side == 0) {
            const double most = 2.0 - std::ldexp(1.0, 1 - F::kDigits);
            value = k == 0 ? 1.0 : std::ldexp(most, (k % period < extra ? 12 : 11) - t);
          } else {
            value = k == 0 ? (i % 2 == 0 ? 1.0 : -1.0) : (i / 2 % 2 == 0 ? 1.0 : -1.0) * 0x1p-12;
            if (i / 4 == 1 && k > 0) value *= 0.75;
          }
        }
        row[k] = encode<T16>(value);
        last = decode<T16>(row[k]);
      }
    }
  }
}
const char* const kFamilies[] = {"normal", "uniform",    "positive",    "wide",      "rising",           "falling",
                                 "sparse", "cancelling", "alternating", "subnormal", "partly-subnormal", "adversarial"};

// A sum in double with what rounding took from it in another: its own error is below 2^-100 of the terms.
struct ExactSum {
  double sum = 0.0;
  double rest = 0.0;
  void add(double term) {
    const double total = sum + term;
    const double other = total - sum;
    rest += (sum - (total - other)) + (term - other);
    sum = total;
  }
};

struct Worst {
  double of_squares = 0.0;  // |error| in units of D 2^-23 (n_i + n_j) / 2
  double of_norms = 0.0;    // in units of D 2^-23 |h_i||h_j|, neither row with subnormal elements
};

template <class T16>
Worst measure(const std::string& family, int depth, int cases, Random& random) {
  Batch batch(cases, depth);
  for (int which = 0; which < cases; ++which) fill<T16>(family, random, which, batch);
  multiply<T16>(batch);
  struct Row {
    std::vector<double> values;
    double squares = 0.0;
    bool normal = true;
  };
  const double least = std::ldexp(1.0, Format<T16>::kLeast);
  const auto widen_row = [&](const std::uint16_t* bits) {
    Row row;
    for (int k = 0; k < depth; ++k) {
      row.values.push_back(decode<T16>(bits[k]));
      row.squares += row.values.back() * row.values.back();
      row.normal = row.normal && (row.values.back() == 0.0 || std::fabs(row.values.back()) >= least);
    }
    return row;
  };
  Worst worst;
  for (int which = 0; which < cases; ++which) {
    std::vector<Row> columns;
    for (int j = 0; j < kColumns; ++j) columns.push_back(widen_row(batch.column(which, j)));
    for (int i = 0; i < kRows; ++i) {
      const Row row = widen_row(batch.row(which, i));
      for (int j = 0; j < kColumns; ++j) {
        const Row& column = columns[static_cast<std::size_t>(j)];
        ExactSum exact;
        for (std::size_t k = 0; k < row.values.size(); ++k) exact.add(row.values[k] * column.values[k]);
        const double got = static_cast<double>(batch.d[Batch::outcome(which, i, j)]);
        const double error = std::fabs((got - exact.sum) - exact.rest);
        const double unit = depth * 0x1p-23;
        const double squares = (row.squares + column.squares) / 2.0;
        const double norms = std::sqrt(row.squares) * std::sqrt(column.squares);
        // NaN counts as worse than any number.
        const auto ratio = [&](double size) {
          return std::isnan(error) ? HUGE_VAL : (error == 0.0 ? 0.0 : error / (unit * size));
        };
        worst.of_squares = std::max(worst.of_squares, ratio(squares));
        if (row.normal && column.normal) worst.of_norms = std::max(worst.of_norms, ratio(norms));
      }
    }
  }
  return worst;
}

// ---- report ---------------------------------------------------------------------------------------------------------

std::string number(double value) {
  if (!std::isfinite(value)) return "1e999";  // reads as infinity
  char text[32];
  std::snprintf(text, sizeof(text), "%.6g", value);
  return text;
}
std::string quoted(const std::string& text) {
  std::string safe = "\"";
  for (const char letter : text) {
    if (letter == '"' || letter == '\\') safe += '\\';
    if (static_cast<unsigned char>(letter) >= 0x20) safe += letter;
  }
  return safe + "\"";
}
template <class List, class F>
std::string joined(const List& list, F text) {
  std::string all;
  for (const auto& each : list) all += (all.empty() ? "" : ", ") + text(each);
  return all;
}

struct Verdict {
  std::string json;
  std::string model;
  bool holds;
};

template <class T16>
Verdict probe(int cases) {
  const Arithmetic found = examine<T16>();
  Verdict verdict;
  verdict.model = model_of(found);

  Random random(1);
  Worst worst;
  std::vector<std::pair<std::string, double>> families;
  for (const char* family : kFamilies) {
    Worst all;
    for (const int depth : {16, 64, 256, 2048}) {
      const Worst here = measure<T16>(family, depth, std::max(3, depth == 2048 ? cases / 2 : cases), random);
      all.of_squares = std::max(all.of_squares, here.of_squares);
      all.of_norms = std::max(all.of_norms, here.of_norms);
    }
    families.emplace_back(family, all.of_squares);
    worst.of_squares = std::max(worst.of_squares, all.of_squares);
    worst.of_norms = std::max(worst.of_norms, all.of_norms);
  }
  const bool regular = found.group > 0 && found.bits > 0 && found.bits < kUnseen;
  const int bits = std::min({found.bits, found.bits_of_products, found.bits_of_accumulator});
  const double general = regular ? ((found.group + 1) * std::ldexp(1.0, 23 - bits) + 1.0) / found.group : 0.0;
  verdict.holds = worst.of_squares <= kBound && general <= kBound;

  const auto named = [](const char* name, const std::string& value) { return quoted(name) + ": " + quoted(value); };
  verdict.json =
      quoted(Format<T16>::kName) + ": {\"group\": " + std::to_string(found.group) +
      ", \"bits\": " + std::to_string(found.bits) + ", " + named("rounding", found.rounding) + ", " +
      named("sum_rounding", found.sum_rounding) + ", " + named("subnormals", found.subnormals) + ", " +
      named("subnormal_exponents", found.subnormal_exponents) + ", " + named("product_exponents", found.products) +
      ", " + named("zeros", found.zeros) + ", " + named("subnormal_sums", found.subnormal_sums) + ", " +
      named("model", verdict.model) + ", \"bits_of_products\": " + std::to_string(found.bits_of_products) +
      ", \"bits_of_accumulator\": " + std::to_string(found.bits_of_accumulator) + ", \"group_of_column\": [" +
      joined(found.groups, [](int group) { return std::to_string(group); }) + "], \"left_of_15_from_2^-" +
      std::to_string(kFewestBits) + "\": [" + joined(found.staircase, number) +
      "], \"general\": " + (regular ? number(general) : "null") + ", \"worst\": " + number(worst.of_squares) +
      ", \"worst_against_norms\": " + number(worst.of_norms) + ", \"worst_by_family\": {" +
      joined(families, [](const auto& each) { return quoted(each.first) + ": " + number(each.second); }) +
      "}, \"holds\": " + (verdict.holds ? "true" : "false") + "}";
  return verdict;
}

int report(const std::string& device, const std::string& capability, int cases) {
  const Verdict half = probe<Half>(cases);
  const Verdict bfloat = probe<BFloat16>(cases);
  const bool holds = half.holds && bfloat.holds;
  std::printf(
      "{\"device\": %s, \"capability\": %s, \"types\": {%s, %s}, \"model\": %s, \"bound\": %s, \"holds\": %s}\n",
      quoted(device).c_str(), quoted(capability).c_str(), half.json.c_str(), bfloat.json.c_str(),
      quoted(half.model == bfloat.model ? half.model : "unknown").c_str(), number(kBound).c_str(),
      holds ? "true" : "false");
  return holds ? 0 : 1;
}

}  // namespace
}  // namespace sn::cuda

// ---- main -----------------------------------------------------------------------------------------------------------

#if defined(SN_SIMT)

int main(int argc, char** argv) {
  const char* const names[] = {"none", "hopper", "ampere", "volta", "crude"};  // simt::MmaModel
  sn::simt::Options options;
  options.mma_error = sn::simt::MmaError::kPlus;
  std::string chosen = "none";
  for (int a = 1; a < argc; a += 2) {
    const std::string option = argv[a];
    if (a + 1 == argc) sn::cuda::fail(option + " needs a value");
    if (option == "--model") {
      chosen = argv[a + 1];
    } else if (option == "--scale") {
      options.mma_error_scale = std::atof(argv[a + 1]);
    } else {
      sn::cuda::fail("expected --model or --scale, got " + option);
    }
  }
  const auto* const found = std::find(std::begin(names), std::end(names), chosen);
  if (found == std::end(names)) sn::cuda::fail("no model " + chosen);
  options.mma_model = static_cast<sn::simt::MmaModel>(found - std::begin(names));
  sn::simt::reset(options);
  return sn::cuda::report("emulated, " + chosen, "none", 3);
}

#else

int main(int argc, char**) {
  using sn::cuda::check;
  if (argc > 1) sn::cuda::fail("takes no arguments");
  cudaDeviceProp facts{};
  check(cudaSetDevice(0), "cudaSetDevice");
  check(cudaGetDeviceProperties(&facts, 0), "cudaGetDeviceProperties");
  return sn::cuda::report(facts.name, std::to_string(facts.major) + "." + std::to_string(facts.minor), 24);
}

#endif
