// soft_aggregate in bfloat16 on AMX tiles: the weights of 32 slots at a time go from their softmax into the product,
// whose other operand, the tokens, is packed once an image.
#include "soft_aggregate.h"
#include "isa.h"
#include "tile_products.h"

#include <limits>

#if TOKENOPS_TILES
namespace tokenops {

TILES_BEGIN

namespace {

using namespace soft_aggregate;

#include "soft_aggregate_panels.h"

// The weights of a panel times `by`, to a and as tiles of the left operand, whose rows are slots
template <int COLUMNS>
INLINE void pack_weights(const float* p, int64_t N, int64_t slots, const __m512 (&by)[2], const Logits& a, int64_t b,
                         int64_t first, char* tiles) {
  const bool across = a.stride_m == 1 || slots == 1;
  uint16_t* out = reinterpret_cast<uint16_t*>(a.data) + b * a.stride_b + first * a.stride_m;
  const int64_t steps = steps_of(N);
  const __mmask32 inside = first_of_32(slots);
  for (int64_t s = 0; s < steps; ++s) {
    __m512i r[COLUMNS][16];
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) {
      __m512i row[2];
#pragma GCC unroll 2
      for (int k = 0; k < 2; ++k) {
        const int64_t n = 32 * s + 2 * i + k;
        if (n < N) {
          const __m512 low = _mm512_mul_ps(by[0], _mm512_load_ps(p + WIDTH * n));
          const __m512 high = COLUMNS == 2 ? _mm512_mul_ps(by[1], _mm512_load_ps(p + WIDTH * n + 16)) : low;
          row[k] = (__m512i)_mm512_cvtne2ps_pbh(high, low);
          if (across) _mm512_mask_storeu_epi16(out + n * a.stride_n, inside, row[k]);
        } else {
          row[k] = _mm512_setzero_si512();
        }
      }
      r[0][i] = paired(_mm512_castsi512_si256(row[0]), _mm512_castsi512_si256(row[1]));
      if constexpr (COLUMNS == 2) {
        r[1][i] = paired(_mm512_extracti64x4_epi64(row[0], 1), _mm512_extracti64x4_epi64(row[1], 1));
      }
    }
#pragma GCC unroll 2
    for (int c = 0; c < COLUMNS; ++c) {
      transpose_words(r[c]);
      write_tile(r[c], tiles + (c * steps + s) * TILE_BYTES);
      if (across) continue;
      const __mmask32 tokens = first_of_32(N - 32 * s);
      for (int64_t i = 0; i < std::min<int64_t>(slots - 16 * c, 16); ++i) {
        _mm512_mask_storeu_epi16(out + (16 * c + i) * a.stride_m + 32 * s, tokens, r[c][i]);
      }
    }
  }
}

// The tokens of an image behind the prefix, those that do not count as zeros (in `room`: they may hold anything).
TileOperand counting(const Sizes& z, const Tokens& x, int64_t b, const Mask& mask, char* room) {
  const uint16_t* rows = reinterpret_cast<const uint16_t*>(x.data) + b * x.stride_b + z.prefix * x.stride_n;
  const bool* counts = mask.image(b);
  if (!counts) return {rows, x.stride_n, 1};
  uint16_t* to = reinterpret_cast<uint16_t*>(room);
  for (int64_t n = 0; n < z.N; ++n) {
    if (counts[n * mask.stride_n]) std::memcpy(to + n * z.C, rows + n * x.stride_n, 2 * z.C);
    else std::memset(to + n * z.C, 0, 2 * z.C);
  }
  return {to, z.C, 1};
}

// rows (up to 32) of a product, to bfloat16
void multiply_rows(const char* left, int64_t rows, const char* right, int64_t columns, int64_t steps, float* block,
                   uint16_t* to, int64_t stride) {
  for (int64_t c = 0; c < columns; c += 32) {
    multiply_block(left, rows, right + c / 16 * steps * TILE_BYTES, columns - c, steps, block);
    store_block(block, rows, columns - c, to + c, stride);
  }
}

thread_local ThreadMemory scratch;

}  // namespace

void soft_aggregate::forward_on_tiles(const Sizes& z, const Tokens& x, const Logits& w, float scale, const Mask& mask,
                                      const Logits& a, const Tokens& y) {
  const int64_t panels = steps_of(z.M), steps = steps_of(z.N);
  const int64_t panel_bytes = (z.N + 32) * WIDTH * 4, tokens_bytes = packed_bytes(z.C, z.N);
  const int64_t room_bytes = mask.data ? 2 * z.N * z.C : 0;
  const Parts parts(z.B, panels);
  parts.run<amx::Tiles>([&](int64_t b, int64_t part) {
    char* at = scratch.of(panel_bytes + tokens_bytes + 2 * steps * TILE_BYTES + 4096 + room_bytes + 256);
    float* panel = reinterpret_cast<float*>(take(at, panel_bytes));
    float* block = reinterpret_cast<float*>(take(at, 4096));
    char *left = take(at, 2 * steps * TILE_BYTES), *right = take(at, tokens_bytes), *room = take(at, room_bytes);
    if (part == 0) copy_prefix(z, 2, x, y, b);
    pack_tiles<true>(turned(counting(z, x, b, mask, room)), z.C, z.N, right);
    for (int64_t m = parts.first(panels, part); m < std::min(z.M, parts.first(panels, part + 1)); m += WIDTH) {
      const int64_t slots = std::min(WIDTH, z.M - m);
      __m512 by[2] = {};
      load_panel(w, b, m, z.N, slots, panel);
      if (slots > 16) {
        softmax_panel<2>(panel, z.N, scale, mask.image(b), mask.stride_n, by);
        pack_weights<2>(panel, z.N, slots, by, a, b, m, left);
      } else {
        softmax_panel<1>(panel, z.N, scale, mask.image(b), mask.stride_n, by);
        pack_weights<1>(panel, z.N, slots, by, a, b, m, left);
      }
      multiply_rows(left, slots, right, z.C, steps, block,
                    reinterpret_cast<uint16_t*>(y.data) + b * y.stride_b + (z.prefix + m) * y.stride_n, y.stride_n);
    }
  });
}

