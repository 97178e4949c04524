// AMX's tiles in plain C++, for processors that have none. Included before a source by the
// compiler's option, it stands in for the intrinsics.
#pragma once

#include <immintrin.h>

#include <cstddef>
#include <cstdint>
#include <cstring>

namespace emulated {

constexpr int kRows = 16;
constexpr int kRowBytes = 64;

struct Tile {
  unsigned char rows[kRows][kRowBytes];

  template <class T>
  T at(int row, int column) const {
    T value;
    std::memcpy(&value, &rows[row][static_cast<std::size_t>(column) * sizeof(T)], sizeof value);
    return value;
  }
};

inline thread_local Tile tiles[8];
inline thread_local bool configured = false;

// Only tiles of the full size are asked for; anything else shows in the results.
inline void configure(const void* config) {
  const auto* bytes = static_cast<const unsigned char*>(config);
  configured = bytes[0] == 1;
  for (int tile = 0; tile < 8; ++tile) {
    configured = configured && bytes[16 + 2 * tile] == kRowBytes && bytes[48 + tile] == kRows;
  }
}

inline void release() { configured = false; }

inline void zero(int tile) { std::memset(&tiles[tile], configured ? 0 : 0xff, sizeof(Tile)); }

inline void load(int tile, const void* from, std::ptrdiff_t stride) {
  for (int row = 0; row < kRows; ++row) {
    std::memcpy(tiles[tile].rows[row], static_cast<const char*>(from) + row * stride, kRowBytes);
  }
}

inline void store(int tile, void* to, std::ptrdiff_t stride) {
  for (int row = 0; row < kRows; ++row) {
    std::memcpy(static_cast<char*>(to) + row * stride, tiles[tile].rows[row], kRowBytes);
  }
}

inline float of_bf16(std::uint16_t bits) {
  const std::uint32_t wide = static_cast<std::uint32_t>(bits) << 16;
  float value;
  std::memcpy(&value, &wide, sizeof value);
  return value;
}

inline void multiply_add(int sums, int left, int right) {
  for (int row = 0; row < kRows; ++row) {
    for (int column = 0; column < kRows; ++column) {
      float sum = tiles[sums].at<float>(row, column);
      for (int k = 0; k < 2 * kRows; ++k) {
        sum += of_bf16(tiles[left].at<std::uint16_t>(row, k)) *
               of_bf16(tiles[right].at<std::uint16_t>(k / 2, 2 * column + k % 2));
      }
      std::memcpy(&tiles[sums].rows[row][static_cast<std::size_t>(column) * sizeof sum], &sum,
                  sizeof sum);
    }
  }
}

}  // namespace emulated

#undef _tile_loadconfig
#undef _tile_release
#undef _tile_zero
#undef _tile_loadd
#undef _tile_stored
#undef _tile_dpbf16ps
#define _tile_loadconfig(config) emulated::configure(config)
#define _tile_release() emulated::release()
#define _tile_zero(tile) emulated::zero(tile)
#define _tile_loadd(tile, from, stride) emulated::load(tile, from, stride)
#define _tile_stored(tile, to, stride) emulated::store(tile, to, stride)
#define _tile_dpbf16ps(sums, left, right) emulated::multiply_add(sums, left, right)
