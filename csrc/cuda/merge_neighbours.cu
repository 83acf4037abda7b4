// Launches of merge_neighbours.cuh.
#include "merge_neighbours.cuh"

#include "../merge_neighbours.h"
#include "launch.h"

namespace tokenops {
namespace {

const char* const OP = "merge_neighbours";

// (C,) or one element
Values factors(const std::optional<Tensor>& t) {
  if (!t) return {};
  return {static_cast<char*>(t->data_ptr()), float_of(*t), 0, t->size(0) == 1 ? 0 : t->stride(0)};
}

template <typename T, int V>
void launch_as(const MergeNeighbours& p, const Plan& plan, bool backward, cudaStream_t stream) {
  const dim3 grid(static_cast<unsigned>(plan.blocks));
  if (!backward && p.norm.wanted) merge_neighbours_norm_kernel<T, V><<<grid, THREADS, plan.shared, stream>>>(p);
  else if (!backward) merge_neighbours_fwd_kernel<T, V><<<grid, THREADS, 0, stream>>>(p);
  else if (p.dlogits.data) merge_neighbours_logits_bwd_kernel<T, V><<<grid, THREADS, 0, stream>>>(p);
  else if (p.summed) merge_neighbours_bwd_kernel<T, V, true><<<grid, THREADS, 0, stream>>>(p);
  else merge_neighbours_bwd_kernel<T, V, false><<<grid, THREADS, 0, stream>>>(p);
}

// What both directions tell the kernels; `like` has the tokens' dtype, images and channels.
MergeNeighbours common(const Tensor& like, const Grid& grid, int64_t prefix, double alpha, double beta,
                       const std::optional<Tensor>& first, const std::optional<Tensor>& second,
                       const std::optional<Tensor>& logits, const std::optional<Tensor>& sizes) {
  STD_TORCH_CHECK(grid.height <= INT_MAX / 4 && grid.width <= INT_MAX / 4 && prefix <= INT_MAX / 4 &&
                      grid.height * grid.width <= INT_MAX / 4 &&
                      like.size(2) * static_cast<int64_t>(like.element_size()) <= INT_MAX / 2,
                  "tokens exceed 2^29, or channels 2^30");
  MergeNeighbours p{};
  p.first = factors(first), p.second = factors(second), p.logits = values(logits), p.sizes = values(sizes);
  p.alpha = alpha, p.beta = beta, p.B = like.size(0), p.C = like.size(2), p.prefix = static_cast<int>(prefix);
  p.height = static_cast<int>(grid.height), p.width = static_cast<int>(grid.width), p.vertical = grid.vertical;
  p.rows = static_cast<int>(prefix + grid.merged());
  return p;
}

void run(const MergeNeighbours& p, const Plan& chosen, const Tensor& like, bool backward, cudaStream_t stream) {
  launch(OP, chosen, like, [&](auto type) {
    using T = decltype(type);
    if (chosen.width == 16) launch_as<T, MOST_IN_PACK<T>>(p, chosen, backward, stream);
    else launch_as<T, 1>(p, chosen, backward, stream);
  });
}

std::tuple<Tensor, Tensor, Tensor, Tensor> merge_neighbours_fwd(
    Tensor x, std::optional<Tensor> first, std::optional<Tensor> second, std::optional<Tensor> logits,
    std::optional<Tensor> sizes, std::optional<Tensor> weight, std::optional<Tensor> bias, int64_t height,
    int64_t width, bool vertical, int64_t prefix, double alpha, double beta, bool norm, double eps) {
  const Grid grid{height, width, vertical};
  check_merge(x, grid, height * width, prefix, first, second, logits, sizes);
  const Merged out(x, sizes, grid, prefix, norm);
  MergeNeighbours p = common(x, grid, prefix, alpha, beta, first, second, logits, sizes);
  p.x = strided(x), p.y = strided(out.y), p.norm = norm_of(norm, x, out.normed, out.statistics, weight, bias, eps);
  if (sizes) p.merged = values(out.sizes);
  const OnDevice on(OP, x);
  run(p, plan(p, static_cast<int64_t>(x.element_size()), on.multiprocessors), x, false, on.stream);
  return {out.y, out.sizes, out.normed, out.statistics};
}

Tensor added(const Tensor& t, bool keep) {
  const int64_t first = 0;
  return torch::stable::sum(t, torch::headeronly::IntHeaderOnlyArrayRef(&first, 1), keep);
}

// The blocks' sums (blocks, 2, C) make the gradients of first and second: of each channel, or of all together.
void gather(const Tensor& sums, MergedGradients& out) {
  const Tensor total = added(sums, false);
  for (auto& [which, gradient] : {std::pair(0, &out.dfirst), {1, &out.dsecond}}) {
    if (gradient->numel() == 0) continue;
    const Tensor mine = torch::stable::select(total, 0, which);
    torch::stable::copy_(*gradient, gradient->size(0) == mine.size(0) ? mine : added(mine, true));
  }
}

std::tuple<Tensor, Tensor, Tensor, Tensor> merge_neighbours_bwd(
    Tensor dy, std::optional<Tensor> x, std::optional<Tensor> first, std::optional<Tensor> second,
    std::optional<Tensor> logits, std::optional<Tensor> sizes, int64_t height, int64_t width, bool vertical,
    int64_t prefix, double alpha, double beta) {
  const Grid grid{height, width, vertical};
  check_merge(dy, grid, grid.merged(), prefix, first, second, logits, sizes);
  MergedGradients out(dy, x, first, second, logits, grid, prefix);
  MergeNeighbours p = common(dy, grid, prefix, alpha, beta, first, second, logits, sizes);
  p.y = strided(dy), p.dx = strided(out.dx);
  if (x) p.x = strided(*x);
  if (x && logits) p.dlogits = values(out.dlogits);
  p.summed = out.dfirst.numel() || out.dsecond.numel();
  const OnDevice on(OP, dy);
  const Plan chosen = plan(p, static_cast<int64_t>(dy.element_size()), on.multiprocessors);
  if (!p.summed) {
    run(p, chosen, dy, true, on.stream);
  } else {
    const Tensor sums = new_tensor(dy, {chosen.blocks, 2, p.C}, wide_type(dy));
    p.sums = sums.data_ptr();
    run(p, chosen, dy, true, on.stream);
    gather(sums, out);
  }
  return {out.dx, out.dfirst, out.dsecond, out.dlogits};
}

}  // namespace
}  // namespace tokenops

STABLE_TORCH_LIBRARY_IMPL(tokenops, CUDA, m) {
  m.impl("merge_neighbours_fwd.native", TORCH_BOX(&tokenops::merge_neighbours_fwd));
  m.impl("merge_neighbours_bwd.native", TORCH_BOX(&tokenops::merge_neighbours_bwd));
}
