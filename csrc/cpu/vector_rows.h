// Arithmetic on rows of channels on a CPU: conversions to floats and back, sums, dot products, and the layer norm of a
// row.
#pragma once

#include "../common.h"
#include "bfloat16.h"
#include "rows.h"

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cmath>
#include <limits>
#include <optional>
#include <type_traits>
#include <vector>

namespace tokenops {
namespace {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;

constexpr int64_t LANES = 16;  // what is worked on at once

// Calls f with a null pointer to the type of a float dtype.
template <typename F>
void with_float(torch::headeronly::ScalarType type, const F& f) {
  if (type == torch::headeronly::ScalarType::Float) f(static_cast<float*>(nullptr));
  else if (type == torch::headeronly::ScalarType::BFloat16) f(static_cast<BFloat16*>(nullptr));
  else if (type == torch::headeronly::ScalarType::Half) f(static_cast<Half*>(nullptr));
  else if (type == torch::headeronly::ScalarType::Double) f(static_cast<double*>(nullptr));
  else STD_TORCH_CHECK(false, "float16, bfloat16, float32 and float64 are allowed");
}

[[maybe_unused]] CLONES void load(const float* in, float* out, int64_t n) {
  for (int64_t i = 0; i < n; ++i) out[i] = in[i];
}
[[maybe_unused]] CLONES void load(const BFloat16* in, float* out, int64_t n) {
  const uint16_t* raw = reinterpret_cast<const uint16_t*>(in);
  for (int64_t i = 0; i < n; ++i) out[i] = from_bfloat16(raw[i]);
}
[[maybe_unused]] void load(const Half* in, float* out, int64_t n) {
  for (int64_t i = 0; i < n; ++i) out[i] = in[i];
}

[[maybe_unused]] CLONES void store(const float* in, float* out, int64_t n) {
  for (int64_t i = 0; i < n; ++i) out[i] = in[i];
}
[[maybe_unused]] CLONES void store(const float* in, BFloat16* out, int64_t n) {
  uint16_t* raw = reinterpret_cast<uint16_t*>(out);
  for (int64_t i = 0; i < n; ++i) raw[i] = to_bfloat16(in[i]);
}
[[maybe_unused]] void store(const float* in, Half* out, int64_t n) {
  for (int64_t i = 0; i < n; ++i) out[i] = in[i];
}
[[maybe_unused]] void load(const double* in, double* out, int64_t n) { std::copy_n(in, n, out); }
[[maybe_unused]] void store(const double* in, double* out, int64_t n) { std::copy_n(in, n, out); }

// LANES values at once; the compiler makes of them what the machine has.
template <typename Wide>
struct Vector {};
template <>
struct Vector<float> {
  typedef float type __attribute__((vector_size(LANES * 4)));
};
template <>
struct Vector<double> {
  typedef double type __attribute__((vector_size(LANES * 8)));
};
#pragma GCC diagnostic ignored "-Wpsabi"  // they are passed between inlined functions only

template <typename Wide>
INLINE typename Vector<Wide>::type read(const Wide* from) {
  typename Vector<Wide>::type values;
  std::memcpy(&values, from, sizeof values);
  return values;
}
template <typename Wide>
INLINE void write(Wide* to, typename Vector<Wide>::type values) {
  std::memcpy(to, &values, sizeof values);
}

// PAIRED values at once, as two vectors, in an order of their dtype: of bfloat16 those of even places and those of odd
// places, which takes no shuffles.
constexpr int64_t PAIRED = 2 * LANES;
template <typename Wide>
struct Two {
  typename Vector<Wide>::type a, b;
};
typedef uint32_t Words __attribute__((vector_size(LANES * 4)));

template <typename Wide>
INLINE Two<Wide> read_pair(const Wide* from) {
  return {read(from), read(from + LANES)};
}
template <bool ANY_NAN = true, typename Wide>
INLINE void write_pair(Wide* to, const Two<Wide>& values) {
  write(to, values.a), write(to + LANES, values.b);
}
INLINE Two<float> read_pair(const BFloat16* from) {
  Words raw;
  std::memcpy(&raw, from, sizeof raw);
  return {(Vector<float>::type)(raw << 16), (Vector<float>::type)(raw & 0xffff0000u)};
}
// To bfloat16, in the upper halves. A NaN may be any, or one whose lower half is 0, or nearly: others carry.
template <bool ANY_NAN>
INLINE Words rounded(Vector<float>::type values) {
  const Words bits = (Words)values, even = bits + 0x7fffu + ((bits >> 16) & 1u);
  if constexpr (!ANY_NAN) return even;
  return (bits & 0x7fffffffu) > 0x7f800000u ? Words{} + 0x7fc00000u : even;
}
template <bool ANY_NAN = true>
INLINE void write_pair(BFloat16* to, const Two<float>& values) {
  const Words raw = (rounded<ANY_NAN>(values.a) >> 16) | (rounded<ANY_NAN>(values.b) & 0xffff0000u);
  std::memcpy(to, &raw, sizeof raw);
}
// Where channel c is in the order of T
template <typename T>
int64_t place_in_order(int64_t c) {
  const int64_t in_pair = c % PAIRED;
  return std::is_same_v<T, BFloat16> ? c - in_pair + in_pair / 2 + in_pair % 2 * LANES : c;
}
// The first n; zeros behind them
template <typename T>
INLINE auto read_some(const T* from, int64_t n) {
  T some[PAIRED] = {};
  std::memcpy(static_cast<void*>(some), from, n * sizeof(T));
  return read_pair(some);
}
template <typename T, typename Wide>
INLINE void write_some(T* to, const Two<Wide>& values, int64_t n) {
  T some[PAIRED];
  write_pair(some, values);
  std::memcpy(static_cast<void*>(to), some, n * sizeof(T));
}

// The last values of a row; zeros behind them
template <typename Wide>
INLINE typename Vector<Wide>::type tail(const Wide* in, int64_t n) {
  Wide rest[LANES] = {};
  std::memcpy(rest, in, n * sizeof(Wide));
  return read(rest);
}
template <typename Wide>
INLINE Wide sum(typename Vector<Wide>::type values) {
  typedef Wide Half __attribute__((vector_size(LANES / 2 * sizeof(Wide))));
  typedef Wide Quarter __attribute__((vector_size(LANES / 4 * sizeof(Wide))));
  const auto add = [](const auto& whole, auto half) ALWAYS_INLINE {
    decltype(half) other;
    std::memcpy(&half, &whole, sizeof half);
    std::memcpy(&other, reinterpret_cast<const char*>(&whole) + sizeof half, sizeof half);
    return half + other;
  };
  const Quarter four = add(add(values, Half{}), Quarter{});
  return (four[0] + four[2]) + (four[1] + four[3]);
}

template <typename Wide>
INLINE Wide dot_of(const Wide* a, const Wide* b, int64_t n) {
  typename Vector<Wide>::type total = {};
  int64_t i = 0;
  for (; i + LANES <= n; i += LANES) total += read(a + i) * read(b + i);
  if (i < n) total += tail(a + i, n - i) * tail(b + i, n - i);
  return sum<Wide>(total);
}
[[maybe_unused]] CLONES float dot(const float* a, const float* b, int64_t n) { return dot_of(a, b, n); }
[[maybe_unused]] CLONES double dot(const double* a, const double* b, int64_t n) { return dot_of(a, b, n); }

[[maybe_unused]] CLONES void scale(float* out, const float* row, float weight, int64_t n) {
  for (int64_t i = 0; i < n; ++i) out[i] = weight * row[i];
}
[[maybe_unused]] CLONES void scale(double* out, const double* row, double weight, int64_t n) {
  for (int64_t i = 0; i < n; ++i) out[i] = weight * row[i];
}

// in the order of T, `sum` too
template <typename T, typename Wide>
INLINE void add_scaled_row(Wide* sum, const T* row, Wide weight, int64_t n) {
  const auto added = [&](int64_t i, const Two<Wide>& values) ALWAYS_INLINE {
    const Two<Wide> old = read_pair(sum + i);
    write_pair(sum + i, Two<Wide>{old.a + weight * values.a, old.b + weight * values.b});
  };
  int64_t i = 0;
  for (; i + PAIRED <= n; i += PAIRED) added(i, read_pair(row + i));
  if (i < n) added(i, read_some(row + i, n - i));
}
[[maybe_unused]] CLONES void add_scaled(float* sum, const float* row, float weight, int64_t n) {
  add_scaled_row(sum, row, weight, n);
}
[[maybe_unused]] CLONES void add_scaled(float* sum, const BFloat16* row, float weight, int64_t n) {
  add_scaled_row(sum, row, weight, n);
}
[[maybe_unused]] CLONES void add_scaled(double* sum, const double* row, double weight, int64_t n) {
  add_scaled_row(sum, row, weight, n);
}

template <typename T, typename Wide>
INLINE void divide_row(const Wide* row, Wide by, T* out, int64_t n) {
  const Wide inverse = 1 / by;
  const auto divided = [&](int64_t i) ALWAYS_INLINE {
    const Two<Wide> x = read_pair(row + i);
    // an ulp of a float is nothing to bfloat16
    return std::is_same_v<T, Wide> ? Two<Wide>{x.a / by, x.b / by} : Two<Wide>{x.a * inverse, x.b * inverse};
  };
  int64_t i = 0;
  for (; i + PAIRED <= n; i += PAIRED) write_pair(out + i, divided(i));
  if (i < n) write_some(out + i, divided(i), n - i);
}
[[maybe_unused]] CLONES void divide(const float* row, float by, float* out, int64_t n) { divide_row(row, by, out, n); }
[[maybe_unused]] CLONES void divide(const float* row, float by, BFloat16* out, int64_t n) {
  divide_row(row, by, out, n);
}
[[maybe_unused]] CLONES void divide(const double* row, double by, double* out, int64_t n) {
  divide_row(row, by, out, n);
}

// A layer norm as a row of T needs it: weight and bias in the order of T, up to whole pairs
template <typename T, typename Wide>
struct Norm {
  std::vector<Wide> weight, bias;
  Wide eps;

