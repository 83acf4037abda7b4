// The matching of bipartite merging on a GPU: a block multiplies the even rows of an image with the odd ones, tile by
// tile in shared memory, scales the products by both norms, and then makes the choice by select_tokens' radix select.
#pragma once

#include "../unit_rows.h"
#include "choose.cuh"
#include "mma.cuh"
#include "rows.cuh"

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

constexpr int MOST_TOKENS = 16384;

// Rows of 16 bits are multiplied by the tensor cores, whose products of them are exact.
__host__ __device__ constexpr bool on_tensor_cores(int64_t element) { return element == 2; }
__host__ __device__ constexpr int tile_rows(int64_t element) { return on_tensor_cores(element) ? 128 : 64; }

template <typename T>
constexpr int TILE = tile_rows(sizeof(T));  // rows of either side
constexpr int CHUNK_BYTES = 128;  // of a row in shared memory
constexpr int READERS = 4;        // threads that read a row
constexpr int READ = THREADS / READERS;

// What a thread's accesses to shared memory move: 16 bytes. A row has one more, so that rows begin in other banks.
template <typename T>
using Part = Pack<T, MOST_IN_PACK<T>>;
template <typename T>
constexpr int CHUNK = CHUNK_BYTES / sizeof(T);
template <typename T>
struct Tile {
  using W = typename Wide<T>::type;
  Part<T> rows[TILE<T>][CHUNK_BYTES / 16 + 1];
  W powers[TILE<T>];  // what brings the rows near 1,
  W scales[TILE<T>];  // and their inverse norms then; NaN of rows that are not there
};

// The rows of one side that belong into a tile, READERS threads each
template <typename T, int V>
struct Side {
  static constexpr int MINE = TILE<T> / READ;  // rows of a thread
  using W = typename Wide<T>::type;
  Strided metric;  // from the first of these rows on, every other one
  int count, units;

  __device__ Side(const MatchBipartite& p, int64_t b, int parity, int start, int end)
      : metric(p.metric), count(end - start), units(p.units) {
    metric.data += b * p.metric.stride_b + (p.prefix + parity + 2 * static_cast<int64_t>(start)) * p.metric.stride_n;
    metric.stride_n *= 2;
  }

  __device__ static int place(int i) { return threadIdx.x / READERS + i * READ; }
  __device__ Pack<T, V> read(int row, int u) const {
    return pack_or_zeros(at<T, V>(metric, 0, row, u), row < count && u < units);
  }

  // of the thread's rows times their powers
  __device__ void add_squares(int u, const W (&powers)[MINE], W (&squares)[MINE]) const {
#pragma unroll
    for (int i = 0; i < MINE; ++i) {
      const Pack<T, V> pack = read(place(i), u);
#pragma unroll
      for (int k = 0; k < V; ++k) {
        const W value = powers[i] * widened(pack, k);
        squares[i] += value * value;
      }
    }
  }

  __device__ void fill(int chunk, bool far, Tile<T>& tile) const {
#pragma unroll 1
    for (int row = place(0); row < TILE<T>; row += READ) {
      T* const to = tile.rows[row][0].of + threadIdx.x % READERS * V;
#pragma unroll(V == 1 ? 4 : CHUNK<T> / V)
      for (int start = 0; start < CHUNK<T>; start += READERS * V) {
        const int u = (chunk * CHUNK<T> + start) / V + threadIdx.x % READERS;
        *reinterpret_cast<Pack<T, V>*>(to + start) = read(row, u);
      }
      if (!far) continue;
      const W power = tile.powers[row];
#pragma unroll 1
      for (int start = 0; start < CHUNK<T>; start += READERS * V) {
        for (int k = 0; k < V; ++k) to[start + k] = narrow<T>(power * widen(to[start + k]));
      }
    }
  }
};

