#include "arguments.h"

#include "../../csrc/cuda/restore_tokens.cuh"

using namespace tokenops;

namespace {

Companion companion(const Array& a) { return {a.data, a.strides[0], a.strides[1]}; }

}  // namespace

// Written are y and made or, backward, base, tokens, old and fresh. Results: bytes of a unit, blocks, threads x and y
void run(const Arguments& a, int64_t* results) {
  const Array &base = a["base"], &tokens = a["tokens"], &index = a["index"], &old = a["old"];
  RestoreTokens p{};
  p.base = strided(base), p.tokens = strided(tokens), p.y = strided(a["y"]);
  p.index = reinterpret_cast<const int64_t*>(index.data);
  p.stride_ib = index.strides[0] / 8, p.stride_ik = index.strides[1] / 8;
  p.companions[0] = {companion(old), companion(a["fresh"]), companion(a["made"]), static_cast<int>(old.itemsize)};
  p.companions_given = 1;
  p.B = base.shape[0], p.rows = base.shape[1], p.C = base.shape[2], p.prefix = a.integer("prefix");
  p.k = static_cast<int>(index.shape[1]), p.carried = static_cast<int>(tokens.shape[1] - index.shape[1]);
  const RestorePlan chosen = plan(p, base.itemsize, a.integer("multiprocessors"));
  check_alignment(chosen.width);
  with_unit(chosen.width, [&](auto unit) {
    using Unit = decltype(unit);
    const auto kernel = a.integer("backward") ? restore_tokens_bwd_kernel<Unit> : restore_tokens_fwd_kernel<Unit>;
    emulation::launch({static_cast<unsigned>(chosen.blocks)}, {chosen.x, chosen.y}, a.seed(), kernel, p);
  });
  results[0] = chosen.width, results[1] = chosen.blocks, results[2] = chosen.x, results[3] = chosen.y;
}
