// soft_aggregate on a CPU, as its parts see it: all of it on AMX tiles (soft_aggregate_tiles.cpp), weights on AVX-512
// (soft_aggregate_avx512.cpp) between torch's products, or torch's softmax; soft_aggregate.cpp chooses.
#pragma once

#include "../common.h"

namespace tokenops::soft_aggregate {

// (B, rows, C), channels side by side
struct Tokens {
  char* data = nullptr;
  int64_t stride_b = 0, stride_n = 0;
  Tokens() = default;
  explicit Tokens(const Tensor& t)
      : data(static_cast<char*>(t.data_ptr())), stride_b(t.stride(0)), stride_n(t.stride(1)) {}
};

// (B, N, M) logits, weights and their gradients; strides in elements, of the tokens or of the slots it is 1 (where
// there is one alone, whatever torch says)
struct Logits {
  char* data = nullptr;
  ScalarType type = ScalarType::Float;
  int64_t stride_b = 0, stride_n = 0, stride_m = 0;
  Logits() = default;
  explicit Logits(const Tensor& t)
      : data(static_cast<char*>(t.data_ptr())), type(t.scalar_type()),
        stride_b(t.stride(0)), stride_n(t.size(1) == 1 ? 1 : t.stride(1)), stride_m(t.size(2) == 1 ? 1 : t.stride(2)) {}
};

// Tokens that count, (B, N) bool; null: all
struct Mask {
  const bool* data = nullptr;
  int64_t stride_b = 0, stride_n = 0;
  Mask() = default;
  explicit Mask(const std::optional<Tensor>& mask) {
    if (!mask) return;
    data = static_cast<const bool*>(mask->data_ptr()), stride_b = mask->stride(0), stride_n = mask->stride(1);
  }
  const bool* image(int64_t b) const { return data ? data + b * stride_b : nullptr; }
};

struct Sizes {
  int64_t B, N, M, C, prefix;
};

// bfloat16 x, weights a and y, logits of 16 or 32 bits
void forward_on_tiles(const Sizes& sizes, const Tokens& x, const Logits& w, float scale, const Mask& mask,
                      const Logits& a, const Tokens& y);
// partial, (B, M), may be null: shares of the scale's gradient
void backward_on_tiles(const Sizes& sizes, const Tokens& dy, const Tokens& x, const Logits& w, float scale,
                       const Mask& mask, const Logits& a, const Tokens& dx, const Logits& dw, float* partial);

// They take any 16 or 32 bits and any order in memory.
// a may be written twice, in two orders
void weights_on_avx512(const Sizes& sizes, const Logits& w, float scale, const Mask& mask, const Logits& a,
                       const Logits* turned);
void weights_backward_on_avx512(const Sizes& sizes, const Logits& da, const Logits& a, const Logits& w, float scale,
                                const Logits& dw, float* partial);

}  // namespace tokenops::soft_aggregate
