// Tensor cores: ldmatrix, and mma with an error within the kernels' bound or by a published model.
#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>

#include "runtime.h"

namespace sn::simt {

void load_matrix(std::uint32_t (&r)[4], std::uint32_t position, bool transposed, Site site) {
  Meeting& meeting = arrive(transposed ? Op::kLoadMatrixTransposed : Op::kLoadMatrix, site);
  meeting.words[current->lane][0] = position;
  if (await_others(meeting)) {
    std::uint16_t matrices[4][8][8];
    for (int lane = 0; lane < kLanes; ++lane) {
      auto& row = matrices[lane / 8][lane % 8];
      std::memcpy(row, note_matrix_read(meeting.words[lane][0], site), sizeof(row));
    }
    for (int lane = 0; lane < kLanes; ++lane) {
      const int major = lane / 4;
      const int minor = lane % 4 * 2;
      for (int m = 0; m < 4; ++m) {
        const std::uint32_t low = transposed ? matrices[m][minor][major] : matrices[m][major][minor];
        const std::uint32_t high = transposed ? matrices[m][minor + 1][major] : matrices[m][major][minor + 1];
        meeting.results[lane][m] = low | high << 16;
      }
    }
    release(meeting);
  }
  std::memcpy(r, meeting.results[current->lane], sizeof(r));
}

namespace {

double widened(std::uint32_t bits, bool bfloat) {
  const std::uint32_t half = bits & 0xffffu;
  if (bfloat) return std::bit_cast<float>(half << 16);
  const std::uint32_t sign = (half & 0x8000u) << 16;
  const std::uint32_t magnitude = half & 0x7fffu;
  if (magnitude >= 0x7c00u) return std::bit_cast<float>(sign | 0x7f800000u | (magnitude & 0x3ffu) << 13);
  // The exponent is 112 less than float's. The multiplication repairs it, for subnormal numbers too.
  return std::bit_cast<float>(sign | magnitude << 13) * 0x1p112f;
}

// The injected error in units of the bound: between -1 and 1.
double drawn_error(double exact, int element) {
  const std::uint64_t word = mix(rt.options.mma_seed * 0x9e3779b97f4a7c15u ^ std::bit_cast<std::uint64_t>(exact) ^
                                 static_cast<std::uint64_t>(element));
  switch (rt.options.mma_error) {
    case MmaError::kNone:
      break;
    case MmaError::kRandom:
      return static_cast<double>(static_cast<std::int64_t>(word)) * 0x1p-63;
    case MmaError::kExtreme:
      return (word & 1) != 0 ? 1.0 : -1.0;
    case MmaError::kPlus:
      return 1.0;
    case MmaError::kMinus:
      return -1.0;
  }
  return 0.0;
}

// An element of an operand, the exponent it is aligned by, and whether it is normal: neither zero nor subnormal.
struct Factor {
  double value;
  int exponent;
  bool normal;
};

Factor factor_of(std::uint32_t bits, bool bfloat) {
  const int least = bfloat ? -126 : -14;
  const int field = static_cast<int>(bfloat ? bits >> 7 & 0xffu : bits >> 10 & 0x1fu);
  return {widened(bits, bfloat), least + std::max(field - 1, 0), field != 0};
}

struct Operands {
  Factor a[16][16];
  Factor b[16][8];
  float sums[16][8];
};

Operands gather(const Meeting& meeting, bool bfloat) {
  Operands all;
  for (int lane = 0; lane < kLanes; ++lane) {
    const std::uint32_t* words = meeting.words[lane];
    const int group = lane / 4;
    const int pair = lane % 4 * 2;
    for (int half = 0; half < 2; ++half) {
      for (int word = 0; word < 4; ++word) {
        all.a[group + 8 * (word & 1)][pair + half + 8 * (word >> 1)] = factor_of(words[word] >> 16 * half, bfloat);
      }
      for (int word = 0; word < 2; ++word) {
        all.b[pair + half + 8 * word][group] = factor_of(words[4 + word] >> 16 * half, bfloat);
      }
    }
    for (int word = 0; word < 4; ++word) {
      all.sums[group + 8 * (word >> 1)][pair + (word & 1)] = std::bit_cast<float>(words[6 + word]);
    }
  }
  return all;
}

// An integer times 2^exponent as a float, cut off towards zero.
float cut_to_float(std::int64_t number, int exponent) {
  constexpr int kSignificand = 24;
  constexpr int kLeast = -149;
  const std::uint64_t size = static_cast<std::uint64_t>(number < 0 ? -number : number);
  const int length = static_cast<int>(std::bit_width(size));
  const int drop = std::max({length - kSignificand, kLeast - exponent, 0});
  const double kept = drop >= length ? 0.0 : std::ldexp(static_cast<double>(size >> drop), exponent + drop);
  return static_cast<float>(number < 0 ? -kept : kept);
}

// Element (row, column) by an MmaModel, of finite values. A product is exact in double, and below 4 in units of its
// exponent, so a group of 16 and the accumulator stay below 2^32 in units of the last bit that is kept.
float modelled(const Operands& all, int row, int column, MmaModelFacts model) {
  float sum = all.sums[row][column];
  for (int first = 0; first < 16; first += model.group) {
    constexpr int kLeastFloat = -126;
    int largest = sum == 0.0f ? kLeastFloat : std::max(std::ilogb(sum), kLeastFloat);
    double products[16];
    for (int k = 0; k < model.group; ++k) {
      const Factor& left = all.a[row][first + k];
      const Factor& right = all.b[first + k][column];
      products[k] = left.value * right.value;
      if (products[k] != 0.0) largest = std::max(largest, left.exponent + right.exponent);
    }
    const int shift = model.bits - largest;
    auto total = static_cast<std::int64_t>(std::ldexp(static_cast<double>(sum), shift));
    for (int k = 0; k < model.group; ++k) total += static_cast<std::int64_t>(std::ldexp(products[k], shift));
    sum = cut_to_float(total, -shift);
    if (!std::isfinite(sum)) break;
  }
  return sum;
}

void multiply(Meeting& meeting, bool bfloat) {
  const Operands all = gather(meeting, bfloat);
  double sums[16][8];
  double sizes[16][8];
  for (int row = 0; row < 16; ++row) {
    for (int column = 0; column < 8; ++column) {
      sums[row][column] = static_cast<double>(all.sums[row][column]);
      sizes[row][column] = std::fabs(sums[row][column]);
    }
  }
  // Products of two halves and their sums over 16 terms are exact in double, or nearly: the bound is 2^29 times the
  // rounding of these.
  for (int row = 0; row < 16; ++row) {
    for (int k = 0; k < 16; ++k) {
      const double left = all.a[row][k].value;
      for (int column = 0; column < 8; ++column) {
        const double product = left * all.b[k][column].value;
        sums[row][column] += product;
        sizes[row][column] += std::fabs(product);
      }
    }
  }
  // The alignment of products with one factor that is not normal (mma_error_bound). Few columns have any.
  for (int k = 0; k < 16; ++k) {
    bool normal = true;
    for (int row = 0; row < 16; ++row) normal = normal && all.a[row][k].normal;
    for (int column = 0; column < 8; ++column) normal = normal && all.b[k][column].normal;
    for (int row = 0; row < 16 && !normal; ++row) {
      const Factor& left = all.a[row][k];
      for (int column = 0; column < 8; ++column) {
        const Factor& right = all.b[k][column];
        if (left.normal == right.normal) continue;
        sizes[row][column] = std::max(sizes[row][column], std::ldexp(0.5, left.exponent + right.exponent));
      }
    }
  }
  const MmaModelFacts model = kMmaModels[static_cast<int>(rt.options.mma_model)];
  // Rounding to float takes 2^-24 of the bound, 2.5e-2 of it. The injected error gets the rest.
  const double bound = (mma_error_bound - 0x1.01p-24) * rt.options.mma_error_scale;
  for (int lane = 0; lane < kLanes; ++lane) {
    for (int word = 0; word < 4; ++word) {
      const int row = lane / 4 + 8 * (word >> 1);
      const int column = lane % 4 * 2 + (word & 1);
      double value = sums[row][column];
      if (std::isfinite(sizes[row][column])) {
        if (model.group > 0) {
          meeting.results[lane][word] = std::bit_cast<std::uint32_t>(modelled(all, row, column, model));
          continue;
        }
        value += drawn_error(value, row * 8 + column) * bound * sizes[row][column];
      }
      meeting.results[lane][word] = std::bit_cast<std::uint32_t>(static_cast<float>(value));
    }
  }
}

}  // namespace

void mma(float (&d)[4], const std::uint32_t (&a)[4], const std::uint32_t (&b)[2], bool bfloat, Site site) {
  Meeting& meeting = arrive(Op::kMma, site);
  std::uint32_t* mine = meeting.words[current->lane];
  std::memcpy(mine, a, sizeof(a));
  std::memcpy(mine + 4, b, sizeof(b));
  std::memcpy(mine + 6, d, sizeof(d));
  if (await_others(meeting)) {
    ++rt.statistics.mmas;
    multiply(meeting, bfloat);
    release(meeting);
  }
  std::memcpy(d, meeting.results[current->lane], sizeof(d));
}

}  // namespace sn::simt
