// The kernel of group_kernel.h, once for all instruction sets.
//
// Each group_<set>.cpp includes this under its own target pragma. Everything here is a template
// over the set `S`, and nothing calls a template of the standard library: the linker merges
// functions of one name, and could otherwise give the whole program a copy that holds newer
// instructions.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "group_kernel.h"
#include "simd_types.h"
#include "vector_math.h"

namespace llfast {

// What words of type T are multiplied with: everything is fp32, unless a set says otherwise.
template <class S, class T>
struct OperandsOf {
  using Hidden = float;
  static constexpr int kStep = S::kLanes;  // elements of a vector of operands
};

template <class S>
struct GroupKernelOf {
  using F32 = typename S::F32;
  static constexpr int kLanes = S::kLanes;
  static constexpr std::int64_t kFewRows = 16;  // so few wait for memory, not for sums
  static constexpr float kInfinity = __builtin_huge_valf();

  template <class T>
  using Hidden = typename OperandsOf<S, T>::Hidden;

  static Kernels table() {
    return {{size<float>, run<float>},
            {size<BFloat16>, run<BFloat16>},
            {size<Float16>, run<Float16>},
            merge};
  }

  template <class T>
  static TaskSize size(const HeadProblem& problem) {
    const std::int64_t fitting = kHiddenBytes / layout_of<T>(problem, 1).hidden_bytes();
    const std::int64_t rows =
        smaller(smaller(fitting > 0 ? fitting : 1, problem.tokens), kBlockRows);
    return {rows, layout_of<T>(problem, rows).bytes(), 1};
  }

  template <class T>
  static void run(const HeadProblem& problem, const GroupTask& task, std::byte* memory,
                  const PartialArrays& parts) {
    const Scratch scratch = layout_of<T>(problem, task.rows).scratch(memory);
    const Cut cut = cut_of<T>(problem, task.rows);
    copy_hidden<T>(problem, task, cut.depth, scratch);
    const std::int64_t begin = task.group * kGroup;
    const std::int64_t end = smaller(begin + kGroup, problem.vocabulary);
    const std::int64_t id = problem.first_word;
    for (std::int64_t row = 0; row < task.rows; ++row) {
      scratch.partials[row] = {-kInfinity, 0.0f, 0.0f, -kInfinity,
                               static_cast<std::int32_t>(id + begin)};
    }
    for (std::int64_t first = begin; first < end; first += kChunk) {
      const std::int64_t words = smaller(kChunk, end - first);
      const Tile tile = {first, words, (words + kWords - 1) / kWords};
      multiply<T>(problem, cut, tile, scratch);
      copy_bias(problem, tile, scratch.bias);
      for (std::int64_t row = 0; row < task.rows; ++row) {
        float* scores = scratch.scores + row * kChunk;
        finish_logits(problem, tile, scratch.bias, scores);
        Partial& partial = scratch.partials[row];
        const Partial found = summarise(tile, scores, partial.max, id);
        partial = merge(partial, found);
        const std::int64_t target = problem.targets[task.row_begin + row] - id - first;
        if (target >= 0 && target < words) partial.target = scores[tile.slot(target)];
      }
    }
    for (std::int64_t row = 0; row < task.rows; ++row) {
      parts.set(task.group * problem.tokens + task.row_begin + row, scratch.partials[row]);
    }
  }

  static Partial merge(const Partial& left, const Partial& right) {
    const float max = left.max > right.max ? left.max : right.max;
    // At most one side holds the target, the other has -inf; a logit may be NaN.
    const bool is_right = right.target > left.target || __builtin_isnan(right.target);
    Partial both = {max, left.sum + right.sum, left.weighted_sum + right.weighted_sum,
                    is_right ? right.target : left.target,
                    right.max > left.max ? right.argmax : left.argmax};
    if (max == -kInfinity) return both;
    F32 x = {};
    x[0] = left.max - max;
    x[1] = right.max - max;
    const F32 shift = clamp_exponent<S>(x);
    const F32 e = exp_nonpositive<S>(shift);
    both.sum = left.sum * e[0] + right.sum * e[1];
    both.weighted_sum = (left.weighted_sum + left.sum * shift[0]) * e[0] +
                        (right.weighted_sum + right.sum * shift[1]) * e[1];
    return both;
  }

