// Launches of match_bipartite.cuh and merge_bipartite.cuh.
#include "merge_bipartite.cuh"

#include "../merge_bipartite.h"
#include "launch.h"
#include "match_bipartite.cuh"

namespace tokenops {
namespace {

const char* const OP = "merge_bipartite";

// Two launches where several blocks look for an image's edges: one block would make few images wait for it.
Tensor match_bipartite_fwd(Tensor metric, int64_t r, int64_t prefix) {
  const Sides sides = checked_sides(metric, r, prefix);
  const int64_t D = metric.size(2);
  STD_TORCH_CHECK(sides.tokens <= MOST_TOKENS && D * static_cast<int64_t>(metric.element_size()) <= INT_MAX / 2,
                  "tokens exceed 16384, or channels 2^30");
  const Tensor index = new_index(metric, sides);
  if (index.numel() == 0) return index;
  const OnDevice on(OP, metric);
  const Tensor edges = new_tensor(metric, {metric.size(0), r ? sides.evens : 0}, wide_type(metric));
  MatchBipartite p{};
  p.metric = strided(metric), p.edges = edges.data_ptr(), p.index = static_cast<int64_t*>(index.data_ptr());
  p.scores = static_cast<const char*>(edges.data_ptr()), p.score_type = float_of(edges);
  p.stride_sb = sides.evens, p.stride_sn = 1, p.N = static_cast<int>(sides.evens);
  p.B = metric.size(0), p.D = D, p.prefix = prefix, p.tokens = static_cast<int>(sides.tokens);
  p.odds = static_cast<int>(sides.odds), p.r = static_cast<int>(r);
  const Plan chosen = plan(p, static_cast<int64_t>(metric.element_size()), on.multiprocessors);
  launch(OP, chosen, metric, [&](auto type) {
    using T = decltype(type);
    const dim3 grid(static_cast<unsigned>(chosen.blocks)), images(static_cast<unsigned>(p.B));
    if (chosen.width == 16) match_bipartite_kernel<T, MOST_IN_PACK<T>><<<grid, THREADS, 0, on.stream>>>(p);
    else match_bipartite_kernel<T, 1><<<grid, THREADS, 0, on.stream>>>(p);
    const size_t list = p.N * sizeof(uint16_t);
    if (p.slices > 1) match_bipartite_choice_kernel<<<images, THREADS, list, on.stream>>>(p);
  });
  return index;
}

// x is (B, P+N, C) and y (B, P+M, C).
MergeBipartite common(const Tensor& x, const Tensor& y, const Tensor& index, int64_t prefix) {
  STD_TORCH_CHECK(x.size(1) <= INT_MAX / 2 && y.size(1) <= INT_MAX / 2 &&
                      x.size(2) * static_cast<int64_t>(x.element_size()) <= INT_MAX / 2,
                  "tokens or channels exceed 2^30");
  MergeBipartite p{};
  p.x = strided(x), p.y = strided(y);
  p.index = static_cast<const int64_t*>(index.data_ptr());
  p.stride_ib = index.stride(0), p.stride_in = index.stride(1);
  p.B = x.size(0), p.C = x.size(2), p.prefix = static_cast<int>(prefix);
  p.tokens = static_cast<int>(x.size(1) - prefix), p.merged_tokens = static_cast<int>(y.size(1) - prefix);
  return p;
}

void merge(MergeBipartite& p, const Tensor& x) {
  const OnDevice on(OP, x);
  const Plan chosen = plan(p, static_cast<int64_t>(x.element_size()), on.multiprocessors, false);
  launch(OP, chosen, x, [&](auto type) {
    using T = decltype(type);
    constexpr int V = MOST_IN_PACK<T>;
    const dim3 grid(static_cast<unsigned>(chosen.blocks));
    if (chosen.width == 16 && p.norm.wanted) merge_bipartite_kernel<T, V, true><<<grid, THREADS, 0, on.stream>>>(p);
    else if (chosen.width == 16) merge_bipartite_kernel<T, V, false><<<grid, THREADS, 0, on.stream>>>(p);
    else if (p.norm.wanted) merge_bipartite_kernel<T, 1, true><<<grid, THREADS, 0, on.stream>>>(p);
    else merge_bipartite_kernel<T, 1, false><<<grid, THREADS, 0, on.stream>>>(p);
  });
}

void unmerge(MergeBipartite& p, const Tensor& y) {
  const OnDevice on(OP, y);
  const Plan chosen = plan(p, static_cast<int64_t>(y.element_size()), on.multiprocessors, true);
  launch(OP, chosen, y, [&](auto type) {
    using T = decltype(type);
    const dim3 grid(static_cast<unsigned>(chosen.blocks));
    if (chosen.width == 16) unmerge_bipartite_kernel<T, MOST_IN_PACK<T>><<<grid, THREADS, 0, on.stream>>>(p);
    else unmerge_bipartite_kernel<T, 1><<<grid, THREADS, 0, on.stream>>>(p);
  });
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> merge_bipartite_fwd(Tensor x, Tensor index, int64_t tokens,
                                                                       std::optional<Tensor> sizes,
                                                                       std::optional<Tensor> weight,
                                                                       std::optional<Tensor> bias, int64_t prefix,
                                                                       bool norm, double eps) {
  const MergedTokens out(x, index, tokens, sizes, prefix, norm);
  MergeBipartite p = common(x, out.y, index, prefix);
  p.sizes = values(sizes), p.mean = true, p.norm = norm_of(norm, x, out.normed, out.statistics, weight, bias, eps);
  p.totals = out.sizes.data_ptr(), p.logs = out.log_sizes.data_ptr();
  merge(p, x);
  return out.tuple();
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> merge_bipartite_matched(
    Tensor x, Tensor metric, int64_t r, std::optional<Tensor> sizes, std::optional<Tensor> weight,
    std::optional<Tensor> bias, int64_t prefix, bool norm, double eps) {
  const Tensor index = match_bipartite_fwd(metric, r, prefix);
  auto [y, totals, logs, normed, statistics] =
      merge_bipartite_fwd(x, index, index.size(1) - r, sizes, weight, bias, prefix, norm, eps);
  return {y, index, totals, logs, normed, statistics};
}

Tensor merge_bipartite_bwd(Tensor dy, Tensor index, std::optional<Tensor> sizes, Tensor merged, int64_t prefix) {
  const Tensor dx = new_merge_gradient(dy, index, sizes, merged, prefix);
  MergeBipartite p = common(dx, dy, index, prefix);
  p.sizes = values(sizes), p.merged = values(merged);
  unmerge(p, dy);
  return dx;
}

Tensor unmerge_bipartite_fwd(Tensor y, Tensor index, int64_t prefix) {
  check_tokens("y", y, index, prefix);
  const Tensor x = new_tokens(y, prefix, index.size(1));
  MergeBipartite p = common(x, y, index, prefix);
  unmerge(p, y);
  return x;
}

Tensor unmerge_bipartite_bwd(Tensor dx, Tensor index, int64_t tokens, int64_t prefix) {
  check_indexed("dx", dx, index, prefix);
  const Tensor dy = new_tokens(dx, prefix, tokens);
  MergeBipartite p = common(dx, dy, index, prefix);
  merge(p, dx);
  return dy;
}

}  // namespace
}  // namespace tokenops

STABLE_TORCH_LIBRARY_IMPL(tokenops, CUDA, m) {
  m.impl("match_bipartite_fwd.native", TORCH_BOX(&tokenops::match_bipartite_fwd));
  m.impl("merge_bipartite_fwd.native", TORCH_BOX(&tokenops::merge_bipartite_fwd));
  m.impl("merge_bipartite_matched.native", TORCH_BOX(&tokenops::merge_bipartite_matched));
  m.impl("merge_bipartite_bwd.native", TORCH_BOX(&tokenops::merge_bipartite_bwd));
  m.impl("unmerge_bipartite_fwd.native", TORCH_BOX(&tokenops::unmerge_bipartite_fwd));
  m.impl("unmerge_bipartite_bwd.native", TORCH_BOX(&tokenops::unmerge_bipartite_bwd));
}
