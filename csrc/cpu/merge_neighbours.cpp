// merge_neighbours on a CPU: one pass over the rows of the result, each of which is copied or weighed from two, and
// normalised while it is at hand; and one pass over the pairs for their gradients.
#include "../merge_neighbours.h"
#include "vector_rows.h"

#include <limits>
#include <optional>

namespace tokenops {
namespace {

template <typename Wide>
INLINE void weigh_rows(const Wide* a, const Wide* b, Wide wa, Wide wb, const Wide* first, const Wide* second, Wide* out,
                       int64_t n) {
  if (first && wa == 1 && wb == 1) for (int64_t i = 0; i < n; ++i) out[i] = first[i] * a[i] + second[i] * b[i];
  else if (first) for (int64_t i = 0; i < n; ++i) out[i] = wa * first[i] * a[i] + wb * second[i] * b[i];
  else for (int64_t i = 0; i < n; ++i) out[i] = wa * a[i] + wb * b[i];
}
CLONES void weigh(const float* a, const float* b, float wa, float wb, const float* first, const float* second,
                  float* out, int64_t n) {
  weigh_rows(a, b, wa, wb, first, second, out, n);
}
CLONES void weigh(const double* a, const double* b, double wa, double wb, const double* first, const double* second,
                  double* out, int64_t n) {
  weigh_rows(a, b, wa, wb, first, second, out, n);
}
// without a detour: the bits of bf16 are the upper half of a float's
CLONES void weigh(const BFloat16* a, const BFloat16* b, float wa, float wb, const float* first, const float* second,
                  BFloat16* out, int64_t n) {
  const uint16_t *x = reinterpret_cast<const uint16_t*>(a), *y = reinterpret_cast<const uint16_t*>(b);
  uint16_t* raw = reinterpret_cast<uint16_t*>(out);
  if (first) {
    for (int64_t i = 0; i < n; ++i) {
      raw[i] = to_bfloat16(wa * first[i] * from_bfloat16(x[i]) + wb * second[i] * from_bfloat16(y[i]));
    }
  } else {
    for (int64_t i = 0; i < n; ++i) raw[i] = to_bfloat16(wa * from_bfloat16(x[i]) + wb * from_bfloat16(y[i]));
  }
}

template <typename Wide>
INLINE void spread_rows(const Wide* dy, Wide w, const Wide* factors, Wide* out, int64_t n) {
  if (factors) for (int64_t i = 0; i < n; ++i) out[i] = w * factors[i] * dy[i];
  else for (int64_t i = 0; i < n; ++i) out[i] = w * dy[i];
}
CLONES void spread(const float* dy, float w, const float* factors, float* out, int64_t n) {
  spread_rows(dy, w, factors, out, n);
}
CLONES void spread(const double* dy, double w, const double* factors, double* out, int64_t n) {
  spread_rows(dy, w, factors, out, n);
}

template <typename Wide>
INLINE void add_products(Wide* sum, const Wide* x, const Wide* dy, Wide w, int64_t n) {
  for (int64_t i = 0; i < n; ++i) sum[i] += w * x[i] * dy[i];
}
CLONES void accumulate(float* sum, const float* x, const float* dy, float w, int64_t n) {
  add_products(sum, x, dy, w, n);
}
CLONES void accumulate(double* sum, const double* x, const double* dy, double w, int64_t n) {
  add_products(sum, x, dy, w, n);
}

// What the tokens of a call count: numbers for all pairs, factors of the channels, or what each pair has of its own.
template <typename Wide>
struct Weights {
  Grid grid;
  Wide alpha, beta;
  std::vector<Wide> first, second;  // (C,), both or neither
  const Tensor *logits, *sizes;     // (B, H*W), or null

  Weights(const Grid& g, int64_t C, double a, double b, const std::optional<Tensor>& of_first,
          const std::optional<Tensor>& of_second, const std::optional<Tensor>& l, const std::optional<Tensor>& s)
      : grid(g), alpha(static_cast<Wide>(a)), beta(static_cast<Wide>(b)), logits(l ? &*l : nullptr),
        sizes(s ? &*s : nullptr) {
    fill(of_first, C, first, alpha);
    fill(of_second, C, second, beta);
    if (first.empty() && !second.empty()) first.assign(C, 1);
    if (second.empty() && !first.empty()) second.assign(C, 1);
  }

  static Wide value(const Tensor& t, int64_t b, int64_t n) {
    Wide found = 0;
    with_float(t.scalar_type(), [&](auto* type) {
      using S = std::remove_pointer_t<decltype(type)>;
      found = static_cast<Wide>(static_cast<const S*>(t.data_ptr())[b * t.stride(0) + n * t.stride(1)]);
    });
    return found;
  }