 private:
  static constexpr std::int64_t kBlockRows = 96;         // of a task; a multiple of every kRows
  static constexpr std::int64_t kHiddenBytes = 2 << 20;  // of them

  // Of so many rows, in the type that T is multiplied in.
  template <class T>
  static constexpr Layout layout_of(const HeadProblem& problem, std::int64_t rows) {
    return {depth_of(problem.width, sizeof(Hidden<T>), S::kDepthBytes), sizeof(Hidden<T>), rows};
  }

  // The task's hidden rows, padded with zeros, one block of depth after the other.
  template <class T>
  static void copy_hidden(const HeadProblem& problem, const GroupTask& task, const Depth& depth,
                          const Scratch& scratch) {
    Hidden<T>* to = static_cast<Hidden<T>*>(scratch.hidden);
    for (std::int64_t begin = 0; begin < problem.width; begin += depth.size) {
      const std::int64_t size = smaller(depth.size, problem.width - begin);
      for (std::int64_t row = 0; row < task.rows; ++row, to += depth.row_size) {
        const T* from = static_cast<const T*>(problem.hidden) +
                        (task.row_begin + row) * problem.hidden_stride + begin;
        copy_row(from, size, to);
      }
    }
  }

  // How a task is cut; found once, for a division takes as long as dozens of products.
  struct Cut {
    Depth depth;
    std::int64_t rows;        // of the task
    std::int64_t block_rows;  // of every register block but the last
    std::int64_t step_ahead;  // elements from one prefetch to the next
  };

  template <class T>
  static Cut cut_of(const HeadProblem& problem, std::int64_t rows) {
    const std::int64_t blocks = (rows + S::kRows - 1) / S::kRows;
    return {depth_of(problem.width, sizeof(Hidden<T>), S::kDepthBytes), rows,
            (rows + blocks - 1) / blocks, OperandsOf<S, T>::kStep / blocks};
  }

  // A block of depth.
  struct DepthBlock {
    std::int64_t index;
    std::int64_t begin;
    std::int64_t size;
  };

  // scores[row][slot] = h . w over all of D, for every word of the tile.
  template <class T>
  static void multiply(const HeadProblem& problem, const Cut& cut, const Tile& tile,
                       const Scratch& scratch) {
    const auto block = [&](std::int64_t index) -> DepthBlock {
      const std::int64_t begin = index * cut.depth.size;
      return {index, begin, smaller(cut.depth.size, problem.width - begin)};
    };
    if (cut.rows <= kFewRows) {
      // Few rows: words are read whole, as they lie in memory.
      for (std::int64_t j = 0; j < tile.quarter; ++j) {
        for (std::int64_t index = 0; index < cut.depth.blocks; ++index) {
          multiply_words<T, true>(problem, cut, tile, j, block(index), scratch);
        }
      }
    } else {
      for (std::int64_t index = 0; index < cut.depth.blocks; ++index) {
        for (std::int64_t j = 0; j < tile.quarter; ++j) {
          multiply_words<T, false>(problem, cut, tile, j, block(index), scratch);
        }
      }
    }
  }

  // One word of each run, one block of depth, all rows. kPrefetch asks for what lies behind them.
  template <class T, bool kPrefetch>
  static void multiply_words(const HeadProblem& problem, const Cut& cut, const Tile& tile,
                             std::int64_t j, const DepthBlock& block, const Scratch& scratch) {
    const Hidden<T>* hidden =
        static_cast<const Hidden<T>*>(scratch.hidden) + block.index * cut.rows * cut.depth.row_size;
    const T* weights[kWords];
    for (int k = 0; k < kWords; ++k) {
      // Past the end the last word is repeated; finish_logits drops what comes of it.
      const std::int64_t word = tile.first + smaller(j + k * tile.quarter, tile.words - 1);
      weights[k] =
          static_cast<const T*>(problem.lm_head) + word * problem.lm_head_stride + block.begin;
    }
    float* scores = scratch.scores + j * kWords;
    if constexpr (sizeof(T) < sizeof(Hidden<T>)) {
      if (cut.rows > 4 * S::kRows) {
        // Many rows share one conversion, which is exact and changes no bit.
        const float* converted[kWords];
        for (int k = 0; k < kWords; ++k) {
          float* to = scratch.weights + k * cut.depth.row_size;
          copy_row(weights[k], block.size, to);
          converted[k] = to;
        }
        multiply_rows<float, kPrefetch>(cut, hidden, converted, block, scores);
        return;
      }
    }
    multiply_rows<T, kPrefetch>(cut, hidden, weights, block, scores);
  }

