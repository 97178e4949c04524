// The kernel of group_kernel.h, once for all instruction sets.
//
// Each group_<set>.cpp includes this under its own target pragma. Everything here is a template
// over the set `S`, and nothing calls a template of the standard library: the linker merges
// functions of one name, and could otherwise give the whole program a copy that holds newer
// instructions.
#pragma once

#include <cstdint>
#include <cstring>

#include "group_kernel.h"
#include "simd_types.h"
#include "vector_math.h"

#if defined(__clang__)
#define LLFAST_UNROLL _Pragma("unroll")
#else
#define LLFAST_UNROLL _Pragma("GCC unroll 8")
#endif

namespace llfast {

template <class S>
struct GroupKernelOf {
  using F32 = typename S::F32;
  static constexpr int kLanes = S::kLanes;
  static constexpr float kInfinity = __builtin_huge_valf();

  static Kernels table() { return {run<float>, run<BFloat16>, run<Float16>, fold}; }

  template <class T>
  static void run(const LogprobProblem& problem, const GroupTask& task, const Scratch& scratch) {
    copy_hidden<T>(problem, task, scratch.hidden);
    for (std::int64_t row = 0; row < task.rows; ++row) task.partials[row] = {-kInfinity, 0.0f};
    const std::int64_t begin = task.group * kGroup;
    const std::int64_t end = smaller(begin + kGroup, problem.vocabulary);
    for (std::int64_t word = begin; word < end; word += kChunk) {
      const std::int64_t words = smaller(kChunk, end - word);
      multiply<T>(problem, task.rows, word, words, scratch);
      if (problem.bias != nullptr) {
        std::memcpy(scratch.bias, problem.bias + word, sizeof(float) * words);
      }
      for (std::int64_t row = 0; row < task.rows; ++row) {
        float* scores = scratch.scores + row * kChunk;
        finish_logits(problem, words, scratch.bias, scores);
        const std::int64_t target = problem.targets[task.row_begin + row] - word;
        if (target >= 0 && target < words) task.target_logits[row] = scores[target];
        task.partials[row] = merge(task.partials[row], summarise(scores, words));
      }
    }
  }

  static Partial fold(const Partial* partials, std::int64_t count, std::int64_t stride) {
    Partial total = partials[0];
    for (std::int64_t i = 1; i < count; ++i) total = merge(total, partials[i * stride]);
    return total;
  }

 private:
  static constexpr std::int64_t smaller(std::int64_t a, std::int64_t b) { return a < b ? a : b; }

  // The task's hidden rows in fp32, padded with zeros, one block of depth after the other.
  template <class T>
  static void copy_hidden(const LogprobProblem& problem, const GroupTask& task, float* to) {
    const std::int64_t row_size = hidden_row_size(problem.width);
    for (std::int64_t depth = 0; depth < problem.width; depth += kDepth) {
      const std::int64_t size = smaller(kDepth, problem.width - depth);
      for (std::int64_t row = 0; row < task.rows; ++row, to += row_size) {
        const T* from = static_cast<const T*>(problem.hidden) +
                        (task.row_begin + row) * problem.hidden_stride + depth;
        copy_row(from, size, to);
      }
    }
  }

  // scores[row][j] = h . w over all of D, for `words` words (a few more columns are overwritten).
  template <class T>
  static void multiply(const LogprobProblem& problem, std::int64_t rows, std::int64_t word,
                       std::int64_t words, const Scratch& scratch) {
    const std::int64_t row_size = hidden_row_size(problem.width);
    const float* hidden = scratch.hidden;
    for (std::int64_t depth = 0; depth < problem.width; depth += kDepth) {
      const std::int64_t size = smaller(kDepth, problem.width - depth);
      for (std::int64_t j = 0; j < words; j += kWords) {
        const T* weights[kWords];
        for (int k = 0; k < kWords; ++k) {
          // Past the end the last word is repeated; finish_logits drops what comes of it.
          const std::int64_t index = word + smaller(j + k, words - 1);
          weights[k] =
              static_cast<const T*>(problem.lm_head) + index * problem.lm_head_stride + depth;
        }
        float* scores = scratch.scores + j;
        if (sizeof(T) < sizeof(float) && rows > S::kRows) {
          // Several blocks of rows share one conversion, which is exact and changes no bit.
          const float* converted[kWords];
          for (int k = 0; k < kWords; ++k) {
            float* to = scratch.weights + k * (kDepth + kRowPadding);
            copy_row(weights[k], size, to);
            converted[k] = to;
          }
          multiply_rows(rows, hidden, row_size, converted, size, depth > 0, scores);
        } else {
          multiply_rows(rows, hidden, row_size, weights, size, depth > 0, scores);
        }
      }
      hidden += rows * row_size;
    }
  }

  template <class T>
  static void multiply_rows(std::int64_t rows, const float* hidden, std::int64_t row_size,
                            const T* const* weights, std::int64_t size, bool add, float* scores) {
    for (std::int64_t row = 0; row < rows; row += S::kRows) {
      multiply_some<T, S::kRows>(rows - row, hidden + row * row_size, row_size, weights, size, add,
                                 scores + row * kChunk);
    }
  }

