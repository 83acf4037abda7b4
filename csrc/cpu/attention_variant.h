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
constexpr int64_t CHUNK = 512;  // keys summed up together: short sums are exact sums

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

// Swaps the blocks of S lanes off the diagonal, in rows S apart.
template <int S>
INLINE void swap_blocks(Square (&r)[ROWS]) {
  Square low, high;
  for (int l = 0; l < ROWS; ++l) low[l] = l & S ? l - S + ROWS : l, high[l] = l & S ? l + ROWS : l + S;
#pragma GCC unroll 8
  for (int i = 0; i < ROWS; ++i) {
    if (i & S) continue;
    const Square a = r[i], b = r[i + S];
    r[i] = __builtin_shuffle(a, b, low), r[i + S] = __builtin_shuffle(a, b, high);
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

// Words of one thread's scratch, each part aligned to a vector.
struct Scratch {
  int64_t words_k, words_v, rows_n, rows_d;  // words of a row of k; rows of words of v; keys and channels, padded
  int32_t *keys, *values, *queries, *row, *logits, *weights, *result;
  float* received;

  static int64_t layout(const Problem& p, int32_t* base, Scratch* s) {
    Scratch t;
    t.words_k = padded(PAIRS ? (p.DK + 1) / 2 : p.DK, ROWS);
    t.words_v = PAIRS ? (p.N + 1) / 2 : p.N;
    t.rows_n = padded(p.N, ROWS), t.rows_d = padded(p.DV, ROWS);
    int64_t at = 0;
    const auto take = [&](int64_t words) {
      int32_t* part = base + at;
      at += padded(words, 16);
      return part;
    };
    t.keys = take(t.rows_n * t.words_k);
    t.values = take(t.words_v * t.rows_d);
    t.queries = take(t.words_k * WIDTH);
    t.row = take(WIDTH * (t.words_k > t.rows_d ? t.words_k : t.rows_d));
    t.logits = take(t.rows_n * WIDTH);
    t.weights = PAIRS ? take(t.words_v * WIDTH) : t.logits;
    t.result = take(t.rows_d * WIDTH);
    t.received = reinterpret_cast<float*>(take(p.received ? p.N * LANES : 0));
    if (s) *s = t;
    return at;
  }
};

INLINE void pack_keys(const Problem& p, const char* k, int64_t N, const Scratch& s) {
  for (int64_t n = 0; n < N; n += ROWS) {
    for (int64_t r = 0; r < ROWS; ++r) {
      int32_t* row = s.row + r * s.words_k;
      if (n + r < N) load_row(p.type, k + (n + r) * p.k.stride_n * p.size_of_element(), p.DK, nullptr, row, s.words_k);
      else std::memset(row, 0, 4 * s.words_k);
    }
    transpose(s.row, ROWS, s.words_k, s.words_k, s.keys + n * s.words_k, ROWS);
  }
}

// Panels of ROWS channels, in them a row of words a key (or two).
INLINE void pack_values(const Problem& p, const char* v, int64_t N, const Scratch& s) {
  const int64_t stride = p.v.stride_n * p.size_of_element(), words = PAIRS ? (N + 1) / 2 : N;
  for (int64_t w = 0; w < words; ++w) {
#if PAIRS
    const uint16_t* low = reinterpret_cast<const uint16_t*>(v + 2 * w * stride);
    const uint16_t* high = reinterpret_cast<const uint16_t*>(v + (2 * w + 1) * stride);
    if (2 * w + 1 < N) {
      for (int64_t d = 0; d < p.DV; ++d) s.row[d] = low[d] | static_cast<uint32_t>(high[d]) << 16;
    } else {
      for (int64_t d = 0; d < p.DV; ++d) s.row[d] = low[d];
    }
#else
    load_floats(p.type, v + w * stride, p.DV, nullptr, reinterpret_cast<float*>(s.row));
#endif
    std::memset(s.row + p.DV, 0, 4 * (s.rows_d - p.DV));
    for (int64_t d = 0; d < s.rows_d; d += ROWS) std::memcpy(s.values + d * s.words_v + w * ROWS, s.row + d, 4 * ROWS);
  }
}

// The attention of `count` queries, V vectors of them.
template <int V>
INLINE void attend_block(const Problem& p, const Scratch& s, const float* bias, int64_t N, int64_t count, int64_t h,
                         bool first, float* lse, float* scores) {
  float* logits = reinterpret_cast<float*>(s.logits);
  Floats high[V], total[V], inverse[V];
  for (int v = 0; v < V; ++v) high[v] = Floats{} + NONE, total[v] = Floats{};

  for (int64_t n = 0; n < N; n += ROWS) {
    Floats c[ROWS][V];
    product<V>(s.keys + n * s.words_k, s.queries, PAIRS ? (p.DK + 1) / 2 : p.DK, c);
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; ++r) {
      const float add = bias && n + r < N ? bias[(n + r) * p.bias_n] : 0.0f;
      for (int v = 0; v < V; ++v) {
        c[r][v] = c[r][v] * p.scale + add;
        if (n + r < N) high[v] = c[r][v] > high[v] ? c[r][v] : high[v];
        write(logits + (n + r) * WIDTH + v * LANES, c[r][v]);
      }
    }
  }
  for (int v = 0; v < V; ++v) high[v] = high[v] == NONE ? Floats{} : high[v];

  const bool keep = p.scores && (p.received || first);
  for (int64_t start = 0; start < N; start += CHUNK) {
    Floats sum[V];
    for (int v = 0; v < V; ++v) sum[v] = Floats{};
    const int64_t end = start + CHUNK < N ? start + CHUNK : N;
#if PAIRS
    for (int64_t n = start; n < end; n += 2) {
      for (int v = 0; v < V; ++v) {
        float* at = logits + n * WIDTH + v * LANES;
        const Floats a = exp_negative(read(at) - high[v]);
        const Floats b = n + 1 < N ? exp_negative(read(at + WIDTH) - high[v]) : Floats{};
        sum[v] += a + b;
        if (keep) {
          write(at, a);
          if (n + 1 < N) write(at + WIDTH, b);
        }
        // both rounded to nearest even, b above a (weights are positive; a NaN keeps its upper half)
        const Ints low = (Ints)a + 0x7fff + (((Ints)a >> 16) & 1), top = (Ints)b + 0x7fff + (((Ints)b >> 16) & 1);
        write(s.weights + n / 2 * WIDTH + v * LANES, (Floats)(((low >> 16) & 0xffff) | (top & ~0xffff)));
      }
    }
#else
    for (int64_t n = start; n < end; ++n) {
      for (int v = 0; v < V; ++v) {
        float* at = logits + n * WIDTH + v * LANES;
        const Floats a = exp_negative(read(at) - high[v]);
        sum[v] += a;
        write(at, a);
      }
    }
#endif
    for (int v = 0; v < V; ++v) total[v] += sum[v];
  }
  for (int v = 0; v < V; ++v) inverse[v] = total[v] == 0.0f ? Floats{} : 1.0f / total[v];
  for (int64_t i = 0; i < count; ++i) {
    const float sum = total[i / LANES][i % LANES];
    lse[i] = sum == 0.0f ? NONE : high[i / LANES][i % LANES] + __builtin_logf(sum);
  }
  if (keep && p.received) {
    for (int64_t n = 0; n < N; ++n) {
      Floats sum = read(s.received + n * LANES);
      for (int v = 0; v < V; ++v) {
        Ints lane;
        for (int l = 0; l < LANES; ++l) lane[l] = v * LANES + l;
        const Floats share = read(logits + n * WIDTH + v * LANES) * inverse[v];
        sum += lane < static_cast<int32_t>(count) ? share : Floats{};
      }
      write(s.received + n * LANES, sum);
    }
  } else if (keep) {
    for (int64_t n = 0; n < N; ++n) scores[n] = logits[n * WIDTH] * inverse[0][0];
  }

  float* result = reinterpret_cast<float*>(s.result);
  for (int64_t d = 0; d < p.DV; d += ROWS) {
    Floats sum[ROWS][V], c[ROWS][V];
    for (int64_t start = 0; start == 0 || start < N; start += CHUNK) {
      const int64_t keys = N - start < CHUNK ? N - start : CHUNK, step = PAIRS ? 2 : 1, words = (keys + step - 1) / step;
      product<V>(s.values + d * s.words_v + start / step * ROWS, s.weights + start / step * WIDTH, words, c);
#pragma GCC unroll 8
      for (int r = 0; r < ROWS; ++r)
        for (int v = 0; v < V; ++v) sum[r][v] = start ? sum[r][v] + c[r][v] : c[r][v];
    }
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; ++r) {
      const float mask = p.v_mask && d + r < p.DV ? p.v_mask[h * p.DV + d + r] : 1.0f;
      for (int v = 0; v < V; ++v) write(result + (d + r) * WIDTH + v * LANES, sum[r][v] * inverse[v] * mask);
    }
  }
}

