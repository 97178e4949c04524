// Products of tiles of bf16 on AMX. Included by group_amx_bf16.cpp under its own target pragma.
//
// A tile of products, words by rows, is that of a tile of words, as they lie in memory, and one of
// hidden rows turned so that a row is a column of pairs. The compiler does not know that the
// instructions on tiles read memory.
#pragma once

#include <immintrin.h>

#include <cstddef>
#include <cstdint>

#include "amx_softmax.h"

namespace llfast {

constexpr std::int64_t kStep = 32;  // elements of depth in a tile
constexpr std::int64_t kTileBytes = 1024;
constexpr std::int64_t kPairBytes = 2 * kTileBytes;  // a step of a panel

// Tiles of the full size while it lives.
class AmxTiles {
 public:
  AmxTiles() {
    alignas(64) std::uint8_t config[64] = {1};  // the only palette
    for (int tile = 0; tile < 8; ++tile) {
      config[16 + 2 * tile] = 64;  // bytes a row
      config[48 + tile] = 16;      // rows
    }
    finish_stores();
    _tile_loadconfig(config);
  }
  AmxTiles(const AmxTiles&) = delete;
  AmxTiles& operator=(const AmxTiles&) = delete;
  ~AmxTiles() { _tile_release(); }

  // What was stored is in memory before tiles are loaded.
  static void finish_stores() {
    __asm__ volatile("" ::: "memory");  // NOLINT(portability-no-assembler): a word to the compiler
  }

  // scores (kPanel, kPanel) = words . hidden over `steps` pairs of tiles, in one chain of products;
  // of the first kSide rows alone without kBoth. After each step, `beside` is called with it.
  template <bool kBoth, class Beside>
  static void multiply(const std::byte* words, std::int64_t word_stride, const std::byte* hidden,
                       std::int64_t steps, float* scores, const Beside& beside) {
    const std::byte* lower = words + kSide * word_stride;
    float* const below = scores + kSide * kPanel;
    _tile_zero(0);
    _tile_zero(2);
    if constexpr (kBoth) {
      _tile_zero(1);
      _tile_zero(3);
    }
    for (std::int64_t step = 0; step < steps; ++step) {
      _tile_loadd(4, words, word_stride);
      _tile_loadd(6, hidden, kTileStride);
      _tile_dpbf16ps(0, 4, 6);
      if constexpr (kBoth) {
        _tile_loadd(7, hidden + kTileBytes, kTileStride);
        _tile_dpbf16ps(1, 4, 7);
      }
      _tile_loadd(5, lower, word_stride);
      _tile_dpbf16ps(2, 5, 6);
      if constexpr (kBoth) _tile_dpbf16ps(3, 5, 7);
      words += kCacheLine;
      lower += kCacheLine;
      hidden += kPairBytes;
      beside(step);
    }
    _tile_stored(0, scores, kScoreStride);
    _tile_stored(2, below, kScoreStride);
    if constexpr (kBoth) {
      _tile_stored(1, scores + kSide, kScoreStride);
      _tile_stored(3, below + kSide, kScoreStride);
    }
  }

  // The elements of a step; zeros where only `left` of them belong to the row.
  static __m512i load_step(const std::uint16_t* from, std::int64_t left) {
    if (left >= kStep) return _mm512_loadu_si512(from);
    return _mm512_maskz_loadu_epi16((1u << left) - 1, from);
  }

  // Sixteen rows of sixteen pairs: within 2 x 2, within quarters, then the quarters.
  static void transpose(__m512i* rows) {
    __m512i t[kSide];
    for (int i = 0; i < 16; i += 2) {
      t[i] = _mm512_unpacklo_epi32(rows[i], rows[i + 1]);
      t[i + 1] = _mm512_unpackhi_epi32(rows[i], rows[i + 1]);
    }
    __m512i u[kSide];
    for (int i = 0; i < 16; i += 4) {
      u[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
      u[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
      u[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
      u[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
    }
    for (int i = 0; i < 4; ++i) {
      const __m512i a = _mm512_shuffle_i32x4(u[i], u[4 + i], 0x88);
      const __m512i b = _mm512_shuffle_i32x4(u[i], u[4 + i], 0xdd);
      const __m512i c = _mm512_shuffle_i32x4(u[8 + i], u[12 + i], 0x88);
      const __m512i d = _mm512_shuffle_i32x4(u[8 + i], u[12 + i], 0xdd);
      rows[i] = _mm512_shuffle_i32x4(a, c, 0x88);
      rows[8 + i] = _mm512_shuffle_i32x4(a, c, 0xdd);
      rows[4 + i] = _mm512_shuffle_i32x4(b, d, 0x88);
      rows[12 + i] = _mm512_shuffle_i32x4(b, d, 0xdd);
    }
  }

 private:
  static constexpr std::int64_t kTileStride = 64;                       // bytes
  static constexpr std::int64_t kScoreStride = kPanel * sizeof(float);  // bytes
};

}  // namespace llfast
