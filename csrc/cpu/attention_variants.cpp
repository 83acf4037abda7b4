// The variants of the CPU attention, one for each instruction set, and the choice among them.
#include "attention.h"

#include <atomic>
#include <cstdlib>
#include <type_traits>
#include <vector>

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

#if __GNUC__ >= 11 && defined(__linux__)
#define TOKENOPS_AMX 1
#include "tiles.h"
#pragma GCC diagnostic ignored "-Wuninitialized"  // of GCC 12's own intrinsics
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC push_options
#pragma GCC target("avx2,fma,bmi,bmi2,avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,amx-tile,amx-bf16")
#include "attention_amx.h"
#pragma GCC pop_options
#endif
#endif

namespace tokenops::attention {

template <typename Scratch>
int64_t words_of(const Problem& p) {
  return Scratch::layout(p, nullptr, nullptr);
}

#define TOKENOPS_VARIANT(space, plain, here)                                                        \
  {                                                                                                 \
#space, here, space::attend, space::attend_backward, plain::mean_keys, words_of<space::Scratch>,    \
        words_of<space::BackwardScratch>, space::WIDTH                                              \
  }

// All there are, the best first; those of `here` this machine has, for the dtype.
std::vector<Variant> variants(Type type) {
#if TOKENOPS_X86
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512vl");
  const bool pairs = avx512 && __builtin_cpu_supports("avx512bf16") && type == Type::BFloat16;
#if TOKENOPS_AMX
  const bool tiles = pairs && amx::here();
#endif
#endif
  return {
#if TOKENOPS_X86
#if TOKENOPS_AMX
      TOKENOPS_VARIANT(amx, avx512bf16, tiles),
#else
      {"amx", false},
#endif
      TOKENOPS_VARIANT(avx512bf16, avx512bf16, pairs),
      TOKENOPS_VARIANT(avx512, avx512, avx512),
      TOKENOPS_VARIANT(avx2, avx2, avx2),
#else
      {"amx", false}, {"avx512bf16", false}, {"avx512", false}, {"avx2", false},
#endif
      TOKENOPS_VARIANT(baseline, baseline, true),
  };
}

// The place of a name among them; that of the best for an empty one, -1 for one that is not there.
int place_of(const std::string& name) {
  const std::vector<Variant> all = variants(Type::BFloat16);
  for (size_t i = 0; i < all.size(); ++i)
    if (name.empty() || name == all[i].name) return static_cast<int>(i);
  return -1;
}

// The best that may be used, by its place, until another is said: that which TOKENOPS_CPU_ISA names.
std::atomic<int>& most() {
  static std::atomic<int> place{std::getenv("TOKENOPS_CPU_ISA") ? place_of(std::getenv("TOKENOPS_CPU_ISA")) : 0};
  return place;
}

Variant choose(Type type) {
  const std::vector<Variant> all = variants(type);
  const int first = most();
  STD_TORCH_CHECK(first >= 0, "TOKENOPS_CPU_ISA is ", std::getenv("TOKENOPS_CPU_ISA"), ", which is none of ours");
  size_t i = static_cast<size_t>(first);
  while (!all[i].here) ++i;
  return all[i];
}

}  // namespace tokenops::attention

// For Python, which asks while tensors are traced too: no operators.
#define TOKENOPS_EXPORT extern "C" __attribute__((visibility("default")))

// The instruction set that a dtype (0: float, 1: bfloat16, 2: half) runs by.
TOKENOPS_EXPORT const char* tokenops_attention_isa(int type) {
  return tokenops::attention::choose(static_cast<tokenops::attention::Type>(type)).name;
}

// From now on none better than the one of this name ("": all); gives the name that this was, null for an unknown one.
TOKENOPS_EXPORT const char* tokenops_limit_cpu_isa(const char* name) {
  using namespace tokenops::attention;
  const int place = place_of(name);
  return place < 0 ? nullptr : variants(Type::BFloat16)[most().exchange(place)].name;
}
