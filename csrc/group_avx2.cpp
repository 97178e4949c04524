// The headers of the system come first: the pragma below is for our own code alone.
#if defined(__x86_64__)
#include <immintrin.h>

#include <cstdint>
#include <cstring>
#include <functional>

#include "group_kernel.h"
#include "simd_types.h"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c")
#endif

#include "group_kernel_impl.h"
#include "simd_avx2.h"

namespace llfast {

Kernels avx2_kernels() { return GroupKernelOf<Avx2>::table(); }

}  // namespace llfast

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif  // __x86_64__
