// The softmax of soft_aggregate and its gradient on AVX-512, 32 slots at a time, and how work is shared out. Included
// between pragmas that set the target, in an unnamed namespace.

constexpr int64_t WIDTH = 32;  // slots of a panel: rows of tokens, WIDTH floats each
constexpr float LOG2E = 1.44269504088896341f;
constexpr float NONE = -std::numeric_limits<float>::infinity();

template <ScalarType T>
constexpr int64_t bytes_of = T == ScalarType::Float ? 4 : 2;

template <ScalarType T>
INLINE __m512 load_16(const char* from, __mmask16 inside) {
  if constexpr (T == ScalarType::Float) return _mm512_maskz_loadu_ps(inside, from);
  const __m256i half = _mm256_maskz_loadu_epi16(inside, from);
  if constexpr (T == ScalarType::Half) return _mm512_cvtph_ps(half);
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}

INLINE __m256i rounded_to_bfloat16(__m512 x) {
  const __m512i bits = _mm512_castps_si512(x), one = _mm512_set1_epi32(1);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), one);
  const __m512i even = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  const __mmask16 nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
  return _mm512_cvtepi32_epi16(_mm512_srli_epi32(_mm512_mask_mov_epi32(even, nan, _mm512_set1_epi32(0x7fc00000)), 16));
}

template <ScalarType T>
INLINE void store_16(char* to, __mmask16 inside, __m512 x) {
  if constexpr (T == ScalarType::Float) _mm512_mask_storeu_ps(to, inside, x);
  else if constexpr (T == ScalarType::Half) _mm256_mask_storeu_epi16(to, inside, _mm512_cvtps_ph(x, 0));
  else _mm256_mask_storeu_epi16(to, inside, rounded_to_bfloat16(x));
}

// 16 x 16 numbers between memory, whose rows are slots, and a panel, whose rows are tokens
template <ScalarType T>
INLINE void load_turned(const char* from, int64_t stride, int64_t tokens, int64_t slots, float* to) {
  __m512i r[16];
  const __mmask16 inside = first_of_16(tokens);
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) {
    r[i] = _mm512_castps_si512(load_16<T>(from + (i < slots ? i * stride : 0), i < slots ? inside : 0));
  }
  transpose_words(r);
  for (int i = 0; i < 16; ++i) _mm512_store_si512(to + WIDTH * i, r[i]);
}

template <ScalarType T>
INLINE void store_turned(const float* from, char* to, int64_t stride, int64_t tokens, int64_t slots) {
  __m512i r[16];
  const __mmask16 inside = first_of_16(tokens);
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) r[i] = _mm512_load_si512(from + WIDTH * i);
  transpose_words(r);
  for (int i = 0; i < std::min<int64_t>(slots, 16); ++i) {
    store_16<T>(to + i * stride, inside, _mm512_castsi512_ps(r[i]));
  }
}

// Calls f(tokens' offset, slots' offset) for the panel's 16 x 16 parts
template <typename F>
INLINE void for_parts(int64_t N, int64_t slots, const F& f) {
  for (int64_t n = 0; n < N; n += 16) {
    for (int64_t m = 0; m < slots; m += 16) f(n, m);
  }
}

template <ScalarType T>
void load_panel_of(const Logits& w, int64_t b, int64_t first, int64_t N, int64_t slots, float* to) {
  constexpr int64_t size = bytes_of<T>;
  const char* from = w.data + (b * w.stride_b + first * w.stride_m) * size;
  if (w.stride_m == 1 || slots == 1) {
    const __mmask16 low = first_of_16(slots), high = first_of_16(slots - 16);
    for (int64_t n = 0; n < N; ++n) {
      _mm512_store_ps(to + WIDTH * n, load_16<T>(from + n * w.stride_n * size, low));
      if (high) _mm512_store_ps(to + WIDTH * n + 16, load_16<T>(from + n * w.stride_n * size + 16 * size, high));
    }
  } else {
    for_parts(N, slots, [&](int64_t n, int64_t m) {
      load_turned<T>(from + (n + m * w.stride_m) * size, w.stride_m * size, N - n, slots - m, to + WIDTH * n + m);
    });
  }
}

