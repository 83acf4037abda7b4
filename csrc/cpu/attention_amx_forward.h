// The forward pass on tiles; a part of attention_amx.h, inside its namespace.
//
// Queries go in blocks of 32, their keys in chunks. While vectors make the weights of a chunk from its logits, the
// tiles work on the products of its neighbours, a step at a time: the result of the chunk before, then the logits of
// the chunk after. Weights are powers of the logits themselves, not of what they are above the highest; a block where
// these are too large or too small is done again, carefully. A result is divided by the sum of the rounded weights that
// it is made of, so that they add up to one; scores and lse take the sum of the weights as floats.

constexpr int64_t CHUNK = 224;  // keys, a multiple of 32

// Words of one thread's scratch, each part aligned to a vector. Three heads may be under way at once.
struct Scratch {
  int64_t rows, deep, wide;  // keys, padded to 32; tiles of the channels of k, along them; of v, across them
  uint16_t *keys[3], *values[3], *queries, *weights[2], *all_weights;
  float *logits[2], *all_logits, *bias[3], *bias2[3], *kept, *received, *result;
  float *sums, *exact, *inverse, *share;  // 1 / sums, for results and for scores

  static int64_t layout(const Problem& p, int32_t* base, Scratch* s) {
    Scratch t;
    t.rows = padded(p.N, DEEP), t.deep = padded(p.DK, DEEP) / DEEP, t.wide = padded(p.DV, 2 * SIDE) / SIDE;
    int64_t at = 0;
    const auto take = [&](int64_t words) {
      int32_t* part = base + at;
      at += padded(words, 16);
      return part;
    };
    const auto halves = [&](int64_t n) { return reinterpret_cast<uint16_t*>(take(n / 2)); };
    const auto floats = [&](int64_t n) { return reinterpret_cast<float*>(take(n)); };
    for (int i = 0; i < 3; ++i) {
      t.keys[i] = halves(t.rows * t.deep * DEEP), t.values[i] = halves(t.rows * t.wide * SIDE);
      t.bias[i] = floats(p.bias ? t.rows : 0), t.bias2[i] = floats(p.bias ? t.rows : 0);
    }
    t.queries = halves(2 * BLOCK * t.deep * DEEP);
    for (int i = 0; i < 2; ++i) t.weights[i] = halves(BLOCK * CHUNK), t.logits[i] = floats(BLOCK * CHUNK);
    t.result = floats(BLOCK * t.wide * SIDE);
    t.sums = floats(BLOCK * SIDE), t.exact = floats(BLOCK * SIDE);
    t.inverse = floats(BLOCK), t.share = floats(BLOCK);
    t.received = floats(p.received ? t.rows : 0);
    t.kept = floats(p.received ? BLOCK * t.rows : p.scores ? 4 * t.rows : 0);
    t.all_weights = halves(BLOCK * t.rows), t.all_logits = floats(BLOCK * t.rows);
    if (s) *s = t;
    return at;
  }
};

struct Head {
  int64_t b, h, N;
  const uint16_t *keys, *values;
  const float *bias, *bias2;  // with zeros behind them; and times log2(e), no less than the least float or -inf
  float* scores;
};

// `count` queries of a head, from m on, and `keys` of its keys, from n on.
struct Chunk {
  const Head* head;
  int64_t m, count, n, keys;
  bool first, last;  // block of its head
  bool done;         // and stored
  const uint16_t* queries;
  int64_t query_stride;
  uint16_t* weights;  // tiles, as logits are: [key / 32 or 16][query / 16]
  float* logits;
  bool ends() const { return n + keys >= head->N; }
};

// Steps of products, each worth as much as another: `weights` times values, then queries times keys.
struct Steps {
  int64_t results = 0, logits = 0;  // how many there are of either kind
  int64_t n = 0, d = 0;             // the next
  const uint16_t *weights, *values, *queries, *keys;
  float *result, *to;
  int64_t result_stride, query_stride, wide, deep, pairs;
  bool add, two_results, two_logits;  // to the result; two rows of tiles, of more than 16 queries
  int64_t all() const { return results + logits; }
};

