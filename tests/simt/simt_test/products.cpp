// Copies, matrices and mma: the injected error reaches its bound and stays within; the models are the published ones.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <random>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "simt_test.h"

namespace sn::cuda {
namespace {

constexpr int kRows = 16;
constexpr int kColumns = 8;
constexpr int kDepth = 48;
constexpr int kPitch = kDepth + 8;

// D [16, 8] = A [16, kDepth] B [8, kDepth]^T by one warp. `transposed`: B through the transposed load.
template <typename T16>
__global__ void product_kernel(const T16* gA, const T16* gB, float* gD, bool transposed) {
  SharedArena arena;
  const Shared<T16> sA = arena.take<T16>(kRows * kPitch);
  const Shared<T16> sB = arena.take<T16>(kColumns * kPitch);
  const Shared<T16> sBt = arena.take<T16>(kDepth * 8);
  for (int pack = lane_id(); pack < kRows * kDepth / 8; pack += kWarpSize) {
    const int row = pack / (kDepth / 8);
    const int column = pack % (kDepth / 8) * 8;
    async_copy16(sA, row * kPitch + column, gA + row * kDepth + column, true);
  }
  async_commit();
  for (int pack = lane_id(); pack < kColumns * kDepth / 8; pack += kWarpSize) {
    const int row = pack / (kDepth / 8);
    const int column = pack % (kDepth / 8) * 8;
    async_copy16(sB, row * kPitch + column, gB + row * kDepth + column, row < 7);  // the last row: zeros
  }
  async_commit();
  async_wait<1>();
  async_wait<0>();
  sync_warp();
  for (int i = lane_id(); i < kDepth * 8; i += kWarpSize) sBt.set(i, sB.get(i % 8 * kPitch + i / 8));
  sync_warp();
  float rD[4] = {};
  for (int depth = 0; depth < kDepth; depth += 16) {
    std::uint32_t rA[4], rBoth[4];
    const int matrix = lane_id() / 8;
    load_matrix_x4(rA, sA, (lane_id() % 8 + matrix % 2 * 8) * kPitch + depth + matrix / 2 * 8);
    if (transposed) {
      load_matrix_x4_transposed(rBoth, sBt, (depth + lane_id() % 16) * 8);
    } else {
      load_matrix_x4(rBoth, sB, lane_id() % 8 * kPitch + depth + matrix % 2 * 8);
    }
    const std::uint32_t rB[2] = {rBoth[0], rBoth[1]};
    mma_m16n8k16<T16>(rD, rA, rB);
  }
  const int group = lane_id() / 4;
  const int pair = lane_id() % 4 * 2;
  gD[group * 8 + pair] = rD[0];
  gD[group * 8 + pair + 1] = rD[1];
  gD[(group + 8) * 8 + pair] = rD[2];
  gD[(group + 8) * 8 + pair + 1] = rD[3];
}

// The second maximum of mma_error_bound (simt.h) for one product.
template <typename T16>
double alignment_of(double left, double right) {
  constexpr int kLeast = std::is_same_v<T16, Half> ? -14 : -126;
  const double least = std::ldexp(1.0, kLeast);
  if ((std::fabs(left) < least) == (std::fabs(right) < least)) return 0.0;
  return least * std::exp2(std::ilogb(std::fabs(left) < least ? right : left)) / 2;
}

template <typename T16>
void test_mma() {
  std::mt19937 random(5);
  std::uniform_real_distribution<float> uniform(-2.0f, 2.0f);
  double worst = 0.0, worst_subnormal = 0.0;
  for (int round = 0; round < 26; ++round) {
    const bool small = round < 4;  // small integers: exact without an injected error
    std::vector<T16> a(kRows * kDepth), b(kColumns * kDepth);
    const auto operand = [&] {
      const float value = uniform(random);
      return narrow<T16>(small ? std::round(value) : (round < 12 ? value : std::fabs(value)));
    };
    std::generate(a.begin(), a.end(), operand);
    std::generate(b.begin(), b.end(), operand);
    const bool subnormal = round >= 20;  // tiny or larger ones, against normal numbers or both kinds
    if (subnormal) {
      const float least = std::is_same_v<T16, Half> ? 0x1p-14f : 0x1p-126f;
      const float large = std::is_same_v<T16, Half> ? 64.0f : 0x1p40f;  // sums that are normal floats
      for (T16& value : a) value = narrow<T16>(least * (uniform(random) / (round < 22 ? 128.0f : 2.0f)));
      for (T16& value : b) value = narrow<T16>(uniform(random) * (round < 24 ? large : 0.25f));
      if (round >= 24) {
        for (std::size_t i = 0; i < a.size(); i += 3) a[i] = narrow<T16>(0.0f);
        for (std::size_t i = 0; i < b.size(); i += 2) b[i] = narrow<T16>(least * uniform(random));
      }
    }
    std::vector<float> first;
    for (const simt::MmaError mode : {simt::MmaError::kNone, simt::MmaError::kRandom, simt::MmaError::kExtreme,
                                      simt::MmaError::kPlus, simt::MmaError::kMinus}) {
      simt::Options options = with_seed(round);
      options.mma_error = mode;
      std::vector<float> d(kRows * kColumns), again(d.size());
      simt::reset(options);
      check(launch(product_kernel<T16>, LaunchShape{1, 32, 8192}, nullptr, a.data(), b.data(), d.data(), false) ==
                cudaSuccess,
            simt::fault());
      check(launch(product_kernel<T16>, LaunchShape{1, 32, 8192}, nullptr, a.data(), b.data(), again.data(), true) ==
                cudaSuccess,
            simt::fault());
      check(std::memcmp(d.data(), again.data(), d.size() * sizeof(float)) == 0, "errors depend on the operands alone");
      if (mode == simt::MmaError::kNone) first = d;
      for (int row = 0; row < kRows; ++row) {
        for (int column = 0; column < kColumns; ++column) {
          double sum = 0.0, size = 0.0, allowed = 0.0, aligned = 0.0, squares = 0.0, relied_on = 0.0;
          for (int depth = 0; depth < kDepth; ++depth) {
            const double left = widen(a[row * kDepth + depth]);
            const double right = column == 7 ? 0.0 : static_cast<double>(widen(b[column * kDepth + depth]));
            sum += left * right;
            size += std::fabs(left * right);
            squares += left * left + right * right;
            aligned = std::max(depth % 16 == 0 ? 0.0 : aligned, alignment_of<T16>(left, right));
            if (depth % 16 == 15) {
              allowed += simt::mma_error_bound * (1 + 1e-5) * std::max(size, aligned);
              relied_on += simt::mma_error_bound * (1 + 1e-5) * squares / 2;
            }
          }
          const float got = d[row * kColumns + column];
          const double error = got - sum;
          check(std::fabs(error) <= allowed + 0x1p-148, "a product is off by more than the bound");
          check(std::fabs(error) <= relied_on + 0x1p-148, "a product is off by more than the kernels allow for");
          if (mode == simt::MmaError::kNone && small) check(got == sum, "exact products");
          if (mode == simt::MmaError::kNone) continue;
          (subnormal ? worst_subnormal : worst) =
              std::max(subnormal ? worst_subnormal : worst, std::fabs(error) / std::max(allowed, 0x1p-130));
          if (mode == simt::MmaError::kPlus) check(got >= first[row * kColumns + column], "errors upwards");
          if (mode == simt::MmaError::kMinus) check(got <= first[row * kColumns + column], "errors downwards");
        }
      }
    }
  }
  check(worst > 0.9, "the injected error reaches the bound");
  check(worst_subnormal > 0.9, "the injected error reaches the bound of subnormal rows");
}

// Every element is c + sum of the same 16 products.
template <typename T16>
__global__ void sum_kernel(const T16* gA, const T16* gB, float c, float* gD) {
  const int pair = lane_id() % 4 * 2;
  const auto word = [&](const T16* row, int k) {
    return static_cast<std::uint32_t>(bits_of(load(row + k))) | static_cast<std::uint32_t>(bits_of(load(row + k + 1)))
                                                                    << 16;
  };
  const std::uint32_t rA[4] = {word(gA, pair), word(gA, pair), word(gA, pair + 8), word(gA, pair + 8)};
  const std::uint32_t rB[2] = {word(gB, pair), word(gB, pair + 8)};
  float rD[4] = {c, c, c, c};
  mma_m16n8k16<T16>(rD, rA, rB);
  for (int d = 0; d < 4; ++d) gD[lane_id() * 4 + d] = rD[d];
}

struct Term {
  int k;
  double left, right;
};

template <typename T16>
double modelled(simt::MmaModel model, double c, const std::vector<Term>& terms) {
  std::vector<T16> a(16, narrow<T16>(0.0f)), b(16, narrow<T16>(0.0f));
  for (const Term& term : terms) {
    a[term.k] = narrow<T16>(static_cast<float>(term.left));
    b[term.k] = narrow<T16>(static_cast<float>(term.right));
    check(widen(a[term.k]) == term.left && widen(b[term.k]) == term.right, "factors of the case are exact");
  }
  simt::Options options = with_seed(3);
  options.mma_error = simt::MmaError::kPlus;  // a model injects none
  options.mma_model = model;
  simt::reset(options);
  std::vector<float> d(128);
  check(launch(sum_kernel<T16>, LaunchShape{1, 32, 0}, nullptr, a.data(), b.data(), static_cast<float>(c), d.data()) ==
            cudaSuccess,
        simt::fault());
  const bool same =
      std::all_of(d.begin(), d.end(), [&](float value) { return std::memcmp(&value, d.data(), sizeof(value)) == 0; });
  check(same, "one sum, whatever its place");
  return d[0];
}

// Checks each model by sums made by hand: the size of a group, the bits kept, the direction of the cut, the exponents.
template <typename T16>
void test_models() {
  constexpr auto kHopper = simt::MmaModel::kGroup16Bits25;
  constexpr auto kAmpere = simt::MmaModel::kGroup8Bits24;
  constexpr auto kVolta = simt::MmaModel::kGroup4Bits23;
  constexpr auto kCrude = simt::MmaModel::kGroup4Bits22;
  const auto expect = [](simt::MmaModel model, double c, const std::vector<Term>& terms, double wanted,
                         const std::string& what) {
    const double got = modelled<T16>(model, c, terms);
    check(got == wanted, what + " under model " + std::to_string(static_cast<int>(model)) + ": " +
                             std::to_string(got / wanted) + " of what is expected");
  };
  const double tiny = 0x1p-14;
  // The last fraction bit that is kept: beside a large accumulator, beside large products, of the accumulator itself.
  for (const auto& [model, bits] : {std::pair(kHopper, 25), {kAmpere, 24}, {kVolta, 23}, {kCrude, 22}}) {
    const double last = std::exp2(-bits), lost = last / 2;
    for (const double kept : {last, -last}) {
      expect(model, -1, {{0, 1, 1}, {3, kept * 0x1p10, 0x1p-10}}, kept, "a term that is kept");
      expect(model, 0, {{1, 1, 1}, {2, -1, 1}, {3, kept * 0x1p10, 0x1p-10}}, kept, "a term that is kept");
      expect(model, kept, {{1, 1, 1}, {2, -1, 1}}, kept, "an accumulator that is kept");
      expect(model, -1, {{0, 1, 1}, {3, 1.5 * kept * 0x1p10, 0x1p-10}}, kept, "a term cut off towards zero");
    }
    expect(model, -1, {{0, 1, 1}, {3, lost * 0x1p10, 0x1p-10}}, 0, "a term that is lost");
    expect(model, -1, {{0, 1, 1}, {3, -1.5 * lost * 0x1p10, 0x1p-10}}, 0, "a term that is lost");
    expect(model, lost, {{1, 1, 1}, {2, -1, 1}}, 0, "an accumulator that is lost");
    // 1.5 x 1.5 is aligned by exponent 0.
    expect(model, 0, {{0, 1.5, 1.5}, {1, -1.5, 1.5}, {2, last * 0x1p10, 0x1p-10}}, last, "unnormalised products");
    // As many terms as a group has, each just below what is kept.
    std::vector<Term> many, more;
    for (int k = 0; k < 16; ++k) many.push_back({k, lost * 1.9375 * 0x1p12, 0x1p-12});
    for (int k = 0; k < 16; ++k) more.push_back({k, last * 0x1p12, 0x1p-12});
    expect(model, 1, many, 1, "sixteen terms that are lost");
    expect(model, 2, more, 2, "sixteen terms that are lost beside 2");
  }
  expect(kHopper, 1, {{0, 3 * 0x1p-13, 0x1p-12}}, 1, "a sum cut off to a float");
  expect(kHopper, 1, {{0, 0x1p-12, 0x1p-12}, {9, 0x1p-13, 0x1p-12}}, 1, "three quarters of a last place");
  expect(kHopper, 1, {{0, 0x1p-12, 0x1p-11}, {9, 3 * 0x1p-13, 0x1p-12}}, 1 + 0x1p-23, "a last place and some");
  for (const double one : {1.0, -1.0}) {
    for (const simt::MmaModel model : {kHopper, kAmpere, kVolta}) {
      expect(model, one, {{0, one, 1}, {1, one, 1}, {2, one, 1}, {3, one * 1.5 * 0x1p-11, 0x1p-11}}, 4 * one,
             "a sum cut off towards zero");
    }
  }
  // Which products meet the 1 before it is gone.
  for (int k = 1; k < 16; ++k) {
    for (const auto& [model, group] : {std::pair(kHopper, 16), {kAmpere, 8}, {kVolta, 4}, {kCrude, 4}}) {
      expect(model, -1, {{0, 1, 1}, {k, tiny, tiny}}, k < group ? 0 : 0x1p-28, "product " + std::to_string(k));
      expect(model, -1, {{15, 1, 1}, {15 - k, tiny, tiny}}, 0, "an earlier product " + std::to_string(k));
    }
  }
  // A subnormal is aligned by the least exponent. A zero aligns nothing.
  const bool half = std::is_same_v<T16, Half>;
  const double least = half ? 0x1p-24 : 0x1p-133, large = half ? 0x1p15 : 0x1p127;
  expect(kHopper, 0, {{5, least, 1}}, least, "a subnormal factor");
  expect(kHopper, 0, {{5, least, large}, {6, -least, large}, {7, 0x1p-12, 0x1p-12}}, 0x1p-24, "beside subnormals");
  expect(kHopper, 0, {{5, least, large}, {6, -least, large}, {7, 0x1p-12, 0x1p-13}}, 0, "beside subnormals");
  expect(kAmpere, 0, {{5, least, large}, {6, -least, large}, {7, 0x1p-12, 0x1p-12}}, 0, "beside subnormals");
  expect(kHopper, 0, {{5, 0, large}, {7, 0x1p-12, 0x1p-13}}, 0x1p-25, "beside a zero");
  // Sums that are subnormal, too small, too large.
  expect(kHopper, 0x1p-149, {}, 0x1p-149, "a subnormal accumulator");
  if (!half) {
    expect(kHopper, 0, {{0, 1.5 * 0x1p-75, 0x1p-74}}, 0x1p-149, "a sum cut off to a subnormal float");
    expect(kHopper, 0, {{0, 1.5 * 0x1p-75, 0x1p-75}}, 0, "a sum below all floats");
    expect(kHopper, 0, {{0, 0x1p100, -0x1p100}}, -HUGE_VAL, "a sum beyond all floats");
    check(std::isnan(modelled<T16>(kAmpere, HUGE_VAL, {{0, 0x1p100, -HUGE_VAL}})), "no number");
  }
}

}  // namespace

void test_products() {
  test_mma<Half>();
  test_mma<BFloat16>();
  test_models<Half>();
  test_models<BFloat16>();
}

}  // namespace sn::cuda
