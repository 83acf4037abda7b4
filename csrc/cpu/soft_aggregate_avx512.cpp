// The weights of soft_aggregate and their gradient on AVX-512: 32 slots of an image at a time, in any order in memory.
#include "soft_aggregate.h"
#include "isa.h"

#if TOKENOPS_X86
#include <immintrin.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <new>

#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // in GCC 12's intrinsics
#pragma GCC diagnostic ignored "-Wuninitialized"

namespace tokenops {

#pragma GCC push_options
#pragma GCC target("avx2,fma,bmi,bmi2,f16c,avx512f,avx512bw,avx512dq,avx512vl")

namespace {

using namespace soft_aggregate;

#include "avx512.h"
#include "soft_aggregate_panels.h"

thread_local ThreadMemory scratch;

// Calls body(b, first slot, slots, memory for `count` panels, floats of a panel) for panels of all images, in parallel.
template <typename F>
void for_panels(const Sizes& z, int64_t count, const F& body) {
  const int64_t panels = (z.M + WIDTH - 1) / WIDTH, size = (z.N + 16) * WIDTH;
  torch::stable::parallel_for(0, z.B * panels, 1 + (1 << 14) / size, [&](int64_t begin, int64_t end) {
    float* memory = reinterpret_cast<float*>(scratch.of(4 * count * size));
    for (int64_t i = begin; i < end; ++i) {
      const int64_t m = i % panels * WIDTH;
      body(i / panels, m, std::min(WIDTH, z.M - m), memory, size);
    }
  });
}

}  // namespace

void soft_aggregate::weights_on_avx512(const Sizes& z, const Logits& w, float scale, const Mask& mask, const Logits& a,
                                       const Logits* turned) {
  for_panels(z, 1, [&](int64_t b, int64_t m, int64_t slots, float* panel, int64_t) {
    __m512 by[2] = {};
    load_panel(w, b, m, z.N, slots, panel);
    if (slots > 16) softmax_panel<2>(panel, z.N, scale, mask.image(b), mask.stride_n, by);
    else softmax_panel<1>(panel, z.N, scale, mask.image(b), mask.stride_n, by);
    for (int64_t n = 0; n < z.N; ++n, panel += WIDTH) {
      _mm512_store_ps(panel, _mm512_mul_ps(by[0], _mm512_load_ps(panel)));
      if (slots > 16) _mm512_store_ps(panel + 16, _mm512_mul_ps(by[1], _mm512_load_ps(panel + 16)));
    }
    store_panel(a, b, m, z.N, slots, panel - z.N * WIDTH);
    if (turned) store_panel(*turned, b, m, z.N, slots, panel - z.N * WIDTH);
  });
}

void soft_aggregate::weights_backward_on_avx512(const Sizes& z, const Logits& da, const Logits& a, const Logits& w,
                                                float scale, const Logits& dw, float* partial) {
  for_panels(z, 3, [&](int64_t b, int64_t m, int64_t slots, float* panel, int64_t size) {
    float *panel_da = panel + size, *panel_w = partial ? panel + 2 * size : nullptr;
    alignas(64) float sums[WIDTH];
    load_panel(a, b, m, z.N, slots, panel);
    load_panel(da, b, m, z.N, slots, panel_da);
    if (partial) load_panel(w, b, m, z.N, slots, panel_w);
    if (slots > 16) softmax_backward_panel<2>(panel, panel_da, panel_w, z.N, scale, sums);
    else softmax_backward_panel<1>(panel, panel_da, panel_w, z.N, scale, sums);
    store_panel(dw, b, m, z.N, slots, panel_da);
    if (partial) std::memcpy(partial + b * z.M + m, sums, 4 * slots);
  });
}

#pragma GCC pop_options
}  // namespace tokenops

#else

namespace tokenops {
void soft_aggregate::weights_on_avx512(const Sizes&, const Logits&, float, const Mask&, const Logits&, const Logits*) {
  STD_TORCH_CHECK(false, "compiled without AVX-512");
}
void soft_aggregate::weights_backward_on_avx512(const Sizes&, const Logits&, const Logits&, const Logits&, float,
                                                const Logits&, float*) {
  STD_TORCH_CHECK(false, "compiled without AVX-512");
}
}  // namespace tokenops

#endif
