// A batch of rows as the kernels see it. Strides are in bytes, so one kernel serves every dtype of a size.
#pragma once

#include <cstdint>

namespace tokenops {

struct Strided {
  char* data;
  int64_t stride_b, stride_n, stride_c;
};

}  // namespace tokenops
