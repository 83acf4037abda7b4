// token_mlp in bfloat16 on AMX tiles: 32 hidden rows at a time go from one product through the GELU into the next, so
// the hidden activations are written only as operands, and stay in cache.
#include "../common.h"
#include "isa.h"
#include "tile_products.h"

#include <tuple>
#include <vector>

namespace tokenops {
namespace {

namespace stable = torch::stable;
using torch::headeronly::BFloat16;

struct Sizes {
  int64_t B, M, C, R, N;
};

void check(const char* name, const Tensor& t, std::initializer_list<int64_t> sizes) {
  bool fits = !t.is_cuda() && t.scalar_type() == ScalarType::BFloat16 && t.dim() == static_cast<int64_t>(sizes.size());
  int64_t dim = 0;
  for (int64_t size : sizes) fits = fits && t.size(dim++) == size;
  STD_TORCH_CHECK(fits, name, " must be bfloat16, on the CPU, and fit to the others");
}

Sizes checked(const Tensor& z, const Tensor& w1, const std::optional<Tensor>& b1, const Tensor& w2) {
  STD_TORCH_CHECK(usable(Isa::Amx), "this machine has no tiles, or was told to leave them");
  STD_TORCH_CHECK(z.dim() == 3 && w1.dim() == 2 && w2.dim() == 2, "z must be (B, M, C), w1 (R, M) and w2 (N, R)");
  const Sizes s = {z.size(0), z.size(1), z.size(2), w1.size(0), w2.size(0)};
  check("z", z, {s.B, s.M, s.C}), check("w1", w1, {s.R, s.M}), check("w2", w2, {s.N, s.R});
  if (b1) check("b1", *b1, {s.R});
  return s;
}

// A bias as floats, zeros where there is none and behind it
std::vector<float> floats_of(const std::optional<Tensor>& bias, int64_t n) {
  std::vector<float> to(n + 32, 0.0f);
  if (bias) {
    const BFloat16* from = static_cast<const BFloat16*>(bias->data_ptr());
    for (int64_t i = 0; i < n; ++i) to[i] = from[i * bias->stride(0)];
  }
  return to;
}

}  // namespace

#if TOKENOPS_TILES
TILES_BEGIN

namespace {

constexpr int64_t BLOCK = 32 * 32;  // floats of a block of results

TileOperand operand(const Tensor& x, int64_t b) {
  const uint16_t* data = static_cast<const uint16_t*>(x.data_ptr());
  return x.dim() == 3 ? TileOperand{data + b * x.stride(0), x.stride(1), 1} : TileOperand{data, x.stride(0), 1};
}

INLINE TileOperand from(const TileOperand& x, int64_t outer, int64_t depth) {
  return {x.data + outer * x.outer_stride + depth * x.depth_stride, x.outer_stride, x.depth_stride};
}

// An operand that all images share, packed in parallel
template <bool RIGHT>
void pack_shared(const TileOperand& x, int64_t outer, int64_t depth, char* to) {
  stable::parallel_for(0, tiles_of(outer), 4, [&](int64_t begin, int64_t end) {
    const int64_t first = 16 * begin, count = std::min(outer, 16 * end) - first;
    pack_tiles<RIGHT>(from(x, first, 0), count, depth, to + begin * steps_of(depth) * TILE_BYTES);
  });
}

// Phi(x), the normal distribution, to 1e-4 of it (Abramowitz and Stegun 7.1.26), and exp(-x^2 / 2)
INLINE __m512 distribution(__m512 x, __m512& e) {
  e = exp2_of<5>(_mm512_mul_ps(_mm512_mul_ps(x, x), _mm512_set1_ps(-0.72134752f)));
  const __m512 one = _mm512_set1_ps(1.0f);
  const __m512 t = _mm512_rcp14_ps(_mm512_fmadd_ps(_mm512_abs_ps(x), _mm512_set1_ps(0.2316418882f), one));
  __m512 p = _mm512_set1_ps(0.5f * 1.061405429f);
  p = _mm512_fmadd_ps(p, t, _mm512_set1_ps(-0.5f * 1.453152027f));
  p = _mm512_fmadd_ps(p, t, _mm512_set1_ps(0.5f * 1.421413741f));
  p = _mm512_fmadd_ps(p, t, _mm512_set1_ps(-0.5f * 0.284496736f));
  p = _mm512_fmadd_ps(p, t, _mm512_set1_ps(0.5f * 0.254829592f));
  const __m512 tail = _mm512_mul_ps(_mm512_mul_ps(p, t), e);
  return _mm512_mask_sub_ps(tail, _mm512_cmp_ps_mask(x, _mm512_setzero_ps(), _CMP_NLT_UQ), one, tail);
}

INLINE __m512i row_of(__m512 low, __m512 high) { return (__m512i)_mm512_cvtne2ps_pbh(high, low); }

// Two rows of 32 numbers as a row of words of each of two tiles of a right operand, `apart` bytes from each other
INLINE void write_words(__m512i row, __m512i next, char* to, int64_t apart) {
  _mm512_store_si512(to, paired(_mm512_castsi512_si256(row), _mm512_castsi512_si256(next)));
  _mm512_store_si512(to + apart, paired(_mm512_extracti64x4_epi64(row, 1), _mm512_extracti64x4_epi64(next, 1)));
}

INLINE __m512i gelu_row(const float* row, float bias) {
  __m512 e, x[2];
#pragma GCC unroll 2
  for (int c = 0; c < 2; ++c) {
    x[c] = _mm512_add_ps(_mm512_load_ps(row + 16 * c), _mm512_set1_ps(bias));
    x[c] = _mm512_mul_ps(x[c], distribution(x[c], e));
  }
  return row_of(x[0], x[1]);
}

thread_local ThreadMemory scratch, shared_scratch;

void forward(const Sizes& s, const Tensor& z, const Tensor& w1, const float* b1, const Tensor& w2, const float* b2,
             const Tensor& y) {
  const int64_t steps_m = steps_of(s.M), steps_r = steps_of(s.R), panels = steps_of(s.C);
  char* at = shared_scratch.of(packed_bytes(s.R, s.M) + packed_bytes(s.N, s.R));
  char *left1 = take(at, packed_bytes(s.R, s.M)), *left2 = take(at, packed_bytes(s.N, s.R));
  pack_shared<false>(operand(w1, 0), s.R, s.M, left1);
  pack_shared<false>(operand(w2, 0), s.N, s.R, left2);
  stable::parallel_for(0, s.B * panels, 1, [&](int64_t begin, int64_t end) {
    amx::Tiles config;
    char* at = scratch.of(4 * BLOCK + 2 * (steps_m + steps_r) * TILE_BYTES);
    float* block = reinterpret_cast<float*>(take(at, 4 * BLOCK));
    char *tokens = take(at, 2 * steps_m * TILE_BYTES), *hidden = take(at, 2 * steps_r * TILE_BYTES);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t b = i / panels, c = i % panels * 32, columns = std::min<int64_t>(32, s.C - c);
      pack_tiles<true>(turned(from(operand(z, b), 0, c)), columns, s.M, tokens);
      for (int64_t r = 0; r < s.R; r += 32) {
        const int64_t rows = std::min<int64_t>(32, s.R - r);
        multiply_block(left1 + r / 16 * steps_m * TILE_BYTES, rows, tokens, columns, steps_m, block);
        char* to = hidden + r / 32 * TILE_BYTES;
        for (int64_t k = 0; k < 32; k += 2, to += 64) {
          const __m512i zero = _mm512_setzero_si512();
          write_words(k < rows ? gelu_row(block + 32 * k, b1[r + k]) : zero,
                      k + 1 < rows ? gelu_row(block + 32 * k + 32, b1[r + k + 1]) : zero, to, steps_r * TILE_BYTES);
        }
      }
      uint16_t* out = static_cast<uint16_t*>(y.data_ptr()) + b * s.N * s.C + c;
      for (int64_t n = 0; n < s.N; n += 32) {
        const int64_t rows = std::min<int64_t>(32, s.N - n);
        multiply_block(left2 + n / 16 * steps_r * TILE_BYTES, rows, hidden, columns, steps_r, block);
        for (int64_t k = 0; k < rows; ++k) {
          const __m512 bias = _mm512_set1_ps(b2[n + k]);
          const __m512i row = row_of(_mm512_add_ps(bias, _mm512_load_ps(block + 32 * k)),
                                     _mm512_add_ps(bias, _mm512_load_ps(block + 32 * k + 16)));
          _mm512_mask_storeu_epi16(out + (n + k) * s.C, first_of_32(columns), row);
        }
      }
    }
  });
}

// The backward pass of some images and of some blocks of 32 hidden rows: what a thread does, and what it adds up.
struct Backward {
  const Sizes& s;
  const Tensor &dy, &z;
  const float* b1;
  const char *left1, *left1t, *left2t;  // w1 (R, M), its transpose, and that of w2 (R, N)

