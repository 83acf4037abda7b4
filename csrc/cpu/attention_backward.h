// The backward pass; a part of attention_variant.h, inside its namespace.
//
// A block of queries keeps P and dP transposed, a row a key, so D = sum of P * dP is a sum down the rows, and exact. dq
// is a product along the keys, as out was; dk and dv are products along the queries, added to sums that last for a
// head.

struct BackwardScratch {
  int64_t words_k, words_v, words_n, rows_n, rows_k, wide_k, wide_v;
  int32_t *keys, *values, *key_channels, *queries, *douts, *query_channels, *dout_channels;
  int32_t *row, *weights, *halves, *left;
  float *p, *ds, *result, *dk, *dv, *dbias;

  static int64_t layout(const Problem& p, int32_t* base, BackwardScratch* s) {
    BackwardScratch t;
    t.words_k = padded(words_of(p.DK), ROWS), t.words_v = padded(words_of(p.DV), ROWS), t.words_n = words_of(p.N);
    t.rows_n = padded(p.N, ROWS), t.rows_k = padded(p.DK, ROWS);
    t.wide_k = padded(p.DK, WIDTH), t.wide_v = padded(p.DV, WIDTH);
    int64_t at = 0;
    const auto take = [&](int64_t words) {
      int32_t* part = base + at;
      at += padded(words, 16);
      return part;
    };
    const auto floats = [&](int64_t words) { return reinterpret_cast<float*>(take(words)); };
    t.keys = take(t.rows_n * t.words_k), t.values = take(t.rows_n * t.words_v);
    t.key_channels = take(t.rows_k * t.words_n);
    t.queries = take(t.words_k * WIDTH), t.douts = take(t.words_v * WIDTH);
    t.query_channels = take(t.wide_k * words_of(WIDTH)), t.dout_channels = take(t.wide_v * words_of(WIDTH));
    t.row = take(WIDTH * padded(p.DK > p.DV ? p.DK : p.DV, ROWS));
    t.p = floats(t.rows_n * WIDTH), t.ds = floats(t.rows_n * WIDTH);
    t.weights = PAIRS ? take(t.words_n * WIDTH) : reinterpret_cast<int32_t*>(t.ds);
    t.halves = take(ROWS * WIDTH), t.left = take(ROWS * WIDTH);
    t.result = floats(t.rows_k * WIDTH);
    t.dk = floats(t.rows_n * t.wide_k), t.dv = floats(t.rows_n * t.wide_v);
    t.dbias = floats(p.N * LANES);
    if (s) *s = t;
    return at;
  }
};

// sums[n][d] += sum over the block's queries of rows[n][i] * columns[i][d], for `channels` of them
template <int V>
INLINE void add_products(const BackwardScratch& s, const float* rows, const int32_t* columns, int64_t N,
                         int64_t channels, float* sums) {
  constexpr int64_t queries = V * LANES;
  for (int64_t n = 0; n < N; n += ROWS) {
#if PAIRS
    uint16_t* halves = reinterpret_cast<uint16_t*>(s.halves);
    for (int64_t r = 0; r < ROWS; ++r)
      for (int64_t i = 0; i < queries; ++i) halves[r * WIDTH + i] = to_bfloat16(rows[(n + r) * WIDTH + i]);
    transpose(s.halves, ROWS, queries / 2, WIDTH / 2, s.left, ROWS);
#else
    transpose(reinterpret_cast<const int32_t*>(rows) + n * WIDTH, ROWS, queries, WIDTH, s.left, ROWS);
#endif
    for (int64_t d = 0; d < channels; d += WIDTH) {
      const auto add = [&](auto lanes) {
        constexpr int L = decltype(lanes)::value;
        Floats c[ROWS][L];
        product<L>(s.left, columns + d * words_of(WIDTH), words_of(queries), c);
#pragma GCC unroll 8
        for (int r = 0; r < ROWS; ++r) {
          for (int v = 0; v < L; ++v) {
            float* at = sums + d * s.rows_n + (n + r) * WIDTH + v * LANES;
            write(at, read(at) + c[r][v]);
          }
        }
      };
      if (channels - d > LANES) add(std::integral_constant<int, 2>());
      else add(std::integral_constant<int, 1>());
    }
  }
}

