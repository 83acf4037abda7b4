// Arithmetic on rows of channels on a CPU: sums, dot products and the layer norm of a row.
#pragma once

#include "rows.h"

#include <cmath>
#include <type_traits>
#include <vector>

namespace tokenops {
namespace {

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

[[maybe_unused]] CLONES void add_scaled(float* sum, const float* row, float weight, int64_t n) {
  for (int64_t i = 0; i < n; ++i) sum[i] += weight * row[i];
}
[[maybe_unused]] CLONES void add_scaled(double* sum, const double* row, double weight, int64_t n) {
  for (int64_t i = 0; i < n; ++i) sum[i] += weight * row[i];
}
[[maybe_unused]] CLONES void scale(float* out, const float* row, float weight, int64_t n) {
  for (int64_t i = 0; i < n; ++i) out[i] = weight * row[i];
}
[[maybe_unused]] CLONES void scale(double* out, const double* row, double weight, int64_t n) {
  for (int64_t i = 0; i < n; ++i) out[i] = weight * row[i];
}

// LANES values at once; the compiler makes of them what the machine has.
template <typename Wide>
struct Vector {
  typedef Wide type __attribute__((vector_size(LANES * sizeof(Wide))));
};
#pragma GCC diagnostic ignored "-Wpsabi"  // they are passed between inlined functions only

template <typename Wide>
INLINE typename Vector<Wide>::type read(const Wide* from) {
  typename Vector<Wide>::type values;
  std::memcpy(&values, from, sizeof values);
  return values;
}

// The last values of a row, filled up.
template <typename Wide>
INLINE typename Vector<Wide>::type tail(const Wide* in, int64_t n, Wide fill) {
  Wide rest[LANES];
  for (int64_t l = 0; l < LANES; ++l) rest[l] = l < n ? in[l] : fill;
  return read(rest);
}
template <typename Wide>
INLINE Wide sum(typename Vector<Wide>::type values) {
  Wide part[LANES];
  std::memcpy(part, &values, sizeof part);
  for (int64_t half = LANES / 2; half > 0; half /= 2) {
    for (int64_t l = 0; l < half; ++l) part[l] += part[l + half];
  }
  return part[0];
}

template <typename Wide>
INLINE Wide dot_of(const Wide* a, const Wide* b, int64_t n) {
  typename Vector<Wide>::type total = {};
  int64_t i = 0;
  for (; i + LANES <= n; i += LANES) total += read(a + i) * read(b + i);
  if (i < n) total += tail<Wide>(a + i, n - i, 0) * tail<Wide>(b + i, n - i, 0);
  return sum<Wide>(total);
}
[[maybe_unused]] CLONES float dot(const float* a, const float* b, int64_t n) { return dot_of(a, b, n); }
[[maybe_unused]] CLONES double dot(const double* a, const double* b, int64_t n) { return dot_of(a, b, n); }

template <typename Wide>
struct Norm {
  const Wide *weight, *bias;  // (C,), or null
  double eps;
};

template <typename Wide>
INLINE void normalize_row(const Wide* in, Wide* out, int64_t n, const Norm<Wide>& norm, Wide* mean, Wide* deviation) {
  typename Vector<Wide>::type total = {}, off = {}, squares = {};
  int64_t i = 0;
  for (; i + LANES <= n; i += LANES) total += read(in + i);
  if (i < n) total += tail<Wide>(in + i, n - i, 0);
  const Wide about = sum<Wide>(total) / n;
  for (i = 0; i + LANES <= n; i += LANES) {
    const auto x = read(in + i) - about;
    off += x, squares += x * x;
  }
  if (i < n) {
    const auto x = tail<Wide>(in + i, n - i, about) - about;
    off += x, squares += x * x;
  }
  const Wide error = sum<Wide>(off) / n;  // of the mean: an ulp counts where a row is constant
  const Wide m = about + error, variance = std::max<Wide>(0, sum<Wide>(squares) / n - error * error);
  const Wide d = 1 / std::sqrt(variance + static_cast<Wide>(norm.eps));
  *mean = m, *deviation = d;
  const Wide *weight = norm.weight, *bias = norm.bias;
  if (weight && bias) {
    for (i = 0; i < n; ++i) out[i] = (in[i] - m) * d * weight[i] + bias[i];
  } else {
    for (i = 0; i < n; ++i) out[i] = (in[i] - m) * d * (weight ? weight[i] : 1) + (bias ? bias[i] : 0);
  }
}
[[maybe_unused]] CLONES void normalize(const float* in, float* out, int64_t n, const Norm<float>& norm, float* mean, float* deviation) {
  normalize_row(in, out, n, norm, mean, deviation);
}
[[maybe_unused]] CLONES void normalize(const double* in, double* out, int64_t n, const Norm<double>& norm, double* mean, double* deviation) {
  normalize_row(in, out, n, norm, mean, deviation);
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

}  // namespace
}  // namespace tokenops