  int64_t steps_m = steps_of(s.M), steps_n = steps_of(s.N), steps_c = steps_of(s.C), steps_r = steps_of(s.R);
  int64_t columns_m = steps_m, columns_n = steps_n;  // blocks of dw1's and dw2's columns

  int64_t sums() const { return steps_r * (columns_m + columns_n) * BLOCK; }  // floats: dw1 (R, M) and dw2^T (R, N)

  int64_t scratch_bytes() const {
    return 2 * packed_bytes(s.C + 16, s.M) + 2 * packed_bytes(s.C + 16, s.N) + packed_bytes(s.M + 16, s.C) +
           packed_bytes(s.N + 16, s.C) + packed_bytes(s.C + 16, s.R) + 4 * steps_c * TILE_BYTES + 8 * BLOCK + 1024;
  }

  // Image b, hidden blocks first to last: adds to dw (blocks), db1 and db2 (floats; null: another part has it), and
  // writes dz (rows of C) through store(block, m, rows, c, columns).
  template <typename Store>
  void run(int64_t b, int64_t first, int64_t last, float* dw, float* db1, float* db2, const Store& store) const {
    char* at = scratch.of(scratch_bytes());
    char *tokens = take(at, packed_bytes(s.C + 16, s.M)), *dout = take(at, packed_bytes(s.C + 16, s.N));
    char *tokens_t = take(at, packed_bytes(s.M + 16, s.C)), *dout_t = take(at, packed_bytes(s.N + 16, s.C));
    char* gradients = take(at, packed_bytes(s.C + 16, s.R));  // of what the GELU takes, depth R
    char *hidden_rows = take(at, 2 * steps_c * TILE_BYTES), *gradient_rows = take(at, 2 * steps_c * TILE_BYTES);
    float *pre = reinterpret_cast<float*>(take(at, 4 * BLOCK)), *grad = reinterpret_cast<float*>(take(at, 4 * BLOCK));
    const TileOperand x = operand(z, b), g = operand(dy, b);
    pack_tiles<true>(turned(x), s.C, s.M, tokens);
    pack_tiles<true>(turned(g), s.C, s.N, dout);
    pack_tiles<true>(x, s.M, s.C, tokens_t);
    pack_tiles<true>(g, s.N, s.C, dout_t);
    const int64_t steps = last - first;
    for (int64_t block = first; block < last; ++block) {
      const int64_t r = 32 * block, rows = std::min<int64_t>(32, s.R - r);
      __m512 sums[32];
      for (__m512& sum : sums) sum = _mm512_setzero_ps();
      for (int64_t c = 0; c < s.C; c += 32) {
        const int64_t columns = std::min<int64_t>(32, s.C - c);
        multiply_block(left1 + r / 16 * steps_m * TILE_BYTES, rows, tokens + c / 16 * steps_m * TILE_BYTES, columns,
                       steps_m, pre);
        multiply_block(left2t + r / 16 * steps_n * TILE_BYTES, rows, dout + c / 16 * steps_n * TILE_BYTES, columns,
                       steps_n, grad);
        char* words = gradients + (c / 16 * steps + block - first) * TILE_BYTES;
        for (int64_t k = 0; k < 32; k += 2, words += 64) {
          __m512i gradient[2];
#pragma GCC unroll 2
          for (int64_t i = k; i < k + 2; ++i) {
            __m512i hidden = _mm512_setzero_si512();
            gradient[i - k] = hidden;
            if (i < rows) hidden = activate(pre + 32 * i, grad + 32 * i, b1[r + i], columns, gradient[i - k], sums[i]);
            const int64_t place = (i / 16 * steps_c + c / 32) * TILE_BYTES + i % 16 * 64;
            _mm512_store_si512(hidden_rows + place, hidden);
            _mm512_store_si512(gradient_rows + place, gradient[i - k]);
          }
          write_words(gradient[0], gradient[1], words, steps * TILE_BYTES);
        }
      }
      for (int64_t i = 0; i < rows; ++i) db1[r + i] += _mm512_reduce_add_ps(sums[i]);
      float* to = dw + block * (columns_m + columns_n) * BLOCK;
      for (int64_t m = 0; m < s.M; m += 32, to += BLOCK) {
        multiply_block<true>(gradient_rows, rows, tokens_t + m / 16 * steps_c * TILE_BYTES, s.M - m, steps_c, to);
      }
      for (int64_t n = 0; n < s.N; n += 32, to += BLOCK) {
        multiply_block<true>(hidden_rows, rows, dout_t + n / 16 * steps_c * TILE_BYTES, s.N - n, steps_c, to);
      }
    }
    for (int64_t m = 0; m < s.M; m += 32) {
      for (int64_t c = 0; c < s.C; c += 32) {
        multiply_block(left1t + (m / 16 * steps_r + first) * TILE_BYTES, s.M - m,
                       gradients + c / 16 * steps * TILE_BYTES, s.C - c, steps, pre, steps_r);
        store(pre, m, std::min<int64_t>(32, s.M - m), c, s.C - c);
      }
    }
    for (int64_t n = 0; db2 && n < s.N; ++n) {
      __m512 sum = _mm512_setzero_ps();
      for (int64_t c = 0; c < s.C; c += 16) {
        const __m256i half = _mm256_maskz_loadu_epi16(first_of_16(s.C - c), g.data + n * g.outer_stride + c);
        sum = _mm512_add_ps(sum, _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16)));
      }
      db2[n] += _mm512_reduce_add_ps(sum);
    }
  }

  // 32 hidden activations of a row, and their gradient made that of what the GELU takes
  inline __attribute__((always_inline)) __m512i activate(const float* pre, const float* grad, float bias,
                                                         int64_t columns, __m512i& gradient, __m512& sum) const {
    __m512 hidden[2], d[2];
#pragma GCC unroll 2
    for (int c = 0; c < 2; ++c) {
      __m512 e;
      const __m512 x = _mm512_add_ps(_mm512_load_ps(pre + 16 * c), _mm512_set1_ps(bias)), p = distribution(x, e);
      hidden[c] = _mm512_mul_ps(x, p);
      const __m512 slope = _mm512_fmadd_ps(_mm512_mul_ps(x, _mm512_set1_ps(0.3989422804f)), e, p);
      d[c] = _mm512_mul_ps(slope, _mm512_load_ps(grad + 16 * c));
      d[c] = _mm512_maskz_mov_ps(first_of_16(columns - 16 * c), d[c]);
      hidden[c] = _mm512_maskz_mov_ps(first_of_16(columns - 16 * c), hidden[c]);
      sum = _mm512_add_ps(sum, d[c]);
    }
    gradient = row_of(d[0], d[1]);
    return row_of(hidden[0], hidden[1]);
  }
};