// The gradients of `count` queries from m on, V vectors of them: dq is written, the others are added to.
template <int V>
INLINE void attend_backward_block(const Problem& p, const Gradients& g, const BackwardScratch& s, const float* bias,
                                  int64_t N, int64_t b, int64_t h, int64_t m, int64_t count) {
  const int64_t bh = b * p.H + h, size = p.size_of_element();
  const float* dscores = g.dscores && (p.received || m == 0) ? g.dscores + bh * p.across_n : nullptr;
  Floats base[V], delta[V], first = {};
  for (int64_t i = 0; i < V * LANES; ++i) {
    const float lse = i < count ? p.lse[bh * p.across_m + m + i] : -NONE;  // without a query there are no weights
    base[i / LANES][i % LANES] = lse == NONE ? 0.0f : lse;
    delta[i / LANES][i % LANES] = i < count && g.dlse ? -g.dlse[bh * p.across_m + m + i] : 0.0f;
  }
  first[0] = 1.0f;

  for (int64_t start = 0; start < N; start += CHUNK) {
    const int64_t end = start + CHUNK < N ? start + CHUNK : N;
    Floats part[V] = {};
    for (int64_t n = start; n < end; n += ROWS) {
      Floats c[ROWS][V], weight[ROWS][V];
      product<V>(s.keys + n * s.words_k, s.queries, words_of(p.DK), c);
#pragma GCC unroll 8
      for (int r = 0; r < ROWS; ++r) {
        const float add = bias && n + r < N ? bias[(n + r) * p.bias_n] : 0.0f;
        for (int v = 0; v < V; ++v) {
          weight[r][v] = n + r < N && add != NONE ? exp_negative(c[r][v] * p.scale + add - base[v]) : Floats{};
          write(s.p + (n + r) * WIDTH + v * LANES, weight[r][v]);
        }
      }
      product<V>(s.values + n * s.words_v, s.douts, words_of(p.DV), c);
#pragma GCC unroll 8
      for (int r = 0; r < ROWS; ++r) {
        const bool counts = dscores && n + r < N && !(bias && bias[(n + r) * p.bias_n] == NONE);
        const float add = counts ? dscores[n + r] : 0.0f;  // where it does not, it may be anything
        for (int v = 0; v < V; ++v) {
          if (dscores) c[r][v] += p.received ? Floats{} + add : v == 0 ? first * add : Floats{};
          if (n + r < N) part[v] += weight[r][v] * c[r][v];
          write(s.ds + (n + r) * WIDTH + v * LANES, c[r][v]);
        }
      }
    }
    for (int v = 0; v < V; ++v) delta[v] += part[v];
  }
  for (int64_t n = 0; n < N; ++n) {
    Floats sum = {};
    for (int v = 0; v < V; ++v) {
      float* at = s.ds + n * WIDTH + v * LANES;
      const Floats ds = read(s.p + n * WIDTH + v * LANES) * (read(at) - delta[v]);
      write(at, ds);
      sum += ds;
    }
    if (g.dbias) write(s.dbias + n * LANES, read(s.dbias + n * LANES) + sum);
  }
#if PAIRS
  for (int64_t n = 0; n < N; n += 2) {
    for (int v = 0; v < V; ++v) {
      const float* at = s.ds + n * WIDTH + v * LANES;
      write(s.weights + n / 2 * WIDTH + v * LANES, paired(read(at), n + 1 < N ? read(at + WIDTH) : Floats{}));
    }
  }
#endif

  for (int64_t c = 0; c < p.DK; c += ROWS) {
    Floats sum[ROWS][V];
    long_product<V>(s.key_channels + c * s.words_n, s.weights, N, sum);
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; ++r)
      for (int v = 0; v < V; ++v) write(s.result + (c + r) * WIDTH + v * LANES, sum[r][v] * p.scale);
  }
  transpose(reinterpret_cast<const int32_t*>(s.result), s.rows_k, V * LANES, WIDTH, s.row, s.rows_k);
  float* dq = reinterpret_cast<float*>(s.row);
  for (int64_t i = 0; i < count; ++i, dq += s.rows_k) {
    if (p.qk_mask) {
      float* q = s.result;  // free by now
      load_floats(p.type, p.head(p.q, b, h) + (m + i) * p.q.stride_n * size, p.DK, nullptr, q);
      for (int64_t c = 0; c < p.DK; ++c) g.dqk_mask[bh * p.DK + c] += q[c] * dq[c];
      for (int64_t c = 0; c < p.DK; ++c) dq[c] *= p.qk_mask[h * p.DK + c];
    }
    store_row(p.type, dq, p.DK, p.head(g.dq, b, h) + (m + i) * g.dq.stride_n * size);
  }
  add_products<V>(s, s.p, s.dout_channels, N, p.DV, s.dv);
  add_products<V>(s, s.ds, s.query_channels, N, p.DK, s.dk);
}

// Sums over a head as the rows of a result; `mask`, the values they were masked from, and the mask's gradient may be
// null.
INLINE void store_sums(const Problem& p, const BackwardScratch& s, const float* sums, int64_t channels, int64_t N,
                       float factor, const float* mask, const char* values, int64_t value_stride, float* dmask,
                       char* to, int64_t stride) {
  float* row = reinterpret_cast<float*>(s.row);
  float* value = s.result;
  for (int64_t n = 0; n < p.N; ++n) {
    for (int64_t d = 0; d < channels; ++d) {
      row[d] = n < N ? sums[d / WIDTH * WIDTH * s.rows_n + n * WIDTH + d % WIDTH] * factor : 0.0f;
    }
    if (mask && n < N) {
      load_floats(p.type, values + n * value_stride, channels, nullptr, value);
      for (int64_t d = 0; d < channels; ++d) dmask[d] += value[d] * row[d];
      for (int64_t d = 0; d < channels; ++d) row[d] *= mask[d];
    }
    store_row(p.type, row, channels, to + n * stride);
  }
}

