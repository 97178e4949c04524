#include "token_logprobs.h"

#include <algorithm>
#include <cmath>
#include <memory>
#include <new>
#include <vector>

#include "group_kernel.h"
#include "parallel.h"

namespace llfast {
namespace {

constexpr std::int64_t kMiB = std::int64_t{1} << 20;
constexpr std::int64_t kBlockRows = 48;                // a multiple of every register block
constexpr std::int64_t kHiddenFloats = 2 * kMiB / 4;   // of one thread's block of hidden rows
constexpr std::int64_t kPartialsPerThread = kMiB / 8;  // of a slice of rows
constexpr std::int64_t kProductsPerThread = 1 << 20;   // fewer do not repay starting a thread

// Floats on cache lines, all zero, so that padding never holds a stray NaN.
class AlignedFloats {
 public:
  explicit AlignedFloats(std::int64_t size)
      : data_(static_cast<float*>(::operator new(sizeof(float) * size, kAlignment))) {
    std::fill_n(data_, size, 0.0f);
  }
  AlignedFloats(const AlignedFloats&) = delete;
  AlignedFloats& operator=(const AlignedFloats&) = delete;
  ~AlignedFloats() { ::operator delete(data_, kAlignment); }

  float* get() const { return data_; }

 private:
  static constexpr std::align_val_t kAlignment{64};
  float* data_;
};

// What one thread works in.
struct Workspace {
  Workspace(std::int64_t rows, std::int64_t width)
      : hidden(rows * depth_blocks(width) * hidden_row_size(width)),
        weights(kWords * (kDepth + kRowPadding)),
        scores(rows * kChunk),
        bias(kChunk) {}

  Scratch scratch() const { return {hidden.get(), weights.get(), scores.get(), bias.get()}; }

  AlignedFloats hidden;
  AlignedFloats weights;
  AlignedFloats scores;
  AlignedFloats bias;
};

Kernels kernels_for(InstructionSet set) {
#if defined(__x86_64__)
  if (set == InstructionSet::kAvx512) return avx512_kernels();
  if (set == InstructionSet::kAvx2) return avx2_kernels();
#endif
  static_cast<void>(set);
  return portable_kernels();
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

bool token_logprobs(const LogprobProblem& problem, InstructionSet set, int threads,
                    const std::function<bool()>& interrupted) {
  const Kernels kernels = kernels_for(set);
  const GroupKernel kernel = kernel_for(kernels, problem.dtype);
  const std::int64_t groups = (problem.vocabulary + kGroup - 1) / kGroup;

  // A thread is worth starting for a million products; in floating point, which cannot overflow.
  const double products = static_cast<double>(problem.tokens) *
                          static_cast<double>(problem.vocabulary) *
                          static_cast<double>(problem.width);
  threads = static_cast<int>(std::clamp(products / kProductsPerThread, 1.0, threads * 1.0));

  // None of these sizes can change a bit, see group_kernel.h.
  const std::int64_t row_floats = depth_blocks(problem.width) * hidden_row_size(problem.width);
  const std::int64_t block_rows =
      std::min(problem.tokens, std::clamp<std::int64_t>(kHiddenFloats / row_floats, 1, kBlockRows));
  const std::int64_t slice_blocks =
      std::max<std::int64_t>(threads * kPartialsPerThread / groups / block_rows, 1);
  const std::int64_t slice_rows = std::min(problem.tokens, slice_blocks * block_rows);
  std::vector<Partial> partials(static_cast<std::size_t>(groups * slice_rows));
  std::vector<float> target_logits(static_cast<std::size_t>(slice_rows));

  for (std::int64_t slice = 0; slice < problem.tokens; slice += slice_rows) {
    const std::int64_t rows = std::min(slice_rows, problem.tokens - slice);
    const std::int64_t blocks = (rows + block_rows - 1) / block_rows;
    const auto make_worker = [&]() -> Worker {
      const auto workspace = std::make_shared<const Workspace>(block_rows, problem.width);
      return [&, workspace](std::int64_t task) {
        // All blocks of rows visit a group before the next group: its weights stay in cache.
        const std::int64_t group = task / blocks;
        const std::int64_t row = task % blocks * block_rows;
        kernel(problem,
               {slice + row, std::min(block_rows, rows - row), group,
                partials.data() + group * slice_rows + row, target_logits.data() + row},
               workspace->scratch());
      };
    };
    if (!run_tasks(blocks * groups, threads, make_worker, interrupted)) return false;

    for (std::int64_t row = 0; row < rows; ++row) {
      const Partial total = kernels.fold(partials.data() + row, groups, slice_rows);
      // (z - max) first: z and log-sum-exp are both large, their difference need not be.
      problem.logprobs[slice + row] =
          static_cast<float>(static_cast<double>(target_logits[static_cast<std::size_t>(row)]) -
                             total.max - std::log(static_cast<double>(total.sum)));
    }
  }
  return true;
}

}  // namespace llfast
