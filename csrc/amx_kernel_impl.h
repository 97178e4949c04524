// The kernel of group_kernel.h for bf16 on AMX. Included by group_amx_bf16.cpp under its own target
// pragma.
//
// A task's words are multiplied a panel at a time, and a block of depth at a time, for which all of
// its rows pass. Products take a tenth of the instructions that a core can begin: between them it
// folds the softmax of the panel before, copies the next one, and asks for the one after that.
#pragma once

#include <immintrin.h>

#include <cstddef>
#include <cstdint>

#include "amx_softmax.h"
#include "amx_tiles.h"
#include "group_kernel.h"

namespace llfast {

class AmxKernel {
 public:
  static TaskSize size(const HeadProblem& problem) {
    const std::int64_t fitting = kHiddenBytes / (steps_of(problem) * kTileBytes) * kSide;
    const std::int64_t most = fitting < kPanel ? kPanel : smaller(fitting, kBlockRows);
    const std::int64_t rows = smaller(most, problem.tokens);
    return {rows, Layout(problem, rows).bytes, kGroupsTogether};
  }

  static void run(const HeadProblem& problem, const GroupTask& task, std::byte* memory,
                  const PartialArrays& parts) {
    const Layout layout(problem, task.rows);
    const Scratch scratch = layout.scratch(memory);
    if (*scratch.copied != task.row_begin + 1) {
      copy_hidden(problem, task, layout, scratch.hidden);
      *scratch.copied = task.row_begin + 1;
    }
    AmxKernel(problem, task, layout, scratch).run(parts);
  }

 private:
  static constexpr std::int64_t kBlockRows = 256;        // of a task, at most
  static constexpr std::int64_t kHiddenBytes = 2 << 20;  // of them
  static constexpr std::int64_t kGroupsTogether = 4;     // for which they are copied once
  static constexpr std::int64_t kDepthSteps = 32;        // longer sums are less exact
  static constexpr std::int64_t kSpan = 512;             // words for which a block of depth stays

  struct Scratch {
    std::int64_t* copied;  // 1 + the row that `hidden` begins with; 0 before there is any
    std::byte* hidden;     // (pairs, steps, 2) tiles
    std::byte* words[2];   // (steps of a block of depth, 2) tiles: a panel, and the next
    float* fresh;          // (kPanel, kPanel): products of a block of depth, to be added
    float* scores;         // (pairs, panels of a span, kPanel, kPanel)
    TokenLanes* lanes;     // (2 pairs,)
  };

  struct Layout {
    std::int64_t pairs;        // of blocks of kSide rows
    std::int64_t steps;        // of kStep elements
    std::int64_t depth_steps;  // in a block of depth
    std::int64_t span;         // words that pass a block of depth before the next block comes
    std::int64_t words_at;
    std::int64_t fresh_at;
    std::int64_t scores_at;
    std::int64_t lanes_at;
    std::int64_t bytes;

    static constexpr std::int64_t kFloat = sizeof(float);

    Layout(const HeadProblem& problem, std::int64_t rows)
        : pairs((rows + kPanel - 1) / kPanel), steps(steps_of(problem)) {
      const std::int64_t depth_blocks = (steps + kDepthSteps - 1) / kDepthSteps;
      depth_steps = (steps + depth_blocks - 1) / depth_blocks;
      span = depth_blocks > 1 ? kSpan : kPanel;
      words_at = kCacheLine + pairs * steps * kPairBytes;
      fresh_at = words_at + 2 * depth_steps * kPairBytes;
      scores_at = fresh_at + kPanel * kPanel * kFloat;
      lanes_at = scores_at + pairs * span * kPanel * kFloat;
      bytes = lanes_at + 2 * pairs * static_cast<std::int64_t>(sizeof(TokenLanes));
    }

    Scratch scratch(std::byte* memory) const {
      std::byte* const words = memory + words_at;
      return {reinterpret_cast<std::int64_t*>(memory),
              memory + kCacheLine,
              {words, words + depth_steps * kPairBytes},
              reinterpret_cast<float*>(memory + fresh_at),
              reinterpret_cast<float*>(memory + scores_at),
              reinterpret_cast<TokenLanes*>(memory + lanes_at)};
    }
  };

  static constexpr std::int64_t smaller(std::int64_t a, std::int64_t b) { return a < b ? a : b; }

