// Products of 16 bits by the tensor cores. What the lanes of a warp hold is laid out as the PTX ISA has it.
#pragma once

#include "numbers.cuh"

namespace tokenops {

// ldmatrix.x4: lane 8 i + g tells where row g of matrix i is, 8 elements of 16 bits; lane 4 g + t gets elements 2 t and
// 2 t + 1 of row g of each matrix.
__device__ inline void load_matrices(uint32_t (&words)[4], const void* row) {
#ifdef __CUDACC__
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
               : "r"(static_cast<uint32_t>(__cvta_generic_to_shared(row)))
               : "memory");
#else
  const auto rows = emulation::of_all_lanes(row);
  const unsigned lane = threadIdx.x % 32;
  for (unsigned i = 0; i < 4; ++i) words[i] = static_cast<const uint32_t*>(rows[8 * i + lane / 4])[lane % 4];
#endif
}

// mma.m16n8k16: sums (16 x 8) += a (16 x 16) times b (16 x 8), in fp32. Of lane 4 g + t:
// a: columns 2 t and 2 t + 1 of rows g and g + 8, then columns 2 t + 8 and 2 t + 9 of them
// b: rows 2 t and 2 t + 1 of column g, then rows 2 t + 8 and 2 t + 9
// sums: columns 2 t and 2 t + 1 of row g, then of row g + 8
template <typename T>
__device__ inline void multiply(float (&sums)[4], const uint32_t (&a)[4], uint32_t low, uint32_t high) {
#ifdef __CUDACC__
#define MMA(type)                                                                    \
  asm("mma.sync.aligned.m16n8k16.row.col.f32." type "." type ".f32 "                 \
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"              \
      : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])                   \
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(low), "r"(high))
  if constexpr (std::is_same_v<T, BFloat16>) MMA("bf16");
  else MMA("f16");
#undef MMA
#else
  struct Lane {
    uint32_t a[4], b[2];
  };
  const auto lanes = emulation::of_all_lanes(Lane{{a[0], a[1], a[2], a[3]}, {low, high}});
  const auto half = [](uint32_t word, int k) { return widen(T{static_cast<uint16_t>(k % 2 ? word >> 16 : word)}); };
  for (int i = 0; i < 4; ++i) {
    const int row = threadIdx.x % 32 / 4 + i / 2 * 8, column = threadIdx.x % 4 * 2 + i % 2;
    for (int k = 0; k < 16; ++k) {
      const int t = k % 8 / 2;
      const uint32_t left = lanes[row % 8 * 4 + t].a[row / 8 + k / 8 * 2], right = lanes[column * 4 + t].b[k / 8];
      sums[i] += half(left, k) * half(right, k);
    }
  }
#endif
}

}  // namespace tokenops