  // Blocks of about equally many rows. With kPrefetch, what lies behind the words in memory is
  // asked for, each block of rows asking for its share: so memory is busy while the sums are
  // computed.
  template <class T, bool kPrefetch>
  static void multiply_rows(const Cut& cut, const Hidden<T>* hidden, const T* const* weights,
                            const DepthBlock& block, float* scores) {
    std::int64_t ahead = block.size;
    for (std::int64_t row = 0; row < cut.rows; row += cut.block_rows) {
      multiply_some<T, kPrefetch, S::kRows>(smaller(cut.block_rows, cut.rows - row), cut,
                                            hidden + row * cut.depth.row_size, weights, block,
                                            ahead, scores + row * kChunk);
      ahead += block.size / OperandsOf<S, T>::kStep * cut.step_ahead;
    }
  }

  // multiply_block for min(rows, kRows) rows: the order of the sums is the same for each.
  template <class T, bool kPrefetch, int kRows>
  static void multiply_some(std::int64_t rows, const Cut& cut, const Hidden<T>* hidden,
                            const T* const* weights, const DepthBlock& block, std::int64_t ahead,
                            float* scores) {
    if constexpr (kRows > 1) {
      if (rows < kRows) {
        multiply_some<T, kPrefetch, kRows - 1>(rows, cut, hidden, weights, block, ahead, scores);
        return;
      }
    }
    multiply_block<T, kPrefetch, kRows>(cut, hidden, weights, block, ahead, scores);
  }

  // The register block: lanes run along D, so neither operand is packed and every product is summed
  // in one order, whatever its neighbours are. The first prefetch is `ahead` elements away.
  template <class T, bool kPrefetch, int kRows>
  static void multiply_block(const Cut& cut, const Hidden<T>* hidden, const T* const* weights,
                             const DepthBlock& block, std::int64_t ahead, float* scores) {
    constexpr int kStep = OperandsOf<S, T>::kStep;
    using Vector = decltype(S::load(hidden));
    // Copies, or the compiler fears that the stores change them. Without unrolling, GCC keeps
    // `sums` in memory.
    const std::int64_t size = block.size;
    const std::int64_t row_size = cut.depth.row_size;
    const std::int64_t step_ahead = cut.step_ahead;
    const bool add = block.index > 0;
    F32 sums[kRows][kWords] = {};
    std::int64_t i = 0;
    for (; i + kStep <= size; i += kStep) {
      Vector h[kRows];
      LLFAST_UNROLL
      for (int row = 0; row < kRows; ++row) h[row] = S::load(hidden + row * row_size + i);
      LLFAST_UNROLL
      for (int k = 0; k < kWords; ++k) {
        // Into L2: what is asked for would push out of L1 what is in use.
        if constexpr (kPrefetch) __builtin_prefetch(weights[k] + ahead, 0, 2);
        const Vector w = S::load(weights[k] + i);
        LLFAST_UNROLL
        for (int row = 0; row < kRows; ++row) sums[row][k] = S::mul_add(h[row], w, sums[row][k]);
      }
      if constexpr (kPrefetch) ahead += step_ahead;
    }
    if (i < size) {
      LLFAST_UNROLL
      for (int k = 0; k < kWords; ++k) {
        const Vector w = load_tail<kStep>(weights[k] + i, size - i);
        LLFAST_UNROLL
        for (int row = 0; row < kRows; ++row) {
          sums[row][k] = S::mul_add(S::load(hidden + row * row_size + i), w, sums[row][k]);
        }
      }
    }
    LLFAST_UNROLL
    for (int row = 0; row < kRows; ++row) {
      float found[kWords];
      S::store_sums(sums[row][0], sums[row][1], sums[row][2], sums[row][3], found);
      float* to = scores + row * kChunk;
      for (int k = 0; k < kWords; ++k) to[k] = add ? to[k] + found[k] : found[k];
    }
  }

