// merge_neighbours on a GPU: a block makes `share` rows of the result, counted through all images. First it looks up
// what each of them is made of, then it reads the tokens, each once.
//
// Threads lie along the channels and, where these leave room, along the rows. Where a row is needed whole (for its
// norm, or for the product that makes the logits' gradient), some lanes of a warp take it.
#pragma once

#include "pairs.cuh"

namespace tokenops {

constexpr int PAIRS_IN_FLIGHT = 4;   // pairs a thread reads before it writes them
constexpr int SUMMED_IN_FLIGHT = 2;  // with their gradients
constexpr int FEWEST_LANES = 8;      // on a row that is needed whole: 128 bytes side by side
constexpr int HELD = 3;              // accesses of a row that a lane keeps for its norm
constexpr int MOST_STAGED = 2048;    // channels; more than lanes hold

template <typename W>
__device__ W sum_of_lanes(W value, int lanes) {
  for (int bits = lanes / 2; bits; bits /= 2) value += __shfl_xor_sync(~0u, value, bits);
  return value;
}

// What V channels from c on are multiplied by.
template <int V, typename W>
__device__ void load_factors(const Values& v, int64_t c, W (&factors)[V]) {
  if (!v.data) {
#pragma unroll
    for (int i = 0; i < V; ++i) factors[i] = 1;
    return;
  }
  with_float(v.type, [&](auto type) {
    const auto* const from = reinterpret_cast<const decltype(type)*>(v.data);
#pragma unroll
    for (int i = 0; i < V; ++i) factors[i] = static_cast<W>(widen(from[(c + i) * v.stride_n]));
  });
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
__device__ Pack<T, V> merged(const Source<W>& s, const Pack<T, V>& a, const Pack<T, V>& b, const W (&first)[V],
                             const W (&second)[V]) {
  if (s.b < 0) return a;
  Pack<T, V> y;
#pragma unroll
  for (int i = 0; i < V; ++i) {
    y.of[i] = narrow<T>(s.weight_a * first[i] * widen(a.of[i]) + s.weight_b * second[i] * widen(b.of[i]));
  }
  return y;
}

template <typename T, int V, typename W>
__device__ Pack<T, V> scaled(const Pack<T, V>& dy, W weight, const W (&factors)[V]) {
  Pack<T, V> dx;
#pragma unroll
  for (int i = 0; i < V; ++i) dx.of[i] = narrow<T>(weight * factors[i] * widen(dy.of[i]));
  return dx;
}

template <typename T, int V>
__global__ void __launch_bounds__(THREADS, 3) merge_neighbours_fwd_kernel(const __grid_constant__ MergeNeighbours p) {
  using W = typename Wide<T>::type;
  SHARED(Sources<T>, sources);
  const Rows rows(p);
  find_sources(p, rows.first, rows.here, sources);
  const int tx = threadIdx.x % p.x_threads, ty = threadIdx.x / p.x_threads, step = THREADS / p.x_threads;
  for (int u = tx; u < p.units && ty < step; u += p.x_threads) {
    W first[V], second[V];
    load_factors(p.first, static_cast<int64_t>(u) * V, first);
    load_factors(p.second, static_cast<int64_t>(u) * V, second);
    for (int start = ty; start < rows.here; start += PAIRS_IN_FLIGHT * step) {
      Pack<T, V> a[PAIRS_IN_FLIGHT], b[PAIRS_IN_FLIGHT];
#pragma unroll
      for (int i = 0; i < PAIRS_IN_FLIGHT; ++i) {
        if (start + i * step >= rows.here) continue;
        const Source<W>& s = sources[start + i * step];
        a[i] = *at<T, V>(p.x, s.image, s.a, u);
        if (s.b >= 0) b[i] = *at<T, V>(p.x, s.image, s.b, u);
      }
#pragma unroll
      for (int i = 0; i < PAIRS_IN_FLIGHT; ++i) {
        if (start + i * step >= rows.here) continue;
        const Source<W>& s = sources[start + i * step];
        *at<T, V>(p.y, s.image, s.row, u) = merged(s, a[i], b[i], first, second);
      }
    }
  }
}

// The same with a layer norm of every row.
template <typename T, int V>
__global__ void __launch_bounds__(THREADS, 2) merge_neighbours_norm_kernel(const __grid_constant__ MergeNeighbours p) {
  using W = typename Wide<T>::type;
  SHARED(Sources<T>, sources);
  DYNAMIC_SHARED(W, factors, 2 * p.staged);
  const Rows rows(p);
  for (int c = threadIdx.x; c < p.staged; c += THREADS) {
    W factor[1];
    load_factors(p.first, c, factor);
    factors[c] = factor[0];
    load_factors(p.second, c, factor);
    factors[p.staged + c] = factor[0];
  }
  find_sources(p, rows.first, rows.here, sources);

  const int lanes = p.x_threads, lane = threadIdx.x % lanes;
  const W *weights = static_cast<const W*>(p.weight), *biases = static_cast<const W*>(p.bias);
  for (int start = 0; start < rows.here; start += THREADS / lanes) {
    const int row = start + threadIdx.x / lanes;
    const bool mine = row < rows.here;  // the others of a warp only take part in the sums
    const Source<W> s = sources[mine ? row : 0];
    const int64_t flat = rows.first + row;
    const int units = mine ? p.units : 0;
    // what is held is staged, if it has factors at all: loading these in the unrolled loop would spill
    const auto merge = [&](int u, const Pack<T, V>& a, const Pack<T, V>& b, bool held) {
      W first[V], second[V];
      const int c = u * V;
      if (p.staged && (held || c < p.staged)) {
        load_aligned(factors + c, first), load_aligned(factors + p.staged + c, second);
      } else if (!held) {
        load_factors(p.first, c, first), load_factors(p.second, c, second);
      } else {
#pragma unroll
        for (int i = 0; i < V; ++i) first[i] = second[i] = 1;
      }
      return merged(s, a, b, first, second);
    };
    Pack<T, V> held[HELD], others[HELD];
#pragma unroll
    for (int h = 0; h < HELD; ++h) {
      const int u = h * lanes + lane;
      if (u < units) held[h] = *at<T, V>(p.x, s.image, s.a, u);
      if (u < units && s.b >= 0) others[h] = *at<T, V>(p.x, s.image, s.b, u);
    }
#pragma unroll
    for (int h = 0; h < HELD; ++h) {
      const int u = h * lanes + lane;
      if (u < units) *at<T, V>(p.y, s.image, s.row, u) = held[h] = merge(u, held[h], others[h], true);
    }
#pragma unroll 1
    for (int u = HELD * lanes + lane; u < units; u += lanes) {
      Pack<T, V> a = *at<T, V>(p.x, s.image, s.a, u), b{};
      if (s.b >= 0) b = *at<T, V>(p.x, s.image, s.b, u);
      *at<T, V>(p.y, s.image, s.row, u) = merge(u, a, b, false);
    }
    // f(access, its values) for all of the row; what is not held each lane reads back as it wrote it
    const auto each = [&](const auto& f) {
#pragma unroll
      for (int h = 0; h < HELD; ++h) {
        if (h * lanes + lane < units) f(h * lanes + lane, held[h]);
      }
#pragma unroll 1
      for (int u = HELD * lanes + lane; u < units; u += lanes) f(u, *at<T, V>(p.y, s.image, s.row, u));
    };
    W sum = 0, squares = 0;
    each([&](int, const Pack<T, V>& y) {
#pragma unroll
      for (int i = 0; i < V; ++i) sum += widen(y.of[i]);
    });
    const W mean = sum_of_lanes(sum, lanes) / p.C;
    each([&](int, const Pack<T, V>& y) {
#pragma unroll
      for (int i = 0; i < V; ++i) squares += (widen(y.of[i]) - mean) * (widen(y.of[i]) - mean);
    });
    const W deviation = inverse_root(sum_of_lanes(squares, lanes) / p.C + static_cast<W>(p.eps));
    if (mine && lane == 0) static_cast<W*>(p.mean)[flat] = mean, static_cast<W*>(p.deviation)[flat] = deviation;
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
      reinterpret_cast<Pack<T, V>*>(p.normed)[flat * p.units + u] = out;
    });
  }
}

