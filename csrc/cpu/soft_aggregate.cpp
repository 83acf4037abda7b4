// soft_aggregate on a CPU: what a call takes is checked and laid out, then it runs on tiles, or as torch's products,
// the weights made on AVX-512, or by torch's softmax, to which logits of -inf, masks and scales are brought. Packed
// sequences run one after the other, each as an image.
#include "soft_aggregate.h"
#include "isa.h"
#include "vector_rows.h"

#include <array>
#include <limits>
#include <numeric>

namespace tokenops {
namespace {

using namespace soft_aggregate;
namespace stable = torch::stable;

// An operator of torch by its name, of one result
template <typename... Arguments>
Tensor call(const char* op, const char* overload, const Arguments&... arguments) {
  std::array<StableIValue, sizeof...(Arguments)> stack{stable::detail::from(arguments)...};
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher(op, overload, stack.data(), TORCH_ABI_VERSION));
  return stable::detail::to<Tensor>(stack[0]);
}
// autocast leaves this form alone
void multiply_into(const Tensor& out, const Tensor& a, const Tensor& b) { call("aten::bmm", "out", a, b, out); }

ScalarType wide_type(const Tensor& x, const Tensor& w) {
  return x.scalar_type() == ScalarType::Double || w.scalar_type() == ScalarType::Double ? ScalarType::Double
                                                                                        : ScalarType::Float;
}

// The order in memory is (B, M, N), as ops/schemas.py has it
bool tokens_last(const Tensor& w) { return w.stride(1) == 1 && w.stride(2) != 1 && w.size(2) != 1; }

Tensor like_logits(const Tensor& w, ScalarType type) {
  const int64_t B = w.size(0), N = w.size(1), M = w.size(2);
  const int64_t sizes[] = {B, N, M}, across[] = {N * M, 1, N}, along[] = {N * M, M, 1};
  return new_tensor(w, sizes, tokens_last(w) ? across : along, 3, type);
}

// The same numbers in the order that w has: with a stride of 1 where w has it
Tensor in_order(const Tensor& t, const Tensor& w) {
  const int64_t side = tokens_last(w) ? 1 : 2;
  if (t.stride(side) == 1 || t.size(side) == 1) return t;
  return side == 2 ? stable::contiguous(t) : stable::transpose(stable::contiguous(stable::transpose(t, 1, 2)), 1, 2);
}

double number(const std::optional<Tensor>& scale) {
  if (!scale) return 1.0;
  STD_TORCH_CHECK(scale->numel() == 1 && !scale->is_cuda(), "scale must have one element, on the CPU");
  switch (scale->scalar_type()) {
    case ScalarType::Double: return *static_cast<const double*>(scale->data_ptr());
    case ScalarType::Float: return *static_cast<const float*>(scale->data_ptr());
    case ScalarType::BFloat16: return *static_cast<const BFloat16*>(scale->data_ptr());
    case ScalarType::Half: return *static_cast<const Half*>(scale->data_ptr());
    default: STD_TORCH_CHECK(false, "scale must be of a float dtype");
  }
  return 0.0;
}

Sizes checked(const Tensor& x, const Tensor& w, const std::optional<Tensor>& mask, int64_t prefix) {
  STD_TORCH_CHECK(x.dim() == 3 && !x.is_cuda() && w.dim() == 3 && !w.is_cuda(), "x and w must be 3D, on the CPU");
  check_float("x", x), check_float("w", w);
  STD_TORCH_CHECK(prefix >= 0 && x.size(0) == w.size(0) && x.size(1) == prefix + w.size(1),
                  "w must have x's images and its tokens behind the prefix");
  if (mask) {
    STD_TORCH_CHECK(mask->scalar_type() == ScalarType::Bool && mask->dim() == 2 && !mask->is_cuda() &&
                        mask->size(0) == w.size(0) && mask->size(1) == w.size(1),
                    "mask must be (B, N) bool");
  }
  return {w.size(0), w.size(1), w.size(2), x.size(2), prefix};
}

bool on_avx512(const Tensor& x, const Tensor& w) {  // 16 or 32 bits, and something to do
  return wide_type(x, w) != ScalarType::Double && x.numel() != 0 && w.numel() != 0 && usable(Isa::Avx512);
}
bool on_tiles(const Tensor& x, const Tensor& w) {
  return x.scalar_type() == ScalarType::BFloat16 && on_avx512(x, w) && usable(Isa::Amx);
}

// Logits or weights as they lie in memory, which is where torch's softmax is fastest; its own inverse
Tensor in_memory(const Tensor& t, const Tensor& w) { return tokens_last(w) ? stable::transpose(t, 1, 2) : t; }
int64_t tokens_dim(const Tensor& w) { return tokens_last(w) ? 2 : 1; }

// A copy of logits or weights in a dtype, in the order that w has
Tensor copied(const Tensor& t, ScalarType type, const Tensor& w) {
  Tensor made = like_logits(w, type);
  return stable::copy_(made, t);
}
Tensor as(const Tensor& t, ScalarType type, const Tensor& w) {
  return t.scalar_type() == type ? t : copied(t, type, w);
}

// f(numbers, how many, image) for every image of a tensor in the accumulation dtype, in parallel
template <typename F>
void for_images(const Tensor& t, const F& f) {
  const int64_t count = t.size(1) * t.size(2);
  const auto run = [&](auto* data) {
    torch::stable::parallel_for(0, t.size(0), 1 + (1 << 14) / (1 + count), [&](int64_t begin, int64_t end) {
      for (int64_t b = begin; b < end; ++b) f(data + b * count, count, b);
    });
  };
  if (t.scalar_type() == ScalarType::Double) run(static_cast<double*>(t.data_ptr()));
  else run(static_cast<float*>(t.data_ptr()));
}

// A = softmax over the tokens of scale * w, in the accumulation dtype; zeros of a slot without a token that counts
Tensor weights(const Tensor& w, ScalarType wide, double by, const Mask& mask, const Sizes& z) {
  constexpr float none = -std::numeric_limits<float>::infinity();  // stays whatever the scale
  const Tensor s = copied(w, wide, w);
  const int64_t step_n = tokens_last(w) ? 1 : z.M, step_m = tokens_last(w) ? z.N : 1;
  std::vector<char> some(z.B);  // images where something is left out
  for_images(s, [&](auto* logits, int64_t count, int64_t b) {
    using Wide = std::remove_pointer_t<decltype(logits)>;
    for (int64_t n = 0; mask.data && n < z.N; ++n) {
      for (int64_t m = 0; !mask.image(b)[n * mask.stride_n] && m < z.M; ++m) logits[n * step_n + m * step_m] = none;
    }
    std::conditional_t<sizeof(Wide) == 8, int64_t, int32_t> out = 0;  // as wide as they: else it is not vectorised
    for (int64_t i = 0; i < count; ++i) out |= logits[i] == none;
    some[b] = out != 0;
    const Wide factor = static_cast<Wide>(by);
    if (by > 0 || !some[b]) {
      for (int64_t i = 0; i < count; ++i) logits[i] *= factor;
    } else {
      for (int64_t i = 0; i < count; ++i) logits[i] = logits[i] == none ? none : logits[i] * factor;
    }
  });
  const Tensor a = call("aten::_softmax", "", in_memory(s, w), tokens_dim(w), false);
  for_images(s, [&](auto* logits, int64_t count, int64_t b) {
    auto* const weights = static_cast<decltype(logits)>(a.data_ptr()) + b * count;
    for (int64_t i = 0; some[b] && i < count; ++i) weights[i] = logits[i] == none ? 0 : weights[i];
  });
  return in_memory(a, w);
}

// Rounded weights in the accumulation dtype: they add up to about 1, which torch's gradient takes for 1
Tensor normalized(const Tensor& rounded, ScalarType wide, const Tensor& w) {
  if (rounded.scalar_type() == wide) return rounded;
  const Tensor a = in_memory(copied(rounded, wide, w), w);
  const int64_t dim = tokens_dim(w);
  const Tensor total = stable::sum(a, torch::headeronly::IntHeaderOnlyArrayRef(&dim, 1), true);
  float* const sums = static_cast<float*>(total.data_ptr());
  for (int64_t i = 0; i < total.numel(); ++i) sums[i] = sums[i] == 0 ? 1 : sums[i];
  return in_memory(call("aten::div", "Tensor", a, total), w);
}

// dw = scale * A (dA - D), D the mean of dA under A; and of each image the sum of A (dA - D) w, if asked for
Tensor weights_backward(const Tensor& da, const Tensor& a, const Tensor& w, double by, std::vector<double>* sums) {
  const ScalarType wide = a.scalar_type();
  const Tensor ds = call("aten::_softmax_backward_data", "", in_memory(da, w), in_memory(a, w), tokens_dim(w), wide);
  const Tensor logits = sums ? copied(w, wide, w) : Tensor();
  for_images(ds, [&](auto* gradients, int64_t count, int64_t b) {
    using Wide = std::remove_pointer_t<decltype(gradients)>;
    if (sums) {
      Wide* const image = static_cast<Wide*>(logits.data_ptr()) + b * count;
      for (int64_t i = 0; i < count; ++i) image[i] = gradients[i] == 0 ? 0 : image[i];  // else it may be NaN
      (*sums)[b] = dot(gradients, image, count);
    }
    const Wide factor = static_cast<Wide>(by);
    for (int64_t i = 0; i < count; ++i) gradients[i] *= factor;
  });
  return in_memory(ds, w);
}

// The tokens behind the prefix, those that do not count as zeros: they may hold anything.
Tensor counting(Tensor x, const Sizes& z, const Mask& mask) {
  Tensor tokens = stable::narrow(x, 1, z.prefix, z.N);
  if (!mask.data) return tokens;
  tokens = stable::clone(stable::contiguous(tokens));
  const int64_t bytes = z.C * static_cast<int64_t>(tokens.element_size());
  char* data = static_cast<char*>(tokens.data_ptr());
  for (int64_t i = 0; bytes && i < z.B * z.N; ++i) {
    if (!mask.image(i / z.N)[i % z.N * mask.stride_n]) std::memset(data + i * bytes, 0, bytes);
  }
  return tokens;
}

// y = [x[:, :P], a b]
void multiply_behind(Tensor y, Tensor x, int64_t prefix, const Tensor& a, const Tensor& b) {
  if (prefix == 0) return multiply_into(y, a, b);
  Tensor first = stable::narrow(y, 1, 0, prefix), rest = stable::narrow(y, 1, prefix, y.size(1) - prefix);
  stable::copy_(first, stable::narrow(x, 1, 0, prefix));
  if (y.scalar_type() != ScalarType::Float) return multiply_into(rest, a, b);
  // MKL takes longer for a strided batch than the copy does
  Tensor whole = new_tensor(y, {rest.size(0), rest.size(1), rest.size(2)});
  multiply_into(whole, a, b);
  stable::copy_(rest, whole);
}

// Writes y; `room` is for the weights, where there is one
std::tuple<Tensor, Tensor> aggregate(Tensor x, Tensor w, std::optional<Tensor> scale, double factor,
                                     std::optional<Tensor> masked, int64_t prefix, Tensor y,
                                     std::optional<Tensor> room) {
  const Sizes z = checked(x, w, masked, prefix);
  const Mask mask(masked);
  const double by = factor * number(scale);
  w = in_order(w, w);
  const bool compiled = on_avx512(x, w);
  Tensor a = room ? *room : compiled ? like_logits(w, x.scalar_type()) : Tensor();
  if (on_tiles(x, w)) {
    x = dense(x);
    forward_on_tiles(z, Tokens(x), Logits(w), static_cast<float>(by), mask, Logits(a), Tokens(y));
  } else {
    Tensor left;  // products are faster where its rows are contiguous
    if (compiled) {
      const bool twice = !tokens_last(w);
      left = twice ? new_tensor(a, {z.B, z.M, z.N}) : stable::transpose(a, 1, 2);
      const Logits turned(stable::transpose(left, 1, 2));
      weights_on_avx512(z, Logits(w), static_cast<float>(by), mask, Logits(a), twice ? &turned : nullptr);
    } else {
      const Tensor made = as(weights(w, wide_type(x, w), by, mask, z), x.scalar_type(), w);
      a = room ? stable::copy_(a, made) : made;
      left = stable::transpose(made, 1, 2);
    }
    multiply_behind(y, x, prefix, left, counting(x, z, mask));
  }
  return {y, a};
}

// Writes dx; `room` is for dw, where there is one
std::tuple<Tensor, Tensor, Tensor> aggregate_backward(Tensor dy, Tensor x, Tensor w, std::optional<Tensor> scale,
                                                      double factor, std::optional<Tensor> masked, Tensor a,
                                                      int64_t prefix, Tensor dx, std::optional<Tensor> room) {
  const Sizes z = checked(x, w, masked, prefix);
  STD_TORCH_CHECK(dy.dim() == 3 && !dy.is_cuda() && dy.scalar_type() == x.scalar_type() && dy.size(0) == z.B &&
                      dy.size(1) == prefix + z.M && dy.size(2) == z.C,
                  "dy must be (B, P+M, C) in x's dtype");
  STD_TORCH_CHECK(a.dim() == 3 && !a.is_cuda() && a.scalar_type() == x.scalar_type() && a.size(0) == z.B &&
                      a.size(1) == z.N && a.size(2) == z.M,
                  "saved must be (B, N, M) in x's dtype");
  const Mask mask(masked);
  const double by = factor * number(scale);
  w = in_order(w, w), a = in_order(a, w);
  const ScalarType wide = wide_type(x, w);
  const bool compiled = on_avx512(x, w);
  Tensor dw = room ? *room : compiled ? like_logits(w, w.scalar_type()) : Tensor();
  std::vector<double> shares(z.B);  // of the scale's gradient
  std::vector<float> partial(scale && compiled ? z.B * z.M : 0);
  float* const sums = partial.empty() ? nullptr : partial.data();
  if (on_tiles(x, w)) {
    dy = dense(dy), x = dense(x);
    backward_on_tiles(z, Tokens(dy), Tokens(x), Logits(w), static_cast<float>(by), mask, Logits(a), Tokens(dx),
                      Logits(dw), sums);
  } else {
    const Tensor tokens = counting(x, z, mask), dslots = stable::narrow(dy, 1, prefix, z.M);
    multiply_behind(dx, dy, prefix, a, dslots);
    const bool slots_first = compiled || tokens_last(w);  // in memory
    const Tensor left = slots_first ? dslots : tokens, right = slots_first ? tokens : dslots;
    Tensor da = new_tensor(x, {z.B, left.size(1), right.size(1)});
    multiply_into(da, left, stable::transpose(right, 1, 2));
    if (slots_first) da = stable::transpose(da, 1, 2);
    if (compiled) {
      weights_backward_on_avx512(z, Logits(da), Logits(a), Logits(w), static_cast<float>(by), Logits(dw), sums);
    } else {
      const Tensor weights = normalized(a, wide, w);
      const Tensor made = weights_backward(as(da, wide, w), weights, w, by, scale ? &shares : nullptr);
      dw = room ? stable::copy_(dw, made) : as(made, w.scalar_type(), w);
    }
  }
  for (size_t i = 0; i < partial.size(); ++i) shares[i / z.M] += partial[i];
  if (!scale) return {dx, dw, new_tensor(x, {0}, wide)};
  Tensor dscale = new_tensor(x, {}, wide);
  const double total = factor * std::accumulate(shares.begin(), shares.end(), 0.0);
  if (wide == ScalarType::Double) *static_cast<double*>(dscale.data_ptr()) = total;
  else *static_cast<float*>(dscale.data_ptr()) = static_cast<float>(total);
  return {dx, dw, dscale};
}

// Where each of the packed sequences begins, and the end of the last
std::vector<int64_t> boundaries(const Tensor& cu_seqlens, const Tensor& x, const Tensor& w,
                                const std::optional<Tensor>& mask, int64_t prefix) {
  STD_TORCH_CHECK(x.dim() == 3 && x.size(0) == 1 && w.dim() == 3 && w.size(0) == 1 && w.size(1) == x.size(1) &&
                      !x.is_cuda() && !w.is_cuda() && prefix >= 0,
                  "x and w of packed sequences must be one image of as many rows, on the CPU");
  if (mask) {
    STD_TORCH_CHECK(mask->dim() == 2 && mask->size(0) == 1 && mask->size(1) == x.size(1), "mask must be (1, T) bool");
  }
  STD_TORCH_CHECK(cu_seqlens.scalar_type() == ScalarType::Int && cu_seqlens.dim() == 1 && cu_seqlens.size(0) >= 1 &&
                      !cu_seqlens.is_cuda(),
                  "cu_seqlens must be (S+1,) int32, on the CPU");
  const auto* const data = static_cast<const int32_t*>(cu_seqlens.data_ptr());
  std::vector<int64_t> ends(cu_seqlens.size(0));
  for (size_t s = 0; s < ends.size(); ++s) {
    ends[s] = data[static_cast<int64_t>(s) * cu_seqlens.stride(0)];
    STD_TORCH_CHECK(s == 0 ? ends[s] == 0 : ends[s] >= ends[s - 1], "cu_seqlens must begin with 0 and not fall");
  }
  STD_TORCH_CHECK(ends.back() <= x.size(1), "cu_seqlens must end within the rows there are");
  return ends;
}

void clear(const Tensor& t) {  // without gaps
  const size_t bytes = static_cast<size_t>(t.numel()) * t.element_size();
  if (bytes) std::memset(t.data_ptr(), 0, bytes);
}
Tensor rows_of(Tensor t, int64_t dim, int64_t begin, int64_t end) { return stable::narrow(t, dim, begin, end - begin); }
std::optional<Tensor> rows_of(const std::optional<Tensor>& t, int64_t begin, int64_t end) {
  return t ? std::optional<Tensor>(rows_of(*t, 1, begin, end)) : std::nullopt;
}
void copy_rows(Tensor to, int64_t dim, int64_t begin, const Tensor& from) {
  to = rows_of(to, dim, begin, begin + from.size(dim));
  stable::copy_(to, from);
}

std::tuple<Tensor, Tensor> soft_aggregate_fwd(Tensor x, Tensor w, std::optional<Tensor> scale, double factor,
                                              std::optional<Tensor> mask, int64_t prefix,
                                              std::optional<Tensor> cu_seqlens, int64_t) {
  if (!cu_seqlens) {
    STD_TORCH_CHECK(x.dim() == 3 && w.dim() == 3 && prefix >= 0, "x and w must be 3D, and prefix 0 or more");
    const Tensor y = new_tensor(x, {x.size(0), prefix + w.size(2), x.size(2)});
    return aggregate(x, w, scale, factor, mask, prefix, y, std::nullopt);
  }
  const std::vector<int64_t> ends = boundaries(*cu_seqlens, x, w, mask, prefix);
  check_float("x", x), check_float("w", w);
  const int64_t sequences = static_cast<int64_t>(ends.size()) - 1;
  const Tensor y = new_tensor(x, {sequences, prefix + w.size(2), x.size(2)}), a = like_logits(w, x.scalar_type());
  clear(a);
  for (int64_t s = 0; s < sequences; ++s) {
    const int64_t begin = ends[s], end = ends[s + 1], tokens = begin + prefix;
    const Tensor slim = rows_of(y, 0, s, s + 1);
    if (tokens >= end) {  // no token behind the prefix
      clear(slim);
      copy_rows(slim, 1, 0, rows_of(x, 1, begin, end));
      continue;
    }
    aggregate(rows_of(x, 1, begin, end), rows_of(w, 1, tokens, end), scale, factor, rows_of(mask, tokens, end), prefix,
              slim, rows_of(a, 1, tokens, end));
  }
  return {y, a};
}

std::tuple<Tensor, Tensor, Tensor> soft_aggregate_bwd(Tensor dy, Tensor x, Tensor w, std::optional<Tensor> scale,
                                                      double factor, std::optional<Tensor> mask, std::optional<Tensor>,
                                                      Tensor a, int64_t prefix, std::optional<Tensor> cu_seqlens,
                                                      int64_t) {
  if (!cu_seqlens) {
    STD_TORCH_CHECK(x.dim() == 3, "x must be 3D");
    const Tensor dx = new_tensor(x, {x.size(0), x.size(1), x.size(2)});
    return aggregate_backward(dy, x, w, scale, factor, mask, a, prefix, dx, std::nullopt);
  }
  const std::vector<int64_t> ends = boundaries(*cu_seqlens, x, w, mask, prefix);
  check_float("x", x), check_float("w", w);
  const int64_t sequences = static_cast<int64_t>(ends.size()) - 1, rows = x.size(1);
  STD_TORCH_CHECK(dy.dim() == 3 && dy.scalar_type() == x.scalar_type() && dy.size(0) == sequences &&
                      dy.size(1) == prefix + w.size(2) && dy.size(2) == x.size(2),
                  "dy must be (S, P+M, C) in x's dtype");
  STD_TORCH_CHECK(a.dim() == 3 && a.size(0) == 1 && a.size(1) == rows, "saved must be (1, T, M) in x's dtype");
  const ScalarType wide = wide_type(x, w);
  const Tensor dx = new_tensor(x, {1, rows, x.size(2)}), dw = like_logits(w, w.scalar_type());
  double total = 0;
  clear(rows_of(dx, 1, ends.back(), rows));  // slack
  clear(dw);
  for (int64_t s = 0; s < sequences; ++s) {
    const int64_t begin = ends[s], end = ends[s + 1], tokens = begin + prefix;
    const Tensor slim = rows_of(dy, 0, s, s + 1);
    if (tokens >= end) {
      copy_rows(dx, 1, begin, rows_of(slim, 1, 0, end - begin));
      continue;
    }
    const auto [of_rows, of_logits, of_scale] = aggregate_backward(
        slim, rows_of(x, 1, begin, end), rows_of(w, 1, tokens, end), scale, factor, rows_of(mask, tokens, end),
        rows_of(a, 1, tokens, end), prefix, rows_of(dx, 1, begin, end), rows_of(dw, 1, tokens, end));
    if (scale) total += number(of_scale);
  }
  if (!scale) return {dx, dw, new_tensor(x, {0}, wide)};
  const Tensor dscale = new_tensor(x, {}, wide);
  if (wide == ScalarType::Double) *static_cast<double*>(dscale.data_ptr()) = total;
  else *static_cast<float*>(dscale.data_ptr()) = static_cast<float>(total);
  return {dx, dw, dscale};
}

}  // namespace
}  // namespace tokenops

STABLE_TORCH_LIBRARY_IMPL(tokenops, CPU, m) {
  m.impl("soft_aggregate_fwd.native", TORCH_BOX(&tokenops::soft_aggregate_fwd));
  m.impl("soft_aggregate_bwd.native", TORCH_BOX(&tokenops::soft_aggregate_bwd));
}
