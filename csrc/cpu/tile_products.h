// bfloat16 products on AMX tiles, for one thread at a time: operands packed into tiles, and blocks of 32 x 32 results.
//
// A tile is 16 rows of 16 words, a word two bfloat16 side by side along the depth (what a product sums over). Of the
// left operand a row is a row of the result, of the right one a column of the result is a column.
#pragma once

#include "isa.h"

#if TOKENOPS_TILES
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // in GCC 12's intrinsics
#pragma GCC diagnostic ignored "-Wuninitialized"
#include <immintrin.h>  // ahead of the pragma: else its functions take the pragma's target

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <new>

#include "tiles.h"

// what stands between these two is compiled for machines with AMX
#define TILES_BEGIN          \
  _Pragma("GCC push_options") \
  _Pragma("GCC target(\"avx2,fma,bmi,bmi2,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,amx-tile,amx-bf16\")")
#define TILES_END _Pragma("GCC pop_options")

TILES_BEGIN

namespace tokenops {
namespace {

#include "avx512.h"

constexpr int64_t TILE_BYTES = 1024;  // bytes

INLINE int64_t tiles_of(int64_t n) { return (n + 15) / 16; }  // along rows or columns
INLINE int64_t steps_of(int64_t n) { return (n + 31) / 32; }  // along the depth
INLINE int64_t packed_bytes(int64_t outer, int64_t depth) { return tiles_of(outer) * steps_of(depth) * TILE_BYTES; }

INLINE void write_tile(const __m512i (&r)[16], char* to) {
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) _mm512_storeu_si512(to + 64 * i, r[i]);
}

// Words of two rows of 16 numbers: the first's in the low halves
INLINE __m512i paired(__m256i low, __m256i high) {
  return _mm512_or_si512(_mm512_cvtepu16_epi32(low), _mm512_slli_epi32(_mm512_cvtepu16_epi32(high), 16));
}

// An operand as it lies in memory: (outer, depth), one of the strides (in elements) is 1. Outer are rows of the left
// operand and columns of the right one.
struct TileOperand {
  const uint16_t* data;
  int64_t outer_stride, depth_stride;
};

INLINE TileOperand turned(const TileOperand& x) { return {x.data, x.depth_stride, x.outer_stride}; }

// 16 outer by 32 along the depth from o and k on, of an operand whose depth is contiguous, or whose outer dimension is
template <bool WHOLE>
INLINE void read_along(const TileOperand& x, int64_t outer, int64_t depth, int64_t o, int64_t k, __m512i (&r)[16]) {
  const __mmask32 inside = WHOLE ? ~0u : first_of_32(depth - k);
  const int64_t stride = x.outer_stride;
  const uint16_t* from = x.data + o * stride + k;
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) {
    r[i] = _mm512_maskz_loadu_epi16(WHOLE || o + i < outer ? inside : 0, from);
    if (WHOLE || o + i + 1 < outer) from += stride;
  }
}
template <bool WHOLE>
INLINE void read_across(const TileOperand& x, int64_t outer, int64_t depth, int64_t o, int64_t k, __m512i (&r)[16]) {
  const __mmask16 inside = WHOLE ? 0xffff : first_of_16(outer - o);
  const int64_t stride = x.depth_stride;
  const uint16_t* from = x.data + k * stride + o;
  const auto next = [&](int i) {
    const __m256i row = _mm256_maskz_loadu_epi16(WHOLE || k + i < depth ? inside : 0, from);
    if (WHOLE || k + i + 1 < depth) from += stride;
    return row;
  };
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) {
    const __m256i low = next(2 * i);
    r[i] = paired(low, next(2 * i + 1));
  }
}

// Tiles [outer / 16][depth / 32], zeros where there is nothing; memory is read row by row.
template <bool RIGHT>
void pack_tiles(const TileOperand& x, int64_t outer, int64_t depth, char* to) {
  const int64_t steps = steps_of(depth);
  __m512i r[16];
  if (x.depth_stride == 1) {
    for (int64_t o = 0; o < outer; o += 16) {
      for (int64_t k = 0; k < depth; k += 32, to += TILE_BYTES) {
        if (o + 16 <= outer && k + 32 <= depth) read_along<true>(x, outer, depth, o, k, r);
        else read_along<false>(x, outer, depth, o, k, r);
        if (RIGHT) transpose_words(r);
        write_tile(r, to);
      }
    }
  } else {
    for (int64_t k = 0; k < depth; k += 32, to += TILE_BYTES) {
      for (int64_t o = 0; o < outer; o += 16) {
        if (o + 16 <= outer && k + 32 <= depth) read_across<true>(x, outer, depth, o, k, r);
        else read_across<false>(x, outer, depth, o, k, r);
        if (!RIGHT) transpose_words(r);
        write_tile(r, to + o / 16 * steps * TILE_BYTES);
      }
    }
  }
}