// The sum over the groups of one block, in the first's place
INLINE float* summed(float* block, int64_t groups, int64_t apart) {
  for (int64_t g = 1; g < groups; ++g) {
    for (int64_t i = 0; i < BLOCK; i += 16) {
      _mm512_store_ps(block + i, _mm512_add_ps(_mm512_load_ps(block + i), _mm512_load_ps(block + g * apart + i)));
    }
  }
  return block;
}

INLINE void turn_block(float* block) {
  __m512i r[4][16];
#pragma GCC unroll 4
  for (int q = 0; q < 4; ++q) {
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) r[q][i] = _mm512_load_si512(block + (q / 2 * 16 + i) * 32 + q % 2 * 16);
    transpose_words(r[q]);
  }
#pragma GCC unroll 4
  for (int q = 0; q < 4; ++q) {
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) _mm512_store_si512(block + (q % 2 * 16 + i) * 32 + q / 2 * 16, r[q][i]);
  }
}

uint16_t* words(const Tensor& t) { return static_cast<uint16_t*>(t.data_ptr()); }

void store_floats(const std::vector<float>& from, int64_t groups, int64_t apart, const Tensor& to) {
  for (int64_t i = 0; i < to.size(0); ++i) {
    float total = 0;
    for (int64_t g = 0; g < groups; ++g) total += from[g * apart + i];
    static_cast<BFloat16*>(to.data_ptr())[i] = total;
  }
}

