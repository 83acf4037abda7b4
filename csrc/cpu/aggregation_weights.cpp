// The weights of soft_aggregate on a CPU, A = softmax over the tokens of scale * w, and their gradient: what torch's
// softmax does in several passes (scale, mask, logits of -inf, conversion), in one, vectorised along memory.
#include "soft_aggregate.h"
#include "rows.h"

#include <cmath>
#include <limits>
#include <vector>

namespace tokenops {
namespace {

using soft_aggregate::Mask;

constexpr float NONE = -std::numeric_limits<float>::infinity();  // the logit of a token that does not count
constexpr int64_t BLOCK = 64;                                   // slots taken together where they lie side by side
constexpr int64_t LANES = 16;                                   // what is worked on at once

// LANES floats; the compiler makes of them what the machine has.
typedef float Floats __attribute__((vector_size(4 * 16)));
typedef int32_t Ints __attribute__((vector_size(4 * 16)));
static_assert(sizeof(Floats) == 4 * LANES, "a vector has LANES elements");
#pragma GCC diagnostic ignored "-Wpsabi"  // they are passed between inlined functions only

#include "vector_math.h"

// scale * w, where -inf stays whatever the scale
INLINE Floats scaled(Floats w, float scale) { return w == NONE ? w : w * scale; }

template <typename F>
INLINE Floats fold(Floats x, F f) {  // the same result in every lane
  float partial[LANES];
  write(partial, x);
  for (int64_t half = LANES / 2; half > 0; half /= 2) {
    for (int64_t i = 0; i < half; ++i) partial[i] = f(partial[i], partial[i + half]);
  }
  return Floats{} + partial[0];
}
INLINE Floats largest(Floats x, bool lanes) {
  return lanes ? fold(x, [](float a, float b) { return a < b ? b : a; }) : x;
}
INLINE Floats sum(Floats x, bool lanes) {
  return lanes ? fold(x, [](float a, float b) { return a + b; }) : x;
}

// Softmax down `height` rows of LANES logits, `stride` apart; of all of them together where the `lanes` are tokens too.
CLONES void softmax(const float* w, float* a, int64_t height, int64_t stride, float scale, bool lanes) {
  Floats high = Floats{} + NONE, total = {};
  for (int64_t i = 0; i < height; ++i) {
    const Floats s = scaled(read(w + i * stride), scale);
    high = s > high ? s : high;
  }
  high = largest(high, lanes);
  high = high == NONE ? Floats{} : high;  // a slot without a token that counts: exp(-inf - 0) * 0
  for (int64_t i = 0; i < height; ++i) {
    const Floats e = exp_negative(scaled(read(w + i * stride), scale) - high);
    total += e;
    write(a + i * stride, e);
  }
  total = sum(total, lanes);
  const Floats by = total == 0.0f ? Floats{} : 1.0f / total;
  for (int64_t i = 0; i < height; ++i) write(a + i * stride, read(a + i * stride) * by);
}

// da becomes dw = scale * A * (dA - D), D the mean of dA under A (A was rounded: its sum is only about 1); and the sums
// of A * (dA - D) * w, if asked for.
CLONES void softmax_backward(const float* a, float* da, const float* w, int64_t height, int64_t stride, float scale,
                             bool lanes, float* sums) {
  Floats delta = {}, total = {}, products = {};
  for (int64_t i = 0; i < height; ++i) {
    const Floats weight = read(a + i * stride);
    delta += weight * read(da + i * stride);
    total += weight;
  }
  total = sum(total, lanes);
  delta = total == 0.0f ? Floats{} : sum(delta, lanes) / total;
  for (int64_t i = 0; i < height; ++i) {
    const Floats weight = read(a + i * stride), ds = weight * (read(da + i * stride) - delta);
    write(da + i * stride, ds * scale);
    if (sums) products += weight == 0.0f ? Floats{} : ds * read(w + i * stride);  // what does not count may be NaN
  }
  if (sums) write(sums, sum(products, lanes));
}

// The logits of one image and a block of its slots as rows: a row a token (`across`: slots side by side, vectorised
// over them), or a row a slot (tokens side by side, vectorised over LANES partial results).
struct Layout {
  int64_t B, N, M, stride_b, row_stride;
  bool across;

