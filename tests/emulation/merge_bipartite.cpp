#include "arguments.h"

#include "../../csrc/cuda/merge_bipartite.cuh"

using namespace tokenops;

// Merges x into y or, where `back`, takes x from y. Results: bytes of an access, blocks, threads side by side
void run(const Arguments& a, int64_t* results) {
  const Array &x = a["x"], &y = a["y"], &index = a["index"];
  const bool back = a.integer("back");
  MergeBipartite p{};
  p.x = strided(x), p.y = strided(y), p.index = reinterpret_cast<const int64_t*>(index.data);
  p.stride_ib = index.strides[0] / 8, p.stride_in = index.strides[1] / 8;
  for (auto [name, target] : {std::pair("sizes", &p.sizes), {"merged", &p.merged}}) {
    const Array* const t = a.find(name);
    if (t) *target = {t->data, float_of(*t), t->strides[0] / t->itemsize, t->strides[1] / t->itemsize};
  }
  p.totals = a.data("totals"), p.logs = a.data("logs"), p.norm = norm_of(a, a.find("normed"));
  p.mean = a.integer("weighted"), p.B = x.shape[0], p.C = x.shape[2];
  p.prefix = a.integer("prefix");
  p.tokens = static_cast<int>(x.shape[1]) - p.prefix, p.merged_tokens = static_cast<int>(y.shape[1]) - p.prefix;
  with_type(x, [&](auto type) {
    using T = decltype(type);
    constexpr int V = MOST_IN_PACK<T>;
    const Plan chosen = plan(p, sizeof(T), a.integer("multiprocessors"), back);
    check_alignment(chosen.width);
    const auto wide = p.norm.wanted ? merge_bipartite_kernel<T, V, true> : merge_bipartite_kernel<T, V, false>;
    const auto narrow = p.norm.wanted ? merge_bipartite_kernel<T, 1, true> : merge_bipartite_kernel<T, 1, false>;
    const auto backward = chosen.width == 16 ? unmerge_bipartite_kernel<T, V> : unmerge_bipartite_kernel<T, 1>;
    const auto kernel = back ? backward : chosen.width == 16 ? wide : narrow;
    emulation::launch({static_cast<unsigned>(chosen.blocks)}, {THREADS}, a.seed(), kernel, p);
    results[0] = chosen.width, results[1] = chosen.blocks, results[2] = p.x_threads;
  });
}
