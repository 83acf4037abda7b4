// The matching of bipartite merging on a GPU: a block compares the even rows of an image with the odd ones, 64 by 64,
// as unit vectors in shared memory, and then makes the choice among them by select_tokens' radix select.
#pragma once

#include "../unit_rows.h"
#include "accesses.cuh"
#include "choose.cuh"
#include "merge_neighbours.cuh"

#include <algorithm>
#include <climits>

namespace tokenops {

// scores: the likeness of each even row's best edge, (B, evens); N: how many even rows an image has
struct MatchBipartite : Scores {
  Strided metric;  // strides in bytes, stride_c of one element
  void* edges;     // where the scores are
  int64_t* index;  // (B, tokens); until the choice is made, of an even row the odd row it is most like
  int64_t B, D, prefix;
  int tokens, odds, r;
  int units, slices;  // accesses in a row; blocks of an image
};

constexpr int TILE = 64;           // rows of either side
constexpr int SIDE = TILE / 16;    // of the square of products a thread has
constexpr int CHUNK_BYTES = 128;   // of a row in shared memory
constexpr int READERS = THREADS / TILE;  // threads that read a row

// What a thread's accesses to shared memory move: 16 bytes. A row has one more, so that rows begin in other banks.
template <typename W>
using Part = Pack<W, MOST_IN_PACK<W>>;
template <typename T>
using Tile = Part<typename Wide<T>::type>[TILE][CHUNK_BYTES / 16 + 1];
template <typename W>
constexpr int CHUNK = CHUNK_BYTES / sizeof(W);

// A row of the metric that READERS threads bring into a tile as a unit vector
template <typename T, int V>
struct UnitRow {
  using W = typename Wide<T>::type;
  const MatchBipartite& p;
  int64_t image, row;
  bool there;
  W power = 1, scale;  // a row is multiplied by both, one after the other: their product may overflow

  __device__ UnitRow(const MatchBipartite& p, int64_t image, int64_t first, int place, int places)
      : p(p), image(image), row(first + 2 * static_cast<int64_t>(place)), there(place < places) {
    W squares = sum_of_squares();
    power = Powers<W>::of(squares);
    if (__ballot_sync(~0u, there && power != 1)) squares = sum_of_squares();
    const W norm = std::sqrt(squares), smallest = Powers<W>::SMALLEST;
    scale = 1 / (norm < smallest ? smallest : norm);
  }

  __device__ W sum_of_squares() const {
    W squares = 0;
    for (int u = threadIdx.x % READERS; u < p.units && there; u += READERS) {
      const Pack<T, V> pack = *at<T, V>(p.metric, image, row, u);
#pragma unroll
      for (int i = 0; i < V; ++i) squares += power * widen(pack.of[i]) * (power * widen(pack.of[i]));
    }
    return sum_of_lanes(squares, READERS);
  }

