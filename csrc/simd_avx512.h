// Sixteen lanes: AVX-512 F, BW, DQ and VL. Included under the target pragma of group_avx512.cpp.
#pragma once

#include <immintrin.h>

#include "simd_types.h"

namespace llfast {

struct Avx512 {
  using F32 = __m512;
  using I32 = std::int32_t __attribute__((vector_size(64)));
  static constexpr int kLanes = 16;
  static constexpr int kRows = 6;  // 6 x 4 sums, 6 hidden vectors and 1 of the head: 31 registers
  static constexpr std::int64_t kDepthBytes = 4096;

  static F32 load(const float* from) { return _mm512_loadu_ps(from); }

  static F32 load(const BFloat16* from) {
    const __m256i halves = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16));
  }

  static F32 load(const Float16* from) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
  }

  // x * 2^power in one instruction, also where 2^power has no fp32 of its own.
  static constexpr bool kScales = true;
  static F32 scale(F32 x, F32 power) { return _mm512_scalef_ps(x, power); }

  static F32 mul_add(F32 a, F32 b, F32 c) { return _mm512_fmadd_ps(a, b, c); }

  // The sums of four vectors: quarters 0 + 2 and 1 + 3, those two, then the four lanes left.
  static void store_sums(F32 a, F32 b, F32 c, F32 d, float* to) {
    const __m512 ab = fold_quarters<0x44, 0xee>(a, b);
    const __m512 cd = fold_quarters<0x44, 0xee>(c, d);
    __m512 sums = fold_quarters<0x88, 0xdd>(ab, cd);
    sums = _mm512_add_ps(sums, _mm512_permute_ps(sums, 0x4e));
    sums = _mm512_add_ps(sums, _mm512_permute_ps(sums, 0xb1));
    const __m512i first_of_quarters =
        _mm512_setr_epi32(0, 4, 8, 12, 0, 4, 8, 12, 0, 4, 8, 12, 0, 4, 8, 12);
    _mm_storeu_ps(to, _mm512_castps512_ps128(_mm512_permutexvar_ps(first_of_quarters, sums)));
  }

 private:
  template <int kFirst, int kSecond>
  static F32 fold_quarters(F32 a, F32 b) {
    return _mm512_add_ps(_mm512_shuffle_f32x4(a, b, kFirst), _mm512_shuffle_f32x4(a, b, kSecond));
  }
};

}  // namespace llfast