// 32 keys of the weights, 32 channels of the values
INLINE void result_step(Steps& s) {
  const uint16_t *a = s.weights + s.n * 2 * TILE, *b = s.values + (s.n * s.wide + s.d) * TILE;
  float *to = s.result + s.d * SIDE, *to2 = to + SIDE * s.result_stride / 4;
  if (s.n == 0 && s.add) {
    TILE_LOAD(0, to, s.result_stride);
    TILE_LOAD(1, to + SIDE, s.result_stride);
    if (s.two_results) {
      TILE_LOAD(2, to2, s.result_stride);
      TILE_LOAD(3, to2 + SIDE, s.result_stride);
    }
  } else if (s.n == 0) {
    TILE_ZERO(0);
    TILE_ZERO(1);
    TILE_ZERO(2);
    TILE_ZERO(3);
  }
  TILE_LOAD(4, a, 64);
  TILE_LOAD(6, b, 64);
  TILE_PRODUCT(0, 4, 6);
  TILE_LOAD(7, b + TILE, 64);
  TILE_PRODUCT(1, 4, 7);
  if (s.two_results) {
    TILE_LOAD(5, a + TILE, 64);
    TILE_PRODUCT(2, 5, 6);
    TILE_PRODUCT(3, 5, 7);
  }
  if (++s.n == s.pairs) {
    TILE_STORE(0, to, s.result_stride);
    TILE_STORE(1, to + SIDE, s.result_stride);
    if (s.two_results) {
      TILE_STORE(2, to2, s.result_stride);
      TILE_STORE(3, to2 + SIDE, s.result_stride);
    }
    s.n = 0, s.d += 2;
  }
}

// the logits of 16 keys; the queries stay where they have no more than 64 channels
INLINE void logits_step(Steps& s) {
  const uint16_t *a = s.queries, *a2 = a + SIDE * s.query_stride / 2, *b = s.keys + s.n * s.deep * TILE;
  const bool load = s.n == 0 || s.deep > 2;
  TILE_ZERO(0);
  TILE_ZERO(1);
  for (int64_t d = 0; d < s.deep; d += 2) {
    if (load) {
      TILE_LOAD(4, a + d * DEEP, s.query_stride);
      if (s.two_logits) TILE_LOAD(6, a2 + d * DEEP, s.query_stride);
    }
    TILE_LOAD(2, b + d * TILE, 64);
    TILE_PRODUCT(0, 4, 2);
    if (s.two_logits) TILE_PRODUCT(1, 6, 2);
    if (d + 1 == s.deep) break;
    if (load) {
      TILE_LOAD(5, a + (d + 1) * DEEP, s.query_stride);
      if (s.two_logits) TILE_LOAD(7, a2 + (d + 1) * DEEP, s.query_stride);
    }
    TILE_LOAD(3, b + (d + 1) * TILE, 64);
    TILE_PRODUCT(0, 5, 3);
    if (s.two_logits) TILE_PRODUCT(1, 7, 3);
  }
  float* to = s.to + s.n * TILE;
  TILE_STORE(0, to, 64);
  if (s.two_logits) TILE_STORE(1, to + TILE / 2, 64);
  ++s.n;
}

INLINE void step(Steps& s) {
  if (s.results) --s.results, result_step(s);
  else --s.logits, logits_step(s);
}

