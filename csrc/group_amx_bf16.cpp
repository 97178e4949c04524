// The headers of the system come first: the pragma below is for our own code alone.
#if defined(__x86_64__)
#include <immintrin.h>

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>

#include "group_kernel.h"
#include "simd_types.h"

#if defined(__clang__)
#pragma clang attribute push(                                                 \
    __attribute__((target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl," \
                          "avx512bf16,amx-tile,amx-bf16"))),                  \
    apply_to = function)
#else
// GCC 12 calls the undefined lanes of its own intrinsics uninitialised (its bug 105593).
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,amx-tile,amx-bf16")
#endif

#include "amx_kernel_impl.h"

namespace llfast {

Kernels amx_bf16_kernels() {
  Kernels kernels = avx512_bf16_kernels();
  kernels.bfloat16 = {AmxKernel::size, AmxKernel::run};
  return kernels;
}

}  // namespace llfast

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif  // __x86_64__