void backward(const Sizes& s, const Tensor& dy, const Tensor& z, const Tensor& w1, const float* b1, const Tensor& w2,
              const Tensor& dz, const Tensor& dw1, const Tensor& db1, const Tensor& dw2, const Tensor& db2) {
  Backward job = {s, dy, z, b1, nullptr, nullptr, nullptr};
  // images in groups, a thread each; where there are fewer, the hidden rows of a group in parts
  const int64_t threads = stable::get_num_threads(), groups = std::min(s.B, threads);
  const int64_t parts = std::min(job.steps_r, threads / groups), tokens = s.M * s.C;
  const int64_t rows1 = s.R + 32, sums = job.sums();
  char* at = shared_scratch.of(packed_bytes(s.R, s.M) + packed_bytes(s.M, s.R) + packed_bytes(s.R, s.N) +
                               4 * groups * sums + (parts > 1 ? 4 * s.B * parts * tokens : 0) + 512);
  char *left1 = take(at, packed_bytes(s.R, s.M)), *left1t = take(at, packed_bytes(s.M, s.R)),
       *left2t = take(at, packed_bytes(s.R, s.N));
  float *dw = reinterpret_cast<float*>(take(at, 4 * groups * sums)), *shares = reinterpret_cast<float*>(at);
  pack_shared<false>(operand(w1, 0), s.R, s.M, left1);
  pack_shared<false>(turned(operand(w1, 0)), s.M, s.R, left1t);
  pack_shared<false>(turned(operand(w2, 0)), s.R, s.N, left2t);
  job.left1 = left1, job.left1t = left1t, job.left2t = left2t;
  std::vector<float> sums1(groups * rows1), sums2(groups * s.N);

  stable::parallel_for(0, groups * parts, 1, [&](int64_t begin, int64_t end) {
    amx::Tiles config;
    for (int64_t i = begin; i < end; ++i) {
      const int64_t group = i / parts, part = i % parts;
      const int64_t first = job.steps_r * part / parts, last = job.steps_r * (part + 1) / parts;
      const int64_t of_block = sums / job.steps_r;
      std::memset(dw + group * sums + first * of_block, 0, 4 * (last - first) * of_block);
      for (int64_t b = s.B * group / groups; b < s.B * (group + 1) / groups; ++b) {
        uint16_t* out = words(dz) + b * tokens;
        float* share = shares + (b * parts + part) * tokens;
        job.run(b, first, last, dw + group * sums, &sums1[group * rows1], part ? nullptr : &sums2[group * s.N],
                [&](const float* block, int64_t m, int64_t rows, int64_t c, int64_t columns) {
                  if (parts == 1) return store_block(block, rows, columns, out + m * s.C + c, s.C);
                  for (int64_t k = 0; k < rows; ++k) {
                    std::memcpy(share + (m + k) * s.C + c, block + 32 * k, 4 * std::min<int64_t>(32, columns));
                  }
                });
      }
    }
  });
  if (parts > 1) {
    stable::parallel_for(0, s.B * tokens, 1 << 14, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        float total = 0;
        for (int64_t part = 0; part < parts; ++part) total += shares[(i / tokens * parts + part) * tokens + i % tokens];
        static_cast<BFloat16*>(dz.data_ptr())[i] = total;
      }
    });
  }
  stable::parallel_for(0, job.steps_r, 4, [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block) {
      const int64_t r = 32 * block, rows = std::min<int64_t>(32, s.R - r);
      float* from = dw + block * (sums / job.steps_r);
      for (int64_t m = 0; m < s.M; m += 32, from += BLOCK) {
        store_block(summed(from, groups, sums), rows, s.M - m, words(dw1) + r * s.M + m, s.M);
      }
      for (int64_t n = 0; n < s.N; n += 32, from += BLOCK) {
        turn_block(summed(from, groups, sums));
        store_block(from, s.N - n, rows, words(dw2) + n * s.R + r, s.R);
      }
    }
  });
  store_floats(sums1, groups, rows1, db1), store_floats(sums2, groups, s.N, db2);
}

}  // namespace
TILES_END
#else
namespace {
void forward(const Sizes&, const Tensor&, const Tensor&, const float*, const Tensor&, const float*, const Tensor&) {}
void backward(const Sizes&, const Tensor&, const Tensor&, const Tensor&, const float*, const Tensor&, const Tensor&,
              const Tensor&, const Tensor&, const Tensor&, const Tensor&) {}
}  // namespace
#endif

