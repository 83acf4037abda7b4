// What the CPU's and the GPU's bipartite merging share: the two sides, the checks and the tensors that come out.
#pragma once

#include "companions.h"

namespace tokenops {

// The N tokens behind the prefix, by the parity of their row: those of even rows look for their like in odd rows.
// Even i is token even(i), odd j is token odd(j); after r went, the left ones of the even come first, then the odd.
struct Sides {
  int64_t prefix, tokens, evens, odds;

  Sides(int64_t P, int64_t rows)
      : prefix(P), tokens(rows - P), evens((rows + 1) / 2 - (P + 1) / 2), odds(rows / 2 - P / 2) {}

  int64_t even(int64_t i) const { return prefix % 2 + 2 * i; }
  int64_t odd(int64_t j) const { return 1 - prefix % 2 + 2 * j; }
  int64_t most() const { return odds > 0 ? evens : 0; }
};

inline void check_prefix(int64_t prefix, int64_t rows) {
  STD_TORCH_CHECK(prefix >= 0 && prefix <= rows, "prefix must be between 0 and the number of rows");
}

inline Sides checked_sides(const Tensor& metric, int64_t r, int64_t prefix) {
  STD_TORCH_CHECK(metric.dim() == 3, "metric must have 3 dimensions");
  check_float("metric", metric);
  check_prefix(prefix, metric.size(1));
  const Sides sides(prefix, metric.size(1));
  STD_TORCH_CHECK(r >= 0 && r <= sides.most(), "r must be between 0 and the number of even rows");
  return sides;
}

// (B, N) int64
inline Tensor new_index(const Tensor& metric, const Sides& sides) {
  return new_tensor(metric, {metric.size(0), sides.tokens}, ScalarType::Long);
}

// x is (B, P + its tokens, C)
inline void check_tokens(const char* name, const Tensor& x, const Tensor& index, int64_t prefix) {
  STD_TORCH_CHECK(x.dim() == 3, name, " must have 3 dimensions");
  check_float(name, x);
  check_prefix(prefix, x.size(1));
  check_index("index", index, x);
}

// x is (B, P + N, C) and index (B, N)
inline void check_indexed(const char* name, const Tensor& x, const Tensor& index, int64_t prefix) {
  check_tokens(name, x, index, prefix);
  STD_TORCH_CHECK(index.size(1) == x.size(1) - prefix, "index must have an entry for each token of ", name);
}

inline void check_sizes(const char* name, const Tensor& sizes, const Tensor& like, int64_t rows) {
  check_matrix(name, sizes, like, rows);
  check_float(name, sizes);
}

// (B, P + tokens, C) like x: of a gather from it, or a sum by index
inline Tensor new_tokens(const Tensor& x, int64_t prefix, int64_t tokens) {
  STD_TORCH_CHECK(tokens >= 0, "tokens must be at least 0");
  return new_tensor(x, {x.size(0), prefix + tokens, x.size(2)});
}

// Like the results of merge_bipartite_fwd, in its order.
struct MergedTokens {
  Tensor y, sizes, log_sizes, normed, statistics;

  MergedTokens(const Tensor& x, const Tensor& index, int64_t tokens, const std::optional<Tensor>& given,
               int64_t prefix, bool norm)
      : MergedTokens(x, checked(x, index, tokens, given, prefix), norm) {}

  auto tuple() const { return std::make_tuple(y, sizes, log_sizes, normed, statistics); }

 private:
  using Shape = std::vector<int64_t>;

  static int64_t checked(const Tensor& x, const Tensor& index, int64_t tokens, const std::optional<Tensor>& given,
                         int64_t prefix) {
    check_indexed("x", x, index, prefix);
    STD_TORCH_CHECK(tokens >= 0, "tokens must be at least 0");
    if (given) check_sizes("sizes", *given, x, x.size(1));
    return prefix + tokens;
  }

  MergedTokens(const Tensor& x, int64_t rows, bool norm)
      : y(new_tensor(x, {x.size(0), rows, x.size(2)})),
        sizes(new_tensor(x, {x.size(0), rows}, wide_type(x))),
        log_sizes(new_tensor(x, {x.size(0), rows}, wide_type(x))),
        normed(new_tensor(x, norm ? Shape{x.size(0), rows, x.size(2)} : Shape{0})),
        statistics(new_tensor(x, norm ? Shape{2, x.size(0), rows} : Shape{0}, wide_type(x))) {}
};

// dx of merge_bipartite_bwd, (B, P + N, C), its arguments checked; merged is (B, P + M) in the accumulation dtype
inline Tensor new_merge_gradient(const Tensor& dy, const Tensor& index, const std::optional<Tensor>& sizes,
                                 const Tensor& merged, int64_t prefix) {
  check_tokens("dy", dy, index, prefix);
  check_matrix("merged", merged, dy, dy.size(1));
  STD_TORCH_CHECK(merged.scalar_type() == wide_type(dy), "merged must be in the accumulation dtype");
  if (sizes) check_sizes("sizes", *sizes, dy, prefix + index.size(1));
  return new_tokens(dy, prefix, index.size(1));
}

}  // namespace tokenops
