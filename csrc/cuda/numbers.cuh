// Floats of every dtype, alone and in packs that one access moves. No launch syntax and no torch in device code: the
// tests compile the same source for the host.
#pragma once

#include "../shared.h"

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#endif
#include <cmath>
#include <cstring>
#include <type_traits>

// Shared memory is declared by SHARED(type, name), and an array whose size the launch gives (`count` says how long it
// is) by DYNAMIC_SHARED(type, name, count), once a kernel. The host emulation replaces both by checked memory.
#ifndef SHARED
#define SHARED(type, name) __shared__ type name
#define DYNAMIC_SHARED(type, name, count)      \
  extern __shared__ uint4 dynamic_memory[];    \
  type* const name = reinterpret_cast<type*>(dynamic_memory)
#endif

namespace tokenops {

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

constexpr int THREADS = 256;  // of a block
constexpr int WARPS = THREADS / 32;

enum class Float : int { F32, BF16, F16, F64 };  // dtypes known at run time

struct BFloat16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

// the dtype of sums
template <typename T>
struct Wide {
  using type = float;
};
template <>
struct Wide<double> {
  using type = double;
};

template <typename T, int V>
struct alignas(sizeof(T) * V) Pack {
  T of[V];
};
template <typename T>
constexpr int MOST_IN_PACK = 16 / sizeof(T);

__device__ inline uint32_t bits_of(float x) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  return bits;
}
__device__ inline uint64_t bits_of(double x) {
  uint64_t bits;
  memcpy(&bits, &x, 8);
  return bits;
}

__device__ inline float widen(float x) { return x; }
__device__ inline double widen(double x) { return x; }
__device__ inline float widen(BFloat16 x) {
  const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  float value;
  memcpy(&value, &bits, 4);
  return value;
}

#ifdef __CUDACC__
__device__ inline float widen(Half x) { return __half2float(__ushort_as_half(x.bits)); }
__device__ inline uint16_t half_bits(float x) { return __half_as_ushort(__float2half_rn(x)); }
__device__ inline uint16_t bfloat16_bits(float x) { return __bfloat16_as_ushort(__float2bfloat16_rn(x)); }
__device__ inline float inverse_root(float x) { return rsqrtf(x); }
__device__ inline double inverse_root(double x) { return rsqrt(x); }
#else
inline float widen(Half x) {
  _Float16 value;
  std::memcpy(&value, &x.bits, 2);
  return static_cast<float>(value);
}
inline uint16_t half_bits(float x) {
  const _Float16 value = static_cast<_Float16>(x);
  uint16_t bits;
  std::memcpy(&bits, &value, 2);
  return bits;
}
inline uint16_t bfloat16_bits(float x) {  // to nearest even
  const uint32_t bits = bits_of(x);
  return static_cast<uint16_t>(x != x ? 0x7fc0u : (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
}
inline float inverse_root(float x) { return 1 / std::sqrt(x); }
inline double inverse_root(double x) { return 1 / std::sqrt(x); }
#endif

// Chosen as words: of elements of 16 bits the compiler would choose each by itself.
template <typename T, int V>
__device__ inline Pack<T, V> pack_or_zeros(const Pack<T, V>* from, bool there) {
  using Words = std::conditional_t<sizeof(Pack<T, V>) == 16, uint4, Pack<T, V>>;
  Words words{};
  if (there) words = *reinterpret_cast<const Words*>(from);
  Pack<T, V> pack;
  memcpy(&pack, &words, sizeof(pack));
  return pack;
}

// Element i; of bfloat16 by one instruction on its word, where the compiler takes three
template <typename T, int V>
__device__ inline typename Wide<T>::type widened(const Pack<T, V>& pack, int i) {
  if constexpr (std::is_same_v<T, BFloat16> && V % 2 == 0) {
    uint32_t word;
    memcpy(&word, &pack.of[i / 2 * 2], 4);
    const uint32_t bits = i % 2 ? word & 0xffff0000u : word << 16;
    float value;
    memcpy(&value, &bits, 4);
    return value;
  } else {
    return widen(pack.of[i]);
  }
}

template <typename T, typename W>
__device__ inline T narrow(W x) {
  if constexpr (std::is_same_v<T, BFloat16>) return {bfloat16_bits(static_cast<float>(x))};
  else if constexpr (std::is_same_v<T, Half>) return {half_bits(static_cast<float>(x))};
  else return static_cast<T>(x);
}

// Where access u of row n of an image lies. V elements are side by side, or V is 1.
template <typename T, int V>
__device__ inline Pack<T, V>* at(const Strided& t, int64_t b, int64_t n, int u) {
  return reinterpret_cast<Pack<T, V>*>(t.data + b * t.stride_b + n * t.stride_n + u * V * t.stride_c);
}

}  // namespace tokenops
