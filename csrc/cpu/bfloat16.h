// bfloat16 is the upper half of a float.
#pragma once

#include <cstdint>
#include <cstring>

#include "isa.h"

namespace tokenops {

INLINE float from_bits(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}
INLINE uint32_t to_bits(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}
INLINE float from_bfloat16(uint16_t x) { return from_bits(static_cast<uint32_t>(x) << 16); }
INLINE uint16_t to_bfloat16(float x) {  // to nearest even
  const uint32_t bits = to_bits(x);
  return (bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
}

}  // namespace tokenops