  static constexpr std::int64_t steps_of(const HeadProblem& problem) {
    return (problem.width + kStep - 1) / kStep;
  }

  static void copy_hidden(const HeadProblem& problem, const GroupTask& task, const Layout& layout,
                          std::byte* hidden) {
    const auto* from =
        static_cast<const std::uint16_t*>(problem.hidden) + task.row_begin * problem.hidden_stride;
    for (std::int64_t row = 0; row < layout.pairs * kPanel; row += kSide) {
      std::byte* to =
          hidden + row / kPanel * layout.steps * kPairBytes + row % kPanel / kSide * kTileBytes;
      for (std::int64_t step = 0; step < layout.steps; ++step, to += kPairBytes) {
        __m512i pairs[kSide] = {};
        for (std::int64_t i = 0; i < smaller(kSide, task.rows - row); ++i) {
          pairs[i] = load_step(from + (row + i) * problem.hidden_stride, step, problem.width);
        }
        transpose(pairs);
        for (int i = 0; i < kSide; ++i) _mm512_store_si512(to + i * kCacheLine, pairs[i]);
      }
    }
  }

  // A panel of words in a block of depth; `begin` counts from the head's first row here.
  struct Piece {
    std::int64_t begin;
    std::int64_t words;
    std::int64_t step;
    std::int64_t steps;
  };

  // The lines of memory of a piece, one after the other.
  class Lines {
   public:
    Lines(const HeadProblem& problem, const Piece& piece, std::int64_t calls)
        : problem_(problem),
          piece_(piece),
          each_(static_cast<int>((piece.words * piece.steps + calls - 1) / calls)),
          row_(row(piece.begin)) {}

    int each() const { return each_; }
    bool left() const { return word_ < piece_.words; }

    void prefetch() {
      if (!left()) return;
      _mm_prefetch(row_ + (piece_.step + step_) * kStep, _MM_HINT_T1);
      advance();
    }

    void copy(std::byte* words) {
      std::byte* const to = words + step_ * kPairBytes + word_ * kCacheLine;
      _mm512_store_si512(to, load_step(row_, piece_.step + step_, problem_.width));
      advance();
    }

   private:
    const std::uint16_t* row(std::int64_t word) const {
      return static_cast<const std::uint16_t*>(problem_.lm_head) + word * problem_.lm_head_stride;
    }

    void advance() {
      if (++step_ < piece_.steps) return;
      step_ = 0;
      ++word_;
      row_ += problem_.lm_head_stride;
    }

    const HeadProblem& problem_;
    Piece piece_;
    int each_;
    const std::uint16_t* row_;
    std::int64_t word_ = 0;
    std::int64_t step_ = 0;
  };

  AmxKernel(const HeadProblem& problem, const GroupTask& task, const Layout& layout,
            const Scratch& scratch)
      : problem_(problem),
        task_(task),
        layout_(layout),
        scratch_(scratch),
        begin_(task.group * kGroup),
        end_(smaller(begin_ + kGroup, problem.vocabulary)),
        softmax_(problem) {
    for (std::int64_t block = 0; block < 2 * layout.pairs; ++block) {
      std::int32_t words[kSide];
      for (std::int64_t i = 0; i < kSide; ++i) words[i] = target_word(block * kSide + i);
      scratch.lanes[block] = TokenLanes::before(words);
    }
  }

  // A row's target, counted from the first word of the group; -1 if it is none of the group's.
  std::int32_t target_word(std::int64_t row) const {
    if (row >= task_.rows) return -1;
    const std::int64_t word =
        problem_.targets[task_.row_begin + row] - problem_.first_word - begin_;
    return word >= 0 && word < kGroup ? static_cast<std::int32_t>(word) : -1;
  }

  void run(const PartialArrays& parts) {
    const AmxTiles tiles;
    Piece piece = first_piece(begin_);
    copy_words(piece, scratch_.words[0]);
    for (int at = 0; piece.words > 0; at ^= 1) {
      const Piece next = piece_after(piece);
      multiply(piece, next, scratch_.words[at], scratch_.words[at ^ 1]);
      piece = next;
    }
    softmax_.finish();
    const std::int64_t first = problem_.first_word + begin_;
    for (std::int64_t row = 0; row < task_.rows; ++row) {
      const TokenLanes& lanes = scratch_.lanes[row / kSide];
      const std::int64_t i = row % kSide;
      std::int32_t argmax[kSide];
      _mm512_storeu_si512(argmax, lanes.argmax);
      parts.set(task_.group * problem_.tokens + task_.row_begin + row,
                {lanes.max[i], lanes.sum[i], lanes.weighted_sum[i], lanes.target[i],
                 static_cast<std::int32_t>(first + argmax[i])});
    }
  }

