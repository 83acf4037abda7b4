// Bipartite merging on a CPU, and its way back: one pass over the rows of the result, each copied, or summed from those
// that go into it, and normalised while it is at hand.
#include "matching.h"
#include "vector_rows.h"

#include <array>
#include <numeric>
#include <stdexcept>
#include <string>

namespace tokenops {
namespace {

// An index (B, N) of any strides
struct Index {
  const int64_t *data, stride_b, stride_n, images, tokens;

  explicit Index(const Tensor& t)
      : data(static_cast<const int64_t*>(t.data_ptr())), stride_b(t.stride(0)), stride_n(t.stride(1)),
        images(t.size(0)), tokens(t.size(1)) {}
  int64_t operator()(int64_t b, int64_t n) const { return data[b * stride_b + n * stride_n]; }

  // torch makes std::out_of_range Python's IndexError; thrown from here, not from where threads are
  void check(const char* op, int64_t M) const {
    for (int64_t b = 0; b < images; ++b) {
      for (int64_t n = 0; n < tokens; ++n) {
        const int64_t t = (*this)(b, n);
        if (t >= 0 && t < M) continue;
        throw std::out_of_range(std::string(op) + ": index[" + std::to_string(b) + ", " + std::to_string(n) +
                                "]=" + std::to_string(t) + ", but it must be from 0 to " + std::to_string(M - 1) +
                                ": there are " + std::to_string(M) + " tokens behind the prefix");
      }
    }
  }
};

// Which tokens go into each of M, image by image, in their order; known once an image is filled.
struct Sources {
  const Index index;
  const int64_t M, N;
  std::vector<int32_t> begins, tokens;  // (B, M + 1), (B, N)

  Sources(const Index& index_, int64_t M_)
      : index(index_), M(M_), N(index.tokens), begins(index.images * (M + 1)), tokens(index.images * N) {}

  void fill(int64_t b) {
    int32_t *const ends = begins.data() + b * (M + 1), *const found = tokens.data() + b * N;
    for (int64_t n = 0; n < N; ++n) ++ends[index(b, n)];
    std::partial_sum(ends, ends + M + 1, ends);
    for (int64_t n = N - 1; n >= 0; --n) found[--ends[index(b, n)]] = static_cast<int32_t>(n);  // ends become begins
  }

  struct Range {
    const int32_t *first, *last;
    const int32_t* begin() const { return first; }
    const int32_t* end() const { return last; }
    int64_t size() const { return last - first; }
  };
  Range of(int64_t b, int64_t m) const {
    const int32_t *const image = tokens.data() + b * N, *const at = begins.data() + b * (M + 1) + m;
    return {image + at[0], image + at[1]};
  }
};

// How many each token counts, (B, rows), known once an image is filled; 1 where nothing is given
template <typename Wide>
struct Sizes {
  const std::optional<Tensor>& given;
  const int64_t rows;
  std::vector<Wide> values;

  explicit Sizes(const std::optional<Tensor>& t) : given(t), rows(t ? t->size(1) : 0), values(t ? t->numel() : 0) {}

