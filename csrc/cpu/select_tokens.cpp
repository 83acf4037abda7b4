// select_tokens on a CPU: the choice image by image, then one pass over the rows of the result, which are copied, as
// many at once as lie together, or summed from the tokens that were left out, and normalised while they are at hand.
#include "../select_tokens.h"
#include "choice.h"
#include "vector_rows.h"

#include <stdexcept>

namespace tokenops {
namespace {

constexpr int64_t CHOOSING_BYTES = 8;     // a token's part in a choice, about, as bytes that are copied
constexpr int64_t LONGEST_RUN = 1 << 13;  // bytes that are copied at once, and are in the first cache for their norm
constexpr int32_t ZEROS = -1, REST = -2;  // rows of the result that are no row of x

// The places of the best `count` of N scores
template <typename T, typename Wide>
void choose(const T* scores, int64_t stride, int64_t N, int64_t count, bool best_first, int64_t* places) {
  if (count == 0) return;
  thread_local std::vector<KeyOf<Wide>> keys;
  thread_local std::vector<int64_t> kept;
  keys.resize(N), kept.resize(N + 1);
  keys_of(widened<T>(reinterpret_cast<const char*>(scores), stride * sizeof(T), N, room_for<Wide>(N)), keys.data(), N);
  best_places(keys.data(), N, count, kept.data());
  if (best_first) {
    std::sort(kept.begin(), kept.begin() + count,
              [&](int64_t a, int64_t b) { return keys[a] != keys[b] ? keys[a] > keys[b] : a < b; });
  }
  std::copy_n(kept.begin(), count, places);
}

int64_t count_of(const int64_t* counts, int64_t b, int64_t k) {
  if (!counts) return k;
  if (counts[b] < 0 || counts[b] > k) {  // Python's IndexError
    throw std::out_of_range("select_tokens: counts[" + std::to_string(b) + "]=" + std::to_string(counts[b]) +
                            ", but it must be between 0 and k=" + std::to_string(k));
  }
  return counts[b];
}

// A companion's values at the places of an image, or (`back`) the gradients of these values among zeros.
void follow(const Matrix& from, const Tensor& made, int64_t b, const int64_t* places, int64_t k, bool back) {
  const Matrix to(made);
  if (made.size(1)) std::memset(to.at(b, 0), 0, made.size(1) * to.bytes);
  for (int64_t j = 0; j < k; ++j) {
    if (places[j] >= 0) std::memcpy(to.at(b, back ? places[j] : j), from.at(b, back ? j : places[j]), to.bytes);
  }
}

// The weights of an image's tokens in its rest token: 0 for those that are kept. Returns their sum.
template <typename Wide>
double weigh(const Tensor& scores, int64_t b, Rest rest, const int64_t* places, int64_t count, double* weights) {
  const int64_t N = scores.size(1);
  std::fill_n(weights, N, 1.0 / std::max<int64_t>(1, N - count));
  if (rest != Rest::Mean) {
    with_float(scores.scalar_type(), [&](auto* type) {
      using S = std::remove_pointer_t<decltype(type)>;
      const S* from = static_cast<const S*>(scores.data_ptr()) + b * scores.stride(0);
      for (int64_t n = 0; n < N; ++n) weights[n] = static_cast<Wide>(from[n * scores.stride(1)]);
    });
  }
  for (int64_t j = 0; j < count; ++j) weights[places[j]] = 0;
  double total = 0;
  for (int64_t n = 0; n < N; ++n) total += weights[n];
  return total;
}

// Which tokens are kept, (N,)
std::vector<char> kept_flags(const int64_t* places, int64_t k, int64_t N) {
  std::vector<char> kept(N, 0);
  for (int64_t j = 0; j < k; ++j) {
    if (places[j] >= 0) kept[places[j]] = 1;
  }
  return kept;
}

template <typename F>
void for_images(int64_t B, int64_t N, const F& f) {
  const int64_t grain = std::max<int64_t>(1, GRAIN_BYTES / (CHOOSING_BYTES * std::max<int64_t>(1, N)));
  torch::stable::parallel_for(0, B, grain, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) f(b);
  });
}

// The rest token of an image: written to `target`; what its gradient needs to `fused`.
template <typename T, typename Wide>
void sum_rest(const Tensor& scores, int64_t b, const int64_t* places, int64_t count, Rest rest, const char* tokens,
              const Strided& from, int64_t C, T* target, Wide* fused) {
  const int64_t N = scores.size(1);
  std::vector<double> weights(N);
  const double total = weigh<Wide>(scores, b, rest, places, count, weights.data());
  const double by = rest == Rest::Normalized && total != 0 ? 1 / total : 1;
  const auto kept = kept_flags(places, count, N);
  RowSum<T, Wide> sum(C);
  for (int64_t j = 0; j < N; ++j) {
    if (!kept[j]) sum.add(tokens + j * from.stride_n, from.stride_c, static_cast<Wide>(weights[j] * by));
  }
  sum.store(target);
  if (rest == Rest::Normalized) fused[0] = static_cast<Wide>(total), sum.copy(fused + 1);
}