  // multiply_block for min(rows, kRows) rows: the order of the sums is the same for each.
  template <class T, int kRows>
  static void multiply_some(std::int64_t rows, const float* hidden, std::int64_t row_size,
                            const T* const* weights, std::int64_t size, bool add, float* scores) {
    if constexpr (kRows > 1) {
      if (rows < kRows) {
        multiply_some<T, kRows - 1>(rows, hidden, row_size, weights, size, add, scores);
        return;
      }
    }
    multiply_block<T, kRows>(hidden, row_size, weights, size, add, scores);
  }

  // The register block: lanes run along D, so neither operand is packed and every product is summed
  // in one order, whatever its neighbours are.
  template <class T, int kRows>
  static void multiply_block(const float* hidden, std::int64_t row_size, const T* const* weights,
                             std::int64_t size, bool add, float* scores) {
    // Without unrolling, GCC keeps `sums` in memory.
    F32 sums[kRows][kWords] = {};
    std::int64_t i = 0;
    for (; i + kLanes <= size; i += kLanes) {
      F32 h[kRows];
      LLFAST_UNROLL
      for (int row = 0; row < kRows; ++row) h[row] = S::load(hidden + row * row_size + i);
      LLFAST_UNROLL
      for (int k = 0; k < kWords; ++k) {
        const F32 w = S::load(weights[k] + i);
        LLFAST_UNROLL
        for (int row = 0; row < kRows; ++row) sums[row][k] = S::mul_add(h[row], w, sums[row][k]);
      }
    }
    if (i < size) {
      LLFAST_UNROLL
      for (int k = 0; k < kWords; ++k) {
        const F32 w = load_tail(weights[k] + i, size - i);
        LLFAST_UNROLL
        for (int row = 0; row < kRows; ++row) {
          sums[row][k] = S::mul_add(S::load(hidden + row * row_size + i), w, sums[row][k]);
        }
      }
    }
    LLFAST_UNROLL
    for (int row = 0; row < kRows; ++row) {
      float block[kWords];
      S::store_sums(sums[row][0], sums[row][1], sums[row][2], sums[row][3], block);
      float* to = scores + row * kChunk;
      for (int k = 0; k < kWords; ++k) to[k] = add ? to[k] + block[k] : block[k];
    }
  }

  // Products become logits in place; columns from `words` to the next whole vector become -inf.
  static void finish_logits(const LogprobProblem& problem, std::int64_t words, const float* bias,
                            float* scores) {
    const bool scaled = problem.scale != 1.0f;
    const bool capped = problem.softcap != 0.0f;
    if (problem.bias != nullptr || scaled || capped) {
      for (std::int64_t j = 0; j < words; j += kLanes) {
        F32 z = S::load(scores + j);
        if (problem.bias != nullptr) z = z + S::load(bias + j);
        z = z * problem.scale;
        if (capped) z = problem.softcap * tanh<S>(z / problem.softcap);
        store(z, scores + j);
      }
    }
    for (std::int64_t j = words; j % kLanes != 0; ++j) scores[j] = -kInfinity;
  }

  // A NaN may or may not win the maximum, but always reaches the sum.
  static Partial summarise(const float* scores, std::int64_t words) {
    F32 maxima = S::load(scores);
    for (std::int64_t j = kLanes; j < words; j += kLanes) {
      const F32 z = S::load(scores + j);
      maxima = z > maxima ? z : maxima;
    }
    float max = -kInfinity;
    for (int lane = 0; lane < kLanes; ++lane) max = maxima[lane] > max ? maxima[lane] : max;
    // -inf - (-inf) would be NaN where every word of the chunk is ruled out.
    const float shift = max == -kInfinity ? 0.0f : max;
    F32 sums = {};
    for (std::int64_t j = 0; j < words; j += kLanes) {
      sums = sums + exp_nonpositive<S>(S::load(scores + j) - shift);
    }
    float total[kWords];
    S::store_sums(sums, F32{}, F32{}, F32{}, total);
    return {max, total[0]};
  }

  static Partial merge(Partial left, Partial right) {
    const float max = left.max > right.max ? left.max : right.max;
    if (max == -kInfinity) return {max, left.sum + right.sum};
    F32 x = {};
    x[0] = left.max - max;
    x[1] = right.max - max;
    const F32 e = exp_nonpositive<S>(x);
    return {max, left.sum * e[0] + right.sum * e[1]};
  }

  // A row in fp32, with zeros up to a whole vector.
  template <class T>
  static void copy_row(const T* from, std::int64_t size, float* to) {
    std::int64_t i = 0;
    for (; i + kLanes <= size; i += kLanes) store(S::load(from + i), to + i);
    if (i < size) store(load_tail(from + i, size - i), to + i);
  }

  static void store(F32 from, float* to) { std::memcpy(to, &from, sizeof from); }

  template <class T>
  static F32 load_tail(const T* from, std::int64_t size) {
    T padded[kLanes] = {};
    std::memcpy(padded, from, sizeof(T) * size);
    return S::load(padded);
  }
};

}  // namespace llfast
