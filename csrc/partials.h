// The softmax over a vocabulary in parts: what each group of 1,024 words adds to it, the fold of
// the groups, and the statistics that come of it. Logits are never stored.
//
// The canonical order. The vocabulary is cut into chunks of kChunk words; the chunks of a group are
// folded left to right, then the groups are. Threads, slices of the vocabulary and blocks of rows
// cut only between groups and between rows, so they cannot change a bit.
#pragma once

#include <cstdint>
#include <functional>

#include "instruction_set.h"

namespace llfast {

constexpr std::int64_t kChunk = 128;
constexpr std::int64_t kGroup = 8 * kChunk;

enum class DType { kFloat32, kBFloat16, kFloat16 };

// Hidden states against some rows of an output head. A logit is z = scale * (h.w + bias), then
// softcap * tanh(z / softcap); sizes and strides count elements; the last dimension of both
// matrices is contiguous.
struct HeadProblem {
  const void* hidden;           // (T, D), of `dtype`
  const void* lm_head;          // (V, D), of `dtype`
  const float* bias;            // (V,), or null
  const std::int64_t* targets;  // (T,), word ids
  std::int64_t first_word;      // the id of the head's first row here, a multiple of kGroup
  std::int64_t tokens;          // T
  std::int64_t vocabulary;      // V, at least 1
  std::int64_t width;           // D, at least 1
  std::int64_t hidden_stride;
  std::int64_t lm_head_stride;
  DType dtype;
  float scale;
  float softcap;  // 0 for none
};

// One row of logits, seen through some of its words.
struct Partial {
  float max;            // m, the largest logit
  float sum;            // sum of e^(z - m)
  float weighted_sum;   // sum of e^(z - m) (z - m)
  float target;         // the target's logit; -inf if it is not among these words
  std::int32_t argmax;  // the id of the first of the largest
};

// Partials as five arrays of shape (parts, T), contiguous.
struct PartialArrays {
  float* max;
  float* sum;
  float* weighted_sum;
  float* target;
  std::int32_t* argmax;

  Partial get(std::int64_t i) const {
    return {max[i], sum[i], weighted_sum[i], target[i], argmax[i]};
  }

  void set(std::int64_t i, const Partial& partial) const {
    max[i] = partial.max;
    sum[i] = partial.sum;
    weighted_sum[i] = partial.weighted_sum;
    target[i] = partial.target;
    argmax[i] = partial.argmax;
  }
};

// Arrays (T,) of what one wants to know of each token, in nats.
struct Statistics {
  float* logprobs;
  float* lse;
  float* target_logits;
  float* entropy;
  std::int64_t* argmax;
};

constexpr std::int64_t groups_of(std::int64_t vocabulary) {
  return (vocabulary + kGroup - 1) / kGroup;
}

// Fills `parts` (groups_of(V), T) and returns true, or returns false after `interrupted` returned
// true.
//
// Products and sums are fp32. The bits of a row depend on that row, on the head, the dtype and the
// instruction set, and on nothing else: not on the other rows, nor on the number of threads.
bool head_partials(const HeadProblem& problem, const PartialArrays& parts, InstructionSet set,
                   int threads, const std::function<bool()>& interrupted);

// Folds parts (count, T) left to right into `total` (T,), which holds what lies to their left.
void fold_partials(const PartialArrays& parts, std::int64_t count, std::int64_t tokens,
                   const PartialArrays& total, InstructionSet set);

// The statistics of T partials.
void statistics_of(const PartialArrays& total, std::int64_t tokens, const Statistics& statistics);

}  // namespace llfast
