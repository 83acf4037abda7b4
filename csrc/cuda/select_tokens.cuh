// select_tokens on a GPU: every block makes its image's choice for itself, by radix select, and then copies its slice of
// the rows: a range of channels (so that one block sums the rest over all tokens) or, with a norm, a range of rows.
#pragma once

#include "../rest.h"
#include "../strided.h"
#include "choose.cuh"
#include "companions.cuh"

#include <algorithm>
#include <utility>

namespace tokenops {

// (B, N) and (B, k), or in the backward pass the other way
struct Follower {
  Companion from, to;
  int bytes;
};

// Forward: x to tokens. Backward: tokens (their gradients) to dx; x and fused are read for a weighted rest.
struct SelectTokens : Scores {
  Strided x, tokens, dx;  // strides in bytes, stride_c of one element
  char* normed;           // like tokens, contiguous; null without a norm
  int64_t *index, stride_ib, stride_ik;
  const int64_t* counts;  // (B,), or null
  void *mean, *deviation;  // (B, rows), of the norm
  const void *weight, *bias;
  double eps;
  void* fused;     // (B, 1+C)
  char* dscores;  // (B, N), in the scores' dtype
  Follower companions[MAX_COMPANIONS];
  int companions_given;
  int64_t B, C, prefix;
  int k;
  Rest rest;
  bool best_first;
  int units, slices, share;  // accesses in a row; blocks of an image, and what each has of units or rows
  int x_threads;             // threads side by side on a row
};

constexpr int IN_FLIGHT = 4;  // rows a thread reads before it writes them

__device__ inline int count_of(const SelectTokens& p, int64_t b) {
  if (!p.counts) return p.k;
  const int64_t count = p.counts[b];
  return count < 0 ? 0 : count > p.k ? p.k : static_cast<int>(count);
}

template <typename Wide>
__device__ Wide sum_of_warp(Wide value) {
  for (int bits = 16; bits; bits /= 2) value += __shfl_xor_sync(~0u, value, bits);
  return value;
}

// The sum over all threads, known to all of them.
template <typename Wide>
__device__ Wide sum_of_block(Wide value, Wide* partial) {
  value = sum_of_warp(value);
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
  using W = typename Wide<T>::type;
  const int lane = threadIdx.x % 32;
  W sum = 0, squares = 0;
  for (int u = lane; u < p.units && !zero; u += 32) {
    const Pack<T, V> pack = *at<T, V>(from, b, source, u);
#pragma unroll
    for (int i = 0; i < V; ++i) sum += widen(pack.of[i]);
  }
  const W mean = sum_of_warp(sum) / p.C;
  for (int u = lane; u < p.units && !zero; u += 32) {
    const Pack<T, V> pack = *at<T, V>(from, b, source, u);
#pragma unroll
    for (int i = 0; i < V; ++i) squares += (widen(pack.of[i]) - mean) * (widen(pack.of[i]) - mean);
  }
  const W deviation = inverse_root(sum_of_warp(squares) / p.C + static_cast<W>(p.eps));
  if (lane == 0) {
    reinterpret_cast<W*>(p.mean)[b * rows + row] = mean;
    reinterpret_cast<W*>(p.deviation)[b * rows + row] = deviation;
  }
  const W *weight = reinterpret_cast<const W*>(p.weight), *bias = reinterpret_cast<const W*>(p.bias);
  for (int u = lane; u < p.units; u += 32) {
    Pack<T, V> pack{};
    if (!zero) pack = *at<T, V>(from, b, source, u);
#pragma unroll
    for (int i = 0; i < V; ++i) {
      W value = (widen(pack.of[i]) - mean) * deviation;
      if (weight) value *= weight[u * V + i];
      if (bias) value += bias[u * V + i];
      pack.of[i] = narrow<T>(value);
    }
    reinterpret_cast<Pack<T, V>*>(p.normed)[(b * rows + row) * p.units + u] = pack;
  }
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
    through_sum = sum_of_warp(dot);
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
      const W sum = sum_of_warp(dot), value = other ? (sum - through_sum) / divisor : W(0);
      if (lane == 0) {
        const int64_t target = b * p.N + n;
        if (p.score_type == Float::F32) reinterpret_cast<float*>(p.dscores)[target] = static_cast<float>(value);
        else if (p.score_type == Float::F64) reinterpret_cast<double*>(p.dscores)[target] = value;
        else if (p.score_type == Float::F16) reinterpret_cast<Half*>(p.dscores)[target] = narrow<Half>(value);
        else reinterpret_cast<BFloat16*>(p.dscores)[target] = narrow<BFloat16>(value);
      }
    }
    if (lane < p.companions_given) {
      const Follower& f = p.companions[lane];
      move(f.bytes, f.to.at(b, n), slot < 0 ? nullptr : f.from.at(b, slot - p.prefix));
    }
  }
}

struct SelectPlan {
  int width;  // bytes of an access: 16, or those of an element; 0 where the data is not even aligned to its elements
  int64_t blocks, shared;  // of dynamic shared memory
};

// Chooses the accesses and the slices, and writes them into p. `tensors` of 3 dimensions, with their rows.
inline SelectPlan plan(SelectTokens& p, int64_t element, int64_t multiprocessors, bool backward) {
  bool dense = true;
  uint64_t addresses = p.C * element | reinterpret_cast<uintptr_t>(p.normed);
  const int64_t given = p.prefix + p.k + (p.rest != Rest::None), all = p.prefix + p.N;
  const std::pair<const Strided*, int64_t> tensors[] = {{&p.x, all}, {&p.tokens, given}, {&p.dx, all}};
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
  const bool by_rows = backward || p.normed;
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
