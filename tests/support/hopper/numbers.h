// float16 and bfloat16 as bits.
#pragma once

#include <cstdint>
#include <cstring>

namespace hopper {

inline float widen(uint16_t bits, bool half) {
  float value;
  if (half) {
    _Float16 x;
    std::memcpy(&x, &bits, 2);
    return x;
  }
  const uint32_t wide = uint32_t(bits) << 16;
  std::memcpy(&value, &wide, 4);
  return value;
}

inline uint16_t narrow(float value, bool half) {
  uint16_t bits;
  if (half) {
    const _Float16 x = _Float16(value);
    std::memcpy(&bits, &x, 2);
    return bits;
  }
  uint32_t wide;
  std::memcpy(&wide, &value, 4);
  if (value != value) return 0x7FFF;
  return uint16_t((wide + 0x7FFF + ((wide >> 16) & 1)) >> 16);  // to nearest, ties to even
}

}  // namespace hopper
