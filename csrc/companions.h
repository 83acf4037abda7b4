// Companions: small tensors (B, tokens) of any dtype that follow the tokens in the same launch.
#pragma once

#include "common.h"

#include <vector>

namespace tokenops {

inline void check_matrix(const char* name, const Tensor& t, const Tensor& like, int64_t columns) {
  STD_TORCH_CHECK(t.dim() == 2 && t.size(0) == like.size(0) && t.size(1) == columns, name, " must have other sizes");
  STD_TORCH_CHECK(t.get_device_index() == like.get_device_index() && t.is_cuda() == like.is_cuda(), name,
                  " must be on the other tensors' device");
}

inline void check_companions(const char* name, const std::vector<Tensor>& companions, const Tensor& like,
                             int64_t columns) {
  STD_TORCH_CHECK(companions.size() <= size_t{MOST_COMPANIONS}, name, " must be at most 4");
  for (const Tensor& c : companions) {
    check_matrix(name, c, like, columns);
    const int64_t bytes = static_cast<int64_t>(c.element_size());
    STD_TORCH_CHECK(bytes == 1 || bytes == 2 || bytes == 4 || bytes == 8, name, " must have 1 to 8 bytes");
  }
}

// (B, N) and (B, k), of the same dtype each
inline void check_pairs(const std::vector<Tensor>& olds, const std::vector<Tensor>& news, const Tensor& like, int64_t N,
                        int64_t k) {
  check_companions("olds", olds, like, N);
  check_companions("news", news, like, k);
  STD_TORCH_CHECK(olds.size() == news.size(), "olds and news must be as many");
  for (size_t c = 0; c < olds.size(); ++c) {
    STD_TORCH_CHECK(olds[c].scalar_type() == news[c].scalar_type(), "olds and news must have the same dtypes");
  }
}

// A companion as bytes
struct Matrix {
  char* data;
  int64_t stride_b, stride_n, bytes;

  explicit Matrix(const Tensor& t)
      : data(static_cast<char*>(t.data_ptr())),
        stride_b(t.stride(0) * static_cast<int64_t>(t.element_size())),
        stride_n(t.stride(1) * static_cast<int64_t>(t.element_size())),
        bytes(static_cast<int64_t>(t.element_size())) {}
  char* at(int64_t b, int64_t n) const { return data + b * stride_b + n * stride_n; }
};

}  // namespace tokenops
