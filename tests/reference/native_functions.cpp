// exp, tanh and the half-precision loads of one instruction set, LLFAST_TEST_SET, against libm and
// the definition of the format. Prints what is wrong and exits with 1.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <iostream>
#include <limits>
#include <string>

#include "simd_portable.h"
#if defined(__AVX2__)
#include "simd_avx2.h"
#endif
#if defined(__AVX512F__)
#include "simd_avx512.h"
#endif
#if defined(__AVX512BF16__)
#include "simd_avx512_bf16.h"
#endif
#if defined(__AMX_BF16__)
#include "amx_softmax.h"
#endif
#include "vector_math.h"

namespace {

int failures = 0;

void expect(bool holds, const std::string& what) {
  if (holds) return;
  ++failures;
  std::cerr << "failed: " << what << '\n';
}

std::uint32_t bits_of(float value) {
  std::uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

// |value - truth| in units of truth's last fp32 place, which is 2^-149 below 2^-126.
double error_in_ulp(float value, double truth) {
  const int exponent = std::max(std::ilogb(truth), -126) - 23;
  return std::abs(value - truth) / std::ldexp(1.0, exponent);
}

// exp and tanh at every 1009th float of their domains, and the exact conversion of every half.
void check_functions() {
  using S = llfast::LLFAST_TEST_SET;
  constexpr float kInfinity = std::numeric_limits<float>::infinity();
  const auto exp_of = [](float x) {
    return llfast::exp_nonpositive<S>(llfast::clamp_exponent<S>(llfast::splat<S>(x)));
  };
  double worst_exp = 0;
  double worst_tanh = 0;
  for (std::uint32_t bits = 0; bits <= bits_of(110.0f); bits += 1009) {
    const float x = -llfast::float_of_bits(bits);
    const auto exp = exp_of(x);
    worst_exp = std::fmax(worst_exp, error_in_ulp(exp[S::kLanes - 1], std::exp(double{x})));
    const auto tanh = llfast::tanh<S>(llfast::splat<S>(x));
    worst_tanh = std::fmax(worst_tanh, error_in_ulp(tanh[0], std::tanh(double{x})));
  }
  std::cout << "exp within " << worst_exp << " ulp, tanh within " << worst_tanh << '\n';
  expect(worst_exp <= 2, "exp is off");
  expect(worst_tanh <= 2, "tanh is off");
  expect(exp_of(0.0f)[0] == 1.0f, "exp(0)");
  expect(exp_of(-kInfinity)[0] == 0.0f, "exp(-inf)");
  expect(std::isnan(exp_of(NAN)[0]), "exp(NaN)");
  expect(llfast::tanh<S>(llfast::splat<S>(kInfinity))[0] == 1.0f, "tanh(inf)");
  expect(llfast::tanh<S>(llfast::splat<S>(-kInfinity))[0] == -1.0f, "tanh(-inf)");
  expect(std::isnan(llfast::tanh<S>(llfast::splat<S>(NAN))[0]), "tanh(NaN)");

  for (std::uint32_t bits = 0; bits < 0x10000; ++bits) {
    llfast::Float16 half[S::kLanes] = {};
    half[S::kLanes - 1].bits = static_cast<std::uint16_t>(bits);
    const float value = S::load(half)[S::kLanes - 1];
    const int exponent = (bits >> 10) & 31;
    const int fraction = bits & 1023;
    const double sign = (bits & 0x8000) != 0 ? -1.0 : 1.0;
    const double truth =
        exponent == 0 ? std::ldexp(fraction, -24) : std::ldexp(1024 + fraction, exponent - 25);
    if (exponent == 31) {
      expect(fraction == 0 ? value == sign * kInfinity : std::isnan(value), "fp16 infinity");
    } else {
      expect(value == sign * truth && std::signbit(value) == (sign < 0), "fp16 value");
    }
  }
}

}  // namespace

int main() {
  check_functions();
  return failures == 0 ? 0 : 1;
}
