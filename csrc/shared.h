// What kernels and the code around them share, without torch.
#pragma once

#include <cstdint>

namespace tokenops {

// A batch of rows. Strides are in bytes, so one kernel serves every dtype of a size.
struct Strided {
  char* data;
  int64_t stride_b, stride_n, stride_c;
};

// What select_tokens makes of the tokens it leaves out
enum class Rest : int { None, Weighted, Normalized, Mean };

constexpr int MOST_COMPANIONS = 4;

}  // namespace tokenops
