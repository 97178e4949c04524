// What the driver asks of an instruction set: the partials of a block of rows over a group of
// words.
#pragma once

#include <cstdint>

#include "partials.h"

namespace llfast {

// Words in a register block of every instruction set; its rows differ.
constexpr int kWords = 4;

// A block of depth ends at a multiple of so many elements: whole vectors of every instruction set,
// pairs of half-precision numbers included.
constexpr std::int64_t kDepthStep = 32;

// Copied rows end with zeros up to a multiple of the widest vector, and are 64 bytes further apart:
// rows 4 KiB apart would all fall into the same few sets of L1.
constexpr std::int64_t kRowPaddingBytes = 64;

// Memory of one thread; sizes in partials.cpp.
struct Scratch {
  void* hidden;       // blocks of depth, each of `rows` rows, in the type that is multiplied
  float* weights;     // kWords rows of one block of depth: half-precision words in fp32
  float* scores;      // (rows, kChunk)
  float* bias;        // (kChunk,)
  Partial* partials;  // (rows,)
};

// Rows [row_begin, row_begin + rows) over the words of a group; parts[group * T + row] is written.
struct GroupTask {
  std::int64_t row_begin;
  std::int64_t rows;
  std::int64_t group;
};

using GroupKernel = void (*)(const HeadProblem&, const GroupTask&, const Scratch&,
                             const PartialArrays& parts);

// `left` and `right` of one row, which lie side by side, as one.
using MergePartials = Partial (*)(const Partial& left, const Partial& right);

struct Kernels {
  // Products are summed along D in blocks of equal size, of at most so many bytes: four rows of the
  // head stay in L1 while the hidden rows pass them.
  std::int64_t depth_bytes;
  GroupKernel float32;
  GroupKernel bfloat16;
  GroupKernel float16;
  MergePartials merge;
};

Kernels portable_kernels();
Kernels avx2_kernels();
Kernels avx512_kernels();
Kernels avx512_bf16_kernels();

constexpr std::int64_t round_up(std::int64_t value, std::int64_t multiple) {
  return (value + multiple - 1) / multiple * multiple;
}

// How a row of D elements is cut and copied.
struct Depth {
  std::int64_t blocks;
  std::int64_t size;      // elements in every block but the last, which may hold fewer
  std::int64_t row_size;  // elements from one copied row of a block to the next
};

constexpr Depth depth_of(std::int64_t width, std::int64_t element_bytes, std::int64_t depth_bytes) {
  const std::int64_t blocks = (width * element_bytes + depth_bytes - 1) / depth_bytes;
  const std::int64_t size = round_up((width + blocks - 1) / blocks, kDepthStep);
  return {(width + size - 1) / size, size, size + kRowPaddingBytes / element_bytes};
}

// Some words of a chunk. They lie in four runs of `quarter` words, and one register block takes a
// word of each: four streams of memory are read at the speed of memory, one is not. A word's place
// among the scores is its slot.
struct Tile {
  std::int64_t first;  // counted from the head's first row here
  std::int64_t words;
  std::int64_t quarter;

  std::int64_t slots() const { return kWords * quarter; }
  std::int64_t slot(std::int64_t word) const { return word % quarter * kWords + word / quarter; }
  std::int64_t word(std::int64_t slot) const { return slot / kWords + slot % kWords * quarter; }
};

}  // namespace llfast
