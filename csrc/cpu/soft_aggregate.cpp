// soft_aggregate on a CPU: what a call takes is checked and laid out, then it runs on tiles, or as weights and torch's
// products (aten::bmm).
#include "soft_aggregate.h"
#include "rows.h"
#include "isa.h"
#include "tile_products.h"

#include <array>

namespace tokenops {
namespace {

using namespace soft_aggregate;
namespace stable = torch::stable;

void multiply_into(const Tensor& out, const Tensor& a, const Tensor& b) {
  std::array<StableIValue, 3> stack{stable::detail::from(a), stable::detail::from(b), stable::detail::from(out)};
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::bmm", "out", stack.data(), TORCH_ABI_VERSION));
  stable::detail::to<Tensor>(stack[0]);
}

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

Tensor rows_of(const Tensor& x) { return x.stride(2) == 1 || x.size(2) == 1 ? x : stable::contiguous(x); }

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

bool low(const Tensor& x, const Tensor& w) {  // 16 or 32 bits, and something to do
  return wide_type(x, w) != ScalarType::Double && x.numel() != 0 && w.numel() != 0;
}
bool on_tiles(const Tensor& x, const Tensor& w) {
  return low(x, w) && x.scalar_type() == ScalarType::BFloat16 && usable(Isa::Amx);
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

std::tuple<Tensor, Tensor> soft_aggregate_fwd(Tensor x, Tensor w, std::optional<Tensor> scale, double factor,
                                              std::optional<Tensor> masked, int64_t prefix) {
  const Sizes z = checked(x, w, masked, prefix);
  const Mask mask(masked);
  const double by = factor * number(scale);
  w = in_order(w, w);
  Tensor y = new_tensor(x, {z.B, prefix + z.M, z.C}), a = like_logits(w, x.scalar_type());
  if (on_tiles(x, w)) {
    x = rows_of(x);
    forward_on_tiles(z, Tokens(x), Logits(w), static_cast<float>(by), mask, Logits(a), Tokens(y));
  } else {
    Tensor left = stable::transpose(a, 1, 2);  // products are faster where its rows are contiguous
    if (low(x, w) && usable(Isa::Avx512)) {
      const bool twice = !tokens_last(w);
      if (twice) left = new_tensor(a, {z.B, z.M, z.N});
      const Logits turned(stable::transpose(left, 1, 2));
      weights_on_avx512(z, Logits(w), static_cast<float>(by), mask, Logits(a), twice ? &turned : nullptr);
    } else {
      weights(w, by, mask, a);
    }
    multiply_behind(y, x, prefix, left, counting(x, z, mask));
  }
  return {y, a};
}

std::tuple<Tensor, Tensor, Tensor> soft_aggregate_bwd(Tensor dy, Tensor x, Tensor w, std::optional<Tensor> scale,
                                                      double factor, std::optional<Tensor> masked,
                                                      std::optional<Tensor>, Tensor a, int64_t prefix) {
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
  Tensor dx = new_tensor(x, {z.B, prefix + z.N, z.C}), dw = like_logits(w, w.scalar_type());
  Tensor partial = stable::new_zeros(x, {scale ? z.B * z.M : 0}, wide_type(x, w));
  float* sums = scale && low(x, w) ? static_cast<float*>(partial.data_ptr()) : nullptr;
  if (on_tiles(x, w)) {
    dy = rows_of(dy), x = rows_of(x);
    backward_on_tiles(z, Tokens(dy), Tokens(x), Logits(w), static_cast<float>(by), mask, Logits(a), Tokens(dx),
                      Logits(dw), sums);
  } else {
    Tensor tokens = counting(x, z, mask), dslots = stable::narrow(dy, 1, prefix, z.M);
    multiply_behind(dx, dy, prefix, a, dslots);
    const bool wide_vectors = low(x, w) && usable(Isa::Avx512);
    const bool slots_first = wide_vectors || tokens_last(w);  // in memory
    Tensor da = slots_first ? stable::transpose(new_tensor(x, {z.B, z.M, z.N}), 1, 2)
                            : new_tensor(x, {z.B, z.N, z.M});
    if (slots_first) multiply_into(stable::transpose(da, 1, 2), dslots, stable::transpose(tokens, 1, 2));
    else multiply_into(da, tokens, stable::transpose(dslots, 1, 2));
    if (wide_vectors) {
      weights_backward_on_avx512(z, Logits(da), Logits(a), Logits(w), static_cast<float>(by), Logits(dw), sums);
    } else {
      weights_backward(da, a, w, by, dw, partial);
    }
  }
  if (!scale) return {dx, dw, partial};
  Tensor dscale = new_tensor(x, {}, wide_type(x, w));
  const auto add_up = [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    T total = 0;
    for (int64_t i = 0; i < partial.numel(); ++i) total += static_cast<const T*>(partial.data_ptr())[i];
    *static_cast<T*>(dscale.data_ptr()) = static_cast<T>(factor) * total;
  };
  if (wide_type(x, w) == ScalarType::Double) add_up(static_cast<double*>(nullptr));
  else add_up(static_cast<float*>(nullptr));
  return {dx, dw, dscale};
}

}  // namespace
}  // namespace tokenops

STABLE_TORCH_LIBRARY_IMPL(tokenops, CPU, m) {
  m.impl("soft_aggregate_fwd.native", TORCH_BOX(&tokenops::soft_aggregate_fwd));
  m.impl("soft_aggregate_bwd.native", TORCH_BOX(&tokenops::soft_aggregate_bwd));
}