// The weights of four queries, a row of logits each, and their sums: a vector a row. Calls tick() after every 32 keys.
// EXACT, there are sums of the floats besides those of the rounded; kept are the weights as floats.
template <bool EXACT, bool BIAS, bool KEEP, typename Tick>
INLINE void exponentials(const Scratch& s, const Chunk& chunk, int64_t i, float factor, const Tick& tick) {
  const float *logits = chunk.logits + i * SIDE, *bias2 = chunk.head->bias2 + chunk.n;
  uint16_t* weights = chunk.weights + i * DEEP;
  float* kept = s.kept + i * s.rows + chunk.n;
  const __m512 c = _mm512_set1_ps(factor);
  const __m512bh ones = (__m512bh)_mm512_set1_epi16(0x3f80);
  __m512 sum[4], exact[4];
  const auto part = [&](int64_t n, bool rest, __mmask16 low, __mmask16 high) __attribute__((always_inline)) {
    __m512 add_low, add_high;
    if (BIAS) {  // the product may be NaN where the key has no weight
      add_low = _mm512_loadu_ps(bias2 + n), add_high = _mm512_loadu_ps(bias2 + n + SIDE);
      low &= _mm512_cmp_ps_mask(add_low, _mm512_set1_ps(NONE), _CMP_NEQ_UQ);
      high &= _mm512_cmp_ps_mask(add_high, _mm512_set1_ps(NONE), _CMP_NEQ_UQ);
    }
#pragma GCC unroll 4
    for (int r = 0; r < 4; ++r) {
      const float* at = logits + n * BLOCK + r * SIDE;
      __m512 a = _mm512_loadu_ps(at), b = _mm512_loadu_ps(at + TILE);
      a = exp2_of<EXACT ? 5 : 3>(BIAS ? _mm512_mask3_fmadd_ps(a, c, add_low, low) : _mm512_mul_ps(a, c));
      b = exp2_of<EXACT ? 5 : 3>(BIAS ? _mm512_mask3_fmadd_ps(b, c, add_high, high) : _mm512_mul_ps(b, c));
      if (rest) a = _mm512_maskz_mov_ps(low, a), b = _mm512_maskz_mov_ps(high, b);
      if (EXACT) exact[r] = _mm512_add_ps(exact[r], _mm512_add_ps(a, b));
      if (KEEP) _mm512_storeu_ps(kept + r * s.rows + n, a), _mm512_storeu_ps(kept + r * s.rows + n + SIDE, b);
      const __m512bh both = _mm512_cvtne2ps_pbh(b, a);
      sum[r] = _mm512_dpbf16_ps(sum[r], both, ones);
      _mm512_storeu_si512(weights + n * BLOCK + r * DEEP, (__m512i)both);
    }
    tick();
  };
  const auto at = [&](float* sums, int r) { return sums + (i + r) * SIDE; };
#pragma GCC unroll 4
  for (int r = 0; r < 4; ++r) {
    sum[r] = chunk.n ? _mm512_loadu_ps(at(s.sums, r)) : _mm512_setzero_ps();
    if (EXACT) exact[r] = chunk.n ? _mm512_loadu_ps(at(s.exact, r)) : _mm512_setzero_ps();
  }
  int64_t n = 0;
  for (; n + DEEP <= chunk.keys; n += DEEP) part(n, false, 0xffff, 0xffff);
  if (n < chunk.keys) part(n, true, first_of_16(chunk.keys - n), first_of_16(chunk.keys - n - SIDE));
#pragma GCC unroll 4
  for (int r = 0; r < 4; ++r) {
    _mm512_storeu_ps(at(s.sums, r), sum[r]);
    if (EXACT) _mm512_storeu_ps(at(s.exact, r), exact[r]);
  }
}

// From the logits of a chunk its weights and their sums; beside it, all the steps.
template <bool EXACT, bool BIAS>
static void make_weights(const Problem& p, const Scratch& s, const Chunk& chunk, Steps& steps) {
  const int64_t units = padded(chunk.count, 4) / 4 * (padded(chunk.keys, DEEP) / DEEP), each = steps.all();
  int64_t due = 0;
  const auto tick = [&]() __attribute__((always_inline)) {
    for (due += each; due >= units; due -= units) step(steps);
  };
  for (int64_t i = 0; i < chunk.count; i += 4) {
    const bool keep = chunk.head->scores && (p.received || (chunk.first && i == 0));
    if (keep) exponentials<true, BIAS, true>(s, chunk, i, p.scale * LOG2_E, tick);
    else exponentials<EXACT, BIAS, false>(s, chunk, i, p.scale * LOG2_E, tick);
  }
  while (steps.all()) step(steps);
}

