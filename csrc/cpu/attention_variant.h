// Attention for one instruction set. Included once for each, with VARIANT (its name), LANES (floats of a vector), ROWS
// (of a block of products) and PAIRS (bfloat16 products, two to a lane) defined, between pragmas that set the target.
//
// Lanes are queries: a block of WIDTH queries keeps its logits transposed, a row a key, so softmax runs down the rows
// and neither product needs a broadcast over memory that is not contiguous. Keys and values are packed once a head, in
// panels of ROWS rows, so that one loop of products serves both. A word is a float or, with PAIRS, two bfloat16.
namespace tokenops::attention::VARIANT {

typedef float Floats __attribute__((vector_size(4 * LANES)));
typedef int32_t Ints __attribute__((vector_size(4 * LANES)));
typedef int32_t Square __attribute__((vector_size(4 * ROWS)));
constexpr int64_t WIDTH = 2 * LANES;
constexpr int64_t CHUNK = 128;  // keys summed up together: short sums are exact sums

INLINE int64_t padded(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

INLINE Floats read(const void* from) {
  Floats x;
  std::memcpy(&x, from, sizeof x);
  return x;
}
INLINE void write(void* to, Floats x) { std::memcpy(to, &x, sizeof x); }

// exp(x) for x <= 0, to about an ulp; 0 for -inf, NaN for NaN
INLINE Floats exp_negative(Floats x) {
  constexpr float shift = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  const Floats rounded = x * 1.44269504088896341f + shift;
  const Floats n = rounded - shift;
  const Floats r = (x - n * 0.693359375f) - n * -2.12194440e-4f;
  Floats p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  const Ints power = ((Ints)rounded + 127) << 23;
  return x < -87.0f ? Floats{} : p * (Floats)power;
}

// Lanes of a and b (those of b from ROWS on). Clang has no such function, but sees through the loop.
INLINE Square pick(Square a, Square b, Square lanes) {
#ifdef __clang__
  Square c;
  for (int l = 0; l < ROWS; ++l) c[l] = lanes[l] < ROWS ? a[lanes[l]] : b[lanes[l] - ROWS];
  return c;
#else
  return __builtin_shuffle(a, b, lanes);
#endif
}

// Swaps the blocks of S lanes off the diagonal, in rows S apart.
template <int S>
INLINE void swap_blocks(Square (&r)[ROWS]) {
  Square low, high;
  for (int l = 0; l < ROWS; ++l) low[l] = l & S ? l - S + ROWS : l, high[l] = l & S ? l + ROWS : l + S;
#pragma GCC unroll 8
  for (int i = 0; i < ROWS; ++i) {
    if (i & S) continue;
    const Square a = r[i], b = r[i + S];
    r[i] = pick(a, b, low), r[i + S] = pick(a, b, high);
  }
}

// to[j][i] = from[i][j], words; rows and columns are multiples of ROWS
INLINE void transpose(const int32_t* from, int64_t rows, int64_t columns, int64_t from_stride, int32_t* to,
                      int64_t to_stride) {
  for (int64_t i = 0; i < rows; i += ROWS) {
    for (int64_t j = 0; j < columns; j += ROWS) {
      Square r[ROWS];
#pragma GCC unroll 8
      for (int l = 0; l < ROWS; ++l) std::memcpy(&r[l], from + (i + l) * from_stride + j, sizeof r[l]);
      if constexpr (ROWS > 4) swap_blocks<4>(r);
      swap_blocks<2>(r);
      swap_blocks<1>(r);
#pragma GCC unroll 8
      for (int l = 0; l < ROWS; ++l) std::memcpy(to + (j + l) * to_stride + i, &r[l], sizeof r[l]);
    }
  }
}

// Words that n channels take, and n rows.
INLINE int64_t words_of(int64_t n) { return PAIRS ? (n + 1) / 2 : n; }

INLINE void load_floats(Type type, const char* from, int64_t n, const float* mask, float* to) {
  if (type == Type::Float) {
    std::memcpy(to, from, 4 * n);
  } else if (type == Type::BFloat16) {
    const uint16_t* raw = reinterpret_cast<const uint16_t*>(from);
    for (int64_t i = 0; i < n; ++i) to[i] = from_bfloat16(raw[i]);
  } else {
    from_half(from, to, n);
  }
  for (int64_t i = 0; mask && i < n; ++i) to[i] *= mask[i];
}

// A row of n channels as words, zeros behind it up to `words`.
INLINE void load_row(Type type, const char* from, int64_t n, const float* mask, int32_t* to, int64_t words) {
#if PAIRS
  uint16_t* raw = reinterpret_cast<uint16_t*>(to);
  std::memcpy(raw, from, 2 * n);
  for (int64_t i = 0; mask && i < n; ++i) raw[i] = to_bfloat16(from_bfloat16(raw[i]) * mask[i]);
  std::memset(raw + n, 0, 4 * words - 2 * n);
  (void)type;
#else
  load_floats(type, from, n, mask, reinterpret_cast<float*>(to));
  std::memset(to + n, 0, 4 * (words - n));
#endif
}

INLINE void store_row(Type type, const float* from, int64_t n, char* to) {
  if (type == Type::Float) {
    std::memcpy(to, from, 4 * n);
  } else if (type == Type::BFloat16) {
    uint16_t* raw = reinterpret_cast<uint16_t*>(to);
    for (int64_t i = 0; i < n; ++i) raw[i] = to_bfloat16(from[i]);
  } else {
    to_half(from, to, n);
  }
}

INLINE Floats multiply_add(int32_t a, Floats b, Floats c) {
#if PAIRS
  return (Floats)_mm512_dpbf16_ps((__m512)c, (__m512bh)_mm512_set1_epi32(a), (__m512bh)b);
#else
  return from_bits(a) * b + c;
#endif
}

#if PAIRS
INLINE Ints rounded(Floats x) {  // to bfloat16, in the upper half; an infinity stays one, a NaN keeps its upper half
  return (Ints)x + 0x7fff + (((Ints)x >> 16) & 1);
}
// a and b as one word a lane, b above a
INLINE Floats paired(Floats a, Floats b) {
  return (Floats)(((rounded(a) >> 16) & 0xffff) | (rounded(b) & ~0xffff));
}
#endif

// c[r] = sum over k of a[k][r] * b[k]: ROWS rows of V vectors of queries
template <int V>
INLINE void product(const int32_t* a, const int32_t* b, int64_t depth, Floats (&c)[ROWS][V]) {
#pragma GCC unroll 8
  for (int r = 0; r < ROWS; ++r)
    for (int v = 0; v < V; ++v) c[r][v] = Floats{};
  for (int64_t k = 0; k < depth; ++k) {
    Floats x[V];
    for (int v = 0; v < V; ++v) x[v] = read(b + k * WIDTH + v * LANES);
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; ++r)
      for (int v = 0; v < V; ++v) c[r][v] = multiply_add(a[k * ROWS + r], x[v], c[r][v]);
  }
}

// The same with b a word for each of N rows (or two of them), which may be many: partial sums are short.
template <int V>
INLINE void long_product(const int32_t* a, const int32_t* b, int64_t N, Floats (&c)[ROWS][V]) {
  product<V>(a, b, words_of(N < CHUNK ? N : CHUNK), c);
  for (int64_t start = CHUNK; start < N; start += CHUNK) {
    Floats more[ROWS][V];
    const int64_t at = words_of(start), left = N - start < CHUNK ? N - start : CHUNK;
    product<V>(a + at * ROWS, b + at * WIDTH, words_of(left), more);
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; ++r)
      for (int v = 0; v < V; ++v) c[r][v] += more[r][v];
  }
}

