// The CUDA kernels as functions on numpy arrays. Strides and alignment are the arrays' own.
#include "emulation.h"

#include "../../csrc/cuda/merge_neighbours.cuh"
#include "../../csrc/cuda/restore_tokens.cuh"
#include "../../csrc/cuda/select_tokens.cuh"

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <map>
#include <string>
#include <utility>

namespace py = pybind11;
using namespace tokenops;

namespace {

Strided strided(const py::array& x) {
  return {static_cast<char*>(const_cast<void*>(x.data())), x.strides(0), x.strides(1), x.strides(2)};
}

Companion companion(const py::array& x) {
  return {static_cast<char*>(const_cast<void*>(x.data())), x.strides(0), x.strides(1)};
}

template <typename Unit>
void launch_restore_tokens(const RestoreTokens& p, const Plan& plan, bool backward, unsigned seed) {
  const dim3 grid{static_cast<unsigned>(plan.blocks)}, threads{plan.x, plan.y};
  const auto kernel = backward ? restore_tokens_bwd_kernel<Unit> : restore_tokens_fwd_kernel<Unit>;
  emulation::launch(grid, threads, seed, kernel, p);
}

// y, or dbase and dtokens where backward, are written in place. Returns (unit's bytes, blocks, threads x, threads y).
auto restore_tokens(py::array base, py::array tokens, py::array y, py::array index, py::list companions,
                    int64_t prefix, bool backward, int multiprocessors, unsigned seed) {
  RestoreTokens p{};
  p.base = strided(base), p.tokens = strided(tokens), p.y = strided(y);
  p.index = static_cast<const int64_t*>(index.data());
  p.stride_ib = index.strides(0) / 8, p.stride_ik = index.strides(1) / 8;
  for (const auto& item : companions) {  // (old, new, result)
    const auto arrays = py::cast<std::array<py::array, 3>>(item);
    p.companions[p.companions_given++] = {companion(arrays[0]), companion(arrays[1]), companion(arrays[2]),
                                          static_cast<int>(arrays[0].itemsize())};
  }
  p.B = base.shape(0), p.rows = base.shape(1), p.C = base.shape(2), p.prefix = prefix;
  p.k = static_cast<int>(index.shape(1)), p.carried = static_cast<int>(tokens.shape(1) - index.shape(1));
  const Plan chosen = plan(p, base.itemsize(), multiprocessors);
  if (!chosen.width) throw std::invalid_argument("not aligned to its elements");
  with_unit(chosen.width, [&](auto unit) { launch_restore_tokens<decltype(unit)>(p, chosen, backward, seed); });
  return py::make_tuple(chosen.width, chosen.blocks, chosen.x, chosen.y);
}

// (B, N) to (B, k) or, of the gradients, back
void set_companions(SelectTokens& p, const py::list& from, const py::list& to) {
  for (const auto& item : from) {
    const auto in = py::cast<py::array>(item), out = py::cast<py::array>(to[p.companions_given]);
    p.companions[p.companions_given++] = {companion(in), companion(out), static_cast<int>(in.itemsize())};
  }
}

template <typename T, int V>
void launch_select_tokens(const SelectTokens& p, const SelectPlan& plan, bool backward, unsigned seed) {
  const dim3 grid{static_cast<unsigned>(plan.blocks)}, threads{THREADS};
  const auto forward = p.normed ? select_tokens_fwd_kernel<T, V, true> : select_tokens_fwd_kernel<T, V, false>;
  emulation::launch(grid, threads, seed, backward ? select_tokens_bwd_kernel<T, V> : forward, p);
}

template <typename T>
void launch_select_tokens(SelectTokens& p, bool backward, int multiprocessors, unsigned seed) {
  const SelectPlan chosen = plan(p, sizeof(T), multiprocessors, backward);
  if (!chosen.width) throw std::invalid_argument("not aligned to its elements");
  if (chosen.width == 16) launch_select_tokens<T, MOST_IN_PACK<T>>(p, chosen, backward, seed);
  else launch_select_tokens<T, 1>(p, chosen, backward, seed);
}

// Arrays by name, written in place; `type` is the tokens' (numpy has no bfloat16). Returns the bytes of an access, and
// how many blocks an image has.
auto select_tokens(py::dict a, std::string type, std::string score_type, int rest, bool best_first, int64_t prefix,
                   double eps, bool backward, int multiprocessors, unsigned seed) {
  const auto array = [&](const char* name) { return py::cast<py::array>(a[name]); };
  const auto data = [&](const char* name) {
    return a.contains(name) ? static_cast<char*>(const_cast<void*>(array(name).data())) : nullptr;
  };
  SelectTokens p{};
  for (auto [name, target] : {std::pair("x", &p.x), {"tokens", &p.tokens}, {"dx", &p.dx}}) {
    if (a.contains(name)) *target = strided(array(name));
  }
  const py::array scores = array("scores"), index = array("index"), tokens = array("tokens");
  const std::map<std::string, Float> types{
      {"float32", Float::F32}, {"bfloat16", Float::BF16}, {"float16", Float::F16}, {"float64", Float::F64}};
  p.scores = static_cast<const char*>(scores.data()), p.score_type = types.at(score_type);
  p.stride_sb = scores.strides(0) / scores.itemsize(), p.stride_sn = scores.strides(1) / scores.itemsize();
  p.normed = data("normed"), p.fused = data("fused"), p.dscores = data("dscores");
  p.mean = data("mean"), p.deviation = data("deviation"), p.weight = data("weight"), p.bias = data("bias"), p.eps = eps;
  p.index = static_cast<int64_t*>(const_cast<void*>(index.data()));
  p.stride_ib = index.strides(0) / 8, p.stride_ik = index.strides(1) / 8;
  p.counts = reinterpret_cast<const int64_t*>(data("counts"));
  set_companions(p, a["from"], a["to"]);
  p.B = scores.shape(0), p.N = static_cast<int>(scores.shape(1)), p.C = tokens.shape(2), p.prefix = prefix;
  p.k = static_cast<int>(index.shape(1)), p.rest = static_cast<Rest>(rest), p.best_first = best_first;
  if (type == "float32") launch_select_tokens<float>(p, backward, multiprocessors, seed);
  else if (type == "bfloat16") launch_select_tokens<BFloat16>(p, backward, multiprocessors, seed);
  else if (type == "float16") launch_select_tokens<Half>(p, backward, multiprocessors, seed);
  else launch_select_tokens<double>(p, backward, multiprocessors, seed);
  return py::make_tuple(p.C ? p.C * tokens.itemsize() / std::max(p.units, 1) : 0, p.slices);
}

template <typename T, int V>
void launch_merge_neighbours(const MergeNeighbours& p, const MergePlan& plan, bool backward, unsigned seed) {
  const auto forward = p.norm ? merge_neighbours_norm_kernel<T, V> : merge_neighbours_fwd_kernel<T, V>;
  const auto fixed = p.summed ? merge_neighbours_bwd_kernel<T, V, true> : merge_neighbours_bwd_kernel<T, V, false>;
  const auto kernel = !backward ? forward : p.dlogits.data ? merge_neighbours_logits_bwd_kernel<T, V> : fixed;
  emulation::launch({static_cast<unsigned>(plan.blocks)}, {THREADS}, seed, kernel, p);
}

// The blocks' sums are made here, since the plan says how many there are; bfloat16 comes as its bits.
template <typename T>
auto launch_merge_neighbours(MergeNeighbours& p, bool backward, int multiprocessors, unsigned seed) {
  using W = typename Wide<T>::type;
  const MergePlan chosen = plan(p, sizeof(T), multiprocessors);
  if (!chosen.width) throw std::invalid_argument("not aligned to its elements");
  py::array_t<W> sums({p.summed ? chosen.blocks : 0, int64_t{2}, p.C});
  std::fill_n(sums.mutable_data(), sums.size(), W(NAN));
  p.sums = sums.mutable_data();
  if (chosen.width == 16) launch_merge_neighbours<T, MOST_IN_PACK<T>>(p, chosen, backward, seed);
  else launch_merge_neighbours<T, 1>(p, chosen, backward, seed);
  return py::make_tuple(chosen.width, chosen.blocks, p.x_threads, sums);
}

Float float_of(const py::array& a) {
  if (a.itemsize() != 2) return a.itemsize() == 8 ? Float::F64 : Float::F32;
  return a.dtype().kind() == 'f' ? Float::F16 : Float::BF16;
}

// Arrays by name, written in place. Returns the bytes of an access, the blocks, the threads side by side, and the sums.
py::tuple merge_neighbours(py::dict a, int height, int width, bool vertical, int prefix, double alpha, double beta,
                           bool norm, double eps, bool backward, int multiprocessors, unsigned seed) {
  const auto array = [&](const char* name) { return py::cast<py::array>(a[name]); };
  const auto data = [&](const char* name) {
    return a.contains(name) ? static_cast<char*>(const_cast<void*>(array(name).data())) : nullptr;
  };
  MergeNeighbours p{};
  for (auto [name, target] : {std::pair("x", &p.x), {"y", &p.y}, {"dx", &p.dx}}) {
    if (a.contains(name)) *target = strided(array(name));
  }
  for (auto [name, target] : {std::pair("first", &p.first), {"second", &p.second}, {"logits", &p.logits},
                              {"sizes", &p.sizes}, {"merged", &p.merged}, {"dlogits", &p.dlogits}}) {
    if (!a.contains(name) || array(name).size() == 0) continue;
    const py::array t = array(name);
    const bool matrix = t.ndim() == 2;
    const int64_t bytes = t.itemsize(), last = t.strides(matrix) / bytes;
    *target = {data(name), float_of(t), matrix ? t.strides(0) / bytes : 0, !matrix && t.size() == 1 ? 0 : last};
  }
  const py::array y = array("y");
  p.B = y.shape(0), p.rows = static_cast<int>(y.shape(1)), p.C = y.shape(2);
  p.height = height, p.width = width, p.vertical = vertical, p.prefix = prefix, p.alpha = alpha, p.beta = beta;
  p.norm = norm && !backward, p.eps = eps, p.normed = data("normed");
  p.mean = data("mean"), p.deviation = data("deviation"), p.weight = data("weight"), p.bias = data("bias");
  p.summed = backward && a.contains("x") && (a.contains("first") || a.contains("second"));
  switch (float_of(y)) {
    case Float::F32: return launch_merge_neighbours<float>(p, backward, multiprocessors, seed);
    case Float::BF16: return launch_merge_neighbours<BFloat16>(p, backward, multiprocessors, seed);
    case Float::F16: return launch_merge_neighbours<Half>(p, backward, multiprocessors, seed);
    default: return launch_merge_neighbours<double>(p, backward, multiprocessors, seed);
  }
}

// What the sanitizers and the scheduler must catch, each in the last thread of a block.
enum Bug { NONE, GLOBAL_WRITE, SHARED_WRITE, MISALIGNED, OVERFLOW, BARRIER };
using Sums = int[64];

void planted_kernel(int* out, int n, int bug) {
  SHARED(Sums, sums);
  const int thread = threadIdx.x;
  const bool last = thread == n - 1;
  sums[thread] = 1;
  if (last && bug == SHARED_WRITE) *(&sums[0] + 64) = 1;
  if (last && bug == MISALIGNED) sums[0] = reinterpret_cast<uint4*>(out + 1)->x;
  if (last && bug == OVERFLOW) sums[0] = INT32_MAX, sums[0] += thread;
  if (last && bug == BARRIER) __syncwarp(1u << thread % 32 | 1u);
  __syncthreads();
  int sum = thread < 32 ? sums[thread] + (thread + 32 < n ? sums[thread + 32] : 0) : 0;
  for (int bits = 16; bits; bits /= 2) sum += __shfl_xor_sync(~0u, sum, bits);
  if (thread < 32) atomicAdd(&out[thread], __shfl_sync(~0u, sum, 0) + __popc(__ballot_sync(~0u, thread % 2)));
  if (last && bug == GLOBAL_WRITE) out[n] = 1;
}

}  // namespace

PYBIND11_MODULE(emulated, m) {
  m.def("restore_tokens", &restore_tokens);
  m.def("select_tokens", &select_tokens);
  m.def("merge_neighbours", &merge_neighbours);
  m.def("planted", [](py::array_t<int> out, int bug, unsigned seed) {
    const int n = static_cast<int>(out.size());
    emulation::launch({1}, {static_cast<unsigned>(n)}, seed, planted_kernel, out.mutable_data(), n, bug);
  });
}
