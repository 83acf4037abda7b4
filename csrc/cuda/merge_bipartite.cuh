// Bipartite merging on a GPU by any map of tokens, and the way back. Merging, a block makes `share` rows of an image's
// result: what goes into each it learns by counting, and rows of more than two tokens look for theirs again, in order.
#pragma once

#include "rows.cuh"

#include <climits>

namespace tokenops {

// Merging: x to y. The way back: y to x.
struct MergeBipartite {
  Strided x, y;  // strides in bytes, stride_c of one element
  const int64_t* index;
  int64_t stride_ib, stride_in;  // in elements
  Values sizes;                  // (B, P+N), or none: 1
  Values merged;                 // (B, P+M), where a gradient is shared out by size
  bool mean;                     // sums are divided by the sizes' sum
  void *totals, *logs;           // (B, P+M), or none
  Norm norm;
  int64_t B, C;
  int prefix, tokens, merged_tokens;  // N and M
  int units, share, slices;  // accesses in a row; rows of a block; of merging, blocks of an image
  int x_threads;             // threads side by side on a row; merging 8, 16 or 32
};

// Which tokens go into a row: how many, the first and the last of them
struct Origin {
  int count, first, last;
};
using Origins = Origin[MAX_SHARE];

__device__ inline void find_origins(const MergeBipartite& p, int64_t b, int first, int here, Origin* origins) {
  for (int i = threadIdx.x; i < here; i += THREADS) {
    const int t = first + i - p.prefix;
    origins[i] = t < 0 ? Origin{1, t, t} : Origin{0, INT_MAX, -1};
  }
  __syncthreads();
  const int64_t lowest = first < p.prefix ? 0 : first - p.prefix, end = static_cast<int64_t>(first) + here - p.prefix;
  for (int n = threadIdx.x; n < p.tokens; n += THREADS) {
    const int64_t t = p.index[b * p.stride_ib + n * p.stride_in];
    if (t < lowest || t >= end) continue;
    Origin& origin = origins[t + p.prefix - first];
    atomicAdd(&origin.count, 1);
    atomicMin(&origin.first, n);
    atomicMax(&origin.last, n);
  }
  __syncthreads();
}

// f(token) for all that go into token t, in their order, by the lanes of a row together.
template <typename F>
__device__ void each_token(const MergeBipartite& p, int64_t b, int64_t t, const Origin& origin, const F& f) {
  if (origin.count <= 2) {
#pragma unroll 1
    for (int i = 0; i < origin.count; ++i) f(i ? origin.last : origin.first);
    return;
  }
  const int lanes = p.x_threads, lane = threadIdx.x % lanes, before = threadIdx.x % 32 - lane;
  const unsigned row = ~0u >> (32 - lanes) << before;
#pragma unroll 1
  for (int start = origin.first; start <= origin.last; start += lanes) {
    const int64_t n = start + lane;
    unsigned votes = __ballot_sync(row, n <= origin.last && p.index[b * p.stride_ib + n * p.stride_in] == t);
#pragma unroll 1
    for (; votes; votes &= votes - 1) f(start + __popc((votes & (0 - votes)) - 1) - before);
  }
}

template <typename W>
__device__ W size_of(const MergeBipartite& p, int64_t b, int64_t row) {
  return p.sizes.data ? load<W>(p.sizes, b, row) : W(1);
}

// H accesses of a row of the result, from access u on, `x_threads` apart. Returns the sum of the sizes.
template <typename T, int V, int H, typename W = typename Wide<T>::type>
__device__ W merge_row(const MergeBipartite& p, int64_t b, int64_t row, const Origin& origin, int u,
                       Pack<T, V> (&y)[H]) {
  if (origin.count == 1) {
    const int64_t from = p.prefix + static_cast<int64_t>(origin.first);
#pragma unroll
    for (int h = 0; h < H; ++h) {
      if (u + h * p.x_threads < p.units) y[h] = *at<T, V>(p.x, b, from, u + h * p.x_threads);
    }
    const W size = size_of<W>(p, b, from);
    if (size == 0 && row >= p.prefix) {
#pragma unroll
      for (int h = 0; h < H; ++h) y[h] = {};
    }
    return size;
  }
  W sum[H][V] = {}, total = 0;
  each_token(p, b, row - p.prefix, origin, [&](int n) {
    const int64_t from = p.prefix + static_cast<int64_t>(n);
    Pack<T, V> x[H]{};
#pragma unroll
    for (int h = 0; h < H; ++h) {
      if (u + h * p.x_threads < p.units) x[h] = *at<T, V>(p.x, b, from, u + h * p.x_threads);
    }
    const W size = size_of<W>(p, b, from);
    total += size;
#pragma unroll
    for (int h = 0; h < H; ++h) {
#pragma unroll
      for (int i = 0; i < V; ++i) sum[h][i] += size * widen(x[h].of[i]);
    }
  });
  const W divisor = p.mean ? total : W(1);
#pragma unroll
  for (int h = 0; h < H; ++h) {
#pragma unroll
    for (int i = 0; i < V; ++i) y[h].of[i] = narrow<T>(total == 0 ? W(0) : sum[h][i] / divisor);
  }
  return total;
}

template <typename T, int V, bool NORM>
__global__ void __launch_bounds__(THREADS, NORM ? 2 : 3)
    merge_bipartite_kernel(const __grid_constant__ MergeBipartite p) {
  using W = typename Wide<T>::type;
  SHARED(Origins, origins);
  const int64_t b = blockIdx.x / p.slices;
  const int rows = p.prefix + p.merged_tokens, first = blockIdx.x % p.slices * p.share;
  const int here = rows - first < p.share ? rows - first : p.share;
  find_origins(p, b, first, here, origins);
  const int lanes = p.x_threads, lane = threadIdx.x % lanes;
  for (int start = 0; start < here; start += THREADS / lanes) {
    const int i = start + threadIdx.x / lanes, row = first + i;
    const bool mine = i < here;  // the others of a warp only take part in the norm's sums
    Pack<T, V> held[HELD];
    if (mine) {
      const W size = merge_row<T, V, HELD>(p, b, row, origins[i], lane, held);
#pragma unroll
      for (int h = 0; h < HELD; ++h) {
        if (h * lanes + lane < p.units) *at<T, V>(p.y, b, row, h * lanes + lane) = held[h];
      }
#pragma unroll 1
      for (int u = HELD * lanes; u < p.units; u += lanes) {
        Pack<T, V> y[1];
        merge_row<T, V, 1>(p, b, row, origins[i], u + lane, y);
        if (u + lane < p.units) *at<T, V>(p.y, b, row, u + lane) = y[0];
      }
      if (p.totals && lane == 0) {
        static_cast<W*>(p.totals)[b * rows + row] = size;
        static_cast<W*>(p.logs)[b * rows + row] = std::log(size);
      }
    }
    if (NORM) normalize_held(p.norm, b * rows + row, p.units, lanes, mine, p.y, b, row, held);
  }
}

// A row of the way back: which one it gets, -1 if none, and what it counts there
template <typename W>
struct Given {
  int64_t image;
  int row, from;
  W weight;
};
template <typename T>
using Givens = Given<typename Wide<T>::type>[MAX_SHARE];

template <typename W>
__device__ void find_givens(const MergeBipartite& p, int64_t first, int here, Given<W>* givens) {
  const int64_t rows = p.prefix + static_cast<int64_t>(p.tokens);
  for (int i = threadIdx.x; i < here; i += THREADS) {
    Given<W> g;
    g.image = (first + i) / rows, g.row = static_cast<int>(first + i - g.image * rows), g.from = g.row, g.weight = 1;
    if (g.row >= p.prefix) {
      const int64_t t = p.index[g.image * p.stride_ib + (g.row - p.prefix) * p.stride_in];
      g.from = t >= 0 && t < p.merged_tokens ? p.prefix + static_cast<int>(t) : -1;
      if (g.from >= 0 && p.merged.data) {
        const W total = load<W>(p.merged, g.image, g.from);
        if (total == 0) g.from = -1;
        else g.weight = size_of<W>(p, g.image, g.row) / total;
      }
    }
    givens[i] = g;
  }
  __syncthreads();
}

template <typename T, int V>
__global__ void __launch_bounds__(THREADS, 3) unmerge_bipartite_kernel(const __grid_constant__ MergeBipartite p) {
  using W = typename Wide<T>::type;
  SHARED(Givens<T>, givens);
  const int64_t all = p.B * (p.prefix + static_cast<int64_t>(p.tokens));
  const int64_t first = static_cast<int64_t>(blockIdx.x) * p.share;
  const int here = static_cast<int>(all - first < p.share ? all - first : p.share);
  find_givens(p, first, here, givens);
  W ones[V];
#pragma unroll
  for (int i = 0; i < V; ++i) ones[i] = 1;
  const int tx = threadIdx.x % p.x_threads, ty = threadIdx.x / p.x_threads, step = THREADS / p.x_threads;
  for (int u = tx; u < p.units && ty < step; u += p.x_threads) {
    for (int start = ty; start < here; start += IN_FLIGHT * step) {
      Pack<T, V> y[IN_FLIGHT];
#pragma unroll
      for (int i = 0; i < IN_FLIGHT; ++i) {
        if (start + i * step >= here) continue;
        const Given<W>& g = givens[start + i * step];
        y[i] = {};
        if (g.from >= 0) y[i] = *at<T, V>(p.y, g.image, g.from, u);
      }
#pragma unroll
      for (int i = 0; i < IN_FLIGHT; ++i) {
        if (start + i * step >= here) continue;
        const Given<W>& g = givens[start + i * step];
        *at<T, V>(p.x, g.image, g.row, u) = g.weight == 1 ? y[i] : scaled(y[i], g.weight, ones);
      }
    }
  }
}

// Merging: blocks of whole images' rows, as many lanes on a row as hold it. The way back: rows counted through images.
inline Plan plan(MergeBipartite& p, int64_t element, int64_t multiprocessors, bool back) {
  const int64_t few = static_cast<int64_t>(p.prefix) + p.merged_tokens;
  const int64_t many = static_cast<int64_t>(p.prefix) + p.tokens;
  const int width = access_width(element, p.B, p.C, p.norm.addresses(), {{&p.x, many}, {&p.y, few}});
  if (width == 0) return {};
  p.units = static_cast<int>(p.C * element / width);
  p.x_threads = back ? threads_along(p.units, LONG_ROW) : lanes_on(p.units);
  // enough blocks to fill the chip twice over, with as many rows for every thread
  const int64_t step = THREADS / p.x_threads, rows = back ? p.B * many : few, images = back ? 1 : p.B;
  const int64_t blocks = std::max<int64_t>(1, 8 * multiprocessors / std::max<int64_t>(images, 1));
  const int64_t share = ceil_div(std::max<int64_t>(ceil_div(rows, blocks), 1), step) * step;
  p.share = static_cast<int>(std::min(share, MAX_SHARE / step * step));
  p.slices = static_cast<int>(ceil_div(few, p.share));
  return {width, back ? ceil_div(rows, p.share) : p.B * p.slices, 0};
}

}  // namespace tokenops
