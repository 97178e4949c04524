// exp and tanh over the lanes of an instruction set `S` (see simd_portable.h for what S offers).
#pragma once

#include <cstdint>

namespace llfast {

template <class S>
inline typename S::F32 splat(float value) {
  return value - typename S::F32{};  // a scalar and a vector: every lane (and -0 stays -0)
}

// The lowest exponent that matters: e^-104 rounds to 0, and exp_nonpositive takes nothing lower. A
// NaN stays.
template <class S>
inline typename S::F32 clamp_exponent(typename S::F32 x) {
  const typename S::F32 lowest = splat<S>(-104.0f);
  return x < lowest ? lowest : x;
}

// e^x for -104 <= x <= 0 within 2 ulp, subnormal results included; NaN gives NaN. Range reduction
// by ln 2 in two parts and the degree-5 polynomial of Cephes' expf.
template <class S>
inline typename S::F32 exp_nonpositive(typename S::F32 x) {
  using F32 = typename S::F32;
  // Adding 1.5 * 2^23 rounds to the nearest integer and leaves it in the low bits.
  const F32 rounding = splat<S>(12582912.0f);
  const F32 shifted = S::mul_add(x, splat<S>(1.44269504088896341f), rounding);
  const F32 n = shifted - rounding;
  F32 r = S::mul_add(n, splat<S>(-0.693359375f), x);
  r = S::mul_add(n, splat<S>(2.12194440e-4f), r);
  F32 p = splat<S>(1.9875691500e-4f);
  p = S::mul_add(p, r, splat<S>(1.3981999507e-3f));
  p = S::mul_add(p, r, splat<S>(8.3334519073e-3f));
  p = S::mul_add(p, r, splat<S>(4.1665795894e-2f));
  p = S::mul_add(p, r, splat<S>(1.6666665459e-1f));
  p = S::mul_add(p, r, splat<S>(5.0000001201e-1f));
  p = S::mul_add(p, r * r, r) + 1.0f;
  if constexpr (S::kScales) {
    return S::scale(p, n);
  } else {
    // 2^n as two factors, because 2^-150 has no fp32 of its own: the same bits.
    using I32 = typename S::I32;
    const I32 power = (I32)shifted - (I32)rounding;
    const I32 half = power >> 1;
    return p * (F32)((half + 127) << 23) * (F32)((power - half + 127) << 23);
  }
}

// tanh within 2 ulp: Cephes' tanhf below 0.625, where 1 - e^-2x would cancel.
template <class S>
inline typename S::F32 tanh(typename S::F32 x) {
  using F32 = typename S::F32;
  using I32 = typename S::I32;
  const I32 sign = (I32)x & (I32)splat<S>(-0.0f);
  const F32 magnitude = (F32)((I32)x ^ sign);
  const F32 square = x * x;
  F32 p = splat<S>(-5.70498872745e-3f);
  p = S::mul_add(p, square, splat<S>(2.06390887954e-2f));
  p = S::mul_add(p, square, splat<S>(-5.37397155531e-2f));
  p = S::mul_add(p, square, splat<S>(1.33314422036e-1f));
  p = S::mul_add(p, square, splat<S>(-3.33332819422e-1f));
  const F32 small = S::mul_add(p * square, x, x);
  const F32 e = exp_nonpositive<S>(clamp_exponent<S>(magnitude * -2.0f));
  const F32 large = (F32)((I32)((1.0f - e) / (1.0f + e)) | sign);
  return magnitude < splat<S>(0.625f) ? small : large;
}

}  // namespace llfast
