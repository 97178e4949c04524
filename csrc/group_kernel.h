// What the driver asks of an instruction set: the partials of a block of rows over a group of
// words.
#pragma once

#include <cstddef>
#include <cstdint>

#include "partials.h"

#if defined(__clang__)
#define LLFAST_UNROLL _Pragma("unroll")
#else
#define LLFAST_UNROLL _Pragma("GCC unroll 8")
#endif

namespace llfast {

// Words in a register block of every instruction set; its rows differ.
constexpr int kWords = 4;

// A block of depth ends at a multiple of so many elements: whole vectors of every instruction set,
// pairs of half-precision numbers included.
constexpr std::int64_t kDepthStep = 32;

constexpr std::int64_t kCacheLine = 64;  // bytes

// Rows [row_begin, row_begin + rows) over the words of a group; parts[group * T + row] is written.
struct GroupTask {
  std::int64_t row_begin;
  std::int64_t rows;
  std::int64_t group;
};

struct TaskSize {
  std::int64_t rows;  // at most
  // Of memory, which is on a cache line, zero before a thread's first task, and then as its last
  // task left it.
  std::int64_t scratch_bytes;
  std::int64_t groups;  // a block of rows visits so many before the next block visits them
};

struct GroupKernel {
  TaskSize (*size)(const HeadProblem&);
  void (*run)(const HeadProblem&, const GroupTask&, std::byte* scratch, const PartialArrays& parts);
};

// `left` and `right` of one row, which lie side by side, as one.
using MergePartials = Partial (*)(const Partial& left, const Partial& right);

struct Kernels {
  GroupKernel float32;
  GroupKernel bfloat16;
  GroupKernel float16;
  MergePartials merge;
};

Kernels portable_kernels();
Kernels avx2_kernels();
Kernels avx512_kernels();
Kernels avx512_bf16_kernels();
Kernels amx_bf16_kernels();

constexpr std::int64_t round_up(std::int64_t value, std::int64_t multiple) {
  return (value + multiple - 1) / multiple * multiple;
}

constexpr std::int64_t smaller(std::int64_t a, std::int64_t b) { return a < b ? a : b; }

// How a row of D elements is cut and copied. Copied rows end with zeros up to a multiple of the
// widest vector, and are a cache line further apart: rows 4 KiB apart would all fall into the same
// few sets of L1.
struct Depth {
  std::int64_t blocks;
  std::int64_t size;      // elements in every block but the last, which may hold fewer
  std::int64_t row_size;  // elements from one copied row of a block to the next
};

constexpr Depth depth_of(std::int64_t width, std::int64_t element_bytes, std::int64_t depth_bytes) {
  const std::int64_t blocks = (width * element_bytes + depth_bytes - 1) / depth_bytes;
  const std::int64_t size = round_up((width + blocks - 1) / blocks, kDepthStep);
  return {(width + size - 1) / size, size, size + kCacheLine / element_bytes};
}

// The memory of one task, of GroupKernelOf.
struct Scratch {
  void* hidden;       // blocks of depth, each of `rows` rows, in the type that is multiplied
  float* weights;     // kWords rows of one block of depth: half-precision words in fp32
  float* scores;      // (rows, kChunk)
  float* bias;        // (kChunk,)
  Partial* partials;  // (rows,)
};

// Its parts one after the other.
struct Layout {
  Depth depth;
  std::int64_t element_bytes;
  std::int64_t rows;

  constexpr std::int64_t hidden_bytes() const {
    return round_up(rows * depth.blocks * depth.row_size * element_bytes, kCacheLine);
  }
  constexpr std::int64_t weights() const { return kWords * depth.row_size; }
  constexpr std::int64_t floats() const { return weights() + rows * kChunk + kChunk; }
  constexpr std::int64_t bytes() const {
    return hidden_bytes() + floats() * static_cast<std::int64_t>(sizeof(float)) +
           rows * static_cast<std::int64_t>(sizeof(Partial));
  }

  Scratch scratch(std::byte* memory) const {
    float* const weights_at = reinterpret_cast<float*>(memory + hidden_bytes());
    float* const scores = weights_at + weights();
    return {memory, weights_at, scores, scores + rows * kChunk,
            reinterpret_cast<Partial*>(weights_at + floats())};
  }
};

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
