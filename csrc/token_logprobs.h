// Log-probabilities of target tokens, from hidden states and the output head, without logits.
#pragma once

#include <cstdint>
#include <functional>

#include "instruction_set.h"

namespace llfast {

enum class DType { kFloat32, kBFloat16, kFloat16 };

// One call. A logit is z = scale * (h.w + bias), then softcap * tanh(z / softcap); sizes and
// strides count elements; the last dimension of both matrices is contiguous.
struct LogprobProblem {
  const void* hidden;           // (T, D), of `dtype`
  const void* lm_head;          // (V, D), of `dtype`
  const float* bias;            // (V,), or null
  const std::int64_t* targets;  // (T,), each in [0, V)
  float* logprobs;              // (T,), the result, in nats
  std::int64_t tokens;          // T
  std::int64_t vocabulary;      // V, at least 1
  std::int64_t width;           // D, at least 1
  std::int64_t hidden_stride;
  std::int64_t lm_head_stride;
  DType dtype;
  float scale;
  float softcap;  // 0 for none
};

// Fills problem.logprobs and returns true, or returns false after `interrupted` returned true.
//
// Products and sums are fp32. The bits of a row depend on that row, on the head, the dtype and the
// instruction set, and on nothing else: not on the other rows, nor on the number of threads.
bool token_logprobs(const LogprobProblem& problem, InstructionSet set, int threads,
                    const std::function<bool()>& interrupted);

}  // namespace llfast
