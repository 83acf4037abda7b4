// The likeness of bfloat16 tokens by tiles of AMX. Included in match_bipartite.cpp.
#pragma once

#include "isa.h"

#if TOKENOPS_TILES
#include "../unit_rows.h"
#include "tile_products.h"

#include <immintrin.h>

#include <cmath>
#include <limits>
#include <vector>

namespace tokenops {
namespace {

TILES_BEGIN

// Metrics of both sides, as rows of `deep` tiles, zeros behind the channels; those of the even side once more as the
// second operand of a product. A tile is 16 rows of 32 bfloat16, or of 16 floats.
struct TileRows {
  static constexpr int64_t SIDE = 16, DEEP = 32, TILE = SIDE * DEEP;
  int64_t deep = 0;
  std::vector<uint16_t> odd, even, packed;

  void resize(int64_t odds, int64_t evens, int64_t D) {
    deep = (D + DEEP - 1) / DEEP;
    odd.resize(odds * deep * DEEP), even.resize(evens * deep * DEEP), packed.resize(evens * deep * DEEP);
  }

  // Keeps a row, by a power of two if need be; returns the inverse of its length.
  static float put(const uint16_t* row, int64_t D, uint16_t* to) {
    float squares = copy(row, D, to);
    if (const float power = Powers<float>::of(squares); power != 1) {
      for (int64_t d = 0; d < D; ++d) {
        to[d] = static_cast<uint16_t>(to_bits(from_bfloat16(row[d]) * power) >> 16);  // exact
      }
      squares = copy(to, D, to);
    }
    return 1 / std::max(std::sqrt(squares), Powers<float>::SMALLEST);
  }

  // the even side's rows from 16 * block on
  void pack(int64_t block) {
    const int64_t width = deep * DEEP;
    char* to = reinterpret_cast<char*>(packed.data() + block * deep * TILE);
    pack_tiles<true>({even.data() + block * SIDE * width, width, 1}, SIDE, width, to);
  }

  // Of 32 even rows the best of the odd ones, divided by the odd one's length, and which: the first of equals.
  void find(int64_t block, int64_t odds, const float* inverses, float* best, int32_t* places) const {
    using namespace amx;
    alignas(64) float dots[2][SIDE][SIDE];
    __m512 top[2];
    __m512i at[2];
    for (int c = 0; c < 2; ++c) {
      top[c] = _mm512_set1_ps(-std::numeric_limits<float>::infinity()), at[c] = _mm512_setzero_si512();
    }
    const uint16_t *const left = packed.data() + 2 * block * deep * TILE, *const right = left + deep * TILE;
    for (int64_t first = 0; first < odds; first += SIDE) {
      TILE_ZERO(0);
      TILE_ZERO(1);
      for (int64_t d = 0; d < deep; ++d) {
        TILE_LOAD(2, odd.data() + first * deep * DEEP + d * DEEP, deep * DEEP * 2);
        TILE_LOAD(3, left + d * TILE, DEEP * 2);
        TILE_LOAD(4, right + d * TILE, DEEP * 2);
        TILE_PRODUCT(0, 2, 3);
        TILE_PRODUCT(1, 2, 4);
      }
      TILE_STORE(0, dots[0], SIDE * 4);
      TILE_STORE(1, dots[1], SIDE * 4);
#pragma GCC unroll 16
      for (int64_t i = 0; i < SIDE; ++i) {
        const __m512 inverse = _mm512_set1_ps(inverses[first + i]);
        const __m512i place = _mm512_set1_epi32(static_cast<int32_t>(first + i));
#pragma GCC unroll 2
        for (int c = 0; c < 2; ++c) {
          const __m512 likeness = _mm512_mul_ps(_mm512_load_ps(dots[c][i]), inverse);
          const __mmask16 better = _mm512_cmp_ps_mask(likeness, top[c], _CMP_GT_OQ);
          top[c] = _mm512_mask_mov_ps(top[c], better, likeness), at[c] = _mm512_mask_mov_epi32(at[c], better, place);
        }
      }
    }
    for (int c = 0; c < 2; ++c) {
      _mm512_storeu_ps(best + (2 * block + c) * SIDE, top[c]);
      _mm512_storeu_si512(places + (2 * block + c) * SIDE, at[c]);
    }
  }

 private:
  // zeros behind the channels; returns the sum of squares
  static float copy(const uint16_t* row, int64_t D, uint16_t* to) {
    __m512 low = _mm512_setzero_ps(), high = _mm512_setzero_ps();
    for (int64_t d = 0; d < D; d += DEEP) {
      const __mmask32 there = D - d >= DEEP ? ~0u : (1u << (D - d)) - 1;
      const __m512i pairs = _mm512_maskz_loadu_epi16(there, row + d);
      _mm512_storeu_si512(to + d, pairs);
      const __m512 a = _mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16));
      const __m512 b = _mm512_castsi512_ps(_mm512_and_si512(pairs, _mm512_set1_epi32(0xffff0000)));
      low = _mm512_fmadd_ps(a, a, low), high = _mm512_fmadd_ps(b, b, high);
    }
    return _mm512_reduce_add_ps(_mm512_add_ps(low, high));
  }
};

TILES_END

}  // namespace
}  // namespace tokenops
#endif
