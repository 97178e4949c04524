// The kernel of group_kernel.h for bf16 on AMX. Included by group_amx_bf16.cpp under its own target
// pragma.
//
// A task's words are multiplied a panel at a time, and a block of depth at a time, for which all of
// its rows pass, in pairs of blocks of kSide. Products take a tenth of the instructions that a core
// can begin: between them it folds the softmax of the panel before, and fetches the next ones.
// They wait for tiles, which come from L2 half as fast as from L1: a deep head's block is so short
// that its words stay in L1 while all rows pass, which pays for adding the sums of blocks.
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
      copy_hidden(problem, task, layout.steps, scratch.hidden);
      *scratch.copied = task.row_begin + 1;
    }
    AmxKernel(problem, task, layout, scratch).run(parts);
  }

 private:
  static constexpr std::int64_t kBlockRows = 512;        // of a task, at most
  static constexpr std::int64_t kHiddenBytes = 3 << 20;  // of them
  static constexpr std::int64_t kFewPairs = 4;           // up to 128 rows are few
  static constexpr std::int64_t kStepsAhead = 4;         // that words in place are asked for
  static constexpr std::int64_t kGroupsTogether = 4;     // for which they are copied once
  static constexpr std::int64_t kWholeSteps = 32;        // longer sums are less exact, and deeper
  static constexpr std::int64_t kDepthSteps = 8;         // heads are cut into blocks of so many
  static constexpr std::int64_t kSpan = 256;             // words for which a block of depth stays

  struct Scratch {
    std::int64_t* copied;  // 1 + the row that `hidden` begins with; 0 before there is any
    std::byte* hidden;     // (pairs, steps, 2) tiles
    std::byte* words[2];   // (kPanel,) rows of a block of depth: a panel, and the next
    float* fresh;          // (kPanel, kPanel): products of a block of depth, to be added
    float* scores;         // (pairs, panels of a span, kPanel, kPanel)
    TokenLanes* lanes;     // (2 pairs,)
  };

  struct Layout {
    std::int64_t pairs;  // of blocks of kSide rows
    std::int64_t steps;  // of kStep elements
    std::int64_t depth_blocks;
    std::int64_t span;  // words that pass a block of depth before the next block comes
    std::int64_t word_bytes;
    std::int64_t words_at;
    std::int64_t fresh_at;
    std::int64_t scores_at;
    std::int64_t lanes_at;
    std::int64_t bytes;

    static constexpr std::int64_t kFloat = sizeof(float);

    Layout(const HeadProblem& problem, std::int64_t rows)
        : pairs((rows + kPanel - 1) / kPanel), steps(steps_of(problem)) {
      const std::int64_t most = steps > kWholeSteps ? kDepthSteps : kWholeSteps;
      depth_blocks = (steps + most - 1) / most;
      word_bytes = (depth_steps(0) | 1) * kCacheLine;
      span = depth_blocks > 1 && pairs > kFewPairs ? kSpan : kPanel;
      words_at = kCacheLine + pairs * steps * kPairBytes;
      fresh_at = words_at + 2 * kPanel * word_bytes;
      scores_at = fresh_at + kPanel * kPanel * kFloat;
      lanes_at = scores_at + pairs * span * kPanel * kFloat;
      bytes = lanes_at + 2 * pairs * static_cast<std::int64_t>(sizeof(TokenLanes));
    }

    // In the block of depth that begins at a step: about equally many, the first ones the most.
    std::int64_t depth_steps(std::int64_t step) const {
      const std::int64_t least = steps / depth_blocks;
      return least + (step < steps % depth_blocks * (least + 1) ? 1 : 0);
    }

    Scratch scratch(std::byte* memory) const {
      std::byte* const words = memory + words_at;
      return {reinterpret_cast<std::int64_t*>(memory),
              memory + kCacheLine,
              {words, words + kPanel * word_bytes},
              reinterpret_cast<float*>(memory + fresh_at),
              reinterpret_cast<float*>(memory + scores_at),
              reinterpret_cast<TokenLanes*>(memory + lanes_at)};
    }
  };

  static constexpr std::int64_t steps_of(const HeadProblem& problem) {
    return (problem.width + kStep - 1) / kStep;
  }

  static void copy_hidden(const HeadProblem& problem, const GroupTask& task, std::int64_t steps,
                          std::byte* hidden) {
    const auto* from =
        static_cast<const std::uint16_t*>(problem.hidden) + task.row_begin * problem.hidden_stride;
    for (std::int64_t row = 0; row < task.rows; row += kSide) {
      std::byte* to =
          hidden + row / kPanel * steps * kPairBytes + row % kPanel / kSide * kTileBytes;
      for (std::int64_t step = 0; step < steps; ++step, to += kPairBytes) {
        __m512i pairs[kSide] = {};
        for (std::int64_t i = 0; i < smaller(kSide, task.rows - row); ++i) {
          pairs[i] = AmxTiles::load_step(from + (row + i) * problem.hidden_stride + step * kStep,
                                         problem.width - step * kStep);
        }
        AmxTiles::transpose(pairs);
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

  // The lines of memory of a piece, one after the other: some at each of so many calls.
  class Lines {
   public:
    Lines(const HeadProblem& problem, const Piece& piece, std::int64_t calls)
        : problem_(problem),
          piece_(piece),
          each_((piece.words * piece.steps + calls - 1) / calls),
          row_(static_cast<const std::uint16_t*>(problem.lm_head) +
               piece.begin * problem.lm_head_stride + piece.step * kStep) {}

    void prefetch() {
      go([](const std::uint16_t* from, std::int64_t, std::int64_t) {
        _mm_prefetch(from, _MM_HINT_T1);
      });
    }

    void copy(std::byte* words, std::int64_t stride) {
      const std::int64_t width = problem_.width - piece_.step * kStep;
      go([=](const std::uint16_t* from, std::int64_t word, std::int64_t step) {
        _mm512_store_si512(words + word * stride + step * kCacheLine,
                           AmxTiles::load_step(from, width - step * kStep));
      });
    }

   private:
    template <class Do>
    void go(const Do& visit) {
      std::int64_t left = each_;
      while (left > 0 && word_ < piece_.words) {
        const std::int64_t end = smaller(step_ + left, piece_.steps);
        left -= end - step_;
        for (; step_ < end; ++step_) visit(row_ + step_ * kStep, word_, step_);
        if (step_ < piece_.steps) return;
        step_ = 0;
        ++word_;
        row_ += problem_.lm_head_stride;
      }
    }

    const HeadProblem& problem_;
    Piece piece_;
    std::int64_t each_;
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
    Words words = words_of(piece, 0);
    if (words.copy != nullptr) {
      Lines(problem_, piece, 1).copy(words.copy, words.row_bytes);
      clear_words(piece, words);
    }
    for (int buffer = 1; piece.words > 0; buffer ^= 1) {
      const Piece next = piece_after(piece);
      const Words next_words = words_of(next, buffer);
      multiply(piece, words, next, next_words);
      piece = next;
      words = next_words;
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
    return {begin, smaller(kPanel, end_ - begin), 0, layout_.depth_steps(0)};
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
      return {span, smaller(kPanel, end_ - span), step, layout_.depth_steps(step)};
    }
    return span + layout_.span < end_ ? first_piece(span + layout_.span) : Piece{};
  }

  // Where the words of a piece are, or will be when they are copied: rows 64 bytes at a time.
  struct Words {
    const std::byte* first;
    std::int64_t row_bytes;
    std::byte* copy;  // null if they stay where they are

    // A step of a panel, into L1: through L2, it would wait twice.
    void prefetch(std::int64_t step) const {
      for (std::int64_t word = 0; word < kPanel; ++word) {
        _mm_prefetch(first + word * row_bytes + step * kCacheLine, _MM_HINT_T0);
      }
    }
  };

  // Few tokens read words where they are, once; for more, rows are copied that may be far apart,
  // or end within a step.
  Words words_of(const Piece& piece, int buffer) const {
    if (layout_.pairs <= kFewPairs && piece.words == kPanel &&
        (piece.step + piece.steps) * kStep <= problem_.width) {
      const std::int64_t row_bytes = 2 * problem_.lm_head_stride;
      return {static_cast<const std::byte*>(problem_.lm_head) + piece.begin * row_bytes +
                  piece.step * kCacheLine,
              row_bytes, nullptr};
    }
    return {scratch_.words[buffer], layout_.word_bytes, scratch_.words[buffer]};
  }

  void clear_words(const Piece& piece, const Words& words) const {
    for (std::int64_t word = piece.words; word < kPanel; ++word) {
      for (std::int64_t step = 0; step < piece.steps; ++step) {
        _mm512_store_si512(words.copy + word * words.row_bytes + step * kCacheLine,
                           _mm512_setzero_si512());
      }
    }
  }

  void multiply(const Piece& piece, const Words& words, const Piece& next,
                const Words& next_words) {
    const std::int64_t calls = layout_.pairs * piece.steps;
    const bool copies = next_words.copy != nullptr && next.words > 0;
    Lines copied(problem_, copies ? next : Piece{}, calls);
    Lines asked(problem_, copies ? piece_after(next) : Piece{}, calls);
    // So many that a panel is folded before the products of another are stored in its place.
    const int folds = static_cast<int>((PanelSoftmax::kMostSteps + piece.steps - 1) / piece.steps);
    bool is_first = true;  // of the pairs that pass words in place
    const auto beside = [&](std::int64_t step) {
      for (int i = 0; i < folds; ++i) softmax_.step();
      copied.copy(next_words.copy, next_words.row_bytes);
      asked.prefetch();
      if (is_first && words.copy == nullptr) {
        const std::int64_t ahead = step + kStepsAhead;
        if (ahead < piece.steps) {
          words.prefetch(ahead);
        } else if (next.words > 0 && !copies) {
          next_words.prefetch(ahead - piece.steps);
        }
      }
    };
    AmxTiles::finish_stores();
    const bool done = piece.step + piece.steps == layout_.steps;
    const std::int64_t place = piece.begin - begin_;
    for (std::int64_t pair = 0; pair < layout_.pairs; ++pair) {
      const std::byte* hidden = scratch_.hidden + (pair * layout_.steps + piece.step) * kPairBytes;
      float* scores = scratch_.scores + (pair * layout_.span + place % layout_.span) * kPanel;
      float* const found = piece.step == 0 ? scores : scratch_.fresh;
      const bool both = task_.rows - pair * kPanel > kSide;
      if (both) {
        AmxTiles::multiply<true>(words.first, words.row_bytes, hidden, piece.steps, found, beside);
      } else {
        AmxTiles::multiply<false>(words.first, words.row_bytes, hidden, piece.steps, found, beside);
      }
      if (piece.step > 0) add(found, scores);
      if (done) {
        softmax_.begin(scores, piece.begin, piece.words, place, scratch_.lanes + 2 * pair,
                       both ? 2 : 1);
      }
      is_first = false;
    }
    if (copies) clear_words(next, next_words);
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