  // of the pair that begins at token a: by which share each token counts
  void shares(int64_t b, const Pair& pair, Wide* share_a, Wide* share_b) const {
    *share_a = *share_b = Wide(0.5);
    if (!sizes) return;
    const Wide one = value(*sizes, b, pair.a), other = pair.b < 0 ? 0 : value(*sizes, b, pair.b), total = one + other;
    if (total != 0) *share_a = one / total, *share_b = other / total;
  }

  // the numbers that multiply both rows (and the factors of the channels, where there are any)
  void of(int64_t b, const Pair& pair, Wide* wa, Wide* wb) const {
    shares(b, pair, wa, wb);
    if (!logits) {
      *wa *= 2 * alpha, *wb *= 2 * beta;
      return;
    }
    const Wide none = -std::numeric_limits<Wide>::infinity();
    // what has no size does not count: its logit is log 0
    const Wide la = *wa == 0 ? none : value(*logits, b, pair.a), lb = *wb == 0 ? none : value(*logits, b, pair.b);
    const Wide largest = la > lb || lb != lb ? la : lb;
    const auto part = [&](Wide w, Wide l) {
      return l == none ? 0 : l == largest && l < -none ? w : w * std::exp(l - largest);
    };
    const Wide one = part(*wa, la), other = part(*wb, lb);
    const Wide total = one + other;
    *wa = total == 0 ? 0 : one / total, *wb = total == 0 ? 0 : other / total;
  }