  Piece first_piece(std::int64_t begin) const {
    return {begin, smaller(kPanel, end_ - begin), 0, smaller(layout_.depth_steps, layout_.steps)};
  }

  // All panels of a span in one block of depth, then in the next; without words after the last.
  Piece piece_after(const Piece& piece) const {
    const std::int64_t span = piece.begin - (piece.begin - begin_) % layout_.span;
    const std::int64_t begin = piece.begin + kPanel;
    if (begin < smaller(span + layout_.span, end_)) {
      return {begin, smaller(kPanel, end_ - begin), piece.step, piece.steps};
    }
    const std::int64_t step = piece.step + piece.steps;
    if (step < layout_.steps) {
      return {span, smaller(kPanel, end_ - span), step,
              smaller(layout_.depth_steps, layout_.steps - step)};
    }
    return span + layout_.span < end_ ? first_piece(span + layout_.span) : Piece{};
  }

  void copy_words(const Piece& piece, std::byte* words) const {
    Lines lines(problem_, piece, 1);
    while (lines.left()) lines.copy(words);
    clear_words(piece, words);
  }

  // Words past the end.
  static void clear_words(const Piece& piece, std::byte* words) {
    for (std::int64_t word = piece.words; word < kPanel; ++word) {
      for (std::int64_t step = 0; step < piece.steps; ++step) {
        _mm512_store_si512(words + step * kPairBytes + word * kCacheLine, _mm512_setzero_si512());
      }
    }
  }

  void multiply(const Piece& piece, const Piece& next, const std::byte* words,
                std::byte* next_words) {
    const std::int64_t calls = layout_.pairs * piece.steps;
    Lines copied(problem_, next, calls);
    Lines asked(problem_, next.words > 0 ? piece_after(next) : next, calls);
    // So many that a panel is folded before the products of another are stored in its place.
    const int folds = static_cast<int>((PanelSoftmax::kMostSteps + piece.steps - 1) / piece.steps);
    const auto beside = [&] {
      for (int i = 0; i < folds; ++i) softmax_.step();
      for (int i = 0; i < copied.each() && copied.left(); ++i) copied.copy(next_words);
      for (int i = 0; i < asked.each(); ++i) asked.prefetch();
    };
    AmxTiles::written();
    const bool done = piece.step + piece.steps == layout_.steps;
    const std::int64_t place = piece.begin - begin_;
    for (std::int64_t pair = 0; pair < layout_.pairs; ++pair) {
      const std::byte* hidden = scratch_.hidden + (pair * layout_.steps + piece.step) * kPairBytes;
      float* scores = scratch_.scores + (pair * layout_.span + place % layout_.span) * kPanel;
      float* const found = piece.step == 0 ? scores : scratch_.fresh;
      const bool both = task_.rows - pair * kPanel > kSide;
      if (both) {
        AmxTiles::multiply_two(words, hidden, piece.steps, found, beside);
      } else {
        AmxTiles::multiply_one(words, hidden, piece.steps, found, beside);
      }
      if (piece.step > 0) add(found, scores);
      if (done) {
        softmax_.begin(scores, piece.begin, piece.words, place, scratch_.lanes + 2 * pair,
                       both ? 2 : 1);
      }
    }
    while (copied.left()) copied.copy(next_words);
    if (next.words > 0) clear_words(next, next_words);
  }

  static void add(const float* from, float* to) {
    for (std::int64_t i = 0; i < kPanel * kPanel; i += kSide) {
      _mm512_store_ps(to + i, _mm512_add_ps(_mm512_load_ps(to + i), _mm512_load_ps(from + i)));
    }
  }

  const HeadProblem& problem_;
  const GroupTask& task_;
  const Layout& layout_;
  const Scratch& scratch_;
  const std::int64_t begin_;
  const std::int64_t end_;
  PanelSoftmax softmax_;
};

}  // namespace llfast
