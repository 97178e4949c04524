#include "partials.h"

#include <algorithm>
#include <cmath>
#include <memory>
#include <new>

#include "group_kernel.h"
#include "parallel.h"

namespace llfast {
namespace {

constexpr std::int64_t kBlockRows = 96;               // a multiple of every register block
constexpr std::int64_t kHiddenBytes = 2 << 20;        // of one thread's block of hidden rows
constexpr std::int64_t kProductsPerThread = 1 << 20;  // fewer do not repay starting a thread
constexpr std::size_t kAlignment = 64;

// Bytes on cache lines, all zero, so that padding never holds a stray NaN.
class AlignedBytes {
 public:
  explicit AlignedBytes(std::int64_t size)
      : data_(static_cast<char*>(
            ::operator new(static_cast<std::size_t>(size), std::align_val_t{kAlignment}))) {
    std::fill_n(data_, size, '\0');
  }
  AlignedBytes(const AlignedBytes&) = delete;
  AlignedBytes& operator=(const AlignedBytes&) = delete;
  ~AlignedBytes() { ::operator delete(data_, std::align_val_t{kAlignment}); }

  template <class T>
  T* as() const {
    return reinterpret_cast<T*>(data_);
  }

 private:
  char* data_;
};

// What one thread works in, for some rows of D elements.
class Workspace {
 public:
  Workspace(std::int64_t rows, std::int64_t width, std::int64_t depth_bytes)
      : hidden_(rows * row_bytes(width, depth_bytes)),
        weights_(kWords * depth_of(width, sizeof(float), depth_bytes).row_size * kFloat),
        scores_(rows * kChunk * kFloat),
        bias_(kChunk * kFloat),
        partials_(rows * static_cast<std::int64_t>(sizeof(Partial))) {}

  Scratch scratch() const {
    return {hidden_.as<void>(), weights_.as<float>(), scores_.as<float>(), bias_.as<float>(),
            partials_.as<Partial>()};
  }

  // Of a copied row: it is multiplied in fp32, or in bf16 as it is, which may need more padding.
  static std::int64_t row_bytes(std::int64_t width, std::int64_t depth_bytes) {
    const auto bytes = [&](std::int64_t element_bytes) {
      const Depth depth = depth_of(width, element_bytes, depth_bytes);
      return depth.blocks * depth.row_size * element_bytes;
    };
    return std::max(bytes(sizeof(float)), bytes(sizeof(std::uint16_t)));
  }

 private:
  static constexpr std::int64_t kFloat = sizeof(float);

  AlignedBytes hidden_;
  AlignedBytes weights_;
  AlignedBytes scores_;
  AlignedBytes bias_;
  AlignedBytes partials_;
};

Kernels kernels_for(InstructionSet set) {
  switch (set) {
#if defined(__x86_64__)
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
  const Kernels kernels = kernels_for(set);
  const GroupKernel kernel = kernel_for(kernels, problem.dtype);
  const std::int64_t groups = groups_of(problem.vocabulary);

  // A thread is worth starting for a million products; in floating point, which cannot overflow.
  const double products = static_cast<double>(problem.tokens) *
                          static_cast<double>(problem.vocabulary) *
                          static_cast<double>(problem.width);
  threads = static_cast<int>(std::clamp(products / kProductsPerThread, 1.0, threads * 1.0));

  const std::int64_t row_bytes = Workspace::row_bytes(problem.width, kernels.depth_bytes);
  const std::int64_t most_rows =
      std::clamp<std::int64_t>(std::min(kHiddenBytes / row_bytes, problem.tokens), 1, kBlockRows);
  const std::int64_t blocks = (problem.tokens + most_rows - 1) / most_rows;
  const auto make_worker = [&]() -> Worker {
    const auto workspace =
        std::make_shared<const Workspace>(most_rows, problem.width, kernels.depth_bytes);
    return [&, workspace](std::int64_t task) {
      // All blocks of rows visit a group before the next group: its weights stay in cache.
      const std::int64_t row = task % blocks * most_rows;
      kernel(problem, {row, std::min(most_rows, problem.tokens - row), task / blocks},
             workspace->scratch(), parts);
    };
  };
  return run_tasks(blocks * groups, threads, make_worker, interrupted);
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
