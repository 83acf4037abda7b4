// The variants of the CPU attention, one for each instruction set, and the choice among them.
#include "attention.h"
#include "isa.h"

#include <type_traits>

#include <torch/headeronly/util/Exception.h>
#include <torch/headeronly/util/Half.h>

#pragma GCC diagnostic ignored "-Wpsabi"           // vectors are passed between inlined functions only
#pragma GCC diagnostic ignored "-Wunused-function"

namespace tokenops::attention {

void from_half(const void* in, float* out, int64_t n) {
  const torch::headeronly::Half* x = static_cast<const torch::headeronly::Half*>(in);
  for (int64_t i = 0; i < n; ++i) out[i] = x[i];
}
void to_half(const float* in, void* out, int64_t n) {
  torch::headeronly::Half* x = static_cast<torch::headeronly::Half*>(out);
  for (int64_t i = 0; i < n; ++i) x[i] = in[i];
}

}  // namespace tokenops::attention

#define VARIANT baseline
#define LANES 4
#define ROWS 4
#define PAIRS 0
#include "attention_variant.h"

#if TOKENOPS_X86
#include <immintrin.h>

#pragma GCC push_options
#pragma GCC target("avx2,fma,bmi,bmi2")
#define VARIANT avx2
#define LANES 8
#define ROWS 4
#define PAIRS 0
#include "attention_variant.h"
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("avx2,fma,bmi,bmi2,avx512f,avx512bw,avx512dq,avx512vl")
#define VARIANT avx512
#define LANES 16
#define ROWS 8
#define PAIRS 0
#include "attention_variant.h"
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("avx2,fma,bmi,bmi2,avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")
#define VARIANT avx512bf16
#define LANES 16
#define ROWS 8
#define PAIRS 1
#include "attention_variant.h"
#pragma GCC pop_options

#if TOKENOPS_TILES
#include "tile_products.h"

TILES_BEGIN
#include "attention_amx.h"
TILES_END
#endif
#endif

namespace tokenops::attention {

template <typename Scratch>
int64_t words_of(const Problem& p) {
  return Scratch::layout(p, nullptr, nullptr);
}

#define TOKENOPS_VARIANT(space, plain)                                                             \
  Variant {                                                                                        \
#space, space::attend, space::attend_backward, plain::mean_keys, words_of<space::Scratch>,         \
        words_of<space::BackwardScratch>, space::WIDTH                                             \
  }

// The best that may be used.
Variant choose(Type type) {
#if TOKENOPS_X86
  const bool halves = type == Type::BFloat16;
#if TOKENOPS_TILES
  if (halves && usable(Isa::Amx)) return TOKENOPS_VARIANT(amx, avx512bf16);
#endif
  if (halves && usable(Isa::Avx512Bf16) && !slow_pairs()) return TOKENOPS_VARIANT(avx512bf16, avx512bf16);
  if (usable(Isa::Avx512)) return TOKENOPS_VARIANT(avx512, avx512);
  if (usable(Isa::Avx2)) return TOKENOPS_VARIANT(avx2, avx2);
#endif
  return TOKENOPS_VARIANT(baseline, baseline);
}

}  // namespace tokenops::attention

// For Python, which asks while tensors are traced too, so no operator: the instruction set that a dtype (0: float, 1:
// bfloat16, 2: half) runs by.
extern "C" __attribute__((visibility("default"))) const char* tokenops_attention_isa(int type) {
  return tokenops::attention::choose(static_cast<tokenops::attention::Type>(type)).name;
}
