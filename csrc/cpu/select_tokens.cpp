// select_tokens on a CPU: the choice image by image, then one pass over the rows of the result, each of which is copied,
// or summed from the tokens that were left out, and normalised while it is at hand.
#include "../select_tokens.h"
#include "vector_rows.h"

#include <stdexcept>

namespace tokenops {
namespace {

constexpr int64_t CHOOSING_NS = 5;      // a token's part in a choice, about
constexpr int64_t GRAIN_NS = 10'000;     // less than this is not worth a second thread
constexpr int32_t ZEROS = -1, REST = -2;  // rows of the result that are no row of x

// Integers in the order of the scores: NaN the least of all, -0 and 0 alike.
template <typename Score, typename Bits>
INLINE void order(const Score* scores, Bits* keys, int64_t n) {
  constexpr Bits sign = Bits{1} << (8 * sizeof(Bits) - 1);
  for (int64_t i = 0; i < n; ++i) {
    const Score score = scores[i] + Score{0};
    Bits bits;
    std::memcpy(&bits, &score, sizeof bits);
    bits = bits & sign ? ~bits : bits | sign;
    keys[i] = score != score ? 0 : bits;
  }
}
template <typename Bits>
INLINE int64_t count_reaching(const Bits* keys, int64_t n, Bits bound) {
  int64_t count = 0;
  for (int64_t i = 0; i < n;) {  // in parts whose counts fit in a key's bits
    Bits part = 0;
    const int64_t end = std::min<int64_t>(n, i + (int64_t{1} << 30));
    for (; i < end; ++i) part += keys[i] >= bound;
    count += static_cast<int64_t>(part);
  }
  return count;
}
CLONES void keys_of(const float* scores, uint32_t* keys, int64_t n) { order(scores, keys, n); }
CLONES void keys_of(const double* scores, uint64_t* keys, int64_t n) { order(scores, keys, n); }
CLONES int64_t reaching(const uint32_t* keys, int64_t n, uint32_t bound) { return count_reaching(keys, n, bound); }
CLONES int64_t reaching(const uint64_t* keys, int64_t n, uint64_t bound) { return count_reaching(keys, n, bound); }

// The places of the best `count` of N scores. The last of them is found bit by bit: counting is faster than sorting.
template <typename T, typename Wide>
void choose(const T* scores, int64_t stride, int64_t N, int64_t count, bool best_first, int64_t* places) {
  using Bits = std::conditional_t<std::is_same_v<Wide, double>, uint64_t, uint32_t>;
  if (count == 0) return;
  thread_local std::vector<Wide> room;
  thread_local std::vector<Bits> keys;
  thread_local std::vector<int64_t> kept;
  room.resize(N), keys.resize(N), kept.resize(N + 1);
  const T* values = scores;
  if (stride != 1) for (int64_t n = 0; n < N; ++n) room[n] = static_cast<Wide>(scores[n * stride]);
  else if constexpr (!std::is_same_v<T, Wide>) load(values, room.data(), N);
  if constexpr (std::is_same_v<T, Wide>) keys_of(stride == 1 ? values : room.data(), keys.data(), N);
  else keys_of(room.data(), keys.data(), N);

  Bits last = 0;
  for (int bit = 8 * sizeof(Bits) - 1; bit >= 0; --bit) {
    const Bits candidate = last | Bits{1} << bit;
    if (reaching(keys.data(), N, candidate) >= count) last = candidate;
  }
  const int64_t above = last == ~Bits{0} ? 0 : reaching(keys.data(), N, last + 1);
  int64_t found = 0, ties = count - above;
  for (int64_t n = 0; n < N; ++n) {  // without a branch, which would be a coin's toss
    const bool level = keys[n] == last && ties > 0;
    kept[found] = n;
    found += keys[n] > last || level;
    ties -= level;
  }
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
  const int64_t grain = std::max<int64_t>(1, GRAIN_NS / (CHOOSING_NS * std::max<int64_t>(1, N)));
  torch::stable::parallel_for(0, B, grain, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) f(b);
  });
}