// SUMS: of the gradients of first and second, too.
template <typename T, int V, bool SUMS>
__global__ void __launch_bounds__(THREADS, SUMS ? 2 : 3)
    merge_neighbours_bwd_kernel(const __grid_constant__ MergeNeighbours p) {
  using W = typename Wide<T>::type;
  using Part = W[THREADS * V];
  constexpr int IN_FLIGHT_HERE = SUMS ? SUMMED_IN_FLIGHT : PAIRS_IN_FLIGHT;
  SHARED(Sources<T>, sources);
  const Rows rows(p);
  find_sources(p, rows.first, rows.here, sources);
  const int tx = threadIdx.x % p.x_threads, ty = threadIdx.x / p.x_threads, step = THREADS / p.x_threads;
  for (int left = 0; left < p.units; left += p.x_threads) {
    const int u = left + tx;
    const bool mine = u < p.units && ty < step;
    W first[V], second[V], sum[2][V] = {};
    if (mine) {
      load_factors(p.first, static_cast<int64_t>(u) * V, first);
      load_factors(p.second, static_cast<int64_t>(u) * V, second);
    }
    for (int start = ty; start < rows.here && mine; start += IN_FLIGHT_HERE * step) {
      Pack<T, V> dy[IN_FLIGHT_HERE], a[IN_FLIGHT_HERE], b[IN_FLIGHT_HERE];
#pragma unroll
      for (int i = 0; i < IN_FLIGHT_HERE; ++i) {
        if (start + i * step >= rows.here) continue;
        const Source<W>& s = sources[start + i * step];
        dy[i] = *at<T, V>(p.y, s.image, s.row, u);
        if (SUMS && s.b >= 0) a[i] = *at<T, V>(p.x, s.image, s.a, u), b[i] = *at<T, V>(p.x, s.image, s.b, u);
      }
#pragma unroll
      for (int i = 0; i < IN_FLIGHT_HERE; ++i) {
        if (start + i * step >= rows.here) continue;
        const Source<W>& s = sources[start + i * step];
        if (s.b < 0) {
          *at<T, V>(p.dx, s.image, s.a, u) = dy[i];
          continue;
        }
        *at<T, V>(p.dx, s.image, s.a, u) = scaled(dy[i], s.weight_a, first);
        *at<T, V>(p.dx, s.image, s.b, u) = scaled(dy[i], s.weight_b, second);
        if (SUMS) {
#pragma unroll
          for (int v = 0; v < V; ++v) {
            sum[0][v] += s.weight_a * widen(dy[i].of[v]) * widen(a[i].of[v]);
            sum[1][v] += s.weight_b * widen(dy[i].of[v]) * widen(b[i].of[v]);
          }
        }
      }
    }
    if constexpr (SUMS) {
      SHARED(Part, part);
#pragma unroll
      for (int which = 0; which < 2; ++which) {
        __syncthreads();  // the part before has been read
#pragma unroll
        for (int v = 0; v < V; ++v) part[threadIdx.x * V + v] = sum[which][v];
        __syncthreads();
        if (mine && ty == 0) {
          W* const to = static_cast<W*>(p.sums) + (2 * static_cast<int64_t>(blockIdx.x) + which) * p.C;
          for (int y = 1; y < step; ++y) {
#pragma unroll
            for (int v = 0; v < V; ++v) sum[which][v] += part[(y * p.x_threads + tx) * V + v];
          }
#pragma unroll
          for (int v = 0; v < V; ++v) to[static_cast<int64_t>(u) * V + v] = sum[which][v];
        }
      }
    }
  }
}