template <ScalarType T>
void store_panel_of(const Logits& w, int64_t b, int64_t first, int64_t N, int64_t slots, const float* from) {
  constexpr int64_t size = bytes_of<T>;
  char* to = w.data + (b * w.stride_b + first * w.stride_m) * size;
  if (w.stride_m == 1 || slots == 1) {
    const __mmask16 low = first_of_16(slots), high = first_of_16(slots - 16);
    for (int64_t n = 0; n < N; ++n) {
      store_16<T>(to + n * w.stride_n * size, low, _mm512_load_ps(from + WIDTH * n));
      if (high) store_16<T>(to + n * w.stride_n * size + 16 * size, high, _mm512_load_ps(from + WIDTH * n + 16));
    }
  } else {
    for_parts(N, slots, [&](int64_t n, int64_t m) {
      store_turned<T>(from + WIDTH * n + m, to + (n + m * w.stride_m) * size, w.stride_m * size, N - n, slots - m);
    });
  }
}

void load_panel(const Logits& w, int64_t b, int64_t first, int64_t N, int64_t slots, float* to) {
  if (w.type == ScalarType::Float) load_panel_of<ScalarType::Float>(w, b, first, N, slots, to);
  else if (w.type == ScalarType::Half) load_panel_of<ScalarType::Half>(w, b, first, N, slots, to);
  else load_panel_of<ScalarType::BFloat16>(w, b, first, N, slots, to);
}
void store_panel(const Logits& w, int64_t b, int64_t first, int64_t N, int64_t slots, const float* from) {
  if (w.type == ScalarType::Float) store_panel_of<ScalarType::Float>(w, b, first, N, slots, from);
  else if (w.type == ScalarType::Half) store_panel_of<ScalarType::Half>(w, b, first, N, slots, from);
  else store_panel_of<ScalarType::BFloat16>(w, b, first, N, slots, from);
}

// Logits become weights that still have to be multiplied with `by`.
template <int COLUMNS>
INLINE void softmax_panel(float* p, int64_t N, float scale, const bool* mask, int64_t mask_stride, __m512 (&by)[2]) {
  const __m512 none = _mm512_set1_ps(NONE), factor = _mm512_set1_ps(scale * LOG2E);
  __m512 high[2] = {none, none}, total[2] = {};
  for (int64_t n = 0; n < N; ++n) {
    const bool counts = !mask || mask[n * mask_stride];
#pragma GCC unroll 2
    for (int c = 0; c < COLUMNS; ++c) {
      __m512 s = counts ? _mm512_load_ps(p + WIDTH * n + 16 * c) : none;
      // -inf stays whatever the scale
      s = _mm512_mask_mul_ps(s, _mm512_cmp_ps_mask(s, none, _CMP_NEQ_UQ), s, factor);
      high[c] = _mm512_max_ps(s, high[c]);
      _mm512_store_ps(p + WIDTH * n + 16 * c, s);
    }
  }
#pragma GCC unroll 2
  for (int c = 0; c < COLUMNS; ++c) {  // a slot without a token that counts: exp(-inf - 0) * 0
    high[c] = _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(high[c], none, _CMP_NEQ_UQ), high[c]);
  }
  for (int64_t n = 0; n < N; ++n) {
#pragma GCC unroll 2
    for (int c = 0; c < COLUMNS; ++c) {
      const __m512 e = exp2_of<5>(_mm512_sub_ps(_mm512_load_ps(p + WIDTH * n + 16 * c), high[c]));
      total[c] = _mm512_add_ps(total[c], e);
      _mm512_store_ps(p + WIDTH * n + 16 * c, e);
    }
  }
