// The backward pass on tiles; a part of attention_amx.h's namespace.
//
// Lanes are queries, 32 a block, and P and dP are kept transposed, a row a key: D = sum of P * dP is a sum down rows.
// Rounded, P and dS are the left of dv = P^T dout and dk = dS^T q as they lie: they wait until a chunk of queries is
// together. dq is made transposed, of the keys' channels and of dS with two keys to a word.

struct BackwardScratch {
  int64_t deep_k, deep_v, wide_k, wide_v, chunk;  // tiles of 32 channels, and of 16; blocks of queries
  uint16_t *keys, *values, *key_channels, *masked, *queries, *douts, *query_pairs, *dout_pairs;
  uint16_t *weights, *ds, *ds_pairs;
  float *p, *dp, *bias, *dscores, *result, *turned, *dk, *dv, *dbias;

  static int64_t layout(const Problem& p, int32_t* base, BackwardScratch* s) {
    BackwardScratch t;
    t.deep_k = padded(p.DK, DEEP) / DEEP, t.deep_v = padded(p.DV, DEEP) / DEEP;
    t.wide_k = 2 * t.deep_k, t.wide_v = 2 * t.deep_v;
    const int64_t rows = padded(p.N, DEEP), widest = DEEP * (t.deep_k > t.deep_v ? t.deep_k : t.deep_v);
    t.chunk = p.M < CHUNK * DEEP ? padded(p.M, DEEP) / DEEP : CHUNK;
    int64_t at = 0;
    const auto floats = [&](int64_t words) {
      float* part = reinterpret_cast<float*>(base + at);
      at += padded(words, SIDE);
      return part;
    };
    const auto halves = [&](int64_t n) { return reinterpret_cast<uint16_t*>(floats(n / 2)); };
    t.keys = halves(rows * DEEP * t.deep_k), t.values = halves(rows * DEEP * t.deep_v);
    t.key_channels = halves(rows * DEEP * t.deep_k);
    t.masked = halves(DEEP * widest);
    t.queries = halves(DEEP * DEEP * t.deep_k), t.douts = halves(DEEP * DEEP * t.deep_v);
    t.query_pairs = halves(t.chunk * DEEP * DEEP * t.deep_k), t.dout_pairs = halves(t.chunk * DEEP * DEEP * t.deep_v);
    t.weights = halves(t.chunk * DEEP * rows), t.ds = halves(t.chunk * DEEP * rows), t.ds_pairs = halves(DEEP * rows);
    t.p = floats(rows * DEEP), t.dp = floats(rows * DEEP);
    t.bias = floats(rows), t.dscores = floats(rows);
    t.result = floats(DEEP * DEEP), t.turned = floats(DEEP * widest);
    t.dk = floats(rows * DEEP * t.deep_k), t.dv = floats(rows * DEEP * t.deep_v);
    t.dbias = floats(rows * SIDE);
    if (s) *s = t;
    return at;
  }
  static constexpr int64_t CHUNK = 8;  // P and dS of so many blocks stay in the L2 cache
};

INLINE __m512 widened(const uint16_t* from, __mmask16 m) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(m, from)), 16));
}
INLINE void store_rounded(uint16_t* to, __mmask16 m, __m512 x) {
  _mm256_mask_storeu_epi16(to, m, (__m256i)_mm512_cvtneps_pbh(x));
}

// Rows times a mask, rounded, in `to`; where they lie without one.
INLINE const uint16_t* masked(const uint16_t* rows, int64_t* stride, int64_t count, int64_t channels, const float* mask,
                              uint16_t* to) {
  if (!mask) return rows;
  for (int64_t i = 0; i < count; ++i) {
    for (int64_t d = 0; d < channels; d += SIDE) {
      const __mmask16 m = first_of_16(channels - d);
      store_rounded(to + i * channels + d, m, widened(rows + i * *stride + d, m) * _mm512_maskz_loadu_ps(m, mask + d));
    }
  }
  *stride = channels;
  return to;
}

