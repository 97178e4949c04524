#include "group_kernel_impl.h"
#include "simd_portable.h"

namespace llfast {

Kernels portable_kernels() { return GroupKernelOf<Portable>::table(); }

}  // namespace llfast