// The queries of a block, where tiles can read them: in place, or copied with zeros around them.
INLINE void load_queries(const Problem& p, const Scratch& s, Chunk& block, uint16_t* to) {
  const uint16_t* from = reinterpret_cast<const uint16_t*>(p.head(p.q, block.head->b, block.head->h));
  from += block.m * p.q.stride_n;
  block.queries = from, block.query_stride = 2 * p.q.stride_n;
  if (!p.qk_mask && p.DK % DEEP == 0 && block.count % SIDE == 0) return;
  block.queries = to, block.query_stride = 2 * s.deep * DEEP;
  const float* mask = p.qk_mask ? p.qk_mask + block.head->h * p.DK : nullptr;
  for (int64_t i = 0; i < padded(block.count, SIDE); ++i) {
    for (int64_t d = 0; d < p.DK; d += DEEP) {
      const int64_t left = p.DK - d;
      const __mmask32 m = i >= block.count ? 0 : left >= DEEP ? ~0u : (1u << left) - 1;
      __m512i x = _mm512_maskz_loadu_epi16(m, from + i * p.q.stride_n + d);
      if (mask) {
        const __m512 low = (__m512)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm512_castsi512_si256(x)), 16);
        const __m512 high = (__m512)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64(x, 1)), 16);
        x = (__m512i)_mm512_cvtne2ps_pbh(
            _mm512_mul_ps(high, _mm512_maskz_loadu_ps(first_of_16(left - SIDE), mask + d + SIDE)),
            _mm512_mul_ps(low, _mm512_maskz_loadu_ps(first_of_16(left), mask + d)));
      }
      _mm512_storeu_si512(to + i * s.deep * DEEP + d, x);
    }
  }
}

INLINE void steps_of_result(const Scratch& s, const Chunk& chunk, Steps& steps) {
  steps.weights = chunk.weights, steps.add = chunk.n != 0;
  steps.values = chunk.head->values + chunk.n / DEEP * s.wide * TILE;
  steps.result = s.result, steps.result_stride = 4 * s.wide * SIDE, steps.wide = s.wide;
  steps.pairs = padded(chunk.keys, DEEP) / DEEP, steps.results = steps.pairs * s.wide / 2;
  steps.two_results = chunk.count > SIDE;
}

INLINE void steps_of_logits(const Scratch& s, const Chunk& chunk, Steps& steps) {
  steps.queries = chunk.queries, steps.query_stride = chunk.query_stride;
  steps.keys = chunk.head->keys + chunk.n / SIDE * s.deep * TILE, steps.deep = s.deep;
  steps.to = chunk.logits;
  steps.logits = padded(chunk.keys, SIDE) / SIDE, steps.two_logits = chunk.count > SIDE;
}

INLINE void store_result(const Problem& p, const Scratch& s, const Chunk& block) {
  uint16_t* out = reinterpret_cast<uint16_t*>(p.head(p.out, block.head->b, block.head->h)) + block.m * p.out.stride_n;
  const float* mask = p.v_mask ? p.v_mask + block.head->h * p.DV : nullptr;
  for (int64_t i = 0; i < block.count; ++i) {
    const __m512 share = _mm512_set1_ps(s.inverse[i]);
    for (int64_t d = 0; d < p.DV; d += DEEP) {
      const float* at = s.result + i * s.wide * SIDE + d;
      const int64_t left = p.DV - d;
      __m512 low = _mm512_mul_ps(share, _mm512_loadu_ps(at)), high = _mm512_mul_ps(share, _mm512_loadu_ps(at + SIDE));
      if (mask) {
        low = _mm512_mul_ps(low, _mm512_maskz_loadu_ps(first_of_16(left), mask + d));
        high = _mm512_mul_ps(high, _mm512_maskz_loadu_ps(first_of_16(left - SIDE), mask + d + SIDE));
      }
      const __mmask32 m = left >= DEEP ? ~0u : (1u << left) - 1;
      _mm512_mask_storeu_epi16(out + i * p.out.stride_n + d, m, (__m512i)_mm512_cvtne2ps_pbh(high, low));
    }
  }
}

