// The kernels of bipartite merging as functions on numpy arrays. Strides and alignment are the arrays' own.
#include "emulation.h"

#include "../../csrc/cuda/match_bipartite.cuh"
#include "../../csrc/cuda/merge_bipartite.cuh"

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <utility>

namespace py = pybind11;
using namespace tokenops;

namespace {

Strided strided(const py::array& x) {
  return {static_cast<char*>(const_cast<void*>(x.data())), x.strides(0), x.strides(1), x.strides(2)};
}

// bfloat16 comes as its bits
Float float_of(const py::array& a) {
  if (a.itemsize() != 2) return a.itemsize() == 8 ? Float::F64 : Float::F32;
  return a.dtype().kind() == 'f' ? Float::F16 : Float::BF16;
}

template <typename F>
auto with_type(const py::array& a, const F& f) {
  switch (float_of(a)) {
    case Float::F32: return f(float{});
    case Float::BF16: return f(BFloat16{});
    case Float::F16: return f(Half{});
    default: return f(double{});
  }
}

// index is written, and edges (B, evens) in the accumulation dtype. Returns (bytes of an access, blocks of an image).
auto match_bipartite(py::array metric, py::array index, py::array edges, int64_t prefix, int r, int multiprocessors,
                     unsigned seed) {
  MatchBipartite p{};
  p.metric = strided(metric), p.edges = const_cast<void*>(edges.data());
  p.scores = static_cast<const char*>(edges.data()), p.score_type = float_of(edges);
  p.stride_sb = edges.shape(1), p.stride_sn = 1, p.N = static_cast<int>(edges.shape(1));
  p.index = static_cast<int64_t*>(const_cast<void*>(index.data()));
  p.B = metric.shape(0), p.D = metric.shape(2), p.prefix = prefix, p.tokens = static_cast<int>(index.shape(1));
  p.odds = p.tokens - p.N, p.r = r;
  return with_type(metric, [&](auto type) {
    using T = decltype(type);
    const MatchPlan chosen = plan(p, sizeof(T), multiprocessors);
    if (!chosen.width) throw std::invalid_argument("not aligned to its elements");
    const auto kernel = chosen.width == 16 ? match_bipartite_kernel<T, MOST_IN_PACK<T>> : match_bipartite_kernel<T, 1>;
    emulation::launch({static_cast<unsigned>(chosen.blocks)}, {THREADS}, seed, kernel, p);
    const dim3 images{static_cast<unsigned>(p.B)};
    if (p.slices > 1) emulation::launch(images, {THREADS}, seed, match_bipartite_choice_kernel, p);
    return py::make_tuple(chosen.width, p.slices);
  });
}

// Merges x into y or, where `back`, takes x from y; arrays by name. Returns (bytes of an access, blocks, threads).
auto merge_bipartite(py::dict a, int prefix, bool mean, double eps, bool back, int multiprocessors, unsigned seed) {
  const auto array = [&](const char* name) { return py::cast<py::array>(a[name]); };
  const auto data = [&](const char* name) {
    return a.contains(name) ? static_cast<char*>(const_cast<void*>(array(name).data())) : nullptr;
  };
  MergeBipartite p{};
  const py::array x = array("x"), y = array("y"), index = array("index");
  p.x = strided(x), p.y = strided(y), p.index = static_cast<const int64_t*>(index.data());
  p.stride_ib = index.strides(0) / 8, p.stride_in = index.strides(1) / 8;
  for (auto [name, target] : {std::pair("sizes", &p.sizes), {"merged", &p.merged}}) {
    if (!a.contains(name)) continue;
    const py::array t = array(name);
    *target = {data(name), float_of(t), t.strides(0) / t.itemsize(), t.strides(1) / t.itemsize()};
  }
  p.totals = data("totals"), p.logs = data("logs"), p.normed = data("normed"), p.norm = p.normed;
  p.means = data("mean"), p.deviations = data("deviation"), p.weight = data("weight"), p.bias = data("bias");
  p.mean = mean, p.eps = eps, p.B = x.shape(0), p.C = x.shape(2), p.prefix = prefix;
  p.tokens = static_cast<int>(x.shape(1)) - prefix, p.merged_tokens = static_cast<int>(y.shape(1)) - prefix;
  return with_type(x, [&](auto type) {
    using T = decltype(type);
    constexpr int V = MOST_IN_PACK<T>;
    const BipartitePlan chosen = plan(p, sizeof(T), multiprocessors, back);
    if (!chosen.width) throw std::invalid_argument("not aligned to its elements");
    const auto wide = p.norm ? merge_bipartite_kernel<T, V, true> : merge_bipartite_kernel<T, V, false>;
    const auto narrow = p.norm ? merge_bipartite_kernel<T, 1, true> : merge_bipartite_kernel<T, 1, false>;
    const auto backward = chosen.width == 16 ? unmerge_bipartite_kernel<T, V> : unmerge_bipartite_kernel<T, 1>;
    const auto kernel = back ? backward : chosen.width == 16 ? wide : narrow;
    emulation::launch({static_cast<unsigned>(chosen.blocks)}, {THREADS}, seed, kernel, p);
    return py::make_tuple(chosen.width, chosen.blocks, p.x_threads);
  });
}

}  // namespace

PYBIND11_MODULE(emulated, m) {
  m.def("match_bipartite", &match_bipartite);
  m.def("merge_bipartite", &merge_bipartite);
}