template <typename T, typename Wide, typename P>
void fill(const Tensor& x, const Tensor& scores, int64_t k, const int64_t* counts, int64_t prefix, Rest rest, bool norm,
          const Norm<T, Wide>& affine, const P& choose, Selected& out) {
  const int64_t B = x.size(0), N = scores.size(1), C = x.size(2), rows = out.tokens.size(1);
  const int64_t* const index = static_cast<const int64_t*>(out.index.data_ptr());
  const Strided from = strided(x);
  const Row row{C, sizeof(T)};
  const int64_t bytes = C * row.bytes;
  const bool close = from.stride_n == bytes && from.stride_c == row.bytes;
  const int64_t together = close ? std::max<int64_t>(1, LONGEST_RUN / std::max<int64_t>(1, bytes)) : 1;
  T *const tokens = static_cast<T*>(out.tokens.data_ptr()), *const normed = static_cast<T*>(out.normed.data_ptr());
  Wide *const mean = static_cast<Wide*>(out.statistics.data_ptr()), *const deviation = mean + B * rows;
  Wide* const fused = static_cast<Wide*>(out.fused.data_ptr());

  const int64_t row_bytes = bytes * (norm ? 4 : 1);  // as long as a row takes
  for_images_and_rows(B, rows, row_bytes, CHOOSING_BYTES * N, choose, [&](int64_t b, int64_t begin, int64_t end) {
    const int64_t *const places = index + b * k, count = counts ? counts[b] : k;
    const char* const image = from.data + b * from.stride_b;
    const auto source = [&](int64_t n) {
      if (n < prefix) return n;
      if (n - prefix < count) return prefix + places[n - prefix];
      return int64_t{rest != Rest::None && n - prefix == count ? REST : ZEROS};
    };
    for (int64_t n = begin, run; n < end; n += run) {
      const int64_t first = source(n);
      T* const target = tokens + (b * rows + n) * C;
      run = 1;
      if (first >= 0) {
        while (run < together && n + run < end && source(n + run) == first + run) ++run;
        if (run > 1) std::memcpy(target, image + first * from.stride_n, run * bytes);
        else row.copy(reinterpret_cast<char*>(target), image + first * from.stride_n, from.stride_c);
      } else if (first == REST) {
        const char* const others = image + prefix * from.stride_n;
        sum_rest<T>(scores, b, places, count, rest, others, from, C, target, fused + b * (1 + C));
      } else {
        row.zero(reinterpret_cast<char*>(target));
      }
      for (int64_t r = b * rows + n; norm && r < b * rows + n + run; ++r) {
        normalize(tokens + r * C, normed + r * C, C, affine, mean + r, deviation + r);
      }
    }
  });
}

SelectedTuple select_tokens_fwd(Tensor x, Tensor scores, int64_t k, std::optional<Tensor> counts,
                                std::vector<Tensor> companions, std::optional<Tensor> weight,
                                std::optional<Tensor> bias, int64_t prefix, std::string rest_name, bool best_first,
                                bool norm, double eps) {
  const Rest rest = rest_named(rest_name);
  Selected out(x, scores, k, prefix, rest, norm, companions);
  const int64_t* counted = checked_counts(counts, x);
  const int64_t B = x.size(0), N = scores.size(1);
  for (int64_t b = 0; b < B; ++b) count_of(counted, b, k);
  int64_t* const index = static_cast<int64_t*>(out.index.data_ptr());
  const auto choose_of = [&](int64_t b) {
    const int64_t count = counted ? counted[b] : k;
    int64_t* const places = index + b * k;
    std::fill(places + count, places + k, -1);
    with_float(scores.scalar_type(), [&](auto* type) {
      using S = std::remove_pointer_t<decltype(type)>;
      using Wide = std::conditional_t<std::is_same_v<S, double>, double, float>;
      const S* const from = static_cast<const S*>(scores.data_ptr()) + b * scores.stride(0);
      choose<S, Wide>(from, scores.stride(1), N, count, best_first, places);
    });
    for (size_t c = 0; c < companions.size(); ++c) {
      follow(Matrix(companions[c]), out.companions[c], b, places, k, false);
    }
  };
  with_float(x.scalar_type(), [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    using Wide = std::conditional_t<std::is_same_v<T, double>, double, float>;
    const Norm<T, Wide> affine(norm, weight, bias, x, eps);
    fill<T, Wide>(x, scores, k, counted, prefix, rest, norm, affine, choose_of, out);
  });
  return out.tuple();
}