namespace {

Tensor token_mlp_tiles_fwd(Tensor z, Tensor w1, std::optional<Tensor> b1, Tensor w2, std::optional<Tensor> b2) {
  const Sizes s = checked(z, w1, b1, w2);
  if (b2) check("b2", *b2, {s.N});
  Tensor y = new_tensor(z, {s.B, s.N, s.C});
  if (y.numel() == 0) return y;
  z = dense(z), w1 = dense(w1), w2 = dense(w2);
  forward(s, z, w1, floats_of(b1, s.R).data(), w2, floats_of(b2, s.N).data(), y);
  return y;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> token_mlp_tiles_bwd(Tensor dy, Tensor z, Tensor w1,
                                                                       std::optional<Tensor> b1, Tensor w2) {
  const Sizes s = checked(z, w1, b1, w2);
  check("dy", dy, {s.B, s.N, s.C});
  Tensor dz = new_tensor(z, {s.B, s.M, s.C});
  Tensor dw1 = new_tensor(z, {s.R, s.M}), db1 = new_tensor(z, {s.R});
  Tensor dw2 = new_tensor(z, {s.N, s.R}), db2 = new_tensor(z, {s.N});
  if (s.B * s.M * s.C * s.R * s.N == 0) {
    for (Tensor* t : {&dz, &dw1, &db1, &dw2, &db2}) stable::zero_(*t);
    return {dz, dw1, db1, dw2, db2};
  }
  dy = dense(dy), z = dense(z), w1 = dense(w1), w2 = dense(w2);
  backward(s, dy, z, w1, floats_of(b1, s.R).data(), w2, dz, dw1, db1, dw2, db2);
  return {dz, dw1, db1, dw2, db2};
}

}  // namespace

}  // namespace tokenops

STABLE_TORCH_LIBRARY_IMPL(tokenops, CPU, m) {
  m.impl("token_mlp_tiles_fwd", TORCH_BOX(&tokenops::token_mlp_tiles_fwd));
  m.impl("token_mlp_tiles_bwd", TORCH_BOX(&tokenops::token_mlp_tiles_bwd));
}
