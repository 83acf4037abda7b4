// restore_tokens on a GPU: a block copies `chunk` rows of one image, threads x along the channels and y along the rows.
//
// First it finds which token owns each of its rows by looking through the image's indices. Where indices repeat, the
// last token wins; the others, and those whose index is out of range, replace nothing and get a gradient of zero.
#pragma once

#include "companions.cuh"
#include "rows.cuh"

namespace tokenops {

// What of a companion is kept, what replaces it, and the result; or their gradients.
struct Replaced {
  Companion old, fresh, y;
  int bytes;
};

struct RestoreTokens {
  Strided base, tokens, y;  // or their gradients; stride_c is that of one unit, the bytes a thread moves at a time
  const int64_t* index;
  int64_t stride_ib, stride_ik;  // in elements
  Replaced companions[MOST_COMPANIONS];
  int companions_given;
  int64_t B, rows, C, prefix;
  int k, carried;
  int units, chunk, chunks;  // units in a row, rows in a chunk, chunks in an image
};

constexpr int MAX_CHUNK = 256;
using Owners = int[MAX_CHUNK];

// Row n of an image, from unit c on
__device__ inline char* at(const Strided& x, int64_t b, int64_t n, int c) {
  return x.data + b * x.stride_b + n * x.stride_n + c * x.stride_c;
}

// The rows of this block: `count` from `first` on, of image b.
struct Chunk {
  int64_t b, first;
  int count;