// Writes the powers and the scales into the tiles; says whether a row of the warp is not taken as it is.
template <typename T, int V>
__device__ bool measure(const Side<T, V> (&sides)[2], Tile<T> (&tiles)[2]) {
  using W = typename Wide<T>::type;
  constexpr int MINE = Side<T, V>::MINE;
  W powers[2][MINE], squares[2][MINE] = {};
#pragma unroll
  for (int i = 0; i < 2 * MINE; ++i) powers[i / MINE][i % MINE] = 1;
  const auto measured = [&] {
    for (int start = 0; start < sides[0].units; start += 2 * READERS) {
#pragma unroll
      for (int u = start + threadIdx.x % READERS, k = 0; k < 2; ++k, u += READERS) {
        sides[0].add_squares(u, powers[0], squares[0]);
        sides[1].add_squares(u, powers[1], squares[1]);
      }
    }
#pragma unroll
    for (int i = 0; i < 2 * MINE; ++i) {
      squares[i / MINE][i % MINE] = sum_of_lanes(squares[i / MINE][i % MINE], READERS);
    }
  };
  measured();
  bool far = false;
#pragma unroll
  for (int i = 0; i < 2 * MINE; ++i) {
    W& power = powers[i / MINE][i % MINE] = Powers<W>::of(squares[i / MINE][i % MINE]);
    far = far || (power != 1 && Side<T, V>::place(i % MINE) < sides[i / MINE].count);
  }
  far = __ballot_sync(~0u, far);
  if (far) {
#pragma unroll
    for (int i = 0; i < 2 * MINE; ++i) squares[i / MINE][i % MINE] = 0;
    measured();
  }
  __syncthreads();  // the tiles before have been read
#pragma unroll
  for (int i = 0; i < 2 * MINE; ++i) {
    const int row = Side<T, V>::place(i % MINE);
    const W norm = std::sqrt(squares[i / MINE][i % MINE]), smallest = Powers<W>::SMALLEST;
    if (threadIdx.x % READERS) continue;
    tiles[i / MINE].powers[row] = powers[i / MINE][i % MINE];
    tiles[i / MINE].scales[row] = row < sides[i / MINE].count ? 1 / (norm < smallest ? smallest : norm) : W(NAN);
  }
  __syncwarp();
  return far;
}

// What a thread has of the products of two tiles: those of some rows, shared by LANES lanes, with some columns
template <typename T>
struct Products {
  static constexpr int ROWS = 4, COLUMNS = 4, LANES = 16, WIDTH = LANES * COLUMNS;
  T sums[ROWS][COLUMNS] = {};

  __device__ static int row(int i) { return threadIdx.x / LANES * ROWS + i; }
  __device__ static int column(int j) { return threadIdx.x % LANES + LANES * j; }
  __device__ T sum(int i, int j) const { return sums[i][j]; }

  __device__ void add(const Tile<T>& evens, const Tile<T>& odds, int first) {
#pragma unroll
    for (int k = 0; k < CHUNK_BYTES / 16; ++k) {
      Part<T> left[ROWS];
#pragma unroll
      for (int i = 0; i < ROWS; ++i) left[i] = evens.rows[row(i)][k];
#pragma unroll
      for (int j = 0; j < COLUMNS; ++j) {
        const Part<T> right = odds.rows[first + column(j)][k];
#pragma unroll
        for (int i = 0; i < ROWS; ++i) {
#pragma unroll
          for (int v = 0; v < MOST_IN_PACK<T>; ++v) sums[i][j] += left[i].of[v] * right.of[v];
        }
      }
    }
  }
};

// By the tensor cores a warp has 16 rows and 64 columns at a time: sums of all 128 would be spilled.
template <typename T>
struct TensorProducts {
  static constexpr int ROWS = 2, COLUMNS = 16, LANES = 4, WIDTH = LANES * COLUMNS;
  float sums[WIDTH / 8][4] = {};

  __device__ static int row(int i) { return threadIdx.x / 32 * 16 + threadIdx.x % 32 / 4 + i * 8; }
  __device__ static int column(int j) { return threadIdx.x % 4 * 2 + j / 2 * 8 + j % 2; }
  __device__ float sum(int i, int j) const { return sums[j / 2][i * 2 + j % 2]; }