// Rows of words, transposed: to[w][i] is word w of row i, for `wide` columns of which `count` are rows.
INLINE void load_columns(Type type, const char* from, int64_t stride, int64_t count, int64_t wide, int64_t channels,
                         const float* mask, int64_t words, int32_t* row, int32_t* to, int64_t to_stride) {
  for (int64_t i = 0; i < wide; ++i) {
    if (i < count) load_row(type, from + i * stride, channels, mask, row + i * words, words);
    else std::memset(row + i * words, 0, 4 * words);
  }
  transpose(row, wide, words, words, to, to_stride);
}

// Panels of ROWS rows, in them a column of words after the other: for products along the channels.
INLINE void pack_by_rows(Type type, const char* from, int64_t stride, int64_t count, int64_t channels, int64_t words,
                         int32_t* row, int32_t* to) {
  for (int64_t n = 0; n < count; n += ROWS) {
    const int64_t here = count - n < ROWS ? count - n : ROWS;
    load_columns(type, from + n * stride, stride, here, ROWS, channels, nullptr, words, row, to + n * words, ROWS);
  }
}

// Panels of `panel` channels, in them a word of every row (with PAIRS, of two rows) after the other: for products along
// the rows. There are `words` of them in memory, of which those of `count` rows are filled.
INLINE void pack_by_channels(Type type, const char* from, int64_t stride, int64_t count, int64_t channels,
                             const float* mask, int64_t panel, int64_t words, int32_t* row, int32_t* to) {
  const int64_t width = padded(channels, panel);
  for (int64_t w = 0; w < words_of(count); ++w) {
#if PAIRS
    const uint16_t* low = reinterpret_cast<const uint16_t*>(from + 2 * w * stride);
    const uint16_t* high = reinterpret_cast<const uint16_t*>(from + (2 * w + 1) * stride);
    if (2 * w + 1 < count) {
      for (int64_t d = 0; d < channels; ++d) row[d] = low[d] | static_cast<uint32_t>(high[d]) << 16;
    } else {
      for (int64_t d = 0; d < channels; ++d) row[d] = low[d];
    }
    for (int64_t d = 0; mask && d < channels; ++d) {
      const uint32_t bits = row[d];
      row[d] = to_bfloat16(from_bits(bits << 16) * mask[d]) |
               static_cast<uint32_t>(to_bfloat16(from_bits(bits & 0xffff0000u) * mask[d])) << 16;
    }
    (void)type;
#else
    load_floats(type, from + w * stride, channels, mask, reinterpret_cast<float*>(row));
#endif
    std::memset(row + channels, 0, 4 * (width - channels));
    for (int64_t d = 0; d < width; d += panel) std::memcpy(to + d * words + w * panel, row + d, 4 * panel);
  }
}

// The mean of the keys over the heads, rows begin to end of those of all images; zeros beyond a length.
static void mean_keys(const Problem& p, char* to, int64_t begin, int64_t end) {
  const int64_t size = p.size_of_element();
  float sum[128], row[128];
  for (int64_t t = begin; t < end; ++t) {
    const int64_t b = t / p.N, n = t % p.N;
    std::memset(sum, 0, sizeof sum);
    for (int64_t h = 0; h < p.H && (!p.lengths || n < p.lengths[b]); ++h) {
      load_floats(p.type, p.head(p.k, b, h) + n * p.k.stride_n * size, p.DK, nullptr, row);
      for (int64_t d = 0; d < p.DK; ++d) sum[d] += row[d];
    }
    for (int64_t d = 0; d < p.DK; ++d) sum[d] /= static_cast<float>(p.H);
    store_row(p.type, sum, p.DK, to + t * p.DK * size);
  }
}

#include "attention_forward.h"
#include "attention_backward.h"

}  // namespace tokenops::attention::VARIANT

#undef VARIANT
#undef LANES
#undef ROWS
#undef PAIRS