// Rows side by side with zeros behind them, and as those that do not count.
INLINE void copy_rows(const uint16_t* from, int64_t stride, int64_t N, int64_t channels, const float* bias,
                      int64_t rows, int64_t width, uint16_t* to) {
  for (int64_t n = 0; n < rows; ++n) {
    for (int64_t d = 0; d < width; d += DEEP) {
      const __mmask32 m = channels - d >= DEEP ? ~0u : (1u << (channels - d)) - 1;
      const bool counts = n < N && bias[n] != NONE;
      const __m512i x = counts ? _mm512_maskz_loadu_epi16(m, from + n * stride + d) : _mm512_setzero_si512();
      _mm512_store_si512(to + n * width + d, x);
    }
  }
}

// A block of queries (V tiles of them) and its keys n on: P rounded, and the terms of D added to `total`.
template <int V>
INLINE void weigh(const BackwardScratch& s, int64_t n, int64_t rows, bool some_out, __m512 scale, const __m512* base,
                  __mmask16 scored, uint16_t* weights, __m512* total) {
  __m512 part[V] = {};
  for (int64_t r = n; r < n + rows; ++r) {
    __m512 w[2] = {};
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) {
      const __m512 bias = some_out ? base[v] + _mm512_set1_ps(s.bias[r]) : base[v];
      w[v] = exp2_of<5>(_mm512_fmadd_ps(_mm512_load_ps(s.p + r * DEEP + v * SIDE), scale, bias));
      _mm512_store_ps(s.p + r * DEEP + v * SIDE, w[v]);
      __m512 dp = _mm512_load_ps(s.dp + r * DEEP + v * SIDE);
      if (scored) {
        dp = _mm512_mask_add_ps(dp, v == 0 || scored == 0xffff ? scored : 0, dp, _mm512_set1_ps(s.dscores[r]));
        _mm512_store_ps(s.dp + r * DEEP + v * SIDE, dp);
      }
      part[v] = _mm512_fmadd_ps(w[v], dp, part[v]);
    }
    _mm512_store_si512(weights + r * DEEP, (__m512i)_mm512_cvtne2ps_pbh(w[1], w[0]));
  }
  for (int v = 0; v < V; ++v) total[v] += part[v];
}

// dS of the same, rounded: a row a key, and two keys to a word
template <int V>
INLINE void differentiate(const BackwardScratch& s, int64_t n, int64_t rows, const __m512* delta, bool dbias,
                          uint16_t* ds) {
  uint16_t* pairs = s.ds_pairs + n * DEEP;
  for (int64_t r = n; r < n + rows; r += 2, pairs += DEEP) {
    __m512i rounded[2];
#pragma GCC unroll 2
    for (int i = 0; i < 2; ++i) {
      const int64_t at = (r + i) * DEEP;
      __m512 x[2] = {};
#pragma GCC unroll 2
      for (int v = 0; v < V; ++v)
        x[v] = _mm512_load_ps(s.p + at + v * SIDE) * (_mm512_load_ps(s.dp + at + v * SIDE) - delta[v]);
      if (dbias) {
        float* sum = s.dbias + (r + i) * SIDE;
        _mm512_store_ps(sum, _mm512_load_ps(sum) + (x[0] + x[1]));
      }
      rounded[i] = (__m512i)_mm512_cvtne2ps_pbh(x[1], x[0]);
      _mm512_store_si512(ds + at, rounded[i]);
    }
    _mm512_store_si512(pairs, _mm512_unpacklo_epi16(rounded[0], rounded[1]));  // queries 0-3, 8-11, 16-19, 24-27
    _mm512_store_si512(pairs + TILE, _mm512_unpackhi_epi16(rounded[0], rounded[1]));  // 4-7, 12-15, 20-23, 28-31
  }
  for (; rows < DEEP; rows += 2, pairs += DEEP) {
    _mm512_store_si512(pairs, _mm512_setzero_si512());
    _mm512_store_si512(pairs + TILE, _mm512_setzero_si512());
  }
}

