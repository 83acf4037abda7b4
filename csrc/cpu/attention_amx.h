// Tiles of AMX for the CPU attention in bfloat16. Included once, between pragmas that set the target. A tile is 16 rows
// of 64 bytes: 16 x 16 floats, or 16 rows of 32 bfloat16. A product C += A B of tiles takes A by rows, and B as words
// of two rows, one above the other: packed so by `pack_transposed` and `pack_pairs`.
namespace tokenops::attention::amx {

using tokenops::amx::Tiles;

constexpr int64_t SIDE = 16;           // rows of a tile, and its columns of floats
constexpr int64_t DEEP = 32;           // bfloat16 of a row of a tile: the depth of one product
constexpr int64_t TILE = SIDE * DEEP;  // bfloat16 of a tile
constexpr int64_t BLOCK = 2 * SIDE;    // queries worked on together
constexpr int64_t WIDTH = BLOCK;
constexpr float LOG2_E = 1.44269504088896341f;

INLINE int64_t padded(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// to[j][i] = from[i][j], 16 x 16 words; rows from `rows` on, and the words that `words` lacks, are zeros
INLINE void transpose(const void* from, int64_t bytes, int64_t rows, __mmask16 words, int32_t* to, int64_t to_stride) {
  __m512i r[16];
  const char* p = static_cast<const char*>(from);
  const auto row = [&](int i) { return _mm512_maskz_loadu_epi32(words, p + i * bytes); };
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) r[i] = i < rows ? row(i) : _mm512_setzero_si512();
  transpose_words(r);
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) _mm512_storeu_si512(to + i * to_stride, r[i]);
}

// The B of a product along the channels, `count` rows as columns: [row / 16][channel / 32] tiles, zeros behind both.
INLINE void pack_transposed(const uint16_t* from, int64_t stride, int64_t count, int64_t channels, uint16_t* to) {
  pack_tiles<true>({from, stride, 1}, count, channels, reinterpret_cast<char*>(to));
}

// The B of a product along `count` rows, channels as columns: [row / 32][channel / 16] tiles, zeros behind both. There
// are an even number of columns of tiles.
INLINE void pack_pairs(const uint16_t* from, int64_t stride, int64_t count, int64_t channels, uint16_t* to) {
  const int64_t wide = padded(channels, 2 * SIDE) / SIDE;
  const __m512i order = _mm512_setr_epi64(0, 4, 1, 5, 2, 6, 3, 7);  // unpacking takes halves of 16 bytes
  for (int64_t d = 0; d < wide; d += 2) {
    const int64_t left = channels - d * SIDE;
    const __mmask32 m = left >= 2 * SIDE ? ~0u : (1u << left) - 1;
    const auto row = [&](int64_t n) {
      const uint16_t* at = from + n * stride + d * SIDE;
      return n < count ? _mm512_permutexvar_epi64(order, _mm512_maskz_loadu_epi16(m, at)) : _mm512_setzero_si512();
    };
    for (int64_t n = 0; n < padded(count, DEEP); n += 2) {
      uint16_t* at = to + ((n / DEEP) * wide + d) * TILE + n % DEEP / 2 * DEEP;
      const __m512i low = row(n), high = row(n + 1);
      _mm512_storeu_si512(at, _mm512_unpacklo_epi16(low, high));
      _mm512_storeu_si512(at + TILE, _mm512_unpackhi_epi16(low, high));
    }
  }
}

// The sums of 16 vectors.
INLINE __m512 row_sums(const float* at) {
  __m512 r[SIDE];
#pragma GCC unroll 16
  for (int i = 0; i < SIDE; ++i) r[i] = _mm512_loadu_ps(at + i * SIDE);
#pragma GCC unroll 8
  for (int i = 0; i < SIDE; i += 2) {
    r[i / 2] = _mm512_add_ps(_mm512_unpacklo_ps(r[i], r[i + 1]), _mm512_unpackhi_ps(r[i], r[i + 1]));
  }
#pragma GCC unroll 4
  for (int i = 0; i < 8; i += 2) {
    const __m512d a = (__m512d)r[i], b = (__m512d)r[i + 1];
    r[i / 2] = _mm512_add_ps((__m512)_mm512_unpacklo_pd(a, b), (__m512)_mm512_unpackhi_pd(a, b));
  }
  for (int i = 0; i < 2; ++i) {  // four rows in each quarter; quarters of a and b, and what is opposite
    const __m512 a = r[2 * i], b = r[2 * i + 1];
    r[i] = _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd));
  }
  return _mm512_add_ps(_mm512_shuffle_f32x4(r[0], r[1], 0x88), _mm512_shuffle_f32x4(r[0], r[1], 0xdd));
}

// The log of a vector of sums, to a few units of the last place.
INLINE __m512 log_of(__m512 x) {
  const __m512 m = _mm512_getmant_ps(x, _MM_MANT_NORM_p75_1p5, _MM_MANT_SIGN_src);
  const __mmask16 halved = _mm512_cmp_ps_mask(m, _mm512_set1_ps(1.0f), _CMP_LT_OQ);
  __m512 e = _mm512_getexp_ps(x);
  e = _mm512_mask_add_ps(e, halved, e, _mm512_set1_ps(1.0f));
  const __m512 one = _mm512_set1_ps(1.0f), f = _mm512_sub_ps(m, one), t = _mm512_div_ps(f, _mm512_add_ps(m, one));
  const __m512 t2 = _mm512_mul_ps(t, t);
  __m512 q = _mm512_set1_ps(2.0f / 9);
  q = _mm512_fmadd_ps(q, t2, _mm512_set1_ps(2.0f / 7));
  q = _mm512_fmadd_ps(q, t2, _mm512_set1_ps(2.0f / 5));
  q = _mm512_fmadd_ps(q, t2, _mm512_set1_ps(2.0f / 3));
  q = _mm512_mul_ps(_mm512_mul_ps(q, t2), t);
  q = _mm512_fmadd_ps(_mm512_set1_ps(2.0f), t, q);
  return _mm512_fmadd_ps(e, _mm512_set1_ps(0.693147181f), q);
}

#include "attention_amx_forward.h"

#include "attention_amx_backward.h"

}  // namespace tokenops::attention::amx