  void fill(int64_t b) {
    if (!given) return;
    with_float(given->scalar_type(), [&](auto* type) {
      using S = std::remove_pointer_t<decltype(type)>;
      const S* const from = static_cast<const S*>(given->data_ptr()) + b * given->stride(0);
      const int64_t stride = given->stride(1);
      for (int64_t n = 0; n < rows; ++n) values[b * rows + n] = static_cast<Wide>(from[n * stride]);
    });
  }
  void fill_all() {
    for (int64_t b = 0; given && b < given->size(0); ++b) fill(b);
  }
  Wide operator()(int64_t b, int64_t n) const { return values.empty() ? 1 : values[b * rows + n]; }
};

// Sizes are small integers most of the time.
template <typename Wide>
Wide log_of(Wide size) {
  static const std::array<Wide, 257> logs = [] {
    std::array<Wide, 257> made;
    for (size_t i = 0; i < made.size(); ++i) made[i] = std::log(static_cast<Wide>(i));
    return made;
  }();
  const int whole = size >= 0 && size <= 256 ? static_cast<int>(size) : -1;
  return whole >= 0 && static_cast<Wide>(whole) == size ? logs[whole] : std::log(size);
}

// The sum of some tokens of an image, weighed by weight(n)
template <typename T, typename Wide, typename F>
RowSum<T, Wide> sum_of(const Sources::Range& sources, const char* tokens, const Strided& from, int64_t C,
                       const F& weight) {
  RowSum<T, Wide> sum(C);
  for (const int64_t n : sources) sum.add(tokens + n * from.stride_n, from.stride_c, weight(n));
  return sum;
}

// What goes into each token by an index that is known of an image after match(b)
template <typename T, typename Wide, typename F>
void merge(const Tensor& x, const Index& index, const std::optional<Tensor>& given, int64_t prefix, bool norm,
           const Norm<T, Wide>& affine, int64_t match_bytes, const F& match, const MergedTokens& out) {
  const int64_t B = x.size(0), C = x.size(2), rows = out.y.size(1);
  const Strided from = strided(x);
  const Row row{C, sizeof(T)};
  T *const y = static_cast<T*>(out.y.data_ptr()), *const normed = static_cast<T*>(out.normed.data_ptr());
  Wide* const totals = static_cast<Wide*>(out.sizes.data_ptr());
  Wide* const logs = static_cast<Wide*>(out.log_sizes.data_ptr());
  Wide *const mean = static_cast<Wide*>(out.statistics.data_ptr()), *const deviation = mean + B * rows;
  Sources sources(index, rows - prefix);
  Sizes<Wide> sizes(given);

  const auto prepare = [&](int64_t b) { match(b), sources.fill(b), sizes.fill(b); };
  for_images_and_rows(B, rows, C * row.bytes, match_bytes, prepare, [&](int64_t b, int64_t begin, int64_t end) {
    const char *const image = from.data + b * from.stride_b, *const tokens = image + prefix * from.stride_n;
    const auto size = [&](int64_t n) { return sizes(b, prefix + n); };
    for (int64_t m = begin; m < end; ++m) {
      const int64_t r = b * rows + m;
      char* const target = reinterpret_cast<char*>(y + r * C);
      Wide total = 0;
      if (m < prefix) {
        total = sizes(b, m);
        row.copy(target, image + m * from.stride_n, from.stride_c);
      } else {
        const Sources::Range merged = sources.of(b, m - prefix);
        for (const int64_t n : merged) total += size(n);
        if (total == 0) {
          row.zero(target);
        } else if (merged.size() == 1) {
          row.copy(target, tokens + *merged.first * from.stride_n, from.stride_c);
        } else {
          sum_of<T, Wide>(merged, tokens, from, C, size).store(y + r * C, total);
        }
      }
      totals[r] = total, logs[r] = log_of(total);
      if (norm) normalize(y + r * C, normed + r * C, C, affine, mean + r, deviation + r);
    }
  });
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> merge_bipartite_fwd(Tensor x, Tensor index, int64_t tokens,
                                                                       std::optional<Tensor> sizes,
                                                                       std::optional<Tensor> weight,
                                                                       std::optional<Tensor> bias, int64_t prefix,
                                                                       bool norm, double eps) {
  const MergedTokens out(x, index, tokens, sizes, prefix, norm);
  const Index places(index);
  places.check("merge_bipartite", tokens);
  with_float(x.scalar_type(), [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    using Wide = std::conditional_t<std::is_same_v<T, double>, double, float>;
    const Norm<T, Wide> affine(norm, weight, bias, x, eps);
    merge(x, places, sizes, prefix, norm, affine, 0, [](int64_t) {}, out);
  });
  return out.tuple();
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> merge_bipartite_matched(
    Tensor x, Tensor metric, int64_t r, std::optional<Tensor> sizes, std::optional<Tensor> weight,
    std::optional<Tensor> bias, int64_t prefix, bool norm, double eps) {
  const Sides sides = checked_sides(metric, r, prefix);
  const Tensor index = new_index(metric, sides);
  const MergedTokens out(x, index, sides.tokens - r, sizes, prefix, norm);
  const Matching match{metric, sides, r, static_cast<int64_t*>(index.data_ptr())};
  with_float(x.scalar_type(), [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    using Wide = std::conditional_t<std::is_same_v<T, double>, double, float>;
    const Norm<T, Wide> affine(norm, weight, bias, x, eps);
    merge(x, Index(index), sizes, prefix, norm, affine, match.bytes(), match, out);
  });
  return {out.y, index, out.sizes, out.log_sizes, out.normed, out.statistics};
}

Tensor merge_bipartite_bwd(Tensor dy, Tensor index, std::optional<Tensor> sizes, Tensor merged, int64_t prefix) {
  const Tensor dx = new_merge_gradient(dy, index, sizes, merged, prefix);
  const int64_t C = dy.size(2), M = dy.size(1) - prefix;
  const Index places(index);
  const Strided from = strided(dy);
  with_float(dy.scalar_type(), [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    using Wide = std::conditional_t<std::is_same_v<T, double>, double, float>;
    const std::optional<Tensor> made = merged;
    Sizes<Wide> each(sizes), totals(made);
    each.fill_all(), totals.fill_all();
    const Row row{C, sizeof(T)};
    T* const out = static_cast<T*>(dx.data_ptr());
    for_rows(dx.size(0), dx.size(1), C * row.bytes, [&](int64_t r, int64_t b, int64_t n) {
      char* const target = reinterpret_cast<char*>(out + r * C);
      const int64_t t = n < prefix ? n - prefix : places(b, n - prefix);
      Wide weight = 1;
      if (n >= prefix) {
        const Wide total = t >= 0 && t < M ? totals(b, prefix + t) : 0;
        if (total == 0) return row.zero(target);
        weight = each(b, n) / total;
      }
      const char* const upstream = from.data + b * from.stride_b + (prefix + t) * from.stride_n;
      if (weight == 1) return row.copy(target, upstream, from.stride_c);
      RowSum<T, Wide> scaled(C);
      scaled.add(upstream, from.stride_c, weight);
      scaled.store(out + r * C);
    });
  });
  return dx;
}

Tensor unmerge_bipartite_fwd(Tensor y, Tensor index, int64_t prefix) {
  check_tokens("y", y, index, prefix);
  const Index places(index);
  places.check("unmerge_bipartite", y.size(1) - prefix);
  const Tensor x = new_tokens(y, prefix, index.size(1));
  const Row row{y.size(2), static_cast<int64_t>(y.element_size())};
  const Strided from = strided(y);
  char* const out = static_cast<char*>(x.data_ptr());
  for_rows(x.size(0), x.size(1), row.C * row.bytes, [&](int64_t r, int64_t b, int64_t n) {
    const int64_t m = n < prefix ? n : prefix + places(b, n - prefix);
    row.copy(out + r * row.C * row.bytes, from.data + b * from.stride_b + m * from.stride_n, from.stride_c);
  });
  return x;
}

Tensor unmerge_bipartite_bwd(Tensor dx, Tensor index, int64_t tokens, int64_t prefix) {
  check_indexed("dx", dx, index, prefix);
  const Tensor dy = new_tokens(dx, prefix, tokens);
  const Index places(index);
  places.check("unmerge_bipartite", tokens);
  Sources sources(places, tokens);
  for (int64_t b = 0; b < index.size(0); ++b) sources.fill(b);
  const int64_t C = dx.size(2);
  const Strided from = strided(dx);
  with_float(dx.scalar_type(), [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    using Wide = std::conditional_t<std::is_same_v<T, double>, double, float>;
    const Row row{C, sizeof(T)};
    T* const out = static_cast<T*>(dy.data_ptr());
    for_rows(dy.size(0), dy.size(1), C * row.bytes, [&](int64_t r, int64_t b, int64_t m) {
      const char *const image = from.data + b * from.stride_b, *const given = image + prefix * from.stride_n;
      char* const target = reinterpret_cast<char*>(out + r * C);
      if (m < prefix) return row.copy(target, image + m * from.stride_n, from.stride_c);
      const Sources::Range merged = sources.of(b, m - prefix);
      if (merged.size() == 0) return row.zero(target);
      if (merged.size() == 1) return row.copy(target, given + *merged.first * from.stride_n, from.stride_c);
      sum_of<T, Wide>(merged, given, from, C, [](int64_t) { return Wide{1}; }).store(out + r * C);
    });
  });
  return dy;
}

}  // namespace
}  // namespace tokenops

STABLE_TORCH_LIBRARY_IMPL(tokenops, CPU, m) {
  m.impl("merge_bipartite_fwd.native", TORCH_BOX(&tokenops::merge_bipartite_fwd));
  m.impl("merge_bipartite_matched.native", TORCH_BOX(&tokenops::merge_bipartite_matched));
  m.impl("merge_bipartite_bwd.native", TORCH_BOX(&tokenops::merge_bipartite_bwd));
  m.impl("unmerge_bipartite_fwd.native", TORCH_BOX(&tokenops::unmerge_bipartite_fwd));
  m.impl("unmerge_bipartite_bwd.native", TORCH_BOX(&tokenops::unmerge_bipartite_bwd));
}
