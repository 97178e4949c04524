// Four lanes in the vector extensions of GCC and clang: SSE2 on x86-64, NEON on AArch64.
#pragma once

#include <cstdint>
#include <cstring>

#include "simd_types.h"

namespace llfast {

struct Portable {
  using F32 = float __attribute__((vector_size(16)));
  using I32 = std::int32_t __attribute__((vector_size(16)));
  static constexpr int kLanes = 4;
  static constexpr bool kScales = false;
  static constexpr int kRows = 2;  // hidden rows of the register block: 2 x 4 sums in 16 registers
  static constexpr std::int64_t kDepthBytes = 3072;

  static F32 load(const float* from) {
    F32 to;
    std::memcpy(&to, from, sizeof to);
    return to;
  }

  static F32 load(const BFloat16* from) {
    return F32{from[0].value(), from[1].value(), from[2].value(), from[3].value()};
  }

  static F32 load(const Float16* from) {
    return F32{from[0].value(), from[1].value(), from[2].value(), from[3].value()};
  }

  // Two roundings: the build says -ffp-contract=off, so that no target fuses some of them.
  static F32 mul_add(F32 a, F32 b, F32 c) { return a * b + c; }

  // The sums of four vectors, each (0 + 2) + (1 + 3).
  static void store_sums(F32 a, F32 b, F32 c, F32 d, float* to) {
    const F32 sums = {(a[0] + a[2]) + (a[1] + a[3]), (b[0] + b[2]) + (b[1] + b[3]),
                      (c[0] + c[2]) + (c[1] + c[3]), (d[0] + d[2]) + (d[1] + d[3])};
    std::memcpy(to, &sums, sizeof sums);
  }
};

}  // namespace llfast
