// What device code shares. No launch syntax and no torch: the tests compile the same source for the host.
#pragma once

#include <cstdint>

// Shared memory is declared by SHARED(type, name), and an array whose size the launch gives (`count` says how long it
// is) by DYNAMIC_SHARED(type, name, count), once a kernel. The host emulation replaces both by checked memory.
#ifndef SHARED
#define SHARED(type, name) __shared__ type name
#define DYNAMIC_SHARED(type, name, count)      \
  extern __shared__ uint4 dynamic_memory[];    \
  type* const name = reinterpret_cast<type*>(dynamic_memory)
#endif

namespace tokenops {

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Calls f with a value of the unsigned type (or CUDA vector) of `width` bytes: 2, 4, 8 or 16.
template <typename F>
void with_unit(int width, const F& f) {
  if (width == 16) f(uint4{});
  else if (width == 8) f(uint2{});
  else if (width == 4) f(uint32_t{});
  else f(uint16_t{});
}

}  // namespace tokenops