  Norm(bool wanted, const std::optional<Tensor>& w, const std::optional<Tensor>& b, const Tensor& x, double eps_)
      : eps(static_cast<Wide>(eps_)) {
    if (wanted) fill("weight", w, x, 1, weight), fill("bias", b, x, 0, bias);
  }

 private:
  static void fill(const char* name, const std::optional<Tensor>& t, const Tensor& x, Wide otherwise,
                   std::vector<Wide>& values) {
    const int64_t C = x.size(x.dim() - 1);
    values.resize((C + PAIRED - 1) / PAIRED * PAIRED, otherwise);
    if (!t) return;
    check_channels(name, *t, x);
    with_float(t->scalar_type(), [&](auto* type) {
      using S = std::remove_pointer_t<decltype(type)>;
      const S* const from = static_cast<const S*>(t->data_ptr());
      const int64_t stride = t->stride(0);
      for (int64_t c = 0; c < C; ++c) {
        const Wide value = static_cast<Wide>(from[c * stride]);
        values[place_in_order<T>(c)] = value == value ? value : std::numeric_limits<Wide>::quiet_NaN();
      }
    });
  }
};

template <typename T, typename Wide>
INLINE void normalize_row(const T* in, T* out, int64_t n, const Wide* weight, const Wide* bias, Wide eps, Wide* mean,
                          Wide* deviation) {
  using Values = typename Vector<Wide>::type;
  const int64_t last = n / PAIRED * PAIRED;
  Values total[2] = {}, off[2] = {}, squares[2] = {};
  for (int64_t i = 0; i < last; i += PAIRED) {
    const auto x = read_pair(in + i);
    total[0] += x.a, total[1] += x.b;
  }
  if (last < n) {
    const auto x = read_some(in + last, n - last);
    total[0] += x.a, total[1] += x.b;
  }
  const Wide about = sum<Wide>(total[0] + total[1]) / n;
  const auto add = [&](const Values& a, const Values& b) ALWAYS_INLINE {
    off[0] += a, off[1] += b, squares[0] += a * a, squares[1] += b * b;
  };
  for (int64_t i = 0; i < last; i += PAIRED) {
    const auto x = read_pair(in + i);
    add(x.a - about, x.b - about);
  }
  if (last < n) {
    T there[PAIRED] = {};
    for (int64_t i = 0; i < n - last; ++i) there[i] = static_cast<T>(1.0f);
    const auto x = read_some(in + last, n - last), counts = read_pair(there);
    add((x.a - about) * counts.a, (x.b - about) * counts.b);
  }
  const Wide error = sum<Wide>(off[0] + off[1]) / n;  // of the mean: an ulp counts where a row is constant
  const Wide m = about + error, variance = std::max<Wide>(0, sum<Wide>(squares[0] + squares[1]) / n - error * error);
  const Wide d = 1 / std::sqrt(variance + eps);
  *mean = m, *deviation = d;
  const auto normed = [&](const Two<Wide>& x, int64_t i) ALWAYS_INLINE {
    const auto w = read_pair(weight + i), b = read_pair(bias + i);
    return Two<Wide>{(x.a - m) * d * w.a + b.a, (x.b - m) * d * w.b + b.b};
  };
  for (int64_t i = 0; i < last; i += PAIRED) write_pair<false>(out + i, normed(read_pair(in + i), i));
  if (last < n) write_some(out + last, normed(read_some(in + last, n - last), last), n - last);
}
#define NORMALIZE(T, Wide)                                                                                            \
  [[maybe_unused]] CLONES void normalize(const T* in, T* out, int64_t n, const Wide* weight, const Wide* bias,        \
                                         Wide eps, Wide* mean, Wide* deviation) {                                     \
    normalize_row(in, out, n, weight, bias, eps, mean, deviation);                                                    \
  }
NORMALIZE(float, float)
NORMALIZE(double, double)
NORMALIZE(BFloat16, float)
#undef NORMALIZE

// Room for rows of this thread
template <typename Wide>
Wide* room_for(int64_t values) {
  thread_local std::vector<Wide> memory;
  if (static_cast<int64_t>(memory.size()) < values) memory.resize(values);
  return memory.data();
}

// The layer norm of a row without gaps, its mean and its inverse standard deviation
template <typename T, typename Wide>
void normalize(const T* in, T* out, int64_t n, const Norm<T, Wide>& norm, Wide* mean, Wide* deviation) {
  if constexpr (std::is_same_v<T, Half>) {
    float* const values = room_for<float>(n);
    load(in, values, n);
    normalize(values, values, n, norm.weight.data(), norm.bias.data(), norm.eps, mean, deviation);
    store(values, out, n);
  } else {
    normalize(in, out, n, norm.weight.data(), norm.bias.data(), norm.eps, mean, deviation);
  }
}

// A row of x as Wide: where it lies if it can be used as it is, else in `room`.
template <typename T, typename Wide>
const Wide* widened(const char* row, int64_t stride, int64_t C, Wide* room) {
  const T* values = reinterpret_cast<const T*>(row);
  if (stride == static_cast<int64_t>(sizeof(T))) {
    if constexpr (std::is_same_v<T, Wide>) return values;
    else load(values, room, C);
  } else {
    for (int64_t c = 0; c < C; ++c) room[c] = static_cast<Wide>(*reinterpret_cast<const T*>(row + c * stride));
  }
  return room;
}

// A sum of rows of T, in an order of T, up to whole pairs
template <typename T, typename Wide>
struct RowSum {
  int64_t C;
  Wide *values, *room;

