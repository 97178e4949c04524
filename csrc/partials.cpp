#include "partials.h"

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <memory>
#include <new>

#include "group_kernel.h"
#include "parallel.h"

namespace llfast {
namespace {

constexpr std::int64_t kProductsPerThread = 1 << 20;  // fewer do not repay starting a thread

// Bytes on cache lines, all zero.
class AlignedBytes {
 public:
  explicit AlignedBytes(std::int64_t size)
      : data_(static_cast<std::byte*>(::operator new(static_cast<std::size_t>(size), kAlignment))) {
    std::fill_n(data_, size, std::byte{0});
  }
  AlignedBytes(const AlignedBytes&) = delete;
  AlignedBytes& operator=(const AlignedBytes&) = delete;
  ~AlignedBytes() { ::operator delete(data_, kAlignment); }

  std::byte* data() const { return data_; }

 private:
  static constexpr std::align_val_t kAlignment{kCacheLine};

  std::byte* data_;
};

Kernels kernels_for(InstructionSet set) {
  switch (set) {
#if defined(__x86_64__)
    case InstructionSet::kAmxBFloat16:
      return amx_bf16_kernels();
    case InstructionSet::kAvx512BFloat16:
      return avx512_bf16_kernels();
    case InstructionSet::kAvx512:
      return avx512_kernels();
    case InstructionSet::kAvx2:
      return avx2_kernels();
#endif
    default:
      return portable_kernels();
  }
}

GroupKernel kernel_for(const Kernels& kernels, DType dtype) {
  switch (dtype) {
    case DType::kBFloat16:
      return kernels.bfloat16;
    case DType::kFloat16:
      return kernels.float16;
    case DType::kFloat32:
      break;
  }
  return kernels.float32;
}

}  // namespace

bool head_partials(const HeadProblem& problem, const PartialArrays& parts, InstructionSet set,
                   int threads, const std::function<bool()>& interrupted) {
  if (problem.tokens == 0) return true;
  const Kernels kernels = kernels_for(set);
  const GroupKernel kernel = kernel_for(kernels, problem.dtype);
  const std::int64_t groups = groups_of(problem.vocabulary);

  // A thread is worth starting for a million products; in floating point, which cannot overflow.
  const double products = static_cast<double>(problem.tokens) *
                          static_cast<double>(problem.vocabulary) *
                          static_cast<double>(problem.width);
  threads = static_cast<int>(std::clamp(products / kProductsPerThread, 1.0, threads * 1.0));

  const TaskSize size = kernel.size(problem);
  const std::int64_t blocks = (problem.tokens + size.rows - 1) / size.rows;
  const auto make_worker = [&]() -> Worker {
    const auto scratch = std::make_shared<const AlignedBytes>(size.scratch_bytes);
    return [&, scratch](std::int64_t task) {
      // All blocks of rows visit some groups before the next ones: their weights stay in cache.
      const std::int64_t first = task / (blocks * size.groups) * size.groups;
      const std::int64_t together = std::min(size.groups, groups - first);
      const std::int64_t left = task - first * blocks;
      const std::int64_t row = left / together * size.rows;
      const std::int64_t rows = std::min(size.rows, problem.tokens - row);
      kernel.run(problem, {row, rows, first + left % together}, scratch->data(), parts);
    };
  };
  // After an operation of torch, its threads spin for some milliseconds: new ones would have to
  // share the cores with them.
  return run_tasks(blocks * groups, threads, Helpers::kOpenMp, make_worker, interrupted);
}

void fold_partials(const PartialArrays& parts, std::int64_t count, std::int64_t tokens,
                   const PartialArrays& total, InstructionSet set) {
  const Kernels kernels = kernels_for(set);
  for (std::int64_t token = 0; token < tokens; ++token) {
    Partial folded = total.get(token);
    for (std::int64_t part = 0; part < count; ++part) {
      folded = kernels.merge(folded, parts.get(part * tokens + token));
    }
    total.set(token, folded);
  }
}

void statistics_of(const PartialArrays& total, std::int64_t tokens, const Statistics& statistics) {
  for (std::int64_t token = 0; token < tokens; ++token) {
    const Partial partial = total.get(token);
    const double max = partial.max;
    const double target = partial.target;
    const double log_sum = std::log(static_cast<double>(partial.sum));
    // (z - max) first: z and log-sum-exp are both large, their difference need not be.
    statistics.logprobs[token] = static_cast<float>(target - max - log_sum);
    statistics.lse[token] = static_cast<float>(max + log_sum);
    statistics.target_logits[token] = partial.target;
    statistics.entropy[token] = static_cast<float>(
        log_sum - static_cast<double>(partial.weighted_sum) / static_cast<double>(partial.sum));
    statistics.argmax[token] = partial.argmax;
  }
}

}  // namespace llfast