  int64_t height() const { return across ? N : (N + LANES - 1) / LANES; }
  int64_t width() const { return across ? BLOCK : LANES; }
  int64_t blocks() const { return across ? (M + BLOCK - 1) / BLOCK : M; }
};

Layout layout(const Tensor& w) {
  const bool across = w.stride(2) == 1 || w.size(2) == 1;
  return {w.size(0), w.size(1), w.size(2), w.stride(0), across ? w.stride(1) : w.stride(2), across};
}

struct Scratch {
  std::vector<float> w, a, da;
  float sums[BLOCK];
  explicit Scratch(int64_t size) : w(size), a(size), da(size) {}
};

// Calls body(b, slot, slots, scratch) for blocks of slots of all images, in parallel.
template <typename F>
void for_blocks(const Layout& l, const F& body) {
  const int64_t blocks = l.blocks(), size = l.height() * l.width();
  const int64_t grain = std::max<int64_t>(1, (1 << 14) / std::max<int64_t>(1, size));
  torch::stable::parallel_for(0, l.B * blocks, grain, [&](int64_t begin, int64_t end) {
    Scratch scratch(size);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t slot = i % blocks * (l.across ? BLOCK : 1);
      body(i / blocks, slot, l.across ? std::min(BLOCK, l.M - slot) : 1, scratch);
    }
  });
}

// Calls f(offset) for every LANES columns of a block's scratch that hold slots.
template <typename F>
void for_columns(int64_t slots, const F& f) {
  for (int64_t column = 0; column < slots; column += LANES) f(column);
}

// Rows of `width` floats of the block: tokens (across), or LANES tokens of the one slot, padded with NONE.
template <typename T>
void gather(const Layout& l, const T* data, int64_t b, int64_t slot, int64_t slots, const bool* mask, int64_t mask_stride,
            float padding, float* out) {
  if (l.across) {
    for (int64_t n = 0; n < l.N; ++n) {
      load(data + b * l.stride_b + n * l.row_stride + slot, out + n * BLOCK, slots);
      if (mask && !mask[n * mask_stride]) std::fill_n(out + n * BLOCK, slots, NONE);
    }
  } else {
    load(data + b * l.stride_b + slot * l.row_stride, out, l.N);
    for (int64_t n = 0; mask && n < l.N; ++n) {
      if (!mask[n * mask_stride]) out[n] = NONE;
    }
    std::fill(out + l.N, out + l.height() * LANES, padding);
  }
}

template <typename T>
void scatter(const Layout& l, const float* in, T* data, int64_t b, int64_t slot, int64_t slots) {
  if (l.across) {
    for (int64_t n = 0; n < l.N; ++n) store(in + n * BLOCK, data + (b * l.N + n) * l.M + slot, slots);
  } else {
    store(in, data + (b * l.M + slot) * l.N, l.N);
  }
}

template <typename W, typename X>
void weights_of(const Tensor& w, float scale, const Mask& mask, Tensor& a) {
  const Layout l = layout(w);
  const W* logits = static_cast<const W*>(w.data_ptr());
  X* out = static_cast<X*>(a.data_ptr());
  for_blocks(l, [&](int64_t b, int64_t slot, int64_t slots, Scratch& t) {
    gather(l, logits, b, slot, slots, mask.image(b), mask.stride_n, NONE, t.w.data());
    for_columns(slots, [&](int64_t c) { softmax(&t.w[c], &t.a[c], l.height(), l.width(), scale, !l.across); });
    scatter(l, t.a.data(), out, b, slot, slots);
  });
}

template <typename W, typename X>
void weights_backward_of(const Tensor& da, const Tensor& a, const Tensor& w, float scale, Tensor& dw, Tensor& partial) {
  Layout l = layout(w), from = l, of_a = l;  // all lie in the order of w
  from.stride_b = da.stride(0), from.row_stride = l.across ? da.stride(1) : da.stride(2);
  of_a.stride_b = a.stride(0), of_a.row_stride = l.across ? a.stride(1) : a.stride(2);
  const W* logits = static_cast<const W*>(w.data_ptr());
  const X *gradient = static_cast<const X*>(da.data_ptr()), *weight = static_cast<const X*>(a.data_ptr());
  W* out = static_cast<W*>(dw.data_ptr());
  float* sums = partial.numel() ? static_cast<float*>(partial.data_ptr()) : nullptr;
  for_blocks(l, [&](int64_t b, int64_t slot, int64_t slots, Scratch& t) {
    gather(of_a, weight, b, slot, slots, nullptr, 0, 0.0f, t.a.data());
    gather(from, gradient, b, slot, slots, nullptr, 0, 0.0f, t.da.data());
    if (sums) gather(l, logits, b, slot, slots, nullptr, 0, NONE, t.w.data());
    for_columns(slots, [&](int64_t c) {
      softmax_backward(&t.a[c], &t.da[c], &t.w[c], l.height(), l.width(), scale, !l.across, sums ? t.sums + c : nullptr);
    });
    scatter(l, t.da.data(), out, b, slot, slots);
    if (sums) std::copy_n(t.sums, slots, sums + b * l.M + slot);
  });
}

// The same of any dtypes in fp64, number by number: for where one of them is fp64.
struct Numbers {
  char* data;
  ScalarType type;
  int64_t stride_b, stride_n, stride_m;
  explicit Numbers(const Tensor& t)
      : data(static_cast<char*>(t.data_ptr())), type(t.scalar_type()),
        stride_b(t.stride(0)), stride_n(t.stride(1)), stride_m(t.stride(2)) {}
  template <typename F>
  void of_type(const F& f) const {
    if (type == ScalarType::Double) f(reinterpret_cast<double*>(data));
    else if (type == ScalarType::Float) f(reinterpret_cast<float*>(data));
    else if (type == ScalarType::BFloat16) f(reinterpret_cast<BFloat16*>(data));
    else f(reinterpret_cast<Half*>(data));
  }
  int64_t at(int64_t b, int64_t m) const { return b * stride_b + m * stride_m; }
  void read_slot(int64_t b, int64_t m, std::vector<double>& to) const {
    of_type([&](auto* from) {
      for (size_t n = 0; n < to.size(); ++n) to[n] = static_cast<double>(from[at(b, m) + n * stride_n]);
    });
  }
  void write_slot(int64_t b, int64_t m, const std::vector<double>& from) const {
    of_type([&](auto* to) {
      using T = std::remove_pointer_t<decltype(to)>;
      for (size_t n = 0; n < from.size(); ++n) to[at(b, m) + n * stride_n] = static_cast<T>(from[n]);
    });
  }
};

template <typename F>
void for_slots(const Tensor& w, const F& f) {
  const int64_t M = w.size(2), grain = 1 + (1 << 12) / (1 + w.size(1));
  torch::stable::parallel_for(0, w.size(0) * M, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) f(i / M, i % M);
  });
}

