// Rows of channels on a GPU: what one access moves, how threads lie along a row, small tensors of any float dtype
// beside the rows, and their layer norm.
#pragma once

#include "numbers.cuh"

#include <algorithm>
#include <initializer_list>
#include <utility>

namespace tokenops {

constexpr int MAX_SHARE = 256;   // rows of a block
constexpr int IN_FLIGHT = 4;     // rows, or pairs of them, that a thread reads before it writes them
constexpr int FEWEST_LANES = 8;  // on a row that is needed whole: 128 bytes side by side
constexpr int HELD = 3;          // accesses of a row that a lane keeps for its norm

struct Plan {
  int width;  // bytes of an access; 0 where the data is not even aligned to its elements
  int64_t blocks, shared;  // of dynamic shared memory
};

// The bytes of an access to (B, rows, C) tensors, given with their rows, and to channels side by side at `addresses`:
// 16, 8, 4 or 2, but those of an element where channels lie apart. Tensors without data do not count.
inline int widest_access(int64_t element, int64_t B, int64_t C, uint64_t addresses,
                         std::initializer_list<std::pair<const Strided*, int64_t>> tensors) {
  bool dense = true;
  addresses |= C * element;
  for (const auto& [t, rows] : tensors) {
    if (!t->data) continue;
    dense = dense && (C == 1 || t->stride_c == element);
    addresses |= reinterpret_cast<uintptr_t>(t->data);
    if (B > 1) addresses |= t->stride_b;
    if (rows > 1) addresses |= t->stride_n;
    if (!dense && C > 1) addresses |= t->stride_c;
  }
  if (addresses % element) return 0;
  int width = dense ? 16 : static_cast<int>(element);
  while (addresses % width) width /= 2;
  return width;
}

// The same, but 16 or those of an element
inline int access_width(int64_t element, int64_t B, int64_t C, uint64_t addresses,
                        std::initializer_list<std::pair<const Strided*, int64_t>> tensors) {
  const int width = widest_access(element, B, C, addresses, tensors);
  return width % 16 == 0 ? width : static_cast<int>(element);
}

// Threads side by side on a row of `units` accesses, that has as many parts as `most` of them need, all equal
inline int threads_along(int64_t units, int64_t most) {
  const int64_t parts = std::max<int64_t>(1, ceil_div(units, most));
  return static_cast<int>(std::max<int64_t>(1, ceil_div(units, parts)));
}
constexpr int LONG_ROW = 64;  // accesses of 16 bytes side by side, 1 KiB

// Lanes on a row that is needed whole: 8, 16 or 32, as many as hold it
inline int lanes_on(int64_t units) {
  int lanes = FEWEST_LANES;
  while (lanes < 32 && lanes * HELD < units) lanes *= 2;
  return lanes;
}

// A small tensor of any float dtype, (B, tokens) or (C,); strides in elements, no data where it is not given
struct Values {
  char* data;
  Float type;
  int64_t stride_b, stride_n;
};

template <typename F>
__device__ void with_float(Float type, const F& f) {
  if (type == Float::F32) f(float{});
  else if (type == Float::BF16) f(BFloat16{});
  else if (type == Float::F16) f(Half{});
  else f(double{});
}

template <typename W>
__device__ W load(const Values& v, int64_t b, int64_t n) {
  W value;
  with_float(v.type, [&](auto type) {
    value = static_cast<W>(widen(reinterpret_cast<const decltype(type)*>(v.data)[b * v.stride_b + n * v.stride_n]));
  });
  return value;
}

template <typename W>
__device__ void store(const Values& v, int64_t b, int64_t n, W value) {
  with_float(v.type, [&](auto type) {
    using T = decltype(type);
    reinterpret_cast<T*>(v.data)[b * v.stride_b + n * v.stride_n] = narrow<T>(value);
  });
}

template <typename W>
__device__ W sum_of_lanes(W value, int lanes) {
  for (int bits = lanes / 2; bits; bits /= 2) value += __shfl_xor_sync(~0u, value, bits);
  return value;
}

// V values side by side; their address is a multiple of 16 bytes, or V is 1.
template <int V, typename W>
__device__ void load_aligned(const W* from, W (&values)[V]) {
  constexpr int SIDE = V == 1 ? 1 : MOST_IN_PACK<W>;
#pragma unroll
  for (int j = 0; j < V; j += SIDE) {
    const Pack<W, SIDE> part = *reinterpret_cast<const Pack<W, SIDE>*>(from + j);
#pragma unroll
    for (int i = 0; i < SIDE; ++i) values[j + i] = part.of[i];
  }
}

template <typename T, int V, typename W>
__device__ Pack<T, V> scaled(const Pack<T, V>& x, W weight, const W (&factors)[V]) {
  Pack<T, V> y;
#pragma unroll
  for (int i = 0; i < V; ++i) y.of[i] = narrow<T>(weight * factors[i] * widen(x.of[i]));
  return y;
}

// The layer norm of rows
struct Norm {
  bool wanted;
  char* normed;               // like the rows, contiguous
  void *means, *deviations;   // one a row
  const void *weight, *bias;  // (C,), in the accumulation dtype
  double eps;