// With the gradient of the logits: that of a pair's weights goes through <dy, a - b>.
template <typename T, int V>
__global__ void __launch_bounds__(THREADS, 3)
    merge_neighbours_logits_bwd_kernel(const __grid_constant__ MergeNeighbours p) {
  using W = typename Wide<T>::type;
  SHARED(Sources<T>, sources);
  const Rows rows(p);
  find_sources(p, rows.first, rows.here, sources);
  W ones[V];
#pragma unroll
  for (int i = 0; i < V; ++i) ones[i] = 1;
  const int lanes = p.x_threads, lane = threadIdx.x % lanes;
  for (int first = 0; first < rows.here; first += THREADS / lanes) {
    const int row = first + threadIdx.x / lanes;
    const bool mine = row < rows.here;  // the others of a warp only take part in the sum
    const Source<W> s = sources[mine ? row : 0];
    const int units = mine ? p.units : 0;
    W dot = 0;
#pragma unroll 1
    for (int start = lane; start < units; start += SUMMED_IN_FLIGHT * lanes) {
      Pack<T, V> dy[SUMMED_IN_FLIGHT], a[SUMMED_IN_FLIGHT], b[SUMMED_IN_FLIGHT];
#pragma unroll
      for (int i = 0; i < SUMMED_IN_FLIGHT; ++i) {
        const int u = start + i * lanes;
        if (u >= units) continue;
        dy[i] = *at<T, V>(p.y, s.image, s.row, u);
        if (s.b >= 0) a[i] = *at<T, V>(p.x, s.image, s.a, u), b[i] = *at<T, V>(p.x, s.image, s.b, u);
      }
#pragma unroll
      for (int i = 0; i < SUMMED_IN_FLIGHT; ++i) {
        const int u = start + i * lanes;
        if (u >= units) continue;
        if (s.b < 0) {
          *at<T, V>(p.dx, s.image, s.a, u) = dy[i];
          continue;
        }
        *at<T, V>(p.dx, s.image, s.a, u) = scaled(dy[i], s.weight_a, ones);
        *at<T, V>(p.dx, s.image, s.b, u) = scaled(dy[i], s.weight_b, ones);
#pragma unroll
        for (int v = 0; v < V; ++v) dot += widen(dy[i].of[v]) * (widen(a[i].of[v]) - widen(b[i].of[v]));
      }
    }
    dot = sum_of_lanes(dot, lanes);
    if (!mine || lane != 0 || s.row < p.prefix) continue;
    const W both = s.weight_a * s.weight_b, slope = both == 0 ? 0 : both * dot;  // 0: one of them does not count
    store(p.dlogits, s.image, s.a - p.prefix, slope);
    if (s.b >= 0) store(p.dlogits, s.image, s.b - p.prefix, -slope);
  }
}

