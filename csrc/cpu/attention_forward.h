// The forward pass; a part of attention_variant.h, inside its namespace.

// Words of one thread's scratch, each part aligned to a vector.
struct Scratch {
  int64_t words_k, words_v, rows_n, rows_d;  // words of a row of k; rows of words of v; keys and channels, padded
  int32_t *keys, *values, *queries, *row, *logits, *weights, *result;
  float* received;

  static int64_t layout(const Problem& p, int32_t* base, Scratch* s) {
    Scratch t;
    t.words_k = padded(words_of(p.DK), ROWS);
    t.words_v = words_of(p.N);
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

// The attention of `count` queries, V vectors of them.
template <int V>
INLINE void attend_block(const Problem& p, const Scratch& s, const float* bias, int64_t N, int64_t count, int64_t h,
                         bool first, float* lse, float* scores) {
  float* logits = reinterpret_cast<float*>(s.logits);
  Floats high[V], total[V], inverse[V];
  for (int v = 0; v < V; ++v) high[v] = Floats{} + NONE, total[v] = Floats{};

  for (int64_t n = 0; n < N; n += ROWS) {
    Floats c[ROWS][V];
    product<V>(s.keys + n * s.words_k, s.queries, words_of(p.DK), c);
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; ++r) {
      const float add = bias && n + r < N ? bias[(n + r) * p.bias_n] : 0.0f;
      for (int v = 0; v < V; ++v) {
        c[r][v] = c[r][v] * p.scale + add;
        if (__builtin_expect(add == NONE, 0)) c[r][v] = Floats{} + NONE;  // the product may be NaN
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
        write(s.weights + n / 2 * WIDTH + v * LANES, paired(a, b));
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
  for (int64_t i = 0; lse && i < count; ++i) {
    const float sum = total[i / LANES][i % LANES];
    lse[i] = sum == 0.0f ? NONE : high[i / LANES][i % LANES] + __builtin_logf(sum);
  }
  const auto counts = [&](int64_t n) { return !bias || bias[n * p.bias_n] != NONE; };
  if (keep && p.received) {
    for (int64_t n = 0; n < N; ++n) {
      if (!counts(n)) continue;
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
    for (int64_t n = 0; n < N; ++n) scores[n] = counts(n) ? logits[n * WIDTH] * inverse[0][0] : 0.0f;
  }

  float* result = reinterpret_cast<float*>(s.result);
  for (int64_t d = 0; d < p.DV; d += ROWS) {
    Floats sum[ROWS][V];
    long_product<V>(s.values + d * s.words_v, s.weights, N, sum);
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
    float* scores = p.scores ? p.scores + bh * p.across_n : nullptr;
    if (task == begin || part == 0) {
      pack_by_rows(p.type, p.head(p.k, b, h), p.k.stride_n * size, N, p.DK, s.words_k, s.row, s.keys);
      pack_by_channels(p.type, p.head(p.v, b, h), p.v.stride_n * size, N, p.DV, nullptr, ROWS, s.words_v, s.row,
                       s.values);
    }
    if (p.received) std::memset(s.received, 0, 4 * N * LANES);
    for (int64_t block = blocks * part / p.splits; block < blocks * (part + 1) / p.splits; ++block) {
      const int64_t m = block * WIDTH, count = p.M - m < WIDTH ? p.M - m : WIDTH, wide = count > LANES ? WIDTH : LANES;
      const float* mask = p.qk_mask ? p.qk_mask + h * p.DK : nullptr;
      load_columns(p.type, q + m * p.q.stride_n * size, p.q.stride_n * size, count, wide, p.DK, mask, s.words_k, s.row,
                   s.queries, WIDTH);
      const auto call = wide == WIDTH ? &attend_block<2> : &attend_block<1>;
      call(p, s, bias, N, count, h, block == 0, p.lse ? p.lse + bh * p.across_m + m : nullptr, scores);
      transpose(s.result, s.rows_d, wide, WIDTH, s.row, s.rows_d);
      const float* rows = reinterpret_cast<const float*>(s.row);
      for (int64_t i = 0; i < count; ++i) {
        store_row(p.type, rows + i * s.rows_d, p.DV, out + (m + i) * p.out.stride_n * size);
      }
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