  __device__ explicit Chunk(const RestoreTokens& p) {
    b = blockIdx.x / p.chunks;
    first = static_cast<int64_t>(blockIdx.x % p.chunks) * p.chunk;
    count = static_cast<int>(p.rows - first < p.chunk ? p.rows - first : p.chunk);
  }
};

// Token j's row and companions, by `step` threads of which this one is number c.
template <typename Unit>
__device__ void zero_token(const RestoreTokens& p, int64_t b, int j, int c, int step) {
  for (int i = c; i < p.companions_given; i += step) {
    move(p.companions[i].bytes, p.companions[i].fresh.at(b, j), nullptr);
  }
#pragma unroll 1
  for (; c < p.units; c += step) *reinterpret_cast<Unit*>(at(p.tokens, b, p.carried + j, c)) = Unit{};
}

// owner[i]: the row of tokens that replaces row first + i, or -1. LOST zeroes the rows of tokens that replace none.
template <typename Unit, bool LOST>
__device__ void find_owners(const RestoreTokens& p, const Chunk& chunk, int* owner) {
  const int64_t first = chunk.first;
  const int thread = threadIdx.y * blockDim.x + threadIdx.x, threads = blockDim.x * blockDim.y;
  for (int i = thread; i < chunk.count; i += threads) {
    owner[i] = first + i < p.carried ? static_cast<int>(first + i) : -1;
  }
  __syncthreads();
  for (int j = thread; j < p.k; j += threads) {
    const int64_t n = p.index[chunk.b * p.stride_ib + j * p.stride_ik];
    int lost = -1;
    if (n >= 0 && n < p.rows - p.prefix && n + p.prefix >= first && n + p.prefix < first + chunk.count) {
      // each exchange has one loser, so every loser is seen exactly once, in whatever order they come
      const int before = atomicMax(&owner[n + p.prefix - first], p.carried + j);
      if (before >= 0) lost = before < p.carried + j ? before : p.carried + j;
    }
    if (LOST && lost >= 0) zero_token<Unit>(p, chunk.b, lost - p.carried, 0, 1);
  }
  if (LOST && first == 0) {  // the first chunk zeroes those that go nowhere
    for (int j = threadIdx.y; j < p.k; j += blockDim.y) {
      const int64_t n = p.index[chunk.b * p.stride_ib + j * p.stride_ik];
      if (n < 0 || n >= p.rows - p.prefix) zero_token<Unit>(p, chunk.b, j, threadIdx.x, blockDim.x);
    }
  }
  __syncthreads();
}

// f(companion, place of a token among the N, the one that replaces it or below 0) for the tokens of the chunk
template <typename F>
__device__ void for_companions(const RestoreTokens& p, const Chunk& chunk, const int* owner, const F& f) {
  const int thread = threadIdx.y * blockDim.x + threadIdx.x, threads = blockDim.x * blockDim.y;
  for (int c = 0; c < p.companions_given; ++c) {
    for (int i = thread; i < chunk.count; i += threads) {
      const int64_t n = chunk.first + i - p.prefix;
      if (n >= 0) f(p.companions[c], n, owner[i] < 0 ? -1 : owner[i] - p.carried);
    }
  }
}

template <typename Unit>
__global__ void __launch_bounds__(THREADS) restore_tokens_fwd_kernel(const __grid_constant__ RestoreTokens p) {
  SHARED(Owners, owner);
  const Chunk chunk(p);
  find_owners<Unit, false>(p, chunk, owner);
  for_companions(p, chunk, owner, [&](const Replaced& r, int64_t n, int j) {
    move(r.bytes, r.y.at(chunk.b, n), j >= 0 ? r.fresh.at(chunk.b, j) : r.old.at(chunk.b, n));
  });

  for (int c = threadIdx.x; c < p.units; c += blockDim.x) {
    const char *base = at(p.base, chunk.b, chunk.first, c), *tokens = at(p.tokens, chunk.b, 0, c);
    char* y = at(p.y, chunk.b, chunk.first, c);
    for (int start = threadIdx.y; start < chunk.count; start += IN_FLIGHT * blockDim.y) {
      Unit unit[IN_FLIGHT];
#pragma unroll
      for (int u = 0; u < IN_FLIGHT; ++u) {
        const int i = start + u * blockDim.y;
        if (i < chunk.count) {
          const int j = owner[i];
          unit[u] = *reinterpret_cast<const Unit*>(j < 0 ? base + i * p.base.stride_n : tokens + j * p.tokens.stride_n);
        }
      }
#pragma unroll
      for (int u = 0; u < IN_FLIGHT; ++u) {
        const int i = start + u * blockDim.y;
        if (i < chunk.count) *reinterpret_cast<Unit*>(y + i * p.y.stride_n) = unit[u];
      }
    }
  }
}

template <typename Unit>
__global__ void __launch_bounds__(THREADS) restore_tokens_bwd_kernel(const __grid_constant__ RestoreTokens p) {
  SHARED(Owners, owner);
  const Chunk chunk(p);
  find_owners<Unit, true>(p, chunk, owner);
  for_companions(p, chunk, owner, [&](const Replaced& r, int64_t n, int j) {
    move(r.bytes, r.old.at(chunk.b, n), j >= 0 ? nullptr : r.y.at(chunk.b, n));
    if (j >= 0) move(r.bytes, r.fresh.at(chunk.b, j), r.y.at(chunk.b, n));
  });

  for (int c = threadIdx.x; c < p.units; c += blockDim.x) {
    const char* dy = at(p.y, chunk.b, chunk.first, c);
    char *dbase = at(p.base, chunk.b, chunk.first, c), *dtokens = at(p.tokens, chunk.b, 0, c);
    for (int start = threadIdx.y; start < chunk.count; start += IN_FLIGHT * blockDim.y) {
      Unit unit[IN_FLIGHT];
#pragma unroll
      for (int u = 0; u < IN_FLIGHT; ++u) {
        const int i = start + u * blockDim.y;
        if (i < chunk.count) unit[u] = *reinterpret_cast<const Unit*>(dy + i * p.y.stride_n);
      }
#pragma unroll
      for (int u = 0; u < IN_FLIGHT; ++u) {
        const int i = start + u * blockDim.y;
        if (i < chunk.count) {
          const int j = owner[i];
          if (j >= 0) *reinterpret_cast<Unit*>(dtokens + j * p.tokens.stride_n) = unit[u];
          *reinterpret_cast<Unit*>(dbase + i * p.base.stride_n) = j >= 0 ? Unit{} : unit[u];
        }
      }
    }
  }
}

struct RestorePlan : Plan {
  unsigned x, y;
};

// Calls f with a value of the unsigned type (or CUDA vector) of `width` bytes: 2, 4, 8 or 16.
template <typename F>
void with_unit(int width, const F& f) {
  if (width == 16) f(uint4{});
  else if (width == 8) f(uint2{});
  else if (width == 4) f(uint32_t{});
  else f(uint16_t{});
}

// Chooses the unit, the chunks and the shape of a block, and writes them into p.
inline RestorePlan plan(RestoreTokens& p, int64_t element, int64_t multiprocessors) {
  const int64_t given = p.k + static_cast<int64_t>(p.carried);
  const int width = widest_access(element, p.B, p.C, 0, {{&p.base, p.rows}, {&p.tokens, given}, {&p.y, p.rows}});
  if (width == 0) return {};
  p.units = static_cast<int>(p.C * element / width);
  if (width > element) p.base.stride_c = p.tokens.stride_c = p.y.stride_c = width;

  const int x = threads_along(p.units, THREADS), y = THREADS / x;

  // Enough chunks to fill the chip twice over; but a block should not read more of the indices than of the rows.
  const int64_t fill = std::min<int64_t>(64, p.B * p.rows / (16 * multiprocessors));
  const int64_t balance = 4 * static_cast<int64_t>(p.k) / std::max<int64_t>(p.C * element, 1);
  int64_t chunk = std::min(std::max(fill, balance), ceil_div(p.B * p.rows, multiprocessors));
  if (chunk > IN_FLIGHT * y) chunk -= chunk % (IN_FLIGHT * y);  // every thread has as many rows
  chunk = std::max<int64_t>(1, std::min<int64_t>(chunk, MAX_CHUNK));
  p.chunks = static_cast<int>(std::max<int64_t>(1, ceil_div(p.rows, chunk)));
  p.chunk = static_cast<int>(std::max<int64_t>(1, ceil_div(p.rows, p.chunks)));
  return {{width, p.B * p.chunks, 0}, static_cast<unsigned>(x), static_cast<unsigned>(std::min<int64_t>(y, p.chunk))};
}

}  // namespace tokenops
