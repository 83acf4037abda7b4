// Which instruction sets kernels may use on this CPU: those that it has, and no better than what was allowed.
#pragma once

namespace tokenops {

enum class Isa { Amx, Avx512Bf16, Avx512, Avx2, Baseline };  // the best first

bool usable(Isa isa);

}  // namespace tokenops
