// What select_tokens makes of the tokens it leaves out, as kernels and launchers name it.
#pragma once

namespace tokenops {

enum class Rest : int { None, Weighted, Normalized, Mean };

}  // namespace tokenops