// Of the weights kept: scores of query 0, or what the keys received.
INLINE void store_scores(const Problem& p, const Scratch& s, const Chunk& block) {
  const Head& head = *block.head;
  if (p.received && block.first) std::memset(s.received, 0, 4 * s.rows);
  for (int64_t n = 0; n < head.N; n += SIDE) {
    __mmask16 counts = first_of_16(head.N - n);
    if (head.bias) counts &= _mm512_cmp_ps_mask(_mm512_loadu_ps(head.bias + n), _mm512_set1_ps(NONE), _CMP_NEQ_UQ);
    __m512 sum = _mm512_setzero_ps();
    for (int64_t i = 0; i < (p.received ? block.count : 1); ++i) {
      const __m512 weight = _mm512_loadu_ps(s.kept + i * s.rows + n);
      sum = _mm512_mask3_fmadd_ps(weight, _mm512_set1_ps(s.share[i]), sum, counts);
    }
    if (p.received) {
      sum = _mm512_add_ps(sum, _mm512_loadu_ps(s.received + n));
      _mm512_storeu_ps(s.received + n, sum);
      sum = _mm512_div_ps(sum, _mm512_set1_ps(p.M));
    }
    if (!p.received || block.last) _mm512_mask_storeu_ps(head.scores + n, first_of_16(head.N - n), sum);
  }
}

// A block from the beginning, by what each of its logits is above the highest, and as it is stored.
static __attribute__((noinline)) void do_carefully(const Problem& p, const Scratch& s, Chunk& block) {
  const Head& head = *block.head;
  block.n = 0, block.keys = head.N, block.logits = s.all_logits, block.weights = s.all_weights, block.done = true;
  load_queries(p, s, block, s.queries + BLOCK * s.deep * DEEP);
  Steps steps;
  steps_of_logits(s, block, steps);
  while (steps.all()) step(steps);
  const __m512 c = _mm512_set1_ps(p.scale), none = _mm512_set1_ps(NONE);
  float* lse = !p.lse ? nullptr : p.lse + (head.b * p.H + head.h) * p.across_m + block.m;
  for (int64_t i = 0; i < block.count; ++i) {
    const auto logit = [&](int64_t n) {
      const __m512 add = head.bias ? _mm512_loadu_ps(head.bias + n) : _mm512_setzero_ps();
      const __mmask16 counts = first_of_16(head.N - n) & _mm512_cmp_ps_mask(add, none, _CMP_NEQ_UQ);
      const __m512 x = _mm512_loadu_ps(s.all_logits + n * BLOCK + i * SIDE);
      return _mm512_mask_mov_ps(none, counts, _mm512_fmadd_ps(x, c, add));
    };
    __m512 most = none, all = _mm512_setzero_ps(), rounded = _mm512_setzero_ps();
    for (int64_t n = 0; n < head.N; n += SIDE) most = _mm512_max_ps(logit(n), most);  // if not NaN
    const float highest = _mm512_reduce_max_ps(most), high = highest == NONE ? 0.0f : highest;
    const bool keep = p.scores && (p.received || (block.first && i == 0));
    for (int64_t n = 0; n < s.rows; n += SIDE) {
      const __m512 above = _mm512_sub_ps(logit(n), _mm512_set1_ps(high));
      const __m512 weight = exp2_of<5>(_mm512_mul_ps(above, _mm512_set1_ps(LOG2_E)));
      all = _mm512_add_ps(all, weight);
      if (keep) _mm512_storeu_ps(s.kept + i * s.rows + n, weight);
      const __m256i half = (__m256i)_mm512_cvtneps_pbh(weight);
      rounded = _mm512_add_ps(rounded, (__m512)_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(s.all_weights + n / DEEP * 2 * TILE + i * DEEP + n % DEEP), half);
    }
    const float sum = _mm512_reduce_add_ps(all);
    s.share[i] = sum == 0.0f ? 0.0f : 1.0f / sum;
    s.inverse[i] = sum == 0.0f ? 0.0f : 1.0f / _mm512_reduce_add_ps(rounded);
    if (p.lse) lse[i] = sum == 0.0f ? NONE : high + __builtin_logf(sum);
  }
  steps = Steps();
  steps_of_result(s, block, steps);
  while (steps.all()) step(steps);
  store_result(p, s, block);
}

