// restore_tokens on a CPU: one pass that copies whole rows, in parallel over the rows of all images.
#include "../companions.h"
#include "rows.h"

#include <stdexcept>
#include <string>
#include <vector>

namespace tokenops {
namespace {

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
      if (n == -1) continue;
      const auto place = [&] {
        return "restore_tokens: index[" + std::to_string(b) + ", " + std::to_string(j) + "]=" + std::to_string(n);
      };
      if (n < 0 || n >= rows - prefix) {
        throw std::out_of_range(place() + ", but base has " + std::to_string(rows - prefix) +
                                " tokens after a prefix of " + std::to_string(prefix) + ": 0 to " +
                                std::to_string(rows - prefix - 1) + " is allowed (and -1, which goes nowhere)");
      }
      int64_t& slot = image[prefix + n];
      if (slot >= 0) throw std::out_of_range(place() + " is there twice, but the indices of an image must be unique");
      slot = carried + j;
    }
  }
  return owner;
}

std::tuple<Tensor, std::vector<Tensor>> restore_tokens_fwd(Tensor base, Tensor tokens, Tensor index, int64_t prefix,
                                                           std::vector<Tensor> olds, std::vector<Tensor> news) {
  check_rows("tokens", tokens, base);
  check_index("index", index, base);
  const int64_t B = base.size(0), rows = base.size(1), C = base.size(2), carried = tokens.size(1) - index.size(1);
  check_carried(carried, prefix, rows);
  const int64_t N = rows - prefix;
  check_pairs(olds, news, base, N, index.size(1));
  const auto owner = owners(index, rows, prefix, carried);
  Tensor y = new_tensor(base, {B, rows, C});
  std::vector<Tensor> made;
  for (size_t c = 0; c < olds.size(); ++c) {
    made.push_back(new_tensor(olds[c], {B, N}));
    const Matrix old(olds[c]), fresh(news[c]), out(made[c]);
    for (int64_t b = 0; b < B; ++b) {
      for (int64_t n = 0; n < N; ++n) {
        const int64_t j = owner[b * rows + prefix + n] - carried;
        std::memcpy(out.at(b, n), j >= 0 ? fresh.at(b, j) : old.at(b, n), out.bytes);
      }
    }
  }
  if (y.numel() == 0) return {y, made};

  const Row row{C, static_cast<int64_t>(base.element_size())};
  const Strided from_base = strided(base), from_tokens = strided(tokens);
  char* out = static_cast<char*>(y.data_ptr());
  for_rows(B, rows, C * row.bytes, [&](int64_t r, int64_t b, int64_t n) {
    const Strided& from = owner[r] < 0 ? from_base : from_tokens;
    const int64_t source = owner[r] < 0 ? n : owner[r];
    row.copy(out + r * C * row.bytes, from.data + b * from.stride_b + source * from.stride_n, from.stride_c);
  });
  return {y, made};
}

std::tuple<Tensor, Tensor, std::vector<Tensor>, std::vector<Tensor>> restore_tokens_bwd(
    Tensor dy, Tensor index, int64_t prefix, int64_t carried, std::vector<Tensor> dcompanions) {
  check_rows("dy", dy, dy);
  check_index("index", index, dy);
  const int64_t B = dy.size(0), rows = dy.size(1), C = dy.size(2), k = index.size(1), given = carried + k;
  check_carried(carried, prefix, rows);
  const int64_t N = rows - prefix;
  check_companions("dcompanions", dcompanions, dy, N);
  const auto owner = owners(index, rows, prefix, carried);
  Tensor dbase = new_tensor(dy, {B, rows, C}), dtokens = new_tensor(dy, {B, given, C});
  std::vector<Tensor> dolds, dnews;
  for (size_t c = 0; c < dcompanions.size(); ++c) {
    dolds.push_back(new_tensor(dcompanions[c], {B, N}));
    dnews.push_back(new_tensor(dcompanions[c], {B, k}));
    const Matrix from(dcompanions[c]), old(dolds[c]), fresh(dnews[c]);
    if (B * k > 0) std::memset(fresh.at(0, 0), 0, B * k * fresh.bytes);
    for (int64_t b = 0; b < B; ++b) {
      for (int64_t n = 0; n < N; ++n) {
        const int64_t j = owner[b * rows + prefix + n] - carried;
        if (j >= 0) std::memset(old.at(b, n), 0, old.bytes);
        std::memcpy(j >= 0 ? fresh.at(b, j) : old.at(b, n), from.at(b, n), from.bytes);
      }
    }
  }

  const Row row{C, static_cast<int64_t>(dy.element_size())};
  const Strided from = strided(dy);
  char *to_base = static_cast<char*>(dbase.data_ptr()), *to_tokens = static_cast<char*>(dtokens.data_ptr());
  // tokens that go nowhere
  const int64_t* places = static_cast<const int64_t*>(index.data_ptr());
  for (int64_t b = 0; b < B; ++b) {
    for (int64_t j = 0; j < k; ++j) {
      if (places[b * index.stride(0) + j * index.stride(1)] != -1) continue;
      row.zero(to_tokens + (b * given + carried + j) * C * row.bytes);
    }
  }
  if (dbase.numel() == 0) return {dbase, dtokens, dolds, dnews};
  for_rows(B, rows, C * row.bytes, [&](int64_t r, int64_t b, int64_t n) {
    char* target = to_base + r * C * row.bytes;
    if (owner[r] >= 0) {
      row.zero(target);
      target = to_tokens + (b * given + owner[r]) * C * row.bytes;
    }
    row.copy(target, from.data + b * from.stride_b + n * from.stride_n, from.stride_c);
  });
  return {dbase, dtokens, dolds, dnews};
}

}  // namespace
}  // namespace tokenops

STABLE_TORCH_LIBRARY_IMPL(tokenops, CPU, m) {
  m.impl("restore_tokens_fwd.native", TORCH_BOX(&tokenops::restore_tokens_fwd));
  m.impl("restore_tokens_bwd.native", TORCH_BOX(&tokenops::restore_tokens_bwd));
}