// P and dS of `count` queries, V tiles of them, for dk and dv; dq is written.
template <int V>
INLINE void attend_backward_block(const Problem& p, const Gradients& g, const BackwardScratch& s, int64_t N, int64_t b,
                                  int64_t h, int64_t m, int64_t count, uint16_t* weights, uint16_t* ds) {
  const int64_t bh = b * p.H + h;
  __m512 base[V], delta[V], total[V];
  for (int v = 0; v < V; ++v) {
    const __mmask16 here = first_of_16(count - v * SIDE);
    const __m512 lse = _mm512_maskz_loadu_ps(here, p.lse + bh * p.across_m + m + v * SIDE);
    const __mmask16 empty = _mm512_cmp_ps_mask(lse, _mm512_set1_ps(NONE), _CMP_EQ_OQ);
    base[v] = _mm512_mask_mul_ps(_mm512_set1_ps(NONE), here, lse, _mm512_set1_ps(-LOG2_E));
    base[v] = _mm512_mask_mov_ps(base[v], empty, _mm512_setzero_ps());
    delta[v] = _mm512_setzero_ps(), total[v] = _mm512_setzero_ps();
    if (g.dlse) delta[v] -= _mm512_maskz_loadu_ps(here & ~empty, g.dlse + bh * p.across_m + m + v * SIDE);
  }
  const bool scored = g.dscores && (p.received || m == 0);
  const __m512 scale = _mm512_set1_ps(p.scale * LOG2_E);
  const __mmask16 lanes_scored = !scored ? 0 : p.received ? 0xffff : 1;
  const TileGrid queries{s.queries, TILE, s.deep_k * TILE, 64}, douts{s.douts, TILE, s.deep_v * TILE, 64};
  const int64_t width_k = s.deep_k * DEEP, width_v = s.deep_v * DEEP;
  // tiles of the next keys are made while these are weighed
  const auto make = [&](int64_t n, int part) {
    n += part % 2 * SIDE;
    if (n >= N) return;
    const TileGrid keys{s.keys + n * width_k, DEEP, 0, 2 * width_k};
    const TileGrid values{s.values + n * width_v, DEEP, 0, 2 * width_v};
    if (part < 2) multiply_tiles<1, V>(keys, queries, s.deep_k, false, s.p + n * DEEP, DEEP);
    else multiply_tiles<1, V>(values, douts, s.deep_v, false, s.dp + n * DEEP, DEEP);
  };
  for (int part = 0; part < 4; ++part) make(0, part);
  for (int64_t n = 0; n < N; n += DEEP) {
    const int64_t rows = N - n > SIDE ? DEEP : SIDE;
    const bool some_out = p.bias || N - n < rows;
    for (int part = 0; part < 4; ++part) {
      make(n + DEEP, part);
      weigh<V>(s, n + part * rows / 4, rows / 4, some_out, scale, base, lanes_scored, weights, total);
    }
  }
  for (int v = 0; v < V; ++v) delta[v] += total[v];
  for (int64_t n = 0; n < N; n += DEEP) differentiate<V>(s, n, N - n > SIDE ? DEEP : SIDE, delta, g.dbias, ds);

  const TileGrid pairs{s.ds_pairs, 2 * TILE, TILE, 64};
  int32_t* turned = reinterpret_cast<int32_t*>(s.turned);
  for (int64_t d = 0; d < p.DK; d += DEEP) {
    const TileGrid channels{s.key_channels + d / SIDE * TILE, s.wide_k * TILE, TILE, 64};
    const auto call = p.DK - d > SIDE ? &multiply_tiles<2, 2> : &multiply_tiles<1, 2>;
    call(channels, pairs, padded(N, DEEP) / DEEP, false, s.result, DEEP);
    for (int64_t i = 0; i < DEEP && d + i < p.DK; i += SIDE)
      for (int64_t c = 0; c < DEEP; c += SIDE)
        transpose(s.result + i * DEEP + c, 4 * DEEP, SIDE, 0xffff, turned + c * width_k + d + i, width_k);
  }
  const uint16_t* q = reinterpret_cast<const uint16_t*>(p.head(p.q, b, h)) + m * p.q.stride_n;
  uint16_t* dq = reinterpret_cast<uint16_t*>(p.head(g.dq, b, h)) + m * g.dq.stride_n;
  for (int64_t i = 0; i < count; ++i) {
    const float* row = s.turned + (i / 4 % 2 * SIDE + i / 8 * 4 + i % 4) * width_k;
    for (int64_t d = 0; d < p.DK; d += SIDE) {
      const __mmask16 l = first_of_16(p.DK - d);
      __m512 x = _mm512_load_ps(row + d) * _mm512_set1_ps(p.scale);
      if (p.qk_mask) {
        float* sum = g.dqk_mask + bh * p.DK + d;
        const __m512 more = widened(q + i * p.q.stride_n + d, l) * x;
        _mm512_mask_storeu_ps(sum, l, _mm512_maskz_loadu_ps(l, sum) + more);
        x *= _mm512_maskz_loadu_ps(l, p.qk_mask + h * p.DK + d);
      }
      store_rounded(dq + i * g.dq.stride_n + d, l, x);
    }
  }
}