  uint64_t addresses() const {
    const void* const all[] = {normed, weight, bias};
    uint64_t bits = 0;
    for (const void* one : all) bits |= reinterpret_cast<uintptr_t>(one);
    return bits;
  }
};

// Row `flat` of all, by `lanes` of a warp: each(f) calls f(access, its values) for what this lane has of the row, and
// `first` is the lane that writes the statistics. Lanes that have nothing take part in the sums.
template <typename T, int V, typename F>
__device__ void normalize(const Norm& norm, int64_t flat, int units, int lanes, bool first, const F& each) {
  using W = typename Wide<T>::type;
  const W *weights = static_cast<const W*>(norm.weight), *biases = static_cast<const W*>(norm.bias);
  const W C = static_cast<W>(units * V);
  W sum = 0, squares = 0;
  each([&](int, const Pack<T, V>& y) {
#pragma unroll
    for (int i = 0; i < V; ++i) sum += widen(y.of[i]);
  });
  const W mean = sum_of_lanes(sum, lanes) / C;
  each([&](int, const Pack<T, V>& y) {
#pragma unroll
    for (int i = 0; i < V; ++i) squares += (widen(y.of[i]) - mean) * (widen(y.of[i]) - mean);
  });
  const W deviation = inverse_root(sum_of_lanes(squares, lanes) / C + static_cast<W>(norm.eps));
  if (first) static_cast<W*>(norm.means)[flat] = mean, static_cast<W*>(norm.deviations)[flat] = deviation;
  each([&](int u, const Pack<T, V>& y) {
    const int64_t c = static_cast<int64_t>(u) * V;
    W value[V], factor[V];
#pragma unroll
    for (int i = 0; i < V; ++i) value[i] = (widen(y.of[i]) - mean) * deviation;
    if (weights) {
      load_aligned(weights + c, factor);
#pragma unroll
      for (int i = 0; i < V; ++i) value[i] *= factor[i];
    }
    if (biases) {
      load_aligned(biases + c, factor);
#pragma unroll
      for (int i = 0; i < V; ++i) value[i] += factor[i];
    }
    Pack<T, V> out;
#pragma unroll
    for (int i = 0; i < V; ++i) out.of[i] = narrow<T>(value[i]);
    reinterpret_cast<Pack<T, V>*>(norm.normed)[flat * units + u] = out;
  });
}

// Of a row of which each lane holds its first accesses, and reads back what else it wrote to y
template <typename T, int V>
__device__ void normalize_held(const Norm& norm, int64_t flat, int units, int lanes, bool mine, const Strided& y,
                               int64_t b, int64_t row, const Pack<T, V> (&held)[HELD]) {
  const int lane = threadIdx.x % lanes, here = mine ? units : 0;
  normalize<T, V>(norm, flat, units, lanes, mine && lane == 0, [&](const auto& f) {
#pragma unroll
    for (int h = 0; h < HELD; ++h) {
      if (h * lanes + lane < here) f(h * lanes + lane, held[h]);
    }
#pragma unroll 1
    for (int u = HELD * lanes + lane; u < here; u += lanes) f(u, *at<T, V>(y, b, row, u));
  });
}

}  // namespace tokenops