struct MergePlan {
  int width;  // bytes of an access: 16, or those of an element; 0 where the data is not even aligned to its elements
  int64_t blocks, shared;  // of dynamic shared memory
};

// Chooses the accesses and what a block takes, and writes both into p.
inline MergePlan plan(MergeNeighbours& p, int64_t element, int64_t multiprocessors) {
  bool dense = true;
  uint64_t addresses = p.C * element | reinterpret_cast<uintptr_t>(p.normed) | reinterpret_cast<uintptr_t>(p.weight) |
                       reinterpret_cast<uintptr_t>(p.bias);
  const int64_t all = p.prefix + static_cast<int64_t>(p.height) * p.width;
  const std::pair<const Strided*, int64_t> tensors[] = {{&p.x, all}, {&p.y, p.rows}, {&p.dx, all}};
  for (const auto& [t, rows] : tensors) {
    if (!t->data) continue;
    dense = dense && (p.C == 1 || t->stride_c == element);
    addresses |= reinterpret_cast<uintptr_t>(t->data);
    if (p.B > 1) addresses |= t->stride_b;
    if (rows > 1) addresses |= t->stride_n;
    if (!dense && p.C > 1) addresses |= t->stride_c;
  }
  if (addresses % element) return {};
  const int width = dense && addresses % 16 == 0 ? 16 : static_cast<int>(element);
  p.units = static_cast<int>(p.C * element / width);
  const bool whole = p.norm || p.dlogits.data;
  if (whole) {
    p.x_threads = FEWEST_LANES;
    while (p.x_threads < 32 && p.x_threads * HELD < p.units) p.x_threads *= 2;
  } else {  // of long rows 1 KiB side by side, one part after another
    const int64_t parts = std::max<int64_t>(1, ceil_div(p.units, 64));
    p.x_threads = static_cast<int>(std::max<int64_t>(1, ceil_div(p.units, parts)));
  }

  // Enough blocks to fill the chip twice over (two or three of them fit into a multiprocessor; each costs a row of sums
  // where there are any), with as many rows for every thread.
  const int64_t step = THREADS / p.x_threads, rows = p.B * p.rows, blocks = (p.summed ? 4 : 8) * multiprocessors;
  const int64_t round = step * (whole ? 1 : p.summed ? SUMMED_IN_FLIGHT : PAIRS_IN_FLIGHT);
  int64_t share = std::max(rows / blocks, std::min(step, ceil_div(rows, 2 * multiprocessors)));
  if (share > round) share -= share % round;
  p.share = static_cast<int>(std::max<int64_t>(1, std::min<int64_t>(share, MAX_SHARE)));
  if (p.norm && (p.first.data || p.second.data)) p.staged = static_cast<int>(std::min<int64_t>(p.C, MOST_STAGED));
  return {width, ceil_div(rows, p.share), 2 * p.staged * (element == 8 ? 8 : 4)};
}

}  // namespace tokenops
