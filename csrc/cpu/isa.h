// Which instruction sets kernels are compiled for and may use on this CPU: those that it has, and no better than what
// was allowed.
#pragma once

// GCC's pragmas for instruction sets, and, of AMX, an assembler that knows it and a system that has to permit it
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define TOKENOPS_X86 1
#if __GNUC__ >= 11 && defined(__linux__)
#define TOKENOPS_TILES 1
#endif
#endif

#define INLINE static inline __attribute__((always_inline))

namespace tokenops {

enum class Isa { Amx, Avx512Bf16, Avx512, Avx2, Baseline };  // the best first

bool usable(Isa isa);

// Whether products of bfloat16 pairs on AVX-512 are no faster than those of floats: so on Intel, measured (2.1 cycles
// each).
bool slow_pairs();

}  // namespace tokenops
