#include "arguments.h"

#include "../../csrc/cuda/select_tokens.cuh"

using namespace tokenops;

namespace {

template <typename T, int V>
void launch(const SelectTokens& p, const Plan& plan, bool backward, uint64_t seed) {
  const auto forward = p.norm.wanted ? select_tokens_fwd_kernel<T, V, true> : select_tokens_fwd_kernel<T, V, false>;
  const auto kernel = backward ? select_tokens_bwd_kernel<T, V> : forward;
  emulation::launch({static_cast<unsigned>(plan.blocks)}, {THREADS}, seed, kernel, p);
}

}  // namespace

// `from` goes to `to`: (B, N) to (B, k) or, of the gradients, back. Where `narrow`, threads side by side are fewer than
// planned, so that each has several turns and others below it. Results: bytes of an access, blocks of an image
void run(const Arguments& a, int64_t* results) {
  const Array &scores = a["scores"], &index = a["index"], &tokens = a["tokens"], &from = a["from"], &to = a["to"];
  const bool backward = a.integer("backward");
  SelectTokens p{};
  p.x = strided(a, "x"), p.tokens = strided(tokens), p.dx = strided(a, "dx");
  p.scores = scores.data, p.score_type = float_of(scores);
  p.stride_sb = scores.strides[0] / scores.itemsize, p.stride_sn = scores.strides[1] / scores.itemsize;
  p.norm = norm_of(a, a.find("normed")), p.fused = a.data("fused"), p.dscores = a.data("dscores");
  p.index = reinterpret_cast<int64_t*>(index.data);
  p.stride_ib = index.strides[0] / 8, p.stride_ik = index.strides[1] / 8;
  p.counts = reinterpret_cast<const int64_t*>(a.data("counts"));
  p.companions[0] = {{from.data, from.strides[0], from.strides[1]},
                     {to.data, to.strides[0], to.strides[1]},
                     static_cast<int>(from.itemsize)};
  p.companions_given = 1;
  p.B = scores.shape[0], p.N = static_cast<int>(scores.shape[1]), p.C = tokens.shape[2];
  p.prefix = a.integer("prefix"), p.k = static_cast<int>(index.shape[1]);
  p.rest = static_cast<Rest>(a.integer("rest")), p.best_first = a.integer("best_first");
  with_type(tokens, [&](auto type) {
    using T = decltype(type);
    const Plan chosen = plan(p, sizeof(T), a.integer("multiprocessors"), backward);
    check_alignment(chosen.width);
    if (a.integer("narrow")) p.x_threads = (p.x_threads + 2) / 3;
    const auto launched = chosen.width == 16 ? launch<T, MOST_IN_PACK<T>> : launch<T, 1>;
    launched(p, chosen, backward, a.seed());
    results[0] = p.C ? chosen.width : 0, results[1] = p.slices;
  });
}
