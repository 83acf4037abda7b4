// The CUDA kernels as functions on numpy arrays. Strides and alignment are the arrays' own.
#include "emulation.h"

#include "../../csrc/cuda/restore_tokens.cuh"

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <string>

namespace py = pybind11;
using namespace tokenops;

namespace {

Strided strided(const py::array& x) {
  return {static_cast<char*>(const_cast<void*>(x.data())), x.strides(0), x.strides(1), x.strides(2)};
}

template <typename Unit>
void launch_restore_tokens(const RestoreTokens& p, const Plan& plan, bool backward, unsigned seed) {
  const dim3 grid{static_cast<unsigned>(plan.blocks)}, threads{plan.x, plan.y};
  const auto kernel = backward ? restore_tokens_bwd_kernel<Unit> : restore_tokens_fwd_kernel<Unit>;
  emulation::launch(grid, threads, seed, kernel, p);
}

// y, or dbase and dtokens where backward, are written in place. Returns (unit's bytes, blocks, threads x, threads y).
auto restore_tokens(py::array base, py::array tokens, py::array y, py::array index, int64_t prefix, bool backward,
                    int multiprocessors, unsigned seed) {
  RestoreTokens p{};
  p.base = strided(base), p.tokens = strided(tokens), p.y = strided(y);
  p.index = static_cast<const int64_t*>(index.data());
  p.stride_ib = index.strides(0) / 8, p.stride_ik = index.strides(1) / 8;
  p.B = base.shape(0), p.rows = base.shape(1), p.C = base.shape(2), p.prefix = prefix;
  p.k = static_cast<int>(index.shape(1)), p.carried = static_cast<int>(tokens.shape(1) - index.shape(1));
  const Plan chosen = plan(p, base.itemsize(), multiprocessors);
  if (!chosen.width) throw std::invalid_argument("not aligned to its elements");
  with_unit(chosen.width, [&](auto unit) { launch_restore_tokens<decltype(unit)>(p, chosen, backward, seed); });
  return py::make_tuple(chosen.width, chosen.blocks, chosen.x, chosen.y);
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
  m.def("planted", [](py::array_t<int> out, int bug, unsigned seed) {
    const int n = static_cast<int>(out.size());
    emulation::launch({1}, {static_cast<unsigned>(n)}, seed, planted_kernel, out.mutable_data(), n, bug);
  });
}
