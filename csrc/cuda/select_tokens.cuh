// select_tokens on a GPU: every block makes its image's choice for itself, by radix select, and then copies its slice
// of the rows: a range of channels (so that one block sums the rest over all tokens) or, with a norm, a range of rows.
#pragma once

#include "choose.cuh"
#include "companions.cuh"
#include "rows.cuh"

namespace tokenops {

// (B, N) and (B, k), or in the backward pass the other way
struct Follower {
  Companion from, to;
  int bytes;
};

// Forward: x to tokens. Backward: tokens (their gradients) to dx; x and fused are read for a weighted rest.
struct SelectTokens : Scores {
  Strided x, tokens, dx;  // strides in bytes, stride_c of one element
  Norm norm;              // of the tokens' rows
  int64_t *index, stride_ib, stride_ik;
  const int64_t* counts;  // (B,), or null
  void* fused;     // (B, 1+C)
  char* dscores;  // (B, N), in the scores' dtype
  Follower companions[MOST_COMPANIONS];
  int companions_given;
  int64_t B, C, prefix;
  int k;
  Rest rest;
  bool best_first;
  int units, slices, share;  // accesses in a row; blocks of an image, and what each has of units or rows
  int x_threads;             // threads side by side on a row
};

__device__ inline int count_of(const SelectTokens& p, int64_t b) {
  if (!p.counts) return p.k;
  const int64_t count = p.counts[b];
  return count < 0 ? 0 : count > p.k ? p.k : static_cast<int>(count);
}

// The sum over all threads, known to all of them.
template <typename Wide>
__device__ Wide sum_of_block(Wide value, Wide* partial) {
  value = sum_of_lanes(value, 32);
  __syncthreads();
  if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = value;
  __syncthreads();
  Wide total = 0;
  for (int w = 0; w < WARPS; ++w) total += partial[w];
  return total;
}

template <typename T>
struct Scratch {
  typename Wide<T>::type sums[THREADS * MOST_IN_PACK<T>];
  typename Wide<T>::type partial[WARPS];
};

// Units [first, last) of the rest token.
template <typename T, int V>
__device__ void fuse_rest(const SelectTokens& p, int64_t b, int count, int first, int last, const uint16_t* list,
                          Scratch<T>& scratch) {
  using W = typename Wide<T>::type;
  const int thread = threadIdx.x, tx = thread % p.x_threads, ty = thread / p.x_threads, rows = THREADS / p.x_threads;
  W total = 0;
  if (p.rest == Rest::Normalized) {
    for (int j = count + thread; j < p.N; j += THREADS) total += score<W>(p, b, list[j]);
    total = sum_of_block(total, scratch.partial);
  }
  const W divisor = p.rest == Rest::Mean ? W(p.N > count ? p.N - count : 1) : total != 0 ? total : W(1);
  const int64_t rest_row = p.prefix + count;
  W* fused = reinterpret_cast<W*>(p.fused) + b * (1 + p.C);
  if (p.rest == Rest::Normalized && first == 0 && thread == 0) fused[0] = total;
  for (int start = first; start < last; start += p.x_threads) {
    const int u = start + tx;
    W sum[V] = {};
    if (u < last && ty < rows) {
      for (int j = count + ty; j < p.N; j += rows) {
        const W weight = p.rest == Rest::Mean ? W(1) : score<W>(p, b, list[j]);
        const Pack<T, V> pack = *at<T, V>(p.x, b, p.prefix + list[j], u);
#pragma unroll
        for (int i = 0; i < V; ++i) sum[i] += weight * widen(pack.of[i]);
      }
    }
    __syncthreads();  // the sums of the units before have been read
#pragma unroll
    for (int i = 0; i < V; ++i) scratch.sums[thread * V + i] = sum[i];
    __syncthreads();
    if (u < last && ty == 0) {
      for (int y = 1; y < rows; ++y) {
#pragma unroll
        for (int i = 0; i < V; ++i) sum[i] += scratch.sums[(y * p.x_threads + tx) * V + i];
      }
      Pack<T, V> pack;
#pragma unroll
      for (int i = 0; i < V; ++i) {
        sum[i] /= divisor;
        pack.of[i] = narrow<T>(sum[i]);
        if (p.rest == Rest::Normalized) fused[1 + u * V + i] = sum[i];
      }
      *at<T, V>(p.tokens, b, rest_row, u) = pack;
    }
  }
}

// The layer norm of a row that this warp can read.
template <typename T, int V>
__device__ void normalize_row(const SelectTokens& p, const Strided& from, int64_t b, int64_t source, bool zero,
                              int64_t row, int64_t rows) {
  const int lane = threadIdx.x % 32;
  normalize<T, V>(p.norm, b * rows + row, p.units, 32, lane == 0, [&](const auto& f) {
    for (int u = lane; u < p.units; u += 32) f(u, zero ? Pack<T, V>{} : *at<T, V>(from, b, source, u));
  });
}

template <typename T, int V, bool NORM>
__global__ void __launch_bounds__(THREADS, 1) select_tokens_fwd_kernel(const __grid_constant__ SelectTokens p) {
  SHARED(Choosing, choosing);
  SHARED(Scratch<T>, scratch);
  DYNAMIC_SHARED(uint16_t, list, p.N);
  const int64_t b = blockIdx.x / p.slices;
  const int slice = blockIdx.x % p.slices, thread = threadIdx.x, count = count_of(p, b);
  find_threshold(p, b, count, choosing);
  compact(p, b, count, choosing, list);
  if (p.best_first) sort_kept(p, b, count, list);

  if (slice == 0) {
    for (int j = thread; j < p.k; j += THREADS) {
      const bool kept = j < count;
      p.index[b * p.k + j] = kept ? list[j] : -1;
      for (int c = 0; c < p.companions_given; ++c) {
        const Follower& f = p.companions[c];
        move(f.bytes, f.to.at(b, j), kept ? f.from.at(b, list[j]) : nullptr);
      }
    }
  }

  const bool fuses = p.rest != Rest::None;
  const int64_t rows = p.prefix + p.k + fuses;
  // row of the result to row of x; rows behind the kept ones are zeros, but for the rest's
  const auto source = [&](int64_t row) { return row < p.prefix ? row : p.prefix + list[row - p.prefix]; };
  const auto filled = [&](int64_t row) { return row < p.prefix + count; };
  const auto skipped = [&](int64_t row) { return fuses && row == p.prefix + count; };

  if (NORM) {
    const int64_t first = static_cast<int64_t>(slice) * p.share;
    const int64_t last = first + p.share < rows ? first + p.share : rows;
    for (int64_t row = first + thread / 32; row < last; row += WARPS) {
      if (skipped(row)) continue;
      const bool zero = !filled(row);
      const int64_t from = zero ? 0 : source(row);
      for (int u = thread % 32; u < p.units; u += 32) {
        *at<T, V>(p.tokens, b, row, u) = zero ? Pack<T, V>{} : *at<T, V>(p.x, b, from, u);
      }
      normalize_row<T, V>(p, p.x, b, from, zero, row, rows);
    }
    if (fuses && slice == p.slices - 1) {
      fuse_rest<T, V>(p, b, count, 0, p.units, list, scratch);
      __syncthreads();
      const int64_t row = p.prefix + count;
      if (thread < 32) normalize_row<T, V>(p, p.tokens, b, row, false, row, rows);
    }
    return;
  }

  const int first = slice * p.share, last = first + p.share < p.units ? first + p.share : p.units;
  const int tx = thread % p.x_threads, ty = thread / p.x_threads, step = THREADS / p.x_threads;
  for (int u = first + tx; u < last && ty < step; u += p.x_threads) {
    for (int64_t start = ty; start < rows; start += IN_FLIGHT * step) {
      Pack<T, V> pack[IN_FLIGHT];
#pragma unroll
      for (int i = 0; i < IN_FLIGHT; ++i) {
        const int64_t row = start + i * step;
        pack[i] = row < rows && filled(row) ? *at<T, V>(p.x, b, source(row), u) : Pack<T, V>{};
      }
#pragma unroll
      for (int i = 0; i < IN_FLIGHT; ++i) {
        const int64_t row = start + i * step;
        if (row < rows && !skipped(row)) *at<T, V>(p.tokens, b, row, u) = pack[i];
      }
    }
  }
  if (fuses) fuse_rest<T, V>(p, b, count, first, last, list, scratch);
}

// A block writes `share` rows of dx, a warp a row at a time.
template <typename T, int V>
__global__ void __launch_bounds__(THREADS, 1) select_tokens_bwd_kernel(const __grid_constant__ SelectTokens p) {
  using W = typename Wide<T>::type;
  DYNAMIC_SHARED(int, slots, p.share);
  const int64_t b = blockIdx.x / p.slices, rows = p.prefix + p.N;
  const int64_t first = static_cast<int64_t>(blockIdx.x % p.slices) * p.share;
  const int here = static_cast<int>(rows - first < p.share ? rows - first : p.share);
  const int thread = threadIdx.x, lane = thread % 32, count = count_of(p, b);
  for (int i = thread; i < here; i += THREADS) slots[i] = first + i < p.prefix ? static_cast<int>(first + i) : -1;
  __syncthreads();
  for (int j = thread; j < p.k; j += THREADS) {  // no two are equal
    const int64_t n = p.index[b * p.stride_ib + j * p.stride_ik];
    const int64_t row = n + p.prefix - first;
    if (n >= 0 && n < p.N && row >= 0 && row < here) slots[row] = static_cast<int>(p.prefix) + j;
  }
  __syncthreads();

  const int64_t rest_row = p.prefix + count;
  const bool fuses = p.rest != Rest::None, weighted = p.rest == Rest::Weighted || p.rest == Rest::Normalized;
  const W* fused = reinterpret_cast<const W*>(p.fused) + b * (1 + p.C);
  W divisor = p.rest == Rest::Mean ? W(p.N > count ? p.N - count : 1) : W(1), through_sum = 0;
  if (p.rest == Rest::Normalized && fused[0] != 0) {
    divisor = fused[0];
    W dot = 0;
    for (int u = lane; u < p.units; u += 32) {
      const Pack<T, V> pack = *at<T, V>(p.tokens, b, rest_row, u);
#pragma unroll
      for (int i = 0; i < V; ++i) dot += widen(pack.of[i]) * fused[1 + u * V + i];
    }
    through_sum = sum_of_lanes(dot, 32);
  }

  for (int row = thread / 32; row < here; row += WARPS) {
    const int64_t n = first + row - p.prefix;  // below 0 in the prefix
    const int slot = slots[row];
    const bool other = slot < 0 && fuses;
    const W weight = other && weighted ? score<W>(p, b, static_cast<int>(n)) / divisor : 1 / divisor;
    W dot = 0;
    for (int u = lane; u < p.units; u += 32) {
      Pack<T, V> pack{};
      if (slot >= 0) pack = *at<T, V>(p.tokens, b, slot, u);
      if (other) {
        pack = *at<T, V>(p.tokens, b, rest_row, u);
        if (weighted) {
          const Pack<T, V> token = *at<T, V>(p.x, b, p.prefix + n, u);
#pragma unroll
          for (int i = 0; i < V; ++i) dot += widen(pack.of[i]) * widen(token.of[i]);
        }
#pragma unroll
        for (int i = 0; i < V; ++i) pack.of[i] = narrow<T>(widen(pack.of[i]) * weight);
      }
      *at<T, V>(p.dx, b, first + row, u) = pack;
    }
    if (n < 0) continue;
    if (weighted) {
      const W sum = sum_of_lanes(dot, 32), value = other ? (sum - through_sum) / divisor : W(0);
      if (lane == 0) {
        store(Values{p.dscores, p.score_type, p.N, 1}, b, n, value);
      }
    }
    if (lane < p.companions_given) {
      const Follower& f = p.companions[lane];
      move(f.bytes, f.to.at(b, n), slot < 0 ? nullptr : f.from.at(b, slot - p.prefix));
    }
  }
}

// Chooses the accesses and the slices, and writes them into p.
inline Plan plan(SelectTokens& p, int64_t element, int64_t multiprocessors, bool backward) {
  const int64_t given = p.prefix + p.k + (p.rest != Rest::None), all = p.prefix + p.N;
  const int width =
      access_width(element, p.B, p.C, p.norm.addresses(), {{&p.x, all}, {&p.tokens, given}, {&p.dx, all}});
  if (width == 0) return {};
  p.units = static_cast<int>(p.C * element / width);
  const bool by_rows = backward || p.norm.wanted;
  const int64_t work = by_rows ? (backward ? all : given) : p.units;
  // Two blocks for every multiprocessor; a slice of channels is what memory moves at least, one of rows a row a warp.
  const int64_t smallest = by_rows ? WARPS : std::max<int64_t>(1, 32 / width);
  int64_t slices = std::max<int64_t>(1, ceil_div(2 * multiprocessors, std::max<int64_t>(1, p.B)));
  slices = std::max<int64_t>(1, std::min(slices, work / smallest));
  if (backward) slices = std::max(slices, ceil_div(work, 1024));  // what a block's table of slots holds
  p.share = static_cast<int>(std::max<int64_t>(1, ceil_div(work, slices)));
  p.slices = static_cast<int>(std::max<int64_t>(1, ceil_div(work, p.share)));
  const int64_t side = by_rows ? p.units : p.share;
  p.x_threads = static_cast<int>(std::max<int64_t>(1, std::min<int64_t>(side, THREADS)));
  const int64_t shared = backward ? p.share * 4 : static_cast<int64_t>(p.N) * 2;
  return {width, p.B * p.slices, shared};
}

}  // namespace tokenops
