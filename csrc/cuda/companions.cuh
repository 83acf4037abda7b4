// Companions on a GPU: small tensors (B, tokens) of any dtype that follow the tokens in the same launch.
#pragma once

#include "numbers.cuh"

namespace tokenops {

struct Companion {
  char* data;
  int64_t stride_b, stride_n;  // in bytes

  __device__ char* at(int64_t b, int64_t n) const { return data + b * stride_b + n * stride_n; }
};

// A value of 1, 2, 4 or 8 bytes, zero where there is no source.
__device__ inline void move(int bytes, char* to, const char* from) {
  if (bytes == 8) *reinterpret_cast<int64_t*>(to) = from ? *reinterpret_cast<const int64_t*>(from) : 0;
  else if (bytes == 4) *reinterpret_cast<int32_t*>(to) = from ? *reinterpret_cast<const int32_t*>(from) : 0;
  else if (bytes == 2) *reinterpret_cast<int16_t*>(to) = from ? *reinterpret_cast<const int16_t*>(from) : 0;
  else *to = from ? *from : 0;
}

}  // namespace tokenops
