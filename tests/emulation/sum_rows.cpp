#include "arguments.h"

#include "../../csrc/cuda/sum_rows.cuh"

using namespace tokenops;

namespace {

const int64_t* integers(const Arguments& a, const char* name) {
  return reinterpret_cast<const int64_t*>(a.data(name));
}

template <typename T>
void gather(const Arguments& a, int64_t* results) {
  constexpr int V = MOST_IN_PACK<T>;
  GatherRows p{};
  p.dy = strided(a["dy"]), p.x = strided(a, "x"), p.dx = strided(a["dx"]), p.dest = integers(a, "dest");
  p.weight = a.data("each"), p.totals = a.data("totals"), p.dots = a.data("dots");
  p.rows = a["dx"].shape[1], p.given = a["dy"].shape[1], p.C = a["dx"].shape[2];
  const Plan chosen = plan(p, sizeof(T), a.integer("multiprocessors"));
  check_alignment(chosen.width);
  const auto wide = p.x.data ? packed_gather_kernel<T, V, true> : packed_gather_kernel<T, V, false>;
  const auto narrow = p.x.data ? packed_gather_kernel<T, 1, true> : packed_gather_kernel<T, 1, false>;
  const auto kernel = chosen.width == 16 ? wide : narrow;
  emulation::launch({static_cast<unsigned>(chosen.blocks)}, {THREADS}, a.seed(), kernel, p);
  results[0] = chosen.width, results[1] = chosen.blocks, results[2] = p.x_threads;
}

template <typename T>
void sum(const Arguments& a, int64_t* results) {
  constexpr int V = MOST_IN_PACK<T>;
  SumRows p{};
  p.x = strided(a["x"]), p.y = strided(a["y"]);
  p.dest = integers(a, "dest"), p.order = integers(a, "order"), p.offsets = integers(a, "offsets");
  p.weight = a.data("each"), p.mean = a.integer("averaged"), p.totals = a.data("totals");
  p.parts = a.data("parts"), p.shares = a.data("shares"), p.norm = norm_of(a, a.find("normed"));
  p.sources = a["x"].shape[1], p.rows = a["y"].shape[1], p.C = a["x"].shape[2];
  p.windows = p.parts ? a["shares"].shape[0] : 0;
  const Plan chosen = plan(p, sizeof(T), a.integer("multiprocessors"));
  check_alignment(chosen.width);
  const bool packs = chosen.width == 16;
  if (p.windows) {
    const auto before = packs ? packed_parts_kernel<T, V> : packed_parts_kernel<T, 1>;
    emulation::launch({static_cast<unsigned>(p.windows * p.slices)}, {THREADS}, a.seed(), before, p);
  }
  const auto wide = p.norm.wanted ? packed_sums_kernel<T, V, true> : packed_sums_kernel<T, V, false>;
  const auto narrow = p.norm.wanted ? packed_sums_kernel<T, 1, true> : packed_sums_kernel<T, 1, false>;
  emulation::launch({static_cast<unsigned>(chosen.blocks)}, {THREADS}, a.seed(), packs ? wide : narrow, p);
  results[0] = chosen.width, results[1] = chosen.blocks, results[2] = p.x_threads;
}

}  // namespace

// Sums of rows of x in y or, where `back`, takes dx from dy. Results: bytes of an access, blocks, lanes on a row
void run(const Arguments& a, int64_t* results) {
  with_type(a[a.integer("back") ? "dx" : "x"], [&](auto type) {
    using T = decltype(type);
    if (a.integer("back")) gather<T>(a, results);
    else sum<T>(a, results);
  });
}