// What is left of a block once its weights are summed up.
INLINE void finish_weights(const Problem& p, const Scratch& s, Chunk& block) {
  float* lse = !p.lse ? nullptr : p.lse + (block.head->b * p.H + block.head->h) * p.across_m + block.m;
  bool fair = true;
  const bool scores = p.scores && (p.received || block.first);
  for (int64_t i = 0; i < block.count; i += SIDE) {
    const __m512 sum = row_sums(s.sums + i * SIDE);
    const __mmask16 here = first_of_16(block.count - i);
    fair = fair && _mm512_mask_cmp_ps_mask(here, sum, _mm512_set1_ps(0x1p-40f), _CMP_GT_OQ) == here &&
           _mm512_mask_cmp_ps_mask(here, sum, _mm512_set1_ps(0x1p60f), _CMP_LT_OQ) == here;
    _mm512_storeu_ps(s.inverse + i, _mm512_div_ps(_mm512_set1_ps(1.0f), sum));
    if (!p.lse && !scores) continue;
    const __m512 exact = row_sums(s.exact + i * SIDE);
    _mm512_storeu_ps(s.share + i, _mm512_div_ps(_mm512_set1_ps(1.0f), exact));
    if (p.lse) _mm512_mask_storeu_ps(lse + i, here, log_of(exact));
  }
  if (__builtin_expect(!fair, 0)) do_carefully(p, s, block);
  if (scores) store_scores(p, s, block);
}

// A head without a key.
static void store_nothing(const Problem& p, int64_t b, int64_t h, int64_t from, int64_t to) {
  for (int64_t m = from; m < to; ++m) {
    std::memset(p.head(p.out, b, h) + 2 * m * p.out.stride_n, 0, 2 * p.DV);
    if (p.lse) p.lse[(b * p.H + h) * p.across_m + m] = NONE;
  }
}

static void load_head(const Problem& p, const Scratch& s, int i, int64_t b, int64_t h, Head& head) {
  head = {b, h, p.lengths ? p.lengths[b] : p.N, s.keys[i], s.values[i], nullptr, nullptr, nullptr};
  if (p.scores) head.scores = p.scores + (b * p.H + h) * p.across_n;
  const uint16_t *k = reinterpret_cast<const uint16_t*>(p.head(p.k, b, h)),
                 *v = reinterpret_cast<const uint16_t*>(p.head(p.v, b, h));
  pack_transposed(k, p.k.stride_n, head.N, p.DK, s.keys[i]);
  pack_pairs(v, p.v.stride_n, head.N, p.DV, s.values[i]);
  if (!p.bias) return;
  const float* bias = p.bias + b * p.bias_b + h * p.bias_h;
  for (int64_t n = 0; n < s.rows; ++n) s.bias[i][n] = n < head.N ? bias[n * p.bias_n] : 0.0f;
  for (int64_t n = 0; n < s.rows; n += SIDE) {
    const __m512 x = _mm512_loadu_ps(s.bias[i] + n);
    const __mmask16 some = _mm512_cmp_ps_mask(x, _mm512_set1_ps(NONE), _CMP_NEQ_UQ);
    const __m512 least = _mm512_set1_ps(std::numeric_limits<float>::lowest());
    const __m512 times = _mm512_mul_ps(x, _mm512_set1_ps(LOG2_E));
    _mm512_storeu_ps(s.bias2[i] + n, _mm512_mask_max_ps(times, some, least, times));  // NaN stays
  }
  head.bias = s.bias[i], head.bias2 = s.bias2[i];
}