  explicit RowSum(int64_t C_)
      : C(C_), values(room_for<Wide>(2 * (C + PAIRED))), room(values + (C + PAIRED - 1) / PAIRED * PAIRED) {
    std::fill(values, room, Wide{0});
  }
  // values += weight * row, of any stride
  void add(const char* row, int64_t stride, Wide weight) {
    if constexpr (std::is_same_v<T, Half>) {
      add_scaled(values, widened<T>(row, stride, C, room), weight, C);
    } else {
      const T* where = reinterpret_cast<const T*>(row);
      if (stride != static_cast<int64_t>(sizeof(T))) {
        T* const close = reinterpret_cast<T*>(room);
        for (int64_t c = 0; c < C; ++c) close[c] = *reinterpret_cast<const T*>(row + c * stride);
        where = close;
      }
      add_scaled(values, where, weight, C);
    }
  }
  void copy(Wide* out) const {
    for (int64_t c = 0; c < C; ++c) out[c] = values[place_in_order<T>(c)];
  }
  // out = values / by
  void store(T* out, Wide by = 1) {
    if constexpr (std::is_same_v<T, Half>) {
      divide(values, by, values, C);
      tokenops::store(values, out, C);
    } else {
      divide(values, by, out, C);
    }
  }
};

}  // namespace
}  // namespace tokenops
