// merge_neighbours on a GPU: a block makes `share` rows of the result, counted through all images. First it looks up
// what each of them is made of, then it reads the tokens, each once.
//
// Threads lie along the channels and, where these leave room, along the rows. Where a row is needed whole (for its
// norm, or for the product that makes the logits' gradient), some lanes of a warp take it.
#pragma once

#include "pairs.cuh"

namespace tokenops {

constexpr int SUMMED_IN_FLIGHT = 2;  // pairs a thread reads before it writes them with their gradients
constexpr int MOST_STAGED = 2048;    // channels; more than lanes hold

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
    for (int start = ty; start < rows.here; start += IN_FLIGHT * step) {
      Pack<T, V> a[IN_FLIGHT], b[IN_FLIGHT];
#pragma unroll
      for (int i = 0; i < IN_FLIGHT; ++i) {
        if (start + i * step >= rows.here) continue;
        const Source<W>& s = sources[start + i * step];
        a[i] = *at<T, V>(p.x, s.image, s.a, u);
        if (s.b >= 0) b[i] = *at<T, V>(p.x, s.image, s.b, u);
      }
#pragma unroll
      for (int i = 0; i < IN_FLIGHT; ++i) {
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
  for (int start = 0; start < rows.here; start += THREADS / lanes) {
    const int row = start + threadIdx.x / lanes;
    const bool mine = row < rows.here;  // the others of a warp only take part in the sums
    const Source<W> s = sources[mine ? row : 0];
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
    normalize_held(p.norm, rows.first + row, p.units, lanes, mine, p.y, s.image, s.row, held);
  }
}

// SUMS: of the gradients of first and second, too.
template <typename T, int V, bool SUMS>
__global__ void __launch_bounds__(THREADS, SUMS ? 2 : 3)
    merge_neighbours_bwd_kernel(const __grid_constant__ MergeNeighbours p) {
  using W = typename Wide<T>::type;
  using Part = W[THREADS * V];
  constexpr int AT_ONCE = SUMS ? SUMMED_IN_FLIGHT : IN_FLIGHT;
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
    for (int start = ty; start < rows.here && mine; start += AT_ONCE * step) {
      Pack<T, V> dy[AT_ONCE], a[AT_ONCE], b[AT_ONCE];
#pragma unroll
      for (int i = 0; i < AT_ONCE; ++i) {
        if (start + i * step >= rows.here) continue;
        const Source<W>& s = sources[start + i * step];
        dy[i] = *at<T, V>(p.y, s.image, s.row, u);
        if (SUMS && s.b >= 0) a[i] = *at<T, V>(p.x, s.image, s.a, u), b[i] = *at<T, V>(p.x, s.image, s.b, u);
      }
#pragma unroll
      for (int i = 0; i < AT_ONCE; ++i) {
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

// Chooses the accesses and what a block takes, and writes both into p.
inline Plan plan(MergeNeighbours& p, int64_t element, int64_t multiprocessors) {
  const int64_t all = p.prefix + static_cast<int64_t>(p.height) * p.width;
  const int width = access_width(element, p.B, p.C, p.norm.addresses(), {{&p.x, all}, {&p.y, p.rows}, {&p.dx, all}});
  if (width == 0) return {};
  p.units = static_cast<int>(p.C * element / width);
  const bool whole = p.norm.wanted || p.dlogits.data;
  p.x_threads = whole ? lanes_on(p.units) : threads_along(p.units, LONG_ROW);

  // Enough blocks to fill the chip twice over (two or three of them fit into a multiprocessor; each costs a row of sums
  // where there are any), with as many rows for every thread.
  const int64_t step = THREADS / p.x_threads, rows = p.B * p.rows, blocks = (p.summed ? 4 : 8) * multiprocessors;
  const int64_t round = step * (whole ? 1 : p.summed ? SUMMED_IN_FLIGHT : IN_FLIGHT);
  int64_t share = std::max(rows / blocks, std::min(step, ceil_div(rows, 2 * multiprocessors)));
  if (share > round) share -= share % round;
  p.share = static_cast<int>(std::max<int64_t>(1, std::min<int64_t>(share, MAX_SHARE)));
  const bool stages = p.norm.wanted && (p.first.data || p.second.data);
  if (stages) p.staged = static_cast<int>(std::min<int64_t>(p.C, MOST_STAGED));
  return {width, ceil_div(rows, p.share), 2 * p.staged * (element == 8 ? 8 : 4)};
}

}  // namespace tokenops
