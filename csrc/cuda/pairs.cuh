// What the rows of merge_neighbours are made of: which two tokens each, and what these count.
#pragma once

#include "rows.cuh"

namespace tokenops {

// Forward: x to y. Backward: y (its gradient) to dx; x is read for the gradients of the weights.
struct MergeNeighbours {
  Strided x, y, dx;           // strides in bytes, stride_c of one element
  Values first, second;       // (C,), or one element of stride 0
  Values logits, sizes;       // (B, H*W)
  Values merged, dlogits;     // results, (B, M) and (B, H*W)
  double alpha, beta;
  Norm norm;
  bool summed;  // in the backward pass: with the gradients of first and second,
  void* sums;   // (blocks, 2, C): what each block adds to them
  int64_t B, C;
  int prefix, height, width, rows;  // rows: of an image's result
  bool vertical;
  int units, share;  // accesses in a row; rows of a block
  int x_threads;     // threads side by side on a row; where it is needed whole 8, 16 or 32
  int staged;        // how many channels of first and second the norm's kernel keeps in shared memory
};

// What a row of the result is made of: rows a and b of an image, and what these count but for the channels' factors.
// b is below 0 where a is alone, or of the prefix.
template <typename W>
struct Source {
  int64_t image;
  int row, a, b;
  W weight_a, weight_b;
};
template <typename T>
using Sources = Source<typename Wide<T>::type>[MAX_SHARE];

template <typename W>
__device__ void weigh(const MergeNeighbours& p, Source<W>& s, int a, int b) {
  W share_a = W(0.5), share_b = W(0.5);
  if (p.sizes.data) {
    const W one = load<W>(p.sizes, s.image, a), other = load<W>(p.sizes, s.image, b), total = one + other;
    if (total != 0) share_a = one / total, share_b = other / total;
  }
  if (!p.logits.data) {
    s.weight_a = 2 * share_a * static_cast<W>(p.alpha), s.weight_b = 2 * share_b * static_cast<W>(p.beta);
    return;
  }
  const W out = -INFINITY;  // what has no size does not count: its logit is log 0
  const W la = share_a == 0 ? out : load<W>(p.logits, s.image, a);
  const W lb = share_b == 0 ? out : load<W>(p.logits, s.image, b);
  const W largest = lb == out || la > lb ? la : lb;
  const W one = la == out ? 0 : share_a * std::exp(la - largest);
  const W other = lb == out ? 0 : share_b * std::exp(lb - largest), total = one + other;
  s.weight_a = total == 0 ? 0 : one / total, s.weight_b = total == 0 ? 0 : other / total;
}

// The sources of this block's rows; in the forward pass their sizes are added up as well.
template <typename W>
__device__ void find_sources(const MergeNeighbours& p, int64_t first, int here, Source<W>* sources) {
  const int columns = p.vertical ? p.width : (p.width + 1) / 2;
  for (int i = threadIdx.x; i < here; i += THREADS) {
    Source<W> s;
    s.image = (first + i) / p.rows, s.row = static_cast<int>(first + i - s.image * p.rows);
    s.a = s.row, s.b = -1, s.weight_a = 1, s.weight_b = 0;
    const int t = s.row - p.prefix;
    if (t >= 0) {
      const int y = t / columns, x = t % columns;
      const int a = p.vertical ? 2 * y * p.width + x : y * p.width + 2 * x, b = a + (p.vertical ? p.width : 1);
      const bool two = p.vertical ? 2 * y + 1 < p.height : 2 * x + 1 < p.width;
      s.a = p.prefix + a;
      if (two) s.b = p.prefix + b, weigh(p, s, a, b);
      if (p.merged.data) {
        const W size = load<W>(p.sizes, s.image, a);
        store(p.merged, s.image, t, two ? size + load<W>(p.sizes, s.image, b) : size);
      }
    }
    sources[i] = s;
  }
  __syncthreads();
}

// The rows of this block
struct Rows {
  int64_t first;
  int here;

  __device__ explicit Rows(const MergeNeighbours& p) {
    const int64_t all = p.B * p.rows;
    first = static_cast<int64_t>(blockIdx.x) * p.share;
    here = static_cast<int>(all - first < p.share ? all - first : p.share);
  }
};

}  // namespace tokenops
