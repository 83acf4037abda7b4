#include "arguments.h"

#include "../../csrc/cuda/merge_neighbours.cuh"

using namespace tokenops;

namespace {

template <typename T, int V>
void launch(const MergeNeighbours& p, const Plan& plan, bool backward, uint64_t seed) {
  const auto forward = p.norm.wanted ? merge_neighbours_norm_kernel<T, V> : merge_neighbours_fwd_kernel<T, V>;
  const auto fixed = p.summed ? merge_neighbours_bwd_kernel<T, V, true> : merge_neighbours_bwd_kernel<T, V, false>;
  const auto kernel = !backward ? forward : p.dlogits.data ? merge_neighbours_logits_bwd_kernel<T, V> : fixed;
  emulation::launch({static_cast<unsigned>(plan.blocks)}, {THREADS}, seed, kernel, p);
}

}  // namespace

// Results: bytes of an access, blocks, threads side by side. `sums` has room for that many blocks or, to ask how many
// there will be, is missing: nothing runs then.
void run(const Arguments& a, int64_t* results) {
  const Array& y = a["y"];
  const bool backward = a.integer("backward");
  MergeNeighbours p{};
  p.x = strided(a, "x"), p.y = strided(y), p.dx = strided(a, "dx");
  for (auto [name, target] : {std::pair("first", &p.first), {"second", &p.second}, {"logits", &p.logits},
                              {"sizes", &p.sizes}, {"merged", &p.merged}, {"dlogits", &p.dlogits}}) {
    const Array* const t = a.find(name);
    if (!t || t->shape[0] * (t->dimensions == 2 ? t->shape[1] : 1) == 0) continue;
    const bool matrix = t->dimensions == 2;
    const int64_t last = t->strides[matrix] / t->itemsize;
    *target = {t->data, float_of(*t), matrix ? t->strides[0] / t->itemsize : 0,
               !matrix && t->shape[0] == 1 ? 0 : last};
  }
  p.B = y.shape[0], p.rows = static_cast<int>(y.shape[1]), p.C = y.shape[2];
  p.height = a.integer("height"), p.width = a.integer("width"), p.vertical = a.integer("vertical");
  p.prefix = a.integer("prefix"), p.alpha = a.number("alpha"), p.beta = a.number("beta");
  p.norm = norm_of(a, a.integer("norm") && !backward);
  p.summed = backward && a.find("x") && (a.find("first") || a.find("second"));
  p.sums = a.data("sums");
  with_type(y, [&](auto type) {
    using T = decltype(type);
    const Plan chosen = plan(p, sizeof(T), a.integer("multiprocessors"));
    check_alignment(chosen.width);
    results[0] = chosen.width, results[1] = chosen.blocks, results[2] = p.x_threads;
    if (p.summed && !p.sums) return;
    const auto launched = chosen.width == 16 ? launch<T, MOST_IN_PACK<T>> : launch<T, 1>;
    launched(p, chosen, backward, a.seed());
  });
}
