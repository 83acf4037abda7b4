// What AVX-512 code shares: memory, masks, a transposition and exp2. Included between pragmas that set the target, in a
// namespace that no other file shares.

// Memory of a thread, kept from call to call.
struct ThreadMemory {
  char* data = nullptr;
  int64_t size = 0;
  char* of(int64_t bytes) {
    if (bytes > size) {
      std::free(data);
      size = (bytes + 4095) / 4096 * 4096;
      data = static_cast<char*>(std::aligned_alloc(4096, size));
      if (!data) size = 0, throw std::bad_alloc();
    }
    return data;
  }
  ~ThreadMemory() { std::free(data); }
};

// The next `bytes` of a scratch
INLINE char* take(char*& at, int64_t bytes) {
  char* here = at;
  at += (bytes + 63) / 64 * 64;
  return here;
}

// masks of the first n lanes
INLINE __mmask16 first_of_16(int64_t n) { return n >= 16 ? 0xffff : n <= 0 ? 0 : (1u << n) - 1; }
INLINE __mmask32 first_of_32(int64_t n) { return n >= 32 ? ~0u : n <= 0 ? 0 : (1u << n) - 1; }

// 16 x 16 words, rows become columns
INLINE void transpose_words(__m512i (&r)[16]) {
  __m512i t[16];
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) {
    t[2 * i] = _mm512_unpacklo_epi32(r[2 * i], r[2 * i + 1]);
    t[2 * i + 1] = _mm512_unpackhi_epi32(r[2 * i], r[2 * i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    r[4 * i] = _mm512_unpacklo_epi64(t[4 * i], t[4 * i + 2]);
    r[4 * i + 1] = _mm512_unpackhi_epi64(t[4 * i], t[4 * i + 2]);
    r[4 * i + 2] = _mm512_unpacklo_epi64(t[4 * i + 1], t[4 * i + 3]);
    r[4 * i + 3] = _mm512_unpackhi_epi64(t[4 * i + 1], t[4 * i + 3]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    t[i] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0x88);
    t[i + 4] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0xdd);
    t[i + 8] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0x88);
    t[i + 12] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0xdd);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    r[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
    r[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
    r[i + 4] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0x88);
    r[i + 12] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0xdd);
  }
}

// 2^x by a polynomial on [0, 1): to 7e-5 (degree 3) or 8e-8 (degree 5, of 0 exact); 0 for -inf, NaN for NaN
template <int DEGREE>
INLINE __m512 exp2_of(__m512 x) {
  static_assert(DEGREE == 3 || DEGREE == 5, "");
  const __m512 f = _mm512_reduce_ps(x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
  __m512 p;
  if constexpr (DEGREE == 3) {
    p = _mm512_set1_ps(7.802452118e-02f);
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(2.260671575e-01f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(6.958335398e-01f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(9.999252186e-01f));
  } else {
    p = _mm512_set1_ps(1.867141713e-03f);
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(9.017005667e-03f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(5.579993074e-02f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(2.401644453e-01f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(6.931513122e-01f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(1.0f));
  }
  return _mm512_scalef_ps(p, x);
}