static void attend(const Problem& p, int32_t* base, int64_t begin, int64_t end) {
  Scratch s;
  Scratch::layout(p, base, &s);
  const int64_t size = p.size_of_element(), blocks = (p.M + WIDTH - 1) / WIDTH;
  for (int64_t task = begin; task < end; ++task) {
    const int64_t part = task % p.splits, bh = task / p.splits, b = bh / p.H, h = bh % p.H;
    const int64_t N = p.lengths ? p.lengths[b] : p.N;
    const char* q = p.head(p.q, b, h);
    char* out = p.head(p.out, b, h);
    const float* bias = p.bias ? p.bias + b * p.bias_b + h * p.bias_h : nullptr;
    float* scores = p.scores ? p.scores + bh * p.N : nullptr;
    if (task == begin || part == 0) {
      pack_keys(p, p.head(p.k, b, h), N, s);
      pack_values(p, p.head(p.v, b, h), N, s);
    }
    if (p.received) std::memset(s.received, 0, 4 * N * LANES);
    for (int64_t block = blocks * part / p.splits; block < blocks * (part + 1) / p.splits; ++block) {
      const int64_t m = block * WIDTH, count = p.M - m < WIDTH ? p.M - m : WIDTH, wide = count > LANES ? WIDTH : LANES;
      for (int64_t i = 0; i < wide; ++i) {
        int32_t* row = s.row + i * s.words_k;
        const float* mask = p.qk_mask ? p.qk_mask + h * p.DK : nullptr;
        if (i < count) load_row(p.type, q + (m + i) * p.q.stride_n * size, p.DK, mask, row, s.words_k);
        else std::memset(row, 0, 4 * s.words_k);
      }
      transpose(s.row, wide, s.words_k, s.words_k, s.queries, WIDTH);
      const auto call = wide == WIDTH ? &attend_block<2> : &attend_block<1>;
      call(p, s, bias, N, count, h, block == 0, p.lse + bh * p.M + m, scores);
      transpose(s.result, s.rows_d, wide, WIDTH, s.row, s.rows_d);
      const float* rows = reinterpret_cast<const float*>(s.row);
      for (int64_t i = 0; i < count; ++i) store_row(p.type, rows + i * s.rows_d, p.DV, out + (m + i) * p.out.stride_n * size);
    }
    if (!scores) continue;
    for (int64_t n = 0; p.received && n < N; ++n) {
      float sum = 0.0f;
      for (int64_t l = 0; l < LANES; ++l) sum += s.received[n * LANES + l];
      scores[n] = sum / static_cast<float>(p.M);
    }
    if (part == 0 && p.N > N) std::memset(scores + N, 0, 4 * (p.N - N));
  }
}

}  // namespace tokenops::attention::VARIANT

#undef VARIANT
#undef LANES
#undef ROWS
#undef PAIRS