template <typename T, typename Wide>
void fill(const Tensor& x, const Tensor& scores, int64_t k, const int64_t* counts, int64_t prefix, Rest rest, bool norm,
          const Norm<Wide>& affine, Selected& out) {
  const int64_t B = x.size(0), N = scores.size(1), C = x.size(2), rows = out.tokens.size(1);
  const int64_t* index = static_cast<const int64_t*>(out.index.data_ptr());
  const Strided from = strided(x);
  const Row row{C, sizeof(T)};
  T *tokens = static_cast<T*>(out.tokens.data_ptr()), *normed = static_cast<T*>(out.normed.data_ptr());
  Wide *mean = static_cast<Wide*>(out.statistics.data_ptr()), *deviation = mean + B * rows;
  Wide* fused = static_cast<Wide*>(out.fused.data_ptr());

  for_rows(B, rows, C * row.bytes, [&](int64_t r, int64_t b, int64_t n) {
    const int64_t *places = index + b * k, count = counts ? counts[b] : k;
    const char* image = from.data + b * from.stride_b;
    int64_t source = n < prefix ? n : ZEROS;
    if (n >= prefix && n - prefix < count) source = prefix + places[n - prefix];
    else if (rest != Rest::None && n - prefix == count) source = REST;

    T* const target = tokens + r * C;
    if (source >= 0) row.copy(reinterpret_cast<char*>(target), image + source * from.stride_n, from.stride_c);
    else row.zero(reinterpret_cast<char*>(target));
    if (source != REST && !norm) return;

    thread_local std::vector<Wide> memory;
    memory.resize(std::max<size_t>(memory.size(), 2 * C));
    Wide *sum = memory.data(), *room = sum + C;
    if (source == REST) {
      std::fill_n(sum, C, Wide{0});
      std::vector<double> weights(N);
      const double total = weigh<Wide>(scores, b, rest, places, count, weights.data());
      const double by = rest == Rest::Normalized && total != 0 ? 1 / total : 1;
      const auto kept = kept_flags(places, count, N);
      for (int64_t j = 0; j < N; ++j) {
        if (kept[j]) continue;
        const char* other = image + (prefix + j) * from.stride_n;
        add_scaled(sum, widened<T>(other, from.stride_c, C, room), static_cast<Wide>(weights[j] * by), C);
      }
      store(sum, target, C);
      if (rest == Rest::Normalized) {
        fused[b * (1 + C)] = static_cast<Wide>(total);
        std::copy_n(sum, C, fused + b * (1 + C) + 1);
      }
    }
    if (norm) {
      const Wide* values = widened<T>(reinterpret_cast<const char*>(target), row.bytes, C, room);
      normalize(values, sum, C, affine, mean + r, deviation + r);
      store(sum, normed + r * C, C);
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
  int64_t* index = static_cast<int64_t*>(out.index.data_ptr());
  with_float(scores.scalar_type(), [&](auto* type) {
    using S = std::remove_pointer_t<decltype(type)>;
    using Wide = std::conditional_t<std::is_same_v<S, double>, double, float>;
    for_images(B, N, [&](int64_t b) {
      const S* from = static_cast<const S*>(scores.data_ptr()) + b * scores.stride(0);
      const int64_t count = count_of(counted, b, k);
      int64_t* places = index + b * k;
      std::fill(places + count, places + k, -1);
      choose<S, Wide>(from, scores.stride(1), N, count, best_first, places);
      for (size_t c = 0; c < companions.size(); ++c) follow(Matrix(companions[c]), out.companions[c], b, places, k, false);
    });
  });
  if (out.tokens.numel() == 0 && out.statistics.numel() == 0 && out.fused.numel() == 0) return out.tuple();
  with_float(x.scalar_type(), [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    using Wide = std::conditional_t<std::is_same_v<T, double>, double, float>;
    const Norm<Wide> affine{static_cast<const Wide*>(checked_channels("weight", weight, x)),
                            static_cast<const Wide*>(checked_channels("bias", bias, x)), eps};
    fill<T, Wide>(x, scores, k, counted, prefix, rest, norm, affine, out);
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
    for (size_t c = 0; c < dcompanions.size(); ++c) follow(Matrix(dcompanions[c]), out.dcompanions[c], b, places.data(), k, true);
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
