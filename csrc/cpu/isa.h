// Which instruction sets kernels may use on this CPU: those that it has, and no better than what was allowed.
#pragma once

namespace tokenops {

enum class Isa { Amx, Avx512Bf16, Avx512, Avx2, Baseline };  // the best first

bool usable(Isa isa);

// Whether products of bfloat16 pairs on AVX-512 are no faster than those of floats: so on Intel, measured (2.1 cycles each).
bool slow_pairs();

}  // namespace tokenops