void soft_aggregate::backward_on_tiles(const Sizes& z, const Tokens& dy, const Tokens& x, const Logits& w, float scale,
                                       const Mask& mask, const Logits& a, const Tokens& dx, const Logits& dw,
                                       float* partial) {
  const int64_t panels = steps_of(z.M), blocks = steps_of(z.N), channels = steps_of(z.C), slots_deep = steps_of(z.M);
  const int64_t panel_bytes = (z.N + 32) * WIDTH * 4, room_bytes = mask.data ? 2 * z.N * z.C : 0;
  const int64_t left_bytes = std::max(packed_bytes(z.N, z.C), packed_bytes(z.N, z.M));
  const int64_t right_bytes = std::max(packed_bytes(z.C, z.M), packed_bytes(WIDTH, z.C));
  const Parts parts(z.B, std::min(panels, blocks));
  parts.run<amx::Tiles>([&](int64_t b, int64_t part) {
    char* at = scratch.of(3 * panel_bytes + left_bytes + right_bytes + 4096 + room_bytes + 512);
    float *panel_a = reinterpret_cast<float*>(take(at, panel_bytes)), *panel_da = panel_a + panel_bytes / 4,
          *panel_w = panel_da + panel_bytes / 4;
    at += 2 * panel_bytes;
    float* block = reinterpret_cast<float*>(take(at, 4096));
    char *left = take(at, left_bytes), *right = take(at, right_bytes), *room = take(at, room_bytes);
    const TileOperand dslots = {reinterpret_cast<const uint16_t*>(dy.data) + b * dy.stride_b + z.prefix * dy.stride_n,
                                dy.stride_n, 1};
    if (part == 0) copy_prefix(z, 2, dy, dx, b);

    // dx = A dslots
    pack_tiles<true>(turned(dslots), z.C, z.M, right);
    const int64_t last = std::min(z.N, parts.first(blocks, part + 1));
    for (int64_t n = parts.first(blocks, part); n < last; n += 32) {
      const uint16_t* weights = reinterpret_cast<const uint16_t*>(a.data) + b * a.stride_b + n * a.stride_n;
      const int64_t rows = std::min<int64_t>(32, z.N - n);
      pack_tiles<false>({weights, a.stride_n, a.stride_m}, rows, z.M, left);
      multiply_rows(left, rows, right, z.C, slots_deep, block,
                    reinterpret_cast<uint16_t*>(dx.data) + b * dx.stride_b + (z.prefix + n) * dx.stride_n, dx.stride_n);
    }

    // dA = tokens dslots^T, and dw from it
    pack_tiles<false>(counting(z, x, b, mask, room), z.N, z.C, left);
    for (int64_t m = parts.first(panels, part); m < std::min(z.M, parts.first(panels, part + 1)); m += WIDTH) {
      const int64_t slots = std::min(WIDTH, z.M - m);
      pack_tiles<true>({dslots.data + m * dslots.outer_stride, dslots.outer_stride, 1}, slots, z.C, right);
      for (int64_t n = 0; n < z.N; n += 32) {
        multiply_block(left + n / 16 * channels * TILE_BYTES, z.N - n, right, slots, channels, panel_da + n * WIDTH);
      }
      load_panel(a, b, m, z.N, slots, panel_a);
      if (partial) load_panel(w, b, m, z.N, slots, panel_w);
      if (slots > 16) softmax_backward_panel<2>(panel_a, panel_da, partial ? panel_w : nullptr, z.N, scale, block);
      else softmax_backward_panel<1>(panel_a, panel_da, partial ? panel_w : nullptr, z.N, scale, block);
      store_panel(dw, b, m, z.N, slots, panel_da);
      if (partial) std::memcpy(partial + b * z.M + m, block, 4 * slots);
    }
  });
}

TILES_END
}  // namespace tokenops

#else

namespace tokenops {
void soft_aggregate::forward_on_tiles(const Sizes&, const Tokens&, const Logits&, float, const Mask&, const Logits&,
                                      const Tokens&) {
  STD_TORCH_CHECK(false, "compiled without tiles");
}
void soft_aggregate::backward_on_tiles(const Sizes&, const Tokens&, const Tokens&, const Logits&, float, const Mask&,
                                       const Logits&, const Tokens&, const Logits&, float*) {
  STD_TORCH_CHECK(false, "compiled without tiles");
}
}  // namespace tokenops

#endif
