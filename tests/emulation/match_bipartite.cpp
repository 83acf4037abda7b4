#include "arguments.h"

#include "../../csrc/cuda/match_bipartite.cuh"

using namespace tokenops;

// index is written, and edges (B, evens) in the accumulation dtype. Results: bytes of an access, blocks of an image
void run(const Arguments& a, int64_t* results) {
  const Array &metric = a["metric"], &index = a["index"], &edges = a["edges"];
  MatchBipartite p{};
  p.metric = strided(metric), p.edges = edges.data, p.scores = edges.data, p.score_type = float_of(edges);
  p.stride_sb = edges.shape[1], p.stride_sn = 1, p.N = static_cast<int>(edges.shape[1]);
  p.index = reinterpret_cast<int64_t*>(index.data);
  p.B = metric.shape[0], p.D = metric.shape[2], p.prefix = a.integer("prefix");
  p.tokens = static_cast<int>(index.shape[1]), p.odds = p.tokens - p.N, p.r = a.integer("r");
  with_type(metric, [&](auto type) {
    using T = decltype(type);
    const Plan chosen = plan(p, sizeof(T), a.integer("multiprocessors"));
    check_alignment(chosen.width);
    const auto kernel = chosen.width == 16 ? match_bipartite_kernel<T, MOST_IN_PACK<T>> : match_bipartite_kernel<T, 1>;
    emulation::launch({static_cast<unsigned>(chosen.blocks)}, {THREADS}, a.seed(), kernel, p);
    const dim3 images{static_cast<unsigned>(p.B)};
    if (p.slices > 1) emulation::launch(images, {THREADS}, a.seed(), match_bipartite_choice_kernel, p);
    results[0] = chosen.width, results[1] = p.slices;
  });
}