// Where packed tiles lie: the first one, the step to the next of the depth and to the neighbour across (both in
// bfloat16), bytes between rows.
struct TileGrid {
  const uint16_t* first;
  int64_t next, across, stride;
};

// to = (add: to +) left right: ROWS x COLUMNS tiles, 1 or 2 of each; stride in floats
template <int ROWS, int COLUMNS>
INLINE void multiply_tiles(const TileGrid& left, const TileGrid& right, int64_t depth, bool add, float* to,
                           int64_t stride) {
  const int64_t bytes = 4 * stride;
  float* below = to + 16 * stride;
  if (add) {
    TILE_LOAD(0, to, bytes);
    if (COLUMNS == 2) TILE_LOAD(1, to + 16, bytes);
    if (ROWS == 2) TILE_LOAD(2, below, bytes);
    if (ROWS == 2 && COLUMNS == 2) TILE_LOAD(3, below + 16, bytes);
  } else {
    TILE_ZERO(0);
    if (COLUMNS == 2) TILE_ZERO(1);
    if (ROWS == 2) TILE_ZERO(2);
    if (ROWS == 2 && COLUMNS == 2) TILE_ZERO(3);
  }
  const uint16_t *a = left.first, *b = right.first;
  for (int64_t k = 0; k < depth; ++k, a += left.next, b += right.next) {
    TILE_LOAD(4, a, left.stride);
    TILE_LOAD(6, b, right.stride);
    TILE_PRODUCT(0, 4, 6);
    if (COLUMNS == 2) {
      TILE_LOAD(7, b + right.across, right.stride);
      TILE_PRODUCT(1, 4, 7);
    }
    if (ROWS == 2) {
      TILE_LOAD(5, a + left.across, left.stride);
      TILE_PRODUCT(2, 5, 6);
      if (COLUMNS == 2) TILE_PRODUCT(3, 5, 7);
    }
  }
  TILE_STORE(0, to, bytes);
  if (COLUMNS == 2) TILE_STORE(1, to + 16, bytes);
  if (ROWS == 2) TILE_STORE(2, below, bytes);
  if (ROWS == 2 && COLUMNS == 2) TILE_STORE(3, below + 16, bytes);
}

// 32 (or 16) rows by 32 (or 16) columns of a product, to rows of 32 floats, or (ADD) added to what is there. Of a left
// operand `left_steps` deep some steps may be taken.
template <bool ADD = false>
INLINE void multiply_block(const char* left, int64_t rows, const char* right, int64_t columns, int64_t steps, float* to,
                           int64_t left_steps = 0) {
  constexpr int64_t tile = TILE_BYTES / 2;
  const TileGrid a{reinterpret_cast<const uint16_t*>(left), tile, (left_steps ? left_steps : steps) * tile, 64};
  const TileGrid b{reinterpret_cast<const uint16_t*>(right), tile, steps * tile, 64};
  if (rows > 16) {
    if (columns > 16) multiply_tiles<2, 2>(a, b, steps, ADD, to, 32);
    else multiply_tiles<2, 1>(a, b, steps, ADD, to, 32);
  } else {
    if (columns > 16) multiply_tiles<1, 2>(a, b, steps, ADD, to, 32);
    else multiply_tiles<1, 1>(a, b, steps, ADD, to, 32);
  }
}

// A block of results as bfloat16
INLINE void store_block(const float* block, int64_t rows, int64_t columns, uint16_t* to, int64_t stride) {
  const __mmask32 inside = first_of_32(columns);
  for (int64_t i = 0; i < std::min<int64_t>(rows, 32); ++i) {
    const __m512bh row = _mm512_cvtne2ps_pbh(_mm512_load_ps(block + 32 * i + 16), _mm512_load_ps(block + 32 * i));
    if (columns >= 32) _mm512_storeu_si512(to + i * stride, (__m512i)row);
    else _mm512_mask_storeu_epi16(to + i * stride, inside, (__m512i)row);
  }
}

}  // namespace
}  // namespace tokenops

TILES_END
#endif
