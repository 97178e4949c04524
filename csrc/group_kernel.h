// What the driver asks of an instruction set: fold a block of rows over a group of the vocabulary.
//
// The canonical order. The vocabulary is cut into chunks of kChunk words; the chunks of a group are
// folded left to right, then the groups are. Threads and blocks cut only between groups and between
// rows, so they cannot change a bit.
#pragma once

#include <cstdint>

#include "token_logprobs.h"

namespace llfast {

constexpr std::int64_t kChunk = 128;
constexpr std::int64_t kGroup = 8 * kChunk;

// Words in a register block of every instruction set; its rows differ.
constexpr int kWords = 4;

// Products are summed along D in blocks of kDepth, so that four rows of the head stay in L1 while
// the hidden rows pass them (4 x 4 KiB in fp32).
constexpr std::int64_t kDepth = 1024;

// Hidden rows are copied to fp32 with zeros up to a multiple of the widest vector, and 64 bytes
// more: rows 4 KiB apart would all fall into the same few sets of L1.
constexpr std::int64_t kMaxLanes = 16;
constexpr std::int64_t kRowPadding = 16;

// A slice of the softmax of one row: the largest logit and the sum of exp(logit - max).
struct Partial {
  float max;
  float sum;
};

// Memory of one thread; sizes in token_logprobs.cpp.
struct Scratch {
  float* hidden;   // blocks of depth, each of rows of hidden_row_size(D) floats
  float* weights;  // kWords rows of kDepth + kRowPadding floats: half-precision words in fp32
  float* scores;   // rows of kChunk floats
  float* bias;     // kChunk floats
};

// Rows [row_begin, row_begin + rows) over words [group * kGroup, ...). Writes partials[0..rows),
// and target_logits[0..rows) of those rows whose target lies in the group.
struct GroupTask {
  std::int64_t row_begin;
  std::int64_t rows;
  std::int64_t group;
  Partial* partials;
  float* target_logits;
};

using GroupKernel = void (*)(const LogprobProblem&, const GroupTask&, const Scratch&);

// The fold of `count` partials, `stride` apart, from left to right.
using FoldPartials = Partial (*)(const Partial* partials, std::int64_t count, std::int64_t stride);

struct Kernels {
  GroupKernel float32;
  GroupKernel bfloat16;
  GroupKernel float16;
  FoldPartials fold;
};

Kernels portable_kernels();
Kernels avx2_kernels();
Kernels avx512_kernels();

constexpr std::int64_t round_up(std::int64_t value, std::int64_t multiple) {
  return (value + multiple - 1) / multiple * multiple;
}

// Floats from one hidden row to the next within a block of depth.
constexpr std::int64_t hidden_row_size(std::int64_t width) {
  return (width < kDepth ? round_up(width, kMaxLanes) : kDepth) + kRowPadding;
}

constexpr std::int64_t depth_blocks(std::int64_t width) { return (width + kDepth - 1) / kDepth; }

}  // namespace llfast
