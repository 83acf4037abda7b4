// restore_tokens on a CPU: one pass that copies whole rows, in parallel over the rows of all images.
#include "../common.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

namespace tokenops {
namespace {

constexpr int64_t GRAIN_BYTES = 1 << 15;  // less than this is not worth a second thread

// (B, rows): the row of tokens that replaces a row of base, or -1. torch makes std::out_of_range Python's IndexError
// (and, from 2.15 on, every other standard exception a RuntimeError).
std::vector<int64_t> owners(const Tensor& index, int64_t rows, int64_t prefix, int64_t carried) {
  const int64_t B = index.size(0), k = index.size(1), stride_b = index.stride(0), stride_k = index.stride(1);
  const int64_t* data = static_cast<const int64_t*>(index.data_ptr());
  std::vector<int64_t> owner(B * rows, -1);
  for (int64_t b = 0; b < B; ++b) {
    int64_t* image = owner.data() + b * rows;
    for (int64_t n = 0; n < carried; ++n) image[n] = n;
    for (int64_t j = 0; j < k; ++j) {
      const int64_t n = data[b * stride_b + j * stride_k];
      const auto place = [&] {
        return "restore_tokens: index[" + std::to_string(b) + ", " + std::to_string(j) + "]=" + std::to_string(n);
      };
      if (n < 0 || n >= rows - prefix) {
        throw std::out_of_range(place() + ", but base has " + std::to_string(rows - prefix) +
                                " tokens after a prefix of " + std::to_string(prefix) + ": 0 to " +
                                std::to_string(rows - prefix - 1) + " is allowed");
      }
      int64_t& slot = image[prefix + n];
      if (slot >= 0) throw std::out_of_range(place() + " is there twice, but the indices of an image must be unique");
      slot = carried + j;
    }
  }
  return owner;
}

template <typename Unit>
void copy_strided(char* out, const char* in, int64_t C, int64_t out_stride, int64_t in_stride) {
  for (int64_t c = 0; c < C; ++c) std::memcpy(out + c * out_stride, in + c * in_stride, sizeof(Unit));
}

// What a row of C elements needs to be copied into a contiguous one.
struct Row {
  int64_t C, bytes;
  void copy(char* out, const char* in, int64_t in_stride) const {
    if (in_stride == bytes || C == 1) std::memcpy(out, in, C * bytes);
    else if (bytes == 2) copy_strided<int16_t>(out, in, C, bytes, in_stride);
    else if (bytes == 4) copy_strided<int32_t>(out, in, C, bytes, in_stride);
    else copy_strided<int64_t>(out, in, C, bytes, in_stride);
  }
};

template <typename F>
void for_rows(int64_t B, int64_t rows, int64_t row_bytes, const F& f) {
  const int64_t grain = std::max<int64_t>(1, GRAIN_BYTES / std::max<int64_t>(1, row_bytes));
  torch::stable::parallel_for(0, B * rows, grain, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin, b = begin / rows, n = begin % rows; r < end; ++r) {
      f(r, b, n);
      if (++n == rows) n = 0, ++b;
    }
  });
}

Tensor restore_tokens_fwd(const Tensor& base, const Tensor& tokens, const Tensor& index, int64_t prefix) {
  check_rows("tokens", tokens, base);
  check_index("index", index, base);
  const int64_t B = base.size(0), rows = base.size(1), C = base.size(2), carried = tokens.size(1) - index.size(1);
  check_carried(carried, prefix, rows);
  const auto owner = owners(index, rows, prefix, carried);
  Tensor y = torch::stable::new_empty(base, {B, rows, C});
  if (y.numel() == 0) return y;

  const Row row{C, static_cast<int64_t>(base.element_size())};
  const Strided from_base = strided(base), from_tokens = strided(tokens);
  char* out = static_cast<char*>(y.data_ptr());
  for_rows(B, rows, C * row.bytes, [&](int64_t r, int64_t b, int64_t n) {
    const Strided& from = owner[r] < 0 ? from_base : from_tokens;
    const int64_t source = owner[r] < 0 ? n : owner[r];
    row.copy(out + r * C * row.bytes, from.data + b * from.stride_b + source * from.stride_n, from.stride_c);
  });
  return y;
}

std::tuple<Tensor, Tensor> restore_tokens_bwd(const Tensor& dy, const Tensor& index, int64_t prefix, int64_t carried) {
  check_rows("dy", dy, dy);
  check_index("index", index, dy);
  const int64_t B = dy.size(0), rows = dy.size(1), C = dy.size(2), given = carried + index.size(1);
  check_carried(carried, prefix, rows);
  const auto owner = owners(index, rows, prefix, carried);
  Tensor dbase = torch::stable::new_empty(dy, {B, rows, C}), dtokens = torch::stable::new_empty(dy, {B, given, C});
  if (dbase.numel() == 0) return {dbase, dtokens};  // then dtokens is empty too: every index has its row

  const Row row{C, static_cast<int64_t>(dy.element_size())};
  const Strided from = strided(dy);
  char *to_base = static_cast<char*>(dbase.data_ptr()), *to_tokens = static_cast<char*>(dtokens.data_ptr());
  for_rows(B, rows, C * row.bytes, [&](int64_t r, int64_t b, int64_t n) {
    char* target = to_base + r * C * row.bytes;
    if (owner[r] >= 0) {
      std::memset(target, 0, C * row.bytes);
      target = to_tokens + (b * given + owner[r]) * C * row.bytes;
    }
    row.copy(target, from.data + b * from.stride_b + n * from.stride_n, from.stride_c);
  });
  return {dbase, dtokens};
}

}  // namespace
}  // namespace tokenops

STABLE_TORCH_LIBRARY_IMPL(tokenops, CPU, m) {
  m.impl("restore_tokens_fwd.native", TORCH_BOX(&tokenops::restore_tokens_fwd));
  m.impl("restore_tokens_bwd.native", TORCH_BOX(&tokenops::restore_tokens_bwd));
}
