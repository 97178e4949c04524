// The softmax of sixteen tokens, a token a lane, over words that come in panels. Included by
// group_amx_bf16.cpp under its own target pragma.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "group_kernel.h"
#include "simd_avx512.h"
#include "vector_math.h"

namespace llfast {

// A type of its own, so that what is compiled here has names of its own.
struct AmxLanes : Avx512 {};

constexpr std::int64_t kSide = 16;          // words, rows and lanes of a tile
constexpr std::int64_t kPanel = 2 * kSide;  // words, and rows, that are multiplied at a time

// What is known of sixteen tokens. Words are counted from the first of their group.
struct TokenLanes {
  using F32 = AmxLanes::F32;

  F32 max;
  F32 sum;
  F32 weighted_sum;
  F32 target;
  __m512i argmax;
  __m512i target_word;  // -1 if it is in another group

  static TokenLanes before(const std::int32_t* target_words) {
    const F32 none = splat<AmxLanes>(-__builtin_huge_valf());
    return {none, F32{}, F32{}, none, __m512i{}, _mm512_loadu_si512(target_words)};
  }
};

// Folds panels of products into TokenLanes, in small steps that fit between the products of others.
class PanelSoftmax {
 public:
  explicit PanelSoftmax(const HeadProblem& problem) : problem_(problem) {}

  // Scores are (kPanel, kPanel), words by tokens; words[0] is the `place`-th of its group. Those
  // of the panel before must be folded.
  void begin(float* scores, std::int64_t word, std::int64_t words, std::int64_t place,
             TokenLanes* lanes, int blocks) {
    scores_ = scores;
    word_ = word;
    words_ = words;
    place_ = static_cast<int>(place);
    lanes_ = lanes;
    step_ = 0;
    last_ = blocks * kSteps;
  }

  // Steps that fold a panel: for one block of kSide tokens, and for both.
  static constexpr int kSteps = 2 + kPanel / kWords;
  static constexpr int kMostSteps = 2 * kSteps;

  void step() {
    if (step_ == last_) return;
    const std::int64_t at = step_ % kSteps;
    float* const scores = scores_ + step_ / kSteps * kSide;
    if (at == 0) {
      finish_logits(scores);
      find_largest(scores);
    } else if (at < kSteps - 1) {
      add_words(scores + (at - 1) * kWords * kPanel);
    } else {
      fold(scores, lanes_[step_ / kSteps]);
    }
    ++step_;
  }

  void finish() {
    while (step_ < last_) step();
  }

 private:
  using F32 = AmxLanes::F32;
  static constexpr float kInfinity = __builtin_huge_valf();

  // Products become logits in place; words past the end become -inf.
  void finish_logits(float* scores) const {
    const bool capped = problem_.softcap != 0.0f;
    if (problem_.bias != nullptr || problem_.scale != 1.0f || capped) {
      for (std::int64_t word = 0; word < words_; ++word) {
        F32 z = _mm512_load_ps(scores + word * kPanel);
        if (problem_.bias != nullptr) z = z + problem_.bias[word_ + word];
        z = z * problem_.scale;
        if (capped) z = problem_.softcap * tanh<AmxLanes>(z / problem_.softcap);
        _mm512_store_ps(scores + word * kPanel, z);
      }
    }
    for (std::int64_t word = words_; word < kPanel; ++word) {
      _mm512_store_ps(scores + word * kPanel, splat<AmxLanes>(-kInfinity));
    }
  }

  // The first of the largest. A NaN never is, but always reaches the sum.
  void find_largest(const float* scores) {
    constexpr int kQuarter = kPanel / kWords;
    F32 largest[kWords];
    __m512i places[kWords];
    for (int k = 0; k < kWords; ++k) {
      largest[k] = splat<AmxLanes>(-kInfinity);
      places[k] = _mm512_setzero_si512();
    }
    for (int j = 0; j < kQuarter; ++j) {
      LLFAST_UNROLL
      for (int k = 0; k < kWords; ++k) {
        const int word = j + k * kQuarter;
        take_larger(_mm512_load_ps(scores + word * kPanel), _mm512_set1_epi32(word), largest[k],
                    places[k]);
      }
    }
    max_ = largest[0];
    largest_ = places[0];
    for (int k = 1; k < kWords; ++k) take_larger(largest[k], places[k], max_, largest_);
    for (int k = 0; k < kWords; ++k) sums_[k] = weighted_sums_[k] = F32{};
  }

  static void take_larger(F32 z, __m512i place, F32& max, __m512i& max_place) {
    const __mmask16 above = _mm512_cmp_ps_mask(z, max, _CMP_GT_OQ);
    max = _mm512_mask_mov_ps(max, above, z);
    max_place = _mm512_mask_mov_epi32(max_place, above, place);
  }

  void add_words(const float* scores) {
    const F32 shift = finite(max_);
    LLFAST_UNROLL
    for (int k = 0; k < kWords; ++k) {
      const F32 x = clamp_exponent<AmxLanes>(_mm512_load_ps(scores + k * kPanel) - shift);
      const F32 e = exp_nonpositive<AmxLanes>(x);
      sums_[k] = sums_[k] + e;
      weighted_sums_[k] = AmxLanes::mul_add(e, x, weighted_sums_[k]);
    }
  }

  // As GroupKernelOf::merge, with the panel on the right.
  void fold(const float* scores, TokenLanes& lanes) const {
    const F32 sum = (sums_[0] + sums_[1]) + (sums_[2] + sums_[3]);
    const F32 weighted_sum =
        (weighted_sums_[0] + weighted_sums_[1]) + (weighted_sums_[2] + weighted_sums_[3]);
    const F32 before = lanes.max;
    const __m512i first = _mm512_set1_epi32(place_);
    take_larger(max_, _mm512_add_epi32(largest_, first), lanes.max, lanes.argmax);
    const F32 shift = finite(lanes.max);
    const F32 left = clamp_exponent<AmxLanes>(before - shift);
    const F32 right = clamp_exponent<AmxLanes>(max_ - shift);
    const F32 e_left = exp_nonpositive<AmxLanes>(left);
    const F32 e_right = exp_nonpositive<AmxLanes>(right);
    lanes.weighted_sum =
        (lanes.weighted_sum + lanes.sum * left) * e_left + (weighted_sum + sum * right) * e_right;
    lanes.sum = lanes.sum * e_left + sum * e_right;

    const __m512i word = _mm512_sub_epi32(lanes.target_word, first);
    const __mmask16 here =
        _mm512_cmplt_epu32_mask(word, _mm512_set1_epi32(static_cast<int>(words_)));
    const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    const __m512i at = _mm512_add_epi32(_mm512_mullo_epi32(word, _mm512_set1_epi32(kPanel)), lane);
    lanes.target = _mm512_mask_i32gather_ps(lanes.target, here, at, scores, sizeof(float));
  }

  // -inf - (-inf) would be NaN where every word is ruled out.
  static F32 finite(F32 max) {
    const __mmask16 none = _mm512_cmp_ps_mask(max, splat<AmxLanes>(-kInfinity), _CMP_EQ_OQ);
    return _mm512_mask_mov_ps(max, none, F32{});
  }

  const HeadProblem& problem_;
  float* scores_ = nullptr;
  std::int64_t word_ = 0;
  std::int64_t words_ = 0;
  int place_ = 0;
  TokenLanes* lanes_ = nullptr;
  int step_ = 0;
  int last_ = 0;
  F32 max_ = {};
  __m512i largest_ = {};
  F32 sums_[kWords] = {};
  F32 weighted_sums_[kWords] = {};
};

}  // namespace llfast