  static void copy_bias(const HeadProblem& problem, const Tile& tile, float* to) {
    if (problem.bias == nullptr) return;
    for (std::int64_t word = 0; word < tile.words; ++word) {
      to[tile.slot(word)] = problem.bias[tile.first + word];
    }
  }

  // Products become logits in place; slots without a word, up to a whole vector, become -inf.
  static void finish_logits(const HeadProblem& problem, const Tile& tile, const float* bias,
                            float* scores) {
    const bool scaled = problem.scale != 1.0f;
    const bool capped = problem.softcap != 0.0f;
    if (problem.bias != nullptr || scaled || capped) {
      for (std::int64_t j = 0; j < tile.slots(); j += kLanes) {
        F32 z = S::load(scores + j);
        if (problem.bias != nullptr) z = z + S::load(bias + j);
        z = z * problem.scale;
        if (capped) z = problem.softcap * tanh<S>(z / problem.softcap);
        store(z, scores + j);
      }
    }
    if (tile.words == kChunk) return;
    for (std::int64_t word = tile.words; word < tile.slots(); ++word) {
      scores[tile.slot(word)] = -kInfinity;
    }
    for (std::int64_t j = tile.slots(); j % kLanes != 0; ++j) scores[j] = -kInfinity;
  }

  // A tile's partial, without its target. Its arg max is looked for only if it is above `largest`,
  // that of the words before. A NaN may or may not win the maximum, but always reaches the sum.
  static Partial summarise(const Tile& tile, const float* scores, float largest, std::int64_t id) {
    F32 maxima = S::load(scores);
    for (std::int64_t j = kLanes; j < tile.slots(); j += kLanes) {
      const F32 z = S::load(scores + j);
      maxima = z > maxima ? z : maxima;
    }
    float max = -kInfinity;
    for (int lane = 0; lane < kLanes; ++lane) max = maxima[lane] > max ? maxima[lane] : max;
    // -inf - (-inf) would be NaN where every word of the chunk is ruled out.
    const float shift = max == -kInfinity ? 0.0f : max;
    F32 sums = {};
    F32 weighted = {};
    for (std::int64_t j = 0; j < tile.slots(); j += kLanes) {
      const F32 x = clamp_exponent<S>(S::load(scores + j) - shift);
      const F32 e = exp_nonpositive<S>(x);
      sums = sums + e;
      weighted = S::mul_add(e, x, weighted);
    }
    float totals[kWords];
    S::store_sums(sums, weighted, F32{}, F32{}, totals);
    std::int64_t first = 0;
    if (max > largest) {
      while (first + 1 < tile.words && scores[tile.slot(first)] != max) ++first;
    }
    return {max, totals[0], totals[1], -kInfinity,
            static_cast<std::int32_t>(id + tile.first + first)};
  }

  // A row in another type or the same, with zeros up to a whole vector.
  template <class T>
  static void copy_row(const T* from, std::int64_t size, float* to) {
    std::int64_t i = 0;
    for (; i + kLanes <= size; i += kLanes) store(S::load(from + i), to + i);
    if (i < size) store(load_tail<kLanes>(from + i, size - i), to + i);
  }

  static void copy_row(const BFloat16* from, std::int64_t size, BFloat16* to) {
    constexpr std::int64_t kStep = OperandsOf<S, BFloat16>::kStep;
    std::memcpy(to, from, sizeof(BFloat16) * size);
    std::memset(to + size, 0, sizeof(BFloat16) * (round_up(size, kStep) - size));
  }

  template <class Vector>
  static void store(const Vector& from, float* to) {
    std::memcpy(to, &from, sizeof from);
  }

  template <int kStep, class T>
  static auto load_tail(const T* from, std::int64_t size) {
    T padded[kStep] = {};
    std::memcpy(padded, from, sizeof(T) * size);
    return S::load(padded);
  }
};

}  // namespace llfast
