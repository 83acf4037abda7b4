// Sums of rows on a GPU, and the gather that is their gradient. The rows of a sum lie one behind the other in `order`,
// and as many lanes as hold a row go through them. Of a row that PART or more go to, whole parts are summed up before,
// each by a block of its own: the part that begins among PART places of the order, of which there is at most one. It
// holds the last of these places, which says what row it is of.
#pragma once

#include "rows.cuh"

namespace tokenops {

constexpr int PART = 128;

struct SumRows {
  Strided x, y;  // as of one image, strides in bytes
  const int64_t *dest, *order, *offsets;
  const void* weight;  // one a row of x, in the accumulation dtype, or none: 1
  bool mean;           // sums are divided by that of their weights
  void *parts, *shares;  // (windows, C) and (windows,), in the accumulation dtype, or none
  void* totals;          // (rows,)
  Norm norm;
  int64_t sources, rows, C;  // of x, and of y
  int64_t windows;
  int units, share, x_threads;  // accesses in a row; rows of a block; lanes on a row: 8, 16 or 32
  int slices;                   // blocks of a window
};

template <typename W>
__device__ W weight_of(const void* weight, int64_t n) {
  return weight ? static_cast<const W*>(weight)[n] : W(1);
}

template <typename T, int V>
__global__ void __launch_bounds__(THREADS, 3) packed_parts_kernel(const __grid_constant__ SumRows p) {
  using W = typename Wide<T>::type;
  const int64_t window = blockIdx.x / p.slices, last = (window + 1) * PART - 1, m = p.dest[p.order[last]];
  const int u = blockIdx.x % p.slices * THREADS + threadIdx.x;
  if (m < 0 || m >= p.rows || u >= p.units) return;
  const int64_t begin = p.offsets[m], end = p.offsets[m + 1], first = begin + (last - begin) / PART * PART;
  if (first + PART > end) return;
  W sum[V] = {}, share = 0;
#pragma unroll 1
  for (int start = 0; start < PART; start += IN_FLIGHT) {
    Pack<T, V> x[IN_FLIGHT];
    W weight[IN_FLIGHT];
#pragma unroll
    for (int i = 0; i < IN_FLIGHT; ++i) {
      const int64_t n = p.order[first + start + i];
      x[i] = *at<T, V>(p.x, 0, n, u), weight[i] = weight_of<W>(p.weight, n);
    }
#pragma unroll
    for (int i = 0; i < IN_FLIGHT; ++i) {
      share += weight[i];
#pragma unroll
      for (int v = 0; v < V; ++v) sum[v] += weight[i] * widen(x[i].of[v]);
    }
  }
  W* const part = static_cast<W*>(p.parts) + window * p.C + static_cast<int64_t>(u) * V;
#pragma unroll
  for (int v = 0; v < V; ++v) part[v] = sum[v];
  if (u == 0) static_cast<W*>(p.shares)[window] = share;
}

// H accesses of a row of the result, from access u on, `x_threads` apart. Returns the sum of the weights.
template <typename T, int V, int H, typename W = typename Wide<T>::type>
__device__ W sum_row(const SumRows& p, int64_t begin, int64_t count, int u, Pack<T, V> (&y)[H]) {
  if (count == 1) {
    const int64_t n = p.order[begin];
    const W weight = weight_of<W>(p.weight, n);
    if (weight == 1 || (p.mean && weight != 0)) {  // it is not rounded
#pragma unroll
      for (int h = 0; h < H; ++h) {
        if (u + h * p.x_threads < p.units) y[h] = *at<T, V>(p.x, 0, n, u + h * p.x_threads);
      }
      return weight;
    }
  }
  W sum[H][V] = {}, total = 0;
  const int64_t parts = p.parts ? count / PART : 0;
#pragma unroll 1
  for (int64_t i = begin / PART; i < begin / PART + parts; ++i) {
    total += static_cast<const W*>(p.shares)[i];
#pragma unroll
    for (int h = 0; h < H; ++h) {
      if (u + h * p.x_threads >= p.units) continue;
      W part[V];
      load_aligned(static_cast<const W*>(p.parts) + i * p.C + static_cast<int64_t>(u + h * p.x_threads) * V, part);
#pragma unroll
      for (int v = 0; v < V; ++v) sum[h][v] += part[v];
    }
  }
#pragma unroll 1
  for (int64_t i = begin + parts * PART; i < begin + count; ++i) {
    const int64_t n = p.order[i];
    Pack<T, V> x[H]{};
#pragma unroll
    for (int h = 0; h < H; ++h) {
      if (u + h * p.x_threads < p.units) x[h] = *at<T, V>(p.x, 0, n, u + h * p.x_threads);
    }
    const W weight = weight_of<W>(p.weight, n);
    total += weight;
#pragma unroll
    for (int h = 0; h < H; ++h) {
#pragma unroll
      for (int v = 0; v < V; ++v) sum[h][v] += weight * widen(x[h].of[v]);
    }
  }
  const W divisor = p.mean && total != 0 ? total : W(1);
#pragma unroll
  for (int h = 0; h < H; ++h) {
#pragma unroll
    for (int v = 0; v < V; ++v) y[h].of[v] = narrow<T>(sum[h][v] / divisor);
  }
  return total;
}

template <typename T, int V, bool NORM>
__global__ void __launch_bounds__(THREADS, NORM ? 2 : 3) packed_sums_kernel(const __grid_constant__ SumRows p) {
  using W = typename Wide<T>::type;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * p.share;
  const int here = static_cast<int>(p.rows - first < p.share ? p.rows - first : p.share);
  const int lanes = p.x_threads, lane = threadIdx.x % lanes;
  for (int start = 0; start < here; start += THREADS / lanes) {
    const int i = start + threadIdx.x / lanes;
    const int64_t row = first + i;
    const bool mine = i < here;  // the others of a warp only take part in the norm's sums
    Pack<T, V> held[HELD];
    if (mine) {
      const int64_t begin = p.offsets[row], count = p.offsets[row + 1] - begin;
      const W total = sum_row<T, V, HELD>(p, begin, count, lane, held);
#pragma unroll
      for (int h = 0; h < HELD; ++h) {
        if (h * lanes + lane < p.units) *at<T, V>(p.y, 0, row, h * lanes + lane) = held[h];
      }
#pragma unroll 1
      for (int u = HELD * lanes; u < p.units; u += lanes) {
        Pack<T, V> y[1];
        sum_row<T, V, 1>(p, begin, count, u + lane, y);
        if (u + lane < p.units) *at<T, V>(p.y, 0, row, u + lane) = y[0];
      }
      if (lane == 0) static_cast<W*>(p.totals)[row] = total;
    }
    if (NORM) normalize_held(p.norm, row, p.units, lanes, mine, p.y, 0, row, held);
  }
}

// Every row gets its share of the one it went to: dy to dx; and its product with that, where there is x.
struct GatherRows {
  Strided dy, x, dx;
  const int64_t* dest;
  const void *weight, *totals;  // in the accumulation dtype, or none: 1
  void* dots;
  int64_t rows, given, C;       // of dx and x, and of dy
  int units, share, x_threads;
};

template <typename T, int V, bool DOTS>
__global__ void __launch_bounds__(THREADS, 3) packed_gather_kernel(const __grid_constant__ GatherRows p) {
  using W = typename Wide<T>::type;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * p.share;
  const int here = static_cast<int>(p.rows - first < p.share ? p.rows - first : p.share);
  const int lanes = p.x_threads, lane = threadIdx.x % lanes;
  W ones[V];
#pragma unroll
  for (int v = 0; v < V; ++v) ones[v] = 1;
  for (int start = 0; start < here; start += THREADS / lanes) {
    const int i = start + threadIdx.x / lanes;
    const int64_t row = first + i, m = i < here ? p.dest[row] : -1;
    const bool goes = m >= 0 && m < p.given;
    W total = goes && p.totals ? static_cast<const W*>(p.totals)[m] : W(1), dot = 0;
    if (total == 0) total = 1;
    const W weight = goes ? weight_of<W>(p.weight, row) / total : W(0);
#pragma unroll 1
    for (int from = lane; from < p.units && i < here; from += HELD * lanes) {
      Pack<T, V> dy[HELD]{}, x[HELD]{};
#pragma unroll
      for (int h = 0; h < HELD; ++h) {
        const int u = from + h * lanes;
        if (!goes || u >= p.units) continue;
        dy[h] = *at<T, V>(p.dy, 0, m, u);
        if (DOTS) x[h] = *at<T, V>(p.x, 0, row, u);
      }
#pragma unroll
      for (int h = 0; h < HELD; ++h) {
        const int u = from + h * lanes;
        if (u >= p.units) continue;
        if (DOTS) {
#pragma unroll
          for (int v = 0; v < V; ++v) dot += widen(x[h].of[v]) * widen(dy[h].of[v]);
        }
        *at<T, V>(p.dx, 0, row, u) = !goes || weight == 1 ? dy[h] : scaled(dy[h], weight, ones);
      }
    }
    if (DOTS) {
      dot = sum_of_lanes(dot, lanes);
      if (i < here && lane == 0) static_cast<W*>(p.dots)[row] = dot / total;
    }
  }
}

// Rows of a block, so that there are enough blocks to fill the chip twice over, with as many rows for every thread
inline int shared_out(int64_t rows, int64_t multiprocessors, int lanes) {
  const int64_t step = THREADS / lanes, blocks = std::max<int64_t>(1, 8 * multiprocessors);
  const int64_t share = ceil_div(std::max<int64_t>(ceil_div(rows, blocks), 1), step) * step;
  return static_cast<int>(std::min(share, MAX_SHARE / step * step));
}

inline Plan plan(SumRows& p, int64_t element, int64_t multiprocessors) {
  const int width = access_width(element, 1, p.C, p.norm.addresses(), {{&p.x, p.sources}, {&p.y, p.rows}});
  if (width == 0) return {};
  p.units = static_cast<int>(p.C * element / width), p.x_threads = lanes_on(p.units);
  p.share = shared_out(p.rows, multiprocessors, p.x_threads);
  p.slices = static_cast<int>(std::max<int64_t>(1, ceil_div(p.units, THREADS)));
  return {width, ceil_div(p.rows, p.share), 0};
}

inline Plan plan(GatherRows& p, int64_t element, int64_t multiprocessors) {
  const int width =
      access_width(element, 1, p.C, 0, {{&p.dy, p.given}, {&p.x, p.rows}, {&p.dx, p.rows}});
  if (width == 0) return {};
  p.units = static_cast<int>(p.C * element / width), p.x_threads = lanes_on(p.units);
  p.share = shared_out(p.rows, multiprocessors, p.x_threads);
  return {width, ceil_div(p.rows, p.share), 0};
}

}  // namespace tokenops