static void attend(const Problem& p, int32_t* base, int64_t begin, int64_t end) {
  Scratch s;
  Scratch::layout(p, base, &s);
  const Tiles tiles;
  const int64_t blocks = (p.M + BLOCK - 1) / BLOCK;
  const auto make = p.lse ? p.bias ? &make_weights<true, true> : &make_weights<true, false>
                    : p.bias ? &make_weights<false, true> : &make_weights<false, false>;
  Head heads[3];
  Chunk chunks[3] = {};
  int64_t task = begin, block = 0, last = 0, packed = 0, made = 0;
  const Head* head = nullptr;
  // the next chunk of the tasks after `c`, the first of a head with keys and values packed; null after the last
  const auto next = [&](const Chunk* c) -> Chunk* {
    Chunk* to = &chunks[made % 3];
    if (c && !c->ends()) {
      to->head = c->head, to->m = c->m, to->count = c->count, to->first = c->first, to->last = c->last;
      to->queries = c->queries, to->query_stride = c->query_stride, to->n = c->n + c->keys;
    } else {
      for (; block == last; ++task) {
        if (task == end) return nullptr;
        const int64_t part = task % p.splits, bh = task / p.splits, b = bh / p.H, h = bh % p.H;
        block = blocks * part / p.splits, last = blocks * (part + 1) / p.splits;
        const int64_t N = p.lengths ? p.lengths[b] : p.N;
        if (p.scores && part == 0) std::memset(p.scores + bh * p.across_n + N, 0, 4 * (p.N - N));
        if (N == 0) {
          store_nothing(p, b, h, block * BLOCK, last * BLOCK < p.M ? last * BLOCK : p.M);
          block = last;
        } else if (task == begin || part == 0) {
          load_head(p, s, packed % 3, b, h, heads[packed % 3]);
          head = &heads[packed++ % 3];
        }
      }
      to->head = head, to->n = 0, to->first = block == 0, to->last = block == blocks - 1;
      to->m = block * BLOCK, to->count = p.M - to->m < BLOCK ? p.M - to->m : BLOCK;
      ++block;
      load_queries(p, s, *to, s.queries);
    }
    to->keys = head->N - to->n < CHUNK ? head->N - to->n : CHUNK, to->done = false;
    to->weights = s.weights[made % 2], to->logits = s.logits[made % 2];
    ++made;
    return to;
  };

  Steps steps;
  const Chunk* before = nullptr;
  Chunk* now = next(nullptr);
  if (now) steps_of_logits(s, *now, steps);
  while (steps.all()) step(steps);
  while (now) {
    steps = Steps();
    Chunk* after = next(now);
    if (before && !before->done) steps_of_result(s, *before, steps);
    if (after) steps_of_logits(s, *after, steps);
    make(p, s, *now, steps);
    if (before && before->ends() && !before->done) store_result(p, s, *before);
    if (now->ends()) finish_weights(p, s, *now);
    before = now, now = after;
  }
  if (before && !before->done) {
    steps = Steps();
    steps_of_result(s, *before, steps);
    while (steps.all()) step(steps);
    store_result(p, s, *before);
  }
}
