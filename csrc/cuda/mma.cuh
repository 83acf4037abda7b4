// Products of 16 bits by the tensor cores. What the lanes of a warp hold is laid out as the PTX ISA has it.
#pragma once

#include "numbers.cuh"

namespace tokenops {

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
#define TENSOR_CORES 1  // of 16 bits; before Ampere, and on a host, the same comes of shuffles
#endif

// ldmatrix.x4: lane 8 i + g tells where row g of matrix i is, 8 elements of 16 bits; lane 4 g + t gets elements 2 t and
// 2 t + 1 of row g of each matrix.
__device__ inline void load_matrices(uint32_t (&words)[4], const void* row) {
#ifdef TENSOR_CORES
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
               : "r"(static_cast<uint32_t>(__cvta_generic_to_shared(row)))
               : "memory");
#else
  const int lane = threadIdx.x % 32;
  const auto place = reinterpret_cast<unsigned long long>(row);
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    words[i] = reinterpret_cast<const uint32_t*>(__shfl_sync(~0u, place, 8 * i + lane / 4))[lane % 4];
  }
#endif
}

// mma.m16n8k16: sums (16 x 8) += a (16 x 16) times b (16 x 8), in fp32. Of lane 4 g + t:
// a: columns 2 t and 2 t + 1 of rows g and g + 8, then columns 2 t + 8 and 2 t + 9 of them
// b: rows 2 t and 2 t + 1 of column g, then rows 2 t + 8 and 2 t + 9
// sums: columns 2 t and 2 t + 1 of row g, then of row g + 8
template <typename T>
__device__ inline void multiply(float (&sums)[4], const uint32_t (&a)[4], uint32_t low, uint32_t high) {
#ifdef TENSOR_CORES
#define MMA(type)                                                                    \
  asm("mma.sync.aligned.m16n8k16.row.col.f32." type "." type ".f32 "                 \
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"              \
      : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])                   \
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(low), "r"(high))
  if constexpr (std::is_same_v<T, BFloat16>) MMA("bf16");
  else MMA("f16");
#undef MMA
#else
  const int lane = threadIdx.x % 32;
  const auto half = [](uint32_t word, int k) { return widen(T{static_cast<uint16_t>(k ? word >> 16 : word)}); };
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int column = lane % 4 * 2 + i % 2;
#pragma unroll
    for (int k = 0; k < 8; ++k) {  // two of the 16 at a time
      const uint32_t left = __shfl_sync(~0u, a[i / 2 + k / 4 * 2], lane / 4 * 4 + k % 4);
      const uint32_t right = __shfl_sync(~0u, k < 4 ? low : high, column * 4 + k % 4);
      sums[i] += half(left, 0) * half(right, 0) + half(left, 1) * half(right, 1);
    }
  }
#endif
}

#undef TENSOR_CORES

}  // namespace tokenops
