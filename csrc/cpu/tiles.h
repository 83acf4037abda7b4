// The tiles of AMX, eight a thread, as statements: by name, so that inline assembly can write them into instructions.
#pragma once

#include <cstdint>
#include <cstring>

#include "bfloat16.h"

#ifdef TOKENOPS_EMULATED_TILES
// In memory, for sanitizers, which see nothing of assembly, and for machines without.
namespace tokenops::amx {

struct Tile {
  char rows[16][64];
};
inline thread_local Tile registers[8];

inline void load(Tile& tile, const void* from, int64_t stride) {
  for (int i = 0; i < 16; ++i) std::memcpy(tile.rows[i], static_cast<const char*>(from) + i * stride, 64);
}
inline void store(const Tile& tile, void* to, int64_t stride) {
  for (int i = 0; i < 16; ++i) std::memcpy(static_cast<char*>(to) + i * stride, tile.rows[i], 64);
}
inline void multiply(Tile& c, const Tile& a, const Tile& b) {
  for (int i = 0; i < 16; ++i) {
    float sums[16];
    uint16_t left[32], right[32];
    std::memcpy(sums, c.rows[i], 64), std::memcpy(left, a.rows[i], 64);
    for (int k = 0; k < 16; ++k) {
      std::memcpy(right, b.rows[k], 64);
      for (int n = 0; n < 32; ++n) {
        sums[n / 2] += from_bfloat16(left[2 * k + n % 2]) * from_bfloat16(right[n]);
      }
    }
    std::memcpy(c.rows[i], sums, 64);
  }
}
inline void configure(void*, const void*) {}
inline void restore(const void*) {}

}  // namespace tokenops::amx

#define TILE_LOAD(t, p, stride) tokenops::amx::load(tokenops::amx::registers[t], p, stride)
#define TILE_STORE(t, p, stride) tokenops::amx::store(tokenops::amx::registers[t], p, stride)
#define TILE_ZERO(t) tokenops::amx::registers[t] = {}
#define TILE_PRODUCT(c, a, b) \
  tokenops::amx::multiply(tokenops::amx::registers[c], tokenops::amx::registers[a], tokenops::amx::registers[b])
#else
// The compiler's own intrinsics do not say that loads read memory.
#define TILE_LOAD(t, p, stride)                                                                              \
  __asm__ volatile("tileloadd (%0,%1,1), %%tmm" #t ::"r"(static_cast<const void*>(p)), "r"(int64_t{stride}) \
                   : "memory")
#define TILE_STORE(t, p, stride)                                                                        \
  __asm__ volatile("tilestored %%tmm" #t ", (%0,%1,1)" ::"r"(static_cast<void*>(p)), "r"(int64_t{stride}) \
                   : "memory")
#define TILE_ZERO(t) __asm__ volatile("tilezero %%tmm" #t ::)
#define TILE_PRODUCT(c, a, b) __asm__ volatile("tdpbf16ps %%tmm" #b ", %%tmm" #a ", %%tmm" #c ::)  // c += a b

namespace tokenops::amx {

inline void configure(char (&before)[64], const char (&now)[64]) {
  __asm__ volatile("sttilecfg %0" : "=m"(before)::"memory");
  __asm__ volatile("ldtilecfg %0" ::"m"(now) : "memory");
}
inline void restore(const char (&before)[64]) {
  if (before[0]) __asm__ volatile("ldtilecfg %0" ::"m"(before) : "memory");
  else __asm__ volatile("tilerelease" ::);
}

}  // namespace tokenops::amx
#endif

namespace tokenops::amx {

// All eight tiles are whole, and denormal floats are zeros (they are slow), for as long as it lives; then all is as it
// was (oneDNN keeps a configuration of its own).
struct Tiles {
  alignas(64) char before[64];
  const unsigned control = __builtin_ia32_stmxcsr();
  Tiles() {
    alignas(64) char whole[64] = {1};  // palette 1; from 16 on the bytes of rows, two each; from 48 on the rows
    for (int i = 0; i < 8; ++i) whole[16 + 2 * i] = 64, whole[48 + i] = 16;
    configure(before, whole);
    __builtin_ia32_ldmxcsr(control | 0x8040);
  }
  ~Tiles() {
    restore(before);
    __builtin_ia32_ldmxcsr(control);
  }
  Tiles(const Tiles&) = delete;
};

}  // namespace tokenops::amx