// Zeros as the keys that have no weight, whatever they hold: in a product along the keys, 0 times NaN would stay NaN.
INLINE void forget_keys(const BackwardScratch& s, const float* bias, int64_t stride, int64_t N) {
  for (int64_t n = 0; n < N; ++n) {
    if (bias[n * stride] != NONE) continue;
    const int32_t kept = !PAIRS ? 0 : n % 2 ? 0x0000ffff : static_cast<int32_t>(0xffff0000u);
    for (int64_t d = 0; d < s.rows_k; d += ROWS) {
      for (int64_t r = 0; r < ROWS; ++r) s.key_channels[d * s.words_n + (PAIRS ? n / 2 : n) * ROWS + r] &= kept;
    }
  }
}

// The gradients of heads begin to end.
static void attend_backward(const Problem& p, const Gradients& g, int32_t* base, int64_t begin, int64_t end) {
  BackwardScratch s;
  BackwardScratch::layout(p, base, &s);
  const int64_t size = p.size_of_element();
  for (int64_t bh = begin; bh < end; ++bh) {
    const int64_t b = bh / p.H, h = bh % p.H, N = p.lengths ? p.lengths[b] : p.N;
    const char *q = p.head(p.q, b, h), *k = p.head(p.k, b, h), *v = p.head(p.v, b, h), *dout = p.head(g.dout, b, h);
    const int64_t stride_q = p.q.stride_n * size, stride_k = p.k.stride_n * size, stride_v = p.v.stride_n * size;
    const int64_t stride_o = g.dout.stride_n * size;
    const float* bias = p.bias ? p.bias + b * p.bias_b + h * p.bias_h : nullptr;
    const float* qk_mask = p.qk_mask ? p.qk_mask + h * p.DK : nullptr;
    const float* v_mask = p.v_mask ? p.v_mask + h * p.DV : nullptr;
    pack_by_rows(p.type, k, stride_k, N, p.DK, s.words_k, s.row, s.keys);
    pack_by_rows(p.type, v, stride_v, N, p.DV, s.words_v, s.row, s.values);
    pack_by_channels(p.type, k, stride_k, N, p.DK, nullptr, ROWS, s.words_n, s.row, s.key_channels);
    if (bias) forget_keys(s, bias, p.bias_n, N);
    std::memset(s.dk, 0, 4 * s.rows_n * s.wide_k), std::memset(s.dv, 0, 4 * s.rows_n * s.wide_v);
    std::memset(s.dbias, 0, 4 * p.N * LANES);
    for (int64_t c = 0; p.qk_mask && c < p.DK; ++c) g.dqk_mask[bh * p.DK + c] = 0.0f;
    for (int64_t d = 0; p.v_mask && d < p.DV; ++d) g.dv_mask[bh * p.DV + d] = 0.0f;

    for (int64_t m = 0; m < p.M; m += WIDTH) {
      const int64_t count = p.M - m < WIDTH ? p.M - m : WIDTH, wide = count > LANES ? WIDTH : LANES;
      const char *q_m = q + m * stride_q, *dout_m = dout + m * stride_o;
      load_columns(p.type, q_m, stride_q, count, wide, p.DK, qk_mask, s.words_k, s.row, s.queries, WIDTH);
      load_columns(p.type, dout_m, stride_o, count, wide, p.DV, v_mask, s.words_v, s.row, s.douts, WIDTH);
      if (count < WIDTH) {
        std::memset(s.query_channels, 0, 4 * s.wide_k * words_of(WIDTH));
        std::memset(s.dout_channels, 0, 4 * s.wide_v * words_of(WIDTH));
      }
      pack_by_channels(p.type, q_m, stride_q, count, p.DK, qk_mask, WIDTH, words_of(WIDTH), s.row, s.query_channels);
      pack_by_channels(p.type, dout_m, stride_o, count, p.DV, nullptr, WIDTH, words_of(WIDTH), s.row, s.dout_channels);
      const auto call = wide == WIDTH ? &attend_backward_block<2> : &attend_backward_block<1>;
      call(p, g, s, bias, N, b, h, m, count);
    }
    store_sums(p, s, s.dk, p.DK, N, p.scale, nullptr, nullptr, 0, nullptr, p.head(g.dk, b, h), g.dk.stride_n * size);
    store_sums(p, s, s.dv, p.DV, N, 1.0f, v_mask, v, stride_v, v_mask ? g.dv_mask + bh * p.DV : nullptr,
               p.head(g.dv, b, h), g.dv.stride_n * size);
    for (int64_t n = 0; g.dbias && n < p.N; ++n) {
      float sum = 0.0f;
      for (int64_t l = 0; l < LANES; ++l) sum += s.dbias[n * LANES + l];
      g.dbias[bh * p.across_n + n] = sum;
    }
  }
}
