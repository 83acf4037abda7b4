// The variants of the CPU attention, one for each instruction set, and the choice among them.
#include "attention.h"

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

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define TOKENOPS_X86 1
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
#endif

namespace tokenops::attention {

template <typename Scratch>
int64_t words_of(const Problem& p) {
  return Scratch::layout(p, nullptr, nullptr);
}

#define TOKENOPS_VARIANT(space, here)                                                               \
  {                                                                                                 \
#space, here, space::attend, space::attend_backward, words_of<space::Scratch>,                      \
        words_of<space::BackwardScratch>, space::WIDTH                                              \
  }

// The best that this machine has for the dtype, or the one that is named.
Variant choose(Type type, const std::string& name) {
#if TOKENOPS_X86
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512vl");
  const bool pairs = avx512 && __builtin_cpu_supports("avx512bf16") && type == Type::BFloat16;
#endif
  const Variant variants[] = {
#if TOKENOPS_X86
      TOKENOPS_VARIANT(avx512bf16, pairs),
      TOKENOPS_VARIANT(avx512, avx512),
      TOKENOPS_VARIANT(avx2, avx2),
#endif
      TOKENOPS_VARIANT(baseline, true),
  };
  for (const Variant& variant : variants) {
    if (variant.here && (name.empty() || name == variant.name)) return variant;
  }
  STD_TORCH_CHECK(false, "this machine has no attention variant ", name, " for this dtype");
  return variants[0];
}

}  // namespace tokenops::attention
