// AVX-512 with BF16: thirty-two products of bf16 in one instruction, summed in fp32. Included under
// the target pragma of group_avx512_bf16.cpp.
#pragma once

#include <immintrin.h>

#include "group_kernel_impl.h"
#include "simd_avx512.h"

namespace llfast {

struct Avx512BFloat16 : Avx512 {
  using Avx512::load;
  using Avx512::mul_add;

  // Thirty-two numbers as they are; a lane of a product adds those of one pair.
  static __m512bh load(const BFloat16* from) { return (__m512bh)_mm512_loadu_si512(from); }

  // The processor takes subnormal factors and results for zeros here.
  static F32 mul_add(__m512bh a, __m512bh b, F32 c) { return _mm512_dpbf16_ps(c, a, b); }
};

template <>
struct OperandsOf<Avx512BFloat16, BFloat16> {
  using Hidden = BFloat16;
  static constexpr int kStep = 32;
};

}  // namespace llfast