  __device__ void add(const Tile<T>& evens, const Tile<T>& odds, int first) {
    const int lane = threadIdx.x % 32, upper = threadIdx.x / 32 * 16;
#pragma unroll
    for (int k = 0; k < CHUNK_BYTES / 16; k += 4) {
      uint32_t left[2][4];
#pragma unroll
      for (int i = 0; i < 2; ++i) load_matrices(left[i], &evens.rows[upper + lane % 16][k + 2 * i + lane / 16]);
#pragma unroll
      for (int j = 0; j < WIDTH / 8; ++j) {
        uint32_t right[4];
        load_matrices(right, &odds.rows[first + j * 8 + lane % 8][k + lane / 8]);
        multiply<T>(sums[j], left[0], right[0], right[1]);
        multiply<T>(sums[j], left[1], right[2], right[3]);
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
  using Mine = std::conditional_t<on_tensor_cores(sizeof(T)), TensorProducts<T>, Products<T>>;
  const int odd = p.prefix % 2, chunks = p.D ? (p.units * V + CHUNK<T> - 1) / CHUNK<T> : 1;
  for (int evens = slice * TILE<T>; evens < p.N; evens += p.slices * TILE<T>) {
    const bool warp_has_rows = evens + static_cast<int>(threadIdx.x) / 32 * (TILE<T> / WARPS) < p.N;
    W best[Mine::ROWS];
    int target[Mine::ROWS];
#pragma unroll
    for (int i = 0; i < Mine::ROWS; ++i) best[i] = -INFINITY, target[i] = Mine::column(0);
    for (int odds = 0; odds < p.odds; odds += TILE<T>) {
      const Side<T, V> sides[] = {{p, b, odd, evens, p.N}, {p, b, 1 - odd, odds, p.odds}};
      const bool far = measure(sides, tiles);
#pragma unroll 1
      for (int first = 0; first < TILE<T> && odds + first < p.odds; first += Mine::WIDTH) {
        Mine products;
        for (int chunk = 0; chunk < chunks; ++chunk) {
          if (chunks > 1 || first == 0) {
            if (chunk || first) __syncthreads();  // the chunk before has been read
            sides[0].fill(chunk, far, tiles[0]);
            sides[1].fill(chunk, far, tiles[1]);
            __syncthreads();
          }
          if (warp_has_rows) products.add(tiles[0], tiles[1], first);
        }
        W here[Mine::ROWS];
        int at[Mine::ROWS] = {};
#pragma unroll
        for (int i = 0; i < Mine::ROWS; ++i) here[i] = -INFINITY;
#pragma unroll
        for (int j = 0; j < Mine::COLUMNS; ++j) {
          const W scale = tiles[1].scales[first + Mine::column(j)];
#pragma unroll
          for (int i = 0; i < Mine::ROWS; ++i) {
            const W likeness = products.sum(i, j) * scale;
            if (likeness > here[i]) here[i] = likeness, at[i] = j;
          }
        }
#pragma unroll
        for (int i = 0; i < Mine::ROWS; ++i) {
          if (here[i] > best[i]) best[i] = here[i], target[i] = odds + first + Mine::column(at[i]);
        }
      }
    }
#pragma unroll
    for (int i = 0; i < Mine::ROWS; ++i) {
      for (int bits = Mine::LANES / 2; bits; bits /= 2) {
        const W likeness = __shfl_xor_sync(~0u, best[i], bits);
        const int place = __shfl_xor_sync(~0u, target[i], bits);
        if (better(likeness, place, best[i], target[i])) best[i] = likeness, target[i] = place;
      }
      const int even = evens + Mine::row(i);
      if (threadIdx.x % Mine::LANES == 0 && even < p.N) {
        const W likeness = best[i] * tiles[0].scales[Mine::row(i)];
        const bool number = likeness == likeness;  // a row with an infinity is like none
        static_cast<W*>(p.edges)[b * p.N + even] = number ? likeness : W(-INFINITY);
        p.index[b * p.tokens + odd + 2 * static_cast<int64_t>(even)] = number ? target[i] : 0;
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
  using List = uint16_t[MOST_TOKENS / 2];
  static_assert(sizeof(List) <= sizeof(Tiles));
  SHARED(Tiles, tiles);
  SHARED(Choosing, choosing);
  const int64_t b = blockIdx.x / p.slices;
  if (p.r) find_edges<T, V>(p, b, blockIdx.x % p.slices, tiles);
  if (p.slices == 1) number_tokens(p, b, choosing, *reinterpret_cast<List*>(&tiles));  // which are done with
}

// Where an image's edges were found by several blocks
__global__ void __launch_bounds__(THREADS, 2) match_bipartite_choice_kernel(const __grid_constant__ MatchBipartite p) {
  SHARED(Choosing, choosing);
  DYNAMIC_SHARED(uint16_t, list, p.N);
  number_tokens(p, blockIdx.x, choosing, list);
}

// Chooses the accesses and how many blocks an image has, and writes both into p. Where these are several, they only
// find the edges, and a second launch makes the choice. By reckoning, 128 bytes of channels of two tiles take a block
// about 1 us and the launch 2 to 3; blocks that share a multiprocessor would gain nothing.
inline Plan plan(MatchBipartite& p, int64_t element, int64_t multiprocessors) {
  const int width = access_width(element, p.B, p.D, 0, {{&p.metric, p.prefix + p.tokens}});
  if (width == 0) return {};
  p.units = static_cast<int>(p.D * element / width);
  const int64_t tiles = ceil_div(p.N, tile_rows(element)), columns = ceil_div(p.odds, tile_rows(element));
  const int64_t slices = std::min(tiles, multiprocessors / std::max<int64_t>(p.B, 1));
  const int64_t fewer = slices > 1 ? tiles - ceil_div(tiles, slices) : 0;  // tiles that a block has
  const int64_t saved = fewer * columns * ceil_div(p.D * element, CHUNK_BYTES);
  p.slices = p.r && saved > 3 ? static_cast<int>(slices) : 1;
  return {width, p.B * p.slices, 0};
}

}  // namespace tokenops