// sums (add: +)= left^T right for ROWS tiles of keys, over a chunk's blocks of queries
template <int ROWS>
INLINE void add_products(const TileGrid& left, const TileGrid& right, int64_t blocks, int64_t channels, bool add,
                         float* sums, int64_t width) {
  for (int64_t d = 0; d < channels; d += DEEP) {
    const TileGrid columns{right.first + d / SIDE * TILE, right.next, right.across, right.stride};
    if (channels - d > SIDE) multiply_tiles<ROWS, 2>(left, columns, blocks, add, sums + d, width);
    else multiply_tiles<ROWS, 1>(left, columns, blocks, add, sums + d, width);
  }
}

// Rows of sums as rows of a result; `mask`, the values that it masked, and its gradient may be null.
INLINE void store_sums(const float* sums, int64_t width, int64_t count, int64_t channels, float factor,
                       const float* mask, const uint16_t* values, float* dmask, uint16_t* to, int64_t stride) {
  for (int64_t n = 0; n < count; ++n) {
    for (int64_t d = 0; d < channels; d += SIDE) {
      const __mmask16 l = first_of_16(channels - d);
      __m512 x = _mm512_load_ps(sums + n * width + d) * _mm512_set1_ps(factor);
      if (mask) {
        const __m512 more = widened(values + n * width + d, l) * x;
        _mm512_mask_storeu_ps(dmask + d, l, _mm512_maskz_loadu_ps(l, dmask + d) + more);
        x *= _mm512_maskz_loadu_ps(l, mask + d);
      }
      store_rounded(to + n * stride + d, l, x);
    }
  }
}