#pragma GCC unroll 2
  for (int c = 0; c < COLUMNS; ++c) {
    const __mmask16 any = _mm512_cmp_ps_mask(total[c], _mm512_setzero_ps(), _CMP_NEQ_UQ);
    by[c] = _mm512_maskz_div_ps(any, _mm512_set1_ps(1.0f), total[c]);
  }
}

// dA becomes dw = scale * A * (dA - D), D the mean of dA under A (A was rounded: its sum is only about 1); and sums of
// A * (dA - D) * w where there is w
template <int COLUMNS>
INLINE void softmax_backward_panel(const float* a, float* da, const float* w, int64_t N, float scale, float* sums) {
  const __m512 zero = _mm512_setzero_ps(), factor = _mm512_set1_ps(scale);
  __m512 delta[2] = {}, total[2] = {}, products[2] = {};
  for (int64_t n = 0; n < N; ++n) {
#pragma GCC unroll 2
    for (int c = 0; c < COLUMNS; ++c) {
      const __m512 weight = _mm512_load_ps(a + WIDTH * n + 16 * c);
      delta[c] = _mm512_fmadd_ps(weight, _mm512_load_ps(da + WIDTH * n + 16 * c), delta[c]);
      total[c] = _mm512_add_ps(total[c], weight);
    }
  }
#pragma GCC unroll 2
  for (int c = 0; c < COLUMNS; ++c) {
    delta[c] = _mm512_maskz_div_ps(_mm512_cmp_ps_mask(total[c], zero, _CMP_NEQ_UQ), delta[c], total[c]);
  }
  for (int64_t n = 0; n < N; ++n) {
#pragma GCC unroll 2
    for (int c = 0; c < COLUMNS; ++c) {
      const __m512 weight = _mm512_load_ps(a + WIDTH * n + 16 * c);
      const __m512 ds = _mm512_mul_ps(weight, _mm512_sub_ps(_mm512_load_ps(da + WIDTH * n + 16 * c), delta[c]));
      _mm512_store_ps(da + WIDTH * n + 16 * c, _mm512_mul_ps(ds, factor));
      if (w) {  // what does not count may be NaN
        const __mmask16 counts = _mm512_cmp_ps_mask(weight, zero, _CMP_NEQ_UQ);
        products[c] = _mm512_mask3_fmadd_ps(ds, _mm512_load_ps(w + WIDTH * n + 16 * c), products[c], counts);
      }
    }
  }
#pragma GCC unroll 2
  for (int c = 0; w && c < COLUMNS; ++c) _mm512_store_ps(sums + 16 * c, products[c]);
}

[[maybe_unused]] void copy_prefix(const Sizes& z, int64_t size, const Tokens& from, const Tokens& to, int64_t b) {
  for (int64_t i = 0; i < z.prefix; ++i) {
    std::memcpy(to.data + size * (b * to.stride_b + i * to.stride_n),
                from.data + size * (b * from.stride_b + i * from.stride_n), size * z.C);
  }
}

// Work for threads: images, or parts of them where there are few
struct Parts {
  int64_t images, splits;
  Parts(int64_t images, int64_t panels) : images(images), splits(1) {
    const int64_t threads = torch::stable::get_num_threads();
    if (images % threads != 0 && images < 4 * threads) splits = std::min(panels, threads);
  }
  // Calls body(b, part) in parallel, with something of a type that lives meanwhile.
  template <typename Meanwhile, typename F>
  void run(const F& body) const {
    torch::stable::parallel_for(0, images * splits, 1, [&](int64_t begin, int64_t end) {
      [[maybe_unused]] Meanwhile meanwhile;
      for (int64_t i = begin; i < end; ++i) body(i / splits, i % splits);
    });
  }
  // A part's share of `panels`
  int64_t first(int64_t panels, int64_t part) const { return panels * part / splits * WIDTH; }
};