void weights_in_double(const Tensor& w, double scale, const Mask& mask, Tensor& a) {
  for_slots(w, [&, from = Numbers(w), to = Numbers(a)](int64_t b, int64_t m) {
    constexpr double none = NONE;
    std::vector<double> s(w.size(1));
    from.read_slot(b, m, s);
    double high = none, total = 0;
    for (size_t n = 0; n < s.size(); ++n) {
      if (mask.data && !mask.image(b)[n * mask.stride_n]) s[n] = none;
      if (s[n] != none) s[n] *= scale;
      high = s[n] > high ? s[n] : high;
    }
    for (double& x : s) total += x = std::exp(x - (high == none ? 0 : high));
    for (double& x : s) x = total == 0 ? 0 : x / total;
    to.write_slot(b, m, s);
  });
}

void weights_backward_in_double(const Tensor& da, const Tensor& a, const Tensor& w, double scale, Tensor& dw,
                                Tensor& partial) {
  double* sums = partial.numel() ? static_cast<double*>(partial.data_ptr()) : nullptr;
  const Numbers gradient(da), given(a), logits(w), to(dw);
  for_slots(w, [&](int64_t b, int64_t m) {
    std::vector<double> weight(w.size(1)), ds(w.size(1)), s(w.size(1));
    gradient.read_slot(b, m, ds), given.read_slot(b, m, weight), logits.read_slot(b, m, s);
    double delta = 0, total = 0, products = 0;
    for (size_t n = 0; n < s.size(); ++n) delta += weight[n] * ds[n], total += weight[n];
    delta = total == 0 ? 0 : delta / total;
    for (size_t n = 0; n < s.size(); ++n) {
      ds[n] = weight[n] * (ds[n] - delta);
      if (weight[n] != 0) products += ds[n] * s[n];  // what does not count may be NaN
      ds[n] *= scale;
    }
    to.write_slot(b, m, ds);
    if (sums) sums[b * w.size(2) + m] = products;
  });
}

bool any_double(const Tensor& w, const Tensor& a) {
  return w.scalar_type() == ScalarType::Double || a.scalar_type() == ScalarType::Double;
}

// f(a null pointer of w's type, one of x's): fp16, bf16 or fp32 each
template <typename F>
void dispatch(ScalarType w, ScalarType x, const F& f) {
  const auto second = [&](auto first) {
    if (x == ScalarType::Float) f(first, static_cast<float*>(nullptr));
    else if (x == ScalarType::BFloat16) f(first, static_cast<BFloat16*>(nullptr));
    else f(first, static_cast<Half*>(nullptr));
  };
  if (w == ScalarType::Float) second(static_cast<float*>(nullptr));
  else if (w == ScalarType::BFloat16) second(static_cast<BFloat16*>(nullptr));
  else second(static_cast<Half*>(nullptr));
}

}  // namespace

void soft_aggregate::weights(const Tensor& w, double scale, const Mask& mask, Tensor& a) {
  if (w.numel() == 0) return;
  if (any_double(w, a)) return weights_in_double(w, scale, mask, a);
  dispatch(w.scalar_type(), a.scalar_type(), [&](auto* logit, auto* weight) {
    using W = std::remove_pointer_t<decltype(logit)>;
    using X = std::remove_pointer_t<decltype(weight)>;
    weights_of<W, X>(w, static_cast<float>(scale), mask, a);
  });
}

void soft_aggregate::weights_backward(const Tensor& da, const Tensor& a, const Tensor& w, double scale, Tensor& dw,
                                      Tensor& partial) {
  if (w.numel() == 0) return;
  if (any_double(w, a)) return weights_backward_in_double(da, a, w, scale, dw, partial);
  dispatch(w.scalar_type(), a.scalar_type(), [&](auto* logit, auto* weight) {
    using W = std::remove_pointer_t<decltype(logit)>;
    using X = std::remove_pointer_t<decltype(weight)>;
    weights_backward_of<W, X>(da, a, w, static_cast<float>(scale), dw, partial);
  });
}

}  // namespace tokenops