// The gradients of heads begin to end.
static void attend_backward(const Problem& p, const Gradients& g, int32_t* base, int64_t begin, int64_t end) {
  BackwardScratch s;
  BackwardScratch::layout(p, base, &s);
  const Tiles tiles;
  const int64_t width_k = s.deep_k * DEEP, width_v = s.deep_v * DEEP;
  for (int64_t bh = begin; bh < end; ++bh) {
    const int64_t b = bh / p.H, h = bh % p.H, N = p.lengths ? p.lengths[b] : p.N, rows = padded(N, DEEP);
    const auto head = [&](const Rows& x) { return reinterpret_cast<uint16_t*>(p.head(x, b, h)); };
    const uint16_t *q = head(p.q), *dout = head(g.dout);
    const float* bias = p.bias ? p.bias + b * p.bias_b + h * p.bias_h : nullptr;
    const float* qk_mask = p.qk_mask ? p.qk_mask + h * p.DK : nullptr;
    const float* v_mask = p.v_mask ? p.v_mask + h * p.DV : nullptr;
    for (int64_t n = 0; n < rows; ++n) {
      s.bias[n] = n >= N ? NONE : bias ? bias[n * p.bias_n] * LOG2_E : 0.0f;
      if (g.dscores) s.dscores[n] = n < N && s.bias[n] != NONE ? g.dscores[bh * p.across_n + n] : 0.0f;
    }
    copy_rows(head(p.k), p.k.stride_n, N, p.DK, s.bias, rows, width_k, s.keys);
    copy_rows(head(p.v), p.v.stride_n, N, p.DV, s.bias, rows, width_v, s.values);
    pack_pairs(s.keys, width_k, N, p.DK, s.key_channels);
    for (int64_t t = 0; t < rows / DEEP * s.wide_k; ++t) {
      int32_t* tile = reinterpret_cast<int32_t*>(s.key_channels + t * TILE);
      transpose(tile, 64, SIDE, 0xffff, tile, SIDE);
    }
    if (g.dbias) std::memset(s.dbias, 0, 4 * rows * SIDE);
    if (qk_mask) std::memset(g.dqk_mask + bh * p.DK, 0, 4 * p.DK);
    if (v_mask) std::memset(g.dv_mask + bh * p.DV, 0, 4 * p.DV);

    int64_t m = 0;
    do {
      const bool first = m == 0;
      int64_t blocks = 0;
      for (; blocks < s.chunk && m < p.M; ++blocks, m += DEEP) {
        const int64_t count = p.M - m < DEEP ? p.M - m : DEEP;
        const uint16_t *q_m = q + m * p.q.stride_n, *dout_m = dout + m * g.dout.stride_n;
        pack_pairs(dout_m, g.dout.stride_n, count, p.DV, s.dout_pairs + blocks * s.wide_v * TILE);
        int64_t stride_q = p.q.stride_n, stride_o = g.dout.stride_n;
        dout_m = masked(dout_m, &stride_o, count, p.DV, v_mask, s.masked);
        pack_transposed(dout_m, stride_o, count, p.DV, s.douts);
        q_m = masked(q_m, &stride_q, count, p.DK, qk_mask, s.masked);
        pack_transposed(q_m, stride_q, count, p.DK, s.queries);
        pack_pairs(q_m, stride_q, count, p.DK, s.query_pairs + blocks * s.wide_k * TILE);
        const auto call = count > SIDE ? &attend_backward_block<2> : &attend_backward_block<1>;
        call(p, g, s, N, b, h, m, count, s.weights + blocks * rows * DEEP, s.ds + blocks * rows * DEEP);
      }
      for (int64_t n = 0; n < N; n += DEEP) {
        const TileGrid weights{s.weights + n * DEEP, rows * DEEP, TILE, 64}, ds{s.ds + n * DEEP, rows * DEEP, TILE, 64};
        const TileGrid douts{s.dout_pairs, s.wide_v * TILE, TILE, 64};
        const TileGrid queries{s.query_pairs, s.wide_k * TILE, TILE, 64};
        float *dv = s.dv + n * width_v, *dk = s.dk + n * width_k;
        const auto call = N - n > SIDE ? &add_products<2> : &add_products<1>;
        call(weights, douts, blocks, p.DV, !first, dv, width_v);
        call(ds, queries, blocks, p.DK, !first, dk, width_k);
        if (m < p.M) continue;
        const int64_t count = N - n < DEEP ? N - n : DEEP;
        store_sums(dv, width_v, count, p.DV, 1.0f, v_mask, s.values + n * width_v,
                   v_mask ? g.dv_mask + bh * p.DV : nullptr, head(g.dv) + n * g.dv.stride_n, g.dv.stride_n);
        store_sums(dk, width_k, count, p.DK, p.scale, nullptr, nullptr, nullptr, head(g.dk) + n * g.dk.stride_n,
                   g.dk.stride_n);
      }
    } while (m < p.M);
    for (int64_t n = N; n < p.N; ++n) {
      std::memset(head(g.dk) + n * g.dk.stride_n, 0, 2 * p.DK);
      std::memset(head(g.dv) + n * g.dv.stride_n, 0, 2 * p.DV);
    }
    for (int64_t n = 0; g.dbias && n < p.N; ++n) {
      g.dbias[bh * p.across_n + n] = n < N ? _mm512_reduce_add_ps(_mm512_load_ps(s.dbias + n * SIDE)) : 0.0f;
    }
  }
}
