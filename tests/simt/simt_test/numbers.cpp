// Conversions between the 16-bit types and float, and arithmetic with directed rounding.
#include <algorithm>
#include <cmath>
#include <limits>
#include <random>
#include <type_traits>
#include <vector>

#include "simt_test.h"

namespace sn::cuda {
namespace {

// All finite values of a 16-bit type; finds the nearest, ties to even.
template <typename T16>
struct Table {
  std::vector<double> values;  // of the patterns 0, 1, ... up to the largest finite one, ascending
  double overflow;             // values from here on round to infinity
  std::uint16_t infinity;

  explicit Table(std::uint16_t infinity_bits) : infinity(infinity_bits) {
    for (std::uint32_t bits = 0; bits < infinity_bits; ++bits) {
      values.push_back(decode(static_cast<std::uint16_t>(bits)));
    }
    overflow = values.back() + (values.back() - values[values.size() - 2]) / 2;
  }
  // From the definition of the format.
  static double decode(std::uint16_t bits) {
    constexpr int kMantissa = std::is_same_v<T16, Half> ? 10 : 7;
    constexpr int kBias = std::is_same_v<T16, Half> ? 15 : 127;
    const int exponent = (bits & 0x7fff) >> kMantissa;
    const int mantissa = bits & ((1 << kMantissa) - 1);
    if (exponent == 0) return std::ldexp(mantissa, 1 - kBias - kMantissa);
    return std::ldexp(mantissa + (1 << kMantissa), exponent - kBias - kMantissa);
  }
  std::uint16_t nearest(double value) const {
    if (value != value) return 0x7fff;
    const std::uint16_t sign = std::signbit(value) ? 0x8000 : 0;
    const double magnitude = std::fabs(value);
    if (magnitude >= overflow) return sign | infinity;
    auto above = std::lower_bound(values.begin(), values.end(), magnitude);
    if (above == values.end()) return static_cast<std::uint16_t>(sign | (infinity - 1));
    auto at = static_cast<std::uint32_t>(above - values.begin());
    if (at > 0) {
      const double up = values[at] - magnitude;
      const double down = magnitude - values[at - 1];
      if (down < up || (down == up && at % 2 == 1)) --at;
    }
    return static_cast<std::uint16_t>(sign | at);
  }
};

template <typename T16>
void test_conversions(std::uint16_t infinity) {
  const Table<T16> table(infinity);
  const auto make = [](std::uint32_t bits) {
    if constexpr (std::is_same_v<T16, Half>) {
      return half_from_bits(static_cast<std::uint16_t>(bits));
    } else {
      return bfloat16_from_bits(static_cast<std::uint16_t>(bits));
    }
  };
  for (std::uint32_t bits = 0; bits < 65536; ++bits) {
    const T16 half = make(bits);
    const float wide = widen(half);
    check(bits_of(half) == bits, "bits_of");
    const std::uint32_t magnitude = bits & 0x7fffu;
    if (magnitude > infinity) {
      check(is_nan(wide) && bits_of(narrow<T16>(wide)) == 0x7fff && !is_finite(half), "NaN");
      continue;
    }
    const double sign = bits >= 0x8000u ? -1.0 : 1.0;
    if (magnitude == infinity) {
      check(wide == sign * HUGE_VAL && !is_finite(half), "infinity");
    } else {
      check(wide == sign * table.values[magnitude] && std::signbit(wide) == (bits >= 0x8000u) && is_finite(half),
            "widen");
    }
    check(bits_of(narrow<T16>(wide)) == bits && bits_of(narrow<T16>(static_cast<double>(wide))) == bits,
          "there and back");
    if (magnitude == infinity) continue;
    // The middle between this value and the next, and its neighbours.
    const double next =
        magnitude + 1u < infinity ? table.values[magnitude + 1] : 2 * table.overflow - table.values[magnitude];
    const double middle = sign * (table.values[magnitude] + (next - table.values[magnitude]) / 2);
    for (const double value :
         {middle, std::nextafter(middle, 0.0), std::nextafter(middle, 2 * middle), 0.9999 * middle}) {
      check(bits_of(narrow<T16>(value)) == table.nearest(value), "narrow of double");
    }
    const auto narrowed = static_cast<float>(middle);
    for (const float value : {narrowed, std::nextafterf(narrowed, 0.0f), std::nextafterf(narrowed, 2 * narrowed)}) {
      check(bits_of(narrow<T16>(value)) == table.nearest(value), "narrow of float");
      check(narrow_pair<T16>(value, wide) == (table.nearest(value) | bits << 16), "narrow_pair");
    }
  }
  std::mt19937_64 random(7);
  for (int i = 0; i < 200000; ++i) {
    const auto bits = random();
    const float value = float_from_bits(static_cast<std::uint32_t>(bits));
    check(bits_of(narrow<T16>(value)) == table.nearest(value), "narrow of any float");
    const double wide = double_from_bits((bits & 0x800fffffffffffffu) | ((bits >> 52 & 0xff) + 896) << 52);
    check(bits_of(narrow<T16>(wide)) == table.nearest(wide), "narrow of any double");
  }
}

void test_directed_rounding() {
  std::mt19937 random(11);
  const auto any = [&](int spread) {
    const std::uint32_t exponent =
        127u - static_cast<std::uint32_t>(spread) + random() % (2 * static_cast<std::uint32_t>(spread) + 1);
    return float_from_bits((random() & 0x807fffffu) | exponent << 23);
  };
  const auto around = [&](float down, float up, long double exact, const char* what) {
    check(down <= exact && exact <= up, what);
    check(down == up || std::nextafterf(down, HUGE_VALF) == up, what);
    if (down == up) check(down == exact, what);
  };
  for (int i = 0; i < 300000; ++i) {
    // The 64 bits of long double hold sums of products whose exponents are this close.
    const float a = any(3), b = any(3), c = any(6);
    around(add_down(a, b), add_up(a, b), static_cast<long double>(a) + b, "add");
    around(multiply_down(a, b), multiply_up(a, b), static_cast<long double>(a) * b, "multiply");
    around(fma_down(a, b, c), fma_up(a, b, c), static_cast<long double>(a) * b + c, "fma");
    const float x = std::fabs(any(100));
    const float down = sqrt_down(x), up = sqrt_up(x);
    check(static_cast<double>(down) * down <= x && static_cast<double>(up) * up >= x, "sqrt");
    check(down == up || std::nextafterf(down, HUGE_VALF) == up, "sqrt");
  }
  const float huge = std::numeric_limits<float>::max();
  check(add_up(huge, huge) == HUGE_VALF && add_down(huge, huge) == huge && add_up(-huge, -huge) == -huge, "overflow");
  check(add_up(1.0f, 1e-30f) == std::nextafterf(1.0f, 2.0f) && add_down(1.0f, 1e-30f) == 1.0f, "a far smaller term");
  check(add_down(1.0f, -1e-30f) == std::nextafterf(1.0f, 0.0f) && add_up(1.0f, -1e-30f) == 1.0f, "a far smaller term");
  check(multiply_up(1e-30f, 1e-30f) > 0.0f && multiply_down(1e-30f, 1e-30f) == 0.0f, "underflow");
  check(add_up(HUGE_VALF, 1.0f) == HUGE_VALF && multiply_down(HUGE_VALF, 2.0f) == HUGE_VALF, "infinity");
  check(is_nan(add_up(NAN, 1.0f)) && is_nan(fma_down(1.0f, NAN, 1.0f)) && is_nan(sqrt_up(NAN)), "NaN");
  check(sqrt_up(0.0f) == 0.0f && sqrt_down(0.0f) == 0.0f && sqrt_up(HUGE_VALF) == HUGE_VALF, "sqrt at the ends");
  check(std::signbit(add_down(1.0f, -1.0f)) && !std::signbit(add_up(1.0f, -1.0f)), "zeros");
  check(one_unless_greater(NAN, 1.0f) == 1.0f && one_unless_greater(1.0f, NAN) == 1.0f, "a NaN is not greater");
  check(one_unless_greater(2.0f, 2.0f) == 1.0f && one_unless_greater(3.0f, 2.0f) == 0.0f, "one unless greater");
  check(minimum(NAN, 1.0f) == 1.0f && maximum(1.0f, NAN) == 1.0f, "minimum and maximum of NaN");
  check(std::signbit(minimum(0.0f, -0.0f)) && !std::signbit(maximum(-0.0f, 0.0f)), "minimum and maximum of zeros");
}

}  // namespace

void test_numbers() {
  test_conversions<Half>(0x7c00);
  test_conversions<BFloat16>(0x7f80);
  test_directed_rounding();
}

}  // namespace sn::cuda
