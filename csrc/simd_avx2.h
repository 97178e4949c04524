// Eight lanes: AVX2, FMA and F16C. Included under the target pragma of group_avx2.cpp.
#pragma once

#include <immintrin.h>

#include "simd_types.h"

namespace llfast {

struct Avx2 {
  using F32 = __m256;
  using I32 = std::int32_t __attribute__((vector_size(32)));
  static constexpr int kLanes = 8;
  static constexpr bool kScales = false;
  static constexpr int kRows = 3;  // 3 x 4 sums, 3 hidden vectors and 1 of the head: 16 registers
  static constexpr std::int64_t kDepthBytes = 3072;

  static F32 load(const float* from) { return _mm256_loadu_ps(from); }

  static F32 load(const BFloat16* from) {
    const __m128i halves = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(halves), 16));
  }

  static F32 load(const Float16* from) {
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
  }

  static F32 mul_add(F32 a, F32 b, F32 c) { return _mm256_fmadd_ps(a, b, c); }

  // The sums of four vectors: neighbours, then neighbouring pairs, then the two halves.
  static void store_sums(F32 a, F32 b, F32 c, F32 d, float* to) {
    const __m256 quarters = _mm256_hadd_ps(_mm256_hadd_ps(a, b), _mm256_hadd_ps(c, d));
    _mm_storeu_ps(to,
                  _mm_add_ps(_mm256_castps256_ps128(quarters), _mm256_extractf128_ps(quarters, 1)));
  }
};

}  // namespace llfast
