// Half-precision storage types, and their exact conversion to fp32 in plain C++.
#pragma once

#include <cstdint>
#include <cstring>

namespace llfast {

inline float float_of_bits(std::uint32_t bits) {
  float value = 0;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

struct BFloat16 {
  std::uint16_t bits;

  float value() const { return float_of_bits(static_cast<std::uint32_t>(bits) << 16); }
};

struct Float16 {
  std::uint16_t bits;

  float value() const {
    // The exponent's bias differs by 112; the product puts it right for subnormals as well.
    const std::uint32_t magnitude = (bits & 0x7fffu) << 13;
    const float scaled = float_of_bits(magnitude) * 0x1p112f;
    std::uint32_t result = 0;
    std::memcpy(&result, &scaled, sizeof result);
    if (magnitude >= 0x0f800000u) result |= 0x7f800000u;  // infinity or NaN
    return float_of_bits(result | (bits & 0x8000u) << 16);
  }
};

}  // namespace llfast