  __device__ void fill(int chunk, Tile<T>& tile) const {
    constexpr int STORED = V == 1 ? 1 : MOST_IN_PACK<W>;
    W* const to = tile[threadIdx.x / READERS][0].of;
#pragma unroll
    for (int start = 0; start < CHUNK<W>; start += READERS * V) {
      const int c = start + threadIdx.x % READERS * V, u = chunk * (CHUNK<W> / V) + c / V;
      Pack<T, V> pack{};
      if (there && u < p.units) pack = *at<T, V>(p.metric, image, row, u);
#pragma unroll
      for (int i = 0; i < V; i += STORED) {
        Pack<W, STORED> part;
#pragma unroll
        for (int k = 0; k < STORED; ++k) part.of[k] = scale * (power * widen(pack.of[i + k]));
        *reinterpret_cast<Pack<W, STORED>*>(to + c + i) = part;
      }
    }
  }
};

// Is this edge better than the other one: no number is the least, and of equals the first is taken.
template <typename W>
__device__ bool better(W likeness, int place, W other, int other_place) {
  return likeness > other || (likeness == other && place < other_place);
}

template <typename T, int V>
__device__ void find_edges(const MatchBipartite& p, int64_t b, int slice, Tile<T> (&tiles)[2]) {
  using W = typename Wide<T>::type;
  const int thread = threadIdx.x, tx = thread % 16, ty = thread / 16, odd = p.prefix % 2;
  const int chunks = (p.units * V + CHUNK<W> - 1) / CHUNK<W>;
  for (int evens = slice * TILE; evens < p.N; evens += p.slices * TILE) {
    const UnitRow<T, V> a(p, b, p.prefix + odd, evens + thread / READERS, p.N);
    const bool warp_has_rows = evens + thread / 32 * 2 * SIDE < p.N;
    W best[SIDE];
    int target[SIDE];
#pragma unroll
    for (int i = 0; i < SIDE; ++i) best[i] = -INFINITY, target[i] = INT_MAX;
    for (int odds = 0; odds < p.odds; odds += TILE) {
      const UnitRow<T, V> other(p, b, p.prefix + 1 - odd, odds + thread / READERS, p.odds);
      W sums[SIDE][SIDE] = {};
      for (int chunk = 0; chunk < chunks; ++chunk) {
        __syncthreads();  // the chunk before has been read
        a.fill(chunk, tiles[0]);
        other.fill(chunk, tiles[1]);
        __syncthreads();
        if (!warp_has_rows) continue;
#pragma unroll
        for (int k = 0; k < CHUNK_BYTES / 16; ++k) {
          Part<W> left[SIDE];
#pragma unroll
          for (int i = 0; i < SIDE; ++i) left[i] = tiles[0][ty * SIDE + i][k];
#pragma unroll
          for (int j = 0; j < SIDE; ++j) {
            const Part<W> right = tiles[1][tx + 16 * j][k];
#pragma unroll
            for (int i = 0; i < SIDE; ++i) {
#pragma unroll
              for (int v = 0; v < MOST_IN_PACK<W>; ++v) sums[i][j] += left[i].of[v] * right.of[v];
            }
          }
        }
      }
#pragma unroll
      for (int j = 0; j < SIDE; ++j) {
        const int place = odds + tx + 16 * j;
#pragma unroll
        for (int i = 0; i < SIDE; ++i) {
          const W likeness = sums[i][j] == sums[i][j] ? sums[i][j] : W(-INFINITY);
          if (place < p.odds && better(likeness, place, best[i], target[i])) best[i] = likeness, target[i] = place;
        }
      }
    }
#pragma unroll
    for (int i = 0; i < SIDE; ++i) {
      for (int bits = 8; bits; bits /= 2) {
        const W likeness = __shfl_xor_sync(~0u, best[i], bits);
        const int place = __shfl_xor_sync(~0u, target[i], bits);
        if (better(likeness, place, best[i], target[i])) best[i] = likeness, target[i] = place;
      }
      const int even = evens + ty * SIDE + i;
      if (tx == 0 && even < p.N) {
        static_cast<W*>(p.edges)[b * p.N + even] = best[i];
        p.index[b * p.tokens + odd + 2 * static_cast<int64_t>(even)] = target[i];
      }
    }
  }
  __syncthreads();
}

// The r best edges are merges; what is left of the even rows comes first, then the odd ones.
__device__ inline void number_tokens(const MatchBipartite& p, int64_t b, Choosing& shared, uint16_t* list) {
  if (p.r) {
    find_threshold(p, b, p.r, shared);
    compact(p, b, p.r, shared, list);
  }
  int64_t* const index = p.index + b * p.tokens;
  const int odd = p.prefix % 2, left = p.N - p.r;
  for (int i = threadIdx.x; i < p.N; i += THREADS) {
    int64_t& place = index[odd + 2 * (p.r ? list[i] : i)];
    place = i < p.r ? left + place : i - p.r;
  }
  for (int i = threadIdx.x; i < p.odds; i += THREADS) index[1 - odd + 2 * i] = left + i;
}

template <typename T, int V>
__global__ void __launch_bounds__(THREADS, 2) match_bipartite_kernel(const __grid_constant__ MatchBipartite p) {
  using Tiles = Tile<T>[2];
  SHARED(Tiles, tiles);
  SHARED(Choosing, choosing);
  DYNAMIC_SHARED(uint16_t, list, p.N);
  const int64_t b = blockIdx.x / p.slices;
  if (p.r) find_edges<T, V>(p, b, blockIdx.x % p.slices, tiles);
  if (p.slices == 1) number_tokens(p, b, choosing, list);
}

// Where an image's edges were found by several blocks
__global__ void __launch_bounds__(THREADS, 2) match_bipartite_choice_kernel(const __grid_constant__ MatchBipartite p) {
  SHARED(Choosing, choosing);
  DYNAMIC_SHARED(uint16_t, list, p.N);
  number_tokens(p, blockIdx.x, choosing, list);
}

struct MatchPlan {
  int width;  // bytes of an access: 16, or those of an element; 0 where the data is not even aligned to its elements
  int64_t blocks;
};

// Chooses the accesses and how many blocks an image has, and writes both into p. Where these are several, they only
// find the edges, and a second launch makes the choice: worth it where few images of many tiles leave the chip empty.
inline MatchPlan plan(MatchBipartite& p, int64_t element, int64_t multiprocessors) {
  const int width = access_width(element, p.B, p.D, 0, {{&p.metric, p.prefix + p.tokens}});
  if (width == 0) return {};
  p.units = static_cast<int>(p.D * element / width);
  const int64_t tiles = ceil_div(p.N, TILE), work = tiles * ceil_div(p.odds, TILE) * ceil_div(p.D, TILE);
  p.slices = 1;
  if (p.r && work > 8) {
    p.slices = static_cast<int>(std::max<int64_t>(1, std::min(tiles, 2 * multiprocessors / std::max<int64_t>(p.B, 1))));
  }
  return {width, p.B * p.slices};
}

}  // namespace tokenops