template <typename T, typename Wide>
void fill_gradients(const Tensor& dtokens, const Tensor& index, const Tensor& scores, const int64_t* counts,
                    const std::optional<Tensor>& x, const std::optional<Tensor>& fused, int64_t prefix, Rest rest,
                    const SelectedGradients& out, const std::vector<int32_t>& slots) {
  const int64_t B = dtokens.size(0), N = scores.size(1), C = dtokens.size(2), k = index.size(1), rows = prefix + N;
  const bool weighted = SelectedGradients::weighted(rest);
  const Strided from = strided(dtokens), tokens = x ? strided(*x) : Strided{};
  const Row row{C, sizeof(T)};
  T* const dx = static_cast<T*>(out.dx.data_ptr());

  for_rows(B, rows, C * row.bytes, [&](int64_t r, int64_t b, int64_t n) {
    const int64_t slot = n < prefix ? n : slots[b * N + n - prefix];
    const char* image = from.data + b * from.stride_b;
    char* const target = reinterpret_cast<char*>(dx + r * C);
    if (slot >= 0) row.copy(target, image + slot * from.stride_n, from.stride_c);
    else if (rest == Rest::None) row.zero(target);
    if (n < prefix || rest == Rest::None) return;

    const int64_t count = counts ? counts[b] : k;
    double weight = 1.0 / std::max<int64_t>(1, N - count), by = 1, dscore = 0;
    if (slot < 0) {
      thread_local std::vector<Wide> memory;
      memory.resize(std::max<size_t>(memory.size(), 2 * C));
      Wide *room = memory.data(), *other = room + C;
      const Wide* drest = widened<T>(image + (prefix + count) * from.stride_n, from.stride_c, C, room);
      if (weighted) {
        with_float(scores.scalar_type(), [&](auto* type) {
          using S = std::remove_pointer_t<decltype(type)>;
          const int64_t at = b * scores.stride(0) + (n - prefix) * scores.stride(1);
          weight = static_cast<Wide>(static_cast<const S*>(scores.data_ptr())[at]);
        });
        const char* token = tokens.data + b * tokens.stride_b + n * tokens.stride_n;
        dscore = dot(drest, widened<T>(token, tokens.stride_c, C, other), C);
        if (rest == Rest::Normalized) {
          const Wide* sums = static_cast<const Wide*>(fused->data_ptr()) + b * (1 + C);
          if (sums[0] != 0) by = 1.0 / sums[0], dscore = (dscore - dot(drest, sums + 1, C)) * by;
        }
      }
      scale(other, drest, static_cast<Wide>(weight * by), C);
      store(other, reinterpret_cast<T*>(target), C);
    }
    if (weighted) {
      with_float(scores.scalar_type(), [&](auto* type) {
        using S = std::remove_pointer_t<decltype(type)>;
        static_cast<S*>(out.dscores.data_ptr())[b * N + n - prefix] = static_cast<S>(dscore);
      });
    }
  });
}

std::tuple<Tensor, Tensor, std::vector<Tensor>> select_tokens_bwd(
    Tensor dtokens, std::vector<Tensor> dcompanions, Tensor index, Tensor scores, std::optional<Tensor> counts,
    std::optional<Tensor> x, std::optional<Tensor> fused, int64_t prefix, std::string rest_name) {
  const Rest rest = rest_named(rest_name);
  check_rows("dtokens", dtokens, dtokens);
  SelectedGradients out(dtokens, dcompanions, index, scores, x, fused, prefix, rest);
  const int64_t* counted = checked_counts(counts, dtokens);
  const int64_t B = scores.size(0), N = scores.size(1), k = index.size(1);
  for (int64_t b = 0; b < B; ++b) count_of(counted, b, k);
  std::vector<int32_t> slots(B * N, -1);  // the row of dtokens that a token became
  for_images(B, k, [&](int64_t b) {
    std::vector<int64_t> places(k);
    for (int64_t j = 0; j < k; ++j) {
      const int64_t n = static_cast<const int64_t*>(index.data_ptr())[b * index.stride(0) + j * index.stride(1)];
      places[j] = n < N ? n : -1;
      if (n >= 0 && n < N) slots[b * N + n] = static_cast<int32_t>(prefix + j);
    }
    for (size_t c = 0; c < dcompanions.size(); ++c) {
      follow(Matrix(dcompanions[c]), out.dcompanions[c], b, places.data(), k, true);
    }
  });
  if (out.dx.numel() == 0 && out.dscores.numel() == 0) return out.tuple();
  with_float(dtokens.scalar_type(), [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    using Wide = std::conditional_t<std::is_same_v<T, double>, double, float>;
    fill_gradients<T, Wide>(dtokens, index, scores, counted, x, fused, prefix, rest, out, slots);
  });
  return out.tuple();
}

}  // namespace
}  // namespace tokenops

STABLE_TORCH_LIBRARY_IMPL(tokenops, CPU, m) {
  m.impl("select_tokens_fwd.native", TORCH_BOX(&tokenops::select_tokens_fwd));
  m.impl("select_tokens_bwd.native", TORCH_BOX(&tokenops::select_tokens_bwd));
}