 private:
  static void fill(const std::optional<Tensor>& t, int64_t C, std::vector<Wide>& factors, Wide& number) {
    if (!t) return;
    if (t->size(0) == 1) {
      with_float(t->scalar_type(), [&](auto* type) {
        using S = std::remove_pointer_t<decltype(type)>;
        number *= static_cast<Wide>(*static_cast<const S*>(t->data_ptr()));
      });
      return;
    }
    factors.resize(C);
    with_float(t->scalar_type(), [&](auto* type) {
      using S = std::remove_pointer_t<decltype(type)>;
      const S* from = static_cast<const S*>(t->data_ptr());
      for (int64_t c = 0; c < C; ++c) factors[c] = static_cast<Wide>(from[c * t->stride(0)]);
    });
  }
};

template <typename T, typename Wide>
void merge(const Tensor& x, const Weights<Wide>& weights, int64_t prefix, bool norm, const Norm<T, Wide>& affine,
           const Merged& out) {
  const int64_t B = x.size(0), C = x.size(2), rows = out.y.size(1);
  const Strided from = strided(x);
  const Row row{C, sizeof(T)};
  T *y = static_cast<T*>(out.y.data_ptr()), *normed = static_cast<T*>(out.normed.data_ptr());
  Wide *mean = static_cast<Wide*>(out.statistics.data_ptr()), *deviation = mean + B * rows;
  const Wide *first = weights.first.empty() ? nullptr : weights.first.data();
  const Wide* second = weights.second.empty() ? nullptr : weights.second.data();
  const bool dense = from.stride_c == static_cast<int64_t>(sizeof(T)) || C == 1;

  for_rows(B, rows, C * row.bytes, [&](int64_t r, int64_t b, int64_t n) {
    const Pair pair = n < prefix ? Pair{n - prefix, -1} : weights.grid.pair(n - prefix);
    const char* const image = from.data + b * from.stride_b;
    const char *const a = image + (prefix + pair.a) * from.stride_n;
    const char *const other = pair.b < 0 ? a : image + (prefix + pair.b) * from.stride_n;
    T* const target = y + r * C;
    thread_local std::vector<Wide> memory;
    memory.resize(std::max<size_t>(memory.size(), 3 * C));
    Wide *room = memory.data(), *room_b = room + C, *sum = room_b + C;
    if (pair.b < 0) {
      row.copy(reinterpret_cast<char*>(target), a, from.stride_c);
    } else {
      Wide wa, wb;
      weights.of(b, pair, &wa, &wb);
      if (std::is_same_v<T, BFloat16> && dense) {
        if constexpr (std::is_same_v<T, BFloat16>) {
          weigh(reinterpret_cast<const T*>(a), reinterpret_cast<const T*>(other), wa, wb, first, second, target, C);
        }
      } else {
        const Wide *one = widened<T>(a, from.stride_c, C, room), *two = widened<T>(other, from.stride_c, C, room_b);
        if constexpr (std::is_same_v<T, Wide>) {
          weigh(one, two, wa, wb, first, second, target, C);
        } else {
          weigh(one, two, wa, wb, first, second, sum, C);
          store(sum, target, C);
        }
      }
    }
    if (norm) normalize(target, normed + r * C, C, affine, mean + r, deviation + r);
  });
}

// The sizes of pairs added up.
template <typename Wide>
void add_sizes(const Weights<Wide>& weights, const Tensor& sizes, const Tensor& merged) {
  with_float(sizes.scalar_type(), [&](auto* type) {
    using S = std::remove_pointer_t<decltype(type)>;
    S* const out = static_cast<S*>(merged.data_ptr());
    const int64_t M = merged.size(1);
    for (int64_t b = 0; b < merged.size(0); ++b) {
      for (int64_t t = 0; t < M; ++t) {
        const Pair pair = weights.grid.pair(t);
        const Wide one = Weights<Wide>::value(sizes, b, pair.a);
        out[b * M + t] = static_cast<S>(pair.b < 0 ? one : one + Weights<Wide>::value(sizes, b, pair.b));
      }
    }
  });
}

std::tuple<Tensor, Tensor, Tensor, Tensor> merge_neighbours_fwd(
    Tensor x, std::optional<Tensor> first, std::optional<Tensor> second, std::optional<Tensor> logits,
    std::optional<Tensor> sizes, std::optional<Tensor> weight, std::optional<Tensor> bias, int64_t height,
    int64_t width, bool vertical, int64_t prefix, double alpha, double beta, bool norm, double eps) {
  const Grid grid{height, width, vertical};
  check_merge(x, grid, height * width, prefix, first, second, logits, sizes);
  const Merged out(x, sizes, grid, prefix, norm);
  with_float(x.scalar_type(), [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    using Wide = std::conditional_t<std::is_same_v<T, double>, double, float>;
    const Weights<Wide> weights(grid, x.size(2), alpha, beta, first, second, logits, sizes);
    if (sizes) add_sizes(weights, *sizes, out.sizes);
    const Norm<T, Wide> affine(norm, weight, bias, x, eps);
    if (out.y.numel() || out.statistics.numel()) merge<T>(x, weights, prefix, norm, affine, out);
  });
  return {out.y, out.sizes, out.normed, out.statistics};
}

void put(const Tensor& t, int64_t b, int64_t n, double value) {
  with_float(t.scalar_type(), [&](auto* type) {
    using S = std::remove_pointer_t<decltype(type)>;
    static_cast<S*>(t.data_ptr())[b * t.size(1) + n] = static_cast<S>(value);
  });
}

constexpr int64_t PAIRS_A_SUM = 32;  // fixed, so that sums do not depend on the threads

// dx, and of pairs begin..end the gradient of the logits and what they add to those of the factors, (2, C)
template <typename T, typename Wide>
void spread_pairs(const Tensor& dy, const std::optional<Tensor>& x, const Weights<Wide>& weights, int64_t prefix,
                  int64_t begin, int64_t end, Wide* sums, const MergedGradients& out) {
  const int64_t C = dy.size(2), M = weights.grid.merged(), rows = prefix + weights.grid.height * weights.grid.width;
  const Strided from = strided(dy), tokens = x ? strided(*x) : Strided{};
  const Row row{C, sizeof(T)};
  T* const dx = static_cast<T*>(out.dx.data_ptr());
  const Wide *first = weights.first.empty() ? nullptr : weights.first.data();
  const Wide* second = weights.second.empty() ? nullptr : weights.second.data();
  std::vector<Wide> memory(4 * C);
  Wide *room = memory.data(), *room_a = room + C, *room_b = room_a + C, *made = room_b + C;

  for (int64_t i = begin; i < end; ++i) {
    const int64_t b = i / M, t = i % M;
    const Pair pair = weights.grid.pair(t);
    const char* const upstream = from.data + b * from.stride_b + (prefix + t) * from.stride_n;
    T* const target = dx + (b * rows + prefix) * C;
    if (pair.b < 0) {
      row.copy(reinterpret_cast<char*>(target + pair.a * C), upstream, from.stride_c);
      if (out.dlogits.numel()) put(out.dlogits, b, pair.a, 0);
      continue;
    }
    Wide wa, wb;
    weights.of(b, pair, &wa, &wb);
    const Wide* const d = widened<T>(upstream, from.stride_c, C, room);
    for (const auto& [n, w, factors] : {std::tuple(pair.a, wa, first), {pair.b, wb, second}}) {
      if constexpr (std::is_same_v<T, Wide>) {
        spread(d, w, factors, target + n * C, C);
      } else {
        spread(d, w, factors, made, C);
        store(made, target + n * C, C);
      }
    }
    if (!x) continue;
    const char* const image = tokens.data + b * tokens.stride_b + prefix * tokens.stride_n;
    const Wide* const one = widened<T>(image + pair.a * tokens.stride_n, tokens.stride_c, C, room_a);
    const Wide* const two = widened<T>(image + pair.b * tokens.stride_n, tokens.stride_c, C, room_b);
    if (out.dlogits.numel()) {
      weigh(one, two, Wide{1}, Wide{-1}, nullptr, nullptr, made, C);
      const Wide through = wa * wb * dot(d, made, C);
      put(out.dlogits, b, pair.a, through);
      put(out.dlogits, b, pair.b, -through);
    }
    if (sums) {
      Wide share_a, share_b;
      weights.shares(b, pair, &share_a, &share_b);
      accumulate(sums, one, d, 2 * share_a, C);
      accumulate(sums + C, two, d, 2 * share_b, C);
    }
  }
}

// The gradient of a factor from the parts of all chunks, (chunks, 2, C): of each channel, or of all together.
template <typename Wide>
void gather_sums(const std::vector<Wide>& parts, int64_t which, int64_t C, const Tensor& out) {
  if (out.numel() == 0) return;
  std::vector<double> total(C, 0);
  for (int64_t begin = which * C; begin < static_cast<int64_t>(parts.size()); begin += 2 * C) {
    for (int64_t c = 0; c < C; ++c) total[c] += parts[begin + c];
  }
  with_float(out.scalar_type(), [&](auto* type) {
    using S = std::remove_pointer_t<decltype(type)>;
    S* const to = static_cast<S*>(out.data_ptr());
    if (out.size(0) == C) {
      for (int64_t c = 0; c < C; ++c) to[c] = static_cast<S>(static_cast<Wide>(total[c]));
    } else {
      double sum = 0;
      for (const double value : total) sum += value;
      *to = static_cast<S>(static_cast<Wide>(sum));
    }
  });
}

std::tuple<Tensor, Tensor, Tensor, Tensor> merge_neighbours_bwd(
    Tensor dy, std::optional<Tensor> x, std::optional<Tensor> first, std::optional<Tensor> second,
    std::optional<Tensor> logits, std::optional<Tensor> sizes, int64_t height, int64_t width, bool vertical,
    int64_t prefix, double alpha, double beta) {
  const Grid grid{height, width, vertical};
  check_merge(dy, grid, grid.merged(), prefix, first, second, logits, sizes);
  const MergedGradients out(dy, x, first, second, logits, grid, prefix);
  const int64_t B = dy.size(0), C = dy.size(2), pairs = B * grid.merged();
  const bool summed = out.dfirst.numel() || out.dsecond.numel();
  with_float(dy.scalar_type(), [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    using Wide = std::conditional_t<std::is_same_v<T, double>, double, float>;
    const Weights<Wide> weights(grid, C, alpha, beta, first, second, logits, sizes);
    const Row row{C, sizeof(T)};
    const Strided from = strided(dy);
    for (int64_t i = 0; i < B * prefix; ++i) {
      T* const target = static_cast<T*>(out.dx.data_ptr()) + (i / prefix * out.dx.size(1) + i % prefix) * C;
      row.copy(reinterpret_cast<char*>(target), from.data + i / prefix * from.stride_b + i % prefix * from.stride_n,
               from.stride_c);
    }
    const int64_t chunks = (pairs + PAIRS_A_SUM - 1) / PAIRS_A_SUM;
    std::vector<Wide> sums(summed ? chunks * 2 * C : 0);
    const int64_t grain = std::max<int64_t>(1, GRAIN_BYTES / std::max<int64_t>(1, PAIRS_A_SUM * C * row.bytes));
    torch::stable::parallel_for(0, chunks, grain, [&](int64_t begin, int64_t end) {
      for (int64_t chunk = begin; chunk < end; ++chunk) {
        spread_pairs<T>(dy, x, weights, prefix, chunk * PAIRS_A_SUM, std::min(pairs, (chunk + 1) * PAIRS_A_SUM),
                        summed ? sums.data() + chunk * 2 * C : nullptr, out);
      }
    });
    if (summed) {
      gather_sums(sums, 0, C, out.dfirst);
      gather_sums(sums, 1, C, out.dsecond);
    }
  });
  return {out.dx, out.dfirst, out.dsecond, out.dlogits};
}

}  // namespace
}  // namespace tokenops

STABLE_TORCH_LIBRARY_IMPL(tokenops, CPU, m) {
  m.impl("merge_neighbours_fwd.native", TORCH_BOX(&tokenops::merge_neighbours_fwd));
  m.impl("merge_neighbours_bwd.native", TORCH_BOX(&tokenops::merge_neighbours_bwd));
}
